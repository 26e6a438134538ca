"""The reference against exact rational arithmetic, and the laws it must keep."""

from __future__ import annotations

import bisect
import itertools
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl.kernels import quantize as front_door
from fp8ctl.kernels import reference
from fp8ctl.kernels.dequantize import dequantize
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block
from fp8ctl.kernels.inputs import INPUT_DTYPES, NonFiniteError
from fp8ctl.kernels.recipes import (
    FP8_MAX,
    IEEE,
    INVERSE_SCALE,
    MIN_SCALE,
    RECIPES,
    RECIPROCAL,
    UE8M0,
    Recipe,
)
from fp8ctl.kernels.reference import quantize
from tests.kernels import matrix, model

ROOT = Path(__file__).resolve().parent.parent.parent
WITHOUT_FLOOR = (IEEE, RECIPROCAL.with_floor(0), INVERSE_SCALE, UE8M0)
WITH_FLOOR = tuple(recipe.with_floor(1e-4) for recipe in RECIPES.values())
ALL_RECIPES = (*RECIPES.values(), *WITH_FLOOR)

_TABLE = [Fraction(value) for value in model.VALUES.tolist()]
_LEAST = Fraction(1, 2**126)

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(0, 40), st.integers(0, 40))
blocks = st.tuples(st.integers(1, 17), st.integers(1, 17)).map(lambda sides: block(*sides))
any_groups = blocks | st.sampled_from([PER_TENSOR, PER_CHANNEL])
without_floor = st.sampled_from(WITHOUT_FLOOR)
finite_words = {
    torch.float32: st.integers(0, 0x7F7FFFFF),
    torch.bfloat16: st.integers(0, 0x7F7F),
    torch.float16: st.integers(0, 0x7BFF),
}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def random(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp2(torch.randint(-12, 12, shape, generator=generator) * spread)


def fp32(value: Fraction) -> Fraction:
    """Round a number of magnitude below 2^128 to FP32, to nearest even."""
    magnitude = abs(value)
    if magnitude == 0:
        return value
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, -126) - 23)
    return round(value / step) * step  # Python rounds a Fraction to nearest even


def by_definition(amax: Fraction, recipe: Recipe) -> tuple[Fraction, Fraction | None]:
    """Return a group's scale, and what x is multiplied by, None where it is divided."""
    a = max(amax, Fraction(recipe.floor))
    if a == 0:
        return Fraction(1), None
    if recipe.arithmetic == "inverse-scale":
        # The quotient is FP32's largest power of two at most, and then above 2^128 too.
        factor = 1 / _LEAST if 448 / a > 1 / _LEAST else fp32(448 / a)
        return fp32(1 / factor), factor
    if recipe.arithmetic == "power-of-two":
        scale = _LEAST
        while scale * 448 < a:
            scale *= 2
        return scale, None
    scale = max(fp32(a / 448), _LEAST)
    return scale, fp32(1 / scale) if recipe.arithmetic == "reciprocal" else None


def nearest_code(x: float, scale: Fraction, factor: Fraction | None) -> int:
    y = fp32(abs(Fraction(x)) / scale if factor is None else abs(Fraction(x)) * factor)
    y = min(y, _TABLE[-1])
    code = bisect.bisect_right(_TABLE, y) - 1
    if code < 126:
        below, above = y - _TABLE[code], _TABLE[code + 1] - y
        code += above < below or (above == below and code % 2 == 1)
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)


