"""Decisions for real names of each family, written by hand; and the traps of substrings."""

from __future__ import annotations

import re

import pytest

from fp8ctl.policy import (
    FAMILIES,
    Backend,
    Decision,
    Family,
    Reason,
    decide,
    family_of,
    ignored_layers,
    kept_modules,
    known,
    should_quantize_param,
)

L = "model.layers.3."
MATRIX = (256, 128)

# name -> quantised or the reason to keep it.
DENSE: dict[str, Reason] = {
    "model.embed_tokens.weight": Reason.EMBEDDING,
    "model.norm.weight": Reason.NORM,
    "lm_head.weight": Reason.LM_HEAD,
    L + "self_attn.q_proj.weight": Reason.LINEAR,
    L + "self_attn.k_proj.weight": Reason.LINEAR,
    L + "self_attn.v_proj.weight": Reason.LINEAR,
    L + "self_attn.o_proj.weight": Reason.LINEAR,
    L + "self_attn.q_proj.bias": Reason.BIAS,
    L + "mlp.gate_proj.weight": Reason.LINEAR,
    L + "mlp.up_proj.weight": Reason.LINEAR,
    L + "mlp.down_proj.weight": Reason.LINEAR,
    L + "input_layernorm.weight": Reason.NORM,
    L + "post_attention_layernorm.weight": Reason.NORM,
    L + "self_attn.q_norm.weight": Reason.NORM,
    L + "self_attn.rotary_emb.inv_freq": Reason.SCALE,
}
EXPERTS = {
    L + "mlp.gate.weight": Reason.ROUTER,
    L + "mlp.experts.0.gate_proj.weight": Reason.EXPERT,
    L + "mlp.experts.127.up_proj.weight": Reason.EXPERT,
    L + "mlp.experts.127.down_proj.weight": Reason.EXPERT,
}
EXPECTED: dict[str, dict[str, Reason]] = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "qwen3_moe": {**DENSE, **EXPERTS},
    "qwen2_moe": {
        **DENSE,
        **EXPERTS,
        L + "mlp.shared_expert.gate_proj.weight": Reason.LINEAR,
        L + "mlp.shared_expert.down_proj.weight": Reason.LINEAR,
        L + "mlp.shared_expert_gate.weight": Reason.ROUTER,
    },
    "mixtral": {
        L + "self_attn.q_proj.weight": Reason.LINEAR,
        L + "block_sparse_moe.gate.weight": Reason.ROUTER,
        L + "block_sparse_moe.experts.7.w1.weight": Reason.EXPERT,
        L + "block_sparse_moe.experts.7.w2.weight": Reason.EXPERT,
        L + "block_sparse_moe.experts.7.w3.weight": Reason.EXPERT,
        "lm_head.weight": Reason.LM_HEAD,
    },
    "deepseek_v3": {
        **EXPERTS,
        L + "mlp.gate.e_score_correction_bias": Reason.ROUTER,
        L + "mlp.gate_proj.weight": Reason.LINEAR,
        L + "mlp.shared_experts.up_proj.weight": Reason.LINEAR,
        L + "self_attn.q_a_proj.weight": Reason.LINEAR,
        L + "self_attn.q_a_layernorm.weight": Reason.NORM,
        L + "self_attn.q_b_proj.weight": Reason.LINEAR,
        L + "self_attn.kv_a_proj_with_mqa.weight": Reason.LINEAR,
        L + "self_attn.kv_a_layernorm.weight": Reason.NORM,
        L + "self_attn.kv_b_proj.weight": Reason.LINEAR,
        L + "self_attn.o_proj.weight": Reason.LINEAR,
        "model.layers.61.eh_proj.weight": Reason.PREDICTION,
        "model.layers.61.enorm.weight": Reason.NORM,
        "model.layers.61.embed_tokens.weight": Reason.EMBEDDING,
        "model.layers.61.shared_head.head.weight": Reason.LM_HEAD,
        "model.layers.61.shared_head.norm.weight": Reason.NORM,
    },
    "deepseek_v2": {L + "self_attn.q_proj.weight": Reason.LINEAR},
    "kimi_k2": {L + "self_attn.q_b_proj.weight": Reason.LINEAR},
    "gemma": DENSE,
    "gemma2": {
        **DENSE,
        L + "pre_feedforward_layernorm.weight": Reason.NORM,
        L + "post_feedforward_layernorm.weight": Reason.NORM,
    },
    "gemma3_text": DENSE,
    "gemma3": {
        "language_model.model.layers.3.mlp.up_proj.weight": Reason.LINEAR,
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight": Reason.VISION,
        "multi_modal_projector.mm_input_projection_weight": Reason.VISION,
    },
    "glm": {L + "mlp.gate_up_proj.weight": Reason.LINEAR},
    "glm4": {
        L + "self_attn.q_proj.weight": Reason.LINEAR,
        L + "mlp.gate_up_proj.weight": Reason.LINEAR,
        L + "mlp.down_proj.weight": Reason.LINEAR,
        L + "post_self_attn_layernorm.weight": Reason.NORM,
    },
    "glm4_moe": {
        **DENSE,
        **EXPERTS,
        L + "mlp.shared_experts.gate_proj.weight": Reason.LINEAR,
        L + "mlp.gate.e_score_correction_bias": Reason.ROUTER,
    },
    "qwen3_next": {
        **DENSE,
        **EXPERTS,
        L + "linear_attn.in_proj_qkvz.weight": Reason.LINEAR,
        L + "linear_attn.out_proj.weight": Reason.LINEAR,
        L + "linear_attn.in_proj_ba.weight": Reason.STATE_SPACE,
        L + "linear_attn.A_log": Reason.STATE_SPACE,
        L + "linear_attn.dt_bias": Reason.STATE_SPACE,
        L + "linear_attn.norm.weight": Reason.NORM,
        L + "mlp.shared_expert_gate.weight": Reason.ROUTER,
        "mtp.layers.0.mlp.gate.weight": Reason.ROUTER,
        "mtp.layers.0.self_attn.q_proj.weight": Reason.LINEAR,
        "mtp.fc.weight": Reason.PREDICTION,
        "mtp.pre_fc_norm_hidden.weight": Reason.NORM,
    },
    "phi": {
        L + "self_attn.q_proj.weight": Reason.LINEAR,
        L + "self_attn.dense.weight": Reason.LINEAR,
        L + "self_attn.dense.bias": Reason.BIAS,
        L + "mlp.fc1.weight": Reason.LINEAR,
        L + "mlp.fc2.weight": Reason.LINEAR,
        "lm_head.bias": Reason.LM_HEAD,
    },
    "phi3": {
        L + "self_attn.qkv_proj.weight": Reason.LINEAR,
        L + "self_attn.o_proj.weight": Reason.LINEAR,
        L + "mlp.gate_up_proj.weight": Reason.LINEAR,
        L + "mlp.down_proj.weight": Reason.LINEAR,
    },
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_decisions_of_each_family(model_type: str) -> None:
    family = family_of({"model_type": model_type})
    assert known(family)
    for name, reason in EXPECTED[model_type].items():
        found = decide(family, name, MATRIX)
        assert (name, found.reason) == (name, reason)
        assert found.quantize == (reason in (Reason.LINEAR, Reason.EXPERT))
        assert (found.role is not None) == found.quantize


