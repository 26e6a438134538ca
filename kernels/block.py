"""The Triton block kernel: the reference's codes and scales in one pass over memory.

Equal to `fp8ctl.kernels.reference.quantize_block` bit for bit, on a GPU and in
Triton's interpreter. Three things make it so:
- both divisions are the correctly rounded ones (`tl.div_rn`; Triton's `/` is
  an approximation on a GPU);
- the code is built by integer arithmetic and stored as a byte. The
  interpreter's own conversion to FP8 loses a carry into the exponent (127.9
  becomes 64, in Triton 3.3.1 to 3.9.0), and GPUs before 8.9 have none;
- NaN and Inf are told by their bits, since Triton's max ignores NaN.

Strides are used as they are, edges are masked: no copy, no padding. The first
non-finite element is found in the same pass. Triton 3.3.1 to 3.9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8ctl.kernels.reference import NonFiniteError, block_grid, check_input

# A program holds its whole block in registers; beyond this it would spill.
MAX_BLOCK_ELEMENTS = 1 << 16

_NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _encode(y):  # type: ignore[no-untyped-def]
    """Round FP32 y, |y| <= 448, to e4m3fn, to nearest even; return the codes as int32."""
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # From 2^-6 up: keep 3 of 23 mantissa bits, ties to even, exponent bias 127 -> 7.
    # The carry of the addition goes into the exponent, where it belongs.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below: one addition rounds to multiples of 2^-9, which is the last place of 2^14.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    return sign | tl.where(magnitude >= 0x3C800000, normal, subnormal)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_block(  # type: ignore[no-untyped-def]
    x_ptr,
    code_ptr,
    scale_ptr,
    bad_ptr,
    N,
    K,
    grid_k,
    x_stride_n,
    x_stride_k,
    code_stride_n,
    code_stride_k,
    scale_stride_n,
    scale_stride_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Quantise the block of this program; TILE is BLOCK rounded up to powers of two."""
    pid = tl.program_id(0)
    block_n = (pid // grid_k).to(tl.int64)
    block_k = (pid % grid_k).to(tl.int64)
    in_n = tl.arange(0, TILE_N)
    in_k = tl.arange(0, TILE_K)
    n = block_n * BLOCK_N + in_n
    k = block_k * BLOCK_K + in_k
    inside = ((in_n < BLOCK_N) & (n < N))[:, None] & ((in_k < BLOCK_K) & (k < K))[None, :]

    x = tl.load(x_ptr + n[:, None] * x_stride_n + k[None, :] * x_stride_k, mask=inside, other=0.0)
    if x.dtype == tl.bfloat16:
        # BF16 is the upper half of FP32; the interpreter's conversion loses subnormals.
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    index = tl.where(finite, _NONE, n[:, None] * K + k[None, :])
    first_bad = tl.min(tl.min(index, axis=1), axis=0)
    if first_bad != _NONE:
        tl.atomic_min(bad_ptr, first_bad)

    # The bits of finite magnitudes order as the numbers do, subnormals included.
    top = tl.max(tl.max(tl.where(finite, magnitude, 0), axis=1), axis=0)
    amax = top.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full((), 448.0, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    scale = tl.where(top == 0, 1.0, scale).to(tl.float32)
    y = tl.div_rn(x, tl.broadcast_to(scale, (TILE_N, TILE_K)))
    y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))

    code = _encode(y).to(tl.uint8)
    tl.store(code_ptr + n[:, None] * code_stride_n + k[None, :] * code_stride_k, code, mask=inside)
    tl.store(scale_ptr + block_n * scale_stride_n + block_k * scale_stride_k, scale)


def fits(block: tuple[int, int]) -> bool:
    """Say whether this kernel takes blocks of this size."""
    elements: int = triton.next_power_of_2(block[0]) * triton.next_power_of_2(block[1])
    return elements <= MAX_BLOCK_ELEMENTS


@torch.no_grad()
def quantize_block(
    x: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a [N, K] tensor in blocks, as `reference.quantize_block` does.

    Reads every element once. One synchronisation, for the non-finite check.

    Raises:
        NonFiniteError, TypeError, ValueError: as the reference; ValueError also
            for a block that `fits` refuses.
    """
    check_input(x, 2)
    n, k = x.shape
    grid_n, grid_k = block_grid((n, k), block)
    if not fits(block):
        raise ValueError(f"block {block[0]}x{block[1]} has more than {MAX_BLOCK_ELEMENTS} elements")
    codes = torch.empty((n, k), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.ones((grid_n, grid_k), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return codes, scales
    bad = torch.full((1,), _NONE.value, dtype=torch.int64, device=x.device)
    out = codes.view(torch.uint8)
    tile_n, tile_k = triton.next_power_of_2(block[0]), triton.next_power_of_2(block[1])
    # Triton launches on the current device, wherever the tensor lies.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _quantize_block[(grid_n * grid_k,)](
            x,
            out,
            scales,
            bad,
            n,
            k,
            grid_k,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            scales.stride(0),
            scales.stride(1),
            BLOCK_N=block[0],
            BLOCK_K=block[1],
            TILE_N=tile_n,
            TILE_K=tile_k,
            num_warps=8 if tile_n * tile_k >= 8192 else 4,
        )
    first = int(bad.item())
    if first != _NONE.value:
        raise NonFiniteError((first // k, first % k), float(x[first // k, first % k]))
    return codes, scales
