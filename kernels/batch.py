"""Many tensors in a few launches, host work included.

A list is sorted into classes that one compiled kernel can work on. Each has a table on
the device with a row per tensor, and one launch (`device` numbers the columns). Without
a plan, tensors are checked and launched in waves that grow: the device works on one while
the host prepares the next, and views of the outputs are made when all is under way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from fp8ctl.kernels import device, launch
from fp8ctl.kernels.inputs import (
    NonFiniteError,
    check_disjoint,
    check_input,
    make_outputs,
    matrices,
    span,
    unravel,
)
from fp8ctl.kernels.recipes import IEEE, check_non_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8ctl.kernels.groups import Groups, Shape
    from fp8ctl.kernels.recipes import NonFinite, Recipe

Pair = tuple[torch.Tensor, torch.Tensor]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

_NO_SPANS = np.empty((0, 3, 2), dtype=np.int64)
_DTYPE, _SHAPE = operator.attrgetter("dtype"), operator.attrgetter("shape")

# Tensors of the waves: the first keeps the device busy while the host goes on.
_WAVES = (256, 256, 512, 4096)
# Bytes of codes in one allocation: what a view of one tensor's codes keeps alive.
_SLAB = 256 << 20
# A place has bits for so many tensors, and a row of the table for sides below this.
_MOST = 1 << (63 - device.PLACE_BITS)
_LONGEST = 1 << 31


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
        up to 256 MB: a view of one keeps the others' memory. Views are made when they are
        first looked at.

    Raises:
        NonFiniteError: names the first tensor of the list that has one, and its first.
        TypeError, ValueError: as `launch.quantize`; the tensor is named.
    """
    return Prepared(xs, groups, recipe, non_finite, out, now=True).outputs


