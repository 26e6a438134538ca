"""SGLang 0.4.8: the whole path in every mode, and per-tensor updates under captured graphs."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fp8ctl.diagnosis import likeliest
from fp8ctl.patching import diff, parser
from tests.gpu import ask, path
from tests.gpu.host import Host, Trainer
from tests.gpu.leg import FailedError, SkippedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.host import Server

PATCH = Path(__file__).with_name("requantise-in-apply.patch")
CAPTURING = "operation not permitted when stream is capturing"
UPDATES = 20
_START = 110.0

_CONFIGURATIONS = {
    "dense-per-tensor": ("dense", ("--mode", "per-tensor")),
    "moe-block": ("moe", ("--mode", "block")),
    "dense-block": ("dense", ("--mode", "block")),
    "moe-per-tensor": ("moe", ("--mode", "per-tensor")),
    "dense-online": ("dense", ("--mode", "online")),
    "moe-online": ("moe", ("--mode", "online")),
    # 512 divides by 128, so kernels for 128x128 would take it, had fp8ctl not switched them off.
    "dense-64x64": ("dense", ("--mode", "block", "--block-size", "64,64")),
}


def run(host: Host) -> None:
    """Do the leg."""
    leg = host.leg
    seen = path.Seen()
    tree = leg.folder / "requantising"
    many: list[ask.Said] = []

    def prepare() -> None:
        with leg.step("models"):
            host.models("dense-a", "dense-b", "moe-a", "moe-b")
        with leg.step("begin as released"):
            host.released("sglang")
        with leg.step("a tree with the seed's fault"):
            requantising_tree(host.python, tree)
        path.patched(host, "sglang")
        path.planned(host, "sglang", host.model("dense-a"), "--mode", "block")
        path.planned(host, "sglang", host.model("moe-a"), "--mode", "per-tensor")

    if not leg.job("prepare", prepare):
        return
    work: dict[str, Callable[[], None]] = {"seed-failure": partial(seed_failure, host, tree)}
    for name, (kind, options) in _CONFIGURATIONS.items():
        models = (host.model(f"{kind}-a"), host.model(f"{kind}-b"))
        between = partial(updates, host, models, many) if name == "dense-per-tensor" else None
        work[name] = partial(
            path.served,
            host,
            seen,
            name,
            "sglang",
            options,
            models,
            limit=_START,
            proves="online" not in name,
            between=between,
        )
        work[f"{name}-fresh"] = partial(
            path.fresh, host, seen, name, "sglang", options, models[1], limit=_START
        )
    work["await-push"] = partial(await_push, host, seen)
    leg.jobs(work)

    def compare(name: str) -> None:
        seen.require_equal(host, f"{name} a pushed", f"{name} a fresh")
        seen.require_equal(host, f"{name} b pushed", f"{name} b fresh")

    for name in _CONFIGURATIONS:
        if leg.wants(name):
            leg.job(f"{name} compared", partial(compare, name))
    if leg.wants("await-push"):
        leg.job(
            "await-push compared",
            lambda: seen.require_equal(host, "await-push a pushed", "dense-per-tensor a fresh"),
        )
    if leg.wants("dense-per-tensor"):
        leg.job(f"{UPDATES} updates compared", partial(compare_updates, host, seen, many))
    leg.job("end", lambda: path.reverted(host, "sglang"))


def requantising_tree(python: Path, tree: Path) -> None:
    """Copy the released SGLang and move its requantisation into `apply`, as the seed's fork did."""
    [site] = (python.parent.parent / "lib").glob("python3*/site-packages")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(
        site / "sglang",
        tree / "sglang",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for one in parser.parse(PATCH.read_bytes(), name=PATCH.name):
        file = tree / str(one.path)
        changed = diff.apply(one, file.read_bytes()).data
        assert changed is not None
        file.write_bytes(changed)


def seed_failure(host: Host, tree: Path) -> None:
    """See the seed's error: requantising in `apply` ends the engine while graphs are captured."""
    if host.device == "cpu":
        with host.leg.step("the seed's failure"):
            raise SkippedError("only where CUDA graphs are captured")
    with host.leg.step("quantise per tensor"):
        out = host.work / "dense-a-per-tensor"
        if not out.exists():
            argv = ("quantize", "--model", host.model("dense-a"), "--out", out)
            host.fp8ctl(*argv, "--mode", "per-tensor", "--backend", "sglang", limit=90)
    with host.leg.step("the seed's failure") as seen:
        try:
            with host.stock("sglang", out, limit=_START, tree=tree):
                pass
        except FailedError as e:
            seen["seen"] = str(e)
        else:
            raise FailedError("the engine started: nothing was requantised under capture")
        [log] = host.leg.folder.glob(f"{host.leg.job_name}-stock-*.log")
        lines = log.read_text(errors="replace").splitlines()
        seen["error"] = [line for line in lines if CAPTURING in line][:3]
        seen["cause"] = likeliest(lines[-200:]).id
        if not seen["error"]:
            raise FailedError(f"it died of something else: {seen['seen']}")
        if seen["cause"] != "graph-capture":
            raise FailedError(f"fp8ctl names another cause: {seen['cause']}")


def updates(host: Host, models: tuple[Path, Path], many: list[ask.Said], server: Server) -> None:
    """Push B, A, B, ... into one server, and keep what it said after each."""
    count = UPDATES if host.device == "cuda" else 4
    with host.leg.step(f"{count} updates in a row") as seen, Trainer(host) as trainer:
        walls = []
        for turn in range(count):
            told = trainer.push(server, models[1 - turn % 2], 60, version=f"turn-{turn}")
            if told["verified"] is None:
                raise FailedError(f"update {turn} was not verified")
            walls.append(round(told["wall"], 4))
            many.append(server.said())
        seen |= {"walls": walls, "seen": f"{count} updates, {min(walls)} to {max(walls)} s each"}


def compare_updates(host: Host, seen: path.Seen, many: list[ask.Said]) -> None:
    """Compare what was said after each update with fresh servers."""
    with host.leg.step("every update = a fresh server") as told:
        fresh = [seen.said.get(f"dense-per-tensor {letter} fresh") for letter in "ba"]
        if not many or None in fresh:
            raise SkippedError("a fresh server or the updates were not seen")
        gaps = []
        for turn, said in enumerate(many):
            want = fresh[turn % 2]
            assert want is not None
            gaps.append(ask.require_equal(said, want, f"update {turn}")["max_difference"])
        told |= {"max_differences": gaps}
        told["seen"] = f"{len(gaps)} updates, largest difference {max(gaps):.3g}"


def await_push(host: Host, seen: path.Seen) -> None:
    """Start from 16-bit weights, refuse to answer, and serve what was pushed."""
    leg = host.leg
    options = ("--mode", "per-tensor", "--await-push")
    with leg.step("launch --await-push"):
        start = host.launched("sglang", host.model("dense-b"), *options, limit=_START)
        server = start.__enter__()
    try:
        with leg.step("503 before the push") as told:
            try:
                ask.chat(server.url, server.model)
            except FailedError as e:
                told["seen"] = str(e)
                if "503" not in str(e):
                    raise
            else:
                raise FailedError("it answered")
        path.pushed(host, server, host.model("dense-a"))
        path.checked(host, server, host.model("dense-a"))
        with leg.step("log-probabilities"):
            seen.said["await-push a pushed"] = path.finite(server.said())
    finally:
        start.__exit__(None, None, None)
