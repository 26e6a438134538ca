"""A client connects all ranks, and is refused before anything is sent where one cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from fp8ctl import wire
from tests.engines.hooks.pushing import Server, error, run

pytestmark = pytest.mark.filterwarnings("error")


def test_an_engine_that_cannot_take_weights_again_is_refused_before_anything_is_sent() -> None:
    async def test() -> None:
        server = Server()
        told = {"refittable": False, "why": "Fp8LinearMethod without the patch refit"}
        server.workers._refittable = lambda rank: told  # type: ignore[method-assign]
        status, answer = await server.connect()
        assert (status, answer["error"]["id"]) == (409, "FP8-REFIT")
        assert answer["error"]["hint"] == "fp8ctl patch --backend sglang"
        assert "without the patch refit" in answer["error"]["message"]
        assert server.workers.calls == ["refittable"]
        # A patch does not help everywhere.
        told["why"] = "experts are loaded once"
        assert (await server.connect())[1]["error"]["hint"] == ""

    run(test())


def test_a_carrier_that_one_rank_cannot_open_is_closed_in_the_others() -> None:
    async def test() -> None:
        server = Server()
        server.workers.faults["connect"] = RuntimeError("rank 1: /proc/7/fd/3: no such file")
        status, answer = await server.connect()
        assert (status, answer["error"]["id"]) == (422, "FP8-CARRIER")
        assert "no such file" in answer["error"]["message"]
        assert server.workers.calls[-1] == "disconnect"
        server.connection = "x"
        assert error(await server.begin())[:2] == (404, "FP8-CONNECTION")

    run(test())


@pytest.mark.parametrize(
    "body",
    [
        {"protocol": wire.PROTOCOL + 1, "carrier": {"kind": "memory"}},
        {"carrier": {"kind": "memory"}},
        {"protocol": wire.PROTOCOL, "carrier": {"kind": "pigeon"}},
        {"protocol": wire.PROTOCOL, "carrier": "memory"},
    ],
)
def test_a_connect_that_says_something_else_reaches_no_rank(body: dict[str, Any]) -> None:
    async def test() -> None:
        server = Server()
        assert error(await server.post(wire.CONNECT, **body)) == (400, "FP8-WIRE", "ready")
        assert server.workers.calls == []

    run(test())


def test_a_new_connection_closes_the_one_before() -> None:
    async def test() -> None:
        server = Server()
        old = (await server.connect())[1]["connection"]
        answer = (await server.connect("disk"))[1]
        assert answer["connection"] != old
        assert (answer["ranks"], answer["engine"], answer["device"]) == (2, "sglang", "cpu")
        assert (answer["manifest"], answer["refittable"]) == ("plan-1", True)
        assert server.workers.calls.count("disconnect") == 1
        assert error(await server.begin(connection=old))[:2] == (404, "FP8-CONNECTION")

    run(test())


def test_disconnecting_ends_the_update_of_that_connection() -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        assert error(await server.post(wire.DISCONNECT, connection="x"))[0] == 404
        assert (await server.post(wire.DISCONNECT, connection=server.connection))[0] == 200
        assert server.workers.calls[-1] == "disconnect"
        assert server.state == "ready"
        assert error(await server.begin("C"))[:2] == (404, "FP8-CONNECTION")

    run(test())
