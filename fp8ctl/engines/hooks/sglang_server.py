"""SGLang 0.4.8's server with a gate in front: `python -m fp8ctl.engines.hooks.sglang_server`.

Takes the arguments of `sglang.launch_server` and starts that server, with

- the gate of `gate.py` around every route that generates,
- the push of `updates.py`,
- `GET /fp8ctl/state`, `GET /fp8ctl/code`, `POST /fp8ctl/report` and `POST /fp8ctl/inspect`,
  behind the API key if there is one,
- the API key from `FP8CTL_API_KEY`, which must not stand in argv,
- what `sglang_worker` installs in the scheduler processes.

The module's top level runs again in every spawned child, as `__mp_main__`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import loaded, manifest, ranklog, report, sglang_worker
from fp8ctl.engines.hooks.evidence import worst
from fp8ctl.engines.hooks.gate import (
    App,
    Gate,
    GateMiddleware,
    Outcome,
    Receive,
    Scope,
    Send,
    answer_json,
    below_root,
)
from fp8ctl.engines.hooks.memory import WEIGHTS, released_by, resumed_by
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.resting import quietly
from fp8ctl.engines.hooks.routes import PushRoutes
from fp8ctl.engines.hooks.secret import Secret
from fp8ctl.engines.hooks.sglang_ranks import Workers
from fp8ctl.engines.hooks.updates import Updates

if TYPE_CHECKING:
    from collections.abc import Callable

sglang_worker.install()

FROM_DISK = "/update_weights_from_disk"
RELEASING, RESUMING = "/release_memory_occupation", "/resume_memory_occupation"
#: Routes that write weights; the gate is closed until their outcome is known.
UPDATING = frozenset(
    {
        FROM_DISK,
        "/update_weights_from_distributed",
        "/update_weights_from_tensor",
    }
)


class UpdateWatch:
    """ASGI middleware: tells the gate what becomes of the weights.

    Holds the answer of an update back until its outcome is known: a client that has
    its answer may generate at once. One update at a time, and none while a push is open.
    """

    def __init__(
        self, app: App, gate: Gate, workers: Workers, expected: list[str], updates: Updates
    ) -> None:
        self._app = app
        self._gate = gate
        self._workers = workers
        self._expected = expected
        self._updates = updates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; watch the routes that write weights or give them up."""
        if scope["type"] == "http":
            self._workers.listen()
            path = below_root(scope)
            watched = {RELEASING: self._release, RESUMING: self._resume}.get(path, self._update)
            if path in UPDATING or path in (RELEASING, RESUMING):
                try:
                    async with self._updates.alone(path):
                        memory = self._updates.memory
                        if path in UPDATING:
                            memory.require_weights()
                        async with memory.turn if path == RELEASING else nullcontext():
                            await watched(scope, receive, send)
                except RefusedError as e:
                    await answer_json(send, e.status, e.body(self._gate.state))
                return
        await self._app(scope, receive, send)

    async def _update(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Any] = []

        async def hold(message: Any) -> None:
            held.append(message)

        self._gate.begin_update()
        outcome = Outcome("failed", message="the update broke off")
        try:
            await self._app(scope, receive, hold)
            taken = bool(held) and held[0].get("status") == 200
            body = b"".join(m.get("body", b"") for m in held[1:])
            outcome = await self._outcome(below_root(scope), taken, body)
        finally:
            self._gate.end_update(outcome)
        if outcome.kind == "failed" and taken:
            # Rank 0 alone answers SGLang's request, and another rank failed.
            await answer_json(send, 500, {"success": False, "message": outcome.message})
            return
        for m in held:
            await send(m)

    async def _outcome(self, path: str, taken: bool, body: bytes) -> Outcome:
        # Whoever has all weights in place may send one tensor; the rest is there.
        expected = self._expected if self._gate.settled != "ready" else []
        answers = await self._workers.ask("progress", expected=expected)
        said = body.decode(errors="replace")[:500]
        if any(a["broken"] for a in answers):
            # Every rank counts from nothing: only a whole set makes the weights whole again.
            await self._workers.ask("forget")
            return Outcome("failed", message=said)
        if not taken:
            return Outcome("rejected", message=said)
        missing, names = worst(answers)
        if missing:
            told = f"{missing} tensors have not arrived, such as {names[0]}"
            return Outcome("applied", missing=missing, message=told)
        if not self._expected and self._gate.settled != "ready" and path != FROM_DISK:
            # Without a plan nobody knows what a whole set is, but a checkpoint is one.
            told = f"without a plan only {FROM_DISK} makes the weights whole again"
            return Outcome("applied", missing=1, message=told)
        return Outcome("applied")

    async def _release(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Close the gate when the memory of the weights is given up: resuming brings none back."""
        if not self._workers.can_release:
            await self._app(scope, receive, send)
            return
        request = _Watched(receive)

        async def look(message: Any) -> None:
            if request.answered(message) == 200:
                await given_up()
            await send(message)

        async def given_up() -> None:
            parts = released_by(request.body)
            self._updates.memory.give_up(parts)
            if WEIGHTS in parts:
                self._gate.lose("the memory of the weights was released: push them again")
                await quietly(self._workers.ask("forget"))

        try:
            await self._app(scope, request.receive, look)
        except BaseException:
            if not request.status:  # nobody knows how far it came
                await given_up()
            raise

    async def _resume(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note what of the memory is there again."""
        request = _Watched(receive)

        async def look(message: Any) -> None:
            if request.answered(message) == 200:
                self._updates.memory.bring_back(resumed_by(request.body))
            await send(message)

        await self._app(scope, request.receive, look)


class _Watched:
    """A request whose body and status are looked at on their way.

    Attributes:
        body: as far as it was read.
        status: of the answer; 0 before there is one.
    """

    def __init__(self, receive: Receive) -> None:
        self.body, self.status = b"", 0
        self._receive = receive

    async def receive(self) -> Any:
        message = await self._receive()
        self.body += message.get("body", b"")
        return message

    def answered(self, message: Any) -> int:
        """Return the status where an answer begins, else 0."""
        if message["type"] != "http.response.start":
            return 0
        self.status = int(message["status"])
        return self.status


def main(argv: list[str]) -> None:
    """Start the server; returns when it has ended."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree
    from sglang.version import __version__

    server_args = prepare_server_args(argv)
    key = server_args.api_key or os.environ.get("FP8CTL_API_KEY")
    server_args.api_key = Secret(key) if key else None
    if sglang_worker.LOADER not in server_args.custom_weight_loader:
        server_args.custom_weight_loader.append(sglang_worker.LOADER)

    await_push = os.environ.get("FP8CTL_AWAIT_PUSH") == "1"
    gate = Gate(engine="sglang", engine_version=__version__, await_push=await_push)
    gate.ranks = server_args.tp_size
    workers = Workers(http_server, server_args)
    plan = manifest.read()
    app = http_server.app

    @app.get("/fp8ctl/state")  # type: ignore[untyped-decorator]
    async def state() -> Any:
        status, body = gate.answer()
        return http_server.ORJSONResponse(body, status_code=status)

    @app.get("/fp8ctl/code")  # type: ignore[untyped-decorator]
    async def code() -> Any:
        return await asyncio.to_thread(loaded.everyone, gate.ranks)

    @app.post(report.REPORT)  # type: ignore[untyped-decorator]
    async def digests() -> Any:
        status, body = await report.answer(
            workers, gate, updates.memory, plan, server_args.model_path
        )
        return http_server.ORJSONResponse(body, status_code=status)

    async def inspect(request: Any) -> Any:
        status, body = await report.answer_more(workers, updates.memory, await request.body())
        return http_server.ORJSONResponse(body, status_code=status)

    app.add_route(report.INSPECT, inspect, methods=["POST"])
    updates = Updates(gate, workers, plan, device=str(server_args.device), folder=ranklog.run_dir())
    # The last one added is the outermost: the gate first, then the watch.
    app.add_middleware(PushRoutes, updates=updates)
    app.add_middleware(
        UpdateWatch,
        gate=gate,
        workers=workers,
        expected=manifest.expected_names(plan),
        updates=updates,
    )
    app.add_middleware(GateMiddleware, gate=gate)
    gate.started = False
    http_server._wait_and_warmup = _then_start(
        gate, _no_warmup if await_push else http_server._wait_and_warmup
    )
    try:
        http_server.launch_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _then_start(gate: Gate, warm_up: Callable[..., None]) -> Callable[..., None]:
    """Return `warm_up`, after which the gate has a state to tell."""

    @functools.wraps(warm_up)
    def run(*args: Any, **kwargs: Any) -> None:
        warm_up(*args, **kwargs)  # ends the process where it fails
        gate.started = True

    return run


def _no_warmup(*_args: object, **_kwargs: object) -> None:
    """Stand in for SGLang's warm-up, which generates and ends a server that answers 503."""
    sys.stderr.write("fp8ctl: the server is up and waits for its weights\n")


if __name__ == "__main__":
    main(sys.argv[1:])
