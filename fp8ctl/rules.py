"""What doctor knows: one function per subject, each from facts to findings.

Here those about the interpreter and the engines; `host_rules` has the rest. A rule speaks of the
two supported engine versions only, costs nothing, and says what to type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8ctl import host_rules
from fp8ctl.environment import LABELS, SUPPORTED, install_hint
from fp8ctl.findings import Facts, Finding
from fp8ctl.patching.status import MEANING, way_out
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.environment import Engine
    from fp8ctl.patching.status import State


#: A patch of vLLM that was once the way to per-tensor updates.
_V2 = "disable-cutlass-fp8"


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Return the findings of every rule, in the order to be read."""
    found: list[Finding] = [*_python(facts)]
    if not facts.environment.engines:
        found.append(
            Finding(
                "engine",
                "engine",
                "fail",
                f"no vLLM and no SGLang in {facts.environment.site_packages}",
                install_hint("sglang", stays=facts.environment.named),
            )
        )
    found += _layer(facts)
    for engine in facts.environment.engines:
        found += _engine(facts, engine)
        if engine.supported and engine.kind != "editable":
            found += _files(facts, engine)
            found += _patches(facts, engine)
    found += _orphans(facts)
    found += _neighbours(facts)
    found += host_rules.packages(facts)
    found += host_rules.gpus(facts)
    found += host_rules.variables(facts)
    return tuple(found)


def _python(facts: Facts) -> Iterator[Finding]:
    version = facts.environment.python_version
    text = f"Python {version[0]}.{version[1]}"
    # Hooks and kernels run inside the engine (3.10); vLLM 0.9.1 says <3.13.
    if (3, 10) <= version < (3, 13):
        yield Finding("python", "Python", "ok", text)
    else:
        yield Finding(
            "python",
            "Python",
            "fail",
            f"{text}; the engines with fp8ctl's hooks need 3.10 to 3.12",
            "python3.12 -m venv NEW, and install the engine there",
        )


def _layer(facts: Facts) -> Iterator[Finding]:
    layer = facts.layer
    if layer is None:
        return
    data: dict[str, object] = {"folder": str(layer.folder), "stale": layer.stale}
    if layer.stale is None:
        yield Finding("overlay", "overlay", "ok", f"overlay of {layer.made_of}", None, data)
    else:
        fix = f"fp8ctl patch{facts.target}"
        yield Finding("overlay", "overlay", "fail", f"overlay is stale: {layer.stale}", fix, data)


def _engine(facts: Facts, engine: Engine) -> Iterator[Finding]:
    name, wanted = LABELS[engine.backend], SUPPORTED[engine.backend]
    check = name
    again = install_hint(engine.backend, stays=facts.environment.named)
    data: dict[str, object] = {"backend": engine.backend, "version": engine.version}
    if not engine.supported:
        yield Finding(
            "engine-version",
            check,
            "fail",
            f"{engine.label} is not supported; fp8ctl knows {name} {wanted}",
            again,
            data | {"expected": wanted},
        )
    else:
        by = f", installed by {engine.installer}" if engine.installer else ""
        yield Finding(
            "engine-version", check, "ok", f"{engine.label} ({engine.kind}{by})", None, data
        )
    if engine.kind == "editable":
        yield Finding(
            "engine-editable",
            check,
            "fail",
            f"editable install of {engine.package_dir}: fp8ctl does not patch a work tree",
            f"{again}, or `git apply` in {engine.package_dir.parent}",
            {"package_dir": str(engine.package_dir)},
        )
    if engine.shadowed_by:
        yield Finding(
            "engine-shadowed",
            check,
            "warn",
            f"`import {engine.backend}` takes {engine.shadowed_by}, not {engine.package_dir}",
            f"take {engine.shadowed_by.parent} out of PYTHONPATH",
            {"imported": str(engine.shadowed_by)},
        )


