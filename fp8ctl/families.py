"""Architectures as data: which Linears a decoder layer has, and how engines build them.

Written down from the model files of vLLM 0.9.1 and SGLang 0.4.8, and from the
checkpoints' own layouts. Whole module paths, never substrings. Used by `policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Backend = Literal["vllm", "sglang"]
Split = Literal["column", "row", "replicated"]

ENGINES: dict[Backend, str] = {"vllm": "vLLM 0.9.1", "sglang": "SGLang 0.4.8"}


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

    @property
    def fused_on_disk(self) -> bool:
        """Whether one tensor of the checkpoint holds several parts."""
        return "+" in self.part


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: model types of its config.json, and its Linears by path in a layer.

    Attributes:
        rules: path in a layer, numbers as `*`, to what the Linear there is.
        unnamed: engines whose model class gives these Linears no name of their own,
            so that no ignored layer reaches them.
        unmapped: engines that un-fuse names, and whose class says nothing of its parts:
            they ask for the fused name.
        missing: engines that have no class for it in the versions that fp8ctl covers.
        bare_layers: engines that name its layers `layers.N`, without `model.` in front.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[tuple[str, Role], ...]
    unnamed: tuple[Backend, ...] = ()
    unmapped: tuple[Backend, ...] = ()
    missing: tuple[Backend, ...] = ()
    bare_layers: tuple[Backend, ...] = ()
    by_path: Mapping[str, Role] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make the rules a table."""
        object.__setattr__(self, "by_path", dict(self.rules))


Rules = tuple[tuple[str, Role], ...]


def _mlp(path: str, *, expert: bool = False) -> Rules:
    return (
        (f"{path}.gate_proj", Role("column", "gate_up_proj", "gate", expert)),
        (f"{path}.up_proj", Role("column", "gate_up_proj", "up", expert)),
        (f"{path}.down_proj", Role("row", expert=expert)),
    )


_QKV: Rules = tuple((f"self_attn.{p}_proj", Role("column", "qkv_proj", p)) for p in ("q", "k", "v"))
_O: Rules = (("self_attn.o_proj", Role("row")),)
_QKV_ON_DISK: Rules = (("self_attn.qkv_proj", Role("column", "qkv_proj", "q+k+v")),)
_MLP_ON_DISK: Rules = (
    ("mlp.gate_up_proj", Role("column", "gate_up_proj", "gate+up")),
    ("mlp.down_proj", Role("row")),
)
_DENSE = _QKV + _O + _mlp("mlp")
_EXPERTS = _mlp("mlp.experts.*", expert=True)
_MIXTRAL_EXPERTS: Rules = (
    ("block_sparse_moe.experts.*.w1", Role("column", "gate_up_proj", "gate", expert=True)),
    ("block_sparse_moe.experts.*.w3", Role("column", "gate_up_proj", "up", expert=True)),
    ("block_sparse_moe.experts.*.w2", Role("row", expert=True)),
)
_MLA: Rules = (
    ("self_attn.q_proj", Role("column")),
    ("self_attn.q_a_proj", Role("replicated", "fused_qkv_a_proj_with_mqa", "q_a")),
    ("self_attn.q_b_proj", Role("column")),
    (
        "self_attn.kv_a_proj_with_mqa",
        Role("replicated", "fused_qkv_a_proj_with_mqa", "kv_a"),
    ),
    ("self_attn.kv_b_proj", Role("column", part="kv_b")),
)
# The gates of linear attention (in_proj_ba: a row or two for each head) stay, as in the
# checkpoints that the model's makers publish.
_LINEAR_ATTENTION: Rules = (
    ("linear_attn.in_proj_qkvz", Role("column", part="qkvz")),
    ("linear_attn.out_proj", Role("row")),
)
_PHI: Rules = (
    *_QKV,
    ("self_attn.dense", Role("row")),
    ("mlp.fc1", Role("column")),
    ("mlp.fc2", Role("row")),
)

FAMILIES = (
    Family("Llama", ("llama",), _DENSE),
    Family("Mistral", ("mistral",), _DENSE),
    Family("Qwen2", ("qwen2",), _DENSE),
    Family("Qwen3", ("qwen3",), _DENSE),
    Family(
        "Qwen2-MoE",
        ("qwen2_moe",),
        _DENSE + _EXPERTS + _mlp("mlp.shared_expert"),
        unnamed=("vllm",),
    ),
    Family("Qwen3-MoE", ("qwen3_moe",), _DENSE + _EXPERTS),
    Family(
        "Qwen3-Next",
        ("qwen3_next",),
        _DENSE + _LINEAR_ATTENTION + _EXPERTS + _mlp("mlp.shared_expert"),
        missing=("vllm", "sglang"),
    ),
    Family("Mixtral", ("mixtral",), _QKV + _O + _MIXTRAL_EXPERTS, bare_layers=("sglang",)),
    Family(
        "DeepSeek",
        ("deepseek_v2", "deepseek_v3", "kimi_k2"),
        _MLA + _O + _mlp("mlp") + _EXPERTS + _mlp("mlp.shared_experts"),
        unmapped=("vllm",),
    ),
    Family("Gemma", ("gemma",), _DENSE),
    Family("Gemma-2", ("gemma2",), _DENSE, unnamed=("vllm", "sglang")),
    Family("Gemma-3", ("gemma3", "gemma3_text"), _DENSE),
    Family("Phi", ("phi",), _PHI, unnamed=("vllm",), missing=("sglang",)),
    Family("Phi-3", ("phi3",), _QKV_ON_DISK + _O + _MLP_ON_DISK),
    Family("GLM", ("glm",), _QKV + _O + _MLP_ON_DISK, missing=("sglang",)),
    Family("GLM-4", ("glm4",), _QKV + _O + _MLP_ON_DISK),
    Family(
        "GLM-4-MoE",
        ("glm4_moe",),
        _DENSE + _EXPERTS + _mlp("mlp.shared_experts"),
        missing=("vllm", "sglang"),
    ),
)

# Names for architectures without an entry: every rule above, dense attention first.
UNKNOWN = Family(
    "unknown",
    (),
    tuple(
        {
            path: (path, role) for family in reversed(FAMILIES) for path, role in family.rules
        }.values()
    ),
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
    return UNKNOWN


def family_named(name: str) -> Family:
    """Return the family of this name, as a plan has it; the unknown one where there is none."""
    return next((family for family in FAMILIES if family.name == name), UNKNOWN)


# What a Linear of no known path most likely is, by its last name.
_ROWS = frozenset(
    ["o_proj", "out_proj", "down_proj", "dense", "fc2", "w2", "wo", "dense_4h_to_h", "c_proj"]
)


def guessed(module: str) -> Role:
    """Return how an engine would cut a Linear that no family names."""
    return Role("row" if module in _ROWS else "column")
