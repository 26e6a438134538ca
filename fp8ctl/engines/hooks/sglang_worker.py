"""What fp8ctl does inside SGLang 0.4.8's scheduler processes.

`load` is a custom weight loader, the one extension point that lets a request
run code in a scheduler (`--custom-weight-loader`). It loads nothing: it
answers questions about the weights that are there. SGLang drops its return
value and an exception in it ends the server, so answers go to files in the run
folder, one per rank, by rename, and it never raises.
"""

from __future__ import annotations

import functools
import json
import os
import traceback
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.engines.hooks import loaded, ranklog, shards, trace
from fp8ctl.engines.hooks.imports import after_import

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import ModuleType

LOADER = "fp8ctl.engines.hooks.sglang_worker.load"
#: Name of the one tensor of a question; its bytes are the question in JSON.
QUESTION = "fp8ctl.question"


class _Pushes:
    """What was loaded since the server started, or since an update broke off.

    Attributes:
        names: names of the tensors that arrived.
        broken: True where loading raised, so that half of a set may be in place.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.broken = False

    def forget(self) -> None:
        self.names.clear()
        self.broken = False


_pushes = _Pushes()


def install() -> None:
    """Register what every process of the engine gets as it imports the engine.

    Called when our entry module is imported: in the server, and again in every
    spawned child before its target is unpickled.
    """
    loaded.install()
    trace.install()
    after_import("sglang.srt.managers.scheduler", _log_per_rank)
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
            try:
                return method(self, request)
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
        _watch_pushes(self.model)
        return result

    runner.load_model = load_and_watch


def _watch_pushes(model: Any) -> None:
    """Remember the names of all tensors that are loaded from now on."""
    load_weights = model.load_weights

    def watched(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        def tap() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                yield name, tensor
                _pushes.names.add(name)

        try:
            return load_weights(tap(), *args, **kwargs)
        except BaseException:
            _pushes.broken = True
            raise

    model.load_weights = watched


def load(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Answer a question of our server process; called by SGLang in every rank."""
    folder = ranklog.run_dir()
    if folder is None or [name for name, _ in named_tensors] != [QUESTION]:
        return
    try:
        question = json.loads(bytes(named_tensors[0][1].cpu().tolist()))
    except ValueError:
        return
    from sglang.srt.distributed import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    answer: dict[str, object] = {"rank": rank, "pid": os.getpid()}
    try:
        answer |= _answer(model, question, rank)
    except Exception as e:  # noqa: BLE001 - nothing may leave, see the docstring
        answer["error"] = f"{type(e).__name__}: {e}"
        traceback.print_exc()
    _write(folder / "reports" / f"{question['id']}.{rank}.json", answer)


def _answer(model: torch.nn.Module, question: dict[str, Any], rank: int) -> dict[str, object]:
    what = question["what"]
    if what == "forget":
        _forget(model)
        return {}
    if what == "progress":
        broken = _pushes.broken
        if broken:
            _forget(model)
        missing = [name for name in question["expected"] if name not in _pushes.names]
        return {
            "broken": broken,
            "unfilled": _guard("fp8ctl_unfilled", model),
            "missing": missing[:20],
            "missing_count": len(missing),
        }
    if what == "digests":
        kept = _keeps_checkpoint(model)
        held = shards.shards(model, rank, _as_in_checkpoint if kept else None)
        return {
            "format": "checkpoint" if kept else "engine",
            "tensors": shards.describe(held),
        }
    raise ValueError(f"unknown question {what!r}")


def _forget(model: torch.nn.Module) -> None:
    """Count from nothing: only a whole set makes the weights whole again."""
    _pushes.forget()
    _guard("fp8ctl_forget", model)


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


def _guard(function: str, model: torch.nn.Module) -> Any:
    """Call the unscaled guard of the patched engine; {} where that patch is not applied."""
    from sglang.srt.layers.quantization import fp8

    known = getattr(fp8, function, None)
    return known(model) if known is not None else {}


def _write(path: Path, answer: dict[str, object]) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(answer))
    draft.rename(path)
