"""vLLM 0.9.1's server with a gate in front: `python -m fp8ctl.engines.hooks.vllm_server`.

Takes the arguments of `vllm.entrypoints.openai.api_server` and starts that
server, with

- the gate of `gate.py` around every route that generates,
- the push of `updates.py`,
- `GET /fp8ctl/state`, `GET /fp8ctl/code`, `POST /fp8ctl/report`, `POST /fp8ctl/inspect`
  and `POST /fp8ctl/update_weights_from_disk {"model_path": ...}`, behind the API
  key if there is one (vLLM itself asks for it under /v1 only),
- the API key from `FP8CTL_API_KEY`, which must not stand in argv,
- `vllm_worker.Extension` in every worker.

The module's top level runs again in every spawned child, as `__mp_main__`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sys
from contextlib import nullcontext
from typing import Any
from urllib.parse import parse_qs

from fp8ctl.engines.hooks import loaded, manifest, ranklog, report, vllm_worker
from fp8ctl.engines.hooks.gate import (
    App,
    Gate,
    GateMiddleware,
    Receive,
    Scope,
    Send,
    answer_json,
    below_root,
)
from fp8ctl.engines.hooks.memory import ALL
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.resting import quietly
from fp8ctl.engines.hooks.routes import PushRoutes, read_body
from fp8ctl.engines.hooks.updates import Updates
from fp8ctl.engines.hooks.vllm_ranks import Workers

vllm_worker.install()

STATE, CODE = "/fp8ctl/state", "/fp8ctl/code"
UPDATE = "/fp8ctl/update_weights_from_disk"
#: Routes of a server in development mode that give weights up or bring them back.
SLEEPING = frozenset({"/sleep", "/wake_up"})
_MAX_BODY = 1 << 20


class Control:
    """ASGI middleware: answers the routes of fp8ctl, passes everything else on."""

    def __init__(
        self,
        app: App,
        gate: Gate,
        plan: dict[str, Any],
        key: str | None,
        workers: Workers,
        updates: Updates,
        model: str = "",
    ) -> None:
        self._app = PushRoutes(app, updates)
        self._gate = gate
        self._plan = plan
        self._key = key
        self._workers = workers
        self._updates = updates
        self._model = model
        self._working: set[asyncio.Future[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        path = below_root(scope) if scope["type"] == "http" else ""
        routes = {
            ("GET", STATE): self._state,
            ("GET", CODE): self._code,
            ("POST", report.REPORT): self._report,
            ("POST", report.INSPECT): self._inspect,
            ("POST", UPDATE): self._update,
        }
        if path in SLEEPING:
            await self._sleep(path, scope, receive, send)
            return
        if not path.startswith("/fp8ctl/"):
            await self._app(scope, receive, send)
            return
        route = routes.get((scope["method"], path))
        if not self._may(scope):
            await answer_json(send, 401, {"error": "Unauthorized"})
        elif path.startswith("/fp8ctl/push/"):
            await self._app(scope, receive, send)
        elif route is None:
            await answer_json(send, 404, {"error": "Not Found"})
        else:
            await answer_json(send, *await route(receive))

    def _may(self, scope: Scope) -> bool:
        if not self._key:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())

    async def _state(self, _receive: Receive) -> tuple[int, object]:
        return self._gate.answer()

    async def _code(self, _receive: Receive) -> tuple[int, object]:
        return 200, await asyncio.to_thread(loaded.everyone, self._gate.ranks)

    async def _report(self, _receive: Receive) -> tuple[int, object]:
        memory = self._updates.memory
        return await report.answer(self._workers, self._gate, memory, self._plan, self._model)

    async def _inspect(self, receive: Receive) -> tuple[int, object]:
        try:
            body = await read_body(receive, _MAX_BODY)
        except RefusedError as e:
            return e.status, {"error": e.message}
        return await report.answer_more(self._workers, self._updates.memory, body)

    async def _update(self, receive: Receive) -> tuple[int, object]:
        try:
            path = json.loads(await read_body(receive, _MAX_BODY) or b"")["model_path"]
            if not isinstance(path, str):
                raise TypeError(f"model_path is {path!r}")
        except (ValueError, KeyError, TypeError, RefusedError) as e:
            told = f'expected {{"model_path": "/folder"}}: {e}'
            return 400, {"success": False, "message": told}
        # In a task of its own: a client that is gone must not leave half of it done.
        task = asyncio.ensure_future(self._updates.reload(path))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        try:
            outcome = await asyncio.shield(task)
        except RefusedError as e:
            status = 409 if e.id in ("FP8-BUSY", "FP8-RELEASED") else 400
            return status, {"success": False, "message": e.message, "missing": 0}
        return 200, {"success": True, "message": outcome.message, "missing": outcome.missing}

    async def _sleep(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        memory = self._updates.memory

        async def look(message: Any) -> None:
            if message.get("status") == 200 and self._workers.can_release:
                if path == "/sleep":
                    memory.give_up(ALL)
                else:
                    memory.bring_back(_woken(scope, memory.released))
                if drops(path, scope):
                    self._gate.lose("the weights were dropped for a sleep: push them again")
                    await quietly(self._workers.ask("forget"))
            await send(message)

        try:
            async with (
                self._updates.alone(path),
                memory.turn if path == "/sleep" else nullcontext(),
            ):
                await self._app(scope, receive, look)
        except RefusedError as e:
            await answer_json(send, e.status, e.body(self._gate.state))


def _woken(scope: Scope, released: frozenset[str]) -> frozenset[str]:
    """Return the parts that /wake_up brings back: vLLM ignores a list with one that is there."""
    tags = frozenset(_query(scope).get("tags", ()))
    return ALL if not tags else tags if tags <= released else frozenset()


def _query(scope: Scope) -> dict[str, list[str]]:
    return parse_qs(scope.get("query_string", b"").decode("latin-1"))


def drops(path: str, scope: Scope) -> bool:
    """Say whether a request gives the weights up: every sleep does that does not keep a copy."""
    asked = _query(scope).get("level", ["1"])
    return path == "/sleep" and asked[-1].strip() != "1"


def main(argv: list[str]) -> None:
    """Start the server; returns when it has ended."""
    if os.environ.get("FP8CTL_API_KEY"):
        os.environ.setdefault("VLLM_API_KEY", os.environ["FP8CTL_API_KEY"])
    import uvloop  # type: ignore[import-not-found]
    from vllm.entrypoints.openai import api_server
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.utils import cli_env_setup
    from vllm.platforms import current_platform
    from vllm.utils import FlexibleArgumentParser
    from vllm.version import __version__

    # From here on as in api_server's own `__main__`.
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(description=__doc__))
    args = parser.parse_args(argv)
    validate_parsed_serve_args(args)
    if args.worker_extension_cls not in ("", vllm_worker.EXTENSION):
        parser.error(f"--worker-extension-cls is fp8ctl's here, not {args.worker_extension_cls}")
    args.worker_extension_cls = vllm_worker.EXTENSION

    await_push = os.environ.get("FP8CTL_AWAIT_PUSH") == "1"
    gate = Gate(engine="vllm", engine_version=__version__, await_push=await_push)
    gate.ranks = args.tensor_parallel_size * args.pipeline_parallel_size
    build_app = api_server.build_app

    def build_gated_app(args: Any) -> Any:
        app = build_app(args)
        key = args.api_key or os.environ.get("VLLM_API_KEY")
        plan = manifest.read()
        workers = Workers(lambda: app.state.engine_client, int(gate.ranks or 1))
        device = current_platform.device_type
        updates = Updates(gate, workers, plan, device=device, folder=ranklog.run_dir())
        # The last one added is the outermost.
        app.add_middleware(
            Control,
            gate=gate,
            plan=plan,
            key=key,
            workers=workers,
            updates=updates,
            model=args.model,
        )
        app.add_middleware(GateMiddleware, gate=gate)
        return app

    api_server.build_app = build_gated_app
    uvloop.run(api_server.run_server(args))


if __name__ == "__main__":
    main(sys.argv[1:])
