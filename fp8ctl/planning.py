"""`fp8ctl plan`: what would be quantised, why, and whether the engine will take it.

Reads config.json and headers; no weights, no GPU. The block that is chosen when
none is asked for is the largest square that fits.
"""

from __future__ import annotations

import contextlib
import gc
import re
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fp8ctl import fitting, models, policy
from fp8ctl.errors import CheckpointError, NotPermittedError, PlanDoesNotFitError, UsageError
from fp8ctl.families import ENGINES
from fp8ctl.fitting import HOPPER, SQUARES, Heads, Linear
from fp8ctl.formats import RECIPE, BlockSize, Mode, parse_mode, parse_scale, scale_word
from fp8ctl.manifest import Plan, PlannedTensor, Problem, dumps
from fp8ctl.sizing import Sizer
from fp8ctl.survey import Kind, Survey, Target, survey

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from fp8ctl.families import Backend
    from fp8ctl.fitting import Module
    from fp8ctl.formats import RecipeName
    from fp8ctl.models import Checkpoint, TensorInfo
    from fp8ctl.policy import Decision
    from fp8ctl.render import Reporter

__all__ = ["Plan", "Typed", "make_plan", "plan_checkpoint", "read_plan", "require_fit", "run"]

_GPU = re.compile(r"(\d{1,2})\.(\d)")


def make_plan(
    model: Path,
    backend: Backend | None,
    mode: Mode,
    tp: int = 1,
    block_size: BlockSize | None = None,
    *,
    gpu: tuple[int, int] | None = HOPPER,
    keep: Sequence[str] = (),
    quantize: Sequence[str] = (),
    recipe: RecipeName = RECIPE,
) -> Plan:
    """Plan the model in `model`; a plan that does not fit says so in `problems`.

    Args:
        model: a checkpoint's folder.
        backend: whose rules to apply; None for those of both engines.
        mode: of the scales.
        tp: tensor-parallel size that must fit.
        block_size: in block mode; None takes the largest of 128, 64 and 32 that fits.
        gpu: compute capability of the GPU; None where the engine computes on none.
        keep: rules for what stays, see `selection`.
        quantize: rules for what becomes FP8.
        recipe: the arithmetic of scales and codes.

    Raises:
        CheckpointError: the folder is not a model's, or is broken.
        UnsupportedError: the model is quantised already, or has no Linear known here.
        UsageError: a block size outside block mode, a tp below 1, or a rule that cannot be meant.
    """
    with _no_collections():
        checkpoint = models.read_checkpoint(model)
        return plan_checkpoint(
            checkpoint,
            backend,
            mode,
            tp,
            block_size,
            gpu=gpu,
            keep=keep,
            quantize=quantize,
            recipe=recipe,
        )


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python's collector away from what only grows: it takes 40 % of a large plan's time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def plan_checkpoint(
    checkpoint: Checkpoint,
    backend: Backend | None,
    mode: Mode,
    tp: int = 1,
    block_size: BlockSize | None = None,
    *,
    gpu: tuple[int, int] | None = HOPPER,
    keep: Sequence[str] = (),
    quantize: Sequence[str] = (),
    recipe: RecipeName = RECIPE,
) -> Plan:
    """Plan a checkpoint that was read; otherwise as `make_plan`."""
    plan, _ = _planned(checkpoint, backend, mode, tp, block_size, gpu, keep, quantize, recipe)
    return plan


