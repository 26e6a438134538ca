"""The Triton block kernel under Triton's interpreter equals the reference, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8ctl.kernels import quantize, reference

pytest.importorskip("triton", reason="Triton is published for Linux only")

_SCRIPT = Path(__file__).with_name("block_cases.py")
_NAMES = (
    "every_bfloat16",
    "every_float16",
    "midpoints_and_carries",
    "shapes_and_blocks",
    "strides",
    "magnitudes",
    "non_finite",
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_HOME": str(tmp_path_factory.mktemp("triton")),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def test_every_case_ran(outcome: dict[str, str]) -> None:
    assert tuple(outcome) == _NAMES


@pytest.mark.parametrize("name", _NAMES)
def test_interpreted_kernel_equals_the_reference(name: str, outcome: dict[str, str]) -> None:
    assert outcome[name] == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", reference.INPUT_DTYPES)
@pytest.mark.parametrize("size", [(128, 128), (64, 64), (1, 128)])
def test_on_a_gpu_the_kernel_equals_the_reference(
    dtype: torch.dtype, size: tuple[int, int]
) -> None:
    x = (torch.randn(1000, 777) * 0.02).to(dtype)
    codes, scales = quantize.quantize_block(x.cuda(), size)
    wanted, wanted_scales = reference.quantize_block(x, size)
    assert torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales.cpu(), wanted_scales)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_reference_is_the_same_on_a_gpu() -> None:
    # torch divides a CUDA tensor by a Python number by multiplying with its reciprocal.
    x = torch.randn(1000, 777)
    for size in ((1, 777), (64, 64)):
        codes, scales = reference.quantize_block(x.cuda(), size)
        wanted, wanted_scales = reference.quantize_block(x, size)
        assert torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(scales.cpu(), wanted_scales)
    codes, scales = reference.quantize_per_tensor(x.cuda())
    wanted, wanted_scales = reference.quantize_per_tensor(x)
    assert torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales.cpu(), wanted_scales)


def test_on_a_cpu_the_reference_is_chosen() -> None:
    x = torch.randn(5, 7)
    codes, scales = quantize.quantize_block(x, (2, 2))
    wanted, wanted_scales = reference.quantize_block(x, (2, 2))
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)
