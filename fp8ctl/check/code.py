"""Which code the processes of a server run, from what each of them says. Pure.

A process compares what it imported with what `launch` saw
(`engines.hooks.loaded`); here that becomes evidence: one line a process, and
one for every worker that says nothing. Called by `live`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fp8ctl.check.verdict import Evidence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.verdict import Result

PATH: Final = "/fp8ctl/code"
_ABSENT: Final = "no such file"


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a server.

    Attributes:
        name: `rank N`, or what it does.
        rank: of a worker, None for others.
        pid: its process id; None where a worker is missing.
        ok: modules whose code is that of the launch.
        absent: modules of patched files that it has not imported.
        wrapped: functions of them, `module:name`, that fp8ctl's own hooks wrap.
        by_engine: functions of them that the engine itself has replaced by others of its own.
        cost_ms: what it cost this process to keep watch on its imports.
        faults: the modules that run something else, as the process told them.
        why: why it says nothing; empty where it does.
    """

    name: str
    rank: int | None
    pid: int | None
    ok: int = 0
    absent: tuple[str, ...] = ()
    wrapped: tuple[str, ...] = ()
    by_engine: tuple[str, ...] = ()
    cost_ms: float = 0.0
    faults: tuple[Mapping[str, Any], ...] = ()
    why: str = ""

    @property
    def result(self) -> Result:
        """Failed with a fault or in silence; a process that imported nothing proves nothing."""
        if self.faults or self.why:
            return "failed"
        return "ok" if self.ok else "not visible"

    @property
    def told(self) -> str:
        """What was found, in words; of several faults the first."""
        if self.why:
            return self.why
        if self.faults:
            more = len(self.faults) - 1
            return _fault(self.faults[0]) + (f"; and {_files(more)} more" if more else "")
        if not self.ok:
            return f"none of {_files(len(self.absent))} imported"
        absent = f", {len(self.absent)} not imported" if self.absent else ""
        own = f", {len(self.by_engine)} functions replaced by the engine" if self.by_engine else ""
        return f"{_files(self.ok)} as launched{absent}{own}"

    def to_json(self) -> dict[str, object]:
        """Return the process as JSON types."""
        return {
            "process": self.name,
            "rank": self.rank,
            "pid": self.pid,
            "result": self.result,
            "message": self.told,
            "files": self.ok,
            "not_imported": list(self.absent),
            "wrapped": list(self.wrapped),
            "by_engine": list(self.by_engine),
            "cost_ms": self.cost_ms,
            "faults": [dict(one) for one in self.faults],
        }


