"""Memory of a GPU that another process of the host opens: exported here, opened there.

The driver allocates it and makes a handle to it. Behind a slot lie random bytes, which whoever
opens it compares with the offer's.
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
    from collections.abc import Callable, Iterable, Mapping

#: Changes when an offer of such memory does; trainer and engine may have different torch.
VERSION = 1
#: Random bytes behind the slot's own: what was opened is what was offered.
NONCE = 32
#: CUDA does not open a handle in the process that made it.
PROCESS = secrets.token_hex(16)


class Memory:
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


class Exported:
    """Slots of one device of this process, for others to open.

    Attributes:
        device: with its index.
        slots: a tensor of each, uint8; its memory is given back with the last one that uses it.
    """

    def __init__(self, nbytes: int, count: int, device: torch.device) -> None:
        """Allocate them.

        Raises:
            CarrierError: the driver refuses; nothing is kept.
        """
        self.device = with_index(device)
        self.slots: list[torch.Tensor] = []
        self._offered: list[dict[str, object]] = []
        self._uuid = driver.uuids()[self.device.index]
        self._driver = _driver(self.device)
        try:
            for _ in range(count):
                self._add(nbytes)
        except CarrierError as e:
            self.close()
            raise CarrierError(
                f"no {count} slots of {nbytes} bytes on {self.device}: {e.message}",
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
        memory = Memory(address, nbytes, self._driver.free)
        nonce = secrets.token_bytes(NONCE)
        self._driver.write(address + nbytes, nonce)
        handle = self._driver.export(address)
        self._offered.append({"handle": handle.hex(), "nbytes": nbytes, "nonce": nonce.hex()})
        self.slots.append(tensor(memory, self.device))

    def offer(self) -> dict[str, Any]:
        """Return the handles, and what tells whether they can be opened; `offered` reads it."""
        return {
            "version": VERSION,
            "process": PROCESS,
            "device": self._uuid,
            "slots": [dict(one) for one in self._offered],
        }

    def close(self) -> None:
        """Give the memory back, as soon as no tensor uses it."""
        settle(self.device)
        self.slots.clear()


class Opened:
    """Slots of another process, as a device of this one reaches them.

    Attributes:
        slots: the memory of each; its handle is closed with the last tensor that uses it.
    """

    def __init__(self, slots: Iterable[tuple[bytes, int, str]], device: torch.device) -> None:
        """Open what `offered` has read.

        Args:
            slots: handle, size and nonce of each.
            device: of this process, with its index: whose memory they are, or a peer of that one.

        Raises:
            CarrierError: the driver refuses, or it is something else that was opened.
        """
        self.slots: list[Memory] = []
        self._driver = _driver(device)
        try:
            for handle, nbytes, nonce in slots:
                self._open(handle, nbytes, nonce)
        except BaseException:
            self.close()
            raise

    def _open(self, handle: bytes, nbytes: int, nonce: str) -> None:
        address = self._driver.open(handle)
        memory = Memory(address, nbytes, self._driver.close)
        if self._driver.read(address + nbytes, NONCE).hex() != nonce:
            raise CarrierError("what the handle opens is not what was offered: its nonce differs")
        self.slots.append(memory)

    def copy(self, slot: int, to: torch.Tensor, stream: Any) -> None:
        """Copy the first bytes of a slot into all of a tensor, in the order of a stream.

        Raises:
            CarrierError: the driver refuses.
        """
        self._driver.copy(to.data_ptr(), self.slots[slot].address, to.numel(), stream.cuda_stream)

    def close(self) -> None:
        """Close the handles, as soon as no tensor uses them."""
        self.slots.clear()


def offered(offer: Mapping[str, Any]) -> list[tuple[bytes, int, str]]:
    """Return handle, size and nonce of each slot, after a look at the offer's head.

    Raises:
        WireError: it is no offer of such memory.
        CarrierError: it is one of another version, or of this very process.
    """
    if offers.take(offer, "version", int) != VERSION:
        raise CarrierError(
            f"the trainer offers CUDA memory in version {offer['version']}, this server reads"
            f" {VERSION}",
            hint="trainer and server need the same fp8ctl",
        )
    offers.take(offer, "device", str)
    if offers.take(offer, "process", str) == PROCESS:
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


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    with contextlib.suppress(RuntimeError):  # a device that has failed does nothing any more
        torch.cuda.synchronize(device)


def with_index(device: torch.device) -> torch.device:
    """Return a CUDA device by its number; the current one where it has none."""
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def tensor(memory: Memory, device: torch.device) -> torch.Tensor:
    """Return memory as a tensor, without a copy."""
    with torch.cuda.device(device):
        made = torch.as_tensor(memory, device=device)
    if made.data_ptr() != memory.address:
        raise CarrierError(f"torch made a copy of {made.device}'s memory for {device}")
    return made


def _driver(device: torch.device) -> Driver:
    # torch makes the device's context its own way, before the driver is asked for it.
    torch.cuda.synchronize(device)
    return Driver(device.index)
