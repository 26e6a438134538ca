"""The command line of vLLM 0.9.1, and what it cannot do.

Pure. Facts are of the released wheel (config.py, engine/arg_utils.py,
layers/quantization/) and of runs on an H100. Called through `base.builder`.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from fp8ctl import fitting
from fp8ctl.engines import base, refusals
from fp8ctl.engines.assembly import assemble
from fp8ctl.engines.base import LaunchPlan, LaunchRequest, Option
from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PORT: Final = 8000
ENTRY: Final = "fp8ctl.engines.hooks.vllm_server"

QUANTIZATION: Final = (
    "aqlm",
    "awq",
    "deepspeedfp",
    "tpu_int8",
    "fp8",
    "ptpc_fp8",
    "fbgemm_fp8",
    "modelopt",
    "modelopt_fp4",
    "marlin",
    "bitblas",
    "gguf",
    "gptq_marlin_24",
    "gptq_marlin",
    "gptq_bitblas",
    "awq_marlin",
    "gptq",
    "compressed-tensors",
    "bitsandbytes",
    "qqq",
    "hqq",
    "experts_int8",
    "neuron_quant",
    "ipex",
    "quark",
    "moe_wna16",
    "torchao",
    "auto-round",
)
"""QuantizationMethods of layers/quantization/__init__.py, in its order."""

_OTHER_HARDWARE: Final = {
    "tpu_int8": "a TPU",
    "neuron_quant": "an AWS Neuron device",
    "ptpc_fp8": "an AMD GPU (MI300)",
    "ipex": "an Intel CPU or XPU build of vLLM",
}

_QUANTIZES: Final = frozenset({"fp8", "bitsandbytes", "experts_int8"})
"""Methods that quantise a 16-bit checkpoint while they load it."""

_GPTQ: Final = (frozenset({"gptq"}), frozenset({"quantize_config.json"}))
_OWN_KIND: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    "awq": (frozenset({"awq"}), frozenset({"quant_config.json", "quantize_config.json"})),
    "awq_marlin": (frozenset({"awq"}), frozenset({"quantize_config.json"})),
    "marlin": (frozenset({"marlin", "gptq", "awq"}), frozenset({"quantize_config.json"})),
    "gptq": _GPTQ,
    "gptq_marlin": _GPTQ,
    "gptq_marlin_24": _GPTQ,
    "gptq_bitblas": _GPTQ,
    "bitblas": (frozenset({"bitblas", "gptq"}), frozenset({"quantize_config.json"})),
    "moe_wna16": (frozenset({"gptq", "awq"}), frozenset({"quantize_config.json"})),
    "modelopt": (frozenset({"modelopt"}), frozenset({"hf_quant_config.json"})),
    "modelopt_fp4": (
        frozenset({"modelopt", "modelopt_fp4"}),
        frozenset({"hf_quant_config.json"}),
    ),
    "compressed-tensors": (frozenset({"compressed-tensors", "compressed_tensors"}), frozenset()),
    "deepspeedfp": (
        frozenset({"deepspeedfp"}),
        frozenset({"quant_config.json", "quantize_config.json"}),
    ),
    "qqq": (frozenset({"qqq"}), frozenset({"quant_config.json", "quantize_config.json"})),
    "hqq": (frozenset({"hqq"}), frozenset({"quantize_config.json"})),
    "auto-round": (
        frozenset({"auto-round", "intel/auto-round"}),
        frozenset({"quantization_config.json"}),
    ),
}
"""Method -> (quant_method values, other files) that it loads; a method of neither table loads
checkpoints of its own name."""

# get_min_capability of each config class, where it is more than the 7.0 that vLLM wants anyway.
_CAPABILITY: Final[dict[str, tuple[int, int]]] = {
    "awq": (7, 5),
    "torchao": (7, 5),
    "modelopt": (8, 9),
    **dict.fromkeys(
        (
            "fp8",
            "fbgemm_fp8",
            "modelopt_fp4",
            "marlin",
            "gptq_marlin",
            "gptq_marlin_24",
            "gptq_bitblas",
            "awq_marlin",
            "qqq",
            "hqq",
            "experts_int8",
        ),
        (8, 0),
    ),
}

_OWN: Final = {
    "--model": "--model",
    "--tensor-parallel-size": "--tp",
    "--quantization": "--quantization",
}

_UNPROVEN: Final = {
    "-dp": "data parallelism",
    "--data-parallel-size": "data parallelism",
    "-pp": "pipeline parallelism",
    "--pipeline-parallel-size": "pipeline parallelism",
    "--enable-expert-parallel": "expert parallelism",
}


def build(request: LaunchRequest) -> LaunchPlan:
    """Return the plan of a vLLM server.

    Raises:
        UsageError: an unknown method, or an engine argument that fp8ctl has an option for.
        UnsupportedError: the machine cannot do it.
        ConflictError: a patch is missing or in the way, or two requests exclude each other.
        PlanDoesNotFitError: the model is not of the kind that the method loads, or its blocks
            would enter a kernel for other blocks.
    """
    refusals.refuse_own_options(_long(request.extra), _OWN)
    refusals.refuse_abbreviations(request.extra, (*_OWN, *_UNPROVEN))
    refusals.refuse_unproven(request.extra, _UNPROVEN)
    refusals.refuse_dummy_weights(request)
    refusals.refuse_lost_override(request, "--hf-overrides")
    _refuse_method(request)
    _refuse_device(request)
    _refuse_patches(request)
    _refuse_blocks(request)

    notes: list[str] = []
    env = base.common_env(request)
    if request.cache_root is not None:
        # vLLM keys compiled code by the files it traced: never mix patched and stock.
        env["VLLM_CACHE_ROOT"] = str(request.cache_root)
        notes.append("compiled code is kept apart per patch state (VLLM_CACHE_ROOT)")
    options = [
        Option("--model", (str(request.model.path),)),
        Option("--served-model-name", (request.model.name,)),
        Option("--host", (request.host,)),
        Option("--port", (str(request.port),)),
    ]
    options += parallel_options(request.tp)
    options += _weights(request, notes)
    if request.device.capability and request.device.capability < base.FP8_CAPABILITY:
        notes.append(
            f"{request.device.describe()} has no FP8 arithmetic: "
            "vLLM keeps FP8 weights and computes in 16 bits (Marlin)"
        )
    key = base.API_KEY_VARIABLE
    env_from = (("VLLM_API_KEY", key),) if request.environ.get(key) else ()
    return assemble(request, "vllm", ENTRY, options, env, notes, env_from)


def _long(extra: tuple[str, ...]) -> tuple[str, ...]:
    """Spell vLLM's short flags out, for comparison only."""
    short = {"-tp": "--tensor-parallel-size", "-q": "--quantization"}
    return tuple(short.get(word, word) for word in extra)


