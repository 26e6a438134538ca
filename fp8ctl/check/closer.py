"""A closer look at tensors that differ: where, how many, like what.

The workers are asked for more of them, and `fp8ctl.difference` or `fp8ctl.online` reads it beside
the source. Bounded: a few tensors, and a few megabytes. Called by `weights`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fp8ctl import interpreter
from fp8ctl.check import asking
from fp8ctl.errors import Fp8ctlError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.comparison import Task
    from fp8ctl.check.tensors import Line
    from fp8ctl.render import Reporter

#: How many tensors that differ are looked at closely, and bytes of values of each part.
_CLOSELY, _VALUES = 8, 4 << 20
#: Of weights that the engine quantised itself all that differ are, up to so many.
_ONLINE, _TOGETHER, _SCALES = 2048, 32, 1 << 18


def look(
    url: str, api_key: str | None, task: Task, lines: Sequence[Line], report: Reporter
) -> list[Line]:
    """Have the workers tell more of some tensors that differ: where, how many, like what."""
    wrong = [x for x in lines if x.found == "different" and x.looks not in ("bf16", "other block")]
    if task.kernel is not None:
        codes = [x for x in wrong if x.quantize and len(wrong) <= _ONLINE]
        names = list(dict.fromkeys(n for x in codes for n in _pair(x.name)))
        seen = _examine(url, api_key, task, names, _SCALES, report)
        lines = [_near(line, seen.get(line.name)) for line in lines]
        wrong = [x for x in lines if x in wrong]
    # What looks like nothing known comes first.
    chosen = sorted(wrong, key=lambda line: bool(line.looks))[:_CLOSELY]
    seen = _examine(url, api_key, task, [line.name for line in chosen], _VALUES, report)
    return [_seen(line, seen.get(line.name)) for line in lines]


def _pair(name: str) -> tuple[str, str]:
    weight = name.removesuffix("_scale")
    return weight, f"{weight}_scale"


def _near(line: Line, seen: Mapping[str, Any] | None) -> Line:
    """Take what an approximate division makes for right."""
    # Of another shape or type, or unlike its copies: that is no question of rounding.
    if seen is None or seen["looks"] != "one step" or not line.by_digest:
        return line
    return replace(line, found="equal", looks="one step", detail=seen["detail"])


def _seen(line: Line, seen: Mapping[str, Any] | None) -> Line:
    if seen is None:
        return line
    detail = ", ".join(filter(None, (line.detail, seen["detail"])))
    codes = seen["codes"]
    return replace(
        line,
        detail=detail,
        codes=(int(codes[0]), int(codes[1])) if codes else None,
        rows=seen["rows"],
        looks=line.looks or seen["looks"],
    )


def _examine(
    url: str,
    api_key: str | None,
    task: Task,
    names: Sequence[str],
    most: int,
    report: Reporter,
) -> dict[str, dict[str, Any]]:
    """Return by name what `fp8ctl.difference` says; nothing of a server that tells no more."""
    told: list[dict[str, Any]] = []
    for first in range(0, len(names), _TOGETHER):
        told += asking.more(url, api_key, names[first : first + _TOGETHER], {}, most)
    if not told:
        return {}
    seen = _examined(task, told, report)
    rows = {name: one["wanted"] for name, one in seen.items() if one["wanted"]}
    if rows and task.kernel is None:
        # Too large to be sent whole: the rows that differ are counted.
        told = asking.more(url, api_key, list(rows), rows, most)
        for name, one in (_examined(task, told, report) if told else {}).items():
            seen[name] |= {"codes": one["codes"], "detail": one["detail"]}
    return seen


def _examined(
    task: Task, told: Sequence[Mapping[str, Any]], report: Reporter
) -> dict[str, dict[str, Any]]:
    arguments = task.arguments(told=list(told))
    try:
        found = interpreter.run_worker(task.python, "examine", arguments, report, "a closer look")
    except Fp8ctlError as e:  # that something differs is known; this is to say what
        report.say(f"weights: no closer look: {e.message}")
        return {}
    tensors: dict[str, dict[str, Any]] = found["tensors"]
    return tensors
