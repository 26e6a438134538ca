"""The parts of a checkpoint read, quantised, written and read again, several at once.

Each thread takes a part of at most a few MB, reads it into its own memory, quantises it
there and writes what came of it: while one waits for the disk, another computes, and no
thread holds more than its part. Reads, writes and kernels let other threads run.
Where there is a GPU, some threads more take as many parts as fill their buffers and quantise
them there in one list; the others do not wait until it is ready, and all bits are the same.
Runs in an interpreter with torch. Python 3.10.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.checksum import checksum
from fp8ctl.dtypes import DTYPES
from fp8ctl.errors import CheckpointError, DriftError, NotPermittedError
from fp8ctl.formats import Mode
from fp8ctl.kernels import groups
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.inputs import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fp8ctl.layout import Layout, Part
    from fp8ctl.manifest import Plan
    from fp8ctl.partial import Partial

    Job = Callable[["Desk"], None]

# Bytes that a thread sends to a GPU at once.
_BATCH = 32 << 20
# So many parts ahead of the one that is read, the disk is told which come.
_AHEAD = 16
_ALIGN = 256
# Threads beside those that compute: some always wait for the disk.
_WAITING = 2
# Where parts are whole tensors: one is read, one computed on by all cores, one written.
_WHOLE = 3
_ON_DEVICE = 6
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bad:
    """A weight that holds NaN or Inf, and the first place of one."""

    tensor: str
    index: tuple[int, ...]
    value: float


def groups_of(plan: Plan) -> groups.Groups:
    """Return what shares a scale under `plan`, as the kernels call it."""
    if plan.mode is Mode.PER_TENSOR:
        return groups.PER_TENSOR
    if plan.mode is Mode.PER_CHANNEL:
        return groups.PER_CHANNEL
    assert plan.block is not None
    return groups.block(plan.block.n, plan.block.k)


def bytes_of(data: torch.Tensor) -> memoryview:
    """Return the memory of a tensor of bytes, for reads and writes."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


class Shard:
    """One file of the result as it is made.

    Attributes:
        layout: where everything lies.
        parts: what it is made of.
        sums: checksum of what each part became.
        made: whether it is complete, by this command or an earlier one.
        left: parts that are still to be done.
        bad: weights that cannot be quantised.
    """

    def __init__(
        self, layout: Layout, source: Path, target: Path, sums: Sequence[int] | None = None
    ) -> None:
        self.layout = layout
        self.parts = tuple(layout.parts())
        self.made = sums is not None and len(sums) == len(self.parts)
        self.sums = list(sums) if sums is not None and self.made else [0] * len(self.parts)
        self.left = len(self.parts)
        self.bad: list[Bad] = []
        self.source_path, self.target_path = source, target
        self._lock = threading.Lock()
        self._source = self._target = -1

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return sum(part.nbytes for part in self.parts)

    def source(self) -> int:
        """Return a descriptor of the source."""
        with self._lock:
            if self._source < 0:
                with _reading(self.source_path):
                    self._source = os.open(self.source_path, os.O_RDONLY | os.O_CLOEXEC)
            return self._source

    def target(self) -> int:
        """Return a descriptor of the result; of one that is not made, new with its header."""
        with self._lock:
            if self._target < 0:
                with writing(self.target_path):
                    if self.made:
                        self._target = os.open(self.target_path, os.O_RDWR | os.O_CLOEXEC)
                    else:
                        self._target = self._create()
            return self._target

    def _create(self) -> int:
        self.target_path.parent.mkdir(parents=True, exist_ok=True)
        self.target_path.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(self.target_path, flags, 0o666)
        os.truncate(descriptor, self.layout.size)
        _write(descriptor, memoryview(self.layout.head), 0)
        return descriptor

    def flush(self) -> None:
        """Have it on the disk."""
        descriptor = self.target()
        with writing(self.target_path):
            os.fsync(descriptor)
        self.made = True

    def intact(self) -> bool:
        """Say whether size and header are as they must be."""
        try:
            with self.target_path.open("rb") as file:
                same = file.read(len(self.layout.head)) == self.layout.head
                return same and os.fstat(file.fileno()).st_size == self.layout.size
        except OSError:
            return False

    def close(self) -> None:
        """Close both files."""
        for descriptor in (self._source, self._target):
            if descriptor >= 0:
                os.close(descriptor)
        self._source = self._target = -1


