"""Mutation testing: change one thing in a module, and see whether its tests notice.

    python tools/mutate.py diff plan store fsops transaction
    python tools/mutate.py store --jobs 2 --log store.jsonl    skips what the log calls killed
    python tools/mutate.py store --list                        only print the mutants
    python tools/mutate.py store --tests "tests/patching/test_store.py -k ledger"

The module's tests are collected once. For every mutant a child of that process puts
the changed code in the place of the old and runs them until the first fails; no file
is written. A mutant is killed by a test that fails, by a time-out or by a module that
cannot be imported. What survives is printed: either a test is missing or the change
makes no difference. Tests that start a program of their own see the code unchanged.
Exits 1 where fewer than `--bar` per cent are killed. Standard library and pytest only.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import inspect
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent

# Module, and the tests that are to find its mutants: the quick ones first.
TARGETS: dict[str, tuple[str, str]] = {
    "names": ("fp8ctl/patching/names.py", "tests/patching/test_names.py"),
    "parser": (
        "fp8ctl/patching/parser.py",
        "tests/patching/test_parser.py tests/patching/test_diff.py tests/patching/test_hostile.py "
        "-k 'not costly and not wheels'",
    ),
    "catalog": (
        "fp8ctl/patching/catalog.py",
        "tests/patching/test_catalog.py tests/patching/test_series.py -m 'not wheels and not long'",
    ),
    "diff": (
        "fp8ctl/patching/diff.py",
        "tests/patching/test_diff.py tests/patching/test_parser.py tests/patching/test_plan.py ",
    ),
    "plan": (
        "fp8ctl/patching/plan.py",
        "tests/patching/test_plan.py tests/patching/test_series.py tests/patching/test_status.py "
        "tests/patching/test_commands.py -m 'not wheels and not long'",
    ),
    "store": (
        "fp8ctl/patching/store.py",
        "tests/patching/test_store.py tests/patching/test_concurrency.py "
        "tests/patching/test_faults.py tests/patching/test_power.py "
        "-k 'not eight and not command_line and not every_call and (not TestCut or patch)'",
    ),
    "fsops": (
        "fp8ctl/patching/fsops.py",
        "tests/patching/test_fsops.py tests/patching/test_faults.py "
        "tests/patching/test_transaction.py -k 'not every_call'",
    ),
    "transaction": (
        "fp8ctl/patching/transaction.py",
        "tests/patching/test_transaction.py tests/patching/test_status.py "
        "tests/patching/test_faults.py tests/patching/test_links.py "
        "tests/patching/test_commands.py tests/patching/test_power.py "
        "-k 'not wheels and (not every_call or EIO-once)'",
    ),
}
_MARKS = "not long and not gpu and not engine"

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
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return isinstance(parent, ast.Expr) or node.value.count(" ") > 2  # a sentence
    if isinstance(parent, ast.Expr):
        return isinstance(node, ast.Constant)
    return False


# --- running --------------------------------------------------------------------------------------


def graft(module: ModuleType, source: bytes) -> None:
    """Give a module that is imported already the code and the values of another source.

    The functions stay the objects that they are, so that whoever has imported one runs the
    new code; a value that somebody has copied stays as it was.
    """
    fresh = ModuleType(module.__name__)
    file = str(vars(module).get("__file__"))
    fresh.__dict__.update(__file__=file, __package__=module.__package__)
    with _registered(fresh):
        exec(compile(source, file, "exec", dont_inherit=True), fresh.__dict__)
    for name, value in vars(fresh).items():
        if isinstance(value, type) and value.__module__ == module.__name__:
            for member, inner in vars(value).items():
                _graft_one(vars(getattr(module, name)).get(member), inner)
        elif not _graft_one(vars(module).get(name), value) and not name.startswith("__"):
            setattr(module, name, value)


@contextlib.contextmanager
def _registered(module: ModuleType) -> Iterator[None]:
    """Let a dataclass that is being made find its module."""
    before = sys.modules[module.__name__]
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        sys.modules[module.__name__] = before


def _graft_one(old: object, new: object) -> bool:
    """Give an old function the code of a new one; False where they are no functions."""
    if isinstance(old, property) and isinstance(new, property):
        return _graft_one(old.fget, new.fget)
    old, new = (getattr(f, "__func__", f) for f in (old, new))
    old, new = (inspect.unwrap(f) if callable(f) else f for f in (old, new))
    if not (isinstance(old, FunctionType) and isinstance(new, FunctionType)):
        return isinstance(new, type)
    if len(old.__code__.co_freevars) == len(new.__code__.co_freevars):
        old.__code__, old.__defaults__ = new.__code__, new.__defaults__
        old.__kwdefaults__ = new.__kwdefaults__
    return True


class Loop:
    """A plugin for pytest: runs what was collected once for each mutant, in children."""

    def __init__(
        self, path: Path, chosen: Sequence[Mutant], jobs: int, log: Path | None, scratch: Path
    ) -> None:
        self.path, self.chosen, self.jobs, self.log = path, chosen, jobs, log
        self.scratch = scratch
        self.survivors: list[Mutant] = []
        self.failed = ""

    def pytest_runtestloop(self, session: Any) -> bool:
        name = str(self.path.relative_to(ROOT))
        module = sys.modules[name.removesuffix(".py").replace("/", ".")]
        source = self.path.read_bytes()
        began = time.monotonic()
        child = self._start(session, module, source, "whole")
        while (code := self._ended(child, began + 900)) is None:
            time.sleep(0.02)
        if code != 0:
            self.failed = f"{name}: its tests fail without a mutant"
            return True
        limit = 5 + 3 * (time.monotonic() - began)
        print(f"{name}: {len(self.chosen)} mutants, tests take {time.monotonic() - began:.1f} s")
        waiting = list(reversed(self.chosen))
        running: dict[int, tuple[Mutant, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                child = self._start(session, module, mutant.applied(source), f"m{len(waiting)}")
                running[child] = (mutant, time.monotonic() + limit)
            time.sleep(0.01)
            for child, (mutant, until) in list(running.items()):
                code = self._ended(child, until)
                if code is not None:
                    del running[child]
                    self._judge(name, mutant, killed=code != 0)
        return True

    def _start(self, session: Any, module: ModuleType, source: bytes, name: str) -> int:
        """Run the tests in a child with another source; it exits 0 if all of them pass."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (1, 2):
                os.dup2(null, fd)
            graft(module, source)
            session.config._tmp_path_factory._given_basetemp = self.scratch / name
            for number, item in enumerate(session.items):
                later = session.items[number + 1 : number + 2]
                protocol = item.config.hook.pytest_runtest_protocol
                protocol(item=item, nextitem=later[0] if later else None)
                if session.testsfailed:
                    os._exit(1)
            os._exit(0)
        finally:
            os._exit(99)  # a source that cannot be imported, or a test that breaks pytest

    def _ended(self, child: int, until: float) -> int | None:
        """Return a child's exit status, -1 if its time is up, None while it runs."""
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() < until:
            return None
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -1

    def _judge(self, name: str, mutant: Mutant, *, killed: bool) -> None:
        if not killed:
            self.survivors.append(mutant)
            print(f"  {name}:{mutant.line} {mutant.key}", flush=True)
        if self.log is not None:
            told = {"module": name, "key": mutant.key, "line": mutant.line, "killed": killed}
            with self.log.open("a") as stream:
                stream.write(json.dumps(told) + "\n")


def run(
    module: Path, chosen: Sequence[Mutant], tests: Sequence[str], jobs: int, log: Path | None
) -> list[Mutant]:
    """Try mutants; return those that live."""
    import pytest

    options = ["-q", "-s", "--no-header", "-p", "no:cacheprovider", "--timeout=30"]
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        loop = Loop(module, chosen, jobs, log, Path(scratch))
        code = pytest.main([*options, f"--rootdir={ROOT}", *tests], plugins=[loop])
    if loop.failed or code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(loop.failed or f"{module}: pytest ends with {code!r}")
    return loop.survivors


def known_dead(log: Path | None, module: Path) -> set[str]:
    """Return the keys of mutants of a module that a log calls killed, by its last word on each."""
    if log is None or not log.exists():
        return set()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = {r["key"]: r["killed"] for r in rows if r["module"] == str(module.relative_to(ROOT))}
    return {key for key, killed in last.items() if killed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("modules", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--tests", help="instead of the module's own: arguments for pytest")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--sample", type=int, help="only this many, chosen at random")
    parser.add_argument("--bar", type=float, default=90.0, help="per cent that must be killed")
    parser.add_argument(
        "--log", type=lambda p: Path(p).resolve(), help="file to go on from, and to write to"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants, and stop")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
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
