"""Runs pip and uv: shows how far they are, and reads their failures.

Called by `install`; knows no engine. The caller's environment is passed on, so
that the user's index settings hold.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from fp8ctl.errors import EngineFailedError, Fp8ctlError, NotFoundError, NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fp8ctl.render import Reporter

UV_SETTINGS = ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS")


def run_pip(
    report: Reporter, command: list[str], env: dict[str, str], what: str, pins: Mapping[str, int]
) -> None:
    """Run pip; count megabytes as it goes from package to package, then show the unpacking.

    Args:
        what: is being installed, a word for people.
        pins: requirement to bytes, of what this command brings.

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
        run_command(command, env, line)


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>\[ ]", requirement)[0]).lower()


def run_command(
    command: list[str], env: dict[str, str], line: Callable[[str], None] | None = None
) -> None:
    """Run one command, feeding its lines to `line`, and raise from its last ones."""
    tail: deque[str] = deque(maxlen=15)
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
        raise failure(command, code, list(tail))


def failure(command: list[str], code: int, tail: list[str]) -> Fp8ctlError:
    """Return the error that the last lines of a failed pip or uv speak of."""
    text = "\n".join(tail)
    tool = "uv" if Path(command[0]).name == "uv" else "pip" if "pip" in command else command[0]
    data: dict[str, object] = {"command": command, "exit": code, "last_lines": tail}
    lines = [t for t in tail if re.match(r"(?i)error|fatal", t)] or tail[-1:]
    reason = re.sub(r"^(ERROR|error|Error):\s*", "", lines[-1].strip()) if lines else "no output"
    offline = r"Max retries|NewConnectionError|NameResolution|Temporary failure|ConnectTimeout"
    offline += r"|dns error|error sending request|Network is unreachable"
    settings = (
        "check the index: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS (`pip config list`)"
    )
    if tool == "uv":
        settings = f"check the index: {', '.join(UV_SETTINGS)}"
    if re.search(offline, text):
        return NotFoundError(f"{tool} cannot reach its index: {reason}", hint=settings, data=data)
    if re.search(r"No matching distribution|Could not find a version|No solution found", text):
        return NotFoundError(f"{tool} does not find a package: {reason}", hint=settings, data=data)
    if re.search(r"No space left|Errno 28", text):
        return NotPermittedError(
            f"the disk is full: {reason}", hint="--dir FOLDER on another disk", data=data
        )
    if re.search(r"Permission denied|Errno 13|Read-only file system|Errno 30", text):
        return NotPermittedError(
            f"{tool} may not write: {reason}", hint="--dir FOLDER that you own", data=data
        )
    return EngineFailedError(
        f"{tool} failed with exit code {code}: {reason}", hint=shlex.join(command), data=data
    )
