"""A group whose broadcasts end when the test says so: lines, ranks and threads are the real ones.

Gloo's are over when they return, and NCCL needs two GPUs.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import ends, link
from fp8ctl.carriers.sent import Launched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8ctl.carriers.sent import Sent
CPU = torch.device("cpu")
NBYTES = 1000
PATIENCE = 30.0
#: Seconds in which what must not happen would happen.
WHILE = 0.2


class Transport:
    """Broadcasts that end, on each rank, when they are told to."""

    def __init__(self) -> None:
        self.launched: dict[int, list[torch.Tensor]] = defaultdict(list)
        #: What rank 0 gave.
        self.bytes: list[torch.Tensor] = []
        #: Of each rank, how many are over.
        self.done: dict[int, int] = defaultdict(int)
        #: By rank and number, what launching it, or asking whether it is over, raises.
        self.unlaunched: dict[tuple[int, int], Exception] = {}
        self.lost: dict[tuple[int, int], Exception] = {}
        #: By rank, what happens right after it was told that a broadcast is not over.
        self.meanwhile: dict[int, Callable[[], None]] = {}
        self.closed: list[int] = []
        self.warmed: list[int] = []
        self.looks = 0
        #: Whether ranks take the bytes out of the trainer's slots.
        self.pulled = False
        #: Whether a device can wait for them; then the number of each is its event.
        self.events = False

    def count(self, rank: int) -> int:
        return len(self.launched[rank])

    def backend(self, _store: object, rank: int, *_: object) -> Backend:
        return Backend(self, rank)


class Backend:
    """One rank of it; see `ahead.Backend`."""

    def __init__(self, transport: Transport, rank: int) -> None:
        self.transport, self.rank = transport, rank
        self.pulled = transport.pulled

    def broadcast(
        self, tensor: torch.Tensor, _after: Any, _deadline: float, check: Callable[[], None]
    ) -> Launched:
        check()
        transport, rank = self.transport, self.rank
        number = transport.count(rank)
        if (rank, number) in transport.unlaunched:
            raise transport.unlaunched.pop((rank, number))
        if rank == 0:
            transport.bytes.append(tensor.clone())
        transport.launched[rank].append(tensor)

        def over() -> bool:
            transport.looks += 1
            if (rank, number) in transport.lost:
                raise transport.lost.pop((rank, number))
            if number >= min(transport.done[rank], len(transport.bytes)):
                transport.meanwhile.pop(rank, lambda: None)()
                return False
            if rank:
                transport.launched[rank][number].copy_(transport.bytes[number])
            return True

        return Launched(over, f"event {number}" if transport.events else None)

    def warm(self) -> None:
        self.transport.warmed.append(self.rank)

    def close(self) -> None:
        self.transport.closed.append(self.rank)
        self.transport.launched[self.rank].clear()


@contextlib.contextmanager
def group(
    *ranks: int, timeout: float = PATIENCE, slots: int | None = None
) -> Iterator[tuple[ends.Sender, list[ends.Receiver]]]:
    """Yield the trainer's end, and every rank's, of one server each; closed afterwards."""
    sender = ends.sender("group", NBYTES, ranks=[1] * len(ranks), timeout=timeout, slots=slots)
    came: list[ends.Receiver] = []
    try:
        with ThreadPoolExecutor(1 + len(ranks)) as threads:
            joining = threads.submit(sender.join)
            coming = [threads.submit(ends.receive, sender.offer(i), 0, CPU) for i in ranks]
            joining.result(PATIENCE)
            came = [one.result(PATIENCE) for one in coming]
        yield sender, came
    finally:
        for one in came:
            one.close()
        sender.close()


class Rank:
    """A rank whose lines the test says: it shows what a real one is late with, or tells."""

    def __init__(self, sender: ends.Sender, slots: int = 3, *, soon: bool = False) -> None:
        offer = sender.offer(0)
        with ThreadPoolExecutor(1) as threads:
            joining = threads.submit(sender.join)
            where = offer["host"], offer["port"], offer["key"]
            about = {"slots": slots, **({"soon": True} if soon else {})}
            self.line = link.join(*where, 1, about, time.monotonic() + PATIENCE)
            self.agreed = self.hear()
            self.line.say(there=1)
            joining.result(PATIENCE)

    def hear(self) -> link.Message:
        return self.line.hear(time.monotonic() + PATIENCE)

    def has_room(self, *slots: int) -> None:
        for slot in slots:
            self.line.say(room=slot)


@contextlib.contextmanager
def played(timeout: float = PATIENCE, *, soon: bool = False) -> Iterator[tuple[ends.Sender, Rank]]:
    """Yield the trainer's end of a group with such a rank, which has room in all slots."""
    sender = ends.sender("group", NBYTES, ranks=[1], timeout=timeout)
    rank = None
    try:
        rank = Rank(sender, soon=soon)
        rank.has_room(0, 1, 2)
        yield sender, rank
    finally:
        if rank is not None:
            rank.line.close()
        sender.close()


def give(sender: ends.Sender, slot: int, seed: int = 0) -> Future[None]:
    """Fill a slot and have it given; return what ends when it may be written again."""
    return sent(sender, slot, seed).left


def sent(sender: ends.Sender, slot: int, seed: int = 0) -> Sent:
    """Fill a slot and have it given; return how far it is."""
    sender.buffer(slot).fill_(seed)
    sender.ready(slot)
    found = sender.send(slot, NBYTES)
    assert found is not None
    return found


def becomes(found: Callable[[], object], wanted: object) -> None:
    """Assert that something is so before long, and stays so."""
    end = time.monotonic() + PATIENCE
    while found() != wanted and time.monotonic() < end:
        time.sleep(0.005)
    assert found() == wanted
    time.sleep(WHILE)
    assert found() == wanted


def errors(futures: Sequence[Future[None]]) -> list[BaseException | None]:
    return [one.exception(PATIENCE) for one in futures]
