"""Of two that would write weights at once one is refused."""

from __future__ import annotations

import asyncio

import pytest

from fp8ctl.engines.hooks.gate import Outcome
from fp8ctl.engines.hooks.refused import RefusedError
from tests.engines.hooks.pushing import Server, error, run, until

pytestmark = pytest.mark.filterwarnings("error")


def test_while_the_engine_warms_up_its_gate_is_not_touched() -> None:
    async def test() -> None:
        server = Server()
        await server.connect()
        server.gate.started = False
        assert error(await server.connect())[:2] == (503, "FP8-BUSY")
        assert error(await server.begin())[:2] == (503, "FP8-BUSY")
        assert await server.generate() == 200

    run(test())


def test_a_second_client_is_refused_at_once_also_while_the_first_waits() -> None:
    async def test() -> None:
        server = Server()
        go_on = asyncio.Event()
        server.workers.faults["hold finish"] = go_on.wait
        first = asyncio.ensure_future(server.begin("B", lease=0.01))
        await until(lambda: "hold finish" in server.workers.calls)
        await asyncio.sleep(0.05)
        assert error(await server.begin("C")) == (409, "FP8-BUSY", "updating")
        assert error(await server.connect()) == (409, "FP8-BUSY", "updating")
        go_on.set()
        assert (await first)[0] == 200

    run(test())


def test_of_two_that_begin_together_one_wins() -> None:
    async def test() -> None:
        server = Server()
        await server.connect()
        answers = await asyncio.gather(server.begin("B"), server.begin("C"))
        assert sorted(status for status, _ in answers) == [200, 409]

    run(test())


def test_the_engines_own_updates_and_pushes_keep_each_other_out() -> None:
    async def test() -> None:
        server = Server()
        order: list[str] = []

        async def own(name: str) -> None:
            async with server.updates.alone(name):
                order.append(f"{name} begins")
                await asyncio.sleep(0.02)
                order.append(f"{name} ends")

        await server.begin()
        with pytest.raises(RefusedError, match="update push-B to version B is on its way") as e:
            await own("/update_weights_from_disk")
        assert (e.value.status, e.value.id) == (409, "FP8-BUSY")
        assert order == []
        await server.abort()
        both = asyncio.gather(own("one"), own("two"))
        await until(lambda: bool(order))
        answer = await server.begin("C")
        assert error(answer)[:2] == (409, "FP8-BUSY")
        assert "one is on its way" in answer[1]["error"]["message"]
        await both
        assert order == ["one begins", "one ends", "two begins", "two ends"]
        assert (await server.begin("C"))[0] == 200

    run(test())


def test_a_version_is_forgotten_when_something_else_writes_weights() -> None:
    async def test() -> None:
        server = Server()
        await server.push("B")
        async with server.updates.alone("/update_weights_from_disk"):
            pass
        assert server.gate.describe()["version"] == "B"
        async with server.updates.alone("/update_weights_from_disk"):
            server.gate.begin_update()
            server.gate.end_update(Outcome("applied"))
        assert server.gate.describe()["version"] is None

    run(test())
