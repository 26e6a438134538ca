"""What a server says, and what of it is shown: arguments, quantisation, the start of a text. Pure.

It is what was asked for, not what is in memory; `weights` finds that. Called by `live`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The only arguments that are shown: SGLang tells all of them to who has its key, the key too.
ARGUMENTS: Final = (
    *("model_path", "served_model_name", "load_format", "dtype", "quantization", "torchao_config"),
    *("json_model_override_args", "kv_cache_dtype", "context_length", "device", "tp_size"),
    *("pp_size", "dp_size", "ep_size", "enable_ep_moe", "attention_backend", "sampling_backend"),
    *("mem_fraction_static", "max_running_requests", "max_total_tokens", "chunked_prefill_size"),
    *("disable_cuda_graph", "disable_radix_cache", "disable_overlap_schedule", "random_seed"),
    *("speculative_algorithm", "disaggregation_mode", "enable_memory_saver"),
)


def arguments(info: Mapping[str, Any]) -> dict[str, object]:
    """Return those of an engine's arguments that may be shown and that were set."""
    return {
        name: info[name]
        for name in ARGUMENTS
        if isinstance(info.get(name), str | int | float) and info[name] not in ("", "{}")
    }


def sglang_word(
    info: Mapping[str, Any], config: Mapping[str, Any] | None
) -> tuple[str | None, bool]:
    """Return what SGLang says of its quantisation, and whether it serves 16 bits.

    Args:
        info: its /get_server_info.
        config: config.json of the folder it serves, None where it cannot be read from here.
    """
    asked = info.get("quantization")
    try:
        override = json.loads(info.get("json_model_override_args") or "{}")
    except (ValueError, TypeError):
        override = {}
    own = override.get("quantization_config") if isinstance(override, dict) else None
    if info.get("torchao_config"):
        return f"torchao {info['torchao_config']}", False
    if own:
        return f"{describe(own)}, put over the checkpoint's config", False
    if config is None:
        # The folder decides where the command line says nothing, and it is not to be seen.
        return (f"{asked}, by argument", False) if asked else (None, False)
    own = config.get("quantization_config")
    if own:
        return f"{describe(own)}, from the checkpoint", False
    if asked:
        return f"{asked}, quantised at load", False
    return "none: a 16-bit checkpoint, and no quantisation was asked for", True


def vllm_word(status: int, text: str) -> str | None:
    """Return what vLLM's /server_info says (with VLLM_SERVER_DEV_MODE=1 only)."""
    if status != 200:
        return None
    found = re.search(r"\bquantization=([\w-]+)", text)
    return None if found is None or found[1] == "None" else f"{found[1]}, by the engine's config"


def describe(config: Any) -> str:
    """Return a quantization_config in a few words."""
    if not isinstance(config, dict):
        return "?"
    method = str(config.get("quant_method", "?"))
    block = config.get("weight_block_size")
    return f"{method} in blocks of {'x'.join(map(str, block))}" if block else method


def mode(told: Mapping[str, Any]) -> str | None:
    """Return how the weights are quantised by the plan of a server of ours; None without one.

    Args:
        told: its /fp8ctl/state.
    """
    plan = told.get("plan")
    if not isinstance(plan, dict) or not plan.get("mode"):
        return None
    block = plan.get("block_size")
    blocks = f" {'x'.join(map(str, block))}" if isinstance(block, list) else ""
    digest = f", plan {str(plan['digest'])[:12]}" if plan.get("digest") else ""
    return f"{plan['mode']}{blocks}, {plan.get('recipe', '?')}{digest}"


def modeless(told: Mapping[str, Any]) -> str:
    """Return why a server tells no mode."""
    if not told:
        return "only a server that fp8ctl started tells its plan"
    if "plan" not in told:
        return "its fp8ctl is an earlier one, which does not tell"
    return "there is no plan: the engine quantises by itself"


def versions(engine: str | None, told: Mapping[str, Any]) -> str | None:
    """Return the versions that a server tells, None where it tells none.

    Args:
        engine: name and version, from a route of its own.
        told: its /fp8ctl/state; empty for a server that is not ours.
    """
    own = f"{told['engine']} {told.get('engine_version', '?')}" if told.get("engine") else None
    found = [engine or own]
    found += [f"{name} {told[name]}" for name in ("fp8ctl", "torch", "python") if told.get(name)]
    device = f" on {told['device']}" if told.get("device") else ""
    return (", ".join(one for one in found if one) + device) if any(found) else None


def short(text: str) -> str:
    """Return the beginning of an answer, in one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 80 else flat[:79] + "…"
