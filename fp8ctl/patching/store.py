"""fp8ctl's state in a patched environment: `<site-packages>/.fp8ctl/`.

    lock            flock of the command at work, its pid inside
    ledger.json     what is applied, per backend and file
    journal/TX.json the transaction under way
    blobs/SHA256    contents that a revert or a roll-back may need

It travels with the environment and the container layer. Losing it is
survivable: the hashes of the files say what is applied. Called by `status`
(reading) and `transaction`; changes files through `fsops` alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fp8ctl.errors import BusyError, DiffError, DriftError, Fp8ctlError
from fp8ctl.patching.names import RelPath, Sha256, parse_relpath, parse_sha256, sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fp8ctl.patching.fsops import Root

FOLDER = ".fp8ctl"
LOCK = f"{FOLDER}/lock"
LEDGER = f"{FOLDER}/ledger.json"
JOURNAL = f"{FOLDER}/journal"
BLOBS = f"{FOLDER}/blobs"
_SCHEMA = 1
_TEMPORARY = ".tmp-"
# The holder of a lock writes its pid right after it has it.
_PID_S = 0.25


@dataclass(frozen=True, slots=True)
class LedgerFile:
    """What fp8ctl did to one file.

    Attributes:
        pre: hash of the content that revert puts back; None: fp8ctl made the file.
        post: hash of the content that fp8ctl left.
        patches: ids that the file holds, in series order.
        link: where the name led before, if an installer had made it a link into its cache.
    """

    pre: Sha256 | None
    post: Sha256
    patches: tuple[str, ...]
    link: str | None = None


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What is applied to one engine.

    Attributes:
        version: of the engine when it was patched.
        series: name of the series.
        patches: hash of each applied diff, by id.
        files: what was done, by path.
    """

    version: str
    series: str
    patches: Mapping[str, Sha256]
    files: Mapping[RelPath, LedgerFile]

    def to_json(self) -> dict[str, object]:
        """Return it as JSON types."""
        return {
            "version": self.version,
            "series": self.series,
            "patches": dict(self.patches),
            "files": {
                path: {"pre": f.pre, "post": f.post, "patches": list(f.patches)}
                | ({} if f.link is None else {"link": f.link})
                for path, f in self.files.items()
            },
        }

    @staticmethod
    def from_json(raw: Mapping[str, object]) -> LedgerEntry:
        """Read what `to_json` wrote; raises KeyError, TypeError, ValueError or DiffError."""
        files: dict[RelPath, LedgerFile] = {}
        for path, f in _mapping(raw["files"]).items():
            file = _mapping(f)
            pre = file["pre"]
            files[parse_relpath(path)] = LedgerFile(
                None if pre is None else parse_sha256(pre),
                parse_sha256(file["post"]),
                _strings(file["patches"]),
                _text_or_none(file.get("link")),
            )
        patches = {k: parse_sha256(v) for k, v in _mapping(raw["patches"]).items()}
        return LedgerEntry(str(raw["version"]), str(raw["series"]), patches, files)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Everything that is applied in one environment, by backend."""

    entries: Mapping[str, LedgerEntry] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return it as JSON types."""
        entries = {backend: e.to_json() for backend, e in sorted(self.entries.items())}
        return {"schema": _SCHEMA, "engines": entries}

    @staticmethod
    def from_json(raw: object) -> Ledger:
        """Read what `to_json` wrote; raises KeyError, TypeError, ValueError or DiffError."""
        body = _mapping(raw)
        if body.get("schema") != _SCHEMA:
            raise ValueError(f"schema {body.get('schema')!r}, expected {_SCHEMA}")
        entries = _mapping(body["engines"])
        return Ledger({k: LedgerEntry.from_json(_mapping(v)) for k, v in entries.items()})


@dataclass(frozen=True, slots=True)
class JournalOp:
    """One file of a transaction; None stands for a file that is not there.

    Attributes:
        path: the file.
        staged: name of the new content in the same folder; "" where the file is removed.
        old: hash before.
        new: hash after.
        mode: permission bits of either.
        owner: user and group of either.
        old_link: where the name led before, if it was a link.
        new_link: where it leads after, if it becomes one again.
    """

    path: RelPath
    staged: str
    old: Sha256 | None
    new: Sha256 | None
    mode: int
    owner: tuple[int, int]
    old_link: str | None = None
    new_link: str | None = None

    @property
    def staged_path(self) -> str:
        """Path of the staged file."""
        return self._beside(self.staged)

    @property
    def back_path(self) -> str:
        """Path at which the old content is staged, to put it back."""
        return self._beside(f".{self.path.rpartition('/')[2]}.fp8ctl-back")

    def _beside(self, name: str) -> str:
        return f"{self.path.rpartition('/')[0]}/{name}".removeprefix("/")


