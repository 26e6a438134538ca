"""Tensors of a trainer as they are to be read: whole, and where and as what they are quantised.

What is one of many parts is gathered, which all ranks do in the same order; the rest is left as it
is for as long as it can be. Runs in a trainer's interpreter: torch and the standard library. Python
3.10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.course import Step

#: Types that are nothing distributed.
_PLAIN = {torch.Tensor, torch.nn.Parameter}
#: Bytes of a copy that takes longer to launch than to do.
_SMALL = 1 << 20


def whole(
    tensor: torch.Tensor, step: Step, where: torch.device | None, wanted: bool, read: bool
) -> torch.Tensor | None:
    """Return a tensor as it is to be read; on a rank that does not want it, None.

    Args:
        tensor: or a part of one, which other ranks have the rest of: all of them have to ask.
        step: what becomes of it.
        where: it is quantised; None: where it lies.
        wanted: False: this rank gathers for others.
        read: it is given to nobody: what stays as it is is copied, from where it lies.
    """
    if wanted and read and type(tensor) in _PLAIN:
        as_it_is = tensor.device == where and step.rounded in (None, tensor.dtype)
        if as_it_is or not step.fp8:
            return tensor
    moved: Any = tensor.detach()
    if type(tensor) not in _PLAIN and hasattr(moved, "full_tensor"):
        # Shards that are kept on the CPU are gathered where the ranks' group is.
        there = moved.device_mesh.device_type
        if moved.device.type != there:
            moved = moved.to(there)
        moved = moved.full_tensor()
    if not wanted:
        return None
    # To where it is already, and to what it is, takes time as well.
    if where is not None and (step.fp8 or not read) and moved.device != where:
        moved = moved.to(where)
    if step.rounded not in (None, moved.dtype) and moved.is_floating_point():
        moved = moved.to(step.rounded)
    found: torch.Tensor = moved
    return found


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether one tensor is read from where the other lies."""
    return one is other or (type(other) in _PLAIN and one.data_ptr() == other.data_ptr())


def copy(places: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """Copy tensors, the small ones that need not be changed in a launch for each dtype.

    Torch's list of copies is trusted with nothing else: it may take one place's dtype for that of
    all (pytorch #173383), and not every kind of tensor knows it.
    """
    small: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for place, tensor in zip(places, tensors, strict=True):
        alike = place.dtype == tensor.dtype and place.device == tensor.device
        if not alike or place.nbytes > _SMALL or type(tensor) not in _PLAIN:
            place.copy_(tensor)
        elif place.nbytes:
            into, those = small.setdefault(place.dtype, ([], []))
            into.append(place)
            those.append(tensor)
    for into, those in small.values():
        torch._foreach_copy_(into, those)
