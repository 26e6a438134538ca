"""What a model says of fixed texts: log-probabilities in BF16 and in fake-quantised FP8.

Runs in the worker, with torch and with transformers, whose model code it drives. The
model is built without weights; each weight is read when a layer asks for it and dropped
after, so that memory is bounded by the largest matrix, not by the model. All hypotheses
go through a layer one after the other before the next layer is read: one pass over the
file. Python 3.10.

Each hypothesis is computed twice. `plain`: its weights, all arithmetic in FP32; that is
where an engine lies on average. `engine`: residuals and results in BF16 and, where
weights are FP8, activations in FP8 as both engines have them (a scale per token and group
of columns in block mode, per token otherwise). How far the two are apart is what the
arithmetic alone does.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import models
from fp8ctl.dtypes import DTYPES
from fp8ctl.errors import CheckpointError, UnsupportedError
from fp8ctl.kernels import groups as kinds
from fp8ctl.kernels import linear
from fp8ctl.kernels.dequantize import dequantize
from fp8ctl.kernels.quantize import quantize
from fp8ctl.pipeline import bytes_of, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from fp8ctl.manifest import Plan

    Progress = Callable[[int, int], None]

# Weights of a layer that are kept for its next state: above it they are made again.
_KEPT = 1 << 30
# Of a matrix that is converted at a time, and of logits that are there at a time.
_SLICE = 1 << 26


@dataclass(frozen=True)
class State:
    """One way through the model.

    Attributes:
        hypothesis: what its weights are.
        plan: of FP8 weights; None for those of the file.
        quantised: names of the weights that are FP8.
        scaled: False where nobody loaded the scales: codes count as they are.
        engine: in the engines' arithmetic, or plain.
    """

    hypothesis: str
    plan: Plan | None
    quantised: frozenset[str]
    scaled: bool
    engine: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of everything between the matrices."""
        return torch.bfloat16 if self.engine else torch.float32


