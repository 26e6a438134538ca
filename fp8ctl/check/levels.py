"""One check: the levels in order, and the document that all of them together are.

What `--json` prints, what the page shows and what the metrics count is this one document.
Called by `command` and `watch`; `supervisor` and `pushing` make theirs of what they saw.
"""

from __future__ import annotations

import os
import platform
import shlex
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from fp8ctl import __version__, gate
from fp8ctl.check import code, live
from fp8ctl.check.verdict import conclude, found_text
from fp8ctl.engines.base import API_KEY_VARIABLE
from fp8ctl.errors import CheckFailedError, Fp8ctlError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fp8ctl.check.verdict import Conclusion, LevelReport
    from fp8ctl.render import Reporter

Level = Literal["live", "weights", "logprobs"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
#: Tasks of the worker whose results depend on the source alone.
OF_THE_SOURCE: Final = ("expect", "logprobs")
#: A shorter key stands in words that are none.
_SHORT_KEY: Final = 4
_HIDDEN: Final = "***"


@dataclass(frozen=True, slots=True)
class Request:
    """What a check is to look at.

    Attributes:
        url: address of the server, without a slash at its end.
        level: the last of the levels.
        model: source checkpoint; None takes that of the server's own plan.
        record: file to write log-probabilities to.
        against: file to compare them with.
    """

    url: str
    level: Level = "live"
    model: str | None = None
    record: Path | None = None
    against: Path | None = None

    def command(self, *more: str) -> str:
        """Return the command line that asks the same again."""
        words = ["fp8ctl", "check", self.url, "--level", self.level]
        for option, value in (
            ("--model", self.model),
            ("--record", self.record),
            ("--against", self.against),
        ):
            words += [] if value is None else [option, str(value)]
        return shlex.join([*words, *more])


@dataclass(frozen=True, slots=True)
class Found:
    """What one check found.

    Attributes:
        live: the first level, as evidence.
        conclusion: the verdict, and why.
        data: the whole document, of JSON types; no API key in it.
    """

    live: LevelReport
    conclusion: Conclusion
    data: dict[str, Any] = field(repr=False)


def parse(text: str, option: str) -> Level:
    """Return a level by its name.

    Args:
        text: as it was typed.
        option: where.

    Raises:
        UsageError: there is no such level.
    """
    level = next((one for one in LEVELS if one == text), None)
    if level is None:
        raise UsageError(
            f"{option} {text!r} is not a level; there is {', '.join(LEVELS[:-1])} and {LEVELS[-1]}",
            hint=f"{option} weights",
        )
    return level


def look(request: Request, report: Reporter) -> Found:
    """Look at a server, level by level.

    Args:
        request: what to look at, and how far.
        report: where to show progress and what was seen.

    Raises:
        Fp8ctlError: as of `further`.
    """
    began = time.time()
    first = live.check(request.url)
    tell(report, first)
    return further(request, report, first, began)


def further(
    request: Request,
    report: Reporter,
    first: LevelReport,
    began: float,
    *,
    api_key: str | None = None,
) -> Found:
    """Look at the levels behind the live one.

    A level that failed does not stop the next, unless that could not run: nobody answers, or
    the server's weights are not there.

    Args:
        request: what to look at, and how far.
        report: where to show progress and what was seen.
        first: what the live level saw.
        began: when that began, in seconds since the epoch.
        api_key: the server's; None takes FP8CTL_API_KEY.

    Raises:
        Fp8ctlError: a level could not be judged at all: no source, no torch, a refusal.
    """
    key = api_key or gate.api_key()
    found: dict[Level, Mapping[str, object]] = {}
    why = _stopped(first)
    for level in LEVELS[1 : LEVELS.index(request.level) + 1]:
        if why:
            found[level] = unseen(level, why)
        else:
            found[level] = _judged(level, request, report, first, found, key)
    return assemble(request, first, found, began, api_key=key)


def assemble(
    request: Request,
    first: LevelReport,
    found: Mapping[Level, Mapping[str, object]],
    began: float | None = None,
    *,
    api_key: str | None = None,
) -> Found:
    """Make the document of what was found.

    Args:
        request: what was looked at.
        first: the live level.
        found: the others that were asked for.
        began: when, in seconds since the epoch; None for now.
        api_key: the server's, which stands nowhere in the document; None takes FP8CTL_API_KEY.
    """
    began = time.time() if began is None else began
    conclusion = conclude(first, found.get("weights"), found.get("logprobs"))
    seconds = round(time.time() - began, 3)
    data: dict[str, Any] = {
        "url": request.url,
        "level": request.level,
        "verdict": conclusion.verdict,
        "message": conclusion.message,
        "evidence": [one.to_json() for one in conclusion.evidence],
        "live": first.to_json(),
        "code": dict(first.code) if first.code is not None else code.judge(None).to_json(),
        "weights": dict(found.get("weights") or {"result": "not visible", "verdict": None}),
        "logprobs": dict(found.get("logprobs") or {"result": "not visible", "verdict": None}),
        "environment": _environment(),
        "commands": _commands(request),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": seconds,
    }
    return Found(first, conclusion, _without(data, api_key or gate.api_key()))


def unseen(level: str, why: str) -> dict[str, object]:
    """Return what a level says that was not looked at."""
    empty: dict[str, object] = {"result": "not visible", "verdict": None, "message": why}
    return empty | ({"counts": {}, "tensors": []} if level == "weights" else {})


def tell(report: Reporter, found: LevelReport) -> None:
    """Print what the live level saw."""
    rows = [[one.check, one.result, found_text(one)] for one in found.evidence]
    report.table(("check", "result", "found"), rows)
    if found.code is not None:
        report.data(f"code: {found.code['result']}, {found.code['message']}")
    if told := code.changed(found.code):
        report.warn(told)


def _stopped(first: LevelReport) -> str:
    """Return why no further level can run; empty where they can."""
    if first.verdict == "unreachable":
        return "the server does not answer"
    server = first.facts.get("server")
    state = server.get("state") if isinstance(server, dict) else None
    return f"the server is {state}" if state not in {None, "ready"} else ""


def _judged(
    level: Level,
    request: Request,
    report: Reporter,
    first: LevelReport,
    found: Mapping[Level, Mapping[str, object]],
    key: str | None,
) -> dict[str, object]:
    """Return what a level says; a server that refuses to be looked at has failed it.

    Raises:
        Fp8ctlError: it cannot be judged from here, and nothing else is wrong with the server.
    """
    try:
        return _ask(level, request, report, key)
    except CheckFailedError as e:
        return unseen(level, e.message) | {"result": "failed"}
    except Fp8ctlError as e:
        if first.result == "ok" and all(one["result"] != "failed" for one in found.values()):
            raise
        return unseen(level, e.message)


def _ask(level: Level, request: Request, report: Reporter, key: str | None) -> dict[str, object]:
    if level == "weights":
        from fp8ctl.check import weights

        return dict(weights.verify(request.url, request.model, report, key))
    from fp8ctl.check import logprobs

    return dict(
        logprobs.verify(
            request.url,
            request.model,
            report,
            key,
            against=request.against,
            record=request.record,
        )
    )


def _environment() -> dict[str, object]:
    """Return what the check itself ran on; whether there was a key, and never which."""
    return {
        "fp8ctl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        API_KEY_VARIABLE: "set" if gate.api_key() else "not set",
    }


def _commands(request: Request) -> list[str]:
    """Return what to type to see the same again, here."""
    home = os.environ.get("FP8CTL_HOME")
    lines = [f"export FP8CTL_HOME={shlex.quote(home)}"] if home else []
    if gate.api_key():
        lines.append(f"read -rs {API_KEY_VARIABLE} && export {API_KEY_VARIABLE}")
    return [*lines, request.command(), request.command("--json")]


def _without(value: Any, key: str | None) -> Any:
    """Return a document in which the API key does not stand, whatever a server answered."""
    if key is None or len(key) < _SHORT_KEY:
        return value
    if isinstance(value, str):
        return value.replace(key, _HIDDEN)
    if isinstance(value, dict):
        return {name: _without(one, key) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without(one, key) for one in value]
    return value
