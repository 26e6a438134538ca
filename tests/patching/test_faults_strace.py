"""The real command under strace: killed, or failed, at one system call after another."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.patching.conftest import REPOSITORY, tree
from tests.patching.faulty import next_command, unlocked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# The bundled series is another one; everything else is `fp8ctl` as it is typed.
DRIVER = """
import sys
from pathlib import Path
from fp8ctl.patching import catalog
catalog.ROOT = Path(sys.argv.pop(1))
from fp8ctl.cli import main
main()
"""
NAMES = "rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlinkat"
FILES = "openat,open,creat,write,pwrite64,writev,truncate,ftruncate,fsync,fdatasync,fallocate"
OTHERS = "chmod,fchmod,fchmodat,chown,fchown,fchownat,utimensat,setxattr,fsetxattr,flock"
READING = "newfstatat,fstatfs,fcntl,faccessat2,faccessat"
MUTATING = f"{NAMES},{FILES},{OTHERS}"


def _no_strace() -> str:
    """Return why strace cannot be used here, "" if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = ["strace", "-f", "--seccomp-bpf", "-e", "trace=openat", "-o", "/dev/null", "true"]
    done = subprocess.run(probe, capture_output=True, check=False)
    return "" if done.returncode == 0 else "this machine does not let processes be traced"


pytestmark = pytest.mark.skipif(bool(_no_strace()), reason=_no_strace() or "never")


@dataclass(frozen=True)
class Call:
    """One system call: its name, which one of that name it is, and how strace wrote it."""

    name: str
    number: int
    line: str

    @property
    def mutates(self) -> bool:
        if self.name in ("openat", "open"):
            return bool(re.search(r"O_CREAT|O_TRUNC|O_WRONLY|O_RDWR", self.line))
        if self.name.startswith(("write", "pwrite")):
            return not re.match(r"\w+\([12],", self.line)
        return self.name in MUTATING.split(",")

    @property
    def ours(self) -> bool:
        """True below site-packages: named from a descriptor, as Python's own imports never do."""
        return bool(re.match(r'\w+\(\d+, "|fstatfs\(|fcntl\(\d+, F_DUPFD', self.line))


