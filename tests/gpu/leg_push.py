"""Updates of an 8B-shaped model by ipc: FP8 in every mode, and 16 bits beside them."""

from __future__ import annotations

import contextlib
import json
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.gpu.host import Trainer
from tests.gpu.leg import FailedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.gpu.ask import Backend
    from tests.gpu.host import Host, Server

Json = dict[str, Any]
_START = 200.0
UPDATES = 7  # the first is told apart: it compiles
MODES = ("block", "16-bit", "per-tensor", "online")


def run(host: Host) -> None:
    """Do the leg of one engine."""
    leg = host.leg
    backend: Backend = "vllm" if leg.name.endswith("vllm") else "sglang"
    model = host.model("8b-a" if host.device == "cuda" else "tiny8b-a")

    def prepare() -> None:
        with leg.step("models"):
            host.models(model.name, limit=150)
        with leg.step("begin as released"):
            host.released(backend)
        with leg.step("patch"):
            # Not force-fp8-serialized: with it vLLM does not quantise by itself.
            some = ("--patch", "refit", "--patch", "unscaled-guard") if backend == "vllm" else ()
            host.fp8ctl("patch", *host.target, "--backend", backend, *some, limit=60)

    if not leg.job("prepare", prepare):
        return
    with Trainer(host) as trainer:
        if host.device == "cuda":
            leg.job("copy", lambda: copy_rate(host, trainer))
        for name in MODES:
            if leg.wants(name):
                leg.job(name, partial(updates, host, backend, model, name, trainer))

    def end() -> None:
        with leg.step("revert") as seen:
            host.fp8ctl("stop", "--all", limit=60)
            host.fp8ctl("revert", *host.target, "--backend", backend, limit=60)
            seen |= host.require_released(backend)

    leg.job("end", end)


def copy_rate(host: Host, trainer: Trainer) -> None:
    with host.leg.step("a copy on the GPU") as seen:
        seen |= trainer.do({"copy": True}, 60)
        seen["seen"] = f"{seen['copy_gb_s']:.0f} GB/s, reads and writes, {seen['device']}"


def updates(host: Host, backend: Backend, model: Path, name: str, trainer: Trainer) -> None:
    """Start a server and push every weight, changed each time, into it."""
    leg = host.leg
    with contextlib.ExitStack() as stack:
        with leg.step("start") as seen:
            server = stack.enter_context(_started(host, backend, model, name))
            seen |= {"ready": server.seconds, "seen": f"ready after {server.seconds:.1f} s"}
        for megabytes in (1024, 512) if host.device == "cuda" else (64,):
            with leg.step(f"{UPDATES} updates, buckets of {megabytes} MiB") as seen:
                told = []
                for turn in range(UPDATES):
                    more: Json = {"bucket_mb": megabytes, "version": f"{name}-{megabytes}-{turn}"}
                    more |= {"factor": 0.995 if turn % 2 else 1.01}
                    if name in ("16-bit", "online"):
                        more["sixteen"] = True
                    told.append(trainer.push(server, model, 60, **more))
                with (leg.folder / "push.jsonl").open("a") as file:
                    file.writelines(json.dumps({"mode": name, **one}) + "\n" for one in told)
                walls = [round(one["wall"], 4) for one in told]
                if name not in ("16-bit", "online") and None in [o["verified"] for o in told]:
                    raise FailedError("an update was not verified")
                seen |= {"walls": walls, "bytes": told[-1]["bytes_sent"]}
                seen |= {"stages": told[-1]["stages"], "loading": told[-1]["loading"]}
                middle = statistics.median(walls[1:])
                seen["seen"] = f"first {walls[0]} s, then {min(walls[1:])} to {max(walls[1:])} s"
                seen["seen"] += f", median {middle} s; {told[-1]['bytes_sent'] / 1e9:.2f} GB"


@contextlib.contextmanager
def _started(host: Host, backend: Backend, model: Path, name: str) -> Iterator[Server]:
    if name == "16-bit":
        with host.stock(backend, model, limit=_START, alone=True, hooks=True) as server:
            yield server
        return
    extra = host.extra(backend, alone=True)
    options = ("--mode", name, "--no-check")
    with host.launched(backend, model, *options, limit=_START, extra=extra) as server:
        yield server
