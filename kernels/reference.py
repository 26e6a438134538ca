"""The exact FP8 arithmetic in plain PyTorch: what every other kernel must equal, bit for bit.

`fp8ctl.kernels.recipes` says what is computed; here it is written down as
operations on FP32 tensors, on any device. Tensors go through in tiles: extra
memory is a few of them.

Runs in an engine's interpreter: standard library and torch only.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels.inputs import NonFiniteError, check_input, make_outputs, matrices, unravel
from fp8ctl.kernels.recipes import FP8_MAX, IEEE, MIN_SCALE, check_non_finite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.kernels.groups import Groups, Shape
    from fp8ctl.kernels.recipes import NonFinite, Recipe

# Elements that are worked on at a time. 4 MB of FP32 stays in the caches of a
# core pair; 2^22 and 2^16 were each about a third slower on 2 x86 cores.
_TILE = 1 << 20
# torch runs an operation on fewer elements than 2^15 in the calling thread.
_ALONE = (1 << 15) - 1


@torch.no_grad()
def quantize(
    x: torch.Tensor,
    groups: Groups,
    recipe: Recipe = IEEE,
    non_finite: NonFinite = "error",
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a tensor; any strides, any sides, none included.

    Args:
        x: BF16, FP16 or FP32; [N, K], and any shape where one scale is for all.
        groups: what shares a scale.
        recipe: the arithmetic.
        non_finite: what becomes of NaN and Inf.
        out: codes and scales to write instead of new ones: float8_e4m3fn or uint8 in the
            shape of `x`, and FP32 of `groups.scale_shape(x.shape)`; any strides.

    Returns:
        codes float8_e4m3fn in the shape of `x` and scales FP32; `out`, if it was given.

    Raises:
        NonFiniteError: the first NaN or Inf in row-major order; outputs are half written.
        TypeError, ValueError: what `inputs` refuses.
    """
    check_non_finite(non_finite)
    check_input(x, groups)
    codes, scales = make_outputs(x, groups, out)
    parts = matrices(x, codes.view(torch.uint8))
    with keeping_denormals(x.numel()) as tile:
        if groups.kind == "per-tensor":
            _per_tensor(x, parts, scales, recipe, non_finite, tile)
        else:
            _matrix(x, codes.view(torch.uint8), scales, groups, recipe, non_finite, tile)
    return codes, scales


