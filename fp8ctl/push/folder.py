"""Full buckets to a folder: an FP8 checkpoint that the engines' own loaders read.

For servers that no carrier reaches. The weights are written while the servers still serve the
old ones; they begin when all of it is there. The folder goes when the update has ended; what a
killed trainer left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import paths
from fp8ctl.carriers import offers
from fp8ctl.carriers.ends import SLOTS
from fp8ctl.course import Places
from fp8ctl.dtypes import SPELLED
from fp8ctl.errors import NotPermittedError
from fp8ctl.layout import header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.manifest import Plan
    from fp8ctl.push.delivery import Clock
    from fp8ctl.wire import Entry

PREFIX = "fp8ctl-push-"
_NEW = ".new-"
_LOCK = ".lock"
#: Seconds after which a folder that has not got its name is nobody's any more.
_UNNAMED = 60.0


class ByFolder:
    """Writes each bucket as a file; a `Delivery`.

    Attributes:
        path: the folder.
        entries: of all files.
    """

    def __init__(
        self,
        parent: Path | None,
        plan: Plan | None,
        capacity: int,
        device: torch.device,
        clock: Clock,
    ) -> None:
        """Make the folder.

        Args:
            parent: where; None: in fp8ctl's cache.
            plan: of the servers.
            capacity: bytes of a bucket.
            device: where buckets are filled.
            clock: for the stages "wait" and "write".

        Raises:
            NotPermittedError: it cannot be made, or does not have room for the plan.
            CarrierError: the device has no room for the buckets.
        """
        self.capacity, self.slots, self.device, self.number = capacity, SLOTS, device, 0
        self.places = Places()
        self.entries: list[Entry] = []
        self._plan, self._clock = plan, clock
        self._files: dict[str, str] = {}
        # Before there is a folder: who gets no memory leaves nothing behind.
        self._memory = offers.allocate([capacity] * SLOTS, device)
        where = paths.cache_dir() / "pushes" if parent is None else parent
        try:
            where.mkdir(parents=True, exist_ok=True)
            sweep(where)
            self.path, self._lock = _locked(where)
            if parent is not None:
                self.path.chmod(0o755)  # the servers may be another user's
            free = shutil.disk_usage(self.path).free
        except OSError as e:
            raise _refused(where, e) from e
        needed = 0 if plan is None else plan.bytes_after
        if needed > free:
            self.close()
            raise NotPermittedError(
                f"{where} has {free} bytes free; the weights take {needed}",
                hint='Rollout(urls, plan, via="disk", folder=PATH)',
            )
        self._pool = ThreadPoolExecutor(1, "fp8ctl-push-write")
        self._writing: list[Future[None] | None] = [None] * SLOTS

    def free(self, slot: int) -> bool:
        """Say whether it is written to its file."""
        writing = self._writing[slot]
        return writing is None or writing.done()

    def buffer(self, slot: int) -> torch.Tensor:
        """Return a slot's memory, when it is written to its file."""
        self._wait(slot)
        return self._memory[slot]

    def begin(self) -> None:
        """Do nothing: servers begin when all files are there."""

    def give(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Do nothing: what is written to a file is looked at first."""

    def deliver(self, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        """Have a bucket written."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        listed, name = [*entries], f"model-{self.number + 1:05}.safetensors"
        self._files.update((entry.name, name) for entry in listed)
        self.entries += listed
        self.number += 1
        self._writing[slot] = self._pool.submit(self._write, name, slot, nbytes, listed)

    def drain(self) -> None:
        """Wait until all is written, and make a checkpoint of it."""
        for slot in range(SLOTS):
            self._wait(slot)
        index = {"metadata": {}, "weight_map": self._files}
        try:
            (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
            (self.path / "config.json").write_text(json.dumps(self._config()))
        except OSError as e:
            raise _refused(self.path, e) from e

    def failed(self) -> bool:
        """Return False: `drain` raises what went wrong, and nothing is on its way after it."""
        return False

    def cancel(self, why: str) -> None:
        """Do nothing: writing ends by itself."""

    def close(self) -> None:
        """Remove the folder."""
        pool = getattr(self, "_pool", None)
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _wait(self, slot: int) -> None:
        writing = self._writing[slot]
        if writing is None:
            return
        with self._clock.stage("wait"):
            try:
                writing.result()
            except OSError as e:
                raise _refused(self.path, e) from e
        self._writing[slot] = None

    def _write(self, name: str, slot: int, nbytes: int, entries: list[Entry]) -> None:
        with self._clock.stage("write"):
            memory = self._memory[slot][:nbytes].cpu()
            by_name = {entry.name: entry for entry in entries}
            head, places = header((e.name, SPELLED[e.dtype], e.shape) for e in entries)
            with open(self.path / name, "wb", buffering=0) as file:
                _all(file.fileno(), head)
                for entry in (by_name[name] for name in places):
                    if entry.nbytes:
                        part = memory[entry.offset : entry.offset + entry.nbytes]
                        _all(file.fileno(), _bytes(part))

    def _config(self) -> dict[str, Any]:
        plan = self._plan
        if plan is None:
            return {}
        config: dict[str, Any] = {"model_type": plan.model_type}
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((plan.model / "config.json").read_text(encoding="utf-8"))
        return {**config, "quantization_config": plan.quantization_config()}


def _locked(where: Path) -> tuple[Path, int]:
    """Return a new folder and the lock on it, which it has before it gets its name."""
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=where)).absolute()
    lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return new.rename(new.with_name(PREFIX + new.name.removeprefix(_NEW))), lock


def sweep(where: Path) -> None:
    """Remove folders whose trainer has ended without a chance to do so."""
    for folder in where.glob(f"{_NEW}*"):
        # Killed before it had its name, perhaps before its lock.
        with contextlib.suppress(OSError):
            if time.time() - folder.lstat().st_mtime > _UNNAMED and not _foreign(folder):
                shutil.rmtree(folder, ignore_errors=True)
    for folder in where.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _foreign(folder: Path) -> bool:
    """Say whether a folder holds anything that is not ours: `--folder` may be anyone's."""
    return bool({*os.listdir(folder)} - {_LOCK})


def _bytes(memory: torch.Tensor) -> memoryview:
    """Return a tensor's bytes; numpy, which could do it, may not be there."""
    size = memory.numel()
    return memoryview((ctypes.c_char * size).from_address(memory.data_ptr())).cast("B")


def _all(file: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(file, view) :]


def _refused(where: Path, e: OSError) -> NotPermittedError:
    return NotPermittedError(
        f"cannot write {where}: {e.strerror}", hint='Rollout(urls, plan, via="disk", folder=PATH)'
    )
