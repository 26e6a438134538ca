"""Many tensors in a few launches, host work included.

A list is sorted into classes that one compiled kernel can work on. Each has a table on
the device with a row per tensor, and one launch (`device` numbers the columns). Without
a plan, tensors are checked and launched in waves that grow: the device works on one while
the host prepares the next, and views of the outputs are made when all is under way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import torch

from fp8ctl.kernels import device, launch
from fp8ctl.kernels.facts import Facts
from fp8ctl.kernels.inputs import (
    NonFiniteError,
    check_disjoint,
    check_input,
    make_outputs,
    unravel,
)
from fp8ctl.kernels.known import Known
from fp8ctl.kernels.recipes import IEEE, check_non_finite
from fp8ctl.kernels.tables import Bucket, Kind, Pair, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8ctl.kernels.groups import Groups
    from fp8ctl.kernels.recipes import NonFinite, Recipe
    from fp8ctl.kernels.tables import Numbers

_NO_SPANS = np.empty((0, 3, 2), dtype=np.int64)
# Numbers of tensors alike are below this, since there are fewer tensors in a list.
_KINDS = 1 << 20

# Tensors of the waves: the first keeps the device busy while the host goes on, the last is
# not long when the host is done.
_WAVES = (256, 320, 256, 4096)
# A place has bits for so many tensors.
_MOST = 1 << (63 - device.PLACE_BITS)


def quantize_many(
    xs: Sequence[torch.Tensor],
    groups: Groups,
    recipe: Recipe = IEEE,
    non_finite: NonFinite = "error",
    out: Sequence[Pair] | None = None,
) -> Sequence[Pair]:
    """Quantise a list of tensors of one device, as `launch.quantize` does one.

    Returns:
        codes and scales of each. Without `out`, tensors of one shape share allocations of
        up to 512 MB: a view of one keeps the others' memory. Views are made when they are
        first looked at.

    Raises:
        NonFiniteError: names the first tensor of the list that has one, and its first.
        TypeError, ValueError: as `launch.quantize`; the tensor is named.
    """
    if out is None:
        return Prepared(xs, groups, recipe, non_finite, now=True).outputs
    return start_many(xs, groups, recipe, non_finite, out).wait()


@torch.no_grad()
def start_many(
    xs: Sequence[torch.Tensor],
    groups: Groups,
    recipe: Recipe,
    non_finite: NonFinite,
    out: Sequence[Pair],
) -> Started:
    """Begin with `quantize_many`, for outputs that the caller gives, and wait for nothing.

    With "error", a list that comes again is known by what it is and where it lies: its tables
    are on the device, and what was checked holds. The other policies wait for nothing at all, so
    that a graph may capture them, which would go on to read tables that are forgotten here.

    Raises:
        TypeError, ValueError: as `quantize_many`.
        NonFiniteError: where a tensor was taken by itself, and waited for.
    """
    known, key = _known(), None
    if xs and non_finite == "error" and len(out) == len(xs):
        # What is no tensor is refused below, by its place in the list.
        with contextlib.suppress(TypeError, AttributeError, RuntimeError):
            if not any(map(torch.Tensor.is_neg, xs)):
                every = [*xs, *[pair[0] for pair in out], *[pair[1] for pair in out]]
                key = known.key(every, groups, recipe, launch.current_stream(xs[0].device))
    launches = None if key is None else known.get(key)
    if launches is None:
        plan = Prepared(xs, groups, recipe, non_finite, out)
        if key is None or plan.singles:
            return Started(plan.run())
        launches = plan.launches()
        known.put(key, launches)
    with launch.on_device(xs[0]):
        flag = launch.Flag(xs[0].device)
        for one in launches:
            one.start(flag)
        flag.fetch()
    return Started(out, xs, flag)


class Started:
    """A list on its way; made by `start_many`."""

    def __init__(
        self,
        outputs: Sequence[Pair],
        xs: Sequence[torch.Tensor] = (),
        flag: launch.Flag | None = None,
    ) -> None:
        """Take a list that is under way.

        Args:
            outputs: of it.
            xs: the tensors.
            flag: of their launches; None: all is done.
        """
        self._outputs, self._xs, self._flag = outputs, xs, flag

    def wait(self) -> Sequence[Pair]:
        """Wait for the device, as far as it has to go for this; return the outputs.

        Raises:
            NonFiniteError: as `quantize_many`.
        """
        flag, self._flag = self._flag, None
        if flag is not None:
            with flag:
                place = flag.read()
                if place is not None:
                    raise _error(self._xs, place)
        return self._outputs


@dataclass(frozen=True, eq=False)
class Launch:
    """A table, and the kernel that works on it. Holds no tensor of the list."""

    table: Table
    program: launch.Program

    def start(self, flag: launch.Flag) -> None:
        """Launch it on the current device."""
        one = self.table
        if one.amax is not None:
            one.amax.zero_()
        self.program.run(
            one.programs,
            (*(flag.tensor,) * 4, one.on_device, one.places, one.per, *(1,) * 10),
            one.amax,
            same=True,
        )


@functools.cache
def _known() -> Known[list[Launch]]:
    """Return the lists of this process."""
    return Known()


class Prepared:
    """All of `quantize_many` but the work on the device, to be run again and again.

    Attributes:
        outputs: codes and scales of each tensor; every run writes the same memory.
        singles: places of tensors that no launch takes.
    """

    outputs: Sequence[Pair]

    @torch.no_grad()
    def __init__(
        self,
        xs: Sequence[torch.Tensor],
        groups: Groups,
        recipe: Recipe = IEEE,
        non_finite: NonFinite = "error",
        out: Sequence[Pair] | None = None,
        *,
        now: bool = False,
    ) -> None:
        self._groups, self._recipe = groups, recipe
        self._non_finite = check_non_finite(non_finite)
        self._xs = list(xs)
        if len(self._xs) > _MOST:
            raise ValueError(f"{len(self._xs)} tensors; at most {_MOST} in one list")
        if out is not None and len(out) != len(self._xs):
            raise ValueError(f"{len(out)} outputs for {len(self._xs)} tensors")
        self._given = None if out is None else list(out)
        # Of inputs, and of the codes and scales that the caller gave.
        self._facts = [Facts() for _ in range(1 if out is None else 3)]
        self._kinds: dict[int, Kind] = {}
        self._launches: list[Table] = []
        self.singles: list[int] = []
        self._single_numbers: list[int] = []
        self.outputs = []
        if not self._xs:
            return
        buckets: list[Bucket] = []
        with launch.on_device(self._xs[0]), launch.Flag(self._xs[0].device) as flag:
            # Nothing of the caller's is written before all of it was found right.
            for ids in _waves(len(self._xs), _WAVES if out is None else ()):
                wave = self._sort(ids)
                buckets += wave
                launches = self._add(wave)
                if self._given is not None:
                    self._check_apart(wave)
                for one in launches:
                    self._launches.append(one)
                    if now:
                        self._launch(one).start(flag)
            if self._given is None:
                made = {i: make_outputs(self._xs[i], groups, None) for i in self.singles}
                self.outputs = _Outputs(len(self._xs), buckets, made)
            else:
                self.outputs = self._given
            if now:
                self._finish(flag)

    @torch.no_grad()
    def run(self, xs: Sequence[torch.Tensor] | None = None) -> Sequence[Pair]:
        """Quantise the tensors as they are now, or others of the same kinds; return `outputs`.

        Args:
            xs: as many tensors, each of the shape, strides, dtype and device of the one that
                the plan was made with; they take its place.

        Raises:
            NonFiniteError: as `quantize_many`.
            ValueError: a tensor is of another kind, or overlaps an output.
        """
        if xs is not None and len(xs) != len(self._xs):
            raise ValueError(f"{len(xs)} tensors; the plan was made for {len(self._xs)}")
        if not self._xs:
            return self.outputs
        before, self._xs = self._xs, self._xs if xs is None else list(xs)
        with launch.on_device(self._xs[0]), launch.Flag(self._xs[0].device) as flag:
            try:
                for one in self._launches:
                    if xs is not None:
                        self._replace(one)
                    self._launch(one).start(flag)
                self._check_singles()
            except (TypeError, ValueError):
                # The plan stays what it was, whatever its outputs hold now.
                self._xs = before
                for one in self._launches:
                    one.move(self._addresses(one.ids, one.numbers))
                raise
            self._finish(flag)
        return self.outputs

    def _sort(self, ids: range) -> list[Bucket]:
        """Return these tensors in buckets of one kind."""
        columns = [self._xs[ids.start : ids.stop]]
        if self._given is not None:
            given = self._given[ids.start : ids.stop]
            columns += [[pair[side] for pair in given] for side in (0, 1)]
        found = [self._look(facts, of, ids) for facts, of in zip(self._facts, columns, strict=True)]
        numbers = found[0][0].copy()
        for more, _ in found[1:]:
            numbers = numbers * _KINDS + more
        at = np.array([addresses for _, addresses in found])
        everywhere = np.arange(ids.start, ids.stop)
        if (numbers == numbers[0]).all():
            sorted_ = [(int(numbers[0]), everywhere, at)]
        else:
            firsts = np.unique(numbers, return_index=True)[1]
            sorted_ = []
            for number in numbers[np.sort(firsts)].tolist():
                here = np.flatnonzero(numbers == number)
                sorted_.append((number, everywhere[here], at[:, here]))
        buckets = []
        for number, here, addresses in sorted_:
            if number not in self._kinds:
                self._kinds[number] = self._new(int(here[0]))
            kind, like = self._kinds[number], int(found[0][0][here[0] - ids.start])
            buckets.append(Bucket(kind, like, here, *addresses))
            if kind.single:
                self.singles += here.tolist()
                self._single_numbers += [like] * len(here)
        return buckets

    def _look(
        self, facts: Facts, of: Sequence[torch.Tensor], ids: Sequence[int]
    ) -> tuple[Numbers, Numbers]:
        """Return numbers of what tensors are, and their addresses; `ids` are their places."""
        try:
            return facts.look(of)
        except (TypeError, AttributeError, RuntimeError):
            for i in ids:
                self._checked(i, functools.partial(check_input, self._xs[i], self._groups))
                if self._given is not None:
                    pair = self._given[i]
                    self._checked(
                        i, functools.partial(make_outputs, self._xs[i], self._groups, pair)
                    )
            raise

    def _check_apart(self, buckets: list[Bucket]) -> None:
        """Refuse outputs that overlap; where extents do not, nothing has to be looked at."""
        spans = np.concatenate([b.spans() for b in buckets if not b.kind.single] or [_NO_SPANS])
        reads, writes = spans[:, 0], spans[:, 1:].reshape(-1, 2)
        self._written = writes[np.argsort(writes[:, 0])]
        ends = np.maximum.accumulate(self._written[:, 1])
        near = (ends[:-1] > self._written[1:, 0]).any() or self._touches(reads)
        if near or self.singles:
            check_disjoint([tensor for pair in self._given or () for tensor in pair], self._xs)

    def _touches(self, reads: Numbers) -> bool:
        """Say whether extents [n, 2] of inputs meet those of the caller's outputs."""
        if not len(self._written):
            return False
        starts, ends = self._written[:, 0], np.maximum.accumulate(self._written[:, 1])
        before = np.searchsorted(starts, reads[:, 1]) - 1
        return bool(((before >= 0) & (ends[np.maximum(before, 0)] > reads[:, 0])).any())

    def _new(self, i: int) -> Kind:
        x = self._xs[i]
        self._checked(i, functools.partial(check_input, x, self._groups))
        if x.device != self._xs[0].device:
            raise ValueError(f"tensor {i} on {x.device}; the first is on {self._xs[0].device}")
        if self._given is not None:
            pair = self._given[i]
            self._checked(i, functools.partial(make_outputs, x, self._groups, pair))
        code, scale = (x, None) if self._given is None else self._given[i]
        return Kind.of(x, code, scale, self._groups)

    def _checked(self, i: int, check: Callable[[], object]) -> None:
        try:
            check()
        except (TypeError, ValueError) as e:
            raise type(e)(f"tensor {i}: {e}") from e

    def _add(self, wave: list[Bucket]) -> list[Table]:
        """Give the buckets of a wave their outputs; return the launches that they take."""
        classes: dict[launch.Variant, list[Bucket]] = {}
        for bucket in wave:
            if bucket.kind.single:
                continue
            if self._given is None:
                bucket.make_outputs(self._groups)
            classes.setdefault(bucket.variant(), []).append(bucket)
        return [Table(variant, buckets) for variant, buckets in classes.items()]

    def launches(self) -> list[Launch]:
        """Return what runs it, but for what is taken by itself (`singles`)."""
        with launch.on_device(self._xs[0]):
            return [self._launch(one) for one in self._launches]

    def _launch(self, one: Table) -> Launch:
        kernel = launch.program(
            one.variant,
            self._recipe,
            self._non_finite,
            "uniform" if one.per else "mixed",
            launch.current_device().index or 0,
        )
        return Launch(one, kernel)

    def _replace(self, one: Table) -> None:
        """Put the addresses of the tensors that are there now into a launch's table."""
        addresses = self._addresses(one.ids, one.numbers)
        if self._given is not None and self._touches(one.reads(addresses)):
            check_disjoint([tensor for pair in self._given for tensor in pair], self._xs)
        one.move(addresses)

    def _addresses(self, ids: Sequence[int], wanted: Numbers) -> Numbers:
        """Return where tensors begin, which have to be what the plan was made for."""
        xs = [self._xs[i] for i in ids]
        numbers, addresses = self._look(self._facts[0], xs, ids)
        for at in np.flatnonzero(numbers != wanted).tolist():
            i, x = ids[at], xs[at]
            raise ValueError(
                f"tensor {i} is {x.dtype} {list(x.shape)} with strides {list(x.stride())} on"
                f" {x.device}; the plan was made for another kind"
            )
        return addresses

    def _check_singles(self) -> None:
        """Refuse tensors of another kind among those that no launch looked at."""
        self._addresses(self.singles, np.array(self._single_numbers, dtype=np.int64))

    def _finish(self, flag: launch.Flag) -> None:
        """Quantise what no list takes, wait for the rest, and raise for the first NaN or Inf."""
        # The device is at work meanwhile; nobody has seen what it wrote.
        if any(map(torch.Tensor.is_neg, self._xs)):
            for i, x in enumerate(self._xs):
                self._checked(i, functools.partial(check_input, x, self._groups))
        error: NonFiniteError | None = None
        for i in self.singles:
            try:
                launch.quantize(
                    self._xs[i], self._groups, self._recipe, self._non_finite, self.outputs[i]
                )
            except NonFiniteError as e:
                error = NonFiniteError(e.index, e.value, i)
                break
        place = flag.read() if self._non_finite == "error" else None
        if place is not None and (error is None or place[0] < (error.tensor or 0)):
            error = _error(self._xs, place)
        if error is not None:
            raise error


