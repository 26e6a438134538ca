"""An update ends with all servers serving exactly what the plan's checkpoint holds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.formats import Mode
from fp8ctl.push import Rollout, Update
from tests.push.serving import Server, serving
from tests.test_stream import WEIGHTS, Source, planned, wanted

if TYPE_CHECKING:
    from collections.abc import Iterable

Named = tuple[str, torch.Tensor]


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
