"""The third level: does a server say what FP8 weights of this model say?

From outside, on any vLLM or SGLang server: prompt log-probabilities of fixed texts, laid
beside what the model says here in BF16 and in fake-quantised FP8 (`expectation`, in an
interpreter with torch and transformers), or beside what another server said (`recording`).
It sees what changes numbers by more than FP8's own noise; one wrong code it does not see,
and says so by saying no more than it knows. Called by `command`.
"""

from __future__ import annotations

import http.client
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp8ctl import gate, interpreter, models, planning, registry, wire
from fp8ctl.check import likelihood, recording, texts
from fp8ctl.check.likelihood import BF16, BROKEN, Hypothesis, Judgement
from fp8ctl.check.prompts import Prompts, Scores
from fp8ctl.check.verdict import as_verdict
from fp8ctl.errors import (
    CheckpointError,
    Fp8ctlError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from fp8ctl.formats import Mode
from fp8ctl.manifest import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.prompts import Ids
    from fp8ctl.check.recording import Recording
    from fp8ctl.check.verdict import Result, Verdict
    from fp8ctl.families import Backend
    from fp8ctl.render import Reporter

RECORDED: Final = "recorded"
_MODES: Final = {mode: f"fp8-{mode.value}" for mode in Mode}
_UNSCALED: Final = "unscaled-"

REPEATED: Final = 3
"""Texts that are asked a second time, one by one: the server's own noise."""

CLEAR: Final = 1.25
"""Times its noise beyond which rarer explanations are looked for before the nearest counts."""

SAME: Final = 2.0
"""Times the two servers' own noise within which one says what the other said."""

HALF: Final = 0.5
"""Share of the way from BF16 to the recorded FP8 within which the same is proven of both, and
share of the distance to BF16 within which dropped scales explain a server."""

FAR: Final = 0.25
"""Share of the way to an unrelated model beyond which no arithmetic explains a difference;
FP8 of any form was seen to go up to 0.1 of it."""

_LIMIT: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What the numbers amount to.

    Attributes:
        result: ok, failed or not visible.
        verdict: the word, None where nothing is proven.
        fits: the hypothesis that fits best; `broken` where none does.
        message: why, in a sentence.
    """

    result: Result
    verdict: Verdict | None
    fits: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What was computed here.

    Attributes:
        ids: of the texts.
        hypotheses: what each would say of them.
        peak_memory: of the worker, in bytes.
    """

    ids: Ids
    hypotheses: list[Hypothesis]
    peak_memory: int


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


# --- expectations ---------------------------------------------------------------------------------


def _plan_of(url: str, api_key: str | None) -> Plan | None:
    """Return the plan that a server of fp8ctl tells, None of any other."""
    try:
        status, body = gate.get(url, wire.PLAN, api_key, 30.0, _LIMIT)
        document = json.loads(body)["manifest"] if status == 200 else None
        return Plan.from_json(document) if document else None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, UsageError):
        return None


def expect(
    folder: Path,
    engine: Backend,
    report: Reporter,
    plan: Plan | None = None,
    ids: Ids | None = None,
    url: str = "",
) -> Expected:
    """Have the worker compute BF16 and both forms of an FP8 checkpoint.

    Args:
        folder: a 16-bit checkpoint.
        engine: whose rules decide what is quantised, where `plan` does not.
        report: shows the progress.
        plan: of one of the forms.
        ids: of the texts; None has them made here.
        url: of a server whose interpreter may be used, if it runs here.

    Raises:
        UnsupportedError: the model cannot be computed here.
    """
    if models.read_config(folder).get("quantization_config"):
        raise UnsupportedError(
            f"{folder} is quantised already: there is no 16-bit source to compare with"
        )
    wanted: dict[str, Any] = {BF16: {"plan": None, "scaled": True}}
    for mode in (Mode.BLOCK, Mode.PER_TENSOR):
        wanted[_MODES[mode]] = _hypothesis(folder, engine, plan, mode)
    return _work(url, folder, wanted, ids, report, "expected log-probabilities")


