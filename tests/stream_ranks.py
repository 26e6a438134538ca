"""One rank of test_stream.py: FSDP2 on the CPU, by gloo. Prints one JSON line.

python tests/stream_ranks.py RANK WORLD RENDEZVOUS CASE
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fp8ctl.manifest import Plan
from fp8ctl.stream import Ranks, quantize_weights

if TYPE_CHECKING:
    from collections.abc import Iterator


class Layer(torch.nn.Module):
    """The Linears of a decoder layer, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.ModuleDict(
            {f"{p}_proj": torch.nn.Linear(48, 48 if p in "qo" else 16, bias=False) for p in "qkvo"}
        )
        self.input_layernorm = torch.nn.LayerNorm(48, bias=False)


class Net(torch.nn.Module):
    """Two such layers, `model.layers.0` and `model.layers.1`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([Layer(), Layer()])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def bits(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def sharded(rank: int, world: int, rendezvous: str, patience: float) -> Net:
    """Return the net as FSDP2 shards it over gloo; every rank calls this."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=patience),
    )
    model = net()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(rank: int, world: int, rendezvous: str, case: str, plan: str) -> dict[str, Any]:
    model = sharded(rank, world, rendezvous, 60.0)

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if case == "dead" and rank == 1 and i == 6:
                os._exit(7)
            if case == "raises" and rank == 1 and i == 6:
                raise OSError("rank 1 has trouble")
            spoilt = case == "nan" and i == 6
            yield name, torch.full(parameter.shape, torch.nan) if spoilt else parameter

    # Those who are gone are waited for; nobody else may be late, however busy the machine is.
    patience = 8.0 if case in ("dead", "raises") else 60.0
    ranks = Ranks(dist.new_group(backend="gloo"), source=0, timeout=patience)
    document = json.loads(plan)
    stream = quantize_weights(named(), Plan.from_json(document), bucket_bytes=9_000, ranks=ranks)
    given = {}
    with stream:
        for name, tensor in stream:
            given[name] = bits(tensor)
            if case == "leaves" and rank == 0:
                break
    return {"given": given}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_, world_, rendezvous_, case_ = sys.argv[1:5]
    try:
        answer = main(int(rank_), int(world_), rendezvous_, case_, sys.stdin.read())
    except Exception as e:  # noqa: BLE001 - the test looks at it
        answer = {"error": type(e).__name__, "message": str(e)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # no goodbye to ranks that may be dead
