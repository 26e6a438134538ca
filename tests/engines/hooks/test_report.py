"""What all ranks tell of their weights: whole sets only, in slices, and more of a few tensors."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8ctl.engines.hooks import report
from fp8ctl.engines.hooks.engine import Engine
from fp8ctl.engines.hooks.gate import Gate, Outcome
from fp8ctl.engines.hooks.memory import Memory
from fp8ctl.engines.hooks.receiver import Receiver
from fp8ctl.held import gather
from fp8ctl.kernels.digest import digest

if TYPE_CHECKING:
    from collections.abc import Callable

    Asked = Callable[[], None]


def engine() -> Engine:
    def form(_model: nn.Module) -> Any:
        return lambda _module, _attribute, t: t

    return Engine(form=form, copies=form, obstacles=lambda _: [], guard=lambda *_: {})


class Workers:
    """Ranks with a model of four layers each, asked in this process.

    Attributes:
        meanwhile: called behind every slice.
    """

    def __init__(self, ranks: int = 2) -> None:
        self.ranks = ranks
        self.models = [
            nn.Sequential(*(nn.Linear(8, 8 * (1 + rank), bias=False) for _ in range(4)))
            for rank in range(ranks)
        ]
        self.receivers = [Receiver(model, i, engine()) for i, model in enumerate(self.models)]
        self.asked: list[dict[str, Any]] = []
        self.meanwhile: Asked = lambda: None

    async def ask(self, what: str, **details: Any) -> list[dict[str, Any]]:
        self.asked.append({"what": what, **details})
        found = json.loads(json.dumps([one.answer(what, details) for one in self.receivers]))
        self.meanwhile()
        answers: list[dict[str, Any]] = found
        return answers


def gate() -> Gate:
    return Gate(engine="sglang", engine_version="0.4.8", await_push=False)


def answer(workers: Any, of: Gate | None = None) -> tuple[int, dict[str, Any]]:
    plan = {"digest": "x"}
    return asyncio.run(report.answer(workers, of or gate(), Memory("sglang"), plan, "/models/m"))


def more(workers: Any, body: object) -> tuple[int, dict[str, Any]]:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(report.answer_more(workers, Memory("sglang"), text))


def test_weights_that_the_engine_gave_up_are_not_touched() -> None:
    memory = Memory("sglang")
    memory.give_up(["weights"])

    class Nobody:
        ranks = 1

        async def ask(self, what: str, **_: object) -> list[dict[str, Any]]:
            raise AssertionError(f"{what} of memory that is not there")

    nobody: Any = Nobody()
    status, body = asyncio.run(report.answer(nobody, gate(), memory, {}, "/m"))
    assert status == 409
    assert "error" in body
    status, body = asyncio.run(report.answer_more(nobody, memory, b'{"names": ["x.weight"]}'))
    assert status == 409


@pytest.mark.parametrize(("size", "slices"), [(1 << 30, (1, 1)), (200, (4, 4)), (300, (4, 2))])
def test_slices_put_together_are_the_whole(
    size: int, slices: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that have less to tell come to their end earlier."""
    monkeypatch.setattr(report, "SLICE", size)
    workers = Workers()
    status, told = answer(workers)
    assert status == 200
    assert (told["manifest"], told["model"]) == ({"digest": "x"}, "/models/m")
    for rank, model in zip(told["ranks"], workers.models, strict=True):
        assert {t["name"]: t["digest"] for t in rank["tensors"]} == {
            name: f"{digest(t):016x}" for name, t in model.named_parameters()
        }
        assert rank["seconds"]["total"] >= rank["seconds"]["longest"] > 0
    by_rank = tuple(rank["seconds"]["slices"] for rank in told["ranks"])
    assert by_rank[::-1] == slices


def test_weights_that_change_between_two_slices_are_told_anew_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "SLICE", 300)
    workers, there = Workers(1), gate()

    def update() -> None:
        if len(workers.asked) == 2:
            there.begin_update()
            fill(workers, 7)
            there.end_update(Outcome("applied"))

    workers.meanwhile = update
    [rank] = answer(workers, there)[1]["ranks"]
    held = gather([rank])
    sevens = digest(torch.full((8, 8), 7.0))
    assert {one.digest for one in held.values()} == {sevens}, "a mixture never was"
    assert workers.asked[-1] == {"what": "digests"}


def fill(workers: Workers, value: float, layers: slice = slice(None)) -> None:
    """Load some layers, as a bucket does."""
    with torch.no_grad():
        for parameter in list(workers.models[0].parameters())[layers]:
            parameter.fill_(value)