def expect_more(
    folder: Path,
    engine: Backend,
    report: Reporter,
    plan: Plan | None,
    ids: Ids,
    url: str = "",
    *,
    faults: bool = True,
) -> Expected:
    """Have rarer explanations computed: what engines quantise at start, and known `faults`.

    Args are those of `expect`.
    """
    wanted: dict[str, Any] = {
        _MODES[Mode.PER_CHANNEL]: _hypothesis(folder, engine, plan, Mode.PER_CHANNEL)
    }
    for mode in (Mode.BLOCK, Mode.PER_TENSOR) if faults else ():
        if plan is None or plan.mode is mode:
            one = _hypothesis(folder, engine, plan, mode)
            wanted[_UNSCALED + _MODES[mode]] = one and one | {"scaled": False}
    return _work(url, folder, wanted, ids, report, "more log-probabilities")


def _hypothesis(
    folder: Path, engine: Backend, plan: Plan | None, mode: Mode
) -> dict[str, Any] | None:
    """Return a hypothesis as the worker takes it: the plan's own where it is of this mode."""
    if plan is not None and plan.mode is mode:
        chosen = replace(plan, model=folder)
    else:
        keep, quantize = (plan.keep, plan.quantize) if plan is not None else ((), ())
        try:
            chosen = planning.make_plan(folder, engine, mode, keep=keep, quantize=quantize)
        except CheckpointError:
            raise
        except Fp8ctlError:
            return None
    if mode is Mode.BLOCK and chosen.block is None:
        return None
    return {"plan": chosen.to_json(), "scaled": True}


def _work(
    url: str,
    folder: Path,
    wanted: Mapping[str, Any],
    ids: Ids | None,
    report: Reporter,
    title: str,
) -> Expected:
    records = (registry.read(name) for name in registry.names())
    engine = next((r.python for r in records if r and url and r.url.rstrip("/") == url), None)
    try:
        python = interpreter.torch_python(
            None if engine is None else Path(engine), also=("transformers",)
        )
    except NotFoundError as e:
        raise UnsupportedError(f"no interpreter here can compute it: {e.message}") from e
    arguments: dict[str, Any] = {
        "model": str(folder),
        "texts": list(texts.TEXTS),
        "cap": texts.CAP,
        "hypotheses": {name: one for name, one in wanted.items() if one},
    }
    if ids is not None:
        arguments["ids"] = [list(text) for text in ids]
    told = interpreter.run_worker(python, "logprobs", arguments, report, title)
    hypotheses = [
        Hypothesis(
            name,
            _scores(both["plain"]),
            _scores(both["engine"]),
            sound=not name.startswith(_UNSCALED),
        )
        for name, both in told["expected"].items()
    ]
    return Expected(tuple(map(tuple, told["ids"])), hypotheses, int(told["peak_memory"]))


def _scores(told: Mapping[str, Any]) -> Scores:
    return Scores(tuple(map(tuple, told["logprobs"])), tuple(map(tuple, told["top"])))


# --- conclusions ----------------------------------------------------------------------------------


