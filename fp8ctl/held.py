"""What all ranks of a server together hold of each checkpoint tensor.

Every rank digests its shards where they lie (`engines/hooks/shards.py`); the
digests of a tensor add up. Standard library: `check` sums in the command's
process, a push's session in the server's.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Held:
    """One checkpoint tensor as all workers together hold it.

    Attributes:
        dtype: as torch spells it, without the `torch.`.
        digest: sum over the shards that count.
        replicas_agree: False where a copy on another rank differs.
        ranks: the ranks that hold a part of it.
        shape: that the parts cover from (0, 0) on; empty where they do not tell theirs.
    """

    dtype: str
    digest: int
    replicas_agree: bool
    ranks: tuple[int, ...]
    shape: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The digest as `kernels.digest.to_text` writes it."""
        return f"{self.digest:016x}"


def gather(ranks: Iterable[Mapping[str, Any]]) -> dict[str, Held]:
    """Add up what the ranks reported, by checkpoint tensor."""
    places: dict[str, dict[tuple[int, int], list[tuple[int, Mapping[str, Any]]]]] = {}
    for rank in ranks:
        for shard in rank["tensors"]:
            at = (int(shard["row"]), int(shard["column"]))
            places.setdefault(shard["name"], defaultdict(list))[at].append((rank["rank"], shard))
    held = {}
    for name, rectangles in places.items():
        total, agree, holders, dtypes = 0, True, set(), set()
        shape: tuple[int, ...] = ()
        for at, copies in rectangles.items():
            counting = [s for _, s in copies if s["primary"]]
            total += sum(int(s["digest"], 16) for s in counting)
            agree &= len(counting) == 1 and len({s["digest"] for _, s in copies}) == 1
            holders |= {rank for rank, _ in copies}
            dtypes |= {s["dtype"] for _, s in copies}
            for _, shard in copies:
                shape = _cover(shape, at, shard.get("shape", ()))
        word = "/".join(sorted(dtypes))
        held[name] = Held(word, total & _MASK, agree, tuple(sorted(holders)), shape)
    return held


def _cover(shape: tuple[int, ...], at: tuple[int, int], part: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of what reaches as far as `shape` and as a part at (row, column).

    More than two sides are rows and columns of a tensor that nobody cuts.
    """
    ends = [start + int(side) for start, side in zip((*at, *(0,) * len(part)), part, strict=False)]
    return tuple(max(a, b) for a, b in zip(shape or (0,) * len(ends), ends, strict=False))


def constant_digest(bits: bytes, shape: Sequence[int]) -> int:
    """Return the digest of a tensor whose elements are all alike, by kernels/digest.py's formula.

    Without torch, in time of the sides alone: the command's process has none.

    Args:
        bits: of an element of 4 bytes, little-endian.
        shape: of the tensor; one side is rows of one column.
    """
    sides = (*shape, 1) if len(shape) < 2 else shape
    rows, columns = _side_sum(math.prod(sides[:-1]), 1), _side_sum(sides[-1], 0)
    return int.from_bytes(bits, "little") * rows * columns & _MASK


@functools.lru_cache(maxsize=256)
def _side_sum(count: int, odd: int) -> int:
    """Return the sum of the keys of so many rows (odd = 1) or columns (0)."""
    return sum(_finish(2 * place + odd) | 1 for place in range(count)) & _MASK


def _finish(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
