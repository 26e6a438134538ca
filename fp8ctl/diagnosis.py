"""From the last lines of an engine's log to the likeliest cause of its death. Pure.

The table goes from the particular to the general; the first row that matches
wins. Each row is the wording of SGLang 0.4.8, vLLM 0.9.1 or what they import
(tests/test_launching.py has a line for each). Called by `supervisor`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an engine died, as far as its log tells.

    Attributes:
        id: short and stable, for programs.
        words: for people.
        hint: what to do.
        line: the line of the log that gave it away; empty where none did.
    """

    id: str
    words: str
    hint: str
    line: str = ""


_TABLE: Final[tuple[tuple[str, str, str, str], ...]] = (
    (
        "unscaled",
        r"fp8ctl unscaled-guard",
        "an FP8 weight or scale was never loaded",
        "let launch quantise the 16-bit checkpoint (no --quantization), or use --await-push",
    ),
    (
        "graph-capture",
        r"stream is capturing",
        "something waits for the GPU while a CUDA graph is captured",
        "fp8ctl patch, or behind `--`: --disable-cuda-graph (vLLM: --enforce-eager)",
    ),
    (
        "block-size",
        r"is not divisible by weight quantization block_[nk]|"
        r"not divisible by .{0,40}block",
        "a layer's size, per GPU, does not divide by the block size",
        "fp8ctl plan names the layer; --mode per-tensor has no blocks",
    ),
    (
        "port-taken",
        r"[Aa]ddress already in use|EADDRINUSE|error while attempting to bind on address",
        "another process took the port between the check and the start",
        "launch it on another --port",
    ),
    (
        "no-cuda",
        r"Torch not compiled with CUDA enabled|No CUDA GPUs are available|"
        r"Found no NVIDIA driver|no CUDA-capable device|libcuda\.so|"
        r"Failed to infer device type|CUDA driver version is insufficient",
        "the engine wants a GPU and finds none that it can use",
        "fp8ctl doctor",
    ),
    (
        "old-gpu",
        r"fp8e4nv (data type )?(is )?not supported|type fp8e4nv not supported",
        "the GPU has no FP8 arithmetic (compute capability below 8.9)",
        "use --torchao-config int8wo (SGLang)",
    ),
    (
        "memory-gpu",
        r"CUDA out of memory|torch\.(cuda\.)?OutOfMemoryError|"
        r"Free memory on device .* is less than desired|"
        r"No available memory for the cache blocks",
        "the GPU's memory is not enough, or another process has it",
        "nvidia-smi; behind `--`, SGLang: --mem-fraction-static 0.7, "
        "vLLM: --gpu-memory-utilization 0.7 --max-model-len 8192",
    ),
    (
        "memory-host",
        r"DefaultCPUAllocator: can't allocate memory|^MemoryError|Cannot allocate memory|"
        r"exit ?code:? -9\b|died with <Signals\.SIGKILL",
        "the machine's memory is not enough",
        "a smaller model, or behind `--`: --max-total-tokens 2048 (SGLang)",
    ),
    (
        "memory-pool",
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        "the weights leave no room for the KV cache",
        "--mem-fraction-static 0.9 behind `--`",
    ),
    (
        "shared-memory",
        r"No space left on device",
        "a disk or /dev/shm is full",
        "df -h /tmp /dev/shm",
    ),
    (
        "argument",
        r"error: (unrecognized arguments|argument |ambiguous option)",
        "the engine does not know an argument",
        "check what stands behind `--`",
    ),
    (
        "no-model-class",
        r"Model architectures? .* (are|is) not supported|"
        r"does not recognize this architecture",
        "the engine does not know this kind of model",
        "fp8ctl doctor shows the engine's version",
    ),
    (
        "loader-lost",
        r"object has no attribute 'weight_loader'",
        "FP8 weights were loaded a second time, which the unpatched engine cannot do",
        "fp8ctl patch",
    ),
    (
        "unpatched-cpu",
        r"_is_amx_tile_supported|No module named '(sgl_kernel|vllm)",
        "SGLang 0.4.8 as released needs more than this environment has to run on a CPU",
        "fp8ctl patch --backend sglang",
    ),
    (
        "import",
        r"^(ModuleNotFoundError|ImportError)|: (ModuleNotFoundError|ImportError):|"
        r"undefined symbol",
        "a package of the engine's environment is missing or does not fit",
        "fp8ctl doctor; fp8ctl install makes an environment with pinned packages",
    ),
)

_COMPILED: Final = tuple((i, re.compile(p), w, h) for i, p, w, h in _TABLE)
_ERROR: Final = re.compile(r"^(\[.*\] )?[\w.]*(Error|Exception)\b")


def likeliest(lines: Iterable[str], code: int | None = None) -> Cause:
    """Return the likeliest cause of death.

    Args:
        lines: the end of the log.
        code: exit status, negative for a signal, None where it still runs.
    """
    lines = tuple(lines)
    for name, pattern, words, hint in _COMPILED:
        for line in lines:
            if pattern.search(line):
                return Cause(name, words, hint, line.strip())
    # SGLang's server kills itself when one of its processes has died of an error.
    if code == -9 and not any("Received sigquit from a child process" in line for line in lines):
        return Cause(
            "killed",
            "it was killed from outside, most often because memory ran out",
            "dmesg | grep -i oom",
        )
    for line in reversed(lines):
        if _ERROR.search(line):
            return Cause("unknown", "its log ends with an error", "fp8ctl doctor", line.strip())
    return Cause("unknown", "its log does not say why", "fp8ctl doctor")
