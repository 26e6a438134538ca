"""Every way in which an update can break off: old weights or new ones, never silently both."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines.hooks.pushing import NAMES, Server, error, flipped, run, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Step = Callable[[Server], Awaitable[tuple[int, Any]]]

pytestmark = pytest.mark.filterwarnings("error")

UNTOUCHED, TOUCHED = "ready", "failed"


async def _first(server: Server, **changes: Any) -> tuple[int, Any]:
    await server.begin()
    return await server.bucket(0, NAMES[:2], **changes)


async def _second(server: Server, **changes: Any) -> tuple[int, Any]:
    await server.begin()
    assert (await server.bucket(0, NAMES[:2]))[0] == 200
    return await server.bucket(1, NAMES[2:], **changes)


async def _whole(server: Server) -> tuple[int, Any]:
    return await server.push("B")


async def _part(server: Server) -> tuple[int, Any]:
    await server.begin()
    await server.bucket(0, NAMES[:2])
    return await server.end(1)


async def _nothing(server: Server) -> tuple[int, Any]:
    await server.begin()
    return await server.end(0)


async def _again(server: Server) -> tuple[int, Any]:
    await server.begin()
    await server.bucket(0, NAMES[:2])
    return await server.bucket(1, NAMES[1:])


def _with(step: Step, **faults: Any) -> Step:
    async def run(server: Server) -> tuple[int, Any]:
        server.workers.faults.update({k.replace("_", " "): v for k, v in faults.items()})
        return await step(server)

    return run


def _changed(step: Callable[..., Awaitable[tuple[int, Any]]], **changes: Any) -> Step:
    return lambda server: step(server, **changes)


def _set(step: Step, **facts: Any) -> Step:
    async def run(server: Server) -> tuple[int, Any]:
        for name, value in facts.items():
            setattr(server.workers, name, value)
        return await step(server)

    return run


async def _lost(server: Server) -> tuple[int, Any]:
    await server.begin()
    await server.bucket(0, NAMES)
    for held in server.workers.held:
        del held["a.weight"]
    return await server.end(1)


BOOM = RuntimeError("rank 1: out of memory")


FAILURES: dict[str, tuple[Step, tuple[int, str, str]]] = {
    "unknown name": (_changed(_first, name="x.weight"), (422, "FP8-TENSOR", UNTOUCHED)),
    "wrong shape": (_changed(_first, shape=[4, 8]), (422, "FP8-TENSOR", UNTOUCHED)),
    "codes as floats": (
        _changed(_second, name="a.weight", shape=[4, 4]),
        (422, "FP8-TENSOR", TOUCHED),
    ),
    "floats as codes": (_changed(_first, dtype="float8_e4m3fn"), (422, "FP8-TENSOR", UNTOUCHED)),
    "a float as an integer": (_changed(_first, dtype="int8"), (422, "FP8-TENSOR", UNTOUCHED)),
    "scales in 16 bits": (_changed(_second, dtype="bfloat16"), (422, "FP8-TENSOR", TOUCHED)),
    "a name twice": (_again, (422, "FP8-TENSOR", TOUCHED)),
    "dtype of nobody": (_changed(_first, dtype="float4"), (400, "FP8-WIRE", UNTOUCHED)),
    "outside of the bucket": (_changed(_first, offset=1 << 20), (400, "FP8-WIRE", UNTOUCHED)),
    "one on the other": (_changed(_second, offset=256), (400, "FP8-WIRE", TOUCHED)),
    "no rank could begin": (
        _with(_first, rank_0="no carrier", rank_1="no carrier"),
        (500, "FP8-LOAD", UNTOUCHED),
    ),
    "no rank could go on": (
        _with(_whole, receive=None, rank_0="half-way", rank_1="half-way"),
        (500, "FP8-LOAD", TOUCHED),
    ),
    "one rank failed": (_with(_first, rank_1="no carrier"), (500, "FP8-LOAD", TOUCHED)),
    "one rank broke off": (_with(_first, rank_1="half-way"), (500, "FP8-LOAD", TOUCHED)),
    "a rank is silent": (_with(_first, receive=BOOM), (500, "FP8-ENGINE", TOUCHED)),
    "settling raises": (_with(_whole, progress=BOOM), (500, "FP8-ENGINE", TOUCHED)),
    "a rank broke off unseen": (_set(_whole, broken=True), (500, "FP8-LOAD", TOUCHED)),
    "the guard counts less": (
        _set(_whole, unfilled={"a.weight": "rows 2-3 of 4"}),
        (422, "FP8-INCOMPLETE", TOUCHED),
    ),
    "a part as the whole": (_part, (422, "FP8-INCOMPLETE", TOUCHED)),
    "nothing as the whole": (_nothing, (422, "FP8-INCOMPLETE", UNTOUCHED)),
    "one scale flipped": (flipped, (500, "FP8-UNEQUAL", TOUCHED)),
    "codes are nowhere": (_lost, (500, "FP8-UNEQUAL", TOUCHED)),
    "digests raise": (_with(_whole, digests=BOOM), (500, "FP8-ENGINE", TOUCHED)),
    "caches stay": (_with(_whole, flush=BOOM), (500, "FP8-ENGINE", TOUCHED)),
    "the engine stays at rest": (_with(_whole, resume=BOOM), (500, "FP8-ENGINE", TOUCHED)),
    "it does not come to rest": (_with(_whole, hold_finish=BOOM), (500, "FP8-ENGINE", UNTOUCHED)),
    "requests go on": (_with(_whole, hold_finish=TimeoutError()), (408, "FP8-DRAIN", UNTOUCHED)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_leaves_the_old_weights_serving_or_the_gate_closed_until_a_whole_push(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        server = Server()
        step, (status, id_, state) = FAILURES[name]
        answer = await step(server)
        assert error(answer) == (status, id_, state)
        assert answer[1]["error"]["message"]
        assert not server.updates.open
        assert server.state == state
        if state == UNTOUCHED:
            assert server.workers.versions == {"A"}
            assert "resume" in server.workers.calls
        assert await server.generate() == (200 if state == UNTOUCHED else 503)
        # The fault is gone: a part does not lead out of `failed`, a whole push does.
        server.workers.faults.clear()
        server.workers.broken, server.workers.unfilled = False, {}
        if state == TOUCHED:
            assert server.gate.describe()["version"] is None
            await server.begin("C", push="part", complete=False)
            await server.bucket(0, NAMES[3:], "C", push="part")
            assert (await server.end(1, push="part"))[1]["missing"] > 0
            assert await server.generate() == 503
        status, ended = await server.push("C")
        assert (status, ended["state"], ended["verified"]) == (200, "ready", 4)
        assert server.workers.versions == {"C"}
        assert await server.generate() == 200

    run(test())


@pytest.mark.parametrize(("buckets", "state"), [(0, "ready"), (1, "failed"), (2, "failed")])
def test_a_client_that_is_killed_between_two_requests_is_seen_by_its_lease(
    buckets: int, state: str
) -> None:
    async def test() -> None:
        server = Server()
        await server.begin(lease=0.15)
        for i in range(buckets):
            await server.bucket(i, [NAMES[2 * i], NAMES[2 * i + 1]])
        assert server.state == "updating"
        await until(lambda: not server.updates.open)
        assert server.state == state
        answer = await server.end(buckets)
        assert error(answer)[:2] == (409, "FP8-ORDER")
        assert "not heard of for 0.15 s" in answer[1]["error"]["message"]
        assert await server.generate() == (200 if state == "ready" else 503)
        assert (await server.push("C"))[0] == 200

    run(test())


def test_the_next_client_need_not_wait_for_the_watch() -> None:
    async def test() -> None:
        server = Server()
        await server.begin(lease=30.0)
        assert error(await server.begin("C"))[:2] == (409, "FP8-BUSY")
        push = server.updates._session.push
        assert push is not None
        push.heard -= 31  # as if the time had passed
        assert (await server.begin("C"))[0] == 200
        assert (await server.abort())[1]["outcome"] == "rejected"

    run(test())


def test_a_begin_that_is_repeated_keeps_an_update_alive() -> None:
    async def test() -> None:
        server = Server()
        for _ in range(8):
            assert (await server.begin(lease=0.3))[0] == 200
            await asyncio.sleep(0.1)
        assert server.state == "updating"
        assert (await server.abort())[1]["outcome"] == "rejected"

    run(test())


def test_the_lease_does_not_run_while_a_request_is_worked_off() -> None:
    async def test() -> None:
        server = Server()

        async def slow() -> None:
            await asyncio.sleep(0.5)

        server.workers.faults["receive"] = slow
        await server.begin(lease=0.1)
        assert (await server.bucket(0, NAMES))[0] == 200
        assert (await server.end(1))[0] == 200

    run(test())


def test_an_abort_waits_for_the_bucket_that_is_being_loaded() -> None:
    async def test() -> None:
        server = Server()
        go_on = asyncio.Event()
        server.workers.faults["receive"] = go_on.wait
        await server.begin()
        bucket = asyncio.ensure_future(server.bucket(0, NAMES))
        await until(lambda: "receive" in server.workers.calls)
        abort = asyncio.ensure_future(server.abort())
        await asyncio.sleep(0.01)
        assert not abort.done()
        go_on.set()
        assert (await bucket)[0] == 200
        status, told = await abort
        assert (status, told["outcome"], told["state"]) == (200, "failed", "failed")
        assert told["message"] == "aborted: tired"
        assert await server.abort() == (status, told)

    run(test())
