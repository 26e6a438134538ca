"""Whatever goes wrong on the way: old or new weights, never a hang, a leak, or a wrong error."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import signal
import threading
import time
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import wire
from fp8ctl.errors import (
    BusyError,
    CarrierError,
    CheckFailedError,
    ConflictError,
    EngineFailedError,
    Fp8ctlError,
    NotFoundError,
    NotPermittedError,
    PlanDoesNotFitError,
    UnsupportedError,
)
from fp8ctl.kernels import quantize as kernels
from fp8ctl.push import Rollout
from fp8ctl.push.delivery import ByCarrier
from fp8ctl.wire import Slot, place
from tests.push.serving import CutOffError, Server, cancelled, serving
from tests.push.test_rollout import CHANGED, HOW, holds, update
from tests.test_stream import PLAN, WEIGHTS, Source, planned, wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8ctl.wire import Entry

Named = tuple[str, torch.Tensor]
each_way = pytest.mark.parametrize("how", HOW)
AT_ONCE = 5.0


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    limit = time.monotonic() + 5
    while threading.active_count() > before[0] and time.monotonic() < limit:
        time.sleep(0.01)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that serves WEIGHTS."""
    with serving(PLAN) as one:
        with Rollout(one.url, PLAN) as rollout:
            rollout.update(WEIGHTS.items(), "old")
        one.asked.clear()
        one.table.buckets.clear()
        yield one


def serves_again(server: Server, rollout: Rollout) -> bool:
    """Say whether a next update mends whatever there was."""
    server.faults.clear()
    server.table.delay = 0.0
    rollout.update(CHANGED.items(), "again")
    rollout.update(WEIGHTS.items(), "and again")
    return server.state == "ready" and holds(server, wanted())


# ---- the source ----


@each_way
@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_a_failing_source_is_the_error_and_the_server_knows(
    how: str, at: int, server: Server
) -> None:
    source = Source(CHANGED.items(), fail_at=at)
    with Rollout(server.url, PLAN, bucket_bytes=1) as rollout:
        with pytest.raises(OSError, match="the source has trouble"):
            update(rollout, source, how, "new")
        assert source.closed
        assert source.came == at
        # Before anything was placed nobody was disturbed.
        assert (wire.ABORT in server.asked) == (wire.BEGIN in server.asked) == (at > 1)
        assert server.state == ("failed" if server.table.buckets else "ready")
        assert serves_again(server, rollout)


@each_way
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.input_layernorm.weight"]
)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_nan_names_its_tensor_quantised_or_kept(
    how: str, name: str, value: float, server: Server
) -> None:
    spoilt = {n: t.clone() for n, t in CHANGED.items()}
    spoilt[name].view(-1)[7] = value
    source = Source(spoilt.items())
    with Rollout(server.url, PLAN) as rollout:
        with pytest.raises(PlanDoesNotFitError, match=rf"{name}: non-finite value") as e:
            update(rollout, source, how, "new")
        assert e.value.data["tensor"] == name
        assert e.value.data["index"] == ([0, 7] if "gate" in name else [7])
        assert source.closed
        assert server.state == "ready"
        assert holds(server, wanted())
        assert serves_again(server, rollout)


