"""`tools/mutate.py`: a weak test lets mutants live, and that is seen."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAST = "return: return n <= LIMIT -> return None"
SOURCE = b'''"""Words."""
from __future__ import annotations
LIMIT: int = 3  # a comment stays


def small(n: int) -> bool:
    """Tell."""
    if n < 0 and n != -5:
        raise ValueError("no such number")
    return n <= LIMIT
'''


@pytest.fixture(scope="module")
def mutate() -> Any:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # a dataclass looks its own module up
    spec.loader.exec_module(module)
    del sys.modules["mutate"]
    return module


def test_mutants_are_single_changes_of_code_that_runs(mutate: Any) -> None:
    found = {m.key for m in mutate.mutants(SOURCE)}
    assert found == {
        "constant: 3 -> 4",
        "boolean: n < 0 and n != -5 -> (n < 0 or n != -5)",
        "compare: n < 0 -> (n <= 0)",
        "constant: 0 -> 1",
        "compare: n != -5 -> (n == -5)",
        "constant: 5 -> 6",
        'deleted: raise ValueError("no such number") -> pass',
        "compare: n <= LIMIT -> (n < LIMIT)",
        "return: return n <= LIMIT -> return None",
    }
    changed = next(m for m in mutate.mutants(SOURCE) if m.old == "n <= LIMIT")
    assert changed.applied(SOURCE) == SOURCE.replace(b"n <= LIMIT", b"(n < LIMIT)")


def test_equal_changes_have_names_of_their_own(mutate: Any) -> None:
    keys = [m.key for m in mutate.mutants(b"x = 1\ny = 1\n")]
    assert keys == ["constant: 1 -> 2", "constant: 1 -> 2 (2)"]


def test_every_target_is_there(mutate: Any) -> None:
    for module, tests in mutate.TARGETS.values():
        assert (ROOT / module).is_file()
        files = [t.partition("::")[0] for t in tests.split() if t.startswith("tests/")]
        assert all((ROOT / file).is_file() for file in files)


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mutate
mutate.ROOT = Path.cwd()
module, log = Path.cwd() / "fp8ctl" / "toy.py", Path("log")
found = mutate.mutants(module.read_bytes())
survivors = mutate.run(module, found, ["tests/test_toy.py"], 2, log)
dead = mutate.known_dead(log, module)
Path("told").write_text(json.dumps([len(found), [m.key for m in survivors], sorted(dead)]))
"""


def test_what_a_weak_test_misses_is_told(tmp_path: Path) -> None:
    (tmp_path / "fp8ctl").mkdir()
    (tmp_path / "tests").mkdir()
    module = tmp_path / "fp8ctl" / "toy.py"
    module.write_bytes(SOURCE)
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from fp8ctl.toy import small\n\ndef test_small():\n    assert small(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "tools")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count, survivors, dead = json.loads((tmp_path / "told").read_text())
    # Killed: the boundary that the test stands on, and the answer itself.
    either = "boolean: n < 0 and n != -5 -> (n < 0 or n != -5)"
    assert dead == [either, "compare: n <= LIMIT -> (n < LIMIT)", LAST]
    assert len(survivors) == count - 3
    assert "constant: 3 -> 4" in survivors
    assert module.read_bytes() == SOURCE


def test_the_last_line_of_a_log_counts(mutate: Any, tmp_path: Path) -> None:
    """A survivor that a new test kills is not tried again; one that lives again is."""
    log = tmp_path / "log"
    module = ROOT / "fp8ctl" / "toy.py"
    rows = [("a", False), ("a", True), ("b", True), ("b", False), ("c", True), ("d", False)]
    told = [{"module": "fp8ctl/toy.py", "key": key, "killed": killed} for key, killed in rows]
    told.append({"module": "fp8ctl/other.py", "key": "d", "killed": True})
    log.write_text("".join(json.dumps(row) + "\n" for row in told))
    assert mutate.known_dead(log, module) == {"a", "c"}
    assert mutate.known_dead(None, module) == mutate.known_dead(tmp_path / "none", module) == set()


def test_a_function_that_somebody_imported_runs_the_new_code(mutate: Any) -> None:
    source = "from dataclasses import dataclass\nN = 1\ndef f():\n    return N\n"
    source += "@dataclass(frozen=True, slots=True)\nclass C:\n    x: int\n    @property\n"
    source += (
        "    def p(self):\n        return 1\n    @staticmethod\n    def s():\n        return 1\n"
    )
    module = types.ModuleType("toy")
    sys.modules["toy"] = module
    try:
        exec(source, module.__dict__)
        f, one, s = module.f, module.C(1), module.C.s
        mutate.graft(module, source.replace("1", "2").encode())
    finally:
        del sys.modules["toy"]
    assert (f(), one.p, s(), module.N) == (2, 2, 2, 2)
