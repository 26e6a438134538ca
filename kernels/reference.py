"""The exact FP8 reference in plain PyTorch: what every other kernel must equal, bit for bit.

Recipe `ieee` (docs/design.md, "Numbers"): per group of elements
    scale = amax / 448                 FP32, true division
    code  = RNE(x / scale) in e4m3fn   FP32, true division, one rounding more
A group of zeros has scale 1. A scale is never below 2^-126, so neither scale
nor quotient meets a flush to zero that would show in a code. NaN and Inf are
refused. Large tensors go through in stripes: extra memory is a few stripes.

Runs in an engine's interpreter: standard library and torch only.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

FP8_MAX = 448.0  # largest finite e4m3fn
MIN_SCALE = 2.0**-126  # smallest normal FP32
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Elements that are worked on at a time. 4 MB of FP32 stays in the caches of a
# core pair; 2^22 and 2^16 were each about a third slower on 2 x86 cores.
_STRIPE = 1 << 20


class NonFiniteError(ValueError):
    """The input holds NaN or Inf, which has no FP8 code and would spoil its whole group.

    Attributes:
        index: position of the first such element in row-major order.
        value: the element, as a Python float.
    """

    def __init__(self, index: tuple[int, ...], value: float) -> None:
        super().__init__(f"non-finite value {value} at index {list(index)}")
        self.index = index
        self.value = value


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scales of a [N, K] tensor: (ceil(N / bn), ceil(K / bk)).

    Raises:
        ValueError: a side of the block is not positive.
    """
    if block[0] < 1 or block[1] < 1:
        raise ValueError(f"block sides must be positive, not {block[0]}x{block[1]}")
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def check_input(x: torch.Tensor, dims: int | None = None) -> None:
    """Refuse what no kernel here takes.

    Raises:
        TypeError: the dtype is not BF16, FP16 or FP32.
        ValueError: the number of dimensions is not `dims`.
    """
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"cannot quantise {x.dtype}; expected bfloat16, float16 or float32")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"expected {dims} dimensions, found shape {list(x.shape)}")