def _planned(
    checkpoint: Checkpoint,
    backend: Backend | None,
    mode: Mode,
    tp: int,
    block_size: BlockSize | None,
    gpu: tuple[int, int] | None,
    keep: Sequence[str],
    quantize: Sequence[str],
    recipe: RecipeName,
) -> tuple[Plan, Survey]:
    """Return the plan, and what it was made from."""
    if tp < 1:
        raise UsageError(f"tensor-parallel size {tp} is not positive", hint="--tp 1")
    if block_size is not None and mode is not Mode.BLOCK:
        raise UsageError(
            f"--block-size {block_size} has no meaning in {mode.value} mode", hint="--mode block"
        )
    seen = survey(checkpoint, keep, quantize)
    target = Target(backend, mode, block_size, tp, gpu)
    rejected: list[tuple[BlockSize, tuple[Problem, ...]]] = []
    if mode is Mode.BLOCK and block_size is None:
        for square in SQUARES:
            target = replace(target, block=square)
            problems = seen.problems(target)
            if not problems:
                break
            rejected.append((square, problems))
        else:
            # None fits: the plan is the first choice, with what is wrong with it.
            (block, problems), *rejected = rejected
            target = replace(target, block=block)
    else:
        problems = seen.problems(target)
    plan = Plan(
        model=checkpoint.folder,
        model_type=str(checkpoint.config.get("model_type", "unknown")),
        family=seen.family.name,
        backend=backend,
        mode=mode,
        tp=tp,
        block=target.block,
        tensors=tuple([_become(checkpoint.tensors[name], d) for name, d in seen.decisions.items()]),
        problems=problems,
        rejected=tuple(rejected),
        notes=_notes(seen, target),
        gpu=gpu,
        keep=tuple(keep),
        quantize=tuple(quantize),
        memory=Sizer(checkpoint.config, mode, target.block, tp).memory(seen),
        recipe=recipe,
    )
    return plan, seen


def engine_modules(checkpoint: Checkpoint, names: Collection[str], tp: int) -> tuple[Module, ...]:
    """Return the shapes that an engine's kernels see of these tensors on one of `tp` GPUs.

    Experts are left out: their kernel is another one, which takes any block.

    Args:
        checkpoint: in 16 bits or in FP8.
        names: of its Linears that are, or will be, in FP8.
        tp: tensor-parallel size.
    """
    family = policy.family_of(checkpoint.config)
    linears = []
    for name in names:
        n, k = checkpoint.tensors[name].shape
        decision = policy.decide(family, name, (n, k))
        role = policy.loadable(decision, name, (n, k), "BF16")
        if role is not None and not role.expert:
            linears.append(Linear(name, 1, (n, k), role))
    return fitting.modules(linears, Heads.of(checkpoint.config), tp)


def require_fit(plan: Plan) -> None:
    """Raise if the plan does not fit, with the smallest change that does.

    Raises:
        PlanDoesNotFitError: the first problem, how many there are, and the plan as data.
    """
    if plan.fits:
        return
    from fp8ctl import remedy

    first = plan.problems[0]
    more = f" (and {len(plan.problems) - 1} more)" if len(plan.problems) > 1 else ""
    form = f"blocks of {plan.block.label}" if plan.block is not None else plan.mode.value
    raise PlanDoesNotFitError(
        f"{form} do not fit {plan.model.name} at tp {plan.tp}:"
        f" {first.tensor}: {first.message}{more}",
        hint=remedy.smallest_change(plan),
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
    gpu: str | None = None,
    keep: Sequence[str] = (),
    quantize: Sequence[str] = (),
    scale: str | None = None,
) -> dict[str, object]:
    """Plan, print a table or a snippet, write the manifest to `out`; exit 8 if it does not fit."""
    from fp8ctl import snippets
    from fp8ctl.environment import parse_backend
    from fp8ctl.interpreter import resolve_model

    engine = parse_backend(backend)
    form = parse_mode(mode)
    block = None if block_size is None else BlockSize.parse(block_size)
    capability = parse_gpu(gpu)
    recipe = RECIPE if scale is None else parse_scale(scale)
    if snippet is not None:
        snippets.engine_of(snippet, engine)
    with _no_collections():
        checkpoint = models.read_checkpoint(resolve_model(report, model))
        plan, seen = _planned(
            checkpoint, engine, form, tp, block, capability, keep, quantize, recipe
        )
        if snippet is None:
            show(report, plan, seen.kinds)
        # Of a large model it takes as long as the table, and in a terminal nobody reads it.
        document = plan.to_json() if report.json_mode or out is not None else {}
        if out is not None:
            _write(out, document)
            report.say(f"wrote {out}")
    # The process ends soon: what it holds by now need not be looked through for cycles.
    gc.freeze()
    require_fit(plan)
    if snippet is None:
        return document
    from fp8ctl.settings import Settings

    text = Settings.from_plan(plan).snippet(snippet)
    for note in plan.notes:
        report.warn(note)
    report.data(text.rstrip("\n"))
    return {**document, "snippet": text}


