"""The likeliest cause of a death, on lines of real logs."""

from __future__ import annotations

import pytest

from fp8ctl.diagnosis import likeliest

LOGS = {
    "unscaled": "RuntimeError: fp8ctl unscaled-guard: model.layers.0.mlp.experts.w13_weight_scale",
    "graph-capture": "RuntimeError: CUDA error: operation not permitted when stream is capturing",
    "block-size": "ValueError: Weight output_partition_size = 576 is not divisible by weight "
    "quantization block_n = 128.",
    "port-taken": "ERROR:    [Errno 98] error while attempting to bind on address "
    "('127.0.0.1', 30000): address already in use",
    "no-cuda": "AssertionError: Torch not compiled with CUDA enabled",
    "old-gpu": "AssertionError: fp8e4nv data type is not supported on CUDA arch < 89",
    "memory-gpu": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 "
    "has a total capacity of 79.10 GiB of which 1.19 GiB is free.",
    "memory-host": "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. "
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes.",
    "memory-pool": "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
    "shared-memory": "OSError: [Errno 28] No space left on device: '/dev/shm/psm_1234'",
    "argument": "launch_server.py: error: unrecognized arguments: --no-such-flag",
    "no-model-class": "ValueError: Model architectures ['FooForCausalLM'] are not supported for "
    "now. Supported architectures: dict_keys(['LlamaForCausalLM'])",
    "loader-lost": "AttributeError: 'Parameter' object has no attribute 'weight_loader'",
    "unpatched-cpu": "AttributeError: module 'torch._C._cpu' has no attribute "
    "'_is_amx_tile_supported'",
    "import": "ImportError: cannot import name 'default_cache_dir' from 'triton.runtime.cache'",
}


@pytest.mark.parametrize("cause", LOGS)
def test_the_likeliest_cause_of_a_real_line(cause: str) -> None:
    noise = [
        "[2025-06-25 12:00:00] server_args=ServerArgs(model_path='/m', quantization='fp8')",
        "Traceback (most recent call last):",
        '  File "/site-packages/sglang/srt/managers/scheduler.py", line 2506, in run',
    ]
    found = likeliest([*noise, LOGS[cause], "[2025-06-25 12:00:09] Killed"], 1)
    assert found.id == cause
    assert found.line == LOGS[cause]
    assert found.words
    assert found.hint


def test_a_log_without_a_known_line_says_so() -> None:
    assert likeliest([], 1).id == "unknown"
    assert likeliest(["all is well"], -9).id == "killed"
    # SGLang's server ends itself so when a scheduler has died, and the log says of what.
    log = ["KeyError: 'model.layers.0'", "Received sigquit from a child process. It usually means"]
    assert likeliest(log, -9).line == "KeyError: 'model.layers.0'"
    found = likeliest(["x", "KeyError: 'model.layers.0'", "[rank0] bye"], 1)
    assert (found.id, found.line) == ("unknown", "KeyError: 'model.layers.0'")


def test_a_healthy_log_names_no_cause() -> None:
    healthy = [
        "Cuda graph is disabled because of using torch native attention backend",
        "Failed to import deep_gemm, disable ENABLE_JIT_DEEPGEMM.",
        "mem_fraction_static=0.8, max_total_num_tokens=8192",
        "The server is fired up and ready to roll!",
    ]
    assert likeliest(healthy, 1).id == "unknown"
