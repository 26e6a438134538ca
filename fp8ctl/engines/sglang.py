"""The command line of SGLang 0.4.8, and what it cannot do.

Pure. Facts are of the released wheel (server_args.py, configs/model_config.py,
layers/torchao_utils.py) and of runs on a CPU. Called through `base.builder`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from fp8ctl.engines import base, refusals
from fp8ctl.engines.assembly import assemble
from fp8ctl.engines.base import LaunchPlan, LaunchRequest, Option
from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PORT: Final = 30000
ENTRY: Final = "fp8ctl.engines.hooks.sglang_server"
WEIGHT_LOADER: Final = "fp8ctl.engines.hooks.sglang_worker.load"

QUANTIZATION: Final = (
    "awq",
    "fp8",
    "gptq",
    "marlin",
    "gptq_marlin",
    "awq_marlin",
    "bitsandbytes",
    "gguf",
    "modelopt",
    "modelopt_fp4",
    "w8a8_int8",
    "w8a8_fp8",
    "moe_wna16",
    "qoq",
)
"""Choices of --quantization (server_args.py:661), in its order."""

TORCHAO: Final = (
    "int8dq",
    "int8wo",
    "int4wo-32",
    "int4wo-64",
    "int4wo-128",
    "int4wo-256",
    "fp8wo",
    "fp8dq-per_tensor",
    "fp8dq-per_row",
    "gemlite-4-GROUP",
    "gemlite-8-None",
    "gemlite-PACK-4-GROUP",
    "gemlite-PACK-8-None",
)
"""What apply_torchao_config_to_model (torchao_utils.py) takes; the engine itself checks
only when the model is loaded."""

_OVERRIDE_VARIABLE: Final = "FP8CTL_BLOCK_QUANT_CONFIG"
"""What patch block-quant-override reads: for trainers that start the engine themselves."""

_GEMLITE = re.compile(r"gemlite(-(8|16|32))?-(4-(None|[1-9]\d*)|8-None)")

# method: (quant_method values it loads, other files it is read from, what that is).
# None among the values: it also takes a 16-bit checkpoint and quantises it at load.
_CHECKPOINTS: Final[dict[str, tuple[frozenset[str | None], frozenset[str], str]]] = {
    "awq": (frozenset({"awq"}), frozenset({"quant_config.json", "quantize_config.json"}), "AWQ"),
    "fp8": (frozenset({None, "fp8"}), frozenset(), "FP8"),
    "gptq": (frozenset({"gptq"}), frozenset({"quantize_config.json"}), "GPTQ"),
    "marlin": (
        frozenset({"marlin", "gptq", "awq"}),
        frozenset({"quantize_config.json"}),
        "Marlin, GPTQ or AWQ",
    ),
    "gptq_marlin": (frozenset({"gptq"}), frozenset({"quantize_config.json"}), "GPTQ"),
    "awq_marlin": (frozenset({"awq"}), frozenset({"quantize_config.json"}), "AWQ"),
    "bitsandbytes": (frozenset({None, "bitsandbytes"}), frozenset(), "bitsandbytes"),
    "gguf": (frozenset(), frozenset(), "GGUF"),
    "modelopt": (frozenset({"modelopt"}), frozenset({"hf_quant_config.json"}), "ModelOpt"),
    "modelopt_fp4": (
        frozenset({"modelopt", "modelopt_fp4"}),
        frozenset({"hf_quant_config.json"}),
        "ModelOpt FP4",
    ),
    # Without its own checkpoint it casts BF16 to int8 and leaves the scales unset: garbage.
    "w8a8_int8": (
        frozenset({"w8a8_int8", "compressed-tensors"}),
        frozenset(),
        "W8A8 INT8 (compressed-tensors)",
    ),
    "w8a8_fp8": (
        frozenset({None, "w8a8_fp8", "compressed-tensors"}),
        frozenset(),
        "W8A8 FP8 (compressed-tensors)",
    ),
    "moe_wna16": (
        frozenset({"gptq", "awq", "moe_wna16"}),
        frozenset({"quantize_config.json"}),
        "GPTQ or AWQ",
    ),
    "qoq": (frozenset({"qoq"}), frozenset({"quant_config.json"}), "QoQ"),
}

# get_min_capability of each config class; fp8: the kernels want 8.9, whatever fp8.py:146 says.
_CAPABILITY: Final[dict[str, tuple[int, int]]] = {
    "awq": (7, 5),
    "fp8": (8, 9),
    "gptq": (6, 0),
    "marlin": (8, 0),
    "gptq_marlin": (8, 0),
    "awq_marlin": (8, 0),
    "bitsandbytes": (7, 0),
    "modelopt": (8, 9),
    "modelopt_fp4": (10, 0),
    "w8a8_int8": (7, 5),
    "w8a8_fp8": (8, 9),
    "moe_wna16": (7, 0),
    "qoq": (8, 0),
}

# quantization/__init__.py: VLLM_QUANTIZATION_METHODS, "requires some operators from vllm".
_NEEDS_VLLM: Final = frozenset(
    {"awq", "gptq", "marlin", "gptq_marlin", "awq_marlin", "bitsandbytes", "gguf"}
)

_OWN: Final = {
    "--model-path": "--model",
    "--tp": "--tp",
    "--tp-size": "--tp",
    "--tensor-parallel-size": "--tp",
    "--quantization": "--quantization",
    "--torchao-config": "--torchao-config",
}

KERNELS_FOR_128: Final = (
    "SGL_ENABLE_JIT_DEEPGEMM",
    "SGLANG_SUPPORT_CUTLASS_BLOCK_FP8",
    "SGLANG_ENABLE_FLASHINFER_GEMM",
    "SGLANG_CUTLASS_MOE",
)
"""Variables whose "0" keeps blocks of another size away from kernels made for 128x128:
DeepGEMM, CUTLASS and FlashInfer look at N and K only; Triton takes any block."""

_UNPROVEN: Final = {
    "--dp": "data parallelism",
    "--dp-size": "data parallelism",
    "--data-parallel-size": "data parallelism",
    "--enable-dp-attention": "data-parallel attention",
    "--pp-size": "pipeline parallelism",
    "--pipeline-parallel-size": "pipeline parallelism",
    "--ep-size": "expert parallelism",
    "--expert-parallel-size": "expert parallelism",
    "--enable-ep-moe": "expert parallelism",
    "--enable-deepep-moe": "expert parallelism",
    "--nnodes": "a second node",
}


def build(request: LaunchRequest) -> LaunchPlan:
    """Return the plan of an SGLang server.

    Raises:
        UsageError: an unknown method, or an engine argument that fp8ctl has an option for.
        UnsupportedError: the machine cannot do it.
        ConflictError: a patch is missing, or two requests exclude each other.
        PlanDoesNotFitError: the model is not of the kind that the method loads.
    """
    refusals.refuse_own_options(request.extra, _OWN)
    refusals.refuse_abbreviations(request.extra, (*_OWN, *_UNPROVEN))
    refusals.refuse_unproven(request.extra, _UNPROVEN)
    refusals.refuse_dummy_weights(request)
    refusals.refuse_lost_override(request, "--json-model-override-args")
    _refuse_method(request)
    _refuse_device(request)

    notes: list[str] = []
    env = base.common_env(request)
    options = [
        Option("--model-path", (str(request.model.path),)),
        Option("--served-model-name", (request.model.name,)),
        Option("--host", (request.host,)),
        Option("--port", (str(request.port),)),
    ]
    options += parallel_options(request.tp)
    if request.device.kind == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        if "OMP_WAIT_POLICY" not in request.environ:
            # Threads that spin while they wait starve the rest of a small machine.
            env["OMP_WAIT_POLICY"] = "PASSIVE"
        options += _CPU_OPTIONS
        notes.append("no GPU: torch-native attention, no CUDA graphs, 8192 tokens of KV cache")
    options += _weights(request, notes)
    _blocks(request, env, notes)
    if request.device.kind == "cuda" and request.torchao_config == "int8dq":
        options.append(Option("--disable-cuda-graph"))
        notes.append(
            "--disable-cuda-graph: int8dq synchronises with the host, "
            "which crashes while CUDA graphs are captured"
        )
    # The entry module adds it to a list of the user's own.
    options.append(Option("--custom-weight-loader", (WEIGHT_LOADER,)))
    if request.environ.get(_OVERRIDE_VARIABLE):
        env[_OVERRIDE_VARIABLE] = ""
        notes.append(f"{_OVERRIDE_VARIABLE} of your shell is left out: --mode decides here")
    return assemble(request, "sglang", ENTRY, options, env, notes)


# KV cache and request slots are sized for a laptop: SGLang would take 88 % of free memory
# (server_args.py, mem_fraction_static) and 4096 rows of request slots.
_CPU_OPTIONS: Final = (
    Option("--device", ("cpu",)),
    Option("--attention-backend", ("torch_native",)),
    Option("--sampling-backend", ("pytorch",)),
    Option("--disable-cuda-graph"),
    Option("--disable-overlap-schedule"),
    Option("--disable-custom-all-reduce"),
    # An idle scheduler takes 65 % of a core without it.
    Option("--sleep-on-idle"),
    Option("--max-total-tokens", ("8192",)),
    Option("--max-running-requests", ("16",)),
    Option("--mem-fraction-static", ("0.8",)),
)


def parallel_options(tp: int) -> list[Option]:
    """Return the options that spread a model over `tp` GPUs."""
    return [Option("--tp-size", (str(tp),))] if tp > 1 else []


def override_options(config: Mapping[str, object]) -> list[Option]:
    """Return the options that start from 16-bit weights with `quantization_config` put over."""
    return [
        Option("--load-format", ("auto",)),
        Option("--quantization", ("fp8",)),
        Option("--json-model-override-args", (base.override_json(config),)),
    ]


def _weights(request: LaunchRequest, notes: list[str]) -> list[Option]:
    """Return the options that say where the quantised weights come from."""
    if request.source == "override":
        notes.append("16-bit weights are loaded; the FP8 configuration is put over their config")
        return override_options(request.override or {})
    if request.source == "online":
        notes.append("--quantization fp8 alone: SGLang quantises while it loads")
        return [Option("--quantization", ("fp8",))]
    if request.source == "torchao":
        return [Option("--torchao-config", (request.torchao_config or "",))]
    if request.source == "method":
        return [Option("--quantization", (request.quantization or "",))]
    return []


def _blocks(request: LaunchRequest, env: dict[str, str], notes: list[str]) -> None:
    """Keep blocks of another size than 128x128 away from kernels made for 128x128."""
    block = request.model.weight_block_size
    capability = request.device.capability
    if block is None or capability is None or capability < (9, 0):
        return
    if block == (128, 128):
        if capability[0] == 10:
            env["SGL_ENABLE_JIT_DEEPGEMM"] = "0"
            notes.append("DeepGEMM is switched off: on this GPU it wants power-of-two scales")
        return
    env.update(dict.fromkeys(KERNELS_FOR_128, "0"))
    notes.append(
        f"blocks of {block[0]}x{block[1]}: DeepGEMM, CUTLASS and FlashInfer are switched off, "
        "which compute with 128x128 whatever the checkpoint says; Triton serves"
    )


def _refuse_method(request: LaunchRequest) -> None:
    """Refuse values that SGLang does not know, and checkpoints that the method does not load."""
    model = request.model
    if request.source == "method":
        method = request.quantization or ""
        if method not in QUANTIZATION:
            raise UsageError(
                f"SGLang 0.4.8 has no --quantization {method!r}; "
                f"it takes {', '.join(QUANTIZATION)}",
                hint="blockwise_int8 and compressed-tensors are taken from the checkpoint alone: "
                "leave --quantization out",
                data={"choices": list(QUANTIZATION)},
            )
        kinds, files, makes = _CHECKPOINTS[method]
        if not (None in kinds and model.quant_method is None):
            refusals.refuse_foreign_checkpoint(
                method,
                model,
                frozenset(kind for kind in kinds if kind is not None),
                files,
                f"{makes} checkpoints",
            )
    if request.source == "torchao":
        config = request.torchao_config or ""
        if config not in TORCHAO[:-4] and not _GEMLITE.fullmatch(config):
            raise UsageError(
                f"SGLang 0.4.8 has no --torchao-config {config!r}; it takes {', '.join(TORCHAO)}",
                hint="--torchao-config int8wo",
                data={"choices": list(TORCHAO)},
            )
        if model.quant_method is not None:
            raise PlanDoesNotFitError(
                f"--torchao-config {config} quantises 16-bit weights, "
                f"but {model.path} is quantised with {model.quant_method!r}",
                hint="give the 16-bit checkpoint as --model",
            )
        if config.startswith("gemlite"):
            # torchao_utils.py passes its filter for every method but this one, and torchao's own
            # takes torch.nn.Linear alone, which SGLang's layers are not. Seen on an H100: three of
            # these gave the same log-probabilities, those of 16 bits.
            raise UnsupportedError(
                f"--torchao-config {config} quantises nothing in SGLang 0.4.8, and says nothing: "
                "torchao is not told which of SGLang's layers are linear",
                hint="--torchao-config int4wo-128",
            )


def _refuse_device(request: LaunchRequest) -> None:
    """Refuse what this machine cannot run, and what needs a patch that is not there."""
    device = request.device
    what = {
        "method": f"--quantization {request.quantization}",
        "torchao": f"--torchao-config {request.torchao_config}",
        "online": "--mode online (--quantization fp8)",
    }.get(request.source, "FP8 on SGLang")
    if device.kind == "cpu":
        _refuse_on_cpu(request, what)
        refusals.refuse_missing_patch(
            request, "sglang", "cpu-fp8", "without it SGLang 0.4.8 does not run FP8 on a CPU"
        )
    elif request.source == "torchao":
        config = request.torchao_config or ""
        if config.startswith(("fp8wo", "fp8dq")):
            # Triton: "fp8e4nv data type is not supported on CUDA arch < 89".
            refusals.refuse_old_gpu(device, what)
        elif config.startswith("int4wo"):
            refusals.refuse_old_gpu(device, what, (8, 0))
    elif request.source == "method":
        refusals.refuse_old_gpu(device, what, _CAPABILITY[request.quantization or ""])
    else:
        refusals.refuse_old_gpu(device, what)
    if device.kind == "cuda" and request.tp > device.count:
        raise UnsupportedError(
            f"--tp {request.tp} needs {request.tp} GPUs, this machine has {device.count}",
            hint=f"--tp {device.count}",
        )
    if request.source == "method" and request.quantization == "bitsandbytes":
        # loader.py:987 beside vLLM's bitsandbytes.py:227; seen on an H100 with vLLM 0.9.1.
        raise UnsupportedError(
            f"{what} of SGLang 0.4.8 dies while it loads: it looks for weights named qweight, and "
            "the layers that it borrows from vLLM name them weight",
            hint="fp8ctl launch --backend vllm --quantization bitsandbytes",
        )
    if (
        request.source == "method"
        and request.quantization in _NEEDS_VLLM
        and "vllm" not in request.installed
    ):
        raise UnsupportedError(
            f"{what} of SGLang 0.4.8 needs operators of the package vllm, "
            f"which the environment of {request.python} does not have",
            hint="fp8ctl launch --backend vllm serves the same checkpoint",
        )
    if request.await_push:
        if request.source not in {"override", "checkpoint"}:
            raise ConflictError(
                f"--await-push waits for FP8 weights, and {what} is not made for them",
                hint="use --mode block or --mode per-tensor",
            )
        refusals.refuse_missing_patch(
            request,
            "sglang",
            "refit",
            "stock SGLang 0.4.8 dies on the first update of FP8 weights",
        )


def _refuse_on_cpu(request: LaunchRequest, what: str) -> None:
    """Refuse the methods whose kernels exist for CUDA only."""
    if request.source == "method" and request.quantization != "fp8":
        raise UnsupportedError(
            f"{what} has CUDA kernels only, and this machine has no GPU",
            hint="--mode block, --mode online and --torchao-config int8wo run on a CPU",
        )
    if request.source == "torchao" and request.torchao_config not in {"int8wo", "int8dq"}:
        config = request.torchao_config or ""
        reason = "its kernels exist for CUDA only"
        if config.startswith("fp8"):
            reason = "it needs a GPU of compute capability >= 8.9"
        raise UnsupportedError(
            f"{what}: {reason}, and this machine has no GPU",
            hint="--torchao-config int8wo and int8dq run on a CPU",
        )
