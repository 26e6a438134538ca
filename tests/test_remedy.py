"""The smallest change that fits: nearest first, and it fits when it is typed."""

from __future__ import annotations

import argparse
import shlex
from functools import cache
from typing import TYPE_CHECKING

import pytest

from fp8ctl.formats import BlockSize, Mode
from fp8ctl.models import read_checkpoint
from fp8ctl.planning import plan_checkpoint
from fp8ctl.remedy import smallest_change
from tests.public_models import LAYOUTS, Layout, dense, save

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.families import Backend
    from fp8ctl.manifest import Plan
    from fp8ctl.models import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model(name: str, folder: Path) -> Checkpoint:
    made = folder / name
    return read_checkpoint(made if made.is_dir() else save(made, layout(name)))


@cache
def layout(name: str) -> Layout:
    return LAYOUTS[name]()


def typed(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """Plan again, with the options of the hint put over those before them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default=plan.mode.value)
    parser.add_argument("--tp", type=int, default=plan.tp)
    parser.add_argument("--block-size")
    parser.add_argument("--keep", action="append", default=list(plan.keep))
    parser.add_argument("--backend", default=plan.backend)
    words = parser.parse_args(shlex.split(smallest_change(plan)))
    mode = Mode(words.mode)
    block = BlockSize.parse(words.block_size) if words.block_size else plan.block
    return plan_checkpoint(
        checkpoint,
        words.backend,
        mode,
        words.tp,
        block if mode is Mode.BLOCK else None,
        keep=words.keep,
    )


@pytest.mark.parametrize(
    ("name", "backend", "tp", "block", "hint"),
    [
        # Another block.
        ("SmolLM2-135M", "sglang", 1, 128, "--block-size 64,64"),
        ("Llama-3.1-8B", "vllm", 1, 64, "--block-size 128,128"),
        ("Qwen2.5-7B", "sglang", 4, 256, "--block-size 128,128"),
        # One layer of 10944 left in 16 bits, where vLLM's kernel would take smaller blocks.
        ("DeepSeek-V2-Lite", "vllm", 1, None, "--keep model.layers.0.mlp"),
        ("DeepSeek-V2-Lite", "sglang", 1, 128, "--block-size 64,64"),
        # 768 / 4 = 192: fewer GPUs, since no smaller block is for vLLM on this GPU.
        ("Qwen3-30B-A3B", "vllm", 4, None, "--block-size 128,128 --tp 2"),
        # 9 heads on no 2 GPUs.
        ("SmolLM2-135M", "sglang", 2, None, "--block-size 64,64 --tp 1"),
        # Parts in one tensor: a scale for each.
        ("Phi-3-mini", "sglang", 1, None, "--mode per-tensor"),
        ("GLM-4-9B", "vllm", 2, None, "--mode per-tensor"),
        ("Qwen2.5-7B", "vllm", 8, None, "--block-size 128,128 --tp 4"),
    ],
)
def test_the_nearest_change(
    name: str, backend: Backend, tp: int, block: int | None, hint: str, folder: Path
) -> None:
    checkpoint = model(name, folder)
    size = None if block is None else BlockSize(block, block)
    plan = plan_checkpoint(checkpoint, backend, Mode.BLOCK, tp, size)
    assert not plan.fits
    assert smallest_change(plan) == hint
    assert typed(plan, checkpoint).fits


@pytest.mark.parametrize("mode", list(Mode)[:2])
@pytest.mark.parametrize(
    "name", ["SmolLM2-135M", "Gemma-3-4B", "Phi-4", "GLM-4-9B", "Mixtral-8x7B"]
)
def test_every_change_fits_when_it_is_typed(name: str, mode: Mode, folder: Path) -> None:
    checkpoint = model(name, folder)
    seen = 0
    for backend in ("vllm", "sglang", None):
        for tp in (1, 2, 3, 8, 16, 32):
            plan = plan_checkpoint(checkpoint, backend, mode, tp)
            if not plan.fits:
                seen += 1
                assert typed(plan, checkpoint).fits, (backend, tp, smallest_change(plan))
    assert seen


def test_a_rule_of_the_users_stays_in_force(folder: Path) -> None:
    checkpoint = model("SmolLM2-135M", folder)
    keep = ["model.layers.0"]
    plan = plan_checkpoint(checkpoint, "sglang", Mode.BLOCK, 1, BlockSize(128, 128), keep=keep)
    again = typed(plan, checkpoint)
    assert again.fits
    assert again.keep == tuple(keep)


def test_rules_in_the_hint_are_few_for_many_layers(tmp_path: Path) -> None:
    # down_proj's 448 columns break 128 in every layer, and nothing else does.
    plain = dense("llama", 4096, 512, 8, (32, 32, 128), 640)
    shapes = dict(plain.shapes)
    for i in range(8):
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (4096, 448)
    checkpoint = read_checkpoint(save(tmp_path / "odd", Layout(plain.config, shapes)))
    plan = plan_checkpoint(checkpoint, "vllm", Mode.BLOCK, 1)
    assert smallest_change(plan) == "--keep 'model.layers.*.mlp.down_proj'"
    assert typed(plan, checkpoint).fits


def test_what_is_built_as_one_stays_as_one(tmp_path: Path) -> None:
    # One key-value head of 64 rows breaks 128; q has rows enough, and stays with k and v.
    checkpoint = read_checkpoint(
        save(tmp_path / "narrow", dense("llama", 4096, 14336, 4, (32, 1, 64), 640))
    )
    plan = plan_checkpoint(checkpoint, "vllm", Mode.BLOCK)
    rules = [f"--keep 'model.layers.*.self_attn.{part}_proj'" for part in "kqv"]
    assert smallest_change(plan) == " ".join(rules)
    assert typed(plan, checkpoint).fits