class Board:
    """What is left to do, for threads; what they do may give more to do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._running = 0
        self._failed: BaseException | None = None

    def add(self, jobs: Sequence[Job]) -> None:
        """Put jobs behind the others."""
        with self._changed:
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def work(self, desk: Callable[[], Desk]) -> None:
        """Do jobs until there are none, and none that could give more; or one has failed."""
        try:
            mine = desk()
            while (job := self._take()) is not None:
                try:
                    job(mine)
                finally:
                    with self._changed:
                        self._running -= 1
                        self._changed.notify_all()
        except BaseException as e:  # noqa: BLE001 - it is raised again by the one who waits
            self.stop(e)

    def stop(self, why: BaseException) -> None:
        """Have nothing more begun; the first reason counts."""
        with self._changed:
            self._failed = self._failed or why
            self._jobs.clear()
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what a job raised."""
        if self._failed is not None:
            raise self._failed

    def _take(self) -> Job | None:
        with self._changed:
            while not self._jobs and self._running and self._failed is None:
                self._changed.wait()
            if not self._jobs or self._failed is not None:
                return None
            self._running += 1
            return self._jobs.popleft()


class Pipeline:
    """Makes the shards of one conversion.

    Args:
        plan: which says what becomes of each tensor.
        partial: where finished shards are noted.
        verify: says whether a part of the result is read again.
        device: that quantises; beside a GPU the cores do, too.
        threads: at once, all of them on the device; None: as many as it and this machine can use.
        batch: bytes of the source that a thread takes at once, at least a part; None: a part on
            a CPU, on a GPU as many as it takes to be worth a launch.

    Attributes:
        verified: bytes of the result that were read again and were right.
        used: types of the devices that quantised something.
        lost: files that an earlier command finished and that had to be made anew.
    """

    def __init__(
        self,
        plan: Plan,
        partial: Partial,
        verify: Callable[[Part], bool],
        device: torch.device,
        threads: int | None = None,
        batch: int | None = None,
    ) -> None:
        self._plan = plan
        self._batch = batch or (0 if device.type == "cpu" else _BATCH)
        self._together = batch is not None
        self._partial = partial
        self._verify = verify
        self._device = device
        self._threads = threads
        self._board = Board()
        self._lock = threading.Lock()
        self._done = 0
        self.verified = 0
        self.used: set[str] = set()
        self.lost: list[str] = []

    def run(self, shards: Sequence[Shard], progress: Callable[[int], None]) -> None:
        """Make every shard, but those that are made: they are read again in full.

        One of these that differs from its sums is made anew.

        Args:
            shards: in the order in which they are begun.
            progress: called with the bytes of the source that are done, in this thread.

        Raises:
            CheckpointError: the source cannot be read.
            DriftError: what was written reads differently; names the tensor.
            NotPermittedError: the result cannot be written.
        """
        for shard in shards:
            if not shard.made:
                self._board.add(self._making(shard))
            elif shard.intact():
                self._board.add(self._checking(shard))
            else:
                self._begin_again(shard)
        cores = torch.get_num_threads()
        devices = self._devices(cores)
        if self._plan.mode is Mode.BLOCK or self._device != _CPU:
            # The threads here are the parallelism; those of a kernel would come on top.
            torch.set_num_threads(1)
        threads = [
            threading.Thread(
                target=self._board.work,
                args=(functools.partial(Desk, self._plan, device, self._together),),
                daemon=True,
            )
            for device in devices
        ]
        interval = sys.getswitchinterval()
        try:
            # While a GPU's kernels are compiled a thread is busy in Python, and each call of
            # another would wait 5 ms for it: conversions then took nearly twice as long.
            sys.setswitchinterval(1e-4)
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.05)
                    progress(self._done)
        except BaseException as e:
            self._board.stop(e)
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for shard in shards:
                shard.close()
            torch.set_num_threads(cores)
            sys.setswitchinterval(interval)
        self._board.check()
        progress(self._done)

    def _devices(self, cores: int) -> list[torch.device]:
        """Return the device of each thread."""
        on_gpu = self._device.type != "cpu"
        if self._threads:
            return [self._device] * self._threads
        if self._plan.mode is not Mode.BLOCK:
            return [self._device] * (_ON_DEVICE if on_gpu else _WHOLE)
        # A core makes some 3 GB/s, and a GPU takes seconds until it is ready: these do not wait.
        return [self._device] * (_ON_DEVICE if on_gpu else 0) + [_CPU] * (cores + _WAITING)

    def _making(self, shard: Shard) -> list[Job]:
        batches = list(_filled(shard.parts, self._batch))
        if not batches:
            return [lambda desk: self._finish(shard)]
        return [functools.partial(self._make, shard, batch) for batch in batches]

    def _make(self, shard: Shard, numbers: Sequence[int], desk: Desk) -> None:
        """Make some parts, as many at once as the desk takes."""
        for some in [numbers] if desk.takes_all else [[number] for number in numbers]:
            self._make_some(shard, some, desk)

    def _make_some(self, shard: Shard, numbers: Sequence[int], desk: Desk) -> None:
        """Read, quantise and write some parts; finish the shard behind its last."""
        source, target = shard.source(), shard.target()
        parts = [shard.parts[i] for i in numbers]
        ahead = numbers[-1] + _AHEAD * len(numbers)
        for part in shard.parts[ahead : ahead + len(numbers)]:
            _announce(source, part.start, part.nbytes)
        with _reading(shard.source_path):
            raw = desk.read(source, [(part.start, part.nbytes) for part in parts])
        made, bad = desk.quantize(parts, raw)
        with writing(shard.target_path):
            for number, part, (codes, scales) in zip(numbers, parts, made, strict=True):
                _write(target, bytes_of(codes), part.place)
                shard.sums[number] = checksum(codes)
                if scales is not None:
                    _write(target, bytes_of(scales), part.scales_place)
                    shard.sums[number] = checksum(scales, shard.sums[number])
        # The disk is to begin with what this thread wrote before.
        for of, part in desk.before(shard, parts):
            _push(of.target(), part.place, part.size)
        with self._lock:
            if any(part.tensor.quantize for part in parts):
                self.used.add(desk.device.type)
            self._done += sum(part.nbytes for part in parts)
            shard.bad += bad
            shard.left -= len(parts)
            last = not shard.left
        if last:
            self._finish(shard)

    def _finish(self, shard: Shard) -> None:
        if shard.bad:
            return
        shard.flush()
        self._partial.finish(shard.layout.name, shard.sums)
        numbers = [i for i, part in enumerate(shard.parts) if self._verify(part)]
        if not numbers:
            return
        if not shard.intact():
            raise self._drift(shard, "the header")
        for i in numbers:
            # To be read from the disk, not from what the system still has in memory.
            _push(shard.target(), shard.parts[i].place, shard.parts[i].size)
        self._board.add([functools.partial(self._verify_part, shard, i) for i in numbers])

    def _verify_part(self, shard: Shard, number: int, desk: Desk) -> None:
        if self._read_back(shard, number, desk) != shard.sums[number]:
            raise self._drift(shard, shard.parts[number].tensor.name)

    def _drift(self, shard: Shard, what: str) -> DriftError:
        self._partial.lose(shard.layout.name)
        return DriftError(
            f"{shard.layout.name}: {what} reads differently from what was written:"
            " the disk or the memory is at fault",
            hint="check both, then run the same command again",
            data={"file": shard.layout.name, "tensor": what},
        )

    def _checking(self, shard: Shard) -> list[Job]:
        """Return the jobs that read again what an earlier command finished."""
        return [functools.partial(self._check_part, shard, i) for i in range(len(shard.parts))]

    def _check_part(self, shard: Shard, number: int, desk: Desk) -> None:
        """Compare a part with its sum; behind the last, have a shard that differs made anew."""
        same = shard.made and self._read_back(shard, number, desk) == shard.sums[number]
        with self._lock:
            shard.made = shard.made and same
            self._done += shard.parts[number].nbytes
            shard.left -= 1
            last = not shard.left
        if last and not shard.made:
            with self._lock:
                self._done -= shard.nbytes
            self._begin_again(shard)

    def _begin_again(self, shard: Shard) -> None:
        self._partial.lose(shard.layout.name)
        shard.close()
        shard.made, shard.left = False, len(shard.parts)
        self.lost.append(shard.layout.name)
        self._board.add(self._making(shard))

    def _read_back(self, shard: Shard, number: int, desk: Desk) -> int:
        """Return the checksum of a part of the result as the file has it."""
        target, part = shard.target(), shard.parts[number]
        for other in shard.parts[number + _AHEAD : number + _AHEAD + 1]:
            _announce(target, other.place, other.size)
        places = [(part.place, part.size)]
        if part.tensor.quantize:
            places.append((part.scales_place, part.scales_size))
        total = 0
        with _reading(shard.target_path):
            for data in desk.read(target, places):
                total = checksum(data, total)
        with self._lock:
            self.verified += part.size + part.scales_size
        return total


