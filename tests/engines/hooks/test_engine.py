"""The unscaled guard of a patched engine, as hooks ask it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from fp8ctl.engines.hooks.engine import COUNTERS, guard_in

PATCHES = sorted(Path(__file__).parents[3].glob("patches/*/*-unscaled-guard.patch"))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("tests_guarded_engine")

    def unfilled(model: nn.Module) -> list[object]:
        return [getattr(one, COUNTERS) for one in model.modules()]

    vars(module)["fp8ctl_unfilled"] = unfilled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_it_goes_through_the_layers_that_it_counts_in_and_through_no_others(
    engine: ModuleType,
) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(nn.Linear(2, 2), inner, nn.Linear(2, 2))
    guard = guard_in(engine.__name__)
    assert guard("fp8ctl_unfilled", model) == []
    setattr(inner[0], COUNTERS, {"weight": 1})
    setattr(model[2], COUNTERS, {})
    assert guard("fp8ctl_unfilled", model) == [{"weight": 1}, {}]
    assert guard("fp8ctl_forget", model) == {}, "an engine without that part of the patch"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: str(patch.parent.name))
def test_the_patches_count_there_and_ask_a_model_for_nothing_else(patch: Path) -> None:
    added = "\n".join(line[1:] for line in patch.read_text().splitlines() if line[:1] == "+")
    assert re.search(rf"\blayer\.{COUNTERS}\b.*= ", added)
    for name in ("fp8ctl_unfilled", "fp8ctl_forget"):
        body = re.split(r"\n(?=\S)", added[added.index(f"def {name}(") :])[0]
        code = body.rpartition('"""')[2]
        assert "model" in code
        assert not re.findall(r"\bmodel\b(?!\.modules\(\))", code), code


def test_both_engines_have_one() -> None:
    assert len(PATCHES) == 2
