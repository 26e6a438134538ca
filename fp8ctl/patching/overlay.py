"""An overlay: a patched copy of engines whose environment cannot be written.

A folder of links: shared objects and data are links into the environment, Python
files and metadata are copies, so that `__file__` leads to a folder with all that an
engine looks for beside its code. The folder is then patched as any site-packages,
and stands in front of it on PYTHONPATH. The environment is only read.

Called by `commands`, `launching` and `doctor`; changes files through `fsops` alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fp8ctl import environment
from fp8ctl.environment import LABELS, SUPPORTED
from fp8ctl.errors import ConflictError, DriftError, NotFoundError, NotPermittedError, UsageError
from fp8ctl.patching import catalog, store, verify
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.names import Sha256, sha256_of
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from fp8ctl.environment import BackendName, Environment

MARKER = ".fp8ctl-overlay.json"
# What a kill may leave of it, or before it.
_DRAFT = f".tmp-{MARKER}"
_SCHEMA = 1
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Overlay:
    """What an overlay is made of.

    Attributes:
        site_packages: the environment's folder, which the links lead into.
        python: its interpreter, None for a bare folder.
        complete: False while it is made or removed.
        engines: name of the metadata folder, by backend.
        files: hash of each copy as it was made, by path.
        links: paths of the links; each leads to the same path of `site_packages`.
    """

    site_packages: Path
    python: Path | None
    complete: bool
    engines: Mapping[BackendName, str]
    files: Mapping[str, Sha256]
    links: frozenset[str]

    def to_json(self) -> dict[str, object]:
        """Return it as JSON types."""
        return {
            "schema": _SCHEMA,
            "site_packages": str(self.site_packages),
            "python": None if self.python is None else str(self.python),
            "complete": self.complete,
            "engines": dict(self.engines),
            "files": dict(self.files),
            "links": sorted(self.links),
        }

    @staticmethod
    def from_json(raw: Any) -> Overlay:
        """Read what `to_json` wrote; raises KeyError, TypeError or ValueError."""
        if raw["schema"] != _SCHEMA:
            raise ValueError(f"schema {raw['schema']!r}, expected {_SCHEMA}")
        return Overlay(
            Path(raw["site_packages"]),
            None if raw["python"] is None else Path(raw["python"]),
            raw["complete"] is True,
            {b: str(raw["engines"][b]) for b in SUPPORTED if b in raw["engines"]},
            {str(path): Sha256(str(sha)) for path, sha in raw["files"].items()},
            frozenset(map(str, raw["links"])),
        )


def read(folder: Path) -> Overlay | None:
    """Return what a folder's overlay is made of, None if the folder holds none.

    Raises:
        DriftError: its description cannot be understood.
    """
    if not folder.is_dir():
        return None
    with Root(folder) as root:
        file = root.read(MARKER, limit=64 << 20)
    if file is None:
        return None
    try:
        return Overlay.from_json(json.loads(file.data))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DriftError(
            f"{folder / MARKER} cannot be read: {e}", hint=f"rm -r {_quoted(folder)}"
        ) from e


def require(folder: Path) -> Overlay:
    """Return what a folder's overlay is made of.

    Raises:
        NotFoundError: the folder holds none.
        DriftError: as `read`.
    """
    found = read(folder)
    if found is None:
        raise NotFoundError(
            f"{folder} holds no overlay of fp8ctl's", hint=f"fp8ctl patch{option(folder)}"
        )
    return found


def option(folder: Path) -> str:
    """Return the option that names an overlay again, for a hint: with a space in front."""
    return f" --overlay {_quoted(folder)}"


def parse(folder: Path) -> Path:
    """Return the folder of an overlay as an absolute path, links resolved once, here.

    Raises:
        UsageError: it cannot stand on PYTHONPATH.
    """
    path = Path(os.path.realpath(folder.expanduser().absolute()))
    if os.pathsep in str(path) or "\n" in str(path):
        raise UsageError(
            f"--overlay {str(folder)!r} cannot stand on PYTHONPATH, where {os.pathsep!r} separates",
            hint="--overlay /a/folder/of/another/name",
        )
    return path


def source(
    folder: Path, python: Path | None, site_packages: Path | None, backend: BackendName | None
) -> Environment:
    """Return the environment that an overlay is of: its own, or for a new one the target.

    Raises:
        ConflictError: the target is not the one that the overlay was made of.
        NotFoundError, UsageError: as `environment.find`.
    """
    old = read(folder)
    named = python is not None or site_packages is not None
    if old is None or named:
        found = environment.find(python, site_packages, backend)
        if old is None and _is_in(folder, found.site_packages):
            raise UsageError(
                f"--overlay {folder} lies in the environment {found.site_packages}",
                hint="--overlay ./fp8ctl-overlay",
            )
    elif old.python is not None:
        found = environment.find(old.python, None, backend)
    else:
        found = environment.find(None, old.site_packages, backend)
    if _is_in(found.site_packages, folder) and old is not None:
        # PYTHONPATH names the overlay already: what lies behind it is meant.
        found = environment.find(None, old.site_packages, backend)
        found = replace(found, python=old.python or found.python)
    if old is not None and not _same(found.site_packages, old.site_packages):
        raise ConflictError(
            f"{folder} is an overlay of {old.site_packages}, not of {found.site_packages}",
            hint=f"fp8ctl revert{option(folder)}, or another folder",
        )
    return found


def overlaid(found: Environment, folder: Path) -> Environment:
    """Return an environment as its interpreter sees it with an overlay in front."""
    front = environment.find(None, folder)
    return replace(
        found,
        site_packages=front.site_packages,
        origin=f"overlay of {found.site_packages}",
        engines=front.engines,
        writable=front.writable,
        duplicates=front.duplicates,
        front=_source_options(found) + option(folder),
    )


def _source_options(found: Environment) -> str:
    if found.python is not None:
        return environment.target_options(found.python, None)
    return environment.target_options(None, found.site_packages)


def survey(site: Path, python: Path | None, backends: Iterable[BackendName]) -> Overlay:
    """Return the overlay that some engines of an environment make; reads only.

    Args:
        site: the environment's folder.
        python: its interpreter.
        backends: the engines.

    Raises:
        NotFoundError: an engine is not there.
        NotPermittedError: a file cannot be read.
    """
    engines: dict[BackendName, str] = {}
    files: dict[str, Sha256] = {}
    links: set[str] = set()
    for backend in backends:
        with Root(site) as root:
            info = verify.dist_info(root, backend)
        if info is None:
            raise NotFoundError(
                f"{LABELS[backend]} {SUPPORTED[backend]} is not in {site}",
                hint=environment.install_hint(backend, stays=True),
            )
        engines[backend] = info
        for path, is_copy in _entries(site, backend, info):
            if is_copy:
                files[path] = sha256_of(_content(site / path))
            else:
                links.add(path)
    return Overlay(site, python, True, engines, files, frozenset(links))


def _entries(site: Path, backend: str, info: str) -> Iterator[tuple[str, bool]]:
    """Yield each path of an engine, and whether it is copied."""
    # Where repaired wheels keep libraries: found by their shared objects as `../NAME.libs`.
    if (site / f"{backend}.libs").is_dir():
        yield f"{backend}.libs", False
    for top in (backend, info):
        for folder, folders, names in os.walk(site / top):
            inside = os.path.relpath(folder, site)
            for name in list(folders):
                if name == "__pycache__":
                    folders.remove(name)
                elif (Path(folder) / name).is_symlink():
                    folders.remove(name)
                    yield f"{inside}/{name}", False
            for name in names:
                yield f"{inside}/{name}", top == info or name.endswith(".py")


def _content(path: Path) -> bytes:
    """Return a file of the environment; an installer may have made it a link to its cache."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise NotPermittedError(
            f"{path}: {e.strerror}", hint="run it as a user who can read this environment"
        ) from e


