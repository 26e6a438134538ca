"""The kernels' own division, by itself: run under Triton's interpreter or on a GPU.

Prints one JSON object: case -> "" or what differs; the case "fused" says whether this
interpreter's fma rounds once, without which there is nothing to be seen.
    TRITON_INTERPRET=1 python -m tests.kernels.division_cases cpu 8 2
"""

# ruff: noqa: N803 - kernel parameters are named as in Triton's own examples

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import triton
import triton.language as tl

from fp8ctl.kernels import device
from fp8ctl.kernels.groups import PER_CHANNEL
from tests.kernels import matrix, model

_WIDE = 1024


@triton.jit
def _fma(x_ptr, out_ptr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 1)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.fma(x, x, tl.load(x_ptr + 1 + at)))


@triton.jit  # type: ignore[untyped-decorator]
def _quotients(  # type: ignore[no-untyped-def]
    x_ptr, scale_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr
):
    """Divide each of COLUMNS numbers by the scale of its row, ROWS rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    at = row * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    scale = tl.load(scale_ptr + row)
    factor = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    tl.store(out_ptr + at, device._divide(tl.load(x_ptr + at), scale, factor, STEPS))


@triton.jit  # type: ignore[untyped-decorator]
def _encoded(  # type: ignore[no-untyped-def]
    x_ptr,
    top_ptr,
    out_ptr,
    scale_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Write the codes of each row and its scale, given the bits of its largest magnitude."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    at = row * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    scale, factor = device._scale(tl.load(top_ptr + row), "divide", 0)
    x = tl.load(x_ptr + at)
    code = device._codes(x, scale, factor, "divide", "error", True, STEPS, HARDWARE)
    tl.store(out_ptr + at, code)
    tl.store(scale_ptr + row, scale)


def _rows(where: str) -> int:
    """Return how many rows a program takes: the interpreter is slow per program."""
    return 64 if where == "cpu" else 8


def fused(where: str) -> bool:
    x = torch.tensor([1 + 2.0**-12, -(1 + 2.0**-11)], device=where)
    out = torch.empty(1, device=where)
    _fma[(1,)](x, out)
    return float(out) == 2.0**-24


def codes_of(dtype: torch.dtype, where: str, every: int, top_exponent: int) -> str:
    """Try `every` so many significands of amax with every one of x, at every distance of exponents.

    Those below 18 binades have no codes but 0. Other exponents of amax are the same
    arithmetic, shifted, as long as nothing is subnormal; `top_exponent` chooses.
    """
    significands = 128 if dtype == torch.bfloat16 else 1024
    fraction = torch.arange(significands, dtype=torch.float64) / significands + 1
    amax = (fraction[every // 2 :: every] * 2.0**top_exponent).to(dtype)
    down = 2.0 ** -torch.arange(19, dtype=torch.float64)
    x = (fraction[None, :] * down[:, None] * 2.0**top_exponent).to(dtype).flatten()
    x = torch.cat([x, -x[: -len(x) % _WIDE]])
    hardware = where == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    rows = _rows(where)
    with np.errstate(all="ignore"):
        scale = model.exact(amax) / np.float32(448)
    if not np.array_equal(_by_kernel(amax, x[:_WIDE], where, hardware, rows)[1], scale):
        return f"{dtype}: scales"
    for start in range(0, len(x), _WIDE):
        part = x[start : start + _WIDE]
        found, _ = _by_kernel(amax, part, where, hardware, rows)
        numbers = model.exact(part)[None, :]
        inside = np.abs(numbers) <= model.exact(amax)[:, None]
        sign = np.where(np.signbit(numbers), 0x80, 0).astype(np.uint8)
        wanted = model.e4m3(numbers / scale[:, None]) | sign
        wrong = np.argwhere((found != wanted) & inside)
        if len(wrong):
            i, j = wrong[0]
            return (
                f"{dtype}: {len(wrong)}, the first {float(part[j])!r} under {float(amax[i])!r}:"
                f" {found[i, j]:#x}, not {wanted[i, j]:#x}"
            )
    return ""


def _by_kernel(
    amax: torch.Tensor, x: torch.Tensor, where: str, hardware: bool, rows: int
) -> tuple[model.Array, model.Array]:
    tops = torch.from_numpy(model.exact(amax)).view(torch.int32).to(where)
    wide = x[None].expand(len(amax), -1).contiguous().to(where)
    out = torch.empty(wide.shape, dtype=torch.uint8, device=where)
    scale = torch.empty(len(amax), device=where)
    _encoded[(len(amax) // rows,)](
        wide, tops, out, scale, ROWS=rows, COLUMNS=_WIDE, STEPS=1, HARDWARE=hardware
    )
    return out.cpu().numpy(), scale.cpu().numpy()


def kinds(where: str) -> str:
    """Encode all sorts of FP32 numbers, zeros and subnormals too, a scale for each row."""
    for kind in matrix.FINITE:
        x = matrix.numbers(kind, (64, _WIDE), torch.float32)
        x[:, 1], x[:, 2] = 0.0, -0.0
        if found := _unlike_model(x, where):
            return f"{kind}: {found}"
    return ""


def middles(where: str, rounds: int) -> str:
    """Encode FP32 whose quotients are, or round to, the middle of two codes, at every scale.

    A quotient that is one unit off has another code there. The middles go with the scale
    of the row, so below 2^-60 the remainders too would fall under the smallest number.
    """
    order = np.random.default_rng(5)
    middle = (model.VALUES[1:] + model.VALUES[:-1])[None, :, None] / 2
    for _ in range(rounds):
        # Every exponent from the least that has a scale of its own, 448 * 2^-126, up.
        exponents = np.arange(256) % 245 - 117
        amax = np.ldexp(1 + order.integers(0, 1 << 23, 256) * 2.0**-23, exponents)
        amax = amax.astype(np.float32)
        scale = (amax / np.float32(448)).astype(np.float64)[:, None, None]
        exact = (middle * scale).astype(np.float32).view(np.int32)
        near = exact + order.integers(-1, 2, (256, 126, 8), np.int32)
        x = np.zeros((256, _WIDE), np.float32)
        x[:, 0] = amax
        x[:, 1 : 1 + 126 * 8] = np.minimum(near.view(np.float32).reshape(256, -1), amax[:, None])
        x *= order.choice(np.array([-1, 1], np.float32), x.shape)
        if found := _unlike_model(torch.from_numpy(x), where):
            return found
    return ""


def _unlike_model(x: torch.Tensor, where: str) -> str:
    """Encode FP32 numbers, a scale for each row; say where that differs from the model."""
    hardware = where == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    wanted = model.quantize(x, PER_CHANNEL, "ieee", "error")
    tops = x.abs().amax(dim=1).view(torch.int32).to(where)
    out = torch.empty(x.shape, dtype=torch.uint8, device=where)
    scale = torch.empty(len(x), device=where)
    rows = _rows(where)
    _encoded[(len(x) // rows,)](
        x.to(where), tops, out, scale, ROWS=rows, COLUMNS=_WIDE, STEPS=2, HARDWARE=hardware
    )
    if not np.array_equal(scale.cpu().numpy(), wanted.scales[:, 0]):
        return "scales"
    wrong = np.argwhere(out.cpu().numpy() != wanted.codes)
    if len(wrong) == 0:
        return ""
    i, j = wrong[0]
    return f"{len(wrong)}, the first {float(x[i, j])!r} under {float(x[i].abs().max())!r}"


def quotients(where: str, rounds: int) -> str:
    """Divide FP32 by FP32 in two steps: random, and as near to the middle of two as can be."""
    order = np.random.default_rng(3)
    rows = 512
    for turn in range(rounds):
        significands = order.integers(1 << 23, 1 << 24, (rows, 1))
        significands[:4, 0] = (1 << 23, (1 << 23) + 1, (1 << 24) - 1, (1 << 24) - 2)
        if turn % 2:
            significands |= 1
            numerators = _near_middles(significands)
        else:
            numerators = order.integers(1 << 23, 1 << 24, (rows, _WIDE))
        scale = np.ldexp(significands.astype(np.float32), order.integers(-83, 76, (rows, 1)))
        shift = order.integers(-9, 9, (rows, _WIDE)) + np.frexp(scale)[1] - 24
        x = np.ldexp(numerators.astype(np.float32), shift)
        x = np.where(order.integers(0, 2, x.shape) == 0, x, -x)
        out = torch.empty(x.shape, device=where)
        _quotients[(rows // _rows(where),)](
            torch.from_numpy(x).to(where),
            torch.from_numpy(scale[:, 0].copy()).to(where),
            out,
            ROWS=_rows(where),
            COLUMNS=_WIDE,
            STEPS=2,
        )
        wanted = x / scale
        wrong = np.argwhere(out.cpu().numpy().view(np.int32) != wanted.view(np.int32))
        if len(wrong):
            i, j = wrong[0]
            return f"{len(wrong)} of {x.size}, the first {x[i, j]!r} / {scale[i, 0]!r}"
    return ""


def _near_middles(significands: model.Array) -> model.Array:
    """Return numerators of 24 bits whose quotients by odd numbers of 24 bits lie next to middles.

    X * 2^25 = M * S - r with an odd M of 25 bits, the middle of two quotients, and a small r:
    M is r / S modulo 2^25. Where that has no such M or X, the numerator is S itself.
    """
    remainders = np.concatenate([np.arange(1, _WIDE, 2), -np.arange(1, _WIDE, 2)])[None, :]
    inverses = np.array([[pow(int(s), -1, 1 << 25)] for s in significands[:, 0]])
    middles = remainders * inverses % (1 << 25)
    numerators = (middles * significands - remainders) >> 25
    fits = (middles >= 1 << 24) & (numerators < 1 << 24)
    return np.where(fits, numerators, significands)


def run(where: str, every: int, rounds: int) -> dict[str, str]:
    """Run all cases, of FP16 with one significand of amax in `every`."""
    if not fused(where):
        return {"fused": "this interpreter rounds a * b before it adds"}
    return {
        "fused": "",
        "bfloat16": codes_of(torch.bfloat16, where, 1, 3),
        "bfloat16, small": codes_of(torch.bfloat16, where, 1, -117),
        "bfloat16, large": codes_of(torch.bfloat16, where, 1, 127),
        "float16": codes_of(torch.float16, where, every, 15),
        "float32": kinds(where),
        "middles": middles(where, rounds),
        "quotients": quotients(where, rounds),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(sys.argv[1], *map(int, sys.argv[2:]))) + "\n")
