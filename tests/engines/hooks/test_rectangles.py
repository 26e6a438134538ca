"""What digests have proven is copied, to the same bytes as by the loaders."""

from __future__ import annotations

import pytest
import torch

from fp8ctl.engines.hooks.rectangles import LOADERS_ONLY
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
