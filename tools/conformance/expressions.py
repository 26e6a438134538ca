"""Rows that need nothing but torch: this project's recipes, and what trainers write in torch.

Each expression is written out as its authors have it, floor, padding, clamp and all, so that
the table says what comes of it. What this project makes of the same arithmetic is in
fp8ctl.kernels.recipes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from .cases import FP8_MAX, Adapter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp8ctl.kernels.groups import Groups
    from fp8ctl.kernels.recipes import NonFinite

    from .cases import Run, Sides

    Pair = tuple[torch.Tensor, torch.Tensor]

FP8 = torch.float8_e4m3fn
SIDE = 128


# --- this project ---------------------------------------------------------------------------------


def ours() -> list[Adapter]:
    """Return a row for each recipe, in all three policies, and one for each other kind of group."""
    from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, block
    from fp8ctl.kernels.recipes import NON_FINITE, RECIPES

    kinds = [(name, block(SIDE, SIDE), (SIDE, SIDE)) for name in RECIPES]
    kinds += [("ieee", block(1, SIDE), (1, SIDE)), ("ieee", PER_CHANNEL, (1, 0))]
    kinds += [("ieee", PER_TENSOR, (0, 0))]
    return [
        Adapter(
            name=f"fp8ctl {recipe}" + ("" if sides == (SIDE, SIDE) else f", {groups}"),
            variant=policy,
            source="fp8ctl",
            call=f"`quantize(x, {_python(groups)}, '{recipe}', non_finite=...)`",
            sides=sides,
            run=_our_run(groups, recipe, policy),
        )
        for recipe, groups, sides in kinds
        for policy in (NON_FINITE if sides == (SIDE, SIDE) else NON_FINITE[:1])
    ]


def _our_run(groups: Groups, recipe: str, policy: NonFinite) -> Run:
    from fp8ctl.kernels import quantize

    def run(x: torch.Tensor) -> Pair:
        return quantize.quantize(x, groups, recipe, policy)

    return run


def _python(groups: Groups) -> str:
    name = str(groups)
    return f"block({name.replace('x', ', ')})" if "x" in name else name.upper().replace("-", "_")


def models(sides: Iterable[Sides]) -> list[Adapter]:
    """Return every recipe for every kind of group: what others may equal."""
    from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, block
    from fp8ctl.kernels.recipes import RECIPES

    fixed = {(1, 0): PER_CHANNEL, (0, 0): PER_TENSOR}
    return [
        Adapter(
            name=recipe,
            source="fp8ctl",
            call="",
            sides=one,
            run=_our_run(fixed[one] if one in fixed else block(*one), recipe, "error"),
        )
        for one in sides
        for recipe in RECIPES
    ]


# --- what trainers write --------------------------------------------------------------------------


def eager() -> list[Adapter]:
    """Return the expressions of trainers and engines, as plain torch on the CPU."""
    block = (SIDE, SIDE)
    rows: list[tuple[str, Sides, Run, str]] = [
        ("x / s", block, _divide(None), "s = amax / 448, no floor; slime's converter, once"),
        ("x / s, floor", block, _divide(1e-12), "amax at least 1e-12; slime's converter"),
        ("x * (1/s)", block, _reciprocal, "amax at least 1e-4, no clamp; DeepGEMM"),
        ("x * div(448, amax)", block, _div, "`torch.div`; 1 for amax 0 and Inf; verl"),
        ("x * (448/amax)", block, _rdiv, "`/`; 1 for amax 0 and Inf; padded; NeMo-RL"),
        ("x * exp2(-e)", block, _power, "e = ceil(log2(amax / 448)); padded; NeMo-RL"),
        ("x * (1/2^e)", block, _bits, "e from bits, amax at least 1e-4, no clamp; DeepGEMM"),
        ("x * (1/s), BF16 s", block, _bf16_scale, "amax at least 1e-10, s rounded last; AReaL"),
        ("x / s, per-channel", (1, 0), _channel, "BF16 / FP32 [N, 1], amax at least 1e-12; slime"),
        ("x / s, per-tensor", (0, 0), _zero_dim, "BF16 / 0-dim FP32, amax at least 1e-12; slime"),
    ]
    return [
        Adapter(name=f"torch {name}", source="torch", call=call, sides=sides, run=run)
        for name, sides, run, call in rows
    ]


def _zeros_behind(x: torch.Tensor) -> torch.Tensor:
    return pad(x, (0, -x.shape[1] % SIDE, 0, -x.shape[0] % SIDE))


def _last_behind(x: torch.Tensor) -> torch.Tensor:
    down, across = -x.shape[0] % SIDE, -x.shape[1] % SIDE
    return pad(x, (0, across, 0, down), value=float(x[-1, -1])) if down or across else x


def _tiles(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0] // SIDE, SIDE, x.shape[1] // SIDE, SIDE)


def _codes(tiles: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Turn scaled tiles into codes in the shape of `x`."""
    n, k = tiles.shape[0] * SIDE, tiles.shape[2] * SIDE
    return tiles.reshape(n, k).to(FP8)[: x.shape[0], : x.shape[1]].contiguous()