def parallel_options(tp: int) -> list[Option]:
    """Return the options that spread a model over `tp` GPUs."""
    return [Option("--tensor-parallel-size", (str(tp),))] if tp > 1 else []


def override_options(config: Mapping[str, object]) -> list[Option]:
    """Return the options that start from 16-bit weights with `quantization_config` put over."""
    return [
        Option("--load-format", ("auto",)),
        Option("--quantization", ("fp8",), ("-q",)),
        Option("--hf-overrides", (base.override_json(config),)),
    ]


def _weights(request: LaunchRequest, notes: list[str]) -> list[Option]:
    """Return the options that say where the quantised weights come from."""
    if request.source == "override":
        notes.append("16-bit weights are loaded; the FP8 configuration is put over their config")
        return override_options(request.override or {})
    if request.source == "online":
        notes.append("--quantization fp8 alone: vLLM quantises while it loads, per tensor")
        return [Option("--quantization", ("fp8",), ("-q",))]
    if request.source == "method":
        return [Option("--quantization", (request.quantization or "",), ("-q",))]
    return []


def _refuse_method(request: LaunchRequest) -> None:
    """Refuse values that vLLM does not know, and checkpoints that the method does not load."""
    if request.source == "torchao":
        raise UsageError(
            "--torchao-config is SGLang's; vLLM 0.9.1 takes torchao from the checkpoint alone",
            hint="fp8ctl launch --backend sglang --torchao-config int8wo",
        )
    if request.source != "method":
        return
    method = request.quantization or ""
    if method not in QUANTIZATION:
        raise UsageError(
            f"vLLM 0.9.1 has no --quantization {method!r}; it takes {', '.join(QUANTIZATION)}",
            hint="--quantization fp8",
            data={"choices": list(QUANTIZATION)},
        )
    if method in _OTHER_HARDWARE:
        raise UnsupportedError(
            f"--quantization {method} of vLLM 0.9.1 runs on {_OTHER_HARDWARE[method]} only; "
            f"this machine has {request.device.describe()}",
            hint="--quantization fp8",
        )
    if method in _QUANTIZES and request.model.quant_method is None:
        return
    kinds, files = _OWN_KIND.get(method, (frozenset({method}), frozenset()))
    refusals.refuse_foreign_checkpoint(
        method, request.model, kinds, files, f"{' or '.join(sorted(kinds))} checkpoints"
    )