@each_way
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_nan_that_a_gpu_tells_of_late_is_known_before_it_is_loaded(
    how: str, bucket_bytes: int, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    # Of a model: it has them whether or not an update does.
    spoilt = {n: torch.nn.Parameter(t.clone(), requires_grad=False) for n, t in CHANGED.items()}
    spoilt[name][2, 3] = torch.nan
    start, delivered = kernels.start_many, ByCarrier.deliver
    under_way: list[Late] = []
    most = 0
    loaded: list[str] = []

    class Late:
        """What is done when it is waited for, as on a GPU it may be."""

        def __init__(self, *asked: Any) -> None:
            nonlocal most
            self.asked = asked
            under_way.append(self)
            most = max(most, len(under_way))

        def wait(self) -> Any:
            under_way.remove(self)
            return start(*self.asked).wait()

        @property
        def places(self) -> set[int]:
            return {codes.data_ptr() for codes, _ in self.asked[3]}

    def deliver(self: ByCarrier, slot: int, nbytes: int, entries: Sequence[Entry]) -> None:
        first = self._sender.buffer(slot).data_ptr()
        places = {first + entry.offset for entry in entries}
        assert not any(one.places & places for one in under_way), "not waited for"
        loaded.extend(entry.name for entry in entries)
        delivered(self, slot, nbytes, entries)

    monkeypatch.setattr(kernels, "start_many", Late)
    monkeypatch.setattr(ByCarrier, "deliver", deliver)
    monkeypatch.setattr(ByCarrier, "free", lambda *_: True)  # else whoever waits looks meanwhile
    with Rollout(server.url, PLAN, bucket_bytes=bucket_bytes) as rollout:
        with pytest.raises(PlanDoesNotFitError, match=rf"{name}: non-finite value nan") as e:
            update(rollout, Source(spoilt.items()), how, "new")
        assert e.value.data == {"tensor": name, "index": [2, 3]}
        assert name not in loaded
        assert bool(loaded) == (bucket_bytes == 1)
        # The device has the next bucket to do while the host looks at this one.
        assert most == (2 if bucket_bytes == 1 else 1)
        monkeypatch.undo()
        assert serves_again(server, rollout)


@pytest.mark.parametrize("how", ["rounded", "made by the source"])
def test_what_is_nobody_elses_is_not_kept_beside_the_next_bucket(
    how: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for name, t in CHANGED.items():
            yield name, t.clone()

    start = kernels.start_many
    kept: list[weakref.ref[torch.Tensor]] = []
    lists = 0

    def starting(xs: Sequence[torch.Tensor], *asked: Any) -> Any:
        nonlocal lists
        lists += 1
        # Of masters in 64 bits each bucket makes tensors of its own; a generator may make each of
        # them. They are gone by now.
        assert not any(one() is not None for one in kept)
        kept[:] = map(weakref.ref, xs)
        made = start(xs, *asked)
        return SimpleNamespace(wait=lambda xs=xs: made.wait())  # as on a GPU, where it holds them

    monkeypatch.setattr(kernels, "start_many", starting)
    with Rollout(server.url, PLAN, bucket_bytes=1) as rollout:
        masters = [(name, t.double()) for name, t in CHANGED.items()]
        rollout.update(masters if how == "rounded" else made(), "new")
    assert lists > 3


def test_what_comes_behind_fp8_and_was_not_made_here_is_looked_at() -> None:
    pairs = [
        ("a.weight", torch.ones(4, 4).to(torch.float8_e4m3fn)),
        ("a.weight_scale", torch.tensor([torch.nan])),
    ]
    with serving(None) as server, Rollout(server.url, None, bucket_bytes=1 << 16) as rollout:
        with pytest.raises(PlanDoesNotFitError, match=r"a\.weight_scale: non-finite value nan"):
            rollout.update(pairs, "1", complete=False)
        assert wire.BUCKET not in server.asked


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (("model.layers.7.mlp.up_proj.weight", torch.ones(96, 64)), ConflictError, "not in the"),
        (("model.layers.0.mlp.extra_buffer", torch.ones(3)), ConflictError, "not in the plan"),
        (("model.layers.0.mlp.gate.weight", torch.ones(8, 65)), PlanDoesNotFitError, "planned"),
        (("model.embed_tokens.weight", torch.ones(50, 64)), ConflictError, "a second time"),
        ("abc", TypeError, "expected"),
    ],
)
def test_what_was_not_planned_is_refused_by_name(
    item: Any, error: type[Exception], message: str, server: Server
) -> None:
    first = next(iter(CHANGED.items()))
    with Rollout(server.url, PLAN) as rollout:
        with pytest.raises(error, match=message):
            rollout.update([first, item], "new")
        assert server.state == "ready"
        assert holds(server, wanted())


# ---- servers that are not for it ----


def test_a_stock_server_is_refused_before_anything_is_asked_of_the_source() -> None:
    source = Source(WEIGHTS.items())
    with serving(PLAN) as good, serving(PLAN, stock=True) as stock:
        rollout = Rollout([good.url, stock.url], PLAN)
        with pytest.raises(UnsupportedError, match="was not started by fp8ctl") as e:
            rollout.update(source.sync(), 1)
        assert e.value.hint == "fp8ctl patch --backend sglang, then start it: fp8ctl launch"
        assert stock.url in str(e.value)
        assert {*good.asked, *stock.asked} == {"/fp8ctl/state", "/get_model_info"}
    assert source.came == 0