def conclude(judgement: Judgement, plan: Plan | None, not_finite: int = 0) -> Conclusion:
    """Say what hypotheses about a server amount to. Pure.

    Args:
        judgement: of the hypotheses.
        plan: how its weights were made, where that is known.
        not_finite: log-probabilities that are no numbers.
    """
    best, rivals = judgement.best, judgement.rivals
    if not_finite:
        message = f"{not_finite} of {best.summary.tokens} log-probabilities are no finite numbers"
        return Conclusion("failed", "wrong-weights", BROKEN, message)
    planned = _MODES[plan.mode] if plan is not None else None
    near = f"{best.name} is {best.ratio:.2g} times its noise away ({_away(best)})"
    if best.name.startswith(_UNSCALED) and best.explains and _sure(judgement):
        message = f"codes without their scales explain what the server says: {near}"
        return Conclusion("failed", "unscaled", best.name, message)
    if not best.explains or best.name.startswith(_UNSCALED):
        if judgement.beyond or best.name.startswith(_UNSCALED):
            message = f"nothing explains what the server says: the nearest, {near}"
            return Conclusion("failed", "wrong-weights", BROKEN, message)
        if planned is not None:
            message = f"not the weights of its plan, {planned}: the nearest, {near}"
            return Conclusion("failed", "wrong-weights", BROKEN, message)
        message = f"the nearest, {near}: FP8 of another kind, or a fault of its size"
        return Conclusion("not visible", None, None, message)
    names = {best.name, *rivals}
    if BF16 in names and len(names) > 1:
        message = (
            f"{' and '.join(sorted(names))} cannot be told apart here: the server is"
            f" {_away(best)} from {best.name}, with noise of {best.noise:.2g}"
        )
        return Conclusion("not visible", None, best.name, message)
    margin = f", {judgement.by:.2f} times nearer than the next" if judgement.by else ""
    if best.name == BF16:
        message = f"the server says what 16-bit weights say: {_away(best)}{margin}"
        return Conclusion("failed", "bf16-fallback", BF16, message)
    if planned is not None and planned not in names:
        message = f"the server says what {best.name} says, and its plan is {planned}: {near}"
        return Conclusion("failed", "wrong-weights", best.name, message)
    others = sorted(names - {best.name})
    beside = f"; {' and '.join(others)} cannot be told from it" if others else ""
    unseen = f"; a fault below its noise of {best.noise:.2g} is not visible"
    message = f"as seen from outside, {best.name}: {_away(best)}{margin}{beside}{unseen}"
    return Conclusion("ok", "fp8-ok", best.name, message)


def _sure(judgement: Judgement) -> bool:
    """Whether dropped scales say more than "garbage": what scatters widely explains anything."""
    [base] = [fit for fit in judgement.fits if fit.name == BF16]
    best = judgement.best.summary
    return best.mean_abs <= HALF * base.summary.mean_abs and best.top1 >= HALF


def compare(recorded: Recording, scores: Scores, noise: float) -> Conclusion:
    """Say whether a server says what another one said. Pure.

    Args:
        recorded: what the other one said.
        scores: what this one says of the same ids.
        noise: by how much it differs from itself.
    """
    summary = likelihood.summarise(scores, recorded.scores)
    if scores.not_finite and not recorded.scores.not_finite:
        message = f"{scores.not_finite} of {summary.tokens} log-probabilities are no finite numbers"
        return Conclusion("failed", "wrong-weights", BROKEN, message)
    own = max(noise, recorded.noise, likelihood.FLOOR)
    far = likelihood.summarise(scores, likelihood.unrelated(recorded.scores)).mean_abs
    other = f"{recorded.model} of {recorded.engine}, recorded {recorded.recorded}"
    away = f"mean |difference| {summary.mean_abs:.3g}"
    if summary.mean_abs <= SAME * own:
        if recorded.verdict is None or recorded.apart is None:
            message = f"the server says what {other} said, of which nothing was proven: {away}"
            return Conclusion("ok", None, RECORDED, message)
        if summary.mean_abs > HALF * recorded.apart:
            message = f"noise hides whether the server is as {other}: {away}"
            return Conclusion("not visible", None, RECORDED, message)
        # What was proven of that server then holds of this one, which says the same.
        message = f"the server says what {other} said, which was {recorded.verdict}: {away}"
        result: Result = "ok" if recorded.verdict == "fp8-ok" else "failed"
        return Conclusion(result, as_verdict(recorded.verdict), RECORDED, message)
    if summary.mean_abs > FAR * far:
        message = f"not the model that was recorded ({other}): {away}, {far:.3g} of another model"
        return Conclusion("failed", "wrong-weights", BROKEN, message)
    message = f"it differs from {other} as FP8 from BF16, or one FP8 from another, may: {away}"
    return Conclusion("not visible", None, RECORDED, message)


def _away(fit: likelihood.Fit) -> str:
    return f"mean |difference| {fit.summary.mean_abs:.3g}"


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
