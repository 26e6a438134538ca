"""What one rank holds of a checkpoint: its names, their digests, and more of a few.

Tensors are shown in the checkpoint's form, as far as the engine can show them so.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import inspection, manifest
from fp8ctl.engines.hooks.shards import Walk
from fp8ctl.engines.hooks.walk import Known

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from fp8ctl.engines.hooks.engine import Engine


class Inventory:
    """The weights of one rank, as they are told to the server."""

    def __init__(self, model: torch.nn.Module, rank: int, tp_rank: int, engine: Engine) -> None:
        """Look at nothing yet.

        Args:
            model: as the engine built and loaded it.
            rank: of this process among the ranks of its server.
            tp_rank: of this process among those that share the same layers.
            engine: what its engine says of it.
        """
        self._model = model
        self._rank = rank
        self._tp_rank = tp_rank
        self._engine = engine
        self._known = Known()

    def forget(self) -> None:
        """Look at every module again: parameters may be elsewhere."""
        self._known.forget()

    def digests(self, start: int | None = 0, most: int | None = None) -> dict[str, Any]:
        """Return place, type and digest of what this rank holds.

        Args:
            start, most: of a slice, as `inspection.digests` takes them; None for a start asks
                for nothing.

        Returns:
            rank; format: "checkpoint", the word of an `Own`, or "engine" (a kernel's own form);
            unfilled: what the unscaled guard saw nobody load; tensors, next and seconds as
            `inspection.digests`.
        """
        word, walk = self._walk()
        told: dict[str, Any] = {"tensors": [], "next": None, "seconds": 0.0}
        if start is not None:
            # A slice is asked for by a check, which is to look for itself.
            told = inspection.digests(self._known.of(walk) if most is None else walk, start, most)
        unfilled = self._engine.guard("fp8ctl_unfilled", self._model)
        return {"rank": self._rank, "format": word, "unfilled": unfilled, **told}

    def inspect(
        self, names: Sequence[str], rows: Mapping[str, Sequence[int]], most: int
    ) -> dict[str, Any]:
        """Return more of a few tensors: `tensors`, as `inspection.inspect` has them."""
        told = inspection.inspect(self._walk()[1], names, rows, most)
        return {"rank": self._rank, "tensors": told}

    def names(self) -> dict[str, Any]:
        """Return the checkpoint tensors that this rank holds: names, and those tied to others."""
        where: dict[tuple[int, torch.Size], str] = {}
        same: dict[str, str] = {}
        names: dict[str, None] = {}
        walk = Walk(self._model, self._tp_rank, self._engine.form(self._model))
        for held in walk.shards():
            names[held.name] = None
            if held.tensor.numel():
                first = where.setdefault((held.tensor.data_ptr(), held.tensor.shape), held.name)
                if first != held.name:
                    same[held.name] = first
        return {"names": [*names], "same": same}

    def _walk(self) -> tuple[str, Walk]:
        """Return the word for the form that weights are shown in, and the way to them."""
        form = self._engine.form(self._model)
        own = None if form is not None else self._engine.own(self._model)
        if own is not None:
            walk = Walk(self._model, self._tp_rank, own.form, own.more, self._on_disk)
            return own.word, walk
        word = "engine" if form is None else "checkpoint"
        return word, Walk(self._model, self._tp_rank, form, on_disk=self._on_disk)

    @functools.cached_property
    def _on_disk(self) -> frozenset[str]:
        """Names of the tensors of the plan's checkpoint."""
        return frozenset(tensor["name"] for tensor in manifest.read().get("tensors", []))
