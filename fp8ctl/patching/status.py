"""What is applied to an installed engine, by the hashes of its files alone.

`take` reads everything once; `judge` is pure. Called by doctor, launch and the
commands of this package; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from fp8ctl import environment
from fp8ctl.errors import HunkError, UnsupportedError
from fp8ctl.patching import catalog, store, verify
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.names import RelPath, Sha256, sha256_or_none

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fp8ctl.environment import BackendName
    from fp8ctl.patching.catalog import Patch, Series
    from fp8ctl.patching.store import LedgerEntry

_TRIES = 20

State = Literal["pristine", "applied", "partial", "superseded", "drifted", "missing", "orphan"]

MEANING: dict[State, str] = {
    "partial": "a patch is in some of its files only",
    "superseded": "installed anew since it was patched",
    "drifted": "neither as released nor as fp8ctl left it",
    "missing": "not there",
    "orphan": "made or patched by fp8ctl for an engine that is no longer installed",
}
"""What a person should know of each state that is not as it should be."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything about one engine that was read from the disk, once.

    Attributes:
        version: of the installed engine, None if there is none.
        files: content of each file that the series or the ledger knows; None: not there.
        record: what RECORD says of them.
        ledger: what fp8ctl did, None if it did nothing or has lost it.
        blobs: the stored pre-images that the ledger names.
        interrupted: an earlier command was cut short.
        links: where the name of a file leads, of those that are links.
    """

    version: str | None
    files: Mapping[RelPath, bytes | None]
    record: Mapping[RelPath, Sha256]
    ledger: LedgerEntry | None
    blobs: Mapping[Sha256, bytes]
    interrupted: bool
    links: Mapping[RelPath, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileStatus:
    """One file.

    Attributes:
        path: the file.
        state: by hash.
        sha: of its content, None if it is not there.
        pristine: hash as released; None if it is not in the release.
        patches: ids that it holds.
        base: hash of what it was before fp8ctl, where that is known.
        matches_record: whether RECORD has this hash; None if RECORD does not name the file.
    """

    path: RelPath
    state: State
    sha: Sha256 | None
    pristine: Sha256 | None
    patches: frozenset[str]
    base: Sha256 | None
    matches_record: bool | None


@dataclass(frozen=True, slots=True)
class PatchStatus:
    """One patch: applied everywhere, in some of its files, or nowhere."""

    id: str
    title: str
    state: Literal["applied", "partial", "not applied"]


@dataclass(frozen=True, slots=True)
class SeriesStatus:
    """One engine.

    Attributes:
        backend: "vllm" or "sglang".
        series: name of the series that the status is about.
        version: installed version, None if it is not installed.
        files: in path order.
        patches: in series order.
        interrupted: an earlier command was cut short; the next `patch` or `revert` mends it.
        orphan: the engine is not there, or in another version, and what fp8ctl left of it is;
            `files` are then those alone.
    """

    backend: str
    series: str
    version: str | None
    files: tuple[FileStatus, ...]
    patches: tuple[PatchStatus, ...]
    interrupted: bool
    orphan: bool = False

    @property
    def applied(self) -> frozenset[str]:
        """Ids of the patches that are applied in all of their files."""
        return frozenset(p.id for p in self.patches if p.state == "applied")

    @property
    def present(self) -> frozenset[str]:
        """Ids of the patches that are applied in one of their files at least."""
        return frozenset(p.id for p in self.patches if p.state != "not applied")

    @property
    def hashes(self) -> dict[str, str]:
        """Hash of each file that holds a patch, by path: a key for caches of compiled code."""
        return {f.path: f.sha for f in self.files if f.patches and f.sha}

    def expectation(self, root: Path) -> dict[str, object]:
        """Return what a process finds that imports these files now, as JSON types.

        Args:
            root: the folder that the paths start from.
        """
        return {
            "schema": 1,
            "root": str(root),
            "series": self.series,
            "patches": [p.id for p in self.patches if p.state == "applied"],
            "files": {f.path: f.sha for f in self.files},
        }

    @property
    def state(self) -> State:
        """The state that a person should hear about first."""
        if self.orphan:
            return "orphan"
        states = {f.state for f in self.files}
        order: tuple[State, ...] = ("missing", "drifted", "partial", "superseded", "applied")
        return next((s for s in order if s in states), "pristine")

    def file(self, path: RelPath) -> FileStatus:
        """Return the status of a file that it names."""
        return next(f for f in self.files if f.path == path)


def inspect(
    site_packages: Path, backend: BackendName, *, series: Series | None = None
) -> SeriesStatus:
    """Say what is applied to an engine; reads only.

    Args:
        site_packages: where it is installed.
        backend: which engine.
        series: instead of the bundled series of the installed version.
    """
    with Root(site_packages) as root:
        version = verify.installed_version(root, backend)
        if version is None or not catalog.covers(backend, version):
            version = environment.SUPPORTED[backend]
        series = series or catalog.load(backend, version)
        return judge(series, take(root, series))


def leftover(site_packages: Path, backend: BackendName) -> SeriesStatus | None:
    """Return what fp8ctl left of an engine that is gone, None if nothing; reads only.

    Gone is an engine that was uninstalled, replaced by another version, or by an
    editable install, whose files lie elsewhere.
    """
    with Root(site_packages) as root:
        known = backend in store.read_ledger(root).entries
        if not known and not root.has_folder(backend):
            return None
        try:
            series = catalog.load(backend, environment.SUPPORTED[backend])
        except UnsupportedError:
            return None
        status = judge(series, take(root, series))
        return status if status.orphan else None


def way_out(status: SeriesStatus, *, site_packages: Path, target: str, reinstall: str) -> str:
    """Return the command that leads out of a state that is not as it should be.

    Args:
        status: of the engine.
        site_packages: where it is installed.
        target: the options that name the environment, with a leading space.
        reinstall: the command that installs the engine anew.
    """
    if status.orphan:
        named = environment.target_options(None, site_packages)
        return f"fp8ctl revert --backend {status.backend}{named}"
    patch = f"fp8ctl patch --backend {status.backend}{target}"
    bad = [f for f in status.files if f.state in ("missing", "drifted")]
    if not bad or status.interrupted:
        return patch
    # As installed, and not as released: another build, which a reinstall would bring again.
    as_installed = all(f.state == "drifted" and f.matches_record for f in bad)
    return f"{patch} --allow-drift" if as_installed else reinstall


def take(root: Root, series: Series) -> Snapshot:
    """Read everything that the series and the ledger know about an engine.

    Without the lock: where somebody changes it meanwhile it is read again, so that a snapshot
    is of one moment, or is marked as interrupted.
    """
    for _ in range(_TRIES):
        before = store.stamp(root)
        snapshot = _take(root, series)
        if store.stamp(root) == before:
            return snapshot
    return replace(snapshot, interrupted=True)


def _take(root: Root, series: Series) -> Snapshot:
    entry = store.read_ledger(root).entries.get(series.backend)
    paths = sorted({*series.pristine, *(entry.files if entry else ())})
    # An installer may have made links into its cache (`uv pip install --link-mode symlink`).
    contents = {p: root.read(p, through=True) for p in paths}
    wanted = {f.pre for f in entry.files.values() if f.pre} if entry else set()
    blobs = {sha: store.read_blob(root, sha) for sha in wanted}
    return Snapshot(
        verify.installed_version(root, series.distribution),
        {p: None if f is None else f.data for p, f in contents.items()},
        verify.record_hashes(root, series.distribution, paths),
        entry,
        {sha: data for sha, data in blobs.items() if data is not None},
        store.needs_recovery(root),
        {p: f.link for p, f in contents.items() if f is not None and f.link is not None},
    )


def judge(series: Series, snapshot: Snapshot) -> SeriesStatus:
    """Say what a snapshot means."""
    gone = not _is_for(series, snapshot.version)
    files = tuple(_file(series, snapshot, path, gone=gone) for path in sorted(snapshot.files))
    if gone:
        listed = snapshot.ledger.files if snapshot.ledger else ()
        files = tuple(f for f in files if f.patches or f.path in listed)
    patches = tuple(_patch(p, files) for p in series.patches)
    torn = {p.id for p in patches if p.state == "partial"}
    files = tuple(_mark(f, torn) for f in files)
    return SeriesStatus(
        series.backend,
        series.name,
        snapshot.version,
        files,
        patches,
        snapshot.interrupted,
        orphan=gone and bool(files),
    )


def _is_for(series: Series, version: str | None) -> bool:
    """Tell whether a series is for the version that is installed; a local part is ignored."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        public = Version(Version(version or "").public)
    except InvalidVersion:
        return False
    return SpecifierSet(series.version).contains(public, prereleases=True)