@dataclass(frozen=True, slots=True)
class Journal:
    """A transaction under way.

    Attributes:
        tx: its name.
        committed: False while it stages: recovery then only removes what it staged.
        ops: in order.
        made: folders that it makes.
        dropped: folders that it removes if they are then empty, deepest first.
        before: what the ledger said.
        ledger: what the ledger says once it is done.
    """

    tx: str
    committed: bool
    ops: tuple[JournalOp, ...]
    made: tuple[RelPath, ...]
    dropped: tuple[RelPath, ...]
    before: Ledger
    ledger: Ledger

    @property
    def path(self) -> str:
        """Where it is stored."""
        return f"{JOURNAL}/{self.tx}.json"

    def to_json(self) -> dict[str, object]:
        """Return it as JSON types."""
        return {
            "schema": _SCHEMA,
            "tx": self.tx,
            "committed": self.committed,
            "ops": [
                {
                    "path": op.path,
                    "staged": op.staged,
                    "old": op.old,
                    "new": op.new,
                    "mode": op.mode,
                    "owner": list(op.owner),
                    "old_link": op.old_link,
                    "new_link": op.new_link,
                }
                for op in self.ops
            ],
            "made": list(self.made),
            "dropped": list(self.dropped),
            "before": self.before.to_json(),
            "ledger": self.ledger.to_json(),
        }

    @staticmethod
    def from_json(raw: object) -> Journal:
        """Read what `to_json` wrote; raises KeyError, TypeError, ValueError or DiffError."""
        body = _mapping(raw)
        if body.get("schema") != _SCHEMA:
            raise ValueError(f"schema {body.get('schema')!r}, expected {_SCHEMA}")
        ops = []
        for o in body["ops"] if isinstance(body["ops"], list) else ():
            op = _mapping(o)
            staged, (uid, gid) = str(op["staged"]), _integers(op["owner"])
            if staged:
                parse_relpath(staged)
            ops.append(
                JournalOp(
                    parse_relpath(str(op["path"])),
                    staged,
                    None if op["old"] is None else parse_sha256(op["old"]),
                    None if op["new"] is None else parse_sha256(op["new"]),
                    _integers([op["mode"]])[0],
                    (uid, gid),
                    _text_or_none(op.get("old_link")),
                    _text_or_none(op.get("new_link")),
                )
            )
        return Journal(
            str(body["tx"]),
            body["committed"] is True,
            tuple(ops),
            tuple(parse_relpath(f) for f in _strings(body["made"])),
            tuple(parse_relpath(f) for f in _strings(body["dropped"])),
            Ledger.from_json(body["before"]),
            Ledger.from_json(body["ledger"]),
        )


def read_ledger(root: Root) -> Ledger:
    """Return what is applied; empty if there is no ledger.

    Raises:
        DriftError: it cannot be understood.
    """
    file = root.read(LEDGER)
    if file is None:
        return Ledger()
    try:
        return Ledger.from_json(json.loads(file.data))
    except (KeyError, TypeError, ValueError, DiffError) as e:
        path = root.path / LEDGER
        raise DriftError(
            f"{path} cannot be read: {e}",
            # Without a ledger the hashes of the files decide, which is enough.
            hint=f"mv {path} {path}.broken && fp8ctl doctor --site-packages {root.path}",
        ) from e


def read_journal(root: Root) -> Journal | None:
    """Return the transaction that an earlier command left unfinished, None if there is none.

    Raises:
        DriftError: it cannot be understood.
    """
    for name in root.names(JOURNAL):
        if name.startswith(_TEMPORARY):
            continue
        file = root.read(f"{JOURNAL}/{name}")
        if file is None:
            continue
        try:
            return Journal.from_json(json.loads(file.data))
        except (KeyError, TypeError, ValueError, DiffError) as e:
            path = root.path / JOURNAL / name
            raise DriftError(
                f"{path} cannot be read: {e}",
                hint=f"mv {path} {root.path} && fp8ctl doctor --site-packages {root.path}",
            ) from e
    return None


def read_blob(root: Root, sha: Sha256) -> bytes | None:
    """Return a stored content, None if it is not there or not what its name says."""
    file = root.read(f"{BLOBS}/{sha}")
    return file.data if file is not None and sha256_of(file.data) == sha else None


def needs_recovery(root: Root) -> bool:
    """Tell whether an earlier command was cut short; reads only."""
    if not root.has_folder(FOLDER):
        return False
    if LEDGER.rpartition("/")[2] not in root.names(FOLDER):
        return True
    return root.has_folder(JOURNAL) or bool(_strays(root))


def stamp(root: Root) -> tuple[object, ...]:
    """Return what changes with every step of a transaction that other readers could see.

    Two equal stamps, and no journal: what was read in between belongs together.
    """
    return root.names(JOURNAL), root.identity(LEDGER), root.identity("")


def _strays(root: Root) -> tuple[str, ...]:
    """Return what is in the store and nothing refers to."""
    kept = {f.pre for entry in read_ledger(root).entries.values() for f in entry.files.values()}
    blobs = (f"{BLOBS}/{name}" for name in root.names(BLOBS) if name not in kept)
    temporary = (
        f"{folder}/{name}"
        for folder in (FOLDER, JOURNAL)
        for name in root.names(folder)
        if name.startswith(_TEMPORARY)
    )
    return (*blobs, *temporary)


