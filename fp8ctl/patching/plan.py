"""What `patch` and `revert` would do to one engine. Pure.

A plan is data: printed by `--dry-run`, executed unchanged by `transaction`.
A file is always built from its pristine content: what is applied plus what is
asked, in series order. Called by `commands`; touches nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fp8ctl.errors import CatalogError, ConflictError, DriftError, HunkError
from fp8ctl.patching.names import RelPath, Sha256, sha256_of, sha256_or_none, short
from fp8ctl.patching.status import base_content, judge
from fp8ctl.patching.store import LedgerEntry, LedgerFile

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from fp8ctl.patching.catalog import Series
    from fp8ctl.patching.status import FileStatus, SeriesStatus, Snapshot

Action = Literal["modify", "create", "delete"]


@dataclass(frozen=True, slots=True)
class FileOp:
    """One file to change.

    Attributes:
        path: the file.
        action: what happens to it.
        old_sha: hash before, None where it is not there.
        new_sha: hash after, None where it is removed.
        old_bytes: content before.
        new_bytes: content after.
        patches: ids that it then holds, in series order.
        mode: permission bits of a file that is created.
        offsets: per patch id, the line offsets at which its hunks were found.
        link: where the name led before fp8ctl, if the file becomes a link again.
    """

    path: RelPath
    action: Action
    old_sha: Sha256 | None
    new_sha: Sha256 | None
    old_bytes: bytes | None = field(repr=False)
    new_bytes: bytes | None = field(repr=False)
    patches: tuple[str, ...]
    mode: int
    offsets: tuple[tuple[str, tuple[int, ...]], ...]
    link: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """A patch of the series, whether the plan wants it applied, and why."""

    id: str
    taken: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PatchPlan:
    """What a command would do to one engine.

    Attributes:
        backend: "vllm" or "sglang".
        series: name of the series.
        choices: every patch, in series order.
        ops: the files that change; empty when everything is so already.
        ledger: what is then applied; None when nothing is.
        before: ids that are applied, wholly or in part.
        after: ids that then are.
        pre_images: contents that a revert will need, by hash; the store has the others.
        drifted: files of another build that are patched at an offset.
        notes: what a person should know.
        forgets: the ledger changes though no file does.
    """

    backend: str
    series: str
    choices: tuple[Choice, ...]
    ops: tuple[FileOp, ...]
    ledger: LedgerEntry | None
    before: tuple[str, ...]
    after: tuple[str, ...]
    pre_images: dict[Sha256, bytes] = field(repr=False)
    drifted: tuple[RelPath, ...]
    notes: tuple[str, ...]
    forgets: bool

    @property
    def empty(self) -> bool:
        """True when there is nothing to do."""
        return not self.ops and not self.forgets


def plan_patch(
    series: Series,
    snapshot: Snapshot,
    *,
    asked: Sequence[str] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    allow_drift: bool = False,
    target: str = "",
) -> PatchPlan:
    """Plan to apply patches on top of what is applied.

    Args:
        series: the patches.
        snapshot: the engine as it is.
        asked: ids; None for every default patch whose devices include `device`.
        device: of this host.
        allow_drift: patch a file of unknown content where each hunk fits in one place.
        target: options that name the environment, for hints.

    Raises:
        NotFoundError: an id that the series has not.
        ConflictError: patches that exclude each other.
        DriftError: a file that has to change is not known.
    """
    status = judge(series, snapshot)
    reasons: dict[str, str] = {}
    refused: dict[str, str] = {}
    for patch in series.patches:
        if asked is None and not patch.default:
            refused[patch.id] = "not a default: name it with --patch"
        elif asked is None and device not in patch.devices:
            there = "no GPU" if device == "cpu" else "a GPU"
            refused[patch.id] = f"for {', '.join(patch.devices)}, and this host has {there}"
        elif asked is None:
            reasons[patch.id] = "default"
    for patch_id in asked or ():
        reasons[series.patch(patch_id).id] = "asked for"
    notes = [
        f"{p.id} is made for {', '.join(p.devices)}"
        for p in map(series.patch, asked or ())
        if device not in p.devices
    ]
    for patch_id in status.present - set(reasons):
        reasons[patch_id] = "applied before"
    for patch_id in series.ordered(series.closure(reasons)):
        needing = [p for p in reasons if patch_id in series.patch(p).requires]
        reasons.setdefault(patch_id, f"required by {', '.join(needing)}")
    wanted = frozenset(reasons)
    series.check(wanted)
    choices = tuple(
        Choice(p.id, p.id in wanted, reasons.get(p.id) or refused.get(p.id) or "not asked for")
        for p in series.patches
    )
    hint = f"fp8ctl patch --backend {series.backend}{target} --allow-drift"
    for file in status.files:
        if series.touching(file.path) & wanted:
            _check_base(series, snapshot, file, allow_drift=allow_drift, hint=hint)
    return _plan(series, snapshot, status, wanted, choices, notes)


def _check_base(
    series: Series, snapshot: Snapshot, file: FileStatus, *, allow_drift: bool, hint: str
) -> None:
    """Refuse a file that cannot be patched, or only with --allow-drift."""
    reinstall = _reinstall(series, snapshot)
    data: dict[str, object] = {
        "path": file.path,
        "found": file.sha,
        "expected": file.pristine,
        "matches_record": file.matches_record,
    }
    if file.state == "missing":
        raise DriftError(f"{file.path} is not there", hint=reinstall, data=data)
    unknown = file.state in ("drifted", "superseded") and file.sha != file.pristine
    if not unknown:
        return
    what = f"{file.path} has sha256 {short(file.sha)}, expected {short(file.pristine)}"
    if file.pristine is None:
        raise DriftError(f"{what}: another file is in the way", hint=reinstall, data=data)
    if not allow_drift:
        kind = (
            f"it is as installed, so this is another build of {series.distribution}"
            if file.matches_record
            else "it was edited after it was installed"
        )
        raise DriftError(f"{what}: {kind}", hint=hint, data=data)


def plan_revert(
    series: Series,
    snapshot: Snapshot,
    *,
    asked: Sequence[str] | None = None,
    target: str = "",
) -> PatchPlan:
    """Plan to take patches back.

    Args:
        series: the patches.
        snapshot: the engine as it is.
        asked: ids; None for all.
        target: options that name the environment, for hints.

    Raises:
        NotFoundError: an id that neither the series nor the ledger has.
        ConflictError: a patch that stays requires one that goes.
        DriftError: a file that has to change is not as fp8ctl left it.
    """
    status = judge(series, snapshot)
    listed = set(snapshot.ledger.patches) if snapshot.ledger else set()
    gone = set(status.present | listed) if asked is None else set()
    for patch_id in asked or ():
        gone.add(patch_id if patch_id in listed else series.patch(patch_id).id)
    kept = status.present - gone
    for patch_id in series.ordered(kept):
        missing = set(series.patch(patch_id).requires) & gone
        if missing:
            raise ConflictError(
                f"patch {patch_id} is applied and requires {', '.join(sorted(missing))}",
                hint=f"fp8ctl revert --backend {series.backend}{target} --patch {patch_id}"
                + "".join(f" --patch {m}" for m in sorted(missing)),
            )
    choices = tuple(
        Choice(
            p.id,
            p.id in kept,
            "stays" if p.id in kept else "taken back" if p.id in status.present else "not applied",
        )
        for p in series.patches
    )
    notes = []
    for file in status.files:
        entry = snapshot.ledger.files.get(file.path) if snapshot.ledger else None
        if entry is None or not gone & set(entry.patches):
            continue
        if file.state == "drifted":
            raise DriftError(
                f"{file.path} has sha256 {short(file.sha)}, fp8ctl left {short(entry.post)}: "
                "it was edited since, and reverting would lose that",
                hint=_reinstall(snapshot=snapshot, series=series),
                data={"path": file.path, "found": file.sha, "expected": entry.post},
            )
        if file.state in ("superseded", "missing"):
            what = "removed" if file.sha is None else "reinstalled"
            notes.append(f"{file.path} was {what} since; forgotten, not changed")
    return _plan(series, snapshot, status, kept, choices, notes, reverting=True)


def _plan(
    series: Series,
    snapshot: Snapshot,
    status: SeriesStatus,
    wanted: Collection[str],
    choices: tuple[Choice, ...],
    notes: list[str],
    *,
    reverting: bool = False,
) -> PatchPlan:
    """Build every file that is not as wanted, from its pristine content.

    A revert looks only at files that hold a patch; of the others it keeps what
    the ledger says of patches that stay.
    """
    ops: list[FileOp] = []
    drifted: list[RelPath] = []
    files: dict[RelPath, LedgerFile] = {}
    pre_images: dict[Sha256, bytes] = {}
    for file in status.files:
        ids = series.ordered(series.touching(file.path) & set(wanted))
        if not file.patches and (reverting or not ids):
            entry = snapshot.ledger.files.get(file.path) if snapshot.ledger else None
            if entry and set(entry.patches) & set(wanted) and file.state in ("drifted", "missing"):
                files[file.path] = entry
            continue
        known = file.base == file.pristine and file.path in series.pristine
        if known:
            done = file.sha == series.images[file.path][frozenset(ids)]
        else:
            done = _lost_but_done(series, snapshot, file, ids)
        if done:
            _keep(series, snapshot, file, ids, files, pre_images)
            continue
        base = _base(series, snapshot, file)
        offsets: tuple[tuple[str, tuple[int, ...]], ...] = ()
        data = base
        if ids:
            image = _build(series, snapshot, file, base, ids, drift=not known)
            data, offsets = image
            if not known:
                drifted.append(file.path)
        new = sha256_or_none(data)
        if known and new != series.images[file.path][frozenset(ids)]:
            raise CatalogError(
                f"{series.name}: {file.path} with {', '.join(ids)} comes out as {short(new)}, "
                f"expected {short(series.images[file.path][frozenset(ids)])}",
                hint="reinstall fp8ctl",
            )
        if new == file.sha:
            _keep(series, snapshot, file, ids, files, pre_images)
            continue
        old_bytes = snapshot.files[file.path]
        action: Action = "create" if old_bytes is None else "delete" if data is None else "modify"
        mode = next((c.mode for p in series.patches if (c := p.on(file.path)) and c.mode), 0o644)
        link = _link(snapshot, file)
        back = None if ids else link
        ops.append(
            FileOp(file.path, action, file.sha, new, old_bytes, data, ids, mode, offsets, back)
        )
        if ids and new is not None:
            files[file.path] = LedgerFile(sha256_or_none(base), new, ids, link)
            if base is not None:
                pre_images[sha256_of(base)] = base
    ledger = _entry(series, snapshot, files, wanted)
    forgets = not ops and snapshot.ledger is not None and ledger != snapshot.ledger
    return PatchPlan(
        series.backend,
        series.name,
        choices,
        tuple(ops),
        ledger if ops or snapshot.ledger is not None else None,
        series.ordered(status.present),
        series.ordered(wanted),
        pre_images,
        tuple(drifted),
        tuple(notes),
        forgets,
    )


def _lost_but_done(
    series: Series, snapshot: Snapshot, file: FileStatus, ids: tuple[str, ...]
) -> bool:
    """Tell whether a file of another build has lost its pre-image, and needs it for a revert only.

    So it is where it is as fp8ctl left it, with these very texts of these patches.
    """
    ledger = snapshot.ledger
    entry = ledger.files.get(file.path) if ledger else None
    texts = {i: series.patch(i).diff_sha256 for i in ids}
    return (
        ledger is not None
        and entry is not None
        and entry.pre not in snapshot.blobs
        and (entry.post, entry.patches) == (file.sha, ids)
        and texts.items() <= ledger.patches.items()
    )


def _keep(
    series: Series,
    snapshot: Snapshot,
    file: FileStatus,
    ids: tuple[str, ...],
    files: dict[RelPath, LedgerFile],
    pre_images: dict[Sha256, bytes],
) -> None:
    """Carry a file that is as wanted into the new ledger."""
    if file.sha is None or not ids:
        return
    files[file.path] = LedgerFile(file.base, file.sha, ids, _link(snapshot, file))
    if file.base is None:
        return
    # A pre-image that was lost is made again while the patches that lead back to it are at
    # hand: the next fp8ctl may have other texts. Where that fails, the ledger still has its hash.
    with contextlib.suppress(HunkError):
        base = base_content(series, snapshot, file)
        if base is not None:
            pre_images[file.base] = base


def _link(snapshot: Snapshot, file: FileStatus) -> str | None:
    """Return where the name of a file led before fp8ctl, if it was a link."""
    if file.path in snapshot.links:
        return snapshot.links[file.path]
    entry = snapshot.ledger.files.get(file.path) if snapshot.ledger else None
    return entry.link if entry is not None and entry.post == file.sha else None


def _base(series: Series, snapshot: Snapshot, file: FileStatus) -> bytes | None:
    try:
        return base_content(series, snapshot, file)
    except HunkError as e:
        raise DriftError(
            f"{file.path} cannot be put back: {e.message}", hint=_reinstall(series, snapshot)
        ) from e


def _build(
    series: Series,
    snapshot: Snapshot,
    file: FileStatus,
    base: bytes | None,
    ids: tuple[str, ...],
    *,
    drift: bool,
) -> tuple[bytes | None, tuple[tuple[str, tuple[int, ...]], ...]]:
    try:
        image = series.build(file.path, base, ids, drift=drift)
    except HunkError as e:
        raise DriftError(
            f"the patch does not fit: {e.message}",
            hint=_reinstall(series, snapshot),
            data={"path": file.path, "found": file.sha, "expected": file.pristine},
        ) from e
    return image.data, image.offsets


def _entry(
    series: Series,
    snapshot: Snapshot,
    files: dict[RelPath, LedgerFile],
    wanted: Collection[str],
) -> LedgerEntry | None:
    if not files:
        return None
    old = snapshot.ledger
    return LedgerEntry(
        snapshot.version or (old.version if old else ""),
        series.name,
        {p.id: p.diff_sha256 for p in series.patches if p.id in wanted},
        files,
    )


def _reinstall(series: Series, snapshot: Snapshot) -> str:
    version = snapshot.version or series.version.removeprefix("==")
    return f"pip install --force-reinstall --no-deps {series.distribution}=={version}"
