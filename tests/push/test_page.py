"""What docs/library.md shows of a push runs, against servers."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.stream import quantize_weights
from tests.push.serving import serving
from tests.push.test_rollout import holds
from tests.test_stream import PLAN, WEIGHTS

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"


def blocks(mark: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"<!-- {mark} -->\n```python\n(.*?)^```$", text, re.M | re.S)


class Model:
    def named_parameters(self) -> Any:
        return ((name, torch.nn.Parameter(t)) for name, t in WEIGHTS.items())


def test_the_python_about_pushes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(json.dumps(PLAN.to_json()))
    code = blocks("push")
    assert len(code) == 2
    with serving(PLAN) as one, serving(PLAN) as other:
        names: dict[str, Any] = {"urls": [one.url, other.url], "model": Model()}
        for block in code:
            exec(compile(block, str(PAGE), "exec"), names)
        assert one.gate.about["version"] == other.gate.about["version"] == "again"
        assert holds(one, [*quantize_weights(WEIGHTS.items(), PLAN)])
    assert capsys.readouterr().out == "0 bytes, 100% were there already\n"
    assert len(Path("updates.jsonl").read_text().splitlines()) == 2 * 20


def test_the_python_about_ranks_is_what_test_ranks_runs() -> None:
    [block] = blocks("push: ranks")
    ast.parse(block)
    assert "ranks=ranks" in block
