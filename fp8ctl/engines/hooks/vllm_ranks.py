"""vLLM 0.9.1's workers and engine core, as its server asks them.

The `workers.Workers` of a push. Workers are asked by `collective_rpc`, the engine core by utility
calls (`vllm_holding`). No such call may be cancelled: vLLM takes an answer that nobody waits for
as the death of its engine.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any, Protocol

from fp8ctl.engines.hooks.workers import Reloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    from fp8ctl.wire import InFlight

#: Seconds for every rank to answer: digests of a large model, a trainer that joins a group.
ANSWER_WITHIN = 1800.0
#: Seconds between two looks whether requests have ended, and whether the engine lives.
_LOOK, _LOOK_FOR_DEATH = 0.005, 1.0


class Engine(Protocol):
    """What is used of vLLM's AsyncLLM."""

    output_processor: Any
    engine_core: Any
    errored: bool

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        """Call a method of every worker and return the answers by rank."""
        ...


class Workers:
    """All ranks of this server, and the core that drives them.

    Attributes:
        ranks: how many.
    """

    def __init__(self, engine: Callable[[], Any], ranks: int) -> None:
        """Say how to find the engine.

        Args:
            engine: returns vLLM's client of it; asked when there is a question.
            ranks: how many workers it has.
        """
        self.ranks = ranks
        self._find = engine
        self._calls: set[asyncio.Future[Any]] = set()

    @property
    def engine(self) -> Engine:
        """VLLM's client of the engine.

        Raises:
            RuntimeError: it is another one than V1's.
        """
        engine: Engine = self._find()
        if not hasattr(engine, "collective_rpc"):
            raise RuntimeError(
                "this is vLLM's V0 engine, which reaches no worker; unset VLLM_USE_V1"
            )
        return engine

    @property
    def can_release(self) -> bool:
        """Whether vLLM can give the memory of its weights up: without sleep mode it does not."""
        config = getattr(self.engine, "model_config", None)
        return bool(getattr(config, "enable_sleep_mode", True))

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        """Return one answer per rank, in the order of ranks.

        Args:
            what: as in `workers.Workers`, and for this engine "reload".
            details: of the question, in JSON types.

        Raises:
            RuntimeError: a rank failed or did not answer in time.
        """
        asked = self.engine.collective_rpc("fp8ctl_ask", args=(what, json.dumps(details)))
        answers: list[dict[str, Any]] = await self._whole(asked)
        failed = [f"rank {a['rank']}: {a['failed']}" for a in answers if "failed" in a]
        if failed:
            raise RuntimeError("; ".join(failed))
        return answers

    async def load_from_disk(self, path: str) -> Reloaded:
        """Have every rank load a folder of safetensors."""
        answers = await self.ask("reload", path=path)
        wrong = [f"rank {a['rank']}: {a['error']}" for a in answers if a["error"]]
        changed = any(a["broken"] or not a["error"] for a in answers)
        return Reloaded(not wrong, "; ".join(wrong), changed)

    async def hold(self, in_flight: InFlight, within: float) -> None:
        """Bring the engine to rest, as `workers.Workers` says.

        Raises:
            TimeoutError: requests still run after `within` seconds.
            RuntimeError: the engine cannot be held so.
        """
        if in_flight == "abort":
            await self._whole(self._abort())  # else requests are gone, and nobody tells
        elif in_flight == "pause":
            await self._core("fp8ctl_hold", "pause")
        else:
            await self._finish(within)

    async def resume(self, trust: Sequence[str] = ()) -> str:
        """Let the engine compute again, and trust what was proven; as `workers.Workers` says."""
        telling = [self.ask("trust", names=list(trust))] if trust else []
        # The core takes messages in their order: the ranks trust before it computes.
        *told, resumed = await asyncio.gather(
            *telling, self._core("fp8ctl_resume"), return_exceptions=True
        )
        if isinstance(resumed, BaseException):
            raise resumed
        return "".join(f"{type(e).__name__}: {e}" for e in told if isinstance(e, BaseException))

    async def receive(
        self, details: Mapping[str, Any], then: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Ask "receive", and with the last bucket what `settle` asks."""
        if then is None:
            return await self.ask("receive", **details)
        return await self._and_flush(self.ask("receive", **details, then=then))

    async def settle(self, **details: Any) -> list[dict[str, Any]]:
        """Ask "progress"; the core is told to forget keys and values before it, without a wait."""
        return await self._and_flush(self.ask("progress", **details))

    async def _and_flush(
        self, question: Coroutine[Any, Any, list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        # The core takes them in this order: nothing is left to do when the last rank has answered.
        flushing = asyncio.ensure_future(self.flush())
        asking = asyncio.ensure_future(question)
        await asyncio.wait({asking, flushing})
        stuck = flushing.exception()
        answers = asking.result()  # why the ranks failed comes first
        if stuck is not None:
            raise stuck
        return answers

    async def flush(self) -> None:
        """Forget all keys and values."""
        await self._core("fp8ctl_flush")

    async def _finish(self, within: float) -> None:
        """Wait for what runs; what comes late, before the core rests, is waited for too."""
        until = time.monotonic() + within
        while True:
            processor = self.engine.output_processor
            idle = not processor.has_unfinished_requests()
            if idle and (await self._core("fp8ctl_hold", "finish"))["held"]:
                return
            if time.monotonic() > until:
                running = processor.get_num_unfinished_requests()
                raise TimeoutError(f"{running} requests still run after {within:g} s")
            await asyncio.sleep(_LOOK)

    async def _abort(self) -> None:
        """Drop all requests of the core, and tell their clients what they have so far."""
        engine = self.engine
        # The core has heard of all of these: messages keep their order.
        known = list(engine.output_processor.request_states)
        await self._core("fp8ctl_hold", "abort")
        # What the core gave before it came to rest is on its way to the clients.
        while not engine.engine_core.outputs_queue.empty() and not engine.errored:
            await asyncio.sleep(0)
        await asyncio.sleep(_LOOK)
        _tell(engine.output_processor, known)

    async def _core(self, method: str, *args: object) -> dict[str, Any]:
        core = self.engine.engine_core
        answer: dict[str, Any] = await self._whole(core.call_utility_async(method, *args))
        return answer

    async def _whole(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a call that goes on where its caller is cancelled or gives up.

        Raises:
            RuntimeError: it failed, the engine died, or it takes too long.
        """
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        task.add_done_callback(self._done)
        until = time.monotonic() + ANSWER_WITHIN
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_FOR_DEATH)
            if not task.done() and self.engine.errored:
                raise RuntimeError("vLLM's engine has died")
            if not task.done() and time.monotonic() > until:
                raise RuntimeError(f"the engine did not answer within {ANSWER_WITHIN:.0f} s")
        error = task.exception()
        if error is not None:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return task.result()

    def _done(self, task: asyncio.Future[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # seen, whether or not somebody still waits


def _tell(processor: Any, request_ids: Iterable[str]) -> None:
    """End requests towards their clients: with what was generated, for the reason "abort"."""
    from vllm.v1.engine import FinishReason

    for request_id in request_ids:
        state = processor.request_states.get(request_id)
        if state is None:
            continue  # it has ended meanwhile
        output = state.make_request_output([], FinishReason.ABORT, None)
        if output is not None and state.queue is not None:
            state.queue.put(output)
        processor.abort_requests([request_id])
        parent = state.parent_req
        if parent is not None and not parent.child_requests:
            processor.parent_requests.pop(parent.request_id, None)
