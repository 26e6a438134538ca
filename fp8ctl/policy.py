"""Decides which tensor becomes FP8, and why; and spells what stays for each engine.

Structure first: a family says, by whole module paths inside a decoder layer,
what each Linear is and how an engine splits and fuses it. Whole components are
compared, never substrings: `mlp.gate` is a router and `mlp.gate_proj` is not,
and mistaking one for the other has cost every trainer a week
(https://github.com/verl-project/verl/pull/7519,
https://github.com/PrimeIntellect-ai/prime-rl/pull/2442).
An unknown family gets the union of all rules, and a warning.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Backend = Literal["vllm", "sglang"]
Split = Literal["column", "row", "replicated"]

QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")


class Reason(enum.Enum):
    """Why a tensor is quantised or kept; the value is what a user reads."""

    LINEAR = "Linear of a decoder layer"
    EXPERT = "Linear of an expert"
    EMBEDDING = "embedding"
    LM_HEAD = "output head: engines keep it in 16 bits"
    NORM = "norm"
    BIAS = "bias"
    ROUTER = "router: engines build it without quantisation"
    VISION = "vision or audio tower"
    PREDICTION = "multi-token prediction projection"
    STATE_SPACE = "convolution or state-space parameter"
    SCALE = "scale or statistic"
    SHAPE = "not a matrix"
    DTYPE = "not a 16- or 32-bit float"
    OUTSIDE = "outside the decoder layers"
    UNKNOWN = "not a Linear that this architecture is known to have"


# Reasons to keep a matrix that an engine may have built as a quantisable Linear,
# or transformers would convert: these are spelled out in the configuration.
_SPELLED = (
    Reason.LM_HEAD,
    Reason.ROUTER,
    Reason.VISION,
    Reason.PREDICTION,
    Reason.OUTSIDE,
    Reason.UNKNOWN,
)


@dataclass(frozen=True, slots=True)
class Role:
    """What a Linear is to an engine.

    Attributes:
        split: how tensor parallelism cuts it: column cuts N, row cuts K.
        fused: the engine's module that it is a part of ("qkv_proj"), or "".
        part: which part it is ("q", "gate"), or the parts that one tensor on
            disk holds already, joined by "+" ("q+k+v").
        expert: whether it is one of many experts, which engines fuse.
    """

    split: Split
    fused: str = ""
    part: str = ""
    expert: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Quantise or keep, with the reason; `role` where it is quantised."""

    quantize: bool
    reason: Reason
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: model types of its config.json, and its Linears by path in a layer."""

    name: str
    model_types: tuple[str, ...]
    rules: tuple[tuple[str, Role], ...]


_QKV = tuple((f"self_attn.{p}_proj", Role("column", "qkv_proj", p)) for p in ("q", "k", "v"))
_O = (("self_attn.o_proj", Role("row")),)
_QKV_ON_DISK = (("self_attn.qkv_proj", Role("column", "qkv_proj", "q+k+v")),)
_GATE_UP_ON_DISK = (("mlp.gate_up_proj", Role("column", "gate_up_proj", "gate+up")),)


def _mlp(path: str, *, expert: bool = False) -> tuple[tuple[str, Role], ...]:
    return (
        (f"{path}.gate_proj", Role("column", "gate_up_proj", "gate", expert)),
        (f"{path}.up_proj", Role("column", "gate_up_proj", "up", expert)),
        (f"{path}.down_proj", Role("row", expert=expert)),
    )


_DENSE = _QKV + _O + _mlp("mlp")
_EXPERTS = _mlp("mlp.experts.*", expert=True)
_MIXTRAL_EXPERTS = (
    ("block_sparse_moe.experts.*.w1", Role("column", "gate_up_proj", "gate", expert=True)),
    ("block_sparse_moe.experts.*.w3", Role("column", "gate_up_proj", "up", expert=True)),
    ("block_sparse_moe.experts.*.w2", Role("row", expert=True)),
)
_MLA = (
    ("self_attn.q_proj", Role("column")),
    ("self_attn.q_a_proj", Role("replicated", "fused_qkv_a_proj_with_mqa", "q_a")),
    ("self_attn.q_b_proj", Role("column")),
    (
        "self_attn.kv_a_proj_with_mqa",
        Role("replicated", "fused_qkv_a_proj_with_mqa", "kv_a"),
    ),
    ("self_attn.kv_b_proj", Role("column")),
)

FAMILIES = (
    Family("Llama", ("llama",), _DENSE),
    Family("Mistral", ("mistral",), _DENSE),
    Family("Qwen2", ("qwen2",), _DENSE),
    Family("Qwen3", ("qwen3",), _DENSE),
    Family("Qwen2-MoE", ("qwen2_moe",), _DENSE + _EXPERTS + _mlp("mlp.shared_expert")),
    Family("Qwen3-MoE", ("qwen3_moe",), _DENSE + _EXPERTS),
    Family("Mixtral", ("mixtral",), _QKV + _O + _MIXTRAL_EXPERTS),
    Family(
        "DeepSeek",
        ("deepseek_v2", "deepseek_v3"),
        _MLA + _O + _mlp("mlp") + _EXPERTS + _mlp("mlp.shared_experts"),
    ),
    Family("Phi-3", ("phi3",), _QKV_ON_DISK + _O + _GATE_UP_ON_DISK + _mlp("mlp")[2:]),
)

# Names for architectures without an entry: every rule above, dense attention first.
_UNKNOWN_FAMILY = Family(
    "unknown",
    (),
    tuple(
        {
            path: (path, role) for family in reversed(FAMILIES) for path, role in family.rules
        }.values()
    ),
)

_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(.+)$")
_TOWERS = frozenset(
    [
        "visual",
        "vision",
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "image_encoder",
        "audio_tower",
        "audio_model",
        "multi_modal_projector",
        "mm_projector",
        "embed_vision",
        "embed_audio",
        "patch_embed",
    ]
)
_EMBEDDINGS = frozenset(
    [
        "embed_tokens",
        "wte",
        "wpe",
        "word_embeddings",
        "position_embeddings",
        "tok_embeddings",
        "embeddings",
    ]
)
_HEADS = frozenset(("lm_head", "embed_out", "head"))
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate", "wg"))
_STATES = frozenset(
    ["conv1d", "A_log", "D", "dt_bias", "dt_proj", "x_proj", "in_proj_a", "in_proj_b", "in_proj_ba"]
)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a model from its configuration; of its text part, where it has one."""
    text = config.get("text_config")
    kinds = [config.get("model_type")]
    if isinstance(text, Mapping):
        kinds.append(text.get("model_type"))
    for family in FAMILIES:
        if any(kind in family.model_types for kind in kinds):
            return family
    return _UNKNOWN_FAMILY


