"""What fp8ctl does inside SGLang 0.4.8's scheduler processes.

`load` is a custom weight loader, the one extension point that lets a request
run code in a scheduler (`--custom-weight-loader`). What it is given is no
weight but a question of our server process: about the weights that are there,
or to load a bucket, or to rest. It reaches all ranks at the same step. SGLang
drops its return value and an exception in it ends the server, so it never raises.
Rank 0's answer goes back as the message of SGLang's own; SGLang says nothing of the
other ranks: theirs go to files in the run folder, by rename.
"""

from __future__ import annotations

import functools
import json
import os
import traceback
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.engines.hooks import loaded, ranklog, sglang_holding, shards, trace
from fp8ctl.engines.hooks.engine import Engine, Own, guard_in
from fp8ctl.engines.hooks.imports import after_import
from fp8ctl.engines.hooks.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import ModuleType

    from fp8ctl.engines.hooks.shards import Form

#: The unscaled guard; {} where that patch is not applied.
_guard = guard_in("sglang.srt.layers.quantization.fp8")
LOADER = "fp8ctl.engines.hooks.sglang_worker.load"
#: Name of the one "tensor" that a question is.
QUESTION = "fp8ctl.question"


class Question(bytes):
    """A question in JSON that goes the way of a tensor: SGLang moves it to its device."""

    def to(self, *_device: object) -> Question:
        """Stay."""
        return self


def install() -> None:
    """Register what every process of the engine gets as it imports the engine.

    Called when our entry module is imported: in the server, and again in every
    spawned child before its target is unpickled.
    """
    loaded.install()
    trace.install()
    after_import("sglang.srt.managers.scheduler", _log_per_rank)
    after_import("sglang.srt.managers.scheduler", sglang_holding.install)
    after_import("sglang.srt.managers.tp_worker", _take_updates_safely)
    after_import("sglang.srt.model_executor.model_runner", _watch_loading)


def _log_per_rank(scheduler: ModuleType) -> None:
    run: Callable[..., Any] = scheduler.run_scheduler_process

    @functools.wraps(run)  # the name must stay: children unpickle it
    def run_scheduler_process(
        server_args: Any,
        port_args: Any,
        gpu_id: int,
        tp_rank: int,
        pp_rank: int,
        dp_rank: int | None,
        *rest: Any,
    ) -> Any:
        stage = (dp_rank or 0) * server_args.pp_size + pp_rank
        ranklog.redirect(stage * server_args.tp_size + tp_rank)
        return run(server_args, port_args, gpu_id, tp_rank, pp_rank, dp_rank, *rest)

    scheduler.run_scheduler_process = run_scheduler_process  # type: ignore[attr-defined]


#: What takes weights, or prepares for it, in the scheduler: (success, message) each.
_UPDATES = (
    "init_weights_update_group",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
)


def _take_updates_safely(tp_worker: ModuleType) -> None:
    """Make a failed weight update an answer instead of the end of the server.

    Stock 0.4.8 lets an exception of most of these leave the scheduler's event loop,
    which ends in SIGQUIT for the whole server.
    """
    worker: Any = tp_worker.TpModelWorker

    def guarded(method: Callable[..., tuple[bool, str]]) -> Callable[..., tuple[bool, str]]:
        @functools.wraps(method)
        def update(self: Any, request: Any) -> tuple[bool, str]:
            if getattr(request, "load_format", None) == "direct":
                # It goes around the loaders, and with them around the scales of the kernels.
                return False, "load_format 'direct' would leave the kernels' scales behind"
            _answers.clear()  # of a question that failed behind its answer
            try:
                success, message = method(self, request)
                return success, taken(message)
            except Exception as e:  # noqa: BLE001 - whatever the loaders raise
                traceback.print_exc()
                return False, f"{type(e).__name__}: {e}"

        return update

    for name in _UPDATES:
        setattr(worker, name, guarded(getattr(worker, name)))


def _watch_loading(model_runner: ModuleType) -> None:
    runner: Any = model_runner.ModelRunner
    load_model = runner.load_model

    @functools.wraps(load_model)
    def load_and_watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(self, *args, **kwargs)
        receiver = _receiver(self.model, self.tp_rank)
        self.model.load_weights = receiver.load  # counts what any route loads from now on
        return result

    runner.load_model = load_and_watch


_receivers: dict[torch.nn.Module, Receiver] = {}


def _receiver(model: torch.nn.Module, rank: int) -> Receiver:
    """Return what receives weights for a model; there is a second one for drafts."""
    if model not in _receivers:
        _receivers[model] = Receiver(model, rank, ENGINE)
    return _receivers[model]


