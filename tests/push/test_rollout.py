"""An update ends with all servers serving exactly what the plan's checkpoint holds."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import wire
from fp8ctl.errors import BusyError, ConflictError, UsageError
from fp8ctl.formats import Mode
from fp8ctl.kernels import reference
from fp8ctl.kernels.groups import block
from fp8ctl.push import Progress, Rollout, Update
from fp8ctl.stream import quantize_weights
from tests.push.serving import Server, serving
from tests.test_stream import PLAN, WEIGHTS, Source, planned, wanted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

Named = tuple[str, torch.Tensor]


#: The weights of another step.
CHANGED = {name: t + t.roll(1, 0) for name, t in WEIGHTS.items()}


def quantised(weights: Mapping[str, torch.Tensor]) -> list[Named]:
    return [(name, t.contiguous()) for name, t in quantize_weights(weights.items(), PLAN)]


def holds(server: Server, expected: Iterable[Named]) -> bool:
    """Say whether every rank has these tensors, bit for bit and no others."""
    pairs = dict(expected)
    return all(
        set(held) == set(pairs)
        and all(
            held[name].dtype == tensor.dtype
            and held[name].shape == tensor.shape
            and torch.equal(
                held[name].contiguous().view(torch.uint8),
                tensor.contiguous().view(torch.uint8),
            )
            for name, tensor in pairs.items()
        )
        for held in server.table.held
    )


def update(rollout: Rollout, source: Source, how: str, version: str, **more: Any) -> Update:
    if how == "sync":
        return rollout.update(source.sync(), version, **more)
    its = source.sync() if how == "sync source" else source.asynchronous()
    return asyncio.run(rollout.aupdate(its, version, **more))


HOW = ("sync", "sync source", "async source")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("bucket", [1, 9000, 1 << 30])
@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
def test_servers_hold_what_the_checkpoint_holds(how: str, bucket: int, mode: Mode) -> None:
    plan = planned(WEIGHTS, mode)
    with (
        serving(plan, ranks=2) as one,
        serving(plan) as other,
        Rollout([one.url, other.url], plan, bucket_bytes=bucket) as rollout,
    ):
        for version in ("1", "2"):
            source = Source(WEIGHTS.items())
            done = update(rollout, source, how, version)
            assert source.closed
            assert done.version == version
            for server in (one, other):
                assert holds(server, wanted(mode))
                assert server.state == "ready"
                assert server.gate.about["version"] == version
        tensors = dict(wanted(mode))
        assert done.sent == done.verified == len(tensors)
        assert done.bytes_sent == sum(t.numel() * t.element_size() for t in tensors.values())
        assert (done.buckets == 1) == (bucket == 1 << 30)
        assert one.asked.count("/fp8ctl/push/connect") == 1


#: What carries, by each way, where weights are on a CPU.
CARRIERS = {"ipc": "memory", "nccl": "gloo", "disk": "disk"}


@pytest.mark.parametrize("via", CARRIERS)
@pytest.mark.parametrize("how", ["sync", "async source"])
def test_each_way_brings_the_same(via: Any, how: str, tmp_path: Path) -> None:
    with (
        serving(PLAN, ranks=2) as one,
        serving(PLAN) as other,
        Rollout([one.url, other.url], PLAN, via=via, bucket_bytes=9000, folder=tmp_path) as rollout,
    ):
        for version, weights in (("A", WEIGHTS), ("B", CHANGED), ("A2", WEIGHTS)):
            done = update(rollout, Source(weights.items()), how, version)
            assert done.verified == done.sent == 19
            assert done.carrier == (CARRIERS[via], "")
            assert done.to_json()["carrier"] == {"name": CARRIERS[via], "why": ""}
            assert holds(one, quantised(weights))
            assert holds(other, quantised(weights))
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("via", ["ipc", "disk"])
def test_without_a_plan_weights_are_sent_as_they_are(via: Any, tmp_path: Path) -> None:
    # One is larger than a bucket: known from a list, met at the head of a generator.
    largest_first = sorted(WEIGHTS.items(), key=lambda pair: -pair[1].nbytes)
    for source in ([*WEIGHTS.items()], Source(largest_first).sync()):
        with serving(None) as server:
            with Rollout(server.url, None, via=via, bucket_bytes=5000, folder=tmp_path) as rollout:
                done = rollout.update(source, 1)
            assert holds(server, [(n, t.contiguous()) for n, t in WEIGHTS.items()])
            assert done.sent == len(WEIGHTS)


def test_a_tensor_that_is_met_too_late_for_its_bucket_says_what_to_set() -> None:
    small = ("a.weight", torch.ones(3))
    large = ("b.weight", torch.ones(3000))
    with serving(None) as server, Rollout(server.url, None, bucket_bytes=4096) as rollout:
        with pytest.raises(UsageError, match=r"b\.weight needs 12032 bytes") as e:
            rollout.update(iter([small, large]), 1)
        assert e.value.hint == "Rollout(urls, plan, bucket_bytes=12032)"
        assert rollout.update([small, large], 2).sent == 2
        assert holds(server, [small, large])


def test_masters_are_rounded_as_the_checkpoint_is() -> None:
    masters = {name: t.float() + 1e-5 for name, t in WEIGHTS.items()}
    rounded = {name: masters[name].to(t.dtype) for name, t in WEIGHTS.items()}
    assert any(not torch.equal(masters[n], rounded[n].float()) for n in masters)
    with serving(PLAN) as server:
        with Rollout(server.url, PLAN) as rollout:
            rollout.update(masters.items(), 1)
            assert holds(server, quantised(rounded))
        with Rollout(server.url, PLAN, dtype=torch.float32) as rollout:
            rollout.update(masters.items(), 2)
        # What is kept has the dtype that the server holds, all the same.
        for name, kept in server.table.held[0].items():
            if kept.dtype == torch.float8_e4m3fn:
                codes, _ = reference.quantize(masters[name], block(32, 16))
                assert torch.equal(kept.view(torch.uint8), codes.view(torch.uint8))
            elif "scale" not in name:
                assert torch.equal(kept, rounded[name])


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_a_tied_head_is_dropped_if_it_is_the_embedding(first: bool, verify: bool) -> None:
    tables = [(f"model.layers.{i}.self_attn.rotary_emb.inv_freq", torch.ones(7)) for i in (0, 1)]

    def named(head: torch.Tensor) -> list[Named]:
        weights = [(HEAD, head), *WEIGHTS.items()] if first else [*WEIGHTS.items(), (HEAD, head)]
        return [*weights, *tables]

    embedding = WEIGHTS[EMBEDDING]
    with (
        serving(PLAN) as server,
        Rollout(server.url, PLAN, verify=verify, bucket_bytes=9000) as rollout,
    ):
        # FP32 masters of both are the same when they are rounded.
        done = rollout.update(named(embedding.float()), 1)
        assert holds(server, wanted())
        assert done.sent == 19
        other = embedding.clone()
        other[3, 4] += 1
        with pytest.raises(ConflictError, match=r"lm_head\.weight differs from model\.embed") as e:
            rollout.update(named(other), 2)
        assert e.value.data["tensor"] == HEAD
        with pytest.raises(ConflictError, match="came without"):
            rollout.update([(HEAD, embedding)], 3, complete=False)
        rollout.update(named(embedding), 4)
        assert server.state == "ready"
        assert holds(server, wanted())


def test_a_head_that_the_plan_has_is_a_tensor_like_others() -> None:
    weights = {**WEIGHTS, HEAD: WEIGHTS[EMBEDDING] + 1}
    plan = planned(weights)
    with serving(plan) as server, Rollout(server.url, plan) as rollout:
        assert rollout.update(weights.items(), 1).sent == 20
        assert torch.equal(server.table.held[0][HEAD], weights[HEAD])


def test_only_what_differs_is_sent() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with (
        serving(PLAN, ranks=2) as one,
        serving(PLAN) as other,
        Rollout([one.url, other.url], PLAN, delta=True, bucket_bytes=9000) as rollout,
    ):
        assert rollout.update(WEIGHTS.items(), 1).skipped == 0
        same = rollout.update(WEIGHTS.items(), 2)
        assert (same.sent, same.skipped, same.buckets, same.verified) == (0, 19, 0, 19)
        assert same.fraction_skipped == 1
        assert same.bytes_skipped == 42240
        assert one.gate.about["version"] == "2"
        # Codes and scale go together, though a power of two changes the scale alone.
        scaled = {**WEIGHTS, name: WEIGHTS[name] * 2}
        one.table.buckets.clear()
        done = rollout.update(scaled.items(), 3)
        assert one.table.buckets == [[name, name + "_scale_inv"]]
        assert (done.sent, done.skipped, done.bytes_sent) == (2, 17, 6144 + 48)
        assert holds(one, quantised(scaled))
        # What one server lost is sent to all.
        other.table.held[0]["model.layers.0.self_attn.q_proj.bias"][5] += 1
        other.table.held[0][name][5, 5] = 0
        done = rollout.update(scaled.items(), 4)
        assert done.sent == 3
        assert holds(one, quantised(scaled))
        assert holds(other, quantised(scaled))


def test_little_differences_share_a_bucket() -> None:
    with serving(PLAN) as server, Rollout(server.url, PLAN, delta=True, bucket_bytes=9000) as r:
        r.update(WEIGHTS.items(), 1)
        changed = {n: t + 1 if t.dim() == 1 else t for n, t in WEIGHTS.items()}
        done = r.update(changed.items(), 2)
        assert (done.sent, done.buckets) == (4, 1)
        assert holds(server, quantised(changed))


def test_what_does_not_fit_beside_a_difference_has_a_bucket_of_its_own() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with serving(PLAN) as server, Rollout(server.url, PLAN, delta=True, bucket_bytes=9000) as r:
        r.update(WEIGHTS.items(), 1)
        changed = {**WEIGHTS, name: CHANGED[name]}
        assert r.update(changed.items(), 2).sent == 2
        assert holds(server, quantised(changed))


def test_tables_that_a_checkpoint_has_need_not_come() -> None:
    weights = {**WEIGHTS, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(7)}
    plan = planned(weights)
    with serving(plan) as server, Rollout(server.url, plan) as rollout:
        assert rollout.update(WEIGHTS.items(), 1).sent == 19
        assert rollout.update(weights.items(), 2).sent == 19


def test_a_part_leaves_the_rest_as_it_is() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with serving(PLAN) as server, Rollout(server.url, PLAN) as rollout:
        rollout.update(WEIGHTS.items(), 1)
        done = rollout.update([(name, CHANGED[name])], 2, complete=False)
        assert done.sent == 2
        assert holds(server, quantised({**WEIGHTS, name: CHANGED[name]}))
        with pytest.raises(ConflictError, match="12 tensors of the plan did not come"):
            rollout.update([(name, WEIGHTS[name])], 3)


def test_progress_ends_at_all_of_the_plan() -> None:
    seen: list[Progress] = []
    with serving(PLAN) as server, Rollout(server.url, PLAN, bucket_bytes=9000) as rollout:
        rollout.update(WEIGHTS.items(), 1, on_progress=seen.append)
    last = seen[-1]
    assert [p.nbytes for p in seen] == sorted(p.nbytes for p in seen)
    assert (last.tensors, last.nbytes, last.buckets) == (19, 42240, 7)
    assert (last.total_tensors, last.total_bytes) == (19, 42240)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"urls": []}, "no server"),
        ({"urls": "127.0.0.1:30000"}, "no address"),
        ({"urls": "ftp://a"}, "no address"),
        ({"urls": "http://a:b"}, "no address"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "twice"),
        ({"via": "pigeon"}, "pigeon"),
        ({"in_flight": "leave"}, "leave"),
        ({"bucket_bytes": 0}, "0 bytes"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"via": "disk", "delta": True}, "whole checkpoints"),
        ({"plan": {"quantization_config": {}}}, "plan was expected"),
        ({"plan": "plan.json"}, "plan was expected"),
        ({"api_key": "a\nb"}, "API key"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        Rollout(**{"urls": "http://127.0.0.1:1", "plan": PLAN, **arguments})
    assert e.value.hint
    assert "a\nb" not in str(e.value)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["online", "plan"])
def test_a_state_dict_instead_of_its_items_is_a_type_error(plan: Any) -> None:
    with (
        serving(plan) as server,
        Rollout(server.url, plan) as rollout,
        pytest.raises(TypeError, match=r"str where \(name, tensor\) was expected"),
    ):
        rollout.update(dict(WEIGHTS), 1)  # type: ignore[arg-type]
    assert server.state == "ready"
    assert not server.table.buckets


def test_one_update_at_a_time() -> None:
    with serving(PLAN) as server, Rollout(server.url, PLAN) as rollout:

        def named() -> Iterator[Named]:
            with pytest.raises(BusyError, match="another update"):
                rollout.update(WEIGHTS.items(), 2)
            yield from WEIGHTS.items()

        rollout.update(named(), 1)
        assert server.gate.about["version"] == "1"
        with pytest.raises(TypeError, match="aupdate"):
            rollout.update(Source(WEIGHTS.items()).asynchronous(), 3)  # type: ignore[arg-type]


def test_closed_it_connects_anew_and_leaves_nothing() -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    with serving(PLAN) as server:
        rollout = Rollout(server.url, PLAN.to_json())
        for version in "AB":
            rollout.update(WEIGHTS.items(), version)
            rollout.close()
            rollout.close()
        assert server.asked.count(wire.CONNECT) == server.asked.count(wire.DISCONNECT) == 2
    rollout.close()  # nobody is there any more
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_servers_close_a_carrier_before_a_larger_one_is_made() -> None:
    small, large = torch.ones(16), torch.ones(4096)
    with serving(None) as server, Rollout(server.url, None, bucket_bytes=1024) as rollout:
        rollout.update([("a", small)], 1, complete=False)
        rollout.update([("a", small)], 2, complete=False)
        assert server.asked.count(wire.CONNECT) == 1
        server.asked.clear()
        rollout.update([("a", small), ("b", large)], 3, complete=False)
        said = [path for path in server.asked if path in (wire.CONNECT, wire.DISCONNECT)]
        assert said == [wire.DISCONNECT, wire.CONNECT]
        assert torch.equal(server.table.held[0]["b"], large)