def _file(series: Series, snapshot: Snapshot, path: RelPath, *, gone: bool) -> FileStatus:
    sha = sha256_or_none(snapshot.files[path])
    known = path in series.pristine
    pristine = series.pristine.get(path)
    record = snapshot.record.get(path)
    entry = snapshot.ledger.files.get(path) if snapshot.ledger else None
    upgraded = snapshot.ledger is not None and snapshot.ledger.version != snapshot.version
    held = series.held(path, sha) if known else None

    state: State
    patches: frozenset[str] = frozenset()
    base: Sha256 | None = None
    if gone and sha is not None and sha == record:
        # Another release's own file, even where it has the very bytes that fp8ctl once made.
        state, base = "superseded", sha
    elif entry is not None and sha == entry.post:
        state, patches, base = "applied", frozenset(entry.patches), entry.pre
    elif known and sha == pristine:
        state, base = ("superseded" if entry else "pristine"), sha
    elif held:
        state, patches, base = "applied", held, pristine
    elif entry is not None and (upgraded or sha == entry.pre or (sha and sha == record)):
        state, base = "superseded", sha
    elif sha is None and (known or entry is not None):
        state = "missing"
    else:
        state, base = "drifted", sha
    if gone and patches:
        state = "orphan"
    matches = None if record is None else sha == record
    return FileStatus(path, state, sha, pristine, patches, base, matches)


def _patch(patch: Patch, files: tuple[FileStatus, ...]) -> PatchStatus:
    touched = {f.path for f in patch.files}
    holding = sum(patch.id in f.patches for f in files if f.path in touched)
    if not holding:
        return PatchStatus(patch.id, patch.title, "not applied")
    return PatchStatus(patch.id, patch.title, "applied" if holding == len(touched) else "partial")


def _mark(file: FileStatus, torn: set[str]) -> FileStatus:
    if file.state != "applied" or not file.patches & torn:
        return file
    return FileStatus(
        file.path,
        "partial",
        file.sha,
        file.pristine,
        file.patches,
        file.base,
        file.matches_record,
    )


def base_content(series: Series, snapshot: Snapshot, file: FileStatus) -> bytes | None:
    """Return what a file was before fp8ctl: as it is, as stored, or by reversing its patches.

    Raises:
        HunkError: it cannot be had: the stored pre-image is lost, and the patches do not come off.
    """
    if file.base == file.sha:
        return snapshot.files[file.path]
    if file.base is None:
        return None
    if file.base in snapshot.blobs:
        return snapshot.blobs[file.base]
    if file.path not in series.pristine or file.base != file.pristine:
        raise HunkError(f"{file.path}: its stored pre-image is lost")
    return series.unbuild(file.path, snapshot.files[file.path], file.patches)
