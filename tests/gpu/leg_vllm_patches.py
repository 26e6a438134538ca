"""The patches of vLLM 0.9.1 one by one: none, V1, V2, refit, all three; and blocks of 64x64.

Each set lies in an overlay of its own, so that their servers run beside each other. The model
has the matrices of an 8B one. Tokens per second are taken while nothing else runs on the GPU.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING

from tests.gpu import ask, path
from tests.gpu.host import Trainer
from tests.gpu.leg import FailedError, SkippedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.gpu.host import Host, Server

_START = 230.0
V1, V2 = "force-fp8-serialized", "disable-cutlass-fp8"
SETS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "v1": (V1,),
    "v2": (V2,),
    "refit": ("refit",),
    "v1-v2-refit": (V1, V2, "refit"),
}
_MORE = {**SETS, "v1-refit": (V1, "refit", "unscaled-guard")}
# What stands in for them in a rehearsal on a CPU, where only SGLang runs.
_REHEARSED = {
    "stock": ("cpu-fp8",),
    "v1": ("cpu-fp8",),
    "v2": ("cpu-fp8", "block-quant-override"),
    "refit": ("cpu-fp8", "refit"),
    "v1-v2-refit": ("cpu-fp8", "block-quant-override", "refit"),
    "v1-refit": ("cpu-fp8", "refit", "unscaled-guard"),
}
MODE = ("--mode", "per-tensor")


class _Meeting:
    """Where jobs wait until all that still run are there, and then go in turns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._present = 0
        self._arrived: dict[str, int] = {}
        self.turn = threading.Lock()

    @contextlib.contextmanager
    def join(self) -> Iterator[None]:
        """Be one of those that the others wait for, to the end of the block."""
        with self._changed:
            self._present += 1
        try:
            yield
        finally:
            with self._changed:
                self._present -= 1
                self._changed.notify_all()

    def wait(self, at: str, limit: float) -> bool:
        """Wait for the others; False where one did not come in time."""
        with self._changed:
            self._arrived[at] = self._arrived.get(at, 0) + 1
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._arrived[at] >= self._present, limit)


def run(host: Host) -> None:
    """Do the leg."""
    leg = host.leg
    seen = path.Seen()
    models = _models(host)

    def prepare() -> None:
        with leg.step("models"):
            host.models(*(model.name for model in models), "narrow-a", "narrow-b", "dense-a")
        with leg.step("begin as released"):
            host.released(host.backend("vllm"))
        (host.work / "overlays").mkdir(exist_ok=True)
        for name in _MORE:
            patches = _patches(host, name)
            if not patches:
                continue
            with leg.step(f"overlay {name}"):
                words = [word for patch in patches for word in ("--patch", patch)]
                at = ("--overlay", str(_overlay(host, name)), "--backend", host.backend("vllm"))
                host.fp8ctl("patch", *host.target, *at, *words, limit=60)

    if not leg.job("prepare", prepare):
        return
    meeting = _Meeting()
    work: dict[str, Callable[[], None]] = {
        name: partial(one_set, host, seen, name, models, meeting) for name in SETS
    }
    leg.jobs(work, rounds=True)
    again: dict[str, Callable[[], None]] = {}
    for name in ("refit", "v1-v2-refit"):
        again[f"{name}-fresh"] = partial(
            path.fresh,
            host,
            seen,
            name,
            host.backend("vllm"),
            _options(host, name),
            models[1],
            limit=_START,
        )
    again["v1-await-push"] = partial(await_push, host, seen)
    again["refused-64x64"] = partial(refused_64, host)
    again["blocks-64x64"] = partial(blocks_64, host, seen)
    leg.jobs(again)

    def compare(name: str) -> None:
        seen.require_equal(host, f"{name} a pushed", f"{name} a fresh")
        seen.require_equal(host, f"{name} b pushed", f"{name} b fresh")

    for name in ("refit", "v1-v2-refit"):
        if leg.wants(name):
            leg.job(f"{name} compared", partial(compare, name))
    # vLLM gives all that it fuses one scale, with V1 as without it; refit keeps each.
    leg.job("V1 changes nothing", lambda: seen.require_equal(host, "v1 a fresh", "stock a fresh"))
    leg.job("one scale", lambda: differ(host, seen, "refit a fresh", "stock a fresh"))
    leg.job(
        "await-push",
        lambda: seen.require_equal(host, "v1-await-push b pushed", "refit b fresh"),
    )
    # Another GEMM, so not equal.
    names = ("refit a fresh", "v1-v2-refit a fresh")
    leg.job("V2 beside refit", lambda: differ(host, seen, *names))


def _models(host: Host) -> tuple[Path, Path]:
    kind = "wide" if host.device == "cuda" else "tiny8b"
    return host.model(f"{kind}-a"), host.model(f"{kind}-b")


def _overlay(host: Host, name: str) -> Path:
    return host.work / "overlays" / name


def _patches(host: Host, name: str) -> tuple[str, ...]:
    return (_REHEARSED if host.device == "cpu" else _MORE)[name]


def _options(host: Host, name: str) -> tuple[str, ...]:
    overlay = ("--overlay", str(_overlay(host, name))) if _patches(host, name) else ()
    return (*MODE, *overlay)