def test_every_family_is_expected_above() -> None:
    assert {kind for family in FAMILIES for kind in family.model_types} == set(EXPECTED)


@pytest.mark.parametrize("model_type", [*EXPECTED, "never-heard-of"])
@pytest.mark.parametrize(
    "router",
    [
        "mlp.gate",
        "mlp.router",
        "mlp.shared_expert_gate",
        "block_sparse_moe.gate",
        "mixer.gate",
        "moe.router",
        "feed_forward.router",
    ],
)
def test_a_router_is_kept_in_every_family(model_type: str, router: str) -> None:
    family = family_of({"model_type": model_type})
    assert decide(family, f"{L}{router}.weight", MATRIX) == Decision(False, Reason.ROUTER)


def test_a_router_s_name_inside_another_name_is_no_router() -> None:
    for name in ("mlp.gate_proj", "mlp.gate_up_proj", "mlp.shared_expert.gate_proj"):
        assert should_quantize_param(f"{L}{name}.weight", MATRIX)
    assert not should_quantize_param(f"{L}mlp.gate.weight", MATRIX)
    assert not should_quantize_param(f"{L}mlp.shared_expert_gate.weight", (1, 128))


def test_an_unknown_family_goes_by_names_and_says_so() -> None:
    family = family_of({"model_type": "never-heard-of"})
    assert not known(family)
    for model_type, names in EXPECTED.items():
        for name, reason in names.items():
            assert (model_type, name, decide(family, name, MATRIX).reason) == (
                model_type,
                name,
                reason,
            )
    assert decide(family, L + "mixer.magic.weight", MATRIX).reason is Reason.UNKNOWN
    assert decide(family, L + "linear_attn.conv1d.weight", (8, 1, 4)).reason is Reason.STATE_SPACE


def test_the_text_part_of_a_composite_model_counts_and_its_tower_stays() -> None:
    family = family_of({"model_type": "llava", "text_config": {"model_type": "llama"}})
    assert family.name == "Llama"
    text = "language_model.model.layers.0.self_attn.q_proj.weight"
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert decide(family, text, MATRIX).quantize
    assert decide(family, tower, MATRIX) == Decision(False, Reason.VISION)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((256,), "BF16", Reason.SHAPE),
        ((8, 256, 128), "BF16", Reason.SHAPE),
        (MATRIX, "I32", Reason.DTYPE),
        (MATRIX, "F8_E4M3", Reason.DTYPE),
        (MATRIX, "F16", Reason.LINEAR),
        (MATRIX, "F32", Reason.LINEAR),
    ],
)
def test_only_float_matrices_are_quantised(
    shape: tuple[int, ...], dtype: str, reason: Reason
) -> None:
    family = family_of({"model_type": "llama"})
    assert decide(family, L + "self_attn.q_proj.weight", shape, dtype).reason is reason