@contextlib.contextmanager
def locked(root: Root, warn: Callable[[str], object]) -> Iterator[None]:
    """Hold the environment's lock; at the end remove the store if nothing is applied.

    Args:
        root: site-packages.
        warn: told if that last step fails: by then what was asked for is done.

    Raises:
        BusyError: another fp8ctl holds it; the message names its pid.
        NotPermittedError: the folder cannot be written.
    """
    fd = _acquire(root)
    try:
        try:
            root.overwrite(LOCK, fd, f"{os.getpid()}\n".encode())
            yield
        except BaseException:
            # The error that stopped the command is the one to show.
            with contextlib.suppress(Fp8ctlError):
                _sweep(root)
            raise
        with tidying(warn):
            _sweep(root)
    finally:
        try:
            with contextlib.suppress(Fp8ctlError):
                root.overwrite(LOCK, fd, b"")  # whoever comes next shall not name this process
        finally:
            os.close(fd)


@contextlib.contextmanager
def tidying(warn: Callable[[str], object]) -> Iterator[None]:
    """Turn an error of the block into a warning: nothing but fp8ctl's own folder is untidy."""
    try:
        yield
    except Fp8ctlError as e:
        warn(f"the files are as they should be, the rest is left to the next command: {e.message}")


def _acquire(root: Root) -> int:
    """Return the lock file, open and locked."""
    until = time.monotonic() + _PID_S
    for _ in range(100):
        try:
            root.make_folder(FOLDER)
            fd = root.lock_file(LOCK)
        except FileNotFoundError:
            continue  # a revert removed the folder just now
        mine = False
        try:
            locked = root.lock(LOCK, fd)
            mine = locked and root.same_file(LOCK, fd)
            if mine:
                return fd
            holder = _holder(fd)
        finally:
            if not mine:
                os.close(fd)
        if locked:
            continue  # locked a file that a revert has unlinked meanwhile
        if holder or time.monotonic() > until:
            raise BusyError(
                f"{root.path} is being changed by another fp8ctl, process {holder or 'unknown'}",
                hint="run it again when that one has ended",
                data={"pid": int(holder) if holder else None},
            )
        time.sleep(0.005)
    raise BusyError(f"{root.path / LOCK} cannot be held: it is made and removed all the time")


def _holder(fd: int) -> str:
    """Return the pid in a lock file; "" while there is none."""
    with contextlib.suppress(OSError):
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        return text if text.isdigit() else ""
    return ""


def _sweep(root: Root) -> None:
    """Remove what nothing refers to; the whole store when nothing is applied.

    A journal that is still there needs its blobs: then nothing is removed.
    """
    if read_journal(root) is not None:
        return
    for stray in _strays(root):
        root.unlink(stray)
    root.remove_folder(JOURNAL)
    if read_ledger(root).entries:
        return
    root.unlink(LEDGER)
    root.remove_folder(BLOBS)
    if root.names(FOLDER) == ("lock",):
        root.unlink(LOCK)
    root.remove_folder(FOLDER)
    root.sync_folder("")


def write_ledger(root: Root, ledger: Ledger) -> None:
    """Write the ledger durably, or remove it when nothing is applied."""
    if ledger.entries:
        root.replace(LEDGER, _dump(ledger.to_json()))
    else:
        root.unlink(LEDGER)
    root.sync_folder(FOLDER)


def write_journal(root: Root, journal: Journal) -> None:
    """Write a journal durably; with `committed` this is the commit point.

    The first time all folders above it are flushed: nothing may be staged before the way
    back is on the disk.
    """
    root.make_folder(JOURNAL)
    root.replace(journal.path, _dump(journal.to_json()))
    for folder in (JOURNAL,) if journal.committed else (JOURNAL, FOLDER, ""):
        root.sync_folder(folder)


def end_journal(root: Root, journal: Journal) -> None:
    """Remove a journal durably."""
    root.unlink(journal.path)
    root.sync_folder(JOURNAL)


def write_blobs(root: Root, contents: Mapping[Sha256, bytes]) -> None:
    """Store contents durably; one that is there already is not written again."""
    root.make_folder(BLOBS)
    for sha, data in contents.items():
        if read_blob(root, sha) is None:
            root.replace(f"{BLOBS}/{sha}", data)
    root.sync_folder(BLOBS)
    root.sync_folder(FOLDER)


def _dump(body: dict[str, object]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def _mapping(raw: object) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise TypeError(f"{type(raw).__name__} where an object was expected")
    return raw


def _text_or_none(raw: object) -> str | None:
    if raw is not None and not isinstance(raw, str):
        raise TypeError(f"{raw!r} where a string was expected")
    return raw


def _strings(raw: object) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(v, str) for v in raw):
        raise TypeError(f"{raw!r} where a list of strings was expected")
    return tuple(raw)


def _integers(raw: object) -> tuple[int, ...]:
    if not isinstance(raw, list) or not all(isinstance(v, int) for v in raw):
        raise TypeError(f"{raw!r} where a list of integers was expected")
    return tuple(raw)
