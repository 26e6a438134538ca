"""Public models from config.json and headers: what becomes of every tensor, written by hand.

The parameter counts are those that the models' makers publish: they prove the layouts.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import pytest

from fp8ctl.errors import UnsupportedError
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.models import read_checkpoint
from fp8ctl.planning import plan_checkpoint
from fp8ctl.policy import FAMILIES, Reason, should_quantize_param
from tests.public_models import LAYOUTS, Layout, save

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.models import Checkpoint


@dataclass(frozen=True)
class Expected:
    """What must come out.

    Attributes:
        parameters: as published.
        blocks: chosen for SGLang and for vLLM on an H100, tp 1; None: no block fits.
        quantized, kept: pattern -> count; braces stand for one of several names, `*` for numbers.
    """

    parameters: int
    blocks: tuple[int | None, int | None]
    quantized: dict[str, int]
    kept: dict[str, tuple[int, Reason]]


L = "model.layers.*"
EMBEDDING, NORM, HEAD = Reason.EMBEDDING, Reason.NORM, Reason.LM_HEAD
ROUTER, BIAS, STATE = Reason.ROUTER, Reason.BIAS, Reason.STATE_SPACE


def ends(*, head: bool = True) -> dict[str, tuple[int, Reason]]:
    kept = {"model.embed_tokens.weight": (1, EMBEDDING), "model.norm.weight": (1, NORM)}
    return {**kept, "lm_head.weight": (1, HEAD)} if head else kept


def norms(layers: int, *, heads: int = 0) -> dict[str, tuple[int, Reason]]:
    kept = {f"{L}.{{input,post_attention}}_layernorm.weight": (layers, NORM)}
    return {**kept, f"{L}.self_attn.{{q,k}}_norm.weight": (heads, NORM)} if heads else kept


def four_norms(layers: int, at: str = L) -> dict[str, tuple[int, Reason]]:
    names = "input,post_attention,pre_feedforward,post_feedforward"
    return {f"{at}.{{{names}}}_layernorm.weight": (layers, NORM)}


def qkv_bias(layers: int) -> dict[str, tuple[int, Reason]]:
    return {f"{L}.self_attn.{{q,k,v}}_proj.bias": (layers, BIAS)}


def dense(layers: int) -> dict[str, int]:
    return {
        f"{L}.self_attn.{{q,k,v,o}}_proj.weight": layers,
        f"{L}.mlp.{{gate,up,down}}_proj.weight": layers,
    }


def latent(layers: int) -> dict[str, int]:
    return {
        f"{L}.self_attn.{{q_a,q_b}}_proj.weight": layers,
        f"{L}.self_attn.kv_a_proj_with_mqa.weight": layers,
        f"{L}.self_attn.{{kv_b,o}}_proj.weight": layers,
    }


def ahead() -> dict[str, tuple[int, Reason]]:
    return {
        f"{L}.embed_tokens.weight": (1, EMBEDDING),
        f"{L}.{{enorm,hnorm}}.weight": (1, NORM),
        f"{L}.eh_proj.weight": (1, Reason.PREDICTION),
        f"{L}.shared_head.norm.weight": (1, NORM),
        f"{L}.shared_head.head.weight": (1, HEAD),
    }


TOWER = "vision_tower.vision_model"
VISION = Reason.VISION

EXPECTED: dict[str, Expected] = {
    # 576 and 192 divide by 64, not by 128.
    "SmolLM2-135M": Expected(134_515_008, (64, 64), dense(30), {**ends(head=False), **norms(30)}),
    "Llama-3.1-8B": Expected(8_030_261_248, (128, 128), dense(32), {**ends(), **norms(32)}),
    "Mistral-7B-v0.3": Expected(7_248_023_552, (128, 128), dense(32), {**ends(), **norms(32)}),
    "Qwen2.5-7B": Expected(
        7_615_616_512, (128, 128), dense(28), {**ends(), **norms(28), **qkv_bias(28)}
    ),
    "Qwen3-8B": Expected(8_190_735_360, (128, 128), dense(36), {**ends(), **norms(36, heads=36)}),
    "Gemma-2-9B": Expected(
        9_241_705_984, (128, 128), dense(42), {**ends(head=False), **four_norms(42)}
    ),
    "Gemma-3-4B": Expected(
        4_300_079_472,
        (128, 128),
        {
            "language_model.model.layers.*.self_attn.{q,k,v,o}_proj.weight": 34,
            "language_model.model.layers.*.mlp.{gate,up,down}_proj.weight": 34,
        },
        {
            "language_model.model.embed_tokens.weight": (1, EMBEDDING),
            "language_model.model.norm.weight": (1, NORM),
            "language_model.model.layers.*.self_attn.{q,k}_norm.weight": (34, NORM),
            **four_norms(34, "language_model.model.layers.*"),
            "multi_modal_projector.mm_input_projection_weight": (1, VISION),
            "multi_modal_projector.mm_soft_emb_norm.weight": (1, VISION),
            f"{TOWER}.embeddings.patch_embedding.{{weight,bias}}": (1, VISION),
            f"{TOWER}.embeddings.position_embedding.weight": (1, VISION),
            f"{TOWER}.encoder.layers.*.self_attn.{{q,k,v,out}}_proj.weight": (27, VISION),
            f"{TOWER}.encoder.layers.*.self_attn.{{q,k,v,out}}_proj.bias": (27, VISION),
            f"{TOWER}.encoder.layers.*.mlp.{{fc1,fc2}}.weight": (27, VISION),
            f"{TOWER}.encoder.layers.*.mlp.{{fc1,fc2}}.bias": (27, VISION),
            f"{TOWER}.encoder.layers.*.layer_norm1.{{weight,bias}}": (27, VISION),
            f"{TOWER}.encoder.layers.*.layer_norm2.{{weight,bias}}": (27, VISION),
            f"{TOWER}.post_layernorm.{{weight,bias}}": (1, VISION),
        },
    ),
    "Phi-2": Expected(
        2_779_683_840,
        (128, 128),
        {
            f"{L}.self_attn.{{q_proj,k_proj,v_proj,dense}}.weight": 32,
            f"{L}.mlp.{{fc1,fc2}}.weight": 32,
        },
        {
            "model.embed_tokens.weight": (1, EMBEDDING),
            "model.final_layernorm.{weight,bias}": (1, NORM),
            "lm_head.{weight,bias}": (1, HEAD),
            f"{L}.input_layernorm.{{weight,bias}}": (32, NORM),
            f"{L}.self_attn.{{q_proj,k_proj,v_proj,dense}}.bias": (32, BIAS),
            f"{L}.mlp.{{fc1,fc2}}.bias": (32, BIAS),
        },
    ),
    # One tensor for q, k and v: no engine loads its block scales.
    "Phi-3-mini": Expected(
        3_821_079_552,
        (None, None),
        {
            f"{L}.self_attn.{{qkv,o}}_proj.weight": 32,
            f"{L}.mlp.{{gate_up,down}}_proj.weight": 32,
        },
        {**ends(), **norms(32)},
    ),
    "Phi-4": Expected(
        14_659_507_200,
        (None, None),
        {
            f"{L}.self_attn.{{qkv,o}}_proj.weight": 40,
            f"{L}.mlp.{{gate_up,down}}_proj.weight": 40,
        },
        {**ends(), **norms(40)},
    ),
    "GLM-4-9B": Expected(
        9_400_279_040,
        (None, None),
        {
            f"{L}.self_attn.{{q,k,v,o}}_proj.weight": 40,
            f"{L}.mlp.{{gate_up,down}}_proj.weight": 40,
        },
        {
            **ends(),
            **norms(40),
            **qkv_bias(40),
            f"{L}.{{post_self_attn,post_mlp}}_layernorm.weight": (40, NORM),
        },
    ),
    "Qwen2-57B-A14B": Expected(
        57_408_658_944,
        (128, 128),
        {
            f"{L}.self_attn.{{q,k,v,o}}_proj.weight": 28,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 28 * 64,
            f"{L}.mlp.shared_expert.{{gate,up,down}}_proj.weight": 28,
        },
        {
            **ends(),
            **norms(28),
            **qkv_bias(28),
            f"{L}.mlp.{{gate,shared_expert_gate}}.weight": (28, ROUTER),
        },
    ),
    "Qwen3-30B-A3B": Expected(
        30_532_122_624,
        (128, 128),
        {
            f"{L}.self_attn.{{q,k,v,o}}_proj.weight": 48,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 48 * 128,
        },
        {**ends(), **norms(48, heads=48), f"{L}.mlp.gate.weight": (48, ROUTER)},
    ),
    "Qwen3-235B-A22B": Expected(
        235_093_634_560,
        (128, 128),
        {
            f"{L}.self_attn.{{q,k,v,o}}_proj.weight": 94,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 94 * 128,
        },
        {**ends(), **norms(94, heads=94), f"{L}.mlp.gate.weight": (94, ROUTER)},
    ),
    # 12 of 48 layers attend to all, and the one that predicts ahead.
    "Qwen3-Next-80B-A3B": Expected(
        81_324_862_720,
        (128, 128),
        {
            f"{L}.self_attn.{{q,k,v,o}}_proj.weight": 12,
            f"{L}.linear_attn.{{in_proj_qkvz,out_proj}}.weight": 36,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 48 * 512,
            f"{L}.mlp.shared_expert.{{gate,up,down}}_proj.weight": 48,
            "mtp.layers.*.self_attn.{q,k,v,o}_proj.weight": 1,
            "mtp.layers.*.mlp.experts.*.{gate,up,down}_proj.weight": 512,
            "mtp.layers.*.mlp.shared_expert.{gate,up,down}_proj.weight": 1,
        },
        {
            **ends(),
            **norms(48, heads=12),
            f"{L}.linear_attn.{{in_proj_ba,conv1d}}.weight": (36, STATE),
            f"{L}.linear_attn.{{A_log,dt_bias}}": (36, STATE),
            f"{L}.linear_attn.norm.weight": (36, NORM),
            f"{L}.mlp.{{gate,shared_expert_gate}}.weight": (48, ROUTER),
            "mtp.layers.*.{input,post_attention}_layernorm.weight": (1, NORM),
            "mtp.layers.*.self_attn.{q,k}_norm.weight": (1, NORM),
            "mtp.layers.*.mlp.{gate,shared_expert_gate}.weight": (1, ROUTER),
            "mtp.fc.weight": (1, Reason.PREDICTION),
            "mtp.{norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight": (1, NORM),
        },
    ),
    "Mixtral-8x7B": Expected(
        46_702_792_704,
        (128, 128),
        {
            f"{L}.self_attn.{{q,k,v,o}}_proj.weight": 32,
            f"{L}.block_sparse_moe.experts.*.{{w1,w2,w3}}.weight": 32 * 8,
        },
        {**ends(), **norms(32), f"{L}.block_sparse_moe.gate.weight": (32, ROUTER)},
    ),
    # 10944 = 171 * 64; vLLM's kernel for 128 would take other layers in blocks of 64.
    "DeepSeek-V2-Lite": Expected(
        15_706_484_224,
        (64, None),
        {
            f"{L}.self_attn.{{q,kv_b,o}}_proj.weight": 27,
            f"{L}.self_attn.kv_a_proj_with_mqa.weight": 27,
            f"{L}.mlp.{{gate,up,down}}_proj.weight": 1,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 26 * 64,
            f"{L}.mlp.shared_experts.{{gate,up,down}}_proj.weight": 26,
        },
        {
            **ends(),
            **norms(27),
            f"{L}.self_attn.kv_a_layernorm.weight": (27, NORM),
            f"{L}.mlp.gate.weight": (26, ROUTER),
        },
    ),
    "DeepSeek-V3": Expected(
        684_489_845_504,
        (128, 128),
        {
            **latent(62),
            f"{L}.mlp.{{gate,up,down}}_proj.weight": 3,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 59 * 256,
            f"{L}.mlp.shared_experts.{{gate,up,down}}_proj.weight": 59,
        },
        {
            **ends(),
            **norms(62),
            f"{L}.self_attn.{{q_a,kv_a}}_layernorm.weight": (62, NORM),
            f"{L}.mlp.gate.{{weight,e_score_correction_bias}}": (59, ROUTER),
            **ahead(),
        },
    ),
    "GLM-4.5-Air": Expected(
        110_468_824_832,
        (64, None),
        {
            f"{L}.self_attn.{{q,k,v,o}}_proj.weight": 47,
            f"{L}.mlp.{{gate,up,down}}_proj.weight": 1,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 46 * 128,
            f"{L}.mlp.shared_experts.{{gate,up,down}}_proj.weight": 46,
        },
        {
            **ends(),
            **norms(47),
            **qkv_bias(47),
            f"{L}.mlp.gate.{{weight,e_score_correction_bias}}": (46, ROUTER),
            **ahead(),
        },
    ),
    "Kimi-K2": Expected(
        1_026_408_232_448,
        (128, 128),
        {
            **latent(61),
            f"{L}.mlp.{{gate,up,down}}_proj.weight": 1,
            f"{L}.mlp.experts.*.{{gate,up,down}}_proj.weight": 60 * 384,
            f"{L}.mlp.shared_experts.{{gate,up,down}}_proj.weight": 60,
        },
        {
            **ends(),
            **norms(61),
            f"{L}.self_attn.{{q_a,kv_a}}_layernorm.weight": (61, NORM),
            f"{L}.mlp.gate.{{weight,e_score_correction_bias}}": (60, ROUTER),
        },
    ),
}

LARGE = ("Qwen3-235B-A22B", "Qwen3-Next-80B-A3B", "DeepSeek-V3", "GLM-4.5-Air", "Kimi-K2")
SMALL = [name for name in EXPECTED if name not in LARGE]
EACH = [*SMALL, *(pytest.param(name, marks=pytest.mark.long) for name in LARGE)]


@cache
def layout(name: str) -> Layout:
    return LAYOUTS[name]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def read(name: str, folder: Path) -> Checkpoint:
    return read_checkpoint(save(folder / name, layout(name)))


def spread(pattern: str) -> list[str]:
    """Write out what stands in braces."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return [pattern]
    return [
        one
        for part in match[1].split(",")
        for one in spread(pattern[: match.start()] + part + pattern[match.end() :])
    ]


def starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@pytest.mark.parametrize("name", EACH)
def test_every_tensor_is_decided_as_expected(name: str, folder: Path) -> None:
    expected = EXPECTED[name]
    assert layout(name).parameters == expected.parameters
    plan = plan_checkpoint(read(name, folder), "sglang", Mode.BLOCK)
    found = Counter((starred(t.name), t.reason, t.quantize) for t in plan.tensors)
    wanted: Counter[tuple[str, Reason, bool]] = Counter()
    for pattern, number in expected.quantized.items():
        for one in spread(pattern):
            wanted[one, Reason.EXPERT if ".experts." in one else Reason.LINEAR, True] = number
    for pattern, (number, reason) in expected.kept.items():
        for one in spread(pattern):
            wanted[one, reason, False] = number
    assert found == wanted


@pytest.mark.parametrize("name", EACH)
def test_the_block_of_each_model_and_engine(name: str, folder: Path) -> None:
    checkpoint = read(name, folder)
    chosen = []
    for backend in ("sglang", "vllm"):
        plan = plan_checkpoint(checkpoint, backend, Mode.BLOCK)
        chosen.append(plan.block.n if plan.block is not None and plan.fits else None)
        assert plan_checkpoint(checkpoint, backend, Mode.PER_TENSOR).fits
    assert tuple(chosen) == EXPECTED[name].blocks


