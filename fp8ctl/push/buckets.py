"""Fills buckets: the stream writes what tensors become where they are sent from.

What the stream makes together is looked at together: digests, NaN in what is kept, the
recorder's facts. On a GPU that is queued behind what writes it, and is waited for when the next
bucket is queued, too: neither the host nor the device waits for the other. A group has the bytes
by then; servers are asked to load them when they were looked at, and not before.

Where servers may hold some of it already, what need not be sent is taken out again first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

from fp8ctl.errors import ConflictError, UsageError
from fp8ctl.push.looking import Looker
from fp8ctl.push.result import Progress
from fp8ctl.wire import ALIGN, Entry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch

    from fp8ctl.course import Course, Parcel, Placed
    from fp8ctl.push.aside import Aside
    from fp8ctl.push.delivery import Clock, Delivery
    from fp8ctl.push.looking import Facts

    Named = tuple[str, torch.Tensor]
    Note = Callable[[Sequence[tuple[Entry, bool]], float], None]


@dataclass(frozen=True)
class _Batch:
    """What the stream made together.

    Attributes:
        placed: where.
        slot: where it is a bucket of its own, on its way perhaps; None: it is a part of one.
        nbytes: of that bucket.
        look: waits for what is looked at, and returns the entries with that.
        began: when it was begun.
    """

    placed: Placed
    slot: int | None
    nbytes: int
    look: Callable[[], list[Entry]]
    began: float


class Filler:
    """The stream's `Placing` of an update, and what it has sent and left out.

    Attributes:
        limit: bytes that are placed together.
        patience: seconds that a place may have to be waited for.
        course: of the update before; at the end of the stream, of this one.
        aside: where an asynchronous update blocks.
        skipped: names that all servers hold already.
        digests: of all that came, by name, where they are computed.
    """

    def __init__(
        self,
        limit: int,
        patience: float,
        open_: Callable[[int], Delivery],
        device: Callable[[], torch.device],
        clock: Clock,
        *,
        digest: bool,
        course: Course | None = None,
        held: Callable[[], Sequence[Mapping[str, str]]] | None = None,
        tie: tuple[str, str] | None = None,
        facts: Facts | None = None,
        note: Note | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        totals: tuple[int, int] | None = None,
        made: bool = False,
    ) -> None:
        """Prepare; nothing is opened before something is placed.

        Args:
            limit: bytes that are placed together.
            patience: seconds that servers may take with a bucket.
            open_: returns what takes buckets of at least so many bytes.
            device: returns where buckets will lie.
            clock: for the stages.
            digest: whether to compute digests.
            course: of the update before, if there was one.
            held: returns what each server holds, name to digest; None: all is sent.
            tie: names of an output head that may come and is not sent, and of its embedding.
            facts: returns facts of tensors, for the recorder.
            note: is told each tensor, whether it is sent, and the seconds that making these took.
            on_progress: is called after every bucket.
            totals: tensors and bytes of the plan.
            made: codes come as they are: nobody has looked yet whether one is NaN.
        """
        self.limit, self.patience, self.course = limit, patience, course
        self.aside: Aside | None = None
        self.skipped: list[str] = []
        self.digests: dict[str, str] = {}
        self.sent, self.bytes_sent, self.bytes_skipped = 0, 0, 0
        self._open, self._device, self._clock = open_, device, clock
        self._held, self._tie, self._note = held, tie, note
        self._looker = Looker(digest or held is not None, tie or (), made, facts)
        self._on_progress, self._totals = on_progress, totals
        self._delivery: Delivery | None = None
        self._slot, self._used = 0, 0
        self._memory: torch.Tensor | None = None
        self._entries: list[Entry] = []
        #: What the stream writes next, and since when; what it has written and nobody looked at.
        self._placed: Placed | None = None
        self._started = 0.0
        self._later: _Batch | None = None

    # ---- what the stream asks ----

    @property
    def device(self) -> torch.device:
        """Where buckets are written."""
        return self._device()

    def wants(self, name: str) -> bool:
        """Say whether a tensor is a weight: buffers of rotary embeddings are computed anew."""
        return not name.endswith("rotary_emb.inv_freq")

    def place(self, parcel: Parcel) -> Placed:
        """Return places in the bucket, in another one if they do not fit this one any more.

        Raises:
            UsageError: a tensor is larger than a bucket.
        """
        nbytes = parcel.nbytes
        delivery = self._opened(nbytes)
        if nbytes > delivery.capacity:
            name = parcel.entries[0].name
            raise UsageError(
                f"{name} needs {nbytes} bytes, a bucket has {delivery.capacity}",
                hint=f"Rollout(urls, plan, bucket_bytes={nbytes})",
                data={"tensor": name},
            )
        if self._used + nbytes > delivery.capacity:
            self._deliver()
        if self._memory is None:
            if self._later is not None and not delivery.free(self._slot):
                self._look_at_last()  # who waits anyway has the time, and servers the next bucket
            self._memory = delivery.buffer(self._slot)
        self._started = time.perf_counter()
        self._placed = delivery.places.at(parcel, self._memory, self._used)
        self._used += nbytes
        return self._placed

    def writing(self, check: Callable[[], object], *, later: bool) -> None:
        """Begin to look at what is written, but at scales that `check` answers for digests alone.

        What was written before is looked at now, if it still has to be.
        """
        here, slot, nbytes = self._placed, self._slot, self._used
        delivery = self._delivery
        assert here is not None
        assert delivery is not None  # these have their places from it
        self._placed = None
        alone = self._is_bucket(here.parcel)
        if alone:
            delivery.give(slot, nbytes, here.entries)
            self._next_slot()
        delivery.begin()  # behind the first bucket: it goes before they are asked
        with self.stage("digest"):
            look = self._looker.begin(here, check)
        batch = _Batch(here, slot if alone else None, nbytes, look, self._started)
        self._look_at_last()
        # The recorder tells how long a bucket took, and asks the device for more.
        if later and alone and self._note is None:
            self._later = batch
        else:
            self._settle(batch)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Measure a stage of the stream."""
        return self._clock.stage(name, None if self._delivery is None else self._delivery.device)

    def in_thread(self, work: Callable[[], list[Named]]) -> Awaitable[list[Named]]:
        """Do it aside."""
        assert self.aside is not None
        return self.aside.do(work)

    # ---- what the update does ----

    def finish(self) -> None:
        """Look at what is left and have it loaded; returns before it is where it should be.

        Raises:
            ConflictError: an output head came that is not its embedding.
        """
        self._look_at_last()
        self._check_tie(last=True)
        self._deliver()

    def tell(self) -> None:
        """Say how much was sent, to whoever wants to know."""
        if self._on_progress is None:
            return
        tensors, nbytes = self._totals or (None, None)
        self._on_progress(
            Progress(
                self.sent + len(self.skipped),
                self.bytes_sent + self.bytes_skipped,
                tensors,
                nbytes,
                self.buckets,
            )
        )

    @property
    def buckets(self) -> int:
        """How many were sent."""
        return 0 if self._delivery is None else self._delivery.number

    def _opened(self, nbytes: int) -> Delivery:
        if self._delivery is None:
            self._delivery = self._open(nbytes)
        return self._delivery

    def _is_bucket(self, parcel: Parcel) -> bool:
        """Say whether these are all of a bucket, whatever is found when they are looked at."""
        if self._held is not None:
            return False  # what servers hold is taken out
        return self._tie is None or self._tie[0] not in parcel.names

    def _look_at_last(self) -> None:
        batch, self._later = self._later, None
        if batch is not None:
            self._settle(batch)

    def _settle(self, batch: _Batch) -> None:
        """Look at what was written, and decide what of it is sent."""
        with self._clock.stage("digest"):
            found = batch.look()
        took = time.perf_counter() - batch.began
        self.digests.update([(entry.name, entry.digest) for entry in found if entry.digest])
        self._check_tie()
        assert self._delivery is not None
        if batch.slot is not None:
            self._tell_of(found, repeat(True), took)
            self.sent += len(found)
            self.bytes_sent += batch.placed.parcel.values
            self._delivery.deliver(batch.slot, batch.nbytes, found)
            self.tell()
            return
        wanted = self._wanted(found)
        self._tell_of(found, wanted, took)
        self.sent += sum(wanted)
        if all(wanted):
            self._entries += found
        else:
            self._used = found[0].offset
            self._entries += self._moved([e for e, sent in zip(found, wanted, strict=True) if sent])
        # With little to send, the next ones may still go into this bucket.
        if self._held is None or self._used > self._delivery.capacity // 2:
            self._deliver()

    def _tell_of(self, found: list[Entry], sent: Iterable[bool], took: float) -> None:
        """Have the recorder note these."""
        if self._note is not None:
            head = self._tie and self._tie[0]
            pairs = zip(found, sent)  # noqa: B905 - that all are sent is told without an end
            self._note([(entry, yes) for entry, yes in pairs if entry.name != head], took)

    def _wanted(self, found: list[Entry]) -> list[bool]:
        """Say of each tensor whether it is sent: codes and their scales together, or not."""
        head = self._tie and self._tie[0]
        held = () if self._held is None else self._held()
        same = [
            bool(held) and all(server.get(e.name) == e.digest for server in held) for e in found
        ]
        for i, entry in enumerate(found):
            if entry.dtype == "float8_e4m3fn":
                same[i] = same[i + 1] = same[i] and same[i + 1]
        for entry, there in zip(found, same, strict=True):
            if there:
                self.skipped.append(entry.name)
                self.bytes_skipped += entry.nbytes
            elif entry.name != head:
                self.bytes_sent += entry.nbytes
        return [not there and e.name != head for e, there in zip(found, same, strict=True)]

    def _moved(self, wanted: list[Entry]) -> list[Entry]:
        """Move tensors down to where the bucket ends without those that are left out."""
        memory, moved = self._memory, []
        assert memory is not None
        for entry in wanted:
            old, new, nbytes = entry.offset, self._used, entry.nbytes
            if new != old:
                part = memory[old : old + nbytes]
                memory[new : new + nbytes].copy_(part if new + nbytes <= old else part.clone())
            moved.append(
                Entry(entry.name, entry.dtype, entry.shape, new, entry.digest, entry.facts)
            )
            self._used += -(-nbytes // ALIGN) * ALIGN
        return moved

    def _deliver(self) -> None:
        if self._entries:
            assert self._delivery is not None
            self._delivery.give(self._slot, self._used, self._entries)
            self._delivery.deliver(self._slot, self._used, self._entries)
            self._next_slot()
        self._entries, self._used = [], 0
        self.tell()

    def _next_slot(self) -> None:
        assert self._delivery is not None
        self._slot = (self._slot + 1) % self._delivery.slots
        self._memory, self._used = None, 0

    def _check_tie(self, last: bool = False) -> None:
        """Refuse an output head that is not the embedding which stands for it."""
        if self._tie is None:
            return
        mine, its = (self.digests.get(name) for name in self._tie)
        if mine is not None and mine != its and (its is not None or last):
            head, embedding = self._tie
            how = "differs from" if its else "came without"
            raise ConflictError(
                f"{head} {how} {embedding}, which the plan has for both",
                hint="plan what is trained: fp8ctl plan --model M --backend B --out plan.json",
                data={"tensor": head},
            )
