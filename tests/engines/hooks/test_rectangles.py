"""What digests have proven is copied, to the same bytes as by the loaders."""

from __future__ import annotations

import pytest
import torch

from fp8ctl.engines.hooks.rectangles import LOADERS_ONLY, _together, _widened, copy
from tests.engines.hooks.receiving import GATE, NORM, Server, bits, serve, servers
from tests.engines.hooks.test_shards import ATTENTION, FORMS, Whole, checkpoint

__all__ = ["servers"]  # a fixture


def another(whole: Whole) -> Whole:
    """Return a checkpoint in which every element is another one."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: (torch.randn(t.shape, generator=generator) + t.float() + 8).to(t.dtype)
        for name, t in whole.items()
    }


def scales(whole: Whole) -> set[str]:
    return {name for name in whole if name.endswith("weight_scale")}


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


def test_what_is_known_of_a_bucket_holds_only_while_nothing_moves(servers: list[Server]) -> None:
    """Updates of which each would copy as the one before: to a parameter that is elsewhere now."""
    whole, second = checkpoint("block"), another(checkpoint("block"))
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    server.push(second)
    server.push(whole)
    model = server.loading[0].model
    norm = model.get_parameter(NORM)
    kept = [norm.data]
    norm.data = torch.zeros_like(norm.data)
    assert server.push(second) == {"loaders": 0, "copies": len(whole)}
    assert server.unequal(second) == set()
    # Another parameter in its place, and another module.
    model.model.norm.weight = torch.nn.Parameter(torch.zeros_like(norm.data))
    assert server.push(whole) == {"loaders": 0, "copies": len(whole)}
    assert server.unequal(whole) == set()
    inner = torch.nn.Module()
    inner.weight = torch.nn.Parameter(torch.zeros_like(norm.data))
    kept.append(model.model.norm.weight.data)
    model.model.norm = inner
    assert server.push(second) == {"loaders": 0, "copies": len(whole)}
    assert server.unequal(second) == set()
    assert torch.equal(bits(kept[1]), bits(whole[NORM])), "the old one is left as it was"


def test_what_is_known_of_a_bucket_ends_with_trust(servers: list[Server]) -> None:
    whole, second = checkpoint("block"), another(checkpoint("block"))
    server = serve(servers, whole)
    server.push(whole)
    server.trust([NORM])
    assert server.push(whole)["copies"] == 1
    server.trust(whole)
    assert server.push(second)["copies"] == len(whole), "more of the same bucket is trusted"
    server.ranks[0].answer("forget", {})
    assert server.push(whole) == {"loaders": len(whole), "copies": 0}
    assert server.unequal(whole) == set()


@pytest.mark.parametrize("other", ["order", "place", "part"])
def test_another_bucket_under_the_same_number_is_seen(other: str, servers: list[Server]) -> None:
    whole, second = checkpoint("block"), another(checkpoint("block"))
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    up = GATE.replace("gate", "up")
    server.ranks[0].answer(
        "receive", {**server.write([(GATE, whole[GATE]), (up, whole[up])]), "number": 0}
    )
    named = [(GATE, second[GATE]), (up, second[up])]
    if other == "order":
        asked = server.write(named[::-1])
    elif other == "place":
        asked = server.write([(NORM, second[NORM]), *named])
    else:
        asked = server.write(named[1:])
    answer = server.ranks[0].answer("receive", {**asked, "number": 0})
    assert (answer["error"], answer["ways"]["loaders"]) == ("", 0)
    sent = [entry["name"] for entry in asked["entries"]]
    assert server.unequal({name: second[name] for name in sent}) == set()
    assert set(sent) <= server.unequal(whole)
    if other == "part":
        assert GATE not in server.unequal(whole), "only what was sent"


def test_no_more_is_kept_than_two_updates_brought(servers: list[Server]) -> None:
    """A trainer may send in another order every time."""
    whole = checkpoint("block")
    server = serve(servers, whole)
    server.push(whole)
    server.trust(whole)
    rectangles = server.ranks[0]._rectangles
    names = list(whole)
    for shift in range(1, 6):
        server.push({name: whole[name] for name in [*names[shift:], *names[:shift]]})
        assert len(rectangles._parts) + len(rectangles._before) <= 2 * (len(whole) // 20 + 1)
    assert len(server.ranks[0]._known_entries) == len(whole) // 20 + 1
    server.ranks[0].answer("disconnect", {})
    left = rectangles._parts, rectangles._before, server.ranks[0]._known_entries
    assert left == ({}, {}, {})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "count"), [(0, 16), (0, 15), (1, 16), (4, 8), (8, 0)])
def test_words_of_8_bytes_are_as_many_as_there_are(
    dtype: torch.dtype, start: int, count: int
) -> None:
    """Whatever a tensor's place and length: nothing beside it is written."""
    source = torch.arange(1, 65).to(dtype)
    target = torch.zeros(64, dtype=dtype)
    to, part = target[start : start + count], source[start : start + count]
    copy(_together([[_widened(to, part)]]))
    assert torch.equal(to, part)
    assert not target[:start].any()
    assert not target[start + count :].any()


def test_what_is_cut_is_copied_apart_from_what_is_whole() -> None:
    """One that is not dense makes torch copy a whole list one by one."""
    dense = torch.zeros(5), torch.rand(5)
    cut = torch.zeros(4, 4), torch.rand(4, 8)[:, 4:]
    moves = _together([[_widened(*dense)], [_widened(*cut)], [_widened(*dense)]])
    assert [len(to) for to, _ in moves] == [2, 1]
    copy(moves)
    assert torch.equal(*dense)
    assert torch.equal(*cut)