def test_an_engine_without_the_patch_is_refused_with_the_command() -> None:
    source = Source(WEIGHTS.items())
    with serving(PLAN) as good, serving(PLAN) as unpatched:
        unpatched.table.refit = False
        with Rollout([good.url, unpatched.url], PLAN) as rollout:
            with pytest.raises(UnsupportedError, match="cannot load weights a second time") as e:
                rollout.update(source.sync(), 1)
            assert (e.value.hint or "").startswith("fp8ctl patch --backend sglang")
            assert wire.BEGIN not in good.asked + unpatched.asked
            assert source.came == 0
            unpatched.table.refit = True
            rollout.update(WEIGHTS.items(), 2)


def test_another_plan_is_refused_before_anything_is_sent() -> None:
    other = planned({**WEIGHTS, "model.more.weight": torch.ones(2, 2)})
    with serving(other) as server, Rollout(server.url, PLAN) as rollout:
        with pytest.raises(ConflictError, match="another plan") as e:
            rollout.update(WEIGHTS.items(), 1)
        assert e.value.data["expected"] == PLAN.digest
        assert e.value.data["found"] == other.digest
        assert wire.BEGIN not in server.asked
    with serving(None) as server, Rollout(server.url, PLAN) as rollout:
        with pytest.raises(ConflictError) as e:
            rollout.update(WEIGHTS.items(), 1)
        assert "None" in (e.value.hint or "")


def test_nobody_there_and_somebody_else_are_told_apart() -> None:
    with serving(PLAN) as server:
        url = server.url
    with pytest.raises(NotFoundError, match=rf"no server answers at {url}"):
        Rollout(url, PLAN).update(WEIGHTS.items(), 1)
    with serving(PLAN) as server:

        async def teapot(_: Any) -> Any:
            return 418, "short and stout"

        server.faults["/fp8ctl/state"] = teapot
        with pytest.raises(EngineFailedError, match="418"):
            Rollout(server.url, PLAN).update(WEIGHTS.items(), 1)

        async def warming(_: Any) -> Any:
            return 503, {"state": "starting", "message": "the engine warms up"}

        server.faults["/fp8ctl/state"] = warming
        with pytest.raises(BusyError, match="warms up"):
            Rollout(server.url, PLAN).update(WEIGHTS.items(), 1)

        async def old(_: Any) -> Any:
            return 200, {"state": "ready", "fp8ctl": "0.0.9", "engine": "vllm"}

        server.faults["/fp8ctl/state"] = old
        with pytest.raises(UnsupportedError, match=r"0\.0\.9"):
            Rollout(server.url, PLAN).update(WEIGHTS.items(), 1)


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "s3cr3t-key"
    with serving(PLAN, key=key) as server:
        monkeypatch.delenv("FP8CTL_API_KEY", raising=False)
        for wrong in (None, "other"):
            with pytest.raises(NotPermittedError, match="another API key") as e:
                Rollout(server.url, PLAN, api_key=wrong).update(WEIGHTS.items(), 1)
            assert "other" not in str(e.value).replace("another", "")
        monkeypatch.setenv("FP8CTL_API_KEY", key)
        with Rollout(server.url, PLAN) as rollout:
            rollout.update(WEIGHTS.items(), 1)

            async def chatty(_: Any) -> Any:
                error = {"id": "FP8-LOAD", "message": f"was given {key}", "hint": key}
                return 500, {"error": error, "state": "failed"}

            server.faults[wire.BUCKET] = chatty
            with pytest.raises(EngineFailedError) as error:
                rollout.update(Source(CHANGED.items()).sync(), 2)
            told = error.value
            assert key not in f"{told} {told.hint} {told.data} {rollout!r} {vars(rollout)}"
            assert key not in str(server.bodies)


# ---- servers that fail ----


def refusing(id_: str, status: int = 409, message: str = "no") -> Callable[[Any], Any]:
    async def fault(_: Any) -> Any:
        error = {"id": id_, "message": message, "hint": "", "data": {"names": ["a"]}}
        return status, {"error": error, "state": "failed"}

    return fault


