"""The cases that every implementation must answer alike, to the last bit.

A case is a recipe, groups, dtype, shape, layout in memory, kind of numbers, policy for
NaN and Inf, and where the outputs go. `small()` and `full()` list cases, `small_batches()`
and `full_batches()` lists of tensors for one call. All are made from seeds that follow
from their names: the same on every run and device.

    small    every pair of values of two factors stands together in some case;
             recipe x dtype on 65,536 numbers;
             recipe on every power of two, and on what a power-of-two scale doubles at;
             dtype x numbers x policy on five numbers
    full     recipe x groups x dtype x shape on ordinary numbers;
             recipe x dtype x numbers x policy in few groups and shapes;
             groups x dtype x layout x output, recipes and policies taking turns;
             and the small ones
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels import recipes
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Shape = tuple[int, ...]
    Pair = tuple[tuple[int, int], tuple[int, int]]

RECIPES = (*recipes.RECIPES, "ieee:floor=0.0001", "ue8m0:floor=0.0001")
POLICIES = recipes.NON_FINITE
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = (
    block(128, 128),
    block(64, 64),
    block(1, 128),
    block(48, 100),
    block(1, 1),
    block(3, 7),
    block(200, 2),
    block(300, 300),  # more than 65,536 elements: no program holds it
    PER_TENSOR,
    PER_CHANNEL,
)
SMALL_SHAPES: tuple[Shape, ...] = (
    (0, 0),
    (0, 129),
    (128, 0),
    (1, 1),
    (1, 127),
    (127, 1),
    (3, 5),
    (5, 128),
    (16, 20),
    (128, 129),
    (129, 128),
    (127, 200),
    (1, 256),
)
OTHER_SHAPES: tuple[Shape, ...] = ((), (0,), (129,), (2, 3, 40), (3, 0, 4))
FULL_SHAPES: tuple[Shape, ...] = tuple(itertools.product((0, 1, 127, 128, 129, 576), repeat=2))
LAYOUTS = ("contiguous", "transposed", "steps", "fused", "one-row", "one-column")
NUMBERS = (
    "normal",
    "wide",
    "equal",
    "one-hot",
    "ties",
    "near-ties",
    "edges",
    "huge",
    "tiny",
    "subnormal",
    "zeros",
    "negative-zeros",
    "signed-zeros",
    "nan",
    "inf",
    "-inf",
    "mixed",
    "nan-zeros",
    "nothing-finite",
)
FINITE = NUMBERS[: NUMBERS.index("nan")]
OUTPUTS = ("new", "bucket", "strided")

# Numbers of a row, the first of which is its largest, in `under_every_amax`.
ROW = 128
EXPONENTS = {torch.bfloat16: 255, torch.float16: 31}  # of finite numbers, subnormals first

# Triton's interpreter takes about 10 ms a program.
SMALL_GROUPS = 24

_POISON = 0xA5
_NAN = {
    # Quiet and signalling, of both signs: what is copied or converted must keep the sign.
    torch.bfloat16: (0x7FC0, 0xFFC0, 0x7F81, 0xFF81),
    torch.float16: (0x7E00, 0xFE00, 0x7C01, 0xFC01),
    torch.float32: (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001),
}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_WORD = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Case:
    """One tensor and what is asked of it."""

    recipe: str
    groups: Groups
    dtype: torch.dtype
    shape: Shape
    layout: str = "contiguous"
    numbers: str = "normal"
    policy: recipes.NonFinite = "error"
    output: str = "new"

    def __str__(self) -> str:
        sides = "x".join(map(str, self.shape)) or "scalar"
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.recipe} {self.groups} {kind} [{sides}]"
            f" {self.layout} {self.numbers} {self.policy} {self.output}"
        )

    def tensor(self, device: str = "cpu", again: int = 0) -> torch.Tensor:
        """Return the input; `again` counts other contents of the same description."""
        return lay_out(numbers(self.numbers, self.shape, self.dtype, again), self.layout, device)

    def outputs(self, device: str = "cpu") -> Outputs:
        return Outputs(self, device)


@dataclass(frozen=True)
class Batch:
    """Tensors for one call: members differ in all but recipe, groups and policy."""

    name: str
    members: tuple[Case, ...]

    def __str__(self) -> str:
        return self.name


class Outputs:
    """Where the results go, inside poisoned memory whose rest must stay as it is.

    `bucket`: one byte buffer with both: uint8 codes at an odd offset, then scales.
    `strided`: float8 codes written column by column, every second scale of a buffer.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None
        self._buffers: list[torch.Tensor] = []
        if case.output == "new":
            return
        wanted = case.groups.scale_shape(case.shape)
        n, m = math.prod(case.shape), math.prod(wanted)
        if case.output == "bucket":
            before = 64 + 2 * (n % 7) + 1
            aligned = -(-(before + n + 5) // 4) * 4
            bucket = self._poisoned(aligned + 4 * m + 77, device)
            codes = bucket[before : before + n].view(case.shape)
            scales = bucket[aligned : aligned + 4 * m].view(torch.float32).view(wanted)
        else:
            sides = [side + 3 for side in reversed(case.shape)]
            buffer = self._poisoned(math.prod(sides), device).view(torch.float8_e4m3fn).view(sides)
            for dimension, side in enumerate(reversed(case.shape)):
                buffer = buffer.narrow(dimension, 1, side)
            codes = buffer.permute(tuple(reversed(range(len(case.shape)))))
            scales = self._poisoned(8 * m + 8, device).view(torch.float32)[1 : 1 + 2 * m : 2]
            scales = scales.view(wanted)
        self.given = (codes, scales)

    def _poisoned(self, size: int, device: str) -> torch.Tensor:
        self._buffers.append(torch.full((size,), _POISON, dtype=torch.uint8, device=device))
        return self._buffers[-1]

    def poison_left(self) -> bool:
        """Overwrite the outputs with poison; say whether all memory then holds it."""
        if self.given is not None:
            codes, scales = self.given
            codes.view(torch.uint8).fill_(_POISON)
            scales.view(torch.int32).fill_(int.from_bytes([_POISON] * 4, "big") - (1 << 32))
        return all(bool((buffer == _POISON).all()) for buffer in self._buffers)


def small() -> list[Case]:
    """Return every pair of two factors, in shapes up to 256 wide and of few groups."""
    return list(_small())


def full() -> list[Case]:
    """Return the module's product and covering designs."""
    return list(_full())


@functools.cache
def _small() -> tuple[Case, ...]:
    cases = [*pairwise((*SMALL_SHAPES, *OTHER_SHAPES), SMALL_GROUPS)]
    # What multiplies and what divides differ in few codes of 16-bit numbers.
    cases += [
        Case(recipe, block(128, 128), dtype, (256, 256), numbers=kind)
        for recipe in RECIPES
        for dtype, kind in ((DTYPES[0], "normal"), (DTYPES[1], "normal"), (DTYPES[2], "near-ties"))
    ]
    # Each number is a group: one step of FP32 beside an edge has another scale than the edge.
    one = block(1, 1)
    cases += [Case(recipe, one, DTYPES[2], (256, 7), numbers="boundaries") for recipe in RECIPES]
    # torch and C compilers convert less than 8 or 16 numbers by other code than more of them.
    recipe = itertools.cycle(RECIPES)
    cases += [
        Case(next(recipe), block(3, 7), dtype, (1, 5), numbers=kind, policy=policy)
        for dtype, kind, policy in itertools.product(DTYPES, NUMBERS, POLICIES)
        if policy != "error" or kind in FINITE[:2]
    ]
    return tuple(dict.fromkeys(cases))


@functools.cache
def _full() -> tuple[Case, ...]:
    cases = [
        Case(recipe, groups, dtype, shape)
        for recipe in RECIPES
        for groups in GROUPS
        for dtype in DTYPES
        for shape in FULL_SHAPES
    ]
    few = ((block(48, 100), (129, 127)), (block(1, 128), (130, 258)), (PER_TENSOR, (40, 576)))
    cases += [
        Case(recipe, groups, dtype, shape, "contiguous", kind, policy)
        for recipe, dtype, kind, policy in itertools.product(RECIPES, DTYPES, NUMBERS, POLICIES)
        for groups, shape in few
    ]
    # On a GPU each of these is compiled anew: one recipe and policy for groups and dtype.
    turns = itertools.cycle(
        (recipe, recipes.check_non_finite(policy))
        for recipe in RECIPES
        for policy in ("saturate", "propagate")
    )
    for (groups, dtype), (recipe, policy) in zip(
        itertools.product(GROUPS, DTYPES), turns, strict=False
    ):
        for i, (layout, output) in enumerate(itertools.product(LAYOUTS, OUTPUTS)):
            shape = ((129, 130), (7, 576))[i % 2]
            cases.append(Case(recipe, groups, dtype, shape, layout, "mixed", policy, output))
    return tuple(dict.fromkeys((*cases, *_small())))


def small_batches() -> list[Batch]:
    """Return lists of few tensors, of all dtypes, with and without NaN and Inf."""
    shapes = ((3, 5), (0, 7), (16, 20), (5, 128), (128, 0), (1, 1), (7, 130), (0, 0), (1, 256))
    batches = []
    for turn, groups in enumerate(GROUPS):
        recipe = RECIPES[turn % len(RECIPES)]
        own: list[Shape] = [shape for shape in shapes if group_count(groups, shape) <= 16]
        if groups.kind == "block" and math.prod(groups.sides) < 64:
            own = [(3, 5), (0, 7), (2, 4), (1, 1), (0, 0)]
        elif groups.kind == "block" and math.prod(groups.sides) > 1 << 16:
            own = [(3, 5), (0, 7), (5, 128)]
        elif groups.kind == "per-tensor":
            own += OTHER_SHAPES
        batches += [
            _batch(recipe, groups, own, DTYPES, policy, kinds)
            for policy, kinds in (
                ("error", ("normal", "wide", "zeros", "ties")),
                ("error", ("normal", "zeros", "subnormal", "normal", "mixed", "equal", "nan")),
                (("saturate", "propagate")[turn % 2], ("mixed", "normal", "nothing-finite")),
            )
        ]
    return [*batches, *shared_batches()]


def shared_batches() -> list[Batch]:
    """Return lists of which one launch works on all: rows of one table, not one table each.

    They take equally many programs or not, and the first that is not finite is not the first.
    """
    small, large = block(48, 100), block(257, 256)  # large: more than 65,536 elements
    alike, unlike = ((40, 32),) * 3, ((40, 32), (100, 32), (7, 32))
    dtype, layout, kinds = DTYPES[:1], LAYOUTS[:1], ("mixed", "wide", "normal")
    return [
        _batch("ieee", small, alike, dtype, "error", ("normal", "normal", "nan"), layout),
        _batch("ieee", small, unlike, dtype, "saturate", kinds, layout),
        _batch("ieee", large, alike[:2], dtype, "saturate", kinds[1:], layout),
    ]


def full_batches() -> list[Batch]:
    """Return lists of every shape: per groups one of each dtype and one of all, twice."""
    recipe = itertools.cycle(RECIPES)
    return [
        _batch(next(recipe), groups, FULL_SHAPES, dtypes, policy, kinds)
        for groups in GROUPS
        for dtypes in (*((dtype,) for dtype in DTYPES), DTYPES)
        for policy, kinds in (
            ("error", FINITE),
            ("saturate" if len(dtypes) > 1 else "propagate", NUMBERS),
        )
    ]


def _batch(
    recipe: str,
    groups: Groups,
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
    policy: str,
    kinds: Sequence[str],
    layouts: Sequence[str] = LAYOUTS,
) -> Batch:
    """Return one tensor a shape; all else takes turns, in coprime steps where it can."""
    checked = recipes.check_non_finite(policy)
    members = tuple(
        Case(
            recipe,
            groups,
            dtypes[i % len(dtypes)],
            shape,
            layouts[i * 5 % len(layouts)],
            kinds[i % len(kinds)],
            checked,
            OUTPUTS[i * 2 % len(OUTPUTS)],
        )
        for i, shape in enumerate(shapes)
    )
    named = "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Batch(f"{recipe} {groups} {named} {policy} {'+'.join(kinds[:4])}", members)


def group_count(groups: Groups, shape: Shape) -> int:
    return math.prod(groups.scale_shape(shape))


def pairwise(shapes: Sequence[Shape], most_groups: int) -> Iterator[Case]:
    """Yield cases until every possible pair of values of two factors has been together.

    Greedy and seeded: an open pair, then for each other factor the value that closes most.
    """
    factors: tuple[Sequence[object], ...] = (
        RECIPES,
        GROUPS,
        DTYPES,
        shapes,
        LAYOUTS,
        NUMBERS,
        POLICIES,
        OUTPUTS,
    )
    order = random.Random(8)
    fits = {
        (g, s)
        for g, groups in enumerate(GROUPS)
        for s, shape in enumerate(shapes)
        if groups.kind == "per-tensor"
        or (len(shape) == 2 and group_count(groups, shape) <= most_groups)
    }
    open_ = dict.fromkeys(
        pair
        for a, b in itertools.combinations(range(len(factors)), 2)
        for pair in itertools.product(
            ((a, i) for i in range(len(factors[a]))), ((b, j) for j in range(len(factors[b])))
        )
        if (a, b) != (1, 3) or (pair[0][1], pair[1][1]) in fits
    )
    while open_:
        chosen = dict(next(iter(open_)))
        left = [factor for factor in range(len(factors)) if factor not in chosen]
        order.shuffle(left)
        for factor in left:
            values = [
                value
                for value in range(len(factors[factor]))
                if {1, 3} - {*chosen, factor}
                or (chosen.get(1, value), chosen.get(3, value)) in fits
            ]
            order.shuffle(values)
            chosen[factor] = max(
                values, key=lambda value: sum(p in open_ for p in _pairs(chosen, factor, value))
            )
        for factor, value in chosen.items():
            for pair in _pairs(chosen, factor, value):
                open_.pop(pair, None)
        picked = [factors[factor][chosen[factor]] for factor in range(len(factors))]
        yield Case(*picked)  # type: ignore[arg-type]


def _pairs(chosen: dict[int, int], factor: int, value: int) -> Iterable[Pair]:
    for other, its in chosen.items():
        if other < factor:
            yield (other, its), (factor, value)
        elif other > factor:
            yield (factor, value), (other, its)


def numbers(kind: str, shape: Shape, dtype: torch.dtype, again: int = 0) -> torch.Tensor:
    """Return a contiguous tensor of these numbers; the same arguments give the same bits."""
    seed = zlib.crc32(f"{kind} {shape} {dtype} {again}".encode())
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    word, mantissa = _WORD[dtype], _MANTISSA[dtype]

    def whole(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    def signed(magnitudes: torch.Tensor) -> torch.Tensor:
        return magnitudes * (1 - 2 * whole(0, 2))

    def pick(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[whole(0, len(values))]

    def power(low: int, high: int) -> torch.Tensor:
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return torch.exp2(low + (high - low) * uniform)

    def bits(patterns: Sequence[int], where: torch.Tensor, x: torch.Tensor) -> None:
        width = 8 * dtype.itemsize
        signed = torch.tensor([p - (p >> (width - 1) << width) for p in patterns], dtype=word)
        x.view(word)[where] = signed[torch.arange(len(where)) % len(patterns)]

    places = torch.tensor(
        sorted({size // 3, size // 2, size - 1}) if size else [], dtype=torch.int64
    )
    infinite = 0x7F800000 if dtype.itemsize == 4 else 0x7F80 if mantissa == 7 else 0x7C00
    negative = infinite | 1 << 8 * dtype.itemsize - 1
    largest = torch.finfo(dtype).max
    x = torch.randn(size, generator=generator) * 0.02
    if kind == "wide":
        bottom, top = (-25, 16) if dtype == torch.float16 else (-150, 128)
        x = signed(power(bottom, top)).clamp(-largest, largest)
    elif kind == "equal":
        x = torch.full((size,), -0.0173 * 2.0 ** (seed % 9))
    elif kind == "one-hot":
        x = torch.zeros(size)
        x[size * 2 // 3 : size * 2 // 3 + 1] = 0.3
    elif kind in {"ties", "near-ties"}:
        # Half of them the largest, so that nearly all groups have it; the rest stand in the
        # middle of two codes, or one step of their own format beside it. With 448 the scale
        # is 1; with another the middles are numbers that quotients round to, or nearly so.
        steps = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
        table = [m * 2.0**-9 for m in range(8)] + steps[:-1]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]
        most = 448.0 if kind == "ties" else float(torch.tensor(1 + seed % 9973 / 9973).to(dtype))
        beside = signed(whole(0, 2)).double() * 2.0**-mantissa
        middle = pick(middles) * (most / 448) * (1 + beside)
        x = signed(torch.where(whole(0, 2) == 0, most, middle.clamp(max=most)))
    elif kind == "edges":
        # 448 times a power of two, where a power-of-two scale doubles, and what is next to it.
        edge = torch.tensor(448.0 * 2.0 ** (seed % 11 - 5), dtype=dtype)
        words = edge.view(word) + torch.arange(-1, seed % 3, dtype=word)
        x = signed(words.view(dtype).double()[whole(0, len(words))])
    elif kind == "boundaries":
        x = boundaries()[torch.arange(size) % boundaries().numel()]
    elif kind == "huge":
        x = signed(pick([largest, largest / 2, largest * 0.99, largest / 448, 1.0]))
    elif kind == "tiny":
        # Round the least scale, 2^-126 * 448; in FP16, which ends above, its own least.
        bottom, top = (-25, -12) if dtype == torch.float16 else (-132, -115)
        x = signed(power(bottom, bottom + 1 + (seed + 3) % (top - bottom)))
    elif kind == "subnormal":
        x = whole(1, 1 << mantissa).double() * torch.finfo(dtype).tiny * 2.0**-mantissa
        x = signed(x)
    elif kind in {"zeros", "nan-zeros"}:
        x = torch.zeros(size)
    elif kind == "negative-zeros":
        x = -torch.zeros(size)
    elif kind == "signed-zeros":
        x = signed(torch.zeros(size))
    elif kind == "mixed":
        x = signed(power(-20, 8))
    x = x.to(dtype)
    if kind in {"nan", "nan-zeros"}:
        bits(_NAN[dtype], places, x)
    elif kind in {"inf", "-inf"}:
        bits([infinite if kind == "inf" else negative], places, x)
    elif kind == "mixed":
        some = torch.randperm(size, generator=generator)[: -(-size // 40)]
        bits([*_NAN[dtype], infinite, negative], some, x)
    elif kind == "nothing-finite":
        bits([infinite, *_NAN[dtype], negative], torch.arange(size), x)
    return x.view(shape)


@functools.cache
def boundaries() -> torch.Tensor:
    """Return all FP32 of significand 1, or 1.75 as 448 has it, and what is next to each."""
    powers = [value * 2.0**e for e in range(-149, 128) for value in (1.0, 1.75)]
    edges = torch.tensor(powers, dtype=torch.float64).float()
    words = edges.view(torch.int32)[:, None] + torch.arange(-1, 2)
    return words.clamp(0, 0x7F7FFFFF).int().flatten().view(torch.float32)


def under_every_amax(
    dtype: torch.dtype, exponent: int, device: str = "cpu"
) -> Iterator[torch.Tensor]:
    """Yield all BF16 or FP16 up to each amax of that biased exponent, in rows of `ROW`.

    The numbers of one amax fill several rows, each behind that amax; where they are larger
    it stands in their place. Signs take turns, and the other way round in a second tensor.
    """
    mantissa, each = _MANTISSA[dtype], ROW - 1
    infinity = EXPONENTS[dtype] << mantissa
    rows = -(-infinity // each)
    words = torch.arange(rows * each, dtype=torch.int32, device=device).clamp_(max=infinity - 1)
    significands = torch.arange(1 << mantissa, dtype=torch.int32, device=device)
    amax = ((exponent << mantissa) + significands)[:, None, None]
    x = torch.empty((len(significands), rows, ROW), dtype=torch.int16, device=device)
    x[:, :, :1] = amax
    x[:, :, 1:] = torch.minimum(words.view(rows, each)[None], amax)
    signs = (torch.arange(ROW, device=device) % 2).to(torch.int16) << 15
    for turn in (signs, signs ^ -0x8000):
        yield (x | turn).view(-1, ROW).view(dtype)


def lay_out(x: torch.Tensor, layout: str, device: str = "cpu") -> torch.Tensor:
    """Return the numbers of `x` in memory of that layout, NaN around them.

    `one-row` and `one-column` repeat a part of `x` by strides of 0.
    """
    if layout == "contiguous" or x.dim() == 0:
        return x.to(device)
    if layout == "transposed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().to(device).permute(order)
    if layout == "one-row":
        return x[:1].contiguous().to(device).expand(x.shape)
    if layout == "one-column":
        return x[..., :1].contiguous().to(device).expand(x.shape)
    if layout == "steps":
        # Every second along one dimension, every third along the next.
        steps = [2 + i % 2 for i in range(x.dim())]
        big = [side * step for side, step in zip(x.shape, steps, strict=True)]
        cut = tuple(slice(None, None, step) for step in steps)
    else:
        big = [side + 8 + i for i, side in enumerate(x.shape)]
        cut = tuple(slice(3 + i, 3 + i + side) for i, side in enumerate(x.shape))
    base = torch.full(big, math.nan, dtype=x.dtype)
    base[cut] = x
    return base.to(device)[cut]
