"""Full buckets to all servers: a few slots, one written while the others are on their way."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl.carriers import turns
from fp8ctl.errors import AbortedError, Fp8ctlError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from fp8ctl.carriers.sent import Sent
    from fp8ctl.course import Places
    from fp8ctl.push.client import Server
    from fp8ctl.push.fleet import Fleet
    from fp8ctl.push.link import Link
    from fp8ctl.wire import Entry


class Clock:
    """Seconds by stage.

    On a GPU a stage is what lies between two events of its stream, asked for at the end.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()
        self._one_at_a_time = threading.Lock()

    @contextlib.contextmanager
    def stage(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Measure what is done inside."""
        gpu = device is not None and device.type == "cuda"
        if gpu:
            event: Any = torch.cuda.Event
            before, after = (event(enable_timing=True) for _ in range(2))
            before.record(torch.cuda.current_stream(device))
        start = time.perf_counter()
        try:
            yield
        finally:
            if gpu:
                after.record(torch.cuda.current_stream(device))
                self._events.append((name, before, after))
            else:
                self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add to a stage."""
        with self._one_at_a_time:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def settle(self) -> None:
        """Ask a GPU for what it has measured, and wait for it."""
        while self._events:
            name, before, after = self._events.pop()
            after.synchronize()
            self.add(name, before.elapsed_time(after) / 1000)

    def seconds(self) -> dict[str, float]:
        """Return what was measured, and the total until now; waits for a GPU."""
        self.settle()
        return {**self._seconds, "total": time.perf_counter() - self._started}


class Delivery(Protocol):
    """Takes full buckets, in order.

    Attributes:
        capacity: bytes of a slot.
        slots: how many there are, two or more, to be used in turn: one is written before the last
            is delivered.
        device: of their memory.
        number: buckets that were taken until now.
        places: what lies in its memory; kept as long as that is, over updates.
    """

    places: Places
    capacity: int
    slots: int
    device: torch.device
    number: int

    def free(self, slot: int) -> bool:
        """Say whether `buffer` would return at once."""

    def buffer(self, slot: int) -> torch.Tensor:
        """Return a slot's memory, when nobody reads it any more."""

    def begin(self) -> None:
        """Hear, again and again, that something is on its way: servers may begin."""

    def give(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Hear that all which writes a bucket is queued: its bytes may go.

        Buckets are delivered in the order in which they are given; what was found out about
        their tensors comes then.
        """

    def deliver(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Have a bucket loaded that was given; returns before it is where it should be."""

    def drain(self) -> None:
        """Wait until all buckets are there."""

    def failed(self) -> bool:
        """Say, in any thread, whether something is known to have gone wrong with a bucket."""

    def cancel(self, why: str) -> None:
        """End what waits, from any thread."""

    def close(self) -> None:
        """Give back what it took; also after a failure."""


class Beginning(Protocol):
    """An update as all servers have it."""

    def begin(self) -> None:
        """Ask all servers to begin, once; returns before they have."""

    def begun(self) -> object:
        """Have all begin, and wait until they have."""


@dataclass
class _Bucket:
    """A bucket on its way.

    Attributes:
        slot: where it lies.
        sent: how far it is on its way to a group; None where there is none.
        asked: end when the servers have loaded it; empty where it is not delivered yet.
        entries: of what is in it.
    """

    slot: int
    sent: Sent | None
    asked: Sequence[Future[Any]] = ()
    entries: Sequence[Entry] = ()

    @property
    def left(self) -> Sequence[Future[Any]]:
        """What ends when the slot may be written again; nothing yet of what is not delivered.

        The slots are taken in turn, so that nobody asks for that one before it is.
        """
        return self.asked if self.sent is None else self.sent[:1]

    @property
    def all(self) -> Sequence[Future[Any]]:
        """What ends when it has arrived everywhere."""
        return [*self.asked, *(self.sent or ())]

    def error(self) -> BaseException | None:
        """Return what went wrong with it until now; rather why than that it was given up."""
        errors = [e for f in self.all if f.done() and (e := f.exception()) is not None]
        return next(
            (e for e in errors if not isinstance(e, AbortedError)), next(iter(errors), None)
        )


class ByCarrier:
    """Has the servers load each bucket from a carrier; a `Delivery`."""

    def __init__(
        self, link: Link, fleet: Fleet, push: str, session: Beginning, clock: Clock
    ) -> None:
        """Deliver over an open link.

        Args:
            link: has its carrier.
            fleet: the servers.
            push: name of the update.
            session: has all servers begin it.
            clock: for the stage "wait".
        """
        assert link.sender is not None
        self._sender, self._fleet, self._push = link.sender, fleet, push
        self._session, self._clock = session, clock
        self.places = link.places
        self.capacity, self.slots = self._sender.buffer(0).numel(), self._sender.slots
        self.device = self._sender.buffer(0).device
        self.number = 0
        self._under_way: list[_Bucket] = []
        self._last: list[Future[dict[str, Any]]] = []
        self._turns = contextlib.ExitStack()
        self._turns.enter_context(turns.short())

    def free(self, slot: int) -> bool:
        """Say whether what was in it is read by nobody any more."""
        return all(f.done() for one in self._under_way if one.slot == slot for f in one.left)

    def buffer(self, slot: int) -> torch.Tensor:
        """Return a slot's memory, when what was in it is read by nobody any more."""
        self._wait(lambda bucket: bucket.left if bucket.slot == slot else ())
        return self._sender.buffer(slot)

    def begin(self) -> None:
        """Have the servers begin, if they were not asked to before."""
        self._session.begin()

    def give(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Send a slot's bytes, where they are sent; a rank takes them when it has room."""
        self._sender.ready(slot)
        sent = self._sender.send(slot, nbytes)
        self._under_way.append(_Bucket(slot, sent, entries=entries))

    def deliver(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Ask all servers to load a slot."""
        with self._clock.stage("wait"):
            self._session.begun()
            self._sender.settle(slot)
        number, listed = self.number, [*entries]
        before = self._last

        def one(i: int, server: Server) -> dict[str, Any]:
            last = before[i] if before else None
            given_up = AbortedError(f"{server.url} did not take the bucket before")
            if last is not None and last.done() and _failed(last):
                raise given_up
            try:
                return server.bucket(self._push, number, slot, nbytes, listed)
            except Exception as e:
                # The one before may be under way still, and why it fails comes first.
                if last is not None and _failed(last):
                    raise given_up from e
                raise

        self._last = self._fleet.start(one, beside=bool(number % 2))
        bucket = next(one for one in self._under_way if one.slot == slot and not one.asked)
        bucket.asked, bucket.entries = self._last, listed
        self.number += 1

    def drain(self) -> None:
        """Wait until all servers have loaded all buckets."""
        self._wait(lambda bucket: bucket.all)

    def failed(self) -> bool:
        """Say whether one on its way has failed."""
        return any(bucket.error() is not None for bucket in self._under_way)

    def cancel(self, why: str) -> None:
        """End what waits for the carrier."""
        self._sender.cancel(why)

    def close(self) -> None:
        """Let threads take their turns as before."""
        self._turns.close()

    def _wait(self, what: Callable[[_Bucket], Sequence[Future[Any]]]) -> None:
        """Wait for some futures of every bucket; raise what goes wrong with any meanwhile."""
        with self._clock.stage("wait"):
            while True:
                over = all(f.done() for bucket in self._under_way for f in what(bucket))
                self._check()
                if over:
                    return
                running = [f for bucket in self._under_way for f in bucket.all if not f.done()]
                concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)

    def _check(self) -> None:
        """Forget the buckets that have arrived.

        Raises:
            BaseException: what went wrong with the oldest that failed.
        """
        # Before errors are looked for: one that fails meanwhile must not be forgotten.
        left = [
            one for one in self._under_way if not one.asked or not all(f.done() for f in one.all)
        ]
        if any(bucket.error() for bucket in self._under_way):
            # The oldest, by a second look: what follows a failure does not say why, and may have
            # failed after its cause was looked at and went well.
            first = next(one for one in self._under_way if one.error() is not None)
            error = first.error()
            assert error is not None
            raise _named(error, first.entries)
        self._under_way = left


def _failed(future: Future[Any]) -> bool:
    """Wait for an answer, and say whether there is none."""
    try:
        return future.exception() is not None
    except concurrent.futures.CancelledError:
        return True


def _named(error: BaseException, entries: Sequence[Entry]) -> BaseException:
    """Return an error with the names of the bucket, where the server did not name a tensor."""
    # Which of them it was, the server may not know: it is gone, for instance.
    if isinstance(error, Fp8ctlError) and "tensor" not in error.data and entries:
        error.data.update(first=entries[0].name, last=entries[-1].name)
        error.message = f"{error.message} (bucket of {entries[0].name} to {entries[-1].name})"
        error.args = (error.message,)
    return error
