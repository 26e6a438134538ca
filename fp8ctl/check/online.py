"""What is known of weights that the engine quantised itself: how, from what, and which. Pure.

`--mode online` has no plan: the engine decides, and rounds in kernels of its own. Both engines,
patched with `refit`, give a scale to every row of what a rank holds, and these are the kernels:

- SGLang 0.4.8, `per_token_group_quant_fp8` with a group of all columns (fp8_kernel.py:128):
  scale = max(amax, 1e-10) / 448, code = x * (1 / scale). On a CPU that is recipe `reciprocal`, bit
  for bit; on a GPU Triton's division is an approximate one.
- vLLM 0.9.1, `dynamic_per_token_scaled_fp8_quant` (csrc/quantization/fp8/common.cu): scale =
  max(amax / 448, 1 / (448 * 512)), code = x / scale, which is recipe `ieee` with a floor of 2^-9.

Called by `weights`; what it makes goes to the worker (`fp8ctl.online`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fp8ctl import planning
from fp8ctl.errors import Fp8ctlError
from fp8ctl.formats import Mode
from fp8ctl.policy import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fp8ctl.families import Backend
    from fp8ctl.held import Held
    from fp8ctl.manifest import Plan

#: By engine, the recipes that its kernel may have followed.
RECIPES: Mapping[Backend, tuple[str, ...]] = {
    "sglang": ("reciprocal",),
    "vllm": ("ieee:floor=0.001953125",),
}


def guess(
    folder: Path, engine: str, ranks: int, held: Mapping[str, Held]
) -> tuple[Plan, dict[str, Any]] | None:
    """Return what the engine should have quantised, and how.

    What it holds in FP8 it has chosen to quantise, but for routers, which no engine should. What
    every engine quantises, the Linears of known architectures, it should hold in FP8.

    Args:
        folder: of the 16-bit checkpoint.
        engine: sglang or vllm.
        ranks: how many share the model.
        held: by all ranks together.

    Returns:
        A plan with a scale for each row, and `online.Kernel` as JSON; None for an engine or a model
        of which this is not known.
    """
    backend = next((name for name in RECIPES if name == engine), None)
    if backend is None:
        return None
    try:
        plan = planning.make_plan(folder, backend, Mode.PER_TENSOR, ranks)
    except Fp8ctlError:
        return None
    tensors = []
    for tensor in plan.tensors:
        one = held.get(tensor.name)
        if one is not None and "float8" in one.dtype and tensor.reason is not Reason.ROUTER:
            reason = tensor.reason if tensor.quantize else Reason.LINEAR
            tensor = tensor._replace(quantize=True, reason=reason)
        tensors.append(tensor)
    plan = replace(
        plan, mode=Mode.PER_CHANNEL, block=None, tensors=tuple(tensors), problems=(), rejected=()
    )
    types = Counter(one.dtype for one in held.values() if one.dtype in ("bfloat16", "float16"))
    kernel = {
        "recipes": list(RECIPES[backend]),
        "parts": {
            tensor.name: one.shape[1]
            for tensor in plan.quantized
            if (one := held.get(f"{tensor.name}_scale")) is not None and len(one.shape) == 2
        },
        "dtype": types.most_common(1)[0][0] if types else "bfloat16",
    }
    return plan, kernel


def shapes(plan: Plan, kernel: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of scales that ranks make of their own columns: one column for each."""
    parts = kernel["parts"]
    return {f"{t.name}_scale": (t.shape[0], parts.get(t.name, 1)) for t in plan.quantized}


def tell(engine: str, device: str, proven: int, near: int) -> str:
    """Return what an fp8-ok says."""
    name = {"sglang": "SGLang", "vllm": "vLLM"}.get(engine, engine)
    told = f"{proven - near} tensors of codes and scales equal what {name}'s own kernel makes of"
    told += " the source, a scale for each row, bit for bit"
    if near:
        told += f"; {near} more within one step of a code, as its division on {device} rounds"
    return told