@dataclass(frozen=True, slots=True)
class CodeReport:
    """What all processes together run.

    Attributes:
        processes: workers by rank, then the others.
        why: why nothing is visible; empty where something is.
        patches: ids that were applied at the launch.
        changed: files that were changed on disk since.
    """

    processes: tuple[Process, ...] = ()
    why: str = ""
    patches: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def result(self) -> Result:
        """Ok only where every worker is."""
        if any(one.result == "failed" for one in self.processes):
            return "failed"
        ranks = [one for one in self.processes if one.rank is not None]
        proven = bool(ranks) and all(one.result == "ok" for one in ranks)
        return "ok" if proven else "not visible"

    @property
    def message(self) -> str:
        """The report in one line, behind its result."""
        failed = [one for one in self.processes if one.result == "failed"]
        if failed:
            return f"{failed[0].name}: {failed[0].told}"
        if self.result == "not visible":
            return self.why or "no worker has imported any of the files"
        ranks = [one for one in self.processes if one.rank is not None]
        least, most = min(one.ok for one in ranks), max(one.ok for one in ranks)
        files = _files(most) if least == most else f"{least} to {_files(most)}"
        workers = "1 worker" if len(ranks) == 1 else f"{len(ranks)} workers"
        return f"{files} in {workers} (patches: {', '.join(self.patches) or 'none'})"

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """One line a process."""
        if not self.processes:
            return (Evidence("code", "not visible", self.why),)
        return tuple(Evidence(f"code, {one.name}", one.result, one.told) for one in self.processes)

    @property
    def in_force(self) -> Evidence:
        """Whether the patches of the launch are what every worker runs.

        A worker runs a patch where all that it imported of the patched files is as launched.
        """
        ranks = [one for one in self.processes if one.rank is not None]
        named = ", ".join(self.patches) or "none"
        if others := [one.name for one in ranks if one.result == "failed"]:
            found = f"{named}; not proven in {', '.join(others)}"
            return Evidence("patches", "failed", found, "in force in every worker")
        if not ranks or any(one.result != "ok" for one in ranks):
            return Evidence("patches", "not visible", self.why or "not every worker shows its code")
        workers = "1 worker" if len(ranks) == 1 else f"all {len(ranks)} workers"
        return Evidence("patches", "ok", f"{named}; in force in {workers}")

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON types."""
        return {
            "result": self.result,
            "message": self.message,
            "patches": list(self.patches),
            "changed_on_disk": list(self.changed),
            "processes": [one.to_json() for one in self.processes],
        }


def judge(answer: object) -> CodeReport:
    """Say what a server's answer means.

    Args:
        answer: body of GET /fp8ctl/code; None where the server has no such route.
    """
    if not isinstance(answer, dict):
        return CodeReport(why="its processes do not tell: it was not started by this fp8ctl")
    if answer.get("error"):  # it is made to tell, and cannot
        return CodeReport((Process("server", None, None, why=str(answer["error"])),))
    if answer.get("why"):
        return CodeReport(why=str(answer["why"]))
    try:
        found = [_process(one) for one in answer["processes"]]
        found += [
            Process(f"process {one['pid']}", None, int(one["pid"]), why=f"silent: {one['why']}")
            for one in answer["silent"]
        ]
        known = {one.rank for one in found}
        found += [
            Process(f"rank {rank}", rank, None, why="no process of this rank shows its code")
            for rank in range(int(answer["ranks"] or 0))
            if rank not in known
        ]
        found.sort(key=lambda one: (one.rank is None, one.rank or 0, one.name))
        return CodeReport(
            tuple(found),
            "" if found else "no process tells",
            tuple(answer["patches"]),
            tuple(answer["changed_on_disk"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        return CodeReport(why=f"not an answer about code: {type(e).__name__} {e}")


def changed(report: Mapping[str, object] | None) -> str:
    """Return the warning about files that were changed under a running server, or nothing."""
    files: Any = report.get("changed_on_disk") if report is not None else None
    if not files:
        return ""
    return (
        f"{', '.join(files[:3])}{' and others' if len(files) > 3 else ''} changed on disk since "
        "the launch: the server runs the older state; stop and launch it again to take effect"
    )


def _process(told: Mapping[str, Any]) -> Process:
    modules: Sequence[Mapping[str, Any]] = told["modules"]
    rank = told["rank"]
    return Process(
        f"rank {rank}" if rank is not None else str(told["role"]),
        rank,
        int(told["pid"]),
        sum(one["found"] == "ok" for one in modules),
        tuple(one["module"] for one in modules if one["found"] == "not imported"),
        tuple(told["wrapped"]),
        tuple(f"{one['module']}:{name}" for one in modules for name in one.get("by_engine", ())),
        float(told["cost_ms"]),
        tuple(one for one in modules if one["found"] not in {"ok", "not imported"}),
    )


def _fault(one: Mapping[str, Any]) -> str:
    module, file = one["module"], one["file"]
    if one["found"] == "other file":
        wanted = f"{one['wanted_file']} ({_short(one['wanted'])})"
        return f"{module} is {file} ({_short(one['sha256'])}), launched with {wanted}"
    if one["found"] == "other text":
        return f"{file} was {_short(one['sha256'])}, launched with {_short(one['wanted'])}"
    if one["found"] == "stale bytecode":
        return f"{file}: the code that runs is not a compile of it (stale bytecode)"
    if one["found"] == "replaced":
        names = ", ".join(one["names"][:3]) + (" and others" if len(one["names"]) > 3 else "")
        return f"{file}: replaced since it was imported: {names}"
    return f"{file} was imported past fp8ctl's hook"


def _short(sha: object) -> str:
    return f"sha256 {sha[:12]}" if isinstance(sha, str) else _ABSENT


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
