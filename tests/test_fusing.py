"""What engines build as one is decided as one, or refused with what would mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fp8ctl.errors import PlanDoesNotFitError
from fp8ctl.formats import Mode
from fp8ctl.models import read_checkpoint
from fp8ctl.planning import plan_checkpoint, require_fit
from tests.public_models import Layout, dense, experts, save

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.families import Backend
    from fp8ctl.manifest import Plan
    from fp8ctl.models import Checkpoint

AT = "model.layers.0.self_attn"


def small(folder: Path, model_type: str = "llama", *, moe: bool = False) -> Checkpoint:
    plain = dense(model_type, 256, 512, 2, (2, 2, 128), 640)
    shapes = dict(plain.shapes)
    if moe:
        shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
        for i in range(2):
            shapes |= dict(experts(f"model.layers.{i}.mlp", 4, 256, 128))
    return read_checkpoint(save(folder / "model", Layout(plain.config, shapes)))


def plan(model: Checkpoint, backend: Backend | None, *keep: str) -> Plan:
    return plan_checkpoint(model, backend, Mode.BLOCK, keep=keep)


@pytest.mark.parametrize("backend", ["vllm", "sglang", None])
@pytest.mark.parametrize(
    ("rule", "hint"),
    [
        (f"{AT}.q_proj", f"--keep {AT}.k_proj --keep {AT}.v_proj"),
        ("*.mlp.up_proj", "--keep 'model.layers.*.mlp.gate_proj'"),
    ],
)
def test_a_part_of_a_fused_module_cannot_stay_alone(
    tmp_path: Path, backend: Backend | None, rule: str, hint: str
) -> None:
    model = small(tmp_path)
    found = plan(model, backend, rule)
    assert {problem.rule for problem in found.problems} == {"fused"}
    with pytest.raises(PlanDoesNotFitError) as caught:
        require_fit(found)
    assert caught.value.hint == hint
    more = [word.strip("'") for word in hint.split() if word != "--keep"]
    assert plan(model, backend, rule, *more).fits


def test_whole_modules_can_stay(tmp_path: Path) -> None:
    model = small(tmp_path)
    for rule in (AT, f"re:{AT}.[qkv]_proj", "*.o_proj", "model.layers.1"):
        assert plan(model, None, rule).fits


@pytest.mark.parametrize("backend", ["vllm", "sglang", None])
@pytest.mark.parametrize(
    "rule", ["model.layers.0.mlp.experts.3", "model.layers.1.mlp", "*.experts.*"]
)
def test_experts_cannot_stay(tmp_path: Path, backend: Backend | None, rule: str) -> None:
    found = plan(small(tmp_path, "qwen3_moe", moe=True), backend, rule)
    assert {problem.rule for problem in found.problems} == {"experts"}
    assert "do not reach a fused MoE" in found.problems[0].message
    with pytest.raises(PlanDoesNotFitError) as caught:
        require_fit(found)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("leave --keep ")


def test_experts_in_one_tensor_cannot_stay_either(tmp_path: Path) -> None:
    plain = dense("brand_new", 256, 512, 1, (2, 2, 128), 640)
    shapes = {**plain.shapes, "model.layers.0.mlp.experts.gate_up_proj": (4, 256, 512)}
    model = read_checkpoint(save(tmp_path / "stacked", Layout(plain.config, shapes)))
    assert {problem.rule for problem in plan(model, "vllm").problems} == {"experts"}


@pytest.mark.parametrize(
    ("model_type", "backend", "fits"),
    [
        ("gemma2", "vllm", False),
        ("gemma2", "sglang", False),
        ("qwen2_moe", "vllm", False),
        ("qwen2_moe", "sglang", True),
        ("gemma3_text", "vllm", True),
    ],
)
def test_a_linear_that_an_engine_builds_without_a_name_cannot_stay(
    tmp_path: Path, model_type: str, backend: Backend, fits: bool
) -> None:
    model = small(tmp_path, model_type)
    assert plan(model, backend).fits
    found = plan(model, backend, "model.layers.0.self_attn")
    assert found.fits is fits
    if not fits:
        assert [problem.rule for problem in found.problems] == ["ignored"]
        with pytest.raises(PlanDoesNotFitError, match="no names") as caught:
            require_fit(found)
        assert caught.value.hint == "leave --keep model.layers.0.self_attn out"


def test_only_sglang_fuses_what_latent_attention_projects_down(tmp_path: Path) -> None:
    shapes = {
        f"{AT}.q_a_proj.weight": (256, 512),
        f"{AT}.kv_a_proj_with_mqa.weight": (192, 512),
        f"{AT}.o_proj.weight": (512, 256),
    }
    config = {"model_type": "deepseek_v3", "num_attention_heads": 2}
    model = read_checkpoint(save(tmp_path / "mla", Layout(config, shapes)))
    rule = f"{AT}.q_a_proj"
    assert plan(model, "vllm", rule).fits
    for backend in ("sglang", None):
        assert [p.rule for p in plan(model, backend, rule).problems] == ["fused"]
