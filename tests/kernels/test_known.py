"""What is remembered of lists of tensors, for how long, and what makes one the same."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from fp8ctl.kernels import known
from fp8ctl.kernels.known import Known


def test_a_list_is_what_it_is_and_where_it_lies() -> None:
    lists: Known[str] = Known()
    x = torch.zeros(6, 4)
    key = lists.key([x, x[1:]], "more")
    assert key == lists.key([x.view(6, 4), x.detach()[1:]], "more")
    others = [
        lists.key([x, x[1:]], "less"),
        lists.key([x[1:], x], "more"),
        lists.key([x], "more"),
        lists.key([x, x[:5]], "more"),
        lists.key([x, x.view(torch.int32)[1:]], "more"),
        lists.key([x, x.t()], "more"),
        lists.key([x, x.clone()[1:]], "more"),
    ]
    assert len({key, *others}) == 1 + len(others)
    with pytest.raises((TypeError, AttributeError)):
        lists.key([x, None])  # type: ignore[list-item]


def test_there_is_room_for_so_many_and_no_tensor_is_kept() -> None:
    lists: Known[int] = Known(most=2)
    keys = []
    for i in range(5):
        x = torch.zeros(3, i + 1)
        keys.append(lists.key([x]))
        lists.put(keys[-1], i)
        assert len(lists) <= 2
        held = weakref.ref(x)
        del x
        assert held() is None
    assert [lists.get(key) for key in keys] == [0, 1, None, None, None]


def test_of_a_circle_that_is_too_long_a_part_is_remembered_and_not_for_ever() -> None:
    """An update asks for its lists one after the other, and the next one for the same."""
    lists: Known[int] = Known(most=4)
    kept: list[torch.Tensor] = []  # or one would lie where another lay

    def keys_of(rows: int) -> list[Any]:
        kept.extend(torch.zeros(rows, i + 1) for i in range(6))
        return [lists.key([x]) for x in kept[-6:]]

    def update(keys: list[Any]) -> int:
        hits = 0
        for key in keys:
            found = lists.get(key)
            hits += found is not None
            if found is None:
                lists.put(key, 1)
        return hits

    first, second = keys_of(2), keys_of(3)
    assert [update(first) for _ in range(3)] == [0, 4, 4]
    assert [update(second) for _ in range(3)] == [0, 0, 0], "others may come again"
    assert [update(second) for _ in range(100)][-1] == 4, "they did not"
    assert len(lists) == 4


def test_all_is_forgotten_at_once_and_nothing_means_something_else_then() -> None:
    lists, others = Known[int](), Known[int]()
    x, y = torch.zeros(3), torch.zeros(1, 3)
    of_x, of_y = lists.key([x]), lists.key([y])
    lists.put(of_x, 1)
    others.put(others.key([y]), 2)
    known.forget()
    assert (len(lists), len(others)) == (0, 0)
    # A key that was asked for before still is the key of these alone.
    assert lists.key([y]) == of_y
    lists.put(of_x, 3)
    assert lists.get(lists.key([y])) is None
    assert lists.get(lists.key([x])) == 3
