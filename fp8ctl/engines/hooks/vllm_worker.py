"""What fp8ctl does inside vLLM 0.9.1's workers, and in the engine core that drives them.

`Extension` is mixed into the worker class (`--worker-extension-cls`) and its
methods are called through `collective_rpc`. Arguments and results cross
msgpack: plain types only. A method returns its error instead of raising it, so
that the answer says what state the weights are in.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import loaded, ranklog, shards, trace, vllm_holding
from fp8ctl.engines.hooks.engine import Engine, Own, guard_in
from fp8ctl.engines.hooks.imports import after_import
from fp8ctl.engines.hooks.receiver import Receiver, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    import torch

    from fp8ctl.engines.hooks.shards import Form

#: The unscaled guard; {} where that patch is not applied.
_guard = guard_in("vllm.model_executor.layers.quantization.fp8")
EXTENSION = "fp8ctl.engines.hooks.vllm_worker.Extension"


def install() -> None:
    """Register what every process of the engine gets as it imports the engine.

    Called when our entry module is imported: in the server, and again in every
    spawned child before its target is unpickled.
    """
    loaded.install()
    trace.install()
    after_import("vllm.worker.worker_base", _log_per_rank)
    after_import("vllm.v1.engine.core", vllm_holding.install)


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
    parallel_config: Any

    def fp8ctl_ask(self, what: str, details: str) -> dict[str, Any]:
        """Answer a question of the server.

        Args:
            what: as in `workers.Workers`, or "reload" {path}: load a folder of safetensors.
            details: of the question, in JSON.

        Returns:
            rank, pid and the answer; `failed` where it raised. To "reload": loaded: number of
            tensors; error: "" or what was raised; broken: True where some may be in place.
        """
        answer: dict[str, Any] = {"rank": self.rank, "pid": os.getpid()}
        try:
            asked = json.loads(details)
            receiver = self._fp8ctl_receiver()
            if what == "reload":
                return answer | _reload(receiver, Path(asked["path"]))
            if what == "refittable" and self.parallel_config.data_parallel_size > 1:
                why = "data parallelism: one server would have several sets of weights"
                return answer | {"refittable": False, "why": why}
            return answer | receiver.answer(what, asked)
        except Exception as e:  # noqa: BLE001 - the answer says it
            traceback.print_exc()
            return answer | {"failed": f"{type(e).__name__}: {e}"}

    def fp8ctl_paused(self, known: dict[str, tuple[int, list[int]]]) -> None:
        """Learn what the scheduler knows of requests that are prefilled again.

        The last token of a request comes to a worker with the step after. Where a chunk of the
        prefill ends just before it, a worker that does not know it takes the prefill for complete
        and generates that token a second time. And log-probabilities of a prompt that were told
        would be computed and told again.

        Args:
            known: by request, how many tokens were generated, and the last of them.
        """
        for request_id, (count, tail) in known.items():
            state = self.model_runner.requests.get(request_id)
            if state is None:
                continue
            new = count - len(state.output_token_ids)
            if new > 0:
                state.output_token_ids.extend(tail[-new:])
            if count and state.sampling_params.prompt_logprobs is not None:
                # The scheduler may have the same object.
                state.sampling_params = copy.copy(state.sampling_params)
                state.sampling_params.prompt_logprobs = None

    def _fp8ctl_receiver(self) -> Receiver:
        """Return what receives weights for this worker's model."""
        from vllm.distributed import get_tensor_model_parallel_rank

        model = self.model_runner.get_model()
        if model not in _receivers:
            dtype, tp_rank = self.model_config.dtype, get_tensor_model_parallel_rank()
            _receivers[model] = Receiver(model, self.rank, engine(dtype), tp_rank=tp_rank)
        return _receivers[model]


_receivers: dict[torch.nn.Module, Receiver] = {}


# --- loading ------------------------------------------------------------------------------------


def _reload(receiver: Receiver, folder: Path) -> dict[str, Any]:
    """Load a folder of safetensors into the running model, in place: loaded, error, broken."""
    names: list[str] = []
    error = ""
    try:
        receiver.load(_tensors(folder, names))
        wait_for(receiver.device)
    except Exception as e:  # noqa: BLE001 - the answer says it, see the module's docstring
        traceback.print_exc()
        error = f"{type(e).__name__}: {e}"
        if "weight_loader" in error:
            error += " (is the patch `refit` applied?)"
        receiver.broken = bool(names)  # nothing was handed out: nothing was written
    return {"loaded": len(names), "error": error, "broken": receiver.broken}


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

    for impl, process in _derived(model):
        before = {k: v for k, v in vars(impl).items() if isinstance(v, torch.Tensor)}
        with torch.no_grad():
            process(dtype)
            for name, old in before.items():
                new = getattr(impl, name)
                if new is not old:
                    old.copy_(new)
                    setattr(impl, name, old)


def _derived(model: torch.nn.Module) -> Iterator[tuple[Any, Callable[[torch.dtype], None]]]:
    """Yield the parts that keep something of the weights, and what makes it anew."""
    for module in model.modules():
        # Every update asks, and a module takes long to say that it has no such attribute.
        impl = vars(module).get("impl", module._modules.get("impl"))
        if not hasattr(impl, "process_weights_after_loading"):
            continue
        process = getattr(module, "process_weights_after_loading", None)
        if callable(process):
            yield impl, process


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


