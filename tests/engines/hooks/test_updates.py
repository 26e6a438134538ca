"""A push's session: every step, and every way in which one can break off.

Never a mixture: `pushing.Server` fails where an answer comes from weights of two versions, where
weights are written under requests that run, or where a paused request goes on with such weights.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import wire
from fp8ctl.engines.hooks import resting
from fp8ctl.engines.hooks.gate import Outcome
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.workers import Reloaded
from tests.engines.hooks.pushing import NAMES, PLAN, Server, digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    Step = Callable[[Server], Awaitable[tuple[int, Any]]]

pytestmark = pytest.mark.filterwarnings("error")


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test, and let nothing that it started go on."""

    async def alone() -> None:
        await asyncio.wait_for(test, 20)
        me = asyncio.current_task()
        rest = [t for t in asyncio.all_tasks() if t is not me]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    asyncio.run(alone())


async def never() -> None:
    await asyncio.Event().wait()


async def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not come to that")


def error(answer: tuple[int, Any]) -> tuple[int, str, str]:
    status, body = answer
    return status, body["error"]["id"], body["state"]


# --- as it should be ------------------------------------------------------------------------------


def test_the_gate_is_closed_from_begin_to_end_and_the_new_weights_serve_after() -> None:
    async def test() -> None:
        server = Server()
        assert await server.generate() == 200
        status, begun = await server.begin("B")
        assert (status, begun["version"], begun["state"]) == (200, None, "ready")
        assert begun["ranks"] == 2
        assert begun["digests"] is None
        assert await server.generate() == 503
        status, taken = await server.bucket(0, NAMES[:3])
        assert (status, taken) == (200, {"number": 0, "loaded": 3, "seconds": {"load": 1.5}})
        assert await server.generate() == 503
        assert (await server.bucket(1, NAMES[3:]))[0] == 200
        status, ended = await server.end(2)
        assert status == 200
        assert (ended["outcome"], ended["state"], ended["version"]) == ("applied", "ready", "B")
        assert (ended["missing"], ended["verified"]) == (0, 4)
        assert await server.generate() == 200
        assert server.workers.versions == {"B"}
        assert server.workers.flushed == 1

    run(test())


def test_update_follows_update_over_one_connection() -> None:
    async def test() -> None:
        server = Server()
        for i, version in enumerate("BABAB"):
            push = f"push-{i}"
            begun = (await server.begin(version, push=push))[1]
            assert begun["version"] == ("BA"[(i + 1) % 2] if i else None)
            assert (await server.bucket(0, NAMES, version, push))[0] == 200
            assert (await server.end(1, version, push))[1]["verified"] == 4
            assert server.workers.versions == {version}
            assert server.gate.describe()["version"] == version
        assert server.workers.calls.count("connect") == 1

    run(test())


def test_the_state_says_of_pushes_what_a_client_must_know() -> None:
    about = Server().gate.describe()
    assert (about["device"], about["version"], about["push"]) == ("cpu", None, wire.PROTOCOL)


def test_the_state_says_by_which_plan_the_weights_are_quantised() -> None:
    plan: Any = Server().gate.describe()["plan"]
    assert set(plan) == {"mode", "block_size", "recipe", "digest"}
    assert plan["mode"] == "block"


def test_a_server_that_waits_for_weights_is_ready_after_its_first_push() -> None:
    async def test() -> None:
        server = Server(version=None)
        assert await server.generate() == 503
        status, ended = await server.push("A")
        assert (status, ended["state"]) == (200, "ready")
        assert await server.generate() == 200

    run(test())


def test_what_is_verified_may_be_copied_and_is_told_once() -> None:
    async def test() -> None:
        server = Server()
        assert (await server.push("B"))[0] == 200
        assert (await server.push("C"))[0] == 200
        trusted = [d["names"] for d in server.workers.details if "names" in d]
        assert [sorted(names) for names in trusted] == [sorted(NAMES)]
        # After a failure the ranks trust nothing, and are told again.
        server.workers.faults["rank 1"] = "half-way"
        assert (await server.push("D"))[0] == 500
        server.workers.faults.clear()
        assert (await server.push("A"))[0] == 200
        assert server.workers.calls.count("trust") == 2

    run(test())


