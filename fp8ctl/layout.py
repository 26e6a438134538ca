"""Where each tensor of a converted file lies, and the parts in which it is made.

Known from the plan before any weight is read: so any part can be written at any
time, by any thread, and read again to be checked. Standard library only.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8ctl import formats, models
from fp8ctl.formats import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fp8ctl.manifest import Plan, PlannedTensor
    from fp8ctl.models import Checkpoint, TensorInfo

# Bytes of the source that are worked on at once: long enough that starting a read, a
# kernel and a write costs nothing beside them, short enough to stay in a core's cache.
PART = 4 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """Whole rows of a tensor, or a stretch of one that is only copied.

    Attributes:
        tensor: of the plan.
        row: first row, 0 where the tensor is copied.
        shape: of the part; copied bytes are one dimension.
        start, nbytes: where it lies in the source.
        place, size: where its codes, or its copy, go in the result.
        scales_place, scales_size: where its scales go; of no size where it is copied.
    """

    tensor: PlannedTensor
    row: int
    shape: tuple[int, ...]
    start: int
    nbytes: int
    place: int
    size: int
    scales_place: int = 0
    scales_size: int = 0


def header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a safetensors file, and where each tensor begins behind them.

    As safetensors' own writer: larger elements first, so that every tensor is aligned to its
    element size; data begin at a multiple of 8 bytes.

    Args:
        entries: name, dtype as safetensors spells it, and shape of each tensor.
    """
    ordered = sorted(entries, key=lambda entry: (-models.DTYPE_BYTES[entry[1]], entry[0]))
    told: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, position = {}, 0
    for name, dtype, shape in ordered:
        nbytes = models.DTYPE_BYTES[dtype] * _count(shape)
        told[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        places[name] = position
        position += nbytes
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places


class Layout:
    """One file of the result.

    Attributes:
        name: of the file, as in the source.
        head: its first bytes: length and header.
        offsets: tensor name to position in the file, in bytes.
        size: of the whole file, in bytes.
    """

    def __init__(
        self, name: str, tensors: Iterable[tuple[PlannedTensor, TensorInfo]], plan: Plan
    ) -> None:
        self._plan = plan
        self._tensors = sorted(tensors, key=lambda pair: pair[1].start)
        entries: list[tuple[str, str, tuple[int, ...]]] = []
        for tensor, _ in self._tensors:
            if tensor.quantize:
                scales = formats.scale_name(tensor.name, plan.mode)
                entries.append((tensor.name, formats.CODE_DTYPE, tensor.shape))
                entries.append((scales, formats.SCALE_DTYPE, plan.scale_shape(tensor)))
            else:
                entries.append((tensor.name, tensor.dtype, tensor.shape))
        head, places = header(entries)
        self.name = name
        self.head = head
        self.offsets = {key: len(head) + place for key, place in places.items()}
        sizes = (models.DTYPE_BYTES[dtype] * _count(shape) for _, dtype, shape in entries)
        self.size = len(head) + sum(sizes)

    def parts(self) -> Iterator[Part]:
        """Yield what the file is made of, in the order of the source; always the same."""
        for tensor, info in self._tensors:
            if tensor.quantize:
                yield from self._rows(tensor, info)
                continue
            place = self.offsets[tensor.name]
            for at in range(0, info.nbytes, PART):
                length = min(PART, info.nbytes - at)
                yield Part(tensor, 0, (length,), info.start + at, length, place + at, length)

    def _rows(self, tensor: PlannedTensor, info: TensorInfo) -> Iterator[Part]:
        plan, name = self._plan, tensor.name
        codes = self.offsets[name]
        scales = self.offsets[formats.scale_name(name, plan.mode)]
        rows, columns = tensor.shape
        high, across = rows, 1
        if plan.mode is Mode.BLOCK:
            assert plan.block is not None
            across = plan.block.grid(tensor.shape)[1]
            a_block = plan.block.n * columns * models.DTYPE_BYTES[tensor.dtype]
            high = plan.block.n * max(1, PART // max(1, a_block))
        wide = info.nbytes // rows if rows else 0
        for row in range(0, max(1, rows), max(1, high)):
            count = min(high, rows - row)
            grid = (1, 1)
            above = 0
            if plan.mode is Mode.BLOCK and plan.block is not None:
                grid = plan.block.grid((count, columns))
                above = row // plan.block.n
            yield Part(
                tensor,
                row,
                (count, columns),
                info.start + row * wide,
                count * wide,
                codes + row * columns,
                count * columns,
                scales + 4 * above * across,
                4 * grid[0] * grid[1],
            )


def layouts(source: Checkpoint, plan: Plan) -> dict[str, Layout]:
    """Return the layout of every weight file, in order."""
    inside: dict[str, list[tuple[PlannedTensor, TensorInfo]]] = {name: [] for name in source.files}
    for tensor in plan.tensors:
        info = source.tensors[tensor.name]
        inside[info.file].append((tensor, info))
    return {name: Layout(name, tensors, plan) for name, tensors in inside.items()}


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
