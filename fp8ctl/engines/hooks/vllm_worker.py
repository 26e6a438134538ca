"""What fp8ctl does inside vLLM 0.9.1's workers.

`Extension` is mixed into the worker class (`--worker-extension-cls`) and its
methods are called through `collective_rpc`. Arguments and results cross
msgpack: plain types only. A method returns its error instead of raising it, so
that the answer says what state the weights are in.
"""

from __future__ import annotations

import functools
import json
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import loaded, ranklog, shards, trace
from fp8ctl.engines.hooks.imports import after_import

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    import torch

EXTENSION = "fp8ctl.engines.hooks.vllm_worker.Extension"

#: Names of the tensors that updates brought, since the start or since one broke off.
_arrived: set[str] = set()


def install() -> None:
    """Register what every process of the engine gets as it imports the engine.

    Called when our entry module is imported: in the server, and again in every
    spawned child before its target is unpickled.
    """
    loaded.install()
    trace.install()
    after_import("vllm.worker.worker_base", _log_per_rank)


def _log_per_rank(worker_base: ModuleType) -> None:
    wrapper: Any = worker_base.WorkerWrapperBase
    init: Callable[..., Any] = wrapper.init_worker

    @functools.wraps(init)
    def init_worker(self: Any, all_kwargs: list[dict[str, Any]]) -> Any:
        ranklog.redirect(int(all_kwargs[self.rpc_rank].get("rank", self.rpc_rank)))
        return init(self, all_kwargs)

    wrapper.init_worker = init_worker


class Extension:
    """Methods that `collective_rpc` finds on every worker.

    vLLM asserts that no name here is one of the worker's own.
    """

    rank: int
    model_runner: Any
    model_config: Any

    def fp8ctl_load_from_disk(self, path: str, expected: list[str]) -> dict[str, Any]:
        """Load a folder of safetensors into the running model, in place.

        Args:
            path: the folder.
            expected: names that must have arrived before the weights are complete.

        Returns:
            rank, loaded: number of tensors; error: "" or what was raised; broken: True
            where it was raised after the first tensor; unfilled: of the unscaled guard;
            missing, missing_count: of `expected`.
        """
        model = self.model_runner.get_model()
        loaded: list[str] = []
        error = ""
        try:
            model.load_weights(_tensors(Path(path), loaded))
            _rederive(model, self.model_config.dtype)
            _wait_for_device()
        except Exception as e:  # noqa: BLE001 - the answer says it, see the module's docstring
            traceback.print_exc()
            error = f"{type(e).__name__}: {e}"
            if "weight_loader" in error:
                error += " (is the patch `refit` applied?)"
        broken = bool(error and loaded)
        _arrived.update(loaded)
        if broken:  # count from nothing: only a whole set makes the weights whole again
            _arrived.clear()
            _guard("fp8ctl_forget", model)
        missing = [name for name in expected if name not in _arrived]
        return {
            "rank": self.rank,
            "loaded": len(loaded),
            "error": error,
            "broken": broken,
            "unfilled": _guard("fp8ctl_unfilled", model),
            "missing": missing[:20],
            "missing_count": len(missing),
        }

    def fp8ctl_forget(self) -> None:
        """Count what is loaded from nothing: another rank failed in the same update."""
        _arrived.clear()
        _guard("fp8ctl_forget", self.model_runner.get_model())

    def fp8ctl_report(self) -> dict[str, Any]:
        """Return place, type and digest of everything that this worker holds."""
        answer: dict[str, Any] = {"rank": self.rank, "pid": os.getpid()}
        try:
            from vllm.distributed import get_tensor_model_parallel_rank

            model, tp_rank = self.model_runner.get_model(), get_tensor_model_parallel_rank()
            answer["unfilled"] = _guard("fp8ctl_unfilled", model)
            answer["format"] = "checkpoint" if _keeps_checkpoint(model) else "engine"
            answer["tensors"] = shards.describe(_shards(model, tp_rank))
        except Exception as e:  # noqa: BLE001 - the answer says it
            traceback.print_exc()
            answer["error"] = f"{type(e).__name__}: {e}"
        return answer


# --- loading ------------------------------------------------------------------------------------


def _tensors(folder: Path, loaded: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors one by one; `loaded` gets each name as it is handed out."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    for name in files:
        with safe_open(str(folder / name), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(key)
                loaded.append(key)
                yield key, tensor


def _rederive(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Bring what attention keeps of the weights up to date, where CUDA graphs read it.

    Multi-head latent attention multiplies kv_b_proj out once, after the start.
    """
    import torch

    for module in model.modules():
        impl = getattr(module, "impl", None)
        process = getattr(module, "process_weights_after_loading", None)
        if process is None or not hasattr(impl, "process_weights_after_loading"):
            continue
        before = {k: v for k, v in vars(impl).items() if isinstance(v, torch.Tensor)}
        with torch.no_grad():
            process(dtype)
            for name, old in before.items():
                new = getattr(impl, name)
                if new is not old:
                    old.copy_(new)
                    setattr(impl, name, old)


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _guard(function: str, model: torch.nn.Module) -> Any:
    """Call the unscaled guard of the patched engine; {} where that patch is not applied."""
    from vllm.model_executor.layers.quantization import fp8

    known = getattr(fp8, function, None)
    return known(model) if known is not None else {}


# --- what is there ------------------------------------------------------------------------------


def _method(module: torch.nn.Module) -> tuple[str, Any]:
    """Return the name of a module's FP8 method and the method, or ("", None)."""
    method = getattr(module, "quant_method", None)
    name = type(method).__name__
    return (name, method) if name in ("Fp8LinearMethod", "Fp8MoEMethod") else ("", None)


def _keeps_checkpoint(model: torch.nn.Module) -> bool:
    """Whether every FP8 layer can show the checkpoint's own codes and scales."""
    for module in model.modules():
        name, method = _method(module)
        if method is None:
            continue
        serialized = method.quant_config.is_checkpoint_fp8_serialized
        if name == "Fp8LinearMethod":
            can = hasattr(method, "_can_refit") and method._can_refit()
        else:
            can = getattr(method, "can_refit", False)
        if not (serialized and can):
            return False
    return True


def _shards(model: torch.nn.Module, tp_rank: int) -> Iterator[shards.Shard]:
    return shards.shards(model, tp_rank, _as_in_checkpoint if _keeps_checkpoint(model) else None)


def _as_in_checkpoint(
    module: torch.nn.Module, attribute: str, t: torch.Tensor
) -> torch.Tensor | None:
    """Return a parameter in the checkpoint's form, from what the kernels really read.

    Refit keeps per-tensor weights as [in, out] views, and expands their scales to
    one per output channel. Activation scales are the largest of several: None.
    """
    import torch

    name, method = _method(module)
    if method is None:
        return t
    if attribute.endswith("input_scale"):
        return None
    if method.block_quant:
        return t
    if name == "Fp8LinearMethod":
        if attribute == "weight":
            return t.t()
        if attribute == "weight_scale" and t.dim() == 2:
            return shards.collapse(torch.split(t.flatten(), _widths(module)))
    expanded = getattr(module, f"{attribute}_expanded", None)
    if expanded is not None and attribute.endswith("weight_scale"):
        per_shard = expanded.reshape(t.numel(), -1)
        return shards.collapse(per_shard.unbind()).view(t.shape)
    return t


def _widths(module: Any) -> list[int]:
    return [int(width) for width in module.logical_widths]
