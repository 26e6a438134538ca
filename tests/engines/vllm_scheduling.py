"""vLLM 0.9.1's own scheduler, cache manager, engine core and batch, driven on a CPU.

`python -m tests.engines.vllm_scheduling SOURCES` reads `{"scenario": ..., ...}` from stdin, one
JSON line each, and answers each in a process of its own. The classes named in `REAL` are vLLM's;
what they import besides stands empty. In place of the model there is a rule: the next token is a
function of what all earlier tokens left in the blocks of keys and values that the worker's block
table names, and of the version of the weights that left it. So a block that was not computed
anew, and a block table that names the wrong ones, change what is generated.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import queue
import sys
import traceback
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.engines import forks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Modules that are vLLM's own.
REAL = frozenset({"vllm.outputs"}) | frozenset(
    f"vllm.v1.{name}"
    for name in (
        *("request", "outputs", "utils", "engine", "engine.core", "kv_cache_interface"),
        *("engine.detokenizer", "engine.logprobs", "engine.output_processor"),
        "engine.parallel_sampling",
        *("core", "core.block_pool", "core.encoder_cache_manager", "core.kv_cache_coordinator"),
        *("core.kv_cache_manager", "core.kv_cache_utils", "core.single_type_kv_cache_manager"),
        *("core.sched", "core.sched.interface", "core.sched.output", "core.sched.scheduler"),
        *("core.sched.utils", "metrics", "metrics.stats", "sample", "sample.metadata"),
        *("worker", "worker.block_table", "worker.gpu_input_batch", "worker.gpu_model_runner"),
    )
)
BLOCK, BLOCKS, LONGEST = 4, 64, 64


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty

    def __getitem__(cls, _item: object) -> Any:
        return cls

    def __or__(cls, _other: object) -> Any:
        return cls

    __ror__ = __or__


class _Empty(metaclass=_Meta):
    """Whatever it is asked for, it has; whatever is called, it does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None

    def __call__(self, *args: Any, **_kwargs: object) -> Any:
        return args[0] if args and callable(args[0]) else self


class _Struct:
    """What vLLM uses of msgspec.Struct: fields by position or name, with defaults."""

    def __init_subclass__(cls, **_options: object) -> None:
        super().__init_subclass__()

    def __init__(self, *args: object, **kwargs: object) -> None:
        names = [
            n for c in reversed(type(self).__mro__) for n in vars(c).get("__annotations__", ())
        ]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in names:
            default = getattr(type(self), name, None)
            default = type(default)(default) if isinstance(default, list | dict) else default
            setattr(self, name, given.get(name, default))
        post = getattr(self, "__post_init__", None)
        if post is not None:
            post()


class Params(_Empty):
    """Sampling parameters: greedy, to a number of tokens."""

    def __init__(self, max_tokens: int, prompt_logprobs: int | None = None) -> None:
        self.max_tokens, self.prompt_logprobs = max_tokens, prompt_logprobs
        self.n, self.seed, self.output_kind, self.detokenize = 1, None, 0, False
        self.logprobs: int | None = None
        self.ignore_eos, self.top_p, self.repetition_penalty = True, 1.0, 1.0
        self.top_k = self.min_tokens = 0
        self.min_p = self.frequency_penalty = self.presence_penalty = 0.0
        self.logit_bias = self.guided_decoding = self.extra_args = None
        self.allowed_token_ids = self.bad_words_token_ids = self.stop_token_ids = None
        self.sampling_type = "greedy"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds vLLM's own modules in its sources, and an empty one for whatever else is missing."""

    def __init__(self, sources: Path) -> None:
        self._sources = sources

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> Any:
        top = name.split(".")[0]
        empty = {"vllm", "msgspec", "zmq", "prometheus_client", "pydantic", "transformers"}
        if name in REAL:
            file = self._sources / Path(*name.split("."))
            package = file.is_dir()
            file = file / "__init__.py" if package else file.with_suffix(".py")
            places = [str(file.parent)] if package else None
            return importlib.util.spec_from_file_location(
                name, file, submodule_search_locations=places
            )
        if top in empty | {"tokenizers", "packaging"}:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        names: dict[str, dict[str, Any]] = {
            "vllm.utils": {
                "cdiv": lambda a, b: -(-a // b),
                "sha256": hash,
                "GiB_bytes": 1 << 30,
                "get_dtype_size": lambda dtype: dtype.itemsize,
                "is_list_of": lambda value, kind: isinstance(value, list),
                "is_pin_memory_available": lambda: False,
            },
            "vllm.sampling_params": {
                "SamplingParams": Params,
                "RequestOutputKind": types.SimpleNamespace(CUMULATIVE=0, DELTA=1, FINAL_ONLY=2),
                "SamplingType": types.SimpleNamespace(GREEDY="greedy", RANDOM_SEED="seed"),
            },
            "msgspec": {"Struct": _Struct},
            "vllm.logger": {"init_logger": lambda name: _Empty()},
        }
        vars(module).update(names.get(spec.name, {}))
        module.__getattr__ = _missing  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Empty,), {})


