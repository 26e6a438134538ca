"""Buckets of weights go into a model that serves, in the worker of one rank.

A push brings a bucket (`carriers`) and the list of what lies where in it
(`wire.Entry`). Tensors are views of the bucket, and go into the model on one of
two ways: by the engine's own `load_weights`, which knows names, fused modules,
ranks and experts, and takes 50 to 100 us of Python a tensor; or, once digests have
proven where they lie, by copies (`rectangles`).
"""

from __future__ import annotations

import contextlib
import time
import traceback
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import wire
from fp8ctl.engines.hooks.inventory import Inventory
from fp8ctl.engines.hooks.rectangles import Rectangles, copy
from fp8ctl.engines.hooks.slots import Slots
from fp8ctl.kernels import known

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from fp8ctl.engines.hooks.engine import Engine
    from fp8ctl.engines.hooks.slots import Open
    from fp8ctl.wire import Entry

Named = tuple[str, torch.Tensor]

#: Copies that a GPU may have to wait with for a bucket, each a launch where rectangles are cut: it
#: takes a thousand or so, and who launches more then waits, perhaps with Python's lock.
_MOST_BEHIND = 256


class Receiver:
    """The model of one rank, and what arrives for it.

    Attributes:
        model: as the engine built and loaded it.
        rank: of this process among the ranks of its server.
        arrived: names of the tensors that updates brought, since the start or since one
            broke off.
        broken: True where loading raised, so that half of a set may be in place.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rank: int,
        engine: Engine,
        *,
        tp_rank: int | None = None,
        open_carrier: Open | None = None,
    ) -> None:
        """Take a model over.

        Args:
            model: with a method `load_weights`.
            rank: of this process among the ranks of its server.
            engine: what its engine says of it.
            tp_rank: of this process among those that share the same layers; `rank` where
                layers are not divided otherwise.
            open_carrier: instead of `carriers.ends.receive`.
        """
        self.model = model
        self.rank = rank
        self.arrived: set[str] = set()
        self.broken = False
        self._engine = engine
        self._load_weights: Any = getattr(model, "load_weights", None)
        self._slots = Slots(open_carrier)
        self._by_loader: set[str] = set()
        #: By number of the bucket: name, bytes and entries of the list that was told last.
        self._known_entries: dict[int, tuple[str, int, list[Entry]]] = {}
        tp_rank = rank if tp_rank is None else tp_rank
        self._rectangles = Rectangles(model, tp_rank, engine.copies)
        self._inventory = Inventory(model, rank, tp_rank, engine)
        self._settled = True
        #: Copies alone have written since the update began: nothing is derived from what they
        #: write, and nothing counts it.
        self._by_copies = False
        #: Something was loaded before all its bytes were known to be here.
        self._coming = False
        #: What the unscaled guard said last, while that still holds.
        self._unfilled: Any = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    # --- questions -------------------------------------------------------------------------

    def answer(self, what: str, details: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a question of the server, with JSON types.

        Args:
            what: "connect", "disconnect", "receive", "progress", "forget", "digests",
                "names", "inspect", "trust" or "refittable".
            details: of the question, as the method of that name takes them.

        Raises:
            ValueError: no such question.
            Exception: whatever went wrong, but for "receive", which says it in its answer.
        """
        if what == "connect":
            return self.connect(details["carrier"])
        if what == "disconnect":
            return self.disconnect()
        if what == "receive":
            slot, nbytes, number = (details[name] for name in ("slot", "nbytes", "number"))
            name, entries = details.get("list", ""), details.get("entries")
            told = self.receive(slot, nbytes, number, name, entries)
            return self._and_then(told, details.get("then"))
        if what == "progress":
            return self._progress(details)
        if what == "forget":
            return self.forget()
        if what == "digests":
            return self._told(details)
        if what == "names":
            return self.names()
        if what == "inspect":
            return self._inventory.inspect(details["names"], details["rows"], details["most"])
        if what == "trust":
            return self.trust(details["names"])
        if what == "refittable":
            return self.refittable()
        raise ValueError(f"unknown question {what!r}")

    def connect(self, offer: Mapping[str, Any]) -> dict[str, Any]:
        """Open the carrier that a client offers, instead of the one that was open.

        Raises:
            Exception: of the carrier, with the reason.
        """
        self.disconnect()
        self._inventory.forget()
        self._slots.open(offer, self.rank, self.device)
        if self.device.type == "cuda":
            # Compiled now, and not when the gate is closed for an update's end.
            with contextlib.suppress(Exception):
                self.digests()
        return {"device": self.device.type}

    def disconnect(self) -> dict[str, Any]:
        """Close the carrier, if one is open."""
        self.broken |= self._coming  # what was on its way may not come any more
        self._coming = False
        # No tensor may be left that uses the carrier's memory.
        self._let_go()
        self._slots.close()
        return {}

    def _let_go(self) -> None:
        """Hold no tensor that uses a carrier's memory, and nothing that was found out for it."""
        self._slots.forget()
        self._rectangles.forget()
        self._known_entries.clear()
        known.forget()

    def refittable(self) -> dict[str, Any]:
        """Say whether the model can be loaded a second time: refittable, why not."""
        reasons = list(self._engine.obstacles(self.model))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return {"refittable": not reasons, "why": f"{reasons[0]}{more}" if reasons else ""}

    def receive(
        self,
        slot: int,
        nbytes: int,
        number: int,
        name: str = "",
        entries: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Load a bucket; when this returns its sender may write where it lay.

        The first of a push is here then: one that is lost leaves the weights as they were. Later
        ones a GPU may still wait for, so that nothing is asked of Python when they come; should
        they be lost, the answer to "progress" says it.

        Args:
            slot: of the carrier.
            nbytes: of the bucket.
            number: of the bucket, from 0. The first of a push looks anew at where
                parameters are.
            name: that the server gave the list of what lies in it.
            entries: this list, `wire.Entry` as JSON; None where it is known by its name.

        Returns:
            loaded: number of tensors; error: "" or what was raised; broken: True where
            something may be in place all the same; seconds: bucket (until it is known where
            it goes, and its bytes are there or on their way), loaders, copies, device (until
            the sender may write again); ways: number of tensors on each.
        """
        clock = _Clock()
        ways = {"loaders": 0, "copies": 0}
        touched = False
        error = ""
        names: list[str] = []
        try:
            if number == 0:
                self._begin()  # while the bucket is on its way
            read = self._read(number, name, nbytes, entries)
            held = self._slots.views(slot, nbytes, read, here=number == 0)
            self._coming = number > 0
            parts = self._rectangles.part(held)
            if parts.others or sum(len(to) for to, _ in parts.moves) > _MOST_BEHIND:
                self._slots.arrived()  # a loader may look at what it takes
            clock.lap("bucket")
            touched = True
            self._settled = False
            if parts.others:
                self._doubt()
                self._load(parts.others)
            clock.lap("loaders")
            copy(parts.moves)
            clock.lap("copies")
            self._slots.loaded()
            clock.lap("device")
            self._inventory.copied(parts.copied)
            ways = {"loaders": len(parts.others), "copies": len(parts.copied)}
            names = [name for name, _ in held]
            self.arrived.update(names)
            self._by_loader.update(name for name, _ in parts.others)
        except Exception as e:  # noqa: BLE001 - the answer says what state the weights are in
            traceback.print_exc()
            error = f"{type(e).__name__}: {e}"
            self._all_here()
            self._doubt()
            self._let_go()
            if "weight_loader" in error:
                error += " (is the patch `refit` applied?)"
            self.broken |= touched
        return {
            "loaded": len(names),
            "broken": self.broken,
            "error": error,
            "seconds": clock.laps,
            "ways": ways,
        }

    def _and_then(self, told: dict[str, Any], then: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the answer to a bucket; behind the last one, with the answer to "progress"."""
        if then is None or told["error"]:
            return told
        clock = _Clock()
        progress = self._progress(then)
        clock.lap("settle")
        return {**told, "then": progress, "seconds": {**told["seconds"], **clock.laps}}

    def _progress(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Answer "progress", and go on where this is the one rank and has all as it was sent.

        The server will see the same, and need not ask a third time: its gate is closed until then.
        """
        told = self.progress(asked["expected"], asked.get("layouts"))
        wanted = asked.get("sums")
        whole = not (told["broken"] or told["missing_count"] or told["unfilled"])
        if wanted and whole and told.get("digests", {}).get("sums") == wanted:
            told["resumed"] = self._engine.resume()
        return told

    def _begin(self) -> None:
        """Look where everything is: an update begins."""
        self._all_here()  # of one that was given up
        self._rectangles.look_anew()
        self._inventory.follow()
        self._by_copies = self._settled  # or something is still to be derived

    def _doubt(self) -> None:
        """Take nothing for known: an engine's own code writes weights."""
        self._inventory.doubt()
        self._by_copies, self._unfilled = False, None

    def _read(
        self, number: int, name: str, nbytes: int, entries: Sequence[Mapping[str, Any]] | None
    ) -> list[Entry]:
        """Return the entries of a bucket; most often they are those of the update before."""
        if entries is not None:
            read = wire.read_entries(list(entries), nbytes)
            self._known_entries[number] = name, nbytes, read
            return read
        known = self._known_entries.get(number)
        if known is None or known[:2] != (name, nbytes):
            raise RuntimeError(f"list {name!r:.40} of bucket {number} is not known here")
        return known[2]

    def progress(
        self, expected: Sequence[str], layouts: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Say what has not arrived; after a load that broke off, count from nothing.

        What the engine derives from the weights is brought up to date first.

        Args:
            expected: names.
            layouts: that the server knows of each rank, or of none: it wants `digests`, too. It
                has none of weights that broke off.
        """
        broken = self.broken
        if broken:
            self.forget()
        elif not self._settled and not self._by_copies:
            self._engine.settle(self.model)
            self._inventory.doubt()
        reading = None
        if layouts is None:
            self._inventory.doubt()
        elif not broken:
            reading = self._inventory.end(layouts[self.rank] if layouts else "")
        # A GPU reads the weights meanwhile.
        missing = [name for name in expected if name not in self.arrived]
        if self._unfilled is None:
            self._unfilled = self._engine.guard("fp8ctl_unfilled", self.model)
        told: dict[str, Any] = {
            "broken": broken,
            "unfilled": self._unfilled,
            "missing": missing[:20],
            "missing_count": len(missing),
        }
        if reading is not None:
            told["digests"] = reading()
        if not broken and not self._all_here():  # not before: the device waits for it itself
            return self.progress(expected, layouts)
        if not broken and not self._settled:
            wait_for(self.device)
            self._settled = True
        self._by_copies = False
        return told

    def forget(self) -> dict[str, Any]:
        """Count from nothing: only a whole set makes the weights whole again."""
        self.arrived.clear()
        self._by_loader.clear()
        self._rectangles.distrust()
        self.broken = self._coming = False
        self._doubt()
        self._engine.guard("fp8ctl_forget", self.model)
        return {}

    def _all_here(self) -> bool:
        """Wait for what was on its way when it was loaded; weights are broken where it is lost."""
        coming, self._coming = self._coming, False
        if coming:
            try:
                self._slots.arrived()
            except Exception:  # noqa: BLE001 - the answer says what state the weights are in
                traceback.print_exc()
                self.broken = True
                self._doubt()
                self._let_go()
        return not self.broken

    def digests(self, layout: str = "") -> dict[str, Any]:
        """Return place, type and digest of what this rank holds, as `Inventory.digests`."""
        return self._inventory.digests(layout)

    def _told(self, details: Mapping[str, Any]) -> dict[str, Any]:
        if "starts" in details:
            return self._inventory.slice(details["starts"][self.rank], details["most"])
        layouts = details.get("layouts")
        return self.digests(layouts[self.rank]) if layouts else self.digests()

    def names(self) -> dict[str, Any]:
        """Return the checkpoint tensors that this rank holds, as `Inventory.names`."""
        return self._inventory.names()

    def trust(self, names: Iterable[str]) -> dict[str, Any]:
        """Let tensors be copied from now on, as `rectangles` says.

        Args:
            names: tensors of which the server has compared the digests that all ranks told
                with those that were sent, after the last bucket; all were equal.

        Returns:
            trusted: how many tensors go by copies from now on.
        """
        proven = (name for name in names if name in self._by_loader)
        return {"trusted": self._rectangles.trust(proven)}

    # --- loading ---------------------------------------------------------------------------

    def load(self, named: Iterable[Named], *args: Any, **kwargs: Any) -> Any:
        """Load by a route of the engine's own; remember what was taken or that it raised."""
        self._rectangles.distrust()
        self._doubt()
        # It may put parameters elsewhere: nothing here may keep the old ones alive.
        self._inventory.forget()
        self._rectangles.forget()
        self._settled = False
        return self._load(named, *args, **kwargs)

    def _load(self, named: Iterable[Named], *args: Any, **kwargs: Any) -> Any:

        def tap() -> Iterator[Named]:
            for name, tensor in named:
                yield name, tensor
                self.arrived.add(name)

        try:
            return self._load_weights(tap(), *args, **kwargs)
        except BaseException:
            self.broken = True
            raise


def wait_for(device: torch.device) -> None:
    """Return when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Clock:
    """Seconds between one call and the next, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
