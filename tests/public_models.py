"""Layouts of public models: config.json and tensor shapes, from their published facts.

Headers only: `save` writes safetensors files whose weights are a hole, so that a
model of 1 TB takes some MB of disk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

_BYTES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Layout:
    """A model without its weights."""

    config: Mapping[str, Any]
    shapes: Mapping[str, Shape]

    @property
    def parameters(self) -> int:
        total = 0
        for shape in self.shapes.values():
            count = 1
            for side in shape:
                count *= side
            total += count
        return total


def save(folder: Path, layout: Layout, dtype: str = "BF16", shards: int = 1) -> Path:
    """Write config.json, and `shards` weight files with an index where there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(layout.config))
    names = list(layout.shapes)
    files = {}
    for shard in range(shards):
        mine = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = (
            "model.safetensors"
            if shards == 1
            else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        )
        header, end = {}, 0
        for name in mine:
            shape = layout.shapes[name]
            start, count = end, _BYTES[dtype]
            for side in shape:
                count *= side
            end = start + count
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            files[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    if shards > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# --- pieces ---------------------------------------------------------------------------------------


def mlp(at: str, hidden: int, inner: int) -> Named:
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


def attention(
    at: str, hidden: int, heads: int, kv: int, size: int, *, bias: bool = False, norms: bool = False
) -> Named:
    for part, rows in (("q", heads * size), ("k", kv * size), ("v", kv * size)):
        yield f"{at}.{part}_proj.weight", (rows, hidden)
        if bias:
            yield f"{at}.{part}_proj.bias", (rows,)
    yield f"{at}.o_proj.weight", (hidden, heads * size)
    if norms:
        yield f"{at}.q_norm.weight", (size,)
        yield f"{at}.k_norm.weight", (size,)


def two_norms(at: str, hidden: int) -> Named:
    yield f"{at}.input_layernorm.weight", (hidden,)
    yield f"{at}.post_attention_layernorm.weight", (hidden,)


def experts(at: str, count: int, hidden: int, inner: int) -> Named:
    yield f"{at}.gate.weight", (count, hidden)
    for i in range(count):
        yield from mlp(f"{at}.experts.{i}", hidden, inner)


def ends(vocabulary: int, hidden: int, *, head: bool = True, prefix: str = "model") -> Named:
    yield f"{prefix}.embed_tokens.weight", (vocabulary, hidden)
    yield f"{prefix}.norm.weight", (hidden,)
    if head:
        yield "lm_head.weight", (vocabulary, hidden)


def settings(
    model_type: str, hidden: int, layers: int, heads: int, kv: int, size: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        **more,
    }


# --- dense ----------------------------------------------------------------------------------------


def dense(
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int, int],
    vocabulary: int,
    *,
    head: bool = True,
    bias: bool = False,
    norms: bool = False,
) -> Layout:
    def each() -> Named:
        yield from ends(vocabulary, hidden, head=head)
        for i in range(layers):
            at = f"model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, *heads, bias=bias, norms=norms)
            yield from mlp(f"{at}.mlp", hidden, inner)
            yield from two_norms(at, hidden)

    return Layout(settings(model_type, hidden, layers, *heads), dict(each()))


def gemma2_9b() -> Layout:
    hidden, layers, heads = 3584, 42, (16, 8, 256)

    def each() -> Named:
        yield from ends(256000, hidden, head=False)
        for i in range(layers):
            at = f"model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, *heads)
            yield from mlp(f"{at}.mlp", hidden, 14336)
            yield from two_norms(at, hidden)
            yield f"{at}.pre_feedforward_layernorm.weight", (hidden,)
            yield f"{at}.post_feedforward_layernorm.weight", (hidden,)

    return Layout(settings("gemma2", hidden, layers, *heads), dict(each()))


