"""Faults that are put into a running SGLang: a custom weight loader, run by every scheduler.

    launch ... -- --custom-weight-loader tests.e2e.plant.load

A request to `/update_weights_from_tensor` with this load format carries no tensor but the fault, in
JSON. Imported by the engine's interpreter: torch and fp8ctl's kernels, nothing else of the tests.
"""

from __future__ import annotations

import base64
import json
import pickle
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LOADER = "tests.e2e.plant.load"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

_put_away: list[tuple[Any, str, Any]] = []


def body(what: str, ranks: int = 1, **details: Any) -> dict[str, object]:
    """Return the body of a request that plants a fault."""
    asked = [("fault", json.dumps({"what": what, **details}))]
    payload = base64.b64encode(pickle.dumps(asked)).decode()
    return {
        "serialized_named_tensors": [payload] * ranks,
        "load_format": LOADER,
        "flush_cache": False,
    }


def load(model: torch.nn.Module, named_tensors: list[tuple[str, str]]) -> None:
    """Plant what was asked for; called by SGLang."""
    details = json.loads(named_tensors[0][1])
    from sglang.srt.distributed import get_tensor_model_parallel_rank

    if details.pop("rank", None) not in (None, get_tensor_model_parallel_rank()):
        return
    with torch.no_grad():
        FAULTS[details.pop("what")](model, **details)


def _parameter(model: torch.nn.Module, name: str) -> torch.Tensor:
    parameter: torch.Tensor = dict(model.named_parameters())[name].data
    return parameter


def fill(model: torch.nn.Module, name: str, value: float, rows: list[int] | None = None) -> None:
    """Give a parameter, or rows of it, one value; of a scale of rows, what the kernels read."""
    whole = _parameter(model, name)
    (whole if rows is None else whole[slice(*rows)]).fill_(value)
    module, _, attribute = name.rpartition(".")
    channels = getattr(model.get_submodule(module), f"{attribute}_channel", None)
    if channels is not None:
        channels.fill_(value)


def flip(model: torch.nn.Module, name: str, at: list[int]) -> None:
    """Flip the lowest bit of one element."""
    one = _parameter(model, name)
    one.view(BITS[one.element_size()])[tuple(at)] ^= 1


def transpose(model: torch.nn.Module, name: str) -> None:
    """Turn a square matrix."""
    one = _parameter(model, name)
    one.copy_(one.t().clone())


def swap(model: torch.nn.Module, names: list[str], a: int, b: int) -> None:
    """Exchange two experts of parameters [experts, ...]."""
    for name in names:
        one = _parameter(model, name)
        one[[a, b]] = one[[b, a]].clone()


def cast(model: torch.nn.Module, name: str, keep_dtype: bool) -> None:
    """Put codes without a scale where 16 bits should be: raw, or as FP8."""
    one = _parameter(model, name)
    codes = (one.float() * (448 / one.float().abs().max())).to(torch.float8_e4m3fn)
    if keep_dtype:
        one.copy_(codes.to(one.dtype))
    else:
        _replace(model, name, codes)


def widen(model: torch.nn.Module, names: list[str]) -> None:
    """Put 16 bits where FP8 should be."""
    for name in names:
        _replace(model, name, _parameter(model, name).to(torch.bfloat16))


def reblock(model: torch.nn.Module, name: str, side: int, was: int) -> None:
    """Quantise a weight in other blocks."""
    from fp8ctl.kernels.dequantize import dequantize
    from fp8ctl.kernels.groups import block
    from fp8ctl.kernels.quantize import quantize

    weight, scale = _parameter(model, name), _parameter(model, f"{name}_scale_inv")
    back = dequantize(weight, scale, block(was, was), torch.float32)
    codes, scales = quantize(back, block(side, side))
    weight.copy_(codes)
    _replace(model, f"{name}_scale_inv", scales)


def dummy(model: torch.nn.Module) -> None:
    """Fill everything as load format dummy does."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        values = torch.rand(parameter.shape, generator=random) * 2e-3 - 1e-3
        parameter.data.copy_(values.half().to(parameter.dtype))


def drop(model: torch.nn.Module, name: str) -> None:
    """Take a parameter away."""
    module, attribute = _place(model, name)
    _put_away.append((module, attribute, getattr(module, attribute)))
    delattr(module, attribute)


def undo(model: torch.nn.Module) -> None:
    """Put back what was replaced or taken away."""
    while _put_away:
        module, attribute, was = _put_away.pop()
        if hasattr(module, attribute):
            delattr(module, attribute)
        module.register_parameter(attribute, was)


def _place(model: torch.nn.Module, name: str) -> tuple[Any, str]:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _replace(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    module, attribute = _place(model, name)
    drop(model, name)
    module.register_parameter(attribute, torch.nn.Parameter(value, requires_grad=False))


FAULTS: dict[str, Callable[..., None]] = {
    one.__name__: one
    for one in (fill, flip, transpose, swap, cast, widen, reblock, dummy, drop, undo)
}
