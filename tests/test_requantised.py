"""One scale for all that is fused: the expectation beside the engines' own function."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from fp8ctl import requantised
from fp8ctl.formats import Mode
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.digest import digest
from fp8ctl.kernels.groups import PER_TENSOR
from fp8ctl.planning import make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.manifest import Plan

LAYER = "model.layers.0"
QKV = [f"{LAYER}.self_attn.{p}_proj.weight" for p in "qkv"]
OUT, EXPERT = f"{LAYER}.self_attn.o_proj.weight", f"{LAYER}.mlp.experts.0"
W13 = [f"{EXPERT}.{p}_proj.weight" for p in ("gate", "up")]
W2, ROUTER = f"{EXPERT}.down_proj.weight", f"{LAYER}.mlp.gate.weight"
NAMES = [*QKV, OUT, *W13, W2, ROUTER]

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Parts of very different size, so that the smaller ones are rounded anew.

    o_proj has a scale that FP16 cannot hold well: that it passes through there is seen.
    """
    random = torch.Generator().manual_seed(4)
    sizes = [1.0, 0.01, 0.3, 1e-5, 2.0, 0.001, 0.5, 1.0]
    return {
        name: (torch.randn((64, 64), generator=random) * size).bfloat16()
        for name, size in zip(NAMES, sizes, strict=True)
    }


@pytest.fixture(scope="module")
def plan(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder: Path = tmp_path_factory.mktemp("model")
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    return make_plan(folder, "sglang", Mode.PER_TENSOR, 1)


def requantize_with_max_scale(
    parts: list[Pair], *, divide: bool
) -> tuple[list[torch.Tensor], float]:
    """What the engines do with the parts of a module: vLLM rounds by the inverse, a CPU divides."""
    weight = torch.cat([codes.view(torch.uint8) for codes, _ in parts]).view(torch.float8_e4m3fn)
    weight_scale = torch.cat([scale for _, scale in parts])
    largest = weight_scale.max()
    done = []
    start = 0
    for idx, (codes, _) in enumerate(parts):
        end = start + codes.shape[0]
        dq = weight[start:end, :].to(torch.float16) * weight_scale[idx]
        assert dq.dtype == torch.float16
        x = dq.float() / largest if divide else dq.float() * (1.0 / largest)
        done.append(x.clamp(-448, 448).to(torch.float8_e4m3fn))
        start = end
    return done, float(largest)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("fused", [QKV, [OUT], W13])
def test_what_is_fused_is_rounded_anew_under_the_largest_scale(
    fused: list[str], divide: bool, plan: Plan, state: dict[str, torch.Tensor]
) -> None:
    found = requantised.expected_digests(plan)
    parts = [kernels.quantize(state[name], PER_TENSOR) for name in fused]
    codes, largest = requantize_with_max_scale(parts, divide=divide)
    for name, one in zip(fused, codes, strict=True):
        assert found[name][0 if divide else 1] == digest(one)
        assert found[f"{name}_scale"] == [digest(torch.tensor([largest]))]
    if len(fused) > 1:
        own = [digest(codes) for codes, _ in parts]
        assert any(found[n][0] != o for n, o in zip(fused, own, strict=True)), "the control"


def test_the_last_matrix_of_an_expert_and_what_is_kept_stay(
    plan: Plan, state: dict[str, torch.Tensor]
) -> None:
    quality: dict[str, dict[str, float]] = {}
    found = requantised.expected_digests(plan, quality=quality)
    codes, scale = kernels.quantize(state[W2], PER_TENSOR)
    assert (found[W2], found[f"{W2}_scale"]) == ([digest(codes)], [digest(scale)])
    assert found[ROUTER] == [digest(state[ROUTER])]
    assert set(quality) == {*QKV, OUT, *W13, W2}


def test_what_is_fused_on_disk_has_one_scale_and_stays() -> None:
    codes, scale = kernels.quantize(torch.randn(8, 8), PER_TENSOR)
    name = f"{LAYER}.self_attn.qkv_proj.weight"
    [(several, shared)] = requantised.share({name: (codes, scale)}).values()
    assert several == [codes]
    assert torch.equal(shared, scale)
