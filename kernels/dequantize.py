"""FP8 codes back to numbers: code * scale, the same bits on every device.

    FP32          rne(code * scale)
    BF16, FP16    rne(rne(code * scale)), to FP32 first, as torch's `codes.float() * scales`
                  and both engines have it; a single rounding would differ now and then

rne() rounds to nearest even, keeps subnormals and overflows to Inf. A NaN code (0x7f,
0xff) gives NaN; which of the NaNs is not said.

On CUDA with triton one Triton kernel does the work, on a CPU the C of `native` where it
can be built, and torch elsewhere: in tiles, with a few megabytes of extra memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels import inputs, native
from fp8ctl.kernels.reference import keeping_denormals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from fp8ctl.kernels.groups import Groups, Shape

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Elements of a tile: on a CPU it stays in the second cache of a core, on a GPU its
# launches are long enough to fill the device.
_TILE = 1 << 17
_TILE_CUDA = 1 << 24


@torch.no_grad()
def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: Groups,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return code * scale for every code; any strides, any sides, none included.

    Args:
        codes: float8_e4m3fn, or uint8 with its bits; [N, K], and any shape where one scale
            is for all.
        scales: FP32 of `groups.scale_shape(codes.shape)`.
        groups: what shares a scale.
        dtype: of the result, FP32, FP16 or BF16; None for that of `out`, or FP32.
        out: where to write, in the shape of `codes`, any strides; None for new memory.

    Returns:
        `out`, or a new contiguous tensor.

    Raises:
        TypeError: not strided tensors, or a dtype is another.
        ValueError: a shape or device is another, or `out` overlaps itself, codes or scales.
    """
    check_quantized(codes, scales, groups)
    out = _output(codes, scales, dtype, out)
    _path(codes.device)(codes, scales, groups, out)
    return out


def check_quantized(codes: torch.Tensor, scales: torch.Tensor, groups: Groups) -> None:
    """Refuse codes and scales that do not belong together.

    Raises:
        TypeError: not strided tensors of float8_e4m3fn (or uint8) and FP32.
        ValueError: their shapes or devices do not fit.
    """
    for name, tensor in (("codes", codes), ("scales", scales)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} are a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.layout != torch.strided or tensor.is_meta or hasattr(tensor, "to_local"):
            raise TypeError(f"{name} are not plain memory: {tensor.layout} on {tensor.device}")
    if codes.dtype not in inputs.CODE_DTYPES:
        raise TypeError(f"codes of {codes.dtype}; expected float8_e4m3fn or uint8")
    if scales.dtype != torch.float32:
        raise TypeError(f"scales of {scales.dtype}; expected float32")
    if groups.kind != "per-tensor" and codes.dim() != 2:
        raise ValueError(f"expected codes [N, K] for {groups} scales, found {list(codes.shape)}")
    wanted = groups.scale_shape(codes.shape)
    if tuple(scales.shape) != wanted:
        raise ValueError(
            f"scales of shape {list(scales.shape)}; expected {list(wanted)}"
            f" for codes of {list(codes.shape)}, {groups}"
        )
    if scales.device != codes.device:
        raise ValueError(f"scales on {scales.device}, codes on {codes.device}")


def _path(device: torch.device) -> Callable[[Tensor, Tensor, Groups, Tensor], None]:
    if device.type == "cuda" and inputs.has_triton():
        return by_triton
    return by_native if device.type == "cpu" and native.available() else by_torch


def by_triton(codes: torch.Tensor, scales: torch.Tensor, groups: Groups, out: torch.Tensor) -> None:
    """Write `out` by the Triton kernel; everything has been checked."""
    from fp8ctl.kernels import dequantize_triton

    for part, target, per_group, size in _parts(codes, scales, groups, out):
        dequantize_triton.fill(part, per_group, size, target)


def by_native(codes: torch.Tensor, scales: torch.Tensor, groups: Groups, out: torch.Tensor) -> None:
    """Write `out` by the C of `native`; everything has been checked."""
    for part, target, per_group, _ in _parts(codes, scales, groups, out):
        native.dequantize(part, per_group, groups, target)


