"""What a list of tensors becomes on its way to the device: kinds, buckets, tables.

Tensors of one shape, strides and dtype are one `Kind`; those of a wave lie in a `Bucket`;
buckets that one compiled kernel can work on share a `Table` on the device, with a row for
each tensor, and one launch. `device` numbers the columns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fp8ctl.kernels import device, launch
from fp8ctl.kernels.inputs import matrices, span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.kernels.groups import Groups, Shape

Pair = tuple[torch.Tensor, torch.Tensor]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

# Bytes of codes in one allocation: what a view of one tensor's codes keeps alive.
_SLAB = 512 << 20
# So many bytes CUDA copies aside before it returns, as its documentation promises; more it
# does so only for memory that is pinned.
_STAGED = 1 << 16
# A row of the table has room for sides below this.
_LONGEST = 1 << 31


@dataclass(frozen=True, eq=False)
class Kind:
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
    ) -> Kind:
        """Return the kind of a tensor.

        Args:
            x: of this kind.
            codes, scales: its outputs, where the caller gave them; else `x` and None.
            groups: what shares a scale.
        """
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

    @functools.cached_property
    def row(self) -> Numbers:
        """A row of the table for a tensor of this kind, with what they share filled in."""
        common = (0, 0, 0, *self.matrix, *self.grid, 0)
        strides = (*self.strides, *self.code_strides, *self.scale_strides)
        return np.array((*common, *strides, 0, 0), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Slab:
    """Outputs of tensors of one shape in one allocation each for codes and scales.

    Attributes:
        ids: the tensors' places in the list.
        codes: [tensors, pitch], the elements of each first.
        scales: [tensors, scales of each].
        shapes: of one tensor, and of its scales.
    """

    ids: Numbers
    codes: torch.Tensor
    scales: torch.Tensor
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def pairs(self) -> Iterator[tuple[int, Pair]]:
        """Yield each tensor's place in the list, and its codes and scales."""
        shape, scale_shape = self.shapes
        count = len(self.ids)
        codes = self.codes[:, : math.prod(shape)].view(count, *shape)
        scales = self.scales.view(count, *scale_shape)
        pairs = zip(codes.unbind(0), scales.unbind(0), strict=True)
        return zip(self.ids.tolist(), pairs, strict=True)


@dataclass
class Bucket:
    """Tensors of one kind, the number of alike inputs, their places in the list, and where
    all lies.
    """

    kind: Kind
    number: int
    ids: Numbers
    addresses: Numbers
    codes: Numbers = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    scales: Numbers = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    slabs: list[Slab] = field(default_factory=list)

    def make_outputs(self, groups: Groups) -> None:
        """Allocate outputs for all, in slabs; codes begin at multiples of 16 bytes."""
        shape = tuple(self.kind.shape)
        scale_shape = groups.scale_shape(shape)
        pitch = -(-math.prod(shape) // 16) * 16
        numbers = math.prod(scale_shape)
        where = launch.current_device()
        step = max(1, _SLAB // pitch)
        codes_at, scales_at = [], []
        for first in range(0, len(self.ids), step):
            ids = self.ids[first : first + step]
            each = np.arange(len(ids))
            codes = torch.empty((len(ids), pitch), dtype=torch.float8_e4m3fn, device=where)
            scales = torch.empty((len(ids), numbers), dtype=torch.float32, device=where)
            self.slabs.append(Slab(ids, codes, scales, (shape, scale_shape)))
            codes_at.append(codes.data_ptr() + each * pitch)
            scales_at.append(scales.data_ptr() + each * (numbers * 4))
        self.codes, self.scales = np.concatenate(codes_at), np.concatenate(scales_at)

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
        table = np.empty((len(self.ids), device.COLUMNS), dtype=np.int64)
        table[:] = self.kind.row
        table[:, 0] = self.addresses
        table[:, 1] = self.codes
        table[:, 2] = self.scales
        table[:, device.ID] = self.ids
        return table


class Table:
    """One launch over a table of tensors.

    Attributes:
        variant: what its kernel is compiled for.
        programs: how many there are.
        per: programs of every tensor, 0 where they differ.
        amax: a number for each of the groups, if they are large.
        on_device: the table.
        places: the row of each program, where they differ.
    """

    def __init__(self, variant: launch.Variant, buckets: list[Bucket]) -> None:
        where = launch.current_device()
        self.variant = variant
        self._kinds = [bucket.kind for bucket in buckets]
        counts = [len(bucket.ids) for bucket in buckets]
        tables = [bucket.rows() for bucket in buckets]
        self._table = tables[0] if len(tables) == 1 else np.concatenate(tables)
        self._numbers = [bucket.number for bucket in buckets]
        self._counts = counts
        programs = np.repeat([kind.programs for kind in self._kinds], counts)
        self._table[:, device.FIRST] = programs.cumsum() - programs
        self.programs = int(programs.sum())
        self.amax: torch.Tensor | None = None
        if variant.tiling.large:
            groups = np.repeat([kind.grid[0] * kind.grid[1] for kind in self._kinds], counts)
            self._table[:, device.AMAX] = groups.cumsum() - groups
            self.amax = torch.empty(int(groups.sum()), dtype=torch.int32, device=where)
        self.on_device = _to(self._table, where)
        self.per, self.places = self._kinds[0].programs, self.on_device
        if any(kind.programs != self.per for kind in self._kinds):
            self.per = 0
            self.places = spread(programs, where)

    @functools.cached_property
    def ids(self) -> list[int]:
        """Places of the tensors in the list, in the order of the rows."""
        ids: list[int] = self._table[:, device.ID].tolist()
        return ids

    @functools.cached_property
    def numbers(self) -> Numbers:
        """Numbers of what the inputs are."""
        return np.repeat(self._numbers, self._counts)

    def reads(self, addresses: Numbers) -> Numbers:
        """Return where inputs at these addresses begin and end, [n, 2]."""
        lengths = np.repeat([kind.spans[0] for kind in self._kinds], self._counts)
        return np.stack([addresses, addresses + lengths], axis=1)

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


def _common(addresses: Numbers) -> int:
    """Return a number that is divisible by a power of two if all the addresses are."""
    return int(np.bitwise_or.reduce(addresses))


def spread(counts: Numbers, where: torch.device) -> torch.Tensor:
    """Return 0 as often as `counts` says first, then 1, and so on, as int32 on the device.

    Made there: what the host makes, for a program each, has to be pinned to be copied without
    waiting, and pinning memory takes milliseconds.
    """
    there = _to(counts.astype(np.int32), where)
    return torch.repeat_interleave(there, output_size=int(counts.sum()))


def _to(array: np.ndarray[Any, Any], where: torch.device) -> torch.Tensor:
    """Return a copy of the array on the device, without waiting for the device."""
    tensor = torch.from_numpy(array)
    if where.type != "cuda":
        return tensor.clone()
    if array.nbytes > _STAGED:
        tensor = tensor.pin_memory()
    return tensor.to(where, non_blocking=True)
