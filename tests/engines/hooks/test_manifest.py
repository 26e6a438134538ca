"""The plan that a server was started with, as its processes read it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fp8ctl.engines.hooks import manifest

if TYPE_CHECKING:
    from pathlib import Path


def test_a_complete_push_is_every_tensor_of_the_plan_with_its_scales() -> None:
    tensors = [
        {"name": "a.weight", "quantize": True},
        {"name": "norm.weight", "quantize": False},
    ]
    block = {"mode": "block", "tensors": tensors}
    assert manifest.expected_names(block) == ["a.weight", "a.weight_scale_inv", "norm.weight"]
    per_tensor = {"mode": "per-tensor", "tensors": tensors}
    assert manifest.expected_names(per_tensor) == ["a.weight", "a.weight_scale", "norm.weight"]
    assert manifest.expected_names({}) == []


def test_the_plan_is_read_from_the_run_folder(run_dir: Path) -> None:
    assert manifest.read() == {}
    (run_dir / "manifest.json").write_text(json.dumps({"mode": "block"}))
    assert manifest.read() == {"mode": "block"}
