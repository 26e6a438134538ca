"""The bodies of `fp8ctl patch` and `fp8ctl revert`.

Find the engines, plan, show the plan, run it. Called by `cli` and `demo`;
changes files through `transaction` alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from fp8ctl.environment import LABELS, SUPPORTED
from fp8ctl.errors import (
    BusyError,
    ConflictError,
    DriftError,
    Fp8ctlError,
    NotPermittedError,
)
from fp8ctl.patching import account, catalog, overlay, store, targets, transaction
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.plan import plan_patch, plan_revert
from fp8ctl.patching.status import judge, take
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fp8ctl.environment import Environment
    from fp8ctl.patching.account import Verb
    from fp8ctl.patching.catalog import Series
    from fp8ctl.patching.plan import PatchPlan
    from fp8ctl.patching.targets import Target
    from fp8ctl.render import Reporter


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
    target = targets.find(report, python, site_packages, backends, front=front)
    targets.check_ids(target, patch_ids)
    if list_only:
        return account.list_patches(
            report, targets.in_front(target) if front is not None else target
        )

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
    print_diff: bool = False,
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
        target = targets.in_front(
            targets.find(report, python, site_packages, backends, front=front)
        )
    else:
        target = targets.find(report, python, site_packages, backends, reverting=True)
    targets.check_ids(target, patch_ids, reverting=True)

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
        print_diff=print_diff,
        allow_running=allow_running,
    )


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
        return False, targets.in_front(target)
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
    with Root(front) as root, transaction.begin(root, report.warn):
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
            transaction.run(root, plans, python_version=target.env.python_version, warn=report.warn)
    report.say(f"overlay {front}: {overlay.describe(wanted)}")
    return True, targets.in_front(target)


def _remove(
    report: Reporter, front: Path, *, dry_run: bool, running: bool, started: float
) -> dict[str, object]:
    """Remove an overlay: what fp8ctl made of it, and nothing else."""
    old = overlay.require(front)
    _check_servers(report, front, allow_running=running)
    with Root(front) as root:
        overlay.check_own(root, old)
        if not dry_run:
            with transaction.begin(root, report.warn):
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
            with transaction.begin(root, report.warn) as mended:
                if mended:
                    report.warn(mended)
        elif verb == "revert" and not target.subjects and not dry_run:
            with transaction.begin(root, report.warn):
                pass  # an empty store goes with the lock
        plans = _plans(report, root, make, dry_run=dry_run)
        changes = any(not p.empty for p in plans)
        for subject, plan in zip(target.subjects, plans, strict=True):
            account.show(report, verb, subject, plan)
        text = account.diff_of(plans) if print_diff else b""
        report.raw(text)
        if changes and not dry_run:
            _check_permitted(root, plans, target)
            _check_servers(report, env.site_packages, allow_running=allow_running)
            with transaction.begin(root, report.warn):
                # Once more under the lock: what was shown is what is done, or it fails.
                plans = make(root)
                transaction.run(root, plans, python_version=env.python_version, warn=report.warn)
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
        **({"diff": text.decode("utf-8", "surrogateescape")} if print_diff else {}),
        "engines": [
            account.engine_data(subject, plan, status)
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


def _plans(
    report: Reporter, root: Root, make: Callable[[Root], list[PatchPlan]], *, dry_run: bool
) -> list[PatchPlan]:
    """Plan without the lock, and with it where somebody else was at work meanwhile."""
    try:
        return make(root)
    except Fp8ctlError:
        if dry_run or not store.needs_recovery(root):
            raise
    with transaction.begin(root, report.warn):
        return make(root)


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
