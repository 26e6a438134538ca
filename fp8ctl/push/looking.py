"""What is found out about tensors that were written to a bucket: digests, NaN, a recorder's facts.

On a GPU it is queued behind what writes them, and fetched: who asks for it later waits for nothing
that was queued since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp8ctl.errors import PlanDoesNotFitError
from fp8ctl.kernels import digest as digests
from fp8ctl.kernels.digest import to_text
from fp8ctl.kernels.fetched import Fetched
from fp8ctl.push.facts import peaks
from fp8ctl.wire import NO_FACTS, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from fp8ctl.course import Placed

    Facts = Callable[[list[Entry], list[torch.Tensor]], list[dict[str, float]]]


@dataclass(frozen=True)
class Looker:
    """What an update wants to know of its tensors.

    Attributes:
        digest: the digest of each.
        always: names of which it is wanted in any case.
        made: codes come as they are: nobody has looked yet whether one is NaN.
        facts: returns the recorder's; None: nobody asks.
    """

    digest: bool
    always: Collection[str]
    made: bool
    facts: Facts | None

    def begin(self, placed: Placed, check: Callable[[], object]) -> Callable[[], list[Entry]]:
        """Begin to look at tensors.

        Args:
            placed: in a bucket.
            check: waits for the scales that are made there, and raises where one is not finite.

        Returns:
            What waits, and returns the entries with digests and facts; it raises
            PlanDoesNotFitError for what is not finite.
        """
        batch, tensors = placed.entries, placed.tensors
        kept = placed.parcel.floats
        found = [peaks([tensors[i] for i in kept])] if kept else []
        if self.made:
            codes = [
                i
                for i, entry in enumerate(batch)
                if entry.dtype == "float8_e4m3fn" and entry.nbytes
            ]
            # 0x7F, with either sign, is the one NaN of this type.
            bad = (((tensors[i].view(torch.uint8) & 0x7F) == 0x7F).any() for i in codes)
            found += [torch.where(one, math.nan, 0.0).double().view(1) for one in bad]
            kept = [*kept, *codes]
        highest = torch.cat(found) if len(found) > 1 else found[0] if found else None
        fetched = None if highest is None else Fetched(highest)
        sums = self._sums(placed)

        def ended() -> list[Entry]:
            check()
            # The recorder's facts, which few ask for, are waited for by themselves.
            facts = [NO_FACTS] * len(batch) if self.facts is None else self.facts(batch, tensors)
            texts = sums()
            numbers = () if fetched is None else fetched.tolist()
            for i, peak in zip(kept, numbers, strict=True):
                if not math.isfinite(peak):
                    raise _not_finite(batch[i].name, tensors[i])
            return [
                Entry(e.name, e.dtype, e.shape, e.offset, text, of_it)
                for e, text, of_it in zip(batch, texts, facts, strict=True)
            ]

        return ended

    def _sums(self, placed: Placed) -> Callable[[], list[str]]:
        """Begin with the digests that are wanted; return what waits for them."""
        if self.digest:
            all_ = placed.digests.start()
            return lambda: [to_text(one) for one in all_()]
        asked = [i for i, entry in enumerate(placed.entries) if entry.name in self.always]
        some = digests.start((placed.tensors[i], 0, 0) for i in asked)

        def texts() -> list[str]:
            found = dict(zip(asked, some(), strict=True))
            return [to_text(found[i]) if i in found else "" for i in range(len(placed.entries))]

        return texts


def _not_finite(name: str, tensor: torch.Tensor) -> PlanDoesNotFitError:
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    [index, *_] = (~torch.isfinite(wide)).nonzero().tolist()
    value = float(wide[tuple(index)])
    return PlanDoesNotFitError(
        f"{name}: non-finite value {value} at index {index}; it would spoil every answer",
        hint="look at the optimiser's step",
        data={"tensor": name, "index": index},
    )
