"""The reference against arithmetic done another way, and the laws it must keep."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl.kernels import reference
from fp8ctl.kernels.reference import (
    FP8_MAX,
    INPUT_DTYPES,
    MIN_SCALE,
    NonFiniteError,
    dequantize,
    quantize_block,
    quantize_per_channel,
    quantize_per_tensor,
)

_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(0, 40), st.integers(0, 40))
blocks = st.tuples(st.integers(1, 17), st.integers(1, 17))


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({1: torch.uint8, 4: torch.int32}[t.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def random(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp2(torch.randint(-12, 12, shape, generator=generator) * spread)


def exact_code(x: float, scale: float) -> int:
    """Round x / scale by exact arithmetic: once to FP32, once to e4m3fn, ties to even."""
    quotient = abs(float(torch.tensor(float(Fraction(x) / Fraction(scale)), dtype=torch.float32)))
    quotient = min(quotient, FP8_MAX)
    distance = [abs(Fraction(quotient) - Fraction(v)) for v in _VALUES]
    best = min(distance)
    code = min((c for c, d in enumerate(distance) if d == best), key=lambda c: c % 2)
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_codes_and_scale_equal_exact_rational_arithmetic(seed: int) -> None:
    x = random((4, 4), seed)
    codes, scales = quantize_block(x, (4, 4))
    amax = Fraction(float(x.abs().max()))
    # FP64 holds 8 guard digits more than the FP32 quotient needs to be told apart.
    assert float(scales) == float(torch.tensor(float(amax / 448), dtype=torch.float32))
    expected = [exact_code(value, float(scales)) for value in x.flatten().tolist()]
    assert bits(codes).flatten().tolist() == expected


def test_every_midpoint_and_its_neighbours_round_to_nearest_even() -> None:
    grid = torch.tensor(_VALUES, dtype=torch.float64)
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    around = torch.stack(
        [torch.nextafter(middle, torch.tensor(0.0)), middle, torch.nextafter(middle, middle * 2)]
    ).flatten()
    x = torch.cat([around, -around, torch.tensor([448.0, 127.9])])[None]
    codes, scales = quantize_block(x, (1, x.shape[1]))
    assert float(scales) == 1.0
    assert bits(codes)[0].tolist() == [exact_code(value, 1.0) for value in x[0].tolist()]


@given(seeds, shapes, blocks, st.integers(-20, 20))
@settings(max_examples=40, deadline=None)
def test_a_power_of_two_moves_into_the_scale_alone(
    seed: int, shape: tuple[int, int], block: tuple[int, int], power: int
) -> None:
    x = random(shape, seed)
    codes, scales = quantize_block(x, block)
    moved_codes, moved_scales = quantize_block(x * 2.0**power, block)
    assert same(codes, moved_codes)
    assert torch.equal(moved_scales, scales * 2.0**power)


@given(seeds, shapes, blocks)
@settings(max_examples=40, deadline=None)
def test_negation_flips_sign_bits_alone(
    seed: int, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    codes, scales = quantize_block(random(shape, seed), block)
    negated, negated_scales = quantize_block(-random(shape, seed), block)
    assert torch.equal(bits(negated), bits(codes) ^ 0x80)
    assert same(scales, negated_scales)


@given(seeds, shapes, blocks)
@settings(max_examples=40, deadline=None)
def test_each_block_depends_on_itself_alone(
    seed: int, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    x = random(shape, seed)
    codes, scales = quantize_block(x, block)
    assert tuple(scales.shape) == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows = slice(i * block[0], (i + 1) * block[0])
            columns = slice(j * block[1], (j + 1) * block[1])
            one, scale = quantize_per_tensor(x[rows, columns])
            assert same(one, codes[rows, columns])
            assert same(scale[0], scales[i, j])


@given(seeds, shapes, blocks, st.sampled_from(INPUT_DTYPES))
@settings(max_examples=40, deadline=None)
def test_dequantised_is_within_half_a_step(
    seed: int, shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype
) -> None:
    x = random(shape, seed, spread=0.3).to(dtype)
    codes, scales = quantize_block(x, block)
    back = dequantize(codes, scales, block)
    per_element = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    step = per_element[: shape[0], : shape[1]] * 2.0**-9
    error = (back - x.float()).abs()
    # 3 bits of mantissa: half a step is 1/16 of the value, or of the smallest step.
    assert bool((error <= torch.maximum(x.float().abs() / 16, step / 2) * (1 + 1e-6)).all())


@pytest.mark.parametrize("stripe", [1, 64, 1 << 20])
def test_stripes_do_not_show(stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random((37, 29), 1)
    whole = (quantize_block(x, (4, 8)), quantize_per_tensor(x), quantize_per_channel(x))
    monkeypatch.setattr(reference, "_STRIPE", stripe)
    again = (quantize_block(x, (4, 8)), quantize_per_tensor(x), quantize_per_channel(x))
    for (codes, scales), (codes2, scales2) in zip(whole, again, strict=True):
        assert same(codes, codes2)
        assert same(scales, scales2)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_strides_do_not_show(dtype: torch.dtype) -> None:
    base = random((60, 80), 2, spread=0.3).to(dtype)
    for view in (base.t(), base[::2, 1::3], base[:, 5].unsqueeze(0), base[3:4].expand(7, 80)):
        for quantize in (lambda t: quantize_block(t, (16, 16)), quantize_per_tensor):
            codes, scales = quantize(view)
            expected, expected_scales = quantize(view.contiguous())
            assert same(codes, expected)
            assert same(scales, expected_scales)
            assert codes.is_contiguous()


def test_the_input_stays_as_it_was() -> None:
    x = random((9, 8), 4)
    before = x.clone()
    quantize_block(x, (4, 4))
    quantize_per_tensor(x)
    quantize_per_channel(x)
    assert same(x, before)


def test_a_zero_block_has_scale_one_and_keeps_signs() -> None:
    x = torch.zeros(2, 4)
    x[0, 0] = -0.0
    codes, scales = quantize_block(x, (2, 2))
    assert scales.tolist() == [[1.0, 1.0]]
    assert bits(codes).tolist() == [[0x80, 0, 0, 0], [0, 0, 0, 0]]
    assert not bool(torch.isnan(dequantize(codes, scales, (2, 2))).any())


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_input_keeps_its_codes_even_where_torch_flushes(flush: bool) -> None:
    x = torch.tensor([[2.0**-149, -(2.0**-140), 2.0**-130, 0.0]])
    torch.set_flush_denormal(flush)
    try:
        codes, scales = quantize_block(x, (1, 4))
        still_flushing = float(torch.tensor(2.0**-140) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert scales.tolist() == [[MIN_SCALE]]
    assert bits(codes)[0].tolist() == [exact_code(float(v), MIN_SCALE) for v in x[0].tolist()]
    assert still_flushing == flush


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_largest_values_do_not_overflow(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    codes, scales = quantize_block(torch.tensor([[top, -top, top / 2, 1.0]], dtype=dtype), (1, 4))
    assert codes[0, :2].float().tolist() == [448.0, -448.0]
    assert bool(torch.isfinite(scales).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stripe", [8, 1 << 20])
def test_non_finite_names_the_first_index_in_row_order(
    value: float, stripe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_STRIPE", stripe)
    x = torch.randn(12, 10)
    x[7, 9] = x[8, 1] = x[11, 0] = value
    for quantize in (
        lambda t: quantize_block(t, (4, 4)),
        quantize_per_tensor,
        quantize_per_channel,
    ):
        with pytest.raises(NonFiniteError, match=r"\[7, 9\]") as caught:
            quantize(x)
        assert caught.value.index == (7, 9)
        quantize(torch.where(torch.isfinite(x), x, 0.0))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5), (0,), (2, 0)])
def test_per_tensor_takes_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    codes, scale = quantize_per_tensor(x)
    flat, flat_scale = quantize_per_tensor(x.flatten())
    assert codes.shape == x.shape
    assert same(codes.flatten(), flat)
    assert scale.shape == (1,)
    assert same(scale, flat_scale)
    if x.dim() == 0:
        with pytest.raises(NonFiniteError):
            quantize_per_tensor(x * math.inf)


def test_per_channel_is_one_block_per_row() -> None:
    x = random((9, 30), 3)
    codes, scales = quantize_per_channel(x)
    expected, expected_scales = quantize_block(x, (1, 30))
    assert same(codes, expected)
    assert same(scales, expected_scales)
    assert quantize_per_channel(x[:, :0])[1].shape == (9, 1)


def test_what_is_no_input_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        quantize_block(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="2 dimensions"):
        quantize_block(torch.zeros(2))
    with pytest.raises(ValueError, match="positive"):
        quantize_block(torch.zeros(2, 2), (0, 4))
    with pytest.raises(ValueError, match="expected"):
        dequantize(torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(2, 1), (2, 2))
