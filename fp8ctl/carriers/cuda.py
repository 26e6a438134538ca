"""Buckets in the memory of a GPU that a trainer and servers of one host share.

The trainer allocates a slot by the driver and exports a handle to it; each rank opens the
handle once. A rank on the same device reads the slot itself. A rank on a peer device gets a
copy in its own memory, since what engines do with weights stays on one device.
"""

from __future__ import annotations

import contextlib
import secrets
import weakref
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import driver, offers
from fp8ctl.carriers.driver import HANDLE, Driver
from fp8ctl.errors import CarrierError
from fp8ctl.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8ctl.wire import Kind

#: Changes when an offer of this kind does; trainer and engine may have different torch.
VERSION = 1
#: Random bytes behind the slot's own: what was opened is what was offered.
NONCE = 32
#: CUDA does not open a handle in the process that made it.
_PROCESS = secrets.token_hex(16)


class _Memory:
    """Memory of the driver's as `torch.as_tensor` takes it; given back with the last tensor."""

    def __init__(self, address: int, nbytes: int, give_back: Callable[[int], None]) -> None:
        self.address = address
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }
        # At the end of the process the driver does it.
        weakref.finalize(self, give_back, address).atexit = False


class CudaSender:
    """Slots in the memory of this process's GPU; see `ends.Sender`."""

    kind: Kind = "ipc"

    def __init__(self, nbytes: int, slots: int, device: torch.device) -> None:
        self.alive, self.slots = True, slots
        self._device = _with_index(device)
        self._slots: list[torch.Tensor] = []
        self._offered: list[dict[str, object]] = []
        #: What the device does before a slot may be read.
        self._written: list[Any] = [None] * slots
        self._uuid = driver.uuids()[self._device.index]
        self._driver = _driver(self._device)
        try:
            for _ in range(slots):
                self._add(nbytes)
        except CarrierError as e:
            self.close()
            raise CarrierError(
                f"no {slots} slots of {nbytes} bytes on {self._device}: {e.message}",
                hint='a smaller bucket_bytes, or via="disk"',
            ) from e

    def _add(self, nbytes: int) -> None:
        size = -(-(nbytes + NONCE) // driver.PIECE) * driver.PIECE
        try:
            address = self._driver.allocate(size)
        except CarrierError as e:
            if e.data.get("code") != driver.OUT_OF_MEMORY:
                raise
            torch.cuda.empty_cache()  # what torch keeps for later is not free for others
            address = self._driver.allocate(size)
        memory = _Memory(address, nbytes, self._driver.free)
        nonce = secrets.token_bytes(NONCE)
        self._driver.write(address + nbytes, nonce)
        handle = self._driver.export(address)
        self._offered.append({"handle": handle.hex(), "nbytes": nbytes, "nonce": nonce.hex()})
        self._slots.append(_tensor(memory, self._device))

    def offer(self, server: int = 0) -> dict[str, Any]:
        """Return the handles, and what tells whether they can be opened."""
        if not self.alive:
            raise CarrierError("the carrier was closed")
        return {
            "kind": self.kind,
            "version": VERSION,
            "process": _PROCESS,
            "device": self._uuid,
            "slots": [dict(one) for one in self._offered],
        }

    def join(self) -> None:
        """Do nothing: nobody is waited for."""

    def look(self) -> None:
        """Do nothing: ranks come and go."""

    def buffer(self, slot: int) -> torch.Tensor:
        """Return the slot."""
        return self._slots[slot]

    def ready(self, slot: int) -> None:
        """Note what was launched until now."""
        cuda: Any = torch.cuda
        self._written[slot] = event = cuda.Event()
        event.record(cuda.current_stream(self._device))

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
            _settle(self._device)
            self._slots.clear()


class CudaReceiver:
    """The slots of a trainer's GPU, in one rank; see `ends.Receiver`."""

    def __init__(self, offer: Mapping[str, Any], device: torch.device) -> None:
        slots = offered(offer)
        if device.type != "cuda":
            raise CarrierError(
                f"the weights of this server are on {device}, the trainer's buckets on a GPU",
                hint="trainer and servers all on GPUs, or all on CPUs",
            )
        self._device = _with_index(device)
        index = whose(offer["device"], driver.uuids(), self._device.index)
        # Copies in this device's own memory, where the slots are on a peer.
        self._copies: list[torch.Tensor] | None = None
        self._slots: list[_Memory] = []
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
        self._driver = _driver(self._device)
        try:
            for handle, nbytes, nonce in slots:
                self._open(handle, nbytes, nonce)
        except BaseException:
            self.close()
            raise

    def _open(self, handle: bytes, nbytes: int, nonce: str) -> None:
        address = self._driver.open(handle)
        memory = _Memory(address, nbytes, self._driver.close)
        if self._driver.read(address + nbytes, NONCE).hex() != nonce:
            raise CarrierError("what the handle opens is not what was offered: its nonce differs")
        self._slots.append(memory)
        if self._copies is None:
            self._views.append(_tensor(memory, self._device))

    def bucket(self, slot: int, nbytes: int) -> torch.Tensor:
        """Return the bytes where the trainer wrote them, or a copy of them from a peer."""
        if self._copies is None:
            return offers.part(self._views, slot, nbytes)
        part = offers.part(self._copies, slot, nbytes)
        stream = torch.cuda.current_stream(self._device)
        self._driver.copy(part.data_ptr(), self._slots[slot].address, nbytes, stream.cuda_stream)
        return part

    def loaded(self) -> None:
        """Wait until the device has read."""
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Close the handles, as soon as no tensor uses them."""
        if self._slots:
            _settle(self._device)
        self._views.clear()
        self._slots.clear()
        self._copies = []


def offered(offer: Mapping[str, Any]) -> list[tuple[bytes, int, str]]:
    """Return handle, size and nonce of each slot, after a look at the offer's head.

    Raises:
        WireError: it is no offer of this kind.
        CarrierError: it is one of another version, or of this very process.
    """
    if offers.take(offer, "version", int) != VERSION:
        raise CarrierError(
            f"the trainer offers CUDA memory in version {offer['version']}, this server reads"
            f" {VERSION}",
            hint="trainer and server need the same fp8ctl",
        )
    offers.take(offer, "device", str)
    if offers.take(offer, "process", str) == _PROCESS:
        raise CarrierError(
            "CUDA opens no memory in the process that exports it: trainer and server are one",
            hint="give the tensors to the model itself",
        )
    slots = []
    for one in offers.slots_of(offer):
        try:
            handle = bytes.fromhex(offers.take(one, "handle", str))
        except ValueError:
            handle = b""
        if len(handle) != HANDLE:
            raise WireError(f"carrier: handle is {one['handle']!r}; expected {HANDLE} bytes in hex")
        slots.append((handle, one["nbytes"], offers.take(one, "nonce", str)))
    return slots


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


def _settle(device: torch.device) -> None:
    with contextlib.suppress(RuntimeError):  # a device that has failed does nothing any more
        torch.cuda.synchronize(device)


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _driver(device: torch.device) -> Driver:
    # torch makes the device's context its own way, before the driver is asked for it.
    torch.cuda.synchronize(device)
    return Driver(device.index)


def _tensor(memory: _Memory, device: torch.device) -> torch.Tensor:
    with torch.cuda.device(device):
        tensor = torch.as_tensor(memory, device=device)
    if tensor.data_ptr() != memory.address:
        raise CarrierError(f"torch made a copy of {tensor.device}'s memory for {device}")
    return tensor