@pytest.mark.parametrize("name", EACH)
def test_no_router_and_no_gate_of_shared_experts_becomes_fp8(name: str, folder: Path) -> None:
    checkpoint = read(name, folder)
    routers = [n for n in checkpoint.tensors if re.search(r"\.(gate|shared_expert_gate)\.", n)]
    # Without a configuration a trainer is told the same.
    assert not any(should_quantize_param(n, checkpoint.tensors[n].shape) for n in routers)
    plan = plan_checkpoint(checkpoint, "vllm", Mode.PER_TENSOR)
    assert {t.reason for t in plan.tensors if t.name in set(routers)} <= {ROUTER}
    assert bool(routers) is any(".experts." in n for n in checkpoint.tensors)


def test_what_is_published_in_fp8_is_refused_as_it_is(tmp_path: Path) -> None:
    # DeepSeek-V3 and Kimi-K2 are: layouts above are those of their 16-bit copies.
    config = {**layout("DeepSeek-V2-Lite").config, "quantization_config": {"quant_method": "fp8"}}
    shapes = {"model.layers.0.self_attn.o_proj.weight": (256, 256)}
    made = save(tmp_path / "fp8", Layout(config, shapes), dtype="F8_E4M3")
    with pytest.raises(UnsupportedError, match="quantised already"):
        plan_checkpoint(read_checkpoint(made), "vllm", Mode.BLOCK)


def test_a_forced_block_is_the_one_of_the_plan(folder: Path) -> None:
    checkpoint = read("Llama-3.1-8B", folder)
    plan = plan_checkpoint(checkpoint, "sglang", Mode.BLOCK, 1, BlockSize(64, 128))
    assert plan.fits
    down = next(t for t in plan.tensors if t.name.endswith("down_proj.weight"))
    assert plan.scale_shape(down) == (64, 112)


def test_there_is_a_model_of_every_family_that_is_not_another_s_twin() -> None:
    kinds = {layout(name).config["model_type"] for name in EXPECTED}
    untold = {f.name for f in FAMILIES if not kinds.intersection(f.model_types)}
    assert untold == {"Gemma", "GLM"}  # the layouts of Llama and of GLM-4
