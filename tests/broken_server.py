"""A server on a socket that answers as no HTTP server should: for ever, or a byte now and then."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    Send = Callable[[bytes], None]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CLOSE = HEAD + b"Connection: close\r\n\r\n"
#: Seconds between two bytes: far below any timeout of a step.
PAUSE = 0.02


def drip(first: bytes) -> Callable[[Send], None]:
    """Return an answer that begins so, and goes on for ever, a byte at a time."""

    def answer(send: Send) -> None:
        send(first)
        while True:
            send(b" ")
            time.sleep(PAUSE)

    return answer


def flood(first: bytes, chunk: bytes) -> Callable[[Send], None]:
    """Return an answer that begins so, and goes on for ever, as fast as it can."""

    def answer(send: Send) -> None:
        send(first)
        while True:
            send(chunk)

    return answer


def whole(body: bytes, head: bytes = b"") -> Callable[[Send], None]:
    """Return an answer with an end."""
    length = b"Content-Length: %d\r\n" % len(body)
    return lambda send: send(HEAD + head + length + b"Connection: close\r\n\r\n" + body)


DRIPS = {
    "in its headers": drip(HEAD + b"X-Long:"),
    "in a body with a length": drip(HEAD + b"Content-Length: 1000000\r\n\r\n"),
    "in a body without one": drip(CLOSE),
    "in chunks": drip(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1000\r\n"),
}
_CHUNK = b"10000\r\n" + b" " * 65536 + b"\r\n"
FLOODS = {
    "without a length": flood(CLOSE, b" " * 65536),
    "with one": flood(HEAD + b"Content-Length: 99999999999\r\n\r\n", b" " * 65536),
    "in chunks": flood(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", _CHUNK),
}
#: Zeros that are a thousand times as many when they are unpacked.
PACKED = whole(zlib.compress(b"\0" * (64 << 20)), b"Content-Encoding: deflate\r\n")
BRACKETS = whole(b"[" * 1_000_000)


@contextlib.contextmanager
def serving(
    answer: Callable[[bytes], Callable[[Send], None]], tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve; `answer` says what is sent to a request, by its first line. Yields the address."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def talk(plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            plain if tls is None else tls.wrap_socket(plain, server_side=True) as connection,
        ):
            asked = connection.recv(65536)
            while asked and b"\r\n\r\n" not in asked:
                more = connection.recv(65536)
                asked = asked + more if more else b""

            def send(data: bytes) -> None:
                if over.is_set():
                    raise ConnectionAbortedError
                connection.sendall(data)

            answer(asked.split(b"\r\n")[0])(send)

    def accept() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(5)
                threads.append(threading.Thread(target=talk, args=[connection], daemon=True))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        first = threading.Thread(target=accept, daemon=True)
        first.start()
        try:
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            for thread in (first, *threads):
                thread.join(10)
