"""Mutation testing: change one thing in a module, and see whether its tests notice.

    python tools/mutate.py diff plan store fsops transaction
    python tools/mutate.py store --jobs 2 --log store.jsonl    skips what the log calls killed
    python tools/mutate.py store --list                        only print the mutants
    python tools/mutate.py store --tests "tests/patching/test_store.py -k ledger"

Every mutant is written into a copy of the repository, in a folder of its own, and
the module's tests run there until the first fails. A mutant is killed by a test
that fails, by a time-out or by a module that cannot be imported. What survives is
printed, and either a test is missing or the change makes no difference. Exits 1
where fewer than `--bar` per cent are killed. Standard library only, but for pytest.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent

# Module, and the tests that are to find its mutants: the quick ones first.
TARGETS: dict[str, tuple[str, str]] = {
    "diff": ("fp8ctl/patching/diff.py", "tests/patching/test_diff.py"),
    "plan": (
        "fp8ctl/patching/plan.py",
        "tests/patching/test_plan.py tests/patching/test_commands.py -m 'not wheels and not long'",
    ),
    "store": (
        "fp8ctl/patching/store.py",
        "tests/patching/test_store.py tests/patching/test_concurrency.py "
        "tests/patching/test_faults.py tests/patching/test_power.py -m 'not long' "
        "-k 'not eight and not command_line'",
    ),
    "fsops": (
        "fp8ctl/patching/fsops.py",
        "tests/patching/test_fsops.py tests/patching/test_transaction.py",
    ),
    "transaction": (
        "fp8ctl/patching/transaction.py",
        "tests/patching/test_transaction.py tests/patching/test_faults.py "
        "tests/patching/test_power.py",
    ),
}
# Imported before the forks, which then need not: nothing of the repository itself.
_EARLY = ("pytest", "_pytest.assertion.rewrite", "hypothesis", "psutil", "unidiff", "packaging")
_MARKS = "not long and not gpu and not engine"
_COPIED = ("fp8ctl", "kernels", "patches", "tests", "tools", "docs", "pyproject.toml", "README.md")

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
}
_DELETED = (ast.Raise, ast.Continue, ast.Break, ast.AugAssign, ast.Delete, ast.Assert)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: bytes `start` to `end` of a source become `new`; `number` tells equal ones."""

    line: int
    kind: str
    old: str
    new: str
    start: int
    end: int
    number: int = 1

    @property
    def key(self) -> str:
        """A name that stays while the lines above it change."""
        words = f"{self.kind}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"
        return words if self.number == 1 else f"{words} ({self.number})"

    def applied(self, source: bytes) -> bytes:
        """Return the source with this change."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def mutants(source: bytes) -> list[Mutant]:
    """Return every mutant of a module, in the order of its lines."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    for node, new, kind in _changes(ast.parse(source)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(new)
        if isinstance(node, ast.expr) and not isinstance(new, ast.Constant):
            text = f"({text})"
        one = Mutant(node.lineno, kind, source[start:end].decode(), text, start, end)
        if one not in found:
            found.append(one)
    found.sort(key=lambda m: (m.line, m.start, m.kind, m.new))
    seen: Counter[str] = Counter()
    for place, one in enumerate(found):
        seen[one.key] += 1
        found[place] = replace(one, number=seen[one.key])
    return found


def _changes(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST, str]]:
    """Yield what is replaced, by what, and the kind of it."""
    for node in _executed(tree):
        if isinstance(node, ast.Compare):
            for number, op in enumerate(node.ops):
                other = copy.deepcopy(node)
                other.ops[number] = _COMPARED[type(op)]()
                yield node, other, "compare"
        elif isinstance(node, ast.BoolOp):
            swap = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node, ast.BoolOp(swap, node.values), "boolean"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, node.operand, "boolean"
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATED:
            yield node, ast.BinOp(node.left, _OPERATED[type(node.op)](), node.right), "arithmetic"
        elif isinstance(node, ast.Constant):
            for value in _other_values(node.value):
                yield node, ast.Constant(value), "constant"
        elif isinstance(node, ast.Return) and node.value is not None:
            if not (isinstance(node.value, ast.Constant) and node.value.value is None):
                yield node, ast.Return(ast.Constant(None)), "return"
        elif isinstance(node, ast.stmt) and _can_go(node):
            yield node, ast.Pass(), "deleted"
        for test in _tests(node):
            if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
                yield test, ast.UnaryOp(ast.Not(), test), "condition"


def _can_go(node: ast.stmt) -> bool:
    """Tell whether a statement is worth deleting: without a plain name's value nothing runs."""
    if isinstance(node, ast.Assign):
        return not isinstance(node.targets[0], ast.Name | ast.Tuple)
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant | ast.Yield)
    return isinstance(node, _DELETED)


def _tests(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _other_values(value: object) -> list[int | str | bytes]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, str):
        return [value + "~"] if value else ["~"]
    if isinstance(value, bytes):
        return [value + b"~"]
    return []


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs and matters: no annotations, docstrings, decorators, words of messages."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_idle(node, child):
                yield from _executed(child)


