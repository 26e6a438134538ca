"""What the kernels take, checked before any of them runs.

Every refusal is a TypeError or a ValueError with the value that was found.
Nothing here reads an element of a tensor.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8ctl.kernels.groups import Groups

    Outputs = tuple[torch.Tensor, torch.Tensor]

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODE_DTYPES = (torch.float8_e4m3fn, torch.uint8)  # bytes of a bucket hold codes as well

# Beyond this many steps numpy's exact test for shared memory gives up.
_WORK = 1 << 20


@functools.cache
def has_triton() -> bool:
    """Say whether the GPU kernels can be used at all; triton itself is not imported."""
    return importlib.util.find_spec("triton") is not None


class NonFiniteError(ValueError):
    """The input holds NaN or Inf, which has no FP8 code.

    Attributes:
        index: position of the first such element in row-major order.
        value: the element, as a Python float.
        tensor: position of its tensor in the list that was given, None without a list.
    """

    def __init__(self, index: tuple[int, ...], value: float, tensor: int | None = None) -> None:
        where = "" if tensor is None else f" of tensor {tensor}"
        super().__init__(f"non-finite value {value} at index {list(index)}{where}")
        self.index = index
        self.value = value
        self.tensor = tensor


def check_input(x: torch.Tensor, groups: Groups) -> None:
    """Refuse what no kernel here takes.

    Raises:
        TypeError: not a plain strided tensor of BF16, FP16 or FP32.
        ValueError: the number of dimensions is not 2 where groups have rows and columns.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"cannot quantise {type(x).__name__}; expected a torch.Tensor")
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"cannot quantise {x.dtype}; expected bfloat16, float16 or float32")
    if hasattr(x, "to_local"):
        raise TypeError(
            "cannot quantise a distributed tensor; give its full_tensor() or to_local()"
        )
    if x.is_neg():
        raise TypeError("cannot quantise a view that negates what it reads: give resolve_neg()")
    if x.layout != torch.strided or x.is_meta:
        raise TypeError(f"cannot quantise a {x.layout} tensor on {x.device}; it has no memory")
    if groups.kind != "per-tensor" and x.dim() != 2:
        raise ValueError(f"expected 2 dimensions for {groups} scales, found shape {list(x.shape)}")


def make_outputs(x: torch.Tensor, groups: Groups, out: Outputs | None) -> Outputs:
    """Return the codes and scales to write: new and contiguous, or what the caller gave.

    Raises:
        TypeError: given codes are neither float8_e4m3fn nor uint8, or given scales not FP32.
        ValueError: a given shape or device is another, or an output folds onto itself.
    """
    wanted = groups.scale_shape(x.shape)
    if out is None:
        return (
            torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
            torch.empty(wanted, dtype=torch.float32, device=x.device),
        )
    codes, scales = out
    if codes.dtype not in CODE_DTYPES:
        raise TypeError(f"codes of {codes.dtype}; expected float8_e4m3fn or uint8")
    if scales.dtype != torch.float32:
        raise TypeError(f"scales of {scales.dtype}; expected float32")
    for name, tensor, shape in (("codes", codes, tuple(x.shape)), ("scales", scales, wanted)):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of shape {list(tensor.shape)}; expected {list(shape)}"
                f" for an input of {list(x.shape)}, {groups}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} on {tensor.device}; expected {x.device}, where the input is")
        if folds(tensor):
            raise ValueError(
                f"{name} of strides {list(tensor.stride())} write one place more than once"
            )
    return codes, scales


def check_disjoint(outputs: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor]) -> None:
    """Refuse outputs that share memory with each other or with an input.

    Raises:
        ValueError: two of them do.
    """
    spans = [
        (*span(tensor), written, tensor)
        for written, tensors in ((True, outputs), (False, inputs))
        for tensor in tensors
        if tensor.numel()
    ]
    spans.sort(key=lambda span: span[:2])
    open_: list[tuple[int, bool, torch.Tensor]] = []
    for start, end, written, tensor in spans:
        # Inputs may overlap each other: they are kept apart only from what is written.
        open_ = [one for one in open_ if one[0] > start]
        for _, other_written, other in open_:
            if (written or other_written) and _share(tensor, other):
                kinds = "two outputs" if written and other_written else "an output and an input"
                raise ValueError(
                    f"{kinds} overlap: {list(tensor.shape)} and {list(other.shape)}"
                    f" at {max(start, span(other)[0]):#x}"
                )
        open_.append((end, written, tensor))


def matrices(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return equally shaped tensors as lists of 2-D views, without a copy of any.

    One view each where strides allow it, else one of each part along the first dimension.
    """
    first = tensors[0]
    if first.dim() == 2:
        return [tensors]
    if first.dim() < 2:
        return [tuple(t.view(1, 1) if t.dim() == 0 else t.unsqueeze(0) for t in tensors)]
    try:
        return [tuple(t.view(-1, t.shape[-1]) for t in tensors)]
    except RuntimeError:
        return [one for parts in zip(*tensors, strict=True) for one in matrices(*parts)]


def unravel(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of the element at a row-major position."""
    index: list[int] = []
    for size in reversed(shape):
        position, rest = divmod(position, size)
        index.append(rest)
    return tuple(reversed(index))


def span(t: torch.Tensor) -> tuple[int, int]:
    """Return the addresses between which the elements of `t` lie."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def folds(t: torch.Tensor) -> bool:
    """Say whether two indices of `t` may mean one address: strides must nest like a matrix's."""
    if t.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    import numpy as np

    try:
        work: Any = _WORK  # numpy's own annotation knows two of its values
        return bool(np.shares_memory(_addresses(a), _addresses(b), max_work=work))
    except np.exceptions.TooHardError:
        return True


def _addresses(t: torch.Tensor) -> Any:
    """Return a numpy array with the layout of `t`, for arithmetic on addresses alone."""
    import numpy as np

    class Layout:
        def __init__(self) -> None:
            self.__array_interface__ = {
                "version": 3,
                "typestr": f"|V{t.element_size()}",
                "shape": tuple(t.shape),
                "strides": tuple(stride * t.element_size() for stride in t.stride()),
                "data": (t.data_ptr(), True),
            }

    return np.asarray(Layout())
