"""A checkpoint with every tensor decided: what plans are made from, and asked against.

Decisions depend on the model and the user's rules alone. What fits depends on mode,
block, tensor-parallel size, engine and GPU too, and is asked of a survey as often
as there are choices. Pure, but for the model that it is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fp8ctl import fitting, fusing, policy, selection
from fp8ctl.errors import UnsupportedError
from fp8ctl.fitting import Heads, Linear
from fp8ctl.policy import Decision, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.families import Backend, Family, Role
    from fp8ctl.formats import BlockSize, Mode
    from fp8ctl.manifest import Problem
    from fp8ctl.models import Checkpoint

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A layer's or an expert's number in a tensor's name."""


class Numbered:
    """Names by what they are without their numbers; what names share is looked at once."""

    def __init__(self) -> None:
        """Start with nothing known."""
        self._stems: dict[str, tuple[str, str]] = {}

    def read(self, name: str) -> tuple[str, str]:
        """Return a name that sorts layer 10 behind layer 9, and the name with `*` for numbers."""
        stem, _, leaf = name.rpartition(".")
        stem, _, module = stem.rpartition(".")
        known = self._stems.get(stem)
        if known is None:
            known = self._stems[stem] = (
                NUMBER.sub(lambda number: number[0].zfill(8), stem + ".")[:-1],
                NUMBER.sub("*", stem + ".")[:-1],
            )
        if module.isdigit():
            return f"{known[0]}.{module.zfill(8)}.{leaf}", f"{known[1]}.*.{leaf}"
        rest = f".{module}.{leaf}"
        return known[0] + rest, known[1] + rest


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan is for.

    Attributes:
        backend: whose rules to apply; None for those of both engines.
        gpu: compute capability of the GPU; None where the engine computes on none.
    """

    backend: Backend | None
    mode: Mode
    block: BlockSize | None
    tp: int
    gpu: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint and its decisions.

    Attributes:
        decisions: of every tensor by name, layer 10 behind layer 9.
        shapes: one Linear for all of the same role and shape, of those that become FP8.
        dense: every Linear that becomes FP8 and is no expert.
        kept: every Linear of a decoder layer that a rule keeps.
        stacked: names of tensors that hold many experts each.
    """

    checkpoint: Checkpoint
    family: Family
    heads: Heads
    decisions: dict[str, Decision]
    shapes: tuple[Linear, ...]
    dense: tuple[Linear, ...]
    kept: tuple[Linear, ...]
    stacked: tuple[str, ...]

    def problems(self, target: Target) -> tuple[Problem, ...]:
        """Return every rule of the engines that these decisions break for a target."""
        t = target
        modules = fitting.modules(self.dense, self.heads, t.tp)
        return (
            *fitting.problems(self.shapes, self.heads, t.mode, t.block, t.tp, t.backend),
            *fitting.kernel_problems(self.shapes, modules, t.block, t.backend, t.gpu),
            *fusing.problems(self.dense, self.kept, self.stacked, self.family, t.backend),
        )


def survey(checkpoint: Checkpoint, keep: Sequence[str], quantize: Sequence[str]) -> Survey:
    """Decide every tensor of a checkpoint.

    Raises:
        UnsupportedError: the model is quantised already, or nothing of it would be.
        UsageError: a rule that cannot be meant.
    """
    _require_16_bit(checkpoint)
    family = policy.family_of(checkpoint.config)
    decisions = _decide(checkpoint, family, selection.parse(keep, quantize))
    shapes, dense, kept, stacked = _linears(checkpoint, decisions)
    if not shapes:
        raise UnsupportedError(
            f"{checkpoint.folder}: no Linear of a decoder layer to quantise"
            f" (model_type {checkpoint.config.get('model_type', 'unknown')})",
            hint="fp8ctl quantises decoder-only language models in the Hugging Face layout",
        )
    return Survey(
        checkpoint=checkpoint,
        family=family,
        heads=Heads.of(checkpoint.config),
        decisions=decisions,
        shapes=shapes,
        dense=tuple(dense),
        kept=tuple(kept),
        stacked=tuple(stacked),
    )


def _decide(
    checkpoint: Checkpoint, family: Family, rules: Sequence[selection.Rule]
) -> dict[str, Decision]:
    """Decide every tensor, in order: layer 10 behind layer 9."""
    # Of names that differ in their numbers only, one is decided: a large MoE has 70 000
    # tensors and some 40 such patterns.
    numbered = Numbered()
    order = sorted((numbered.read(name), name) for name in checkpoint.tensors)
    known: dict[tuple[str, int, str], Decision] = {}
    decisions = {}
    for (_, pattern), name in order:
        info = checkpoint.tensors[name]
        key = (pattern, len(info.shape), info.dtype)
        decision = known.get(key)
        if decision is None:
            decision = known[key] = policy.decide(family, name, info.shape, info.dtype)
        decisions[name] = decision
    return selection.apply(rules, decisions, checkpoint.tensors) if rules else decisions


def _linears(
    checkpoint: Checkpoint, decisions: dict[str, Decision]
) -> tuple[tuple[Linear, ...], list[Linear], list[Linear], list[str]]:
    """Return shapes, dense Linears, Linears that stay, and tensors of many experts."""
    # By identity: Python hashes a dataclass slowly, and a family shares its roles. No Linear
    # is made for each expert.
    counts: dict[tuple[int, tuple[int, ...]], int] = {}
    first: dict[tuple[int, tuple[int, ...]], Linear] = {}
    dense: list[Linear] = []
    kept: list[Linear] = []
    stacked: list[str] = []
    for name, decision in decisions.items():
        role = decision.role
        if role is None:
            if decision.reason is Reason.STACKED:
                stacked.append(name)
            continue
        shape = checkpoint.tensors[name].shape
        key = (id(role), shape)
        if decision.quantize:
            counts[key] = counts.get(key, 0) + 1
            if role.expert and key in first:
                continue
        linear = Linear(name, 1, (shape[0], shape[1]), role)
        if not decision.quantize:
            kept.append(linear)
            continue
        first.setdefault(key, linear)
        if not role.expert:
            dense.append(linear)
    # Roles that a rule made may be equal without being the same.
    merged: dict[tuple[Role, tuple[int, int]], Linear] = {}
    for key, linear in first.items():
        same = merged.get((linear.role, linear.shape), replace(linear, count=0))
        merged[linear.role, linear.shape] = replace(same, count=same.count + counts[key])
    return tuple(merged.values()), dense, kept, stacked


def _require_16_bit(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config")
    stored = [t for t in checkpoint.tensors.values() if t.dtype.startswith("F8_")]
    if config is None and not stored:
        return
    method = config.get("quant_method") if isinstance(config, dict) else None
    found = f"quant_method {method!r} in config.json" if config else f"{stored[0].name} in FP8"
    raise UnsupportedError(
        f"{checkpoint.folder} is quantised already: {found}; expected 16- or 32-bit weights",
        hint="give the checkpoint that it was made from, or launch it as it is",
    )
