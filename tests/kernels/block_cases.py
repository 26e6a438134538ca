"""Cases of test_block.py, run under Triton's interpreter in a process of their own.

TRITON_INTERPRET counts only if it is set before triton is imported, and pytest
may have imported torch and triton already. Prints one JSON object: case -> "" or
what differs. Also run by hand with an engine's Triton:
    TRITON_INTERPRET=1 PYTHONPATH=. python tests/kernels/block_cases.py
Each program of a launch takes some 10 ms here, so shapes stay small.
"""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels import block, reference

if TYPE_CHECKING:
    from collections.abc import Callable

CASES: dict[str, Callable[[], str]] = {}


def case(run: Callable[[], str]) -> Callable[[], str]:
    CASES[run.__name__] = run
    return run


def differs(x: torch.Tensor, size: tuple[int, int]) -> str:
    codes, scales = block.quantize_block(x, size)
    wanted, wanted_scales = reference.quantize_block(x, size)
    where = f"{list(x.shape)} {x.dtype} {size}"
    if not torch.equal(scales.view(torch.int32), wanted_scales.view(torch.int32)):
        return f"{where}: scales"
    wrong = (codes.view(torch.uint8) != wanted.view(torch.uint8)).nonzero()
    if len(wrong):
        i = tuple(wrong[0].tolist())
        return f"{where}: {len(wrong)} codes, {x[i]} -> {codes[i].float()} not {wanted[i].float()}"
    return ""


def every_value(dtype: torch.dtype) -> torch.Tensor:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)]
    return x[: x.numel() // 256 * 256].view(-1, 256)


@case
def every_bfloat16() -> str:
    return differs(every_value(torch.bfloat16), (16, 256)) or differs(
        every_value(torch.bfloat16)[::7], (1, 256)
    )


@case
def every_float16() -> str:
    return differs(every_value(torch.float16), (16, 256)) or differs(
        every_value(torch.float16)[::7], (1, 256)
    )


@case
def midpoints_and_carries() -> str:
    # With 448 in the block the scale is 1, and codes are rounded as they stand:
    # 127.9 is the value that the interpreter's own conversion turns into 64.
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(0.0)), middle, torch.nextafter(middle, middle * 2)]
    x = torch.cat([*near, *(-n for n in near), torch.tensor([448.0, 127.9])])[None]
    return differs(x, (1, x.shape[1]))


@case
def shapes_and_blocks() -> str:
    torch.manual_seed(0)
    for shape in ((1, 1), (127, 129), (128, 128), (200, 150), (3, 300), (0, 5), (5, 0)):
        for dtype in reference.INPUT_DTYPES:
            x = (torch.randn(shape) * 0.02).to(dtype)
            for size in ((128, 128), (48, 100)):
                if found := differs(x, size):
                    return found
    return ""


@case
def strides() -> str:
    torch.manual_seed(1)
    base = torch.randn(150, 210)
    views = (base.t(), base[::2, 1::3], base[10:90, 40:200], base[4:5].expand(33, 210))
    for view in views:
        if found := differs(view, (64, 64)) or differs(view.bfloat16(), (64, 64)):
            return found
    return ""


@case
def magnitudes() -> str:
    torch.manual_seed(2)
    for factor in (1e-45, 1e-40, 1.2e-38, 1e-36, 1e30, 5e37):
        if found := differs(torch.randn(40, 50) * factor, (32, 32)):
            return found
    zero = torch.zeros(8, 8)
    zero[0, 0] = -0.0
    return differs(zero, (4, 4))


@case
def non_finite() -> str:
    for value in (math.nan, math.inf, -math.inf):
        for dtype in reference.INPUT_DTYPES:
            x = torch.ones(40, 50, dtype=dtype)
            x[33, 7] = x[34, 1] = x[39, 0] = value
            try:
                block.quantize_block(x, (16, 16))
            except reference.NonFiniteError as e:
                if e.index != (33, 7):
                    return f"{value} {dtype}: index {e.index}"
            else:
                return f"{value} {dtype}: no error"
    return ""


def main() -> None:
    sys.stdout.write(json.dumps({name: run() for name, run in CASES.items()}) + "\n")


if __name__ == "__main__":
    main()
