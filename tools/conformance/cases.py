"""What is asked of every implementation: an input, and the word that its outcome comes to.

Every word is computed from codes and scales, none is known beforehand. Inputs come of random
whole numbers, so that they are the same on every machine.
Standard library and torch only: this runs in other packages' interpreters too.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Sides = tuple[int, int]

FP8_MAX = 448.0
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SPOT = (0, 3)  # where one element is other than the rest: in the first group of every kind
FLOAT32_MAX = torch.finfo(FP32).max


@dataclass(frozen=True)
class Adapter:
    """One implementation behind one signature.

    Attributes:
        name: of the row.
        source: the distribution that it comes from.
        call: what is called, for the page.
        sides: rows and columns that share a scale, 0 for all of them.
        run: returns codes as a float8 tensor and the scales that dequantise, or raises.
        variant: one of several ways to call it that share a row where they do the same.
    """

    name: str
    source: str
    call: str
    sides: Sides
    run: Run
    variant: str = ""

    @property
    def groups(self) -> str:
        """Say what shares a scale, in a word."""
        rows, columns = self.sides
        if columns:
            return f"{rows}x{columns}"
        return "row" if rows else "tensor"


@dataclass(frozen=True)
class Outcome:
    """What an implementation returned, and what it is worth.

    Attributes:
        codes, scales: as returned.
        grid: the scales in FP64, one per group, in rows and columns of groups.
        values: codes times scales in FP64, exact.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    grid: torch.Tensor
    values: torch.Tensor


class Word(Exception):  # noqa: N818 - an answer, not an error
    """The outcome is none that could be judged further; the message is the cell."""


class NotQuantisedError(Exception):
    """An adapter's way to say that the implementation gave the tensor back as it was."""


@dataclass(frozen=True)
class Case:
    """One column.

    Attributes:
        key: for the program.
        title: for the page.
        judge: adapter to word.
    """

    key: str
    title: str
    judge: Callable[[Adapter], str]


def cell(case: Case, adapter: Adapter) -> str:
    """Run one case on one implementation and return its word."""
    try:
        return case.judge(adapter)
    except Word as word:
        return str(word)


