"""Launches the Triton kernels: on one tensor here, on a list in `batch`.

What a kernel is compiled for (`Variant`) follows from the groups, the recipe and how
the tensor lies in memory; numbers that change from tensor to tensor stay arguments.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from fp8ctl.kernels import device
from fp8ctl.kernels.fetched import Fetched
from fp8ctl.kernels.inputs import (
    NonFiniteError,
    check_disjoint,
    check_input,
    make_outputs,
    matrices,
    unravel,
)
from fp8ctl.kernels.recipes import IEEE, check_non_finite

if TYPE_CHECKING:
    from fp8ctl.kernels.groups import Groups, Shape
    from fp8ctl.kernels.recipes import NonFinite, Recipe

# A tile of a large group; and what a program of several small groups works on.
_ELEMENTS = 1 << 14
_FEW = 1 << 12
# The largest group for one program: 1,024 threads with 64 elements each.
_LARGEST = 1 << 16
_ELEMENTS_OF_A_THREAD = 64

_TRITON_DTYPE = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Tiling:
    """How groups of one size are dealt out to programs.

    Attributes:
        tile: sides of what a program works on, powers of two; of one group unless `large`.
        block: sides of a group as the kernel needs them; 0 where a group is as long as
            the tensor, which only a `large` one needs to know.
        above: groups of one program, one above the other.
        large: a group is cut into tiles, and read twice.
    """

    tile: Shape
    block: Shape
    above: int
    large: bool

    @property
    def warps(self) -> int:
        """Return how many warps share the tile."""
        elements = self.above * self.tile[0] * self.tile[1]
        each = _ELEMENTS_OF_A_THREAD // 2 if elements <= _FEW else _ELEMENTS_OF_A_THREAD
        return min(32, max(1, elements // (32 * each)))

    def programs(self, shape: Shape, groups: Groups) -> int:
        """Return how many programs a [N, K] tensor takes."""
        down, across = groups.grid(shape)
        if not self.large:
            return -(-down // self.above) * across
        size = groups.size(shape)
        tiles = -(-size[0] // self.tile[0]) * -(-size[1] // self.tile[1])
        return down * across * tiles


def tiling(shape: Shape, groups: Groups) -> Tiling:
    """Return how the groups of a [N, K] tensor are dealt out."""
    size = groups.size(shape)
    tile = _power(size[0]), _power(size[1])
    if tile[0] * tile[1] > _LARGEST:
        return tiles(shape, groups)
    # A group as long as its tensor ends where the tensor ends: any side will do, and one
    # of the tile's spares a compilation for every length.
    block = size if groups.kind == "block" else tile
    rows = _power(groups.grid(shape)[0])
    above = min(rows, max(1, _FEW // (tile[0] * tile[1])))
    return Tiling(tile, block, above, large=False)


def tiles(shape: Shape, groups: Groups) -> Tiling:
    """Return how groups are cut into tiles that are worked on by themselves."""
    size = groups.size(shape)
    rows = min(_power(size[0]), max(1, _ELEMENTS // min(_power(size[1]), 1024)))
    tile = rows, min(_power(size[1]), _ELEMENTS // rows)
    whole = {"block": size, "per-channel": (1, 0), "per-tensor": (0, 0)}
    return Tiling(tile, whole[groups.kind], 1, large=True)


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        dtype: of the input.
        tiling: see there.
        layout: alignment of the input in elements: positive along k, negative along n,
            0 for neither (`device._quantize`).
        code_layout: alignment of the codes along k, 0 for none.
        k_multiple: a power of two up to 16 that divides K.
        whole: no group is cut by the tensor's edge.
    """

    dtype: torch.dtype
    tiling: Tiling
    layout: int
    code_layout: int
    k_multiple: int
    whole: bool

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        tiling: Tiling,
        shape: Shape,
        x: tuple[Shape, int],
        codes: tuple[Shape, int],
    ) -> Variant:
        """Return the variant for [N, K] tensors.

        Args:
            dtype: of the input.
            tiling: of the groups.
            shape: of each tensor.
            x: strides and address; of many addresses, all of them with `or`.
            codes: the same of the codes.
        """
        block = tiling.block[0] * tiling.above, tiling.block[1]
        whole = not tiling.large and tiling.tile == tiling.block
        return cls(
            dtype,
            tiling,
            layout_of(shape, *x, dtype.itemsize),
            max(0, layout_of(shape, *codes, 1)),
            math.gcd(shape[1], 16),
            whole and shape[0] % block[0] == 0 and shape[1] % block[1] == 0,
        )

    def constants(self, recipe: Recipe, non_finite: NonFinite, hardware: bool) -> dict[str, Any]:
        """Return the arguments that the kernels are compiled with.

        Args:
            recipe, non_finite: what they compute.
            hardware: the GPU converts to FP8 itself.
        """
        constants = {
            "TILE_N": self.tiling.tile[0],
            "TILE_K": self.tiling.tile[1],
            "DTYPE": _TRITON_DTYPE[self.dtype],
            "LAYOUT": self.layout,
            "CODE_LAYOUT": self.code_layout,
            "K_MULTIPLE": self.k_multiple,
            "X_BYTES": min(16, max(1, abs(self.layout)) * self.dtype.itemsize),
            "ARITHMETIC": recipe.arithmetic,
            "FLOOR": recipe.floor_bits,
            "NON_FINITE": non_finite,
            "FUSED": not INTERPRETED,
            "STEPS": 2 if self.dtype == torch.float32 else 1,
            "HARDWARE": hardware,
            "num_warps": self.tiling.warps,
        }
        if not INTERPRETED:
            constants["enable_fp_fusion"] = False
            # Three programs of 8 warps at a time keep enough reads in flight; nothing
            # spills at this number of registers (docs/kernels.md).
            registers = 96 if self.dtype == torch.float32 else 80
            constants["maxnreg"] = min(registers, 65536 // (32 * self.tiling.warps))
        if self.tiling.large:
            constants["WHOLE_N"] = self.tiling.block[0] == 0
            constants["WHOLE_K"] = self.tiling.block[1] == 0
        else:
            constants["BLOCK_N"], constants["BLOCK_K"] = self.tiling.block
            constants["R"] = self.tiling.above
            constants["WHOLE"] = self.whole
        return constants


@torch.no_grad()
def quantize(
    x: torch.Tensor,
    groups: Groups,
    recipe: Recipe = IEEE,
    non_finite: NonFinite = "error",
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise one tensor, as `reference.quantize` does; one synchronisation, for the check.

    Raises:
        NonFiniteError, TypeError, ValueError: as the reference; ValueError also where an
            output overlaps the other, or the input.
    """
    check_non_finite(non_finite)
    check_input(x, groups)
    codes, scales = make_outputs(x, groups, out)
    if out is not None:
        check_disjoint((codes, scales), (x,))
    if x.numel() == 0:
        scales.fill_(recipe.scale_of_zeros)
        return codes, scales
    bytes_ = codes.view(torch.uint8)
    strides = (scales.stride(0), scales.stride(1)) if scales.dim() == 2 else (0, 0)
    parts = matrices(x, bytes_)
    # Triton launches on the current device, wherever the tensor lies.
    with on_device(x), Flag(x.device) as flag:
        # Parts of one tensor: first the amax of all, then the codes of all.
        amax = torch.zeros(1, dtype=torch.int32, device=x.device) if len(parts) > 1 else None
        for passes in ((0, 1),) if amax is None else ((0,), (1,)):
            for matrix, code in parts:
                _one(matrix, code, scales, strides, flag, groups, recipe, non_finite, amax, passes)
        place = flag.read() if non_finite == "error" else None
    if place is not None and len(parts) > 1:
        # Each part counts for itself; reading again is for this rare case alone.
        index = tuple(torch.isfinite(x).logical_not_().nonzero()[0].tolist())
        raise NonFiniteError(index, float(x[index]))
    if place is not None:
        index = unravel(place[1], tuple(x.shape))
        raise NonFiniteError(index, float(x[index]))
    return codes, scales


def _one(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    scale_strides: Shape,
    flag: Flag,
    groups: Groups,
    recipe: Recipe,
    non_finite: NonFinite,
    amax: torch.Tensor | None,
    passes: tuple[int, ...],
) -> None:
    """Launch the work on one [N, K] tensor, or on one such part of a tensor."""
    n, k = x.shape
    grid = groups.grid((n, k))
    plan = tiling((n, k), groups) if amax is None else tiles((n, k), groups)
    variant = Variant.of(
        x.dtype,
        plan,
        (n, k),
        ((x.stride(0), x.stride(1)), x.data_ptr()),
        ((codes.stride(0), codes.stride(1)), codes.data_ptr()),
    )
    strides = (*x.stride(), *codes.stride(), *scale_strides)
    if plan.large and amax is None:
        amax = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=x.device)
    program(variant, recipe, non_finite).run(
        plan.programs((n, k), groups),
        (x, codes, scales, *(flag.tensor,) * 3, 1, n, k, *grid, *strides),
        amax,
        passes,
    )


class Program:
    """A kernel as it is compiled for one variant and recipe; made by `program`."""

    def __init__(self, variant: Variant, constants: dict[str, Any]) -> None:
        self._variant, self._constants = variant, constants
        self._large = variant.tiling.large
        self._compiled: dict[int, Any] = {}

    def run(
        self,
        programs: int,
        arguments: tuple[Any, ...],
        amax: torch.Tensor | None = None,
        passes: tuple[int, ...] = (0, 1),
        *,
        same: bool = False,
    ) -> None:
        """Launch what quantises: one kernel, or the two passes over large groups.

        Args:
            programs: how many programs.
            arguments: of the kernel, up to the strides of the scales.
            amax: int32 zeros, one per group, if groups are large.
            passes: over large groups: 0 finds the amax, 1 writes the codes.
            same: arguments have the types and alignments of every other such run. Then
                Triton need not look at them again, which is most of a launch's time.
        """
        if not self._large:
            self._launch(device._quantize, 0, programs, arguments, {}, same)
            return
        block = self._variant.tiling.block
        for second in passes:
            more = (*arguments, amax, programs, *block)
            self._launch(device._large, second, programs, more, {"SECOND": bool(second)}, same)

    def _launch(
        self,
        kernel: Any,
        number: int,
        programs: int,
        arguments: tuple[Any, ...],
        more: dict[str, Any],
        same: bool,
    ) -> None:
        known = self._compiled.get(number) if same else None
        if known is not None:
            compiled, constants = known
            compiled[(programs, 1, 1)](*arguments, *constants)
            return
        constants = {**self._constants, **more}
        compiled = kernel[(programs,)](*arguments, **constants)
        if same and not INTERPRETED:
            names = kernel.arg_names[len(arguments) :]
            self._compiled[number] = compiled, [constants[name] for name in names]


def program(
    variant: Variant, recipe: Recipe, non_finite: NonFinite, lists: str = "", index: int = 0
) -> Program:
    """Return the kernel for a variant, a recipe and a policy.

    Args:
        lists: "" for one tensor; "uniform" or "mixed" for a list of tensors that take equally
            many programs, or not.
        index: of the GPU.
    """
    hardware = not INTERPRETED and _capability() >= (8, 9)
    return _program(variant, recipe, non_finite, lists, index, hardware)


@functools.cache
def _program(
    variant: Variant,
    recipe: Recipe,
    non_finite: NonFinite,
    lists: str,
    index: int,
    hardware: bool,
) -> Program:
    constants = variant.constants(recipe, non_finite, hardware)
    constants |= {"LIST": bool(lists), "UNIFORM": lists == "uniform"}
    return Program(variant, constants)


def layout_of(shape: Shape, strides: Shape, address: int, itemsize: int) -> int:
    """Return how a [N, K] tensor is aligned: see `Variant.layout`; at most 16 elements."""
    for sign, unit, other in ((1, 1, 0), (-1, 0, 1)):
        if strides[unit] == 1 or shape[unit] == 1:
            elements = math.gcd(strides[other], 16) if shape[other] > 1 else 16
            while min(16, elements * itemsize) > math.gcd(address, 16):
                elements //= 2
            return sign * elements
    return 0


class Flag:
    """A number on the device that a kernel lowers to the first place that is not finite.

    Kept between calls, one for each that runs at the same time: making one is a launch.
    """

    _spare: dict[torch.device, list[torch.Tensor]] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, where: torch.device) -> None:
        self._fetched: Fetched | None = None
        self._pool = self._spare.setdefault(where, [])
        try:
            self.tensor = self._pool.pop()
        except IndexError:
            self.tensor = torch.full((1,), device.NO_PLACE, dtype=torch.int64, device=where)

    def __enter__(self) -> Flag:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._pool.append(self.tensor)

    def fetch(self) -> None:
        """Queue what `read` returns then: it does not wait for what is queued later."""
        self._fetched = Fetched(self.tensor)

    def read(self) -> tuple[int, int] | None:
        """Wait for the device; return tensor and position, and make the flag new."""
        fetched = self._fetched
        place = int(self.tensor.item() if fetched is None else fetched.tolist()[0])
        if place == device.NO_PLACE:
            return None
        self.tensor.fill_(device.NO_PLACE)
        return place >> device.PLACE_BITS, place & ((1 << device.PLACE_BITS) - 1)


def on_device(x: torch.Tensor) -> torch.cuda.device_of:
    """Return a context in which kernels are launched where `x` lies."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


def current_device() -> torch.device:
    """Return the device that kernels are launched on: the current GPU, or the interpreter's CPU."""
    if INTERPRETED:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def current_stream(where: torch.device) -> int:
    """Return what tells the stream that kernels of a device are launched on from others."""
    return 0 if INTERPRETED else int(torch.cuda.current_stream(where).cuda_stream)


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _power(side: int) -> int:
    power: int = triton.next_power_of_2(max(1, side))
    return power
