"""When two greedy answers are no fault."""

from __future__ import annotations

from typing import Any

import pytest

from fp8ctl.check.repeat import FAR, NEAR, judge


def choice(*tokens: str, tops: Any = None, first: Any = -0.1) -> dict[str, Any]:
    values = [first, -0.7][: len(tokens)]
    told = {"tokens": list(tokens), "token_logprobs": values, "top_logprobs": tops}
    return {"text": "".join(tokens), "logprobs": told}


def two(gap: float, at: float = -0.7, **more: float) -> list[Any]:
    """Return the likeliest tokens of two places, `x` and `y` at the second."""
    return [{"a": -0.1}, {"x": at, "y": at - gap, **more}]


def test_one_answer_is_well_whatever_its_likelihoods() -> None:
    assert judge(choice("a"), {"text": "a"}).result == "ok"


@pytest.mark.parametrize(
    ("gap", "result"),
    [
        (0.0, "ok"),
        (NEAR - 0.01, "ok"),
        (NEAR + 0.05, "not visible"),
        (FAR - 0.01, "not visible"),
        (FAR + 0.05, "failed"),
    ],
)
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
    ("one", "other"),
    [
        (two(0.1, -9.0), two(0.1)),  # the same two, and quite another likelihood
        (two(0.1, -2.9, z=-0.1), two(0.1, -2.9)),  # neither is the likeliest
        (two(0.1), two(float("nan"))),
    ],
)
def test_rounding_moves_no_likelihood_far(one: list[Any], other: list[Any]) -> None:
    for a, b in ((one, other), (other, one)):
        assert judge(choice("a", "x", tops=a), choice("a", "y", tops=b)).result == "failed"


def test_what_was_the_same_before_is_as_likely_in_both() -> None:
    def result(first: Any) -> str:
        near = choice("a", "y", tops=two(0.0), first=first)
        return judge(choice("a", "x", tops=two(0.0)), near).result

    assert result(-0.2) == "ok"
    assert {result(one) for one in (-0.15 - FAR, None, float("nan"), 10**400)} == {"failed"}


@pytest.mark.parametrize(
    ("last", "result"),
    [(-0.71, "not visible"), (-0.7 - NEAR + 0.01, "not visible"), (-0.75 - FAR, "failed")],
)
def test_a_token_that_is_not_told_is_no_likelier_than_the_last_that_is(
    last: float, result: str
) -> None:
    """Of a model that finds many as likely, five do not show which others are."""
    flat = [{"a": -0.1}, {"x": -0.7, "z": last}]
    for one, other in (("x", "y"), ("y", "x")):
        tops = {"x": flat, "y": two(0.01)}
        found = judge(choice("a", one, tops=tops[one]), choice("a", other, tops=tops[other]))
        assert found.result == result, found.found


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