def _refuse_device(request: LaunchRequest) -> None:
    """Refuse what this machine cannot run."""
    device = request.device
    if device.kind == "cpu":
        raise UnsupportedError(
            "the released vLLM 0.9.1 runs on CUDA GPUs only, and the driver shows none here",
            hint="fp8ctl launch --backend sglang runs on a CPU",
        )
    if request.source == "method":
        method = request.quantization or ""
        refusals.refuse_old_gpu(device, f"--quantization {method}", _CAPABILITY.get(method, (7, 0)))
    else:
        refusals.refuse_old_gpu(device, "FP8 on vLLM", (8, 0))
    if request.tp > device.count:
        raise UnsupportedError(
            f"--tp {request.tp} needs {request.tp} GPUs, this machine has {device.count}",
            hint=f"--tp {device.count}",
        )
    if request.await_push:
        refusals.refuse_old_gpu(
            device, "--await-push (below that vLLM repacks the weights for Marlin)"
        )


def _refuse_patches(request: LaunchRequest) -> None:
    """Refuse what needs a patch that is absent, or fails with one that is there."""
    online = request.source == "online" or (
        request.source == "method"
        and request.quantization == "fp8"
        and request.model.quant_method is None
    )
    if online and "force-fp8-serialized" in request.applied | request.present:
        raise ConflictError(
            "patch force-fp8-serialized makes vLLM believe that every checkpoint is FP8 already: "
            "online quantisation would serve unscaled weights",
            hint=f"fp8ctl revert --python {shlex.quote(str(request.python))} --backend vllm "
            "--patch force-fp8-serialized",
            data={"patch": "force-fp8-serialized", "applied": sorted(request.applied)},
        )
    if not request.await_push:
        return
    if request.source not in {"override", "checkpoint"}:
        raise ConflictError(
            "--await-push waits for FP8 weights, and "
            f"--quantization {request.quantization or 'fp8'} alone is not made for them",
            hint="use --mode block or --mode per-tensor",
        )
    refusals.refuse_missing_patch(
        request, "vllm", "refit", "stock vLLM 0.9.1 loses the loaders of FP8 weights after start"
    )


def _refuse_blocks(request: LaunchRequest) -> None:
    """Refuse blocks that the CUTLASS kernel would compute as 128x128."""
    block = request.model.weight_block_size
    capability = request.device.capability
    if block is None or block == (128, 128) or capability is None:
        return
    low, high = fitting.CUTLASS_BLOCK_GPUS
    if not low <= capability < high:
        # Older GPUs have no such kernel; on newer ones the gate does look at the scales' shape.
        return
    caught = fitting.in_128_kernel(request.model.modules)
    if request.model.modules and not caught:
        return
    what = caught[0].label if caught else "some layers"
    raise PlanDoesNotFitError(
        f"blocks of {block[0]}x{block[1]}: vLLM 0.9.1 on {request.device.describe()} would compute "
        f"{what} with its kernel for 128x128 blocks",
        hint=fitting.AROUND_128_KERNEL,
        data={
            "weight_block_size": list(block),
            "layer": caught[0].name if caught else None,
        },
    )