def test_ranks_that_cannot_be_told_that_are_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        server = Server()
        server.workers.faults["trust"] = RuntimeError("busy")
        assert (await server.push("B"))[0] == 200
        assert (await server.push("C"))[0] == 200
        assert server.workers.calls.count("trust") == 2
        assert server.workers.versions == {"C"}

    run(test())


@pytest.mark.parametrize("in_flight", ["abort", "pause"])
def test_requests_in_flight_are_ended_or_go_on_with_the_new_weights(in_flight: str) -> None:
    async def test() -> None:
        server = Server()
        server.workers.running = 3
        assert (await server.push("B", in_flight=in_flight))[0] == 200
        assert server.workers.running == (3 if in_flight == "pause" else 0)
        assert server.workers.calls.index("flush") < server.workers.calls.index("resume")

    run(test())


# --- what is left out -----------------------------------------------------------------------------


def test_what_did_not_change_may_be_skipped_and_is_verified_all_the_same() -> None:
    async def test() -> None:
        server = Server()
        begun = (await server.begin("B", digests=True))[1]
        assert begun["digests"] == {name: digest("A", name) for name in NAMES}
        assert (await server.bucket(0, NAMES[1:]))[0] == 200
        status, ended = await server.end(1, skipped=NAMES[:1])
        assert (status, ended["verified"]) == (200, 4)

    run(test())


def test_what_is_not_alike_on_all_ranks_cannot_be_skipped() -> None:
    async def test() -> None:
        server = Server()
        digests = server.workers._digests

        def differing(rank: int) -> dict[str, Any]:
            answer = digests(rank)
            for shard in answer["tensors"]:
                if shard["name"] == "norm.weight":  # copies, of which one has gone bad
                    shard |= {"row": 0, "primary": rank == 0, "digest": f"{rank:016x}"}
            return answer

        server.workers._digests = differing  # type: ignore[method-assign]
        begun = (await server.begin(digests=True))[1]
        assert sorted(begun["digests"]) == sorted(set(NAMES) - {"norm.weight"})

    run(test())


def test_what_was_skipped_and_changed_meanwhile_is_seen() -> None:
    async def test() -> None:
        server = Server()
        await server.begin("B", digests=True)
        server.workers.held[1][NAMES[0]] = digest("D", NAMES[0])
        await server.bucket(0, NAMES[1:])
        answer = await server.end(1, skipped=NAMES[:1])
        assert error(answer) == (500, "FP8-UNEQUAL", "failed")

    run(test())


@pytest.mark.parametrize("skipped", [NAMES[:1], ["nobody.knows"], NAMES[1:2]])
def test_only_what_the_server_told_may_be_skipped(skipped: list[str]) -> None:
    async def test() -> None:
        server = Server()
        await server.begin("B", digests=skipped != NAMES[:1])
        await server.bucket(0, NAMES[1:])
        assert error(await server.end(1, skipped=skipped)) == (422, "FP8-INCOMPLETE", "failed")

    run(test())


def test_an_update_that_changes_nothing_writes_nothing_and_keeps_the_caches() -> None:
    async def test() -> None:
        server = Server()
        await server.begin("B", digests=True)
        status, ended = await server.end(0, skipped=NAMES)
        assert (status, ended["outcome"], ended["version"]) == (200, "applied", "B")
        assert server.workers.flushed == 0
        assert await server.generate() == 200

    run(test())


@pytest.mark.parametrize("state", ["unpushed", "failed"])
def test_no_digests_are_told_where_everything_must_be_sent(state: str) -> None:
    async def test() -> None:
        server = Server(version="A" if state == "failed" else None)
        if state == "failed":
            await server.begin("C")
            await server.bucket(0, NAMES[:1], "C")
            await server.abort("C")
        assert server.state == state
        assert (await server.begin("B", digests=True))[1]["digests"] is None

    run(test())


def test_a_part_may_be_sent_to_a_server_that_has_all() -> None:
    async def test() -> None:
        server = Server()
        await server.begin("A", complete=False)
        await server.bucket(0, NAMES[3:], "A")
        status, ended = await server.end(1, "A")
        assert (status, ended["state"], ended["verified"]) == (200, "ready", 1)

    run(test())


