"""The versions that were pushed to a server, from its log: digests by name.

Called by `weights` where something differs: an older version is a fault that has a name.
"""

from __future__ import annotations

import http.client
import json
import time
from typing import TYPE_CHECKING, Any

from fp8ctl import gate, wire
from fp8ctl.check.looks import Version

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Seconds for the whole log, and for one answer.
_PATIENCE, _TIMEOUT = 30.0, 30.0
_LIMIT = 256 << 20


def pushed(url: str, api_key: str | None) -> list[Version]:
    """Return the versions of a server's log, the oldest first; none where it has no log."""
    return list(group(_lines(url, api_key)))


def group(lines: Iterable[dict[str, Any]]) -> Iterator[Version]:
    """Yield the updates whose weights may be in place: not those that were rejected."""
    digests: dict[str, int] = {}
    for line in lines:
        if line.get("kind") == "tensor":
            text = str(line.get("digest") or "")
            if len(text) == 16:
                digests[str(line.get("name"))] = int(text, 16)
        elif line.get("kind") == "update":
            outcome = str(line.get("outcome"))
            if outcome != "rejected":
                broke = "" if outcome == "applied" else ", which broke off"
                yield Version(f"version {line.get('version')}{broke}", digests)
            digests = {}


def _lines(url: str, api_key: str | None) -> Iterator[dict[str, Any]]:
    until = time.monotonic() + _PATIENCE
    after = 0
    while time.monotonic() < until:
        try:
            status, body = gate.get(url, f"{wire.LOG}?after={after}", api_key, _TIMEOUT, _LIMIT)
            found = json.loads(body) if status == 200 else {}
            lines, following = found["lines"], int(found["next"])
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):
            return
        yield from (line for line in lines if isinstance(line, dict))
        if not lines or following <= after:
            return
        after = following
