"""What the numbers of the third level amount to, in a word. Pure; called by `logprobs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fp8ctl.check import likelihood
from fp8ctl.check.likelihood import BF16, BROKEN, FP8, UNSCALED
from fp8ctl.check.verdict import as_verdict

if TYPE_CHECKING:
    from fp8ctl.check.likelihood import Judgement
    from fp8ctl.check.prompts import Scores
    from fp8ctl.check.recording import Recording
    from fp8ctl.check.verdict import Result, Verdict
    from fp8ctl.manifest import Plan

RECORDED: Final = "recorded"

SAME: Final = 2.0
"""Times the two servers' own noise within which one says what the other said."""

HALF: Final = 0.5
"""Share of the way from BF16 to the recorded FP8 within which the same is proven of both, and
share of the distance to BF16 within which dropped scales explain a server."""

FAR: Final = 0.25
"""Share of the way to an unrelated model beyond which no arithmetic explains a difference;
FP8 of any form was seen to go up to 0.1 of it."""


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
    planned = FP8[plan.mode] if plan is not None else None
    near = f"{best.name} is {best.ratio:.2g} times its noise away ({_away(best)})"
    if best.name.startswith(UNSCALED) and best.explains and _sure(judgement):
        message = f"codes without their scales explain what the server says: {near}"
        return Conclusion("failed", "unscaled", best.name, message)
    if not best.explains or best.name.startswith(UNSCALED):
        if judgement.beyond or best.name.startswith(UNSCALED):
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
