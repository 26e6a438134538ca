"""A scheduler of SGLang 0.4.8 that rests while its weights change.

Everything here runs in the scheduler's own thread, between two of its steps, and in
every tensor-parallel rank at the same one: the questions that lead here are broadcast
as requests are. `hold` first takes in the result of the batch that is under way
(overlap schedule), then nothing runs on the weights, and `get_next_batch_to_run`
finds nothing to do until `resume`.

Requests that run go back to the front of the queue, as SGLang does it itself where it
runs out of memory: what they have generated stays, their keys and values are computed
anew, and penalties on repetition begin anew. The caches are emptied at once. So the
idle scheduler's count of its memory is right.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from fp8ctl.wire import InFlight

ABORTED = "ended for an update of the weights"
#: Milliseconds that a scheduler at rest waits for a message from the server, before it looks for
#: those that come by other ways.
_REST = 10

#: Of this process; a scheduler process has one scheduler.
_holding: Holding | None = None


def install(scheduler: ModuleType) -> None:
    """Let the schedulers of this module be held; called when it has been imported."""
    kind: Any = scheduler.Scheduler
    init, next_batch, flush_cache = kind.__init__, kind.get_next_batch_to_run, kind.flush_cache

    @functools.wraps(init)
    def init_and_remember(self: Any, *args: Any, **kwargs: Any) -> None:
        global _holding
        init(self, *args, **kwargs)
        _holding = Holding(self)

    @functools.wraps(next_batch)
    def next_batch_unless_held(self: Any) -> Any:
        if not _is_held(self):
            return next_batch(self)
        _rest(self)
        return None

    @functools.wraps(flush_cache)
    def flush_cache_also_when_held(self: Any) -> Any:
        # Stock code refuses while requests wait, and its updates assert that it did not.
        if not _is_held(self):
            return flush_cache(self)
        this().flush()
        return True

    kind.__init__ = init_and_remember
    kind.get_next_batch_to_run = next_batch_unless_held
    kind.flush_cache = flush_cache_also_when_held


def this() -> Holding:
    """Return the holding of this process's scheduler.

    Raises:
        RuntimeError: it has none.
    """
    if _holding is None:
        raise RuntimeError("this process has no scheduler")
    return _holding


def resume_here() -> bool:
    """Let this process's scheduler work on; False where it does not rest."""
    if _holding is None or not _holding.held:
        return False
    _holding.resume()
    return True


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Surround what may keep the scheduler for minutes, such as a trainer that joins late.

    SGLang's watchdog ends the server where a batch takes longer than 300 s.
    """
    if _holding is None:
        yield
        return
    scheduler = _holding.scheduler
    batch, scheduler.cur_batch = scheduler.cur_batch, None
    try:
        yield
    finally:
        scheduler.watchdog_last_time = time.perf_counter()
        scheduler.cur_batch = batch


def _is_held(scheduler: Any) -> bool:
    return _holding is not None and _holding.scheduler is scheduler and _holding.held


def _rest(scheduler: Any) -> None:
    """Wait for a message, for a moment.

    SGLang's loop would look for one again and again, and hold Python's lock nearly all the time:
    the thread that takes the next bucket needs it.
    """
    poll = getattr(getattr(scheduler, "recv_from_tokenizer", None), "poll", None)
    if poll is not None:
        poll(_REST)


class CannotHoldError(RuntimeError):
    """A scheduler of a kind that cannot be brought to rest."""


class Holding:
    """One scheduler, at work or at rest.

    Attributes:
        scheduler: SGLang's.
        held: True at rest.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.held = False

    def hold(self, how: InFlight) -> dict[str, Any]:
        """Bring the scheduler to rest; may be called again, to abort what waits.

        Args:
            how: "finish" leaves it at work where a request has begun and not ended; "abort" ends
                all requests, those that wait included, with an answer to their clients; "pause"
                has those that run wait for `resume`.

        Returns:
            held; aborted, paused: how many requests.

        Raises:
            CannotHoldError: the scheduler is of a kind that cannot be held; it goes on.
        """
        reason = self._refusal(how)
        if reason:
            raise CannotHoldError(reason)
        scheduler = self.scheduler
        if how == "finish" and not self.held and self._any_begun():
            return {"held": False, "aborted": 0, "paused": 0}
        self._take_in_what_is_under_way()
        running = list(self._running())
        for req in running:
            req.reset_for_retract()
            req.temp_input_token_ids_logprobs_val = None
            req.temp_input_token_ids_logprobs_idx = None
        scheduler.waiting_queue[:0] = running
        # A batch without requests, of the kind that the scheduler begins with.
        scheduler.running_batch = type(scheduler.running_batch)(reqs=[], batch_is_full=False)
        scheduler.cur_batch = scheduler.last_batch = scheduler.chunked_req = None
        self.held = True
        self.flush()
        if how == "abort":
            return {"held": True, "aborted": self._abort(), "paused": 0}
        return {"held": True, "aborted": 0, "paused": len(running)}

    def resume(self) -> dict[str, Any]:
        """Let the scheduler work on."""
        self.held = False
        return {}

    def flush(self) -> dict[str, Any]:
        """Forget all keys and values; the scheduler rests.

        Raises:
            RuntimeError: it does not.
        """
        if not self.held:
            raise RuntimeError("the caches can be emptied only while the scheduler rests")
        scheduler = self.scheduler
        scheduler.tree_cache.reset()
        scheduler.req_to_token_pool.clear()
        scheduler.token_to_kv_pool_allocator.clear()
        if scheduler.draft_worker is not None:
            draft = scheduler.draft_worker.model_runner
            draft.req_to_token_pool.clear()
            draft.token_to_kv_pool_allocator.clear()
        _forget_images()
        return {}

    def _refusal(self, how: InFlight) -> str:
        scheduler = self.scheduler
        if scheduler.disaggregation_mode.name != "NULL":
            return "prefill and decode on different servers: requests cannot be held"
        if scheduler.pp_size > 1:
            return "pipeline parallelism: requests cannot be held"
        if scheduler.draft_worker is not None and how == "pause" and any(self._running()):
            return "speculative decoding: requests cannot be paused; finish or abort them"
        return ""

    def _take_in_what_is_under_way(self) -> None:
        """Process the last batch's result, as the overlap loop does when nothing follows."""
        results = getattr(self.scheduler, "result_queue", ())
        while results:
            batch, result = results.popleft()
            batch.next_batch_sampling_info = None
            self.scheduler.process_batch_result(batch, result, None)

    def _running(self) -> Iterator[Any]:
        """Yield what has begun and not ended: decoding, just prefilled, prefilled in part."""
        scheduler = self.scheduler
        seen: set[int] = set()
        batches = [scheduler.running_batch, scheduler.last_batch]
        reqs = [req for batch in batches if batch is not None for req in batch.reqs or ()]
        reqs += [scheduler.chunked_req] if scheduler.chunked_req is not None else []
        for req in reqs:
            if id(req) not in seen and not req.finished():
                seen.add(id(req))
                yield req

    def _any_begun(self) -> bool:
        """Say whether anything was generated of a request that has not ended."""
        if any(self._running()):
            return True
        return any(req.output_ids for req in self.scheduler.waiting_queue)  # memory had run out

    def _abort(self) -> int:
        """End all requests that wait; their clients get what was generated so far."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        scheduler = self.scheduler
        reqs = [*scheduler.waiting_queue, *scheduler.grammar_queue]
        for req in scheduler.grammar_queue:
            if req.grammar is not None:
                req.grammar.cancel()  # it is being compiled
                req.grammar = None
        scheduler.waiting_queue = []
        scheduler.grammar_queue = []
        for req in reqs:
            if not req.finished():
                # Without a status: with one, the client would get an error and no text.
                req.finished_reason = FINISH_ABORT(ABORTED)
            for name in _INPUT_LOGPROBS:
                if getattr(req, name) is None:
                    setattr(req, name, [])
        for told in (False, True):
            some = [req for req in reqs if bool(req.return_logprob) is told]
            if some:
                scheduler.stream_output(some, told)
        return len(reqs)


#: What a request that was never prefilled has not, and its answer is made of.
_INPUT_LOGPROBS = tuple(
    f"input_{kind}_logprobs_{part}"
    for kind in ("token", "top", "token_ids")
    for part in ("val", "idx")
)


def _forget_images() -> None:
    """Drop embeddings of images: they were made by the weights that were."""
    from sglang.srt.managers import mm_utils

    if mm_utils.embedding_cache is not None:
        mm_utils.embedding_cache.clear()