class Worker:
    """vLLM's batch and its bookkeeping, with the rule in place of the model.

    Attributes:
        version: of the weights.
        cache: what each place of each block holds: the token and the version that computed it.
        busy: a forward pass is on its way.
    """

    def __init__(self) -> None:
        from vllm.v1.worker.gpu_input_batch import InputBatch
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        self._update_states = GPUModelRunner._update_states
        device = torch.device("cpu")
        self.runner = types.SimpleNamespace(
            requests={},
            encoder_cache={},
            uses_mrope=False,
            device=device,
            input_batch=InputBatch(8, LONGEST, 64, device, False, 1000, [BLOCK]),
            _may_reorder_batch=lambda scheduled: False,
        )
        self.version = 1
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.read: dict[str, list[set[int]]] = {}
        self.steps = 0

    def execute_model(self, scheduled: Any) -> Any:
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

        self._update_states(self.runner, scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self.steps += 1
        batch = self.runner.input_batch
        sampled: list[list[int]] = []
        for index, name in enumerate(batch.req_ids):
            row = batch.block_table[0].get_numpy_array()[index]
            first = int(batch.num_computed_tokens_cpu[index])
            last = first + scheduled.num_scheduled_tokens[name]
            for at in range(first, last):
                token = int(batch.token_ids_cpu[index, at])
                self.cache[int(row[at // BLOCK]), at % BLOCK] = (token, self.version)
            left = [self.cache[int(row[at // BLOCK]), at % BLOCK] for at in range(last)]
            if last < self.runner.requests[name].num_tokens:  # as in GPUModelRunner
                sampled.append([])
                continue
            self.read.setdefault(name, []).append({version for _, version in left})
            sampled.append([rule([token for token, _ in left])])
        return ModelRunnerOutput(
            req_ids=list(batch.req_ids),
            req_id_to_index=dict(batch.req_id_to_index),
            sampled_token_ids=sampled,
            spec_token_ids=None,
            logprobs=None,
            prompt_logprobs_dict={},
        )

    def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> None:
        from fp8ctl.engines.hooks.vllm_worker import Extension

        getattr(Extension, method)(types.SimpleNamespace(model_runner=self.runner), *args)


def rule(tokens: list[int]) -> int:
    """Return the token that follows: another one wherever one of those before differs."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 997
    return value


class Core:
    """vLLM's engine core, stepped by hand where it would loop."""

    def __init__(self, *, caching: bool = True, budget: int = 16, queue_size: int = 1) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine import core
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        from fp8ctl.engines.hooks import vllm_holding

        vllm_holding.install(core)
        parallel = types.SimpleNamespace(data_parallel_size=1, data_parallel_rank=0)
        config = types.SimpleNamespace(
            scheduler_config=types.SimpleNamespace(
                max_num_seqs=8,
                max_num_batched_tokens=budget,
                max_model_len=LONGEST,
                long_prefill_token_threshold=0,
                disable_chunked_mm_input=False,
            ),
            cache_config=types.SimpleNamespace(
                num_gpu_blocks=BLOCKS,
                block_size=BLOCK,
                enable_prefix_caching=caching,
                prefix_caching_hash_algo="builtin",
            ),
            lora_config=None,
            kv_events_config=None,
            kv_transfer_config=None,
            speculative_config=None,
            model_config=types.SimpleNamespace(is_multimodal_model=False),
            parallel_config=parallel,
        )
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float16, use_mla=False
        )
        grammar = types.SimpleNamespace(
            grammar_bitmask=lambda *_args: None, should_advance=lambda _request: False
        )
        self.worker = Worker()
        real = core.EngineCoreProc.__new__(core.EngineCoreProc)
        real.vllm_config = config
        real.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=grammar,
            log_stats=True,
        )
        real.model_executor = self.worker
        real.mm_input_cache_server = None
        real.batch_queue = queue.Queue(queue_size) if queue_size > 1 else None
        real.batch_queue_size = queue_size
        real.step_fn = real.step if real.batch_queue is None else real.step_with_batch_queue
        real.input_queue, real.output_queue = queue.Queue(), queue.Queue()
        real.engines_running = False
        if queue_size > 1:
            vars(self.worker)["execute_model"] = _later(self.worker.execute_model)
        self.real, self.scheduler = real, real.scheduler
        self.answers: list[Any] = []
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    def add(self, name: str, prompt: list[int], tokens: int, **more: Any) -> None:
        from vllm.v1.engine import EngineCoreRequestType
        from vllm.v1.request import Request

        request = Request(name, prompt, None, None, None, Params(tokens, **more), None)
        self.real.add_request = self.scheduler.add_request
        self.real.input_queue.put_nowait((EngineCoreRequestType.ADD, request))

    def ask(self, method: str, *args: object) -> Any:
        """Send a utility call, and take messages until it is answered."""
        from vllm.v1.engine import EngineCoreRequestType

        self.real.input_queue.put_nowait(
            (EngineCoreRequestType.UTILITY, (0, len(self.answers), method, args))
        )
        self.messages()
        return self.answers[-1]

    def messages(self) -> None:
        """Take all messages, as the busy loop does; it must not wait for one that never comes."""
        while not self.real.input_queue.empty():
            self.real._handle_client_request(*self.real.input_queue.get_nowait())
        self.outputs()

    def loop(self, times: int) -> int:
        """Go round the busy loop; return how often it would have waited for a message."""
        waited = 0
        for _ in range(times):
            self.messages()
            if not self.scheduler.has_requests():
                waited += 1  # `_process_input_queue` blocks here, but where it was busy: once
                self.real._process_engine_step()
                self.outputs()
                continue
            self.real._process_input_queue()
            self.real._process_engine_step()
            self.outputs()
        return waited

    def outputs(self) -> None:
        while not self.real.output_queue.empty():
            _, found = self.real.output_queue.get_nowait()
            if found.utility_output is not None:
                answer = found.utility_output
                self.answers.append(answer.failure_message or answer.result)
            for one in found.outputs or ():
                self.tokens.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.ended[one.request_id] = str(one.finish_reason)


def _later(execute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from concurrent.futures import Future

    def soon(scheduled: Any) -> Any:
        future: Any = Future()
        future.set_result(execute(scheduled))
        return future

    return soon


PROMPTS = {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3, 4, 9, 9, 9, 9, 9], "c": [8]}
TOKENS = 12


def expected(prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(TOKENS):
        tokens.append(rule(tokens))
    return tokens[len(prompt) :]


def _wanted() -> dict[str, list[int]]:
    return {name: expected(prompt) for name, prompt in PROMPTS.items()}


def _started(steps: int, **options: Any) -> Core:
    core = Core(**options)
    for name, prompt in PROMPTS.items():
        core.add(name, prompt, TOKENS)
    core.loop(steps)
    return core


def pause(steps: int, *, here: bool = False, **options: Any) -> dict[str, Any]:
    """Pause after some steps, change the weights, go on; from here, or by a call."""
    from fp8ctl.engines.hooks import vllm_holding

    core = _started(steps, **options)
    before = {name: len(tokens) for name, tokens in core.tokens.items()}
    running = [r.request_id for r in core.scheduler.running]
    held = core.ask("fp8ctl_hold", "pause")
    batch = list(core.worker.runner.input_batch.req_id_to_index)
    taken = {name: len(tokens) for name, tokens in core.tokens.items()}
    done = core.worker.steps
    core.add("late", [8, 8], 3)
    waited = core.loop(20)
    flushed = core.ask("fp8ctl_flush")
    again = core.ask("fp8ctl_hold", "pause")
    core.worker.version = 2
    stood = core.worker.steps == done
    queue_ = [r.request_id for r in core.scheduler.waiting]
    resumed = vllm_holding.resume_here() if here else core.ask("fp8ctl_resume")
    reads = {name: len(seen) for name, seen in core.worker.read.items()}
    core.loop(200)
    after = {name: seen[reads.get(name, 0) :] for name, seen in core.worker.read.items()}
    return {
        "before": before,
        "running": running,
        "held": held,
        "again": again,
        "batch": batch,
        "taken": taken,
        "waited": waited,
        "stood": stood,
        "flushed": flushed,
        "resumed": resumed,
        "queue": queue_,
        "tokens": core.tokens,
        "wanted": _wanted(),
        "ended": core.ended,
        "versions_read_after": sorted({v for seen in after.values() for s in seen for v in s}),
        "left": [core.scheduler.get_num_unfinished_requests(), core.scheduler.has_requests()],
        "usage": core.scheduler.kv_cache_manager.usage,
    }


def forgotten(steps: int, how: str, used: bool) -> dict[str, Any]:
    """Count how often all blocks are gone through, and those that have a hash, at each question."""
    from fp8ctl.engines.hooks import vllm_holding

    core = _started(steps)
    if how == "finish":
        core.loop(100)
    pool = core.scheduler.kv_cache_manager.block_pool
    resets: list[int] = []
    reset = pool.reset_prefix_cache

    def counted() -> bool:
        resets.append(sum(block.block_hash is not None for block in pool.blocks))
        return bool(reset())

    pool.reset_prefix_cache = counted
    told: dict[str, Any] = {"cached": len(pool.cached_block_hash_to_block)}
    core.ask("fp8ctl_hold", how)
    told["held"] = [*resets]
    if used:
        pool.get_new_blocks(1)
    told["flushed"] = core.ask("fp8ctl_flush")
    told["again"] = resets[len(told["held"]) :]
    told["resumed"] = [vllm_holding.resume_here() for _ in range(2)]
    told["rests"] = vllm_holding.is_held(core.real)
    told["hashes"] = sum(block.block_hash is not None for block in pool.blocks)
    return told


def without_a_step(steps: int) -> dict[str, Any]:
    """What becomes of a pause whose workers keep the requests in their batch."""
    from fp8ctl.engines.hooks import vllm_holding

    vllm_holding._step_without_requests = lambda core: None
    return pause(steps)


def abort(steps: int, **options: Any) -> dict[str, Any]:
    """Abort after some steps, then serve others."""
    core = _started(steps, **options)
    held = core.ask("fp8ctl_hold", "abort")
    empty = not core.scheduler.requests
    flushed = core.ask("fp8ctl_flush")
    core.add("late", PROMPTS["b"], TOKENS)
    waited = core.loop(5)
    core.worker.version = 2
    core.ask("fp8ctl_resume")
    core.loop(50)
    return {
        "held": held,
        "empty": empty,
        "flushed": flushed,
        "waited": waited,
        "late": core.tokens.get("late"),
        "wanted": expected(PROMPTS["b"]),
        "batch": list(core.worker.runner.requests),
        "read": sorted({v for seen in core.worker.read.get("late", []) for v in seen}),
    }


def abort_paused(steps: int) -> dict[str, Any]:
    """Pause, then end what is paused."""
    core = _started(steps)
    core.ask("fp8ctl_hold", "pause")
    held = core.ask("fp8ctl_hold", "abort")
    core.ask("fp8ctl_resume")
    core.loop(10)
    return {
        "held": held,
        "left": len(core.scheduler.requests),
        "usage": core.scheduler.kv_cache_manager.usage,
    }


def finish() -> dict[str, Any]:
    """Ask to rest when all is done, too early and in time."""
    core = _started(2)
    early = core.ask("fp8ctl_hold", "finish")
    core.loop(100)
    core.add("late", [8, 8], 3)
    core.messages()
    done = core.ask("fp8ctl_hold", "finish")
    waited = core.loop(5)
    late = core.tokens.get("late")
    core.ask("fp8ctl_resume")
    core.loop(20)
    return {
        "early": early,
        "done": done,
        "waited": waited,
        "late_while_held": late,
        "ended": core.ended,
    }


def refused(what: str, how: str) -> dict[str, Any]:
    """Ask a core that cannot be held; it must go on."""
    core = _started(3, queue_size=2 if what == "pipeline" else 1)
    parallel = core.real.vllm_config.parallel_config
    if what == "connector":
        core.scheduler.connector = object()
    if what == "data":
        parallel.data_parallel_size = 2
    answer = core.ask("fp8ctl_hold", how)
    core.scheduler.connector = None
    core.loop(200)
    return {"answer": answer, "ended": core.ended, "tokens": core.tokens, "wanted": _wanted()}


def told() -> dict[str, Any]:
    """Pause requests that have been told the log-probabilities of their prompts, or not yet."""
    core = Core(budget=4)
    core.add("told", [1, 2], 20, prompt_logprobs=1)
    core.add("plain", [3], 20)
    core.loop(4)
    core.add("soon", list(range(1, 40)), 5, prompt_logprobs=1)
    core.loop(2)
    running = {r.request_id: r.num_output_tokens for r in core.scheduler.running}
    core.ask("fp8ctl_hold", "pause")
    states = core.worker.runner.requests
    params = {name: state.sampling_params.prompt_logprobs for name, state in states.items()}
    theirs = {r.request_id: r.sampling_params.prompt_logprobs for r in core.scheduler.waiting}
    return {"running": running, "workers": params, "schedulers": theirs}


def in_use() -> dict[str, Any]:
    """Ask to forget keys and values while requests hold them."""
    core = _started(2)
    return {"answer": core.ask("fp8ctl_flush")}


def tell() -> dict[str, Any]:
    """End requests towards their clients, in all the ways in which those listen."""
    import asyncio

    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.engine.parallel_sampling import ParentRequest

    from fp8ctl.engines.hooks import vllm_ranks

    processor = OutputProcessor(types.SimpleNamespace(get_lora_tokenizer=lambda _lora: None), True)
    queues: dict[str, Any] = {}

    def request(name: str, kind: int, logprobs: int | None) -> Any:
        params = Params(50)
        params.output_kind, params.logprobs, params.n = kind, logprobs, 2
        return types.SimpleNamespace(
            request_id=name,
            sampling_params=params,
            lora_request=None,
            prompt_token_ids=[1, 2],
            arrival_time=0.0,
        )

    def add(name: str, kind: int, logprobs: int | None = None, parent: Any = None) -> None:
        key = parent.request_id if parent else name
        if key not in queues:
            queues[key] = RequestOutputCollector(kind)
        index = int(name[0]) if parent else 0
        one = request(name, kind, logprobs)
        processor.add_request(one, None, parent, index, queues[key])

    add("stream", 1)
    add("stream-of-log-probabilities", 1, 2)
    add("whole", 2)
    add("not-begun", 2, 1)
    for name, kind in (("many", 2), ("many-streams", 1)):
        parent = ParentRequest(name, request(name, kind, None).sampling_params)
        for index in range(2):
            child, _ = parent.get_child_info(index)
            add(child, kind, parent=parent)
    begun = ["stream", "whole", "0_many", "0_many-streams"]
    processor.process_outputs([EngineCoreOutput(name, [5, 6]) for name in begun], 1.0, None)
    first = queues["stream"].get_nowait()
    known = list(processor.request_states)
    add("late", 2)
    vllm_ranks._tell(processor, [*known, "gone"])

    async def read(queue: Any) -> list[Any]:
        # As `AsyncLLM.generate` does.
        found: list[Any] = []
        while not (found and found[-1].finished):
            found.append(queue.get_nowait() or await asyncio.wait_for(queue.get(), 5))
        return [
            [c.index, list(c.token_ids), c.finish_reason, len(c.logprobs or [])]
            for one in found
            for c in one.outputs
        ]

    told = {name: asyncio.run(read(queue)) for name, queue in queues.items() if name != "late"}
    # What the core gave before it heard of it comes to nobody.
    processor.process_outputs([EngineCoreOutput(name, [7]) for name in known], 2.0, None)
    return {
        "first": [list(c.token_ids) for c in first.outputs],
        "told": told,
        "left": list(processor.request_states),
        "parents": list(processor.parent_requests),
        "again": [name for name, queue in queues.items() if queue.get_nowait() is not None],
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "pause": pause,
    "forgotten": forgotten,
    "without-a-step": without_a_step,
    "abort": abort,
    "abort-paused": abort_paused,
    "finish": finish,
    "refused": refused,
    "told": told,
    "tell": tell,
    "in-use": in_use,
}


def _run(job: dict[str, Any]) -> str:
    try:
        torch.set_num_threads(1)
        return json.dumps(SCENARIOS[job.pop("scenario")](**job))
    except BaseException:  # noqa: BLE001 - whatever it is, the test is to see it
        return json.dumps({"traceback": traceback.format_exc()})


def main() -> None:
    """Answer jobs, one JSON line each."""
    sys.meta_path.insert(0, _Finder(Path(sys.argv[1])))
    for name in ("vllm.v1.engine.core", "vllm.v1.worker.gpu_model_runner"):
        importlib.import_module(name)
    importlib.import_module("fp8ctl.engines.hooks.vllm_worker")
    forks.answer(_run)


if __name__ == "__main__":
    main()
