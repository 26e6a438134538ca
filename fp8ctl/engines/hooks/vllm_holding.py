"""An engine core of vLLM 0.9.1 (V1) that rests while its weights change.

The engine core is one thread in a process of its own: it takes messages, then makes a step. Our
server asks it by a utility call, which is answered between two steps by a method of the core with
that name; so `install` adds methods. `hold` takes in the results of batches that are under way,
ends the requests or puts them back to the front of the queue, as the scheduler does it itself
where it runs out of memory, and then tells the core that there is nothing to do: it waits for
messages, without a busy loop, and adds what comes to the queue.

What was generated stays; keys and values, and what encoders made of images, are computed
anew after `resume`.
"""

from __future__ import annotations

import functools
import time
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

#: Tokens that the workers may not have been told of yet: one, or as many as were speculated.
_TAIL = 64

#: Of this process, the core that came to rest last.
_held: weakref.ref[Any] | None = None


def install(core: ModuleType) -> None:
    """Let the engine cores of this module be held; called when it has been imported."""
    kind: Any = core.EngineCore
    for name, method in (
        ("fp8ctl_hold", hold),
        ("fp8ctl_resume", resume),
        ("fp8ctl_flush", flush),
    ):
        setattr(kind, name, method)
    process: Any = core.EngineCoreProc
    step = process._process_engine_step

    @functools.wraps(step)
    def step_unless_held(self: Any) -> Any:
        # With a batch queue a step would schedule whether or not there is something to do.
        return False if is_held(self) else step(self)

    process._process_engine_step = step_unless_held


def is_held(core: Any) -> bool:
    """Say whether a core rests."""
    return "has_requests" in vars(core.scheduler)


def hold(core: Any, how: str) -> dict[str, Any]:
    """Bring a core to rest; one that rests can be asked again, to abort what waits.

    Args:
        core: the engine core.
        how: "finish" leaves it at work where a request has begun and not ended; "abort" drops
            all requests: their clients are told by the server's own process; "pause" lets them
            go on after `resume`.

    Returns:
        held; begun: how many requests had begun and not ended.

    Raises:
        RuntimeError: this core cannot be held so; it goes on.
    """
    global _held
    scheduler = core.scheduler
    begun = [one for one in scheduler.requests.values() if _has_begun(one)]
    reason = _refusal(core, how, len(begun))
    if reason:
        raise RuntimeError(reason)
    if how == "finish" and begun and not is_held(core):
        return {"held": False, "begun": len(begun)}
    _take_in_what_is_under_way(core)
    if how == "abort":
        core.abort_requests(list(scheduler.requests))
    elif scheduler.running:
        _preempt(core)
    # Found by `_process_input_queue` and `step` before the class's own.
    scheduler.has_requests = _nothing_to_do
    _held = weakref.ref(core)
    _forget(core)  # what is in use all the same, `flush` tells
    return {"held": True, "begun": len(begun)}


def resume(core: Any) -> dict[str, Any]:
    """Let a core compute again; does nothing where it is not held."""
    vars(core.scheduler).pop("has_requests", None)
    return {"waiting": len(core.scheduler.waiting)}


def resume_here() -> bool:
    """Let this process's core compute again, where it rests and nothing of the old weights is left.

    False in a worker that is a process of its own.
    """
    core = None if _held is None else _held()
    if core is None or not is_held(core) or not _forget(core):
        return False
    resume(core)
    return True


def flush(core: Any) -> dict[str, Any]:
    """Forget all keys and values.

    Raises:
        RuntimeError: some are in use.
    """
    if not _forget(core):
        raise RuntimeError("keys and values of the old weights are in use and cannot be forgotten")
    return {}


def _forget(core: Any) -> bool:
    """Forget all keys and values; say whether none is in use.

    VLLM goes through all blocks of its cache for that, tens of thousands in 4 ms. So a core does it
    as it comes to rest, beside the first bucket, and at an update's end there is nothing to forget:
    a block has a hash as long as the pool finds it by that.
    """
    pool = core.scheduler.kv_cache_manager.block_pool
    in_use = pool.num_gpu_blocks - pool.get_num_free_blocks() - 1  # the null block is no request's
    if not in_use and not pool.cached_block_hash_to_block:
        return True
    return bool(core.scheduler.reset_prefix_cache())


def _nothing_to_do() -> bool:
    return False


def _has_begun(request: Any) -> bool:
    return bool(request.num_computed_tokens or request.num_output_tokens)


def _refusal(core: Any, how: str, begun: int) -> str:
    if core.vllm_config.parallel_config.data_parallel_size > 1:
        return "data parallelism: the engines of one server step together and cannot be held"
    if core.scheduler.connector is not None:
        return "keys and values are shared with other servers: requests cannot be held"
    if core.batch_queue is not None and how == "pause" and begun:
        # A step without requests is none that the later stages know.
        return "pipeline parallelism: requests cannot be paused; finish or abort them"
    return ""


def _take_in_what_is_under_way(core: Any) -> None:
    """Process the results of batches that were scheduled; pipeline parallelism has several."""
    queue = core.batch_queue
    while queue is not None and not queue.empty():
        future, scheduled = queue.get_nowait()
        result = future.result()
        queue.task_done()
        _give(core, core.scheduler.update_from_output(scheduled, result))


def _give(core: Any, outputs: Any) -> None:
    for output in (outputs or {}).items():
        core.output_queue.put_nowait(output)


def _preempt(core: Any) -> None:
    """Put what runs back to the front of the queue, in its order, without keys and values."""
    from vllm.v1.engine import EngineCoreEventType
    from vllm.v1.request import RequestStatus

    scheduler = core.scheduler
    now = time.monotonic()
    known = {
        one.request_id: (
            one.num_output_tokens,
            list(one.output_token_ids[-_TAIL:]),
        )
        for one in scheduler.requests.values()
        if _has_begun(one)
    }
    while scheduler.running:
        request = scheduler.running.pop()
        scheduler.kv_cache_manager.free(request)
        scheduler.encoder_cache_manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.spec_token_ids = []
        if scheduler.log_stats:
            request.record_event(EngineCoreEventType.PREEMPTED, now)
        scheduler.waiting.appendleft(request)
    _step_without_requests(core)
    core.model_executor.collective_rpc("fp8ctl_paused", args=(known,))


def _step_without_requests(core: Any) -> None:
    """Have the workers take all requests out of their batch.

    To one that still is in it they would append the new blocks of its keys and values behind
    the old ones: where the scheduler preempts, a step without the request always follows.
    """
    scheduler = core.scheduler
    waiting, scheduler.waiting = scheduler.waiting, type(scheduler.waiting)()
    try:
        scheduled = scheduler.schedule()
        result = core.execute_model(scheduled)
        _give(core, scheduler.update_from_output(scheduled, result))
    finally:
        scheduler.waiting = waiting
