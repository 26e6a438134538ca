"""Broadcasts between GPUs by NCCL itself, the library that torch has loaded.

Not by torch's ProcessGroupNCCL: that one waits without end for a peer that dies while the
group is made, ends the process when a peer dies later, and says so by other names in other
versions of torch. NCCL's own interface is the same from 2.14 on: every call returns at once,
its end is asked for, and what does not end is aborted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import driver, turns
from fp8ctl.carriers.sent import Launched
from fp8ctl.errors import CarrierError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LIBRARY = "libnccl.so.2"
#: The first release whose calls can be asked not to block, as NCCL writes versions.
OLDEST = 21400
#: How ranks of one host share memory; ranks that differ in it wait for each other for ever.
#: Both engines set it to 0 in their processes.
CUMEM = "NCCL_CUMEM_ENABLE"

_SUCCESS, _IN_PROGRESS = 0, 7
_MAGIC = 0xCAFEBEEF
_UINT8 = 1
#: Seconds that a kernel may take to end after it was told to.
_LEAVING = 10.0


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


class _Config(ctypes.Structure):
    """`ncclConfig_t` of 2.14; later releases take it and set what they have added."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


def _library() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as e:
        raise CarrierError(f"no NCCL in this process: {e}", hint='via="ipc" or via="disk"') from e
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    library.ncclGetErrorString.argtypes = [whole]
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclGetVersion.argtypes = [ctypes.POINTER(whole)]
    library.ncclGetUniqueId.argtypes = [ctypes.POINTER(_UniqueId)]
    library.ncclCommInitRankConfig.argtypes = [
        *(ctypes.POINTER(pointer), whole, _UniqueId, whole, ctypes.POINTER(_Config)),
    ]
    library.ncclCommGetAsyncError.argtypes = [pointer, ctypes.POINTER(whole)]
    library.ncclBroadcast.argtypes = [
        *(pointer, pointer, ctypes.c_size_t, whole, whole, pointer, pointer),
    ]
    library.ncclCommAbort.argtypes = [pointer]
    return library


def _refuse(library: Any, what: str, result: int) -> None:
    if result not in (_SUCCESS, _IN_PROGRESS):
        raise ConflictError(f"NCCL: {what}: {library.ncclGetErrorString(result).decode()}")


def about(device: torch.device) -> dict[str, object]:
    """Return what has to be the same in all ranks, NCCL's version and how it shares memory.

    And what has to differ: the device.

    Raises:
        CarrierError: there is no NCCL, or one that is too old.
    """
    version = ctypes.c_int()
    library = _library()
    _refuse(library, "ncclGetVersion", library.ncclGetVersion(ctypes.byref(version)))
    if version.value < OLDEST:
        raise CarrierError(f"NCCL {version.value}; expected {OLDEST} (2.14) or later")
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = driver.uuids()[index]
    return {"nccl": version.value, CUMEM: os.environ.get(CUMEM, ""), "device": uuid}


def refuse_unlike(ours: Mapping[str, object], theirs: Mapping[str, object], who: str) -> None:
    """Refuse a rank that would not understand the others; NCCL itself would only hang.

    Raises:
        CarrierError: it is one.
    """
    if theirs.get("nccl") != ours["nccl"]:
        raise CarrierError(
            f"{who} has NCCL {theirs.get('nccl')}, the trainer {ours['nccl']}",
            hint='the same NCCL on both sides, or via="ipc" or via="disk"',
        )
    if theirs.get("device") == ours["device"]:
        raise CarrierError(
            f"{who} is on the trainer's GPU {ours['device']}; NCCL takes each GPU once",
            hint='via="ipc"',
        )
    if theirs.get(CUMEM) != ours[CUMEM]:
        value = theirs.get(CUMEM) or ""
        raise CarrierError(
            f"{who} has {CUMEM}={value!r}, the trainer {ours[CUMEM]!r}: they would wait for ever",
            hint=f"{CUMEM}={value or 0} in the trainer's environment, before its first use of NCCL",
        )


