"""One server, over HTTP: a method for each of its push routes.

http.client of the standard library: a trainer's interpreter has nothing else for certain, and
it takes no proxy from the environment. Two connections are kept, each used by one thread at a
time: every other bucket goes by the second, and END by the one that the last bucket does not
use: it may be asked before that is answered. Every request ends within a time-out. What fails on
the way is asked once more: the routes answer a repeated request as they answered the first.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import socket
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fp8ctl import wire
from fp8ctl.errors import AbortedError, BusyError, NotFoundError, UnsupportedError, UsageError
from fp8ctl.push import replies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.errors import Fp8ctlError
    from fp8ctl.wire import Begin, Entry

STATE = "/fp8ctl/state"
#: Seconds until somebody has taken the call, and until a server that is given up has answered.
KNOCK = 10.0
#: Seconds that a server may take to say that requests did not end in time.
GRACE = 60.0
#: Bytes of an answer: digests of 70 000 tensors are 8 MB.
_LIMIT = 256 << 20


class Server:
    """A server's push routes.

    Attributes:
        url: its address, without what may be secret.
        backend: "vllm" or "sglang", as it said itself, or as far as one can tell.
    """

    def __init__(self, url: str, key: str | None, timeout: float, backend: str | None) -> None:
        """Say where it is; nothing is sent.

        Raises:
            UsageError: no address of a server, or a key that no header takes.
        """
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.username:
            # What may be secret is not shown: a password, or a key in the query.
            shown = url.partition("?")[0] + ("?..." if parts.query else "")
            shown = shown if parts.username is None else f"{parts.scheme}://...@{host}"
            raise UsageError(
                f"{shown!r} is no address of a server",
                hint='Rollout("http://127.0.0.1:30000", plan)',
            )
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UsageError("the API key has characters that no header takes", hint="api_key=KEY")
        shown = f"[{host}]" if ":" in host else host
        self._base = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{shown}" + (f":{port}" if port else "") + self._base
        self.backend = backend or "sglang"
        self._address, self._https = (host, port), parts.scheme == "https"
        self._key, self._timeout = key or "", timeout
        self._connection: http.client.HTTPConnection | None = None
        self._cut = threading.Event()
        self._why: Fp8ctlError | None = None
        #: The same server by a connection of its own, for every other request; cut together.
        self._odd: Server | None = None
        self._odd = copy.copy(self)

    # ---- what it is asked ----

    def state(self) -> dict[str, Any]:
        """Return what the server says of itself.

        Raises:
            NotFoundError: nobody answers there.
            UnsupportedError: a stock server, or one of another fp8ctl.
            BusyError: it warms up.
        """
        try:
            status, body = self._exchange("GET", STATE, None, KNOCK, repeat=True)
        except ConnectionRefusedError:
            raise NotFoundError(
                f"no server answers at {self.url}", hint="fp8ctl ps", data={"server": self.url}
            ) from None
        known = isinstance(body, dict) and "state" in body
        if not known and status in (404, 405):
            raise replies.stock(self.url, self._guess())
        if known and status == 503:
            raise BusyError(
                f"{self.url} is not ready: {body.get('message') or body['state']}",
                hint="fp8ctl ps",
                data={"server": self.url},
            )
        if not known or status != 200:
            raise self._refused(status, body)
        self.backend = str(body.get("engine") or self.backend)
        if body.get("push") != wire.PROTOCOL:
            raise UnsupportedError(
                f"{self.url} has fp8ctl {body.get('fp8ctl')}, whose pushes are of protocol"
                f" {body.get('push')}; here it is {wire.PROTOCOL}",
                hint="install the same fp8ctl on both sides: fp8ctl --version",
                data={"server": self.url},
            )
        found: dict[str, Any] = body
        return found

    def connect(self, offer: Mapping[str, Any] | None, client: Mapping[str, Any]) -> dict[str, Any]:
        """Offer a carrier; a connection that was there is closed."""
        body = {"protocol": wire.PROTOCOL, "client": dict(client), "carrier": offer}
        # Not twice: ranks that joined a group cannot join it again.
        return self._post(wire.CONNECT, body, repeat=False)

    def disconnect(self, connection: str) -> dict[str, Any]:
        """Say goodbye."""
        return self._post(wire.DISCONNECT, {"connection": connection}, timeout=KNOCK)

    def begin(self, begin: Begin) -> dict[str, Any]:
        """Open an update, or show that it still lives."""
        return self._post(
            wire.BEGIN, begin.to_json(), timeout=begin.within + min(self._timeout, GRACE)
        )

    def bucket(
        self, push: str, number: int, slot: int, nbytes: int, entries: Sequence[Entry]
    ) -> dict[str, Any]:
        """Have a bucket loaded; may be asked while the one before is on its way."""
        body = {"push": push, "number": number, "slot": slot, "nbytes": nbytes}
        return self._line(number)._post(wire.BUCKET, _with_entries(body, entries))

    def folder(self, push: str, path: str, entries: Sequence[Entry]) -> dict[str, Any]:
        """Have a folder loaded: the only bucket of its update."""
        body = {"push": push, "number": 0, "path": path}
        return self._post(wire.BUCKET, _with_entries(body, entries))

    def end(self, push: str, buckets: int, skipped: Sequence[str], verify: bool) -> dict[str, Any]:
        """Have the update take force; may be asked while the last bucket is on its way."""
        body = {"push": push, "buckets": buckets, "skipped": list(skipped), "verify": verify}
        return self._line(buckets)._post(wire.END, body)

    def abort(self, push: str, reason: str) -> dict[str, Any]:
        """Give the update up; also after `cut`, by a connection of its own."""
        body = {"push": push, "reason": reason.replace(self._key, "***") if self._key else reason}
        return self._post(wire.ABORT, body, timeout=KNOCK)

    def log(self, after: int = 0) -> dict[str, Any]:
        """Return lines of the server's log of pushes, and where the next ones begin."""
        return self._asked(*self._exchange("GET", f"{wire.LOG}?after={after}", None, KNOCK))

    # ---- how ----

    def _line(self, number: int) -> Server:
        """Return the connection of a bucket of this number; END has that of the next one."""
        line = (self._odd if number % 2 else None) or self
        line.backend = self.backend
        return line

    def cut(self, why: Fp8ctlError | None = None) -> None:
        """End requests that wait in other threads, and refuse others until `mend`.

        Args:
            why: what they raise; None: that the update was given up.
        """
        if self._odd is not None:
            self._odd._why = why or self._why
        self._why = why or self._why
        self._cut.set()
        self._shut()
        if self._odd is not None:
            self._odd._shut()

    def _shut(self) -> None:
        connection = self._connection
        sock = None if connection is None else connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Take requests again, by a new connection."""
        self.close()
        self._cut.clear()
        self._why = None
        if self._odd is not None:
            self._odd._why = None

    @property
    def here(self) -> str:
        """This host's address, as the server sees it; "" without a connection."""
        connection = self._connection
        sock = None if connection is None else connection.sock
        return "" if sock is None else str(sock.getsockname()[0])

    @property
    def is_cut(self) -> bool:
        """Whether requests are refused."""
        return self._cut.is_set()

    def close(self) -> None:
        """Close the connection; the next request opens one."""
        self._hang_up()
        if self._odd is not None:
            self._odd.close()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _post(
        self, path: str, body: object, timeout: float | None = None, repeat: bool = True
    ) -> dict[str, Any]:
        found = self._exchange("POST", path, body, timeout or self._timeout, repeat=repeat)
        return self._asked(*found)

    def _asked(self, status: int, body: Any) -> dict[str, Any]:
        if status != 200 or not isinstance(body, dict):
            raise self._refused(status, body)
        return body

    def _refused(self, status: int, body: Any) -> Exception:
        return replies.refused(self.url, status, body, backend=self.backend, secret=self._key)

    def _guess(self) -> str:
        """Return which engine a stock server is, by a route that only one has."""
        try:
            status, _ = self._exchange("GET", "/get_model_info", None, KNOCK)
        except Exception:  # noqa: BLE001 - only the words of a hint hang on it
            return self.backend
        return "sglang" if status == 200 else self.backend if status != 404 else "vllm"

    def _exchange(
        self, method: str, path: str, body: object, timeout: float, repeat: bool = True
    ) -> tuple[int, Any]:
        """Send a request; return status and body of the answer, None where it is no JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if not repeat:
            self._hang_up()
        left = 2 if repeat else 1
        while True:
            if self._cut.is_set():
                raise self._given_up()
            left -= 1
            try:
                return self._once(method, path, data, timeout)
            except TimeoutError:
                self._hang_up()
                raise replies.silent(self.url, path, f"not within {timeout:g} s") from None
            except (OSError, http.client.HTTPException) as e:
                self._hang_up()
                if self._cut.is_set():
                    raise self._given_up() from None
                if isinstance(e, ConnectionRefusedError) and path == STATE:
                    raise
                if not left:
                    raise replies.silent(self.url, path, f"{type(e).__name__} {e}") from None
            except BaseException:
                self._hang_up()  # half an answer would be read as that of the next request
                raise

    def _given_up(self) -> Fp8ctlError:
        return self._why or AbortedError(f"the update of {self.url} was given up")

    def _once(self, method: str, path: str, data: bytes | None, timeout: float) -> tuple[int, Any]:
        connection = self._connection
        if connection is None or connection.sock is None:
            kind = _Secure if self._https else _Plain
            host, port = self._address
            connection = self._connection = kind(host, port, timeout=min(KNOCK, timeout))
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._cut.is_set():
                raise ConnectionAbortedError
        connection.sock.settimeout(timeout)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request(method, self._base + path, body=data, headers=headers)
        with connection.getresponse() as response:
            # No more than there is: Python 3.10 fills as much memory with zeros as it is asked for.
            length = _LIMIT if response.length is None else min(response.length, _LIMIT)
            text = response.read(length)
            if response.length is not None and len(text) < length:
                raise http.client.IncompleteRead(text, length - len(text))
            if not response.isclosed():
                self._hang_up()  # more than any answer has
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, None


class _OneSend:
    """A connection that sends a request's head together with its body.

    http.client sends one after the other, and a server that is idle wakes for each.
    """

    _parts: list[bytes] | None = None

    def request(self, *what: Any, **more: Any) -> None:
        """Send a request, whose body is bytes or none."""
        parts: list[bytes] = []
        self._parts = parts
        try:
            super().request(*what, **more)  # type: ignore[misc]
        finally:
            self._parts = None
        self.send(b"".join(parts))

    def send(self, data: Any) -> None:
        """Send, or keep it until the request is whole."""
        if self._parts is None:
            super().send(data)  # type: ignore[misc]
        else:
            self._parts.append(data)


class _Plain(_OneSend, http.client.HTTPConnection):
    """By HTTP."""


class _Secure(_OneSend, http.client.HTTPSConnection):
    """By HTTPS."""


def _with_entries(body: Mapping[str, object], entries: Sequence[Entry]) -> bytes:
    """Return a request as JSON: nearly all of it is entries, which know their own text."""
    listed = ", ".join([entry.to_text() for entry in entries])
    return f'{json.dumps(body)[:-1]}, "entries": [{listed}]}}'.encode()