def gemma3_4b() -> Layout:
    """With its vision tower; its config.json leaves the heads to the class's defaults."""
    hidden, vision, layers = 2560, 1152, 34

    def each() -> Named:
        yield from ends(262208, hidden, head=False, prefix="language_model.model")
        for i in range(layers):
            at = f"language_model.model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, 8, 4, 256, norms=True)
            yield from mlp(f"{at}.mlp", hidden, 10240)
            yield from two_norms(at, hidden)
            yield f"{at}.pre_feedforward_layernorm.weight", (hidden,)
            yield f"{at}.post_feedforward_layernorm.weight", (hidden,)
        yield "multi_modal_projector.mm_input_projection_weight", (vision, hidden)
        yield "multi_modal_projector.mm_soft_emb_norm.weight", (vision,)
        tower = "vision_tower.vision_model"
        yield f"{tower}.embeddings.patch_embedding.weight", (vision, 3, 14, 14)
        yield f"{tower}.embeddings.patch_embedding.bias", (vision,)
        yield f"{tower}.embeddings.position_embedding.weight", (4096, vision)
        for i in range(27):
            at = f"{tower}.encoder.layers.{i}"
            sides = {"fc1": (4304, vision), "fc2": (vision, 4304)}
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield f"{at}.self_attn.{name}.weight", (vision, vision)
                yield f"{at}.self_attn.{name}.bias", (vision,)
            for name, shape in sides.items():
                yield f"{at}.mlp.{name}.weight", shape
                yield f"{at}.mlp.{name}.bias", shape[:1]
            for name in ("layer_norm1", "layer_norm2"):
                yield f"{at}.{name}.weight", (vision,)
                yield f"{at}.{name}.bias", (vision,)
        yield f"{tower}.post_layernorm.weight", (vision,)
        yield f"{tower}.post_layernorm.bias", (vision,)

    text = {"model_type": "gemma3_text", "hidden_size": hidden, "num_hidden_layers": layers}
    config = {"model_type": "gemma3", "text_config": text}
    return Layout(config, dict(each()))


def phi3(hidden: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int) -> Layout:
    query, kv = heads
    size = hidden // query

    def each() -> Named:
        yield from ends(vocabulary, hidden)
        for i in range(layers):
            at = f"model.layers.{i}"
            yield f"{at}.self_attn.qkv_proj.weight", ((query + 2 * kv) * size, hidden)
            yield f"{at}.self_attn.o_proj.weight", (hidden, query * size)
            yield f"{at}.mlp.gate_up_proj.weight", (2 * inner, hidden)
            yield f"{at}.mlp.down_proj.weight", (hidden, inner)
            yield from two_norms(at, hidden)

    config = settings("phi3", hidden, layers, query, kv, size)
    del config["head_dim"]
    return Layout(config, dict(each()))


def phi2() -> Layout:
    hidden = 2560

    def linear(name: str, rows: int, columns: int) -> Named:
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)

    def each() -> Named:
        yield "model.embed_tokens.weight", (51200, hidden)
        for i in range(32):
            at = f"model.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "dense"):
                yield from linear(f"{at}.self_attn.{part}", hidden, hidden)
            yield from linear(f"{at}.mlp.fc1", 10240, hidden)
            yield from linear(f"{at}.mlp.fc2", hidden, 10240)
            yield f"{at}.input_layernorm.weight", (hidden,)
            yield f"{at}.input_layernorm.bias", (hidden,)
        yield "model.final_layernorm.weight", (hidden,)
        yield "model.final_layernorm.bias", (hidden,)
        yield from linear("lm_head", 51200, hidden)

    return Layout(settings("phi", hidden, 32, 32, 32, 80), dict(each()))


def glm4_9b() -> Layout:
    hidden, layers, heads = 4096, 40, (32, 2, 128)

    def each() -> Named:
        yield from ends(151552, hidden)
        for i in range(layers):
            at = f"model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, *heads, bias=True)
            yield f"{at}.mlp.gate_up_proj.weight", (2 * 13696, hidden)
            yield f"{at}.mlp.down_proj.weight", (hidden, 13696)
            yield from two_norms(at, hidden)
            yield f"{at}.post_self_attn_layernorm.weight", (hidden,)
            yield f"{at}.post_mlp_layernorm.weight", (hidden,)

    return Layout(settings("glm4", hidden, layers, *heads), dict(each()))


# --- mixtures of experts --------------------------------------------------------------------------


def qwen3_moe(hidden: int, inner: int, layers: int, heads: tuple[int, int, int]) -> Layout:
    def each() -> Named:
        yield from ends(151936, hidden)
        for i in range(layers):
            at = f"model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, *heads, norms=True)
            yield from experts(f"{at}.mlp", 128, hidden, inner)
            yield from two_norms(at, hidden)

    return Layout(settings("qwen3_moe", hidden, layers, *heads), dict(each()))


