"""What copies have written is read right behind them, and is what the rank holds at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.engines.hooks import shards
from fp8ctl.engines.hooks.behind import Behind
from fp8ctl.engines.hooks.shards import Shard
from fp8ctl.held import gather
from fp8ctl.kernels.digest import digest, to_text
from tests.engines.hooks.receiving import GATE, NORM, Server, serve, servers
from tests.engines.hooks.test_rectangles import another
from tests.engines.hooks.test_shards import FORMS, Whole, checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["servers"]  # a fixture


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of what is read, together, each time that something is."""
    lists: list[list[str]] = []
    begin, prepare = shards.begin, shards.prepare

    def noted(held: Iterable[Shard]) -> Callable[[], list[int]]:
        those = list(held)
        lists.append([shard.name for shard in those])
        return begin(those)

    class Noted:
        def __init__(self, held: Iterable[Shard]) -> None:
            self.those = list(held)
            self.prepared = prepare(self.those)

        def start(self) -> Callable[[], list[int]]:
            lists.append([shard.name for shard in self.those])
            return self.prepared.start()

    monkeypatch.setattr(shards, "begin", noted)
    monkeypatch.setattr(shards, "prepare", Noted)
    return lists


def ended(server: Server, *layouts: str) -> list[dict[str, Any]]:
    """End an update; return what the ranks tell of what they hold, to who knows their layouts."""
    told = [
        rank.answer("progress", {"expected": [], "layouts": [*layouts]}) for rank in server.ranks
    ]
    assert not any(one["broken"] for one in told)
    return [one["digests"] for one in told]


def unequal(told: list[dict[str, Any]], whole: Whole) -> set[str]:
    held = gather(told)
    return {
        name
        for name, t in whole.items()
        if held[name].text != to_text(digest(t)) or not held[name].replicas_agree
    }


def copying(servers: list[Server], whole: Whole, tp: int = 1) -> Server:
    """Return a server that copies all of a checkpoint, and knows what the buckets bring."""
    server = serve(servers, whole, tp)
    server.push(whole)
    assert unequal(ended(server), whole) == set()
    assert server.trust(whole) == len(whole)
    server.push(whole)
    assert unequal(ended(server), whole) == set()
    return server


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_update_by_copies_is_read_behind_them_once(
    tp: int, servers: list[Server], read: list[list[str]]
) -> None:
    first, second = checkpoint("block"), another(checkpoint("block"))
    server = copying(servers, first, tp)
    for whole in (second, first):
        read.clear()
        assert server.push(whole)["loaders"] == 0
        before = sum(map(len, read))
        told = ended(server)
        assert unequal(told, whole) == set()
        assert sum(map(len, read)) == before == sum(len(one["tensors"]) for one in told)