class Prepared:
    """All of `quantize_many` but the work on the device, to be run again and again.

    Attributes:
        outputs: codes and scales of each tensor; every run writes the same memory.
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
        # Kinds in order of appearance, and their numbers by what makes tensors one of a kind.
        self._kinds: list[_Kind] = []
        self._numbers: dict[object, int] = {}
        self._launches: list[_Launch] = []
        self._singles: list[int] = []
        self._single_numbers: list[int] = []
        self.outputs = []
        if not self._xs:
            return
        buckets: list[_Bucket] = []
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
                        self._start(one, flag)
            if self._given is None:
                made = {i: make_outputs(self._xs[i], groups, None) for i in self._singles}
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
                    self._start(one, flag)
                self._check_singles()
            except (TypeError, ValueError):
                # The plan stays what it was, whatever its outputs hold now.
                self._xs = before
                for one in self._launches:
                    one.move(_addresses([before[i] for i in one.ids]))
                raise
            self._finish(flag)
        return self.outputs

    def _sort(self, ids: range) -> list[_Bucket]:
        """Return these tensors in buckets of one kind."""
        xs = self._xs[ids.start : ids.stop]
        # The host's inner loop: what is called for each tensor is in C, but for new kinds.
        found = self._look_up(xs, ids)
        while None in found:
            # Mostly all are of the first one's kind; if not, the next time finds every other.
            new = [at for at, number in enumerate(found) if number is None]
            for at in new[:1] if len(self._kinds) == 0 else new:
                key = next(self._keys([xs[at]], [ids[at]]))
                if key not in self._numbers:
                    self._kinds.append(self._new(ids[at]))
                    self._numbers[key] = len(self._numbers)
            found = self._look_up(xs, ids)
        numbers = np.array(found, dtype=np.int64)
        addresses = _addresses(xs)
        buckets = []
        for number in {*found}:
            kind, here = self._kinds[number or 0], np.flatnonzero(numbers == number)
            buckets.append(_Bucket(kind, number or 0, here + ids.start, addresses[here]))
            if kind.single:
                self._singles += (here + ids.start).tolist()
                self._single_numbers += [number or 0] * len(here)
        return buckets

    def _look_up(self, xs: list[torch.Tensor], ids: Sequence[int]) -> list[int | None]:
        """Return the numbers of the tensors' kinds, None for new ones."""
        try:
            return [*map(self._numbers.get, self._keys(xs, ids))]
        except (TypeError, AttributeError, RuntimeError):
            for i, x in zip(ids, xs, strict=True):
                self._checked(i, functools.partial(check_input, x, self._groups))
            raise

    def _keys(self, xs: list[torch.Tensor], ids: Sequence[int]) -> Iterator[object]:
        """Yield what makes each tensor one of a kind; `ids` are their places in the list.

        By calls in C, without an object that is kept: a list of tuples would have Python
        collect garbage, for longer than the device takes.
        """
        # Strides count where they are not what the shape says; asking for them is slow.
        strides: list[object] = [*map(torch.Tensor.is_contiguous, xs)]
        if not all(strides):
            strides = [dense or x.stride() for dense, x in zip(strides, xs, strict=True)]
        where = map(torch.Tensor.get_device, xs)
        facts = zip(map(type, xs), map(_DTYPE, xs), where, map(_SHAPE, xs), strides)  # noqa: B905
        if self._given is None:
            return facts
        return zip(facts, map(_layout, (self._given[i] for i in ids)))  # noqa: B905

    def _check_apart(self, buckets: list[_Bucket]) -> None:
        """Refuse outputs that overlap; where extents do not, nothing has to be looked at."""
        spans = np.concatenate([b.spans() for b in buckets if not b.kind.single] or [_NO_SPANS])
        reads, writes = spans[:, 0], spans[:, 1:].reshape(-1, 2)
        self._written = writes[np.argsort(writes[:, 0])]
        ends = np.maximum.accumulate(self._written[:, 1])
        near = (ends[:-1] > self._written[1:, 0]).any() or self._touches(reads)
        if near or self._singles:
            check_disjoint([tensor for pair in self._given or () for tensor in pair], self._xs)

    def _touches(self, reads: Numbers) -> bool:
        """Say whether extents [n, 2] of inputs meet those of the caller's outputs."""
        if not len(self._written):
            return False
        starts, ends = self._written[:, 0], np.maximum.accumulate(self._written[:, 1])
        before = np.searchsorted(starts, reads[:, 1]) - 1
        return bool(((before >= 0) & (ends[np.maximum(before, 0)] > reads[:, 0])).any())

    def _new(self, i: int) -> _Kind:
        x = self._xs[i]
        self._checked(i, functools.partial(check_input, x, self._groups))
        if x.device != self._xs[0].device:
            raise ValueError(f"tensor {i} on {x.device}; the first is on {self._xs[0].device}")
        if self._given is not None:
            pair = self._given[i]
            self._checked(i, functools.partial(make_outputs, x, self._groups, pair))
        code, scale = (x, None) if self._given is None else self._given[i]
        return _Kind.of(x, code, scale, self._groups)

    def _checked(self, i: int, check: Callable[[], object]) -> None:
        try:
            check()
        except (TypeError, ValueError) as e:
            raise type(e)(f"tensor {i}: {e}") from e

    def _add(self, wave: list[_Bucket]) -> list[_Launch]:
        """Give the buckets of a wave their outputs; return the launches that they take."""
        classes: dict[launch.Variant, list[_Bucket]] = {}
        for bucket in wave:
            if bucket.kind.single:
                continue
            if self._given is None:
                bucket.make_outputs(self._groups)
            else:
                bucket.take_outputs([self._given[i] for i in bucket.ids])
            classes.setdefault(bucket.variant(), []).append(bucket)
        return [_Launch(variant, buckets) for variant, buckets in classes.items()]

    def _start(self, one: _Launch, flag: launch.Flag) -> None:
        if one.amax is not None:
            one.amax.zero_()
        kernel = launch.program(
            one.variant,
            self._recipe,
            self._non_finite,
            "uniform" if one.per else "mixed",
            launch.current_device().index or 0,
        )
        kernel.run(
            one.programs,
            (*(flag.tensor,) * 4, one.on_device, one.places, one.per, *(1,) * 10),
            one.amax,
            same=True,
        )

    def _replace(self, one: _Launch) -> None:
        """Put the addresses of the tensors that are there now into a launch's table."""
        xs = [self._xs[i] for i in one.ids]
        self._check_kinds(xs, one.ids, one.numbers)
        addresses = _addresses(xs)
        if self._given is not None and self._touches(one.reads(addresses)):
            check_disjoint([tensor for pair in self._given for tensor in pair], self._xs)
        one.move(addresses)

    def _check_kinds(self, xs: list[torch.Tensor], ids: Sequence[int], numbers: list[int]) -> None:
        found = self._look_up(xs, ids)
        for i, x, number, wanted in zip(ids, xs, found, numbers, strict=True):
            if number != wanted:
                raise ValueError(
                    f"tensor {i} is {x.dtype} {list(x.shape)} with strides {list(x.stride())} on"
                    f" {x.device}; the plan was made for another kind"
                )

    def _check_singles(self) -> None:
        """Refuse tensors of another kind among those that no launch looked at."""
        xs = [self._xs[i] for i in self._singles]
        self._check_kinds(xs, self._singles, self._single_numbers)

    def _finish(self, flag: launch.Flag) -> None:
        """Quantise what no list takes, wait for the rest, and raise for the first NaN or Inf."""
        # The device is at work meanwhile; nobody has seen what it wrote.
        if any(map(torch.Tensor.is_neg, self._xs)):
            for i, x in enumerate(self._xs):
                self._checked(i, functools.partial(check_input, x, self._groups))
        error: NonFiniteError | None = None
        for i in self._singles:
            try:
                launch.quantize(
                    self._xs[i], self._groups, self._recipe, self._non_finite, self.outputs[i]
                )
            except NonFiniteError as e:
                error = NonFiniteError(e.index, e.value, i)
                break
        place = flag.read() if self._non_finite == "error" else None
        if place is not None and (error is None or place[0] < (error.tensor or 0)):
            x = self._xs[place[0]]
            index = unravel(place[1], x.shape)
            error = NonFiniteError(index, float(x[index]), place[0])
        if error is not None:
            raise error


