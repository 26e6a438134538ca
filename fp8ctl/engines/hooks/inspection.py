"""What one rank tells of its weights: digests, in slices, and more of a few tensors.

A rank that digests does not compute; so `report` asks for a slice at a time, and requests go
on between two. Of tensors that differ it asks a second question: sums of rows, which say
where, and values. Run by `inventory.Inventory`.
"""

from __future__ import annotations

import base64
import time
import zlib
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.engines.hooks import shards
from fp8ctl.kernels.digest import row_sums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.engines.hooks.shards import Shard, Walk


def digests(walk: Walk, start: int, most: int) -> dict[str, Any]:
    """Return place, type and digest of what modules hold.

    Args:
        walk: of the model.
        start: number of the first module.
        most: bytes after which no further module is begun.

    Returns:
        tensors: of `shards.describe`; next: the number to ask with next, None at the end;
        seconds: that it took.
    """
    began = time.perf_counter()
    held: list[Shard] = []
    size = 0
    following = None
    for number, some in walk.by_module(start):
        if size >= most:
            following = number
            break
        held += some
        size += sum(shard.tensor.nbytes for shard in some)
    told = shards.describe(held)
    return {"tensors": told, "next": following, "seconds": time.perf_counter() - began}


def inspect(
    walk: Walk, names: Sequence[str], rows: Mapping[str, Sequence[int]], most: int
) -> list[dict[str, Any]]:
    """Return more of a few tensors: a line for each part that this rank holds.

    Args:
        walk: of the model.
        names: of the tensors.
        rows: by name, the rows of which values are wanted; of others, all are.
        most: bytes of values for one part, before they are packed; of more, none are sent.

    Returns:
        As `shards.describe` without `digest`; `sums`: `row_sums` as little-endian int64 in base
        64; `rows`: those of the whole tensor whose values follow, None for all of the part;
        `values`: little-endian, by zlib, in base 64, or None.
    """
    wanted = set(names)
    held = (shard for shard in walk.shards() if shard.name in wanted)
    return [_line(shard, rows.get(shard.name), most) for shard in held]


def _line(shard: Shard, rows: Sequence[int] | None, most: int) -> dict[str, Any]:
    tensor, mine = shard.tensor, None
    if rows is not None:
        mine = [r for r in rows if shard.row <= r < shard.row + (tensor.shape or (1,))[0]]
        at = torch.tensor([r - shard.row for r in mine], dtype=torch.int64, device=tensor.device)
        chosen = (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)[at]
    else:
        chosen = tensor
    sums = row_sums(tensor, shard.column)
    return {
        "name": shard.name,
        "row": shard.row,
        "column": shard.column,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "primary": shard.primary,
        "sums": base64.b64encode(sums.numpy().astype("<i8").tobytes()).decode(),
        "rows": mine,
        "values": _packed(chosen) if chosen.nbytes <= most else None,
    }


def _packed(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
    return base64.b64encode(zlib.compress(data, 1)).decode()
