"""Which part of which checkpoint tensor each parameter of a loaded model holds.

vLLM 0.9.1 and SGLang 0.4.8 share the names of their layer classes, and a
layer says itself how it was cut: over ranks, and into the tensors that were
fused into it. So one walk over the modules serves both engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.kernels.digest import Prepared, start, to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

    Form = Callable[[torch.nn.Module, str, torch.Tensor], torch.Tensor | None]
    #: What a module holds that is no parameter: name and value of each.
    More = Callable[[torch.nn.Module], Iterable[tuple[str, torch.Tensor]]]

#: Last name of a fused module -> the modules it was made of, in order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
#: DeepSeek's first projections of queries, and of keys and values, which SGLang builds as one
#: where queries have a low rank: the parts, in order.
LATENT = ("fused_qkv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa"))
#: Classes of methods that quantise no weight, in both engines: those that leave them as they
#: are, and those that have scales of keys and values alone.
UNQUANTIZED = (
    "UnquantizedLinearMethod",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
)
KEY_VALUE_SCALES = ("BaseKVCacheMethod", "Fp8KVCacheMethod")
_EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Shard:
    """A rectangle of a checkpoint tensor, as one rank holds it.

    Attributes:
        name: the checkpoint tensor, such as `model.layers.0.self_attn.q_proj.weight`.
        tensor: the values, a view into the engine's own memory.
        row: first row of the checkpoint tensor that it holds.
        column: first column of it.
        primary: False where another rank holds the same rectangle and counts for it.
    """

    name: str
    tensor: torch.Tensor
    row: int
    column: int
    primary: bool


@dataclass(frozen=True)
class Walk:
    """How the modules of a model are walked.

    Attributes:
        model: as the engine built and loaded it.
        tp_rank: of this process.
        as_in_checkpoint: gives a parameter the form that it has in a checkpoint; what
            it returns None for is left out.
        more: what modules hold beside their parameters.
        on_disk: names of the checkpoint's tensors, where they are known: a module that the
            checkpoint fuses, too (Phi-3), is shown as that tensor.
    """

    model: torch.nn.Module
    tp_rank: int
    as_in_checkpoint: Form | None = None
    more: More | None = None
    on_disk: Container[str] = ()

    def by_module(self, start: int = 0) -> Iterator[tuple[int, list[Shard]]]:
        """Yield the number of each module from `start` on, and what its parameters hold."""
        modules = list(self.model.named_modules())
        parents = dict(modules)
        for number, (prefix, module) in islice(enumerate(modules), start, None):
            parent = parents.get(prefix.rpartition(".")[0])
            yield number, self.of(prefix, module, parent)

    def of(self, prefix: str, module: torch.nn.Module, parent: Any) -> list[Shard]:
        """Return what the parameters of one module hold.

        Args:
            prefix: its name.
            module: itself.
            parent: the module that it is in.
        """
        held: list[Shard] = []
        for attribute, tensor in self._tensors(module):
            if prefix.rpartition(".")[2] == LATENT[0]:
                held += _latent(module, parent, prefix, attribute, tensor, self.tp_rank)
            else:
                held += _of(module, prefix, attribute, tensor, self.tp_rank, self.on_disk)
        return held

    def shards(self) -> Iterator[Shard]:
        """Yield what every parameter holds; parameters of unknown layers whole."""
        for _, held in self.by_module():
            yield from held

    def _tensors(self, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for attribute, parameter in module.named_parameters(recurse=False):
            tensor: torch.Tensor | None = parameter.detach()
            if self.as_in_checkpoint is not None:
                tensor = self.as_in_checkpoint(module, attribute, parameter.detach())
            if tensor is not None:
                yield attribute, tensor
        if self.more is not None:
            yield from self.more(module)


def shards(
    model: torch.nn.Module, tp_rank: int, as_in_checkpoint: Form | None = None
) -> Iterator[Shard]:
    """Yield what every parameter of `model` holds; see `Walk`."""
    return Walk(model, tp_rank, as_in_checkpoint).shards()


def place(shard: Shard) -> dict[str, object]:
    """Return place and type of a shard as JSON."""
    return {
        "name": shard.name,
        "row": shard.row,
        "column": shard.column,
        "shape": list(shard.tensor.shape),
        "dtype": str(shard.tensor.dtype).removeprefix("torch."),
        "primary": shard.primary,
    }


def begin(held: Iterable[Shard]) -> Callable[[], list[int]]:
    """Begin with the digest of each shard; return what waits for them, once for all."""
    return start((shard.tensor, shard.row, shard.column) for shard in held)


def prepare(held: Iterable[Shard]) -> Prepared:
    """Return what begins with them again and again, while they stay where they are."""
    return Prepared((shard.tensor, shard.row, shard.column) for shard in held)


def describe(held: Iterable[Shard]) -> list[dict[str, object]]:
    """Return place, type and digest of each shard as JSON."""
    those = list(held)
    return [
        {**place(shard), "digest": to_text(digest)}
        for shard, digest in zip(those, begin(those)(), strict=True)
    ]


def collapse(groups: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the one value that each group repeats; the odd one out where it does not."""
    values = []
    for group in groups:
        bits = group.contiguous().view(torch.int32)
        values.append(group[(bits != bits[0]).to(torch.int8).argmax()])
    return torch.stack(values)


