"""A small checkpoint, its plan, and the digests of what the kernel makes of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from fp8ctl import checkpoint
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.planning import make_plan
from tests.check.reports import SHAPES

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.manifest import Plan


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint of a mixture of experts, without its experts."""
    folder = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    return folder


@pytest.fixture(scope="session")
def plan(model: Path) -> Plan:
    return make_plan(model, "sglang", Mode.BLOCK, 1, BlockSize(32, 32))


@pytest.fixture(scope="session")
def expected(plan: Plan) -> dict[str, int]:
    return checkpoint.expected_digests(plan.model, plan)
