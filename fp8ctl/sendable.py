"""Whether a checkpoint is what servers of a plan can be sent: its 16-bit form, or its FP8 form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from fp8ctl import formats
from fp8ctl.errors import ConflictError, UnsupportedError
from fp8ctl.manifest import RECORD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.manifest import Plan
    from fp8ctl.models import Checkpoint

# What a trainer's checkpoint may hold besides: `Rollout` drops it.
_UNASKED: Final = ("lm_head.weight", ".rotary_emb.inv_freq")
# Scales of activations, keys and values, which are not pushed.
_STATIC: Final = (".input_scale", ".k_scale", ".v_scale")
_CODES, _SCALES = "F8_E4M3", "F32"


def is_quantized(source: Checkpoint) -> bool:
    """Say whether a checkpoint is in FP8, or quantised in any other way."""
    return bool(source.config.get("quantization_config")) or any(
        one.dtype.startswith("F8") for one in source.tensors.values()
    )


def require(source: Checkpoint, plan: Plan | None) -> None:
    """Refuse a checkpoint that the servers' plan is not of.

    Args:
        source: in 16 or 32 bits, or the FP8 form that the plan makes.
        plan: of the servers; None: they quantise by themselves.

    Raises:
        UnsupportedError: it is quantised, and otherwise than the plan says.
        ConflictError: a tensor is missing, too many, or of another shape.
    """
    if is_quantized(source):
        _require_made(source, plan)
        return
    if plan is None:
        return
    planned = {tensor.name: tensor.shape for tensor in plan.tensors}
    found = {name: one.shape for name, one in source.tensors.items()}
    odd = [name for name in planned if planned[name] != found.get(name)]
    odd += [n for n in found if n not in planned and not n.endswith(_UNASKED)]
    if odd:
        name = odd[0]
        raise ConflictError(
            f"{source.folder} is not the model of the servers' plan: {name} is"
            f" {_shape(found.get(name))}, planned {_shape(planned.get(name))}"
            + (f" ({len(odd)} such)" if odd[1:] else ""),
            hint=f"fp8ctl launch --model {source.folder} serves this one",
            data={"tensors": odd[:20]},
        )


def _require_made(source: Checkpoint, plan: Plan | None) -> None:
    """Refuse codes and scales that are not those of the plan's form."""
    if plan is None:
        raise _other(source, "the servers quantise by themselves, and take 16 bits")
    config: Any = source.config.get("quantization_config") or {}
    wanted: Any = plan.quantization_config()
    for key in ("quant_method", "weight_block_size"):
        if config.get(key) != wanted.get(key):
            raise _other(source, f"{key} is {config.get(key)!r}, planned {wanted.get(key)!r}")
    recipe = _recipe(source)
    if recipe is not None and recipe != plan.recipe:
        raise _other(source, f"its scales are made by recipe {recipe!r}, planned {plan.recipe!r}")
    for name, (dtype, shape) in made_of(plan).items():
        one = source.tensors.get(name)
        if one is None:
            raise _other(source, f"{name} is absent")
        # Others write the scale of a whole tensor without a dimension.
        fits = one.shape == shape or (one.shape, shape) == ((), (1,))
        if dtype and one.dtype != dtype:
            raise _other(source, f"{name} is {one.dtype}, planned {dtype}")
        if (not dtype and one.dtype.startswith("F8")) or not fits:
            raise _other(source, f"{name} is {one.dtype} {list(one.shape)}, planned {list(shape)}")
    made = made_of(plan)
    more = [n for n in source.tensors if n not in made and not n.endswith((*_UNASKED, *_STATIC))]
    if more:
        raise _other(source, f"{more[0]} is not in the plan")


def made_of(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what the FP8 form of a plan holds: dtype and shape by name, codes before scales.

    The dtype of what is kept is "": servers take any float.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in plan.tensors:
        found[tensor.name] = (_CODES if tensor.quantize else "", tensor.shape)
        if tensor.quantize:
            shape = formats.scale_shape(tensor.shape, plan.mode, plan.block)
            found[formats.scale_name(tensor.name, plan.mode)] = (_SCALES, shape)
    return found


def _recipe(source: Checkpoint) -> str | None:
    """Return the recipe by which fp8ctl made a checkpoint; None: it did not, or does not say."""
    try:
        record: Mapping[str, Any] = json.loads((source.folder / RECORD).read_text())
        return str(record["plan"]["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _other(source: Checkpoint, why: str) -> UnsupportedError:
    made = "the 16-bit checkpoint that it was made from"
    here = (source.folder / RECORD).is_file()
    return UnsupportedError(
        f"{source.folder} is quantised already, and not as the servers' plan says: {why}",
        hint=f"--model of {made}" + (f": {RECORD} in it says which" if here else ""),
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