def tokenise(folder: Path, texts: Sequence[str], cap: int) -> list[list[int]]:
    """Return the ids of texts by the model's own tokenizer, at most `cap` each.

    Raises:
        UnsupportedError: the folder has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return [list(tokenizer(text)["input_ids"])[:cap] for text in texts]
    except Exception as e:
        raise UnsupportedError(
            f"transformers cannot load the tokenizer of {folder}: {_first(e)}"
        ) from e


@torch.no_grad()
def compute(
    folder: Path,
    ids: Sequence[Sequence[int]],
    hypotheses: Mapping[str, tuple[Plan | None, bool]],
    progress: Progress,
) -> dict[str, dict[str, dict[str, list[list[Any]]]]]:
    """Return what every hypothesis expects of token ids, every one but the first of a text.

    Args:
        folder: a 16-bit checkpoint.
        ids: of the texts.
        hypotheses: by name, the plan of FP8 weights, None for 16 bits, and whether their
            scales are loaded.
        progress: called with bytes of weights done and in all.

    Returns:
        hypothesis -> `plain` or `engine` -> `logprobs` of the ids, and `top`: the likeliest ids.

    Raises:
        CheckpointError: the folder cannot be read.
        UnsupportedError: transformers does not know the model, or by other names.
    """
    states = []
    for name, (plan, scaled) in hypotheses.items():
        quantised = frozenset(tensor.name for tensor in plan.quantized) if plan else frozenset()
        states += [State(name, plan, quantised, scaled, engine) for engine in (False, True)]
    with _Weights(folder) as weights:
        found = _Forward(_skeleton(folder), weights, states, progress).run(ids)
    result: dict[str, dict[str, dict[str, list[list[Any]]]]] = {}
    for state, scores in zip(states, found, strict=True):
        result.setdefault(state.hypothesis, {})["engine" if state.engine else "plain"] = scores
    return result


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 where it is not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class _Weights:
    """Tensors of a checkpoint, read when they are asked for; no file is mapped."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = models.read_checkpoint(folder)
        self.tensors = self._checkpoint.tensors
        self._files = contextlib.ExitStack()
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """Return a tensor as it is stored, or some of its rows."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{info.file}: {name} has dtype {info.dtype}, unknown here")
        shape, start, size = list(info.shape), info.start, info.nbytes
        if rows is not None:
            row = info.nbytes // shape[0]
            rows = min(rows, shape[0] - first)
            start, size, shape[0] = start + first * row, rows * row, rows
        if info.file not in self._open:
            path = self._checkpoint.folder / info.file
            self._open[info.file] = self._files.enter_context(path.open("rb", buffering=0))
        file = self._open[info.file]
        data = torch.empty(size, dtype=torch.uint8)
        view, done = bytes_of(data), 0
        file.seek(start)
        while done < size:  # the kernel gives at most 2 GB at a time
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{info.file} ends inside {name}")
            done += count
        return data.view(DTYPES[info.dtype]).view(shape)


class _Forward:
    """A model without weights, and the way of the hypotheses through it."""

    def __init__(
        self, model: Any, weights: _Weights, states: Sequence[State], progress: Progress
    ) -> None:
        self._model = model
        self._weights = weights
        self._states = states
        self._state = states[0]
        self._progress = progress
        self._done = 0
        self._total = sum(info.nbytes for info in weights.tensors.values())
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        self._names = self._checked_names()
        self._check_plans()
        self._base = getattr(model, model.base_model_prefix)
        layers = _layers(model)
        inside = {id(m) for layer in layers for m in layer.modules()}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                _reroute(module, functools.partial(self._linear, f"{name}.weight", module))
            elif isinstance(module, torch.nn.Embedding) and id(module) not in inside:
                embed = functools.partial(self._embed, f"{name}.weight", module.forward, module)
                _reroute(module, embed)
            elif id(module) not in inside:
                self._fill(name, module, torch.float32)
        prefixes = {id(m): name for name, m in model.named_modules()}
        for layer in layers:
            layer.forward = functools.partial(
                self._layer, prefixes[id(layer)], layer, layer.forward
            )

    def run(self, ids: Sequence[Sequence[int]]) -> list[dict[str, list[list[Any]]]]:
        """Return the scores of every state."""
        width = max(len(text) for text in ids)
        # What is behind a token has no influence on it: any id will do to fill up.
        table = torch.tensor([[*text, *[text[-1]] * (width - len(text))] for text in ids])
        stacked = table.repeat(len(self._states), 1)
        told = self._base(input_ids=stacked, use_cache=False, return_dict=True)
        hidden = told.last_hidden_state
        self._done = self._total
        self._progress(self._done, self._total)
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        rows = max(1, _SLICE // (4 * vocabulary * width))
        found: list[dict[str, list[list[Any]]]] = []
        for number, state in enumerate(self._states):
            self._state = state
            self._kept.clear()
            part = hidden[number * len(ids) : (number + 1) * len(ids)]
            scores: dict[str, list[list[Any]]] = {"logprobs": [], "top": []}
            for first in range(0, len(ids), rows):
                few = slice(first, first + rows)
                told.last_hidden_state = part[few]
                self._score(told, table[few], ids[few], scores)
            found.append(scores)
        return found

    def _score(
        self,
        told: Any,
        table: torch.Tensor,
        ids: Sequence[Sequence[int]],
        scores: dict[str, list[list[Any]]],
    ) -> None:
        """Have the model make logits of hidden states: families scale and cap them as they like."""
        forward = self._base.forward
        self._base.forward = lambda *_, **__: told
        try:
            logits = self._model(input_ids=table, use_cache=False).logits.float()
        finally:
            self._base.forward = forward
        spread = logits[:, :-1].logsumexp(-1)
        chosen = logits[:, :-1].gather(-1, table[:, 1:, None])[..., 0] - spread
        top = logits[:, :-1].argmax(-1)
        for text, values, best in zip(ids, chosen, top, strict=True):
            scores["logprobs"].append(values[: len(text) - 1].tolist())
            scores["top"].append(best[: len(text) - 1].tolist())

    def _checked_names(self) -> dict[str, str]:
        """Return where each tensor of the model lies in the file; tied ones lie under another."""
        tensors = self._weights.tensors
        state: Mapping[str, torch.Tensor] = self._model.state_dict(keep_vars=True)
        places: dict[int, str] = {}
        for name in state:
            if name in tensors:
                places.setdefault(id(state[name]), name)
        names = {name: name for name in state if name in tensors}
        if self._model.config.get_text_config().tie_word_embeddings:
            shared = self._model.get_input_embeddings().weight
            first = next(n for n, p in state.items() if p is shared)
            for name in self._model._tied_weights_keys or ():
                if name not in names and first in names:
                    names[name] = first
        missing = [name for name in state if name not in names]
        if missing:
            kind = type(self._model).__name__
            raise UnsupportedError(
                f"{kind} of transformers has {missing[0]}, which the checkpoint has not"
                f" ({len(missing)} such)"
            )
        for name, place in names.items():
            if tuple(state[name].shape) != tensors[place].shape:
                raise UnsupportedError(
                    f"{name} is {list(state[name].shape)} in transformers,"
                    f" {list(tensors[place].shape)} in the checkpoint"
                )
        return names

    def _check_plans(self) -> None:
        """Refuse a model in which what becomes FP8 is no Linear: it would stay as it is."""
        linears = {
            self._names[f"{name}.weight"]
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        known = set(self._names.values())
        for state in self._states:
            odd = sorted((state.quantised & known) - linears)
            if odd:
                raise UnsupportedError(
                    f"{odd[0]} is no Linear of {type(self._model).__name__} in transformers"
                )

    def _layer(
        self,
        name: str,
        layer: Any,
        forward: Callable[..., Any],
        hidden: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Take the hidden states of all hypotheses through one layer, one after the other."""
        whole = hidden.shape[0]
        each = whole // len(self._states)
        result = torch.empty_like(hidden)
        for number, state in enumerate(self._states):
            if state.hypothesis != self._state.hypothesis:
                self._kept.clear()
            self._state = state
            for inner, module in layer.named_modules(prefix=name):
                if not isinstance(module, torch.nn.Linear):
                    self._fill(inner, module, state.dtype)
                elif module.bias is not None:
                    self._fill(inner, module, state.dtype, ("bias",))
            part = slice(number * each, (number + 1) * each)
            cut = functools.partial(_cut, part=part, whole=whole, dtype=state.dtype)
            out = forward(
                cut(hidden), *map(cut, rest), **{key: cut(value) for key, value in more.items()}
            )
            result[part] = out[0] if isinstance(out, tuple) else out
        self._kept.clear()
        for inner, module in layer.named_modules(prefix=name):
            self._empty(inner, module)
        self._done += sum(
            self._weights.tensors[self._names[key]].nbytes
            for key in self._names
            if key.startswith(f"{name}.")
        )
        self._progress(self._done, self._total)
        return (result,) if isinstance(out, tuple) else result

    def _linear(self, name: str, module: Any, x: torch.Tensor) -> torch.Tensor:
        state = self._state
        flat = x.reshape(-1, x.shape[-1])
        place = self._names[name]
        plan = state.plan
        if plan is None or place not in state.quantised:
            if state.engine:
                y = self._product(place, flat.to(torch.bfloat16))
            else:
                y = self._product(place, flat.float())
        else:
            if state.engine and flat.shape[0]:
                flat = _as_fp8(flat.to(torch.bfloat16), plan)
            y = flat.float() @ self._quantised(place, plan, state.scaled).T
        if module.bias is not None:
            y = y + module.bias
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return x times a matrix of the file, some rows of it at a time."""
        n, k = self._weights.tensors[name].shape
        rows = max(1, _SLICE // (4 * k))
        parts = []
        for first in range(0, n, rows):
            key = (name, first)
            weight = self._kept.get(key)
            if weight is None:
                weight = self._weights.read(name, first, rows)
                self._keep(key, weight)
            parts.append(x @ weight.to(x.dtype).T)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def _quantised(self, name: str, plan: Plan, scaled: bool) -> torch.Tensor:
        weight = self._kept.get((name, -1))
        if weight is None:
            source = self._weights.read(name)
            codes, scales = quantize(source, groups_of(plan), plan.recipe)
            if not scaled:
                scales.fill_(1.0)
            weight = dequantize(codes, scales, groups_of(plan))
            self._keep((name, -1), weight)
        return weight

    def _keep(self, key: tuple[str, int], weight: torch.Tensor) -> None:
        if sum(t.nbytes for t in self._kept.values()) + weight.nbytes <= _KEPT:
            self._kept[key] = weight

    def _embed(
        self, name: str, forward: Callable[..., torch.Tensor], module: Any, ids: torch.Tensor
    ) -> torch.Tensor:
        """Read the rows that are asked for; the family's own forward may scale them."""
        wanted, index = torch.unique(ids, return_inverse=True)
        place = self._names[name]
        rows = [self._weights.read(place, int(one), 1) for one in wanted]
        module.weight = torch.nn.Parameter(torch.cat(rows).float(), requires_grad=False)
        return forward(index)

    def _fill(self, name: str, module: Any, dtype: torch.dtype, only: tuple[str, ...] = ()) -> None:
        """Give a module its own weights."""
        for kind in (module._parameters, module._buffers):
            for key, value in list(kind.items()):
                full = f"{name}.{key}"
                if value is None or full not in self._names or (only and key not in only):
                    continue
                tensor = self._weights.read(self._names[full])
                kind[key] = _like(value, tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def _empty(self, name: str, module: Any) -> None:
        for kind in (module._parameters, module._buffers):
            for key, value in list(kind.items()):
                if value is not None and f"{name}.{key}" in self._names:
                    kind[key] = _like(value, value.to("meta"))


def _reroute(module: Any, forward: Callable[..., Any]) -> None:
    """Have a module do something else when it is called."""
    module.forward = forward


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    is_parameter = isinstance(old, torch.nn.Parameter)
    return torch.nn.Parameter(new, requires_grad=False) if is_parameter else new


def _as_fp8(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return activations [M, K] after a round trip through FP8, in FP32."""
    groups = kinds.PER_CHANNEL if plan.block is None else kinds.block(1, plan.block.k)
    codes, scales = quantize(x, groups, linear.ACTIVATION, "propagate")
    return dequantize(codes, scales, groups)


def _cut(value: Any, part: slice, whole: int, dtype: torch.dtype) -> Any:
    """Return a state's share of an argument of a layer, in its dtype."""
    if isinstance(value, tuple):
        return tuple(_cut(one, part, whole, dtype) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() > 1 and value.shape[0] == whole:
        value = value[part]
    return value.to(dtype) if value.is_floating_point() else value


def _layers(model: Any) -> Any:
    """Return the decoder's layers.

    Raises:
        UnsupportedError: it is not built of such.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedError(f"{type(model).__name__} of transformers has no list of {count} layers")


def _skeleton(folder: Path) -> Any:
    """Return the model as transformers builds it, without weights.

    Raises:
        UnsupportedError: transformers cannot build it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with _without_weights():
            model: Any = transformers.AutoModelForCausalLM.from_config(
                config, torch_dtype=torch.float32
            )
    except Exception as e:
        raise UnsupportedError(
            f"transformers {transformers.__version__} cannot build the model of {folder}:"
            f" {_first(e)}"
        ) from e
    return model.eval()


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Have modules be built with their buffers, and with parameters that have no memory."""
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        if value is not None:
            value = torch.nn.Parameter(value.to("meta"), requires_grad=False)
        register(self, name, value)

    from transformers import modeling_utils

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        # Memory that nobody writes to is not taken: what is left out is the filling.
        with modeling_utils.no_init_weights():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _first(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200] if lines else ''}"
