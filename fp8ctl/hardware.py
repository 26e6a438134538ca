"""The GPUs of this machine and their driver, as NVML tells them.

NVML is opened only where a driver is present, and nothing here ever fails:
a machine without a GPU is an ordinary one.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

# The driver's own traces; /dev/dxg is WSL's. Without one, NVML is not even imported.
_DRIVER_FILES = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver prints it.
        capability: CUDA compute capability, such as (9, 0); None if not told.
        memory: bytes in all.
    """

    name: str
    capability: tuple[int, int] | None
    memory: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """The GPUs in NVML's order (CUDA_VISIBLE_DEVICES is not applied), and their driver.

    Attributes:
        driver: version of the driver; None where there is none.
        cuda: newest CUDA that the driver runs, such as (12, 8).
        problem: why the driver could not be asked, though it is there.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    problem: str | None = None


@functools.cache
def detect() -> Hardware:
    """Return the GPUs of this machine; asked once per process."""
    if not any(Path(f).exists() for f in _DRIVER_FILES):
        return Hardware()
    try:
        import pynvml
    except ImportError:
        return Hardware(problem="nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError) as e:
        return Hardware(problem=f"NVML: {e}")
    try:
        return _ask()
    except (pynvml.NVMLError, OSError, AttributeError) as e:
        return Hardware(problem=f"NVML: {e}")
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _ask() -> Hardware:
    import pynvml

    def text(value: str | bytes) -> str:
        # Bindings before 11.5 return bytes.
        return value.decode() if isinstance(value, bytes) else value

    cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    gpus = []
    for i in range(int(pynvml.nvmlDeviceGetCount())):
        handle = pynvml.nvmlDeviceGetHandleByIndex(i)
        try:
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            capability: tuple[int, int] | None = (int(major), int(minor))
        except pynvml.NVMLError:
            capability = None
        memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        gpus.append(Gpu(text(pynvml.nvmlDeviceGetName(handle)), capability, memory))
    driver = text(pynvml.nvmlSystemGetDriverVersion())
    return Hardware(tuple(gpus), driver, (cuda // 1000, cuda % 1000 // 10))
