"""Two GPUs: tensor parallelism of both engines, updates by ipc, and by nccl to the other GPU.

NCCL wants a GPU for each of its ranks: a trainer on the first and a server on the second.
"""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.gpu import leg_eight, path
from tests.gpu.host import Trainer
from tests.gpu.leg import ROOT, FailedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.gpu.ask import Backend
    from tests.gpu.host import Host, Server

Json = dict[str, Any]
_START = 200.0
#: Of what NCCL takes for the bytes alone.
_MORE = 1.2


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
        if leg.wants(f"{backend}-nccl-8b"):
            leg.job(f"{backend}-nccl-8b", partial(large, host, backend))
        if leg.wants(f"{backend}-example"):
            leg.job(f"{backend}-example", partial(example, host, backend))
        leg.job(f"{backend} end", partial(path.reverted, host, backend))


def parallel(
    host: Host, seen: path.Seen, name: str, backend: Backend, kind: str, mode: str
) -> None:
    """Two ranks: launch, check, push by ipc, check, push back; log-probabilities as before."""
    models = (host.model(f"{kind}-a"), host.model(f"{kind}-b"))
    options = ("--mode", mode, "--tp", "2")
    path.served(host, seen, name, backend, options, models, limit=_START)
    seen.require_equal(host, f"{name} a pushed", f"{name} a fresh")


@contextlib.contextmanager
def on_the_second(host: Host, backend: Backend, model: Path) -> Iterator[Server]:
    """Start a server in blocks on the second GPU; a trainer has the first."""
    extra = host.extra(backend, alone=True)
    if host.device == "cuda" and backend == "vllm":
        # It takes the first GPUs that it sees, and fp8ctl starts it with this environment.
        host.more_env = {"CUDA_VISIBLE_DEVICES": "1"}
    elif host.device == "cuda":
        extra = [*extra, "--base-gpu-id", "1"]
    options = ("--mode", "block", "--no-check")
    with contextlib.ExitStack() as stack:
        try:
            with host.leg.step("launch on the second GPU") as told:
                server = stack.enter_context(
                    host.launched(backend, model, *options, limit=_START, extra=extra)
                )
                told["seen"] = f"ready after {server.seconds:.1f} s"
        finally:
            host.more_env = {}
        yield server


def nccl(host: Host, seen: path.Seen, backend: Backend) -> None:
    """Updates from the first GPU to the second; log-probabilities as before."""
    leg = host.leg
    with on_the_second(host, backend, host.model("dense-a")) as server, Trainer(host) as trainer:
        with leg.step("log-probabilities of A"):
            seen.said[f"{backend} nccl a fresh"] = path.finite(server.said())
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


def large(host: Host, backend: Backend) -> None:
    """Updates of an 8B-shaped model, beside the rate of NCCL's own broadcast."""
    leg = host.leg
    name = "8b-a" if host.device == "cuda" else "tiny8b-a"
    with leg.step("models"):
        host.models(name, limit=150)
    rate = broadcast(host)
    row: Json = {"engine": backend, "weights": "block"}
    with (
        on_the_second(host, backend, host.model(name)) as server,
        Trainer(host) as trainer,
    ):
        leg_eight.push(host, server, host.model(name), row, trainer, via="nccl")
    for key in [key for key in row if key.startswith("push_s_")]:
        with leg.step(f"bar, {key}") as seen:
            wire = row["push_gb"] / rate
            seen |= {"row": row, "seen": f"{row[key]} s, NCCL alone {wire:.4f} s at {rate} GB/s"}
            if host.device == "cuda" and row[key] > _MORE * wire:
                raise FailedError(f"{seen['seen']}: {row[key] / wire:.2f} times, bar {_MORE}")


def broadcast(host: Host) -> float:
    """Return GB/s of NCCL's broadcast between the two GPUs."""
    with host.leg.step("NCCL's broadcast") as seen:
        argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = str(ROOT / "tests" / "gpu" / "broadcast.py")
        done = host.leg.run([host.torch_python, *argv, script, host.device], host.env, 90)
        if done.returncode:
            raise FailedError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
        seen |= json.loads(done.stdout.splitlines()[-1])
        seen["seen"] = f"{seen['gb_s']} GB/s, buckets of {seen['bucket'] >> 20} MiB"
        return float(seen["gb_s"])


def example(host: Host, backend: Backend) -> None:
    """examples/fsdp2_rollout.py: two ranks, a GPU each; the weights go by nccl."""
    with host.leg.step("models"):
        host.models("tiny8b-a")
    with host.leg.step("examples/fsdp2_rollout.py") as seen:
        engine = host.extra(backend)
        if host.device == "cuda" and backend == "sglang":
            engine = [*engine, "--base-gpu-id", "1"]
        script = str(ROOT / "examples" / "fsdp2_rollout.py")
        argv: list[str | Path] = [host.torch_python, script, "--model", host.model("tiny8b-a")]
        argv += ["--backend", backend, "--python", host.python, "--via", "nccl", "--json"]
        argv += ["--steps", "4", "--lr", "1e-3"]
        done = host.leg.run([*argv, *(("--", *engine) if engine else ())], host.env, 240)
        if done.returncode:
            raise FailedError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
        steps = json.loads(done.stdout[done.stdout.index("{") :])["steps"]
        told = [(step["k3"], step["stale"]) for step in steps]
        seen |= {"steps": steps, "seen": f"k3 and what it would be without: {told}"}
        if any(step["update"]["verified"] != step["update"]["sent"] for step in steps):
            raise FailedError("not every tensor was equal in every rank")