@torch.no_grad()
def by_torch(codes: torch.Tensor, scales: torch.Tensor, groups: Groups, out: torch.Tensor) -> None:
    """Write `out` by torch, on any device; everything has been checked."""
    with keeping_denormals(codes.numel()) as tile:
        for part, target, per_group, size in _parts(codes, scales, groups, out):
            for rows, columns in _tiles(part, size, tile):
                values = _values(part[rows, columns])
                spread = _spread(per_group, size, rows, columns)
                # Computed in FP32, whatever the dtype of what is written.
                torch.mul(values, spread, out=target[rows, columns])


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Return e4m3fn codes, given as uint8, as FP16 numbers 2^8 too small: exact, NaN kept.

    Five times as fast on a CPU as torch's conversion, which goes element by element.
    """
    # The sign falls into place by sign extension, the other 7 bits by a shift.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    # 0x3f80 alone, which is NaN's, carries into the bit that makes an FP16 NaN of it.
    return bits.bitwise_or_((bits + 0x80).bitwise_and_(0x4000)).view(torch.float16)


def _output(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None, out: torch.Tensor | None
) -> torch.Tensor:
    if dtype is None:
        dtype = torch.float32 if out is None else out.dtype
    if dtype not in OUTPUT_DTYPES:
        raise TypeError(f"cannot dequantise to {dtype}; expected bfloat16, float16 or float32")
    if out is None:
        return torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.dtype != dtype:
        raise TypeError(f"out of {out.dtype}; expected {dtype}")
    if out.shape != codes.shape:
        raise ValueError(f"out of shape {list(out.shape)}; expected {list(codes.shape)}")
    if out.device != codes.device:
        raise ValueError(f"out on {out.device}; expected {codes.device}, where the codes are")
    if out.is_neg():
        raise ValueError("out is a view that negates what is written")
    if inputs.folds(out):
        raise ValueError(f"out of strides {list(out.stride())} writes one place more than once")
    inputs.check_disjoint([out], [codes, scales])
    return out


def _parts(
    codes: torch.Tensor, scales: torch.Tensor, groups: Groups, out: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Shape]]:
    """Yield 2-D views of codes (uint8) and out, their scales as a matrix, sides of a group."""
    scales = scales.resolve_neg()  # kernels read memory as it is
    per_group = scales.view(1, 1) if groups.kind == "per-tensor" else scales
    for part, target in inputs.matrices(codes.view(torch.uint8), out):
        yield part, target, per_group, groups.size((part.shape[0], part.shape[1]))


def _values(codes: torch.Tensor) -> torch.Tensor:
    """Return the FP32 values of e4m3fn codes (uint8)."""
    if codes.device.type == "cpu":
        return halves(codes).float().mul_(256.0)
    return codes.view(torch.float8_e4m3fn).float()


def _spread(scales: torch.Tensor, size: Shape, rows: slice, columns: slice) -> torch.Tensor:
    """Return the scales of a tile's elements, 1 wide along a side that has one group."""
    for dim, span in enumerate((rows, columns)):
        first, last = span.start // size[dim], (span.stop - 1) // size[dim]
        scales = scales.narrow(dim, first, last - first + 1)
        if last > first:
            index = torch.arange(span.start, span.stop, device=scales.device) // size[dim] - first
            scales = scales.index_select(dim, index)
    return scales


def _tiles(codes: torch.Tensor, size: Shape, most: int) -> Iterator[tuple[slice, slice]]:
    n, k = codes.shape
    limit = _TILE_CUDA if codes.is_cuda else min(_TILE, most)
    width = min(k, limit)
    height = limit // max(1, width)
    if height < size[0]:
        # As many tiles for each group of rows, so that none has scales of two.
        height = -(-size[0] // -(-size[0] // height))
    else:
        height -= height % size[0]
    for top in range(0, n if k else 0, height):
        for left in range(0, k, width):
            yield slice(top, min(n, top + height)), slice(left, min(k, left + width))
