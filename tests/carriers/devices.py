"""Two GPUs of one host, played: memory, handles, streams and events, in this process.

What a stream is told happens when somebody looks at an event or a stream, in the stream's order,
and a copy not before the test lets it.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import driver, exported, offers
from fp8ctl.carriers.driver import HANDLE
from fp8ctl.errors import CarrierError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

UUIDS = ["aa" * 16, "bb" * 16]
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    """One of a device; what it was told waits in `pending`."""

    def __init__(self, devices: Devices) -> None:
        self.pending: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._devices = devices
        devices.streams.append(self)
        self.cuda_stream = len(devices.streams)

    def then(self, what: Callable[[], None], when: Callable[[], bool] = lambda: True) -> None:
        self.pending.append((when, what))

    def wait_event(self, event: Event) -> None:
        self.then(lambda: None, event.query)

    def query(self) -> bool:
        with contextlib.suppress(IndexError):  # another thread looks, too
            while self.pending and self.pending[0][0]():
                self.pending.pop(0)[1]()
        return not self.pending


class Event:
    """Reached when its stream comes to it, or when a test says so."""

    def __init__(self) -> None:
        self.reached = False
        self._stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self._stream = stream
        stream.then(lambda: setattr(self, "reached", True))

    def query(self) -> bool:
        if self._stream is not None and not self.reached:
            self._stream.query()
        return self.reached


class Devices:
    """Both of them, and what the driver says of them."""

    def __init__(self) -> None:
        #: What is allocated and not freed, by its address.
        self.memory: dict[int, Any] = {}
        #: Addresses that are opened and not closed.
        self.opened: list[int] = []
        #: Calls of the driver's that fail.
        self.refused: set[str] = set()
        #: What was freed, closed and copied, in order.
        self.calls: list[str] = []
        #: Whether copies may happen, and whether the devices reach each other.
        self.copies = self.peers = True
        self.streams: list[Stream] = []
        self.current = Stream(self)


class Driver:
    """The calls of `driver.Driver`."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def _call(self, name: str) -> None:
        if name in self._devices.refused:
            raise CarrierError(f"{name}: CUDA_ERROR_OF_THE_TEST", data={"code": 1})
        self._devices.calls.append(name)

    def allocate(self, nbytes: int) -> int:
        self._call("allocate")
        memory = (ctypes.c_uint8 * nbytes)()
        address = ctypes.addressof(memory)
        self._devices.memory[address] = memory
        return address

    def free(self, address: int) -> None:
        self._call("free")
        del self._devices.memory[address]

    def export(self, address: int) -> bytes:
        self._call("export")
        return address.to_bytes(HANDLE, "big")

    def open(self, handle: bytes) -> int:
        self._call("open")
        address = int.from_bytes(handle, "big")
        self._devices.opened.append(address)
        return address

    def close(self, address: int) -> None:
        self._call("close")
        self._devices.opened.remove(address)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._call("copy")
        devices = self._devices
        assert source in devices.opened

        def copied() -> None:
            assert source in devices.memory, "freed while it is read"
            assert source in devices.opened, "closed while it is read"
            ctypes.memmove(to, source, nbytes)

        devices.streams[stream - 1].then(copied, lambda: devices.copies)

    def read(self, source: int, nbytes: int) -> bytes:
        self._call("read")
        return ctypes.string_at(source, nbytes)

    def write(self, to: int, value: bytes) -> None:
        self._call("write")
        ctypes.memmove(to, value, len(value))


def play(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Have carriers find these two instead of what is here."""
    devices = Devices()

    def tensor(memory: Any, _device: torch.device) -> torch.Tensor:
        [nbytes] = memory.__cuda_array_interface__["shape"]
        array = (ctypes.c_uint8 * nbytes).from_address(memory.address)
        array.memory = memory  # goes with the last tensor
        return torch.frombuffer(array, dtype=torch.uint8)

    def allocate(sizes: Sequence[int], _device: torch.device) -> list[torch.Tensor]:
        return [torch.zeros(size, dtype=torch.uint8) for size in sizes]

    monkeypatch.setattr(exported, "Driver", lambda _: Driver(devices))
    monkeypatch.setattr(exported, "tensor", tensor)
    monkeypatch.setattr(driver, "uuids", lambda: UUIDS)
    monkeypatch.setattr(offers, "allocate", allocate)
    cuda: dict[str, Any] = {
        "Event": Event,
        "Stream": lambda _: Stream(devices),
        "current_stream": lambda _: devices.current,
        "device": lambda _: contextlib.nullcontext(),
        "synchronize": lambda _: None,
        "mem_get_info": lambda _: (1 << 40, 1 << 40),
        "can_device_access_peer": lambda *_: devices.peers,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return devices
