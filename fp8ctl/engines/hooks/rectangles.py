"""Where the tensors of a checkpoint lie in a model's memory, so that they can be copied there.

`shards` says which rectangle of which checkpoint tensor a view into the engine's memory
holds. A bucket of tensors can then be copied with one call, around the engine's loaders.
That is sound for tensors that `Rectangles.trust` has let in, and only for them. It takes
all of this:

- The engine's module says so (`engine.Engine.copies`): memory has the checkpoint's own
  form, and the loader does nothing but copy. Scales whose loader renews a kernel's copy,
  and weights that the engine quantises itself, are never in.
- The tensor went in through its loader before, and afterwards the digest of what all
  ranks hold on exactly these rectangles was that of the tensor that was sent. Digests
  depend on places, so a rectangle that is elsewhere holds something else.
- Its values could have told: not all alike, and unlike those of any other tensor of its
  shape. Norms that are all ones would be equal wherever they went.
- The dtype is that of the memory: a cast is the loader's business.

Later digests cannot prove it again: they look where the copies went. So what could bring
the weights into another form, a load by a route of the engine's own, takes all trust
away, and so does a push that broke off; where parameters lie is looked at again for each
push. `FP8CTL_PUSH_LOADERS=1` in the engine's environment leaves all to the loaders.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from fp8ctl.engines.hooks.shards import Walk
from fp8ctl.engines.hooks.walk import Known
from fp8ctl.kernels.digest import digests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from fp8ctl.engines.hooks.shards import Form, Shard

    Named = tuple[str, torch.Tensor]
    #: Where to, and from where.
    Pair = tuple[torch.Tensor, torch.Tensor]
    Move = tuple[list[torch.Tensor], list[torch.Tensor]]
    _Key = tuple[tuple[str, ...], tuple[int, ...]]

#: "1": no copies, whatever was verified.
LOADERS_ONLY = "FP8CTL_PUSH_LOADERS"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Rectangles:
    """The rectangles that one rank holds, and which tensors may be copied into them."""

    def __init__(
        self,
        model: torch.nn.Module,
        tp_rank: int,
        copies: Callable[[torch.nn.Module], Form | None],
    ) -> None:
        """Take a model over; nothing is trusted yet.

        Args:
            model: as the engine built and loaded it.
            tp_rank: of this process among those that share the same layers.
            copies: `engine.Engine.copies`.
        """
        self._model = model
        self._copies = copies
        self._trusted: set[str] = set()
        self._tp_rank = tp_rank
        self._walk = Known()
        self._list: list[Shard] = []
        self._held: dict[str, list[Shard]] = {}
        self._looked = False
        #: By names and tensors: the parts of a bucket, of this update and of the one before.
        self._parts: dict[_Key, Parts] = {}
        self._before: dict[_Key, Parts] = {}

    def look_anew(self) -> None:
        """Look up where parameters lie: an update begins."""
        self._looked = False
        # What does not come again need not be kept.
        self._parts, self._before = {}, self._parts
        self.held()

    def forget(self) -> None:
        """Hold nothing of what was copied from, and look at every module again."""
        self._looked, self._list, self._held = False, [], {}
        self._forget_parts()
        self._walk.forget()

    def _forget_parts(self) -> None:
        self._parts.clear()
        self._before.clear()

    def held(self) -> dict[str, list[Shard]]:
        """Return the rectangles into which each tensor may be copied."""
        if self._looked:
            return self._held
        if not self._walk.same:
            form = self._copies(self._model)
            if form is None:
                self._walk.forget()
            else:
                self._walk.of(Walk(self._model, self._tp_rank, form))
        listed = self._walk.shards()
        if listed is not self._list:
            self._forget_parts()
            found: dict[str, list[Shard]] = defaultdict(list)
            for shard in listed:
                found[shard.name].append(shard)
            self._list, self._held = listed, dict(found)
        self._looked = True
        return self._held

    def trust(self, names: Iterable[str]) -> int:
        """Let tensors in whose values would be others if they lay elsewhere.

        Args:
            names: of tensors that loaders have written and digests have proven.

        Returns:
            How many are let in by now.
        """
        held = self.held()
        able = [name for name in names if name in held and name not in self._trusted]
        if able:
            self._trusted.update(_telling({name: held[name] for name in able}))
            self._forget_parts()
        return len(self._trusted)

    def distrust(self) -> None:
        """Let nothing in."""
        self._trusted.clear()
        self._forget_parts()

    def part(self, named: Sequence[Named]) -> Parts:
        """Part a bucket into what is copied and what loaders take."""
        held = self.held()
        if os.environ.get(LOADERS_ONLY) == "1":
            return Parts(named, (), named, ())
        # The parts hold the tensors, so that no other one has the number of one of them.
        key = tuple([name for name, _ in named]), tuple([id(tensor) for _, tensor in named])
        parts = self._parts.get(key) or self._before.get(key)
        if parts is None:
            trusted = ((name, tensor) for name, tensor in named if name in self._trusted)
            pairs = {name: _pairs(tensor, held.get(name, ())) for name, tensor in trusted}
            copied = [name for name, those in pairs.items() if those]
            others = [(name, tensor) for name, tensor in named if not pairs.get(name)]
            parts = Parts(named, copied, others, _together(pairs.values()))
        self._parts[key] = parts
        return parts


class Parts(NamedTuple):
    """What becomes of a bucket.

    Attributes:
        named: the bucket.
        copied: names of what is copied.
        others: what loaders take.
        moves: lists of tensors that are copied in one call: to, and from.
    """

    named: Sequence[Named]
    copied: Sequence[str]
    others: Sequence[Named]
    moves: Sequence[Move]


def copy(moves: Iterable[Move]) -> None:
    """Copy lists of tensors, each with one call."""
    with torch.no_grad():
        for to, parts in moves:
            torch._foreach_copy_(to, parts)


def _pairs(tensor: torch.Tensor, held: Iterable[Shard]) -> list[Pair]:
    """Return what is copied where; nothing where the tensor is not what memory holds."""
    pairs = []
    for shard in held:
        to = shard.tensor
        if to.dtype != tensor.dtype or to.dim() != tensor.dim():
            return []
        part = tensor
        if tensor.shape != to.shape:  # most often they are the same
            for side, start in zip(range(to.dim()), (shard.row, shard.column), strict=False):
                if start + to.shape[side] > tensor.shape[side]:
                    return []
                part = part.narrow(side, start, to.shape[side])
            if part.shape != to.shape:
                return []
        pairs.append(_widened(to, part))
    return pairs


def _widened(*both: torch.Tensor) -> Pair:
    """Return what is copied as words of 8 bytes: a GPU takes fewer steps for as many bytes."""
    if all(t.is_contiguous() and _in_words(t) for t in both):
        to, part = (t.view(-1).view(torch.int64) for t in both)
    else:
        # FP8 as bytes: torch has fewer fast kernels for it.
        to, part = (t.view(torch.uint8) if t.element_size() == 1 else t for t in both)
    return to, part


def _in_words(t: torch.Tensor) -> bool:
    size = t.element_size()
    return not any(n % 8 for n in (t.nbytes, t.data_ptr(), t.storage_offset() * size))


def _together(pairs: Iterable[Iterable[Pair]]) -> list[Move]:
    """Return what is copied in one call: all of a dtype, which are quick if none is cut."""
    alike: dict[object, list[Pair]] = defaultdict(list)
    for pair in chain.from_iterable(pairs):
        alike[(pair[0].dtype, *(t.is_contiguous() for t in pair))].append(pair)
    return [([to for to, _ in those], [part for _, part in those]) for those in alike.values()]


def _telling(held: Mapping[str, Sequence[Shard]]) -> set[str]:
    """Return the names whose values would not be the same in another place."""
    flat = [(name, shard) for name, those in held.items() for shard in those if _size(shard)]
    if not flat:
        return set()
    sums = digests((shard.tensor, shard.row, shard.column) for _, shard in flat)
    bits = [shard.tensor.view(_BITS[shard.tensor.element_size()]) for _, shard in flat]
    # Without a copy of any: the largest table would not fit beside a serving engine.
    ends = [torch.aminmax(b) for b in bits]
    varied = torch.stack([low != high for low, high in ends]).tolist()
    kinds = [
        (tuple(shard.tensor.shape), shard.tensor.dtype, total)
        for (_, shard), total in zip(flat, sums, strict=True)
    ]
    count = Counter(kinds)
    dull = {
        name
        for (name, _), kind, differs in zip(flat, kinds, varied, strict=True)
        if not differs or count[kind] > 1
    }
    return {name for name, _ in flat} - dull


def _size(shard: Shard) -> int:
    return shard.tensor.numel()
