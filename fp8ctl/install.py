"""`fp8ctl install`: a managed environment with the pinned engine.

The environment is a virtual environment of the interpreter that runs fp8ctl,
filled from a lock file (`fp8ctl/locks/`): an unconstrained resolver today takes
packages newer than these engines were made for. pip and uv are started with the
user's environment, so that their index settings hold.

A virtual environment cannot be moved, so it is built in place: its folder is
marked as unfinished first and as finished last. An unfinished one is removed
and made again; a finished one with the same lock is used as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fp8ctl import environment, paths
from fp8ctl.environment import LABELS, MARKER, SUPPORTED, BackendName
from fp8ctl.errors import (
    BusyError,
    ConflictError,
    EngineFailedError,
    NotPermittedError,
)
from fp8ctl.installplan import CONSTRAINTS, Plan, make_plan, shown
from fp8ctl.packager import OWN_PLACE, Advice, run_command, run_pip
from fp8ctl.render import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.render import JsonObject, Reporter

_STARTED = ".fp8ctl-unfinished"
# Settings that would send packages somewhere else than into the new environment.
_MISLEADING = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PYTHONHOME", "PYTHONPATH")


def install(
    report: Reporter, backend: BackendName, device: str | None = None, folder: Path | None = None
) -> Path:
    """Make or reuse the environment of an engine, and return its interpreter.

    Raises:
        Fp8ctlError: see `execute` and `make_plan`.
    """
    plan = make_plan(backend, device, folder)
    if not is_finished(plan):
        execute(report, plan)
    return plan.python


def run(
    report: Reporter, *, engine: str, device: str | None, folder: Path | None, dry_run: bool
) -> JsonObject:
    """Run `fp8ctl install`."""
    plan = make_plan(environment.parse_backend(engine, "fp8ctl install"), device, folder)
    data: JsonObject = {
        "engine": plan.backend,
        "version": SUPPORTED[plan.backend],
        "device": plan.device,
        "folder": str(plan.folder),
        "python": str(plan.python),
        "installer": plan.tool,
        "download_bytes": plan.lock.download,
        "commands": [shown(plan, c) for c in plan.commands],
    }
    if is_finished(plan):
        report.data(f"already installed: {plan.python}")
        following = _following(plan)
        report.say(f"next: {following}")
        return data | {"changed": False, "next": following}
    if dry_run:
        _announce(report, plan)
        for command in plan.commands:
            report.data(shown(plan, command))
        return data | {"changed": False}
    seconds = execute(report, plan)
    report.data(f"{LABELS[plan.backend]} {SUPPORTED[plan.backend]}: {plan.python}")
    following = _following(plan)
    report.say(f"next: {following}")
    return data | {"changed": True, "seconds": round(seconds, 1), "next": following}


def _following(plan: Plan) -> str:
    """Return the command to type next; it names the environment unless that is found by itself."""
    found = {environment.find(None, None, wanted).python for wanted in (None, plan.backend)}
    target = "" if found == {plan.python} else environment.target_options(plan.python, None)
    return f"fp8ctl doctor{target}"


def is_finished(plan: Plan) -> bool:
    """Say whether the folder holds a finished environment made from the same lock."""
    try:
        marker = json.loads((plan.folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(marker, dict) and marker.get("lock") == plan.lock.sha256 and plan.python.exists()
    )


def execute(report: Reporter, plan: Plan) -> float:
    """Build the environment, and return the seconds it took.

    Raises:
        BusyError: another installation works on the folder, or a process runs from it.
        ConflictError: the folder holds something that fp8ctl did not make.
        NotFoundError: the index does not have a package, or cannot be reached.
        NotPermittedError: the folder cannot be written, or the disk is full.
        EngineFailedError: pip or uv failed in another way.
    """
    started = time.monotonic()
    _require_ours(plan)
    _require_space(plan)
    with _locked(plan):
        if is_finished(plan):  # by whoever held the lock before
            return time.monotonic() - started
        _require_ours(plan)
        _clear(plan)
        _announce(report, plan)
        absent = [folder for folder in plan.folder.parents if not folder.exists()]
        try:
            try:
                plan.folder.mkdir(parents=True)
                (plan.folder / _STARTED).write_text("made by fp8ctl install\n", encoding="utf-8")
            except OSError as e:
                raise _not_permitted(plan, plan.folder, e) from e
            _fill(report, plan)
        except BaseException:
            _remove(plan.folder)
            for folder in absent:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        marker = {
            "engine": plan.backend,
            "version": SUPPORTED[plan.backend],
            "device": plan.device,
            "lock": plan.lock.sha256,
        }
        # One rename turns unfinished into finished.
        mark = plan.folder / _STARTED
        mark.write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        mark.rename(plan.folder / MARKER)
    return time.monotonic() - started


def _announce(report: Reporter, plan: Plan) -> None:
    size = human_bytes(plan.lock.download)
    report.say(
        f"{LABELS[plan.backend]} {SUPPORTED[plan.backend]} for {plan.device}: "
        f"{len(plan.lock.pins)} packages, about {size} to download with {plan.tool} "
        f"(less what its cache holds), into {plan.folder}"
    )
    if plan.device == "cpu":
        report.say(
            "An index without a CPU build of torch adds about 2.5 GB of CUDA packages: "
            "PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can name a place that has one"
        )


def _fill(report: Reporter, plan: Plan) -> None:
    env = {k: v for k, v in os.environ.items() if k not in _MISLEADING}
    env["VIRTUAL_ENV"] = str(plan.folder)
    advice = Advice(plan.again, plan.elsewhere("/a/folder/on/another/disk"))
    with tempfile.TemporaryDirectory(prefix="fp8ctl-install-") as scratch:
        constraints = Path(scratch) / CONSTRAINTS
        constraints.write_text("\n".join(plan.constraints) + "\n", encoding="utf-8")
        make, *adds = [
            [str(constraints) if a == CONSTRAINTS else a for a in c] for c in plan.commands
        ]
        with report.step("Make the virtual environment"):
            run_command(make, env, advice)
        for number, command in enumerate(adds, 1):
            what = "torch" if number < len(adds) else "packages"
            if plan.tool == "uv":
                with report.step(f"Install {what} with uv"):
                    run_command(command, env, advice)
            else:
                # Of two commands the first brings torch, and the second all else.
                pins = {
                    pin: size
                    for pin, size in plan.lock.pins.items()
                    if len(adds) == 1 or pin.startswith("torch==") == (what == "torch")
                }
                run_pip(report, command, env, what, pins, advice)
    with report.step("Look at what was installed"):
        found = environment.find(plan.python, None).engines
        if not any(e.backend == plan.backend and e.supported for e in found):
            raise EngineFailedError(
                f"{plan.tool} ended well, but {plan.folder} holds no "
                f"{LABELS[plan.backend]} {SUPPORTED[plan.backend]}",
                hint=f"{plan.again} --dry-run",
            )


@contextlib.contextmanager
def _locked(plan: Plan) -> Iterator[None]:
    """Hold the lock of a folder; far from it, since nothing is to be left beside it."""
    path = lock_path(plan.folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise NotPermittedError(f"cannot write {path}: {e.strerror}", hint=OWN_PLACE) from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise BusyError(
                f"another installation works on {plan.folder}",
                hint=f"wait for it, and then: {plan.again}",
            ) from e
        yield
        # The file stays: unlinking it would let two holders lock two inodes.
    finally:
        os.close(handle)


def lock_path(folder: Path) -> Path:
    """Return the file whose lock an installation into `folder` holds."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    return paths.data_dir() / "engines" / ".locks" / name


