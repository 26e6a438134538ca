"""Two GPUs: tensor parallelism of both engines, updates by ipc, and by nccl to the other GPU.

NCCL wants a GPU for each of its ranks: a trainer on the first and a server on the second.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from tests.gpu import path
from tests.gpu.host import Trainer

if TYPE_CHECKING:
    from tests.gpu.ask import Backend
    from tests.gpu.host import Host

_START = 200.0


def run(host: Host) -> None:
    """Do the leg, with the engines that are there."""
    leg = host.leg
    done = host.data("doctor", *host.target, limit=60)
    engines = [engine["backend"] for engine in done["environment"]["engines"]]
    with_ports: list[Backend] = [name for name in ("sglang", "vllm") if name in engines]
    seen = path.Seen()

    def prepare() -> None:
        with leg.step("models"):
            host.models("dense-a", "dense-b", "moe-a", "moe-b")
        with leg.step("begin as released"):
            host.released(*with_ports)

    if not leg.job("prepare", prepare):
        return
    for backend in with_ports:
        if not leg.job(f"{backend} patched", partial(path.patched, host, backend)):
            continue
        for mode in ("block", "per-tensor"):
            name = f"{backend}-tp2-{mode}"
            kind = "dense" if mode == "block" else "moe"
            if leg.wants(name):
                leg.job(name, partial(parallel, host, seen, name, backend, kind, mode))
        if leg.wants(f"{backend}-nccl"):
            leg.job(f"{backend}-nccl", partial(nccl, host, seen, backend))
        leg.job(f"{backend} end", partial(path.reverted, host, backend))


def parallel(
    host: Host, seen: path.Seen, name: str, backend: Backend, kind: str, mode: str
) -> None:
    """Two ranks: launch, check, push by ipc, check, push back; log-probabilities as before."""
    models = (host.model(f"{kind}-a"), host.model(f"{kind}-b"))
    options = ("--mode", mode, "--tp", "2")
    path.served(host, seen, name, backend, options, models, limit=_START)
    seen.require_equal(host, f"{name} a pushed", f"{name} a fresh")


def nccl(host: Host, seen: path.Seen, backend: Backend) -> None:
    """A server on the second GPU, a trainer on the first."""
    leg = host.leg
    if host.device == "cuda" and backend == "vllm":
        with leg.step("vLLM on the second GPU"):
            # vLLM takes the first GPUs that it sees, and fp8ctl starts it with this environment.
            host.more_env = {"CUDA_VISIBLE_DEVICES": "1"}
    extra = host.extra(backend, alone=True)
    if backend == "sglang" and host.device == "cuda":
        extra = [*extra, "--base-gpu-id", "1"]
    try:
        with contextlib.ExitStack() as stack:
            with leg.step("launch on the second GPU") as told:
                server = stack.enter_context(
                    host.launched(
                        backend, host.model("dense-a"), "--mode", "block", limit=_START, extra=extra
                    )
                )
                told["seen"] = f"ready after {server.seconds:.1f} s"
            host.more_env = {}
            with leg.step("log-probabilities of A"):
                seen.said[f"{backend} nccl a fresh"] = path.finite(server.said())
            trainer = stack.enter_context(Trainer(host))
            with leg.step("6 updates by nccl") as told:
                walls = []
                for turn in range(6):
                    model = host.model(f"dense-{'ba'[turn % 2]}")
                    update = trainer.push(server, model, 90, via="nccl", version=f"turn-{turn}")
                    walls.append(round(update["wall"], 4))
                told |= {"walls": walls, "seen": f"{min(walls)} to {max(walls)} s"}
            path.checked(host, server, host.model("dense-a"))
            with leg.step("log-probabilities of A, pushed"):
                seen.said[f"{backend} nccl a pushed"] = path.finite(server.said())
            seen.require_equal(host, f"{backend} nccl a pushed", f"{backend} nccl a fresh")
    finally:
        host.more_env = {}
