"""Signal to noise of quantised weights, beside the definition in FP64."""

from __future__ import annotations

import math

import pytest
import torch

from fp8ctl import quality
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.dequantize import dequantize
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block

ALL = [block(32, 32), block(3, 5), block(128, 128), PER_TENSOR, PER_CHANNEL]


def defined(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, how: Groups) -> float:
    w = weight.double()
    noise = w - dequantize(codes, scales, how).double()
    return 10 * math.log10(float(w.square().sum() / noise.square().sum()))


@pytest.mark.parametrize("groups", ALL, ids=str)
@pytest.mark.parametrize("shape", [(300, 200), (1, 64), (5, 7), (6000, 1100)])
def test_it_is_the_ratio_of_the_definition(shape: tuple[int, int], groups: Groups) -> None:
    """The largest is seen in samples of its rows, which are not alike."""
    random = torch.Generator().manual_seed(1)
    rows = torch.logspace(-6, -1.7, shape[0]).unsqueeze(1)
    weight = (torch.randn(shape, generator=random) * rows).bfloat16()
    codes, scales = kernels.quantize(weight, groups)
    found = quality.measure(weight, codes, scales, groups)
    assert found["sqnr_db"] == pytest.approx(defined(weight, codes, scales, groups), abs=0.1)
    assert found["amax"] == float(weight.float().abs().max())


def test_a_layer_that_lost_its_scales_is_seen() -> None:
    weight = torch.randn(64, 64).bfloat16()
    codes, scales = kernels.quantize(weight, PER_TENSOR)
    assert quality.measure(weight, codes, scales * 2, PER_TENSOR)["sqnr_db"] == pytest.approx(
        0, abs=0.5
    )


def test_what_fp8_keeps_whole_has_no_noise() -> None:
    for weight in (torch.zeros(8, 8), torch.full((8, 8), -448.0), torch.empty(0, 4)):
        codes, scales = kernels.quantize(weight, PER_TENSOR)
        found = quality.measure(weight, codes, scales, PER_TENSOR)
        assert found["sqnr_db"] == quality.NOISELESS
        assert found["amax"] == (448.0 if weight.numel() and weight[0, 0] else 0.0)