def _write(out: Path, document: dict[str, object]) -> None:
    try:
        out.write_text(dumps(document), encoding="utf-8")
    except OSError as e:
        raise NotPermittedError(
            f"cannot write {out}: {e.strerror}", hint="--out /a/folder/you/own/plan.json"
        ) from e


@dataclass(frozen=True, slots=True)
class Typed:
    """What was typed beside `--plan`; None and () where nothing was."""

    backend: Backend | None = None
    mode: Mode | None = None
    tp: int | None = None
    block: BlockSize | None = None
    gpu: tuple[int, int] | None = None
    keep: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    recipe: RecipeName | None = None


def read_plan(path: Path, typed: Typed, model: Path | None = None) -> Plan:
    """Return the plan that `plan --out` wrote, for the model that it was made for.

    Args:
        path: of the manifest.
        typed: options, each of which must say what the plan says.
        model: folder of the model, where it is no longer the plan's own.

    Raises:
        NotFoundError: no file.
        UsageError: no plan, an edited one, or an option that it contradicts.
        CheckpointError: the model is broken, or another one than was planned.
    """
    plan = Plan.read(path)
    pairs: tuple[tuple[str, object, object], ...] = (
        ("--backend", typed.backend, plan.backend or typed.backend),
        ("--mode", typed.mode and typed.mode.value, plan.mode.value),
        ("--tp", typed.tp, plan.tp),
        ("--block-size", typed.block and str(typed.block), str(plan.block)),
        ("--gpu", typed.gpu and _dotted(typed.gpu), _dotted(plan.gpu)),
        ("--keep", typed.keep or None, plan.keep),
        ("--quantize", typed.quantize or None, plan.quantize),
        ("--scale", typed.recipe and scale_word(typed.recipe), scale_word(plan.recipe)),
    )
    for option, asked, planned in pairs:
        if asked is not None and asked != planned:
            raise UsageError(
                f"{option} {_words(asked)} beside --plan {path}, which says {_words(planned)}",
                hint=f"leave {option} out, or plan again",
            )
    plan = plan if model is None else replace(plan, model=model)
    tensors = models.read_checkpoint(plan.model).tensors
    planned = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    found = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    if found != planned:
        different = sorted(name for name, _ in found.items() ^ planned.items())
        raise CheckpointError(
            f"{plan.model} is not the model of {path}: {different[0]} differs"
            f" ({len(set(different))} such)",
            hint=f"fp8ctl plan --model {shlex.quote(str(plan.model))} --backend BACKEND"
            f" --out {shlex.quote(str(path))}",
        )
    return plan


def _dotted(gpu: tuple[int, int] | None) -> str:
    return "none" if gpu is None else f"{gpu[0]}.{gpu[1]}"


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def parse_gpu(text: str | None) -> tuple[int, int] | None:
    """Return the compute capability that `text` names: 9.0 where it is None, none for `none`.

    Raises:
        UsageError: it is no compute capability.
    """
    if text is None:
        return HOPPER
    if text == "none":
        return None
    match = _GPU.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--gpu {text!r} is no compute capability such as 8.9 or 9.0, nor none",
            hint="--gpu 9.0",
        )
    return int(match[1]), int(match[2])


def _become(info: TensorInfo, d: Decision) -> PlannedTensor:
    return PlannedTensor(info.name, info.dtype, info.shape, d.quantize, d.reason, d.rule)