def load(model: torch.nn.Module, named_tensors: list[tuple[str, Any]]) -> None:
    """Answer a question of our server process; called by SGLang in every rank."""
    folder = ranklog.run_dir()
    if folder is None or [name for name, _ in named_tensors] != [QUESTION]:
        return
    question = named_tensors[0][1]
    if not isinstance(question, Question):
        return
    try:
        asked = json.loads(question)
    except ValueError:
        return
    from sglang.srt.distributed import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    answer: dict[str, object] = {"rank": rank, "pid": os.getpid()}
    try:
        answer |= _answer(_receiver(model, rank), asked["what"], asked)
    except Exception as e:  # noqa: BLE001 - nothing may leave, see the docstring
        answer["failed"] = f"{type(e).__name__}: {e}"
        traceback.print_exc()
    if rank == 0:
        _answers[:] = [json.dumps(answer | {"id": asked["id"]})]
    else:
        _write(folder / "reports" / f"{asked['id']}.{rank}.json", answer)


#: Rank 0's, until SGLang's own has taken it along.
_answers: list[str] = []


def taken(message: str) -> str:
    """Return rank 0's answer to the question that was just asked, or else `message`."""
    return _answers.pop() if _answers else message


def _answer(receiver: Receiver, what: str, details: dict[str, Any]) -> dict[str, Any]:
    if what == "hold":
        return sglang_holding.this().hold(details["how"])
    if what == "resume":
        return _resume(receiver, details.get("trust", ()))
    if what == "flush":
        return sglang_holding.this().flush()
    if what == "reload":
        return _reload(receiver, details["path"])
    if details.get("flush"):
        sglang_holding.this().flush()
    with sglang_holding.unwatched():
        return receiver.answer(what, details)


def _resume(receiver: Receiver, trust: Sequence[str]) -> dict[str, Any]:
    """Let the scheduler work on, whether or not the rank can trust what was proven."""
    distrusts = ""
    try:
        if trust:
            with sglang_holding.unwatched():
                receiver.trust(trust)
    except Exception as e:  # noqa: BLE001 - the weights are right all the same
        traceback.print_exc()
        distrusts = f"{type(e).__name__}: {e}"
    return {**sglang_holding.this().resume(), "distrusts": distrusts}


def _reload(receiver: Receiver, path: str) -> dict[str, Any]:
    """Load a folder as /update_weights_from_disk does: ok, message, changed.

    SGLang remembers the folder as its model's; an update's folder does not stay.
    """
    runner = sglang_holding.this().scheduler.tp_worker.worker.model_runner
    remembered = [
        (runner.model_config, "model_path"),
        (runner.server_args, "model_path"),
        (runner.server_args, "load_format"),
        (runner, "load_config"),
    ]
    before = [getattr(where, name) for where, name in remembered]
    try:
        ok, message = runner.update_weights_from_disk(path, "auto")
    except Exception as e:  # noqa: BLE001 - it loads a second time where loading failed
        traceback.print_exc()
        ok, message = False, f"{type(e).__name__}: {e}"
    finally:
        for (where, name), value in zip(remembered, before, strict=True):
            setattr(where, name, value)
    return {"ok": ok, "message": message, "changed": ok or receiver.broken}


# --- what SGLang's models are -------------------------------------------------------------------


def _methods(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, Any]]:
    """Yield name, module, and the class and object of its method of quantisation."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            yield name, module, type(method).__name__, method


def _obstacles(model: torch.nn.Module) -> Iterator[str]:
    """Yield why the model cannot be loaded a second time."""
    for name, module, kind, method in _methods(model):
        if kind in ("Fp8LinearMethod", "Fp8MoEMethod"):
            yield from _obstacle(name, module, kind, method)
        elif kind not in (*shards.UNQUANTIZED, *shards.KEY_VALUE_SCALES):
            yield f"{name} is quantised by {kind}"
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            yield f"{name} is a {type(parameter.data).__name__}"


def _obstacle(name: str, module: torch.nn.Module, kind: str, method: Any) -> Iterator[str]:
    if not hasattr(method, "refittable"):
        yield "the patch `refit` is not applied"
        return
    experts_in_blocks = kind == "Fp8MoEMethod" and method.block_quant
    if not method.refittable and not experts_in_blocks:
        if kind == "Fp8MoEMethod" and not method.quant_config.is_checkpoint_fp8_serialized:
            yield f"{name}: experts that SGLang quantises itself are loaded once"
        else:
            yield f"{name}: Marlin's and ROCm's forms of a weight are made once"
    for attribute, parameter in module.named_parameters(recurse=False):
        if attribute != "bias" and not hasattr(parameter, "weight_loader"):
            yield f"{name}.{attribute} has lost its loader"


def _form(model: torch.nn.Module) -> Form | None:
    return _as_in_checkpoint if _keeps_checkpoint(model) else None


def _keeps_checkpoint(model: torch.nn.Module) -> bool:
    """Whether every FP8 layer can show the checkpoint's own codes and scales."""
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    linear = [m for m in methods if type(m).__name__ == "Fp8LinearMethod"]
    experts = [m for m in methods if type(m).__name__ == "Fp8MoEMethod"]
    others = [m for m in methods if type(m).__name__ == "Fp8EPMoEMethod"]
    return not others and all(
        getattr(m, "block_quant", False)
        or (m.quant_config.is_checkpoint_fp8_serialized and getattr(m, "refittable", False))
        for m in (*linear, *experts)
    )


