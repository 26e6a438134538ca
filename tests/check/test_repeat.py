"""When two greedy answers are no fault."""

from __future__ import annotations

from typing import Any

import pytest

from fp8ctl.check.repeat import NEAR, judge


def choice(*tokens: str, tops: list[Any] | None = None) -> dict[str, Any]:
    return {"text": "".join(tokens), "logprobs": {"tokens": list(tokens), "top_logprobs": tops}}


def two(gap: float) -> list[Any]:
    """Return the likeliest tokens of two places, `x` and `y` at the second."""
    return [{"a": -0.1}, {"x": -0.7, "y": -0.7 - gap}]


def test_one_answer_is_well_whatever_its_likelihoods() -> None:
    assert judge(choice("a"), {"text": "a"}).result == "ok"


@pytest.mark.parametrize(("gap", "result"), [(0.0, "ok"), (NEAR - 0.01, "ok"), (0.3, "failed")])
def test_tokens_as_likely_as_each_other_may_take_turns(gap: float, result: str) -> None:
    for sign in (1, -1):
        tops = two(sign * gap)
        assert judge(choice("a", "x", tops=tops), choice("a", "y", tops=tops)).result == result


def test_both_answers_have_to_find_them_near() -> None:
    near, far = two(0.01), two(4.0)
    for one, other in ((near, far), (far, near)):
        found = judge(choice("a", "x", tops=one), choice("a", "y", tops=other))
        assert (found.result, found.expected) == ("failed", "one answer")


@pytest.mark.parametrize(
    "tops",
    [
        None,
        [],
        [None, None],
        [{"a": -0.1}, {"x": -0.7}],
        [{"a": -0.1}, {"x": None, "y": -0.7}],
        [{"a": -0.1}, {"x": float("nan"), "y": -0.7}],
        "no list",
    ],
)
def test_what_is_not_told_excuses_nothing(tops: Any) -> None:
    found = judge(choice("a", "x", tops=tops), choice("a", "y", tops=two(0.0)))
    assert found.result == "failed"


def test_texts_that_differ_where_the_tokens_do_not_are_a_fault() -> None:
    one = choice("a", tops=[{"a": -0.1}])
    assert judge(one, {**one, "text": "b"}).result == "failed"
    assert judge({"text": "a"}, {"text": "b", "logprobs": "odd"}).result == "failed"