def test_weights_that_change_again_beside_the_second_look_are_told_anew_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second update begins when the first is told of, and ends before that is an answer."""
    monkeypatch.setattr(report, "SLICE", 300)
    workers, there = Workers(1), gate()
    whole: list[int] = []

    def update() -> None:
        if len(workers.asked) == 2:
            there.begin_update()
            fill(workers, 7)
            there.end_update(Outcome("applied"))
            fill(workers, 8, slice(2))  # the first bucket of the next
        elif workers.asked[-1] == {"what": "digests"} and not whole:
            whole.append(1)
            there.begin_update()
            fill(workers, 8)
            there.end_update(Outcome("applied"))

    workers.meanwhile = update
    status, body = answer(workers, there)
    assert (status, body["state"]["state"]) == (200, "ready")
    held = gather(body["ranks"])
    assert {one.digest for one in held.values()} == {digest(torch.full((8, 8), 8.0))}


def test_ranks_in_the_middle_of_an_update_are_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may end while they answer, and the mixture would be told of a server that is ready."""
    monkeypatch.setattr(report, "SLICE", 300)
    workers, there = Workers(1), gate()

    def update() -> None:
        if len(workers.asked) == 2:
            there.begin_update()
            fill(workers, 7, slice(2))
        elif workers.asked[-1] == {"what": "digests"}:
            fill(workers, 7)
            there.end_update(Outcome("applied"))

    workers.meanwhile = update
    status, body = answer(workers, there)
    assert (status, body["state"]["state"], body["ranks"]) == (200, "updating", [])
    assert {"what": "digests"} not in workers.asked


def test_weights_that_never_rest_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SLICE", 300)
    workers, there = Workers(1), gate()

    def update() -> None:
        there.begin_update()
        there.end_update(Outcome("applied"))

    workers.meanwhile = update
    status, body = answer(workers, there)
    assert (status, body["id"]) == (503, "FP8-BUSY")
    assert "the weights changed 4 times" in body["error"]
    assert workers.asked.count({"what": "digests"}) == report.AGAIN
    # One that rests at last is told.
    workers.asked.clear()
    workers.meanwhile = lambda: update() if len(workers.asked) < 5 else None
    assert answer(workers, there)[0] == 200


def test_while_an_update_is_on_its_way_no_rank_is_asked() -> None:
    workers, there = Workers(), gate()
    there.begin_update()
    status, told = answer(workers, there)
    assert (status, told["state"]["state"], told["ranks"]) == (200, "updating", [])
    assert workers.asked == []


def test_a_rank_that_fails_is_an_answer() -> None:
    workers = Workers()

    def fail() -> None:
        raise RuntimeError("rank 1: no")

    workers.meanwhile = fail
    assert answer(workers) == (500, {"error": "rank 1: no"})
    assert more(workers, {"names": ["0.weight"]}) == (500, {"error": "rank 1: no"})


def test_more_of_a_few_tensors_comes_from_all_ranks() -> None:
    workers = Workers()
    names = [f"{i}.weight" for i in range(4)]
    status, told = more(workers, {"names": names, "rows": {"1.weight": [3]}})
    assert status == 200
    assert [(t["rank"], t["name"]) for t in told["tensors"]] == [
        (rank, name) for rank in (0, 1) for name in names
    ]
    rows = {t["name"]: t["rows"] for t in told["tensors"]}
    assert rows == {**dict.fromkeys(names), "1.weight": [3]}


def test_values_of_one_answer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TOGETHER", 1)
    monkeypatch.setattr(report, "VALUES", 1000)
    workers = Workers(1)
    told = more(workers, {"names": [f"{i}.weight" for i in range(4)]})[1]["tensors"]
    assert [t["values"] is not None for t in told] == [True, True, True, False]
    assert all(t["sums"] for t in told), "where they differ can still be seen"
    assert [a["most"] for a in workers.asked][-1] < 256


@pytest.mark.parametrize(
    "body",
    [
        b"no",
        b"[]",
        {},
        {"names": "a"},
        {"names": [1]},
        {"names": ["a"] * 65},
        {"names": ["a"], "rows": []},
        {"names": ["a"], "most": "1"},
    ],
)
def test_what_asks_for_something_else_is_refused(body: object) -> None:
    workers = Workers()
    status, told = more(workers, body)
    assert (status, set(told)) == (400, {"error"})
    assert workers.asked == []
