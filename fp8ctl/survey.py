"""A checkpoint with every tensor decided: what plans are made from, and asked against.

Decisions depend on the model and the user's rules alone. What fits depends on mode,
block, tensor-parallel size, engine and GPU too, and is asked of a survey as often
as there are choices. Pure, but for the model that it is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from fp8ctl import fitting, fusing, policy, selection
from fp8ctl.errors import UnsupportedError
from fp8ctl.fitting import Heads, Linear
from fp8ctl.policy import Decision, Reason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.families import Backend, Family, Role
    from fp8ctl.formats import BlockSize, Mode
    from fp8ctl.manifest import Problem
    from fp8ctl.models import Checkpoint, TensorInfo

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A layer's or an expert's number in a tensor's name."""


class Numbered:
    """Names by what they are without their numbers; what names share is looked at once."""

    def __init__(self) -> None:
        """Start with nothing known."""
        self._paths: dict[str, tuple[str, str]] = {"": ("", "")}

    def read(self, name: str) -> tuple[str, str]:
        """Return a name that sorts layer 10 behind layer 9, and the name with `*` for numbers."""
        path, dot, leaf = name.rpartition(".")
        if not dot:
            return name, name
        # The last module is put in here: most are beside two others of one expert.
        path, _, module = path.rpartition(".")
        known = self._paths.get(path) or self._read(path)
        if module.isdigit():
            return f"{known[0]}{module:0>8}.{leaf}", f"{known[1]}*.{leaf}"
        return f"{known[0]}{module}.{leaf}", f"{known[1]}{module}.{leaf}"

    def _read(self, path: str) -> tuple[str, str]:
        """Return both forms of a path, each with a dot behind it."""
        known = self._paths.get(path)
        if known is None:
            above, _, last = path.rpartition(".")
            key, pattern = self._read(above)
            if last.isdigit():
                known = f"{key}{last:0>8}.", f"{pattern}*."
            else:
                known = f"{key}{last}.", f"{pattern}{last}."
            self._paths[path] = known
        return known


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


class Kind(NamedTuple):
    """Tensors that differ in the numbers in their names alone.

    Attributes:
        pattern: their name, with `*` for numbers.
    """

    pattern: str
    first: TensorInfo
    decision: Decision
    number: int


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint and its decisions.

    Attributes:
        decisions: of every tensor by name, layer 10 behind layer 9.
        kinds: the same tensors, those that are alike counted.
        shapes: one Linear for all of the same role and shape, of those that become FP8.
        dense: every Linear that becomes FP8 and is no expert.
        kept: every Linear of a decoder layer that a rule keeps.
        stacked: names of tensors that hold many experts each.
    """

    checkpoint: Checkpoint
    family: Family
    heads: Heads
    decisions: dict[str, Decision]
    kinds: tuple[Kind, ...]
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
    decisions, kinds = _decide(checkpoint, family, selection.parse(keep, quantize))
    shapes, dense, kept, stacked = _linears(checkpoint, decisions, kinds)
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
        kinds=kinds,
        shapes=shapes,
        dense=tuple(dense),
        kept=tuple(kept),
        stacked=tuple(stacked),
    )


def _decide(
    checkpoint: Checkpoint, family: Family, rules: Sequence[selection.Rule]
) -> tuple[dict[str, Decision], tuple[Kind, ...]]:
    """Decide every tensor, in order: layer 10 behind layer 9."""
    # Of names that differ in their numbers only, one is decided: a large MoE has 70 000
    # tensors and some 40 such patterns. This is the one loop over all that a plan takes.
    read = Numbered().read
    order = sorted([(*read(info.name), info) for info in checkpoint.tensors.values()])
    known: dict[tuple[str, tuple[int, ...], str], Decision] = {}
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    first = []
    decisions = {}
    for _, pattern, info in order:
        key = (pattern, info.shape, info.dtype)
        decision = known.get(key)
        if decision is None:
            decision = known[key] = policy.decide(family, info.name, info.shape, info.dtype)
            counts[key] = 0
            first.append(info)
        counts[key] += 1
        decisions[info.name] = decision
    if rules:
        decisions = selection.apply(rules, decisions, checkpoint.tensors)
        return decisions, _recounted([(pattern, info) for _, pattern, info in order], decisions)
    kinds = [
        Kind(key[0], info, known[key], count)
        for (key, count), info in zip(counts.items(), first, strict=True)
    ]
    return decisions, tuple(kinds)


def _recounted(
    order: Sequence[tuple[str, TensorInfo]], decisions: Mapping[str, Decision]
) -> tuple[Kind, ...]:
    """Return the kinds of tensors where rules have split some."""
    kinds: dict[tuple[str, tuple[int, ...], str, Decision], Kind] = {}
    for pattern, info in order:
        decision = decisions[info.name]
        key = (pattern, info.shape, info.dtype, decision)
        known = kinds.get(key) or Kind(pattern, info, decision, 0)
        kinds[key] = known._replace(number=known.number + 1)
    return tuple(kinds.values())


def _linears(
    checkpoint: Checkpoint, decisions: Mapping[str, Decision], kinds: Sequence[Kind]
) -> tuple[tuple[Linear, ...], list[Linear], list[Linear], list[str]]:
    """Return shapes, dense Linears, Linears that stay, and tensors of many experts."""
    # Of experts no Linear is made for each.
    dense: list[Linear] = []
    kept: list[Linear] = []
    stacked: list[str] = []
    for name, decision in decisions.items():
        role = decision.role
        if role is None:
            if decision.reason is Reason.STACKED:
                stacked.append(name)
            continue
        if decision.quantize and role.expert:
            continue
        shape = checkpoint.tensors[name].shape
        linear = Linear(name, 1, (shape[0], shape[1]), role)
        (dense if decision.quantize else kept).append(linear)
    # Roles that a rule made may be equal without being the same.
    merged: dict[tuple[Role, tuple[int, int]], Linear] = {}
    for _, info, decision, count in kinds:
        if not decision.quantize or decision.role is None:
            continue
        shape = (info.shape[0], info.shape[1])
        key = (decision.role, shape)
        same = merged.get(key, Linear(info.name, 0, shape, decision.role))
        merged[key] = replace(same, count=same.count + count)
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
