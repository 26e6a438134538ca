"""Run plans so that a kill at any instant leaves all-old or all-new.

    lock -> recover -> (the caller plans) -> compile-check -> free space ->
    pre-images -> journal -> stage -> re-hash -> commit the journal ->
    rename each -> drop bytecode -> flush folders -> re-read -> ledger -> tidy

Before the commit an interrupted command is forgotten; after it, it is
finished; which one is decided by hashes alone. An error that Python sees ends
in all-old until the ledger is written. From there on the change stands, and
what fails while fp8ctl tidies its own folder is a warning. Called by
`commands`; changes files through `fsops`.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8ctl.errors import ConflictError, DriftError, Fp8ctlError, NotPermittedError
from fp8ctl.patching import store
from fp8ctl.patching.names import RelPath, Sha256, sha256_of, sha256_or_none, short
from fp8ctl.patching.store import Journal, JournalOp, Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from fp8ctl.patching.fsops import Root
    from fp8ctl.patching.plan import FileOp, PatchPlan

# Timestamps in .pyc files have whole seconds (PEP 552): two more are never equal.
_MTIME_STEP_NS = 2_000_000_000
_SPARE_BYTES = 1 << 20


def _unheard(message: str) -> None:
    """Take a warning that nobody wants to hear."""


@contextlib.contextmanager
def begin(root: Root, warn: Callable[[str], object] = _unheard) -> Iterator[str | None]:
    """Take the lock and mend what an earlier command left; yield what was mended, in words.

    Args:
        root: site-packages.
        warn: told what could not be tidied.

    Raises:
        BusyError: another fp8ctl is at work here.
        DriftError: an unfinished transaction meets a file that it does not know.
        NotPermittedError: the file system refuses.
    """
    with store.locked(root, warn):
        yield recover(root, warn)


def run(
    root: Root,
    plans: Sequence[PatchPlan],
    *,
    python_version: tuple[int, int],
    warn: Callable[[str], object] = _unheard,
) -> None:
    """Execute plans, made under the lock that `begin` holds, as one transaction.

    Args:
        root: site-packages.
        plans: one per engine.
        python_version: of the interpreter that will import the files.
        warn: told what could not be tidied after the change.

    Raises:
        ConflictError: a result is not valid Python of that version.
        NotPermittedError: the file system refuses; nothing was changed, or the hint says
            that the next command will mend it.
        DriftError: a file changed since it was read; nothing was changed.
    """
    ops = [op for plan in plans for op in plan.ops]
    for op in ops:
        check_compiles(op, python_version)
    check_permitted(root, ops)
    journal = _journal(root, plans)
    if not ops:
        store.write_ledger(root, journal.ledger)
        return
    _check_space(root, ops)
    pre_images: dict[Sha256, bytes] = {}
    for plan in plans:
        pre_images.update(plan.pre_images)
    for op in ops:
        # The way back of this very transaction, whichever direction it goes.
        if op.old_bytes is not None:
            pre_images[sha256_of(op.old_bytes)] = op.old_bytes
    try:
        store.write_blobs(root, pre_images)
        store.write_journal(root, journal)
        _stage(root, journal, ops)
        store.write_journal(root, replace(journal, committed=True))
        _finish(root, journal)
    except BaseException as e:
        told = _changed(root, e.filename) if isinstance(e, FileNotFoundError) else e
        try:
            _roll_back(root, journal)
        except (Fp8ctlError, FileNotFoundError):
            # The journal stays, for the next command.
            if isinstance(told, Fp8ctlError):
                told.hint = (
                    "some files may be changed and others not: mend this, then run the same "
                    f"command again, or fp8ctl revert --site-packages {root.path}"
                )
        if told is not e:
            raise told from e
        raise
    _tidy(root, journal, warn)


def recover(root: Root, warn: Callable[[str], object] = _unheard) -> str | None:
    """Finish or forget an interrupted transaction; return what was done, None if nothing.

    Args:
        root: site-packages.
        warn: told what could not be tidied.

    Raises:
        DriftError: a file is neither as before nor as after it; nothing is touched.
        NotPermittedError: the file system refuses; the journal stays.
    """
    journal = store.read_journal(root)
    if journal is None:
        return None
    try:
        return _recover(root, journal, warn)
    except FileNotFoundError as e:
        raise _changed(root, e.filename, hint="run the same command again") from e


def _recover(root: Root, journal: Journal, warn: Callable[[str], object]) -> str:
    if not journal.committed:
        _roll_back(root, journal)
        return "an interrupted command was undone: it had changed no file"
    present = {op.path: _sha(root, op.path) for op in journal.ops}
    for op in journal.ops:
        # One that is gone by now, with its engine perhaps, is nobody's content to lose.
        if present[op.path] not in (op.old, op.new, None):
            raise DriftError(
                f"{root.path / op.path} has sha256 {short(present[op.path])}, the interrupted "
                f"command knows {short(op.old)} and {short(op.new)}",
                hint=f"put one of them back, or remove {root.path / journal.path}",
            )
    ready = all(
        present[op.path] == op.new
        or (present[op.path] == op.old and (not op.staged or _sha(root, op.staged_path) == op.new))
        for op in journal.ops
    )
    if ready:
        _finish(root, journal)
        _tidy(root, journal, warn)
        return "an interrupted command was finished"
    _roll_back(root, journal)
    return "an interrupted command was undone"


def check_compiles(op: FileOp, python_version: tuple[int, int]) -> None:
    """Refuse a result that the target's Python cannot compile.

    Done by fp8ctl's own parser held to the target's grammar: no subprocess. A
    file that is put back is not looked at: it was installed like that.

    Raises:
        ConflictError: a syntax error, with its line.
    """
    if op.new_bytes is None or not op.patches or not op.path.endswith(".py"):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the engines' own escapes are not our business
            compile(op.new_bytes, op.path, "exec", dont_inherit=True)
            if python_version < sys.version_info[:2]:
                ast.parse(op.new_bytes, op.path, feature_version=python_version)
    except (SyntaxError, ValueError) as e:
        line = f" line {e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        version = ".".join(str(v) for v in python_version)
        raise ConflictError(
            f"{op.path}{line}: the patched file is not valid Python {version}: {e.args[0]}",
            hint="run fp8ctl with the engine's own Python version",
        ) from e


def check_permitted(root: Root, ops: Sequence[FileOp]) -> None:
    """Refuse a folder that this process may not change.

    Raises:
        NotPermittedError: with the folder's path.
    """
    for path in (store.FOLDER, *(op.path for op in ops)):
        if not root.writable(path):
            folder = (root.path / path).parent
            raise NotPermittedError(
                f"{folder} cannot be written by user {os.geteuid()}",
                hint="run it as the owner of this environment, or while the image is built",
                data={"path": str(folder)},
            )


def _check_space(root: Root, ops: Sequence[FileOp]) -> None:
    total = sum(len(data) for op in ops for data in (op.old_bytes, op.new_bytes) if data)
    needed, free = 2 * total + _SPARE_BYTES, root.free_bytes()
    if free < needed:
        raise NotPermittedError(
            f"{root.path} has {free} bytes free, expected at least {needed}",
            hint="free some space and run it again; nothing was changed",
        )


def _journal(root: Root, plans: Sequence[PatchPlan]) -> Journal:
    tx = f"{time.time_ns():x}-{os.getpid()}"
    before = store.read_ledger(root)
    entries = dict(before.entries)
    wanted: dict[RelPath, None] = {}
    dropped: set[RelPath] = set()
    ops: list[JournalOp] = []
    for plan in plans:
        entries.pop(plan.backend, None)
        if plan.ledger is not None:
            entries[plan.backend] = plan.ledger
        for op in plan.ops:
            ops.append(_journal_op(root, op, tx))
            if op.action == "create":
                wanted |= dict.fromkeys(_folders(op.path))
            elif op.action == "delete":
                # No wheel holds an empty folder: one that is left empty was made for our file,
                # or an installer could not remove it because our file was in it.
                dropped.update(_folders(op.path))
    made = tuple(f for f in wanted if not root.has_folder(f))
    return Journal(tx, False, tuple(ops), made, _inner_first(dropped), before, Ledger(entries))


def _journal_op(root: Root, op: FileOp, tx: str) -> JournalOp:
    file = root.read(op.path, through=True)
    if sha256_or_none(file.data if file else None) != op.old_sha:
        raise _changed(root, op.path)
    name = op.path.rpartition("/")[2]
    mode = file.mode if file else op.mode
    # What a link leads to may be another user's.
    owner = (file.uid, file.gid) if file and file.link is None else _owner(root, op.path)
    return JournalOp(
        op.path,
        f".{name}.fp8ctl-{tx}" if op.new_sha else "",
        op.old_sha,
        op.new_sha,
        mode,
        owner,
        file.link if file else None,
        # Not where the cache was cleaned meanwhile: then the stored content is put back.
        op.link if op.link and root.leads_to(op.path, op.link) == op.new_bytes else None,
    )


def _folders(path: RelPath) -> list[RelPath]:
    """Return the folders that a file lies in, the top one first."""
    folder = RelPath(path.rpartition("/")[0])
    return [*_folders(folder), folder] if folder else []


def _inner_first(folders: Collection[RelPath]) -> tuple[RelPath, ...]:
    """Return folders such that each comes before the one it lies in, as they can be removed."""
    return tuple(sorted(folders, reverse=True))


def _owner(root: Root, path: str) -> tuple[int, int]:
    """Return the owner of the nearest folder that is there."""
    try:
        return root.owner(path)
    except FileNotFoundError:
        return _owner(root, path.rpartition("/")[0])


def _stage(root: Root, journal: Journal, ops: Sequence[FileOp]) -> None:
    for folder in journal.made:
        root.make_folder(folder)
    for op, entry in zip(ops, journal.ops, strict=True):
        if op.new_bytes is not None:
            _write(root, entry.staged_path, entry, op.new_bytes, entry.new_link)
    for parent in _parents(journal):
        root.sync_folder(parent)
    for entry in journal.ops:
        # Somebody else may have edited it since it was read.
        if _sha(root, entry.path) != entry.old:
            raise _changed(root, entry.path)


def _write(root: Root, path: str, op: JournalOp, data: bytes, link: str | None) -> None:
    """Stage a new content of a file, with what else belongs to the file that is there now; or
    the link that it is to be.
    """
    if link is not None:
        root.link(path, link)
        return
    old = root.read(op.path, through=True)
    mtime = time.time_ns()
    xattrs: tuple[tuple[str, bytes], ...] = ()
    if old is not None:
        mtime = max(mtime, old.mtime_ns + _MTIME_STEP_NS)
        # What a link leads to has its own; they are not this file's.
        xattrs = root.xattrs(op.path) if old.link is None else ()
    root.stage(
        path,
        data,
        mode=op.mode,
        owner=op.owner,
        mtime_ns=mtime,
        xattrs=xattrs,
    )


def _finish(root: Root, journal: Journal) -> None:
    """Do what a committed journal says; every step may have been done already."""
    for op in journal.ops:
        root.unlink(op.back_path)  # of a way back that was cut short itself
        if _sha(root, op.path) == op.new:
            if op.staged:
                root.unlink(op.staged_path)
        elif op.staged:
            root.rename(op.staged_path, op.path.rpartition("/")[2])
        else:
            root.unlink(op.path)
    _settle(root, journal, journal.dropped)
    for op in journal.ops:
        found = _sha(root, op.path)
        if found != op.new:
            raise DriftError(
                f"{root.path / op.path} reads back as {short(found)}, {short(op.new)} was written",
                hint="run the same command again; if it says this again, see dmesg",
            )
    store.write_ledger(root, journal.ledger)


def _tidy(root: Root, journal: Journal, warn: Callable[[str], object]) -> None:
    """Remove a journal that is done: if it stays, the next command finds nothing left to do."""
    with store.tidying(warn):
        store.end_journal(root, journal)


def _roll_back(root: Root, journal: Journal) -> None:
    """Put every file of a journal back as it was before; a file of a third content stays."""
    for op in journal.ops:
        root.unlink(op.back_path)
        if op.staged:
            root.unlink(op.staged_path)
    for op in journal.ops:
        if _sha(root, op.path) != op.new:
            continue
        if op.old is None:
            root.unlink(op.path)
            continue
        data = store.read_blob(root, op.old)
        if data is None:
            raise DriftError(
                f"{root.path / op.path}: its content {short(op.old)} is not in the store",
                hint="reinstall the engine",
            )
        for folder in _folders(op.path):
            root.make_folder(folder)  # gone with the last file in it
        link = op.old_link if op.old_link and root.leads_to(op.path, op.old_link) == data else None
        _write(root, op.back_path, op, data, link)
        root.rename(op.back_path, op.path.rpartition("/")[2])
    # Folders of files that went with their engine: an installer leaves those with a staged file.
    gone = [op.path for op in journal.ops if op.old is not None and _sha(root, op.path) is None]
    _settle(root, journal, _inner_first({*journal.made, *(f for p in gone for f in _folders(p))}))
    if store.read_ledger(root) != journal.before:
        store.write_ledger(root, journal.before)
    else:
        root.sync_folder(store.FOLDER)  # what an earlier way back wrote need not be on the disk
    store.end_journal(root, journal)


def _settle(root: Root, journal: Journal, folders: Sequence[RelPath]) -> None:
    """Drop stale bytecode and folders that are no longer needed; make all names durable.

    All, whether this process changed them or not: one that was killed has flushed nothing,
    and once the journal is gone nobody looks again.
    """
    for op in journal.ops:
        root.drop_bytecode(op.path)
    for folder in folders:
        root.remove_folder(f"{folder}/__pycache__")
        root.remove_folder(folder)
    above = {folder.rpartition("/")[0] for folder in folders}
    for parent in sorted({*_parents(journal), *above}):
        root.sync_folder(f"{parent}/__pycache__".removeprefix("/"))
        root.sync_folder(parent)


def _parents(journal: Journal) -> list[str]:
    """Return every folder in which a transaction, or its way back, may change a name."""
    changed = {op.path for op in journal.ops} | {*journal.made, *journal.dropped}
    return sorted({path.rpartition("/")[0] for path in changed})


def _sha(root: Root, path: str) -> Sha256 | None:
    file = root.read(path, through=True)
    return sha256_or_none(file.data if file else None)


def _changed(
    root: Root, path: str, *, hint: str = "nothing was changed: run the same command again"
) -> DriftError:
    return DriftError(f"{root.path / path} was changed by somebody else just now", hint=hint)
