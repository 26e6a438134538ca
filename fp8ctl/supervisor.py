"""Watching over one server: start, wait until it is ready, check, follow, end.

Called by `launching` with a plan that is already refused or good. Whatever goes
wrong between start and hand-over, nothing of the server is left running.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fp8ctl import gate, registry
from fp8ctl.check import beside, command, levels, live
from fp8ctl.check.levels import Request
from fp8ctl.diagnosis import likeliest
from fp8ctl.engines.base import option_value
from fp8ctl.errors import AbortedError, BusyError, EngineFailedError, Fp8ctlError
from fp8ctl.logtail import Tail, last_lines, telling
from fp8ctl.process import (
    Identity,
    free_port,
    identify,
    listens,
    members,
    port_holder,
    spawn,
    stop_tree,
)
from fp8ctl.registry import Record
from fp8ctl.server import refuse_occupied, stop
from fp8ctl.signals import interruptible, undisturbed

if TYPE_CHECKING:
    from fp8ctl.check.levels import Level
    from fp8ctl.engines.base import LaunchPlan
    from fp8ctl.gate import Answer
    from fp8ctl.render import Reporter

SHOWN_LINES: Final = 30
_POLL: Final = 0.2
_ASK_EVERY: Final = 1.0
"""Seconds between two questions over HTTP, each of which the engine logs."""
_TELL_EVERY: Final = 10.0
_LAST_MOMENTS: Final = 3.0
_FLOOD: Final = 16
"""Chunks of log shown between two looks at the server."""


@dataclass(frozen=True, slots=True)
class About:
    """What the registry keeps of a server besides its plan; see `registry.Record`."""

    engine: str
    source: str
    mode: str
    site_packages: str


@dataclass(frozen=True, slots=True)
class Watch:
    """How long and how closely to watch.

    Attributes:
        detach: hand over a running server instead of following it.
        wait: wait until it is ready; False needs `detach`.
        timeout: seconds until it must be ready.
        check: end with a check up to this level; None: with none.
        model: what levels behind the live one compare with; None takes the server's own plan's.
        expect: text that its answer must contain.
    """

    detach: bool = False
    wait: bool = True
    timeout: float = 600.0
    check: Level | None = "live"
    model: str | None = None
    expect: str | None = None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What is left in the run folder for the server's own processes to read, as JSON.

    Attributes:
        manifest: the quantisation plan; None where the engine quantises by itself.
        code: the files of the patch series, each with its hash; None where that is not known.
    """

    manifest: str | None = None
    code: str | None = None


def serve(
    report: Reporter,
    plan: LaunchPlan,
    about: About,
    watch: Watch,
    left: RunFiles | None = None,
) -> dict[str, object]:
    """Start a server and see it through.

    Args:
        report: where to say what happens; in the foreground also the server's log.
        plan: what to start.
        about: for the registry.
        watch: how to watch.
        left: files for the run folder.

    Returns the server's name, pid, address, state and check; in the foreground
    when it was stopped with `fp8ctl stop`.

    Raises:
        BusyError: the port was taken, before or while it started; nothing of it is left.
        EngineFailedError: it did not become ready, or died.
        CheckFailedError: it is not what it should be; it was stopped.
        AbortedError: Ctrl-C or SIGTERM; it was stopped.
        Fp8ctlError: it could not be checked: no source, no torch; it was stopped.
    """
    name = plan.run_dir.name
    with interruptible(once=True):
        born: list[Record] = []
        try:
            child = _start(plan, about, left or RunFiles(), born)
            [record] = born
            report.say(f"started {name}: pid {child.pid}, log: fp8ctl logs {name}")
            data: dict[str, object] = {
                "name": name,
                "pid": child.pid,
                "url": plan.url,
                "state": "starting",
                "check": None,
            }
            if not watch.wait:
                return data
            with Tail(plan.run_dir / "server.log") as tail:
                answer = _until_ready(report, plan, record, child, watch, tail)
                registry.mark_ready(record)
                data["state"] = answer.state
                if watch.check is not None:
                    request = Request(plan.url, watch.check, watch.model)
                    expect = watch.expect
                    data["check"] = _check(report, plan, record, child, request, expect, answer)
                if watch.detach:
                    report.say(f"{name} runs at {plan.url}; stop it: fp8ctl stop {name}")
                    return data
                _follow(report, record, child, tail)
                data["state"] = "stopped"
                return data
        except BaseException as e:
            for record in born:
                try:
                    _end(report, record, e)
                except KeyboardInterrupt:  # after an error; there is no second one
                    _end(report, record, e)
            if isinstance(e, KeyboardInterrupt):
                end = f"{name} was stopped" if born else "nothing was started"
                raise AbortedError(f"interrupted; {end}") from None
            raise


