"""Cases of test_dequantize.py: the Triton kernel against torch on a CPU, bit for bit.

    check("cuda")    on a GPU
    check("cpu")     under Triton's interpreter, which needs a process of its own:
                     TRITON_INTERPRET counts only if it is set before triton is imported

Run by hand, also with an engine's Triton; prints one JSON object, case -> "" or what differs:
    TRITON_INTERPRET=1 PYTHONPATH=. python tests/kernels/dequantize_cases.py
Each program of a launch takes some 10 ms there, so shapes stay small. With `compile` as
argument and without TRITON_INTERPRET it prints the machine code for an H100; no GPU needed.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels import dequantize, dequantize_triton, inputs
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, block

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.kernels.groups import Groups

CASES: dict[str, Callable[[str], str]] = {}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
BLOCKS = (block(128, 128), block(64, 64), block(1, 128), block(48, 100), block(3, 7))


def case(run: Callable[[str], str]) -> Callable[[str], str]:
    CASES[run.__name__] = run
    return run


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether all bits are equal, but for those of a NaN."""
    nan = torch.isnan(a)
    return torch.equal(nan, torch.isnan(b)) and torch.equal(
        a.contiguous().view(BITS[a.dtype]).masked_fill(nan, 0),
        b.contiguous().view(BITS[b.dtype]).masked_fill(nan, 0),
    )


def hard_scales() -> torch.Tensor:
    """Return 256 scales: products that are subnormal, overflow or are ties, in every dtype."""
    generator = torch.Generator().manual_seed(0)
    mantissas = 1 + torch.rand(256, generator=generator, dtype=torch.float64)
    exponents = torch.arange(256) % 128 * 2 - 135
    scales = (mantissas * 2.0**exponents).float()
    special = [0.0, 1.0, 2.0**-149, 2.0**-126, 3.4e38, torch.inf, torch.nan]
    # One, 2^-8 and 2^-11 ulp of 16-bit formats beside a power of two: ties and near ties.
    special += [1 + 2.0**-i for i in range(5, 24)]
    special += [2.0**-17 * (1 + 2.0**-i) for i in range(5, 24)]
    special += [2.0**-133 * (1 + 2.0**-i) for i in range(5, 15)]
    scales[: len(special)] = torch.tensor(special, dtype=torch.float64).float()
    scales.view(torch.int32)[-1] = 0x7FFFFFFF  # a NaN that rounding would carry away
    return scales


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return codes of every kind, as uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def random_scales(groups: Groups, shape: torch.Size, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups.scale_shape(shape), generator=generator).exp()


def differs(
    device: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: Groups,
    place: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like,
    dtypes: tuple[torch.dtype, ...] = (),
) -> str:
    """Compare the kernel on a device, the arguments moved there as they lie, with torch."""
    everywhere = dequantize.OUTPUT_DTYPES if device != "cpu" else (torch.bfloat16,)
    for dtype in dtypes or everywhere:
        wanted = torch.empty(codes.shape, dtype=dtype)
        dequantize.by_torch(codes, scales, groups, wanted)
        where = f"{list(codes.shape)} {codes.stride()} {groups} {dtype}"
        converts = dequantize_triton._converts(torch.device(device))
        for hardware in (False, True) if converts else (False,):
            out = place(wanted).to(device).fill_(7.0)
            moved, moved_scales = as_it_lies(codes, device), as_it_lies(scales, device)
            per_group = moved_scales.view(1, 1) if groups is PER_TENSOR else moved_scales
            for part, target in inputs.matrices(moved, out):
                size = groups.size((part.shape[0], part.shape[1]))
                dequantize_triton.fill(part, per_group, size, target, hardware)
            if not equal(out.cpu(), wanted):
                return f"{where}, hardware {hardware}"
        if device != "cpu":
            moved = as_it_lies(codes, device).view(torch.float8_e4m3fn)
            if not equal(dequantize.dequantize(moved, moved_scales, groups, dtype).cpu(), wanted):
                return f"{where}, as it is called"
            out = torch.empty(codes.shape, dtype=dtype, device=device)
            dequantize.by_torch(moved, moved_scales, groups, out)
            if not equal(out.cpu(), wanted):
                return f"{where}, torch"
    return ""


