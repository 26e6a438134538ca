"""Starting a server and ending every process of it. The only module that signals.

A pid alone names nobody: it is used again. A process is named by its pid, the
tick at which it started and the boot it belongs to; and the members of a
server are its descendants plus every process that carries its run folder in
its environment, which a child keeps when it leaves the session, the process
group and its parent. Linux only (/proc). Called by `server` and `launching`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fp8ctl.engines.base import RUN_DIR_VARIABLE
from fp8ctl.errors import BusyError, EngineFailedError, NotPermittedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fp8ctl.engines.base import LaunchPlan

_PROC: Final = Path("/proc")
_POLL: Final = 0.05
GRACE_ROOT: Final = 10.0
"""Seconds that the server's own clean-up gets: SGLang looks for SIGTERM every 5 s."""
GRACE_ALL: Final = 2.0
GRACE_KILL: Final = 10.0

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Servers that this very process started: only their parent can reap them."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, for good.

    Attributes:
        pid: process id.
        start_ticks: field 22 of /proc/PID/stat, clock ticks since boot. Unlike
            psutil's create_time it does not move when the clock is set.
        boot_id: which boot those ticks count from.
    """

    pid: int
    start_ticks: int
    boot_id: str

    def alive(self) -> bool:
        """Say whether this very process runs; one that ended unreaped does not."""
        found = _stat(self.pid)
        return (
            found is not None
            and found.start_ticks == self.start_ticks
            and found.state not in {"Z", "X"}
            and boot_id() == self.boot_id
        )


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    state: str
    start_ticks: int


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> Identity | None:
    """Return the identity of a running process, None where there is none."""
    found = _stat(pid)
    return None if found is None else Identity(pid, found.start_ticks, boot_id())


def spawn(plan: LaunchPlan, log: Path, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, with all its output in `log`.

    Raises:
        EngineFailedError: the interpreter cannot be run.
    """
    env = {**environ, **dict(plan.env)}
    env |= {name: environ[source] for name, source in plan.env_from if source in environ}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        child = subprocess.Popen(
            list(plan.argv),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    except OSError as e:
        raise EngineFailedError(
            f"cannot run {plan.argv[0]}: {e.strerror}", hint="fp8ctl doctor"
        ) from e
    finally:
        os.close(descriptor)
    _children[child.pid] = child
    return child


def members(root: Identity | None, run_dir: Path) -> frozenset[Identity]:
    """Return every living process of a server.

    Args:
        root: the process that was started; ignored where its pid names another by now.
        run_dir: the server's run folder, the marker in its processes' environment.
    """
    boot = boot_id()
    table = {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, stat in table.items():
        children.setdefault(stat.parent, []).append(pid)
    marker = f"{RUN_DIR_VARIABLE}={run_dir}".encode()
    found = {pid for pid in table if marker in _environment(pid)}
    if root is not None and root.alive():
        found.add(root.pid)
    queue = list(found)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    # A shell that was started inside a server may call `stop`: spare it and its parents.
    found -= _ancestry(table)
    return frozenset(
        Identity(pid, table[pid].start_ticks, boot)
        for pid in found
        if table[pid].state not in {"Z", "X"}
    )


def stop_tree(
    root: Identity | None,
    run_dir: Path,
    *,
    grace: float = GRACE_ROOT,
) -> int:
    """End a server: SIGTERM to the root, then to all, then SIGKILL, until nothing is left.

    Args:
        root: the process that was started.
        run_dir: the server's run folder.
        grace: seconds for the server's own clean-up.

    Returns how many processes were ended.

    Raises:
        NotPermittedError: a process belongs to somebody else, or cannot be killed.
    """
    seen: set[Identity] = set()
    child = _children.get(root.pid) if root is not None else None

    def left() -> frozenset[Identity]:
        if child is not None:
            child.poll()
        now = members(root, run_dir)
        seen.update(now)
        # A worker keeps running when its parent, through which it was found, has gone.
        return now | {one for one in seen if one.alive()}

    if root is not None and root.alive():
        left()
        _signal((root,), signal.SIGTERM)
        end = time.monotonic() + grace
        while root.alive() and left() and time.monotonic() < end:
            time.sleep(_POLL)
    told: set[Identity] = set()
    end = time.monotonic() + GRACE_ALL
    while (now := left()) and time.monotonic() < end:
        _signal(now - told, signal.SIGTERM)
        told |= now
        time.sleep(_POLL)
    end = time.monotonic() + GRACE_KILL
    while (now := left()) and time.monotonic() < end:
        # Again and again: what was just being forked is new in the next round.
        _signal(now, signal.SIGKILL)
        time.sleep(_POLL)
    if now:
        pids = sorted(one.pid for one in now)
        raise NotPermittedError(
            f"process {pids[0]} does not end, not even by SIGKILL",
            hint=f"ps -o pid,stat,wchan,cmd -p {','.join(map(str, pids))}",
        )
    if child is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
            _children.pop(child.pid, None)
    return len(seen)


def refuse_taken_port(host: str, port: int) -> None:
    """Refuse a port on which somebody listens, and say who.

    Raises:
        BusyError: it is taken.
        UsageError: the host is not an address of this machine.
        NotPermittedError: this user may not listen there.
    """
    import errno

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the engines do; without it a port in TIME_WAIT looks taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            # Only listening finds a listener that set SO_REUSEPORT.
            probe.listen(1)
    except socket.gaierror as e:
        raise UsageError(f"--host {host!r}: {e.strerror}", hint="--host 127.0.0.1") from e
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise BusyError(
                f"port {port} on {host} is taken by {port_holder(port) or 'another process'}",
                hint=f"--port {free_port(host)}",
                data={"host": host, "port": port},
            ) from e
        if e.errno == errno.EACCES:
            raise NotPermittedError(
                f"this user may not listen on port {port}", hint="--port 30000"
            ) from e
        raise UsageError(
            f"--host {host!r} is not an address of this machine: {e.strerror}",
            hint="--host 127.0.0.1",
        ) from e


def free_port(host: str) -> int:
    """Return a port that nobody listens on just now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def listens(those: Iterable[Identity], port: int) -> bool:
    """Say whether any of these processes listens on a port, on whatever address."""
    import psutil

    for one in those:
        with contextlib.suppress(psutil.Error, OSError):
            for connection in psutil.Process(one.pid).net_connections(kind="tcp"):
                here = connection.status == psutil.CONN_LISTEN and connection.laddr
                if here and connection.laddr.port == port:
                    return True
    return False


def overlap(one: str, other: str) -> bool:
    """Say whether two addresses cannot both be listened on at one port."""
    anywhere = {"", "0.0.0.0", "::"}  # noqa: S104
    if one in anywhere or other in anywhere or one == other:
        return True
    return bool(_addresses(one) & _addresses(other))


def _addresses(host: str) -> set[str]:
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {str(address[0]) for *_, address in found}


def port_holder(port: int) -> str | None:
    """Return who listens on a port, as `pid 123 (name)`; None where the system does not tell."""
    import psutil

    try:
        for connection in psutil.net_connections(kind="tcp"):
            listening = connection.status == psutil.CONN_LISTEN
            if listening and connection.laddr and connection.laddr.port == port and connection.pid:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        return None
    return None


def _signal(targets: Iterable[Identity], number: signal.Signals) -> None:
    for target in targets:
        try:
            # The descriptor pins the process, so the check cannot go stale before the signal.
            descriptor = os.pidfd_open(target.pid)
        except ProcessLookupError:
            continue
        try:
            if target.alive():
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            continue
        except PermissionError as e:
            raise NotPermittedError(
                f"process {target.pid} belongs to another user", hint=f"sudo kill {target.pid}"
            ) from e
        finally:
            os.close(descriptor)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir(_PROC) if name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses of its own.
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(parent=int(fields[1]), state=fields[0], start_ticks=int(fields[19]))


def _environment(pid: int) -> frozenset[bytes]:
    try:
        return frozenset((_PROC / str(pid) / "environ").read_bytes().split(b"\0"))
    except OSError:
        return frozenset()


def _ancestry(table: Mapping[int, _Stat]) -> set[int]:
    line = {os.getpid()}
    pid = os.getpid()
    while (stat := table.get(pid)) is not None and stat.parent not in line and stat.parent > 0:
        pid = stat.parent
        line.add(pid)
    return line