def _start(
    plan: LaunchPlan, about: About, left: RunFiles, born: list[Record]
) -> subprocess.Popen[bytes]:
    """Become one of the registered servers; whatever goes wrong, nothing is left.

    Args:
        plan: what to start.
        about: for the registry.
        left: files for the run folder.
        born: gets the server's record at the moment in which it is the caller's to end it.

    Raises:
        BusyError: another server has the port, or is going to have it.
        EngineFailedError: the interpreter cannot be run.
    """
    with registry.one_launch_at_a_time():
        refuse_occupied(plan.host, plan.port)
        registry.claim(plan.run_dir.name)
        try:
            for name, text in (("manifest.json", left.manifest), ("code.json", left.code)):
                if text is not None:
                    (plan.run_dir / name).write_text(text)
            child = spawn(plan, plan.run_dir / "server.log", os.environ)
            record = _record(plan, about, identify(child.pid))
            registry.write(record)
            born.append(record)
        except BaseException:
            with undisturbed():
                stop_tree(None, plan.run_dir)
                shutil.rmtree(plan.run_dir, ignore_errors=True)
            raise
        return child


def _record(plan: LaunchPlan, about: About, identity: Identity | None) -> Record:
    return Record(
        name=plan.run_dir.name,
        # It may have ended at once; no process has pid 0.
        identity=identity or Identity(0, 0, ""),
        engine=about.engine,
        url=plan.url,
        model=plan.model,
        source=about.source,
        mode=about.mode,
        await_push=plan.await_push,
        python=plan.argv[0],
        site_packages=about.site_packages,
        since=time.time(),
        host=plan.host,
    )


def _until_ready(
    report: Reporter,
    plan: LaunchPlan,
    record: Record,
    child: subprocess.Popen[bytes],
    watch: Watch,
    tail: Tail,
) -> Answer:
    """Poll process and gate until the server is ready, dead or late.

    Raises:
        BusyError: another process answers at its address.
        EngineFailedError: it died, failed, or took too long.
    """
    report.say(f"{record.engine} is starting: it imports its packages before it says anything")
    started = told = time.monotonic()
    next_question = started
    answer = gate.Answer("starting")
    while True:
        now = time.monotonic()
        if now >= next_question:
            answer = gate.ask(plan.url, _key(plan), pid=child.pid)
            next_question = time.monotonic() + _ASK_EVERY
        # Asked after the question: an answer counts only from a living process.
        code = child.poll()
        if not watch.detach:
            _show(report, tail)
        now = time.monotonic()
        if code is not None:
            raise _death(report, record, code, "died before it was ready")
        if answer.foreign or (answer.state == "locked" and not _listens(plan, record)):
            holder = port_holder(plan.port) or "another process"
            raise BusyError(
                f"port {plan.port} on {plan.host} was taken by {holder} while {record.name} "
                "was starting",
                hint=f"--port {free_port('127.0.0.1')}",
                data={"host": plan.host, "port": plan.port, "name": record.name},
            )
        # An update comes to a server that was ready; one that failed awaits the next.
        pushed = answer.state == "updating" or bool(answer.data.get("updates"))
        if pushed or answer.state in {"ready", "unpushed", "locked"}:
            report.say(f"{record.name} is {answer.state} after {now - started:.1f} s")
            return answer
        if answer.state == "failed":
            raise _death(report, record, None, f"says it has failed: {answer.message}")
        if now - started > watch.timeout:
            late = f"was not ready after {watch.timeout:.0f} s (--timeout)"
            hint = f"--timeout {2 * watch.timeout:.0f}, or see fp8ctl logs {record.name}"
            raise _death(report, record, None, late, hint=hint)
        if now - told >= _TELL_EVERY:
            told = now
            _tell_waiting(report, plan, watch, now - started)
        time.sleep(_POLL)


def _tell_waiting(report: Reporter, plan: LaunchPlan, watch: Watch, seconds: float) -> None:
    """Say that the server is still starting; in the foreground its own log says so."""
    last = telling(last_lines(plan.run_dir / "server.log", SHOWN_LINES))
    if not last:
        report.say(f"waiting, {seconds:.0f} s: the engine imports its packages")
    elif watch.detach:
        report.say(f"waiting, {seconds:.0f} s: {last[-1][:120]}")


def _listens(plan: LaunchPlan, record: Record) -> bool:
    """Say whether the server itself has the port: without its key it tells nothing."""
    return listens(members(record.identity, plan.run_dir), plan.port)


