"""A closer look: what is asked of a server, how much, and what becomes of its answers."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import checkpoint, models, reading
from fp8ctl.check import asking, closer
from fp8ctl.check.comparison import Task
from fp8ctl.check.tensors import Line
from fp8ctl.engines.hooks import inspection
from fp8ctl.engines.hooks.shards import Shard
from fp8ctl.render import Reporter
from tests.check.reports import NORM, OUT, SCALE, Q

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from fp8ctl.manifest import Plan


class Held:
    """A rank that holds what the kernel makes of the plan's model, with some bits changed."""

    def __init__(self, plan: Plan, *changed: tuple[str, int, int]) -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.asked: list[tuple[list[str], dict[str, list[int]], int]] = []
        for planned, _, tensor in reading.read_planned(models.read_checkpoint(plan.model), plan):
            self.held |= checkpoint.become(planned, tensor, plan)
        for name, row, column in changed:
            bits = self.held[name].view(torch.uint8)
            bits[row, column * self.held[name].element_size()] ^= 1

    def shards(self) -> Iterator[Shard]:
        return (Shard(name, t, 0, 0, True) for name, t in self.held.items())

    def more(
        self, _url: str, _key: str | None, names: Sequence[str], rows: Any, most: int
    ) -> list[dict[str, Any]]:
        self.asked.append((list(names), dict(rows), most))
        walk: Any = self
        return inspection.inspect(walk, names, rows, most)


def different(*names: str) -> list[Line]:
    return [Line(name, "different", "float8_e4m3fn", True, "rank 0") for name in names]


def look(
    held: Any, plan: Plan, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Line], str]:
    monkeypatch.setattr(asking, "more", held)
    said = io.StringIO()
    report = Reporter(out=io.StringIO(), err=said)
    task = Task(plan, None, Path(sys.executable))
    return closer.look("http://x", None, task, lines, report), said.getvalue()


def test_codes_are_counted_by_the_worker(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(plan, (Q, 3, 2), (SCALE, 1, 0))
    lines, _ = look(held.more, plan, different(Q, SCALE), monkeypatch)
    assert [(x.codes, x.rows, x.detail) for x in lines] == [
        ((1, 64 * 64), "3", "rank 0"),
        ((1, 4), "1", "rank 0"),
    ]
    assert [names for names, _, _ in held.asked] == [[Q, SCALE]]


def test_rows_of_what_is_too_large_are_asked_for(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closer, "_VALUES", 128)
    held = Held(plan, (Q, 3, 2), (Q, 60, 1))
    lines, _ = look(held.more, plan, different(Q), monkeypatch)
    assert (lines[0].codes, lines[0].rows) == ((2, 64 * 64), "3, 60")
    assert [rows for _, rows, _ in held.asked] == [{}, {Q: [3, 60]}]


def test_few_are_looked_at_and_the_strangest_first(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closer, "_CLOSELY", 1)
    held = Held(plan, (Q, 3, 2), (OUT, 5, 5))
    first, second = different(OUT, Q)
    stale = replace(first, looks="stale", version="1")
    lines, _ = look(held.more, plan, [stale, second], monkeypatch)
    assert [x.codes for x in lines] == [None, (1, 64 * 64)]
    assert (lines[0].looks, lines[0].version) == ("stale", "1")


def test_what_is_of_another_type_or_block_needs_no_look(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(plan)
    first, second = different(Q, SCALE)
    lines = [replace(first, looks="bf16"), replace(second, looks="other block")]
    lines += [Line(NORM, "missing", "", False)]
    assert look(held.more, plan, lines, monkeypatch)[0] == lines
    assert held.asked == [([], {}, closer._VALUES)] or held.asked == []


def test_a_server_that_tells_no_more_leaves_what_is_known(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older fp8ctl, for instance; or one whose answer nobody can read."""
    lines = different(Q)
    assert look(lambda *_: [], plan, lines, monkeypatch) == (lines, "")
    nonsense = [{"name": Q, "dtype": "x", "shape": [1], "sums": "", "rows": None, "values": "x"}]
    seen, said = look(lambda *_: nonsense, plan, lines, monkeypatch)
    assert seen == lines
    assert "no closer look" in said