@pytest.mark.parametrize("path", [wire.CONNECT, wire.BEGIN, wire.BUCKET, wire.END])
@pytest.mark.parametrize(
    ("id_", "kind"),
    [
        ("FP8-REFIT", UnsupportedError),
        ("FP8-WIRE", UnsupportedError),
        ("FP8-CARRIER", CarrierError),
        ("FP8-BUSY", BusyError),
        ("FP8-DRAIN", BusyError),
        ("FP8-MANIFEST", ConflictError),
        ("FP8-ORDER", ConflictError),
        ("FP8-TENSOR", PlanDoesNotFitError),
        ("FP8-INCOMPLETE", ConflictError),
        ("FP8-UNEQUAL", CheckFailedError),
        ("FP8-LOAD", EngineFailedError),
        ("FP8-OF-TOMORROW", EngineFailedError),
    ],
)
def test_each_refusal_is_an_error_of_the_tree_with_server_and_hint(
    path: str, id_: str, kind: type[Fp8ctlError]
) -> None:
    with serving(PLAN) as good, serving(PLAN) as bad:
        bad.faults[path] = refusing(id_)

        async def slowly(_: Any) -> None:
            await asyncio.sleep(0.05)

        good.faults[wire.END] = slowly  # who serves the new weights is told all the same
        with Rollout([good.url, bad.url], PLAN, bucket_bytes=9000) as rollout:
            with pytest.raises(kind) as e:
                rollout.update(WEIGHTS.items(), 1)
            assert type(e.value) is kind
            assert str(e.value).startswith(f"{bad.url}: no")
            assert e.value.hint
            assert e.value.data["server"] == bad.url
            assert e.value.data["reply"] == id_
            assert e.value.data["names"] == ["a"]
            if path == wire.END:
                assert e.value.data["applied"] == [good.url]
                assert f"{good.url} serve version 1 already" in str(e.value)
            else:
                assert wire.END not in good.asked
                assert good.state != "ready" or not good.table.buckets
            if path in (wire.BUCKET, wire.END):
                assert good.asked[-1] == bad.asked[-1] == wire.ABORT
            good.faults.clear()
            assert serves_again(bad, rollout)
            assert holds(good, wanted())


@each_way
def test_a_server_that_is_gone_in_a_bucket_is_told_with_its_tensors(
    how: str, server: Server
) -> None:
    async def cut(found: Any) -> Any:
        if found["number"] == 1:
            raise CutOffError

    source = Source(CHANGED.items())
    with serving(PLAN) as gone, Rollout([server.url, gone.url], PLAN, bucket_bytes=9000) as rollout:
        gone.faults[wire.BUCKET] = cut
        with pytest.raises(
            EngineFailedError, match=r"does not answer.*bucket of model\.layers"
        ) as e:
            update(rollout, source, how, "new")
        assert e.value.data["server"] == gone.url
        assert source.closed
        # Asked twice, since an answer may be lost; then given up.
        asked = [one["number"] for one in gone.bodies if "nbytes" in one]
        assert (asked.count(0), asked.count(1)) == (1, 2)
        assert server.state == "failed"
        assert wire.END not in server.asked
        assert serves_again(gone, rollout)
        assert holds(server, wanted())


def test_a_lost_answer_is_asked_for_again_and_nothing_is_loaded_twice(server: Server) -> None:
    lost: list[str] = []

    def losing(path: str) -> Callable[[Any], Any]:
        async def fault(found: Any) -> Any:
            if path in lost:
                return None
            lost.append(path)
            # It is worked off, and the answer never arrives.
            route = getattr(server.updates, path.rpartition("/")[2])
            await route(found)
            raise CutOffError

        return fault

    for path in (wire.BEGIN, wire.BUCKET, wire.END):
        server.faults[path] = losing(path)
    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        done = rollout.update(CHANGED.items(), "new")
    assert lost == [wire.BEGIN, wire.BUCKET, wire.END]
    assert done.verified == 19
    names = [name for bucket in server.table.buckets for name in bucket]
    assert len(names) == len(set(names)) == 19
    assert server.state == "ready"


def test_a_bucket_is_asked_for_while_the_one_before_is_worked_off(server: Server) -> None:
    came = asyncio.Event()

    async def wait(found: dict[str, Any]) -> None:
        if found["number"] == 1:
            came.set()
        await asyncio.wait_for(came.wait(), 20)

    server.faults[wire.BUCKET] = wait
    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        done = rollout.update(WEIGHTS.items(), "new")
    assert done.buckets > 2
    assert done.verified == 19
    assert holds(server, wanted())


def test_of_two_buckets_that_fail_the_first_is_told_also_where_it_is_answered_last(
    server: Server,
) -> None:
    refused = asyncio.Event()

    async def fail(found: dict[str, Any]) -> tuple[int, Any]:
        if found["number"] == 1:
            refused.set()
            told = "it follows"
        else:
            await asyncio.wait_for(refused.wait(), 20)
            await asyncio.sleep(0.3)
            told = "the cause"
        error = {"id": "FP8-LOAD", "message": told, "hint": "", "data": {}}
        return 500, {"error": error, "state": "ready"}

    server.faults[wire.BUCKET] = fail
    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        with pytest.raises(Fp8ctlError, match="the cause"):
            rollout.update(CHANGED.items(), "new")
        del server.faults[wire.BUCKET]
        assert rollout.update(CHANGED.items(), "new").verified == 19