def _require_ours(plan: Plan) -> None:
    """Refuse a folder that holds something which fp8ctl did not make."""
    folder = plan.folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConflictError(
            f"{folder} is there and is not a folder", hint=plan.elsewhere("/a/new/folder")
        )
    try:
        entries = set(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as e:
        raise _not_permitted(plan, folder, e) from e
    if entries and not entries & {_STARTED, MARKER}:
        raise ConflictError(
            f"{folder} is not empty and was not made by fp8ctl install",
            hint=plan.elsewhere("/a/new/folder"),
        )


def _clear(plan: Plan) -> None:
    """Remove what an earlier installation left."""
    folder = plan.folder
    if not folder.exists():
        return
    users = _processes(folder)
    if users:
        raise BusyError(
            f"{folder} is to be made anew, but processes run from it: {', '.join(users)}",
            hint="fp8ctl stop --all",
        )
    _remove(folder)
    if folder.exists():
        raise NotPermittedError(f"cannot remove {folder}", hint=f"rm -r {shlex.quote(str(folder))}")


def _processes(folder: Path) -> list[str]:
    import psutil

    prefix = str(folder) + os.sep
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        argv = process.info["cmdline"] or [""]
        if argv[0].startswith(prefix) and process.pid != os.getpid():
            found.append(str(process.pid))
    return found


def _remove(folder: Path) -> None:
    # A removal that is cut short must leave a folder that is ours and unfinished:
    # so it is marked so first, and the mark goes last.
    with contextlib.suppress(OSError):
        (folder / MARKER).rename(folder / _STARTED)
    with contextlib.suppress(OSError):
        for entry in sorted(folder.iterdir(), key=lambda p: p.name == _STARTED):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        folder.rmdir()


def _require_space(plan: Plan) -> None:
    """Refuse a disk that cannot hold even the smaller of the two builds of torch."""
    lock = plan.lock
    if lock.installed is None:
        return
    place = next(folder for folder in plan.folder.parents if folder.exists())
    usage = shutil.disk_usage(place)
    # One without a size is no disk; what it is, making the folder will tell.
    if not usage.total or usage.free >= lock.installed:
        return
    needed = f"about {human_bytes(lock.installed)}"
    if lock.installed_cuda is not None:
        needed += (
            f" with a CPU build of torch, about {human_bytes(lock.installed_cuda)} "
            "where the index has the CUDA build only"
        )
    raise NotPermittedError(
        f"{place} has {human_bytes(usage.free)} free; the environment takes {needed}",
        hint=plan.elsewhere("/a/folder/on/another/disk"),
    )


def _not_permitted(plan: Plan, path: Path, e: OSError) -> NotPermittedError:
    # What /proc says of a new folder, whose parents were all made or there.
    why = "its file system takes no new folders" if e.errno == errno.ENOENT else e.strerror
    return NotPermittedError(f"cannot make {path}: {why}", hint=plan.elsewhere())
