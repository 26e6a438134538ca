"""`fp8ctl plan`: what would be quantised, why, and whether the engine will take it.

Reads config.json and headers; no weights, no GPU. The block that is chosen when
none is asked for is the largest square that fits.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8ctl import fitting, models, policy
from fp8ctl.errors import NotPermittedError, PlanDoesNotFitError, UnsupportedError, UsageError
from fp8ctl.fitting import SQUARES, Heads, Linear
from fp8ctl.formats import BlockSize, Mode, parse_mode
from fp8ctl.manifest import Plan, PlannedTensor, Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from fp8ctl.fitting import Module
    from fp8ctl.models import Checkpoint
    from fp8ctl.policy import Backend, Family, Role
    from fp8ctl.render import Reporter

__all__ = ["Plan", "make_plan", "require_fit", "run"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def make_plan(
    model: Path,
    backend: Backend | None,
    mode: Mode,
    tp: int = 1,
    block_size: BlockSize | None = None,
) -> Plan:
    """Plan the model in `model`; a plan that does not fit says so in `problems`.

    Args:
        model: a checkpoint's folder.
        backend: whose rules to apply; None for those of both engines.
        mode: of the scales.
        tp: tensor-parallel size that must fit.
        block_size: in block mode; None takes the largest of 128, 64 and 32 that fits.

    Raises:
        CheckpointError: the folder is not a model's, or is broken.
        UnsupportedError: the model is quantised already, or has no Linear known here.
        UsageError: a block size outside block mode, or a tp below 1.
    """
    if tp < 1:
        raise UsageError(f"tensor-parallel size {tp} is not positive", hint="--tp 1")
    if block_size is not None and mode is not Mode.BLOCK:
        raise UsageError(
            f"--block-size {block_size} has no meaning in {mode.value} mode", hint="--mode block"
        )
    checkpoint = models.read_checkpoint(model)
    _require_16_bit(checkpoint)
    family = policy.family_of(checkpoint.config)
    tensors, each = _decide(checkpoint, family)
    linears = _by_shape(each)
    model_type = str(checkpoint.config.get("model_type", "unknown"))
    if not linears:
        raise UnsupportedError(
            f"{model}: no Linear of a decoder layer found (model_type {model_type})",
            hint="fp8ctl quantises decoder-only language models in the Hugging Face layout",
        )
    heads = Heads.of(checkpoint.config)
    rejected: list[tuple[BlockSize, tuple[Problem, ...]]] = []
    block, problems = None, fitting.problems(linears, heads, mode, None, tp, backend)
    if mode is Mode.BLOCK:
        for square in (block_size,) if block_size is not None else SQUARES:
            block, problems = square, fitting.problems(linears, heads, mode, square, tp, backend)
            if not problems:
                break
            rejected.append((square, problems))
        else:
            # None fits: the plan is the first choice, with what is wrong with it.
            block, problems = rejected[0]
            rejected = rejected[1:]
    modules = fitting.modules(each, heads, tp)
    notes = list(fitting.notes(linears, modules, mode, block, backend))
    if not policy.known(family):
        notes.insert(
            0,
            f"architecture {model_type} is not one that fp8ctl knows by structure:"
            " Linears were told by their names",
        )
    return Plan(
        model=model,
        model_type=model_type,
        family=family.name,
        backend=backend,
        mode=mode,
        tp=tp,
        block=block,
        tensors=tensors,
        problems=problems,
        rejected=tuple(rejected),
        notes=tuple(notes),
    )


def engine_modules(checkpoint: Checkpoint, names: Collection[str], tp: int) -> tuple[Module, ...]:
    """Return the shapes that an engine's kernels see of these tensors on one of `tp` GPUs.

    Args:
        checkpoint: in 16 bits or in FP8.
        names: of its Linears that are, or will be, in FP8.
        tp: tensor-parallel size.
    """
    family = policy.family_of(checkpoint.config)
    linears = []
    for name in names:
        n, k = checkpoint.tensors[name].shape
        role = policy.decide(family, name, (n, k)).role
        if role is not None:
            linears.append(Linear(name, 1, (n, k), role))
    return fitting.modules(linears, Heads.of(checkpoint.config), tp)


def require_fit(plan: Plan) -> None:
    """Raise if the plan does not fit, with the smallest change that does.

    Raises:
        PlanDoesNotFitError: the first problem, how many there are, and the plan as data.
    """
    if plan.fits:
        return
    first = plan.problems[0]
    more = f" (and {len(plan.problems) - 1} more)" if len(plan.problems) > 1 else ""
    form = f"blocks of {plan.block.label}" if plan.block is not None else plan.mode.value
    raise PlanDoesNotFitError(
        f"{form} do not fit {plan.model.name} at tp {plan.tp}:"
        f" {first.tensor}: {first.message}{more}",
        hint=_smallest_change(plan),
        data=plan.to_json(),
    )


def run(
    report: Reporter,
    *,
    model: str,
    backend: str,
    mode: str,
    tp: int,
    block_size: str | None,
    out: Path | None,
    snippet: str | None = None,
) -> dict[str, object]:
    """Plan, print a table or a snippet, write the manifest to `out`; exit 8 if it does not fit."""
    from fp8ctl import snippets
    from fp8ctl.environment import parse_backend
    from fp8ctl.interpreter import resolve_model

    engine = parse_backend(backend)
    form = parse_mode(mode)
    block = None if block_size is None else BlockSize.parse(block_size)
    if snippet is not None:
        snippets.engine_of(snippet, engine)
    plan = make_plan(resolve_model(report, model), engine, form, tp, block)
    if snippet is None:
        show(report, plan)
    if out is not None:
        try:
            out.write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as e:
            raise NotPermittedError(
                f"cannot write {out}: {e.strerror}", hint="--out /a/folder/you/own/plan.json"
            ) from e
        report.say(f"wrote {out}")
    require_fit(plan)
    if snippet is None:
        return plan.to_json()
    from fp8ctl.settings import Settings

    text = Settings.from_plan(plan).snippet(snippet)
    for note in plan.notes:
        report.warn(note)
    report.data(text.rstrip("\n"))
    return {**plan.to_json(), "snippet": text}


def show(report: Reporter, plan: Plan) -> None:
    """Print a plan: one row for all tensors that differ only in layer and expert."""
    from fp8ctl.render import human_bytes

    groups: dict[tuple[str, tuple[int, ...], bool, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        key = (_NUMBER.sub("*", tensor.name), tensor.shape, tensor.quantize, tensor.reason.value)
        groups.setdefault(key, []).append(tensor)
    rows = []
    for (name, shape, quantize, reason), members in groups.items():
        grid = "x".join(map(str, plan.scale_shape(members[0]))) if quantize else ""
        rows.append(
            (
                name,
                str(len(members)),
                "x".join(map(str, shape)),
                "fp8" if quantize else "keep",
                grid,
                human_bytes(sum(tensor.bytes_before for tensor in members)),
                human_bytes(sum(plan.bytes_of(tensor) for tensor in members)),
                reason,
            )
        )
    report.table(("tensor", "count", "shape", "as", "scales", "before", "after", "why"), rows)
    count = sum(1 for _ in plan.quantized)
    for line in explain(plan):
        report.data(line)
    report.data(
        f"{count} of {len(plan.tensors)} tensors become FP8:"
        f" {human_bytes(plan.bytes_before)} -> {human_bytes(plan.bytes_after)}"
    )
    for note in plan.notes:
        report.warn(note)


def explain(plan: Plan) -> list[str]:
    """Return, in a few lines, the format of a plan and why it is that one."""
    engine = plan.backend or "vllm and sglang"
    lines = []
    for block, problems in plan.rejected if plan.fits else ():
        lines.append(f"{block.label} does not fit: {_summary(problems)}")
    verdict = "fits" if plan.fits else f"does not fit: {_summary(plan.problems)}"
    form = plan.mode.value if plan.block is None else f"blocks of {plan.block.label}"
    lines.append(f"{plan.family}, {form}, tp {plan.tp}, {engine}: {verdict}")
    return lines


def _summary(problems: Sequence[Problem]) -> str:
    """Say each different fault once, with the tensors that have it."""
    by_message: dict[str, list[Problem]] = {}
    for problem in problems:
        by_message.setdefault(problem.message, []).append(problem)
    said = []
    for message, group in by_message.items():
        name = group[0].tensor.removesuffix(".weight").rpartition(".")[2]
        others = f" and {len(group) - 1} more" if len(group) > 1 else ""
        said.append(f"{message} ({name}{others}; {sum(p.count for p in group)} tensors)")
    return "; ".join(said)


def _decide(
    checkpoint: Checkpoint, family: Family
) -> tuple[tuple[PlannedTensor, ...], tuple[Linear, ...]]:
    """Decide every tensor; return with them the Linears that become FP8."""
    tensors, linears = [], []
    for name in sorted(checkpoint.tensors, key=_natural):
        info = checkpoint.tensors[name]
        decision = policy.decide(family, name, info.shape, info.dtype)
        tensors.append(
            PlannedTensor(name, info.dtype, info.shape, decision.quantize, decision.reason)
        )
        if decision.role is not None:
            linears.append(Linear(name, 1, (info.shape[0], info.shape[1]), decision.role))
    return tuple(tensors), tuple(linears)


def _by_shape(linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """Return one Linear for all of the same role and shape."""
    seen: dict[tuple[Role, tuple[int, int]], Linear] = {}
    for linear in linears:
        first = seen.setdefault((linear.role, linear.shape), replace(linear, count=0))
        seen[linear.role, linear.shape] = replace(first, count=first.count + 1)
    return tuple(seen.values())


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort layer 10 behind layer 9."""
    return tuple((0, int(p)) if p.isdigit() else (1, p) for p in name.split("."))


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


def _smallest_change(plan: Plan) -> str:
    """Return options under which the model fits, the nearest to what was asked first."""
    squares = [square for square in SQUARES if square != plan.block]
    tps = [plan.tp, *(tp for tp in range(plan.tp - 1, 0, -1) if plan.tp % tp == 0)]
    for tp in tps:
        suffix = f" --tp {tp}" if tp != plan.tp else ""
        if plan.mode is Mode.BLOCK:
            if tp != plan.tp and _fits(plan, Mode.BLOCK, tp, plan.block):
                return f"--block-size {plan.block}{suffix}"
            for square in squares:
                if _fits(plan, Mode.BLOCK, tp, square):
                    return f"--block-size {square}{suffix}"
        if _fits(plan, Mode.PER_TENSOR, tp, None):
            return f"--mode per-tensor{suffix}"
    return "no block, no tensor-parallel size and no mode of fp8ctl fits this model"


def _fits(plan: Plan, mode: Mode, tp: int, block: BlockSize | None) -> bool:
    return make_plan(plan.model, plan.backend, mode, tp, block).fits
