"""Named recipes: how a group's scale and codes come out of its numbers, to the last bit.

With `amax` the largest finite magnitude of a group and a = max(amax, floor), all in
FP32 and rounded to nearest even at every step:

    name            stored scale               code                    as
    ieee            a / 448                    e4m3(x / scale)         the default
    reciprocal      a / 448                    e4m3(x * (1 / scale))   slime, verl, AReaL, SGLang
    inverse-scale   1 / m, with m = 448 / a    e4m3(x * m)             Transformer Engine, torchao
    ue8m0           2^ceil(log2(a / 448))      e4m3(x / scale)         DeepGEMM

e4m3() rounds to the nearest float8_e4m3fn, ties to even, and saturates at +-448.
In torch, `448 / a` with a Python number is 448 * (1 / a), rounded twice, and no division.
No scale is below 2^-126, the smallest normal FP32. A group with a = 0 (only zeros,
and no floor; an empty group too) has scale 1 and codes +-0.

What is not finite is never part of `amax`. `NonFinite` says what becomes of it:

    error        NonFiniteError, with tensor, index and value (the default)
    saturate     Inf is +-448 in code, NaN is +0: the result is finite
    propagate    NaN in code (0x7f, 0xff by sign) for NaN and Inf: what was not
                 finite is NaN when it is dequantised, and nothing beside it is touched

Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass
from typing import Literal, get_args

FP8_MAX = 448.0  # largest finite e4m3fn
MIN_SCALE = 2.0**-126  # smallest normal FP32

Arithmetic = Literal["divide", "reciprocal", "inverse-scale", "power-of-two"]
NonFinite = Literal["error", "saturate", "propagate"]
NON_FINITE: tuple[NonFinite, ...] = get_args(NonFinite)


def _fp32(value: float) -> float:
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def _shortest(value: float) -> str:
    """Return the shortest decimal that is this FP32 number."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if _fp32(float(text)) == value)


@dataclass(frozen=True)
class Recipe:
    """One way to compute scales and codes; see the module's table.

    Attributes:
        name: as users type it.
        arithmetic: the row of the table.
        floor: the least `amax` of a group, an FP32 number; 0 for none.
    """

    name: str
    arithmetic: Arithmetic
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.arithmetic not in get_args(Arithmetic):
            raise ValueError(f"unknown arithmetic {self.arithmetic!r}")
        if not 0.0 <= _fp32(self.floor) < math.inf or self.floor < 0:
            raise ValueError(f"the floor of amax must be an FP32 from 0 up, not {self.floor}")
        object.__setattr__(self, "floor", _fp32(self.floor))

    def with_floor(self, floor: float) -> Recipe:
        """Return this recipe with another floor, rounded to FP32, and named after it.

        Raises:
            ValueError: the floor is negative, NaN or infinite.
        """
        base = self.name.partition(":")[0]
        changed = dataclasses.replace(self, floor=floor)
        named = RECIPES.get(base)
        if named is not None and named.floor == changed.floor:
            return named
        return dataclasses.replace(changed, name=f"{base}:floor={_shortest(changed.floor)}")

    @property
    def floor_bits(self) -> int:
        """The floor as the bits of an FP32 number."""
        bits: int = struct.unpack("I", struct.pack("f", self.floor))[0]
        return bits

    @property
    def scale_of_zeros(self) -> float:
        """The scale of a group whose largest magnitude is not above the floor."""
        if self.floor == 0.0:
            return 1.0
        # FP64 has the guard digits that make rounding twice the same as rounding once.
        if self.arithmetic == "power-of-two":
            return max(MIN_SCALE, 2.0 ** math.ceil(math.log2(self.floor / FP8_MAX)))
        if self.arithmetic == "inverse-scale":
            return _fp32(1.0 / min(_fp32(FP8_MAX / self.floor), 1.0 / MIN_SCALE))
        return max(MIN_SCALE, _fp32(self.floor / FP8_MAX))

    def __str__(self) -> str:
        return self.name


IEEE = Recipe("ieee", "divide")
RECIPROCAL = Recipe("reciprocal", "reciprocal", floor=1e-10)
INVERSE_SCALE = Recipe("inverse-scale", "inverse-scale")
UE8M0 = Recipe("ue8m0", "power-of-two")
RECIPES = {recipe.name: recipe for recipe in (IEEE, RECIPROCAL, INVERSE_SCALE, UE8M0)}


def named(name: str | Recipe) -> Recipe:
    """Return the recipe of that name: `ieee`, or with a floor of its own `ue8m0:floor=1e-4`.

    Raises:
        ValueError: there is none.
    """
    if isinstance(name, Recipe):
        return name
    base, colon, option = name.partition(":")
    if base not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    if not colon:
        return RECIPES[base]
    key, _, value = option.partition("=")
    if key != "floor":
        raise ValueError(f"unknown option {option!r} of recipe {base}; expected floor=NUMBER")
    try:
        floor = float(value)
    except ValueError:
        raise ValueError(f"the floor of recipe {name!r} is not a number") from None
    return RECIPES[base].with_floor(floor)


def check_non_finite(policy: str) -> NonFinite:
    """Return `policy` if it is one.

    Raises:
        ValueError: it is none.
    """
    for known in NON_FINITE:
        if policy == known:
            return known
    raise ValueError(f"unknown policy {policy!r}; expected one of {', '.join(NON_FINITE)}")