@dataclass
class Traced:
    """The command line on a lab, with strace around it."""

    lab: Any
    home: Path

    def run(self, words: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
        # Quick where it may be: strace 6.1 then loses the signals that it is to inject.
        quick = () if any(":signal=" in o for o in options) else ("--seccomp-bpf",)
        argv = ["strace", "-f", *quick, *options]
        argv += [sys.executable, "-c", DRIVER, str(self.lab.patches), *words]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "FP8CTL_HOME": str(self.home),
        }
        return subprocess.run(
            [*argv, "--site-packages", str(self.lab.site)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def calls(self, words: Sequence[str], kinds: str = MUTATING) -> list[Call]:
        """Run a command to its end; return its calls from the first look into fp8ctl's folder."""
        log = self.home.parent / "trace"
        # Names that this machine's architecture has not are passed over.
        kinds = ",".join(f"?{kind}" for kind in kinds.split(","))
        done = self.run(words, "-o", str(log), "-s", "200", "-e", f"trace={kinds}")
        assert done.returncode == 0, done.stderr
        found: list[Call] = []
        counts: dict[str, int] = {}
        seen = False
        for line in log.read_text().splitlines():
            match = re.match(r"\d+\s+((\w+)\(.*)", line)
            if match is None:
                continue
            name = match[2]
            counts[name] = counts.get(name, 0) + 1
            seen = seen or '".fp8ctl"' in line
            if seen:
                found.append(Call(name, counts[name], match[1]))
        return found


@pytest.fixture
def traced(lab: Any, tmp_path: Path) -> Traced:
    return Traced(lab, tmp_path / "home")


COMMANDS = {
    "patch": ((), ("patch", "--patch", "second", "--patch", "third")),
    "revert": (("second", "third"), ("revert",)),
    "rebuild": (("second", "third"), ("patch", "--patch", "first")),
}


def lay(site: Path, source: Path) -> None:
    shutil.rmtree(site)
    shutil.copytree(source, site, symlinks=True)


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_second_time_no_call_changes_anything(traced: Traced, verb: str) -> None:
    before, words = COMMANDS[verb]
    if before:
        traced.lab.patch(*before)
    first = [c for c in traced.calls(words) if c.mutates]
    assert len(first) > 30
    again = traced.calls(words)
    assert [c.line for c in again if c.mutates] == []
    assert again


def begin(traced: Traced, verb: str, start: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Make the start of a command, keep a copy of it, and let the command run once, which
    makes its folders in the home; return its words and the tree that it starts from.
    """
    before, words = COMMANDS[verb]
    if before:
        traced.lab.patch(*before)
    old = unlocked(tree(traced.lab.site))
    shutil.copytree(traced.lab.site, start)
    traced.calls(words)
    lay(traced.lab.site, start)
    return words, old


@pytest.mark.parametrize("stride", [41, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_kill_at_a_call_that_changes_something(
    traced: Traced, tmp_path: Path, verb: str, stride: int
) -> None:
    lab, start = traced.lab, tmp_path / "start"
    words, old = begin(traced, verb, start)
    points = [c for c in traced.calls(words) if c.mutates]
    new = unlocked(tree(lab.site))
    ends = {"old": 0, "new": 0}
    for call in points[len(verb) % stride :: stride]:
        lay(lab.site, start)
        inject = f"inject={call.name}:signal=KILL:when={call.number}"
        done = traced.run(words, "-o", "/dev/null", "-e", f"trace={call.name}", "-e", inject)
        assert done.returncode == -signal.SIGKILL, (call, done.stderr)
        next_command(lab.site)
        found = unlocked(tree(lab.site))
        assert found in (old, new), call
        ends["new" if found == new else "old"] += 1
    print(f"strace, kill, {verb}: {sum(ends.values())} of {len(points)} points, {ends}")
    assert stride > 1 or min(ends.values()) > 0


@pytest.mark.parametrize("stride", [41, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("verb", COMMANDS)
def test_an_error_at_any_call_is_told_and_mended(
    traced: Traced, tmp_path: Path, verb: str, stride: int
) -> None:
    lab, start = traced.lab, tmp_path / "start"
    words, old = begin(traced, verb, start)
    calls = traced.calls(words, f"{MUTATING},{READING}")
    # Those that only read are many, and much alike.
    points = [c for c in calls if c.mutates] + [c for c in calls if c.ours and not c.mutates][::9]
    points = [c for c in points if not re.match(r"write\([12],", c.line)]
    new = unlocked(tree(lab.site))
    codes: dict[int, int] = {}
    for number, call in enumerate(points):
        if number % stride != (7 * len(verb)) % stride:
            continue
        lay(lab.site, start)
        code = ("EIO", "EACCES", "ENOSPC", "EROFS")[number % 4] if call.mutates else "EIO"
        inject = f"inject={call.name}:error={code}:when={call.number}"
        done = traced.run(words, "-o", "/dev/null", "-e", f"trace={call.name}", "-e", inject)
        where = f"{verb}: {code} at {call}\n{done.stderr[-600:]}"
        codes[done.returncode] = codes.get(done.returncode, 0) + 1
        assert "Traceback" not in done.stderr, where
        assert done.returncode in (0, 3, 5, 6), where
        if done.returncode == 6:
            assert str(lab.site) in done.stderr or str(traced.home) in done.stderr, where
            # What may be written is asked for with yes or no: no reason comes back.
            told = call.name.startswith("faccessat") or os.strerror(getattr(errno, code))
            assert told is True or told in done.stderr, where
        next_command(lab.site)
        found = unlocked(tree(lab.site))
        assert found in (old, new), where
        if done.returncode == 0:
            assert found == new, where
    print(f"strace, errors, {verb}: {sum(codes.values())} of {len(points)} points, exits {codes}")