def test_parts_make_a_waiting_server_ready_when_all_have_arrived() -> None:
    async def test() -> None:
        server = Server(version=None)
        await server.begin("A", push="one", complete=False)
        await server.bucket(0, NAMES[:3], "A", push="one")
        status, ended = await server.end(1, push="one")
        assert (status, ended["outcome"], ended["state"]) == (200, "applied", "unpushed")
        assert (ended["missing"], ended["message"]) == (
            1,
            "1 tensors have not arrived, such as norm.weight",
        )
        assert await server.generate() == 503
        await server.begin("A", push="two", complete=False)
        await server.bucket(0, NAMES[3:], "A", push="two")
        assert (await server.end(1, push="two"))[1]["state"] == "ready"
        assert await server.generate() == 200

    run(test())


def test_a_kept_tensor_that_no_rank_holds_need_not_be_sent() -> None:
    """A head that is tied to the embedding, but stored; tables that engines compute."""
    tied = {"name": "lm_head.weight", "dtype": "BF16", "shape": [8, 4], "quantize": False}
    table = {"name": "l.rotary_emb.inv_freq", "dtype": "F32", "shape": [4], "quantize": False}
    plan = {**PLAN, "tensors": [*PLAN["tensors"], tied, table]}

    async def test() -> None:
        server = Server(plan=plan)
        assert (await server.push("B"))[0] == 200
        for held in server.workers.held:  # now the engine has one of its own
            held["lm_head.weight"] = digest("B", "lm_head.weight")
        status, answer = await server.push("C")
        assert (status, answer["error"]["data"]["names"]) == (422, ["lm_head.weight"])

    run(test())


# --- what is refused before it begins -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"manifest": "plan-2"}, (409, "FP8-MANIFEST", "ready")),
        ({"manifest": ""}, (409, "FP8-MANIFEST", "ready")),
        ({"connection": "another"}, (404, "FP8-CONNECTION", "ready")),
        ({"connection": ""}, (404, "FP8-CONNECTION", "ready")),
        ({"lease": 0.0}, (400, "FP8-WIRE", "ready")),
        ({"lease": float("nan")}, (400, "FP8-WIRE", "ready")),
        ({"within": -1.0}, (400, "FP8-WIRE", "ready")),
        ({"in_flight": "kill"}, (400, "FP8-WIRE", "ready")),
    ],
)
def test_a_begin_that_does_not_fit_leaves_the_server_alone(
    change: dict[str, Any], refusal: tuple[int, str, str]
) -> None:
    async def test() -> None:
        server = Server()
        await server.connect()
        before = list(server.workers.calls)
        assert error(await server.begin(**change)) == refusal
        assert server.workers.calls == before
        assert await server.generate() == 200

    run(test())


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
        {"protocol": 2, "carrier": {"kind": "memory"}},
        {"carrier": {"kind": "memory"}},
        {"protocol": 1, "carrier": {"kind": "pigeon"}},
        {"protocol": 1, "carrier": "memory"},
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


def test_while_the_engine_warms_up_its_gate_is_not_touched() -> None:
    async def test() -> None:
        server = Server()
        await server.connect()
        server.gate.started = False
        assert error(await server.connect())[:2] == (503, "FP8-BUSY")
        assert error(await server.begin())[:2] == (503, "FP8-BUSY")
        assert await server.generate() == 200

    run(test())


# --- every failure: old or new, never silently both -----------------------------------------------

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


async def _flipped(server: Server) -> tuple[int, Any]:
    """One scale is not what was sent, on one rank."""
    await server.begin()
    await server.bucket(0, NAMES)
    server.workers.held[1]["a.weight_scale_inv"] = digest("D", "a.weight_scale_inv")
    return await server.end(1)


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
    "one scale flipped": (_flipped, (500, "FP8-UNEQUAL", TOUCHED)),
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


def test_the_first_of_many_wrong_tensors_is_named_and_the_others_are_counted() -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        answer = await server.bucket(0, ["x.weight", "y.weight", "norm.weight"])
        told = answer[1]["error"]
        assert told["message"] == "x.weight: the server's plan has no such tensor, and 1 more"
        assert told["data"] == {"names": ["x.weight", "y.weight"], "count": 2}
        assert "receive" not in server.workers.calls

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


# --- order and repeats ----------------------------------------------------------------------------


