"""The few calls of the CUDA driver that a carrier needs, with errors by name.

The driver itself, by ctypes: memory of torch's allocator may lie in segments that cannot be
exported, and its own way to share pickles what another version of torch does not read.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from typing import TYPE_CHECKING, Any

from fp8ctl.errors import CarrierError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY = "libcuda.so.1"
#: Bytes of a handle to memory of another process.
HANDLE = 64
#: What the driver gives memory in; less than this would share a piece with something else.
PIECE = 2 << 20
OUT_OF_MEMORY = 2

_LAZY_PEER_ACCESS = 1

_Pointer = ctypes.c_uint64


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE),)


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * 16),)


class Driver:
    """One device, in torch's own context of it.

    Args:
        ordinal: as torch counts the devices that this process sees.
    """

    def __init__(self, ordinal: int) -> None:
        self._library = load()
        self._device = ctypes.c_int()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(ordinal))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        # After the last memory of it, which holds this object by its way back.
        release = self._library.cuDevicePrimaryCtxRelease_v2
        weakref.finalize(self, release, self._device).atexit = False

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            found = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(found))
            error = found.value.decode() if found.value else f"error {code}"
            raise CarrierError(f"{name}: {error}", data={"code": code})

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context the thread's own for a while."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory."""
        address = _Pointer()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back; waits until the device has done what it was told."""
        with self._current():
            self._call("cuMemFree_v2", _Pointer(address))

    def export(self, address: int) -> bytes:
        """Return a handle by which another process opens the memory."""
        handle = _Handle()
        with self._current():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), _Pointer(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Return the address, here, of another process's memory; of a peer device, too."""
        address = _Pointer()
        found = _Handle.from_buffer_copy(handle)
        with self._current():
            self._call(
                "cuIpcOpenMemHandle_v2",
                *(ctypes.byref(address), found, ctypes.c_uint(_LAZY_PEER_ACCESS)),
            )
        return address.value

    def close(self, address: int) -> None:
        """Give back what `open` returned."""
        with self._current():
            self._call("cuIpcCloseMemHandle", _Pointer(address))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between addresses of this device and its peers, in the order of a stream."""
        with self._current():
            self._call(
                "cuMemcpyAsync",
                *(_Pointer(to), _Pointer(source), ctypes.c_size_t(nbytes)),
                ctypes.c_void_p(stream),
            )

    def read(self, source: int, nbytes: int) -> bytes:
        """Return bytes of the device's memory, or of a peer's."""
        found = ctypes.create_string_buffer(nbytes)
        with self._current():
            self._call("cuMemcpyDtoH_v2", found, _Pointer(source), ctypes.c_size_t(nbytes))
        return found.raw

    def write(self, to: int, value: bytes) -> None:
        """Write bytes to the device's memory."""
        with self._current():
            self._call("cuMemcpyHtoD_v2", _Pointer(to), value, ctypes.c_size_t(len(value)))


def load() -> Any:
    """Return the driver's library.

    Raises:
        CarrierError: this host has none.
    """
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as e:
        raise CarrierError(
            f"no CUDA driver on this host: {e}", hint='a CPU takes shared memory: device="cpu"'
        ) from e


def uuids() -> list[str]:
    """Return the UUID of each device that this process sees, in torch's order.

    Raises:
        CarrierError: there is no driver, or it fails.
    """
    library = load()
    # The second version knows parts of a device (MIG) apart.
    ask = getattr(library, "cuDeviceGetUuid_v2", None) or library.cuDeviceGetUuid
    count = ctypes.c_int()
    found = []
    code = library.cuInit(ctypes.c_uint(0)) or library.cuDeviceGetCount(ctypes.byref(count))
    for ordinal in range(count.value):
        device, uuid = ctypes.c_int(), _Uuid()
        code = code or library.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal))
        code = code or ask(ctypes.byref(uuid), device)
        found.append(bytes(uuid).hex())
    if code:
        raise CarrierError(f"the CUDA driver does not name its devices: error {code}")
    return found
