"""The bodies of `fp8ctl patch` and `fp8ctl revert`.

Find the engines, plan, show the plan, run it. Called by `cli` and `demo`;
changes files through `transaction` alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fp8ctl import environment
from fp8ctl.environment import LABELS, SUPPORTED
from fp8ctl.errors import (
    BusyError,
    ConflictError,
    DriftError,
    Fp8ctlError,
    NotFoundError,
    NotPermittedError,
)
from fp8ctl.patching import catalog, diff, overlay, store, transaction
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.names import short
from fp8ctl.patching.plan import plan_patch, plan_revert
from fp8ctl.patching.status import MEANING, judge, leftover, take, way_out
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fp8ctl.environment import BackendName, Engine, Environment
    from fp8ctl.patching.catalog import Series
    from fp8ctl.patching.plan import PatchPlan
    from fp8ctl.patching.status import SeriesStatus
    from fp8ctl.render import Reporter

Verb = Literal["patch", "revert"]


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


def patch(
    report: Reporter,
    *,
    python: Path | None = None,
    site_packages: Path | None = None,
    backends: Sequence[str] | None = None,
    patch_ids: Sequence[str] | None = None,
    list_only: bool = False,
    dry_run: bool = False,
    print_diff: bool = False,
    allow_drift: bool = False,
    allow_running: bool = False,
    front: Path | None = None,
) -> dict[str, object]:
    """Apply patches to the engines of an environment.

    Args:
        report: where to say what happens.
        python: interpreter of the environment.
        site_packages: or its folder.
        front: folder of an overlay to make, and to patch in the environment's place.
        backends: engines; None for every supported one that is there.
        patch_ids: patches; None for every default one that fits this host.
        list_only: list the patches and their state, and stop.
        dry_run: show what would be done, and stop.
        print_diff: print the change as one git diff.
        allow_drift: patch a file of another build where its hunks fit in one place.
        allow_running: go on although a server of fp8ctl runs on this environment.

    Returns:
        Environment, engines with patches and files, and the time it took.
    """
    started = time.monotonic()
    if front is not None:
        front = overlay.parse(front)
        if list_only:
            overlay.require(front)
    target = _target(report, python, site_packages, backends, front=front)
    _check_ids(target, patch_ids)
    if list_only:
        return _list(report, _in_front(target) if front is not None else target)

    def plans(root: Root) -> list[PatchPlan]:
        return [
            plan_patch(
                series,
                take(root, series),
                asked=_asked(series, patch_ids),
                device="cuda" if target.env.gpus else "cpu",
                allow_drift=allow_drift,
                target=target.options,
            )
            for series in (subject.series for subject in target.subjects)
        ]

    made = False
    if front is not None:
        # What cannot be patched is refused before anything is made.
        with Root(target.env.site_packages) as root, _installer_named(target.env):
            plans(root)
        made, target = _overlay(report, target, front, dry_run=dry_run, running=allow_running)
    data = _run(
        report,
        "patch",
        target,
        plans,
        started=started,
        dry_run=dry_run,
        print_diff=print_diff,
        allow_running=allow_running,
    )
    if front is not None:
        data |= {"overlay": str(front), "changed": made or data["changed"]}
    return data


def revert(
    report: Reporter,
    *,
    python: Path | None = None,
    site_packages: Path | None = None,
    backends: Sequence[str] | None = None,
    patch_ids: Sequence[str] | None = None,
    dry_run: bool = False,
    allow_running: bool = False,
    front: Path | None = None,
) -> dict[str, object]:
    """Take patches back, byte for byte; arguments and result as `patch`.

    Of an overlay, with no patch and no engine named, all is removed.
    """
    started = time.monotonic()
    if front is not None:
        front = overlay.parse(front)
        overlay.require(front)
        if patch_ids is None and not backends:
            return _remove(report, front, dry_run=dry_run, running=allow_running, started=started)
        target = _in_front(_target(report, python, site_packages, backends, front=front))
    else:
        target = _target(report, python, site_packages, backends, reverting=True)
    _check_ids(target, patch_ids, reverting=True)

    def plans(root: Root) -> list[PatchPlan]:
        result = []
        for series in (subject.series for subject in target.subjects):
            snapshot = take(root, series)
            known = {p.id for p in series.patches} | set(
                snapshot.ledger.patches if snapshot.ledger else ()
            )
            asked = None if patch_ids is None else [p for p in patch_ids if p in known]
            result.append(plan_revert(series, snapshot, asked=asked, target=target.options))
        return result

    return _run(
        report,
        "revert",
        target,
        plans,
        started=started,
        dry_run=dry_run,
        print_diff=False,
        allow_running=allow_running,
    )


def _target(
    report: Reporter,
    python: Path | None,
    site_packages: Path | None,
    backends: Sequence[str] | None,
    *,
    reverting: bool = False,
    front: Path | None = None,
) -> Target:
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
        subjects = [_subject(env.require_patchable(b)) for b in names]
        subjects += [subject for subject, _ in gone]
        return Target(env, tuple(subjects), options)
    for _, words in gone:
        report.warn(words)
    try:
        names = wanted or _supported(env) or _expected(env)
        subjects = [_subject(env.require_patchable(b)) for b in names]
    except NotFoundError as e:
        if gone:
            raise NotFoundError(f"{e.message}; {gone[0][1]}", hint=_revert(env), data=e.data) from e
        raise
    return Target(env, tuple(subjects), options, front)


def _in_front(target: Target) -> Target:
    """Return the engines as they are in the overlay."""
    assert target.front is not None
    held = overlay.require(target.front).engines
    env = overlay.overlaid(target.env, target.front)
    subjects = tuple(s for s in target.subjects if s.backend in held)
    return replace(target, env=env, subjects=subjects)


def _overlay(
    report: Reporter, target: Target, front: Path, *, dry_run: bool, running: bool
) -> tuple[bool, Target]:
    """Make the overlay where it is not there, or not that of its environment any more.

    Returns whether it was made, and what to patch then: in a dry run of an overlay that has
    to be made, the environment stands for it.
    """
    old = overlay.read(front)
    if old is None:
        overlay.check_free(front)
    site = target.env.site_packages
    backends = dict.fromkeys([s.backend for s in target.subjects])
    for backend in old.engines if old else ():
        if any(e.backend == backend and e.supported for e in target.env.engines):
            backends.setdefault(backend)
    # The same environment by another path, or another name of its interpreter, is the same.
    if old is not None:
        site = old.site_packages
    wanted = overlay.survey(site, (old.python if old else None) or target.env.python, backends)
    if old == wanted:
        return False, _in_front(target)
    if old is not None:
        why = overlay.stale(old) or "another engine is asked for"
        report.say(f"the overlay {front} is made anew: {why}")
    if dry_run:
        report.say(f"{front} would be made: {overlay.describe(wanted)}")
        return False, target
    if old is not None:
        _check_servers(report, front, allow_running=running)
    else:
        with Root(front.parent) as above:
            above.make_folder(front.name)
    with Root(front) as root, transaction.begin(root):
        carried: dict[str, list[str]] = {}
        if old is not None:
            for series in (catalog.load(b, SUPPORTED[b]) for b in old.engines):
                present = judge(series, take(root, series)).present
                carried[series.backend] = list(series.ordered(present))
            overlay.check_own(root, old)
        overlay.build(root, wanted, old)
        plans = [
            plan_patch(series, take(root, series), asked=carried[backend])
            for backend in backends
            if carried.get(backend)
            for series in (catalog.load(backend, SUPPORTED[backend]),)
        ]
        if plans:
            transaction.run(root, plans, python_version=target.env.python_version)
    report.say(f"overlay {front}: {overlay.describe(wanted)}")
    return True, _in_front(target)


def _remove(
    report: Reporter, front: Path, *, dry_run: bool, running: bool, started: float
) -> dict[str, object]:
    """Remove an overlay: what fp8ctl made of it, and nothing else."""
    old = overlay.require(front)
    _check_servers(report, front, allow_running=running)
    with Root(front) as root:
        overlay.check_own(root, old)
        if not dry_run:
            with transaction.begin(root):
                overlay.check_own(root, old)
                overlay.remove(root, old)
    if dry_run:
        report.say(f"{front} would be removed: {overlay.describe(old)}")
    else:
        with Root(front.parent) as above:
            above.remove_folder(front.name)
        report.say(f"{front} is removed; {old.site_packages} was never changed")
    return {
        "site_packages": str(front),
        "origin": f"overlay of {old.site_packages}",
        "overlay": str(front),
        "changed": not dry_run,
        "dry_run": dry_run,
        "elapsed_s": round(time.monotonic() - started, 4),
        "engines": [],
    }


def _subject(engine: Engine) -> Subject:
    return Subject(
        engine.backend, engine.version, engine.label, catalog.load(engine.backend, engine.version)
    )


def _leftovers(env: Environment, wanted: Sequence[BackendName]) -> list[tuple[Subject, str]]:
    """Return what fp8ctl left of engines that are gone, each with a sentence about it."""
    found = []
    for backend in wanted:
        engine = next((e for e in env.engines if e.backend == backend), None)
        if engine is not None and engine.supported and engine.kind != "editable":
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
    return [e.backend for e in env.engines if e.supported]


def _expected(env: Environment) -> list[BackendName]:
    """Say why there is no engine to work on."""
    if env.engines:
        env.engine(env.engines[0].backend)  # raises, with the versions in the message
    raise NotFoundError(
        f"no engine in {env.site_packages} ({env.origin}), expected vLLM "
        f"{SUPPORTED['vllm']} or SGLang {SUPPORTED['sglang']}",
        hint=environment.install_hint("sglang", stays=env.named),
    )


def _check_ids(target: Target, patch_ids: Sequence[str] | None, *, reverting: bool = False) -> None:
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


def _asked(series: Series, patch_ids: Sequence[str] | None) -> list[str] | None:
    """Return which of the asked ids this series has; the other engine may have the rest."""
    if patch_ids is None:
        return None
    own = {p.id for p in series.patches}
    return [p for p in patch_ids if p in own]


def _run(
    report: Reporter,
    verb: Verb,
    target: Target,
    make: Callable[[Root], list[PatchPlan]],
    *,
    started: float,
    dry_run: bool,
    print_diff: bool,
    allow_running: bool,
) -> dict[str, object]:
    env = target.env
    with Root(env.site_packages) as root, _installer_named(env):
        interrupted = store.needs_recovery(root)
        if interrupted and not dry_run:
            _check_servers(report, env.site_packages, allow_running=allow_running)
            with transaction.begin(root) as mended:
                if mended:
                    report.warn(mended)
        elif verb == "revert" and not target.subjects and not dry_run:
            with transaction.begin(root):
                pass  # an empty store goes with the lock
        plans = make(root)
        changes = any(not p.empty for p in plans)
        for subject, plan in zip(target.subjects, plans, strict=True):
            _show(report, verb, subject, plan)
        if print_diff:
            _print_diff(report, plans)
        if changes and not dry_run:
            _check_permitted(root, plans, target)
            _check_servers(report, env.site_packages, allow_running=allow_running)
            with transaction.begin(root):
                # Once more under the lock: what was shown is what is done, or it fails.
                plans = make(root)
                transaction.run(root, plans, python_version=env.python_version)
        statuses = [judge(s.series, take(root, s.series)) for s in target.subjects]
    elapsed = time.monotonic() - started
    files = sum(len(p.ops) for p in plans)
    if not changes and verb == "patch" and not any(p.after for p in plans):
        report.warn("no default patch fits this host, so nothing was done; --patch ID takes one")
    elif not changes:
        report.say("nothing to do: already so")
    elif dry_run:
        report.say(f"{plural(files, 'file')} would change; --dry-run changes nothing")
    else:
        report.say(f"{plural(files, 'file')} changed in {elapsed:.2f} s")
        for subject in target.subjects:
            if subject.gone and not dry_run:
                report.say(f"nothing of fp8ctl's for {LABELS[subject.backend]} is left there")
    return {
        "site_packages": str(env.site_packages),
        "origin": env.origin,
        "changed": changes and not dry_run,
        "dry_run": dry_run,
        "elapsed_s": round(elapsed, 4),
        "engines": [
            _engine_data(subject, plan, status)
            for subject, plan, status in zip(target.subjects, plans, statuses, strict=True)
        ],
    }


def _check_permitted(root: Root, plans: Sequence[PatchPlan], target: Target) -> None:
    """Refuse what may not be written, with the way round it."""
    try:
        transaction.check_permitted(root, [op for p in plans for op in p.ops])
    except NotPermittedError as e:
        if target.front is None and any(p.after for p in plans):
            e.hint = (
                f"fp8ctl patch{target.options} --overlay ./fp8ctl-overlay, which leaves the "
                f"environment as it is; or {e.hint}"
            )
        raise


@contextlib.contextmanager
def _installer_named(env: Environment) -> Iterator[None]:
    """Have hints name the installer of this environment: plans know of `pip install` alone."""
    try:
        yield
    except (DriftError, ConflictError) as e:
        head, words, requirement = (e.hint or "").partition(" --force-reinstall --no-deps ")
        if head == "pip install" and words:
            e.hint = env.reinstall(requirement)
        raise


def _show(report: Reporter, verb: Verb, subject: Subject, plan: PatchPlan) -> None:
    report.say(f"{subject.label}, series {plan.series}:")
    for choice in plan.choices:
        was = choice.id in plan.before
        if choice.taken:
            mark = "+" if not was and verb == "patch" else "="
        else:
            mark = "-" if was else " "
        report.say(f"  {mark} {choice.id}: {choice.reason}")
    for op in plan.ops:
        report.say(f"    {op.action} {op.path}  {short(op.old_sha)} -> {short(op.new_sha)}")
        for patch_id, offsets in op.offsets if op.path in plan.drifted else ():
            lines = ", ".join(f"{o:+d}" for o in offsets)
            report.warn(f"{op.path}: {patch_id} applied at an offset of {lines} lines")
    for path in plan.drifted:
        report.warn(f"{path} is of another build; it is patched where the context fits")
    for note in plan.notes:
        report.warn(note)


def _print_diff(report: Reporter, plans: Sequence[PatchPlan]) -> None:
    for plan in plans:
        for op in plan.ops:
            text = diff.render(op.path, op.old_bytes, op.new_bytes, mode=op.mode)
            report.data(text.decode("utf-8", "backslashreplace").removesuffix("\n"))


def _list(report: Reporter, target: Target) -> dict[str, object]:
    data: list[dict[str, object]] = []
    env = target.env
    with Root(env.site_packages) as root:
        statuses = [judge(s.series, take(root, s.series)) for s in target.subjects]
    rows = []
    for subject, status in zip(target.subjects, statuses, strict=True):
        data.append(_engine_data(subject, None, status))
        for one, state in zip(subject.series.patches, status.patches, strict=True):
            devices = "any" if len(one.devices) > 1 else one.devices[0]
            default = "yes" if one.default else "no"
            rows.append((subject.series.name, one.id, state.state, default, devices, one.title))
        if status.interrupted:
            report.warn("an earlier command was cut short; the next patch or revert mends it")
        odd = [f for f in status.files if f.state in MEANING]
        for file in odd:
            report.warn(f"{file.path} is {file.state}: {MEANING[file.state]}")
        if odd:
            requirement = f"{subject.series.distribution}=={subject.version}"
            out = way_out(
                status,
                site_packages=env.site_packages,
                target=target.options,
                reinstall=env.reinstall(requirement),
            )
            report.warn(f"the way out: {out}")
    report.table(("series", "patch", "state", "default", "device", "title"), rows)
    return {
        "site_packages": str(target.env.site_packages),
        "origin": target.env.origin,
        "engines": data,
    }


def _engine_data(
    subject: Subject, plan: PatchPlan | None, status: SeriesStatus
) -> dict[str, object]:
    series = subject.series
    reasons = {c.id: c.reason for c in plan.choices} if plan else {}
    result: dict[str, object] = {
        "backend": subject.backend,
        "version": subject.version,
        "series": series.name,
        "state": status.state,
        "interrupted": status.interrupted,
        "patches": [
            {
                "id": one.id,
                "title": one.title,
                "why": one.why,
                "upstream": one.upstream,
                "state": state.state,
                "default": one.default,
                "devices": list(one.devices),
                "modes": list(one.modes),
                "requires": list(one.requires),
                "conflicts": list(one.conflicts),
                **({"reason": reasons[one.id]} if one.id in reasons else {}),
            }
            for one, state in zip(series.patches, status.patches, strict=True)
        ],
        "files": [
            {
                "path": f.path,
                "state": f.state,
                "sha256": f.sha,
                "pristine": f.pristine,
                "patches": list(series.ordered(f.patches)),
            }
            for f in status.files
        ],
    }
    if plan is not None:
        result["before"], result["after"] = list(plan.before), list(plan.after)
        result["changes"] = [
            {
                "path": op.path,
                "action": op.action,
                "old": op.old_sha,
                "new": op.new_sha,
                "offsets": {p: list(o) for p, o in op.offsets},
            }
            for op in plan.ops
        ]
        result["drifted"], result["notes"] = list(plan.drifted), list(plan.notes)
    return result


def _check_servers(report: Reporter, folder: Path, *, allow_running: bool) -> None:
    """Refuse, or only warn, when a server of fp8ctl runs on this environment."""
    servers = live_servers(folder)
    if not servers:
        return
    names = ", ".join(servers)
    if not allow_running:
        raise BusyError(
            f"{names} runs on {folder}: it would go on with the old code",
            hint=f"fp8ctl stop {next(iter(servers))}, or --allow-running",
            data={"servers": servers},
        )
    report.warn(f"{names} runs on this environment: restart to take effect")


def live_servers(site_packages: Path) -> dict[str, int]:
    """Return the running servers of fp8ctl on an environment: name and process id."""
    from fp8ctl import registry

    wanted = os.path.realpath(site_packages)
    found: dict[str, int] = {}
    try:
        records = [registry.read(name) for name in registry.names()]
    except Fp8ctlError:
        return found  # no state folder of this user's, so no server of this user's
    for record in records:
        same = record is not None and os.path.realpath(record.site_packages) == wanted
        if record is not None and same and record.identity.alive():
            found[record.name] = record.identity.pid
    return found