@st.composite
def small_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits of any dtype, all of one magnitude or of all magnitudes."""
    dtype = draw(st.sampled_from(INPUT_DTYPES))
    word = st.tuples(finite_words[dtype], st.booleans())
    if draw(st.booleans()):
        low = draw(finite_words[dtype])
        span = 3 << {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
        top = {torch.float32: 0x7F7FFFFF, torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}[dtype]
        word = st.tuples(st.integers(max(0, low - span), min(top, low + span)), st.booleans())
    words = draw(st.lists(word, min_size=1, max_size=9))
    least = -(1 << (8 * dtype.itemsize - 1))
    return torch.tensor(
        [magnitude + (least if negative else 0) for magnitude, negative in words],
        dtype=torch.int32 if dtype.itemsize == 4 else torch.int16,
    ).view(dtype)[None]


@given(small_tensors(), st.sampled_from((*ALL_RECIPES, *WITHOUT_FLOOR)))
@settings(max_examples=250, deadline=None)
def test_codes_and_scale_equal_exact_rational_arithmetic(x: torch.Tensor, recipe: Recipe) -> None:
    codes, scales = quantize(x, PER_TENSOR, recipe)
    values = x[0].double().tolist()
    scale, factor = by_definition(max(abs(Fraction(v)) for v in values), recipe)
    assert Fraction(float(scales)) == scale
    assert bits(codes)[0].tolist() == [nearest_code(v, scale, factor) for v in values]


@given(small_tensors(), st.sampled_from(tuple(RECIPES)), st.sampled_from(["", ":floor=0.0001"]))
@settings(max_examples=120, deadline=None)
def test_the_model_equals_exact_rational_arithmetic(x: torch.Tensor, name: str, floor: str) -> None:
    # What the matrix holds the reference to is itself held to the definition.
    recipe = RECIPES[name].with_floor(1e-4) if floor else RECIPES[name]
    found = model.quantize(x, PER_TENSOR, name + floor, "error")
    values = x[0].double().tolist()
    scale, factor = by_definition(max(abs(Fraction(v)) for v in values), recipe)
    assert Fraction(float(found.scales[0])) == scale
    assert found.codes[0].tolist() == [nearest_code(v, scale, factor) for v in values]


def test_many_numbers_have_the_models_codes_and_no_two_recipes_agree() -> None:
    # x / s and x * (1 / s) differ in 4 codes of 10,000 in BF16, and hardly ever in FP32.
    x = torch.randn((1 << 11, 1 << 8), generator=torch.Generator().manual_seed(9)).bfloat16()
    found = {}
    for name, recipe in RECIPES.items():
        codes, scales = quantize(x, block(16, 16), recipe)
        wanted = model.quantize(x, block(16, 16), name, "error")
        assert torch.equal(bits(codes), torch.from_numpy(wanted.codes))
        assert torch.equal(scales, torch.from_numpy(wanted.scales))
        found[name] = bits(codes)
    for one, other in itertools.combinations(found, 2):
        assert int((found[one] != found[other]).sum()) > 10, (one, other)


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=str)
def test_every_midpoint_and_its_neighbours_round_to_nearest_even(recipe: Recipe) -> None:
    grid = torch.from_numpy(model.VALUES)
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    around = torch.stack(
        [torch.nextafter(middle, torch.tensor(0.0)), middle, torch.nextafter(middle, middle * 2)]
    ).flatten()
    x = torch.cat([around, -around, torch.tensor([448.0, 127.9])])[None]
    codes, scales = quantize(x, PER_CHANNEL, recipe)
    assert float(scales) == 1.0
    assert bits(codes)[0].tolist() == [nearest_code(v, Fraction(1), None) for v in x[0].tolist()]


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=str)
def test_scales_at_every_power_of_two_and_beside_it(recipe: Recipe) -> None:
    x = matrix.boundaries()[:, None]
    codes, scales = quantize(x, PER_CHANNEL, recipe)
    wanted = [by_definition(Fraction(v), recipe) for v in x.flatten().tolist()]
    assert [Fraction(v) for v in scales.flatten().tolist()] == [scale for scale, _ in wanted]
    assert bits(codes).flatten().tolist() == [
        nearest_code(v, *pair) for v, pair in zip(x.flatten().tolist(), wanted, strict=True)
    ]


@given(seeds, shapes, any_groups, without_floor, st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_a_power_of_two_moves_into_the_scale_alone(
    seed: int, shape: tuple[int, int], groups: Groups, recipe: Recipe, power: int
) -> None:
    x = random(shape, seed)
    codes, scales = quantize(x, groups, recipe)
    moved_codes, moved_scales = quantize(x * 2.0**power, groups, recipe)
    assert same(codes, moved_codes)
    if x.numel():  # the scale of nothing is 1 whatever is in it
        assert torch.equal(moved_scales, scales * 2.0**power)


@given(seeds, shapes, any_groups, st.sampled_from(ALL_RECIPES))
@settings(max_examples=60, deadline=None)
def test_negation_flips_sign_bits_alone(
    seed: int, shape: tuple[int, int], groups: Groups, recipe: Recipe
) -> None:
    codes, scales = quantize(random(shape, seed), groups, recipe)
    negated, negated_scales = quantize(-random(shape, seed), groups, recipe)
    assert torch.equal(bits(negated), bits(codes) ^ 0x80)
    assert same(scales, negated_scales)


@given(seeds, shapes, blocks, st.sampled_from(ALL_RECIPES))
@settings(max_examples=40, deadline=None)
def test_each_group_depends_on_itself_alone(
    seed: int, shape: tuple[int, int], groups: Groups, recipe: Recipe
) -> None:
    x = random(shape, seed)
    codes, scales = quantize(x, groups, recipe)
    height, width = groups.sides
    assert tuple(scales.shape) == (-(-shape[0] // height), -(-shape[1] // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows = slice(i * height, (i + 1) * height)
            columns = slice(j * width, (j + 1) * width)
            one, scale = quantize(x[rows, columns], PER_TENSOR, recipe)
            assert same(one, codes[rows, columns])
            assert same(scale[0], scales[i, j])


@given(seeds, shapes, blocks, st.sampled_from(INPUT_DTYPES), without_floor)
@settings(max_examples=60, deadline=None)
def test_dequantised_is_within_half_a_step(
    seed: int, shape: tuple[int, int], groups: Groups, dtype: torch.dtype, recipe: Recipe
) -> None:
    x = random(shape, seed, spread=0.3).to(dtype)
    codes, scales = quantize(x, groups, recipe)
    back = dequantize(codes, scales, groups)
    height, width = groups.sides
    per_element = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
    step = per_element[: shape[0], : shape[1]] * 2.0**-9
    error = (back - x.float()).abs()
    # 3 bits of mantissa: half a step is 1/16 of the value, or of the smallest step.
    assert bool((error <= torch.maximum(x.float().abs() / 16, step / 2) * (1 + 1e-6)).all())


@pytest.mark.long
@pytest.mark.parametrize("module", [reference, front_door], ids=["reference", "front door"])
@pytest.mark.parametrize("exponent", [0, 1, 2, 8, 100, 127, 253, 254])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_bf16_number_under_every_amax(recipe: str, exponent: int, module: Any) -> None:
    # All exponents, and FP16 too, on a GPU: test_on_gpu.py.
    for x in matrix.under_every_amax(torch.bfloat16, exponent):
        codes, scales = module.quantize(x, PER_CHANNEL, RECIPES[recipe])
        wanted = model.quantize(x, PER_CHANNEL, recipe, "error")
        assert torch.equal(scales, torch.from_numpy(wanted.scales))
        assert torch.equal(bits(codes), torch.from_numpy(wanted.codes))


def test_the_largest_of_a_group_has_the_largest_code_but_under_a_floor() -> None:
    x = random((64, 64), 5)
    for recipe in ALL_RECIPES:
        codes, scales = quantize(x, block(8, 8), recipe)
        top = codes.float().abs().view(8, 8, 8, 8).amax(dim=(1, 3))
        if recipe.arithmetic == "power-of-two":
            assert bool((top > 208).all())
        else:
            assert bool((top == FP8_MAX).all())
        low, floored = quantize(x * 2.0**-80, block(8, 8), recipe)
        if recipe.floor == 0:
            assert same(low, codes)
        else:
            assert not bits(low).bitwise_and(0x7F).any()
            assert bool((floored == floored[0, 0]).all())
        assert bool((scales > 0).all())


@pytest.mark.parametrize("tile", [1, 5, 64, 1000, 1 << 20])
def test_tiles_do_not_show(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random((37, 29), 1)
    every = (block(4, 8), block(50, 50), block(1, 3), PER_TENSOR, PER_CHANNEL)
    whole = [quantize(x, groups) for groups in every]
    back = [dequantize(*one, groups) for one, groups in zip(whole, every, strict=True)]
    monkeypatch.setattr(reference, "_TILE", tile)
    for groups, (codes, scales), values in zip(every, whole, back, strict=True):
        codes2, scales2 = quantize(x, groups)
        assert same(codes, codes2)
        assert same(scales, scales2)
        assert same(values, dequantize(codes, scales, groups))


@given(
    seeds,
    shapes,
    any_groups,
    st.sampled_from([1, 7, 64]),
    st.sampled_from(matrix.NUMBERS),
    st.sampled_from(matrix.LAYOUTS),
)
@settings(max_examples=40, deadline=None)
def test_tiles_do_not_show_for_any_numbers(
    seed: int, shape: tuple[int, int], groups: Groups, tile: int, kind: str, layout: str
) -> None:
    x = matrix.lay_out(matrix.numbers(kind, shape, torch.bfloat16, seed), layout)
    whole = model.quantize(x, groups, "ieee", "propagate")
    kept = reference._TILE
    reference._TILE = tile
    try:
        codes, scales = quantize(x, groups, IEEE, "propagate")
    finally:
        reference._TILE = kept
    assert torch.equal(bits(codes), torch.from_numpy(whole.codes))
    assert torch.equal(scales, torch.from_numpy(whole.scales))


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("groups", [block(16, 16), PER_TENSOR, PER_CHANNEL], ids=str)
def test_strides_do_not_show(dtype: torch.dtype, groups: Groups) -> None:
    base = random((60, 80), 2, spread=0.3).to(dtype)
    for view in (base.t(), base[::2, 1::3], base[:, 5].unsqueeze(0), base[3:4].expand(7, 80)):
        codes, scales = quantize(view, groups)
        expected, expected_scales = quantize(view.contiguous(), groups)
        assert same(codes, expected)
        assert same(scales, expected_scales)
        assert codes.is_contiguous()


def test_the_input_stays_as_it_was() -> None:
    x = random((9, 8), 4)
    before = x.clone()
    for recipe in ALL_RECIPES:
        for groups in (block(4, 4), PER_TENSOR, PER_CHANNEL):
            quantize(x, groups, recipe)
    assert same(x, before)


def test_no_graph_is_built_and_one_is_no_hindrance() -> None:
    x = torch.nn.Parameter(random((4, 4), 6))
    codes, scales = quantize(x, block(2, 2))
    assert not scales.requires_grad
    assert same(codes, quantize(x.detach(), block(2, 2))[0])


@pytest.mark.parametrize("recipe", WITHOUT_FLOOR, ids=str)
def test_a_zero_group_has_scale_one_and_keeps_signs(recipe: Recipe) -> None:
    x = torch.zeros(2, 4)
    x[0, 0] = -0.0
    codes, scales = quantize(x, block(2, 2), recipe)
    assert scales.tolist() == [[1.0, 1.0]]
    assert bits(codes).tolist() == [[0x80, 0, 0, 0], [0, 0, 0, 0]]
    assert not bool(torch.isnan(dequantize(codes, scales, block(2, 2))).any())


@pytest.mark.parametrize("recipe", WITH_FLOOR, ids=str)
def test_a_zero_group_under_a_floor_has_the_floors_scale(recipe: Recipe) -> None:
    scale = float(by_definition(Fraction(0), recipe)[0])
    for groups, shape in ((block(2, 2), (2, 2)), (PER_TENSOR, (0, 3)), (PER_CHANNEL, (2, 0))):
        out = torch.ones(shape, dtype=torch.uint8), torch.full(groups.scale_shape(shape), 7.0)
        codes, scales = quantize(torch.zeros(shape), groups, recipe, out=out)
        assert set(scales.flatten().tolist()) == {scale}
        assert not bits(codes).any()


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_input_keeps_its_codes_even_where_torch_flushes(flush: bool) -> None:
    x = torch.tensor([[2.0**-149, -(2.0**-140), 2.0**-130, 0.0]])
    expected = [nearest_code(v, _LEAST, None) for v in x[0].tolist()]
    torch.set_flush_denormal(flush)
    try:
        codes, scales = quantize(x, block(1, 4))
        still_flushing = float(torch.tensor(2.0**-140) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert scales.tolist() == [[MIN_SCALE]]
    assert bits(codes)[0].tolist() == expected
    assert still_flushing == flush


_FLUSHING_POOL = """
import torch
torch.set_num_threads(2)
torch.set_flush_denormal(True)
torch.randn(1 << 22).mul_(2)  # the threads of the pool start now, and take the setting with them
from fp8ctl.kernels import quantize, reference
from fp8ctl.kernels.groups import PER_TENSOR, block
x = torch.full((1024, 1024), 1 << 19, dtype=torch.int32).view(torch.float32)  # 2^-130
for module in (reference, quantize):
    for groups in (block(128, 128), PER_TENSOR):
        codes, scales = module.quantize(x, groups)
        assert scales.unique().tolist() == [2.0**-126], (module, scales.unique())
        assert codes.view(torch.uint8).unique().tolist() == [{code}], module
