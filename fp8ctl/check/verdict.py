"""The words of a verdict, and what each rests on. Pure.

Called by the levels (`live`, `weights`) and by `command`. A level that a
server does not let us see is `not visible`, never ok.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

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


def as_verdict(word: object) -> Verdict | None:
    """Return a word of a verdict as such, None for anything else."""
    return next((verdict for verdict in VERDICTS if verdict == word), None)
