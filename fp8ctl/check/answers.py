"""Asks a server over HTTP, and takes no more of its answer than was said, and no longer.

What is checked may be broken: it may send for ever, or a byte a minute. So an answer has a limit
of bytes and a time for all of it. Called by `live`, `prompts` and `asking`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from fp8ctl.deadline import Deadline
from fp8ctl.engines.base import is_loopback
from fp8ctl.gate import without_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    import httpx

LIMIT: Final = 16 << 20
"""Bytes of an answer, unless the question is about more."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer: status, JSON body (None where it is none), seconds it took."""

    status: int
    body: Any
    text: str
    seconds: float


class Server:
    """A server that is asked; a context, since it keeps a connection.

    Attributes:
        url: its address, without a slash at its end.
        timeout: seconds for one answer.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        """Make ready to ask; nothing is sent yet.

        Args:
            url: address of the server.
            api_key: sent as a Bearer token, and never part of a reply's text.
            timeout: seconds for one whole answer.
        """
        import httpx

        self.url = url.rstrip("/")
        self.timeout = timeout
        self._key = api_key
        self._connection: Any = None
        self._client = httpx.Client(
            # Packed, a few bytes may be very many.
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            # A proxy from the environment has no business between this machine and itself.
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def get(self, path: str, wait: float | None = None) -> Reply:
        """Fetch a path; see `ask`."""
        return self.ask("GET", path, wait=wait)

    def post(
        self, path: str, body: object = None, limit: int | None = None, *, as_sent: bool = False
    ) -> Reply:
        """Post JSON to a path; see `ask`."""
        return self.ask("POST", path, body, limit=limit, as_sent=as_sent)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        wait: float | None = None,
        limit: int | None = None,
        as_sent: bool = False,
    ) -> Reply:
        """Ask once, and return the whole answer.

        Args:
            method: of HTTP.
            path: with its query.
            body: sent as JSON; None for none.
            wait: seconds for the whole answer; None for `timeout`.
            limit: bytes of it; None for LIMIT.
            as_sent: the API key is blotted out of the text alone: a digest may hold its letters
                by chance.

        Raises:
            httpx.RequestError: there was no answer, or more of it; ReadTimeout: not in time.
        """
        import httpx

        started = time.monotonic()
        with Deadline(self.timeout if wait is None else wait) as deadline:

            def connected(event: str, about: Mapping[str, Any]) -> None:
                if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                    self._connection = about["return_value"].get_extra_info("socket")
                    deadline.watch(self._connection)

            if self._connection is not None:
                deadline.watch(self._connection)
            try:
                with self._client.stream(
                    method,
                    self.url + path,
                    json=body,
                    timeout=deadline.seconds,
                    extensions={"trace": connected},
                ) as response:
                    data = _read(response, LIMIT if limit is None else limit)
            except httpx.RequestError as e:
                if deadline.passed:  # why ever it says that the connection has ended
                    raise _late(deadline) from e
                raise
            if deadline.passed:
                raise _late(deadline)
        # Before anything is cut from it: half a key would not be found.
        sent = data.decode(errors="replace")
        text = without_key(sent, self._key)
        parsed = _parsed(sent if as_sent else text)
        return Reply(response.status_code, parsed, text, time.monotonic() - started)


def _late(deadline: Deadline) -> httpx.ReadTimeout:
    import httpx

    return httpx.ReadTimeout(f"no whole answer within {deadline.seconds:g} s")


def _read(response: httpx.Response, limit: int) -> bytes:
    import httpx

    chunks: list[bytes] = []
    size = 0
    for chunk in response.iter_raw():
        size += len(chunk)
        if size > limit:
            raise httpx.RequestError(f"the answer is larger than {limit >> 20} MiB")
        chunks.append(chunk)
    return b"".join(chunks)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or a million brackets
        return None
