"""Digests of what copies have written, begun right behind them.

An update proves at its end what a rank holds. To read all weights for that, when the last bucket
is there, takes a GPU milliseconds in which nothing else happens. Where copies alone have written
since the update began (`rectangles`), nothing has touched a tensor after its own copy: its digest
is begun then, while the next bucket is on its way, and the end reads what is left.

Loaders are an engine's code and may write anywhere: after one, nothing here counts. Nor does it
for tensors that share memory with one of another name, since a later copy may write it. And to find
out how a list of tensors is cut takes Python longer than a GPU to read it: only buckets that bring
what they brought the last time are read early, and what was found out for them is kept. Standard
library and torch; runs in an engine's worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8ctl.engines.hooks import shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from fp8ctl.engines.hooks.shards import Shard
    from fp8ctl.kernels.digest import Prepared


class Behind:
    """Digests of one list of shards, of one update after the other.

    Attributes:
        listed: all that a rank holds.
    """

    def __init__(self, listed: list[Shard]) -> None:
        """Take a list; nothing is read yet."""
        self.listed = listed
        shared = _shared(listed)
        self._of: dict[str, list[int]] = {}
        for number, shard in enumerate(listed):
            if number not in shared:
                self._of.setdefault(shard.name, []).append(number)
        #: What the buckets of this update brought, and those of the last that ended.
        self._now: list[list[int]] = []
        self._before: list[list[int]] = []
        self._begun: list[tuple[Sequence[int], Callable[[], list[int]]]] = []
        #: Of this update and of the one before, by the numbers of what is read together.
        self._prepared: dict[tuple[int, ...], Prepared] = {}
        self._kept: dict[tuple[int, ...], Prepared] = {}

    def again(self) -> Behind:
        """Return itself, with nothing read: another update begins."""
        self._now, self._begun = [], []
        self._prepared, self._kept = {}, self._prepared
        return self

    def copied(self, names: Iterable[str]) -> None:
        """Begin with the digests of tensors whose copies are launched, on the current stream.

        Where the bucket brings something else than the last time, the end reads it all.
        """
        numbers = [number for name in names for number in self._of.get(name, ())]
        self._now.append(numbers)
        if numbers and self._now == self._before[: len(self._now)]:
            self._begin(numbers)

    def end(self) -> Callable[[], list[int]]:
        """Begin with all others; return what waits, and returns the digests in order."""
        there = {number for numbers in self._now for number in numbers}
        if self._now != self._before:
            self._before, self._begun, there = self._now, [], set()
        if rest := [number for number in range(len(self.listed)) if number not in there]:
            self._begin(rest)
        begun, self._now, self._begun = self._begun, [], []

        def ended() -> list[int]:
            sums = [0] * len(self.listed)
            for numbers, reading in begun:
                for number, one in zip(numbers, reading(), strict=True):
                    sums[number] = one
            return sums

        return ended

    def _begin(self, numbers: Sequence[int]) -> None:
        key = tuple(numbers)
        prepared = self._prepared.get(key) or self._kept.get(key)
        if prepared is None:
            prepared = shards.prepare(self.listed[number] for number in numbers)
        self._prepared[key] = prepared
        self._begun.append((numbers, prepared.start()))


def _shared(listed: Sequence[Shard]) -> set[int]:
    """Return the numbers of shards in whose memory one of another name lies, too."""
    spans = sorted((*_span(s.tensor), i) for i, s in enumerate(listed) if s.tensor.numel())
    found: set[int] = set()
    together: list[int] = []
    reach = 0
    for begin, end, number in spans:
        if begin >= reach:
            together = []
        together.append(number)
        reach = max(reach, end)
        if len({listed[i].name for i in together}) > 1:
            found.update(together)
    return found


def _span(t: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor, and the one behind its last."""
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
