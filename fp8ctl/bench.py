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
    recipe: str,
    quick: bool,
    python: Path | None,
    url: str | None = None,
    push: Mapping[str, Any] | None = None,
) -> dict[str, object]:
    """Measure the kernels, or what `what` says; return what was found.

    Args:
        url: of the server, for "push".
        push: options that only that has.

    Raises:
        UsageError: there is no such benchmark, device or recipe.
        NotFoundError: no interpreter with torch, or no CUDA device where one was asked for.
        CheckFailedError: codes or scales are not the reference's; its data is all that was found.
    """
    if what == "push":
        from fp8ctl import pushbench

        if url is None:
            raise UsageError("no server was named", hint="fp8ctl bench push URL; fp8ctl ps")
        return pushbench.run(report, url=url, device=device, python=python, **(push or {}))
    if what != "kernel" or url is not None:
        asked = " ".join(filter(None, (what, url)))
        raise UsageError(
            f"unknown benchmark {asked!r}, expected kernel or push URL",
            hint="fp8ctl bench kernel, or fp8ctl bench push URL",
        )
    if device is not None and device not in _DEVICES:
        raise UsageError(
            f"unknown device {device!r}, expected {' or '.join(_DEVICES)}",
            hint=" or ".join(f"--device {name}" for name in _DEVICES),
        )
    chosen = torch_python() if python is None else environment.find(python, None).python
    assert chosen is not None  # only a bare folder has none
    arguments = {"device": device, "recipe": recipe, "quick": quick}
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
