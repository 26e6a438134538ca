"""vLLM 0.9.1's server with a gate in front: `python -m fp8ctl.engines.hooks.vllm_server`.

Takes the arguments of `vllm.entrypoints.openai.api_server` and starts that
server, with

- the gate of `gate.py` around every route that generates,
- `GET /fp8ctl/state`, `GET /fp8ctl/code`, `POST /fp8ctl/report` and
  `POST /fp8ctl/update_weights_from_disk {"model_path": ...}`, behind the API
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
import time
from typing import Any, Protocol

from fp8ctl.engines.hooks import loaded, manifest, vllm_worker
from fp8ctl.engines.hooks.gate import (
    App,
    Gate,
    GateMiddleware,
    Outcome,
    Receive,
    Scope,
    Send,
    answer_json,
)

vllm_worker.install()

STATE, CODE, REPORT = "/fp8ctl/state", "/fp8ctl/code", "/fp8ctl/report"
UPDATE = "/fp8ctl/update_weights_from_disk"
#: Seconds that an update waits for the requests that were running when it came.
DRAIN_WITHIN = 600.0
_MAX_BODY = 1 << 20


class Engine(Protocol):
    """What is used of vLLM's AsyncLLM."""

    output_processor: Any

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        """Call a method of every worker and return the answers by rank."""
        ...

    async def reset_prefix_cache(self) -> None:
        """Forget cached keys and values: they are of the old weights."""
        ...


class Control:
    """ASGI middleware: answers the routes of fp8ctl, passes everything else on."""

    def __init__(self, app: App, gate: Gate, plan: dict[str, Any], key: str | None) -> None:
        self._app = app
        self._gate = gate
        self._plan = plan
        self._key = key
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        routes = {
            ("GET", STATE): self._state,
            ("GET", CODE): self._code,
            ("POST", REPORT): self._report,
            ("POST", UPDATE): self._update,
        }
        if scope["type"] != "http" or not scope["path"].startswith("/fp8ctl/"):
            await self._app(scope, receive, send)
            return
        route = routes.get((scope["method"], scope["path"]))
        if not self._may(scope):
            await answer_json(send, 401, {"error": "Unauthorized"})
        elif route is None:
            await answer_json(send, 404, {"error": "Not Found"})
        else:
            await answer_json(send, *await route(scope, receive))

    def _may(self, scope: Scope) -> bool:
        if not self._key:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())

    async def _state(self, _scope: Scope, _receive: Receive) -> tuple[int, object]:
        return self._gate.answer()

    async def _code(self, _scope: Scope, _receive: Receive) -> tuple[int, object]:
        return 200, await asyncio.to_thread(loaded.everyone, self._gate.ranks)

    async def _report(self, scope: Scope, _receive: Receive) -> tuple[int, object]:
        try:
            ranks = await self._ask(scope, "fp8ctl_report")
            failed = [f"rank {r['rank']}: {r['error']}" for r in ranks if r.get("error")]
        except Exception as e:  # noqa: BLE001 - whatever the engine raises is the answer
            ranks, failed = [], [f"{type(e).__name__}: {e}"]
        if failed:
            return 500, {"error": "; ".join(failed)}
        return 200, {"state": self._gate.describe(), "manifest": self._plan, "ranks": ranks}

    async def _update(self, scope: Scope, receive: Receive) -> tuple[int, object]:
        try:
            path = json.loads(await _body(receive))["model_path"]
            if not isinstance(path, str):
                raise TypeError(f"model_path is {path!r}")
        except (ValueError, KeyError, TypeError) as e:
            told = f'expected {{"model_path": "/folder"}}: {e}'
            return 400, {"success": False, "message": told}
        async with self._one_at_a_time:
            self._gate.begin_update()
            outcome = Outcome("failed", message="the update broke off")
            try:
                outcome = await self._load(scope, path)
            except Exception as e:  # noqa: BLE001 - whatever the engine raises is the answer
                outcome = Outcome("failed", message=f"{type(e).__name__}: {e}")
            finally:
                self._gate.end_update(outcome)
        ok = outcome.kind == "applied"
        answer = {"success": ok, "message": outcome.message, "missing": outcome.missing}
        return 200 if ok else 400, answer

    async def _load(self, scope: Scope, path: str) -> Outcome:
        # Whoever has all weights in place may send a part; the rest is there.
        expected = manifest.expected_names(self._plan) if self._gate.settled != "ready" else []
        engine = self._engine(scope)
        until = time.monotonic() + DRAIN_WITHIN
        while self._gate.in_flight or engine.output_processor.has_unfinished_requests():
            if time.monotonic() > until:
                told = f"requests still run after {DRAIN_WITHIN:.0f} s"
                return Outcome("rejected", message=told)
            await asyncio.sleep(0.02)
        answers = await self._ask(scope, "fp8ctl_load_from_disk", path, expected)
        # Keys and values of the old weights; none is in use, so vLLM does not refuse.
        await engine.reset_prefix_cache()
        errors = [f"rank {a['rank']}: {a['error']}" for a in answers if a["error"]]
        if errors:
            await self._ask(scope, "fp8ctl_forget")
            started = any(a["broken"] or not a["error"] for a in answers)
            return Outcome("failed" if started else "rejected", message="; ".join(errors))
        worst = max(answers, key=lambda a: int(a["missing_count"]) + len(a["unfilled"]))
        missing = int(worst["missing_count"]) + len(worst["unfilled"])
        if not missing:
            return Outcome("applied")
        first = [*worst["missing"], *worst["unfilled"]][0]
        told = f"{missing} tensors have not arrived, such as {first}"
        return Outcome("applied", missing=missing, message=told)

    def _engine(self, scope: Scope) -> Engine:
        engine = scope["app"].state.engine_client
        if not hasattr(engine, "collective_rpc"):
            raise RuntimeError(
                "this is vLLM's V0 engine, which reaches no worker; unset VLLM_USE_V1"
            )
        found: Engine = engine
        return found

    async def _ask(self, scope: Scope, method: str, *args: object) -> list[dict[str, Any]]:
        return await self._engine(scope).collective_rpc(method, args=args)


async def _body(receive: Receive) -> bytes:
    body = b""
    more = True
    while more and len(body) <= _MAX_BODY:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def main(argv: list[str]) -> None:
    """Start the server; returns when it has ended."""
    if os.environ.get("FP8CTL_API_KEY"):
        os.environ.setdefault("VLLM_API_KEY", os.environ["FP8CTL_API_KEY"])
    import uvloop  # type: ignore[import-not-found]
    from vllm.entrypoints.openai import api_server
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.utils import cli_env_setup
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
        # The last one added is the outermost.
        app.add_middleware(Control, gate=gate, plan=manifest.read(), key=key)
        app.add_middleware(GateMiddleware, gate=gate)
        return app

    api_server.build_app = build_gated_app
    uvloop.run(api_server.run_server(args))


if __name__ == "__main__":
    main(sys.argv[1:])
