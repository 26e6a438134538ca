"""The run folders of the servers that fp8ctl started: one folder a server, named after it.

`<state>/servers/NAME/` (0700) holds server.json (what is here as `Record`),
server.log, rank-N.log, manifest.json, code.json, code/ and reports/. When a server has ended its
folder moves to `<state>/ended/NAME`, where `logs` still finds it. Called by
`server` and `launching`; knows nothing of processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

from fp8ctl import paths
from fp8ctl.errors import BusyError, NotFoundError, NotPermittedError, UsageError
from fp8ctl.process import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_RECORD: Final = "server.json"
_READY: Final = "ready"
_STOPPING: Final = "stopping"
_UNBORN: Final = 60.0
KEEP_ENDED: Final = 20
"""How many folders of ended servers are kept for their logs."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a started server.

    Attributes:
        name: unique among the running ones; also the folder's name.
        identity: the process that was started; every other one is found from it.
        engine: backend and version, such as "sglang 0.4.8".
        url: where it answers.
        model: the name under which it serves.
        source: the folder it was started from.
        mode: block, per-tensor, online, or the method asked for.
        await_push: whether it started closed.
        python: interpreter it runs on.
        site_packages: the environment it runs from.
        since: seconds since the epoch.
        host: the address it listens on, which may be all of the machine's; empty where unknown.
    """

    name: str
    identity: Identity
    engine: str
    url: str
    model: str
    source: str
    mode: str
    await_push: bool
    python: str
    site_packages: str
    since: float
    host: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON types."""
        return asdict(self)


def servers_dir() -> Path:
    """Return the folder of running servers, made if need be."""
    return _made(paths.state_dir() / "servers")


def ended_dir() -> Path:
    """Return the folder of servers that have ended, made if need be."""
    return _made(paths.state_dir() / "ended")


def folder(name: str) -> Path:
    """Return the run folder of a name, whether or not it exists.

    Raises:
        UsageError: it is not a name of a server (a path, for instance).
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not the name of a server", hint="fp8ctl ps")
    return servers_dir() / name


def free_name(backend: str, port: int) -> str:
    """Return the name that the next server of this backend and port gets."""
    taken = {path.name for path in servers_dir().iterdir()}
    name = f"{backend}-{port}"
    suffix = 2
    while name in taken:
        name = f"{backend}-{port}-{suffix}"
        suffix += 1
    return name


@contextlib.contextmanager
def one_launch_at_a_time() -> Iterator[None]:
    """Hold the lock under which a launch looks at the servers there are and becomes one."""
    path = servers_dir().with_name("launch.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def claim(name: str) -> Path:
    """Make the run folder of a new server.

    Raises:
        BusyError: another launch took the name in between.
    """
    path = folder(name)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError as e:
        raise BusyError(
            f"another launch is taking the name {name} just now", hint="fp8ctl ps"
        ) from e
    (path / "reports").mkdir(mode=0o700)
    return path


def write(record: Record) -> None:
    """Store a record, by rename, so that a reader never sees half of it."""
    path = folder(record.name) / _RECORD
    staged = path.with_name(f".{_RECORD}.{os.getpid()}")
    staged.write_text(json.dumps(record.to_json(), indent=2) + "\n")
    staged.replace(path)


def read(name: str) -> Record | None:
    """Return the record of a name, None where there is none or it cannot be read."""
    try:
        data = json.loads((folder(name) / _RECORD).read_text())
        data["identity"] = Identity(**data["identity"])
        return replace(Record(**data), name=name)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def names() -> tuple[str, ...]:
    """Return the name of every run folder, sorted."""
    return tuple(sorted(p.name for p in servers_dir().iterdir() if _NAME.fullmatch(p.name)))


def find(name: str) -> Record:
    """Return the record of a server.

    Raises:
        NotFoundError: there is none of that name.
    """
    record = read(name)
    if record is None:
        known = names()
        raise NotFoundError(
            f"there is no server {name!r}; "
            + (f"there is {', '.join(known)}" if known else "none is running"),
            hint="fp8ctl ps",
        )
    return record


def log_folder(name: str) -> Path:
    """Return the folder with the logs of a server, running or ended.

    Raises:
        NotFoundError: there never was one of that name, or its logs are gone.
    """
    running = folder(name)
    if running.is_dir():
        return running
    ended = ended_dir() / name
    if ended.is_dir():
        return ended
    find(name)
    raise AssertionError("unreachable")


def mark_ready(record: Record) -> None:
    """Leave word that the server has been ready: silent from now on means trouble."""
    with contextlib.suppress(OSError):
        (folder(record.name) / _READY).touch()


def was_ready(record: Record) -> bool:
    """Say whether the server has been ready."""
    return (folder(record.name) / _READY).exists()


def mark_stopping(name: str) -> None:
    """Leave word that the server is being stopped on purpose."""
    with contextlib.suppress(OSError):
        (folder(name) / _STOPPING).touch()


def is_stopping(record: Record) -> bool:
    """Say whether the server was stopped on purpose; also after it has ended."""
    run = folder(record.name) if read(record.name) == record else ended_dir() / record.name
    return (run / _STOPPING).exists()


def archive(record: Record) -> Path:
    """Move the folder of an ended server away and drop the oldest of those kept.

    Returns the folder's new place. Two callers at once are fine, and so is a
    new server that has taken the name since.
    """
    target = ended_dir() / record.name
    if read(record.name) == record:
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder(record.name).rename(target)
            shutil.rmtree(target / "code", ignore_errors=True)  # sockets of processes that ended
            os.utime(target)
    for old in sorted(ended_dir().iterdir(), key=_age, reverse=True)[KEEP_ENDED:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def discard_unborn(name: str) -> None:
    """Remove a run folder whose launch died before it wrote a record.

    A launch that is just under way is left alone for a minute.
    """
    path = folder(name)
    if read(name) is None and time.time() - _age(path) > _UNBORN:
        shutil.rmtree(path, ignore_errors=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _made(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        raise NotPermittedError(
            f"cannot make {path}: {e.strerror}", hint="export FP8CTL_HOME=/a/folder/you/own"
        ) from e
    return path
