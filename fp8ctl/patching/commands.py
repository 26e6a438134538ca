"""The bodies of `fp8ctl patch` and `fp8ctl revert`.

Find the engines, plan, show the plan, run it. Called by `cli` and `demo`;
changes files through `transaction` alone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fp8ctl import environment
from fp8ctl.errors import BusyError, Fp8ctlError, NotFoundError
from fp8ctl.patching import catalog, diff, store, transaction
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.names import short
from fp8ctl.patching.plan import plan_patch, plan_revert
from fp8ctl.patching.status import judge, take
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fp8ctl.environment import BackendName, Engine, Environment
    from fp8ctl.patching.catalog import Series
    from fp8ctl.patching.plan import PatchPlan
    from fp8ctl.patching.status import SeriesStatus
    from fp8ctl.render import Reporter

Verb = Literal["patch", "revert"]


@dataclass(frozen=True, slots=True)
class Target:
    """The engines to work on.

    Attributes:
        env: the environment.
        engines: with the series of each.
        options: that name it again in a hint, with a leading space.
    """

    env: Environment
    engines: tuple[tuple[Engine, Series], ...]
    options: str


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
) -> dict[str, object]:
    """Apply patches to the engines of an environment.

    Args:
        report: where to say what happens.
        python: interpreter of the environment.
        site_packages: or its folder.
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
    target = _target(report, python, site_packages, backends)
    _check_ids(target, patch_ids)
    if list_only:
        return _list(report, target)

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
            for _, series in target.engines
        ]

    return _run(
        report,
        "patch",
        target,
        plans,
        started=started,
        dry_run=dry_run,
        print_diff=print_diff,
        allow_running=allow_running,
    )


def revert(
    report: Reporter,
    *,
    python: Path | None = None,
    site_packages: Path | None = None,
    backends: Sequence[str] | None = None,
    patch_ids: Sequence[str] | None = None,
    dry_run: bool = False,
    allow_running: bool = False,
) -> dict[str, object]:
    """Take patches back, byte for byte; arguments and result as `patch`."""
    started = time.monotonic()
    target = _target(report, python, site_packages, backends)
    _check_ids(target, patch_ids, reverting=True)

    def plans(root: Root) -> list[PatchPlan]:
        result = []
        for _, series in target.engines:
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
) -> Target:
    wanted = [environment.parse_backend(b) for b in dict.fromkeys(backends or ())]
    env = environment.find(python, site_packages, wanted[0] if wanted else None)
    report.say(f"environment: {env.site_packages} ({env.origin})")
    if wanted:
        engines = [env.require_patchable(b) for b in wanted]
    else:
        engines = [env.require_patchable(b) for b in _supported(env)]
    options = environment.target_options(python, site_packages)
    return Target(env, tuple((e, catalog.load(e.backend, e.version)) for e in engines), options)


def _supported(env: Environment) -> list[BackendName]:
    """Return the engines to patch when none was named; an unsupported one alone is an error."""
    supported = [e.backend for e in env.engines if e.supported]
    if supported:
        return supported
    if env.engines:
        env.engine(env.engines[0].backend)  # raises, with the versions in the message
    raise NotFoundError(
        f"no engine in {env.site_packages} ({env.origin}), expected vLLM "
        f"{environment.SUPPORTED['vllm']} or SGLang {environment.SUPPORTED['sglang']}",
        hint=environment.install_hint("sglang", stays=env.named),
    )


def _check_ids(target: Target, patch_ids: Sequence[str] | None, *, reverting: bool = False) -> None:
    """Refuse an id that none of the engines knows."""
    known = {p.id for _, series in target.engines for p in series.patches}
    if reverting:
        with Root(target.env.site_packages) as root:
            for entry in store.read_ledger(root).entries.values():
                known |= set(entry.patches)
    for patch_id in patch_ids or ():
        if patch_id not in known:
            names = ", ".join(series.name for _, series in target.engines)
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
    with Root(env.site_packages) as root:
        interrupted = store.needs_recovery(root)
        if interrupted and not dry_run:
            _check_servers(report, env, allow_running=allow_running)
            with transaction.begin(root, report.warn) as mended:
                if mended:
                    report.warn(mended)
        plans = _plans(report, root, make, dry_run=dry_run)
        changes = any(not p.empty for p in plans)
        for (engine, _), plan in zip(target.engines, plans, strict=True):
            _show(report, verb, engine, plan)
        if print_diff:
            _print_diff(report, plans)
        if changes and not dry_run:
            transaction.check_permitted(root, [op for p in plans for op in p.ops])
            _check_servers(report, env, allow_running=allow_running)
            with transaction.begin(root, report.warn):
                # Once more under the lock: what was shown is what is done, or it fails.
                plans = make(root)
                transaction.run(root, plans, python_version=env.python_version, warn=report.warn)
        statuses = [judge(series, take(root, series)) for _, series in target.engines]
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
    return {
        "site_packages": str(env.site_packages),
        "origin": env.origin,
        "changed": changes and not dry_run,
        "dry_run": dry_run,
        "elapsed_s": round(elapsed, 4),
        "engines": [
            _engine_data(engine, series, plan, status)
            for (engine, series), plan, status in zip(target.engines, plans, statuses, strict=True)
        ],
    }


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


def _show(report: Reporter, verb: Verb, engine: Engine, plan: PatchPlan) -> None:
    report.say(f"{engine.label}, series {plan.series}:")
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
    with Root(target.env.site_packages) as root:
        statuses = [judge(series, take(root, series)) for _, series in target.engines]
    rows = []
    for (engine, series), status in zip(target.engines, statuses, strict=True):
        data.append(_engine_data(engine, series, None, status))
        for one, state in zip(series.patches, status.patches, strict=True):
            devices = "any" if len(one.devices) > 1 else one.devices[0]
            default = "yes" if one.default else "no"
            rows.append((series.name, one.id, state.state, default, devices, one.title))
        if status.interrupted:
            report.warn("an earlier command was cut short; the next patch or revert mends it")
        for file in status.files:
            if file.state not in ("pristine", "applied"):
                report.warn(f"{file.path} is {file.state}")
    report.table(("series", "patch", "state", "default", "device", "title"), rows)
    return {
        "site_packages": str(target.env.site_packages),
        "origin": target.env.origin,
        "engines": data,
    }


def _engine_data(
    engine: Engine, series: Series, plan: PatchPlan | None, status: SeriesStatus
) -> dict[str, object]:
    reasons = {c.id: c.reason for c in plan.choices} if plan else {}
    result: dict[str, object] = {
        "backend": engine.backend,
        "version": engine.version,
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


def _check_servers(report: Reporter, env: Environment, *, allow_running: bool) -> None:
    """Refuse, or only warn, when a server of fp8ctl runs on this environment."""
    servers = live_servers(env.site_packages)
    if not servers:
        return
    names = ", ".join(servers)
    if not allow_running:
        raise BusyError(
            f"{names} runs on {env.site_packages}: it would go on with the old code",
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
