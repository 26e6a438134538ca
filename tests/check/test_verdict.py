"""How the levels become one verdict: a bad word wins, the most telling of several."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from fp8ctl.check.verdict import (
    OUTSIDE,
    TELLING,
    VERDICTS,
    Evidence,
    LevelReport,
    Result,
    Verdict,
    as_verdict,
    conclude,
    fault_text,
    found_text,
)

WELL = LevelReport("live", "ok", None, (Evidence("health", "ok", "HTTP 200"),), {})
PROVEN = {"result": "ok", "verdict": "fp8-ok", "message": "all equal"}
FITS = {"result": "ok", "verdict": "fp8-ok", "message": "fp8-block fits"}
HIDDEN = {"result": "not visible", "verdict": None, "message": "no route"}


def bad(word: Verdict | None, message: str = "why") -> dict[str, object]:
    return {"result": "failed", "verdict": word, "message": message}


def live(word: Verdict | None, what: str = "state") -> LevelReport:
    return LevelReport("live", "failed", word, (Evidence(what, "failed", "so", "other"),), {})


def test_every_bad_word_has_its_rank() -> None:
    assert {*TELLING, "fp8-ok"} == set(VERDICTS)
    assert len(TELLING) == len(VERDICTS) - 1


def test_only_the_weights_or_the_log_probabilities_prove_fp8() -> None:
    assert conclude(WELL).verdict is None
    assert conclude(WELL).result == "ok"
    assert conclude(WELL, PROVEN).verdict == "fp8-ok"
    assert conclude(WELL, HIDDEN).verdict is None
    assert conclude(WELL, HIDDEN).result == "not visible"
    assert conclude(WELL, PROVEN, HIDDEN).verdict == "fp8-ok"
    assert conclude(WELL, HIDDEN, HIDDEN).result == "not visible"


def test_what_was_seen_from_outside_only_says_so() -> None:
    assert OUTSIDE in conclude(WELL, HIDDEN, FITS).message
    assert OUTSIDE not in conclude(WELL, PROVEN, FITS).message


def test_over_all_combinations_fp8_ok_is_never_told_beside_a_fault() -> None:
    levels = [None, PROVEN, HIDDEN, {}, *(bad(word) for word in (*TELLING, None))]
    # What a level may say wrongly: a bad word with a good result, words that are none.
    levels += [{"result": "ok", "verdict": "stale"}, {"result": "failed", "verdict": "fp8-ok"}]
    levels += [{"result": "well", "verdict": "fine", "message": "x"}]
    for first, weights, logprobs in itertools.product(
        [WELL, live(None), live("unpushed"), live("bf16-fallback")], levels, levels
    ):
        found = conclude(first, weights, logprobs)
        faulty = [
            one
            for one in (weights, logprobs)
            if one and (one.get("result") == "failed" or one.get("verdict") in TELLING)
        ]
        if faulty or first is not WELL:
            assert found.result == "failed"
        if found.verdict == "fp8-ok" and found.result == "ok":
            assert not faulty
            assert first is WELL
            assert PROVEN in (weights, logprobs)
        assert found.result in get_args(Result)
        assert found.message


@pytest.mark.parametrize(
    ("weights", "logprobs", "word"),
    [
        (bad("wrong-weights"), bad("unscaled"), "unscaled"),
        (bad("router-quantised"), bad("wrong-weights"), "router-quantised"),
        (bad("stale"), bad("bf16-fallback"), "bf16-fallback"),
        (bad(None), bad("stale"), "stale"),
        (PROVEN, bad("wrong-weights"), "wrong-weights"),
    ],
)
def test_of_several_bad_words_the_most_telling_is_told(
    weights: dict[str, object], logprobs: dict[str, object], word: str
) -> None:
    assert conclude(WELL, weights, logprobs).verdict == word


def test_what_the_live_level_says_of_the_server_itself_comes_first() -> None:
    found = conclude(live("unpushed"), bad("wrong-weights"))
    assert (found.verdict, found.message) == ("unpushed", "state: so (expected other)")
    assert conclude(live(None), bad("stale", "layer 3")).message == "layer 3"


def test_other_code_is_why_whatever_else_is_wrong() -> None:
    one = (Evidence("code, rank 0", "failed", "another file"),)
    found = LevelReport("live", "failed", None, one, {}, {"result": "failed"})
    told = conclude(found, bad("wrong-weights", "layer 3"))
    assert (told.verdict, told.message) == ("wrong-weights", "code, rank 0: another file")
    assert conclude(found, PROVEN).result == "failed"
    assert conclude(found, PROVEN).verdict is None


def test_every_level_that_was_asked_for_has_its_line() -> None:
    lines = conclude(WELL, HIDDEN, FITS).evidence
    assert [(one.check, one.result) for one in lines] == [
        ("live", "ok"),
        ("weights", "not visible"),
        ("logprobs", "ok"),
    ]


def test_the_fault_of_a_verdict_is_its_own() -> None:
    evidence = (
        Evidence("health", "failed", "HTTP 503", "200"),
        Evidence("connection", "failed", "refused", "an answer"),
    )
    fault = LevelReport("live", "failed", "unreachable", evidence, {}).fault
    assert fault is not None
    assert fault.check == "connection"
    fault = LevelReport("live", "failed", "unpushed", evidence, {}).fault
    assert fault is not None
    assert fault.check == "health"


def test_a_fault_is_worded_with_what_was_expected_in_one_place() -> None:
    failed = Evidence("chat", "failed", "'Lyon'", "an answer with 'Paris'")
    found = LevelReport("live", "failed", None, (failed,), {})
    assert fault_text(found) == "chat: 'Lyon' (expected an answer with 'Paris')"
    assert found_text(Evidence("chat", "ok", "'Paris'", "an answer")) == "'Paris'"
    gone = Evidence("connection", "failed", "ConnectError: refused", "an answer")
    found = LevelReport("live", "failed", "unreachable", (failed, gone), {})
    assert fault_text(found) == "ConnectError: refused"


@pytest.mark.parametrize("given", [None, "", "ok", "FP8-OK", 3])
def test_a_word_that_is_no_verdict_is_none(given: object) -> None:
    assert as_verdict(given) is None
    assert as_verdict("fp8-ok") == "fp8-ok"
