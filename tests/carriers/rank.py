"""One rank of a server, in a process of its own: orders come as lines of JSON, answers go so.

{"join": offer, "rank": r, "device": "cpu"} joins, {"bucket": [slot, nbytes]} is answered with
a sum of what came, and gives the slot free unless told to "keep" it, {"look": slot} with that of
what a slot that was kept holds now, {"left": true} with what the process holds that a carrier
could have left, {"close": true} with that after closing twice. A bucket that is asked for "early"
may be on its way, and the device waits for it; {"arrived": true} sees whether it came.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import warnings
from typing import Any

import torch

from fp8ctl.carriers import ends


def weighted(tensor: torch.Tensor) -> int:
    """Return a sum that differs where bytes are swapped, and for other lengths."""
    at = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.int64)
    return int((tensor.long() * (at % 1009 + 1)).sum()) + tensor.numel()


def left() -> dict[str, int]:
    """Return what this process holds that a carrier could have left."""
    gc.collect()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = sum("memfd:fp8ctl" in line for line in maps)
    open_ = 0
    for fd in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{fd}"):  # the listing's own is gone
            target = os.readlink(f"/proc/self/fd/{fd}")
            open_ += target.startswith(("socket:", "/memfd:", "anon_inode:"))
    return {
        "mapped": mapped,
        "open": open_,
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
    }


class Rank:
    """What the orders are about."""

    def __init__(self) -> None:
        self.receiver: ends.Receiver | None = None
        self.kept: dict[int, torch.Tensor] = {}

    def obey(self, order: dict[str, Any]) -> Any:
        """Do what one line asks for."""
        if "join" in order:
            device = torch.device(order.get("device", "cpu"))
            self.receiver = ends.receive(order["join"], order["rank"], device)
            return "joined"
        if "left" in order:
            return left()
        if "look" in order:
            return weighted(self.kept[order["look"]])
        assert self.receiver is not None
        if "bucket" in order:
            slot, nbytes = order["bucket"]
            self.kept[slot] = self.receiver.bucket(slot, nbytes, here=not order.get("early"))
            found = weighted(self.kept[slot])
            if not order.get("keep"):
                self.kept.pop(slot)
                self.receiver.loaded()
            return found
        if "arrived" in order:
            return self.receiver.arrived()
        self.kept.clear()
        self.receiver.close()
        self.receiver.close()
        return left()


def main() -> None:
    torch.set_num_threads(1)
    rank = Rank()
    for line in sys.stdin:
        try:
            answer = {"ok": rank.obey(json.loads(line))}
        except Exception as e:  # noqa: BLE001 - the test looks at it
            hint = getattr(e, "hint", None)
            answer = {"error": type(e).__name__, "message": str(e), "hint": hint}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
