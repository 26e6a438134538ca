"""What one rank tells that it holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.engines.hooks.receiver import Receiver
from fp8ctl.held import gather, packed, unpacked
from fp8ctl.kernels.digest import digest
from tests.engines.hooks.receiving import GATE, NORM, Loading, Settled
from tests.engines.hooks.test_shards import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


def test_names_are_those_of_the_checkpoint_and_say_what_is_one_memory() -> None:
    whole = checkpoint("block")
    rank = Loading(whole, 0, 2)
    receiver = Receiver(rank.model, 0, Settled().engine())
    told = receiver.answer("names", {})
    assert sorted(told["names"]) == sorted({held["name"] for held in receiver.digests()["tensors"]})
    assert told["same"] == {}
    rank.model.other = torch.nn.Module()
    rank.model.other.weight = rank.model.get_parameter(NORM)
    assert receiver.names()["same"] == {"other.weight": NORM}
    assert receiver.names()["names"] == [*told["names"], "other.weight"]


class Told:
    """A rank, what it has told as a whole, and what it tells now to who knows that."""

    def __init__(self) -> None:
        self.model: Any = Loading(checkpoint("block"), 0, 2).model
        self.receiver = Receiver(self.model, 1, Settled().engine(), tp_rank=0)
        self.whole = self.receiver.answer("digests", {})

    def now(self) -> dict[str, Any]:
        return self.receiver.answer(
            "digests", {"layouts": ["another rank's", self.whole["layout"]]}
        )

    def digests(self) -> list[str]:
        """What is told now, one for each tensor that was told as a whole."""
        return [f"{one:016x}" for one in unpacked(self.now()["sums"])]

    def fresh(self) -> list[dict[str, Any]]:
        """What a rank tells that remembers nothing."""
        other = Receiver(self.model, 1, Settled().engine(), tp_rank=0)
        tensors: list[dict[str, Any]] = other.digests()["tensors"]
        return tensors


def test_what_lies_where_is_told_once_and_then_the_sums_alone() -> None:
    rank = Told()
    assert rank.now() == {
        "rank": 1,
        "format": "checkpoint",
        "layout": rank.whole["layout"],
        "sums": packed([int(one["digest"], 16) for one in rank.whole["tensors"]]),
    }


def test_sums_are_of_what_lies_there_now() -> None:
    """A value that was changed by hand; a parameter whose memory is elsewhere; another one."""
    rank = Told()
    norm = rank.model.get_parameter(NORM)
    before = rank.digests()
    with torch.no_grad():
        norm[0] += 1
    after = rank.digests()
    assert [a != b for a, b in zip(before, after, strict=True)].count(True) == 1
    old = norm.data
    norm.data = torch.full_like(old, 7)
    assert rank.digests() == [one["digest"] for one in rank.fresh()]
    rank.model.model.norm.weight = torch.nn.Parameter(torch.full_like(old, 8))
    held = gather([{"rank": 1, "tensors": rank.fresh()}])
    assert rank.digests() == [one["digest"] for one in rank.fresh()]
    assert held[NORM].digest == digest(rank.model.get_parameter(NORM))


def widened(model: Any) -> None:
    norm = model.get_parameter(NORM)
    norm.data = torch.cat([norm.data, norm.data])


def in_another_type(model: Any) -> None:
    model.get_parameter(NORM).data = model.get_parameter(NORM).data.float()


def put_in(model: Any) -> None:
    model.other = torch.nn.Linear(2, 2, bias=False)


def taken_out(model: Any) -> None:
    del model.model.norm.weight


def renamed(model: Any) -> None:
    model.model._modules["last"] = model.model._modules.pop("norm")


def replaced(model: Any) -> None:
    model.model.norm = torch.nn.LayerNorm(64)


@pytest.mark.parametrize("change", [widened, in_another_type, put_in, taken_out, renamed, replaced])
def test_another_layout_is_told_as_a_whole_under_another_name(
    change: Callable[[Any], None],
) -> None:
    rank = Told()
    change(rank.model)
    told = rank.now()
    assert told["layout"] != rank.whole["layout"]
    assert told["tensors"] == rank.fresh()
    assert set(told) == set(rank.whole)
    rank.whole = told
    assert "tensors" not in rank.now()


def test_a_rank_that_was_started_anew_knows_no_name_of_before() -> None:
    rank = Told()
    rank.receiver = Receiver(rank.model, 1, Settled().engine(), tp_rank=0)
    told = rank.now()
    assert told["tensors"] == rank.whole["tensors"]
    assert told["layout"] != rank.whole["layout"]


@pytest.mark.parametrize("unknown", [{}, {"layouts": []}, {"layouts": ["", ""]}])
def test_who_knows_no_layout_is_told_it(unknown: dict[str, Any]) -> None:
    rank = Told()
    assert "tensors" in rank.receiver.answer("digests", unknown)


def test_after_a_load_of_the_engines_own_all_is_looked_at_and_the_name_stays() -> None:
    rank = Told()
    kept = rank.model.get_parameter(GATE.replace("gate_proj", "gate_up_proj")).data
    whole = checkpoint("block")
    rank.receiver.load([(NORM, whole[NORM] + 1)])
    told = rank.now()
    assert told["layout"] == rank.whole["layout"]
    assert rank.digests() == [one["digest"] for one in rank.fresh()]
    assert kept is not None


def test_what_a_form_makes_anew_is_told_by_sums_as_well() -> None:
    """Scales of which the kernels read a copy: the tensor is another one every time."""
    rank = Told()

    def form(_module: nn.Module, _name: str, t: torch.Tensor) -> torch.Tensor | None:
        return t.clone() if t.dim() == 1 else t

    engine = dataclasses.replace(Settled().engine(), form=lambda _model: form)
    rank.receiver = Receiver(rank.model, 1, engine, tp_rank=0)
    rank.whole = rank.receiver.answer("digests", {})
    with torch.no_grad():
        rank.model.get_parameter(NORM).add_(1)
    assert rank.digests() == [one["digest"] for one in rank.fresh()]


def test_the_engine_is_asked_for_its_form_where_something_changed_alone() -> None:
    rank = Told()
    asked: list[object] = []

    def form(model: nn.Module) -> Any:
        asked.append(model)
        return Settled().engine().form(model)

    rank.receiver = Receiver(rank.model, 1, dataclasses.replace(Settled().engine(), form=form))
    rank.receiver.digests()
    rank.receiver.digests()
    assert len(asked) == 1
    rank.model.model.norm.quant_method = object()
    rank.receiver.digests()
    assert len(asked) == 2


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