def unique_id() -> bytes:
    """Return what names a new group; it is made on rank 0 and told to all."""
    found = _UniqueId()
    library = _library()
    _refuse(library, "ncclGetUniqueId", library.ncclGetUniqueId(ctypes.byref(found)))
    return bytes(found)


class Nccl:
    """One rank of a group; rank 0 is who gives. Making it waits for all other ranks."""

    pulled = False

    def __init__(
        self,
        unique: bytes,
        rank: int,
        world: int,
        device: torch.device,
        deadline: float,
        check: Callable[[], None],
    ) -> None:
        self._library = _library()
        self._device = device
        self._communicator = ctypes.c_void_p()
        # Its own stream: nothing of the engine or the trainer stands behind a broadcast. And
        # before others: kernels that fill the next bucket would hold what it runs on.
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device, priority=-1)
        config = _Config(ctypes.sizeof(_Config), _MAGIC, OLDEST, 0)
        try:
            with torch.cuda.device(device):
                result = self._library.ncclCommInitRankConfig(
                    ctypes.byref(self._communicator),
                    world,
                    _UniqueId.from_buffer_copy(unique),
                    rank,
                    ctypes.byref(config),
                )
                _refuse(self._library, "ncclCommInitRankConfig", result)
                self._settle("the group is made", deadline, check)
        except BaseException:
            self.close()
            raise

    def broadcast(
        self, tensor: torch.Tensor, after: Any, deadline: float, check: Callable[[], None]
    ) -> Launched:
        """Launch it: the tensor is given, or got, behind what was launched before.

        Args:
            tensor: the whole of it.
            after: an event of this device that comes first; None: nothing does.
            deadline: of time.monotonic().
            check: raises where nobody wants it any more.

        Raises:
            TimeoutError: NCCL did not launch it in time.
            ConflictError: NCCL failed, or `check` raised it.
        """
        cuda: Any = torch.cuda
        done = cuda.Event()
        with torch.cuda.device(self._device):
            if after is not None:
                self._stream.wait_event(after)
            result = self._library.ncclBroadcast(
                *(tensor.data_ptr(), tensor.data_ptr(), tensor.numel(), _UINT8, 0),
                *(self._communicator, self._stream.cuda_stream),
            )
            _refuse(self._library, "ncclBroadcast", result)
            self._settle("the broadcast is launched", deadline, check)
            done.record(self._stream)

        def over() -> bool:
            # NCCL first: after its failure the device may reach nothing any more.
            return self._settled("the broadcast has ended") and bool(done.query())

        return Launched(over, done)

    def _settle(self, what: str, deadline: float, check: Callable[[], None]) -> None:
        """Wait until NCCL has done, in the background, what it was asked for."""
        _poll(lambda: self._settled(what), what, deadline, check)

    def _settled(self, what: str) -> bool:
        state = ctypes.c_int(_IN_PROGRESS)
        asked = self._library.ncclCommGetAsyncError(self._communicator, ctypes.byref(state))
        _refuse(self._library, "ncclCommGetAsyncError", asked)
        _refuse(self._library, f"until {what}", state.value)
        return state.value == _SUCCESS

    def warm(self) -> None:
        """Do nothing: the kernel of a broadcast is there already when the bytes are."""

    def close(self) -> None:
        """Leave the group; what still runs in it is ended. No other rank is waited for."""
        if self._communicator:
            communicator, self._communicator = self._communicator, ctypes.c_void_p()
            with torch.cuda.device(self._device):
                self._library.ncclCommAbort(communicator)
                # The slots are in use until the kernel has left; it is told to.
                end = time.monotonic() + _LEAVING
                with contextlib.suppress(TimeoutError, RuntimeError):
                    _poll(self._stream.query, "the device has left it", end, lambda: None)


def _poll(done: Callable[[], bool], what: str, deadline: float, check: Callable[[], None]) -> None:
    """Wait with naps."""
    began = time.monotonic()
    while not done():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"NCCL: no answer until {what}")
        if turns.nap(began):
            check()
