"""How matrices are cut into groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block

sides = st.integers(1, 400)
shapes = st.tuples(st.integers(0, 1000), st.integers(0, 1000))


@given(sides, sides, shapes)
def test_blocks_cover_a_matrix_and_no_more(n: int, k: int, shape: tuple[int, int]) -> None:
    groups = block(n, k)
    down, across = groups.grid(shape)
    assert groups.size(shape) == (n, k)
    assert (down - 1) * n < shape[0] <= down * n or down == shape[0] == 0
    assert (across - 1) * k < shape[1] <= across * k or across == shape[1] == 0
    assert groups.scale_shape(shape) == (down, across)


@given(shapes)
def test_a_channel_is_a_row(shape: tuple[int, int]) -> None:
    assert PER_CHANNEL.scale_shape(shape) == PER_CHANNEL.grid(shape) == (shape[0], 1)
    assert PER_CHANNEL.size(shape) == (1, max(1, shape[1]))


@given(st.lists(st.integers(0, 9), max_size=5))
def test_a_tensor_has_one_scale_whatever_its_shape(shape: list[int]) -> None:
    assert PER_TENSOR.scale_shape(shape) == (1,)


@given(shapes)
def test_a_matrix_is_one_group_per_tensor(shape: tuple[int, int]) -> None:
    assert PER_TENSOR.grid(shape) == (1, 1)
    assert PER_TENSOR.size(shape) == (max(1, shape[0]), max(1, shape[1]))


@given(st.sampled_from([PER_TENSOR, PER_CHANNEL, block(3, 7), block(64, 64)]), shapes)
def test_groups_of_that_size_make_up_the_grid(groups: Groups, shape: tuple[int, int]) -> None:
    if math.prod(shape):
        size, grid = groups.size(shape), groups.grid(shape)
        assert tuple(-(-a // b) for a, b in zip(shape, size, strict=True)) == grid


@pytest.mark.parametrize(
    ("n", "k"), [(0, 4), (4, 0), (-1, 4), (4, -128), (1.5, 2), (True, 2), ("8", 8), (None, 1)]
)
def test_sides_that_are_not_positive_whole_numbers_are_refused(n: Any, k: Any) -> None:
    with pytest.raises(ValueError, match=f"positive whole numbers, not {n}x{k}"):
        block(n, k)
    with pytest.raises(ValueError, match=f"positive whole numbers, not {n}x{k}"):
        Groups("block", (n, k))


def test_groups_are_values() -> None:
    assert block(128, 64) == block(128, 64)
    assert block(128, 64) != block(64, 128)
    assert len({block(1, 2), block(1, 2), PER_TENSOR, PER_CHANNEL}) == 3
    assert [str(g) for g in (block(128, 64), PER_TENSOR, PER_CHANNEL)] == [
        "128x64",
        "per-tensor",
        "per-channel",
    ]
