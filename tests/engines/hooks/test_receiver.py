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
