"""Body of `fp8ctl check`: what was typed, the levels, one verdict and its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fp8ctl.check import levels
from fp8ctl.check.levels import Request
from fp8ctl.errors import CheckFailedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.check.levels import Found
    from fp8ctl.render import Reporter


def run(
    report: Reporter,
    *,
    url: str,
    model: str | None = None,
    level: str | None = None,
    record: Path | None = None,
    against: Path | None = None,
    page: Path | None = None,
    every: float | None = None,
    metrics: str | None = None,
) -> dict[str, object]:
    """Say what a live server really serves; arguments are those of `fp8ctl check`.

    Args:
        report: where to say it.
        url: address of the server.
        model: source checkpoint to compare with.
        level: live, weights or logprobs; None takes the one that the other options need.
        record: file for the log-probabilities of this server.
        against: file with those of another.
        page: file for the report.
        every: seconds from one check to the next; None for one check.
        metrics: HOST:PORT to tell Prometheus at.

    Raises:
        UsageError: an address, a level or a combination that cannot be meant.
        CheckFailedError: the server is not what it should be; its data is the whole report.
        BusyError: the port of the metrics is taken.
        NotPermittedError: the page cannot be written.
    """
    request = _request(url, model, level, record, against)
    if metrics is not None and every is None:
        raise UsageError(
            f"--metrics {metrics} is for a check that goes on",
            hint=request.command("--watch", "60", "--metrics", metrics),
        )
    if page is not None:
        from fp8ctl.check import page as pages

        pages.require_place(page)
    if every is not None:
        from fp8ctl.check import watch

        return watch.run(report, request, every, page, metrics)
    found = levels.look(request, report)
    if page is not None:
        keep(report, found, page)
    close(report, request, found)
    return found.data


def keep(report: Reporter, found: Found, path: Path) -> None:
    """Write the page of a check.

    Raises:
        NotPermittedError: it cannot be written.
    """
    from fp8ctl.check import page

    page.write(path, page.render(found.data))
    report.say(f"report: {path}")


def parse_url(text: str) -> str:
    """Return an address without its trailing slash.

    Raises:
        UsageError: it is not http://HOST[:PORT] or https://, or has a password in it.
    """
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").strip(".")
        sound = parts.scheme in {"http", "https"} and bool(host) and parts.port != 0
        host.encode("idna")
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(
            f"{text!r} is not an address such as http://127.0.0.1:30000",
            hint="fp8ctl ps lists the servers of fp8ctl",
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UsageError(
            f"{bare} was given with more than an address (a user, a query): "
            "that would stand in reports, and is not sent",
            hint=f"export FP8CTL_API_KEY, then {bare}",
        )
    return text.rstrip("/")


def close(report: Reporter, request: Request, found: Found) -> None:
    """Print the verdict, and fail where the server is not what it should be.

    Raises:
        CheckFailedError: something is not as it should be, or is not proven.
    """
    end = found.conclusion
    report.data(verdict_line(found))
    if end.result == "ok" or recorded(request, found):
        return
    word: str = end.verdict or "not well"
    if found.live.other_code:
        word = "running other code"
    elif end.result == "not visible":
        word = "not proven to serve FP8"
    raise CheckFailedError(
        f"{request.url} is {word}: {end.message}",
        hint=_hint(None if found.live.other_code else end.verdict, request.url),
        data=found.data,
    )


def verdict_line(found: Found) -> str:
    """Return the last line of a check, of a launch and of a push: the one place that words it."""
    end = found.conclusion
    if found.data["level"] == "live" and end.verdict is None and end.result == "ok":
        return "live: ok; weights: not visible at this level"
    return worded(end.verdict, end.message)


def worded(verdict: str | None, message: str) -> str:
    """Return a verdict and why in one line."""
    return f"verdict: {verdict or 'none'}, {message}"


def recorded(request: Request, found: Found) -> bool:
    """Say whether all that was wanted is a record, and it was made: a BF16 server gives one too."""
    end = found.conclusion
    made = request.record is not None and found.data["logprobs"].get("recorded") is True
    made &= found.data["logprobs"].get("verdict") in {None, "fp8-ok", "bf16-fallback"}
    weights = found.data["weights"]
    made &= weights["result"] != "failed" or weights["verdict"] is not None
    strange = [
        one for one in found.live.evidence if one.result == "failed" and one.check != "quantisation"
    ]
    return made and not strange and end.verdict in {None, "fp8-ok", "bf16-fallback"}


def _request(
    url: str,
    model: str | None,
    level: str | None,
    record: Path | None,
    against: Path | None,
) -> Request:
    files = record is not None or against is not None
    asked = levels.parse(level if level is not None else "logprobs" if files else "live", "--level")
    if files and asked != "logprobs":
        option = "--record" if record is not None else "--against"
        raise UsageError(
            f"{option} is about log-probabilities, and --level {asked} was asked for",
            hint=f"fp8ctl check {url} --level logprobs {option} {record or against}",
        )
    if model is not None and asked == "live":
        raise UsageError(
            f"--model {model} is compared at the weights level and above",
            hint=f"fp8ctl check {url} --level weights --model {model}",
        )
    if record is not None and against is not None and record.absolute() == against.absolute():
        raise UsageError(
            f"--record {record} would write over what --against reads", hint="--record ANOTHER"
        )
    return Request(parse_url(url), asked, model, record, against)


def _hint(verdict: str | None, url: str) -> str:
    if verdict == "unreachable":
        return "fp8ctl ps"
    if verdict == "unpushed":
        return f"push the FP8 weights to {url}"
    return "fp8ctl logs NAME shows the server's log (fp8ctl ps lists the names)"
