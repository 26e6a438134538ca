"""A trainer of one process: a JSON line in is an update, a JSON line out what it told.

{"url", "model", "version", "via", "bucket_mb", "factor", "delta", "sixteen", "plan"}: the weights
of a checkpoint folder, times `factor` if there is one. They stay on the device between updates.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import urllib.request
from pathlib import Path
from typing import Any

import torch

from fp8ctl.errors import Fp8ctlError
from fp8ctl.push import Rollout
from fp8ctl.source import read_tensors

Json = dict[str, Any]
_DEVICE = "cuda" if os.environ.get("TRAINER_DEVICE") != "cpu" else "cpu"


class Trainer:
    """Models and connections that stay."""

    def __init__(self) -> None:
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        self.rollouts: dict[str, Rollout] = {}

    def do(self, wanted: Json) -> Json:
        if wanted.get("forget"):
            self.close()
            self.weights.clear()
            return {"forgotten": True}
        if wanted.get("copy"):
            return {"copy_gb_s": copy_rate(), "device": torch.cuda.get_device_name()}
        weights = self._load(wanted["model"])
        if factor := wanted.get("factor"):
            with torch.no_grad():
                for tensor in weights.values():
                    tensor.mul_(factor)
        _wait()
        rollout = self._rollout(wanted)
        began = time.perf_counter()
        update = rollout.update(weights.items(), wanted.get("version", "0"))
        return {"wall": time.perf_counter() - began, **update.to_json()}

    def _load(self, folder: str) -> dict[str, torch.Tensor]:
        if folder not in self.weights:
            self.weights[folder] = {
                name: tensor.to(_DEVICE, copy=True) for name, tensor in read_tensors(Path(folder))
            }
        return self.weights[folder]

    def _rollout(self, wanted: Json) -> Rollout:
        url, via = wanted["url"], wanted.get("via", "ipc")
        megabytes, delta = int(wanted.get("bucket_mb", 512)), bool(wanted.get("delta"))
        key = json.dumps([url, via, megabytes, delta])
        if key not in self.rollouts:
            self.close()
            plan = None if wanted.get("sixteen") else _plan(url)
            self.rollouts[key] = Rollout(
                url, plan, via=via, bucket_bytes=megabytes << 20, delta=delta, timeout=120.0
            )
        return self.rollouts[key]

    def close(self) -> None:
        for rollout in self.rollouts.values():
            rollout.close()
        self.rollouts.clear()


def _plan(url: str) -> Json | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/fp8ctl/push/plan", timeout=30) as answer:
        found = json.loads(answer.read())
    plan = found.get("manifest", found)
    return plan if isinstance(plan, dict) and plan else None


def copy_rate() -> float:
    """Return GB/s of a copy on the GPU, reads and writes counted."""
    one = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    two = torch.empty_like(one)
    for turn in range(13):
        if turn == 3:
            _wait()
            began = time.perf_counter()
        two.copy_(one)
    _wait()
    return 20 * (1 << 30) / (time.perf_counter() - began) / 1e9


def _wait() -> None:
    if _DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    trainer = Trainer()
    for line in sys.stdin:
        try:
            found = trainer.do(json.loads(line))
        except Fp8ctlError as e:
            found = {"error": f"{e.id}: {e}", "hint": e.hint}
        except Exception as e:  # noqa: BLE001 - whatever it is, the leg is to know
            traceback.print_exc()
            found = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    trainer.close()


if __name__ == "__main__":
    main()
