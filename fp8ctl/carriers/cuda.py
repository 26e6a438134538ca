"""Buckets in the memory of a GPU that a trainer and servers of one host share.

The trainer allocates a slot by the driver and exports a handle to it; each rank opens the
handle once. A rank on the same device reads the slot itself. A rank on a peer device gets a
copy in its own memory, since what engines do with weights stays on one device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import driver, exported, offers
from fp8ctl.carriers.exported import Exported, Opened
from fp8ctl.carriers.sent import Carrier
from fp8ctl.errors import CarrierError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.wire import Kind


class CudaSender:
    """Slots in the memory of this process's GPU; see `ends.Sender`."""

    kind: Kind = "ipc"
    carrier = Carrier("ipc")

    def __init__(self, nbytes: int, slots: int, device: torch.device) -> None:
        self.alive, self.slots = True, slots
        self._exported = Exported(nbytes, slots, device)
        #: What the device does before a slot may be read.
        self._written: list[Any] = [None] * slots

    def offer(self, server: int = 0) -> dict[str, Any]:
        """Return the handles, and what tells whether they can be opened."""
        if not self.alive:
            raise CarrierError("the carrier was closed")
        return {"kind": self.kind, **self._exported.offer()}

    def join(self) -> None:
        """Do nothing: nobody is waited for."""

    def look(self) -> None:
        """Do nothing: ranks come and go."""

    def buffer(self, slot: int) -> torch.Tensor:
        """Return the slot."""
        return self._exported.slots[slot]

    def ready(self, slot: int) -> None:
        """Note what was launched until now."""
        cuda: Any = torch.cuda
        self._written[slot] = event = cuda.Event()
        event.record(cuda.current_stream(self._exported.device))

    def settle(self, slot: int) -> None:
        """Wait until the device has written: no stream reaches into another process."""
        event = self._written[slot]
        if event is not None:
            event.synchronize()

    def send(self, slot: int, nbytes: int) -> None:
        """Do nothing: the ranks read the slot itself."""

    def cancel(self, why: str) -> None:
        """Do nothing: nothing waits."""

    def close(self) -> None:
        """Give the memory back, as soon as no tensor uses it.

        The servers close first: what becomes of memory that is freed while another process
        has it open, CUDA does not say.
        """
        if self.alive:
            self.alive = False
            self._exported.close()


class CudaReceiver:
    """The slots of a trainer's GPU, in one rank; see `ends.Receiver`."""

    def __init__(self, offer: Mapping[str, Any], device: torch.device) -> None:
        slots = exported.offered(offer)
        if device.type != "cuda":
            raise CarrierError(
                f"the weights of this server are on {device}, the trainer's buckets on a GPU",
                hint="trainer and servers all on GPUs, or all on CPUs",
            )
        self._device = exported.with_index(device)
        index = whose(offer["device"], driver.uuids(), self._device.index)
        # Copies in this device's own memory, where the slots are on a peer.
        self._copies: list[torch.Tensor] | None = None
        if index != self._device.index:
            if not torch.cuda.can_device_access_peer(self._device, index):
                raise CarrierError(
                    f"cuda:{self._device.index} cannot read the memory of the trainer's"
                    f" cuda:{index}",
                    hint='via="nccl"',
                )
            sizes = [nbytes for _, nbytes, _ in slots]
            self._copies = offers.allocate(sizes, self._device)
        self._views: list[torch.Tensor] = []
        self._opened = Opened(slots, self._device)
        try:
            if self._copies is None:
                self._views += [exported.tensor(one, self._device) for one in self._opened.slots]
        except BaseException:
            self.close()
            raise

    def bucket(self, slot: int, nbytes: int, *, here: bool = True) -> torch.Tensor:
        """Return the bytes where the trainer wrote them, or a copy of them from a peer."""
        if self._copies is None:
            return offers.part(self._views, slot, nbytes)
        part = offers.part(self._copies, slot, nbytes)
        self._opened.copy(slot, part, torch.cuda.current_stream(self._device))
        return part

    def arrived(self) -> None:
        """Do nothing: bytes are there before a rank is asked."""

    def loaded(self) -> None:
        """Wait until the device has read."""
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Close the handles, as soon as no tensor uses them."""
        if self._opened.slots:
            exported.settle(self._device)
        self._views.clear()
        self._opened.close()
        self._copies = []


def whose(uuid: str, visible: Sequence[str], own: int) -> int:
    """Return which of the visible devices has the slots; the rank's own where it can be.

    Raises:
        CarrierError: this process does not see the device.
    """
    if visible[own] == uuid:
        return own
    if uuid not in visible:
        raise CarrierError(
            f"the trainer's GPU {uuid} is none of this server's: {', '.join(visible)}",
            hint='a server that sees it in CUDA_VISIBLE_DEVICES, or via="nccl" or via="disk"',
        )
    return list(visible).index(uuid)