def test_ignored_layers_are_spelled_for_each_engine() -> None:
    kept = ("lm_head", "m.layers.0.mlp.gate_proj", "m.layers.0.mlp.up_proj", "m.layers.0.mlp.gate")
    assert ignored_layers(kept, "vllm") == tuple(sorted(kept))
    assert ignored_layers(kept, "sglang") == (
        "lm_head",
        "m.layers.0.mlp.gate",
        "m.layers.0.mlp.gate_up_proj",
    )
    both = set(ignored_layers(kept, "vllm")) | set(ignored_layers(kept, "sglang"))
    assert set(ignored_layers(kept, None)) == both


def family(model_type: str) -> Family:
    return family_of({"model_type": model_type})


@pytest.mark.parametrize(
    ("model_type", "backend", "kept", "spelled"),
    [
        # GLM's class asks for parts of what the checkpoint holds in one; Phi-3's does not.
        (
            "glm4",
            "vllm",
            "model.layers.0.mlp.gate_up_proj",
            {f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "gate_up")},
        ),
        ("glm4", "sglang", "model.layers.0.mlp.gate_up_proj", {"model.layers.0.mlp.gate_up_proj"}),
        # DeepSeek's class in vLLM has no packed_modules_mapping.
        (
            "deepseek_v3",
            "vllm",
            "model.layers.0.mlp.up_proj",
            {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"},
        ),
        ("llama", "vllm", "model.layers.0.mlp.up_proj", {"model.layers.0.mlp.up_proj"}),
        (
            "deepseek_v3",
            "sglang",
            "model.layers.0.self_attn.q_a_proj",
            {"model.layers.0.self_attn.fused_qkv_a_proj_with_mqa"},
        ),
        (
            "deepseek_v2",
            "sglang",
            "model.layers.0.self_attn.kv_a_proj_with_mqa",
            {
                "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa",
                "model.layers.0.self_attn.kv_a_proj_with_mqa",
            },
        ),
        # SGLang builds Mixtral's layers under a bare prefix.
        ("mixtral", "sglang", "model.layers.3.self_attn.o_proj", {"layers.3.self_attn.o_proj"}),
        ("mixtral", "vllm", "model.layers.3.self_attn.o_proj", {"model.layers.3.self_attn.o_proj"}),
        (
            "gemma3",
            "sglang",
            "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",
            {
                "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",
                "vision_tower.vision_model.encoder.layers.0.self_attn.proj",
            },
        ),
    ],
)
def test_names_that_an_engine_spells_in_its_own_way(
    model_type: str, backend: Backend, kept: str, spelled: set[str]
) -> None:
    assert set(ignored_layers([kept], backend, family(model_type))) == spelled


def test_the_head_is_named_even_where_it_is_tied() -> None:
    names = [L + "mlp.gate.weight", L + "mlp.up_proj.weight", "model.embed_tokens.weight"]
    decisions = [(name, decide(family("qwen3_moe"), name, MATRIX)) for name in names]
    kept = kept_modules((name, d.reason, MATRIX) for name, d in decisions if not d.quantize)
    assert kept == ("lm_head", L + "mlp.gate")


def test_what_transformers_would_convert_is_named_and_what_is_no_matrix_is_not() -> None:
    shapes = {"in_proj_ba": (64, 128), "conv1d": (8, 1, 4), "norm": (128,)}
    names = [(f"{L}linear_attn.{name}.weight", shape) for name, shape in shapes.items()]
    kept = kept_modules(
        (name, decide(family("qwen3_next"), name, shape).reason, shape) for name, shape in names
    )
    assert kept == ("lm_head", L + "linear_attn.in_proj_ba")


def test_experts_in_one_tensor_are_kept_for_a_reason_of_their_own() -> None:
    for name in ("mlp.experts.gate_up_proj", "feed_forward.experts.down_proj"):
        found = decide(family("never-heard-of"), L + name, (4, 256, 128))
        assert found == Decision(False, Reason.STACKED)


def test_what_decides_is_neither_a_number_in_the_name_nor_a_side_of_the_shape() -> None:
    # Planning decides one of all names that differ in their numbers only.
    for model_type, names in EXPECTED.items():
        for name in names:
            other = re.sub(r"(?<=\.)\d+(?=\.)", "77", name)
            assert decide(family(model_type), name, MATRIX) == decide(
                family(model_type), other, (7, 9)
            )
