"""What `patch` and `revert` say of plans and states, for people and as data.

Called by `commands`; reads only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fp8ctl.patching import diff
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.names import short
from fp8ctl.patching.status import MEANING, judge, take, way_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.patching.plan import PatchPlan
    from fp8ctl.patching.status import SeriesStatus
    from fp8ctl.patching.targets import Subject, Target
    from fp8ctl.render import Reporter

Verb = Literal["patch", "revert"]


def show(report: Reporter, verb: Verb, subject: Subject, plan: PatchPlan) -> None:
    """Show a plan to a person."""
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


def diff_of(plans: Sequence[PatchPlan]) -> bytes:
    """Return what plans change as one git diff."""
    return b"".join(
        # What is edited keeps its mode, whatever that is.
        diff.render(
            op.path, op.old_bytes, op.new_bytes, mode=None if op.action == "modify" else op.mode
        )
        for plan in plans
        for op in plan.ops
    )


def list_patches(report: Reporter, target: Target) -> dict[str, object]:
    """Body of `patch --list`: every patch with its state, every odd file with the way out."""
    data: list[dict[str, object]] = []
    env = target.env
    with Root(env.site_packages) as root:
        statuses = [judge(s.series, take(root, s.series)) for s in target.subjects]
    rows = []
    for subject, status in zip(target.subjects, statuses, strict=True):
        data.append(engine_data(subject, None, status))
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


def engine_data(
    subject: Subject, plan: PatchPlan | None, status: SeriesStatus
) -> dict[str, object]:
    """Return an engine, its patches and files as JSON types; with what a plan does to them."""
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
