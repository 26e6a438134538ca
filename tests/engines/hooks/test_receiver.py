"""Buckets go into a model by its loaders; what digests have proven is copied, to the same bytes.

The models are those of `test_shards`: the engines' class names, filled as the engines' weight
loaders cut a checkpoint. The loader here is that same cutting, written without `shards`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import wire
from fp8ctl.carriers import ends
from fp8ctl.engines.hooks.receiver import Engine, Receiver, view
from fp8ctl.engines.hooks.rectangles import LOADERS_ONLY
from fp8ctl.held import gather
from fp8ctl.kernels.digest import digest, to_text
from tests.engines.hooks.test_shards import (
    ATTENTION,
    FORMS,
    MLP,
    Rank,
    Whole,
    checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
GATE, NORM = f"{MLP}.gate_proj.weight", "model.norm.weight"
SLOT = 1 << 20


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().view(BITS[t.element_size()])


def another(whole: Whole) -> Whole:
    """Return a checkpoint in which every element is another one."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: (torch.randn(t.shape, generator=generator) + t.float() + 8).to(t.dtype)
        for name, t in whole.items()
    }


class Loading:
    """A model of one rank with the `load_weights` of an engine.

    Attributes:
        names: what the loaders were given.
        fails: a name at which they raise.
    """

    def __init__(self, whole: Whole, rank: int, tp: int) -> None:
        self.model: Any = Rank(whole, rank, tp).model()
        self.model.load_weights = self._load  # type: ignore[assignment]
        self.whole = dict(whole)
        self.rank, self.tp = rank, tp
        self.names: list[str] = []
        self.fails = ""

    def _load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        marks = {n: torch.zeros_like(bits(t)) for n, t in self.whole.items()}
        for name, tensor in named:
            if name == self.fails:
                raise ValueError(f"{name}: shape mismatch")
            self.names.append(name)
            self.whole[name] = tensor.clone()
            marks[name] -= 1
        values, marked = self._cut(self.whole), self._cut(self._like(marks))
        nothing = self._cut(self._like({n: torch.zeros_like(m) for n, m in marks.items()}))
        for key, parameter in self.model.named_parameters():
            here = bits(marked[key]) != bits(nothing[key])
            bits(parameter)[here] = bits(values[key])[here]

    def _like(self, marks: dict[str, torch.Tensor]) -> Whole:
        return {name: mark.view(self.whole[name].dtype) for name, mark in marks.items()}

    def _cut(self, whole: Whole) -> dict[str, torch.Tensor]:
        return dict(Rank(whole, self.rank, self.tp).model().named_parameters())


def no_scales(_module: nn.Module, attribute: str, t: torch.Tensor) -> torch.Tensor | None:
    """Per-tensor scales have a copy for the kernels: their loaders do more than copy."""
    return None if attribute.endswith("weight_scale") else t


class Settled:
    """What an engine is told to bring up to date, and what its guard is asked."""

    def __init__(self) -> None:
        self.settled = 0
        self.asked: list[str] = []
        self.obstacles: list[str] = []

    def engine(self) -> Engine:
        return Engine(
            form=lambda _model: lambda _module, _attribute, t: t,
            copies=lambda _model: no_scales,
            obstacles=lambda _model: self.obstacles,
            guard=self._guard,
            settle=self._settle,
        )

    def _guard(self, function: str, _model: nn.Module) -> Any:
        self.asked.append(function)
        return {}

    def _settle(self, _model: nn.Module) -> None:
        self.settled += 1