def stale(overlay: Overlay) -> str | None:
    """Say why an overlay is no longer that of its environment, None where it is."""
    if not overlay.complete:
        return "it was not made to its end"
    here = overlay.site_packages
    if not here.is_dir():
        return f"{here} is gone"
    try:
        now = survey(here, overlay.python, overlay.engines)
    except NotFoundError as e:
        return e.message
    for backend, info in overlay.engines.items():
        if now.engines[backend] != info:
            return f"{here} has {now.engines[backend].removesuffix('.dist-info')} by now"
    paths = {*now.files, *now.links, *overlay.files, *overlay.links}
    changed = sorted(
        p
        for p in paths
        if now.files.get(p) != overlay.files.get(p) or (p in now.links) != (p in overlay.links)
    )
    if not changed:
        return None
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"{', '.join(changed[:_SHOWN])}{more} changed in {here} since"


def require_current(folder: Path) -> Overlay:
    """Return what a folder's overlay is made of, if it is that of its environment.

    Raises:
        NotFoundError, DriftError: as `require`.
        DriftError: the environment was changed since.
    """
    found = require(folder)
    why = stale(found)
    if why:
        raise DriftError(
            f"the overlay {folder} is stale: {why}",
            hint=f"fp8ctl patch{option(folder)}",
            data={"overlay": str(folder), "site_packages": str(found.site_packages)},
        )
    return found


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something, and no overlay.

    Raises:
        ConflictError: it does.
        NotFoundError: the folder that it would lie in is not there.
    """
    if not folder.parent.is_dir():
        raise NotFoundError(
            f"{folder.parent}, where the overlay would lie, is not a folder",
            hint=f"mkdir -p {_quoted(folder.parent)}",
        )
    if not folder.exists():
        return
    if not folder.is_dir() or {p.name for p in folder.iterdir()} - {store.FOLDER, _DRAFT}:
        raise ConflictError(
            f"{folder} holds something that is no overlay of fp8ctl's; it is not touched",
            hint="--overlay with a new or an empty folder",
        )


def strangers(root: Root, overlay: Overlay) -> list[str]:
    """Return what lies in an overlay and was not made by fp8ctl, nor by Python."""
    ledger = store.read_ledger(root)
    series = [catalog.load(b, SUPPORTED[b]) for b in overlay.engines]
    left = {str(p): f.post for e in ledger.entries.values() for p, f in e.files.items()}
    found = []
    for _, paths in _walk(root):
        found += [p for p in paths if not _is_ours(root, overlay, p, left, series)]
    return sorted(found)


def _walk(root: Root) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder of an overlay, "" for its own, and paths of the files and links in it;
    without the marker and the store.
    """
    for folder, below, names in os.walk(root.path):
        inside = os.path.relpath(folder, root.path)
        if inside == ".":
            inside = ""
            below[:] = [f for f in below if f != store.FOLDER]
            names = [n for n in names if n != MARKER]
        linked = [f for f in below if (Path(folder) / f).is_symlink()]
        yield inside, [f"{inside}/{name}".removeprefix("/") for name in (*names, *linked)]


