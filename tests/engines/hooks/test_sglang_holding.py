"""A scheduler at rest, as far as the real one on a CPU does not show it (tests/e2e does the rest).

A GPU's overlap schedule has a batch under way when the question comes; other schedulers cannot
be held at all.
"""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from fp8ctl.engines.hooks import sglang_holding
from fp8ctl.engines.hooks.sglang_holding import Holding


class Request:
    """SGLang's Req, as far as it is looked at."""

    def __init__(self, name: str, *, done: bool = False) -> None:
        self.name, self.done = name, done
        self.output_ids: list[int] = []
        self.retracted = 0

    def finished(self) -> bool:
        return self.done

    def reset_for_retract(self) -> None:
        self.retracted += 1


class Batch:
    """SGLang's ScheduleBatch."""

    next_batch_sampling_info: object = "the next one's"

    def __init__(self, reqs: list[Request], batch_is_full: bool) -> None:
        self.reqs = reqs
        self.batch_is_full = batch_is_full


class Pool:
    """A cache or a pool that can be emptied."""

    def __init__(self) -> None:
        self.emptied = 0

    def clear(self) -> None:
        self.emptied += 1

    reset = clear


class Scheduler:
    """SGLang's Scheduler, as far as it is used and wrapped."""

    def __init__(self, *running: Request, **changes: Any) -> None:
        self.disaggregation_mode = SimpleNamespace(name="NULL")
        self.pp_size = 1
        self.draft_worker: Any = None
        self.tree_cache, self.req_to_token_pool = Pool(), Pool()
        self.token_to_kv_pool_allocator = Pool()
        self.running_batch = Batch(list(running), True)
        self.last_batch: Batch | None = None
        self.cur_batch: Batch | None = self.running_batch
        self.chunked_req: Request | None = None
        self.waiting_queue: list[Request] = []
        self.grammar_queue: list[Request] = []
        self.processed: list[tuple[Any, Any, Any]] = []
        self.flushed = 0
        vars(self).update(changes)

    def process_batch_result(self, batch: Any, result: Any, launched: Any) -> None:
        self.processed.append((batch, result, launched))
        if result == "the last token":
            batch.reqs[0].done = True

    def get_next_batch_to_run(self) -> str:
        return "a batch"

    def flush_cache(self) -> bool:
        self.flushed += 1
        return not self.waiting_queue

    @property
    def emptied(self) -> tuple[int, int, int]:
        pools = (self.tree_cache, self.req_to_token_pool, self.token_to_kv_pool_allocator)
        return tuple(pool.emptied for pool in pools)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_holding, "_forget_images", lambda: None)


def names(reqs: list[Request]) -> list[str]:
    return [req.name for req in reqs]


def test_what_has_begun_waits_before_what_has_not_and_everything_is_computed_anew() -> None:
    decoding, prefilled, part, done = (
        Request("decoding"),
        Request("prefilled"),
        Request("in part"),
        Request("done", done=True),
    )
    scheduler = Scheduler(decoding, done)
    scheduler.last_batch = Batch([prefilled, part], False)
    scheduler.chunked_req = part
    scheduler.waiting_queue = [Request("waiting")]
    holding = Holding(scheduler)
    assert holding.hold("pause") == {"held": True, "aborted": 0, "paused": 3}
    assert names(scheduler.waiting_queue) == ["decoding", "prefilled", "in part", "waiting"]
    assert [req.retracted for req in (decoding, prefilled, part, done)] == [1, 1, 1, 0]
    for name in ("last_batch", "cur_batch", "chunked_req"):
        assert getattr(scheduler, name) is None
    assert scheduler.running_batch.reqs == []
    assert not scheduler.running_batch.batch_is_full
    assert scheduler.emptied == (1, 1, 1)
    # A second time there is nothing left to do.
    assert holding.hold("pause") == {"held": True, "aborted": 0, "paused": 0}
    assert decoding.retracted == 1


@pytest.mark.parametrize("where", ["running", "under way", "retracted", "waiting"])
def test_finishing_leaves_at_work_what_has_begun(where: str) -> None:
    """Paused, it would go on with the new weights: one answer of two sets."""
    req = Request("late")
    scheduler = Scheduler(*([req] if where == "running" else []))
    if where == "under way":
        scheduler.last_batch = Batch([req], False)
    if where in ("retracted", "waiting"):
        scheduler.waiting_queue = [req]
    req.output_ids = [5] if where == "retracted" else []
    holding = Holding(scheduler)
    told = holding.hold("finish")
    assert told["held"] is holding.held is (where == "waiting"), "that one has seen no weights yet"
    assert req.retracted == 0
    assert scheduler.emptied == ((1, 1, 1) if where == "waiting" else (0, 0, 0))