class Server:
    """All ranks of a server, and a trainer that sends them everything in a few buckets."""

    def __init__(self, whole: Whole, tp: int = 1) -> None:
        self.loading = [Loading(whole, rank, tp) for rank in range(tp)]
        self.settled = Settled()
        self.ranks = [Receiver(m.model, m.rank, self.settled.engine()) for m in self.loading]
        self.sender = ends.sender("memory", SLOT)
        for rank in self.ranks:
            rank.connect(self.sender.offer())

    def close(self) -> None:
        for rank in self.ranks:
            rank.disconnect()
        self.sender.close()

    def write(self, named: Sequence[tuple[str, torch.Tensor]], slot: int = 0) -> dict[str, Any]:
        """Fill a slot; return what "receive" is asked with."""
        slots = [
            wire.Slot(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in named
        ]
        offsets, nbytes = wire.place(slots)
        entries = []
        for one, offset, (_, tensor) in zip(slots, offsets, named, strict=True):
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            self.sender.buffer(slot)[offset : offset + raw.numel()] = raw
            entries.append(wire.Entry(one.name, one.dtype, one.shape, offset).to_json())
        return {"slot": slot, "nbytes": nbytes, "entries": entries}

    def push(self, whole: Whole) -> dict[str, int]:
        """Send a checkpoint; return how many tensors went which way on rank 0."""
        ways = {"loaders": 0, "copies": 0}
        names = list(whole)
        for number, start in enumerate(range(0, len(names), 20)):
            named = [(name, whole[name]) for name in names[start : start + 20]]
            asked = self.write(named, number % 2)
            answers = [rank.answer("receive", {**asked, "number": number}) for rank in self.ranks]
            assert [a["error"] for a in answers] == [""] * len(answers)
            assert {a["loaded"] for a in answers} == {len(named)}
            for way, count in answers[0]["ways"].items():
                ways[way] += count
        return ways

    def unequal(self, whole: Whole) -> set[str]:
        """Return the names that are not what was sent, by the digests of all ranks."""
        held = gather(rank.answer("digests", {}) for rank in self.ranks)
        return {
            name
            for name, t in whole.items()
            if name not in held
            or held[name].text != to_text(digest(t))
            or not held[name].replicas_agree
        }

    def trust(self, names: Iterable[str]) -> int:
        told = [rank.answer("trust", {"names": list(names)})["trusted"] for rank in self.ranks]
        return int(told[0])

    def memory(self) -> list[dict[str, torch.Tensor]]:
        return [{n: bits(t) for n, t in m.model.named_parameters()} for m in self.loading]


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made: list[Server] = []
    yield made
    for server in made:
        server.close()


def serve(servers: list[Server], whole: Whole, tp: int = 1) -> Server:
    servers.append(Server(whole, tp))
    return servers[-1]


def scales(whole: Whole) -> set[str]:
    return {name for name in whole if name.endswith("weight_scale")}


# --- copies are what the loaders write ----------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_copies_leave_the_same_bytes_as_the_loaders(
    form: str, tp: int, servers: list[Server]
) -> None:
    """Fused, cut by rows and columns, shared key heads, padded vocabulary, experts."""
    first, second = checkpoint(form), another(checkpoint(form))
    copying, loading = serve(servers, second, tp), serve(servers, second, tp)
    for server in (copying, loading):
        assert server.push(first) == {"loaders": len(first), "copies": 0}
        assert server.unequal(first) == set()
    plain = set(first) - scales(first)
    copying.trust(first)
    assert copying.push(second) == {"loaders": len(first) - len(plain), "copies": len(plain)}
    assert loading.push(second) == {"loaders": len(first), "copies": 0}
    for one, other in zip(copying.memory(), loading.memory(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert copying.unequal(second) == set()


def test_only_what_came_through_its_loader_and_was_verified_is_copied(
    servers: list[Server],
) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    assert server.trust(whole) == 0, "the checkpoint at the start was not pushed"
    server.push({name: t for name, t in whole.items() if name != GATE})
    assert server.trust([GATE]) == 0
    assert server.trust([NORM]) == 1
    assert server.push(whole)["copies"] == 1


def test_a_tensor_that_would_look_the_same_elsewhere_is_left_to_its_loader(
    servers: list[Server],
) -> None:
    whole = checkpoint("block")
    whole[NORM] = torch.ones_like(whole[NORM])
    twins = [f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"]
    whole[twins[0]] = whole[twins[1]].clone()
    server = serve(servers, whole)
    server.push(whole)
    assert server.unequal(whole) == set()
    assert server.trust(whole) == len(whole) - 3
    server.loading[0].names.clear()
    server.push(whole)
    assert sorted(server.loading[0].names) == sorted([NORM, *twins])


def test_another_type_or_shape_than_memorys_is_the_loaders_business(
    servers: list[Server],
) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    server.loading[0].names.clear()
    for other in (whole[NORM].float(), whole[NORM][:8].clone(), whole[NORM].view(1, -1)):
        asked = server.write([(NORM, other)])
        server.loading[0].fails = NORM
        answer = server.ranks[0].answer("receive", {**asked, "number": 0})
        assert "shape mismatch" in answer["error"], "it went to the loader"
        server.ranks[0].broken = False


@pytest.mark.parametrize("way", ["forgotten", "broken", "switched off"])
def test_trust_ends(way: str, servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    assert server.push(whole)["copies"] == len(whole)
    if way == "forgotten":
        server.ranks[0].answer("forget", {})
    elif way == "broken":
        server.ranks[0].broken = True
        assert server.ranks[0].answer("progress", {"expected": []})["broken"]
    else:
        monkeypatch.setenv(LOADERS_ONLY, "1")
    assert server.push(whole) == {"loaders": len(whole), "copies": 0}


@pytest.mark.parametrize("wrong", ["gate and up", "key heads", "vocabulary", "ranks"])
def test_a_rectangle_that_is_elsewhere_is_seen_while_the_loaders_still_write(
    wrong: str, servers: list[Server]
) -> None:
    """The layer says something wrong of itself; the loader does not ask it.

    Digests of what was copied could not see it: they would look where the copies went.
    """
    whole = checkpoint("block")
    server = serve(servers, another(whole), 4)
    for made in server.loading:
        inner = made.model.model
        attention, mlp = inner.layers[0].self_attn, inner.layers[0].mlp
        if wrong == "gate and up":
            mlp.gate_up_proj.output_partition_sizes = [16, 48]
        elif wrong == "key heads":
            attention.qkv_proj.num_kv_head_replicas = 1
        elif wrong == "vocabulary":
            inner.embed_tokens.shard_indices.org_vocab_start_index += 1
        else:
            attention.q_b_proj.tp_rank = 3 - made.rank
    server.push(whole)
    seen = server.unequal(whole)
    assert seen
    # A session trusts nothing of such an update. The others alone would be right.
    server.trust(set(whole) - seen)
    server.loading[0].names.clear()
    server.push(whole)
    assert seen <= set(server.loading[0].names)


def test_a_copy_that_went_elsewhere_is_seen(servers: list[Server]) -> None:
    whole, second = checkpoint("block"), another(checkpoint("block"))
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    held = server.ranks[0]._rectangles.held()
    up = GATE.replace("gate", "up")
    held[GATE], held[up] = held[up], held[GATE]
    asked = server.write([(GATE, second[GATE]), (up, second[up])])
    server.ranks[0].answer("receive", {**asked, "number": 1})
    assert server.unequal({name: second[name] for name in (GATE, up)}) == {GATE, up}


def test_the_engines_own_reload_takes_trust_away(servers: list[Server]) -> None:
    """It may bring the weights into another form."""
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    server.ranks[0].load([(NORM, whole[NORM])])
    assert server.push(whole) == {"loaders": len(whole), "copies": 0}


def test_parameters_that_moved_are_found_by_the_next_update(servers: list[Server]) -> None:
    whole, second = checkpoint("block"), another(checkpoint("block"))
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    norm = server.loading[0].model.get_parameter(NORM)
    norm.data = norm.data.clone()
    assert server.push(second)["loaders"] == 0
    assert torch.equal(bits(norm), bits(second[NORM]))


# --- a bucket -----------------------------------------------------------------------------------


def test_a_tensor_is_a_view_of_its_bucket() -> None:
    bucket = torch.arange(2048, dtype=torch.int64).to(torch.uint8)
    entry = wire.Entry("a", "bfloat16", (3, 4), 512)
    found = view(bucket, entry)
    assert (found.dtype, tuple(found.shape)) == (torch.bfloat16, (3, 4))
    assert found.data_ptr() == bucket.data_ptr() + 512
    codes = view(bucket, wire.Entry("a", "float8_e4m3fn", (2, 5), 256))
    assert torch.equal(codes.view(torch.uint8).flatten(), bucket[256:266])
    assert view(bucket, wire.Entry("a", "float32", (), 0)).shape == ()
    assert view(bucket, wire.Entry("a", "float32", (0, 4), 0)).shape == (0, 4)


def test_what_fails_before_a_weight_is_written_breaks_nothing(
    servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    before = server.memory()[0]
    asked = server.write([(NORM, torch.zeros_like(whole[NORM]))])
    [entry] = asked["entries"]
    for wrong in (
        {**asked, "slot": 7},
        {**asked, "nbytes": SLOT * 2},
        {**asked, "nbytes": 8},
        {**asked, "entries": [{**entry, "dtype": "float4"}]},
        {**asked, "entries": [entry, entry]},
    ):
        answer = server.ranks[0].answer("receive", {**wrong, "number": 0})
        assert answer["error"]
        assert (answer["loaded"], answer["broken"]) == (0, False)
    server.ranks[0].disconnect()
    answer = server.ranks[0].answer("receive", {**asked, "number": 0})
    assert "no carrier is open" in answer["error"]
    assert not answer["broken"]
    assert all(torch.equal(before[n], t) for n, t in server.memory()[0].items())
    capsys.readouterr()


def test_a_loader_that_raises_leaves_the_weights_broken_until_a_new_count(
    servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.loading[0].fails = NORM
    asked = server.write([(GATE, whole[GATE]), (NORM, whole[NORM])])
    answer = server.ranks[0].answer("receive", {**asked, "number": 0})
    assert (answer["loaded"], answer["broken"]) == (0, True)
    assert answer["error"] == f"ValueError: {NORM}: shape mismatch"
    told = server.ranks[0].answer("progress", {"expected": [GATE, NORM]})
    assert (told["broken"], told["missing"]) == (True, [GATE, NORM])
    assert server.settled.asked == ["fp8ctl_forget", "fp8ctl_unfilled"]
    assert server.settled.settled == 0, "derived from half a set"
    assert "Traceback" in capsys.readouterr().err


def test_progress_brings_up_to_date_what_the_engine_derives_once(servers: list[Server]) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.push(whole)
    for _ in range(2):
        told = server.ranks[0].answer("progress", {"expected": [*whole, "other"]})
        assert (told["broken"], told["missing"], told["missing_count"]) == (False, ["other"], 1)
    assert server.settled.settled == 1


def test_what_an_engine_loads_by_its_own_route_counts_too(servers: list[Server]) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    receiver = server.ranks[0]
    receiver.load([(NORM, whole[NORM])])
    assert receiver.arrived == {NORM}
    server.loading[0].fails = GATE
    with pytest.raises(ValueError, match="shape mismatch"):
        receiver.load([(GATE, whole[GATE])])
    assert receiver.broken


def test_a_new_offer_closes_the_carrier_before_it(servers: list[Server]) -> None:
    server = serve(servers, checkpoint("bf16"))
    first = server.ranks[0]._carrier
    assert first is not None
    assert server.ranks[0].answer("connect", {"carrier": server.sender.offer()}) == {
        "device": "cpu"
    }
    with pytest.raises(Exception, match="slot"):
        first.bucket(0, 8)
    assert server.ranks[0].answer("disconnect", {}) == {}
    assert server.ranks[0].answer("disconnect", {}) == {}, "a second time"


def test_a_model_that_cannot_be_loaded_twice_says_why(servers: list[Server]) -> None:
    server = serve(servers, checkpoint("bf16"))
    assert server.ranks[0].answer("refittable", {}) == {"refittable": True, "why": ""}
    server.settled.obstacles = ["the patch `refit` is not applied", "and more", "and more"]
    assert server.ranks[0].answer("refittable", {}) == {
        "refittable": False,
        "why": "the patch `refit` is not applied (and 2 more)",
    }


def test_a_question_that_nobody_knows_is_an_error(servers: list[Server]) -> None:
    server = serve(servers, checkpoint("bf16"))
    with pytest.raises(ValueError, match="'nonsense'"):
        server.ranks[0].answer("nonsense", {})


def test_names_are_those_of_the_checkpoint_and_say_what_is_one_memory() -> None:
    whole = checkpoint("block")
    rank = Loading(whole, 0, 2)
    receiver = Receiver(rank.model, 0, Settled().engine())
    told = receiver.answer("names", {})
    assert sorted(told["names"]) == sorted({held["name"] for held in receiver.digests()["tensors"]})
    assert told["same"] == {}
    rank.model.other = torch.nn.Module()
    rank.model.other.weight = rank.model.get_parameter(NORM)
    assert receiver.names()["same"] == {"other.weight": NORM}
    assert receiver.names()["names"] == [*told["names"], "other.weight"]


def test_on_a_gpu_digests_are_compiled_when_a_client_connects() -> None:
    """Else the first update would do it with the gate closed; what fails then, fails there."""
    asked: list[str] = []

    class Compiling(Receiver):
        device = torch.device("cuda")

        def digests(self, start: int | None = 0, most: int | None = None) -> dict[str, Any]:
            asked.append("digests")
            raise RuntimeError("no compiler")

    def carrier(*_: object) -> Any:
        asked.append("carrier")

    rank = Loading(checkpoint("block"), 0, 1)
    receiver = Compiling(rank.model, 0, Settled().engine(), open_carrier=carrier)
    assert receiver.connect({}) == {"device": "cuda"}
    assert asked == ["carrier", "digests"]
    asked.clear()
    Receiver(rank.model, 0, Settled().engine(), open_carrier=carrier).connect({})
    assert asked == ["carrier"], "on a CPU they take a while, and nothing is compiled"
