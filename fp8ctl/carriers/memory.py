"""Buckets in memory that a trainer and servers of one host share.

A slot is a memfd: a file that no file system shows and that goes with its last user, however
that one ends. A server opens it through the trainer's /proc and maps it to be read only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.carriers import offers
from fp8ctl.carriers.sent import Carrier
from fp8ctl.errors import CarrierError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.wire import Kind

NAME = "fp8ctl-bucket"
#: Random bytes behind the slot's own: what was opened is what was offered.
NONCE = 32
ELSEWHERE = 'via="disk" or via="nccl" reach servers of other hosts, containers and users'

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1


class MemorySender:
    """Slots in this process's memory; see `ends.Sender`."""

    kind: Kind = "memory"
    carrier = Carrier("memory")

    def __init__(self, nbytes: int, slots: int) -> None:
        self.alive, self.slots = True, slots
        self._files: list[int] = []
        self._nonces: list[bytes] = []
        self._slots: list[torch.Tensor] = []
        try:
            for _ in range(slots):
                self._add(nbytes)
        except OSError as e:
            self.close()
            raise CarrierError(
                f"no {slots} slots of {nbytes} bytes of shared memory: {e.strerror}",
                hint='a smaller bucket_bytes, or via="disk"',
            ) from e

    def _add(self, nbytes: int) -> None:
        file = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._files.append(file)
        os.ftruncate(file, nbytes + NONCE)
        # A file that shrinks under a mapping is a SIGBUS in the server.
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        nonce = secrets.token_bytes(NONCE)
        os.pwrite(file, nonce, nbytes)
        self._nonces.append(nonce)
        self._slots.append(_map(file, nbytes, _PROT_READ | _PROT_WRITE))

    def offer(self, server: int = 0) -> dict[str, Any]:
        """Return where a server of this host finds the slots."""
        if not self.alive:
            raise CarrierError("the carrier was closed")
        return {
            "kind": self.kind,
            "pid": os.getpid(),
            "boot_id": offers.boot_id(),
            "slots": [
                {"fd": file, "nbytes": len(slot), "nonce": nonce.hex()}
                for file, slot, nonce in zip(self._files, self._slots, self._nonces, strict=True)
            ],
        }

    def join(self) -> None:
        """Do nothing: nobody is waited for."""

    def look(self) -> None:
        """Do nothing: ranks come and go."""

    def buffer(self, slot: int) -> torch.Tensor:
        """Return the slot."""
        return self._slots[slot]

    def ready(self, slot: int) -> None:
        """Do nothing: a CPU has written when it returns."""

    def settle(self, slot: int) -> None:
        """Do nothing, likewise."""

    def send(self, slot: int, nbytes: int) -> None:
        """Do nothing: the ranks read the slot itself."""

    def cancel(self, why: str) -> None:
        """Do nothing: nothing waits."""

    def close(self) -> None:
        """Give the memory back, as soon as no tensor and no server uses it."""
        self.alive = False
        self._slots.clear()
        while self._files:
            os.close(self._files.pop())


class MemoryReceiver:
    """The slots of a trainer on this host, to be read; see `ends.Receiver`.

    A tensor of it is the trainer's memory, not a copy: to write it is a fault of the process.
    """

    def __init__(self, offer: Mapping[str, Any]) -> None:
        pid = offers.take(offer, "pid", int)
        boot_id = offers.take(offer, "boot_id", str)
        if boot_id != offers.boot_id():
            raise CarrierError(
                f"the trainer (process {pid}) runs on another host, or before a reboot of this one",
                hint=ELSEWHERE,
            )
        self._slots: list[torch.Tensor] = []
        for one in offers.slots_of(offer):
            where = Path("/proc", str(pid), "fd", str(offers.take(one, "fd", int)))
            self._slots.append(_open(where, one["nbytes"], offers.take(one, "nonce", str)))

    def bucket(self, slot: int, nbytes: int, *, here: bool = True) -> torch.Tensor:
        """Return the bytes where the trainer wrote them."""
        return offers.part(self._slots, slot, nbytes)

    def arrived(self) -> None:
        """Do nothing: bytes are there before a rank is asked."""

    def loaded(self) -> None:
        """Do nothing: a CPU has read what it was told to read."""

    def close(self) -> None:
        """Unmap the slots, as soon as no tensor uses them."""
        self._slots.clear()


def _open(where: Path, nbytes: int, nonce: str) -> torch.Tensor:
    """Map a slot of another process, after a look at what it is."""
    with contextlib.ExitStack() as stack:
        try:
            # The link first: to open something else, a pipe or a device, may have effects.
            target = where.readlink()
            if not str(target).startswith(f"/memfd:{NAME}"):
                raise CarrierError(f"{where} is {target}, not a trainer's bucket", hint=ELSEWHERE)
            file = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, file)
            size = os.fstat(file).st_size
            found = os.pread(file, NONCE, nbytes)
            seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
        except OSError as e:
            raise CarrierError(f"{where}: {_reason(e)}", hint=ELSEWHERE) from e
        if size != nbytes + NONCE:
            raise CarrierError(f"{where} has {size} bytes, offered were {nbytes} and {NONCE} more")
        if found.hex() != nonce:
            raise CarrierError(f"{where} is not what was offered: its nonce differs")
        if seals & _SEALS != _SEALS:
            raise CarrierError(f"{where} is not sealed: it could shrink while it is read")
        try:
            return _map(file, nbytes, _PROT_READ)
        except OSError as e:
            raise CarrierError(f"{where} cannot be mapped: {e.strerror}") from e


def _reason(e: OSError) -> str:
    if e.errno in (errno.ENOENT, errno.ESRCH, errno.ENOTDIR):
        return "no such process or file; it ended, or has another number in this container"
    if e.errno in (errno.EACCES, errno.EPERM):
        return f"not to be read by user {os.geteuid()}; it is another user's process"
    return e.strerror or str(e)


def _map(file: int, nbytes: int, protection: int) -> torch.Tensor:
    """Return a file's memory as a tensor; it is unmapped when the last tensor on it goes.

    The C library's mmap, since torch warns of a Python buffer that cannot be written, and
    Python's keeps the file open.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, nbytes, protection, _MAP_SHARED, file, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    # torch holds `memory` as long as a tensor holds its bytes.
    weakref.finalize(memory, libc.munmap, address, nbytes).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)
