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

    Facts = Callable[[list[Entry], list[torch.Tensor]], list[dict[str, float]]]

_FLOATS = {"bfloat16", "float16", "float32", "float64"}


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

    def begin(
        self,
        batch: list[Entry],
        tensors: list[torch.Tensor],
        scales: Collection[str],
        check: Callable[[], object],
    ) -> Callable[[], list[Entry]]:
        """Begin to look at tensors.

        Args:
            batch: their entries.
            tensors: in a bucket.
            scales: names of those that `check` answers for.
            check: waits for what writes them, and raises where one is not finite.

        Returns:
            What waits, and returns the entries with digests and facts; it raises
            PlanDoesNotFitError for what is not finite.
        """
        kept = [
            (entry, tensor)
            for entry, tensor in zip(batch, tensors, strict=True)
            if entry.dtype in _FLOATS and entry.name not in scales and tensor.numel()
        ]
        found = [peaks([tensor for _, tensor in kept])] if kept else []
        if self.made:
            codes = [
                (entry, tensor)
                for entry, tensor in zip(batch, tensors, strict=True)
                if entry.dtype == "float8_e4m3fn" and tensor.numel()
            ]
            # 0x7F, with either sign, is the one NaN of this type.
            bad = (((t.view(torch.uint8) & 0x7F) == 0x7F).any() for _, t in codes)
            found += [torch.where(one, math.nan, 0.0).double().view(1) for one in bad]
            kept += codes
        highest = torch.cat(found) if len(found) > 1 else found[0] if found else None
        asked = [self.digest or entry.name in self.always for entry in batch]
        fetched = None if highest is None else Fetched(highest)
        sums = digests.start((t, 0, 0) for t, yes in zip(tensors, asked, strict=True) if yes)

        def ended() -> list[Entry]:
            check()
            # The recorder's facts, which few ask for, are waited for by themselves.
            facts = [NO_FACTS] * len(batch) if self.facts is None else self.facts(batch, tensors)
            made = iter(sums())
            numbers = () if fetched is None else fetched.tolist()
            for (entry, tensor), peak in zip(kept, numbers, strict=True):
                if not math.isfinite(peak):
                    raise _not_finite(entry.name, tensor)
            return [
                Entry(e.name, e.dtype, e.shape, e.offset, to_text(next(made)) if yes else "", of_it)
                for e, yes, of_it in zip(batch, asked, facts, strict=True)
            ]

        return ended


def _not_finite(name: str, tensor: torch.Tensor) -> PlanDoesNotFitError:
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    [index, *_] = (~torch.isfinite(wide)).nonzero().tolist()
    value = float(wide[tuple(index)])
    return PlanDoesNotFitError(
        f"{name}: non-finite value {value} at index {index}; it would spoil every answer",
        hint="look at the optimiser's step",
        data={"tensor": name, "index": index},
    )
