"""Make docs/conformance.md: what implementations of FP8 quantisation do at the edges.

    python -m tools.conformance --out docs/conformance.md [--python PYTHON] [--wheels DIR]

`make conformance` installs what it compares with and runs this. Rows of this project and of
plain torch come from the interpreter that runs it, those of packages from the one given by
--python, which needs torch and what it has of them, and nothing of fp8ctl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import expressions, packages, page

if TYPE_CHECKING:
    from collections.abc import Sequence

TOOLS = Path(__file__).resolve().parent.parent
ROOT = TOOLS.parent


def own_rows() -> list[page.Row]:
    """Judge what needs only torch: this project and expressions."""
    import fp8ctl  # not there where a worker runs

    return [
        *page.judge(expressions.ours(), fp8ctl.__version__),
        *page.judge(expressions.eager(), torch.__version__.partition("+")[0]),
    ]


def compare(rows: Sequence[page.Row]) -> None:
    """Write into every row which of this project's recipes it equals."""
    page.compare(rows, expressions.models(sorted({row.sides for row in rows})))


def other_rows(wheels: Path | None) -> tuple[list[page.Row], list[str]]:
    """Judge the packages that this interpreter has, and wheels; return what is missing too."""
    rows: list[page.Row] = []
    missing = []
    for distribution in packages.INSTALLED:
        try:
            adapters, version = packages.installed(distribution)
        except (ImportError, AttributeError, OSError, RuntimeError) as e:
            missing.append(f"{distribution} ({type(e).__name__}: {e})")
            continue
        rows += page.judge(adapters, version)
    for distribution, version, of in packages.RELEASED:
        try:
            if wheels is None:
                raise ImportError("no --wheels")
            adapters = packages.released(wheels, distribution, version, of)
        except ImportError as e:
            missing.append(f"{distribution} {version} ({e})")
            continue
        rows += page.judge(adapters, version)
    return rows, missing


def ask(python: Path, wheels: Path | None) -> tuple[list[page.Row], list[str], str]:
    """Have another interpreter judge what it has; return its torch's version as well."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        # In tools/, so that this is the package `conformance` and nothing else of this
        # repository can be imported: transformers looks for a package named `kernels`.
        argv = [str(python.absolute()), "-m", "conformance", "--answer", str(answer)]
        if wheels is not None:
            argv += ["--wheels", str(wheels.absolute())]
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            argv, cwd=TOOLS, env=os.environ | offline, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"error: {python} exited with {done.returncode}:\n{done.stderr}")
        told = json.loads(answer.read_text(encoding="utf-8"))
    rows = [page.Row(**row | {"sides": tuple(row["sides"])}) for row in told["rows"]]
    return rows, told["missing"], told["torch"]


def shown(argument: str) -> str:
    """Return an argument as the page may show it: paths from the root of the project."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the page; default: print it")
    parser.add_argument("--python", type=Path, help="an interpreter with the packages")
    parser.add_argument("--wheels", type=Path, help="a folder with released wheels")
    parser.add_argument("--wanted", action="store_true", help="print the wheels for pip download")
    parser.add_argument("--require", action="store_true", help="exit 1 if a row is missing")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.wanted:
        print(*(f"{name}=={version}" for name, version, _ in packages.RELEASED), sep="\n")
        return 0
    if args.answer is not None:
        rows, missing = other_rows(args.wheels)
        told = {"rows": [asdict(r) for r in rows], "missing": missing, "torch": torch.__version__}
        args.answer.write_text(json.dumps(told), encoding="utf-8")
        return 0

    theirs, missing, used = ask(args.python or Path(sys.executable), args.wheels)
    if used.partition("+")[0] != torch.__version__.partition("+")[0]:
        raise SystemExit(f"error: torch {torch.__version__} here, {used} there; use the same")
    words = sys.argv[1:] if argv is None else argv
    head = [
        f"Made on {datetime.datetime.now(datetime.UTC):%Y-%m-%d} by",
        f"`python -m tools.conformance {shlex.join(shown(word) for word in words)}`",
        f"(`make conformance`), Python {platform.python_version()}, torch {torch.__version__} on",
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}.",
        f"Not installed here: {', '.join(m.partition(' (')[0] for m in missing) or 'nothing'}.",
    ]
    rows = [*own_rows(), *theirs]
    compare(rows)
    text = page.render(rows, head)
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.write_text(text, encoding="utf-8")
    for name in missing:
        print(f"not installed here: {name}", file=sys.stderr)
    return 1 if missing and args.require else 0


if __name__ == "__main__":
    raise SystemExit(main())
