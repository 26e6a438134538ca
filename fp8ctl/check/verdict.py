"""The words of a verdict, what each rests on, and how levels become one. Pure.

Called by the levels (`live`, `weights`, `logprobs`) and by `levels`. A level that a
server does not let us see is `not visible`, never ok.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

Verdict = Literal[
    "fp8-ok",
    "bf16-fallback",
    "unscaled",
    "stale",
    "wrong-weights",
    "router-quantised",
    "unpushed",
    "unreachable",
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

Result = Literal["ok", "failed", "not visible"]

#: Of several bad words the first of these is told: the others follow from it, or say less.
TELLING: Final[tuple[Verdict, ...]] = (
    "unreachable",
    "unpushed",
    "router-quantised",
    "bf16-fallback",
    "unscaled",
    "stale",
    "wrong-weights",
)
OUTSIDE: Final = "seen from outside only: the weights level is not visible"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that was looked at.

    Attributes:
        check: what, in a word or two.
        result: ok, failed, or not visible.
        found: what was there.
        expected: what should have been; empty where any value will do.
    """

    check: str
    result: Result
    found: str
    expected: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the evidence as JSON types."""
        return {
            "check": self.check,
            "result": self.result,
            "found": self.found,
            "expected": self.expected,
        }


@dataclass(frozen=True, slots=True)
class LevelReport:
    """What one level saw.

    Attributes:
        level: live, weights or logprobs.
        result: ok only where everything that was looked at is ok, and something was.
        verdict: the word that this level can answer for; None where it proves none.
        evidence: in the order in which it was gathered.
        facts: what the server told of itself, for programs.
        code: which code its processes run, for programs; None where that was not looked at.
    """

    level: str
    result: Result
    verdict: Verdict | None
    evidence: tuple[Evidence, ...]
    facts: Mapping[str, object]
    code: Mapping[str, object] | None = None

    @property
    def other_code(self) -> bool:
        """Whether a process of the server runs other code than it should."""
        return self.code is not None and self.code["result"] == "failed"

    @property
    def fault(self) -> Evidence | None:
        """What the verdict rests on, else the first thing that failed; None where nothing did."""
        failed = [one for one in self.evidence if one.result == "failed"]
        if self.other_code:  # it may be why anything else is as it is
            return next(one for one in failed if one.check.startswith("code"))
        if self.verdict == "unreachable":
            # It may have answered something before it fell silent.
            return failed[-1]
        return failed[0] if failed else None

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON types."""
        return {
            "level": self.level,
            "result": self.result,
            "verdict": self.verdict,
            "evidence": [one.to_json() for one in self.evidence],
            "facts": dict(self.facts),
        }


def not_visible(level: str, why: str) -> LevelReport:
    """Return the report of a level that was not, or could not be, looked at."""
    return LevelReport(level, "not visible", None, (Evidence(level, "not visible", why),), {})


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What all levels together say.

    Attributes:
        result: of the check; `not visible` where nothing is wrong and nothing proven.
        verdict: the one word; None where none fits.
        message: what it rests on.
        evidence: one line a level that was asked for.
    """

    result: Result
    verdict: Verdict | None
    message: str
    evidence: tuple[Evidence, ...]


def conclude(
    live: LevelReport,
    weights: Mapping[str, object] | None = None,
    logprobs: Mapping[str, object] | None = None,
) -> Conclusion:
    """Make one verdict of the levels that were asked for.

    A bad word wins over a good one, the most telling of several. `fp8-ok` needs the weights
    level; where that is not visible, log-probabilities may prove it, and the message says so.

    Args:
        live: what the live level saw.
        weights: what `weights.verify` says; None where it was not asked for.
        logprobs: what `logprobs.verify` says; None where it was not asked for.
    """
    lines = [Evidence("live", live.result, _live_text(live))]
    words: list[Verdict | None] = [live.verdict]
    for name, told in (("weights", weights), ("logprobs", logprobs)):
        if told is not None:
            lines.append(_line(name, told))
            words.append(as_verdict(told.get("verdict")))
    bad = [i for i, line in enumerate(lines) if line.result == "failed"]
    evidence = tuple(lines)
    if bad:
        worst = min(bad, key=lambda i: _rank(words[i]))
        # Other code than at the launch may be why anything else is as it is.
        why = lines[0 if live.other_code else worst].found
        return Conclusion("failed", words[worst], why, evidence)
    for i, line in enumerate(lines):
        if words[i] == "fp8-ok" and line.check == "weights":
            return Conclusion("ok", "fp8-ok", line.found, evidence)
    for i, line in enumerate(lines):
        if words[i] == "fp8-ok" and line.check == "logprobs":
            return Conclusion("ok", "fp8-ok", f"{line.found}; {OUTSIDE}", evidence)
    if len(lines) == 1:
        return Conclusion("ok", None, "the live level proves no FP8", evidence)
    return Conclusion(
        "not visible", None, "; ".join(dict.fromkeys(x.found for x in lines[1:])), evidence
    )


def fault_text(found: LevelReport) -> str:
    """Return what the live level failed on, in a few words: the one place that words it."""
    fault = found.fault
    if fault is None:
        return "something is wrong"
    if found.verdict == "unreachable":
        return fault.found
    return f"{fault.check}: {found_text(fault)}"


def found_text(one: Evidence) -> str:
    """Return what was found, and where that is a fault what should have been."""
    wanted = f" (expected {one.expected})" if one.result == "failed" and one.expected else ""
    return one.found + wanted


def _live_text(live: LevelReport) -> str:
    return fault_text(live) if live.result == "failed" else "it answers, and with sense"


def _line(name: str, told: Mapping[str, object]) -> Evidence:
    """Return a level's line; what is no result, or a bad word with a good one, is a failure."""
    word = as_verdict(told.get("verdict"))
    results: tuple[Result, ...] = get_args(Result)
    result = next((one for one in results if one == told.get("result")), None)
    if result is None:
        result = "ok" if word == "fp8-ok" else "failed" if word else "not visible"
    if word is not None and word != "fp8-ok":
        result = "failed"
    return Evidence(name, result, str(told.get("message") or "it gives no reason"))


def _rank(word: Verdict | None) -> int:
    return TELLING.index(word) if word in TELLING else len(TELLING)


def as_verdict(word: object) -> Verdict | None:
    """Return a word of a verdict as such, None for anything else."""
    return next((verdict for verdict in VERDICTS if verdict == word), None)
