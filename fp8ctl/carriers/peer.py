"""Buckets from one GPU of a host to another by its copy engine: the rank pulls them itself.

For a group of a trainer and one rank. NCCL's broadcast is a kernel: it shares the device with
those that fill the next bucket, and each takes from the other. A copy engine does nothing else,
and is a little faster even where nothing else runs. So the trainer lends its slots; the rank opens
them once, copies each bucket out of its slot when it is told that it may, and says when it has it.

What stands in the way is no error: NCCL carries the bytes then, and the trainer's user is told why.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import driver, exported, offers, turns
from fp8ctl.carriers.exported import Exported, Opened
from fp8ctl.carriers.sent import Launched
from fp8ctl.errors import CarrierError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: "1" in the environment of either: by NCCL, also where a rank could pull.
NCCL_ONLY = "FP8CTL_PUSH_NCCL"
#: "1" on either side: NCCL's own word for hosts whose GPUs do not reach each other as they say.
NO_PEERS = "NCCL_P2P_DISABLE"
#: What the trainer says where it would say how an NCCL group is called.
GO = "peer"
#: Seconds that copies may take to end.
_LEAVING = 10.0


#: What may be read until this process ends.
_KEPT: list[list[torch.Tensor]] = []


class Lender:
    """The trainer's end: slots that a rank pulls from; see `ahead.Backend`."""

    pulled = True

    def __init__(self, nbytes: int, count: int, device: torch.device) -> None:
        """Allocate the slots.

        Raises:
            CarrierError: this process cannot have such.
        """
        self._boot_id = offers.boot_id()
        self._exported = Exported(nbytes, count, device)

    @property
    def slots(self) -> list[torch.Tensor]:
        """A tensor of each: this very list holds the memory, `close` leaves it alone."""
        return self._exported.slots

    def offer(self) -> dict[str, Any]:
        """Return what `puller` reads."""
        return {**self._exported.offer(), "boot_id": self._boot_id}

    def broadcast(
        self, _tensor: torch.Tensor, _after: Any, _deadline: float, _check: Callable[[], None]
    ) -> Launched:
        """Do nothing: the rank was told."""
        return Launched(_over)

    def warm(self) -> None:
        """Do nothing: it is the rank that copies."""

    def keep(self) -> None:
        """Never give the memory back: a rank that did not leave in time may still read it."""
        _KEPT.append([*self.slots])

    def close(self) -> None:
        """Do nothing: the rank copies nothing more when its connection has ended."""


class Puller:
    """The rank's end: copies what the trainer lends; see `ahead.Backend`."""

    pulled = True

    def __init__(
        self,
        opened: Opened,
        slots: Sequence[torch.Tensor],
        spare: torch.Tensor,
        device: torch.device,
    ) -> None:
        """Launch nothing yet.

        Args:
            opened: the trainer's slots.
            slots: this rank's own, in the same order.
            spare: a byte of this rank's, which nobody reads.
            device: where those are, with its index.
        """
        self._opened, self._device = opened, device
        self._numbers = {slot.data_ptr(): number for number, slot in enumerate(slots)}
        cuda: Any = torch.cuda
        # Its own stream: nothing of the engine stands behind a copy.
        self._stream = cuda.Stream(device)
        self._spare = spare

    def broadcast(
        self, tensor: torch.Tensor, after: Any, _deadline: float, _check: Callable[[], None]
    ) -> Launched:
        """Launch the copy into one of the slots, or its first bytes, behind those before.

        Args:
            tensor: the whole of it.
            after: an event of this device that comes first; None: nothing does.

        Raises:
            ConflictError: the driver failed.
        """
        cuda: Any = torch.cuda
        done = cuda.Event()
        with torch.cuda.device(self._device):
            if after is not None:
                self._stream.wait_event(after)
            if tensor.numel():
                try:
                    number = self._numbers[tensor.data_ptr()]
                    self._opened.copy(number, tensor, self._stream)
                except CarrierError as e:
                    raise ConflictError(f"the copy from the trainer's GPU: {e.message}") from e
            done.record(self._stream)

        def over() -> bool:
            return bool(done.query())

        return Launched(over, done)

    def warm(self) -> None:
        """Copy a byte, whatever it is: the first copy after a rest takes the driver 0.6 ms."""
        with contextlib.suppress(CarrierError), torch.cuda.device(self._device):
            self._opened.copy(0, self._spare, self._stream)

    def close(self) -> None:
        """Close the handles, when what was launched is over."""
        if not self._opened.slots:
            return
        began = time.monotonic()
        with contextlib.suppress(RuntimeError):  # a device that has failed does nothing any more
            while not self._stream.query() and time.monotonic() - began < _LEAVING:
                turns.nap(began)
        self._opened.close()


