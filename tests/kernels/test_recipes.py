"""Names, floors and refusals of recipes."""

from __future__ import annotations

import dataclasses
import math
import struct
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ctl.kernels import recipes
from fp8ctl.kernels.recipes import (
    IEEE,
    INVERSE_SCALE,
    RECIPES,
    RECIPROCAL,
    UE8M0,
    Recipe,
    check_non_finite,
    named,
)

names = st.sampled_from(tuple(RECIPES))
fp32_numbers = st.integers(0, 0x7F7FFFFF).map(
    lambda word: float(struct.unpack("f", struct.pack("I", word))[0])
)


def test_there_are_four_and_what_each_is() -> None:
    assert list(RECIPES) == ["ieee", "reciprocal", "inverse-scale", "ue8m0"]
    assert [str(recipe) for recipe in RECIPES.values()] == list(RECIPES)
    assert [recipe.floor for recipe in RECIPES.values()] == [0.0, pytest.approx(1e-10), 0.0, 0.0]
    assert recipes.FP8_MAX == 448.0
    assert Fraction(1, 2**126) == Fraction(recipes.MIN_SCALE)


@given(names)
def test_a_name_names_its_recipe(name: str) -> None:
    assert named(name) is RECIPES[name]
    assert named(RECIPES[name]) is RECIPES[name]


@given(names, fp32_numbers)
def test_a_floor_is_part_of_the_name_and_the_name_gives_it_back(name: str, floor: float) -> None:
    recipe = RECIPES[name].with_floor(floor)
    assert recipe.floor == floor
    assert recipe.arithmetic == RECIPES[name].arithmetic
    assert named(str(recipe)) == recipe
    assert recipe.with_floor(RECIPES[name].floor) is RECIPES[name]
    assert named(f"{name}:floor={floor!r}") == recipe


@given(fp32_numbers, fp32_numbers)
def test_other_floors_have_other_names(one: float, other: float) -> None:
    assert (str(IEEE.with_floor(one)) == str(IEEE.with_floor(other))) == (one == other)


def test_a_floor_is_rounded_to_fp32() -> None:
    assert RECIPROCAL.floor == struct.unpack("f", struct.pack("f", 1e-10))[0] != 1e-10
    assert IEEE.with_floor(0.1).floor == struct.unpack("f", struct.pack("f", 0.1))[0]
    assert named("reciprocal:floor=1e-10") is RECIPROCAL
    assert IEEE.with_floor(1.0).with_floor(2.0) == IEEE.with_floor(2.0)


@pytest.mark.parametrize("floor", [-1.0, -1e-300, math.inf, -math.inf, math.nan, 1e39, 3.5e38])
def test_a_floor_that_is_no_number_of_fp32_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match="floor"):
        IEEE.with_floor(floor)
    with pytest.raises(ValueError, match="floor"):
        Recipe("mine", "divide", floor)
    with pytest.raises(ValueError, match="floor"):
        named(f"ieee:floor={floor}")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("", "unknown recipe ''; expected one of ieee, reciprocal, inverse-scale, ue8m0"),
        ("IEEE", "unknown recipe 'IEEE'"),
        ("ieee ", "unknown recipe 'ieee '"),
        ("ieee:", "unknown option '' of recipe ieee; expected floor=NUMBER"),
        ("ue8m0:ceil=1", "unknown option 'ceil=1' of recipe ue8m0"),
        ("ieee:floor", "'ieee:floor'.* not a number"),
        ("ieee:floor=", "'ieee:floor='.* not a number"),
        ("ieee:floor=small", "'ieee:floor=small'.* not a number"),
        ("nothing:floor=1", "unknown recipe 'nothing:floor=1'"),
    ],
)
def test_what_is_no_name_is_refused(name: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        named(name)


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown arithmetic 'approximate'"):
        Recipe("mine", "approximate")  # type: ignore[arg-type]


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        IEEE.floor = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("policy", ["error", "saturate", "propagate"])
def test_the_policies(policy: str) -> None:
    assert check_non_finite(policy) == policy


@pytest.mark.parametrize("policy", ["", "Error", "ignore", None, 0])
def test_no_other_policy(policy: str) -> None:
    with pytest.raises(ValueError, match=f"unknown policy {policy!r}; expected one of error, sat"):
        check_non_finite(policy)


def _fp32(value: Fraction) -> Fraction:
    """Round to FP32 by trying the neighbours of FP64's answer, exactly."""
    if value > Fraction(2) ** 127 * (2 - Fraction(1, 2**24)):
        return Fraction(2) ** 200  # beyond FP32
    word = struct.unpack("I", struct.pack("f", min(float(value), 3.4028234663852886e38)))[0]
    near = [w for w in (word - 1, word, word + 1) if 0 <= w <= 0x7F7FFFFF]
    numbers = [(Fraction(struct.unpack("f", struct.pack("I", w))[0]), w) for w in near]
    return min(numbers, key=lambda number: (abs(number[0] - value), number[1] % 2))[0]


@given(st.sampled_from((IEEE, RECIPROCAL, INVERSE_SCALE, UE8M0)), fp32_numbers)
def test_the_scale_of_zeros_follows_from_the_floor(recipe: Recipe, floor: float) -> None:
    least, found = Fraction(1, 2**126), Fraction(recipe.with_floor(floor).scale_of_zeros)
    if floor == 0.0:
        assert found == 1
    elif recipe is UE8M0:
        assert found.numerator.bit_count() == found.denominator.bit_count() == 1
        assert found >= least
        assert found * 448 >= Fraction(floor)
        assert found == least or found * 224 < Fraction(floor)
    elif recipe is INVERSE_SCALE:
        assert found == _fp32(1 / min(_fp32(448 / Fraction(floor)), 1 / least))
    else:
        assert found == max(least, _fp32(Fraction(floor) / 448))
