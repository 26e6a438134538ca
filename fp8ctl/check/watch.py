"""`check --watch`: round after round, until a verdict is bad or somebody ends it.

A round is a whole check. What depends on the source alone is computed in the first one and
kept, so that the others cost what the server's part costs. Called by `command`.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final, NoReturn

from fp8ctl import gate, interpreter
from fp8ctl.check import beside, command, levels, metrics
from fp8ctl.errors import AbortedError
from fp8ctl.signals import interruptible

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.check.levels import Found, Request
    from fp8ctl.render import Reporter

#: The same in every round: it is the source's, and long.
_CONSTANT: Final = "quality"


def run(
    report: Reporter,
    request: Request,
    every: float,
    page: Path | None = None,
    address: str | None = None,
) -> NoReturn:
    """Check until the verdict is bad.

    Prints one line a round; under --json one document a line, the last one being the error.

    Args:
        report: where to say it.
        request: what to look at, and how far.
        every: seconds from the end of a round to the beginning of the next.
        page: file for the report of the last round; None for none.
        address: HOST:PORT for Prometheus; None for none.

    Raises:
        CheckFailedError: a round found the server not to be what it should be.
        AbortedError: Ctrl-C or SIGTERM, also in the middle of a round.
        BusyError: the port of the metrics is taken.
        Fp8ctlError: a level could not be judged at all.
    """
    report.line_by_line()
    rounds = metrics.Rounds(request.url)
    number = 0
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(interruptible())
            if address is not None:
                at = stack.enter_context(metrics.serving(address, rounds.text))
                report.say(f"metrics: {at}")
            stack.enter_context(interpreter.remembering(*levels.OF_THE_SOURCE))
            while True:
                number += 1
                _round(report, request, rounds, number, page)
                time.sleep(every)
    except KeyboardInterrupt:
        done = number - 1 if number else 0
        raise AbortedError(
            f"interrupted in round {number}; no verdict was bad in {done} before it",
            data={"rounds": done},
        ) from None
    raise AssertionError("unreachable")


def _round(
    report: Reporter,
    request: Request,
    rounds: metrics.Rounds,
    number: int,
    page: Path | None,
) -> None:
    """Check once, and tell it in one line.

    Raises:
        CheckFailedError: the verdict is bad.
    """
    # Only the first computes what takes long, and shows how far it is.
    talk = report.muted() if number == 1 else report.silent()
    found = levels.look(request, talk)
    found.data["round"] = number
    result = _result(found)
    rounds.add(found.data, result, time.time())
    if page is not None:
        command.keep(report.silent(), found, page)
    found.data["weights"].pop(_CONSTANT, None)
    report.data(_line(found, number, result))
    if result != "skipped":
        command.close(report.silent(), request, found)
    report.finish("check", found.data)


def _result(found: Found) -> str:
    """Return what a round counts as: one beside which an update ran is no verdict."""
    server = found.live.facts.get("server")
    if isinstance(server, dict) and beside.update_ran(found, server, gate.api_key()):
        return "skipped"
    return found.conclusion.result


def _line(found: Found, number: int, result: str) -> str:
    """Return a round in one line: when, the verdict, why, how quick the server was."""
    at = time.strftime("%H:%M:%S")
    end = found.conclusion
    word = end.verdict or ("ok" if result == "ok" else result)
    why = end.message
    if result == "skipped":
        word, why = "updating", beside.WHY
    latency = found.live.facts.get("latency_s")
    quick = f"; chat {latency:.2f} s" if isinstance(latency, float) else ""
    return f"{at}  {number}  {word}  {why}{quick}; took {found.data['seconds']:.1f} s"