"""


def test_subnormal_input_keeps_its_codes_where_all_of_torchs_threads_flush() -> None:
    code = nearest_code(2.0**-130, _LEAST, None)
    script = _FLUSHING_POOL.format(code=code)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=str)
def test_largest_values_do_not_overflow(dtype: torch.dtype, recipe: Recipe) -> None:
    top = torch.finfo(dtype).max
    x = torch.tensor([[top, -top, top / 2, 1.0]], dtype=dtype)
    codes, scales = quantize(x, block(1, 4), recipe)
    assert bool(torch.isfinite(scales).all())
    if recipe.arithmetic == "power-of-two":
        assert codes[0, :2].float().tolist() == [256.0, -256.0]
    else:
        assert codes[0, :2].float().tolist() == [448.0, -448.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tile", [8, 1 << 20])
def test_non_finite_names_the_first_index_in_row_order(
    value: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_TILE", tile)
    x = torch.ones(12, 10)
    x[7, 9] = x[8, 1] = x[11, 0] = value
    x[11, 1] = math.inf if math.isnan(value) else math.nan
    for groups in (block(4, 4), block(5, 50), PER_TENSOR, PER_CHANNEL):
        with pytest.raises(NonFiniteError, match=rf"{value} at index \[7, 9\]$") as caught:
            quantize(x, groups)
        assert caught.value.index == (7, 9)
        assert repr(caught.value.value) == repr(value)
        assert caught.value.tensor is None
        quantize(torch.where(torch.isfinite(x), x, 0.0), groups)


def test_the_first_index_has_as_many_numbers_as_the_tensor_has_dimensions() -> None:
    x = torch.zeros(2, 3, 4, 5)
    x[1, 2, 0, 4] = x[1, 2, 3, 0] = math.nan
    for view in (x, x.permute(0, 1, 2, 3), x.transpose(1, 3).contiguous().transpose(1, 3)):
        with pytest.raises(NonFiniteError) as caught:
            quantize(view, PER_TENSOR)
        assert caught.value.index == (1, 2, 0, 4)
    with pytest.raises(NonFiniteError) as caught:
        quantize(torch.tensor(math.inf), PER_TENSOR)
    assert caught.value.index == ()


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=str)
def test_what_is_not_finite_leaves_its_neighbours_alone(recipe: Recipe) -> None:
    x = random((16, 16), 7)
    holes = x.clone()
    where = [(0, 0), (3, 9), (15, 15)]
    for (i, j), value in zip(where, (math.nan, math.inf, -math.inf), strict=True):
        x[i, j] = 0.0
        holes[i, j] = value
    codes, scales = quantize(x, block(8, 8), recipe)
    for policy, special in (("saturate", [0, 0x7E, 0xFE]), ("propagate", [0x7F, 0x7F, 0xFF])):
        found, found_scales = quantize(holes, block(8, 8), recipe, policy)  # type: ignore[arg-type]
        assert same(found_scales, scales)
        assert [int(bits(found)[at]) for at in where] == special
        for at in where:
            bits(found)[at] = bits(codes)[at]
        assert same(found, codes)
    nan = torch.isnan(dequantize(*quantize(holes, block(8, 8), recipe, "propagate"), block(8, 8)))
    assert torch.equal(nan, ~torch.isfinite(holes))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5), (0,), (2, 0), (3, 0, 2), (2, 3, 4, 5)])
def test_per_tensor_takes_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    codes, scale = quantize(x, PER_TENSOR)
    flat, flat_scale = quantize(x.flatten(), PER_TENSOR)
    assert codes.shape == x.shape
    assert same(codes.flatten(), flat)
    assert scale.shape == (1,)
    assert same(scale, flat_scale)
    assert same(dequantize(codes, scale, PER_TENSOR).flatten(), dequantize(flat, scale, PER_TENSOR))


def test_per_channel_is_one_block_per_row() -> None:
    x = random((9, 30), 3)
    codes, scales = quantize(x, PER_CHANNEL)
    expected, expected_scales = quantize(x, block(1, 30))
    assert same(codes, expected)
    assert same(scales, expected_scales)
    out = torch.empty(9, 0, dtype=torch.uint8), torch.full((9, 1), 7.0)
    assert quantize(x[:, :0], PER_CHANNEL, out=out)[1].tolist() == [[1.0]] * 9
    assert quantize(x[:0], PER_CHANNEL)[1].shape == (0, 1)


@pytest.mark.parametrize("groups", [block(48, 20), PER_CHANNEL, PER_TENSOR], ids=str)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_dequantised_is_one_product_rounded_once(groups: Groups, dtype: torch.dtype) -> None:
    x = random((100, 70), 8, spread=0.3)
    codes, scales = quantize(x, groups)
    height, width = groups.size((100, 70))
    spread = scales.view(groups.grid((100, 70)))
    spread = spread.repeat_interleave(height, 0)[:100].repeat_interleave(width, 1)[:, :70]
    product = codes.double() * spread.double()  # exact
    expected = product.float().to(dtype)
    found = dequantize(codes, scales, groups, dtype)
    assert found.dtype == dtype
    assert same(found, expected)
    out = torch.full((70, 100), 9.0, dtype=dtype).t()
    assert dequantize(codes, scales, groups, dtype, out) is out
    assert same(out, expected)
    assert same(dequantize(codes.t().contiguous().t(), scales, groups, dtype), expected)
    assert same(dequantize(codes.view(torch.uint8), scales, groups, dtype), expected)


def test_what_is_no_input_is_refused_with_its_value() -> None:
    with pytest.raises(TypeError, match="float64"):
        quantize(torch.zeros(2, 2, dtype=torch.float64), PER_TENSOR)
    with pytest.raises(ValueError, match="2 dimensions"):
        quantize(torch.zeros(2), PER_CHANNEL)
    with pytest.raises(ValueError, match="'ignore'"):
        quantize(torch.zeros(2), PER_TENSOR, IEEE, "ignore")  # type: ignore[arg-type]
    codes = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        dequantize(codes, torch.ones(2, 1), block(2, 2))
