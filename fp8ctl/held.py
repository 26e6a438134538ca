"""What all ranks of a server together hold of each checkpoint tensor.

Every rank digests its shards where they lie (`engines/hooks/shards.py`); the
digests of a tensor add up. Standard library: `check` sums in the command's
process, a push's session in the server's.
"""

from __future__ import annotations

import functools
import math
import struct
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    #: Number of a shard among those of all ranks, its rank, and what that told of it.
    _Part = tuple[int, int, Mapping[str, Any]]
    #: Name of a tensor, all but its digest, the sums that add up to that, and pairs that are alike.
    _Tensor = tuple[str, "Held", list[int], list[tuple[int, int]]]

_MASK = (1 << 64) - 1


class Held(NamedTuple):
    """One checkpoint tensor as all workers together hold it. A tuple: an update makes thousands.

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
    told = list(ranks)
    return _Layout(told).add_up([one for rank in told for one in _sums(rank)])


class Gathered(Mapping[str, Held]):
    """What all ranks told of what they hold; added up when somebody looks."""

    def __init__(self, layout: _Layout, sums: Sequence[int]) -> None:
        """Take the sums of one layout, one rank's behind the other's.

        Raises:
            ValueError: there are more of them, or fewer, than shards.
        """
        layout.check(sums)
        self._layout, self._sums = layout, sums

    @functools.cached_property
    def _held(self) -> dict[str, Held]:
        return self._layout.add_up(self._sums)

    def __getitem__(self, name: str) -> Held:
        """Return what is held of a tensor."""
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all tensors."""
        return iter(self._held)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._held)

    def are(self, wanted: Mapping[str, tuple[str, str]]) -> bool:
        """Say at once whether tensors are held as they should be, and alike wherever they are.

        Args:
            wanted: by name, dtype and digest, as `to_text` writes it.
        """
        return self._layout.are(self._sums, wanted)


