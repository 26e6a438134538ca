"""What all ranks of a server together hold of each checkpoint tensor.

Every rank digests its shards where they lie (`engines/hooks/shards.py`); the
digests of a tensor add up. Standard library: `check` sums in the command's
process, a push's session in the server's.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Held:
    """One checkpoint tensor as all workers together hold it.

    Attributes:
        dtype: as torch spells it, without the `torch.`.
        digest: sum over the shards that count.
        replicas_agree: False where a copy on another rank differs.
        ranks: the ranks that hold a part of it.
    """

    dtype: str
    digest: int
    replicas_agree: bool
    ranks: tuple[int, ...]

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
        for copies in rectangles.values():
            counting = [s for _, s in copies if s["primary"]]
            total += sum(int(s["digest"], 16) for s in counting)
            agree &= len(counting) == 1 and len({s["digest"] for _, s in copies}) == 1
            holders |= {rank for rank, _ in copies}
            dtypes |= {s["dtype"] for _, s in copies}
        held[name] = Held("/".join(sorted(dtypes)), total & _MASK, agree, tuple(sorted(holders)))
    return held