def _form(model: torch.nn.Module) -> Form | None:
    return _as_in_checkpoint if _keeps_checkpoint(model) else None


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


def _own(model: torch.nn.Module) -> Own | None:
    """Return how the model shows what vLLM made of all its FP8 layers; None where unknown."""
    methods = [found for module in model.modules() if (found := _method(module))[1] is not None]
    if not methods or any(method.block_quant for _, method in methods):
        return None
    serialized = {bool(m.quant_config.is_checkpoint_fp8_serialized) for _, m in methods}
    refit = [
        hasattr(method, "_can_refit") and method._can_refit()
        if name == "Fp8LinearMethod"
        else getattr(method, "can_refit", False)
        for name, method in methods
    ]
    if serialized == {False} and all(refit):
        return Own("online", _online_form, _row_scales)
    known = any(hasattr(m, "_can_refit") or hasattr(m, "can_refit") for _, m in methods)
    packed = any(getattr(m, "use_marlin", False) for _, m in methods)
    return Own("shared", _shared) if serialized == {True} and not (known or packed) else None


def _shared(module: torch.nn.Module, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter of a stock per-tensor layer: [out, in], and its scale for each part."""
    if attribute.endswith("input_scale"):
        return None
    if _method(module)[0] != "Fp8LinearMethod":
        return t
    if attribute == "weight":
        return t.t()
    return t.reshape(1).repeat(len(_widths(module))) if attribute == "weight_scale" else t


def _online_form(module: torch.nn.Module, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter in the checkpoint's form; codes of a Linear lie as [in, out]."""
    if attribute.endswith("input_scale"):
        return None
    transposed = _method(module)[0] == "Fp8LinearMethod" and attribute == "weight"
    return t.t() if transposed else t


def _row_scales(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the scales of experts, which stand beside the parameters."""
    for attribute, buffer in module.named_buffers(recurse=False):
        if attribute.endswith("weight_scale_expanded") and not hasattr(module, attribute[:-9]):
            yield attribute.removesuffix("_expanded"), buffer


def _widths(module: Any) -> list[int]:
    return [int(width) for width in module.logical_widths]


# --- what can be loaded again -------------------------------------------------------------------


def _obstacles(model: torch.nn.Module) -> Iterator[str]:
    """Yield why the model cannot be loaded a second time."""
    for name, module in model.named_modules():
        kind, method = _method(module)
        other = type(getattr(module, "quant_method", None)).__name__
        if method is not None:
            yield from _obstacle(name, module, kind, method)
        elif other not in ("NoneType", *shards.UNQUANTIZED, *shards.KEY_VALUE_SCALES):
            yield f"{name} is quantised by {other}"


def _obstacle(name: str, module: torch.nn.Module, kind: str, method: Any) -> Iterator[str]:
    if not (hasattr(method, "_can_refit") or hasattr(method, "can_refit")):
        yield "the patch `refit` is not applied"
        return
    if kind == "Fp8MoEMethod":
        if not method.quant_config.is_checkpoint_fp8_serialized:
            yield f"{name}: experts that vLLM quantises itself are loaded once"
        elif not method.can_refit:
            yield f"{name}: experts for Marlin, DeepGEMM or all-to-all kernels are loaded once"
    elif not method._can_refit():
        yield f"{name}: Marlin's and ROCm's forms of a weight are made once"
    for attribute, parameter in module.named_parameters(recurse=False):
        # What vLLM quantises itself has scales that the weight's own loader writes.
        derived = (
            attribute.endswith("scale") and not method.quant_config.is_checkpoint_fp8_serialized
        )
        if attribute != "bias" and not derived and not hasattr(parameter, "weight_loader"):
            yield f"{name}.{attribute} has lost its loader"


def _copies(model: torch.nn.Module) -> Form | None:
    return None if any(True for _ in _derived(model)) else _copied


def _copied(module: torch.nn.Module, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter that is in memory as in the checkpoint, and whose loader only copies.

    Per-tensor scales of fused modules have copies for the kernels that their loaders renew, and
    what is quantised here is no copy.
    """
    name, method = _method(module)
    if attribute.endswith(("input_scale", "k_scale", "v_scale")):
        return None
    if method is None:
        if type(getattr(module, "quant_method", None)).__name__ in shards.UNQUANTIZED:
            return t
        # Norms. Loaders of their own do more: they cut, or take a logarithm.
        parameter = getattr(module, attribute)
        return None if hasattr(parameter, "weight_loader") else t
    if not method.quant_config.is_checkpoint_fp8_serialized:
        return None
    if method.block_quant or attribute == "bias":
        return t
    if not attribute.endswith("weight"):
        return None
    return t.t() if name == "Fp8LinearMethod" else t


def engine(dtype: torch.dtype) -> Engine:
    """Return what vLLM says of a model that computes in `dtype`."""
    return Engine(
        form=_form,
        copies=_copies,
        obstacles=_obstacles,
        guard=_guard,
        settle=functools.partial(_rederive, dtype=dtype),
        own=_own,
        resume=vllm_holding.resume_here,
    )
