"""The compiled C against the definition written another way, and how it is built and refused."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl import paths
from fp8ctl.kernels import compiled, native, reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block
from fp8ctl.kernels.recipes import IEEE, NON_FINITE, RECIPES, UE8M0, NonFinite, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOORED = [recipe.with_floor(0.0625) for recipe in RECIPES.values()]
BARE = [recipe.with_floor(0.0) for recipe in RECIPES.values()]
GROUPS = (
    block(1, 128),
    block(64, 64),
    block(5, 3),
    block(1, 1),
    block(7, 1),
    block(1 << 64, 2),
    PER_CHANNEL,
    PER_TENSOR,
)
_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / 2
_RAW = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

seeds = st.integers(0, 2**31)
sides = st.one_of(st.integers(0, 12), st.sampled_from([63, 64, 65, 127, 128, 129, 1023, 1025]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home whose cache has the library: it is compiled once for all tests."""
    if not compiled._compilers():
        pytest.skip("no C compiler")
    home = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8CTL_HOME", str(home))
        native._library.cache_clear()
        assert native.available(), native.why_not()
    return home


@pytest.fixture
def home(built: Path, isolated_home: Path) -> Path:
    """Return a home of this test's own, which has the library."""
    shutil.copytree(built / "cache", isolated_home / "cache")
    return isolated_home


def load() -> ctypes.CDLL | str:
    """Load the library as a new process does; return it, or why not."""
    return native._library.__wrapped__()