def _death(
    report: Reporter, record: Record, code: int | None, how: str, *, hint: str | None = None
) -> EngineFailedError:
    """Show the end of the log, and return the error with the likeliest cause.

    Args:
        report: shows the log.
        record: of the server.
        code: its exit status, None where it still runs.
        how: what happened, in words.
        hint: for a death without a known cause.
    """
    lines = telling(last_lines(registry.folder(record.name) / "server.log", 400))
    cause = likeliest(lines, code)
    shown = lines[-SHOWN_LINES:]
    if shown:
        report.say(f"the last {len(shown)} lines of its log:")
    for line in shown:
        report.say(f"  {line}")
    logs = f"fp8ctl logs {record.name}"
    if registry.is_stopping(record):
        how, why, hint = "was stopped by `fp8ctl stop` while it started", "", logs
    elif cause.id == "unknown":
        why, hint = (f"; its last error: {cause.line}" if cause.line else ""), hint or logs
    else:
        why, hint = f"; likeliest cause: {cause.words}", cause.hint
        if cause.id == "port-taken":
            hint = f"--port {free_port('127.0.0.1')}"
        if cause.line and cause.line not in shown[-5:]:
            report.say(f"the line that tells: {cause.line}")
    status = "" if code is None else f" (exit {code})"
    return EngineFailedError(
        f"{record.engine} {how}{status}{why}",
        hint=hint,
        data={
            "name": record.name,
            "exit_code": code,
            "cause": cause.id,
            "line": cause.line,
            "last_lines": list(shown),
        },
    )


def _check(
    report: Reporter,
    plan: LaunchPlan,
    record: Record,
    child: subprocess.Popen[bytes],
    request: Request,
    expect: str | None,
    answer: Answer,
) -> dict[str, object]:
    """Check the server; one that waits for its first push is as it should be.

    Args:
        report: where to say what is seen.
        plan: what was started.
        record: of the server.
        child: its first process.
        request: how far to look.
        expect: text that its answer must contain.
        answer: its state when it was ready.
    """
    began = time.time()
    key = _key(plan)
    found = live.check(plan.url, expect, api_key=key)
    _require_alive(report, record, child, lost=found.verdict == "unreachable")
    levels.tell(report, found)
    unpushed = answer.state == found.verdict == "unpushed"
    if plan.await_push and unpushed and not found.other_code:
        report.data("verdict: unpushed, as asked: it opens when FP8 weights have landed")
        return levels.assemble(request, found, {}, began, api_key=key).data
    seen = levels.further(request, report, found, began, api_key=key)
    lost = request.level != "live" and seen.conclusion.result == "failed"
    _require_alive(report, record, child, lost=lost)
    # A trainer's weights are not those that it was started on, and no reason to end it.
    told = found.facts.get("server")
    since = {**(told if isinstance(told, dict) else {}), "updates": 0}
    if beside.update_ran(seen, since, key):
        seen.data["beside_update"] = True
        report.data(f"verdict: updating, {beside.WHY}")
        return seen.data
    command.close(report, request, seen)
    if request.level == "live" and (plan.run_dir / "manifest.json").exists():
        report.say(f"the proof, tensor by tensor: fp8ctl check {plan.url} --level weights")
    return seen.data


def _require_alive(
    report: Reporter, record: Record, child: subprocess.Popen[bytes], *, lost: bool
) -> None:
    """See that the server still runs, which explains what was seen of it.

    Args:
        report: shows the log of one that died.
        record: of the server.
        child: its first process.
        lost: something was wrong: a connection breaks a moment before its process has ended.

    Raises:
        EngineFailedError: it died.
    """
    if lost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LAST_MOMENTS)
    if (code := child.poll()) is not None:
        raise _death(report, record, code, "died while it was checked")


def _follow(report: Reporter, record: Record, child: subprocess.Popen[bytes], tail: Tail) -> None:
    """Show the log until the server ends; quiet if that was asked for.

    Raises:
        EngineFailedError: it died.
    """
    while (code := child.poll()) is None:
        _show(report, tail)
        time.sleep(_POLL)
    while _show(report, tail):
        pass
    if not registry.is_stopping(record):
        raise _death(report, record, code, "died")
    report.say(f"{record.name} was stopped by `fp8ctl stop`")


def _show(report: Reporter, tail: Tail) -> bool:
    """Print what the log has gained, a part of it in a flood; say whether there was any."""
    shown = False
    for _ in range(_FLOOD):
        lines = tail.lines()
        for line in telling(lines):
            report.say(line)
        shown = shown or bool(lines)
        if not lines:
            break
    return shown


def _end(report: Reporter, record: Record, error: BaseException) -> None:
    """Stop what was started; the error at hand is the one that matters."""
    lives = isinstance(error, Fp8ctlError) and not isinstance(error, EngineFailedError)
    with undisturbed():
        if lives or isinstance(error, KeyboardInterrupt):
            report.say(f"stopping {record.name}")
        stop(record)
    if lives and not isinstance(error, BusyError):
        report.say(f"{record.name} was stopped; its log is still there: fp8ctl logs {record.name}")


def _key(plan: LaunchPlan) -> str | None:
    """Return the key that the server will ask for."""
    typed = option_value(plan.argv, "--api-key") or gate.api_key()
    return typed or (os.environ.get("VLLM_API_KEY") if plan.backend == "vllm" else None)