class _Outputs(Sequence[Pair]):
    """Codes and scales of a list; 2 views a tensor take longer to make than a small one to
    quantise, so they are made when they are looked at, those of one allocation together.
    """

    def __init__(self, count: int, buckets: list[_Bucket], made: dict[int, Pair]) -> None:
        self._count, self._made = count, made
        self._slabs = [slab for bucket in buckets for slab in bucket.slabs]
        self._slab_of = np.zeros(count, dtype=np.int64)
        for number, (ids, _, _) in enumerate(self._slabs):
            self._slab_of[ids] = number

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
            ids, codes, scales = self._slabs[self._slab_of[place]]
            pairs = zip(codes.unbind(0), scales.unbind(0), strict=True)
            self._made.update(zip(ids.tolist(), pairs, strict=True))
        return self._made[place]


@dataclass(frozen=True, eq=False)
class _Kind:
    """What tensors of one type, shape and strides share, and so do their outputs.

    Attributes:
        single: taken one by one: empty, of no single matrix, or with a side of 2^31 and up.
    """

    dtype: torch.dtype
    shape: torch.Size
    matrix: Shape
    strides: Shape
    code_strides: Shape
    scale_strides: Shape
    grid: Shape
    tiling: launch.Tiling
    programs: int
    spans: tuple[int, int, int]
    single: bool

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        groups: Groups,
    ) -> _Kind:
        parts = matrices(x, codes)
        matrix, code = parts[0] if parts else (x.view(0, 0), x.view(0, 0))
        shape = (matrix.shape[0], matrix.shape[1])
        grid = groups.grid(shape)
        plan = launch.tiling(shape, groups)
        # Outputs that are made here are contiguous.
        contiguous = (shape[1], 1)
        scale_strides = (grid[1], 1)
        if groups.kind == "per-tensor":
            scale_strides = (0, 0)
        elif scales is not None:
            scale_strides = (scales.stride(0), scales.stride(1))
        return cls(
            x.dtype,
            x.shape,
            shape,
            (matrix.stride(0), matrix.stride(1)),
            contiguous if scales is None else (code.stride(0), code.stride(1)),
            scale_strides,
            grid,
            plan,
            plan.programs(shape, groups),
            (_length(x), _length(codes), 0 if scales is None else _length(scales)),
            x.numel() == 0 or len(parts) != 1 or max(shape) >= _LONGEST,
        )


