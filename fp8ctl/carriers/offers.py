"""Offers read strictly, and what all carriers refuse alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fp8ctl.errors import CarrierError
from fp8ctl.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")

#: What is allocated without a look at what is free.
LEAST = 2

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def take(offer: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return a field of an offer.

    Raises:
        WireError: it is missing or of another kind; True is no number.
    """
    value = offer.get(key)
    if type(value) is not kind:
        raise WireError(f"carrier: {key} is {value!r}; expected {kind.__name__}")
    return value


def slots_of(offer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the offer's slots, each with a positive `nbytes`.

    Raises:
        WireError: there is none, or one is something else.
    """
    slots = take(offer, "slots", list)
    if not slots or not all(isinstance(one, dict) for one in slots):
        raise WireError(f"carrier: slots is {slots!r}; expected a list of objects")
    for one in slots:
        if take(one, "nbytes", int) < 1:
            raise WireError(f"carrier: a slot of {one['nbytes']} bytes")
    return slots


def count_in(message: Mapping[str, Any]) -> int:
    """Return how many slots a message is of.

    Raises:
        WireError: it does not say, or says none.
    """
    count = take(message, "slots", int)
    if count < 1:
        raise WireError(f"carrier: {count} slots")
    return count


def boot_id() -> str:
    """Return what tells this host, since it was started, from all others.

    Raises:
        CarrierError: it does not say.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError as e:
        raise CarrierError(f"{_BOOT_ID}: {e.strerror or e}", hint='via="disk"') from e


def part(slots: list[torch.Tensor], slot: int, nbytes: int) -> torch.Tensor:
    """Return the first bytes of a slot.

    Raises:
        CarrierError: there is no such slot, or it is smaller; or the carrier was closed.
    """
    if not 0 <= slot < len(slots):
        raise CarrierError(f"slot {slot} of a carrier that has {len(slots)}")
    if not 0 <= nbytes <= len(slots[slot]):
        raise CarrierError(f"a bucket of {nbytes} bytes in a slot of {len(slots[slot])}")
    return slots[slot][:nbytes]


def allocate(sizes: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Return a buffer of each size.

    Raises:
        CarrierError: the device does not have so much memory.
    """
    try:
        return [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in sizes]
    except (RuntimeError, MemoryError) as e:
        raise CarrierError(
            f"no {len(sizes)} slots of {sizes[0]} bytes on {device}: {str(e).splitlines()[0]}",
            hint="a smaller bucket_bytes",
        ) from e


def fitting(sizes: Sequence[int], device: torch.device) -> int:
    """Return how many of these buffers a device has room for beside its work: at least `LEAST`.

    A further one has to leave as much free as one of them takes.
    """
    count = min(len(sizes), LEAST)
    if device.type != "cuda":
        return len(sizes)
    free, _ = torch.cuda.mem_get_info(device)
    while count < len(sizes) and sum(sizes[: count + 1]) + max(sizes) <= free:
        count += 1
    return count


def keep(buffers: list[torch.Tensor], count: int) -> None:
    """Give back the buffers that are too many."""
    device = buffers[0].device
    if count < len(buffers):
        del buffers[count:]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for later is not free for others