def test_what_was_found_out_for_a_list_is_kept_as_long_as_it_comes_again(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []
    prepare = shards.prepare

    def prepared(held: Iterable[Shard]) -> Any:
        those = list(held)
        made.append([shard.name for shard in those])
        return prepare(those)

    monkeypatch.setattr(shards, "prepare", prepared)
    whole = checkpoint("block")
    server = copying(servers, whole)
    server.push(whole)
    ended(server)
    made.clear()
    for _ in range(3):
        server.push(whole)
        assert unequal(ended(server), whole) == set()
    assert not made
    for _ in range(3):
        server.push({NORM: whole[NORM]})
        ended(server)
    assert [NORM] in made
    made.clear()
    server.push(whole)
    ended(server)
    assert made, "another list came for two updates"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_told_is_what_a_rank_tells_that_reads_it_all(
    form: str, servers: list[Server]
) -> None:
    first, second = checkpoint(form), another(checkpoint(form))
    server = serve(servers, first, 2)
    server.push(first)
    ended(server)
    server.trust(first)
    for whole in (second, first, second):
        server.push(whole)
        told = ended(server)
        fresh = [rank.answer("digests", {}) for rank in server.ranks]
        assert [one["tensors"] for one in told] == [one["tensors"] for one in fresh]


def test_a_part_is_read_behind_its_copies_and_the_rest_at_the_end(
    servers: list[Server], read: list[list[str]]
) -> None:
    whole = checkpoint("block")
    server = copying(servers, whole)
    server.push({NORM: whole[NORM]})
    ended(server)
    read.clear()
    server.push({NORM: whole[NORM] + 1})
    assert read == [[NORM]]
    assert unequal(ended(server), whole) == {NORM}
    assert NORM not in read[1]


def test_buckets_that_bring_something_else_are_read_at_the_end_with_all_others(
    servers: list[Server], read: list[list[str]]
) -> None:
    """What is left out differs from step to step: every list would be cut anew, and remembered."""
    whole = checkpoint("block")
    server = copying(servers, whole)
    everything = [shard["name"] for shard in ended(server)[0]["tensors"]]
    for left_out in (1, 3, 5):
        read.clear()
        server.push(dict([*whole.items()][left_out:]))
        assert unequal(ended(server), whole) == set()
        assert read == [everything]
    for lists in (1, len(whole) // 20 + 1):
        read.clear()
        server.push(whole)
        assert unequal(ended(server), whole) == set()
        assert len(read) == lists


def test_who_wants_no_digests_has_none_read_and_leaves_none(
    servers: list[Server], read: list[list[str]]
) -> None:
    whole = checkpoint("block")
    server = copying(servers, whole)
    server.push(whole)
    server.ranks[0].answer("progress", {"expected": []})
    with torch.no_grad():
        server.loading[0].model.get_parameter(NORM).add_(1)
    assert unequal(ended(server), whole) == {NORM}


def test_after_a_loader_all_is_read_at_the_end(servers: list[Server]) -> None:
    """A loader is the engine's code: this one writes into what was copied before it."""
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.push(whole)
    ended(server)
    last = list(whole)[-1]
    server.trust(set(whole) - {last})
    copied = {name: whole[name] for name in [NORM, *whole] if name != last}
    for _ in range(2):
        assert server.push(copied)["loaders"] == 0
        ended(server)
    model = server.loading[0].model
    load = server.ranks[0]._load_weights

    def astray(named: Any) -> None:
        load(named)
        with torch.no_grad():
            model.get_parameter(NORM).add_(1)

    server.ranks[0]._load_weights = astray
    assert server.push({**copied, last: whole[last]})["loaders"] == 1
    assert unequal(ended(server), whole) == {NORM}


@pytest.mark.parametrize("what", ["route", "derived", "moved"])
def test_what_else_may_write_is_seen_at_the_end(what: str, servers: list[Server]) -> None:
    """A route of the engine's own; what an engine derives; parameters that are elsewhere."""
    whole = checkpoint("block")
    server = copying(servers, whole)
    rank, norm = server.ranks[0], server.loading[0].model.get_parameter(NORM)
    if what == "derived":
        rank._settled = False  # of an update that nobody ended

        def derive(_model: object) -> None:
            with torch.no_grad():
                norm.add_(1)

        server.settled._settle = derive  # type: ignore[method-assign]
        rank._engine = server.settled.engine()
    if what == "moved":
        norm.data = norm.data.clone()
    server.push(whole)
    settled = server.settled.settled
    if what == "route":
        rank.load([(NORM, whole[NORM] + 1)])
    server.settled.asked.clear()
    assert unequal(ended(server), whole) == (set() if what == "moved" else {NORM})
    if what == "route":
        assert "fp8ctl_unfilled" in server.settled.asked
        assert server.settled.settled == settled + 1


def test_an_update_that_was_given_up_leaves_nothing_for_the_next(servers: list[Server]) -> None:
    first, second = checkpoint("block"), another(checkpoint("block"))
    server = copying(servers, first)
    fused = server.loading[0].model.get_parameter(GATE.replace("gate_proj", "gate_up_proj"))
    server.push(second)
    with torch.no_grad():
        fused.zero_()
    server.push({NORM: first[NORM]})
    assert GATE in unequal(ended(server), second)
    server.push(second)
    assert unequal(ended(server), second) == set()
    with torch.no_grad():
        fused.zero_()
    assert GATE in unequal(ended(server), second), "an end that comes again reads anew"


def test_the_guard_is_asked_where_loaders_wrote_alone(servers: list[Server]) -> None:
    whole = checkpoint("block")
    server = copying(servers, whole)
    [told] = ended(server)
    server.settled.asked.clear()
    settled = server.settled.settled
    server.push(whole)
    ended(server, told["layout"])
    assert (server.settled.asked, server.settled.settled) == ([], settled)
    server.ranks[0].answer("forget", {})
    server.push(whole)
    ended(server, told["layout"])
    assert server.settled.asked[0] == "fp8ctl_forget"
    assert "fp8ctl_unfilled" in server.settled.asked
    assert server.settled.settled == settled + 1


def test_tensors_of_two_names_in_one_memory_are_read_at_the_end(read: list[list[str]]) -> None:
    """A tied head is written twice where it is sent twice: the first digest would be old."""
    memory, own = torch.zeros(8, 4), torch.arange(4.0)
    listed = [
        Shard("embedding", memory, 0, 0, True),
        Shard("own", own, 0, 0, True),
        Shard("head", memory[:6], 0, 0, True),
        Shard("nothing", memory[:0], 0, 0, True),
        Shard("inside", memory.t()[1:2], 0, 0, True),
    ]
    behind = Behind(listed)
    for turn in range(3):
        read.clear()
        behind.again().copied(["embedding", "own"])
        memory[:6] += 1
        behind.copied(["head", "inside", "unknown"])
        assert read == ([["own"]] if turn else [])
        assert behind.end()() == [digest(shard.tensor) for shard in listed]
    behind.again().copied(["embedding", "own"])
    behind.copied(["head", "inside", "unknown"])
    own += 1  # it was given up, and another one ends
    assert behind.again().end()() == [digest(shard.tensor) for shard in listed]


def test_parts_of_one_memory_that_share_nothing_are_read_behind_their_copies(
    read: list[list[str]],
) -> None:
    fused = torch.arange(32.0).view(8, 4)
    listed = [Shard(name, fused[i : i + 4], 0, 0, True) for name, i in (("q", 0), ("k", 4))]
    behind = Behind(listed)
    for turn in range(2):
        read.clear()
        behind.copied(["k"])
        behind.copied(["q"])
        assert behind.end()() == [digest(shard.tensor) for shard in listed]
        assert read == ([["k"], ["q"]] if turn else [["q", "k"]])