def test_a_bucket_that_is_repeated_gets_its_answer_and_is_not_loaded_again() -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        first = await server.bucket(0, NAMES[:2])
        again = await server.bucket(0, NAMES[:2])
        assert again == (200, {**first[1], "repeated": True})
        assert server.workers.calls.count("receive") == 1
        assert (await server.bucket(1, NAMES[2:]))[0] == 200
        assert (await server.end(2))[0] == 200

    run(test())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s.bucket(0, NAMES[2:]),  # another bucket under the number of the last
        lambda s: s.bucket(2, NAMES[2:]),
        lambda s: s.bucket(-1, NAMES[2:]),
        lambda s: s.bucket(1.0, NAMES[2:]),
        lambda s: s.bucket(True, NAMES[2:]),
        lambda s: s.end(2),
        lambda s: s.end(0),
        lambda s: s.bucket(1, NAMES[2:], push="another"),
        lambda s: s.end(1, push="another"),
        lambda s: s.post(wire.ABORT, push="another", reason=""),
        lambda s: s.begin("C", push="push-B"),
    ],
)
def test_what_comes_out_of_order_is_refused_and_the_update_goes_on(wrong: Step) -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        await server.bucket(0, NAMES[:2])
        answer = await wrong(server)
        assert error(answer) == (409, "FP8-ORDER", "updating")
        assert (await server.bucket(1, NAMES[2:]))[0] == 200
        assert (await server.end(2))[1]["state"] == "ready"

    run(test())


def test_begin_and_end_are_repeated_without_being_done_twice() -> None:
    async def test() -> None:
        server = Server()
        begun = await server.begin(digests=True)
        assert await server.begin(digests=True) == begun
        assert server.workers.calls.count("hold finish") == 1
        await server.bucket(0, NAMES)
        ended = await server.end(1)
        # The answer was lost, and meanwhile another update is on its way.
        await server.begin("C")
        assert await server.end(1) == ended
        assert server.state == "updating"
        assert error(await server.begin())[:2] == (409, "FP8-BUSY")
        await server.abort("C")
        assert error(await server.begin())[:2] == (409, "FP8-ORDER")
        assert error(await server.bucket(1, NAMES))[:2] == (409, "FP8-ORDER")

    run(test())


def test_an_end_that_failed_fails_alike_when_it_is_repeated() -> None:
    async def test() -> None:
        server = Server()
        answer = await _flipped(server)
        assert await server.end(1) == answer
        status, told = await server.abort()
        assert (status, told["outcome"], told["state"]) == (200, "failed", "failed")

    run(test())


def test_a_begin_that_was_refused_may_be_sent_again() -> None:
    async def test() -> None:
        server = Server()
        server.workers.faults["hold finish"] = TimeoutError()
        assert error(await server.begin())[:2] == (408, "FP8-DRAIN")
        server.workers.faults.clear()
        assert (await server.begin())[0] == 200

    run(test())


# --- a client that is gone, or gives up -----------------------------------------------------------


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
        push = server.updates._push
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


@pytest.mark.parametrize("step", ["hold finish", "receive", "progress", "digests", "flush"])
def test_a_request_whose_client_goes_away_is_worked_off_and_its_repeat_finds_it_done(
    step: str,
) -> None:
    async def test() -> None:
        server = Server()
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            reached.set()
            await go_on.wait()

        async def client() -> None:
            await server.push("B")

        server.workers.faults[step] = wait
        task = asyncio.ensure_future(client())
        await reached.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert server.state == "updating"
        assert await server.generate() == 503
        del server.workers.faults[step]
        go_on.set()
        # The client comes back and says the same again, from where it was.
        calls = {"hold finish": 0, "receive": 1, "progress": 2, "digests": 2, "flush": 2}[step]
        if calls == 0:
            assert (await server.begin())[0] == 200
        if calls <= 1:
            assert (await server.bucket(0, NAMES[:2]))[1].get("repeated", False) is (calls == 1)
            assert (await server.bucket(1, NAMES[2:]))[0] == 200
        status, ended = await server.end(2)
        assert (status, ended["state"], ended["verified"]) == (200, "ready", 4)
        assert server.workers.calls.count("receive") == 2
        assert server.workers.flushed == 1

    run(test())


def test_a_request_that_breaks_off_in_its_body_changes_nothing() -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        assert await server.http("POST", wire.ABORT, gone=True) == (0, None)
        assert server.updates.open
        await server.abort()

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


# --- two at once ----------------------------------------------------------------------------------


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


