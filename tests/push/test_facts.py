"""Facts of codes are those of a plain count, whatever the shape and wherever blocks are cut."""

from __future__ import annotations

import pytest
import torch

from fp8ctl.kernels import reference
from fp8ctl.kernels.groups import PER_TENSOR
from fp8ctl.kernels.groups import block as blocks
from fp8ctl.push import facts as module
from fp8ctl.push.facts import facts, largest, peaks
from fp8ctl.wire import Entry


def counted(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None
) -> dict[str, float]:
    """Count block by block, in plain words."""
    values = codes.float()
    high, wide = block or codes.shape
    amax, zero = 0.0, 0
    for r in range(-(-codes.shape[0] // high)):
        for c in range(-(-codes.shape[1] // wide)):
            part = values[r * high : (r + 1) * high, c * wide : (c + 1) * wide]
            scale = scales.view(-1)[0] if block is None else scales[r, c]
            if bool((part == 0).all()):
                zero += 1
            else:
                amax = max(amax, 448 * float(scale))
    saturated = int((values.abs() == 448).sum())
    return {"amax": amax, "saturated": saturated, "zero_blocks": zero}


@pytest.mark.parametrize("shape", [(8, 8), (96, 64), (33, 47), (1, 9), (100, 130)])
@pytest.mark.parametrize("block", [(32, 16), (64, 64), None])
@pytest.mark.parametrize("spoil", ["nothing", "zeros", "all zeros", "448", "negative zero"])
def test_they_are_what_a_plain_count_finds(
    shape: tuple[int, int], block: tuple[int, int] | None, spoil: str
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if spoil in ("zeros", "negative zero"):
        x[:32, :16] = 0 if spoil == "zeros" else -0.0
    elif spoil == "all zeros":
        x[:] = 0
    elif spoil == "448":
        x[0, 0] = 448  # scale 1, as a block of zeros has it
    codes, scales = reference.quantize(x, PER_TENSOR if block is None else blocks(*block))
    entries = [
        Entry("a.weight", "float8_e4m3fn", tuple(codes.shape), 0),
        Entry("a.weight_scale", "float32", tuple(scales.shape), 0),
        Entry("b.weight", "bfloat16", (3,), 0),
        Entry("c.steps", "int64", (1,), 0),
    ]
    kept, steps = torch.tensor([1.0, -5.0, 2.0]).bfloat16(), torch.ones(1, dtype=torch.int64)
    found = facts(entries, [codes, scales, kept, steps], block)
    assert found == [counted(codes, scales, block), {}, {"amax": 5.0}, {}]


@pytest.mark.parametrize(
    "dtypes",
    [[torch.bfloat16] * 4, [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]],
)
@pytest.mark.parametrize("spoil", [None, torch.nan, -torch.inf])
def test_peaks_of_a_list_are_those_of_its_tensors_on_a_gpu_as_on_a_cpu(
    dtypes: list[torch.dtype], spoil: float | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    xs = [
        (10**i * torch.randn(3 + i, 5, generator=generator)).to(dtype)
        for i, dtype in enumerate(dtypes)
    ]
    if spoil is not None:
        xs[2][1, 2] = spoil
    wanted = torch.stack([x.double().abs().amax() for x in xs])
    for found in (peaks(xs), module._by_norms(xs), torch.stack(largest(xs))):
        assert found.dtype == torch.float64
        assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))
    assert largest([]) == []