def _files(facts: Facts, engine: Engine) -> Iterator[Finding]:
    record = engine.record
    check = f"{LABELS[engine.backend]} files"
    pin = f"{engine.backend}=={SUPPORTED[engine.backend]}"
    again = facts.environment.reinstall(pin)
    if not record.present:
        yield Finding("engine-files", check, "warn", "no RECORD to verify the files against", again)
        return
    status = facts.patches.get(engine.backend)
    ours = (
        set()
        if status is None or isinstance(status, str)
        else {str(f.path) for f in status.files if f.patches}
    )
    strange = [f for f in record.modified if f not in ours]
    if record.missing:
        yield Finding(
            "engine-files",
            check,
            "fail",
            f"{plural(len(record.missing), 'file')} of RECORD missing: {_some(record.missing)}",
            again,
            {"missing": list(record.missing)},
        )
    if strange:
        yield Finding(
            "engine-files",
            check,
            "warn",
            f"{plural(len(strange), 'file')} changed since the release, not by fp8ctl: "
            f"{_some(strange)}",
            again,
            {"modified": strange},
        )
    if not record.missing and not strange:
        changed = len(record.modified)
        files = plural(record.checked, "file")
        but = f", but {changed} that fp8ctl patched" if changed else ""
        yield Finding("engine-files", check, "ok", f"{files} as released{but}")
    if record.read_only_dirs or not facts.environment.writable:
        patch = f"fp8ctl patch --backend {engine.backend}{facts.target}"
        yield Finding(
            "engine-writable",
            check,
            "warn",
            f"{facts.environment.site_packages} is not writable for you: it cannot be patched"
            + ("" if facts.layer else ", an overlay of it can"),
            None if facts.layer else f"{patch} --overlay ./fp8ctl-overlay",
            {"folders": list(record.read_only_dirs)},
        )
    if record.linked:
        yield Finding(
            "engine-links",
            check,
            "info",
            f"{plural(record.linked, 'file')} shared with an installer's cache; fp8ctl replaces "
            "files and never writes into them, an editor may do otherwise",
        )


def _patches(facts: Facts, engine: Engine) -> Iterator[Finding]:
    status = facts.patches.get(engine.backend)
    check = f"{LABELS[engine.backend]} patches"
    if status is None or isinstance(status, str):
        yield Finding("patches", check, "warn", f"cannot be told: {status or 'not asked'}")
        return
    applied = [p.id for p in status.patches if p.state == "applied"]
    data: dict[str, object] = {
        "state": status.state,
        "applied": applied,
        "files": {str(f.path): f.state for f in status.files},
    }
    command = way_out(
        status,
        site_packages=facts.environment.site_packages,
        target=facts.target,
        reinstall=facts.environment.reinstall(f"{engine.backend}=={engine.version}"),
    )
    torn = [p.id for p in status.patches if p.state == "partial"]
    bad = {state: [str(f.path) for f in status.files if f.state == state] for state in MEANING}
    told: tuple[State, ...] = ("missing", "drifted", "superseded")
    odd = [f"{state}, {MEANING[state]}: {_some(bad[state])}" for state in told if bad[state]]
    if status.interrupted or torn:
        what = "an earlier command was cut short" if status.interrupted else ", ".join(torn)
        message = "; ".join([f"applied in part: {what}", *odd])
        yield Finding("patches", check, "fail", message, command, data)
    elif odd:
        yield Finding("patches", check, "warn", "; ".join(odd), command, data)
    elif applied:
        yield Finding("patches", check, "ok", f"applied: {', '.join(applied)}", None, data)
    else:
        known = plural(len(status.patches), "patch", "patches")
        yield Finding("patches", check, "info", f"pristine, {known} known", command, data)
    if _V2 in applied and not any(gpu.capability == (12, 0) for gpu in facts.machine.gpus):
        # Measured on an H100: docs/evidence, 2026-11-22, leg vllm-patches.
        why = (
            "beside refit it costs speed (12 to 38 % on an H100) and gives nothing"
            if "refit" in applied
            else "without refit, memory that nothing wrote can reach per-tensor answers, up to NaN"
        )
        fix = f"fp8ctl revert --backend vllm --patch {_V2}{facts.target}"
        yield Finding("cutlass", check, "warn", f"{_V2} is applied: {why}", fix)


def _orphans(facts: Facts) -> Iterator[Finding]:
    """Name what fp8ctl left of engines that are gone."""
    for backend, status in facts.patches.items():
        if isinstance(status, str) or not status.orphan:
            continue
        files = {str(f.path): f.state for f in status.files}
        ours = [path for path, state in files.items() if state == "orphan"]
        what = f"{plural(len(ours), 'file')} ({_some(ours)}), " if ours else ""
        yield Finding(
            "orphan",
            f"{LABELS[backend]} patches",
            "warn",
            f"the engine that was patched is no longer installed: {what}.fp8ctl is left",
            way_out(
                status,
                site_packages=facts.environment.site_packages,
                target=facts.target,
                reinstall="",
            ),
            {"state": status.state, "files": files},
        )


def _neighbours(facts: Facts) -> Iterator[Finding]:
    environment = facts.environment
    if len(environment.engines) > 1:
        yield Finding(
            "both-engines",
            "engines",
            "warn",
            "vLLM and SGLang share one environment; vLLM 0.9.1 pins torch 2.7.0, SGLang 0.4.8 "
            f"pins 2.7.1: torch is {environment.packages.get('torch', 'missing')}",
            install_hint("sglang", stays=True),
        )
    for name, versions in (environment.duplicates or {}).items():
        yield Finding(
            "duplicate-metadata",
            name,
            "warn",
            f"{name} has {len(versions)} metadata folders: {', '.join(versions)}",
            f"{facts.pip} --force-reinstall --no-deps {name}",
            {"versions": list(versions)},
        )


def _some(items: tuple[str, ...] | list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