def _clamp(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.clamp(-FP8_MAX, FP8_MAX)


def _amax(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.abs().float().amax(dim=(1, 3), keepdim=True)


def _grid(scale: torch.Tensor) -> torch.Tensor:
    return scale[:, 0, :, 0]


def _divide(floor: float | None) -> Run:
    def run(x: torch.Tensor) -> Pair:
        tiles = _tiles(_zeros_behind(x))
        amax = _amax(tiles)
        s = (amax if floor is None else amax.clamp(min=floor)) / FP8_MAX
        return _codes(_clamp(tiles / s), x), _grid(s)

    return run


def _reciprocal(x: torch.Tensor) -> Pair:
    tiles = _tiles(_zeros_behind(x))
    s = _amax(tiles).clamp(1e-4) / FP8_MAX
    return _codes(tiles * (1.0 / s), x), _grid(s)


def _div(x: torch.Tensor) -> Pair:
    tiles = _tiles(_zeros_behind(x.float()))
    amax = _amax(tiles)
    factor = torch.empty_like(amax)
    torch.div(FP8_MAX, amax, out=factor)
    return _multiply(tiles, amax, factor, x)


def _rdiv(x: torch.Tensor) -> Pair:
    tiles = _tiles(_last_behind(x.float()))
    amax = _amax(tiles)
    # A number / a tensor is no division in torch: it is the tensor's reciprocal times the number.
    return _multiply(tiles, amax, FP8_MAX / amax, x)


def _multiply(
    tiles: torch.Tensor, amax: torch.Tensor, factor: torch.Tensor, x: torch.Tensor
) -> Pair:
    factor = torch.where((amax == 0) | (amax == torch.inf), 1.0, factor)
    return _codes(_clamp(tiles * factor), x), _grid(torch.reciprocal(factor))


def _power(x: torch.Tensor) -> Pair:
    tiles = _tiles(_last_behind(x.float()))
    exponent = torch.ceil(torch.log2(_amax(tiles) / FP8_MAX))
    exponent = (exponent.clamp(min=-127, max=127) + 127).to(torch.uint8)
    factor = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent.float()))
    return _codes(_clamp(tiles * factor), x), _grid(torch.reciprocal(factor))


def _bits(x: torch.Tensor) -> Pair:
    tiles = _tiles(_zeros_behind(x))
    bits = (_amax(tiles).clamp(1e-4) / FP8_MAX).view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()
    s = (exponent.clamp(1, 254) << 23).view(torch.float32)
    return _codes(tiles * (1.0 / s), x), _grid(s)


def _bf16_scale(x: torch.Tensor) -> Pair:
    tiles = _tiles(_zeros_behind(x))
    s = _amax(tiles).clamp(1e-10) / FP8_MAX
    return _codes(_clamp(tiles * (1.0 / s)), x), _grid(s).to(torch.bfloat16)


def _channel(x: torch.Tensor) -> Pair:
    amax = torch.max(x.abs(), dim=-1, keepdim=True)[0]
    s = amax.clamp(min=1e-12).to(torch.float32) / FP8_MAX
    return _clamp(x / s).to(FP8), s


def _zero_dim(x: torch.Tensor) -> Pair:
    s = x.abs().max().clamp(min=1e-12).to(torch.float32) / FP8_MAX
    return _clamp(x / s).to(FP8), s.view(1)
