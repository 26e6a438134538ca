"""Who is in a group, and what is said in it: one connection from each rank to the trainer.

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
import secrets
import selectors
import socket
import time
from typing import TYPE_CHECKING, Any

from fp8ctl.errors import CarrierError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

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

    def end(self) -> None:
        """End the connection; whoever waits for a message in another thread hears of it."""
        with contextlib.suppress(OSError):  # the other end was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def proof(key: str, question: str, rank: int) -> str:
    """Return what only someone with the key can answer."""
    return hmac.new(bytes.fromhex(key), f"{question} {rank}".encode(), hashlib.sha256).hexdigest()


class Hub:
    """The trainer's side: ranks 1 to n, each by its name until it has told more.

    `cancel` may be called from any thread; the rest from one at a time.
    """

    def __init__(self, host: str, names: Sequence[str]) -> None:
        self.key = secrets.token_hex(32)
        self._names = dict(enumerate(names, start=1))
        self._lines: dict[int, Line] = {}
        self._why = ""
        self._listener: socket.socket | None = None
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        try:
            self._listener = listen(host)
        except OSError as e:
            self.close()
            raise CarrierError(
                f"cannot listen on {host}: {e.strerror or e}",
                hint='Rollout(urls, plan, via="nccl", master=ADDRESS), one of this host',
            ) from e
        self.port: int = self._listener.getsockname()[1]

    def gather(self, deadline: float) -> dict[int, Message]:
        """Wait until every rank has joined; return what each said of itself.

        Raises:
            TimeoutError: some did not come; all are named.
            ConflictError: `cancel` was called, or one that had come is gone.
        """
        told: dict[int, Message] = {}
        asked: dict[Line, str] = {}
        listener = self._listener
        assert listener is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(listener, selectors.EVENT_READ)
            try:
                while len(told) < len(self._names):
                    ready = self._select(selector, deadline, set(self._names) - set(told))
                    if listener in ready:
                        ready.remove(listener)
                        self._ask(listener, selector, asked)
                    for one in ready:
                        assert isinstance(one, Line)
                        if one not in asked:
                            _refuse_failed(one, one.heard())  # nothing else is due
                        elif self._joins(one, asked[one], told):
                            del asked[one]
                        elif one.fileno() < 0:
                            selector.unregister(one)
            finally:
                for line in asked:
                    line.close()
        listener.close()
        self._listener = None
        return told

    def _ask(
        self, listener: socket.socket, selector: selectors.BaseSelector, asked: dict[Line, str]
    ) -> None:
        try:
            connection, address = listener.accept()
        except OSError:
            return  # gone before it was heard
        line = Line(connection, f"a stranger at {address[0]}")
        asked[line] = secrets.token_hex(16)
        selector.register(line, selectors.EVENT_READ)
        try:
            line.say(question=asked[line])
        except ConflictError:
            line.close()

    def _joins(self, line: Line, question: str, told: dict[int, Message]) -> bool:
        """Read what a new connection says; one that does not belong here is closed."""
        try:
            message = line.heard()
            if message is None:
                return False
            rank = message.get("rank")
            if type(rank) is not int or rank not in self._names:
                line.say(no=f"no rank {rank!r} is expected")
            elif not hmac.compare_digest(
                str(message.get("proof")).encode(), proof(self.key, question, rank).encode()
            ):
                line.say(no="this is another group: the key is not its own")
            elif rank in told:
                line.say(no=f"{self._names[rank]} is there already")
            else:
                told[rank] = message
                line.who = f"{self._names[rank]} ({message.get('process')})"
                self._lines[rank] = line
                return True
        except ConflictError:
            pass
        # It stays in `asked`, and is taken from the selector by who called.
        line.close()
        return False

    def collect(self, deadline: float) -> dict[int, Message]:
        """Wait for one message of every rank.

        Raises:
            TimeoutError: some did not say anything; all are named.
            ConflictError: one is gone or has failed, or `cancel` was called.
        """
        said: dict[int, Message] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            ranks = {line: rank for rank, line in self._lines.items()}
            for line in ranks:
                selector.register(line, selectors.EVENT_READ)
            while True:
                # Before it waits: a line may have come together with the one before.
                for line, rank in ranks.items():
                    if rank not in said and (message := line.heard()) is not None:
                        _refuse_failed(line, message)
                        said[rank] = message
                if len(said) == len(ranks):
                    return said
                for line in self._select(selector, deadline, set(self._lines) - set(said)):
                    assert isinstance(line, Line)
                    if ranks[line] in said:
                        selector.unregister(line)

    def listen(
        self,
        take: Callable[[int, Message], None],
        missing: Callable[[], Collection[int]],
        deadline: float,
    ) -> None:
        """Hand on what the ranks say, until nobody is missing.

        Args:
            take: is given a rank and what it says.
            missing: returns the ranks that have more to say.
            deadline: of time.monotonic().

        Raises:
            TimeoutError: some did not say it; all are named.
            ConflictError: one is gone or has failed, or `cancel` was called.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for line in self._lines.values():
                selector.register(line, selectors.EVENT_READ)
            while True:
                for rank, line in self._lines.items():
                    while (message := line.heard()) is not None:
                        _refuse_failed(line, message)
                        take(rank, message)
                waiting = missing()
                if not waiting:
                    return
                self._select(selector, deadline, {*waiting})

    def _select(
        self, selector: selectors.BaseSelector, deadline: float, missing: set[int]
    ) -> list[Any]:
        """Wait for what can be read; `cancel` and the deadline end it."""
        ready = [key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]
        if self._why:
            raise ConflictError(self._why)
        if not ready:
            raise TimeoutError(
                f"{len(missing)} of {len(self._names)} ranks did not come in time: "
                + ", ".join(self.name(rank) for rank in sorted(missing))
            )
        return ready

    def name(self, rank: int) -> str:
        """Return what a rank is called in messages."""
        return self._lines[rank].who if rank in self._lines else self._names[rank]

    def tell(self, **message: object) -> None:
        """Say the same to all.

        Raises:
            ConflictError: one is gone.
        """
        for line in self._lines.values():
            line.say(**message)

    def check(self) -> None:
        """Raise what `cancel` asked for."""
        if self._why:
            raise ConflictError(self._why)

    def cancel(self, why: str) -> None:
        """End what waits, now and later."""
        self._why = self._why or why
        with contextlib.suppress(OSError):  # full of earlier ones, or closed
            self._waker.send(b"!")

    def close(self, why: str = "") -> None:
        """Tell all that this is the end, and close every connection."""
        for line in self._lines.values():
            with contextlib.suppress(ConflictError):
                line.say(no=why or self._why or "the trainer has closed the group")
            line.close()
        self._lines.clear()
        for one in (self._listener, self._woken, self._waker):
            if one is not None:
                one.close()
        self._listener = None


def _refuse_failed(line: Line, message: Message | None) -> None:
    if message is not None and "failed" in message:
        raise ConflictError(f"{line.who}: {message['failed']}")


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
