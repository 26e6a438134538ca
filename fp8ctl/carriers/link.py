"""A connection between a rank of a group and its trainer; the trainer has one to each (`hub`).

The weights go by NCCL or gloo. These connections say when, and who is gone: the end of a
process ends its connection at once, and whoever waits hears of it. Lines of JSON; who joins
shows that it has the offer's key.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import select
import selectors
import socket
import time
from typing import TYPE_CHECKING, Any

from fp8ctl.errors import CarrierError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A line longer than this is not one of ours.
LONGEST = 1 << 16

Message = dict[str, Any]


class Line:
    """One connection, and the part of a line that has come so far."""

    def __init__(self, connection: socket.socket, who: str) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.who = connection, who
        self._come = b""

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        return self.connection.fileno()

    @property
    def gone(self) -> bool:
        """Whether the other end has left, even if what it said before is still to be heard."""
        return self.leaves(0.0)

    def leaves(self, within: float) -> bool:
        """Wait so many seconds for the other end to leave; return whether it has."""
        look = select.poll()
        try:
            look.register(self.connection, select.POLLRDHUP)
        except ValueError:
            return True  # this end has closed it
        return bool(look.poll(within * 1000))

    def say(self, **message: object) -> None:
        """Send a message; they are short, so that a full buffer is a peer that does not read.

        Raises:
            ConflictError: the other end is gone, or does not read.
        """
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as e:
            raise ConflictError(f"{self.who} is gone: {e.strerror or e}") from e

    def heard(self) -> Message | None:
        """Return the next message, None where none has come yet.

        Raises:
            ConflictError: the other end is gone, or says what is no message.
        """
        while b"\n" not in self._come:
            try:
                more = self.connection.recv(LONGEST)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as e:
                raise ConflictError(f"{self.who} is gone: {e.strerror or e}") from e
            if not more:
                raise ConflictError(f"{self.who} is gone")
            self._come += more
            if len(self._come) > LONGEST:
                raise ConflictError(f"{self.who} says what is no message")
        line, _, self._come = self._come.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise ConflictError(f"{self.who} says {line[:80]!r}, which is no message")
        return message

    def hear(self, deadline: float | None) -> Message:
        """Wait for the next message.

        Args:
            deadline: of time.monotonic(); None: there is none.

        Raises:
            TimeoutError: it does not come until then.
            ConflictError: the other end is gone.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while (message := self.heard()) is None:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not selector.select(left):
                    raise TimeoutError(f"{self.who} did not answer in time")
        return message

    def end(self, *, quietly: bool = False) -> None:
        """End the connection; whoever waits for a message in another thread hears of it.

        Args:
            quietly: the other end does not, until `close`.
        """
        with contextlib.suppress(OSError):  # the other end was faster
            self.connection.shutdown(socket.SHUT_RD if quietly else socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def proof(key: str, question: str, rank: int) -> str:
    """Return what only someone with the key can answer."""
    return hmac.new(bytes.fromhex(key), f"{question} {rank}".encode(), hashlib.sha256).hexdigest()


def listen(host: str) -> socket.socket:
    """Return a socket that listens on this address, on a port that was free."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def join(
    host: str, port: int, key: str, rank: int, about: Mapping[str, object], deadline: float
) -> Line:
    """Return a rank's connection to the trainer, which knows now that it is there.

    Raises:
        CarrierError: nobody listens there.
        TimeoutError: no answer in time.
        ConflictError: whoever listens there is gone again.
    """
    try:
        connection = socket.create_connection((host, port), _left(deadline))
    except TimeoutError as e:
        raise TimeoutError(f"the trainer at {host}:{port} did not answer in time") from e
    except OSError as e:
        raise CarrierError(
            f"no trainer at {host}:{port}: {e.strerror or e}",
            hint='Rollout(urls, plan, via="nccl", master=ADDRESS), one that this server reaches',
        ) from e
    line = Line(connection, "the trainer")
    try:
        question = str(line.hear(deadline).get("question"))
        process = f"process {os.getpid()} on {socket.gethostname()}"
        line.say(rank=rank, proof=proof(key, question, rank), process=process, **about)
    except BaseException:
        line.close()
        raise
    return line


def agree(line: Line, deadline: float) -> Message:
    """Wait, in a rank, for the trainer's word.

    Raises:
        ConflictError: it says no, or is gone.
        TimeoutError: it says nothing.
    """
    return refuse(line.hear(deadline))


def refuse(message: Message) -> Message:
    """Return the trainer's message, unless it is the end.

    Raises:
        ConflictError: it says no.
    """
    if "no" in message:
        raise ConflictError(f"the trainer says: {message['no']}")
    return message


def expect_nothing(line: Line) -> None:
    """Look, in a rank, whether the trainer says anything: now that is the end.

    Raises:
        ConflictError: it does, or is gone.
    """
    message = line.heard()
    if message is not None:
        raise ConflictError(f"the trainer says: {message.get('no', message)}")


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
