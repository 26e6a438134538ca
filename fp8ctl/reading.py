"""The tensors of a source as a plan has them: one after the other, or several at a time.

Read into memory, never mapped: a file that is cut meanwhile is an error and no signal. Runs in
an interpreter with torch. Python 3.10.
"""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fp8ctl.dtypes import DTYPES
from fp8ctl.errors import CheckpointError
from fp8ctl.pipeline import bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Generator, Iterator
    from concurrent.futures import Future

    from fp8ctl.manifest import Plan, PlannedTensor
    from fp8ctl.models import Checkpoint, TensorInfo

T = TypeVar("T")

# Bytes of the source that are worked on or wait to be taken, unless one tensor has more.
_IN_MEMORY = 2 << 30
# Threads that read where a GPU works.
_READING = 4


def default_device() -> torch.device:
    """Return the GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def each(
    source: Checkpoint,
    plan: Plan,
    work: Callable[[PlannedTensor, torch.Tensor], T],
    progress: Callable[[int, int], None] | None = None,
    only: Container[str] | None = None,
) -> Generator[tuple[PlannedTensor, T], None, None]:
    """Do some work on every tensor of the source; several at a time are read.

    On a CPU they are worked on as many at a time as there are cores. A GPU has one at a time: it
    is fast enough, and most often a server has nearly all of its memory.

    Args:
        source: which is read.
        plan: its model is the source.
        work: on a tensor on the default device, or where that has no room, on the CPU; is called
            in several threads, of which each has one core, or on a GPU in this one.
        progress: called with bytes of the source done and in all, in this thread.
        only: names of the tensors; None for all.

    Yields:
        Each tensor of the plan with what came of it, in the order of the disk.

    Raises:
        CheckpointError: the source cannot be read. And what `work` raises.
    """
    device, cores = default_device(), torch.get_num_threads()
    here = device.type == "cpu"
    threads = cores if here else min(cores, _READING)
    waiting: deque[tuple[PlannedTensor, int, Future[Any]]] = deque()
    begun = done = 0

    def one(planned: PlannedTensor, info: TensorInfo) -> T | torch.Tensor:
        with (source.folder / info.file).open("rb") as file:
            tensor = _read(file, info)
        return work(planned, tensor) if here else tensor

    def first() -> tuple[PlannedTensor, T]:
        nonlocal done
        planned, nbytes, future = waiting.popleft()
        result = future.result()
        if not here:
            result = _there(device, work, planned, result)
        done += nbytes
        if progress is not None:
            progress(done, plan.bytes_before)
        return planned, result

    pool = ThreadPoolExecutor(threads)
    # The threads here are the parallelism: those of an operation would come on top, and wait for
    # each other on every core that something else has.
    torch.set_num_threads(1)
    try:
        for planned, info in _in_order(source, plan, only):
            while waiting and begun - done + info.nbytes > _IN_MEMORY:
                yield first()
            waiting.append((planned, info.nbytes, pool.submit(one, planned, info)))
            begun += info.nbytes
            if len(waiting) > 2 * threads:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _there(
    device: torch.device,
    work: Callable[[PlannedTensor, torch.Tensor], T],
    planned: PlannedTensor,
    tensor: torch.Tensor,
) -> T:
    """Do the work on a device that may have no room; its bits are the same everywhere."""
    try:
        return work(planned, tensor.to(device))
    except torch.OutOfMemoryError:
        pass  # and what the error holds is let go
    torch.cuda.empty_cache()
    return work(planned, tensor)


def read_planned(
    source: Checkpoint, plan: Plan, only: Container[str] | None = None
) -> Iterator[tuple[PlannedTensor, TensorInfo, torch.Tensor]]:
    """Yield every tensor, or some by name, in the order of the disk."""
    with contextlib.ExitStack() as stack:
        name, file = "", None
        for planned, info in _in_order(source, plan, only):
            if file is None or info.file != name:
                stack.pop_all().close()
                name, file = info.file, stack.enter_context((source.folder / info.file).open("rb"))
            yield planned, info, _read(file, info)


def _in_order(
    source: Checkpoint, plan: Plan, only: Container[str] | None
) -> Iterator[tuple[PlannedTensor, TensorInfo]]:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    for info in sorted(source.tensors.values(), key=lambda info: (info.file, info.start)):
        if only is None or info.name in only:
            yield planned[info.name], info


def _read(file: Any, info: TensorInfo) -> torch.Tensor:
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{info.file}: {info.name} has dtype {info.dtype}, unknown here")
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    file.seek(info.start)
    if file.readinto(bytes_of(data)) != info.nbytes:
        raise CheckpointError(f"{info.file} ends inside {info.name}; it changed while it was read")
    return data.view(DTYPES[info.dtype]).view(info.shape)