class Layouts:
    """Which tensors lie where on the ranks of one server.

    That stays as it is from one update to the next: a rank tells it once, under a name, and
    then only the sums.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._told: list[Mapping[str, Any]] = []
        self._layout = _Layout(())

    @property
    def known(self) -> list[str]:
        """The name of each rank's; empty where one has not told any."""
        names: list[str] = [rank.get("layout", "") for rank in self._told]
        return names if all(names) else []

    def gather(self, ranks: Sequence[Mapping[str, Any]]) -> Gathered:
        """Add up, as `gather` does, what ranks answered that were told which ones are `known`.

        Raises:
            ValueError: a rank gave sums of something else.
        """
        try:
            if not all("sums" in rank for rank in ranks):
                self._learn(ranks)
            for rank, name in zip(ranks, self.known or [""] * len(ranks), strict=True):
                if "sums" in rank and rank["layout"] != name:
                    told = f"rank {rank['rank']} gave sums of another layout, {rank['layout']!r}"
                    raise ValueError(told)
            return Gathered(self._layout, [one for rank in ranks for one in _sums(rank)])
        except ValueError:
            self._told = []  # the next time they are asked for all of it
            raise

    def sums(self, wanted: Mapping[str, tuple[str, str]]) -> str:
        """Return what the one rank will tell that holds these as they should be, and nothing else.

        Args:
            wanted: by name, dtype and digest, as `to_text` writes it.

        Returns:
            As `packed` writes them; "" where that cannot be known.
        """
        return self._layout.sums(wanted) if self.known else ""

    def _learn(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        nothing: Mapping[str, Any] = {"tensors": []}
        before = self._told or [nothing] * len(ranks)
        pairs = zip(ranks, before, strict=True)
        self._told = [old if "sums" in rank else rank for rank, old in pairs]
        self._layout = _Layout(self._told)


def _sums(rank: Mapping[str, Any]) -> Sequence[int]:
    if "sums" in rank:
        return unpacked(rank["sums"])
    return [int(shard["digest"], 16) for shard in rank["tensors"]]


class _Layout:
    """Where the ranks hold what, so that sums alone can be added up."""

    def __init__(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Sort the shards of each tensor.

        Args:
            ranks: each with its `rank` and, in the order of its sums, its `tensors`.
        """
        told = ((rank["rank"], shard) for rank in ranks for shard in rank["tensors"])
        parts: dict[str, dict[tuple[int, int], list[_Part]]] = {}
        for number, (rank, shard) in enumerate(told):
            at = (int(shard["row"]), int(shard["column"]))
            parts.setdefault(shard["name"], defaultdict(list))[at].append((number, rank, shard))
        self._count = sum(len(rank["tensors"]) for rank in ranks)
        self._tensors: list[_Tensor] = [
            (name, *_sorted(rectangles)) for name, rectangles in parts.items()
        ]
        self._compared: _Compared | None = None

    def check(self, sums: Sequence[int]) -> None:
        """Refuse digests that are not one for each shard.

        Raises:
            ValueError: there are more of them, or fewer.
        """
        if len(sums) != self._count:
            raise ValueError(f"{len(sums)} digests of {self._count} parts of tensors")

    def are(self, sums: Sequence[int], wanted: Mapping[str, tuple[str, str]]) -> bool:
        """Say whether these names have these dtypes and digests, and copies of them are alike."""
        names, dtypes = [*wanted], [dtype for dtype, _ in wanted.values()]
        texts = [text for _, text in wanted.values()]
        compared = self._compared
        if compared is None or compared.names != names:  # most updates bring the same
            compared = self._compared = _Compared(names, self._tensors)
        if compared.dtypes != dtypes or not {16}.issuperset(map(len, texts)):
            return False
        if any(sums[i] != sums[j] for i, j in compared.copies):
            return False
        totals = [
            sums[those[0]] if len(those) == 1 else sum([sums[i] for i in those]) & _MASK
            for those in compared.counting
        ]
        try:
            return totals == [*unpacked("".join(texts))]
        except ValueError:
            return False

    def sums(self, wanted: Mapping[str, tuple[str, str]]) -> str:
        """Return all sums, packed, that these digests leave no choice; "" where they leave any."""
        texts = [""] * self._count
        for name, blank, counting, copies in self._tensors:
            dtype, text = wanted.get(name, ("", ""))
            if dtype != blank.dtype or not blank.replicas_agree or len(counting) != 1:
                return ""
            for number in chain(counting, *copies):
                texts[number] = text
        return "".join(texts) if {16}.issuperset(map(len, texts)) else ""

    def add_up(self, sums: Sequence[int]) -> dict[str, Held]:
        """Add up the digests of all shards of all ranks, one rank's behind the other's.

        Raises:
            ValueError: there are more of them, or fewer, than shards.
        """
        self.check(sums)
        found = {}
        for name, blank, counting, copies in self._tensors:
            if len(counting) == 1:
                total = sums[counting[0]]
            else:
                total = sum(sums[i] for i in counting) & _MASK
            agree = blank.replicas_agree and all(sums[i] == sums[j] for i, j in copies)
            found[name] = Held(blank.dtype, total, agree, blank.ranks, blank.shape)
        return found


class _Compared:
    """Where the digests of some tensors are among all.

    Attributes:
        names: of them.
        dtypes: of each; None of one that is not held, or not alike on all ranks.
        counting: the sums that add up to each.
        copies: pairs of sums that have to be alike.
    """

    def __init__(self, names: list[str], tensors: Iterable[_Tensor]) -> None:
        held = {one[0]: one[1:] for one in tensors}
        nowhere: tuple[Held, list[int], list[tuple[int, int]]] = (Held("", 0, False, ()), [], [])
        self.names = names
        self.dtypes: list[str | None] = []
        self.counting: list[list[int]] = []
        self.copies: list[tuple[int, int]] = []
        for name in names:
            blank, counting, copies = held.get(name, nowhere)
            self.dtypes.append(blank.dtype if blank.replicas_agree else None)
            self.counting.append(counting)
            self.copies += copies


def _sorted(
    rectangles: Mapping[tuple[int, int], Sequence[_Part]],
) -> tuple[Held, list[int], list[tuple[int, int]]]:
    """Return a tensor but for its digest, which sums count, and which must be alike."""
    counting: list[int] = []
    alike: list[tuple[int, int]] = []
    agree, holders, dtypes = True, set(), set()
    shape: tuple[int, ...] = ()
    for at, copies in rectangles.items():
        primary = [number for number, _, shard in copies if shard["primary"]]
        counting += primary
        agree &= len(primary) == 1
        alike += [(copies[0][0], number) for number, _, _ in copies[1:]]
        holders |= {rank for _, rank, _ in copies}
        dtypes |= {shard["dtype"] for _, _, shard in copies}
        for _, _, shard in copies:
            shape = _cover(shape, at, shard.get("shape", ()))
    return Held("/".join(sorted(dtypes)), 0, agree, tuple(sorted(holders)), shape), counting, alike


def packed(sums: Sequence[int]) -> str:
    """Return digests as one text: 16 hexadecimal digits each, as `kernels.digest.to_text`."""
    return struct.pack(f">{len(sums)}Q", *sums).hex()


def unpacked(text: str) -> tuple[int, ...]:
    """Return the digests that `packed` wrote.

    Raises:
        ValueError: it did not write this.
    """
    data = bytes.fromhex(text)
    if len(data) % 8:
        raise ValueError(f"{len(data)} bytes are no digests")
    return struct.unpack(f">{len(data) // 8}Q", data)


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
