"""When servers are asked to end: one before it has its last bucket, several when all have all."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import wire
from fp8ctl.carriers.sent import Sent
from fp8ctl.errors import ConflictError, EngineFailedError, PlanDoesNotFitError
from fp8ctl.push import Rollout
from fp8ctl.push.company import Company
from fp8ctl.push.delivery import ByCarrier
from tests.push.serving import CutOffError, Server, cancelled, serving
from tests.push.test_rollout import CHANGED, HOW, holds, quantised, update
from tests.test_stream import PLAN, WEIGHTS, Source, wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

each_way = pytest.mark.parametrize("how", HOW)
#: One bucket, and an even and an odd number of them: END goes by the one or the other connection.
SIZES = (1 << 20, 15_000, 20_000)
each_size = pytest.mark.parametrize("size", SIZES)
AT_ONCE = 5.0


class Last:
    """A server of which the last bucket is known, and what happens to it and to END.

    Attributes:
        number: of the last bucket.
        end: set when END is asked.
    """

    def __init__(self, server: Server, rollout: Rollout) -> None:
        self.number = rollout.update(CHANGED.items(), "count").buckets - 1
        rollout.update(WEIGHTS.items(), "old")
        self.server, self.end = server, asyncio.Event()
        server.asked.clear()
        server.bodies.clear()
        server.table.buckets.clear()
        server.faults[wire.END] = self._ended

    async def _ended(self, _: Any) -> Any:
        self.end.set()

    async def asked(self) -> None:
        """Wait until END is asked."""
        await asyncio.wait_for(self.end.wait(), 10)

    def meets(self, what: Callable[[Any], Any]) -> None:
        """Have the last bucket meet this before it is worked off."""

        async def fault(found: Any) -> Any:
            return await what(found) if found["number"] == self.number else None

        self.server.faults[wire.BUCKET] = fault


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(PLAN) as one:
        yield one


def serves_again(server: Server, rollout: Rollout) -> bool:
    server.faults.clear()
    rollout.update(CHANGED.items(), "again")
    rollout.update(WEIGHTS.items(), "and again")
    return server.state == "ready" and holds(server, wanted())


def test_these_sizes_make_both_an_even_and_an_odd_number(server: Server) -> None:
    counts = []
    for size in SIZES:
        with Rollout(server.url, PLAN, bucket_bytes=size) as rollout:
            counts.append(rollout.update(WEIGHTS.items(), "count").buckets)
    assert counts[0] == 1
    assert [count % 2 for count in counts[1:]] == [0, 1]
    assert min(counts[1:]) > 2


@each_way
@each_size
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("via", ["ipc", "nccl"])
def test_one_server_is_asked_to_end_before_its_last_bucket_is_answered(
    via: Any, delta: bool, size: int, how: str, server: Server
) -> None:
    with Rollout(server.url, PLAN, via=via, bucket_bytes=size, delta=delta) as rollout:
        last = Last(server, rollout)
        last.meets(lambda _: last.asked())
        done = update(rollout, Source(CHANGED.items()), how, "new")
        assert (done.buckets, done.verified) == (last.number + 1, 19)
        assert holds(server, quantised(CHANGED))
        assert {"wait", "end"} <= set(done.stages)
        if delta:
            # Nothing but an end: there is no bucket to wait for.
            done = update(rollout, Source(CHANGED.items()), how, "same")
            assert (done.buckets, done.skipped, done.verified) == (0, 19, 19)


def test_what_waits_for_the_last_bucket_is_told_as_waiting_and_not_as_the_end(
    server: Server,
) -> None:
    with Rollout(server.url, PLAN) as rollout:
        last = Last(server, rollout)

        async def slow(_: Any) -> None:
            await last.asked()
            await asyncio.sleep(2.0)

        last.meets(slow)
        stages = rollout.update(CHANGED.items(), "new").stages
    assert stages["wait"] > 1.9
    assert stages["end"] < 1.5


@each_way
@each_size
def test_of_two_servers_none_is_asked_to_end_before_both_have_all(
    size: int, how: str, server: Server
) -> None:
    asked: list[bool] = []
    with (
        serving(PLAN) as other,
        Rollout([server.url, other.url], PLAN, bucket_bytes=size) as rollout,
    ):
        last = Last(server, rollout)

        async def slow(_: Any) -> None:
            other.asked.clear()
            await asyncio.sleep(0.3)
            asked.append(wire.END in [*server.asked, *other.asked])

        last.meets(slow)
        assert update(rollout, Source(CHANGED.items()), how, "new").verified == 19
    assert asked == [False]


def refuse(message: str, status: int = 500, id_: str = "FP8-LOAD") -> tuple[int, Any]:
    error = {"id": id_, "message": message, "hint": "", "data": {}}
    return status, {"error": error, "state": "failed"}


@each_way
@each_size
@pytest.mark.parametrize("fails", ["in a rank", "unanswered", "END first"])
def test_why_the_last_bucket_failed_is_told_and_not_what_its_end_makes_of_that(
    fails: str, size: int, how: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rollout(server.url, PLAN, bucket_bytes=size) as rollout:
        last = Last(server, rollout)

        async def fault(_: Any) -> Any:
            await last.asked()
            await asyncio.sleep(0.2)
            if fails == "unanswered":
                raise CutOffError
            return refuse("this is why") if fails == "END first" else None

        async def too_early(_: Any) -> Any:
            last.end.set()
            return refuse("a consequence", 409, "FP8-ORDER")

        receive = server.table._receive

        def broken(rank: int, number: int, *asked: Any, **listed: Any) -> Any:
            if number == last.number:
                raise OSError("this is why")
            return receive(rank, number, *asked, **listed)

        if fails == "END first":
            server.faults[wire.END] = too_early
        if fails == "in a rank":
            monkeypatch.setattr(server.table, "_receive", broken)
        last.meets(fault)
        start = time.monotonic()
        why = "does not answer" if fails == "unanswered" else "this is why"
        with pytest.raises(EngineFailedError, match=rf"{why}.*\(bucket of .* to .*\)"):
            update(rollout, Source(CHANGED.items()), how, "new")
        assert time.monotonic() - start < AT_ONCE
        assert wire.END in server.asked
        assert server.asked[-1] == wire.ABORT
        # In a rank it may have been written in half.
        assert server.state == ("failed" if last.number or fails == "in a rank" else "ready")
        monkeypatch.undo()
        assert serves_again(server, rollout)


@each_way
@each_size
def test_nan_in_the_last_bucket_is_told_before_anybody_is_asked_to_end(
    size: int, how: str, server: Server
) -> None:
    *_, name = (n for n, t in CHANGED.items() if t.is_floating_point())
    spoilt = {n: t.clone() for n, t in CHANGED.items()}
    spoilt[name].view(-1)[3] = torch.nan
    with Rollout(server.url, PLAN, bucket_bytes=size) as rollout:
        last = Last(server, rollout)
        with pytest.raises(PlanDoesNotFitError, match=f"{name}: non-finite value nan"):
            update(rollout, Source(spoilt.items()), how, "new")
        assert wire.END not in server.asked
        assert server.state == ("failed" if last.number else "ready")
        assert serves_again(server, rollout)


@each_size
def test_who_is_told_of_progress_may_end_it_to_the_last(size: int, server: Server) -> None:
    with Rollout(server.url, PLAN, bucket_bytes=size) as rollout:
        last = Last(server, rollout)
        calls: list[int] = []
        rollout.update(CHANGED.items(), "count", on_progress=lambda p: calls.append(p.buckets))
        assert calls[-1] == last.number + 1
        for call in (len(calls) - 1, len(calls)):
            server.asked.clear()
            told = 0

            def tire(_: Any, call: int = call) -> None:
                nonlocal told
                told += 1
                if told == call:
                    raise OSError("enough of it")

            with pytest.raises(OSError, match="enough of it"):
                rollout.update(CHANGED.items(), "new", on_progress=tire)
            assert wire.END not in server.asked
            assert server.asked[-1] == wire.ABORT
        assert serves_again(server, rollout)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_rank_that_calls_it_off_in_time_keeps_everybody_from_being_asked_to_end(
    servers: int, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called_off(_: Company) -> None:
        time.sleep(0.2)  # what was asked before this has come
        raise ConflictError("rank 1 was cancelled")

    with (
        serving(PLAN) as other,
        Rollout([server.url, other.url][:servers], PLAN, bucket_bytes=15_000) as rollout,
    ):
        Last(server, rollout)
        monkeypatch.setattr(Company, "require_all", called_off)
        with pytest.raises(ConflictError, match="rank 1 was cancelled"):
            rollout.update(CHANGED.items(), "new")
        assert wire.END not in server.asked
        assert server.asked[-1] == wire.ABORT
        monkeypatch.undo()
        assert serves_again(server, rollout)


@each_size
@pytest.mark.parametrize(
    "lost", ["the bucket", "its answer", "END", "the answer to END", "all of it"]
)
def test_what_is_lost_on_the_way_then_is_asked_again_and_done_once(
    lost: str, size: int, server: Server
) -> None:
    cut: list[str] = []
    with Rollout(server.url, PLAN, bucket_bytes=size) as rollout:
        last = Last(server, rollout)

        async def bucket(found: Any) -> None:
            await last.asked()
            if lost in ("END", "the answer to END"):
                while not cut:  # END comes again before its bucket is taken
                    await asyncio.sleep(0.01)
            elif lost == "the bucket" and not cut:
                cut.append("before")
                raise CutOffError
            elif lost != "the bucket" and not cut:
                cut.append("after")
                await server.updates.bucket(found)
                while server.state == "updating":  # END is worked off meanwhile
                    await asyncio.sleep(0.01)
                raise CutOffError

        async def end(found: Any) -> None:
            again = last.end.is_set()
            last.end.set()
            if again or lost in ("the bucket", "its answer"):
                return
            if lost != "END":
                task = asyncio.ensure_future(server.updates.end(found))
                await asyncio.sleep(0.1)
                if lost == "all of it":
                    await task
                    raise CutOffError
                cut.append("while it waits")
                asked.append(task)
            else:
                cut.append("before")
            raise CutOffError

        asked: list[asyncio.Task[Any]] = []
        last.meets(bucket)
        server.faults[wire.END] = end
        done = rollout.update(CHANGED.items(), "new")
        assert cut
        assert done.verified == 19
        assert server.asked.count(wire.ABORT) == 0
        assert server.asked.count(wire.END) == 1 + (lost not in ("the bucket", "its answer"))
        assert all(task.done() for task in asked)
        names = [name for one in server.table.buckets for name in one]
        assert len(names) == len(set(names)) == 19
        assert holds(server, quantised(CHANGED))
        assert serves_again(server, rollout)


def test_an_answer_that_is_lost_for_good_ends_it_before_the_end_is_asked(server: Server) -> None:
    """The server has taken the bucket, and the next one: it would serve what its client gave up."""
    with Rollout(server.url, PLAN, bucket_bytes=15_000) as rollout:
        last = Last(server, rollout)
        taken = asyncio.Event()

        async def fault(found: Any) -> None:
            if found["number"] == last.number - 1:
                if not taken.is_set():
                    await server.updates.bucket(found)
                    taken.set()
                await asyncio.sleep(0.3)  # all else is asked for by then
                raise CutOffError

        server.faults[wire.BUCKET] = fault
        with pytest.raises(EngineFailedError, match="does not answer"):
            rollout.update(CHANGED.items(), "new")
        assert wire.END not in server.asked
        assert server.state == "failed"
        assert serves_again(server, rollout)


def test_an_update_that_is_done_all_the_same_is_told_with_the_error(server: Server) -> None:
    """The last answer is lost, again and again, when END is on its way already."""
    with Rollout(server.url, PLAN) as rollout:
        last = Last(server, rollout)

        async def lost(found: Any) -> None:
            await server.updates.bucket(found)
            while server.gate.about["version"] != "new":
                await asyncio.sleep(0.01)
            raise CutOffError

        last.meets(lost)
        with pytest.raises(EngineFailedError, match="does not answer") as e:
            rollout.update(CHANGED.items(), "new")
        assert e.value.message.endswith(f"; {server.url} serve version new already")
        assert e.value.data["applied"] == [server.url]
        assert holds(server, quantised(CHANGED))
        assert serves_again(server, rollout)


@pytest.mark.parametrize("size", SIZES[:2])
def test_a_cancellation_while_the_end_waits_for_its_bucket_is_heard_at_once(
    size: int, server: Server
) -> None:
    reached = threading.Event()
    with Rollout(server.url, PLAN, bucket_bytes=size) as rollout:
        last = Last(server, rollout)

        async def hang(_: Any) -> None:
            await last.asked()
            await asyncio.sleep(0.1)
            reached.set()
            await asyncio.sleep(30)

        last.meets(hang)
        update = rollout.aupdate([*CHANGED.items()], "new")
        assert asyncio.run(cancelled(update, reached)) < AT_ONCE
        assert server.asked[-1] == wire.ABORT
        assert server.state == ("failed" if last.number else "ready")
        assert serves_again(server, rollout)


def test_a_group_that_broke_is_told_also_where_the_server_has_ended(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rollout(server.url, PLAN, via="nccl") as rollout:
        Last(server, rollout)
        late, give = Future[None](), ByCarrier.give

        def given(self: ByCarrier, *asked: Any) -> None:
            give(self, *asked)
            sent = self._under_way[-1].sent
            assert sent is not None
            self._under_way[-1].sent = Sent(sent.left, late)

        def breaks() -> None:
            while server.gate.about["version"] != "new":
                time.sleep(0.01)
            late.set_exception(ConflictError("a rank is gone"))

        monkeypatch.setattr(ByCarrier, "give", given)
        thread = threading.Thread(target=breaks)
        thread.start()
        with pytest.raises(ConflictError, match="a rank is gone"):
            rollout.update(CHANGED.items(), "new")
        thread.join()
        monkeypatch.undo()
        assert serves_again(server, rollout)