def _of(
    module: Any,
    prefix: str,
    attribute: str,
    t: torch.Tensor,
    tp_rank: int,
    on_disk: Container[str] = (),
) -> Iterator[Shard]:
    kinds = {base.__name__ for base in type(module).__mro__}
    # A layer may be cut otherwise than the model: attention that every rank holds whole.
    tp_rank = int(getattr(module, "tp_rank", tp_rank))
    name = f"{prefix}.{attribute}" if prefix else attribute
    if kinds & {"FusedMoE", "EPMoE"} and attribute.startswith(("w13_", "w2_")):
        yield from _experts(module, prefix, attribute, t, tp_rank)
    elif kinds & {"QKVParallelLinear", "MergedColumnParallelLinear"}:
        yield from _merged(module, prefix, attribute, t, tp_rank, f"{prefix}.weight" in on_disk)
    elif "VocabParallelEmbedding" in kinds and t.dim() == 2:
        # The vocabulary is padded for the kernels; only the real rows count.
        indices = module.shard_indices
        start = int(indices.org_vocab_start_index)
        rows = int(indices.org_vocab_end_index) - start
        yield Shard(name, t[:rows], start, 0, True)
    elif "RowParallelLinear" in kinds and t.dim() == 2:
        yield Shard(name, t, 0, tp_rank * t.shape[1], True)
    elif "ColumnParallelLinear" in kinds and not _per_tensor(attribute, t):
        yield Shard(name, t, tp_rank * t.shape[0], 0, True)
    else:
        yield Shard(name, t, 0, 0, tp_rank == 0)


def _per_tensor(attribute: str, t: torch.Tensor) -> bool:
    return "scale" in attribute and t.dim() <= 1


def _merged(
    module: Any, prefix: str, attribute: str, t: torch.Tensor, tp_rank: int, on_disk: bool
) -> Iterator[Shard]:
    """Cut a fused column-parallel parameter back into the tensors it was made of.

    Args:
        on_disk: the checkpoint has one tensor of all parts, one behind the other.
    """
    parent, _, last = prefix.rpartition(".")
    sizes: Sequence[int] = list(module.output_partition_sizes)
    names = FUSED.get(last, tuple(f"{last}#{i}" for i in range(len(sizes))))
    replicas = int(getattr(module, "num_kv_head_replicas", 1))
    tp_size = int(getattr(module, "tp_size", 1))
    total = sum(sizes)
    start = 0
    above = 0  # rows of the parts before, in the whole checkpoint tensor
    for i, (part, size) in enumerate(zip(names, sizes, strict=True)):
        full = ".".join(filter(None, (parent, last if on_disk else part, attribute)))
        if _per_tensor(attribute, t):
            # One scale on disk is that of every part.
            yield Shard(full, t[i : i + 1], 0, 0, tp_rank == 0 and not (on_disk and i))
            continue
        # Block scales have fewer rows than weights, in the same proportion.
        rows = t.shape[0] * size // total
        # With more ranks than key and value heads, neighbours hold the same heads.
        copies = replicas if i > 0 else 1
        yield Shard(
            full,
            t[start : start + rows],
            above + (tp_rank // copies) * rows,
            0,
            tp_rank % copies == 0,
        )
        start += rows
        if on_disk:
            above += rows * tp_size // copies


def _latent(
    module: Any, parent: Any, prefix: str, attribute: str, t: torch.Tensor, tp_rank: int
) -> Iterator[Shard]:
    """Cut DeepSeek's fused first projections, which every rank holds whole."""
    rank = int(getattr(parent, "q_lora_rank", 0) or 0)
    if "scale" in attribute:  # as many rows of blocks as the rows of queries fill
        config = getattr(getattr(module, "quant_method", None), "quant_config", None)
        side = getattr(config, "weight_block_size", None)
        rank = -(-rank // int(side[0])) if side else 1
    outer = prefix.rpartition(".")[0]
    names = [f"{outer}.{part}.{attribute}" for part in LATENT[1]]
    yield Shard(names[0], t[:rank], 0, 0, tp_rank == 0)
    yield Shard(names[1], t[rank:], 0, 0, tp_rank == 0)


def _experts(
    module: Any, prefix: str, attribute: str, t: torch.Tensor, tp_rank: int
) -> Iterator[Shard]:
    """Cut a fused mixture of experts into the tensors of each expert."""
    fused, _, rest = attribute.partition("_")  # w13, weight_scale_inv
    mixtral = "block_sparse_moe" in prefix
    ep_size = int(getattr(module, "ep_size", 1))
    rank = 0 if ep_size > 1 else tp_rank
    for e, expert_id in enumerate(_expert_ids(module, t.shape[0])):
        for i, w in enumerate(("w1", "w3") if fused == "w13" else ("w2",)):
            part = w if mixtral else _EXPERT_NAMES[w]
            full = f"{prefix}.{expert_id}.{part}.{rest}"
            expert = t[e]
            if expert.dim() < 2:  # one scale per matrix
                one = expert[i : i + 1] if expert.dim() else expert.reshape(1)
                yield Shard(full, one, 0, 0, rank == 0)
            elif fused == "w13":
                rows = expert.shape[0] // 2
                yield Shard(full, expert[i * rows : (i + 1) * rows], rank * rows, 0, True)
            else:
                yield Shard(full, expert, 0, rank * expert.shape[1], True)


def _expert_ids(module: Any, count: int) -> list[int]:
    """Return the global ids of the experts that this rank holds, in their local order."""
    local = getattr(module, "expert_map", None)  # vLLM: global id -> local id or -1
    if local is not None:
        placed = sorted((int(at), i) for i, at in enumerate(local.tolist()) if at >= 0)
        return [i for _, i in placed]
    first = int(getattr(module, "start_expert_id", 0))  # SGLang
    return list(range(first, first + count))
