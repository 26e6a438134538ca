"""SGLang 0.4.8's scheduler processes, as its server asks them.

The `workers.Workers` of a push. A question goes the way of a weight update with our
custom loader (`sglang_worker.load`), by SGLang's own communicator: not through its
route's lock, which waits for requests that run and would never end for paused ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import ranklog, sglang_worker
from fp8ctl.engines.hooks.workers import Reloaded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fp8ctl.wire import InFlight

#: Seconds for every rank to answer: digests of a large model, a trainer that joins a group.
ANSWER_WITHIN = 1800.0
#: Seconds that an answer which did not come in time may still take when the next one is asked.
GRACE = 10.0
#: Seconds between two looks for an answer of another rank; rank 0's comes with SGLang's own.
_LOOK = 0.001
#: Seconds between two looks whether requests have ended.
_LOOK_FOR_REST = 0.005


class Workers:
    """All ranks of this server.

    Attributes:
        ranks: how many.
        can_release: whether SGLang can give the memory of its weights up.
    """

    def __init__(self, http_server: Any, server_args: Any) -> None:
        self._http_server = http_server
        self._one_at_a_time = asyncio.Lock()
        #: A question that was not answered in time.
        self._late: asyncio.Future[list[Any]] | None = None
        self.ranks: int = server_args.tp_size
        #: Without the memory saver, releasing gives nothing up.
        self.can_release = bool(server_args.enable_memory_saver)

    @property
    def _manager(self) -> Any:
        return self._http_server._global_state.tokenizer_manager

    def listen(self) -> None:
        """Have the tokenizer manager read the schedulers' answers; needs the event loop.

        SGLang starts that with the first request that generates, and a server that
        awaits its weights gets none: routes such as /get_server_info would hang.
        """
        self._manager.auto_create_handle_loop()

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        """Return one answer per rank, in the order of ranks.

        Args:
            what: as in `workers.Workers`, and for this engine "hold", "resume", "flush"
                and "reload".
            details: of the question, in JSON types.

        Raises:
            RuntimeError: the engine refused, a rank failed or did not answer in time.
        """
        # A question that is cancelled half-way would leave SGLang's communicator waiting for
        # its answer, and all questions after it.
        asking = asyncio.ensure_future(self._ask(what, details))
        return await asyncio.shield(asking)

    async def _ask(self, what: str, details: dict[str, Any]) -> list[dict[str, Any]]:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        folder = ranklog.run_dir()
        if folder is None:
            raise RuntimeError(f"{ranklog.RUN_DIR} is not set: there is no place for answers")
        number = uuid.uuid4().hex
        asked = json.dumps({**details, "id": number, "what": what}).encode()
        payload = MultiprocessingSerializer.serialize(
            [(sglang_worker.QUESTION, sglang_worker.Question(asked))]
        )
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[payload] * self.ranks,
            load_format=sglang_worker.LOADER,
            flush_cache=False,
        )
        try:
            async with self._one_at_a_time:
                results = await self._heard(request)
            if len(results) > 1:
                why = "data parallelism: one server would have several sets of weights"
                raise RuntimeError(why)
            [result] = results
            if not result.success:
                raise RuntimeError(result.message)
            answers = [_first(result.message, number)]
            answers += [await _read(_answer(folder, number, r)) for r in range(1, self.ranks)]
        finally:
            self._forget(folder, number)
        failed = [f"rank {a['rank']}: {a['failed']}" for a in answers if "failed" in a]
        if failed:
            raise RuntimeError("; ".join(failed))
        return answers

    async def _heard(self, request: Any) -> list[Any]:
        """Return what the schedulers answer; SGLang waits for that without an end.

        Raises:
            RuntimeError: they do not, or not even to the question before.
        """
        late = self._late
        if late is not None:
            # SGLang's communicator takes the next question when it has the answer to this one.
            await asyncio.wait({late}, timeout=GRACE)
            if not late.done():
                raise RuntimeError("the schedulers have not answered the question before")
            self._late = None
        self.listen()
        call = self._manager.update_weights_from_tensor_communicator(request)
        asked: asyncio.Future[list[Any]] = asyncio.ensure_future(call)
        await asyncio.wait({asked}, timeout=ANSWER_WITHIN)
        if not asked.done():
            self._late = asked
            raise RuntimeError(f"the schedulers did not answer within {ANSWER_WITHIN:.0f} s")
        return asked.result()

    def _forget(self, folder: Path, number: str) -> None:
        """Remove the answers to a question; those that are yet to come, when they have."""

        def remove(_: object = None) -> None:
            for rank in range(1, self.ranks):
                _answer(folder, number, rank).unlink(missing_ok=True)

        remove()
        if self._late is not None and not self._late.done():
            self._late.add_done_callback(remove)

    async def load_from_disk(self, path: str) -> Reloaded:
        """Have every rank load a folder, by the engine's own code."""
        answers = await self.ask("reload", path=path)
        wrong = [f"rank {a['rank']}: {a['message']}" for a in answers if not a["ok"]]
        return Reloaded(not wrong, "; ".join(wrong), any(a["changed"] for a in answers))

    async def hold(self, in_flight: InFlight, within: float) -> None:
        """Bring all ranks to rest at the same step, as `workers.Workers` says.

        Raises:
            TimeoutError: requests still run after `within` seconds.
            RuntimeError: the schedulers cannot be held.
        """
        if in_flight != "finish":
            await self.ask("hold", how=in_flight)
            return
        until = time.monotonic() + within
        while True:
            running = len(self._manager.rid_to_state)
            # One that came since is let finish, too: it would be of two sets of weights.
            if not running and all(a["held"] for a in await self.ask("hold", how="finish")):
                return
            if time.monotonic() > until:
                raise TimeoutError(f"{running or 'some'} requests still run after {within:g} s")
            await asyncio.sleep(_LOOK_FOR_REST)

    async def resume(self, trust: Sequence[str] = ()) -> str:
        """Let all ranks compute again, and trust what was proven; as `workers.Workers` says."""
        answers = await self.ask("resume", **({"trust": list(trust)} if trust else {}))
        wrong = [f"rank {a['rank']}: {a['distrusts']}" for a in answers if a.get("distrusts")]
        return "; ".join(wrong)

    async def receive(
        self, details: Mapping[str, Any], then: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Ask "receive", and with the last bucket what `settle` asks."""
        last = {} if then is None else {"then": then, "flush": True}
        return await self.ask("receive", **details, **last)

    async def settle(self, **details: Any) -> list[dict[str, Any]]:
        """Ask "progress"; a scheduler forgets its keys and values as it is asked."""
        return await self.ask("progress", **details, flush=True)

    async def flush(self) -> None:
        """Forget all keys and values."""
        await self.ask("flush")


def _answer(folder: Path, question: str, rank: int) -> Path:
    return folder / "reports" / f"{question}.{rank}.json"


def _first(message: str, question: str) -> dict[str, Any]:
    """Return rank 0's answer, which SGLang's own brings.

    Raises:
        RuntimeError: there is none to this question.
    """
    with contextlib.suppress(ValueError):
        answer = json.loads(message)
        if isinstance(answer, dict) and answer.pop("id", None) == question:
            return answer
    raise RuntimeError(f"rank 0 did not answer what it was asked: {message:.200}")


async def _read(path: Path) -> dict[str, Any]:
    """Return an answer when it is there: rank 0 answers the request, others may be later."""
    until = time.monotonic() + ANSWER_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            raise RuntimeError(f"no {path.name} within {ANSWER_WITHIN:.0f} s")
        await asyncio.sleep(_LOOK)
    answer: dict[str, Any] = json.loads(path.read_text())
    return answer
