"""Full buckets to all servers: two slots, one written while the servers load the other."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8ctl.errors import AbortedError, Fp8ctlError
from fp8ctl.push.fleet import answers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from fp8ctl.push.client import Server
    from fp8ctl.push.fleet import Fleet
    from fp8ctl.push.link import Link
    from fp8ctl.wire import Entry

    #: Address, dtype and shape, and the tensor that lies there.
    Places = dict[tuple[int, str, tuple[int, ...]], torch.Tensor]

SLOTS = 2


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

    def seconds(self) -> dict[str, float]:
        """Return what was measured, and the total until now; waits for a GPU."""
        while self._events:
            name, before, after = self._events.pop()
            after.synchronize()
            self.add(name, before.elapsed_time(after) / 1000)
        return {**self._seconds, "total": time.perf_counter() - self._started}


class Delivery(Protocol):
    """Takes full buckets, in order.

    Attributes:
        capacity: bytes of a slot.
        device: of its memory.
        number: buckets that were taken until now.
        places: tensors in its memory; kept as long as that is, over updates.
    """

    places: Places
    capacity: int
    device: torch.device
    number: int

    def buffer(self, slot: int) -> torch.Tensor:
        """Return a slot's memory, when nobody reads it any more."""

    def deliver(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Take a bucket; returns before it is where it should be."""

    def drain(self) -> None:
        """Wait until all buckets are there."""

    def cancel(self, why: str) -> None:
        """End what waits, from any thread."""

    def close(self) -> None:
        """Give back what it took; also after a failure."""


class ByCarrier:
    """Has the servers load each bucket from a carrier; a `Delivery`."""

    def __init__(
        self, link: Link, fleet: Fleet, push: str, begun: Callable[[], object], clock: Clock
    ) -> None:
        """Deliver over an open link.

        Args:
            link: has its carrier.
            fleet: the servers.
            push: name of the update.
            begun: waits until all servers have begun it.
            clock: for the stage "wait".
        """
        assert link.sender is not None
        self._sender, self._fleet, self._push = link.sender, fleet, push
        self._begun, self._clock = begun, clock
        self.places = link.places
        self.capacity = self._sender.buffer(0).numel()
        self.device = self._sender.buffer(0).device
        self.number = 0
        self._under_way: list[tuple[list[Future[Any]], Sequence[Entry]] | None] = [None] * SLOTS
        self._last: list[Future[dict[str, Any]]] = []
        group = link.kind == "group"
        self._sending = ThreadPoolExecutor(1, "fp8ctl-push-send") if group else None

    def buffer(self, slot: int) -> torch.Tensor:
        """Return a slot's memory, when all servers have loaded what was in it."""
        self._wait(slot)
        return self._sender.buffer(slot)

    def deliver(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Ask all servers to load a slot."""
        with self._clock.stage("wait"):
            self._begun()
            self._sender.ready(slot)
        number, listed = self.number, [*entries]
        before = self._last

        def one(i: int, server: Server) -> dict[str, Any]:
            if before and before[i].exception() is not None:
                raise AbortedError(f"{server.url} did not take the bucket before")
            return server.bucket(self._push, number, slot, nbytes, listed)

        self._last = self._fleet.start(one)
        futures: list[Future[Any]] = [*self._last]
        if self._sending is not None:
            futures.append(self._sending.submit(self._sender.send, slot, nbytes))
        self._under_way[slot] = futures, listed
        self.number += 1

    def drain(self) -> None:
        """Wait until all servers have loaded all buckets."""
        for number in range(self.number, self.number + SLOTS):
            self._wait(number % SLOTS)  # the older first: what follows a failure does not say why

    def cancel(self, why: str) -> None:
        """End what waits for the carrier."""
        self._sender.cancel(why)

    def close(self) -> None:
        """End the thread that sends."""
        if self._sending is not None:
            self._sending.shutdown(wait=True, cancel_futures=True)

    def _wait(self, slot: int) -> None:
        under_way = self._under_way[slot]
        if under_way is None:
            return
        futures, entries = under_way
        try:
            with self._clock.stage("wait"):
                answers(futures)
        except Fp8ctlError as e:
            # Which of them it was, the server may not know: it is gone, for instance.
            if "tensor" not in e.data and entries:
                e.data.update(first=entries[0].name, last=entries[-1].name)
                e.message = f"{e.message} (bucket of {entries[0].name} to {entries[-1].name})"
                e.args = (e.message,)
            raise
        self._under_way[slot] = None
