"""The servers that fp8ctl started: list them, read their logs, stop them.

Bodies of `ps`, `logs` and `stop`. Run folders are `registry`'s, processes are
`process`'s; what is here joins the two and reports.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from fp8ctl import gate, registry
from fp8ctl.errors import BusyError, NotFoundError, UsageError
from fp8ctl.logtail import Tail
from fp8ctl.process import free_port, listens, members, overlap, refuse_taken_port, stop_tree

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.registry import Record
    from fp8ctl.render import Reporter

_COLUMNS: Final = ("name", "pid", "engine", "url", "state", "mode", "model", "since")
_JSON_LOG: Final = 1 << 20
_POLL: Final = 0.2


def running(*, ask_state: bool = True) -> tuple[tuple[tuple[Record, str], ...], tuple[str, ...]]:
    """Return the running servers with their states, and the names that were cleaned away.

    Besides the gate's states there are `starting`, `silent` (it was ready and answers
    no more) and `orphaned` (its first process is gone while others of it still run: it
    stays listed, so that `stop` can end it).

    Args:
        ask_state: False leaves the state of a living server at "running", without HTTP.
    """
    key = gate.api_key()
    alive: list[tuple[Record, str]] = []
    cleaned: list[str] = []
    for name in registry.names():
        record = registry.read(name)
        if record is None:
            registry.discard_unborn(name)
        elif record.identity.alive():
            alive.append((record, _state(record, key) if ask_state else "running"))
        elif members(record.identity, registry.folder(name)):
            alive.append((record, "orphaned"))
        else:
            registry.archive(record)
            cleaned.append(name)
    return tuple(alive), tuple(cleaned)


def _state(record: Record, key: str | None) -> str:
    """Return the state of a living server; what another one says at its address is not its."""
    state: str = gate.ask(record.url, key, timeout=1.0, pid=record.identity.pid).state
    if state == "locked":
        port = urlsplit(record.url).port or 0
        if not listens(members(record.identity, registry.folder(record.name)), port):
            state = "starting"
    return "silent" if state == "starting" and registry.was_ready(record) else state


def refuse_occupied(host: str, port: int) -> None:
    """Refuse a port that a server of fp8ctl has, or will have once it is up, or that is taken.

    Raises:
        BusyError: it is taken; the server is named.
        UsageError: the host is not an address of this machine.
        NotPermittedError: this user may not listen there.
    """
    for record, state in running(ask_state=False)[0]:
        if urlsplit(record.url).port == port and overlap(host, record.host):
            state = _state(record, gate.api_key()) if state == "running" else state
            raise BusyError(
                f"port {port} is taken by {record.name}, which is {state}",
                hint=f"--port {free_port('127.0.0.1')}, or fp8ctl stop {record.name}",
                data={"host": host, "port": port, "name": record.name, "state": state},
            )
    refuse_taken_port(host, port)


def run_ps(report: Reporter) -> dict[str, object]:
    """List the running servers, and clean up after those that have ended."""
    alive, cleaned = running()
    for name in cleaned:
        report.say(f"{name} has ended; its log is still there: fp8ctl logs {name}")
    rows = [
        {
            "name": record.name,
            "pid": record.identity.pid,
            "engine": record.engine,
            "url": record.url,
            "state": state,
            "mode": record.mode,
            "model": record.model,
            "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.since)),
        }
        for record, state in alive
    ]
    if rows:
        report.table(_COLUMNS, [[str(row[column]) for column in _COLUMNS] for row in rows])
    else:
        report.say("no server is running")
    return {"servers": rows, "cleaned": list(cleaned)}


def run_logs(
    report: Reporter, *, name: str, rank: int | None = None, follow: bool = False
) -> dict[str, object]:
    """Print the log of a server or of one of its workers; `follow` until the server ends.

    Raises:
        NotFoundError: there is no such server, or no such rank.
        UsageError: `follow` together with `--json`, which prints one document.
    """
    if follow and report.json_mode:
        raise UsageError("-f goes on, --json is one document", hint=f"fp8ctl logs {name} --json")
    folder = registry.log_folder(name)
    path = _log_of(folder, name, rank)
    if report.json_mode:
        text, cut = _end_of(path)
        return {"name": name, "rank": rank, "path": str(path), "truncated": cut, "text": text}
    record = registry.read(name)
    with Tail(path) as tail:
        while True:
            # Asked before reading: what was written up to its end is still read.
            ended = record is None or not record.identity.alive()
            while lines := tail.lines():
                for line in lines:
                    report.data(line)
            if not follow or ended:
                break
            time.sleep(_POLL)
        for line in tail.lines(final=True):
            report.data(line)
    return {"name": name, "rank": rank, "path": str(path)}


def run_stop(
    report: Reporter, *, name: str | None = None, everything: bool = False
) -> dict[str, object]:
    """Stop one server or all of them, each with every process of it.

    Raises:
        UsageError: neither a name nor --all, or both.
        NotFoundError: there is no server of that name.
        NotPermittedError: a process cannot be ended.
    """
    if (name is None) != everything:
        raise UsageError("stop takes the name of a server, or --all", hint="fp8ctl ps")
    if name is None:
        records = [record for record, _ in running(ask_state=False)[0]]
        if not records:
            report.say("no server is running")
    else:
        records = [registry.find(name)]
    stopped: list[object] = []
    for record in records:
        with report.step(f"stop {record.name}") as step:
            count = stop(record)
            step.note = f"{count} processes ended" if count else "it had ended already"
        stopped.append({"name": record.name, "processes": count})
    return {"stopped": stopped}


def stop(record: Record) -> int:
    """End every process of a server and put its folder away; returns how many there were."""
    folder = registry.folder(record.name)
    registry.mark_stopping(record.name)
    count = stop_tree(record.identity, folder)
    registry.archive(record)
    return count


def _log_of(folder: Path, name: str, rank: int | None) -> Path:
    path = folder / ("server.log" if rank is None else f"rank-{rank}.log")
    if path.is_file():
        return path
    ranks = sorted(
        (int(p.stem[5:]) for p in folder.glob("rank-*.log") if p.stem[5:].isdigit()),
    )
    what = f"log of rank {rank}" if rank is not None else "log"
    there = f"; there is rank {', '.join(map(str, ranks))}" if ranks else ""
    raise NotFoundError(f"server {name} has no {what}{there}", hint=f"fp8ctl logs {name}")


def _end_of(path: Path) -> tuple[str, bool]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _JSON_LOG))
        return file.read().decode(errors="replace"), size > _JSON_LOG
