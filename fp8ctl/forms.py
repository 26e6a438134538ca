"""What a plan, or a configuration, makes of the tensors that come: which become FP8, which stay.

Asked by `stream` for every name; knows no tensors' values. Runs in a trainer's interpreter.
Python 3.10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import formats, policy
from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UsageError
from fp8ctl.formats import BlockSize, Mode, RecipeName
from fp8ctl.kernels.groups import PER_TENSOR, Groups, block
from fp8ctl.manifest import Plan
from fp8ctl.wire import ALIGN

if TYPE_CHECKING:
    from collections.abc import Sequence

#: As a plan spells what weights are rounded to; other dtypes stay as they come.
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Form:
    """What becomes of tensors.

    Attributes:
        quantized: says whether a name of this shape becomes FP8; raises where it cannot be.
        names: all that have to come; None: nobody knows.
        dtype: says what a tensor of this name is rounded to; None: nothing.
        recipe: the arithmetic.
        codes: says of which codes a tensor of this name is the scale, where they come as they
            are; "": of none.
        ahead: bytes that are kept free, behind a tensor of this name, for the scale that follows.
    """

    groups: Groups
    mode: Mode
    quantized: Callable[[str, torch.Size], bool]
    names: frozenset[str] | None
    dtype: Callable[[str], torch.dtype | None] = lambda _: None
    recipe: RecipeName = formats.RECIPE
    codes: Callable[[str], str] = lambda _: ""
    ahead: Callable[[str], int] = lambda _: 0


def of_push(plan: Plan | None, dtype: torch.dtype | None) -> Form:
    """Return the form of a push: nothing comes that the plan does not have, but for a tied head.

    Args:
        plan: None: all is kept, under any name.
        dtype: what weights are rounded to before they are quantised; None: as the plan says.
    """
    if plan is None:
        return Form(PER_TENSOR, Mode.PER_TENSOR, lambda name, shape: False, None)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    # A head that does not come may be tied in the engine, too: the server knows.
    names = frozenset(name for name in planned if not name.endswith("lm_head.weight"))
    tie = tied_head(plan)
    if tie is not None:
        planned[tie[0]] = planned[tie[1]]._replace(name=tie[0])

    def quantized(name: str, shape: torch.Size) -> bool:
        one = planned.get(name)
        if one is None:
            raise _stranger(name, plan)
        if tuple(shape) != one.shape:
            raise _misshapen(name, shape, one.shape)
        return one.quantize

    def rounded(name: str) -> torch.dtype | None:
        one = planned[name]
        return dtype if dtype is not None and one.quantize else FLOATS.get(one.dtype)

    groups = _groups(plan.mode, plan.block)
    return Form(groups, plan.mode, quantized, names, rounded, plan.recipe)


def of_made(plan: Plan) -> Form:
    """Return the form of a push of what is in FP8 already: nothing is quantised."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | None] = {}
    codes: dict[str, str] = {}
    ahead: dict[str, int] = {}
    for tensor in plan.tensors:
        shapes[tensor.name] = tensor.shape
        if not tensor.quantize:
            dtypes[tensor.name] = FLOATS.get(tensor.dtype)
            continue
        scale = formats.scale_name(tensor.name, plan.mode)
        shapes[scale] = formats.scale_shape(tensor.shape, plan.mode, plan.block)
        codes[scale] = tensor.name
        ahead[tensor.name] = -(-4 * math.prod(shapes[scale]) // ALIGN) * ALIGN
        ahead[scale] = -ahead[tensor.name]

    def known(name: str, shape: torch.Size) -> bool:
        if name not in shapes:
            raise _stranger(name, plan)
        if tuple(shape) != shapes[name]:
            raise _misshapen(name, shape, shapes[name])
        return False

    return Form(
        _groups(plan.mode, plan.block),
        plan.mode,
        known,
        frozenset(shapes),
        lambda name: dtypes.get(name),
        plan.recipe,
        lambda name: codes.get(name, ""),
        lambda name: ahead.get(name, 0),
    )


def of(plan: Plan | Mapping[str, Any]) -> Form:
    """Return the form of a plan, of its manifest, or of a config.json.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(plan, Mapping) and "quantization_config" in plan:
        return _of_config(plan)
    if isinstance(plan, Mapping):
        plan = Plan.from_json(plan)
    if not isinstance(plan, Plan):
        raise UsageError(
            f"{type(plan).__name__} where a plan or a configuration was expected",
            hint="quantize_weights(named_tensors, fp8ctl.planning.make_plan(...))",
        )
    planned = {tensor.name: tensor for tensor in plan.tensors}
    family = policy.family_of({"model_type": plan.model_type})

    def quantized(name: str, shape: torch.Size) -> bool:
        one = planned.get(name)
        if one is None:
            # A tied head, a buffer: what the policy keeps anyway may come along.
            if policy.decide(family, name, shape).quantize:
                raise _stranger(name, plan)
            return False
        if tuple(shape) != one.shape:
            raise _misshapen(name, shape, one.shape)
        return one.quantize

    groups, names = _groups(plan.mode, plan.block), frozenset(planned)
    return Form(groups, plan.mode, quantized, names, recipe=plan.recipe)


def _stranger(name: str, plan: Plan) -> ConflictError:
    return ConflictError(
        f"{name} is not in the plan of {plan.model.name}",
        hint="give the names of the checkpoint that was planned",
        data={"tensor": name},
    )


def _misshapen(name: str, shape: Sequence[int], planned: tuple[int, ...]) -> PlanDoesNotFitError:
    return PlanDoesNotFitError(
        f"{name} has shape {list(shape)}, planned {list(planned)}",
        hint="plan the model that is trained",
        data={"tensor": name},
    )


def _of_config(config: Mapping[str, Any]) -> Form:
    found = config["quantization_config"]
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if method != "fp8":
        raise UsageError(
            f"quant_method {method!r} in quantization_config; expected 'fp8'",
            hint="give the plan, or the config.json of an FP8 checkpoint",
        )
    sides = found.get("weight_block_size")
    mode = Mode.PER_TENSOR if sides is None else Mode.BLOCK
    size = None if sides is None else BlockSize(int(sides[0]), int(sides[1]))
    family = policy.family_of(config)
    kept = {*found.get("modules_to_not_convert", ()), *found.get("ignored_layers", ())}

    def quantized(name: str, shape: torch.Size) -> bool:
        module = name.removesuffix(".weight")
        return module not in kept and policy.decide(family, name, shape).quantize

    return Form(_groups(mode, size), mode, quantized, None)


def _groups(mode: Mode, size: BlockSize | None) -> Groups:
    return PER_TENSOR if size is None or mode is not Mode.BLOCK else block(size.n, size.k)


def tied_head(plan: Plan) -> tuple[str, str] | None:
    """Return the names of an output head that is its embedding, and of that; None: there is none.

    `lm_head.weight` of a checkpoint that has none: the plan does not list it, and trainers
    give it all the same.
    """
    names = {tensor.name for tensor in plan.tensors}
    if any(name.endswith("lm_head.weight") for name in names):
        return None
    for name in names:
        if name.endswith("model.embed_tokens.weight"):
            return name.removesuffix("model.embed_tokens.weight") + "lm_head.weight", name
    return None