# ---- what is computed ----


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def from_bits(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    wide = torch.tensor(values, dtype=torch.int64)
    raw = wide.to(_RAW[dtype]) if dtype != torch.float32 else wide.to(torch.int32)
    return raw.view(dtype)


def nearest(y: torch.Tensor) -> torch.Tensor:
    """Return the codes of FP32 numbers: by their place among the middles of all values."""
    magnitude = y.double().abs().contiguous()
    below = torch.bucketize(magnitude, _MIDDLES)  # middles less than it
    up_to = torch.bucketize(magnitude, _MIDDLES, right=True)  # and those it equals
    code = torch.where(below % 2 == 0, below, up_to)  # between two codes: the even one
    return (code + 0x80 * torch.signbit(y)).to(torch.uint8)


def scale_and_factor(amax: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of one group, and what takes its place in x / scale or x * factor."""
    a = torch.maximum(amax, torch.tensor(recipe.floor))
    one, top = torch.tensor(1.0), torch.tensor(448.0)
    least = torch.tensor(2.0**-126)
    if float(a) == 0:
        return one, one
    if recipe.arithmetic == "power-of-two":
        ratio = Fraction(float(a)) / 448
        power = math.frexp(float(ratio))[1] - 2
        while Fraction(2) ** power < ratio:
            power += 1
        scale = torch.tensor(2.0 ** max(power, -126))
        return scale, scale
    if recipe.arithmetic == "inverse-scale":
        m = torch.minimum(top / a, one / least)
        return one / m, m
    scale = torch.maximum(a / top, least)
    return scale, scale if recipe.arithmetic == "divide" else one / scale


def expected(
    x: torch.Tensor, groups: Groups, recipe: Recipe, non_finite: NonFinite
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int] | None]:
    """Return codes, scales and first index as recipes.py defines them, a group at a time."""
    size, grid = groups.size((x.shape[0], x.shape[1])), groups.grid((x.shape[0], x.shape[1]))
    sign = torch.signbit(x)  # of 16 bits: torch may lose that of a NaN when it widens FP16
    wide = x.float()
    finite = torch.isfinite(wide)
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    scales = torch.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i * size[0], (i + 1) * size[0])
            columns = slice(j * size[1], (j + 1) * size[1])
            part = wide[rows, columns]
            held = part[finite[rows, columns]].abs()
            amax = held.max() if held.numel() else torch.tensor(0.0)
            scale, factor = scale_and_factor(amax, recipe)
            divides = recipe.arithmetic in ("divide", "power-of-two")
            y = part / factor if divides else part * factor
            codes[rows, columns] = nearest(y)
            scales[i, j] = scale
    codes[wide.isnan()] = 0
    if non_finite == "propagate":
        codes = torch.where(finite, codes, (0x7F + 0x80 * sign).to(torch.uint8))
    where = (~finite).nonzero()
    return codes, scales, (int(where[0, 0]), int(where[0, 1])) if len(where) else None


def run(
    x: torch.Tensor,
    groups: Groups,
    recipe: Recipe = IEEE,
    non_finite: NonFinite = "saturate",
    codes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int] | None]:
    """Quantise, into memory that is full of what must not stay."""
    if codes is None:
        codes = torch.full(x.shape, 0x55, dtype=torch.uint8)
    scales = torch.full(groups.grid((x.shape[0], x.shape[1])), math.nan)
    return codes, scales, native.quantize(x, groups, recipe, non_finite, codes, scales)


def check(
    x: torch.Tensor,
    groups: Groups,
    recipe: Recipe,
    non_finite: NonFinite,
    codes: torch.Tensor | None = None,
) -> None:
    want_codes, want_scales, want_first = expected(x, groups, recipe, non_finite)
    got_codes, got_scales, got_first = run(x, groups, recipe, non_finite, codes)
    said = f"{list(x.shape)} {x.stride()} {x.dtype} {groups} {recipe} {non_finite}"
    assert got_first == want_first, said
    if want_first is None or non_finite != "error":
        wrong = (got_codes != want_codes).nonzero().tolist()
        assert not wrong, f"{said}: codes {wrong[:5]}"
        assert torch.equal(bits(got_scales), bits(want_scales)), said


def numbers(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers of very different sizes, zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-20, 4, shape, generator=generator))
    x = torch.randn(shape, generator=generator) * spread
    x[torch.rand(shape, generator=generator) < 0.05] *= 2.0**-130
    x[torch.rand(shape, generator=generator) < 0.05] *= 0.0  # of both signs
    return x.to(dtype)


def sprinkled(x: torch.Tensor, seed: int, count: int = 3) -> torch.Tensor:
    """Return x with NaN and Inf of both signs at places anywhere."""
    generator = torch.Generator().manual_seed(seed)
    x = x.clone()
    specials = {
        torch.bfloat16: [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF],
        torch.float16: [0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFFFF],
        torch.float32: [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF],
    }[x.dtype]
    flat = x.view(_RAW[x.dtype]).view(-1)
    if flat.numel():
        at = torch.randint(flat.numel(), (count,), generator=generator)
        which = torch.randint(len(specials), (count,), generator=generator).tolist()
        flat[at] = from_bits([specials[i] for i in which], x.dtype).view(flat.dtype)
    return x


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.t().clone(memory_format=torch.contiguous_format).t()


def every_second(t: torch.Tensor) -> torch.Tensor:
    wide = torch.full((t.shape[0] * 2 + 1, t.shape[1] * 2 + 1), 9, dtype=torch.uint8).to(t.dtype)
    view = wide[1::2, 1::2]
    view.copy_(t)
    return view


def every_third_down(t: torch.Tensor) -> torch.Tensor:
    return every_second(t.t()).t()


LAYOUTS = (contiguous, transposed, every_second, every_third_down)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("recipe", [*RECIPES.values(), *FLOORED], ids=str)
def test_codes_scales_and_first_index_are_those_of_the_definition(
    recipe: Recipe, groups: Groups
) -> None:
    shapes = itertools.cycle([(9, 11), (65, 130), (1, 40), (33, 1), (128, 4), (3, 257)])
    layouts = itertools.cycle([(a, b) for a in LAYOUTS for b in LAYOUTS])
    for seed, (dtype, non_finite) in enumerate(itertools.product(DTYPES, NON_FINITE)):
        for _ in range(2):
            shape = next(shapes)
            if groups in (block(1, 1), block(5, 3), block(7, 1)):
                shape = min(shape[0], 12), min(shape[1], 20)
            x = numbers(shape, seed, dtype)
            if non_finite != "error" or seed % 2:
                x = sprinkled(x, seed)
            lay_x, lay_codes = next(layouts)
            codes = lay_codes(torch.full(shape, 0x55, dtype=torch.uint8))
            check(lay_x(x), groups, recipe, non_finite, codes)


@given(
    seeds,
    st.tuples(sides, sides),
    st.tuples(st.integers(1, 140), st.integers(1, 1100)),
    st.sampled_from(DTYPES),
    st.sampled_from([*RECIPES.values(), *BARE]),
    st.sampled_from(NON_FINITE),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.usefixtures("built")
def test_any_shape_block_and_strides(
    seed: int,
    shape: tuple[int, int],
    sides: tuple[int, int],
    dtype: torch.dtype,
    recipe: Recipe,
    non_finite: NonFinite,
    lay_x: Callable[[torch.Tensor], torch.Tensor],
    lay_codes: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    codes = lay_codes(torch.full(shape, 0x55, dtype=torch.uint8))
    x = numbers(shape, seed, dtype)
    if seed % 3 == 0:
        x = sprinkled(x, seed)
    # The definition goes group by group in Python: not thousands of them.
    groups = block(max(sides[0], shape[0] // 8), max(sides[1], shape[1] // 8))
    check(lay_x(x), groups, recipe, non_finite, codes)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lay", [contiguous, transposed])
@pytest.mark.parametrize("groups", [PER_TENSOR, PER_CHANNEL, block(100, 3000)], ids=str)
def test_the_largest_of_a_group_counts_wherever_it_is(
    groups: Groups,
    lay: Callable[[torch.Tensor], torch.Tensor],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed, (r, c) in enumerate([(0, 0), (3, 1023), (63, 1024), (64, 2047), (129, 2099)]):
        x = numbers((130, 2100), seed, DTYPES[seed % 3])
        x[r, c] = -3000.0
        x[(r + 65) % 130, (c + 1024) % 2100] = math.inf
        with torch_threads(threads, monkeypatch):
            check(lay(x), groups, IEEE, "propagate")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("recipe", BARE, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(dtype: torch.dtype, recipe: Recipe) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    # Rows of neighbours, each with its own scale; then columns of very different numbers.
    check(every.view(256, 256), PER_CHANNEL, recipe, "propagate")
    check(every.view(512, 128).t(), PER_CHANNEL, recipe, "saturate")
    check(every.view(512, 128), block(64, 128), recipe, "propagate")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("recipe", BARE, ids=str)
def test_fp32_values_from_the_smallest_to_the_largest(recipe: Recipe) -> None:
    generator = torch.Generator().manual_seed(5)
    # One exponent to a row: subnormal, below and above the smallest scale, up to the largest.
    mantissas = torch.randint(1 << 23, (255, 67), generator=generator, dtype=torch.int32)
    x = ((torch.arange(255, dtype=torch.int32)[:, None] << 23) | mantissas).view(torch.float32)
    check(x * torch.where(mantissas % 2 == 0, 1.0, -1.0), PER_CHANNEL, recipe, "error")
    check(x.t(), PER_CHANNEL, recipe, "error")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("recipe", BARE, ids=str)
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**119])
def test_midpoints_go_to_the_even_code_and_their_neighbours_do_not(
    scale: float, recipe: Recipe
) -> None:
    middle = _MIDDLES.float()
    around = [torch.nextafter(middle, middle * 0), middle, torch.nextafter(middle, middle * 2)]
    x = torch.cat([_VALUES.float(), *around])
    codes, scales, _ = run(torch.cat([x, -x])[None] * scale, PER_TENSOR, recipe)
    assert float(scales) == scale
    down, up = list(range(126)), list(range(1, 127))
    want = [*range(127), *down, *(code + code % 2 for code in down), *up]
    assert codes[0].tolist() == want + [code | 0x80 for code in want]


@pytest.mark.usefixtures("built")
@given(seeds)
@settings(max_examples=20, deadline=None)
def test_the_scale_of_ue8m0_is_the_least_power_of_two_that_holds_the_group(seed: int) -> None:
    amax = numbers((40, 1), seed, torch.float32).abs()
    _, scales, _ = run(amax, PER_CHANNEL, UE8M0)
    for a, scale in zip(amax[:, 0].tolist(), scales[:, 0].tolist(), strict=True):
        assert math.frexp(scale)[0] == 0.5
        if a == 0:
            assert scale == 1
        else:
            assert Fraction(a) <= 448 * Fraction(scale)
            assert scale == 2.0**-126 or Fraction(a) > 448 * Fraction(scale) / 2


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1)])
@pytest.mark.parametrize("groups", [block(3, 3), PER_CHANNEL, PER_TENSOR], ids=str)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
def test_nothing_and_zero_have_the_scale_of_the_floor(
    shape: tuple[int, int], groups: Groups, recipe: Recipe
) -> None:
    codes, scales, first = run(torch.full(shape, -0.0), groups, recipe, "error")
    want = scale_and_factor(torch.tensor(0.0), recipe)[0]
    assert first is None
    assert codes.tolist() == torch.full(shape, 0x80, dtype=torch.uint8).tolist()
    assert tuple(scales.shape) == groups.grid(shape)
    assert all(scale == float(want) for scale in scales.flatten().tolist())


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "groups", [block(128, 128), block(2, 600), PER_CHANNEL, PER_TENSOR], ids=str
)
def test_the_first_of_many_that_are_not_finite_is_found_under_every_policy(
    groups: Groups,
    threads: int,
    lay: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(threads)
    with torch_threads(threads, monkeypatch):
        for dtype in DTYPES:
            x = torch.ones((300, 700), dtype=dtype)
            at = sorted((torch.randint(x.numel() // 2, (5,), generator=generator) + 9).tolist())
            # The first in row-major order is the last in memory's, where it lies by columns.
            at += [700 * (at[0] // 700 + 1), 700 * 299]
            for place in at:
                x[place // 700, place % 700] = math.nan if place % 2 else -math.inf
            for policy in NON_FINITE:
                first = run(lay(x), groups, IEEE, policy)[2]
                assert first == divmod(at[0], 700)


@contextlib.contextmanager
def torch_threads(count: int, monkeypatch: pytest.MonkeyPatch, grain: int = 1) -> Iterator[None]:
    """Have torch use this many threads, and the library share out whatever there is."""
    before = torch.get_num_threads()
    monkeypatch.setattr(native, "_GRAIN", grain)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("count", [2, 5])
def test_threads_change_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (shape, groups, lay, non_finite)
        for shape in ((1, 1), (3, 1000), (1000, 3), (257, 300), (1, 5000), (5000, 1))
        for groups in (block(128, 128), block(1, 128), block(200, 170), PER_CHANNEL, PER_TENSOR)
        for lay in (contiguous, transposed)
        for non_finite in NON_FINITE
    ]
    for seed, (shape, groups, lay, non_finite) in enumerate(cases):
        x = numbers(shape, seed, DTYPES[seed % 3])
        x = lay(sprinkled(x, seed) if non_finite != "error" else x)
        alone = run(x, groups, UE8M0, non_finite)
        out = torch.empty(shape)
        native.dequantize(alone[0], alone[1], groups, out)
        with torch_threads(count, monkeypatch):
            together = run(x, groups, UE8M0, non_finite)
            again = torch.empty(shape)
            native.dequantize(alone[0], alone[1], groups, again)
        assert torch.equal(alone[0], together[0])
        assert torch.equal(bits(alone[1]), bits(together[1]))
        assert alone[2] == together[2]
        assert torch.equal(bits(out), bits(again))


@pytest.mark.usefixtures("built")
def test_work_is_done_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    x = numbers((300, 300), 1, torch.float32)
    with torch_threads(4, monkeypatch):
        monkeypatch.setattr("threading.Thread.start", refuse)
        check(x, block(64, 64), IEEE, "error")


def test_a_thread_without_memory_is_an_error() -> None:
    with pytest.raises(MemoryError):
        native._share(2, lambda *_: 1, [(), (), ()])


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Flush subnormals in this thread, and see that they still are at the end."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        yield
        tiny = from_bits([1 << 20], torch.float32)
        assert not float(tiny * 1.0), "the caller's own setting is gone"
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("recipe", BARE, ids=str)
def test_subnormals_stay_where_the_caller_has_them_flushed(
    recipe: Recipe, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(1 << 23, (64, 64), generator=generator, dtype=torch.int32)
    x = raw.view(torch.float32)
    assert int(raw.max()) < 1 << 23  # all are subnormal
    for groups in (block(16, 16), PER_TENSOR):
        want_codes, want_scales, _ = expected(x, groups, recipe, "error")
        assert len(set(want_codes.flatten().tolist())) > 20
        back = want_codes.view(torch.float8_e4m3fn).float() * 2.0**-140
        scales = torch.full(groups.grid((64, 64)), 2.0**-140)
        out = torch.empty(64, 64)
        with torch_threads(threads, monkeypatch), flushed():
            codes, got, _ = run(x, groups, recipe, "error")
            native.dequantize(want_codes, scales, groups, out)
        assert torch.equal(codes, want_codes)
        assert torch.equal(bits(got), bits(want_scales))
        assert torch.equal(bits(out), bits(back))


@pytest.mark.usefixtures("built")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the mode is x86's")
def test_numbers_are_rounded_to_nearest_where_the_caller_rounds_up() -> None:
    libm = ctypes.CDLL("libm.so.6")
    upward = 0x800
    x = numbers((64, 64), 3, torch.float32)
    want = run(x, block(8, 8))
    codes, scales = torch.empty_like(want[0]), torch.empty_like(want[1])
    libm.fesetround(upward)
    try:
        native.quantize(x, block(8, 8), IEEE, "error", codes, scales)
        still = libm.fegetround()
    finally:
        libm.fesetround(0)
    assert still == upward
    assert torch.equal(codes, want[0])
    assert torch.equal(bits(scales), bits(want[1]))


@pytest.mark.usefixtures("built")
def test_only_the_outputs_are_written() -> None:
    x = numbers((130, 70), 2, torch.bfloat16)
    bucket = torch.full((130 * 70 * 3,), 0xA5, dtype=torch.uint8)
    slots = torch.full((3, 7, 11), 7.0)
    for flip in (False, True):
        codes = bucket.as_strided((130, 70), (90, 1), 70)
        codes, view = (codes.t(), x.t()) if flip else (codes, x)
        scales = slots[1, 2:, 3:].as_strided(
            block(64, 64).grid((codes.shape[0], codes.shape[1])), (11, 2)
        )
        before = bucket.clone(), slots.clone()
        native.quantize(view, block(64, 64), IEEE, "error", codes, scales)
        want = expected(view, block(64, 64), IEEE, "error")
        assert torch.equal(codes, want[0])
        assert torch.equal(scales, want[1])
        codes.fill_(0xA5)
        scales.fill_(7.0)
        assert torch.equal(bucket, before[0])
        assert torch.equal(slots, before[1])


@pytest.mark.usefixtures("built")
def test_elements_at_odd_addresses_and_one_element_many_times() -> None:
    x = numbers((20, 30), 4, torch.float32)
    for dtype in DTYPES:
        memory = bytearray(1) + bytearray(bits(x.to(dtype)).numpy().tobytes())
        odd = torch.frombuffer(memory, dtype=dtype, offset=1).view(20, 30)
        assert odd.data_ptr() % 2
        check(odd, block(3, 7), IEEE, "error")
        check(odd.t(), block(3, 7), IEEE, "error")
    for view in (x[:1].expand(40, 30), x[:, :1].expand(20, 50), x[:1, :1].expand(5, 6)):
        check(view, block(3, 7), IEEE, "error")


@pytest.mark.usefixtures("built")
def test_a_sign_that_torch_has_not_put_on_yet_counts() -> None:
    z = torch.complex(torch.ones(4, 6), numbers((4, 6), 1, torch.float32)).conj()
    assert z.imag.is_neg()
    check(z.imag, block(2, 2), IEEE, "error")
    codes, scales, _ = run(z.imag, block(2, 2))
    negative = torch.complex(scales, scales).conj().imag
    out = torch.empty(4, 6)
    native.dequantize(codes, negative, block(2, 2), out)
    assert torch.equal(out, -restored(codes, scales, block(2, 2), torch.float32))
    with pytest.raises(ValueError, match="negation"):
        native.dequantize(codes, scales, block(2, 2), z.imag)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("groups", [*GROUPS, block(128, 128)], ids=str)
@pytest.mark.parametrize("non_finite", NON_FINITE)
def test_the_reference_has_the_same_bits(groups: Groups, non_finite: NonFinite) -> None:
    for seed, (recipe, dtype) in enumerate(itertools.product(RECIPES.values(), DTYPES)):
        x = numbers((67, 131), seed, dtype)
        if non_finite != "error":
            x = sprinkled(x, seed)
        codes, scales, _ = run(x, groups, recipe, non_finite)
        want_codes, want_scales = reference.quantize(x, groups, recipe, non_finite)
        assert torch.equal(codes, want_codes.view(torch.uint8))
        assert torch.equal(bits(scales).flatten(), bits(want_scales).flatten())


# ---- and back ----


def restored(
    codes: torch.Tensor, scales: torch.Tensor, groups: Groups, dtype: torch.dtype
) -> torch.Tensor:
    size = groups.size((codes.shape[0], codes.shape[1]))
    rows = torch.tensor([i // size[0] for i in range(codes.shape[0])], dtype=torch.int64)
    columns = torch.tensor([j // size[1] for j in range(codes.shape[1])], dtype=torch.int64)
    each = scales[rows][:, columns]
    return (codes.view(torch.float8_e4m3fn).float() * each).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors are the same to the bit, but for which NaN a NaN is."""
    nan = torch.isnan(a)
    return torch.equal(nan, torch.isnan(b)) and torch.equal(bits(a)[~nan], bits(b)[~nan])


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_times_scales_of_every_size(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(400, 256)
    generator = torch.Generator().manual_seed(7)
    scales = torch.exp2(torch.linspace(-150, 127, 400))
    scales = (scales * (1 + torch.rand(400, generator=generator)))[:, None]
    scales[:6, 0] = torch.tensor([0.0, -1.0, math.inf, math.nan, 2.0**-149, 2.0**-24])
    out = torch.empty(400, 256, dtype=dtype)
    native.dequantize(codes, scales, PER_CHANNEL, out)
    want = restored(codes, scales, PER_CHANNEL, dtype)
    assert same(out, want)
    # Of each dtype: numbers, its subnormals, what is too large for it, and NaN.
    finite = out[torch.isfinite(out)].float().abs()
    assert ((finite > 0) & (finite < torch.finfo(dtype).smallest_normal)).any()
    assert out.isinf().any()
    assert out.isnan().any()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_numbers_are_rounded_once_and_ties_to_even(dtype: torch.dtype) -> None:
    # 1.0 times any FP32 number: conversion alone, around all middles and limits of the dtype.
    scales = numbers((2000, 1), 3, torch.float32)
    fine = torch.finfo(dtype)
    edges = [fine.max, fine.smallest_normal, fine.smallest_normal * fine.eps, 1.0, 3.0]
    near = torch.tensor(edges).float()[:, None] * (1 + torch.arange(-64, 65) * 2.0**-13)
    halves = near.to(dtype).float() * (1 + fine.eps / 2)
    scales = torch.cat([scales, near.reshape(-1, 1), halves.reshape(-1, 1)])
    codes = torch.tensor([[0x38, 0xB8, 0x39]], dtype=torch.uint8).expand(len(scales), 3)
    out = torch.empty(codes.shape, dtype=dtype)
    native.dequantize(codes, scales, PER_CHANNEL, out)
    assert same(out, restored(codes, scales, PER_CHANNEL, dtype))


@pytest.mark.usefixtures("built")
@given(
    seeds,
    st.tuples(sides, sides),
    st.sampled_from(DTYPES),
    st.sampled_from([*GROUPS, block(128, 128)]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
)
@settings(max_examples=60, deadline=None)
def test_dequantise_any_shape_and_strides(
    seed: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    groups: Groups,
    lay_codes: Callable[[torch.Tensor], torch.Tensor],
    lay_out: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    grid = groups.grid(shape)
    scales = torch.rand(grid[::-1], generator=generator).t()
    out = lay_out(torch.full(shape, 5.0, dtype=dtype))
    native.dequantize(lay_codes(codes).view(torch.float8_e4m3fn), scales, groups, out)
    assert same(out, restored(codes, scales, groups, dtype))


# ---- how it is built, and when it is not used ----


def test_the_library_is_found_again(home: Path) -> None:
    [library] = (home / "cache" / "native").iterdir()
    before = library.stat()
    assert isinstance(load(), ctypes.CDLL)
    assert [p.name for p in (home / "cache" / "native").iterdir()] == [library.name]
    assert library.stat().st_mtime_ns == before.st_mtime_ns
    assert stat.S_IMODE((home / "cache" / "native").stat().st_mode) == 0o700


def test_it_can_be_turned_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8CTL_NATIVE", "0")
    assert load() == "FP8CTL_NATIVE=0 is set"
    monkeypatch.setenv("FP8CTL_NATIVE", "1")
    assert isinstance(load(), ctypes.CDLL)


def test_what_is_not_available_says_so_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: "there is none")
    assert not native.available()
    assert native.why_not() == "there is none"
    x = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="there is none"):
        run(x, PER_TENSOR)
    with pytest.raises(RuntimeError, match="there is none"):
        native.dequantize(x.to(torch.uint8), x[:1, :1], PER_TENSOR, x)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C compiler" in str(load())


@pytest.mark.parametrize(
    ("cc", "said"),
    [
        ("/nowhere/cc", "no C compiler"),
        ("false", "exit status 1"),
        ("'unfinished", "quotation"),
        ("sh -c 'echo it is broken >&2; exit 3'", "it is broken"),
    ],
)
def test_a_compiler_that_does_not_work(
    cc: str, said: str, monkeypatch: pytest.MonkeyPatch, isolated_home: Path
) -> None:
    monkeypatch.setenv("CC", cc)
    assert said in str(load())
    assert not list((isolated_home / "cache").glob("native/*")), "something is left behind"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_SECONDS", 0.3)
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", "exec sleep 20")))
    started = time.monotonic()
    assert "timed out" in str(load())
    assert time.monotonic() - started < 10


def test_a_compiler_that_knows_no_options_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    [real, *_] = compiled._compilers()
    refuse = 'for a; do case "$a" in -m*) echo "what is $a?" >&2; exit 1;; esac; done'
    wrapper = script(tmp_path / "cc", f'{refuse}\nexec {real[0]} "$@"')
    monkeypatch.setenv("CC", str(wrapper))
    library = load()
    assert isinstance(library, ctypes.CDLL), library
    monkeypatch.setattr(native, "_library", lambda: library)
    for dtype in DTYPES:
        for recipe in RECIPES.values():
            check(sprinkled(numbers((65, 131), 1, dtype), 1), block(64, 64), recipe, "propagate")


def test_a_folder_that_cannot_be_written(isolated_home: Path) -> None:
    (isolated_home / "cache").write_text("a file stands where the folder should")
    assert str(isolated_home / "cache") in str(load())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(home: Path) -> None:
    folder = home / "cache" / "native"
    for library in folder.iterdir():
        library.unlink()
    folder.chmod(0o500)
    try:
        assert "Permission denied" in str(load())
    finally:
        folder.chmod(0o700)


def test_a_folder_of_somebody_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = home.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert f"belongs to user {owner}, not to {owner + 1}" in str(load())


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_folder_that_others_can_write(home: Path, mode: int) -> None:
    folder = home / "cache" / "native"
    folder.chmod(mode)
    assert "written by others" in str(load())
    folder.chmod(0o700)
    assert isinstance(load(), ctypes.CDLL)


def test_a_folder_that_is_a_link(home: Path) -> None:
    folder = home / "cache" / "native"
    folder.rename(home / "elsewhere")
    folder.symlink_to(home / "elsewhere")
    assert "is no folder" in str(load())


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "writable by others"])
def test_a_damaged_library_is_made_again_or_refused(
    damage: str, home: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, pristine = only_library(home), only_library(built)
    good = library.read_bytes()
    middle = len(good) // 2
    library.write_bytes(
        {
            "cut": good[:middle],
            "changed": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "empty": b"",
            "writable by others": good,
        }[damage]
    )
    if damage == "writable by others":
        library.chmod(0o722)
    made: list[Path] = []

    def compile_again(*given: Any) -> None:
        path = given[3]
        made.append(path)
        path.unlink()
        shutil.copy(pristine, path)

    def cannot(*_: object) -> None:
        raise RuntimeError("no compiler today")

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_compile", cannot)
        assert "no compiler today" in str(load())
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_compile", compile_again)
        assert isinstance(load(), ctypes.CDLL)
        assert isinstance(load(), ctypes.CDLL)
    assert made == [library]


def only_library(home: Path) -> Path:
    [library] = (home / "cache" / "native").iterdir()
    return library


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("a / 448.0f", "a * (1.0f / 448.0f)"),
        ("1.0f / m;", "a / 448.0f;"),
        ("0x1FFFFF", "0x3FFFFF"),
        ("(20u << 23) + 56", "(20u << 23) + 57"),
        ("job->arithmetic == DIVIDE ? s : 1.0f / s", "s"),
        ("raw == infinity ? sign | 0x7E : 0", "sign | 0x7E"),
        ("sign | 0x7F", "0x7F"),
        ("s > FLT_MIN ? s : FLT_MIN", "s"),
        ("*first = least(", "(void)least("),
        ("subnormal & 113u << 23", "subnormal & 112u << 23"),
    ],
)
def test_a_library_that_computes_something_else_is_not_used(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    source = native._SOURCE.read_text()
    assert right in source
    changed = tmp_path / "native.c"
    changed.write_text(source.replace(right, wrong))
    monkeypatch.setattr(native, "_SOURCE", changed)
    monkeypatch.setattr(native, "_FLAGS", ("-O0",))
    monkeypatch.setattr(native, "_TUNING", ((),))
    assert "the compiled library" in str(load())


def test_options_that_break_the_arithmetic_are_refused(
    monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    monkeypatch.setattr(native, "_FLAGS", ("-O3", "-ffast-math"))
    assert "IEEE 754" in str(load())


def test_each_machine_and_compiler_has_a_library_of_its_own(
    monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    command = compiled._compilers()[0]
    source = native._SOURCE.read_bytes()

    def key(
        source: bytes = source,
        command: list[str] = command,
        options: tuple[str, ...] = ("-O2",),
    ) -> str:
        return compiled._key(source, command, [options], time.monotonic() + 60)

    first = key()
    assert key() == first
    others = {first, key(source + b"\n"), key(command=[*command, "-g"]), key(options=())}
    for name, value in (
        ("_cpu", lambda: ["flags : sse"]),
        ("_run", lambda *_: b"cc 99"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, name, value)
            others.add(key())
    assert len(others) == 6


_FIRST_USE = """
import sys
from fp8ctl.kernels import native
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
print(native.available(), native.why_not())
"""


def test_two_processes_at_first_use(isolated_home: Path, built: Path) -> None:
    argv = [sys.executable, "-c", _FIRST_USE]
    pipe = subprocess.PIPE
    two = [subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) for _ in range(2)]
    try:
        for process in two:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in two:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120)[0] for process in two]
    finally:
        for process in two:
            process.kill()
            process.wait()
    assert answers == ["True \n", "True \n"]
    assert len(list((isolated_home / "cache" / "native").iterdir())) == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"FP8CTL_HOME": "/some/where"},
        {"FP8CTL_HOME": "~/here"},
        {"FP8CTL_HOME": "relative"},
        {"XDG_CACHE_HOME": "/caches"},
        {"XDG_CACHE_HOME": "relative"},
        {"FP8CTL_HOME": "", "XDG_CACHE_HOME": ""},
        {"FP8CTL_HOME": "/a", "XDG_CACHE_HOME": "/b"},
        {},
    ],
)
def test_the_folder_is_in_fp8ctls_cache(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FP8CTL_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compiled._cache_dir() == paths.cache_dir()


def test_no_home_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FP8CTL_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert "home directory" in str(load())