def lender(nbytes: int, count: int, device: torch.device, world: int) -> Lender | str:
    """Return slots for a rank to pull from; or why it cannot: "" where that is no matter of choice.

    Args:
        nbytes: of a slot.
        count: of slots.
        device: of the trainer.
        world: how many are in the group, the trainer included.
    """
    if device.type != "cuda" or world != 2:
        return ""
    if name := _unwanted():
        return f"{name}=1 in the trainer's environment"
    try:
        return Lender(nbytes, count, device)
    except CarrierError as e:
        return f"the trainer's memory cannot be lent: {e.message}"


def puller(
    offer: Mapping[str, Any], slots: Sequence[torch.Tensor], device: torch.device
) -> Puller | str:
    """Open the slots that a trainer lends; or return why they cannot be opened.

    As many as this rank has: those that are too many may be given back before it is told.

    Args:
        offer: of the group; "peer" is what `Lender.offer` returned.
        slots: this rank's own.
        device: where those are.

    Raises:
        WireError: what is lent is not said as it should be.
    """
    if "peer" not in offer or device.type != "cuda":
        return ""
    if name := _unwanted():
        return f"{name}=1 in the server's environment"
    lent, device = offers.take(offer, "peer", dict), exported.with_index(device)

    def reaches(index: int) -> bool:
        return torch.cuda.can_device_access_peer(device, index)

    try:
        theirs = exported.offered(lent)[: len(slots)]
        alike = [nbytes for _, nbytes, _ in theirs] == [len(slot) for slot in slots]
        if not alike:
            return "the server's slots have other sizes"
        if why := hindrance(lent, offers.boot_id(), driver.uuids(), device.index, reaches):
            return why
        # Before they are opened: that waits for whatever used this memory.
        [spare] = offers.allocate([1], device)
        return Puller(Opened(theirs, device), slots, spare, device)
    except CarrierError as e:
        return f"the server cannot open the trainer's memory: {e.message}"


def hindrance(
    lent: Mapping[str, Any],
    boot_id: str,
    visible: Sequence[str],
    own: int,
    reaches: Callable[[int], bool],
) -> str:
    """Return why a rank need not try to pull from a trainer's device; "" where it may be able to.

    One that this process does not see may be opened all the same; the driver knows then whether
    both reach each other. A rank on the trainer's own device has no use for a copy.

    Args:
        lent: what `Lender.offer` returned.
        boot_id: of this host.
        visible: the UUIDs of the devices that this process sees.
        own: which of them is the rank's.
        reaches: says whether that one reaches another's memory.

    Raises:
        WireError: the offer does not say it.
    """
    uuid = offers.take(lent, "device", str)
    if offers.take(lent, "boot_id", str) != boot_id:
        return "the server is on another host"
    if visible[own] == uuid:
        return "the server is on the trainer's own GPU"
    if uuid in visible and not reaches(list(visible).index(uuid)):
        return "the server's GPU does not reach the memory of the trainer's"
    return ""


def _unwanted() -> str:
    """Return the variable that says so; "" for none."""
    return next((name for name in (NCCL_ONLY, NO_PEERS) if os.environ.get(name) == "1"), "")


def _over() -> bool:
    return True
