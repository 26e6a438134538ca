"""Stale bytecode hides no patch: what an interpreter imports is what lies there, in every cell.

The cells: how a .pyc is validated, whether the patch keeps the size of the file, whether it
falls into the second of the old file's time, and the level of optimisation. Without care 15 of
the 36 import the old code; `test_without_care` shows that, so that the law is known to bite.
"""

from __future__ import annotations

import itertools
import json
import os
import py_compile
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fp8ctl.engines import base

Verb = Literal["patch", "revert"]

Change = tuple[str, str, str, str, dict[str, object]]
"""Patch, file, module, name in it, and the value of that name after each command."""

# The same size: `d = 2` becomes `d = 3`. Another: two lines more.
SAME: Change = ("third", "sglang/c.py", "sglang.c", "d", {"patch": 3, "revert": 2})
OTHER: Change = (
    "first",
    "sglang/srt/a.py",
    "sglang.srt.a",
    "first",
    {"patch": True, "revert": None},
)

IMPORTER = """
import importlib, json, sys
answers = []
for site, module, name in json.load(sys.stdin):
    for known in [m for m in sys.modules if m.split(".")[0] == "sglang"]:
        del sys.modules[known]
    sys.path[0] = site
    answers.append(getattr(importlib.import_module(module), name, None))
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True)
class Cell:
    """One combination, and an installed engine of its own."""

    invalidation: py_compile.PycInvalidationMode
    same_size: bool
    same_second: bool
    optimize: int
    site: Path

    @property
    def change(self) -> Change:
        return SAME if self.same_size else OTHER

    def source(self) -> Path:
        return self.site / self.change[1]

    def settle(self, then: float) -> None:
        """Give the source a time, and the bytecode that goes with it."""
        if not self.same_second:
            os.utime(self.source(), (then - 3600, then - 3600))
        py_compile.compile(
            str(self.source()),
            invalidation_mode=self.invalidation,
            optimize=self.optimize,
            doraise=True,
        )

    def __str__(self) -> str:
        size = "same size" if self.same_size else "other size"
        second = "same second" if self.same_second else "later"
        return f"{self.invalidation.name}, {size}, {second}, -{'O' * self.optimize}"


@pytest.fixture
def cells(lab: Any, tmp_path: Path) -> list[Cell]:
    axes = itertools.product(py_compile.PycInvalidationMode, (True, False), (True, False), range(3))
    made = []
    for number, (mode, size, second, optimize) in enumerate(axes):
        site = tmp_path / "cells" / str(number)
        shutil.copytree(lab.site, site)
        made.append(Cell(mode, size, second, optimize, site))
    assert len(made) == 36
    return made


def imported(cells: list[Cell], **environ: str) -> list[object]:
    """Return what the real interpreter imports in each cell, in their order."""
    found: dict[Cell, object] = {}
    for optimize in range(3):
        group = [c for c in cells if c.optimize == optimize]
        flags = ["-" + "O" * optimize] if optimize else []
        asked = [(str(c.site), c.change[2], c.change[3]) for c in group]
        done = subprocess.run(
            [sys.executable, "-S", *flags, "-c", IMPORTER],
            input=json.dumps(asked),
            env={"PYTHONDONTWRITEBYTECODE": "1", **environ},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        found |= dict(zip(group, json.loads(done.stdout), strict=True))
    return [found[c] for c in cells]


def wrong(cells: list[Cell], verb: Verb, **environ: str) -> list[str]:
    values = imported(cells, **environ)
    return [
        f"{cell}: {value!r}"
        for cell, value in zip(cells, values, strict=True)
        if value != cell.change[4][verb]
    ]


def apply(lab: Any, cell: Cell, verb: Verb) -> None:
    lab.site = cell.site
    if verb == "patch":
        lab.patch(cell.change[0])
    else:
        lab.revert()


def test_every_cell_imports_the_patched_code_and_then_the_old_one(
    lab: Any, cells: list[Cell]
) -> None:
    for cell in cells:
        cell.settle(time.time())
        apply(lab, cell, "patch")
    assert wrong(cells, "patch") == []
    for cell in cells:
        cell.settle(time.time())
        apply(lab, cell, "revert")
    assert wrong(cells, "revert") == []


def test_without_care_fifteen_cells_import_the_old_code(lab: Any, cells: list[Cell]) -> None:
    for cell in cells:
        cell.settle(time.time())
        old = cell.source().stat().st_mtime_ns
        other = cell.site.with_suffix(".patched")
        shutil.copytree(cell.site, other)
        lab.site = other
        lab.patch(cell.change[0])
        (other / cell.change[1]).replace(cell.source())
        then = old + (0 if cell.same_second else 3600 * 10**9)
        os.utime(cell.source(), ns=(then, then))
    stale = wrong(cells, "patch")
    assert sum("UNCHECKED" in one for one in stale) == 12
    assert sum("TIMESTAMP, same size, same second" in one for one in stale) == 3
    assert len(stale) == 15


def test_bytecode_that_lies_elsewhere_hides_nothing_from_a_launched_server(
    lab: Any, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = str(tmp_path / "prefix")
    monkeypatch.setattr(sys, "pycache_prefix", prefix)
    for cell in cells:
        cell.settle(time.time())
        apply(lab, cell, "patch")
    # No command can find what lies there; an unchecked file is never compared with its source.
    hidden = wrong(cells, "patch", PYTHONPYCACHEPREFIX=prefix)
    assert len(hidden) == 12
    assert all("UNCHECKED" in one for one in hidden)
    request = base.LaunchRequest(
        python=Path(sys.executable),
        model=base.ModelFacts(tmp_path, "m"),
        source="checkpoint",
        device=base.CPU,
        host="127.0.0.1",
        port=1,
        run_dir=tmp_path,
        hook_path=tmp_path,
        environ={"PYTHONPYCACHEPREFIX": prefix},
    )
    launched = {"PYTHONPYCACHEPREFIX": prefix} | base.common_env(request)
    assert wrong(cells, "patch", PYTHONPYCACHEPREFIX=launched["PYTHONPYCACHEPREFIX"]) == []
    assert "PYTHONPYCACHEPREFIX" not in base.common_env(
        base.LaunchRequest(**{f: getattr(request, f) for f in request.__slots__} | {"environ": {}})
    )