def qwen2_57b() -> Layout:
    hidden, layers, heads = 3584, 28, (28, 4, 128)

    def each() -> Named:
        yield from ends(151936, hidden)
        for i in range(layers):
            at = f"model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, *heads, bias=True)
            yield from experts(f"{at}.mlp", 64, hidden, 2560)
            yield from mlp(f"{at}.mlp.shared_expert", hidden, 20480)
            yield f"{at}.mlp.shared_expert_gate.weight", (1, hidden)
            yield from two_norms(at, hidden)

    return Layout(settings("qwen2_moe", hidden, layers, *heads), dict(each()))


def qwen3_next_80b() -> Layout:
    """Three layers of linear attention, then one of full; and a layer that predicts ahead."""
    hidden, heads = 2048, (16, 2, 256)

    def layer(at: str, full: bool) -> Named:
        if full:
            # q_proj holds query and gate.
            yield f"{at}.self_attn.q_proj.weight", (2 * 16 * 256, hidden)
            rest = attention(f"{at}.self_attn", hidden, *heads, norms=True)
            yield from ((name, shape) for name, shape in rest if ".q_proj." not in name)
        else:
            key, value = 16 * 128, 32 * 128
            linear = f"{at}.linear_attn"
            yield f"{linear}.in_proj_qkvz.weight", (2 * key + 2 * value, hidden)
            yield f"{linear}.in_proj_ba.weight", (2 * 32, hidden)
            yield f"{linear}.conv1d.weight", (2 * key + value, 1, 4)
            yield f"{linear}.A_log", (32,)
            yield f"{linear}.dt_bias", (32,)
            yield f"{linear}.norm.weight", (128,)
            yield f"{linear}.out_proj.weight", (hidden, value)
        yield from experts(f"{at}.mlp", 512, hidden, 512)
        yield from mlp(f"{at}.mlp.shared_expert", hidden, 512)
        yield f"{at}.mlp.shared_expert_gate.weight", (1, hidden)
        yield from two_norms(at, hidden)

    def each() -> Named:
        yield from ends(151936, hidden)
        for i in range(48):
            yield from layer(f"model.layers.{i}", i % 4 == 3)
        yield from layer("mtp.layers.0", True)
        yield "mtp.fc.weight", (hidden, 2 * hidden)
        yield "mtp.norm.weight", (hidden,)
        yield "mtp.pre_fc_norm_embedding.weight", (hidden,)
        yield "mtp.pre_fc_norm_hidden.weight", (hidden,)

    return Layout(settings("qwen3_next", hidden, 48, *heads), dict(each()))


def mixtral_8x7b() -> Layout:
    hidden, inner = 4096, 14336

    def each() -> Named:
        yield from ends(32000, hidden)
        for i in range(32):
            at = f"model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, 32, 8, 128)
            yield f"{at}.block_sparse_moe.gate.weight", (8, hidden)
            for j in range(8):
                expert = f"{at}.block_sparse_moe.experts.{j}"
                yield f"{expert}.w1.weight", (inner, hidden)
                yield f"{expert}.w2.weight", (hidden, inner)
                yield f"{expert}.w3.weight", (inner, hidden)
            yield from two_norms(at, hidden)

    return Layout(settings("mixtral", hidden, 32, 32, 8, 128), dict(each()))


def deepseek(
    model_type: str,
    hidden: int,
    layers: int,
    heads: int,
    *,
    q_rank: int | None,
    dense_layers: int,
    inner: int,
    moe_inner: int,
    routed: int,
    shared: int,
    vocabulary: int,
    correction: bool,
    ahead: int = 0,
) -> Layout:
    """Multi-head latent attention: 128 + 64 for queries and keys, 128 for values, rank 512."""

    def latent(at: str) -> Named:
        if q_rank is None:
            yield f"{at}.q_proj.weight", (heads * 192, hidden)
        else:
            yield f"{at}.q_a_proj.weight", (q_rank, hidden)
            yield f"{at}.q_a_layernorm.weight", (q_rank,)
            yield f"{at}.q_b_proj.weight", (heads * 192, q_rank)
        yield f"{at}.kv_a_proj_with_mqa.weight", (576, hidden)
        yield f"{at}.kv_a_layernorm.weight", (512,)
        yield f"{at}.kv_b_proj.weight", (heads * 256, 512)
        yield f"{at}.o_proj.weight", (hidden, heads * 128)

    def each() -> Named:
        yield from ends(vocabulary, hidden)
        for i in range(layers + ahead):
            at = f"model.layers.{i}"
            yield from latent(f"{at}.self_attn")
            yield from two_norms(at, hidden)
            if i < dense_layers:
                yield from mlp(f"{at}.mlp", hidden, inner)
            else:
                yield from experts(f"{at}.mlp", routed, hidden, moe_inner)
                yield from mlp(f"{at}.mlp.shared_experts", hidden, shared * moe_inner)
                if correction:
                    yield f"{at}.mlp.gate.e_score_correction_bias", (routed,)
            if i >= layers:
                yield from prediction(at, vocabulary, hidden)

    config = settings(model_type, hidden, layers, heads, heads, 0)
    del config["head_dim"]
    return Layout(config, dict(each()))


