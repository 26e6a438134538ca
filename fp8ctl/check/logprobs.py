"""The third level: does a server say what FP8 weights of this model say?

From outside, on any vLLM or SGLang server: prompt log-probabilities of fixed texts, laid
beside what the model says here in BF16 and in fake-quantised FP8 (`hypotheses`), or beside
what another server said (`recording`). It sees what changes numbers by more than FP8's own
noise; one wrong code it does not see, and says so by saying no more than it knows.
Called by `command`.
"""

from __future__ import annotations

import http.client
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fp8ctl import gate, interpreter, wire
from fp8ctl.check import likelihood, recording, texts
from fp8ctl.check.conclusion import RECORDED, Conclusion, compare, conclude
from fp8ctl.check.hypotheses import expect, expect_more
from fp8ctl.check.likelihood import BF16, BROKEN, Hypothesis
from fp8ctl.check.prompts import Prompts, Scores
from fp8ctl.errors import UnsupportedError, UsageError
from fp8ctl.manifest import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fp8ctl.check.hypotheses import Expected
    from fp8ctl.check.prompts import Ids
    from fp8ctl.check.recording import Recording
    from fp8ctl.render import Reporter

REPEATED: Final = 3
"""Texts that are asked a second time, one by one: the server's own noise."""

CLEAR: Final = 1.25
"""Times its noise beyond which rarer explanations are looked for before the nearest counts."""

_LIMIT: Final = 256 << 20


@dataclass(slots=True)
class _Seen:
    """What is known of a server so far."""

    ids: Ids
    scores: Scores
    noise: float
    hypotheses: list[Hypothesis] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)


def verify(
    url: str,
    model: str | None,
    report: Reporter,
    api_key: str | None,
    *,
    plan: Plan | None = None,
    against: Path | None = None,
    record: Path | None = None,
) -> dict[str, object]:
    """Compare what a server says of fixed texts with what it should.

    Args:
        url: address of the server.
        model: source checkpoint, in 16 bits; None takes the plan's, or that of the server's own
            plan; with `against` none is needed.
        report: where to show progress and the hypotheses.
        api_key: sent as a Bearer token.
        plan: how the server's weights were made; None: any FP8 will do.
        against: a recording of another server to compare with.
        record: where to write what this server says.

    Returns:
        JSON with `result`, `verdict` (None where nothing is proven), `message`, `hypotheses`,
        `fits`, `by`, `sigmas`, `rivals`, `histogram`, `separation`, `noise`, `not_finite`,
        `tokens`, `texts`, and, where an expectation was computed, `model` and `peak_memory`.

    Raises:
        CheckFailedError: the server does not answer.
        NotFoundError: the model, the recording or an interpreter is not there.
        NotPermittedError: the recording cannot be written.
        UsageError: `against` is no recording.
    """
    url = url.rstrip("/")
    recorded = recording.read(against) if against is not None else None
    try:
        with Prompts(url, api_key) as prompts:
            return _verify(prompts, url, model, report, api_key, plan, recorded, record)
    except UnsupportedError as e:
        report.data(f"logprobs: not visible: {e.message}")
        return _nothing(e.message)


def _verify(
    prompts: Prompts,
    url: str,
    model: str | None,
    report: Reporter,
    api_key: str | None,
    plan: Plan | None,
    recorded: Recording | None,
    record: Path | None,
) -> dict[str, object]:
    if plan is None and recorded is None:
        plan = _plan_of(url, api_key)
    folder = _folder(model, plan, recorded, report)
    expected: Expected | None = None
    why = ""
    if folder is not None:
        try:
            known = None if recorded is None else recorded.ids
            expected = expect(folder, prompts.engine, report, plan, known, url)
        except UnsupportedError as e:
            if recorded is None and record is None:
                raise
            why = e.message
    elif recorded is None and record is None:
        raise UnsupportedError(
            "nothing to compare with: no --model, no --against, and no plan of the server with"
            " a model on this machine"
        )
    seen = _ask(prompts, _ids(prompts, expected, recorded))
    if expected is not None and folder is not None:
        seen.hypotheses = expected.hypotheses
        seen.facts = {"model": str(folder), "peak_memory": expected.peak_memory}
        if not seen.scores.not_finite:
            first = likelihood.judge(seen.scores, seen.hypotheses, seen.noise)
            if first.best.ratio > CLEAR:
                more = expect_more(
                    folder, prompts.engine, report, plan, seen.ids, url, faults=first.beyond
                )
                seen.hypotheses = [*seen.hypotheses, *more.hypotheses]
    data = _tell(report, seen, plan, recorded, why)
    if record is not None:
        _recording(prompts, seen, data).write(record)
        report.data(f"logprobs: recorded in {record}")
        data["recorded"] = True
    return data


def _ids(prompts: Prompts, expected: Expected | None, recorded: Recording | None) -> Ids:
    if expected is not None:
        return expected.ids
    if recorded is not None:
        return recorded.ids
    return prompts.tokenise(texts.TEXTS, texts.CAP)


