"""Buckets go into a model by its loaders; what fails says what state the weights are in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8ctl.engines.hooks.receiver import Receiver
from tests.engines.hooks.receiving import GATE, NORM, SLOT, Loading, Server, Settled, serve, servers
from tests.engines.hooks.test_shards import checkpoint

__all__ = ["servers"]  # a fixture


def test_what_fails_before_a_weight_is_written_breaks_nothing(
    servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    before = server.memory()[0]
    asked = server.write([(NORM, torch.zeros_like(whole[NORM]))])
    [entry] = asked["entries"]
    for wrong in (
        {**asked, "slot": 7},
        {**asked, "nbytes": SLOT * 2},
        {**asked, "nbytes": 8},
        {**asked, "entries": [{**entry, "dtype": "float4"}]},
        {**asked, "entries": [entry, entry]},
    ):
        answer = server.ranks[0].answer("receive", {**wrong, "number": 0})
        assert answer["error"]
        assert (answer["loaded"], answer["broken"]) == (0, False)
    server.ranks[0].disconnect()
    answer = server.ranks[0].answer("receive", {**asked, "number": 0})
    assert "no carrier is open" in answer["error"]
    assert not answer["broken"]
    assert all(torch.equal(before[n], t) for n, t in server.memory()[0].items())
    capsys.readouterr()


def test_a_loader_that_raises_leaves_the_weights_broken_until_a_new_count(
    servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.loading[0].fails = NORM
    asked = server.write([(GATE, whole[GATE]), (NORM, whole[NORM])])
    answer = server.ranks[0].answer("receive", {**asked, "number": 0})
    assert (answer["loaded"], answer["broken"]) == (0, True)
    assert answer["error"] == f"ValueError: {NORM}: shape mismatch"
    told = server.ranks[0].answer("progress", {"expected": [GATE, NORM], "layouts": []})
    assert (told["broken"], told["missing"]) == (True, [GATE, NORM])
    assert "digests" not in told, "nobody waits for those of half a set"
    assert server.settled.asked == ["fp8ctl_forget", "fp8ctl_unfilled"]
    assert server.settled.settled == 0, "derived from half a set"
    assert "Traceback" in capsys.readouterr().err


def test_progress_brings_up_to_date_what_the_engine_derives_once(servers: list[Server]) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.push(whole)
    for _ in range(2):
        told = server.ranks[0].answer("progress", {"expected": [*whole, "other"]})
        assert (told["broken"], told["missing"], told["missing_count"]) == (False, ["other"], 1)
    assert server.settled.settled == 1


def test_what_an_engine_loads_by_its_own_route_counts_too(servers: list[Server]) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    receiver = server.ranks[0]
    receiver.load([(NORM, whole[NORM])])
    assert receiver.arrived == {NORM}
    server.loading[0].fails = GATE
    with pytest.raises(ValueError, match="shape mismatch"):
        receiver.load([(GATE, whole[GATE])])
    assert receiver.broken


def test_a_new_offer_closes_the_carrier_before_it(servers: list[Server]) -> None:
    server = serve(servers, checkpoint("bf16"))
    first = server.ranks[0]._slots._carrier
    assert first is not None
    assert server.ranks[0].answer("connect", {"carrier": server.sender.offer()}) == {
        "device": "cpu"
    }
    with pytest.raises(Exception, match="slot"):
        first.bucket(0, 8)
    assert server.ranks[0].answer("disconnect", {}) == {}
    assert server.ranks[0].answer("disconnect", {}) == {}, "a second time"


def test_a_model_that_cannot_be_loaded_twice_says_why(servers: list[Server]) -> None:
    server = serve(servers, checkpoint("bf16"))
    assert server.ranks[0].answer("refittable", {}) == {"refittable": True, "why": ""}
    server.settled.obstacles = ["the patch `refit` is not applied", "and more", "and more"]
    assert server.ranks[0].answer("refittable", {}) == {
        "refittable": False,
        "why": "the patch `refit` is not applied (and 2 more)",
    }


def test_a_question_that_nobody_knows_is_an_error(servers: list[Server]) -> None:
    server = serve(servers, checkpoint("bf16"))
    with pytest.raises(ValueError, match="'nonsense'"):
        server.ranks[0].answer("nonsense", {})


def test_on_a_gpu_digests_are_compiled_when_a_client_connects() -> None:
    """Else the first update would do it with the gate closed; what fails then, fails there."""
    asked: list[str] = []

    class Compiling(Receiver):
        device = torch.device("cuda")

        def digests(self, layout: str = "") -> dict[str, Any]:
            asked.append("digests")
            raise RuntimeError("no compiler")

    def carrier(*_: object) -> Any:
        asked.append("carrier")

    rank = Loading(checkpoint("block"), 0, 1)
    receiver = Compiling(rank.model, 0, Settled().engine(), open_carrier=carrier)
    assert receiver.connect({}) == {"device": "cuda"}
    assert asked == ["carrier", "digests"]
    asked.clear()
    Receiver(rank.model, 0, Settled().engine(), open_carrier=carrier).connect({})
    assert asked == ["carrier"], "on a CPU they take a while, and nothing is compiled"


class Late:
    """A carrier whose buckets may come after they were asked for; see `ends.Receiver`."""

    def __init__(self, server: Server) -> None:
        self.slots = server.sender
        self.asked: list[str] = []
        self.lost: Exception | None = None

    def bucket(self, slot: int, nbytes: int, *, here: bool = True) -> torch.Tensor:
        self.asked.append("here" if here else "on its way")
        return self.slots.buffer(slot)[:nbytes]

    def arrived(self) -> None:
        self.asked.append("arrived")
        if self.lost is not None:
            raise self.lost

    def loaded(self) -> None:
        self.asked.append("loaded")

    def close(self) -> None:
        self.asked.append("close")


def proven(servers: list[Server]) -> tuple[Server, Late, list[tuple[str, torch.Tensor]]]:
    """Return a server that copies all it gets, what carries to it, and what it holds."""
    server = serve(servers, checkpoint("block"))
    whole = server.loading[0].whole
    server.push(whole)
    server.ranks[0].answer("progress", {"expected": []})
    server.trust(whole)
    named = [(name, t) for name, t in whole.items() if name in (GATE, NORM)]
    late = Late(server)
    server.ranks[0]._slots._carrier = late
    return server, late, named


def receive(server: Server, named: list[tuple[str, torch.Tensor]], number: int) -> Any:
    asked = server.write(named, number % 2)
    return server.ranks[0].answer("receive", {**asked, "number": number})


PROGRESS = {"expected": [GATE, NORM], "layouts": [""]}


def test_a_gpu_waits_for_all_buckets_but_the_first(servers: list[Server]) -> None:
    """The first that is lost leaves the old weights; so it is here before a weight is written."""
    server, late, named = proven(servers)
    for number in range(3):
        assert not receive(server, named, number)["error"]
    assert late.asked == ["here", "loaded", *["on its way", "loaded"] * 2]
    told = server.ranks[0].answer("progress", PROGRESS)
    assert (told["broken"], told["missing"], "digests" in told) == (False, [], True)
    assert late.asked[5:] == ["loaded", "arrived"]
    server.ranks[0].answer("progress", PROGRESS)
    assert late.asked[6:] == ["arrived"], "once for each update"


def test_loaders_get_no_bytes_that_are_on_their_way(servers: list[Server]) -> None:
    server, late, named = proven(servers)
    server.ranks[0]._rectangles.distrust()
    loading = server.loading[0]
    load, loading.model.load_weights = loading.model.load_weights, None

    def loads(of: Any) -> None:
        late.asked.append("load")
        load(of)

    server.ranks[0]._load_weights = loads
    for number in range(2):
        assert not receive(server, named, number)["error"]
    assert late.asked == [
        *("here", "arrived", "load", "loaded"),
        *("on its way", "arrived", "load", "loaded"),
    ]


def test_a_gpu_has_not_more_to_wait_with_than_it_takes(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, late, named = proven(servers)
    for most, asked in ((1, ["on its way", "arrived"]), (2, ["on its way"])):
        monkeypatch.setattr("fp8ctl.engines.hooks.receiver._MOST_BEHIND", most)
        late.asked.clear()
        receive(server, named, 1)
        assert late.asked == [*asked, "loaded"]


@pytest.mark.parametrize("then", ["progress", "begin", "bucket", "disconnect"])
def test_a_bucket_that_was_loaded_and_is_lost_breaks_the_weights(
    then: str, servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    server, late, named = proven(servers)
    receiver = server.ranks[0]
    for number in range(2):
        receive(server, named, number)
    late.lost = ConnectionError("the trainer was killed")
    assert not receiver.broken
    if then == "begin":
        assert receive(server, named, 0)["broken"]
    elif then == "bucket":
        asked = {**server.write(named, 0), "number": 2, "nbytes": 8}
        assert receiver.answer("receive", asked)["broken"]
    elif then == "disconnect":
        receiver.answer("disconnect", {})
    told = receiver.answer("progress", PROGRESS)
    assert told["broken"]
    assert "digests" not in told
    assert receiver.arrived == set(), "it counts from nothing"
    assert then == "begin" or not receiver._slots._seen, "views of what the carrier gives back"
    assert then == "disconnect" or "the trainer was killed" in capsys.readouterr().err


def test_what_is_lost_of_an_update_that_has_failed_is_not_asked_for(servers: list[Server]) -> None:
    """Its server has the ranks count from nothing: only a whole set makes it right again."""
    server, late, named = proven(servers)
    for number in range(2):
        receive(server, named, number)
    late.lost = ConnectionError("the trainer was killed")
    server.ranks[0].answer("forget", {})
    assert not server.ranks[0].answer("progress", PROGRESS)["broken"]
    assert "arrived" not in late.asked


@pytest.mark.parametrize("behind", [False, True], ids=["asked", "asked with the last bucket"])
def test_the_one_rank_lets_its_engine_go_on_when_it_holds_what_was_sent(
    behind: bool, servers: list[Server]
) -> None:
    server, _, named = proven(servers)
    receiver = server.ranks[0]
    layout = receiver.answer("digests", {})["layout"]
    sums = receiver.answer("digests", {"layouts": [layout]})["sums"]

    def asked(**more: Any) -> Any:
        then = {"expected": [GATE], "layouts": [layout], "sums": sums, **more}
        if not behind:
            return receiver.answer("progress", then)
        slot = server.write(named, 0)
        return receiver.answer("receive", {**slot, "number": 0, "then": then})["then"]

    assert asked()["resumed"] is True
    assert server.settled.resumed == 1
    other = "0" * 16 + sums[16:]
    unlike: list[dict[str, Any]] = [
        *({"sums": other}, {"sums": ""}, {"expected": ["x"]}, {"layouts": []}),
    ]
    for more in unlike:
        assert "resumed" not in asked(**more)
    receiver.broken = True
    assert "resumed" not in asked()
    assert server.settled.resumed == 1
    # What the unscaled guard saw nobody load.
    receiver._unfilled = {GATE: "rows 0-3"}
    receiver._by_copies = True
    assert "resumed" not in receiver.answer(
        "progress", {"expected": [], "layouts": [layout], "sums": sums}
    )