def test_after_weights_were_given_up_the_ranks_are_told_again_what_they_may_copy() -> None:
    async def test() -> None:
        server = Server()
        await server.push("B")
        async with server.updates.alone("/release_memory_occupation"):
            server.gate.lose("released")
        assert server.gate.describe()["version"] is None
        assert (await server.push("C"))[0] == 200
        assert server.workers.calls.count("trust") == 2

    run(test())


def test_after_a_folder_that_was_rejected_the_ranks_are_told_again_what_they_may_copy() -> None:
    """They trust nothing after a reload of the engine's own, however it ended."""

    async def rejected(path: str) -> Reloaded:
        return Reloaded(False, "no such folder", changed=False)

    async def test() -> None:
        server = Server()
        await server.push("B")
        server.workers.load_from_disk, load = rejected, server.workers.load_from_disk  # type: ignore[method-assign]
        assert error(await _from_disk(server, "/C", "C")) == (500, "FP8-LOAD", "ready")
        server.workers.load_from_disk = load  # type: ignore[method-assign]
        await server.connect()
        assert (await server.push("D"))[0] == 200
        assert server.workers.calls.count("trust") == 2

    run(test())


# --- without a plan, and by disk ------------------------------------------------------------------


def _sixteen(names: list[str] = NAMES) -> list[str]:
    return [name for name in names if "_scale" not in name]


async def _push_16_bits(server: Server, names: list[str], version: str) -> tuple[int, Any]:
    await server.begin(version)
    for i, name in enumerate(names):
        status, answer = await server.bucket(i, [name], version, dtype="bfloat16")
        if status != 200:
            return status, answer
    return await server.end(len(names), version)


def test_an_engine_that_quantises_itself_takes_floats_under_any_name() -> None:
    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        # Names that no parameter has: the engine calls its own otherwise.
        status, ended = await _push_16_bits(server, ["embed.weight", "new.weight"], "B")
        assert (status, ended["verified"], ended["state"]) == (200, None, "ready")
        await server.begin("C")
        answer = await server.bucket(0, ["a.weight"], "C")
        assert error(answer) == (422, "FP8-TENSOR", "ready")

    run(test())


@pytest.mark.parametrize("skipped", ["embed.weight", "a.weight", "norm.weight"])
def test_without_a_plan_a_complete_update_brings_what_the_ranks_hold(skipped: str) -> None:
    """A server that is ready as well: a tensor that a trainer forgot would be of another step."""

    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        some = [name for name in _sixteen() if name != skipped]
        status, answer = await _push_16_bits(server, some, "B")
        assert (status, answer["error"]["id"]) == (422, "FP8-INCOMPLETE")
        assert answer["error"]["data"]["names"] == [skipped]
        assert server.state == "failed", "some of it is in place"
        status, ended = await _push_16_bits(server, _sixteen(), "A")
        assert (status, ended["state"]) == (200, "ready")
        # Who says that it is a part may send one.
        await server.begin("B", push="part", complete=False)
        server.workers.calls.clear()
        assert (await server.end(0, "B", push="part"))[0] == 200
        assert "names" not in server.workers.calls

    run(test())


@pytest.mark.parametrize(
    ("held", "sent"),
    [
        ("layer.q_proj.weight", "layer.qkv_proj.weight"),  # one tensor in the checkpoint
        ("lm_head.weight", ""),  # in the memory of the embedding
    ],
)
def test_what_comes_under_another_name_is_not_missing(held: str, sent: str) -> None:
    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        server.workers.same = {"lm_head.weight": NAMES[0]}
        server.workers.parameters.append(held)
        names = [*_sixteen(), *filter(None, [sent])]
        status, answer = await _push_16_bits(server, names, "B")
        assert (status, answer["state"]) == (200, "ready")
        assert server.workers.calls.count("digests") == 1, "it is verified, and no more"

    run(test())