def _is_ours(
    root: Root,
    overlay: Overlay,
    path: str,
    left: Mapping[str, Sha256],
    series: list[catalog.Series],
) -> bool:
    name = path.rpartition("/")[2]
    if path == _DRAFT or ("/__pycache__/" in path and ".pyc" in name):
        return True
    if (root.path / path).is_symlink():
        if path not in overlay.links:
            return False
        return os.readlink(root.path / path) == str(overlay.site_packages / path)
    if not overlay.complete and (path in overlay.files or name.startswith(".tmp-")):
        return True
    sha = sha256_of(_content(root.path / path))
    if sha in (overlay.files.get(path), left.get(path)):
        return True
    known = cast("Any", path)
    return any(known in one.pristine and bool(one.held(known, sha)) for one in series)


def check_own(root: Root, overlay: Overlay) -> None:
    """Refuse to remove or replace what fp8ctl did not make.

    Raises:
        DriftError: there is such a thing; nothing was changed.
    """
    found = strangers(root, overlay)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DriftError(
            f"{root.path} holds what fp8ctl did not make, or what was edited since: "
            f"{', '.join(found[:_SHOWN])}{more}",
            hint=f"take it out, or rm -r {_quoted(root.path)}",
            data={"paths": cast("list[object]", found)},
        )


def build(root: Root, wanted: Overlay, old: Overlay | None) -> None:
    """Make an overlay, or make it anew over an old one; patches come off it.

    A kill leaves it marked as incomplete: it is then not launched, and made again.

    Args:
        root: its folder, with the lock held.
        wanted: what it shall be.
        old: what it is, checked by `check_own`.
    """
    both = wanted
    if old is not None:
        both = replace(wanted, files={**old.files, **wanted.files}, links=old.links | wanted.links)
    _mark(root, replace(both, complete=False))
    if old is not None:
        _clear(root, both)
        store.write_ledger(root, store.Ledger())
    folders = {Path(p).parent for p in (*wanted.files, *wanted.links)}
    for folder in sorted({f for one in folders for f in (one, *one.parents)} - {Path()}):
        root.make_folder(str(folder))
    for path, sha in wanted.files.items():
        content = _content(wanted.site_packages / path)
        if sha256_of(content) != sha:
            raise DriftError(
                f"{wanted.site_packages / path} was changed just now",
                hint="run the same command again",
            )
        root.replace(path, content)
    for path in sorted(wanted.links):
        root.link(path, str(wanted.site_packages / path))
    for folder in sorted(folders):
        root.sync_folder(str(folder))
    _mark(root, wanted)


def remove(root: Root, overlay: Overlay) -> None:
    """Remove an overlay, checked by `check_own`; its folder stays, empty."""
    _mark(root, replace(overlay, complete=False))
    _clear(root, overlay)
    store.write_ledger(root, store.Ledger())
    root.unlink(MARKER)


def _mark(root: Root, overlay: Overlay) -> None:
    text = json.dumps(overlay.to_json(), indent=1, sort_keys=True)
    root.replace(MARKER, text.encode() + b"\n")
    root.sync_folder("")


def _clear(root: Root, overlay: Overlay) -> None:
    """Remove everything but the marker and the store; `check_own` has looked at it."""
    folders = []
    for inside, paths in _walk(root):
        folders.append(inside)
        for path in paths:
            root.unlink(path)
    for inside in sorted(filter(None, folders), reverse=True):
        root.remove_folder(inside)


def describe(overlay: Overlay) -> str:
    """Return what an overlay is made of, in words."""
    copies, links = plural(len(overlay.files), "copy", "copies"), plural(len(overlay.links), "link")
    return f"{copies} and {links} of {overlay.site_packages}"


def _is_in(folder: Path, other: Path) -> bool:
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(other))


def _same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
