"""One rank of test_ranks.py: FSDP2 on the CPU, one update after the other. Prints one JSON line.

python -m tests.push.push_ranks RANK WORLD RENDEZVOUS GOOD_URL BAD_URL CASES < plan.json
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8ctl.push import Rollout
from fp8ctl.stream import Ranks
from tests.stream_ranks import sharded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator


async def cancelled(doing: Coroutine[Any, Any, Any]) -> Any:
    """Cancel an update that waits for the other rank."""
    task = asyncio.ensure_future(doing)
    await asyncio.sleep(3)
    task.cancel()
    return await task


def main(rank: int, world: int, rendezvous: str, good: str, bad: str, cases: list[str]) -> Any:
    model = sharded(rank, world, rendezvous, 120.0)
    plan = json.load(sys.stdin)
    patience = 8.0 if "dead" in cases else 90.0
    ranks = Ranks(dist.new_group(backend="gloo"), source=0, timeout=patience)
    rollout = Rollout(good, plan, bucket_bytes=9_000)
    unable, whole = Rollout(bad, plan), Rollout(good, plan)
    told = []
    gone = ("early", "cancelled", "awaits")
    for version, case in enumerate(cases):

        def named(case: str = case) -> Iterator[tuple[str, torch.Tensor]]:
            for i, (name, parameter) in enumerate(model.named_parameters()):
                if case == "dead" and rank == 1 and i == 6:
                    os._exit(7)
                if case == "raises" and rank == 1 and i == 6:
                    raise OSError("rank 1 has trouble")
                if case == "fewer" and rank == 1 and i == 6:
                    return
                spoilt = case == "nan" and i == 6
                yield name, torch.full(parameter.shape, torch.nan) if spoilt else parameter
            if case in ("late-0", "late-1") and case != f"late-{rank}":
                time.sleep(6)  # the other rank has no tensor left, and is cancelled meanwhile

        async def slow() -> AsyncIterator[tuple[str, torch.Tensor]]:
            for i, pair in enumerate(model.named_parameters()):
                if i == 6:
                    await asyncio.sleep(60)
                yield pair

        one = {"refused": unable, "late-0": whole, "late-1": whole}.get(case, rollout)
        started = time.monotonic()
        try:
            leaves = case == f"late-{rank}" or (case in gone and rank == 1)
            if leaves:
                source = slow() if case == "awaits" else named()
                done = asyncio.run(cancelled(one.aupdate(source, version, ranks=ranks)))
            elif case in ("async", "late-0", "late-1", *gone):
                done = asyncio.run(one.aupdate(named(), version, ranks=ranks))
            else:
                done = one.update(named(), version, ranks=ranks, complete=case != "fewer")
            answer: dict[str, Any] = {"sent": done.sent}
        except (Exception, asyncio.CancelledError) as e:  # noqa: BLE001 - the test looks at it
            answer = {"error": type(e).__name__, "message": str(e)}
        told.append({"case": case, "seconds": time.monotonic() - started, **answer})
    rollout.close()
    whole.close()
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_, world_, rendezvous_, good_, bad_, cases_ = sys.argv[1:7]
    answer_ = main(int(rank_), int(world_), rendezvous_, good_, bad_, cases_.split(","))
    sys.stdout.write(json.dumps(answer_) + "\n")
    sys.stdout.flush()
    os._exit(0)  # no goodbye to ranks that may be dead