def test_without_a_plan_what_the_ranks_hold_says_what_leads_out_of_a_failure() -> None:
    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        await server.begin("C")
        await server.bucket(0, NAMES[:1], "C")
        await server.abort("C")
        assert server.state == "failed"
        status, answer = await _push_16_bits(server, _sixteen()[:2], "B")
        assert (status, answer["error"]["data"]["names"]) == (422, ["norm.weight"])
        status, ended = await _push_16_bits(server, _sixteen(), "A")
        assert (status, ended["state"]) == (200, "ready")

    run(test())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_need_not_be_sent_to_lead_out_of_a_failure(tied: bool) -> None:
    """VLLM's LlamaForCausalLM has a name for it, and its loader skips what comes under it."""

    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"

        server.workers.parameters.append("lm_head.weight")

        def embed(version: str) -> None:
            for held in server.workers.held:
                held["lm_head.weight"] = digest(version, NAMES[0])

        embed("A")
        await server.begin("C")
        await server.bucket(0, NAMES[:1], "C")
        await server.abort("C")
        await server.begin("B")
        for i, name in enumerate(_sixteen()):
            assert (await server.bucket(i, [name], "B", dtype="bfloat16"))[0] == 200
        if tied:
            embed("B")
        status, answer = await server.end(len(_sixteen()), "B")
        if tied:
            assert (status, answer["state"]) == (200, "ready")
        else:
            assert (status, answer["error"]["data"]["names"]) == (422, ["lm_head.weight"])

    run(test())


async def _from_disk(server: Server, path: str, version: str = "B") -> tuple[int, Any]:
    await server.connect("disk")
    await server.begin(version)
    found = [{"name": n, "dtype": d, "shape": list(s), "offset": 0} for n, (d, s) in _all()]
    push = f"push-{version}"
    status, answer = await server.post(wire.BUCKET, push=push, number=0, path=path, entries=found)
    return (status, answer) if status != 200 else await server.end(1, version)


def _all() -> Any:
    from tests.engines.hooks.pushing import TENSORS

    return TENSORS.items()


def test_a_folder_is_a_bucket_and_goes_through_the_engines_own_reload() -> None:
    async def test() -> None:
        server = Server()
        status, ended = await _from_disk(server, "/shared/B")
        assert (status, ended["state"]) == (200, "ready")
        assert server.workers.versions == {"B"}
        assert "connect" not in server.workers.calls
        assert "trust" not in server.workers.calls

    run(test())


@pytest.mark.parametrize(("changed", "state"), [(False, "ready"), (True, "failed")])
def test_a_reload_that_fails_closes_the_gate_only_where_it_may_have_written(
    changed: bool, state: str
) -> None:
    async def test() -> None:
        server = Server()

        async def fails(path: str) -> Reloaded:
            return Reloaded(False, f"no such folder: {path}", changed)

        server.workers.load_from_disk = fails  # type: ignore[method-assign]
        answer = await _from_disk(server, "/shared/B")
        assert error(answer) == (500, "FP8-LOAD", state)
        assert answer[1]["error"]["message"] == "no such folder: /shared/B"

    run(test())


@pytest.mark.parametrize("path", ["relative/B", None, 7])
def test_a_folder_must_be_named_whole(path: Any) -> None:
    async def test() -> None:
        server = Server()
        assert error(await _from_disk(server, path)) == (400, "FP8-WIRE", "ready")
        assert "disk" not in server.workers.calls

    run(test())


# --- what can be proven ---------------------------------------------------------------------------


def test_a_kept_tensor_that_the_engine_holds_in_another_type_proves_nothing_and_fails_nothing() -> (
    None
):
    async def test() -> None:
        server = Server()
        server.workers.dtypes["norm.weight"] = "float32"
        status, ended = await server.push("B")
        assert (status, ended["verified"]) == (200, 3)
        # Codes are another matter.
        server.workers.dtypes["a.weight"] = "bfloat16"
        status, answer = await server.push("C")
        assert (status, answer["error"]["data"]["names"]) == (500, ["a.weight"])

    run(test())


def test_codes_that_lie_under_names_of_the_engines_own_prove_nothing() -> None:
    """A module that is fused on disk: the engine tells its parts."""

    async def test() -> None:
        server = Server()
        await server.begin()
        await server.bucket(0, NAMES)
        for held in server.workers.held:
            held["a_part.weight"] = held.pop("a.weight")
        server.workers.dtypes["a_part.weight"] = "float8_e4m3fn"
        status, ended = await server.end(1)
        assert (status, ended["verified"], ended["state"]) == (200, None, "ready")
        assert "trust" not in server.workers.calls

    run(test())


def test_who_does_not_want_proof_gets_none() -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        await server.bucket(0, NAMES)
        assert (await server.end(1, verify=False))[1]["verified"] is None
        assert "digests" not in server.workers.calls

    run(test())
