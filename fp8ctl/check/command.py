"""Body of `fp8ctl check`: the levels in order, then one verdict and its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from fp8ctl import gate
from fp8ctl.check import code, live
from fp8ctl.check.verdict import as_verdict
from fp8ctl.errors import CheckFailedError, UsageError

if TYPE_CHECKING:
    from fp8ctl.check.verdict import Evidence, LevelReport
    from fp8ctl.render import Reporter

LEVELS: Final = ("live", "weights")


def run(
    report: Reporter, *, url: str, model: str | None = None, level: str = "live"
) -> dict[str, object]:
    """Say what a live server really serves.

    Args:
        report: where to say it.
        url: address of the server.
        model: source checkpoint that the weights level compares with.
        level: live or weights.

    Raises:
        UsageError: the address or the level is none.
        CheckFailedError: the server is not what it should be; its data is the whole report.
    """
    if level not in LEVELS:
        raise UsageError(
            f"--level {level!r} is not a level; there is {' and '.join(LEVELS)}",
            hint=f"fp8ctl check {url} --level weights",
        )
    if model is not None and level == "live":
        raise UsageError(
            f"--model {model} is compared at the weights level only",
            hint=f"fp8ctl check {url} --level weights --model {model}",
        )
    url = parse_url(url)
    first = live.check(url)
    data = summary(url, first)
    tell(report, first)
    if level == "live" or first.result != "ok":
        close(report, data, first)
        return data
    from fp8ctl.check import weights

    found = dict(weights.verify(url, model, report, gate.api_key()))
    verdict = as_verdict(found.get("verdict"))
    data |= {"weights": found, "verdict": verdict}
    report.data(f"verdict: {verdict or found.get('verdict')}")
    if verdict != "fp8-ok":
        raise CheckFailedError(
            f"{url} is {verdict or 'not proven to serve FP8'}"
            + (f": {found['message']}" if found.get("message") else ""),
            hint=_hint(verdict, url),
            data=data,
        )
    return data


def parse_url(text: str) -> str:
    """Return an address without its trailing slash.

    Raises:
        UsageError: it is not http://HOST[:PORT] or https://.
    """
    try:
        parts = urlsplit(text)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(
            f"{text!r} is not an address such as http://127.0.0.1:30000",
            hint="fp8ctl ps lists the servers of fp8ctl",
        )
    return text.rstrip("/")


def summary(url: str, found: LevelReport) -> dict[str, object]:
    """Return the data of a check that went no further than the live level."""
    return {
        "url": url,
        "verdict": found.verdict,
        "live": found.to_json(),
        "code": dict(found.code) if found.code is not None else code.judge(None).to_json(),
        "weights": {"result": "not visible", "verdict": None},
    }


def tell(report: Reporter, found: LevelReport) -> None:
    """Print what the live level saw."""
    rows = [[one.check, one.result, _found(one)] for one in found.evidence]
    report.table(("check", "result", "found"), rows)
    if found.code is not None:
        report.data(f"code: {found.code['result']}, {found.code['message']}")
    if told := code.changed(found.code):
        report.warn(told)


def fault_text(found: LevelReport) -> str:
    """Return what the live level failed on, in a few words: the one place that words it."""
    fault = found.fault
    if fault is None:
        return "something is wrong"
    if found.verdict == "unreachable":
        return fault.found
    return f"{fault.check}: {_found(fault)}"


def _found(one: Evidence) -> str:
    wanted = f" (expected {one.expected})" if one.result == "failed" and one.expected else ""
    return one.found + wanted


def close(report: Reporter, data: dict[str, object], found: LevelReport) -> None:
    """Print the closing line of the live level, and fail where it failed.

    Raises:
        CheckFailedError: something is not as it should be.
    """
    verdict = f", verdict: {found.verdict}" if found.verdict else ""
    report.data(f"live: {found.result}{verdict}; weights: not visible at this level")
    if found.result == "ok":
        return
    word = "running other code" if found.other_code else found.verdict or "not well"
    raise CheckFailedError(
        f"{data['url']} is {word}: {fault_text(found)}",
        hint=_hint(None if found.other_code else found.verdict, str(data["url"])),
        data=data,
    )


def _hint(verdict: str | None, url: str) -> str:
    if verdict == "unreachable":
        return "fp8ctl ps"
    if verdict == "unpushed":
        return f"push the FP8 weights to {url}"
    return "fp8ctl logs NAME shows the server's log (fp8ctl ps lists the names)"
