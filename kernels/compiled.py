"""C that is compiled at first use, and kept.

A library is made by the system's C compiler, and kept in fp8ctl's cache under a name that
says from what, by what and for which CPU. It is loaded only from a folder that is this
user's and that nobody else can write, and only if it is as it was written.

Standard library only: runs in an engine's interpreter, which may have nothing else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHARED = ("-std=c99", "-fPIC", "-shared")
_SECONDS = 60.0  # for all compilers together
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DIGEST = hashlib.sha256().digest_size


def disabled() -> str:
    """Return why nothing is to be compiled or loaded, "" if nobody said so."""
    return "FP8CTL_NATIVE=0 is set" if os.environ.get("FP8CTL_NATIVE") == "0" else ""


def build(source: bytes, flags: Sequence[str], tuning: Sequence[Sequence[str]] = ((),)) -> Path:
    """Return the path of a shared library, compiled if the cache has none.

    Args:
        source: in C99.
        flags: that it is always compiled with.
        tuning: more of them, in turn, for a compiler that does not know the first.

    Raises:
        OSError, RuntimeError, ValueError: there can be none, and why.
    """
    folder = _folder()
    deadline = time.monotonic() + _SECONDS
    why = "no C compiler found: install one (gcc or clang), or name it in CC"
    options = [(*_SHARED, *more, *flags) for more in tuning]
    for command in _compilers():
        try:
            path = folder / f"{_key(source, command, options, deadline)}.so"
            if not _is_intact(path):
                _compile(source, command, options, path, deadline)
        except (OSError, RuntimeError, subprocess.SubprocessError) as e:
            why = f"{command[0]}: {e}"
            continue
        return path
    raise RuntimeError(why)


def _folder() -> Path:
    """Return the folder of compiled libraries, which is this user's alone."""
    folder = _cache_dir() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeError(f"{folder} is no folder")
    if found.st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & _BY_OTHERS:
        raise RuntimeError(f"{folder} can be written by others: chmod go-w it, or remove it")
    return folder


def _cache_dir() -> Path:
    """Return what `fp8ctl.paths.cache_dir` does, which an engine's interpreter may not have."""
    home = os.environ.get("FP8CTL_HOME")
    if home:
        return Path(home).expanduser().absolute() / "cache"
    root = os.environ.get("XDG_CACHE_HOME")
    if root and os.path.isabs(root):
        return Path(root) / "fp8ctl"
    return Path.home() / ".cache" / "fp8ctl"


def _compilers() -> list[list[str]]:
    """Return the commands to try: what CC says, else those there are by their usual names."""
    named = shlex.split(os.environ.get("CC", ""))
    commands = [named] if named else [["cc"], ["gcc"], ["clang"]]
    found = []
    for command in commands:
        path = shutil.which(command[0])
        if path is not None:
            found.append([path, *command[1:]])
    return found


def _key(source: bytes, command: list[str], options: list[tuple[str, ...]], deadline: float) -> str:
    """Return a name for what this compiler makes for this machine.

    A home may be shared by machines with other CPUs, and by containers with other libraries.
    """
    version = _run([*command, "--version"], deadline)
    parts = [
        source,
        os.path.realpath(command[0]),
        *command[1:],
        version,
        options,
        platform.machine(),
        platform.libc_ver(),
        _cpu(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _cpu() -> list[str]:
    """Return what the CPU is and can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return [platform.processor()]
    # One of each: the rest differs between cores (and, as the clock, between moments).
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return sorted({line for line in lines if line.partition(":")[0].strip() in wanted})


def _compile(
    source: bytes,
    command: list[str],
    options: list[tuple[str, ...]],
    path: Path,
    deadline: float,
) -> None:
    """Write the library and its digest to `path`, at once and whole."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as draft:
        library = Path(draft) / "library"
        for flags in options:
            what = ("-x", "c", "-", "-o", str(library), "-lm")
            try:
                _run([*command, *flags, *what], deadline, source, TMPDIR=draft)
                break
            except RuntimeError:
                if flags == options[-1]:
                    raise
        with library.open("ab") as file:
            # A loader does not look behind the end of what it loads.
            file.write(hashlib.sha256(library.read_bytes()).digest())
        library.chmod(0o700)
        library.replace(path)


def _run(argv: list[str], deadline: float, text: bytes = b"", **environment: str) -> bytes:
    """Run a compiler and return what it says.

    Raises:
        RuntimeError: it fails; with its first words.
    """
    done = subprocess.run(
        argv,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=max(0.0, deadline - time.monotonic()),
        env={**os.environ, "LC_ALL": "C", **environment},
        check=False,
    )
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        raise RuntimeError(f"exit status {done.returncode}: {said[:400]}")
    return done.stdout


def _is_intact(path: Path) -> bool:
    """Say whether a library is there as it was written; if not, another takes its place."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read()
    except FileNotFoundError:
        return False
    if found.st_uid != os.getuid() or found.st_mode & _BY_OTHERS:
        return False
    return hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]
