"""Dequantisation equals its definition, bit for bit, by torch and by Triton."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fp8ctl.kernels import dequantize, native, reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block

_SCRIPT = Path(__file__).with_name("dequantize_cases.py")
_NAMES = (
    "every_code_and_hard_scales",
    "shapes_and_groups",
    "strides",
    "places",
    "beside_nothing_is_written",
    "dimensions",
    "more_rows_than_a_grid_is_high",
    "tiles_that_begin_inside_a_group",
)
_DTYPES = dequantize.OUTPUT_DTYPES
_FORMATS = {torch.float32: (24, -126), torch.bfloat16: (8, -126), torch.float16: (11, -14)}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only"
)


@pytest.fixture(params=["torch", "native"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give every test to both that serve a CPU."""
    if request.param == "native" and not native.available():
        pytest.skip(native.why_not())
    chosen = {"torch": dequantize.by_torch, "native": dequantize.by_native}[request.param]
    monkeypatch.setattr(dequantize, "_path", lambda _: chosen)
    return str(request.param)


on_each_path = pytest.mark.usefixtures("path")


# The definition, in exact arithmetic.


def _code_value(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    value = math.ldexp(mantissa if exponent == 0 else 8 + mantissa, max(exponent, 1) - 10)
    return -value if code & 0x80 else value


def _rounded(value: Fraction, dtype: torch.dtype) -> float:
    """Round to nearest even in a format of `digits` bits and its smallest normal exponent."""
    digits, least = _FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = math.frexp(float(value))[1] - 1  # 28 bits: exact in a double
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    result = round(value / unit) * unit  # Python rounds a Fraction to even
    largest = Fraction(2) ** (16 if dtype == torch.float16 else 128)
    if abs(result) >= largest:
        return math.copysign(math.inf, result)
    return float(result)


def _defined(code: int, scale: float, dtype: torch.dtype) -> float:
    value = _code_value(code)
    if not math.isfinite(value) or not math.isfinite(scale):
        return value * scale
    product = _rounded(Fraction(value) * Fraction(scale), torch.float32)
    if not math.isfinite(product):
        return product
    sign = math.copysign(1.0, value) * math.copysign(1.0, scale)
    return math.copysign(_rounded(Fraction(product), dtype), sign)


def _bits(t: torch.Tensor) -> list[str]:
    """Return each number as an exact text, all NaN alike."""
    return [float.hex(v) for v in t.double().flatten().tolist()]


def _hard_scales() -> list[float]:
    # Not shared with the cases of the kernel: one wrong list should not blind both.
    random = np.random.default_rng(0)
    scales = [0.0, 1.0, -0.7, 2.0**-149, 3 * 2.0**-149, 2.0**-126, math.inf, math.nan]
    scales += [random.uniform(1, 2) * 2.0**e for e in range(-140, 127, 6)]
    scales += [(1 + 2.0**-i) * 2.0**e for i in (7, 8, 10, 11, 12, 23) for e in (0, -17, -128)]
    return [struct.unpack("f", struct.pack("f", s))[0] for s in scales]


@on_each_path
@on_each_path
@pytest.mark.parametrize("dtype", _DTYPES)
def test_every_code_times_hard_scales_is_as_defined(dtype: torch.dtype) -> None:
    scales = _hard_scales()
    codes = torch.arange(256).to(torch.uint8).expand(len(scales), 256)
    found = dequantize.dequantize(codes, torch.tensor(scales)[:, None], PER_CHANNEL, dtype)
    assert found.dtype == dtype
    wanted = [float.hex(_defined(c, s, dtype)) for s in scales for c in range(256)]
    assert _bits(found) == wanted


def test_a_product_is_rounded_to_fp32_before_it_is_rounded_to_bf16() -> None:
    # 9 * scale lies just above the middle of two BF16 numbers; in FP32 it is the middle.
    middle, scale = 1 + 2.0**-8, float.fromhex("0x1.c8e39p-4")
    exact = Fraction(9) * Fraction(scale)
    assert _rounded(exact, torch.float32) == middle < exact
    assert _rounded(exact, torch.bfloat16) == 1 + 2.0**-7
    codes = torch.tensor([9.0]).to(torch.float8_e4m3fn)
    found = dequantize.dequantize(codes, torch.tensor([scale]), PER_TENSOR, torch.bfloat16)
    assert found.item() == 1.0


def _by_elements(codes: torch.Tensor, scales: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the FP32 result, element by element."""
    result = torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            if groups.kind == "block":
                scale = scales[i // groups.sides[0], j // groups.sides[1]]
            else:
                scale = scales[i, 0] if groups.kind == "per-channel" else scales[0]
            result[i, j] = _code_value(int(codes[i, j])) * float(scale)
    return result


def _random(shape: tuple[int, int], groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    codes = torch.randint(0, 127, shape).to(torch.uint8)
    return codes, torch.randn(groups.scale_shape(shape)).exp()


@on_each_path
@on_each_path
@on_each_path
@on_each_path
@on_each_path
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (3, 0), (13, 17), (1, 40), (40, 1)])
@pytest.mark.parametrize(
    "groups", [block(4, 4), block(3, 5), block(1, 16), block(100, 100), PER_CHANNEL, PER_TENSOR]
)
@pytest.mark.parametrize("tile", [1 << 17, 60, 7])
def test_groups_and_tiles(
    shape: tuple[int, int], groups: Groups, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiles that hold many groups, parts of several and parts of one.
    monkeypatch.setattr(dequantize, "_TILE", tile)
    codes, scales = _random(shape, groups)
    found = dequantize.dequantize(codes.view(torch.float8_e4m3fn), scales, groups)
    assert found.dtype == torch.float32
    assert torch.equal(found, _by_elements(codes, scales, groups))


def test_strides_and_given_memory() -> None:
    groups = block(4, 5)
    codes, scales = _random((30, 40), groups)
    wanted = dequantize.dequantize(codes, scales, groups, torch.bfloat16)
    folded = codes.t().contiguous().t()
    bucket = torch.full((64, 100), 7.0, dtype=torch.bfloat16)
    place = bucket[2:62:2, 10:90:2]
    assert dequantize.dequantize(folded, scales.t().contiguous().t(), groups, out=place) is place
    assert torch.equal(place, wanted)
    place.fill_(7.0)
    assert bool((bucket == 7.0).all())


def test_dimensions_of_a_tensor_with_one_scale() -> None:
    codes, scale = _random((24, 10), PER_TENSOR)
    wanted = _by_elements(codes, scale, PER_TENSOR)
    shaped = wanted.view(4, 6, 10)
    for part in ((), (slice(1, 3), slice(0, 6, 2)), (1, 2, 3), (1, 2)):
        found = dequantize.dequantize(codes.view(4, 6, 10)[part], scale, PER_TENSOR)
        assert torch.equal(found, shaped[part])
    found = dequantize.dequantize(codes.view(4, 6, 10).permute(2, 0, 1), scale, PER_TENSOR)
    assert torch.equal(found, shaped.permute(2, 0, 1))


def test_it_undoes_quantising() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 130)
    codes, scales = reference.quantize(x, block(32, 32))
    error = (dequantize.dequantize(codes, scales, block(32, 32)) - x).abs()
    # Half a unit of 4 significant bits, or half a step of the subnormal codes.
    spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)[:100, :130]
    assert bool((error <= torch.maximum(x.abs() * 2.0**-4, spread * 2.0**-10) * 1.000001).all())


def test_subnormal_numbers_are_kept_where_the_caller_flushes_them() -> None:
    codes = torch.tensor([[1.0, 448.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([1 << 19], dtype=torch.int32).view(torch.float32)  # 2^-130
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        found = dequantize.dequantize(codes, scale, PER_TENSOR)
    finally:
        torch.set_flush_denormal(False)
    assert found.tolist() == [[2.0**-130, 448 * 2.0**-130]]


_CODES = torch.zeros(4, 6, dtype=torch.uint8)
_MEMORY = torch.ones(24)
_SCALES = _MEMORY[:4].view(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 6)}, "codes of torch.float32"),
        ({"codes": torch.zeros(4, 6).to(torch.float8_e5m2)}, "codes of torch.float8_e5m2"),
        ({"codes": _CODES[0]}, r"expected codes \[N, K\] for 2x3 scales, found \[6\]"),
        ({"codes": _CODES.to("meta")}, "on meta"),
        ({"codes": [1]}, "codes are a list"),
        ({"scales": torch.ones(2, 3)}, r"scales of shape \[2, 3\]; expected \[2, 2\]"),
        ({"scales": torch.ones(2, 2).double()}, "scales of torch.float64"),
        ({"groups": PER_TENSOR}, r"scales of shape \[2, 2\]; expected \[1\]"),
        ({"groups": PER_CHANNEL}, r"scales of shape \[2, 2\]; expected \[4, 1\]"),
        ({"dtype": torch.float64}, "cannot dequantise to torch.float64"),
        ({"out": torch.empty(4, 6).double()}, "cannot dequantise to torch.float64"),
        ({"out": torch.empty(4, 6), "dtype": torch.float16}, "out of torch.float32; expected"),
        ({"out": torch.empty(6, 4)}, r"out of shape \[6, 4\]; expected \[4, 6\]"),
        ({"out": torch.empty(4, 6, device="meta")}, "out on meta"),
        ({"out": torch.empty(6).expand(4, 6)}, "writes one place more than once"),
        ({"out": _MEMORY.view(4, 6)}, "overlap"),
        ({"out": torch.zeros(4, 6, dtype=torch.complex64).conj().imag}, "negates what is written"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"codes": _CODES, "scales": _SCALES, "groups": block(2, 3), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        dequantize.dequantize(**arguments)


# Triton.


def _run_cases(folder: Path, *arguments: str, **variables: str) -> dict[str, str]:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_HOME": str(folder),
        "OMP_WAIT_POLICY": "PASSIVE",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _run_cases(tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@needs_triton
def test_every_case_ran(outcome: dict[str, str]) -> None:
    assert tuple(outcome) == _NAMES


@needs_triton
@pytest.mark.parametrize("name", _NAMES)
def test_the_interpreted_kernel_equals_torch(name: str, outcome: dict[str, str]) -> None:
    assert outcome[name] == ""


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_kernel_equals_torch() -> None:
    from tests.kernels import dequantize_cases

    assert dequantize_cases.check("cuda") == dict.fromkeys(_NAMES, "")


@needs_triton
def test_machine_code_reads_and_writes_16_bytes_and_approximates_nothing(tmp_path: Path) -> None:
    code = _run_cases(tmp_path, "compile")["sass"]
    assert "LDG.E.128" in code
    assert "STG.E.128" in code
    assert not re.findall(r"\S*(?:FTZ|MUFU|LDL|STL)\S*", code)
