"""SGLang's app behind fp8ctl's watch and gate: the app is a function, the ranks are stand-ins."""

from __future__ import annotations

import asyncio
from typing import Any

from fp8ctl.engines.hooks.gate import Gate, GateMiddleware
from fp8ctl.engines.hooks.sglang_server import UpdateWatch
from fp8ctl.engines.hooks.updates import Updates

EXPECTED = ["a.weight", "a.weight_scale_inv", "norm.weight"]
FORGET: tuple[str, dict[str, Any]] = ("forget", {})
COMPLETE = {"broken": False, "unfilled": {}, "missing": [], "missing_count": 0}
BROKEN = {**COMPLETE, "broken": True, "missing": ["a.weight"], "missing_count": 3}
PART = {**COMPLETE, "missing": ["norm.weight"], "missing_count": 1}
UNFILLED = {**COMPLETE, "unfilled": {"a.weight": "rows 2-3", "b.weight": "rows 0-3"}}
DISK = "/update_weights_from_disk"
TENSOR = "/update_weights_from_tensor"
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


class Asked:
    """Stands in for `Workers`: answers what it was given, and notes the questions."""

    def __init__(self, *answers: dict[str, Any], error: Exception | None = None) -> None:
        self.answers = answers
        self.error = error
        self.can_release = True
        self.ranks = len(answers)
        self.questions: list[tuple[str, dict[str, Any]]] = []
        self.listening = 0

    def listen(self) -> None:
        self.listening += 1

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        self.questions.append((what, details))
        if self.error is not None:
            raise self.error
        if what == "forget":
            return []
        return list(self.answers)


class Server:
    """SGLang's app behind the watch and the gate.

    Attributes:
        seen: the gate's state as the app ran, and as each message left for the client.
    """

    def __init__(
        self,
        *answers: dict[str, Any],
        await_push: bool = True,
        status: int = 200,
        parts: tuple[bytes, ...] = (b'{"success": true}',),
        raises: Exception | None = None,
        error: Exception | None = None,
        expected: list[str] = EXPECTED,
    ) -> None:
        self.inside = self.most = 0
        self.gate = Gate(engine="sglang", engine_version="0.4.8", await_push=await_push)
        self.workers = Asked(*answers, error=error)
        self.seen: list[str] = []

        async def engine(scope: Any, receive: Any, send: Any) -> None:
            self.seen.append(self.gate.state)
            self.inside += 1
            self.most = max(self.most, self.inside)
            await receive()
            await asyncio.sleep(0)
            self.inside -= 1
            if raises is not None:
                raise raises
            await send({"type": "http.response.start", "status": status, "headers": []})
            for i, part in enumerate(parts):
                more = i < len(parts) - 1
                await send({"type": "http.response.body", "body": part, "more_body": more})

        self.engine = engine
        workers: Any = self.workers
        self.updates = Updates(self.gate, workers, {}, device="cpu", folder=None)
        watch = UpdateWatch(engine, self.gate, workers, expected, self.updates)
        self._app = GateMiddleware(watch, self.gate)

    def ask(self, path: str, kind: str = "http", body: bytes = b"") -> tuple[int, bytes]:
        return asyncio.run(self.ask_soon(path, kind, body))

    async def at_once(self, *paths: str) -> int:
        """Send requests together; return how many were in the engine at a time."""
        self.most = 0
        await asyncio.gather(*(self.ask_soon(path) for path in paths))
        return self.most

    async def ask_soon(self, path: str, kind: str = "http", body: bytes = b"") -> tuple[int, bytes]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            self.seen.append(self.gate.state)
            sent.append(message)

        await self._app({"type": kind, "method": "POST", "path": path}, receive, send)
        return sent[0]["status"], b"".join(m["body"] for m in sent[1:])

    @property
    def message(self) -> str:
        return str(self.gate.describe()["message"])
