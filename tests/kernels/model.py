"""The recipes once more, from their definitions, in numpy: what the reference is held to.

Shares no code with `fp8ctl.kernels`. A group is a rectangle of a matrix, its arithmetic
is numpy's IEEE FP32, and e4m3 is a search in the table of its 127 values. Slow, and
short enough to be checked by eye.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from fp8ctl.kernels.groups import Groups

    Array = np.ndarray[Any, Any]

# Code c is exponent c >> 3 (bias 7; 0 for subnormals) and mantissa c & 7; 127 is NaN.
VALUES = np.array(
    [c * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(127)]
)
_MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2  # exact: one more bit each
_POWERS = 2.0 ** np.arange(-126, 128)


@dataclass(frozen=True)
class Result:
    """Codes as bytes in the input's shape, scales FP32; or the first element not finite."""

    codes: Array
    scales: Array
    bad: tuple[tuple[int, ...], float] | None = None


def quantize(x: torch.Tensor, groups: Groups, recipe: str, policy: str) -> Result:
    """Return what `recipe` (a name, `:floor=NUMBER` behind it or not) makes of a tensor."""
    values = exact(x)
    finite = np.isfinite(values)
    if policy == "error" and not finite.all():
        index = np.unravel_index(np.argmin(finite.ravel()), values.shape)
        at = tuple(int(i) for i in index)
        return Result(np.empty(0), np.empty(0), (at, float(values[at])))
    if groups.kind == "per-tensor":
        matrix, sides = values.reshape(1, -1), (1, max(1, values.size))
    elif groups.kind == "per-channel":
        matrix, sides = values, (1, max(1, values.shape[1]))
    else:
        matrix, sides = values, groups.sides
    name, _, option = recipe.partition(":floor=")
    floor = np.float32(option or {"reciprocal": 1e-10}.get(name, 0.0))
    amax = np.maximum(_largest(matrix, sides), floor)
    # Rows of no columns are channels, and a tensor of no elements has a scale.
    if amax.size == 0 and groups.kind != "block":
        amax = np.full((1 if groups.kind == "per-tensor" else len(matrix), 1), floor, np.float32)
    scales, quotients = _arithmetic(name, matrix, amax, sides)
    codes = e4m3(quotients) | np.where(np.signbit(matrix), 0x80, 0).astype(np.uint8)
    if policy == "saturate":
        codes[np.isnan(matrix)] = 0
    else:
        codes = np.where(np.isfinite(matrix), codes, codes | 0x7F)
    shaped = scales.reshape(-1) if groups.kind == "per-tensor" else scales
    return Result(codes.reshape(values.shape), shaped)


def exact(x: torch.Tensor) -> Array:
    """Return the numbers of a BF16, FP16 or FP32 tensor as FP32, by their bits."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.float32:
        return np.array(x.view(torch.int32).numpy()).view(np.float32)
    words = x.view(torch.int16).numpy()
    if x.dtype == torch.float16:
        with np.errstate(invalid="ignore"):  # signalling NaN
            return np.asarray(words.view(np.float16).astype(np.float32))
    return np.asarray((words.view(np.uint16).astype(np.uint32) << 16).view(np.float32))


def e4m3(y: Array) -> Array:
    """Return the codes nearest to |y|, ties to the even one, 448 (0x7e) beyond; NaN is 0x7e."""
    # A search in sorted numbers; the middles are exact in FP64, and so is FP32.
    magnitude = np.abs(y.astype(np.float64))
    below = np.searchsorted(_MIDDLES, magnitude, side="left")  # middles under |y|
    on_middle = np.append(_MIDDLES, np.nan)[below] == magnitude
    return np.asarray(below + (on_middle & (below % 2 == 1)), dtype=np.uint8)


def _largest(matrix: Array, sides: tuple[int, int]) -> Array:
    """Return the largest finite magnitude of each group."""
    magnitude = np.where(np.isfinite(matrix), np.abs(matrix), np.float32(0))
    for axis, side in enumerate(sides):
        starts = np.arange(0, matrix.shape[axis], side)
        if matrix.shape[axis]:
            magnitude = np.maximum.reduceat(magnitude, starts, axis=axis)
    return magnitude


def _arithmetic(
    name: str, matrix: Array, amax: Array, sides: tuple[int, int]
) -> tuple[Array, Array]:
    """Return the scale of each group, and of each element what e4m3 rounds."""
    largest, one, least = np.float32(448), np.float32(1), np.float32(2.0**-126)

    def spread(per_group: Array) -> Array:
        rows = np.repeat(per_group, sides[0], axis=0)[: matrix.shape[0]]
        return np.repeat(rows, sides[1], axis=1)[:, : matrix.shape[1]]

    with np.errstate(all="ignore"):
        if name == "inverse-scale":
            multiplier = np.minimum(largest / amax, one / least)
            multiplier = np.where(amax == 0, one, multiplier)
            return one / multiplier, matrix * spread(multiplier)
        if name == "ue8m0":
            # The least power of two that takes 448 up to amax; all of this is exact in FP64.
            up = np.searchsorted(448 * _POWERS, amax.astype(np.float64), side="left")
            scale = _POWERS[up].astype(np.float32)
        else:
            scale = np.maximum(amax / largest, least)
        scale = np.where(amax == 0, one, scale)
        if name == "reciprocal":
            return scale, matrix * spread(one / scale)
        assert name in {"ieee", "ue8m0"}
        return scale, matrix / spread(scale)
