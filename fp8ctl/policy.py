"""Decides which tensor becomes FP8, and why; and spells what stays for each engine.

Structure first: a family (`families`) says, by whole module paths inside a decoder
layer, what each Linear is. Whole components are compared, never substrings:
`mlp.gate` is a router and `mlp.gate_proj` is not, and mistaking one for the other
has cost every trainer a week
(https://github.com/verl-project/verl/pull/7519,
https://github.com/PrimeIntellect-ai/prime-rl/pull/2442).
An unknown family gets the union of all rules, and a warning.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8ctl.families import FAMILIES, UNKNOWN, Backend, Family, Role, Split, family_of, guessed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "FAMILIES",
    "Backend",
    "Decision",
    "Family",
    "Reason",
    "Role",
    "Split",
    "decide",
    "family_of",
    "ignored_layers",
    "kept_modules",
    "known",
    "loadable",
    "should_quantize_param",
]

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
    STACKED = "experts in one tensor: only a tensor for each can be quantised"
    DTYPE = "not a 16- or 32-bit float"
    OUTSIDE = "outside the decoder layers"
    UNKNOWN = "not a Linear that this architecture is known to have"
    USER = "user rule"


# Reasons to keep a matrix that an engine may have built as a quantisable Linear,
# or transformers would convert: these are spelled out in the configuration.
_SPELLED = frozenset(
    [
        Reason.LM_HEAD,
        Reason.ROUTER,
        Reason.VISION,
        Reason.PREDICTION,
        Reason.STATE_SPACE,
        Reason.OUTSIDE,
        Reason.UNKNOWN,
        Reason.USER,
    ]
)


@dataclass(frozen=True, slots=True)
class Decision:
    """Quantise or keep, with the reason.

    Attributes:
        role: of a Linear that is quantised, or that a user's rule keeps.
        rule: the user's rule as typed, where the reason is one.
    """

    quantize: bool
    reason: Reason
    role: Role | None = None
    rule: str = ""


_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(.+)$")
_NORM = re.compile(r"norm\d*$|(?:^|_)norm_")
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
_OPEN = (Reason.UNKNOWN, Reason.STATE_SPACE)
"""Reasons that a user may know better than fp8ctl."""


def known(family: Family) -> bool:
    """Say whether the structure of this family is written down."""
    return family is not UNKNOWN


def decide(family: Family, name: str, shape: Sequence[int], dtype: str = "BF16") -> Decision:
    """Decide one tensor.

    The numbers in the name decide nothing, nor do the sides of a matrix: callers may
    keep the answer for names that differ in those alone.

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
    layer = _LAYER.search(name)
    if len(shape) != 2:
        stacked = len(shape) == 3 and layer is not None and "experts" in parts
        return Decision(False, Reason.STACKED if stacked else Reason.SHAPE)
    if parts[-1] != "weight":
        return Decision(False, Reason.UNKNOWN)
    if layer is None:
        return Decision(False, Reason.OUTSIDE)
    path = ".".join("*" if part.isdigit() else part for part in layer[1].split(".")[:-1])
    role = family.by_path.get(path)
    if role is None:
        return Decision(False, Reason.UNKNOWN)
    return Decision(True, Reason.EXPERT if role.expert else Reason.LINEAR, role)


def loadable(decision: Decision, name: str, shape: Sequence[int], dtype: str) -> Role | None:
    """Return the role in which an engine could load a tensor in FP8, or None where it could not.

    Args:
        decision: what fp8ctl decides about it.
        name, shape, dtype: of the tensor.
    """
    if decision.role is not None:
        return decision.role
    layer = _LAYER.search(name)
    if (
        decision.reason not in _OPEN
        or layer is None
        or len(shape) != 2
        or dtype not in QUANTIZABLE_DTYPES
        or not layer[1].endswith(".weight")
    ):
        return None
    path = ".".join("*" if part.isdigit() else part for part in layer[1].split(".")[:-1])
    return UNKNOWN.by_path.get(path) or guessed(path.rpartition(".")[2])


def should_quantize_param(
    name: str, shape: Sequence[int], config: Mapping[str, Any] | None = None
) -> bool:
    """Say whether a trainer should send this parameter in FP8.

    Args:
        name: full name as in a Hugging Face checkpoint.
        shape: of the whole parameter.
        config: config.json as a mapping; without it, names alone decide.
    """
    family = UNKNOWN if config is None else family_of(config)
    return decide(family, name, shape).quantize


def kept_modules(tensors: Iterable[tuple[str, Reason, Sequence[int]]]) -> tuple[str, ...]:
    """Return the modules that stay in 16 bits though they may be Linear, in the checkpoint's names.

    `lm_head` is always one: where it is tied to the embedding the checkpoint has
    no tensor of that name, and transformers would convert the module.

    Args:
        tensors: name, reason and shape of each tensor that is kept.
    """
    names = {"lm_head"}
    for name, reason, shape in tensors:
        if reason in _SPELLED and len(shape) == 2 and name.endswith(".weight"):
            names.add(name.removesuffix(".weight"))
    return tuple(sorted(names))


_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED = {part: fused for fused, parts in _PARTS.items() for part in parts}
_FUSED_BY_SGLANG = {
    **_FUSED,
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}


def ignored_layers(
    kept: Iterable[str], backend: Backend | None, family: Family = UNKNOWN
) -> tuple[str, ...]:
    """Spell kept modules as the engine compares them: exact full names.

    vLLM 0.9.1 asks for the parts of a fused module, also of one that the checkpoint
    holds in one tensor (GLM); where its class does not name the parts (DeepSeek), for
    the module itself. SGLang 0.4.8 asks for the fused module (it calls
    `is_layer_skipped` without the mapping). Without a backend both spellings are
    given; each engine passes over the other's.
    """
    names: set[str] = set()
    for module in kept:
        if backend != "sglang":
            names.update(_for_vllm(module, "vllm" in family.unmapped))
        if backend != "vllm":
            names.update(_for_sglang(module, "sglang" in family.bare_layers))
    return tuple(sorted(names))


def _for_vllm(module: str, unmapped: bool) -> set[str]:
    stem, _, last = module.rpartition(".")
    names = {module, *(f"{stem}.{part}" for part in _PARTS.get(last, ()))}
    if unmapped and stem and last in _FUSED:
        names.add(f"{stem}.{_FUSED[last]}")
    return names


def _for_sglang(module: str, bare_layers: bool) -> set[str]:
    if bare_layers and module.startswith("model.layers."):
        module = module.removeprefix("model.")
    stem, _, last = module.rpartition(".")
    fused = _FUSED_BY_SGLANG.get(last) if stem else None
    names = {module if fused is None else f"{stem}.{fused}"}
    if last == "kv_a_proj_with_mqa":
        names.add(module)  # beside no q_a_proj it is a module of its own
    if last == "out_proj" and _TOWERS.intersection(stem.split(".")):
        names.add(f"{stem}.proj")  # VisionAttention's name for it
    return names


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
    if _NORM.search(module.lower()) or module in ("ln_f", "ln_1", "ln_2"):
        return Reason.NORM
    if module in _ROUTERS or last == "e_score_correction_bias":
        return Reason.ROUTER
    if module in _STATES or last in _STATES:
        return Reason.STATE_SPACE
    if last == "bias" or last.endswith("_bias"):
        return Reason.BIAS
    if module == "eh_proj" or (module == "fc" and "mtp" in parts):
        return Reason.PREDICTION
    if last.endswith(("_scale", "_scale_inv", "inv_freq")):
        return Reason.SCALE
    return None
