"""The smallest change under which a model fits, as options to type.

Called by `planning` where a plan does not fit. Every answer was tried: it is given
only where the same model fits under it.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8ctl import fitting, fusing, models
from fp8ctl.errors import Fp8ctlError
from fp8ctl.fitting import SQUARES
from fp8ctl.formats import Mode
from fp8ctl.survey import NUMBER, Survey, Target, survey

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8ctl.fitting import Linear
    from fp8ctl.manifest import Plan

_FEW = 0.1
"""The share of the FP8 weights that may stay before another mode is the lesser change."""

NOTHING = "no block, no tensor-parallel size and no mode of fp8ctl fits this model"


def smallest_change(plan: Plan) -> str:
    """Return options under which the model fits, the nearest to what was asked first.

    In this order: another part of the user's own rules; another block; a few Linears
    left in 16 bits; another tensor-parallel size; a scale for each tensor; many Linears
    left in 16 bits; the other engine.
    """
    checkpoint = models.read_checkpoint(plan.model)
    target = Target(plan.backend, plan.mode, plan.block, plan.tp, plan.gpu)
    seen = survey(checkpoint, plan.keep, plan.quantize)
    rules = [problem.rule for problem in plan.problems]
    if {"fused", "experts", "ignored"}.intersection(rules):
        return _mended_rules(plan, seen, target)
    some, many = _ignoring(plan, seen, target)
    smaller = [tp for tp in range(plan.tp - 1, 0, -1) if plan.tp % tp == 0]
    if plan.mode is Mode.BLOCK:
        for square in SQUARES:
            if square != plan.block and not seen.problems(replace(target, block=square)):
                return f"--block-size {square}"
        if some is not None:
            return some
        for tp in smaller:
            for same in dict.fromkeys((plan.block, *SQUARES)):
                if not seen.problems(replace(target, block=same, tp=tp)):
                    return f"--block-size {same} --tp {tp}"
    each = replace(target, mode=Mode.PER_TENSOR, block=None)
    for tp in (plan.tp, *smaller):
        if not seen.problems(replace(each, tp=tp)):
            mode = "" if plan.mode is Mode.PER_TENSOR else "--mode per-tensor"
            size = f"--tp {tp}" if tp != plan.tp else ""
            return f"{mode} {size}".strip()
    if many is not None:
        return many
    if plan.backend == "vllm" and not seen.problems(replace(target, backend="sglang")):
        return "--backend sglang"
    return NOTHING


def _ignoring(plan: Plan, seen: Survey, target: Target) -> tuple[str | None, str | None]:
    """Return the rules that keep what does not fit: where that is little, and in any case."""
    bad = {
        (shape.role, shape.shape)
        for shape in seen.shapes
        if fitting.broken(shape, seen.heads, target.mode, target.block, target.tp, target.backend)
    }
    mine = [linear for linear in seen.dense if (linear.role, linear.shape) in bad]
    if not mine or any(role.expert for role, _ in bad):
        return None, None
    # What is built as one stays as one.
    beside: dict[str, list[Linear]] = {}
    for one in seen.dense:
        beside.setdefault(_parent(one.name), []).append(one)
    names: set[str] = set()
    for linear in mine:
        names.update(fusing.partners(linear, beside[_parent(linear.name)], target.backend))
    words = _as_rules(names, seen)
    keep = (*plan.keep, *words)
    try:
        kept = survey(seen.checkpoint, keep, plan.quantize)
    except Fp8ctlError:
        return None, None
    if kept.problems(target):
        return None, None
    text = " ".join(f"--keep {shlex.quote(rule)}" for rule in words)
    sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in seen.dense}
    total = sum(shape.count * shape.shape[0] * shape.shape[1] for shape in seen.shapes)
    few = sum(sizes[name] for name in names) <= _FEW * total
    return (text if few else None), text


def _mended_rules(plan: Plan, seen: Survey, target: Target) -> str:
    """Return the rules to add, or to leave out, so that engines can build the model."""
    kept = {linear.name for linear in seen.kept}
    beside: dict[str, list[Linear]] = {}
    for one in (*seen.dense, *seen.kept):
        beside.setdefault(_parent(one.name), []).append(one)
    together: set[str] = set()
    for linear in seen.kept:
        together.update(fusing.partners(linear, beside[_parent(linear.name)], target.backend))
    words = _as_rules(together - kept, seen)
    for keep in ((*plan.keep, *words),) if words else ():
        if not survey(seen.checkpoint, keep, plan.quantize).problems(target):
            return " ".join(f"--keep {shlex.quote(rule)}" for rule in words)
    # A rule that no engine honours: the fewest left out that help.
    for rule in plan.keep:
        fewer = tuple(one for one in plan.keep if one != rule)
        if not survey(seen.checkpoint, fewer, plan.quantize).problems(target):
            return f"leave --keep {shlex.quote(rule)} out"
    if plan.keep and not survey(seen.checkpoint, (), plan.quantize).problems(target):
        return "leave every --keep out"
    return NOTHING


def _parent(name: str) -> str:
    """Return the module that holds a Linear's module."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _as_rules(names: set[str], seen: Survey) -> tuple[str, ...]:
    """Return few rules that mean exactly these tensors."""
    patterns: dict[str, list[str]] = {}
    for name in seen.decisions:
        patterns.setdefault(NUMBER.sub("*", name), []).append(name)
    rules: list[str] = []
    for pattern, all_of_it in patterns.items():
        wanted = [name for name in all_of_it if name in names]
        if len(wanted) > 1 and len(wanted) == len(all_of_it):
            rules.append(pattern.removesuffix(".weight"))
        else:
            rules.extend(name.removesuffix(".weight") for name in wanted)
    return tuple(_shortened(rules, names, seen))


def _shortened(rules: Sequence[str], names: set[str], seen: Survey) -> Iterator[str]:
    """Yield a module in place of rules for all that becomes FP8 in it."""
    inside: dict[str, list[str]] = {}
    for rule in rules:
        inside.setdefault(rule.rpartition(".")[0], []).append(rule)
    for module, own in inside.items():
        linears = [
            name
            for name, decision in seen.decisions.items()
            if decision.quantize and name.startswith(module + ".")
        ]
        whole = len(own) > 1 and "*" not in module and set(linears) <= names
        yield from (module,) if whole else own
