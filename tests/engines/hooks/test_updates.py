"""A push's session, request by request: in order, and each of them again.

Never a mixture: `pushing.Server` fails where an answer comes from weights of two versions, where
weights are written under requests that run, or where a paused request goes on with such weights.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import wire
from fp8ctl.engines.hooks import updates
from tests.engines.hooks.pushing import NAMES, Server, error, flipped, run, together, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Step = Callable[[Server], Awaitable[tuple[int, Any]]]

pytestmark = pytest.mark.filterwarnings("error")


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


def test_a_bucket_may_come_while_the_one_before_is_on_its_way() -> None:
    """By another connection, so that the server may see it first."""

    async def test() -> None:
        server = Server()
        await server.begin()
        second = asyncio.ensure_future(server.bucket(1, NAMES[2:]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not second.done()
        assert (await server.bucket(0, NAMES[:2]))[1]["number"] == 0
        assert (await second)[1]["number"] == 1
        # The answers of both may be lost.
        for number, names in ((0, NAMES[:2]), (1, NAMES[2:])):
            assert (await server.bucket(number, names))[1]["repeated"]
        assert error(await server.bucket(0, NAMES[:1]))[:2] == (409, "FP8-ORDER")
        assert server.workers.calls.count("receive") == 2
        assert (await server.end(2))[1]["verified"] == len(NAMES)

    run(test())


@pytest.mark.parametrize("how", ["fails", "abort"])
def test_a_bucket_whose_predecessor_never_arrives_does_not_wait_for_it(how: str) -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        second = asyncio.ensure_future(server.bucket(1, NAMES[2:]))
        await asyncio.sleep(0.01)
        if how == "fails":
            server.workers.faults["rank 1"] = "no carrier"
            assert error(await server.bucket(0, NAMES[:2]))[1] == "FP8-LOAD"
        else:
            assert (await server.abort())[0] == 200
        status, told = await asyncio.wait_for(second, 5)
        assert (status, told["error"]["id"]) == (409, "FP8-ORDER")
        assert "it has ended" in told["error"]["message"]
        assert server.workers.calls.count("receive") == (how == "fails")

    run(test())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s.bucket(0, NAMES[2:]),  # another bucket under the number of the last
        lambda s: s.bucket(2, NAMES[2:]),
        lambda s: s.bucket(-1, NAMES[2:]),
        lambda s: s.bucket(1.0, NAMES[2:]),
        lambda s: s.bucket(True, NAMES[2:]),
        lambda s: s.end(2),  # the last never comes
        lambda s: s.end(3),
        lambda s: s.end(0),
        lambda s: s.bucket(1, NAMES[2:], push="another"),
        lambda s: s.end(1, push="another"),
        lambda s: s.post(wire.ABORT, push="another", reason=""),
        lambda s: s.begin("C", push="push-B"),
    ],
)
def test_what_comes_out_of_order_is_refused_and_the_update_goes_on(
    wrong: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "PREDECESSOR", 0.05)

    async def test() -> None:
        server = Server()
        await server.begin()
        await server.bucket(0, NAMES[:2])
        answer = await wrong(server)
        assert error(answer) == (409, "FP8-ORDER", "updating")
        assert (await server.bucket(1, NAMES[2:]))[0] == 200
        assert (await server.end(2))[1]["state"] == "ready"

    run(test())


@pytest.mark.parametrize("before", [0, 1])
def test_an_end_may_come_while_the_last_bucket_is_on_its_way(before: int) -> None:
    """By the connection that this bucket does not use; all of it may be said again."""

    async def test() -> None:
        server = Server()
        await server.begin()
        names = NAMES
        for number in range(before):
            assert (await server.bucket(number, NAMES[:2]))[0] == 200
            names = NAMES[2:]
        # Its connection was cut, and the client asks by another.
        ends = [asyncio.ensure_future(server.end(before + 1)) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(end.done() for end in ends)
        # One that more than a bucket is missing of waits for nothing.
        early = await asyncio.wait_for(server.end(before + 2), 5)
        assert error(early) == (409, "FP8-ORDER", "updating")
        last = await server.bucket(before, names)
        assert last[1]["number"] == before
        ended = await asyncio.wait_for(ends[0], 5)
        assert (ended[0], ended[1]["state"], ended[1]["verified"]) == (200, "ready", len(NAMES))
        assert await ends[1] == await server.end(before + 1) == ended
        # The answer to the last bucket may be lost, and END be worked off by then.
        assert await server.bucket(before, names) == (200, {**last[1], "repeated": True})
        assert error(await server.bucket(before, NAMES[:1]))[:2] == (409, "FP8-ORDER")
        assert server.workers.calls.count("receive") == before + 1
        assert server.workers.flushed == 1
        # Who asks for another update has heard it.
        assert (await server.push("C"))[0] == 200
        assert error(await server.bucket(before, names))[:2] == (409, "FP8-ORDER")
        assert server.workers.versions == {"C"}

    run(test())


def test_an_end_waits_as_long_as_the_last_bucket_is_being_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(updates, "PREDECESSOR", 0.05)

    async def test() -> None:
        server = Server()

        async def slow() -> None:
            await asyncio.sleep(0.3)

        server.workers.faults["receive"] = slow
        await server.begin()
        bucket = asyncio.ensure_future(server.bucket(0, NAMES))
        await until(lambda: "receive" in server.workers.calls)
        assert (await server.end(1))[1]["verified"] == len(NAMES)
        assert (await bucket)[0] == 200

    run(test())


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("how", ["fails", "is refused", "abort"])
def test_an_end_whose_last_bucket_is_not_taken_does_not_wait_for_it(how: str, before: int) -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        for number in range(before):
            assert (await server.bucket(number, NAMES[:2]))[0] == 200
        end = asyncio.ensure_future(server.end(before + 1))
        await asyncio.sleep(0.01)
        if how == "fails":
            server.workers.faults["rank 1"] = "no carrier"
            assert error(await server.bucket(before, NAMES[2:]))[1] == "FP8-LOAD"
        elif how == "is refused":
            answer = await server.bucket(before, NAMES[2:], name="x.weight")
            assert error(answer)[1] == "FP8-TENSOR"
        else:
            assert (await server.abort())[0] == 200
        status, told = await asyncio.wait_for(end, 5)
        assert (status, told["error"]["id"]) == (409, "FP8-ORDER")
        assert "it has ended" in told["error"]["message"]
        assert "progress" not in server.workers.calls
        assert server.state == ("failed" if before or how == "fails" else "ready")
        server.workers.faults.clear()
        assert (await server.push("C"))[0] == 200

    run(test())


@pytest.mark.parametrize(("before", "state"), [(0, "ready"), (1, "failed")])
def test_a_client_that_is_gone_with_its_end_asked_and_its_last_bucket_not_is_seen(
    before: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "PREDECESSOR", 0.2)

    async def test() -> None:
        server = Server()
        await server.begin(lease=0.1)
        for number in range(before):
            assert (await server.bucket(number, NAMES[:2]))[0] == 200
        answer = await server.end(before + 1)
        assert error(answer) == (409, "FP8-ORDER", "updating")
        told = f"{before + 1} buckets were sent; {before} arrived"
        assert answer[1]["error"]["message"] == told
        await until(lambda: not server.updates.open)
        assert server.state == state
        assert "progress" not in server.workers.calls
        assert (await server.push("C"))[0] == 200

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


def test_an_end_asks_the_ranks_once_and_brings_them_back() -> None:
    """Each question is a millisecond or two in which nothing is served."""

    async def test() -> None:
        server = Server()
        for version in "BC":
            await server.begin(version)
            await server.bucket(0, NAMES, version)
            server.workers.messages.clear()
            assert (await server.end(1, version))[1]["verified"] == 4
            assert server.workers.messages == ["settle", "resume"]

    run(test())


def test_an_end_that_failed_fails_alike_when_it_is_repeated() -> None:
    async def test() -> None:
        server = Server()
        answer = await flipped(server)
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


# --- the last bucket and the end in one question --------------------------------------------------


def test_ranks_tell_with_the_last_bucket_what_an_end_wants_that_is_there() -> None:
    async def test() -> None:
        server = Server()
        assert (await together(server))[1]["verified"] == len(NAMES)
        assert server.workers.messages == ["receive", "resume"]
        assert server.workers.flushed == 1
        assert (await together(server, "C", early=False))[1]["verified"] == len(NAMES)
        assert server.workers.messages == ["receive", "settle", "resume"]
        assert server.workers.flushed == 2

    run(test())


@pytest.mark.parametrize("verify", [True, False])
def test_an_end_that_comes_again_and_wants_something_else_asks_again(verify: bool) -> None:
    """What the ranks told is of the last one that came, and the first one is worked off."""

    async def test() -> None:
        server = Server()
        await server.begin()
        first = asyncio.ensure_future(server.end(1, verify=verify))
        await asyncio.sleep(0.01)
        again = asyncio.ensure_future(server.end(1, verify=not verify))
        await asyncio.sleep(0.01)
        assert (await server.bucket(0, NAMES))[0] == 200
        told = [await first, await again]
        assert told[0] == told[1]
        assert told[0][1]["verified"] == (len(NAMES) if verify else None)

    run(test())


def test_what_is_not_what_was_sent_is_seen_with_the_last_bucket_too() -> None:
    async def test() -> None:
        server = Server()
        workers: Any = server.workers
        kept = workers._receive

        def flip(rank: int, **details: Any) -> dict[str, Any]:
            told: dict[str, Any] = kept(rank, **details)
            if rank:
                server.workers.held[1][NAMES[0]] = "f" * 16
            return told

        workers._receive = flip
        answer = await together(server)
        assert error(answer) == (500, "FP8-UNEQUAL", "failed")
        assert answer[1]["error"]["data"]["names"] == [NAMES[0]]
        assert server.workers.messages == ["receive", "forget", "flush", "resume"]

    run(test())


@pytest.mark.parametrize("what", ["progress", "digests", "flush"])
def test_ranks_that_fail_behind_the_last_bucket_fail_the_update(what: str) -> None:
    async def test() -> None:
        server = Server()

        async def once() -> None:
            del server.workers.faults[what]
            raise RuntimeError("no memory")

        server.workers.faults[what] = once
        answer = await together(server)
        assert error(answer) == (500, "FP8-ENGINE", "failed")
        assert "no memory" in answer[1]["error"]["message"]
        assert (await server.push("C"))[1]["verified"] == len(NAMES)

    run(test())


def test_what_was_told_with_a_bucket_that_is_not_the_last_does_not_count() -> None:
    """A client that said how many there are, and sends one more."""

    async def test() -> None:
        server = Server()
        await server.begin()
        one_more = asyncio.ensure_future(server.bucket(1, NAMES[2:]))
        await asyncio.sleep(0.01)
        early = asyncio.ensure_future(server.end(1))
        await asyncio.sleep(0.01)
        assert (await server.bucket(0, NAMES[:2]))[0] == 200
        assert (await one_more)[0] == 200
        assert error(await early)[:2] == (409, "FP8-ORDER")
        assert server.workers.messages.count("settle") == 0
        assert (await server.end(2))[1]["verified"] == len(NAMES)
        assert server.workers.messages.count("settle") == 1

    run(test())