def test_the_result_of_a_batch_under_way_is_taken_in_first() -> None:
    """Else its tokens would be computed twice, and a request that has ended would go on."""
    ending, going = Request("ending"), Request("going on")
    scheduler = Scheduler(ending, going)
    scheduler.last_batch = scheduler.running_batch
    under_way = Batch([ending, going], False)
    scheduler.result_queue = deque([(under_way, "the last token")])  # type: ignore[attr-defined]
    Holding(scheduler).hold("pause")
    assert scheduler.processed == [(under_way, "the last token", None)]
    assert under_way.next_batch_sampling_info is None, "nothing follows it"
    assert names(scheduler.waiting_queue) == ["going on"]


@pytest.mark.parametrize(
    ("changes", "how", "why"),
    [
        ({"disaggregation_mode": SimpleNamespace(name="DECODE")}, "abort", "different servers"),
        ({"pp_size": 2}, "abort", "pipeline"),
        ({"draft_worker": object()}, "pause", "speculative"),
    ],
)
def test_a_scheduler_that_cannot_be_held_goes_on(
    changes: dict[str, Any], how: Any, why: str
) -> None:
    scheduler = Scheduler(Request("running"), **changes)
    holding = Holding(scheduler)
    with pytest.raises(sglang_holding.CannotHoldError, match=why):
        holding.hold(how)
    assert not holding.held
    assert names(scheduler.running_batch.reqs) == ["running"]
    assert scheduler.emptied == (0, 0, 0)


def test_a_speculating_scheduler_that_has_nothing_to_do_can_rest() -> None:
    runner = SimpleNamespace(req_to_token_pool=Pool(), token_to_kv_pool_allocator=Pool())
    scheduler = Scheduler(draft_worker=SimpleNamespace(model_runner=runner))
    Holding(scheduler).hold("pause")
    assert runner.req_to_token_pool.emptied == runner.token_to_kv_pool_allocator.emptied == 1


def test_caches_are_emptied_only_at_rest() -> None:
    scheduler = Scheduler(Request("running"))
    holding = Holding(scheduler)
    with pytest.raises(RuntimeError, match="rests"):
        holding.flush()
    assert scheduler.emptied == (0, 0, 0)
    holding.hold("pause")
    holding.resume()
    with pytest.raises(RuntimeError, match="rests"):
        holding.flush()


# --- wrapped ------------------------------------------------------------------------------------


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sglang_holding, "_holding", None)
    kind = type("Scheduler", (Scheduler,), dict(vars(Scheduler)))
    module: Any = SimpleNamespace(Scheduler=kind)
    sglang_holding.install(module)
    return kind(Request("running"))


def test_a_scheduler_finds_nothing_to_do_while_it_is_held(scheduler: Any) -> None:
    assert scheduler.get_next_batch_to_run() == "a batch"
    sglang_holding.this().hold("pause")
    assert scheduler.get_next_batch_to_run() is None
    sglang_holding.this().resume()
    assert scheduler.get_next_batch_to_run() == "a batch"


def test_a_scheduler_goes_on_from_within_a_question_where_it_rests(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not sglang_holding.resume_here(), "it works"
    sglang_holding.this().hold("pause")
    assert sglang_holding.resume_here()
    assert scheduler.get_next_batch_to_run() == "a batch"
    monkeypatch.setattr(sglang_holding, "_holding", None)
    assert not sglang_holding.resume_here()


def test_a_scheduler_at_rest_waits_for_messages(scheduler: Any) -> None:
    """Looking again and again, it would keep other threads from Python's lock."""
    waited: list[int] = []
    scheduler.recv_from_tokenizer = SimpleNamespace(poll=waited.append)
    scheduler.get_next_batch_to_run()
    assert not waited, "at work it waits for nothing"
    sglang_holding.this().hold("pause")
    scheduler.get_next_batch_to_run()
    [milliseconds] = waited
    assert 1 <= milliseconds <= 100, "what comes by another way waits no longer"
    scheduler.recv_from_tokenizer = SimpleNamespace()  # of ranks but the first
    assert scheduler.get_next_batch_to_run() is None


def test_an_update_of_the_engine_may_flush_while_requests_are_paused(scheduler: Any) -> None:
    """Stock code refuses, and asserts that it did not: the server would end."""
    assert scheduler.flush_cache()
    assert (scheduler.flushed, scheduler.emptied) == (1, (0, 0, 0))
    sglang_holding.this().hold("pause")
    assert scheduler.waiting_queue
    assert scheduler.flush_cache()
    assert (scheduler.flushed, scheduler.emptied) == (1, (2, 2, 2))


def test_sglangs_watchdog_does_not_see_a_batch_while_a_question_takes_long(scheduler: Any) -> None:
    """It reads these two, in a thread of its own, and ends the server."""
    batch = scheduler.cur_batch
    scheduler.watchdog_last_time = before = time.perf_counter()

    def late() -> None:
        with sglang_holding.unwatched():
            assert scheduler.cur_batch is None
            raise TimeoutError

    with pytest.raises(TimeoutError):
        late()
    assert scheduler.cur_batch is batch
    assert scheduler.watchdog_last_time > before, "the batch's time begins anew"


def test_without_a_scheduler_a_process_cannot_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_holding, "_holding", None)
    with pytest.raises(RuntimeError, match="no scheduler"):
        sglang_holding.this()
