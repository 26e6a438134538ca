"""What a server says of itself: one state, read over HTTP.

`/fp8ctl/state` where the server was started with fp8ctl's entry module, else
`/health`. Standard library only, so that `ps` stays quick; called by `server`,
`launching` and `check`.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args
from urllib.parse import urlsplit

from fp8ctl.deadline import Deadline
from fp8ctl.engines.base import API_KEY_VARIABLE, HEALTH_PATH, STATE_PATH

if TYPE_CHECKING:
    from collections.abc import Mapping

State = Literal["ready", "unpushed", "updating", "failed", "starting", "locked"]
"""The gate's four states; starting: it does not answer, or not yet in order; locked: it
tells its state only to who has its API key."""

_GATE: Final = get_args(State)[:4]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered.

    Attributes:
        state: its state.
        gated: whether it has fp8ctl's state route; False: a stock server.
        message: the server's own words, or why there was no answer.
        data: the whole answer of the state route.
        foreign: another process answered than the one that was asked for, which does not.
    """

    state: State
    gated: bool = False
    message: str = ""
    data: Mapping[str, object] = field(default_factory=dict)
    foreign: bool = False


def api_key() -> str | None:
    """Return the user's API key, None where there is none."""
    return os.environ.get(API_KEY_VARIABLE) or None


def ask(
    url: str, key: str | None = None, timeout: float = 2.0, *, pid: int | None = None
) -> Answer:
    """Return the state of a server; never raises for a server's fault.

    Args:
        url: its address.
        key: sent as a Bearer token.
        timeout: seconds for each of at most two answers.
        pid: process of the one server that is meant, which has fp8ctl's state route;
            whoever else answers there is `foreign`.
    """
    try:
        status, body = get(url, STATE_PATH, key, timeout)
        data = _object(body)
        teller = None if data is None else data.get("pid")
        if pid is not None and teller != pid and (status == 200 or teller is not None):
            who = "another process" if teller is None else f"process {teller}"
            return Answer("starting", message=f"{who} answers at {url}", foreign=True)
        if status == 200 and data is not None and data.get("state") in _GATE:
            message = str(data.get("message") or "")
            return Answer(data["state"], gated=True, message=message, data=data)
        if status == 503:  # the engine still warms itself up
            return Answer(
                "starting",
                gated=True,
                message=without_key(body.decode(errors="replace"), key)[:200],
            )
        if status in {401, 403}:
            return Answer("locked", message=f"{STATE_PATH} answers {status}: it wants a key")
        if pid is not None:
            return Answer("starting", message=f"{STATE_PATH} answers {status}", foreign=True)
        status, _ = get(url, HEALTH_PATH, key, timeout)
    except (OSError, http.client.HTTPException, ValueError) as e:
        return Answer("starting", message=f"{type(e).__name__}: {e}")
    if status == 200:
        return Answer("ready")
    return Answer("starting", message=f"{HEALTH_PATH} answers {status}")


#: Shorter ones stand in any text.
_SHORT_KEY = 4


def without_key(text: str, key: str | None) -> str:
    """Return what a server said without the API key that it was asked with."""
    return text if not key or len(key) < _SHORT_KEY else text.replace(key, "***")


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def get(
    url: str, path: str, key: str | None, timeout: float, limit: int = 1 << 20
) -> tuple[int, bytes]:
    """Fetch one path; no proxy, since a server that fp8ctl starts is its neighbour.

    Args:
        url: address of the server.
        path: of the route, with its query.
        key: sent as a Bearer token.
        timeout: seconds for the whole answer.
        limit: bytes of the answer that are read.

    Raises:
        OSError, http.client.HTTPException, ValueError: there was no answer.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    late = f"no whole answer within {timeout:g} s"
    with Deadline(timeout) as deadline:
        try:
            plain = socket.create_connection((connection.host, connection.port), timeout)
            deadline.watch(plain)
            connection.sock = plain
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(plain, server_hostname=connection.host)
            connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
            response = connection.getresponse()
            found = response.status, response.read(limit)
        except (OSError, http.client.HTTPException, ValueError) as e:
            if deadline.passed:  # whatever the end of the connection looks like
                raise TimeoutError(late) from e
            raise
        finally:
            connection.close()
        if deadline.passed:
            raise TimeoutError(late)
    return found