def attempt(adapter: Adapter, x: torch.Tensor, spot: tuple[int, int] | None = None) -> Outcome:
    """Quantise a copy of `x` that has its strides.

    Args:
        spot: the element that may be refused; whether an error names it is part of the word.

    Raises:
        Word: it raised, or returned what cannot be read as codes and scales.
    """
    try:
        codes, scales = adapter.run(like(x))
    except NotQuantisedError:
        raise Word("not quantised") from None
    except Exception as e:  # whatever it raises is the fact
        where = "" if spot is None or str(list(spot)) not in str(e) else f" at {list(spot)}"
        raise Word(f"raises {type(e).__name__}{where}") from e
    if codes.dtype != torch.float8_e4m3fn:
        raise Word(f"codes are {short(codes.dtype)}")
    if codes.shape != x.shape:
        raise Word(f"codes {list(codes.shape)} for {list(x.shape)}")
    n, k = x.shape
    rows, columns = adapter.sides[0] or max(1, n), adapter.sides[1] or max(1, k)
    shape = -(-n // rows) if adapter.sides[0] else 1, -(-k // columns) if adapter.sides[1] else 1
    if scales.numel() != shape[0] * shape[1]:
        raise Word(f"scales {list(scales.shape)} for {list(shape)} groups")
    grid = scales.detach().float().double().reshape(shape)
    spread = grid.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    return Outcome(codes.detach(), scales.detach(), grid, codes.detach().double() * spread)


def like(x: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides, so that no run can spoil the next."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return copy.copy_(x)


def first_group(adapter: Adapter, x: torch.Tensor) -> tuple[slice, slice]:
    rows, columns = adapter.sides
    return slice(0, rows or x.shape[0]), slice(0, columns or x.shape[1])


# --- inputs ---------------------------------------------------------------------------------------


@functools.cache
def _integers() -> torch.Tensor:
    """Return 2^20 random whole numbers from 1 to 2^31 - 1, the same on every machine."""
    generator = torch.Generator().manual_seed(20250)
    return torch.randint(1, 2**31, (1 << 20,), generator=generator)


@functools.cache
def _gaussian() -> torch.Tensor:
    """Return 2^20 numbers of N(0, 1) in FP64."""
    # A last bit of erfinv that differs between machines is gone after one rounding.
    return torch.erfinv(_integers().double() / 2.0**30 - 1.0) * math.sqrt(2.0)


def normal(n: int, k: int, deviation: float = 0.02, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Return a matrix of N(0, deviation)."""
    return (_gaussian()[: n * k].reshape(n, k) * deviation).to(FP32).to(dtype)


def with_amax(amax: float, dtype: torch.dtype) -> torch.Tensor:
    """Return 256x256 random numbers; the largest, in the first group of every kind, is `amax`."""
    base = _gaussian()[: 256 * 256].reshape(256, 256)
    x = (base / base.abs().max() * amax).to(dtype)
    x[0, 0], x[0, 1] = amax, -amax
    return x


def integers(limit: int, unit: float, dtype: torch.dtype) -> torch.Tensor:
    """Return 256x256 whole multiples of a unit, from -limit to limit."""
    x = (_integers()[: 256 * 256] % (2 * limit + 1) - limit).reshape(256, 256).double()
    x[0, 0] = limit
    return (x * unit).to(dtype)


# --- words ----------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write a number: powers of two that are not short as such, the rest in two digits."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    mantissa, exponent = math.frexp(abs(value))
    if mantissa == 0.5 and not -4 <= exponent - 1 <= 9:
        return f"{'-' if value < 0 else ''}2^{exponent - 1}"
    return f"{value:.3g}" if mantissa == 0.5 else f"{value:.2g}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accuracy(outcome: Outcome, x: torch.Tensor) -> str:
    """Say how what comes back compares with what went in."""
    wanted, got = x.double(), outcome.values
    if got.isnan().all():
        return "comes back NaN"
    if got.isnan().any():
        return "partly NaN"
    if not got.any():
        return "comes back 0"
    error = 100 * float(((got - wanted).square().sum() / wanted.square().sum()).sqrt())
    return f"error {error:.1f} %" if error < 9.95 else f"error {error:.0f} %"


def scale_and_accuracy(adapter: Adapter, x: torch.Tensor) -> str:
    outcome = attempt(adapter, x)
    return f"scale {number(float(outcome.grid[0, 0]))}, {accuracy(outcome, x)}"


# --- zeros, NaN, infinity -------------------------------------------------------------------------


def zeros(adapter: Adapter) -> str:
    x = normal(256, 256)
    group = first_group(adapter, x)
    x[group] = 0.0
    outcome = attempt(adapter, x)
    codes = outcome.codes[group].float()
    if codes.isnan().all():
        seen = "NaN"
    elif not codes.any():
        seen = "0"
    else:
        seen = "not 0"
    return f"scale {number(float(outcome.grid[0, 0]))}, codes {seen}"


def _non_finite(adapter: Adapter, value: float) -> str:
    """Compare with the same input where the element is 0: what else is touched?"""
    x = normal(256, 256)
    x[SPOT] = 0.0
    base = attempt(adapter, x)
    x[SPOT] = value
    outcome = attempt(adapter, x, SPOT)
    group = first_group(adapter, x)
    inside = torch.zeros(x.shape, dtype=torch.bool)
    inside[group] = True
    outside = ~inside
    inside[SPOT] = False

    words = [f"{number(value)} -> {_place(outcome)}"]
    scale = float(outcome.grid[0, 0])
    if scale != float(base.grid[0, 0]):
        words.append(f"scale {number(scale)}")
    rest, before = outcome.values[inside], base.values[inside]
    if torch.equal(rest, before):
        words.append("rest kept")
    elif rest.isnan().all():
        words.append("rest NaN")
    elif not rest.any():
        words.append("rest 0")
    else:
        words.append("rest changed")
    if not torch.equal(outcome.values[outside], base.values[outside]):
        words.append("other groups changed")
    return ", ".join(words)


def _place(outcome: Outcome) -> str:
    value, most = float(outcome.values[SPOT]), FP8_MAX * float(outcome.grid[0, 0])
    return {most: "448 s", -most: "-448 s"}.get(value, number(value))


def nan(adapter: Adapter) -> str:
    return _non_finite(adapter, math.nan)


def infinity(adapter: Adapter) -> str:
    return _non_finite(adapter, math.inf)


# --- small and large numbers ----------------------------------------------------------------------


def subnormal_bf16(adapter: Adapter) -> str:
    return scale_and_accuracy(adapter, integers(127, 2.0**-133, BF16))


def subnormal_fp32(adapter: Adapter) -> str:
    return scale_and_accuracy(adapter, integers(2**19, 2.0**-149, FP32))


def tiny(adapter: Adapter) -> str:
    return scale_and_accuracy(adapter, with_amax(1e-12, BF16))


def tinier(adapter: Adapter) -> str:
    return scale_and_accuracy(adapter, with_amax(1e-30, BF16))


def largest(adapter: Adapter) -> str:
    x = with_amax(FLOAT32_MAX, FP32)
    outcome = attempt(adapter, x)
    word = f"scale {number(float(outcome.grid[0, 0]))}, {accuracy(outcome, x)}"
    back = outcome.codes.float() * outcome.grid.float()[0, 0]
    return f"{word}, Inf in FP32" if back[first_group(adapter, x)].isinf().any() else word


# --- shapes and layout ----------------------------------------------------------------------------


def ragged(adapter: Adapter) -> str:
    """130x200, its last element far above the rest; against zeros behind it by hand."""
    x = normal(130, 200)
    x[-1, -1] = 1.0
    outcome = attempt(adapter, x)
    padded = torch.zeros((256, 256), dtype=x.dtype)
    padded[:130, :200] = x
    wanted = attempt(adapter, padded).values[:130, :200]
    same = "as" if torch.equal(outcome.values, wanted) else "not as"
    return f"scales {list(outcome.scales.shape)}, {same} with zeros behind"


def transposed(adapter: Adapter) -> str:
    x = normal(384, 256).t()
    outcome = attempt(adapter, x)
    other = attempt(adapter, x.contiguous())
    same = _same_bits(outcome.codes, other.codes) and torch.equal(outcome.grid, other.grid)
    layout = "contiguous" if outcome.codes.is_contiguous() else "not contiguous"
    return f"{'same' if same else 'other'} bits, codes {layout}"


def small(adapter: Adapter) -> str:
    rows, columns = adapter.sides
    if not columns:
        return "no such path"
    shape = rows // 2 if rows > 1 else 64, columns * 3 // 4
    x = normal(*shape)
    outcome = attempt(adapter, x)
    return f"{shape[0]}x{shape[1]}: scales {list(outcome.scales.shape)}, {accuracy(outcome, x)}"


def empty(adapter: Adapter) -> str:
    outcome = attempt(adapter, normal(0, 256))
    return f"codes {list(outcome.codes.shape)}, scales {list(outcome.scales.shape)}"


def stored(adapter: Adapter) -> str:
    outcome = attempt(adapter, normal(256, 384))
    return f"{short(outcome.scales.dtype)} {list(outcome.scales.shape)}"


def dtypes(adapter: Adapter) -> str:
    taken = []
    for name, dtype in (("BF16", BF16), ("FP16", FP16), ("FP32", FP32)):
        try:
            attempt(adapter, normal(256, 256, dtype=dtype))
        except Word:
            continue
        taken.append(name)
    return ", ".join(taken) or "none"


def unchanged(adapter: Adapter) -> str:
    x = normal(256, 256)
    before = x.clone()
    try:
        adapter.run(x)
    except Exception as e:
        raise Word(f"raises {type(e).__name__}") from e
    return "kept" if _same_bits(x, before) else "changed"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    a, b = (t.contiguous().view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


# --- arithmetic -----------------------------------------------------------------------------------


def exact(x: torch.Tensor, sides: Sides, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes by one FP32 division, and amax / 448 of each group in FP32.

    With `power_of_two` the scales are 2^ceil(log2(amax / 448)), found without a logarithm.
    """
    n, k = x.shape
    rows, columns = sides[0] or n, sides[1] or k
    tiles = x.float().reshape(n // rows, rows, k // columns, columns)
    amax = tiles.abs().amax(dim=(1, 3))
    scale = amax / torch.full_like(amax, FP8_MAX)
    if power_of_two:
        mantissa, exponent = torch.frexp(amax.double() / FP8_MAX)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int()).float()
    quotient = tiles / scale[:, None, :, None]
    codes = quotient.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).reshape(n, k)
    return codes, scale


def _powers_of_two(scales: torch.Tensor) -> bool:
    return bool((torch.frexp(scales)[0] == 0.5).all())


@functools.lru_cache(maxsize=1)
def sample(adapter: Adapter) -> tuple[Outcome, torch.Tensor, torch.Tensor]:
    """Return what becomes of 1024x1024 random numbers, and exact codes and scales of them.

    One scale would say little: per-tensor, they are 64 tensors, the blocks of the others.
    """
    x = normal(1024, 1024)
    if any(adapter.sides):
        outcome = attempt(adapter, x)
        return outcome, *exact(x, adapter.sides, _powers_of_two(outcome.grid))
    blocks = x.reshape(8, 128, 8, 128).transpose(1, 2).reshape(64, 128, 128)
    every = [attempt(adapter, block) for block in blocks]
    codes = torch.cat([one.codes.contiguous().view(torch.uint8) for one in every])
    grid = torch.cat([one.grid for one in every])
    values = torch.cat([one.values for one in every])
    outcome = Outcome(codes.view(torch.float8_e4m3fn), grid.float(), grid, values)
    return outcome, *exact(blocks.reshape(-1, 128), (128, 0), _powers_of_two(grid))


def arithmetic_codes(adapter: Adapter) -> str:
    outcome, codes, _ = sample(adapter)
    differ = outcome.codes.contiguous().view(torch.uint8) != codes.view(torch.uint8)
    share = 100 * float(differ.double().mean())
    return f"{share:.2g} % differ" if share else "none differ"


def arithmetic_scales(adapter: Adapter) -> str:
    outcome, _, wanted = sample(adapter)
    got = outcome.grid.float()
    apart = (got.view(torch.int32).long() - wanted.view(torch.int32).long()).abs()
    count, most = int((apart > 0).sum()), int(apart.max())
    if not count:
        return "none differ"
    share = 100 * float((got.double() / wanted.double() - 1).abs().max())
    size = f"{most} ulp" if most <= 8 else f"{share:.2g} %"
    return f"{count} of {apart.numel()} differ, at most {size}"


def fingerprint(adapter: Adapter) -> str:
    """Return a digest of the codes and scales of the sample; two that agree have the same bits."""
    outcome, _, _ = sample(adapter)
    digest = hashlib.sha256(outcome.codes.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(outcome.grid.float().numpy().tobytes())
    return digest.hexdigest()


def equal(adapter: Adapter) -> str:
    x = torch.full((256, 256), 0.1, dtype=BF16)
    outcome = attempt(adapter, x)
    codes = sorted({f"{code:g}" for code in outcome.codes.float().flatten().tolist()})
    off = float((outcome.values / x.double() - 1).abs().max())
    return f"codes {', '.join(codes)}, {f'off by {off:.1g}' if off else 'exact'}"


def edge(adapter: Adapter) -> str:
    x = torch.zeros((256, 256), dtype=FP32)
    x[first_group(adapter, x)][0, 0] = FP8_MAX * 2.0**-14 * (1 + 2.0**-23)
    outcome = attempt(adapter, x)
    scale = outcome.grid[0, 0]
    return f"scale {number(float(scale))}" if _powers_of_two(scale) else "no power of two"


# --- all of them ----------------------------------------------------------------------------------

TABLES: dict[str, tuple[Case, ...]] = {
    "Zeros, NaN and infinity": (
        Case("zeros", "Group of zeros", zeros),
        Case("nan", "One NaN", nan),
        Case("infinity", "One +Inf", infinity),
    ),
    "Small and large numbers": (
        Case("subnormal-bf16", "BF16 subnormals", subnormal_bf16),
        Case("subnormal-fp32", "FP32 subnormals", subnormal_fp32),
        Case("tinier", "amax 1e-30", tinier),
        Case("tiny", "amax 1e-12", tiny),
        Case("largest", "Largest FP32", largest),
    ),
    "Shapes and layout": (
        Case("ragged", "130x200", ragged),
        Case("small", "Below one block", small),
        Case("empty", "0x256", empty),
        Case("transposed", "Transposed view", transposed),
        Case("stored", "Scales of 256x384", stored),
        Case("dtypes", "Takes", dtypes),
        Case("unchanged", "Its input", unchanged),
    ),
    "Arithmetic": (
        Case("codes", "Codes against x / s", arithmetic_codes),
        Case("scales", "Scales against amax / 448", arithmetic_scales),
        Case("equal", "All 0.1", equal),
        Case("edge", "1 ulp above a power of two", edge),
    ),
}

CASES = tuple(case for cases in TABLES.values() for case in cases)
