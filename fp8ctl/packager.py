"""Runs pip and uv: shows how far they are, and reads their failures.

Called by `install`; knows no engine. The caller's environment is passed on, so
that the user's index settings hold.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp8ctl.errors import EngineFailedError, Fp8ctlError, NotFoundError, NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fp8ctl.render import Reporter

OWN_PLACE = "export FP8CTL_HOME=/a/folder/you/own"
UV_SETTINGS = ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS")

_OFFLINE = (
    r"Max retries|NewConnectionError|NameResolution|Temporary failure|ConnectTimeout|ReadTimeout"
    r"|SSLError|ProxyError|HTTP error|dns error|error sending request|Network is unreachable"
)
_ABSENT = (
    r"No matching distribution|Could not find a version|No solution found|ResolutionImpossible"
)


@dataclass(frozen=True, slots=True)
class Advice:
    """What to type when pip or uv has failed.

    Attributes:
        again: the command of fp8ctl that failed; None: nobody knows.
        place: names another folder to write to.
    """

    again: str | None = None
    place: str = OWN_PLACE


def run_pip(
    report: Reporter,
    command: list[str],
    env: dict[str, str],
    what: str,
    pins: Mapping[str, int],
    advice: Advice,
) -> None:
    """Run pip; count megabytes as it goes from package to package, then show the unpacking.

    Args:
        report: where to show it.
        command: the arguments.
        env: the environment of the process.
        what: is being installed, a word for people.
        pins: requirement to bytes, of what this command brings.
        advice: for the hint of a failure.

    Raises:
        Fp8ctlError: see `failure`.
    """
    sizes = {_name(pin): size for pin, size in pins.items()}
    total = max(1, sum(sizes.values()) // 1_000_000)
    seen: list[str] = []
    stack = contextlib.ExitStack()
    tell = stack.enter_context(report.progress(f"Download {what}", total, "MB"))

    def line(text: str) -> None:
        match = re.match(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9._-]+)", text)
        if match:
            # pip names a package when it begins with it: those before it are done.
            tell(sum(sizes.get(n, 0) for n in seen) // 1_000_000)
            if (name := _name(match.group(1))) not in seen:
                seen.append(name)
        elif text.startswith("Installing collected packages"):
            tell(total)
            stack.close()
            stack.enter_context(report.step(f"Unpack {what}"))

    with stack:
        run_command(command, env, advice, line)


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>\[ ]", requirement)[0]).lower()


def run_command(
    command: list[str],
    env: dict[str, str],
    advice: Advice,
    line: Callable[[str], None] | None = None,
) -> None:
    """Run one command, feeding its lines to `line`, and raise from its last ones."""
    tail: deque[str] = deque(maxlen=40)
    try:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as e:
        raise EngineFailedError(f"cannot run {command[0]}: {e.strerror}") from e
    try:
        assert process.stdout is not None
        for text in process.stdout:
            tail.append(text.rstrip())
            if line is not None:
                line(text)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
    if code:
        raise failure(command, code, list(tail), advice)


def failure(
    command: list[str], code: int, tail: list[str], advice: Advice | None = None
) -> Fp8ctlError:
    """Return the error that the last lines of a failed pip or uv speak of."""
    text = "\n".join(tail)
    advice = advice or Advice()
    tool = "uv" if Path(command[0]).name == "uv" else "pip" if "pip" in command else command[0]
    data: dict[str, object] = {"command": command, "exit": code, "last_lines": tail}
    lines = [t for t in tail if re.match(r"(?i)error|fatal", t)] or tail[-1:]
    reason = re.sub(r"^(ERROR|error|Error):\s*", "", lines[-1].strip()) if lines else "no output"
    if own := re.search(r"The user requested \(constraint\) (\S+)", text):
        # Nothing that is asked for is among our constraints, so this one is the user's.
        return NotFoundError(
            f"a constraint of yours, {own.group(1)}, excludes what is to be installed",
            hint=_typed("PIP_CONSTRAINT=/dev/null", advice.again),
            data=data,
        )
    index = "PIP_INDEX_URL=https://an.index/simple"
    if os.environ.get("PIP_NO_INDEX"):
        index = "PIP_NO_INDEX=0"
    if tool == "uv":
        index = "UV_DEFAULT_INDEX=https://an.index/simple"
    index = _typed(index, advice.again)
    if re.search(_OFFLINE, text):
        return NotFoundError(f"{tool} cannot reach its index: {reason}", hint=index, data=data)
    if re.search(r"from versions: none|not found in the package registry", text):
        return NotFoundError(
            f"{tool} got no answer from its index, or one without the package: {reason}",
            hint=index,
            data=data,
        )
    if re.search(_ABSENT, text):
        return NotFoundError(f"{tool} does not find a package: {reason}", hint=index, data=data)
    if re.search(r"No space left|Errno 28", text):
        return NotPermittedError(f"the disk is full: {reason}", hint=advice.place, data=data)
    if re.search(r"Permission denied|Errno 13|Read-only file system|Errno 30", text):
        return NotPermittedError(f"{tool} may not write: {reason}", hint=advice.place, data=data)
    # What it ran in and with is gone by now; a dry run prints the commands that still work.
    hint = f"{advice.again} --dry-run" if advice.again else None
    return EngineFailedError(f"{tool} failed with exit code {code}: {reason}", hint=hint, data=data)


def _typed(setting: str, again: str | None) -> str:
    """Return a command line with a setting in front of it, or the setting alone."""
    return f"{setting} {again}" if again else f"export {setting}"
