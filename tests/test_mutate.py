"""`tools/mutate.py`: a weak test lets mutants live, and that is seen."""

from __future__ import annotations

import importlib.util
import sys
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
        assert all((ROOT / t).is_file() for t in tests.split() if t.startswith("tests/"))


def test_what_a_weak_test_misses_is_told(
    mutate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tests").mkdir()
    module = tmp_path / "tools" / "toy.py"
    module.write_bytes(SOURCE)
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from tools.toy import small\n\ndef test_small():\n    assert small(3)\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    log = tmp_path / "log"
    found = [m for m in mutate.mutants(SOURCE) if m.key in ("constant: 3 -> 4", LAST)]
    survivors = mutate.run(module, found, ["tests/test_toy.py"], 2, log)
    assert [m.key for m in survivors] == ["constant: 3 -> 4"]
    assert mutate.known_dead(log, module) == {LAST}
    assert module.read_bytes() == SOURCE
