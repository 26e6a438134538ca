"""The Triton kernel of `fp8ctl.kernels.dequantize`: its bits, one read and one write.

The same arithmetic is written twice, and the cases of tests/kernels/dequantize_cases.py
hold both to the same bits over every code:
- by the hardware, which converts e4m3 to FP16 and FP32 to BF16 exactly (compute
  capability 8.9 and up): 8 instructions for an element, where memory allows some 25;
- by integers, for older GPUs and for Triton's interpreter, whose own conversions
  lose carries, subnormals and NaN (Triton 3.3.1 to 3.9.0).

Strides are used as they are, edges are masked: no copy, no padding. Triton 3.3.1 to 3.9.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from fp8ctl.kernels.groups import Shape

# Elements of a program: two 16-byte loads for each of 128 threads. Not yet tuned on a GPU.
_ELEMENTS = 4096
_WARPS = 4
_GRID_Y = 1 << 15  # CUDA's limit is 65,535, but for the first side of a grid

_REBIAS = tl.constexpr(2.0**120)


@triton.jit
def _decode(code):  # type: ignore[no-untyped-def]
    """Return the FP32 values of e4m3fn codes, given as bytes."""
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    # Put where FP32 has them, exponent and mantissa mean 2^120 too little, for
    # subnormal codes too; one exact multiplication makes that good.
    bits = (magnitude << 20) | ((code & 0x80) << 24)
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True) * _REBIAS


@triton.jit
def _bfloat16_bits(y):  # type: ignore[no-untyped-def]
    """Round FP32 to BF16, to nearest even; return its bits as int16."""
    bits = y.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # The carry could turn a NaN into a zero.
    return tl.where(y != y, 0x7FC0, rounded).to(tl.int16)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]
    code_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    code_stride_n,
    code_stride_k,
    scale_stride_n,
    scale_stride_k,
    out_stride_n,
    out_stride_k,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Dequantise one tile. GROUP of 0: one scale along that side."""
    # No division finds the tile: a GPU divides integers by an approximate reciprocal,
    # and machine code without any is how the arithmetic is known to have none.
    top = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * TILE_N
    left = tl.program_id(0).to(tl.int64) * TILE_K
    in_n = tl.arange(0, TILE_N)
    in_k = tl.arange(0, TILE_K)
    n = top + in_n
    k = left + in_k
    inside = (n < N)[:, None] & (k < K)[None, :]

    # One scale for the tile where it lies in one group, else one per row, column or both.
    scales = scale_ptr
    if GROUP_N != 0:
        # A grid may be higher than the tensor.
        group_n = tl.minimum(top, N - 1) // GROUP_N
        if GROUP_N % TILE_N == 0:
            scales += group_n * scale_stride_n
        else:
            group_n += ((top - group_n * GROUP_N).to(tl.int32) + in_n) // GROUP_N
            scales += (group_n * scale_stride_n)[:, None]
    if GROUP_K != 0:
        group_k = left // GROUP_K
        if GROUP_K % TILE_K == 0:
            scales += group_k * scale_stride_k
        else:
            group_k += ((left - group_k * GROUP_K).to(tl.int32) + in_k) // GROUP_K
            scales += (group_k * scale_stride_k)[None, :]
    if GROUP_N % TILE_N != 0 and GROUP_K % TILE_K != 0:
        scale = tl.load(scales, mask=inside, other=0.0)
    elif GROUP_N % TILE_N != 0:
        scale = tl.load(scales, mask=(n < N)[:, None], other=0.0)
    elif GROUP_K % TILE_K != 0:
        scale = tl.load(scales, mask=(k < K)[None, :], other=0.0)
    else:
        scale = tl.load(scales)

    code = tl.load(
        code_ptr + n[:, None] * code_stride_n + k[None, :] * code_stride_k, mask=inside, other=0
    )
    if HARDWARE:
        y = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    else:
        y = _decode(code) * scale
    if out_ptr.dtype.element_ty == tl.int16:
        value = y.to(tl.bfloat16).to(tl.int16, bitcast=True) if HARDWARE else _bfloat16_bits(y)
    else:
        value = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * out_stride_n + k[None, :] * out_stride_k, value, mask=inside)


def fill(
    codes: torch.Tensor,
    scales: torch.Tensor,
    size: Shape,
    out: torch.Tensor,
    hardware: bool | None = None,
) -> None:
    """Write codes * scale into `out`; one launch, no copy, no synchronisation.

    Args:
        codes: uint8 [N, K], any strides.
        scales: FP32, one per group of `size`, any strides.
        size: sides of a group.
        out: FP32, FP16 or BF16 [N, K], any strides.
        hardware: convert by instructions of the device; None for where there are any.
    """
    if out.numel() == 0:
        return
    if out.stride(1) > out.stride(0) and min(out.shape) > 1:
        # Neighbours in memory are neighbours in a tile.
        codes, scales, size, out = codes.t(), scales.t(), (size[1], size[0]), out.t()
    n, k = out.shape
    # Zero where one group spans all: no new compilation for another length.
    group_n, group_k = (
        0 if side >= length else side for side, length in zip(size, (n, k), strict=True)
    )
    tile_n, tile_k = _tile(n, k, group_n, group_k)
    tiles_n = triton.cdiv(n, tile_n)
    if hardware is None:
        hardware = _converts(codes.device)
    # Triton launches on the current device, wherever the tensor lies.
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        _dequantize[(triton.cdiv(k, tile_k), min(tiles_n, _GRID_Y), triton.cdiv(tiles_n, _GRID_Y))](
            codes,
            scales,
            out.view(torch.int16) if out.dtype == torch.bfloat16 else out,
            n,
            k,
            *codes.stride(),
            *scales.stride(),
            *out.stride(),
            GROUP_N=group_n,
            GROUP_K=group_k,
            TILE_N=tile_n,
            TILE_K=tile_k,
            HARDWARE=hardware,
            num_warps=_WARPS,
        )


def _tile(n: int, k: int, group_n: int, group_k: int) -> Shape:
    """Return sides of a tile: powers of two, inside a group where that costs no length."""
    n, k = triton.next_power_of_2(n), triton.next_power_of_2(k)
    tile_k: int = min(k, max(256, _ELEMENTS // n))
    if (inner := group_k & -group_k) >= 64:
        tile_k = min(tile_k, inner)
    tile_n: int = min(n, _ELEMENTS // tile_k)
    if (inner := group_n & -group_n) >= 16:
        tile_n = min(tile_n, inner)
    return tile_n, tile_k


@functools.cache
def _converts(device: torch.device) -> bool:
    """Say whether the device has the instructions that the kernel means by HARDWARE."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and isinstance(_dequantize, triton.JITFunction)  # not the interpreter
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )
