"""A server's ranks, and a trainer that sends them buckets.

The models are those of `test_shards`: the engines' class names, filled as the engines' weight
loaders cut a checkpoint. The loader here is that same cutting, written without `shards`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import wire
from fp8ctl.carriers import ends
from fp8ctl.engines.hooks.engine import Engine
from fp8ctl.engines.hooks.receiver import Receiver
from fp8ctl.held import gather
from fp8ctl.kernels.digest import digest, to_text
from tests.engines.hooks.test_shards import MLP, Rank, Whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
GATE, NORM = f"{MLP}.gate_proj.weight", "model.norm.weight"
SLOT = 1 << 20


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().view(BITS[t.element_size()])


class Loading:
    """A model of one rank with the `load_weights` of an engine.

    Attributes:
        names: what the loaders were given.
        fails: a name at which they raise.
    """

    def __init__(self, whole: Whole, rank: int, tp: int) -> None:
        self.model: Any = Rank(whole, rank, tp).model()
        self.model.load_weights = self._load  # type: ignore[assignment]
        self.whole = dict(whole)
        self.rank, self.tp = rank, tp
        self.names: list[str] = []
        self.fails = ""

    def _load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        marks = {n: torch.zeros_like(bits(t)) for n, t in self.whole.items()}
        for name, tensor in named:
            if name == self.fails:
                raise ValueError(f"{name}: shape mismatch")
            self.names.append(name)
            self.whole[name] = tensor.clone()
            marks[name] -= 1
        values, marked = self._cut(self.whole), self._cut(self._like(marks))
        nothing = self._cut(self._like({n: torch.zeros_like(m) for n, m in marks.items()}))
        for key, parameter in self.model.named_parameters():
            here = bits(marked[key]) != bits(nothing[key])
            bits(parameter)[here] = bits(values[key])[here]

    def _like(self, marks: dict[str, torch.Tensor]) -> Whole:
        return {name: mark.view(self.whole[name].dtype) for name, mark in marks.items()}

    def _cut(self, whole: Whole) -> dict[str, torch.Tensor]:
        return dict(Rank(whole, self.rank, self.tp).model().named_parameters())


def no_scales(_module: nn.Module, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Per-tensor scales have a copy for the kernels: their loaders do more than copy."""
    return None if attribute.endswith("weight_scale") else t


class Settled:
    """What an engine is told to bring up to date, and what its guard is asked."""

    def __init__(self) -> None:
        self.settled = 0
        self.asked: list[str] = []
        self.obstacles: list[str] = []
        self.resumed = 0

    def engine(self) -> Engine:
        return Engine(
            form=lambda _model: lambda _module, _attribute, t: t,
            copies=lambda _model: no_scales,
            obstacles=lambda _model: self.obstacles,
            guard=self._guard,
            settle=self._settle,
            resume=self._resume,
        )

    def _resume(self) -> bool:
        self.resumed += 1
        return True

    def _guard(self, function: str, _model: nn.Module) -> Any:
        self.asked.append(function)
        return {}

    def _settle(self, _model: nn.Module) -> None:
        self.settled += 1


class Server:
    """All ranks of a server, and a trainer that sends them everything in a few buckets."""

    def __init__(self, whole: Whole, tp: int = 1) -> None:
        self.loading = [Loading(whole, rank, tp) for rank in range(tp)]
        self.settled = Settled()
        self.ranks = [Receiver(m.model, m.rank, self.settled.engine()) for m in self.loading]
        self.sender = ends.sender("memory", SLOT)
        for rank in self.ranks:
            rank.connect(self.sender.offer())

    def close(self) -> None:
        for rank in self.ranks:
            rank.disconnect()
        self.sender.close()

    def write(self, named: Sequence[tuple[str, torch.Tensor]], slot: int = 0) -> dict[str, Any]:
        """Fill a slot; return what "receive" is asked with."""
        slots = [
            wire.Slot(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in named
        ]
        offsets, nbytes = wire.place(slots)
        entries = []
        for one, offset, (_, tensor) in zip(slots, offsets, named, strict=True):
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            self.sender.buffer(slot)[offset : offset + raw.numel()] = raw
            entries.append(json.loads(wire.Entry(one.name, one.dtype, one.shape, offset).to_text()))
        return {"slot": slot, "nbytes": nbytes, "entries": entries}

    def push(self, whole: Whole) -> dict[str, int]:
        """Send a checkpoint; return how many tensors went which way on rank 0."""
        ways = {"loaders": 0, "copies": 0}
        names = list(whole)
        for number, start in enumerate(range(0, len(names), 20)):
            named = [(name, whole[name]) for name in names[start : start + 20]]
            asked = self.write(named, number % 2)
            answers = [rank.answer("receive", {**asked, "number": number}) for rank in self.ranks]
            assert [a["error"] for a in answers] == [""] * len(answers)
            assert {a["loaded"] for a in answers} == {len(named)}
            for way, count in answers[0]["ways"].items():
                ways[way] += count
        return ways

    def unequal(self, whole: Whole) -> set[str]:
        """Return the names that are not what was sent, by the digests of all ranks."""
        held = gather(rank.answer("digests", {}) for rank in self.ranks)
        return {
            name
            for name, t in whole.items()
            if name not in held
            or held[name].text != to_text(digest(t))
            or not held[name].replicas_agree
        }

    def trust(self, names: Iterable[str]) -> int:
        told = [rank.answer("trust", {"names": list(names)})["trusted"] for rank in self.ranks]
        return int(told[0])

    def memory(self) -> list[dict[str, torch.Tensor]]:
        return [{n: bits(t) for n, t in m.model.named_parameters()} for m in self.loading]


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made: list[Server] = []
    yield made
    for server in made:
        server.close()


def serve(servers: list[Server], whole: Whole, tp: int = 1) -> Server:
    servers.append(Server(whole, tp))
    return servers[-1]
