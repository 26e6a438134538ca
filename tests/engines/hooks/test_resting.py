"""The engine is brought to rest and back, and what runs on it meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from fp8ctl.engines.hooks import resting
from tests.engines.hooks.pushing import NAMES, Server, digest, error, never, run, until

pytestmark = pytest.mark.filterwarnings("error")

BOOM = RuntimeError("rank 1: out of memory")


@pytest.mark.parametrize("in_flight", ["abort", "pause"])
def test_requests_in_flight_are_ended_or_go_on_with_the_new_weights(in_flight: str) -> None:
    async def test() -> None:
        server = Server()
        server.workers.running = 3
        assert (await server.push("B", in_flight=in_flight))[0] == 200
        assert server.workers.running == (3 if in_flight == "pause" else 0)
        assert server.workers.calls.index("flush") < server.workers.calls.index("resume")

    run(test())


@pytest.mark.parametrize("ends", [True, False])
def test_what_was_paused_is_ended_after_a_failure_or_stays_at_rest(ends: bool) -> None:
    """It would go on with weights of two versions (`Ranks.resume` asserts that)."""

    async def test() -> None:
        server = Server()
        server.workers.running = 2
        await server.begin(in_flight="pause")
        await server.bucket(0, NAMES[:1])
        if not ends:
            server.workers.faults["hold abort"] = BOOM
        await server.abort()
        assert server.state == "failed"
        assert server.workers.at_rest is not ends
        # The next push does not wait for what waits for it.
        server.workers.faults.clear()
        assert (await server.push("C", in_flight="finish"))[0] == 200
        assert (server.workers.running, server.workers.paused) == (0, 0)

    run(test())


def test_an_engine_that_was_left_at_rest_does_not_keep_its_own_routes_waiting() -> None:
    """SGLang's wait for requests that run, and those that were paused do so for ever."""

    async def test() -> None:
        server = Server()
        server.workers.running = 1
        await server.begin(in_flight="pause")
        await server.bucket(0, NAMES[:1])
        server.workers.faults["hold abort"] = BOOM
        await server.abort()
        with pytest.raises(RuntimeError):
            async with server.updates.alone("/update_weights_from_disk"):
                raise AssertionError("it would wait for ever")
        assert server.workers.at_rest
        assert server.state == "failed"
        server.workers.faults.clear()
        server.workers.held = [{n: digest("A", n) for n in NAMES} for _ in server.workers.held]
        async with server.updates.alone("/update_weights_from_disk"):
            assert (server.workers.paused, server.workers.at_rest) == (0, False)

    run(test())


def test_an_engine_that_cannot_be_brought_back_is_no_server_that_is_ready() -> None:
    async def test() -> None:
        server = Server()
        server.workers.faults["resume"] = BOOM
        await server.begin()
        status, answer = await server.abort()
        assert (status, answer["outcome"], answer["state"]) == (200, "failed", "failed")
        assert "could not be brought back" in answer["message"]

    run(test())


def test_an_abort_does_not_wait_for_requests_that_run() -> None:
    async def test() -> None:
        server = Server()
        server.workers.running = 1
        begin = asyncio.ensure_future(server.begin(within=600.0))
        await until(lambda: "hold finish" in server.workers.calls)
        assert await server.generate() == 503
        status, told = await server.abort()
        assert (status, told["outcome"], told["state"]) == (200, "rejected", "ready")
        assert error(await begin)[:2] == (409, "FP8-ORDER")
        assert server.workers.calls[-1] == "resume"
        assert await server.generate() == 200

    run(test())


def test_an_engine_that_hangs_on_its_way_to_rest_does_not_close_the_gate_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resting, "GRACE", 0.05)

    async def test() -> None:
        server = Server()
        server.workers.faults["hold finish"] = never
        assert error(await server.begin(within=0.05)) == (408, "FP8-DRAIN", "ready")
        assert await server.generate() == 200

    run(test())


def test_requests_that_take_too_long_are_told_with_a_way_out() -> None:
    async def test() -> None:
        server = Server()
        server.workers.running = 1
        status, answer = await server.begin(within=0.01)
        assert (status, answer["error"]["id"]) == (408, "FP8-DRAIN")
        assert "pause" in answer["error"]["hint"]
        assert server.workers.running == 1
        assert await server.generate() == 200

    run(test())
