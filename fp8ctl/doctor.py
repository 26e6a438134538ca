"""`fp8ctl doctor`: what is here, what is wrong, what to type next.

Reads metadata and files of the environment and asks the driver; imports no
engine, starts no server, writes nothing, needs no network.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from fp8ctl import environment, hardware, rules
from fp8ctl.environment import LABELS, SUPPORTED
from fp8ctl.errors import CheckFailedError, Fp8ctlError, NotFoundError, UnsupportedError
from fp8ctl.findings import Facts, Layer
from fp8ctl.render import plural

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.environment import BackendName, Environment
    from fp8ctl.findings import Finding
    from fp8ctl.patching.status import SeriesStatus
    from fp8ctl.render import JsonObject, Reporter

# The packages whose version changes what an engine does.
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "torchao",
    "compressed-tensors",
    "xgrammar",
    "sgl-kernel",
    "flashinfer-python",
    "xformers",
)
_MARKS = {"ok": ("✓", "ok"), "info": ("·", "dim"), "warn": ("!", "warn"), "fail": ("✗", "fail")}


def run(
    report: Reporter,
    *,
    python: Path | None,
    site_packages: Path | None,
    strict: bool,
    front: Path | None = None,
) -> JsonObject:
    """Run `fp8ctl doctor`; `front` is the folder of an overlay to look at.

    Raises:
        NotFoundError: no engine is here.
        UnsupportedError: only engines of other versions are here.
        CheckFailedError: under `strict`, a finding is a warning or a failure.
    """
    target = environment.target_options(python, site_packages)
    if front is None:
        found, layer = environment.find(python, site_packages), None
    else:
        from fp8ctl.patching import overlay

        front = overlay.parse(front)
        made = overlay.require(front)
        found = overlay.overlaid(overlay.source(front, python, site_packages, None), front)
        target += overlay.option(front)
        layer = Layer(front, overlay.describe(made), overlay.stale(made))
    facts = Facts(found, hardware.detect(), os.environ, _patches(found), target, layer)
    findings = rules.examine(facts)
    following = _next(found, facts, target)
    data: JsonObject = {
        "environment": to_json(found),
        "findings": [f.to_json() for f in findings],
        "next": following,
    }
    _print(report, found, findings, following)

    if not found.engines:
        raise NotFoundError(
            f"no vLLM and no SGLang in {found.site_packages} ({found.origin})",
            hint=following,
            data=data,
        )
    if not any(e.supported for e in found.engines):
        names = ", ".join(e.label for e in found.engines)
        known = " and ".join(f"{LABELS[b]} {v}" for b, v in SUPPORTED.items())
        raise UnsupportedError(
            f"{names} is not supported; fp8ctl knows {known}", hint=following, data=data
        )
    bad = [f for f in findings if f.status in ("warn", "fail")]
    if strict and bad:
        raise CheckFailedError(
            f"{len(bad)} of {plural(len(findings), 'finding')} "
            f"{'is a warning or a failure' if len(bad) == 1 else 'are warnings or failures'}: "
            + ", ".join(dict.fromkeys(f.id for f in bad)),
            hint=next((f.fix for f in bad if f.fix), None),
            data=data,
        )
    return data


def to_json(found: Environment) -> JsonObject:
    """Return an environment as JSON types."""
    machine = hardware.detect()
    return {
        "python": str(found.python) if found.python else None,
        "python_version": ".".join(map(str, found.python_version)),
        "site_packages": str(found.site_packages),
        "origin": found.origin,
        "writable": found.writable,
        "engines": [
            {
                "backend": e.backend,
                "version": e.version,
                "supported": e.supported,
                "kind": e.kind,
                "installer": e.installer,
                "source": e.source,
                "package_dir": str(e.package_dir),
                "record": {
                    "present": e.record.present,
                    "checked": e.record.checked,
                    "modified": list(e.record.modified),
                    "missing": list(e.record.missing),
                    "linked": e.record.linked,
                },
            }
            for e in found.engines
        ],
        "packages": {n: found.packages[n] for n in _PACKAGES if n in found.packages},
        "cuda": found.cuda,
        "driver": found.driver,
        "driver_cuda": ".".join(map(str, machine.cuda)) if machine.cuda else None,
        "gpus": [
            {
                "name": g.name,
                "capability": list(g.capability) if g.capability else None,
                "memory": g.memory,
            }
            for g in found.gpus
        ],
    }


def _patches(found: Environment) -> dict[BackendName, SeriesStatus | str]:
    states: dict[BackendName, SeriesStatus | str] = {}
    for engine in found.engines:
        if not engine.supported or engine.kind == "editable":
            continue
        from fp8ctl.patching import status

        try:
            states[engine.backend] = status.inspect(engine.dist_info.parent, engine.backend)
        except Fp8ctlError as e:
            states[engine.backend] = e.message
        except OSError as e:
            states[engine.backend] = str(e)
    for backend in SUPPORTED:
        if backend in states:
            continue
        from fp8ctl.patching import status

        with contextlib.suppress(Fp8ctlError, OSError):
            left = status.leftover(found.site_packages, backend)
            if left is not None:
                states[backend] = left
    return states


def _next(found: Environment, facts: Facts, target: str) -> str:
    """Choose the one command to type next: install, patch or launch."""
    usable = [e for e in found.engines if e.supported and e.kind != "editable"]
    if not usable:
        wanted = found.engines[0].backend if found.engines else "sglang"
        return environment.install_hint(wanted, stays=found.named)
    # Without a GPU SGLang is the engine that runs.
    engine = usable[-1] if not found.gpus else usable[0]
    state = facts.patches.get(engine.backend)
    applied = state.applied if state is not None and not isinstance(state, str) else frozenset()
    verb = "launch" if applied else "patch"
    return f"fp8ctl {verb} --backend {engine.backend}{target}"


def _print(
    report: Reporter, found: Environment, findings: tuple[Finding, ...], following: str
) -> None:
    place = found.python or found.site_packages
    report.data(f"{report.style(str(place), 'path')} ({found.origin})")
    for finding in findings:
        mark, style = _MARKS[finding.status]
        report.data(f"{report.style(mark, style)} {_line(finding)}")
        if finding.fix:
            report.data(f"    {report.style('fix:', 'bold')} {finding.fix}")
    failures, warnings = (sum(f.status == s for f in findings) for s in ("fail", "warn"))
    report.data(
        f"{plural(len(findings), 'finding')}: "
        f"{plural(failures, 'failure')}, {plural(warnings, 'warning')}"
    )
    report.data(f"{report.style('next:', 'bold')} {following}")


def _line(finding: Finding) -> str:
    # `torch: torch 2.7.1` says it twice.
    if finding.message.lower().startswith(finding.check.lower()):
        return finding.message
    return f"{finding.check}: {finding.message}"