@torch.no_grad()
def quantize_block(
    x: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a [N, K] tensor in blocks of `block` = (bn, bk).

    Any strides; N and K need not divide by the block, and may be 0.

    Returns:
        codes [N, K] float8_e4m3fn and scales [ceil(N/bn), ceil(K/bk)] float32,
        both contiguous; `codes * scale` of the block approximates `x`.

    Raises:
        NonFiniteError: the first NaN or Inf in row-major order.
        TypeError, ValueError: see `check_input` and `block_grid`.
    """
    check_input(x, 2)
    n, k = x.shape
    bn, bk = block
    grid_n, grid_k = block_grid((n, k), block)
    codes = torch.empty((n, k), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.ones((grid_n, grid_k), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return codes, scales
    # Ragged edges are worked on with zeros behind them, in the stripe only:
    # zeros change no amax, and their codes are not copied out.
    wide = grid_k * bk
    step = max(1, min(grid_n, _STRIPE // (bn * wide)))
    work = torch.empty((step * bn, wide), dtype=torch.float32, device=x.device)
    spare = torch.empty_like(work)
    with _denormals():
        for top in range(0, grid_n, step):
            count = min(step, grid_n - top)
            first, last = top * bn, min(n, (top + count) * bn)
            rows = last - first
            part, absolute = work[: count * bn], spare[: count * bn]
            if rows < part.shape[0] or k < wide:
                part.zero_()
            part[:rows, :k].copy_(x[first:last])
            torch.abs(part, out=absolute)
            amax = absolute.view(count, bn, grid_k, bk).amax(dim=(1, 3))
            if not torch.isfinite(amax).all():
                _raise_non_finite(x, first, last)
            scale = _scale(amax)
            scales[top : top + count] = scale
            part.view(count, bn, grid_k, bk).div_(scale[:, None, :, None])
            codes[first:last] = _encode(part)[:rows, :k]
    return codes, scales


@torch.no_grad()
def quantize_per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a tensor of any shape with one scale.

    Returns:
        codes in the shape of `x`, float8_e4m3fn; scale [1] float32.

    Raises:
        NonFiniteError, TypeError: as `quantize_block`.
    """
    check_input(x)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.ones(1, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return codes, scale
    matrix = x.reshape(1, -1) if x.dim() < 2 else x.flatten(0, -2)
    target = codes.view(matrix.shape)
    with _denormals():
        amax = torch.zeros(1, dtype=torch.float32, device=x.device)
        for rows in _stripes(*matrix.shape):
            # abs and amax are exact in 16 bits too: no FP32 copy in this pass.
            amax = torch.maximum(amax, matrix[rows].abs().amax().float())
        if not torch.isfinite(amax).all():
            _raise_non_finite(x, 0, x.shape[0] if x.dim() else 1)
        scale = _scale(amax)
        for rows in _stripes(*matrix.shape):
            target[rows] = _encode(matrix[rows].float() / scale)
    return codes, scale


@torch.no_grad()
def quantize_per_channel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a [N, K] tensor with one scale per row (output channel).

    Returns:
        codes [N, K] float8_e4m3fn and scales [N, 1] float32.

    Raises:
        NonFiniteError, TypeError, ValueError: as `quantize_block`.
    """
    check_input(x, 2)
    if x.shape[1] == 0:
        return (
            torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
            torch.ones((x.shape[0], 1), dtype=torch.float32, device=x.device),
        )
    return quantize_block(x, (1, x.shape[1]))


@torch.no_grad()
def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return `codes * scale`, multiplied in FP32 and rounded once to `dtype`.

    Args:
        codes: float8_e4m3fn, [N, K] in block and per-channel form, else any shape.
        scales: FP32; [ceil(N/bn), ceil(K/bk)] with `block`, else [1] or [N, 1].
        block: (bn, bk), or None for per-tensor and per-channel scales.
        dtype: of the result.

    Raises:
        ValueError: the scales do not have the shape that codes and block ask for.
    """
    if block is None:
        if scales.numel() != 1 and tuple(scales.shape) != (codes.shape[0], 1):
            raise ValueError(
                f"scales of shape {list(scales.shape)} for codes {list(codes.shape)};"
                f" expected [1] or [{codes.shape[0]}, 1]"
            )
        return (codes.float() * scales).to(dtype)
    grid = block_grid((codes.shape[0], codes.shape[1]), block)
    if tuple(scales.shape) != grid:
        raise ValueError(
            f"scales of shape {list(scales.shape)} for codes {list(codes.shape)} in blocks of"
            f" {block[0]}x{block[1]}; expected {list(grid)}"
        )
    n, k = codes.shape
    result = torch.empty((n, k), dtype=dtype, device=codes.device)
    for top in range(grid[0]):
        rows = slice(top * block[0], min(n, (top + 1) * block[0]))
        per_column = scales[top].repeat_interleave(block[1])[:k]
        result[rows] = codes[rows].float().mul_(per_column)
    return result


def _scale(amax: torch.Tensor) -> torch.Tensor:
    """Return the scale of each group from its largest magnitude (FP32, finite)."""
    # By a tensor on the device: torch on CUDA divides by a Python number by
    # multiplying with its reciprocal, which is one unit off now and then (seen on an H100).
    scale = (amax / torch.full_like(amax, FP8_MAX)).clamp_(min=MIN_SCALE)
    return scale.masked_fill_(amax == 0, 1.0)


def _encode(quotient: torch.Tensor) -> torch.Tensor:
    """Round FP32 quotients to e4m3fn, to nearest even.

    amax / (amax / 448) can come out a few units above 448, never near 464,
    where e4m3fn would round to NaN; the clamp only makes that plain.
    """
    return quotient.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _stripes(n: int, k: int) -> Iterator[slice]:
    step = max(1, _STRIPE // k)
    for first in range(0, n, step):
        yield slice(first, first + step)


def _raise_non_finite(x: torch.Tensor, first: int, last: int) -> None:
    """Raise for the first non-finite element of rows first..last of `x`."""
    part = x.reshape(1) if x.dim() == 0 else x[first:last]
    where = torch.isfinite(part).logical_not_().nonzero()[0].tolist()
    value = float(part[tuple(where)])
    index = tuple(where) if x.dim() else ()
    raise NonFiniteError((index[0] + first, *index[1:]) if index else (), value)


@contextlib.contextmanager
def _denormals() -> Iterator[None]:
    """Keep subnormal numbers while the arithmetic runs, as IEEE asks.

    torch.set_flush_denormal is per thread, off by default, and has no getter:
    a multiplication tells.
    """
    tiny = torch.tensor(2.0**-140)
    if float(tiny * 1.0) != 0.0:
        yield
        return
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
