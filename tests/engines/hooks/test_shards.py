"""The parts that all ranks hold add up to the checkpoint, however the engine cut and fused it.

The layer classes are torch modules with the names and attributes of the engines'
own; how a whole tensor is cut for a rank is written here a second time, as the
engines' weight loaders do it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8ctl.engines.hooks.shards import Shard, Walk, describe, shards
from fp8ctl.kernels.digest import combine, digest, from_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HIDDEN, HEAD, HEADS, KV_HEADS, WIDTH, VOCAB, EXPERTS = 64, 16, 8, 2, 128, 50, 4
BLOCK = (8, 16)

LAYER = "model.layers.0"
ATTENTION, MLP, MOE = f"{LAYER}.self_attn", f"{LAYER}.mlp", f"{LAYER}.mlp.experts"
SHAPES = {
    f"{ATTENTION}.q_proj": (HEADS * HEAD, HIDDEN),
    f"{ATTENTION}.k_proj": (KV_HEADS * HEAD, HIDDEN),
    f"{ATTENTION}.v_proj": (KV_HEADS * HEAD, HIDDEN),
    f"{ATTENTION}.o_proj": (HIDDEN, HEADS * HEAD),
    f"{ATTENTION}.q_b_proj": (HEADS * HEAD, HIDDEN),
    f"{MLP}.gate_proj": (WIDTH, HIDDEN),
    f"{MLP}.up_proj": (WIDTH, HIDDEN),
    f"{MLP}.down_proj": (HIDDEN, WIDTH),
    **{
        f"{MOE}.{e}.{part}": (HIDDEN, WIDTH) if part == "down_proj" else (WIDTH, HIDDEN)
        for e in range(EXPERTS)
        for part in ("gate_proj", "up_proj", "down_proj")
    },
}
Whole = dict[str, torch.Tensor]
Report = list[tuple[Shard, dict[str, Any]]]


def checkpoint(form: str) -> Whole:
    """Return every tensor of a checkpoint: 16 bits, or codes and scales per block or tensor."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    whole: Whole = {}
    for name, (n, k) in SHAPES.items():
        if form == "bf16":
            whole[f"{name}.weight"] = normal(n, k).bfloat16()
            continue
        whole[f"{name}.weight"] = normal(n, k).to(torch.float8_e4m3fn)
        if form == "block":
            whole[f"{name}.weight_scale_inv"] = normal(n // BLOCK[0], k // BLOCK[1])
        else:
            whole[f"{name}.weight_scale"] = normal(1)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"{ATTENTION}.{part}"
        whole[f"{name}.bias"] = normal(SHAPES[name][0]).bfloat16()
    whole["model.embed_tokens.weight"] = normal(VOCAB, HIDDEN).bfloat16()
    whole["lm_head.weight"] = normal(VOCAB, HIDDEN).bfloat16()
    whole["model.norm.weight"] = normal(HIDDEN).bfloat16()
    whole[f"{MLP}.gate.weight"] = normal(EXPERTS, HIDDEN).bfloat16()
    whole[f"{MLP}.gate.bias"] = normal(EXPERTS)
    return whole


# --- the engines' classes -----------------------------------------------------------------------


class LinearBase(nn.Module):
    pass


class ReplicatedLinear(LinearBase):
    pass


class ColumnParallelLinear(LinearBase):
    output_partition_sizes: list[int]


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class QKVParallelLinear(ColumnParallelLinear):
    num_kv_head_replicas: int


class RowParallelLinear(LinearBase):
    pass


class RMSNorm(nn.Module):
    pass


@dataclass
class ShardIndices:
    org_vocab_start_index: int
    org_vocab_end_index: int


class VocabParallelEmbedding(nn.Module):
    shard_indices: ShardIndices


class ParallelLMHead(VocabParallelEmbedding):
    pass


class FusedMoE(nn.Module):
    ep_size = 1
    expert_map: torch.Tensor | None = None


class Rank:
    """Builds what one rank holds, as the engines' weight loaders cut it."""

    def __init__(self, whole: Whole, rank: int, tp: int) -> None:
        self.whole, self.rank, self.tp = whole, rank, tp

    def _attributes(self, name: str) -> list[str]:
        kinds = ("weight", "weight_scale_inv", "weight_scale", "bias")
        return [kind for kind in kinds if f"{name}.{kind}" in self.whole]

    def _rows(self, name: str, attribute: str, at: int, of: int) -> torch.Tensor:
        t = self.whole[f"{name}.{attribute}"]
        return t if attribute == "weight_scale" else t.tensor_split(of)[at]

    def _columns(self, name: str, attribute: str) -> torch.Tensor:
        t = self.whole[f"{name}.{attribute}"]
        return t if t.dim() < 2 else t.tensor_split(self.tp, dim=1)[self.rank]

    def fill(self, module: nn.Module, values: dict[str, torch.Tensor]) -> Any:
        for name, value in values.items():
            parameter = nn.Parameter(value.clone().contiguous(), requires_grad=False)
            module.register_parameter(name, parameter)
        return module

    def qkv(self) -> nn.Module:
        module = QKVParallelLinear()
        # As both engines compute it.
        module.num_kv_head_replicas = max(1, self.tp // KV_HEADS)
        kv_heads = max(1, KV_HEADS // self.tp)
        module.output_partition_sizes = [HEADS // self.tp * HEAD, kv_heads * HEAD, kv_heads * HEAD]
        copies = module.num_kv_head_replicas
        values = {}
        for attribute in self._attributes(f"{ATTENTION}.q_proj"):
            parts = [self._rows(f"{ATTENTION}.q_proj", attribute, self.rank, self.tp)]
            parts += [
                self._rows(
                    f"{ATTENTION}.{p}_proj", attribute, self.rank // copies, self.tp // copies
                )
                for p in "kv"
            ]
            values[attribute] = torch.cat(parts)
        return self.fill(module, values)  # type: ignore[no-any-return]

    def merged(self) -> nn.Module:
        module = MergedColumnParallelLinear()
        module.output_partition_sizes = [WIDTH // self.tp] * 2
        return self.fill(  # type: ignore[no-any-return]
            module,
            {
                a: torch.cat(
                    [self._rows(f"{MLP}.{p}_proj", a, self.rank, self.tp) for p in ("gate", "up")]
                )
                for a in self._attributes(f"{MLP}.gate_proj")
            },
        )

    def column(self, name: str) -> nn.Module:
        module = ColumnParallelLinear()
        module.output_partition_sizes = [SHAPES[name][0] // self.tp]
        values = {a: self._rows(name, a, self.rank, self.tp) for a in self._attributes(name)}
        return self.fill(module, values)  # type: ignore[no-any-return]

    def row(self, name: str) -> nn.Module:
        values = {a: self._columns(name, a) for a in self._attributes(name)}
        return self.fill(RowParallelLinear(), values)  # type: ignore[no-any-return]

    def whole_of(self, module: nn.Module, name: str) -> nn.Module:
        values = {a: self.whole[f"{name}.{a}"] for a in self._attributes(name)}
        return self.fill(module, values)  # type: ignore[no-any-return]

    def vocabulary(self, module: VocabParallelEmbedding, name: str) -> nn.Module:
        padded = 64 // self.tp  # the vocabulary is padded to a multiple of 64
        start = min(VOCAB, self.rank * padded)
        end = min(VOCAB, start + padded)
        held = torch.full((padded, HIDDEN), 3.0, dtype=torch.bfloat16)
        held[: end - start] = self.whole[f"{name}.weight"][start:end]
        module.shard_indices = ShardIndices(start, end)
        return self.fill(module, {"weight": held})  # type: ignore[no-any-return]

    def experts(self, ids: Sequence[int], *, cut: bool = True) -> FusedMoE:
        """Fuse the experts `ids`; every rank has a cut of each, or some ranks the whole of some."""
        values: dict[str, list[torch.Tensor]] = defaultdict(list)
        at, of = (self.rank, self.tp) if cut else (0, 1)
        for e in ids:
            for a in self._attributes(f"{MOE}.{e}.gate_proj"):
                w13 = [self._rows(f"{MOE}.{e}.{p}_proj", a, at, of) for p in ("gate", "up")]
                w2 = self.whole[f"{MOE}.{e}.down_proj.{a}"]
                values[f"w13_{a}"].append(torch.cat(w13))
                if a == "weight_scale":
                    values[f"w2_{a}"].append(w2.reshape(()))
                else:
                    values[f"w2_{a}"].append(w2.tensor_split(of, dim=1)[at])
        module = FusedMoE()
        return self.fill(module, {n: torch.stack(v) for n, v in values.items()})  # type: ignore[no-any-return]

    def model(self) -> nn.Module:
        attention, mlp = nn.Module(), nn.Module()
        attention.qkv_proj = self.qkv()
        attention.q_b_proj = self.column(f"{ATTENTION}.q_b_proj")
        attention.o_proj = self.row(f"{ATTENTION}.o_proj")
        mlp.gate = self.whole_of(ReplicatedLinear(), f"{MLP}.gate")
        mlp.gate_up_proj = self.merged()
        mlp.down_proj = self.row(f"{MLP}.down_proj")
        mlp.experts = self.experts(range(EXPERTS))
        layer = nn.Module()
        layer.self_attn, layer.mlp = attention, mlp
        inner = nn.Module()
        inner.embed_tokens = self.vocabulary(VocabParallelEmbedding(), "model.embed_tokens")
        inner.layers = nn.ModuleList([layer])
        inner.norm = self.whole_of(RMSNorm(), "model.norm")
        model = nn.Module()
        model.model = inner
        model.lm_head = self.vocabulary(ParallelLMHead(), "lm_head")
        return model


def report(models: Iterable[nn.Module]) -> Report:
    """Return what all ranks tell, and the shards they tell it of."""
    return [
        pair
        for rank, model in enumerate(models)
        for pair in zip(shards(model, rank), describe(shards(model, rank)), strict=True)
    ]


def totals(told: Report) -> dict[str, int]:
    parts: dict[str, list[int]] = defaultdict(list)
    for _, line in told:
        parts[line["name"]] += [from_text(line["digest"])] if line["primary"] else []
    return {name: combine(*values) for name, values in parts.items()}


def differ(told: Report, whole: Whole) -> set[str]:
    """Return the names whose digest is not that of the whole, both ways round."""
    found, wanted = totals(told), {name: digest(t) for name, t in whole.items()}
    return {name for name in found.keys() | wanted if found.get(name) != wanted.get(name)}


# --- laws ---------------------------------------------------------------------------------------

FORMS = ("bf16", "block", "per-tensor")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_the_shards_that_count_add_up_to_every_tensor_of_the_checkpoint(form: str, tp: int) -> None:
    """From two ranks on each has one key and value head; with four and more they share them."""
    whole = checkpoint(form)
    told = report(Rank(whole, rank, tp).model() for rank in range(tp))
    assert differ(told, whole) == set()


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_every_rectangle_counts_once_and_its_copies_are_alike(form: str, tp: int) -> None:
    whole = checkpoint(form)
    told = report(Rank(whole, rank, tp).model() for rank in range(tp))
    places: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for shard, line in told:
        if shard.tensor.numel():
            places[line["name"], line["row"], line["column"]].append(line)
    for copies in places.values():
        assert sum(line["primary"] for line in copies) == 1
        assert len({line["digest"] for line in copies}) == 1
    copied = {name for (name, _, _), copies in places.items() if len(copies) > 1}
    shared = any(name.startswith(f"{ATTENTION}.k_proj.weight") for name in copied)
    assert shared == (tp > KV_HEADS or (tp > 1 and form == "per-tensor"))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_shard_is_the_rectangle_that_it_says_it_is(tp: int) -> None:
    whole = checkpoint("block")
    for shard, line in report(Rank(whole, rank, tp).model() for rank in range(tp)):
        n, k = [*shard.tensor.shape, 1][:2]
        source = whole[shard.name].view(whole[shard.name].shape[0], -1)
        source = source[shard.row : shard.row + n, shard.column : shard.column + k]
        bits = torch.uint8
        assert torch.equal(
            shard.tensor.reshape(n, k).contiguous().view(bits), source.contiguous().view(bits)
        )
        assert line["shape"] == list(shard.tensor.shape)
        assert line["dtype"] == str(whole[shard.name].dtype).removeprefix("torch.")


def test_a_shard_is_a_view_of_what_the_engine_reads() -> None:
    model = Rank(checkpoint("block"), 0, 1).model()
    parameter = model.get_parameter(f"{ATTENTION}.qkv_proj.weight")
    [key] = [s for s in shards(model, 0) if s.name == f"{ATTENTION}.k_proj.weight"]
    assert key.tensor.data_ptr() == parameter.data_ptr() + HEADS * HEAD * HIDDEN
    assert key.tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_experts_that_live_whole_on_one_rank_keep_their_numbers(form: str, ep: int) -> None:
    """Expert parallelism: `expert_map` gives global id -> local id or -1, in both engines."""
    whole = {n: t for n, t in checkpoint(form).items() if n.startswith(MOE)}
    models = []
    for rank in range(ep):
        count = EXPERTS // ep
        ids = range(rank * count, (rank + 1) * count)
        experts = Rank(whole, rank, ep).experts(ids, cut=False)
        if ep > 1:
            experts.ep_size = ep
            experts.expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
            experts.expert_map[ids[0] : ids[-1] + 1] = torch.arange(count, dtype=torch.int32)
        models.append(nest(MOE, experts))
    assert differ(report(models), whole) == set()


def test_experts_that_are_placed_in_another_order_keep_their_numbers() -> None:
    whole = {n: t for n, t in checkpoint("block").items() if n.startswith(MOE)}
    models = []
    for rank, ids in enumerate([(2, 0), (3, 1)]):
        experts = Rank(whole, rank, 2).experts(ids, cut=False)
        experts.ep_size = 2
        experts.expert_map = torch.full((EXPERTS,), -1)
        experts.expert_map[list(ids)] = torch.arange(2)
        models.append(nest(MOE, experts))
    assert differ(report(models), whole) == set()


def test_experts_of_mixtral_have_the_names_of_its_checkpoint() -> None:
    whole = checkpoint("block")
    prefix = f"{LAYER}.block_sparse_moe.experts"
    model = nest(prefix, Rank(whole, 0, 1).experts(range(EXPERTS)))
    spelling = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    wanted = {}
    for name, t in whole.items():
        if name.startswith(MOE):
            expert, part, rest = name.removeprefix(f"{MOE}.").split(".")
            wanted[f"{prefix}.{expert}.{spelling[part]}.{rest}"] = t
    assert differ(report([model]), wanted) == set()


def nest(path: str, module: nn.Module) -> nn.Module:
    """Return a model in which `module` has the name `path`."""
    for name in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(name, module)
        module = outer
    return module


# --- hazards ------------------------------------------------------------------------------------


def swap_rows(t: torch.Tensor, a: int, b: int, count: int) -> None:
    bits = t.view(torch.uint8)
    kept = bits[a : a + count].clone()
    bits[a : a + count] = bits[b : b + count]
    bits[b : b + count] = kept


@pytest.mark.parametrize("tp", [1, 2])
def test_two_parts_of_a_fused_module_in_the_wrong_order_are_seen(tp: int) -> None:
    whole = checkpoint("block")
    models = [Rank(whole, rank, tp).model() for rank in range(tp)]
    half = WIDTH // tp
    swap_rows(models[0].get_parameter(f"{MLP}.gate_up_proj.weight"), 0, half, half)
    assert differ(report(models), whole) == {f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"}


def test_two_experts_in_the_wrong_order_are_seen() -> None:
    whole = checkpoint("block")
    model = Rank(whole, 0, 1).model()
    swap_rows(model.get_parameter(f"{MOE}.w2_weight"), 1, 2, 1)
    wrong = {f"{MOE}.{e}.down_proj.weight" for e in (1, 2)}
    assert differ(report([model]), whole) == wrong


def test_two_ranks_with_each_others_part_are_seen() -> None:
    whole = checkpoint("block")
    models = [Rank(whole, rank, 2).model() for rank in (0, 1)]
    a, b = (m.get_parameter(f"{MLP}.down_proj.weight") for m in models)
    a.data, b.data = b.data, a.data
    assert differ(report(models), whole) == {f"{MLP}.down_proj.weight"}


def test_one_scale_of_a_fused_module_is_told_by_the_name_of_its_part() -> None:
    for form, row in (("block", HEADS * HEAD // BLOCK[0]), ("per-tensor", 1)):
        whole = checkpoint(form)
        kind = "weight_scale_inv" if form == "block" else "weight_scale"
        model = Rank(whole, 0, 1).model()
        model.get_parameter(f"{ATTENTION}.qkv_proj.{kind}").data[row] *= 2
        assert differ(report([model]), whole) == {f"{ATTENTION}.k_proj.{kind}"}


def test_a_copy_that_differs_does_not_hide_behind_the_one_that_counts() -> None:
    whole = checkpoint("block")
    models = [Rank(whole, rank, 4).model() for rank in range(4)]
    # Rank 1 holds the same key heads as rank 0, which counts for both.
    weight = models[1].get_parameter(f"{ATTENTION}.qkv_proj.weight").view(torch.uint8)
    weight[HEADS // 4 * HEAD] ^= 1
    told = report(models)
    assert differ(told, whole) == set()
    name = f"{ATTENTION}.k_proj.weight"
    copies = {line["digest"] for _, line in told if (line["name"], line["row"]) == (name, 0)}
    assert len(copies) == 2


def test_the_padding_of_the_vocabulary_is_no_part_of_it() -> None:
    whole = checkpoint("bf16")
    model = Rank(whole, 0, 1).model()
    model.get_parameter("lm_head.weight").data[VOCAB:] = -1
    assert differ(report([model]), whole) == set()
    model.get_parameter("lm_head.weight").data[VOCAB - 1] = -1
    assert differ(report([model]), whole) == {"lm_head.weight"}


def test_a_form_of_the_engine_is_turned_back_and_what_has_none_is_left_out() -> None:
    whole = {"down.weight": torch.arange(12.0).view(3, 4), "down.scale": torch.ones(1)}
    module = RowParallelLinear()
    module.weight = nn.Parameter(whole["down.weight"].t().contiguous())
    module.input_scale = nn.Parameter(torch.ones(1))
    module.scale = nn.Parameter(torch.ones(1))

    def form(_module: nn.Module, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
        return None if attribute == "input_scale" else t.t() if attribute == "weight" else t

    lines = describe(shards(nest("down", module), 0, form))
    assert {str(line["name"]): from_text(str(line["digest"])) for line in lines} == {
        name: digest(t) for name, t in whole.items()
    }


def test_a_layer_that_nobody_knows_is_reported_whole_under_its_own_name() -> None:
    model = nest("model.mystery", nn.Linear(3, 2))
    found = {s.name: (s.row, s.column, s.primary) for s in shards(model, 1)}
    assert found == {
        "model.mystery.weight": (0, 0, False),
        "model.mystery.bias": (0, 0, False),
    }


def test_a_layer_says_itself_how_it_was_cut() -> None:
    """Data-parallel attention: whole on every rank, whatever the rank in the model."""
    seen = set()
    for rank in range(2):
        layer = type("QKVParallelLinear", (torch.nn.Module,), {})()
        layer.tp_rank, layer.num_kv_head_replicas = 0, 1
        layer.output_partition_sizes = [4, 2, 2]
        layer.weight = torch.nn.Parameter(torch.zeros(8, 4))
        outer = torch.nn.Module()
        outer.qkv_proj = layer
        seen |= {shard.row for shard in shards(outer, rank)}
    assert seen == {0}


@pytest.mark.parametrize("form", ["bf16", "block"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_modules_that_are_fused_on_disk_too_are_shown_as_such(form: str, tp: int) -> None:
    """Phi-3: q, k and v stand in one tensor, one behind the other, on every rank its part of each.

    With more ranks than key heads, neighbours hold the same.
    """
    whole = checkpoint(form)
    parts = {
        f"{ATTENTION}.qkv_proj": [f"{ATTENTION}.{p}_proj" for p in "qkv"],
        f"{MLP}.gate_up_proj": [f"{MLP}.{p}_proj" for p in ("gate", "up")],
    }
    kinds = ["weight"] if form == "bf16" else ["weight", "weight_scale_inv"]
    fused = {
        f"{name}.{kind}": torch.cat([whole[f"{one}.{kind}"] for one in ones])
        for name, ones in parts.items()
        for kind in kinds
    }
    told = []
    for rank in range(tp):
        model = Rank(whole, rank, tp).model()
        for name in parts:
            model.get_submodule(name).tp_size = tp  # type: ignore[assignment]
        held = list(Walk(model, rank, on_disk=set(fused)).shards())
        told += list(zip(held, describe(held), strict=True))
    found = totals(told)
    assert {name: found[name] for name in fused} == {n: digest(t) for n, t in fused.items()}
    assert not {f"{ATTENTION}.q_proj.weight", f"{MLP}.up_proj.weight"} & set(found)


def test_one_scale_on_disk_is_that_of_every_part() -> None:
    layer = MergedColumnParallelLinear()
    layer.output_partition_sizes = [4, 4]
    layer.weight_scale = nn.Parameter(torch.tensor([2.0, 2.0]))
    layer.weight = nn.Parameter(torch.zeros(8, 4))
    model = nest("gate_up_proj", layer)
    held = [
        s for s in Walk(model, 0, on_disk={"gate_up_proj.weight"}).shards() if "scale" in s.name
    ]
    assert [(s.name, s.primary) for s in held] == [
        ("gate_up_proj.weight_scale", True),
        ("gate_up_proj.weight_scale", False),
    ]


def test_the_first_projections_of_latent_attention_are_told_apart() -> None:
    """SGLang fuses q_a_proj and kv_a_proj_with_mqa; scales end in half a block."""
    whole = {
        f"{ATTENTION}.q_a_proj.weight": torch.randn(32, HIDDEN).to(torch.float8_e4m3fn),
        f"{ATTENTION}.kv_a_proj_with_mqa.weight": torch.randn(20, HIDDEN).to(torch.float8_e4m3fn),
        f"{ATTENTION}.q_a_proj.weight_scale_inv": torch.randn(4, 4),
        f"{ATTENTION}.kv_a_proj_with_mqa.weight_scale_inv": torch.randn(3, 4),
    }
    layer: Any = ReplicatedLinear()
    for kind in ("weight", "weight_scale_inv"):
        parts = [whole[f"{ATTENTION}.{p}.{kind}"] for p in ("q_a_proj", "kv_a_proj_with_mqa")]
        bits = [p.view(torch.uint8) if kind == "weight" else p for p in parts]
        value = torch.cat(bits)
        value = value.view(torch.float8_e4m3fn) if kind == "weight" else value
        layer.register_parameter(kind, nn.Parameter(value, requires_grad=False))
    layer.quant_method = type("Fp8LinearMethod", (), {})()
    layer.quant_method.quant_config = type("Fp8Config", (), {"weight_block_size": [8, 16]})()
    attention: Any = nn.Module()
    attention.q_lora_rank = 32
    attention.fused_qkv_a_proj_with_mqa = layer
    told = report([nest(ATTENTION, attention), nest(ATTENTION, attention)])
    assert differ(told, whole) == set()


def test_a_walk_goes_on_where_it_was_left() -> None:
    model = Rank(checkpoint("block"), 0, 1).model()
    every = [shard.name for shard in shards(model, 0)]
    walked, start = [], 0
    while True:
        number, held = next(Walk(model, 0).by_module(start), (None, []))
        if number is None:
            break
        walked += [shard.name for shard in held]
        start = number + 1
    assert walked == every
