"""The rate of a broadcast from rank 0 to rank 1, a GPU each: the ceiling of updates by nccl.

`torchrun --nproc-per-node 2 tests/gpu/broadcast.py cuda`; prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

_TURNS, _BUCKETS = 7, 16


def main() -> None:
    cuda = sys.argv[1] == "cuda"
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    size = 512 << 20 if cuda else 8 << 20
    slots = [torch.full((size,), rank, dtype=torch.uint8, device=device) for _ in range(2)]
    seconds = []
    for _ in range(_TURNS):
        _wait(cuda)
        dist.barrier()
        began = time.perf_counter()
        for number in range(_BUCKETS):
            dist.broadcast(slots[number % 2], src=0)
        _wait(cuda)
        seconds.append(time.perf_counter() - began)
    assert not any(int(slot.max()) for slot in slots)
    if rank == 0:
        rate = _BUCKETS * size / statistics.median(seconds[1:]) / 1e9
        told = {"gb_s": round(rate, 2), "bucket": size, "seconds": [round(s, 5) for s in seconds]}
        print(json.dumps(told))
    dist.destroy_process_group()


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