def _as_in_checkpoint(module: Any, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter as the checkpoint has it, from what the kernels really read.

    Refit keeps a copy of per-tensor scales with one entry per output channel, and that
    copy is what the kernels multiply with. Activation scales are the largest of several
    in there: None.
    """
    if attribute.endswith("input_scale"):
        return None
    channels: torch.Tensor | None = getattr(module, f"{attribute}_channel", None)
    if channels is None or not attribute.endswith("weight_scale"):
        return t
    if t.dim() == 1 and hasattr(module, "logical_widths"):
        groups = torch.split(channels.flatten(), list(module.logical_widths))
        return shards.collapse(groups)
    return shards.collapse(channels.reshape(t.numel(), -1).unbind()).view(t.shape)


def _own(model: torch.nn.Module) -> Own | None:
    """Return how the model shows what SGLang made of all its FP8 layers; None where unknown."""
    kinds = [(kind, method) for _, _, kind, method in _methods(model)]
    ours = [m for kind, m in kinds if kind in ("Fp8LinearMethod", "Fp8MoEMethod")]
    other = any(kind == "Fp8EPMoEMethod" for kind, _ in kinds)
    if not ours or other or any(m.block_quant for m in ours):
        return None
    serialized = {bool(m.quant_config.is_checkpoint_fp8_serialized) for m in ours}
    if serialized == {False} and all(getattr(m, "refittable", False) for m in ours):
        return Own("online", _without_activations, _row_scales)
    stock = not any(hasattr(m, "refittable") for m in ours)
    # With cutlass, parts keep their scales, one for each channel; Marlin packs the codes.
    plain = not any(
        getattr(m, "cutlass_fp8_supported", False) or getattr(m, "use_marlin", False) for m in ours
    )
    return Own("shared", _shared) if serialized == {True} and stock and plain else None


def _shared(module: Any, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter of a stock per-tensor layer: [out, in], and its scale for each part."""
    if attribute.endswith("input_scale"):
        return None
    if type(getattr(module, "quant_method", None)).__name__ != "Fp8LinearMethod":
        return t
    if attribute == "weight":
        return t.t()
    if attribute == "weight_scale":
        return t.reshape(1).repeat(len(module.logical_widths))
    return t


def _without_activations(_module: Any, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    return None if attribute.endswith("input_scale") else t


def _row_scales(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the kernels multiply with, which stands beside the parameters."""
    for attribute, buffer in module.named_buffers(recurse=False):
        if attribute.endswith("weight_scale_channel"):
            yield attribute.removesuffix("_channel"), buffer


def _copied(module: Any, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter that is in memory as in the checkpoint, and whose loader only copies.

    Per-tensor scales have kernel copies that their loaders renew, and what is quantised
    here is no copy.
    """
    if attribute.endswith(("input_scale", "k_scale", "v_scale")):
        return None
    method = getattr(module, "quant_method", None)
    kind = type(method).__name__
    if method is None:
        # Norms. Loaders of their own do more: they cut, or take a logarithm.
        parameter = getattr(module, attribute)
        return None if hasattr(parameter, "weight_loader") else t
    if kind in shards.UNQUANTIZED:
        return None if getattr(module, "use_intel_amx_backend", False) else t
    if kind not in ("Fp8LinearMethod", "Fp8MoEMethod"):
        return None
    if method.block_quant or attribute == "bias":
        return t
    serialized = method.quant_config.is_checkpoint_fp8_serialized
    return t if serialized and attribute.endswith("weight") else None


def _copies(model: torch.nn.Module) -> Form | None:
    # Multi-head latent attention multiplies kv_b_proj out, at the end of load_weights.
    return None if hasattr(model, "post_load_weights") else _copied


ENGINE = Engine(
    form=_form,
    copies=_copies,
    obstacles=_obstacles,
    guard=_guard,
    own=_own,
    resume=sglang_holding.resume_here,
)


def _write(path: Path, answer: dict[str, object]) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(answer))
    draft.rename(path)
