"""Compiles what a GPU needs for an update while the servers still connect.

Triton compiles a kernel when it is first run on tensors of a kind: for a second or more, in
which an update would keep the servers' gates closed. The same functions are run here on tensors
that are as wide as those of the plan and have few rows: rows are arguments to the kernels,
but for what is left over in the last group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fp8ctl import forms
from fp8ctl.course import Parcel, Placed, Step
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.digest import digests
from fp8ctl.wire import Slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.kernels.groups import Groups
    from fp8ctl.manifest import Plan

Shape = tuple[int, int]
#: Elements of small groups that one program takes, and above which a group is cut (`launch`).
_FEW, _LARGEST = 1 << 12, 1 << 16
#: Rows of what is only digested.
_ROWS = 8


class Kinds(NamedTuple):
    """Small tensors on which the same kernels run as on those of a plan.

    Attributes:
        weights: shapes of what is quantised.
        longer: the same with more rows, so that they take more programs.
        kept: columns and dtype of what is not.
    """

    weights: tuple[Shape, ...]
    longer: tuple[Shape, ...]
    kept: tuple[tuple[int, str], ...]


def kinds(plan: Plan, groups: Groups) -> Kinds:
    """Return the kinds of a plan's tensors."""
    step = 0
    if groups.kind == "block":
        high, wide = groups.sides
        # A power of two of groups lies in one program, one above the other.
        step = high * max(1, _FEW // (_power(high) * _power(wide)))
    weights: dict[Shape, None] = {}
    kept: dict[tuple[int, str], None] = {}
    for tensor in plan.tensors:
        if not tensor.quantize:
            if tensor.shape and tensor.dtype in forms.FLOATS:
                kept[(tensor.shape[-1], tensor.dtype)] = None
            continue
        n, k = tensor.shape
        if groups.kind == "block":
            weights[(n if n <= 2 * step else step + n % step, k)] = None
        else:
            weights[(min(n, 16 + 2 * _LARGEST // max(1, k)), k)] = None
    longer = tuple((n + (step or n), k) for n, k in weights)
    return Kinds(tuple(weights), longer, tuple(kept))


def warm(plan: Plan, dtype: torch.dtype | None, device: torch.device) -> None:
    """Run what an update runs, on small tensors.

    Args:
        plan: of the servers.
        dtype: what weights are rounded to; None: what the plan says.
        device: where buckets are filled.
    """
    form = forms.of_push(plan, dtype)
    found = kinds(plan, form.groups)
    names = {tensor.dtype for tensor in plan.quantized}
    dtypes = [dtype] if dtype is not None else [forms.FLOATS[n] for n in names & set(forms.FLOATS)]
    made: list[torch.Tensor] = []
    for weights in dtypes:
        # Lists of tensors that take equally many programs are a kernel of their own.
        alone: list[list[Shape]] = [[shape] for shape in found.weights]
        for shapes in (*alone, [*found.weights, *found.longer]):
            if shapes:
                made += _quantized(shapes, weights, form, device)
    made += [torch.ones(_ROWS, k, dtype=forms.FLOATS[n], device=device) for k, n in found.kept]
    digests((tensor, 0, 0) for tensor in made)


def _quantized(
    shapes: Sequence[Shape], dtype: torch.dtype, form: forms.Form, device: torch.device
) -> list[torch.Tensor]:
    fp8, scale = "float8_e4m3fn", form.groups.scale_shape
    steps = [
        Step("", dtype, torch.Size(shape), True, None, slots)
        for shape in shapes
        for slots in [(Slot("", fp8, shape), Slot("", "float32", tuple(scale(shape))))]
    ]
    # As in a bucket: what addresses are multiples of counts, too.
    parcel = Parcel(steps)
    memory = torch.empty(parcel.nbytes, dtype=torch.uint8, device=device)
    here = Placed(parcel, memory, 0)
    xs = [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]
    kernels.quantize_many(xs, form.groups, form.recipe, out=here.pairs)
    return here.tensors


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