def as_it_lies(t: torch.Tensor, device: str) -> torch.Tensor:
    """Move a tensor to a device with its strides."""
    if device == "cpu":
        return t
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return memory.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@case
def every_code_and_hard_scales(device: str) -> str:
    codes = torch.arange(256).to(torch.uint8).expand(256, 256)
    return differs(
        device, codes, hard_scales()[:, None], PER_CHANNEL, dtypes=dequantize.OUTPUT_DTYPES
    )


@case
def shapes_and_groups(device: str) -> str:
    for shape in ((1, 1), (127, 129), (128, 256), (3, 250), (250, 3), (0, 5), (5, 0)):
        codes = random_codes(*shape)
        for groups in (*BLOCKS, PER_CHANNEL, PER_TENSOR):
            if found := differs(device, codes, random_scales(groups, codes.shape), groups):
                return found
    return ""


@case
def strides(device: str) -> str:
    base = random_codes(150, 210)
    views = (base.t(), base[::2, 1::3], base[10:90, 40:200], base[4:5].expand(33, 210))
    for codes in views:
        for groups in (block(64, 64), block(1, 100), PER_CHANNEL):
            scales = random_scales(groups, codes.shape)
            wide = torch.empty(scales.shape[1] * 2, scales.shape[0]).t()[:, ::2].copy_(scales)
            if found := differs(device, codes, wide, groups):
                return found
    return ""


@case
def places(device: str) -> str:
    codes = random_codes(70, 90)
    scales = random_scales(block(16, 32), codes.shape)

    def transposed(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(90, 70, dtype=t.dtype, device=device).t()

    def inside(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(200, 300, dtype=t.dtype, device=device)[5:145:2, 7:187:2]

    for place in (transposed, inside):
        if found := differs(device, codes, scales, block(16, 32), place):
            return found
    return ""


@case
def beside_nothing_is_written(device: str) -> str:
    codes = random_codes(70, 90)
    around = torch.full((72, 92), 7.0, dtype=torch.bfloat16, device=device)
    scales = torch.ones(1, 1, device=device)
    dequantize_triton.fill(codes.to(device), scales, (70, 90), around[1:71, 1:91])
    around[1:71, 1:91] = 7.0
    return "" if bool((around == 7.0).all()) else "written outside"


@case
def dimensions(device: str) -> str:
    base = random_codes(6, 20, 30)
    scale = torch.tensor([0.37])
    for codes in (base[0, 0, 3], base[0, 0], base, base[::2, 1:], base.permute(2, 0, 1)):
        if found := differs(device, codes, scale, PER_TENSOR):
            return found
    return ""


@case
def more_rows_than_a_grid_is_high(device: str) -> str:
    codes = random_codes(300, 5)
    height, dequantize_triton._GRID_Y = dequantize_triton._GRID_Y, 2
    try:
        return differs(device, codes, random_scales(block(16, 5), codes.shape), block(16, 5))
    finally:
        dequantize_triton._GRID_Y = height


@case
def tiles_that_begin_inside_a_group(device: str) -> str:
    codes = random_codes(70, 90)
    tile, dequantize_triton._tile = dequantize_triton._tile, lambda *_: (32, 32)
    try:
        return differs(device, codes, random_scales(block(20, 40), codes.shape), block(20, 40))
    finally:
        dequantize_triton._tile = tile


def check(device: str) -> dict[str, str]:
    """Return what differs in each case, "" where nothing does."""
    return {name: run(device) for name, run in CASES.items()}


def compiled() -> dict[str, str]:
    """Return the machine code for [4096, 4096] in blocks of 128x128, BF16, on an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_

    pointers = {"code_ptr": "*u8", "scale_ptr": "*fp32", "out_ptr": "*i16"}
    tile_n, tile_k = dequantize_triton._tile(4096, 4096, 128, 128)
    sides = {"GROUP_N": 128, "GROUP_K": 128, "TILE_N": tile_n, "TILE_K": tile_k}
    names = dequantize_triton._dequantize.arg_names
    constants = {**sides, "HARDWARE": True, **{n: 1 for n in names if n.endswith("_stride_k")}}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(names) if name not in constants}
    source = ASTSource(dequantize_triton._dequantize, signature, constants, attributes)
    options = {"num_warps": dequantize_triton._WARPS}
    kernel = compile_(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"sass": kernel.asm["sass"]}


def main() -> None:
    result = compiled() if sys.argv[1:] == ["compile"] else check("cpu")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
