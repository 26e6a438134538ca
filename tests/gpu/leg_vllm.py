"""vLLM 0.9.1: the whole path, block and per-tensor, dense and experts, under CUDA graphs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tests.gpu import path

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.host import Host

_START = 210.0

_CONFIGURATIONS = {
    "dense-per-tensor": ("dense", ("--mode", "per-tensor")),
    "dense-block": ("dense", ("--mode", "block")),
    "moe-block": ("moe", ("--mode", "block")),
    "moe-per-tensor": ("moe", ("--mode", "per-tensor")),
}


def run(host: Host) -> None:
    """Do the leg."""
    leg = host.leg
    seen = path.Seen()
    backend = host.backend("vllm")

    def prepare() -> None:
        with leg.step("models"):
            host.models("dense-a", "dense-b", "moe-a", "moe-b")
        with leg.step("begin as released"):
            host.released(backend)
        path.patched(host, backend)
        path.planned(host, backend, host.model("dense-a"), "--mode", "block")
        path.planned(host, backend, host.model("moe-a"), "--mode", "per-tensor")

    if not leg.job("prepare", prepare):
        return
    work: dict[str, Callable[[], None]] = {}
    for name, (kind, options) in _CONFIGURATIONS.items():
        models = (host.model(f"{kind}-a"), host.model(f"{kind}-b"))
        work[name] = partial(path.served, host, seen, name, backend, options, models, limit=_START)
        work[f"{name}-fresh"] = partial(
            path.fresh, host, seen, name, backend, options, models[1], limit=_START
        )
    leg.jobs(work, rounds=True)

    def compare(name: str) -> None:
        seen.require_equal(host, f"{name} a pushed", f"{name} a fresh")
        seen.require_equal(host, f"{name} b pushed", f"{name} b fresh")

    for name in _CONFIGURATIONS:
        if leg.wants(name):
            leg.job(f"{name} compared", partial(compare, name))
    leg.job("end", lambda: path.reverted(host, backend))
