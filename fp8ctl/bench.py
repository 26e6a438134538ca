"""`fp8ctl bench kernel`: the kernels beside a copy of as many bytes, measured by the worker.

`bench push` is in `pushbench`.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from fp8ctl import environment
from fp8ctl.errors import CheckFailedError, UsageError
from fp8ctl.interpreter import run_worker, torch_python
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fp8ctl.render import Reporter

_DEVICES = ("cpu", "cuda")


def run(
    report: Reporter,
    *,
    what: str,
    device: str | None,
    recipe: str | None,
    quick: bool,
    python: Path | None,
    url: str | None = None,
    push: Mapping[str, Any] | None = None,
) -> dict[str, object]:
    """Measure the kernels, or what `what` says; return what was found.

    Args:
        recipe: of the kernels; None: "ieee".
        url: of the server, for "push".
        push: options that only that has; those that are None were not given.

    Raises:
        UsageError: there is no such benchmark, device or recipe, or an option is of the other one.
        NotFoundError: no interpreter with torch, or no CUDA device where one was asked for.
        CheckFailedError: codes or scales are not the reference's; its data is all that was found.
    """
    if device is not None and device not in _DEVICES:
        raise UsageError(
            f"unknown device {device!r}, expected {' or '.join(_DEVICES)}",
            hint=" or ".join(f"--device {name}" for name in _DEVICES),
        )
    of_push = {name: value for name, value in (push or {}).items() if value is not None}
    if what == "push":
        from fp8ctl import pushbench

        if url is None:
            raise UsageError("no server was named", hint="fp8ctl bench push URL; fp8ctl ps")
        _refuse({"recipe": recipe, "quick": quick or None}, "kernel", f"push {shlex.quote(url)}")
        return pushbench.run(report, url=url, device=device, python=python, **of_push)
    if what != "kernel" or url is not None:
        asked = " ".join(filter(None, (what, url)))
        raise UsageError(
            f"unknown benchmark {asked!r}, expected kernel or push URL",
            hint="fp8ctl bench kernel, or fp8ctl bench push URL",
        )
    _refuse(of_push, "push URL", "kernel")
    chosen = torch_python() if python is None else environment.find(python, None).python
    assert chosen is not None  # only a bare folder has none
    arguments = {"device": device, "recipe": recipe or "ieee", "quick": quick}
    result = run_worker(chosen, "bench-kernel", arguments, report, "bench kernel")
    for line in result["heading"]:
        report.data(line)
    report.data()
    report.table(result["columns"], result["cells"])
    document: dict[str, object] = result["document"]
    wrong = [row for row in result["document"]["rows"] if not row["exact"]]
    if wrong:
        raise CheckFailedError(
            f"{plural(len(wrong), 'row')} of {len(result['document']['rows'])} not exact;"
            f" {wrong[0]['work']}: {wrong[0]['differs']}",
            hint=f"fp8ctl doctor --python {shlex.quote(str(chosen))}",
            data=document,
        )
    return document


def _refuse(given: Mapping[str, Any], theirs: str, asked: str) -> None:
    """Refuse options of the other benchmark: a table without what they ask for would mislead.

    Args:
        given: those that only the other one has, by name; None: not given.
        theirs: the other one, as it is typed.
        asked: this one.
    """
    options = {f"--{n.replace('_', '-')}": v for n, v in given.items() if v is not None}
    if not options:
        return
    typed = " ".join(n if v is True else f"{n} {shlex.quote(str(v))}" for n, v in options.items())
    raise UsageError(
        f"{typed}: of bench {theirs.split()[0]}, and bench {asked.split()[0]} has no such option",
        hint=f"fp8ctl bench {asked}, or fp8ctl bench {theirs} {typed}",
    )
