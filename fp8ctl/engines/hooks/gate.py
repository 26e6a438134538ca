"""The gate in front of a server: no answer from weights that are not there.

One state per server: `ready`, `unpushed` (FP8 weights were announced and have
not all arrived), `updating`, `failed` (an update broke off half-way). Routes
that generate answer 503 in the last three, so a trainer's client retries
instead of learning from garbage. A plain ASGI middleware: it needs neither
engine nor web framework.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from fp8ctl import __version__

State = Literal["ready", "unpushed", "updating", "failed"]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: What SGLang 0.4.8 and vLLM 0.9.1 answer without asking the weights, or what an operator
#: and a trainer need while the weights are not there. Everything else is held back: a
#: route that nobody thought of must not answer from garbage.
OPEN = frozenset(
    {
        "/",
        "/abort_request",
        "/close_session",
        "/configure_logging",
        "/detokenize",
        "/docs",
        "/dump_expert_distribution_record",
        "/flush_cache",
        "/get_load",
        "/get_model_info",
        "/get_server_info",
        "/get_weights_by_name",
        "/health",
        "/init_weights_update_group",
        "/is_sleeping",
        "/load",
        "/metrics",
        "/open_session",
        "/openapi.json",
        "/parse_function_call",
        "/ping",
        "/release_memory_occupation",
        "/reset_prefix_cache",
        "/resume_memory_occupation",
        "/separate_reasoning",
        "/server_info",
        "/set_internal_state",
        "/sleep",
        "/slow_down",
        "/start_expert_distribution_record",
        "/start_profile",
        "/stop_expert_distribution_record",
        "/stop_profile",
        "/tokenize",
        "/update_weights_from_disk",
        "/update_weights_from_distributed",
        "/update_weights_from_tensor",
        "/v1/load_lora_adapter",
        "/v1/models",
        "/v1/unload_lora_adapter",
        "/version",
        "/wake_up",
    }
)
_OPEN_BELOW = ("/fp8ctl/", "/metrics/", "/v1/models/")


@dataclass(frozen=True)
class Outcome:
    """How an update ended.

    Attributes:
        kind: "applied"; "failed": half of it may be in place; "rejected": nothing changed.
        missing: how many tensors or parameters have no loaded value yet.
        message: what went wrong or is missing, for people.
    """

    kind: Literal["applied", "failed", "rejected"]
    missing: int = 0
    message: str = ""


class Gate:
    """The state of one server, and the middleware that acts on it.

    Attributes:
        engine: "sglang" or "vllm".
        engine_version: as the engine says it.
        await_push: True where the server was started to wait for its weights.
        ranks: number of workers, once known.
        started: False while the engine warms itself up: it has no state to tell yet,
            and its own requests must pass.
        about: what others add to the state: of pushes, for instance.
    """

    def __init__(self, *, engine: str, engine_version: str, await_push: bool) -> None:
        self.engine = engine
        self.engine_version = engine_version
        self.await_push = await_push
        self.ranks: int | None = None
        self.started = True
        self.about: dict[str, object] = {}
        self._lock = threading.Lock()
        self._updates = 0
        self._updates_done = 0
        self._in_flight = 0
        self._losses = 0
        self._settled: State = "unpushed" if await_push else "ready"
        self._message = "no complete set of weights has been pushed yet" if await_push else ""

    @property
    def state(self) -> State:
        """The state now."""
        with self._lock:
            return "updating" if self._updates else self._settled

    @property
    def settled(self) -> State:
        """The state that holds but for updates on their way."""
        with self._lock:
            return self._settled

    @property
    def updates(self) -> int:
        """How many updates have changed weights."""
        with self._lock:
            return self._updates_done

    @property
    def in_flight(self) -> int:
        """How many requests have passed the gate and are not answered yet."""
        with self._lock:
            return self._in_flight

    def begin_update(self) -> None:
        """Close the gate for an update; every call is ended by `end_update`."""
        with self._lock:
            self._updates += 1

    def end_update(self, outcome: Outcome) -> None:
        """Settle the state that follows from how an update ended."""
        with self._lock:
            self._updates -= 1
            if outcome.kind == "rejected":
                return
            self._updates_done += 1
            self._message = outcome.message
            if outcome.kind == "failed":
                self._settled = "failed"
            else:
                self._settled = "unpushed" if outcome.missing else "ready"
            self._losses += self._settled != "ready"

    def answer(self) -> tuple[int, dict[str, object]]:
        """Return status and body of `GET /fp8ctl/state`: 503 until the engine has started."""
        if self.started:
            return 200, self.describe()
        return 503, {**self.describe(), "state": "starting", "message": "the engine warms up"}

    def describe(self) -> dict[str, object]:
        """Return the state and what it is the state of."""
        state = self.state
        with self._lock:
            return {
                "state": state,
                "message": "an update is on its way" if state == "updating" else self._message,
                "engine": self.engine,
                "engine_version": self.engine_version,
                "fp8ctl": __version__,
                "python": platform.python_version(),
                "torch": getattr(sys.modules.get("torch"), "__version__", None),
                "pid": os.getpid(),
                "await_push": self.await_push,
                "updates": self._updates_done,
                "ranks": self.ranks,
                **self.about,
            }

    def lose(self, message: str) -> None:
        """Close the gate because the weights are gone: they were released, for instance."""
        with self._lock:
            self._settled, self._message = "unpushed", message
            self._losses += 1

    def wrap(self, app: App) -> App:
        """Return `app` behind this gate."""

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or is_open(scope):
                await app(scope, receive, send)
                return
            if self.state != "ready":
                await self._refuse(send)
                return
            with self._lock:
                self._in_flight += 1
            try:
                await app(scope, receive, self._unless_lost(send))
            finally:
                with self._lock:
                    self._in_flight -= 1

        return gated

    def _unless_lost(self, send: Send) -> Send:
        """Return `send`, but refuse where the weights were lost since the request came in.

        An answer that is on its way then ends where it is: the rest would be of another set.
        So it is where they are whole again by now: it may have been computed in between.
        """
        started = over = False
        losses = self._losses

        async def checked(message: MutableMapping[str, Any]) -> None:
            nonlocal started, over
            if over:
                return
            over = self._losses != losses
            if not over:
                started = True
                await send(message)
            elif not started:
                await self._refuse(send)
            else:
                await send({"type": "http.response.body", "body": b""})

        return checked

    async def _refuse(self, send: Send) -> None:
        about = self.describe()
        error = {"id": "FP8-GATE", "state": about["state"], "message": about["message"]}
        await answer_json(send, 503, {"error": error}, (b"retry-after", b"1"))


async def answer_json(send: Send, status: int, data: object, *more: tuple[bytes, bytes]) -> None:
    """Answer a request by itself."""
    body = json.dumps(data).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def below_root(scope: Scope) -> str:
    """Return the path of a request below the app's root."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def is_open(scope: Scope) -> bool:
    """Say whether a request needs no weights, by its path below the app's root."""
    path = below_root(scope)
    return path in OPEN or path.startswith(_OPEN_BELOW) or scope.get("method") == "OPTIONS"


class GateMiddleware:
    """`Gate.wrap` in the form in which Starlette takes a middleware."""

    def __init__(self, app: App, gate: Gate) -> None:
        self._gated = gate.wrap(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        await self._gated(scope, receive, send)
