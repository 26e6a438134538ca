"""What `patch` and `revert` work on: the engines of an environment, and what is left of others.

Called by `commands`; reads only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fp8ctl import environment
from fp8ctl.environment import LABELS, SUPPORTED
from fp8ctl.errors import NotFoundError
from fp8ctl.patching import catalog, overlay, store
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.status import leftover
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fp8ctl.environment import BackendName, Engine, Environment
    from fp8ctl.patching.catalog import Series
    from fp8ctl.render import Reporter


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine to work on, or what fp8ctl left of one that is gone.

    Attributes:
        backend: which engine.
        version: as installed, None where it is not.
        label: name and version, for a person.
        series: the patches for it.
        gone: the engine is no longer there; what fp8ctl left of it is.
    """

    backend: BackendName
    version: str | None
    label: str
    series: Series
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """The engines to work on.

    Attributes:
        env: the environment.
        subjects: the engines.
        options: that name it again in a hint, with a leading space.
        front: folder of the overlay that is worked on, None for the environment itself.
    """

    env: Environment
    subjects: tuple[Subject, ...]
    options: str
    front: Path | None = None


def find(
    report: Reporter,
    python: Path | None,
    site_packages: Path | None,
    backends: Sequence[str] | None,
    *,
    reverting: bool = False,
    front: Path | None = None,
) -> Target:
    """Return the engines to work on.

    Args:
        report: is told which environment it is, and what is left of engines that are gone.
        python: interpreter of the environment.
        site_packages: or its folder.
        backends: engines; None for every supported one that is there.
        reverting: what is left of engines that are gone is worked on, too.
        front: folder of an overlay, whose environment is meant where none is named.

    Raises:
        NotFoundError, UnsupportedError, ConflictError: there is nothing to work on, and why.
    """
    wanted = [environment.parse_backend(b) for b in dict.fromkeys(backends or ())]
    first = wanted[0] if wanted else None
    options = environment.target_options(python, site_packages)
    if front is None:
        env = environment.find(python, site_packages, first)
    else:
        env = overlay.source(front, python, site_packages, first)
        options += overlay.option(front)
    report.say(f"environment: {env.site_packages} ({env.origin})")
    gone = _leftovers(env, wanted or tuple(SUPPORTED))
    if reverting:
        left = {subject.backend for subject, _ in gone}
        names = [b for b in wanted or _supported(env) if b not in left]
        if not names and not left and not _has_store(env):
            names = _expected(env)
        subjects = [_subject(env.require_patchable(b, catalog.covers)) for b in names]
        subjects += [subject for subject, _ in gone]
        return Target(env, tuple(subjects), options)
    for _, words in gone:
        report.warn(words)
    try:
        names = wanted or _supported(env) or _expected(env)
        subjects = [_subject(env.require_patchable(b, catalog.covers)) for b in names]
    except NotFoundError as e:
        if gone:
            raise NotFoundError(f"{e.message}; {gone[0][1]}", hint=_revert(env), data=e.data) from e
        raise
    return Target(env, tuple(subjects), options, front)


def in_front(target: Target) -> Target:
    """Return the engines as they are in the overlay."""
    assert target.front is not None
    held = overlay.require(target.front).engines
    env = overlay.overlaid(target.env, target.front)
    subjects = tuple(s for s in target.subjects if s.backend in held)
    return replace(target, env=env, subjects=subjects)


def check_ids(target: Target, patch_ids: Sequence[str] | None, *, reverting: bool = False) -> None:
    """Refuse an id that none of the engines knows."""
    known = {p.id for subject in target.subjects for p in subject.series.patches}
    if reverting:
        with Root(target.env.site_packages) as root:
            for entry in store.read_ledger(root).entries.values():
                known |= set(entry.patches)
    for patch_id in patch_ids or ():
        if patch_id not in known:
            names = ", ".join(subject.series.name for subject in target.subjects)
            raise NotFoundError(
                f"no patch {patch_id!r} in {names}, expected one of: {', '.join(sorted(known))}",
                hint=f"fp8ctl patch{target.options} --list",
            )


def _subject(engine: Engine) -> Subject:
    return Subject(
        engine.backend, engine.version, engine.label, catalog.load(engine.backend, engine.version)
    )


def _leftovers(env: Environment, wanted: Sequence[BackendName]) -> list[tuple[Subject, str]]:
    """Return what fp8ctl left of engines that are gone, each with a sentence about it."""
    found = []
    for backend in wanted:
        engine = next((e for e in env.engines if e.backend == backend), None)
        if (
            engine is not None
            and catalog.covers(engine.backend, engine.version)
            and engine.kind != "editable"
        ):
            continue
        left = leftover(env.site_packages, backend)
        if left is None:
            continue
        series = catalog.load(backend, SUPPORTED[backend])
        label = f"{LABELS[backend]} {SUPPORTED[backend]}, no longer installed"
        files = sum(f.state == "orphan" for f in left.files)
        words = (
            f"{label}: {plural(files, 'file')} and the store that fp8ctl made are left in "
            f"{env.site_packages}"
        )
        found.append((Subject(backend, left.version, label, series, gone=True), words))
    return found


def _has_store(env: Environment) -> bool:
    with Root(env.site_packages) as root:
        return root.has_folder(store.FOLDER)


def _revert(env: Environment) -> str:
    return f"fp8ctl revert{environment.target_options(None, env.site_packages)}"


def _supported(env: Environment) -> list[BackendName]:
    return [e.backend for e in env.engines if catalog.covers(e.backend, e.version)]


def _expected(env: Environment) -> list[BackendName]:
    """Say why there is no engine to work on."""
    if env.engines:
        env.engine(env.engines[0].backend)  # raises, with the versions in the message
    raise NotFoundError(
        f"no engine in {env.site_packages} ({env.origin}), expected vLLM "
        f"{SUPPORTED['vllm']} or SGLang {SUPPORTED['sglang']}",
        hint=environment.install_hint("sglang", stays=env.named),
    )