def one_set(
    host: Host, seen: path.Seen, name: str, models: tuple[Path, Path], meeting: _Meeting
) -> None:
    """Start A; log-probabilities; push B, A; tokens per second when the others are quiet."""
    leg = host.leg
    with contextlib.ExitStack() as stack:
        stack.enter_context(meeting.join())
        with leg.step("launch") as told:
            # Without refit V2 answers NaN: that is to be seen, not to end the job.
            server = stack.enter_context(
                host.launched(
                    host.backend("vllm"),
                    models[0],
                    *_options(host, name),
                    "--no-check",
                    limit=_START,
                    again=1,
                )
            )
            told |= {"ready": server.seconds, "seen": f"ready after {server.seconds:.1f} s"}
        path.graphs(host, server)
        with leg.step("log-probabilities of A") as told:
            said = server.said()
            told |= {"finite": said.finite(), "patches": SETS[name]}
            told["seen"] = "finite" if said.finite() else "NaN among them"
            if said.finite():
                seen.said[f"{name} a fresh"] = said
            elif "refit" in SETS[name]:
                raise FailedError("NaN in log-probabilities, with refit")
        _push(host, seen, name, server, models)
        with leg.step("tokens per second") as told:
            quiet = meeting.wait("ready", leg.left(150))
            told["quiet"] = quiet
            with meeting.turn:
                new, at_once = (128, 32) if host.device == "cuda" else (8, 2)
                one = ask.speed(server.url, server.backend, server.model, 1, new)
                many = ask.speed(server.url, server.backend, server.model, at_once, new)
            told |= {"one": one, "many": many}
            told["seen"] = f"{one['seen']}; {many['seen']}{'' if quiet else ' (others ran)'}"
            # A server that stops would disturb the next.
            meeting.wait("measured", leg.left(60))


def _push(
    host: Host, seen: path.Seen, name: str, server: Server, models: tuple[Path, Path]
) -> None:
    leg = host.leg
    if "refit" not in SETS[name]:
        with leg.step("push without refit is refused") as told:
            argv = ("push", server.url, "--model", str(models[1]))
            document = host.answer(*argv, limit=60)
            if document["ok"]:
                raise FailedError("it was taken")
            told["seen"] = f"{document['error']['id']}: {document['error']['message']}"
        return
    with leg.step("20 updates") as told, Trainer(host) as trainer:
        walls = []
        for turn in range(20):
            update = trainer.push(server, models[1 - turn % 2], 60, version=f"turn-{turn}")
            walls.append(round(update["wall"], 4))
            if turn in (0, 1, 18, 19):
                letter = "ba"[turn % 2]
                said = path.finite(server.said())
                kept = f"{name} {letter} pushed"
                if kept in seen.said:
                    ask.require_equal(said, seen.said[kept], f"update {turn}")
                seen.said[kept] = said
        told |= {"walls": walls, "seen": f"{min(walls)} to {max(walls)} s each"}


def await_push(host: Host, seen: path.Seen) -> None:
    """What V1 is for: 16-bit weights at the start, FP8 ones later."""
    leg = host.leg
    options = (*_options(host, "v1-refit"), "--await-push")
    models = _models(host)
    backend = host.backend("vllm")
    with contextlib.ExitStack() as stack:
        with leg.step("launch --await-push") as told:
            start = host.launched(backend, models[0], *options, limit=_START, again=1)
            server = stack.enter_context(start)
            told |= {"ready": server.seconds, "seen": f"ready after {server.seconds:.1f} s"}
        path.pushed(host, server, models[1])
        path.checked(host, server, models[1])
        with leg.step("log-probabilities"):
            seen.said["v1-await-push b pushed"] = path.finite(server.said())


_BLOCK = ("--mode", "block", "--block-size", "64,64")


def refused_64(host: Host) -> None:
    """Blocks of 64x64 are refused where a kernel for 128x128 would take them."""
    with host.leg.step("64x64, of layers that divide by 128") as told:
        argv = ["launch", "--backend", host.backend("vllm"), "--model", str(host.model("dense-a"))]
        overlay = ("--overlay", str(_overlay(host, "refit")))
        document = host.answer(*argv, *_BLOCK, *overlay, "--dry-run", limit=60)
        if document["ok"]:
            if host.device == "cpu":
                raise SkippedError("only where there are such kernels")
            raise FailedError("it was not refused")
        told["seen"] = f"{document['error']['id']}: {document['error']['message']}"


def blocks_64(host: Host, seen: path.Seen) -> None:
    """Blocks of 64x64 are served where no kernel for 128x128 takes the layers."""
    options = (*_BLOCK, "--overlay", str(_overlay(host, "refit")))
    models = (host.model("narrow-a"), host.model("narrow-b"))
    path.served(host, seen, "64x64", host.backend("vllm"), options, models, limit=_START)
    seen.require_equal(host, "64x64 a pushed", "64x64 a fresh")


def differ(host: Host, seen: path.Seen, one: str, other: str) -> None:
    """Tell how far apart two servers' log-probabilities are, which nobody expects to be equal."""
    with host.leg.step(f"{other} beside {one}") as told:
        if any(name not in seen.said for name in (one, other)):
            raise SkippedError("not seen")
        found = ask.difference(seen.said[one], seen.said[other])
        told |= found
        told["seen"] = f"mean {found['mean_difference']:.3g}, max {found['max_difference']:.3g}"
