"""What hypotheses about a server amount to, in a word; and what a recording does.

The numbers of a real engine are tests/e2e/test_logprobs.py's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fp8ctl.check import conclusion
from fp8ctl.check.likelihood import BF16, BROKEN, Fit, Judgement, Summary
from fp8ctl.check.prompts import Scores
from fp8ctl.check.recording import Recording
from fp8ctl.check.verdict import VERDICTS
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.manifest import Plan

BLOCK, TENSOR, CHANNEL = "fp8-block", "fp8-per-tensor", "fp8-per-channel"


def plan(mode: Mode = Mode.BLOCK) -> Plan:
    block = BlockSize(128, 128) if mode is Mode.BLOCK else None
    return Plan(Path("/m"), "llama", "Llama", None, mode, 1, block, ())


def fit(name: str, ratio: float, noise: float = 0.1) -> Fit:
    return Fit(name, Summary(ratio * noise, 1.0, 0.1, 0.9, 1000), "plain", noise, (ratio * noise,))


def judgement(*fits: Fit, rivals: tuple[str, ...] = (), reach: float = 0.25) -> Judgement:
    return Judgement(fits, rivals, 9.0, reach)


RIGHT = judgement(fit(BLOCK, 1.0), fit(BF16, 5.0, 0.03))


@pytest.mark.parametrize(
    ("found", "planned", "result", "verdict", "fits"),
    [
        pytest.param(RIGHT, None, "ok", "fp8-ok", BLOCK, id="FP8"),
        pytest.param(RIGHT, Mode.BLOCK, "ok", "fp8-ok", BLOCK, id="as planned"),
        pytest.param(
            RIGHT, Mode.PER_TENSOR, "failed", "wrong-weights", BLOCK, id="another FP8 than planned"
        ),
        pytest.param(
            judgement(fit(TENSOR, 1.0), fit(BLOCK, 1.1), rivals=(BLOCK,)),
            Mode.BLOCK,
            *("ok", "fp8-ok", TENSOR),
            id="perhaps another FP8 than planned",
        ),
        pytest.param(
            judgement(fit(BF16, 1.0), fit(BLOCK, 2.0)),
            None,
            *("failed", "bf16-fallback", BF16),
            id="16 bits",
        ),
        pytest.param(
            judgement(fit(BF16, 1.0), fit(BLOCK, 1.0), rivals=(BLOCK,)),
            None,
            *("not visible", None, BF16),
            id="16 bits or FP8",
        ),
        pytest.param(
            judgement(fit(BLOCK, 1.0), fit(BF16, 1.0), rivals=(BF16,)),
            Mode.BLOCK,
            *("not visible", None, BLOCK),
            id="FP8 or 16 bits, whatever is planned",
        ),
        pytest.param(
            judgement(fit(BLOCK, 20.0), fit(BF16, 80.0)),
            None,
            *("failed", "wrong-weights", BROKEN),
            id="nothing",
        ),
        pytest.param(
            judgement(fit(BLOCK, 1.8), fit(BF16, 9.0)),
            None,
            *("not visible", None, None),
            id="a little off, and nobody knows what it should be",
        ),
        pytest.param(
            judgement(fit(BLOCK, 1.8), fit(BF16, 9.0)),
            Mode.BLOCK,
            *("failed", "wrong-weights", BROKEN),
            id="a little off what it should be",
        ),
        pytest.param(
            judgement(fit("unscaled-fp8-block", 1.0), fit(BF16, 90.0)),
            Mode.BLOCK,
            *("failed", "unscaled", "unscaled-fp8-block"),
            id="scales dropped",
        ),
        pytest.param(
            judgement(fit("unscaled-fp8-block", 1.0, 6.0), fit(BF16, 100.0)),
            Mode.BLOCK,
            *("failed", "wrong-weights", BROKEN),
            id="garbage, and dropped scales scatter enough to explain it",
        ),
        pytest.param(
            judgement(fit(CHANNEL, 1.0), fit(BF16, 5.0)),
            None,
            *("ok", "fp8-ok", CHANNEL),
            id="quantised by the engine",
        ),
    ],
)
def test_the_word_for_what_fits(
    found: Judgement, planned: Mode | None, result: str, verdict: str | None, fits: str | None
) -> None:
    told = conclusion.conclude(found, None if planned is None else plan(planned))
    assert (told.result, told.verdict, told.fits) == (result, verdict, fits), told.message
    assert told.verdict is None or told.verdict in VERDICTS


def test_ok_is_never_said_without_the_word_that_it_was_seen_from_outside() -> None:
    message = conclusion.conclude(RIGHT, None).message
    assert "as seen from outside" in message
    assert "a fault below its noise of 0.1 is not visible" in message


def test_a_number_that_is_none_is_wrong_whatever_fits() -> None:
    told = conclusion.conclude(RIGHT, plan(), not_finite=3)
    assert (told.result, told.verdict, told.fits) == ("failed", "wrong-weights", BROKEN)
    assert "3 of 1000" in told.message


# --- recordings -----------------------------------------------------------------------------------

IDS = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
SCORES = Scores(((-1.0, -9.0), (-4.0, -2.0), (-7.0, -0.5)), ((2, 3), (5, 6), (8, 9)))
RECORDED = Recording(1, "m", "vllm 0.9.1", "2026", 0.01, BLOCK, "fp8-ok", 0.3, IDS, SCORES)


def shifted(by: float) -> Scores:
    return replace(SCORES, logprobs=tuple(tuple(v - by for v in t) for t in SCORES.logprobs))


@pytest.mark.parametrize(
    ("by", "result", "verdict"),
    [(0.0, "ok", "fp8-ok"), (0.019, "ok", "fp8-ok"), (0.1, "not visible", None),
     (4.0, "failed", "wrong-weights")],
)  # fmt: skip
def test_as_another_server_or_not(by: float, result: str, verdict: str | None) -> None:
    told = conclusion.compare(RECORDED, shifted(by), 0.0)
    assert (told.result, told.verdict) == (result, verdict), told.message


def test_noise_of_either_server_widens_what_is_the_same() -> None:
    assert conclusion.compare(RECORDED, shifted(0.1), 0.0).result == "not visible"
    assert conclusion.compare(RECORDED, shifted(0.1), 0.06).result == "ok"
    assert conclusion.compare(replace(RECORDED, noise=0.06), shifted(0.1), 0.0).result == "ok"


def test_the_same_as_a_server_of_which_nothing_was_proven_proves_nothing() -> None:
    told = conclusion.compare(replace(RECORDED, verdict=None, apart=None), SCORES, 0.0)
    assert (told.result, told.verdict) == ("ok", None)


def test_the_same_as_a_bad_server_is_as_bad() -> None:
    told = conclusion.compare(replace(RECORDED, verdict="bf16-fallback"), SCORES, 0.0)
    assert (told.result, told.verdict) == ("failed", "bf16-fallback")


def test_noise_as_large_as_what_fp8_does_proves_nothing() -> None:
    # Within the servers' noise of an FP8 server, and as far from it as one in 16 bits is.
    assert conclusion.compare(RECORDED, shifted(0.14), 0.1).verdict == "fp8-ok"
    told = conclusion.compare(RECORDED, shifted(0.16), 0.1)
    assert (told.result, told.verdict) == ("not visible", None)


def test_numbers_that_only_the_other_one_had_are_missed() -> None:
    silent = replace(SCORES, logprobs=((float("nan"), -9.0), *SCORES.logprobs[1:]))
    told = conclusion.compare(RECORDED, silent, 0.0)
    assert (told.result, told.verdict) == ("failed", "wrong-weights")
    assert "1 of 6" in told.message