def _is_idle(parent: ast.AST, node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True  # positions inside an f-string are wrong before Python 3.12
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return True
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("NewType", "TypeVar"):
        return True
    if isinstance(node, ast.keyword) and node.arg in ("hint", "slots", "frozen", "repr"):
        return True
    if isinstance(parent, ast.Call) and isinstance(node, ast.Constant):
        return isinstance(node.value, str) and ast.unparse(parent.func).endswith("Error")
    if isinstance(parent, ast.Expr):
        return isinstance(node, ast.Constant)
    return False


# --- running --------------------------------------------------------------------------------------


def copy_repository(folder: Path) -> None:
    """Lay a copy into a folder, without compiled files: of one second and size, they would lie."""
    leave = shutil.ignore_patterns("__pycache__", ".*")
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)


def start(folder: Path, tests: Sequence[str]) -> int:
    """Start the tests of a copy in a child of this process, which has imported pytest already."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.chdir(folder)
        log = os.open(folder / ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT]
        import pytest

        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--basetemp", ".tmp"]
        code = int(pytest.main([*options, *tests]))
        sys.stdout.flush()
        os._exit(code)
    finally:
        os._exit(99)


def ended(child: int, until: float) -> int | None:
    """Return a child's exit status, -1 if its time is up, None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        return os.waitstatus_to_exitcode(status)
    if time.monotonic() < until:
        return None
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def run(
    module: Path, chosen: Sequence[Mutant], tests: Sequence[str], jobs: int, log: Path | None
) -> list[Mutant]:
    """Try mutants; return those that live."""
    source = module.read_bytes()
    name = module.relative_to(ROOT)
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        folders = [Path(scratch) / str(n) for n in range(jobs)]
        for folder in folders:
            copy_repository(folder)
        began = time.monotonic()
        child = start(folders[0], tests)
        while (code := ended(child, began + 900)) is None:
            time.sleep(0.05)
        if code != 0:
            print((folders[0] / ".log").read_text(errors="replace")[-3000:])
            raise SystemExit(f"{name}: its tests fail without a mutant")
        limit = 5 + 4 * (time.monotonic() - began)
        print(f"{name}: {len(chosen)} mutants, tests take {time.monotonic() - began:.1f} s")
        second = int(time.time())
        waiting, free = list(reversed(chosen)), list(folders)
        running: dict[int, tuple[Path, Mutant, float]] = {}
        while waiting or running:
            while waiting and free:
                folder, mutant = free.pop(), waiting.pop()
                (folder / name).write_bytes(mutant.applied(source))
                # Compiled files go by size and seconds: no two mutants share a second.
                second += 2
                os.utime(folder / name, (second, second))
                running[start(folder, tests)] = (folder, mutant, time.monotonic() + limit)
            time.sleep(0.01)
            for child, (folder, mutant, until) in list(running.items()):
                code = ended(child, until)
                if code is None:
                    continue
                del running[child]
                free.append(folder)
                if code == 0:
                    survivors.append(mutant)
                    print(f"  {name}:{mutant.line} {mutant.key}", flush=True)
                if log is not None:
                    with log.open("a") as stream:
                        told = {"module": str(name), "key": mutant.key, "line": mutant.line}
                        stream.write(json.dumps(told | {"killed": code != 0}) + "\n")
    return survivors


def known_dead(log: Path | None, module: Path) -> set[str]:
    """Return the keys of mutants of a module that a log calls killed."""
    if log is None or not log.exists():
        return set()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    mine = [r for r in rows if r["module"] == str(module.relative_to(ROOT))]
    return {r["key"] for r in mine if r["killed"]} - {r["key"] for r in mine if not r["killed"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("modules", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--tests", help="instead of the module's own: arguments for pytest")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--sample", type=int, help="only this many, chosen at random")
    parser.add_argument("--bar", type=float, default=90.0, help="per cent that must be killed")
    parser.add_argument("--log", type=Path, help="file to go on from, and to write to")
    parser.add_argument("--list", action="store_true", help="print the mutants, and stop")
    options = parser.parse_args()
    for module_name in _EARLY:
        with contextlib.suppress(ImportError):
            importlib.import_module(module_name)
    low = False
    for name in options.modules:
        module = ROOT / TARGETS[name][0]
        chosen = mutants(module.read_bytes())
        if options.sample and options.sample < len(chosen):
            chosen = random.Random(0).sample(chosen, options.sample)
        if options.list:
            for mutant in chosen:
                print(f"{module.relative_to(ROOT)}:{mutant.line} {mutant.key}")
            continue
        tests = shlex.split(options.tests or TARGETS[name][1])
        if "-m" not in tests:
            tests += ["-m", _MARKS]
        dead = known_dead(options.log, module)
        left = [m for m in chosen if m.key not in dead]
        survivors = run(module, left, tests, max(1, options.jobs), options.log)
        share = 100 * (1 - len(survivors) / max(1, len(chosen)))
        low = low or share < options.bar
        print(f"{name}: {len(chosen) - len(survivors)} of {len(chosen)} killed, {share:.1f} %")
    return int(low)


if __name__ == "__main__":
    sys.exit(main())
