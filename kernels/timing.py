"""Two devices to time calls on: the CPU by its clock, a GPU by its events.

Before each timed call a buffer larger than the caches is overwritten, so that no call finds
its data there. On CUDA it is overwritten as often as it takes for the host to be ahead of
the device: what lies between two events is then the device's own time. `wall` is what a
caller waits, from an idle device until all is done, host work included.

Standard library and torch only.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Call = Callable[[], object]


class NoCudaError(RuntimeError):
    """CUDA was asked for and torch has, or sees, none."""


class Device(abc.ABC):
    """Where tensors are made and calls are timed.

    Attributes:
        kind: cpu or cuda.
        device: of the tensors.
        piece: bytes that a long copy reads at a time.
        few: how often a call is timed at least.
        many: how often at most.
        seconds: how long, within these bounds.
    """

    kind: str
    device: torch.device
    piece: int
    few: int
    many: int
    seconds: float

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what identifies the device and what drives it."""

    @abc.abstractmethod
    def free(self) -> int:
        """Return the bytes of memory that tensors can have."""

    def release(self) -> None:
        """Give back the memory of tensors that are gone."""
        gc.collect()

    @abc.abstractmethod
    def times(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """Return the seconds of each call in each round; in a round they take turns."""

    @abc.abstractmethod
    def wall(self, call: Call, rounds: int) -> list[float]:
        """Return the seconds until all is done, from an idle device on."""

    def rounds(self, calls: Sequence[Call]) -> int:
        """Return how often to time these calls."""
        took = sum(min(self.wall(call, 2)) for call in calls)
        return max(self.few, min(self.many, int(self.seconds / took)))


class Cpu(Device):
    """The CPU."""

    kind = "cpu"

    def __init__(self, quick: bool) -> None:
        self.device = torch.device("cpu")
        self.piece = 1 << 26
        self.few, self.many, self.seconds = (3, 3, 0.0) if quick else (5, 50, 1.0)
        self._flush = torch.zeros(1 << (24 if quick else 27), dtype=torch.uint8)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the device."""
        return _facts(self.kind, _processor())

    def free(self) -> int:
        """Return the bytes of memory that tensors can have."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def times(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """Return the seconds of each call in each round; in a round they take turns."""
        found: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, mine in zip(calls, found, strict=True):
                self._flush.fill_(1)
                started = time.perf_counter()
                call()
                mine.append(time.perf_counter() - started)
        return found

    def wall(self, call: Call, rounds: int) -> list[float]:
        """Return the seconds of a call in each round; here nobody is ahead of anybody."""
        return self.times([call], rounds)[0]


class Cuda(Device):
    """The current CUDA device."""

    kind = "cuda"

    def __init__(self, quick: bool) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.piece = 1 << (28 if quick else 31)
        self.few, self.many, self.seconds = (5, 20, 0.05) if quick else (10, 100, 0.3)
        self._flush = torch.zeros(1 << 28, dtype=torch.uint8, device=self.device)
        [flushes] = self._events([self._flush.zero_], 10, [0])
        self._flush_seconds = statistics.median(flushes)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the device and what drives it."""
        properties = torch.cuda.get_device_properties(self.device)
        return _facts(
            self.kind, properties.name, properties.total_memory, _driver(), torch.version.cuda
        )

    def free(self) -> int:
        """Return the bytes of memory that tensors can have, less a tenth."""
        self.release()
        return int(torch.cuda.mem_get_info(self.device)[0] * 0.9)

    def release(self) -> None:
        """Give back the memory of tensors that are gone."""
        gc.collect()
        torch.cuda.empty_cache()

    def times(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """Return the seconds of each call in each round; in a round they take turns."""
        return self._events(calls, rounds, [self._flushes(call) for call in calls])

    def wall(self, call: Call, rounds: int) -> list[float]:
        """Return the seconds until all is done, from an idle device on."""
        found = []
        for _ in range(rounds):
            self._wait()
            started = time.perf_counter()
            call()
            self._wait()
            found.append(time.perf_counter() - started)
        return found

    def _wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def _events(
        self, calls: Sequence[Call], rounds: int, flushes: Sequence[int]
    ) -> list[list[float]]:
        marks = [[(_event(), _event()) for _ in range(rounds)] for _ in calls]
        self._wait()
        for number in range(rounds):
            for call, mine, count in zip(calls, marks, flushes, strict=True):
                for _ in range(count):
                    self._flush.zero_()
                mine[number][0].record()
                call()
                mine[number][1].record()
        self._wait()
        return [[start.elapsed_time(end) / 1e3 for start, end in mine] for mine in marks]

    def _flushes(self, call: Call) -> int:
        """Return how often to flush so that the device is busy until the host has called."""
        host = []
        for _ in range(3):
            self._wait()
            started = time.perf_counter()
            call()
            host.append(time.perf_counter() - started)
        # Twice: a host is now and then slower than it was.
        return 1 + min(256, math.ceil(2 * min(host) / self._flush_seconds))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def open_device(name: str | None, quick: bool) -> Device:
    """Return the device of that name; without one CUDA, where torch sees it.

    Raises:
        ValueError: there is no such kind of device.
        NoCudaError: torch sees no CUDA device.
    """
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; expected cpu or cuda")
    if name != "cpu" and torch.cuda.is_available():
        return Cuda(quick)
    if name == "cuda":
        why = "sees no GPU" if torch.version.cuda else "is a build without CUDA"
        raise NoCudaError(f"torch {torch.__version__} of {sys.executable} {why}")
    return Cpu(quick)


def _facts(
    kind: str,
    name: str,
    memory: int | None = None,
    driver: str | None = None,
    cuda: str | None = None,
) -> dict[str, Any]:
    return {"type": kind, "name": name, "memory": memory, "driver": driver, "cuda": cuda}


def _processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
        if found:
            return found[1].strip()
    return platform.machine()


def _driver() -> str | None:
    """Return the version of the NVIDIA driver: by its own file, else by its program."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.M)
        if found:
            return found[1]
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    argv = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