def scale_and_factor(amax: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `recipe` makes of largest magnitudes: the scales, and what x is multiplied by.

    Args:
        amax: FP32, finite, not negative; any shape.

    Returns:
        scales, the multipliers that dequantise; and factors, which for `ieee` are the
        reciprocals of the scales and not used.
    """
    a = amax.clamp(min=recipe.floor)
    one = torch.ones_like(a)
    # By tensors on the device: torch on CUDA divides by a Python number by multiplying
    # with its reciprocal, which is one unit off now and then (seen on an H100).
    if recipe.arithmetic == "power-of-two":
        # 448 is 1.75 * 2^8: up to that mantissa the exponent falls by 8, above it by 7.
        exponent = ((a.view(torch.int32) + 0x1FFFFF) >> 23).sub_(8).clamp_(min=1)
        scale = (exponent << 23).view(torch.float32)
        factor = ((254 - exponent) << 23).view(torch.float32)
    elif recipe.arithmetic == "inverse-scale":
        factor = (one * FP8_MAX / a).clamp_(max=1 / MIN_SCALE)
        scale = one / factor
    else:
        scale = (a / (one * FP8_MAX)).clamp_(min=MIN_SCALE)
        factor = one / scale
    return scale.masked_fill_(a == 0, 1.0), factor.masked_fill_(a == 0, 1.0)


def _matrix(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: Groups,
    recipe: Recipe,
    non_finite: NonFinite,
    tile: int,
) -> None:
    """Quantise a [N, K] tensor by bands of whole groups, each in two passes over its tiles."""
    n, k = x.shape
    size, grid = groups.size((n, k)), groups.grid((n, k))
    height = size[0] * max(1, tile // max(1, size[0] * k))
    for top in range(0, n, height):
        band = x[top : top + height]
        first = top // size[0]
        count = -(-band.shape[0] // size[0])
        amax = torch.zeros((count, grid[1]), dtype=torch.float32, device=x.device)
        bad = _amax(band, size, amax, tile)
        if bad is not None and non_finite == "error":
            raise NonFiniteError((bad[0] + top, bad[1]), float(band[bad]))
        scale, factor = scale_and_factor(amax, recipe)
        scales[first : first + count] = scale
        _encode(band, codes[top : top + height], size, scale, factor, recipe, non_finite, tile)


def _per_tensor(
    x: torch.Tensor,
    parts: list[tuple[torch.Tensor, ...]],
    scales: torch.Tensor,
    recipe: Recipe,
    non_finite: NonFinite,
    tile: int,
) -> None:
    """Quantise the parts of a tensor, as matrices, with one scale."""
    amax = torch.zeros((1, 1), dtype=torch.float32, device=scales.device)
    done = 0
    for part, _ in parts:
        bad = _amax(part, _whole(part), amax, tile)
        if bad is not None and non_finite == "error":
            position = done + bad[0] * part.shape[1] + bad[1]
            raise NonFiniteError(unravel(position, x.shape), float(part[bad]))
        done += part.numel()
    scale, factor = scale_and_factor(amax, recipe)
    scales.copy_(scale[0])
    for part, codes in parts:
        _encode(part, codes, _whole(part), scale, factor, recipe, non_finite, tile)


def _amax(x: torch.Tensor, size: Shape, amax: torch.Tensor, tile: int) -> tuple[int, int] | None:
    """Raise `amax` to the largest finite magnitudes; return the first non-finite index."""
    first: tuple[int, int] | None = None
    for rows, columns in _tiles(x.shape[0], x.shape[1], size, tile):
        part = x[rows, columns].abs()  # exact in 16 bits too
        finite = torch.isfinite(part)
        if not finite.all():
            i, j = finite.logical_not().nonzero()[0].tolist()
            found = (rows.start + i, columns.start + j)
            first = found if first is None else min(first, found)
            part.masked_fill_(finite.logical_not_(), 0.0)
        grouped = _by_group(part.float(), size).amax(dim=(1, 3))
        i, j = rows.start // size[0], columns.start // size[1]
        target = amax[i : i + grouped.shape[0], j : j + grouped.shape[1]]
        torch.maximum(target, grouped, out=target)
    return first


def _encode(
    x: torch.Tensor,
    codes: torch.Tensor,
    size: Shape,
    scale: torch.Tensor,
    factor: torch.Tensor,
    recipe: Recipe,
    non_finite: NonFinite,
    tile: int,
) -> None:
    """Write the codes (uint8) of a [N, K] tensor, given scale and factor of each group."""
    for rows, columns in _tiles(x.shape[0], x.shape[1], size, tile):
        part = x[rows, columns].float()
        y = _by_group(part, size)
        i, j = rows.start // size[0], columns.start // size[1]
        here = (slice(i, i + y.shape[0]), slice(j, j + y.shape[2]))
        if recipe.arithmetic == "divide":
            y = y / scale[here][:, None, :, None]
        else:
            y = y * factor[here][:, None, :, None]
        y = y.reshape(y.shape[0] * y.shape[1], -1)[: part.shape[0], : part.shape[1]]
        # A quotient can come out a few units above 448, never near 464, where e4m3fn
        # would round to NaN: the clamp is for Inf, and makes that plain.
        code = y.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        if non_finite == "saturate":
            code = code.masked_fill(torch.isnan(part), 0)
        elif non_finite == "propagate":
            # Of the bits: a NaN in FP16 can lose its sign on the way to FP32, on CPU and GPU.
            bits = x[rows, columns].view(torch.int32 if x.element_size() == 4 else torch.int16)
            nan = (bits < 0).to(torch.uint8).mul_(0x80).add_(0x7F)
            code = torch.where(torch.isfinite(part), code, nan)
        codes[rows, columns] = code


def _by_group(part: torch.Tensor, size: Shape) -> torch.Tensor:
    """Return a tile as [groups, rows of each, groups, columns of each], zeros behind its edges."""
    n, k = part.shape
    bn, bk = min(size[0], n), min(size[1], k)
    down, across = -n % bn, -k % bk
    if down or across:
        # Zeros raise no amax, and their codes are not copied out.
        part = torch.nn.functional.pad(part, (0, across, 0, down))
    return part.view((n + down) // bn, bn, (k + across) // bk, bk)


def _tiles(n: int, k: int, size: Shape, tile: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into tiles of whole groups, or of parts of one group."""
    if n == 0 or k == 0:
        return
    columns = list(_cuts(k, size[1], tile))
    widest = max(part.stop - part.start for part in columns)
    for rows in _cuts(n, size[0], max(1, tile // widest)):
        for part in columns:
            yield rows, part


def _cuts(length: int, side: int, limit: int) -> Iterator[slice]:
    if side <= limit:
        step = limit // side * side
        for first in range(0, length, step):
            yield slice(first, min(first + step, length))
        return
    for start in range(0, length, side):
        end = min(start + side, length)
        for first in range(start, end, limit):
            yield slice(first, min(first + limit, end))


def _whole(matrix: torch.Tensor) -> Shape:
    return max(1, matrix.shape[0]), max(1, matrix.shape[1])


@contextlib.contextmanager
def keeping_denormals(elements: int) -> Iterator[int]:
    """Keep subnormal numbers while arithmetic runs on this CPU, as IEEE asks.

    torch.set_flush_denormal is per thread, off by default, and has no getter: a
    multiplication tells. torch's other threads inherit it when they are started, and
    cannot be told: then work stays in this one.

    Args:
        elements: how many there are in all.

    Yields:
        how many may be worked on at a time.
    """
    tiny = torch.tensor(2.0**-140, dtype=torch.float32, device="cpu")
    flushes = float(tiny * 1.0) == 0.0
    if flushes:
        torch.set_flush_denormal(False)
    try:
        if elements <= _ALONE or bool((tiny.expand(4 * _ALONE) * 1.0).all()):
            yield _TILE
        else:
            yield min(_TILE, _ALONE)
    finally:
        if flushes:
            torch.set_flush_denormal(True)
