"""The push routes over HTTP: bodies in, answers out, for either engine's web application."""

from __future__ import annotations

import asyncio
import json
import traceback
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from fp8ctl import wire
from fp8ctl.engines.hooks.gate import answer_json, below_root
from fp8ctl.engines.hooks.refused import RefusedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fp8ctl.engines.hooks.gate import App, Receive, Scope, Send
    from fp8ctl.engines.hooks.updates import Updates

    Body = dict[str, Any]

#: Of a request: the entries of a bucket with every tensor of a very large model.
MAX_BODY = 64 << 20


class PushRoutes:
    """ASGI middleware: answers the routes of a push, passes everything else on."""

    def __init__(self, app: App, updates: Updates) -> None:
        self._app = app
        self._updates = updates
        self._working: set[asyncio.Future[Any]] = set()
        self._routes: dict[tuple[str, str], Callable[[Body], Awaitable[Body]]] = {
            ("POST", wire.CONNECT): updates.connect,
            ("POST", wire.DISCONNECT): updates.disconnect,
            ("POST", wire.BEGIN): updates.begin,
            ("POST", wire.BUCKET): updates.bucket,
            ("POST", wire.END): updates.end,
            ("POST", wire.ABORT): updates.abort,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        path = below_root(scope) if scope["type"] == "http" else ""
        if not path.startswith("/fp8ctl/push/"):
            await self._app(scope, receive, send)
            return
        if (scope["method"], path) == ("GET", wire.LOG):
            query = scope.get("query_string", b"").decode("latin-1")
            await answer_json(send, *await self._log(query))
            return
        if (scope["method"], path) == ("GET", wire.PLAN):
            await answer_json(send, 200, {"manifest": self._updates.plan})
            return
        try:
            body = await read_body(receive, MAX_BODY)
        except RefusedError as e:
            await answer_json(send, e.status, e.body(self._updates.state))
            return
        if body is None:
            return  # the client is gone before it said what it wants
        # In a task of its own: a client that is gone must not leave half of it done.
        task = asyncio.ensure_future(self.answer(scope["method"], path, body))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        await answer_json(send, *await asyncio.shield(task))

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, Body]:
        """Answer a request; must not be cancelled.

        Args:
            method: of HTTP.
            path: as in `wire`.
            body: JSON.

        Returns:
            Status and body; never raises.
        """
        route = self._routes.get((method, path))
        try:
            if route is None:
                raise RefusedError(404, "FP8-WIRE", f"there is no {method} {path}")
            found = _object(body)
            with self._updates.hearing(found.get("push")):
                return 200, await route(found)
        except RefusedError as e:
            refused = e
        except wire.WireError as e:
            refused = RefusedError(400, "FP8-WIRE", str(e))
        except Exception as e:  # noqa: BLE001 - a fault of ours must be an answer, too
            traceback.print_exc()
            refused = RefusedError(500, "FP8-INTERNAL", f"{type(e).__name__}: {e}")
        return refused.status, refused.body(self._updates.state)

    async def _log(self, query: str) -> tuple[int, Body]:
        after = parse_qs(query).get("after", ["0"])[0]
        if not (after.isascii() and after.isdigit() and len(after) < 20):
            told = f"after={after!r:.40}; expected a number of lines"
            return 400, RefusedError(400, "FP8-WIRE", told).body(self._updates.state)
        lines, following = await asyncio.to_thread(self._updates.log.read, int(after))
        return 200, {"lines": lines, "next": following}


def _object(body: bytes) -> Body:
    try:
        found = json.loads(body)
    except ValueError as e:
        raise wire.WireError(f"the body is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise wire.WireError(f"the body is {type(found).__name__}; expected an object")
    return found


async def read_body(receive: Receive, most: int) -> bytes | None:
    """Return a request's body; None where its client went away.

    Raises:
        RefusedError: it is larger than `most` bytes.
    """
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise RefusedError(413, "FP8-WIRE", f"the body has more than {most} bytes")
        more = message.get("more_body", False)
    return b"".join(parts)