@dataclass
class _Bucket:
    """Tensors of one kind, its number, their places in the list, and where all lies."""

    kind: _Kind
    number: int
    ids: Numbers
    addresses: Numbers
    codes: Numbers = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    scales: Numbers = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    slabs: list[tuple[Numbers, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def make_outputs(self, groups: Groups) -> None:
        """Allocate outputs for all, in slabs; codes begin at multiples of 16 bytes."""
        kind = self.kind
        elements = kind.shape.numel()
        pitch = -(-elements // 16) * 16
        scale_shape = groups.scale_shape(kind.shape)
        where = launch.current_device()
        step = max(1, _SLAB // pitch)
        codes_at, scales_at = [], []
        for first in range(0, len(self.ids), step):
            count = min(step, len(self.ids) - first)
            codes = torch.empty((count, pitch), dtype=torch.float8_e4m3fn, device=where)
            scales = torch.empty((count, *scale_shape), dtype=torch.float32, device=where)
            ids = self.ids[first : first + count]
            self.slabs.append((ids, codes[:, :elements].view(count, *kind.shape), scales))
            each = np.arange(count)
            codes_at.append(codes.data_ptr() + each * pitch)
            scales_at.append(scales.data_ptr() + each * (math.prod(scale_shape) * 4))
        self.codes, self.scales = np.concatenate(codes_at), np.concatenate(scales_at)

    def take_outputs(self, given: list[Pair]) -> None:
        """Note where the outputs lie that the caller gave."""
        self.codes = np.array([codes.data_ptr() for codes, _ in given], dtype=np.int64)
        self.scales = np.array([scales.data_ptr() for _, scales in given], dtype=np.int64)

    def spans(self) -> Numbers:
        """Return where inputs, codes and scales begin and end, [n, 3, 2]."""
        starts = np.stack([self.addresses, self.codes, self.scales], axis=1)
        return np.stack([starts, starts + self.kind.spans], axis=2)

    def variant(self) -> launch.Variant:
        """Return what the kernel for these tensors is compiled for."""
        kind = self.kind
        return launch.Variant.of(
            kind.dtype,
            kind.tiling,
            kind.matrix,
            (kind.strides, _common(self.addresses)),
            (kind.code_strides, _common(self.codes)),
        )

    def rows(self) -> Numbers:
        """Return the rows of the table for these tensors; `first` and `amax` stay open."""
        kind = self.kind
        table = np.zeros((len(self.ids), device.COLUMNS), dtype=np.int64)
        table[:, 0] = self.addresses
        table[:, 1] = self.codes
        table[:, 2] = self.scales
        table[:, 3:7] = (*kind.matrix, *kind.grid)
        table[:, 8:14] = (*kind.strides, *kind.code_strides, *kind.scale_strides)
        table[:, device.ID] = self.ids
        return table


class _Launch:
    """One launch over a table of tensors.

    Attributes:
        variant: what its kernel is compiled for.
        ids: places of the tensors in the list, in the order of the rows.
        numbers: of their kinds.
        programs: how many there are.
        per: programs of every tensor, 0 where they differ.
        amax: a number for each of the groups, if they are large.
        on_device: the table.
        places: the row of each program, where they differ.
    """

    def __init__(self, variant: launch.Variant, buckets: list[_Bucket]) -> None:
        where = launch.current_device()
        self.variant = variant
        self._kinds = [bucket.kind for bucket in buckets]
        counts = [len(bucket.ids) for bucket in buckets]
        tables = [bucket.rows() for bucket in buckets]
        self._table = tables[0] if len(tables) == 1 else np.concatenate(tables)
        self.ids: list[int] = self._table[:, device.ID].tolist()
        self.numbers: list[int] = []
        for bucket, count in zip(buckets, counts, strict=True):
            self.numbers += [bucket.number] * count
        self._spans = np.repeat([kind.spans[0] for kind in self._kinds], counts)
        programs = np.repeat([kind.programs for kind in self._kinds], counts)
        self._table[:, device.FIRST] = np.cumsum(programs) - programs
        self.programs = int(programs.sum())
        self.amax: torch.Tensor | None = None
        if variant.tiling.large:
            groups = np.repeat([kind.grid[0] * kind.grid[1] for kind in self._kinds], counts)
            self._table[:, device.AMAX] = np.cumsum(groups) - groups
            self.amax = torch.empty(int(groups.sum()), dtype=torch.int32, device=where)
        self.on_device = _to(self._table, where)
        self.per, self.places = self._kinds[0].programs, self.on_device
        if any(kind.programs != self.per for kind in self._kinds):
            self.per = 0
            rows = np.arange(len(programs), dtype=np.int32)
            self.places = _to(np.repeat(rows, programs), where)

    def reads(self, addresses: Numbers) -> Numbers:
        """Return where inputs at these addresses begin and end, [n, 2]."""
        return np.stack([addresses, addresses + self._spans], axis=1)

    def move(self, addresses: Numbers) -> None:
        """Work on tensors of the same kinds at other addresses, aligned as they may be."""
        self._table[:, 0] = addresses
        uniform = self.places is self.on_device
        self.on_device = _to(self._table, launch.current_device())
        if uniform:
            self.places = self.on_device
        common = _common(addresses)
        layouts = [
            launch.layout_of(kind.matrix, kind.strides, common, kind.dtype.itemsize)
            for kind in self._kinds
        ]
        self.variant = dataclasses.replace(self.variant, layout=min(layouts, key=abs))


def _length(t: torch.Tensor) -> int:
    start, end = span(t)
    return end - start


def _layout(pair: Pair) -> object:
    """Return what outputs have to share to be written as one kind."""
    codes, scales = pair
    return (codes.dtype, codes.device, codes.shape, codes.stride()), (
        *(scales.dtype, scales.device, scales.shape, scales.stride()),
    )


def _waves(count: int, sizes: Sequence[int]) -> Iterator[range]:
    first = 0
    for size in (*sizes, count):
        if first < count:
            yield range(first, min(first + size, count))
        first += size


def _addresses(xs: list[torch.Tensor]) -> Numbers:
    return np.array([*map(torch.Tensor.data_ptr, xs)], dtype=np.int64)


def _common(addresses: Numbers) -> int:
    """Return a number that is divisible by a power of two if all the addresses are."""
    return int(np.bitwise_or.reduce(addresses))


def _to(array: np.ndarray[Any, Any], where: torch.device) -> torch.Tensor:
    """Return a copy of the array on the device, without waiting for the device."""
    tensor = torch.from_numpy(array)
    if where.type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(where, non_blocking=True)