def known(family: Family) -> bool:
    """Say whether the structure of this family is written down here."""
    return family is not _UNKNOWN_FAMILY


def decide(family: Family, name: str, shape: Sequence[int], dtype: str = "BF16") -> Decision:
    """Decide one tensor.

    Args:
        family: from `family_of`.
        name: full name in the checkpoint.
        shape: on disk.
        dtype: as safetensors spells it.
    """
    parts = name.split(".")
    reason = _named_reason(parts)
    if reason is not None:
        return Decision(False, reason)
    if dtype not in QUANTIZABLE_DTYPES:
        return Decision(False, Reason.DTYPE)
    if len(shape) != 2:
        return Decision(False, Reason.SHAPE)
    if parts[-1] != "weight":
        return Decision(False, Reason.UNKNOWN)
    layer = _LAYER.search(name)
    if layer is None:
        return Decision(False, Reason.OUTSIDE)
    path = ".".join("*" if part.isdigit() else part for part in layer[1].split(".")[:-1])
    role = _rules(family).get(path)
    if role is None:
        return Decision(False, Reason.UNKNOWN)
    return Decision(True, Reason.EXPERT if role.expert else Reason.LINEAR, role)


def should_quantize_param(
    name: str, shape: Sequence[int], config: Mapping[str, Any] | None = None
) -> bool:
    """Say whether a trainer should send this parameter in FP8.

    Args:
        name: full name as in a Hugging Face checkpoint.
        shape: of the whole parameter.
        config: config.json as a mapping; without it, names alone decide.
    """
    family = _UNKNOWN_FAMILY if config is None else family_of(config)
    return decide(family, name, shape).quantize


def kept_modules(decisions: Iterable[tuple[str, Decision]]) -> tuple[str, ...]:
    """Return the modules that stay in 16 bits though they may be Linear, in the checkpoint's names.

    `lm_head` is always one: where it is tied to the embedding the checkpoint has
    no tensor of that name, and transformers would convert the module.
    """
    names = {"lm_head"}
    for name, decision in decisions:
        if decision.reason in _SPELLED and name.endswith(".weight"):
            names.add(name.removesuffix(".weight"))
    return tuple(sorted(names))


def ignored_layers(kept: Iterable[str], backend: Backend | None) -> tuple[str, ...]:
    """Spell kept modules as the engine compares them: exact full names.

    vLLM 0.9.1 asks for the parts of a fused module, SGLang 0.4.8 for the fused
    module itself (it calls `is_layer_skipped` without the mapping). Without a
    backend both spellings are given; each engine passes over the other's.
    """
    names: set[str] = set()
    for module in kept:
        stem, _, last = module.rpartition(".")
        fused = _FUSED.get(last)
        if fused is None or backend != "sglang":
            names.add(module)
        if fused is not None and stem and backend != "vllm":
            names.add(f"{stem}.{fused}")
    return tuple(sorted(names))


_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@functools.cache
def _rules(family: Family) -> dict[str, Role]:
    return dict(family.rules)


def _named_reason(parts: Sequence[str]) -> Reason | None:
    """Return the reason to keep that a name alone gives, or None."""
    last = parts[-1]
    module = parts[-2] if len(parts) > 1 else ""
    if _TOWERS.intersection(parts):
        return Reason.VISION
    if _EMBEDDINGS.intersection(parts):
        return Reason.EMBEDDING
    if module in _HEADS:
        return Reason.LM_HEAD
    if module.lower().endswith(("norm", "layernorm")) or module in ("ln_f", "ln_1", "ln_2"):
        return Reason.NORM
    if module in _ROUTERS or last == "e_score_correction_bias":
        return Reason.ROUTER
    if last == "bias" or last.endswith("_bias"):
        return Reason.BIAS
    if module == "eh_proj":
        return Reason.PREDICTION
    if module in _STATES or last in _STATES:
        return Reason.STATE_SPACE
    if last.endswith(("_scale", "_scale_inv", "inv_freq")):
        return Reason.SCALE
    return None