def show(report: Reporter, plan: Plan, kinds: Sequence[Kind]) -> None:
    """Print a plan: one row for all tensors that differ only in layer and expert.

    Args:
        report: where to.
        plan: to print.
        kinds: what it was made of.
    """
    from fp8ctl.render import human_bytes

    # A row is of one shape; its dtypes may differ.
    groups: dict[tuple[str, object], list[tuple[int, PlannedTensor]]] = {}
    for pattern, info, decision, number in kinds:
        tensor = _become(info, decision)
        group = (pattern, (tensor.shape, tensor.quantize, tensor.reason, tensor.rule))
        groups.setdefault(group, []).append((number, tensor))
    rows = []
    before = after = count = 0
    for (pattern, _), members in groups.items():
        one = members[0][1]
        many = sum(number for number, _ in members)
        own = (
            sum(number * tensor.bytes_before for number, tensor in members),
            sum(number * plan.bytes_of(tensor) for number, tensor in members),
        )
        before, after = before + own[0], after + own[1]
        count += many if one.quantize else 0
        rows.append(
            (
                pattern,
                str(many),
                "x".join(map(str, one.shape)),
                "fp8" if one.quantize else "keep",
                "x".join(map(str, plan.scale_shape(one))) if one.quantize else "",
                human_bytes(own[0]),
                human_bytes(own[1]),
                one.why,
            )
        )
    report.table(("tensor", "count", "shape", "as", "scales", "before", "after", "why"), rows)
    for line in explain(plan):
        report.data(line)
    report.data(
        f"{count} of {len(plan.tensors)} tensors become FP8:"
        f" {human_bytes(before)} -> {human_bytes(after)}"
    )
    memory = plan.memory
    report.data(
        f"each of {plan.tp} GPU{'s' if plan.tp > 1 else ''}: weights"
        f" {human_bytes(memory.before)} -> {human_bytes(memory.after)};"
        f" KV cache in 16 bits {human_bytes(memory.cache_per_token)} a token"
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
    if plan.recipe == "ue8m0":
        form += ", scales powers of two"
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


def _notes(seen: Survey, target: Target) -> tuple[str, ...]:
    """Return what a user should know and no rule forbids."""
    notes = []
    if not policy.known(seen.family):
        model_type = seen.checkpoint.config.get("model_type", "unknown")
        notes.append(
            f"architecture {model_type} is not one that fp8ctl knows by structure:"
            " Linears were told by their names"
        )
    lacking = [ENGINES[e] for e in seen.family.missing if target.backend in (None, e)]
    if lacking:
        have = "have" if len(lacking) > 1 else "has"
        notes.append(
            f"{' and '.join(lacking)} {have} no class of {seen.family.name}, so that only a later"
            " version serves it; the rules applied are theirs all the same"
        )
    caught = _caught_by_transformers(seen)
    if caught is not None:
        kept, quantized = caught
        notes.append(
            f"transformers takes {kept} in modules_to_not_convert for a part of {quantized}, and"
            " would not convert that either: engines compare whole names"
        )
    return (*notes, *fitting.notes(seen.shapes, target.mode, target.block, target.backend))


def _caught_by_transformers(seen: Survey) -> tuple[str, str] | None:
    """Return a module that stays and one that becomes FP8 whose name begins with it, or None."""
    beside: dict[str, list[str]] = {}
    for linear in seen.dense:
        path, _, module = linear.name.removesuffix(".weight").rpartition(".")
        beside.setdefault(path, []).append(module)
    kept = policy.kept_modules(
        (name, decision.reason, seen.checkpoint.tensors[name].shape)
        for name, decision in seen.decisions.items()
        if not decision.quantize
    )
    for name in kept:
        path, _, module = name.rpartition(".")
        for other in beside.get(path, ()):
            if other.startswith(module):
                return name, f"{path}.{other}"
    return None
