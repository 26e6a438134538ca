"""What came at an update, in order, and all that follows from names, dtypes and shapes alone.

A trainer gives the same tensors at every update. To find out for hundreds of them what each
becomes and where it lies takes Python longer than a GPU needs for a bucket of them, and gives what
it gave before. So an update leaves its course behind: the next one follows it for as long as the
same comes, and asks again from the first tensor on that is another.

No tensor is kept here but by `Placed`, which belongs to whose memory it lies in.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from fp8ctl.kernels.digest import Prepared
from fp8ctl.wire import Entry, Slot, place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.forms import Form

_FLOATS = {"bfloat16", "float16", "float32", "float64"}


class Step(NamedTuple):
    """One tensor that came, and what becomes of it.

    Attributes:
        name: of it.
        dtype, shape: as it came.
        fp8: it becomes FP8.
        rounded: what it is rounded to before it is quantised; None: nothing.
        slots: the places that it needs in a push: as it is, or codes and scales; none outside.
        nbytes: what counts against a bucket's size.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    fp8: bool = False
    rounded: torch.dtype | None = None
    slots: Sequence[Slot] = ()
    nbytes: int = 0


class Parcel:
    """Tensors that are placed together, one after the other. Known by identity.

    Attributes:
        nbytes: of all, from the first byte to where a next one may begin.
        entries: of each place, as in a bucket that begins with it.
        names: of these.
        scales: names of those that are made here, with their codes.
        quantised: of the tensors that came, the numbers of those that become FP8.
        kept: the numbers of the others.
        first: of each tensor that came, the number of its first place.
        floats: numbers of the places that hold numbers as they came, none of them empty.
        values: bytes of all tensors, without what lies between them.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        """Lay them out."""
        slots = [slot for step in steps for slot in step.slots]
        offsets, self.nbytes = place(slots)
        self.entries = [Entry(*slot, offset) for slot, offset in zip(slots, offsets, strict=True)]
        self.names = frozenset(slot.name for slot in slots)
        self.scales = frozenset(step.slots[1].name for step in steps if step.fp8)
        self.quantised = [i for i, step in enumerate(steps) if step.fp8]
        self.kept = [i for i, step in enumerate(steps) if not step.fp8]
        *self.first, _ = accumulate((len(step.slots) for step in steps), initial=0)
        self.floats = [
            i
            for i, one in enumerate(self.entries)
            if one.dtype in _FLOATS and one.name not in self.scales and one.nbytes
        ]
        self.values = sum(entry.nbytes for entry in self.entries)


class Placed:
    """A parcel in memory, from update to update.

    Attributes:
        parcel: which one.
        start: bytes of the bucket before it.
        entries: as in the bucket that this memory is.
        tensors: of each entry, in the memory.
        pairs: codes and scales of each tensor that becomes FP8.
        kept: where each other one is copied to.
    """

    def __init__(self, parcel: Parcel, memory: torch.Tensor, start: int) -> None:
        """Cut the memory.

        Args:
            parcel: what lies there.
            memory: uint8 of a whole bucket.
            start: bytes of the bucket before it.
        """
        self.parcel, self.start = parcel, start
        self.entries = parcel.entries
        if start:
            self.entries = [one._replace(offset=start + one.offset) for one in parcel.entries]
        self.tensors = [_at(memory, entry) for entry in self.entries]
        pairs = [parcel.first[i] for i in parcel.quantised]
        self.pairs = [(self.tensors[i], self.tensors[i + 1]) for i in pairs]
        self.kept = [self.tensors[parcel.first[i]] for i in parcel.kept]

    @functools.cached_property
    def digests(self) -> Prepared:
        """What computes the digests of all of them, again and again."""
        return Prepared((tensor, 0, 0) for tensor in self.tensors)


@dataclass(frozen=True)
class Course:
    """What came at an update that went through.

    Attributes:
        form: that it was taken by: another one may make something else of the same names.
        steps: in the order in which they came.
        parcels: by the numbers of the first step and of the one behind the last.
        complete: all that the form names came.
    """

    form: Form
    steps: Sequence[Step]
    parcels: Mapping[tuple[int, int], Parcel]
    complete: bool


class Places:
    """What lies in the memory of a carrier, from update to update."""

    def __init__(self) -> None:
        #: By the address of a bucket's memory, and the parcel.
        self._placed: dict[tuple[int, Parcel], Placed] = {}

    def at(self, parcel: Parcel, memory: torch.Tensor, start: int) -> Placed:
        """Return a parcel where it lies: it did before, or is cut now; see `Placed`."""
        key = memory.data_ptr(), parcel
        found = self._placed.get(key)
        if found is None or found.start != start:
            found = self._placed[key] = Placed(parcel, memory, start)
        return found

    def keep(self, course: Course | None) -> None:
        """Forget parcels that are not of this course: nobody asks for them any more."""
        those = set() if course is None else {*course.parcels.values()}
        self._placed = {key: one for key, one in self._placed.items() if key[1] in those}

    def clear(self) -> None:
        """Forget all: no tensor is left that uses the memory."""
        self._placed.clear()


class Follower:
    """Goes along the course of the update before, as far as the same comes."""

    def __init__(self, form: Form, before: Course | None) -> None:
        """Begin.

        Args:
            form: of this update.
            before: the course of the one before; None: there was none.
        """
        self._form = form
        self._before = before if before is not None and before.form is form else None
        self._known = () if self._before is None else self._before.steps
        #: Until the first that is another, all steps are those before: none is noted.
        self._steps: list[Step] | None = None
        self._agreed = 0
        self._first = 0
        self._parcels: dict[tuple[int, int], Parcel] = {}

    @property
    def steps(self) -> Sequence[Step]:
        """What came until now."""
        return self._known[: self._agreed] if self._steps is None else self._steps

    def next(self, name: str, tensor: torch.Tensor) -> Step | None:
        """Return what becomes of the next tensor, if it and all before it came at that update.

        Where None is returned, `add` has to follow.
        """
        if self._steps is None:
            if self._agreed < len(self._known):
                step = self._known[self._agreed]
                if step.name == name and step.dtype is tensor.dtype and step.shape == tensor.shape:
                    self._agreed += 1
                    return step
            self._steps = [*self._known[: self._agreed]]
        return None

    def add(self, step: Step) -> None:
        """Note what becomes of a tensor."""
        assert self._steps is not None
        self._steps.append(step)

    def parcel(self, steps: Sequence[Step]) -> Parcel:
        """Return what is placed together: the steps behind those of the parcel before.

        Who asks may have taken more, which do not fit any more.
        """
        key = self._first, self._first + len(steps)
        self._first = key[1]
        known = None
        if self._before is not None and key[1] <= self._agreed:
            known = self._before.parcels.get(key)
        found = self._parcels[key] = known or Parcel(steps)
        return found

    @property
    def is_complete(self) -> bool:
        """Whether it is known that all of the form came: it did by the same course."""
        same = self._steps is None and self._agreed == len(self._known)
        return same and self._before is not None and self._before.complete

    def ended(self, complete: bool) -> Course:
        """Return the course of this update.

        Args:
            complete: it was found to be.
        """
        return Course(self._form, self.steps, self._parcels, complete or self.is_complete)


def _at(memory: torch.Tensor, entry: Entry) -> torch.Tensor:
    raw = memory[entry.offset : entry.offset + entry.nbytes]
    return raw.view(getattr(torch, entry.dtype)).view(entry.shape)
