"""The trainer's side of a group: who is in it, and what all ranks say."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import time
from typing import TYPE_CHECKING, Any

from fp8ctl.carriers.link import Line, listen, proof
from fp8ctl.errors import CarrierError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from fp8ctl.carriers.link import Message


class Hub:
    """The trainer's side: ranks 1 to n, each by its name until it has told more.

    `cancel`, `wake` and `gone` may be called from any thread; the rest from one at a time.
    """

    def __init__(self, host: str, names: Sequence[str]) -> None:
        self.key = secrets.token_hex(32)
        self._names = dict(enumerate(names, start=1))
        self._lines: dict[int, Line] = {}
        self._why = ""
        self._listener: socket.socket | None = None
        #: Of `listen`: waits for all lines at once, over all buckets.
        self._selector: selectors.BaseSelector | None = None
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
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

    def listen(self, take: Callable[[int, Message], None], seconds: float | None) -> None:
        """Hand on what the ranks say; wait for it, or for `wake`, where nothing has come yet.

        Args:
            take: is given a rank and what it says.
            seconds: to wait at most; None: without end.

        Raises:
            ConflictError: one is gone or has failed, or `cancel` was called.
        """
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._woken, selectors.EVENT_READ, 0)
            for rank, line in self._lines.items():
                self._selector.register(line, selectors.EVENT_READ, rank)
            ready = {*self._lines}  # something may have come together with what was read
        else:
            ready = {key.data for key, _ in self._selector.select(seconds)}
        # Before the look at what it may be about: what comes in between wakes once more.
        if 0 in ready:
            self._woken.recv(1 << 12)
        self.check()
        failed: tuple[Line, Message] | None = None
        for rank in sorted(ready - {0}):
            line = self._lines[rank]
            while (message := line.heard()) is not None:
                if "failed" in message:
                    failed = failed or (line, message)
                    break
                take(rank, message)
        # Who is gone without a word is rather the cause than who failed by it.
        if failed is not None:
            _refuse_failed(*failed)

    def _select(
        self, selector: selectors.BaseSelector, deadline: float, missing: set[int]
    ) -> list[Any]:
        """Wait for what can be read; `cancel` and the deadline end it."""
        ready = [key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]
        if self._why:
            raise ConflictError(self._why)
        if not ready:
            raise self.late(missing, "did not come in time")
        return ready

    def late(self, missing: Collection[int], what: str) -> TimeoutError:
        """Return the error that some ranks did not do in time what they should; it names all."""
        names = ", ".join(self.name(rank) for rank in sorted(missing))
        return TimeoutError(f"{len(missing)} of {len(self._names)} ranks {what}: {names}")

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

    def gone(self) -> list[str]:
        """Return who has left, by name; may be called from any thread."""
        return [line.who for line in [*self._lines.values()] if line.gone]

    def check(self) -> None:
        """Raise what `cancel` asked for."""
        if self._why:
            raise ConflictError(self._why)

    def cancel(self, why: str) -> None:
        """End what waits, now and later."""
        self._why = self._why or why
        self.wake()

    def wake(self) -> None:
        """Let who waits in `listen` look at what else there is."""
        with contextlib.suppress(OSError):  # full of earlier ones, or closed
            self._waker.send(b"!")

    def close(self, why: str = "", patience: float = 0.0) -> bool:
        """Tell all that this is the end, and close every connection.

        Args:
            why: what is told; "": what `cancel` was.
            patience: seconds that the ranks get to leave by themselves.

        Returns:
            Whether all of them have.
        """
        for line in self._lines.values():
            with contextlib.suppress(ConflictError):
                line.say(no=why or self._why or "the trainer has closed the group")
        end = time.monotonic() + patience
        left = [line.leaves(max(0.0, end - time.monotonic())) for line in self._lines.values()]
        for line in self._lines.values():
            line.close()
        self._lines.clear()
        for one in (self._selector, self._listener, self._woken, self._waker):
            if one is not None:
                one.close()
        self._listener = self._selector = None
        return all(left)


def _refuse_failed(line: Line, message: Message | None) -> None:
    if message is not None and "failed" in message:
        raise ConflictError(f"{line.who}: {message['failed']}")
