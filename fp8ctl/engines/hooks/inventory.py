"""What one rank holds of a checkpoint: its names, their digests, and more of a few.

Tensors are shown in the checkpoint's form, as far as the engine can show them so.
"""

from __future__ import annotations

import functools
import time
import uuid
from typing import TYPE_CHECKING, Any

from fp8ctl import held
from fp8ctl.engines.hooks import inspection, manifest, shards
from fp8ctl.engines.hooks.behind import Behind
from fp8ctl.engines.hooks.shards import Walk
from fp8ctl.engines.hooks.walk import Known
from fp8ctl.kernels.digest import to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from fp8ctl.engines.hooks.engine import Engine
    from fp8ctl.engines.hooks.shards import Shard


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
        self._word = ""
        #: What was told last, as a whole, under a name of its own.
        self._listed: list[Shard] | None = None
        self._places: list[dict[str, object]] = []
        self._layout = ""
        #: Made for the list that it has; and the same while an update goes by copies alone.
        self._behind: Behind | None = None
        self._following: Behind | None = None

    def forget(self) -> None:
        """Look at every module again: parameters may be elsewhere."""
        self._known.forget()
        self._listed = None
        self._behind = self._following = None

    def follow(self) -> None:
        """Begin to read what an update copies, right behind its copies.

        Not where a list of all that is held is still to be made, or is made anew every time. That
        nothing has moved is seen now: until `doubt` nothing runs that could move it.
        """
        kept = self._known.kept
        if kept is None or not self._known.same:
            self._behind = self._following = None
            return
        if self._behind is None or self._behind.listed is not kept:
            self._behind = Behind(kept)
        self._following = self._behind.again()

    def copied(self, names: Iterable[str]) -> None:
        """Hear that copies of these are launched, which write nothing else."""
        if self._following is not None:
            self._following.copied(names)

    def doubt(self) -> None:
        """Hear that something else may have written: all is read at the end."""
        self._following = None

    def digests(self, layout: str = "") -> dict[str, Any]:
        """Return place, type and digest of all that this rank holds.

        Args:
            layout: that the server knows of this rank.

        Returns:
            rank; format: "checkpoint", the word of an `Own`, or "engine" (a kernel's own form);
            layout: a name of this list of places; where the server knows it, sums: of each place,
            as `held.packed` writes them; else tensors: `shards.describe`, unfilled: what the
            unscaled guard saw nobody load, next and seconds, as of a slice.
        """
        return self.begin(layout)()

    def end(self, layout: str = "") -> Callable[[], dict[str, Any]]:
        """As `begin`, at an update's end: what was read behind its copies is not read again."""
        following, self._following = self._following, None
        if following is None:
            return self.begin(layout)
        began, reading = time.perf_counter(), following.end()
        return lambda: self._tell(layout, began, following.listed, reading())

    def begin(self, layout: str = "") -> Callable[[], dict[str, Any]]:
        """Have a GPU begin with `digests`; return what waits for them."""
        began = time.perf_counter()
        # It reads what was held the last time; then Python looks whether that is still it.
        kept = self._known.kept
        reading = shards.begin(kept) if kept is not None else None
        return lambda: self._tell(layout, began, *self._read(kept, reading))

    def _tell(
        self, layout: str, began: float, listed: list[Shard], sums: list[int]
    ) -> dict[str, Any]:
        # Where nothing is made anew the list is the same, and its places are.
        if listed is not self._listed:
            places = [shards.place(shard) for shard in listed]
            if places != self._places or not self._layout:
                self._places, self._layout = places, uuid.uuid4().hex
            self._listed = listed
        told = {"rank": self._rank, "format": self._word, "layout": self._layout}
        if layout == self._layout:
            return {**told, "sums": held.packed(sums)}
        tensors = zip(self._places, map(to_text, sums), strict=True)
        return {
            **told,
            "unfilled": self._engine.guard("fp8ctl_unfilled", self._model),
            "tensors": [{**place, "digest": text} for place, text in tensors],
            "next": None,
            "seconds": time.perf_counter() - began,
        }

    def _read(
        self, kept: list[Shard] | None, reading: Callable[[], list[int]] | None
    ) -> tuple[list[Shard], list[int]]:
        """Return all that is held, and the digest of each.

        Args:
            kept: what was held the last time, where that can be told.
            reading: waits for the digests of that.
        """
        if not self._known.same:
            self._word, walk = self._walk()
            self._known.of(walk)
        listed = self._known.shards()
        if reading is None or listed is not kept:
            reading = shards.begin(listed)
        return listed, reading()

    def slice(self, start: int | None, most: int) -> dict[str, Any]:
        """Return place, type and digest of a part, for a check: it is to look for itself.

        Args:
            start, most: as `inspection.digests` takes them; None for a start asks for nothing.

        Returns:
            rank, format and unfilled as `digests`; tensors, next and seconds as
            `inspection.digests`.
        """
        word, walk = self._walk()
        told: dict[str, Any] = {"tensors": [], "next": None, "seconds": 0.0}
        if start is not None:
            told = inspection.digests(walk, start, most)
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
        for shard in walk.shards():
            names[shard.name] = None
            if shard.tensor.numel():
                first = where.setdefault((shard.tensor.data_ptr(), shard.tensor.shape), shard.name)
                if first != shard.name:
                    same[shard.name] = first
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
