"""Laws of the numbers that the logprobs level rests on."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ctl.check import likelihood
from fp8ctl.check.likelihood import BF16, Hypothesis, judge, k3, sigmas, summarise, unrelated
from fp8ctl.check.prompts import Scores

TEXTS, LENGTH = 36, 29

logprobs = st.floats(min_value=-20, max_value=0)


def scores(values: list[list[float]], top: int = 7) -> Scores:
    return Scores(tuple(map(tuple, values)), tuple((top,) * len(text) for text in values))


def moved(base: Scores, by: float, seed: int) -> Scores:
    """Return a base with noise of that standard deviation on every token."""
    noise = random.Random(seed)
    return replace(
        base, logprobs=tuple(tuple(v + noise.gauss(0, by) for v in t) for t in base.logprobs)
    )


@pytest.fixture
def base() -> Scores:
    random_ = random.Random(0)
    return scores([[-random_.expovariate(0.3) for _ in range(LENGTH)] for _ in range(TEXTS)])


def world(base: Scores, apart: float = 0.15, noise: float = 0.1) -> dict[str, Hypothesis]:
    """Return BF16 and two kinds of FP8 as a small model has them."""
    block, tensor = moved(base, apart, 1), moved(base, apart, 2)
    return {
        BF16: Hypothesis(BF16, base, moved(base, noise / 4, 3)),
        "fp8-block": Hypothesis("fp8-block", block, moved(block, noise, 4)),
        "fp8-per-tensor": Hypothesis("fp8-per-tensor", tensor, moved(tensor, noise, 5)),
    }


@given(st.floats(min_value=-30, max_value=30))
def test_k3_is_zero_where_two_agree_and_positive_elsewhere(difference: float) -> None:
    assert k3(0.0) == 0.0
    assert k3(difference) >= 0.0
    if abs(difference) > 1e-3:
        assert k3(difference) > 0.0


def test_k3_of_sampled_tokens_estimates_the_divergence() -> None:
    # The formula's claim: x ~ q, r = p(x) / q(x), E[r - 1 - log r] = KL(q || p).
    q, p = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    divergence = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    tokens = random.Random(1).choices(range(3), q, k=200_000)
    found = sum(k3(math.log(q[t]) - math.log(p[t])) for t in tokens) / len(tokens)
    assert found == pytest.approx(divergence, rel=0.05)


def test_k3_of_a_token_that_the_server_finds_impossible_is_a_number() -> None:
    assert math.isfinite(k3(likelihood.NO_NUMBER))


def test_what_is_said_by_both_is_no_distance(base: Scores) -> None:
    found = summarise(base, base)
    assert (found.mean_abs, found.p99_abs, found.k3_kl, found.top1) == (0, 0, 0, 1)
    assert found.tokens == TEXTS * LENGTH


@given(st.lists(logprobs, min_size=2, max_size=40), st.floats(min_value=0.01, max_value=5))
def test_a_shift_of_all_tokens_is_the_mean_and_the_percentile(
    values: list[float], shift: float
) -> None:
    one = scores([values])
    found = summarise(one, scores([[v - shift for v in values]]))
    assert found.mean_abs == pytest.approx(shift)
    assert found.p99_abs == pytest.approx(shift)


def test_the_percentile_leaves_out_one_token_in_a_hundred() -> None:
    one, other = scores([[0.0] * 200]), scores([[0.1] * 198 + [5.0, 5.0]])
    assert summarise(one, other).p99_abs == pytest.approx(0.1)
    other = scores([[0.1] * 197 + [5.0] * 3])
    assert summarise(one, other).p99_abs == pytest.approx(5.0)


def test_a_place_where_the_likeliest_token_is_not_told_counts_for_nothing(base: Scores) -> None:
    half = tuple((7, 8) * (LENGTH // 2) + (-1,) for _ in range(TEXTS))
    assert summarise(replace(base, top=half), base).top1 == 0.5
    silent = replace(base, top=tuple((-1,) * LENGTH for _ in range(TEXTS)))
    assert summarise(silent, base).top1 == 0.0


@pytest.mark.parametrize("name", [BF16, "fp8-block", "fp8-per-tensor"])
@pytest.mark.parametrize("seed", range(5))
def test_a_server_of_each_kind_is_told_from_the_others(base: Scores, name: str, seed: int) -> None:
    hypotheses = world(base)
    noise = 0.025 if name == BF16 else 0.1
    served = moved(hypotheses[name].plain, noise, 100 + seed)
    found = judge(served, list(hypotheses.values()))
    assert found.best.name == name
    assert found.best.explains
    assert found.best.ratio == pytest.approx(1, abs=0.15)
    assert not found.rivals
    assert found.by is not None
    assert found.by > 1.3
    assert found.sigmas is not None
    assert found.sigmas > likelihood.APART


def test_the_order_of_hypotheses_decides_nothing(base: Scores) -> None:
    hypotheses = list(world(base).values())
    served = moved(hypotheses[1].plain, 0.1, 9)
    assert judge(served, hypotheses) == judge(served, hypotheses[::-1])


def test_what_lies_within_noise_is_not_told_apart(base: Scores) -> None:
    # FP8 moves this model by a hundredth of what its arithmetic scatters.
    hypotheses = world(base, apart=0.001, noise=0.1)
    found = judge(moved(base, 0.1, 9), list(hypotheses.values()))
    assert {found.best.name, *found.rivals} == set(hypotheses)


def test_noise_of_the_servers_own_widens_what_is_explained(base: Scores) -> None:
    hypotheses = list(world(base).values())
    served = moved(hypotheses[1].plain, 0.3, 9)
    assert not judge(served, hypotheses).best.explains
    assert judge(served, hypotheses, own_noise=0.25).best.explains


def test_another_model_is_beyond_all_and_a_little_more_noise_is_not(base: Scores) -> None:
    hypotheses = list(world(base).values())
    found = judge(unrelated(base), hypotheses)
    assert not found.best.explains
    assert found.beyond
    found = judge(moved(hypotheses[1].plain, 0.2, 9), hypotheses)
    assert not found.best.explains
    assert not found.beyond


def test_a_known_fault_does_not_widen_what_fp8_may_do(base: Scores) -> None:
    fault = Hypothesis("unscaled", unrelated(base), moved(unrelated(base), 5.0, 6), sound=False)
    sound = list(world(base).values())
    served = moved(base, 1.0, 9)
    assert judge(served, sound).beyond
    assert judge(served, [*sound, fault]).beyond
    assert not judge(served, [*sound, replace(fault, sound=True)]).beyond, "the control"


def test_a_shallow_model_that_follows_the_rounding_is_nearer_to_the_engines_way(
    base: Scores,
) -> None:
    hypotheses = world(base)
    served = moved(hypotheses["fp8-block"].engine, 0.01, 9)
    found = judge(served, list(hypotheses.values()))
    assert (found.best.name, found.best.nearer) == ("fp8-block", "engine")
    served = moved(hypotheses["fp8-block"].plain, 0.1, 9)
    assert judge(served, list(hypotheses.values())).best.nearer == "plain"


def test_what_is_no_number_is_as_far_as_can_be(base: Scores) -> None:
    broken = replace(base, logprobs=((math.nan,) * LENGTH, *base.logprobs[1:]))
    assert broken.not_finite == LENGTH
    found = summarise(broken, base)
    assert found.mean_abs > 100
    assert all(math.isfinite(v) for v in (found.mean_abs, found.p99_abs, found.k3_kl))


@given(
    st.lists(st.floats(min_value=0.01, max_value=9), min_size=3, max_size=30),
    st.integers(min_value=0),
)
def test_standard_errors_change_sign_with_the_sides_and_not_with_the_unit(
    near: list[float], seed: int
) -> None:
    random_ = random.Random(seed)
    far = [value + random_.random() for value in near]
    forth, back = sigmas(near, far), sigmas(far, near)
    assert forth == -back
    scaled = sigmas([8 * value for value in near], [8 * value for value in far])
    assert scaled == pytest.approx(forth)


def test_standard_errors_where_there_is_no_scatter() -> None:
    assert sigmas([1.0, 2.0], [1.0, 2.0]) == 0.0
    assert sigmas([1.0, 2.0], [2.0, 3.0]) == math.inf
    assert sigmas([1.0], [2.0]) == 0.0, "one text proves nothing"


def test_an_unrelated_model_has_the_same_numbers_elsewhere(base: Scores) -> None:
    other = unrelated(base)
    assert sorted(other.logprobs) == sorted(base.logprobs)
    assert summarise(other, base).mean_abs > 1
    ragged = scores([[-1.0, -2.0, -3.0], [-4.0], [-5.0, -6.0]])
    assert [len(t) for t in unrelated(ragged).logprobs] == [3, 1, 2]


def test_every_token_is_in_one_bar(base: Scores) -> None:
    other = moved(base, 0.1, 1)
    found = likelihood.histogram(other, {"a": base, "b": moved(base, 9.0, 2)})
    edges, counts = found["edges"], found["counts"]
    assert isinstance(edges, list)
    assert isinstance(counts, dict)
    assert edges == sorted(edges)
    assert len(edges) == likelihood.BARS + 1
    assert [sum(bars) for bars in counts.values()] == [TEXTS * LENGTH] * 2
    middle = counts["a"][likelihood.BARS // 2 - 2 : likelihood.BARS // 2 + 2]
    assert sum(middle) > 0.9 * TEXTS * LENGTH, "the control: small differences are in the middle"