def test_a_connection_that_idled_away_is_opened_again(server: Server) -> None:
    with Rollout(server.url, PLAN) as rollout:
        rollout.update(CHANGED.items(), 1)
        [mine] = rollout._servers
        assert mine._connection is not None
        mine._connection.sock.shutdown(2)  # as a server's keep-alive ends
        rollout.update(WEIGHTS.items(), 2)
    assert holds(server, wanted())


@pytest.mark.parametrize("delta", [False, True])
def test_a_server_that_was_started_anew_is_connected_again(server: Server, delta: bool) -> None:
    with serving(PLAN) as other, Rollout([server.url, other.url], PLAN, delta=delta) as rollout:
        rollout.update(CHANGED.items(), 1)
        server.restart()
        rollout.update(WEIGHTS.items(), 2)
        assert server.asked.count(wire.CONNECT) == 2
        assert other.asked.count(wire.CONNECT) == 1
        assert holds(server, wanted())
        assert holds(other, wanted())


@each_way
@pytest.mark.parametrize("path", [wire.CONNECT, wire.BUCKET, wire.END])
def test_a_server_that_hangs_is_given_up_after_the_time_out(
    how: str, path: str, server: Server
) -> None:
    async def hang(_: Any) -> None:
        await asyncio.sleep(60)

    source = Source(CHANGED.items())
    with Rollout(server.url, PLAN, timeout=2.0) as rollout:
        server.faults[path] = hang
        start = time.monotonic()
        with pytest.raises(EngineFailedError, match=r"not within 2 s"):
            update(rollout, source, how, "new")
        assert time.monotonic() - start < AT_ONCE
        assert source.closed == (path != wire.CONNECT)  # it was not begun
        server.faults.clear()
        rollout._wish = dataclasses.replace(rollout._wish, timeout=60.0)
        for one in rollout._servers:
            for line in (one, one._odd):
                assert line is not None
                line._timeout = 60.0
        assert serves_again(server, rollout)


# ---- who goes away in the middle ----


WHEN = ["state", "connect", "begin", "bucket", "end", "source"]


@pytest.mark.parametrize("when", WHEN)
def test_a_cancelled_update_is_aborted_at_once(when: str, server: Server) -> None:
    reached = threading.Event()
    source = Source(CHANGED.items())

    async def hang(_: Any) -> None:
        reached.set()
        await asyncio.sleep(30)

    async def named() -> Any:
        async for item in (inner := source.asynchronous()):
            if when == "source" and source.came == 9:
                reached.set()
                try:
                    await asyncio.sleep(30)
                finally:
                    await inner.aclose()  # type: ignore[attr-defined]
            yield item

    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        if when != "source":
            path = "/fp8ctl/state" if when == "state" else f"/fp8ctl/push/{when}"
            server.faults[path] = hang
        assert asyncio.run(cancelled(rollout.aupdate(named(), "new"), reached)) < AT_ONCE
        if when != "state" and when != "connect":
            assert wire.ABORT in server.asked
        if source.came:
            assert source.closed
        assert serves_again(server, rollout)


def test_the_event_loop_goes_on_while_servers_are_slow(server: Server) -> None:
    server.table.delay = 0.1
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def run(rollout: Rollout) -> None:
        ticking = asyncio.create_task(tick())
        await rollout.aupdate(Source(CHANGED.items()).asynchronous(), "new")
        ticking.cancel()

    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        start = time.monotonic()
        asyncio.run(run(rollout))
        assert time.monotonic() - start > 0.7
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    # A machine may stall once; a loop that waits for requests does for each of them.
    assert len(gaps) > 20
    assert sorted(gaps)[-3] < 0.1


def test_a_bucket_is_filled_while_the_one_before_is_loaded(server: Server) -> None:
    server.table.delay = 0.3
    source = Source(CHANGED.items())
    came: list[int] = []

    async def note(found: Any) -> None:
        came.append(source.came)

    async def seen(found: Any) -> Any:
        came.append(source.came)

    server.faults[wire.BUCKET] = seen
    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        rollout.update(source.sync(), "new")
    # When bucket n is asked for, the source has given what is in n + 1, and never all of it.
    assert came[0] < came[2] < len(CHANGED)
    assert came == sorted(came)