def prediction(at: str, vocabulary: int, hidden: int) -> Named:
    yield f"{at}.embed_tokens.weight", (vocabulary, hidden)
    yield f"{at}.enorm.weight", (hidden,)
    yield f"{at}.hnorm.weight", (hidden,)
    yield f"{at}.eh_proj.weight", (hidden, 2 * hidden)
    yield f"{at}.shared_head.norm.weight", (hidden,)
    yield f"{at}.shared_head.head.weight", (vocabulary, hidden)


def glm45_air() -> Layout:
    hidden, layers, heads = 4096, 46, (96, 8, 128)

    def each() -> Named:
        yield from ends(151552, hidden)
        for i in range(layers + 1):
            at = f"model.layers.{i}"
            yield from attention(f"{at}.self_attn", hidden, *heads, bias=True)
            yield from two_norms(at, hidden)
            if i < 1:
                yield from mlp(f"{at}.mlp", hidden, 10944)
            else:
                yield from experts(f"{at}.mlp", 128, hidden, 1408)
                yield f"{at}.mlp.gate.e_score_correction_bias", (128,)
                yield from mlp(f"{at}.mlp.shared_experts", hidden, 1408)
            if i >= layers:
                yield from prediction(at, 151552, hidden)

    return Layout(settings("glm4_moe", hidden, layers, *heads), dict(each()))


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "SmolLM2-135M": lambda: dense("llama", 576, 1536, 30, (9, 3, 64), 49152, head=False),
    "Llama-3.1-8B": lambda: dense("llama", 4096, 14336, 32, (32, 8, 128), 128256),
    "Mistral-7B-v0.3": lambda: dense("mistral", 4096, 14336, 32, (32, 8, 128), 32768),
    "Qwen2.5-7B": lambda: dense("qwen2", 3584, 18944, 28, (28, 4, 128), 152064, bias=True),
    "Qwen3-8B": lambda: dense("qwen3", 4096, 12288, 36, (32, 8, 128), 151936, norms=True),
    "Gemma-2-9B": gemma2_9b,
    "Gemma-3-4B": gemma3_4b,
    "Phi-2": phi2,
    "Phi-3-mini": lambda: phi3(3072, 8192, 32, (32, 32), 32064),
    "Phi-4": lambda: phi3(5120, 17920, 40, (40, 10), 100352),
    "GLM-4-9B": glm4_9b,
    "Qwen2-57B-A14B": qwen2_57b,
    "Qwen3-30B-A3B": lambda: qwen3_moe(2048, 768, 48, (32, 4, 128)),
    "Qwen3-235B-A22B": lambda: qwen3_moe(4096, 1536, 94, (64, 4, 128)),
    "Qwen3-Next-80B-A3B": qwen3_next_80b,
    "Mixtral-8x7B": mixtral_8x7b,
    "DeepSeek-V2-Lite": lambda: deepseek(
        "deepseek_v2",
        2048,
        27,
        16,
        q_rank=None,
        dense_layers=1,
        inner=10944,
        moe_inner=1408,
        routed=64,
        shared=2,
        vocabulary=102400,
        correction=False,
    ),
    "DeepSeek-V3": lambda: deepseek(
        "deepseek_v3",
        7168,
        61,
        128,
        q_rank=1536,
        dense_layers=3,
        inner=18432,
        moe_inner=2048,
        routed=256,
        shared=1,
        vocabulary=129280,
        correction=True,
        ahead=1,
    ),
    "GLM-4.5-Air": glm45_air,
    "Kimi-K2": lambda: deepseek(
        "kimi_k2",
        7168,
        61,
        64,
        q_rank=1536,
        dense_layers=1,
        inner=18432,
        moe_inner=2048,
        routed=384,
        shared=1,
        vocabulary=163840,
        correction=True,
    ),
}