class Desk:
    """The memory of one thread, and the device that it uses.

    Attributes:
        takes_all: whether many small parts are best quantised at once.
    """

    def __init__(self, plan: Plan, device: torch.device, together: bool = False) -> None:
        self._groups = groups_of(plan)
        self._plan = plan
        self.device = device
        self.takes_all = together or device.type != "cpu"
        self._before: list[tuple[Shard, Part]] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def read(self, descriptor: int, places: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Return bytes of a file, in memory that the next call uses again.

        Raises:
            OSError, EOFError: they cannot be read, or are not there.
        """
        found = self._cut("source", [length for _, length in places])
        for (start, _), data in zip(places, found, strict=True):
            left = bytes_of(data)
            while left:
                count = os.preadv(descriptor, [left], start)
                if not count:
                    raise EOFError
                start, left = start + count, left[count:]
        return found

    def before(self, shard: Shard, parts: Sequence[Part]) -> list[tuple[Shard, Part]]:
        """Return what was written before these parts, of files that are not finished yet."""
        found = [(of, part) for of, part in self._before if not of.made]
        self._before = [(shard, part) for part in parts]
        return found

    def quantize(
        self, parts: Sequence[Part], raw: Sequence[torch.Tensor]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor | None]], list[Bad]]:
        """Return the bytes of codes and scales of each part, or itself, and what has no code.

        They lie in memory that the next call uses again.
        """
        codes = self._cut("codes", [p.size if p.tensor.quantize else 0 for p in parts])
        scales = self._cut("scales", [p.scales_size for p in parts])
        made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        xs, outs, ours = [], [], []
        for part, data, code, scale in zip(parts, raw, codes, scales, strict=True):
            if not part.tensor.quantize:
                made.append((data, None))
                continue
            made.append((code, scale))
            x = data.view(DTYPES[part.tensor.dtype]).view(part.shape)
            pair = code.view(part.shape), scale.view(torch.float32)
            xs.append(x)
            outs.append((pair[0], pair[1].view(self._groups.scale_shape(part.shape))))
            ours.append(part)
        try:
            self._run(xs, outs)
        except NonFiniteError:
            return made, list(_bad(ours, xs))
        return made, []

    def _run(self, xs: list[torch.Tensor], outs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if self.device.type == "cpu":
            for x, out in zip(xs, outs, strict=True):
                kernels.quantize(x, self._groups, self._plan.recipe, out=out)
            return
        if not xs:
            return
        with torch.cuda.stream(self._stream):
            there = [x.to(self.device, non_blocking=True) for x in xs]
            self._stream.synchronize()  # so that nobody waits for a copy behind the lock
            with _ONE_AT_A_TIME:
                pairs = kernels.quantize_many(there, self._groups, self._plan.recipe)
            for pair, out in zip(pairs, outs, strict=True):
                for value, host in zip(pair, out, strict=True):
                    host.view(torch.uint8).copy_(value.view(torch.uint8), non_blocking=True)
            self._stream.synchronize()

    def _cut(self, name: str, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Return aligned pieces of one of the buffers, which grows to the largest demand."""
        places, end = [], 0
        for length in lengths:
            places.append(end)
            end += -(-length // _ALIGN) * _ALIGN
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < end:
            self._buffers.pop(name, None)
            pinned = self.device.type == "cuda"
            buffer = torch.empty(max(end, _ALIGN), dtype=torch.uint8, pin_memory=pinned)
            self._buffers[name] = buffer
        return [buffer[at : at + length] for at, length in zip(places, lengths, strict=True)]


# A list's kernels are started by one thread at a time: Triton compiles at the first call.
_ONE_AT_A_TIME = threading.Lock()


def _bad(parts: Sequence[Part], xs: Sequence[torch.Tensor]) -> Iterator[Bad]:
    """Yield the parts that hold NaN or Inf, with the first place in the whole tensor."""
    for part, x in zip(parts, xs, strict=True):
        odd = (~torch.isfinite(x)).view(-1)
        if bool(odd.any()):
            at = int(odd.to(torch.uint8).argmax())
            row, column = divmod(at, x.shape[1])
            yield Bad(part.tensor.name, (part.row + row, column), float(x[row, column]))


def _filled(parts: Sequence[Part], limit: int) -> Iterator[list[int]]:
    """Yield runs of parts, each of at most `limit` bytes or one part."""
    run: list[int] = []
    total = 0
    for i, part in enumerate(parts):
        if run and total + part.nbytes > limit:
            yield run
            run, total = [], 0
        run.append(i)
        total += part.nbytes
    if run:
        yield run


def _announce(descriptor: int, start: int, length: int) -> None:
    """Have the system begin to read what will be asked for soon."""
    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)


def _push(descriptor: int, start: int, length: int) -> None:
    """Have the system begin to write what is only in its memory, and forget what is not.

    Else it would begin when the file is flushed, and all would wait for it at the end.
    """
    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    # One call of pwrite takes at most 2 GiB.
    while data:
        count = os.pwrite(descriptor, data, offset)
        offset, data = offset + count, data[count:]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise CheckpointError(
            f"{path} ends too early; it changed while it was read", hint="run it again"
        ) from None
    except OSError as e:
        raise CheckpointError(
            f"cannot read {path}: {e.strerror or e}", hint="fetch or save the model again"
        ) from e


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system says in this block into an error of ours.

    Raises:
        NotPermittedError: it cannot be written; says which file and why.
    """
    try:
        yield
    except OSError as e:
        raise NotPermittedError(
            f"cannot write {path}: {e.strerror or e}",
            data={"path": str(path), "errno": e.errno or 0},
        ) from e