@pytest.mark.usefixtures("interrupts_count")
@pytest.mark.parametrize("where", ["server", "source"])
def test_ctrl_c_is_raised_and_the_update_is_aborted(where: str, server: Server) -> None:
    def interrupt() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    source = Source(CHANGED.items())

    async def hang(found: Any) -> None:
        thread.start()
        await asyncio.sleep(30)

    def named() -> Iterator[Named]:
        for item in (inner := source.sync()):
            if where == "source" and source.came == 9:
                thread.start()
                try:
                    time.sleep(30)
                finally:
                    inner.close()  # type: ignore[attr-defined]
            yield item

    if where == "server":
        server.faults[wire.BUCKET] = hang
    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            rollout.update(named(), "new")
        assert time.monotonic() - start < AT_ONCE
        thread.join()
        assert server.asked[-1] == wire.ABORT
        assert source.closed
        assert serves_again(server, rollout)


def test_a_slow_source_does_not_lose_its_servers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8ctl.push.session.LEASE", 1.0)

    def named() -> Iterator[Named]:
        for i, item in enumerate(CHANGED.items()):
            if i == 9:
                time.sleep(2.5)
            yield item

    with Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        rollout.update(named(), "new")
    assert server.asked.count(wire.BEGIN) > 3
    assert server.state == "ready"


@each_way
@pytest.mark.parametrize("bucket_bytes", [5000, 9000])
def test_a_bucket_that_is_refused_while_the_last_one_waits_says_why(
    bucket_bytes: int, how: str, server: Server
) -> None:
    with Rollout(server.url, PLAN, bucket_bytes=bucket_bytes) as rollout:
        last = rollout.update(WEIGHTS.items(), "count").buckets - 1

        async def refuse(found: Any) -> Any:
            if found["number"] == last - 1:
                await asyncio.sleep(0.3)  # the last one stands behind it by then
                return await refusing("FP8-LOAD", 500, "this is why")(found)
            return None

        server.faults[wire.BUCKET] = refuse
        with pytest.raises(EngineFailedError, match="this is why"):
            update(rollout, Source(CHANGED.items()), how, "new")
        server.faults.clear()
        assert serves_again(server, rollout)


@pytest.mark.parametrize("how", ["started anew", "another client"])
def test_a_group_that_a_server_left_is_made_again_before_anything_is_sent(
    how: str, server: Server
) -> None:
    with serving(PLAN) as other, Rollout([server.url, other.url], PLAN, via="nccl") as rollout:
        rollout.update(CHANGED.items(), 1)
        if how == "started anew":
            server.restart()
        else:
            with Rollout(server.url, PLAN) as stranger:
                stranger.update(CHANGED.items(), "theirs")
        rollout.update(WEIGHTS.items(), 2)
        rollout.update(WEIGHTS.items(), 3)
        for one in (server, other):
            assert holds(one, wanted())
        assert other.asked.count(wire.CONNECT) == 2, "once for all updates, and once again"
        assert wire.ABORT not in [*server.asked, *other.asked]


@each_way
def test_what_is_in_fp8_already_comes_as_pairs(how: str, server: Server) -> None:
    """Of a size that ends between a pair: both are in one bucket all the same."""
    made = dict(wanted())
    slots = [Slot("", str(t.dtype)[6:], tuple(t.shape)) for t in made.values()]
    ends = [*place(slots)[0][1:], place(slots)[1]]
    codes = next(end for end, slot in zip(ends, slots, strict=True) if slot.dtype[:6] == "float8")
    with Rollout(server.url, PLAN, bucket_bytes=codes, delta=True) as rollout:
        update(rollout, Source(made.items()), how, "1", quantized=True)
        assert holds(server, wanted())
        scale = next(name for name in made if "_scale" in name)
        alone = {n: t for n, t in made.items() if n != scale} | {scale: made[scale]}
        with pytest.raises(ConflictError, match=f"{scale} does not come right after"):
            update(rollout, Source(alone.items()), how, "2", quantized=True)
        assert serves_again(server, rollout)
        name = next(n for n, t in made.items() if t.dtype == torch.float8_e4m3fn)
        bad = made[name].clone()
        bad.view(torch.uint8).view(-1)[5] = 0xFF
        with pytest.raises(PlanDoesNotFitError, match=f"{name}: non-finite value nan"):
            update(rollout, Source(({**made, name: bad}).items()), how, "3", quantized=True)
        assert serves_again(server, rollout)