def _ask(prompts: Prompts, ids: Ids) -> _Seen:
    scores = prompts.score(ids)
    few = ids[:REPEATED]
    again = prompts.score(few, batch=1)
    before = Scores(scores.logprobs[: len(few)], scores.top[: len(few)])
    finite = not (before.not_finite or again.not_finite)
    noise = likelihood.summarise(before, again).mean_abs if finite else 0.0
    return _Seen(ids, scores, noise)


def _folder(
    model: str | None, plan: Plan | None, recorded: Recording | None, report: Reporter
) -> Path | None:
    """Return the source to compute from; None where there is none to be had."""
    if model is not None:
        return interpreter.resolve_model(report, model)
    if plan is not None and recorded is None and plan.model.is_dir():
        return plan.model
    return None


def _plan_of(url: str, api_key: str | None) -> Plan | None:
    """Return the plan that a server of fp8ctl tells, None of any other."""
    try:
        status, body = gate.get(url, wire.PLAN, api_key, 30.0, _LIMIT)
        document = json.loads(body)["manifest"] if status == 200 else None
        return Plan.from_json(document) if document else None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, UsageError):
        return None


# --- what is told ---------------------------------------------------------------------------------


def _tell(
    report: Reporter, seen: _Seen, plan: Plan | None, recorded: Recording | None, why: str
) -> dict[str, object]:
    shown: dict[str, Mapping[str, object]] = {}
    judgement = None
    conclusion = Conclusion("ok", None, None, "recorded; nothing was compared")
    if why:
        conclusion = Conclusion("not visible", None, None, why)
    plain = {one.name: one.plain for one in seen.hypotheses}
    if seen.hypotheses:
        judgement = likelihood.judge(seen.scores, seen.hypotheses, seen.noise)
        shown = {one.name: one.to_json() for one in judgement.fits}
        conclusion = conclude(judgement, plan, seen.scores.not_finite)
    if recorded is not None:
        plain[RECORDED] = recorded.scores
        shown[RECORDED] = likelihood.summarise(seen.scores, recorded.scores).to_json()
        compared = compare(recorded, seen.scores, seen.noise)
        if not seen.hypotheses or (conclusion.result != "failed" and compared.result == "failed"):
            conclusion = compared
    if plain:
        first = plain.get(BF16) or next(iter(plain.values()))
        other = likelihood.unrelated(first)
        shown[BROKEN] = likelihood.summarise(seen.scores, other).to_json()
        rows = [
            [name, *(f"{one[key]:.4f}" for key in ("mean_abs", "p99_abs", "k3_kl", "top1"))]
            for name, one in shown.items()
        ]
        columns = ("hypothesis", "mean |d|", "p99 |d|", "k3 KL", "top-1")
        report.table(columns, rows)
    verdict = f", verdict: {conclusion.verdict}" if conclusion.verdict else ""
    report.data(f"logprobs: {conclusion.result}{verdict}: {conclusion.message}")
    return {
        "result": conclusion.result,
        "verdict": conclusion.verdict,
        "message": conclusion.message,
        "hypotheses": shown,
        "fits": conclusion.fits,
        "by": None if judgement is None else judgement.by,
        "sigmas": _finite(None if judgement is None else judgement.sigmas),
        "rivals": [] if judgement is None else list(judgement.rivals),
        "histogram": likelihood.histogram(seen.scores, plain) if plain else None,
        "separation": _separation(seen.hypotheses),
        "noise": seen.noise,
        "not_finite": seen.scores.not_finite,
        "tokens": seen.scores.tokens,
        "texts": len(seen.ids),
        **seen.facts,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _separation(hypotheses: Sequence[Hypothesis]) -> dict[str, dict[str, float]]:
    """Return how far hypotheses are from each other, mean |difference|."""
    return {
        one.name: {
            other.name: likelihood.summarise(one.plain, other.plain).mean_abs
            for other in hypotheses
            if other is not one
        }
        for one in hypotheses
    }


def _recording(prompts: Prompts, seen: _Seen, data: Mapping[str, Any]) -> Recording:
    return recording.Recording(
        texts=texts.VERSION,
        model=prompts.model,
        engine=f"{prompts.engine} {prompts.find_version()}",
        recorded=recording.now(),
        noise=seen.noise,
        fits=data["fits"],
        verdict=data["verdict"],
        apart=_apart(seen.hypotheses),
        ids=seen.ids,
        scores=seen.scores,
    )


def _apart(hypotheses: Sequence[Hypothesis]) -> float | None:
    """Return how far the nearest FP8 is from BF16."""
    base = next((one.plain for one in hypotheses if one.name == BF16), None)
    others = [one.plain for one in hypotheses if one.name != BF16]
    if base is None or not others:
        return None
    return min(likelihood.summarise(one, base).mean_abs for one in others)


def _nothing(why: str) -> dict[str, object]:
    return {
        "result": "not visible",
        "verdict": None,
        "message": why,
        "hypotheses": {},
        "fits": None,
        "by": None,
        "sigmas": None,
        "rivals": [],
        "histogram": None,
        "separation": {},
        "noise": None,
        "not_finite": 0,
        "tokens": 0,
        "texts": 0,
    }