def _error(xs: Sequence[torch.Tensor], place: tuple[int, int]) -> NonFiniteError:
    x = xs[place[0]]
    index = unravel(place[1], x.shape)
    return NonFiniteError(index, float(x.detach()[index]), place[0])


class _Outputs(Sequence[Pair]):
    """Codes and scales of a list; 2 views a tensor take longer to make than a small one to
    quantise, so they are made when they are looked at, those of one allocation together.
    """

    def __init__(self, count: int, buckets: list[Bucket], made: dict[int, Pair]) -> None:
        self._count, self._made = count, made
        self._slabs = [slab for bucket in buckets for slab in bucket.slabs]
        self._slab_of = np.zeros(count, dtype=np.int64)
        for number, slab in enumerate(self._slabs):
            self._slab_of[slab.ids] = number

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Pair: ...
    @overload
    def __getitem__(self, i: slice) -> list[Pair]: ...
    def __getitem__(self, i: int | slice) -> Pair | list[Pair]:
        if isinstance(i, slice):
            return [self[one] for one in range(*i.indices(self._count))]
        place = range(self._count)[i]
        if place not in self._made:
            self._made.update(self._slabs[self._slab_of[place]].pairs())
        return self._made[place]


def _waves(count: int, sizes: Sequence[int]) -> Iterator[range]:
    first = 0
    for size in (*sizes, count):
        if first < count:
            yield range(first, min(first + size, count))
        first += size
