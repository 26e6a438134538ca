"""What both engines' legs do with one server: launch, check, push, check, push back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.gpu import ask
from tests.gpu.leg import FailedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.gpu.ask import Backend, Said
    from tests.gpu.host import Host, Server

Json = dict[str, Any]

# What an engine's log says once its CUDA graphs are there.
_CAPTURED = {"sglang": "Capture cuda graph end", "vllm": "Graph capturing finished"}


class Seen:
    """What servers said, by name, until it is compared."""

    def __init__(self) -> None:
        self.said: dict[str, Said] = {}

    def require_equal(self, host: Host, one: str, other: str) -> None:
        """Compare as a step; what was not seen is skipped with the reason."""
        with host.leg.step(f"{one} = {other}") as seen:
            missing = [name for name in (one, other) if name not in self.said]
            if missing:
                from tests.gpu.leg import SkippedError

                raise SkippedError(f"not seen: {', '.join(missing)}")
            seen |= ask.require_equal(self.said[one], self.said[other], f"{one}, {other}")


def patched(host: Host, backend: Backend) -> None:
    """Type what comes before a launch."""
    leg = host.leg
    with leg.step("doctor"):
        host.fp8ctl("doctor", *host.target, limit=60)
    with leg.step("patch"):
        host.fp8ctl("patch", *host.target, "--backend", backend, limit=60)


def planned(host: Host, backend: Backend, model: Path, *options: str) -> None:
    with host.leg.step("plan"):
        gpu = ("--gpu", "none") if host.device == "cpu" else ()
        argv = ("plan", "--model", str(model), "--backend", backend, *gpu, *options)
        host.fp8ctl(*argv, limit=60)


def graphs(host: Host, server: Server) -> None:
    """See that CUDA graphs were captured."""
    if host.device == "cpu":
        return
    with host.leg.step("CUDA graphs") as seen:
        log = host.work / "home" / "state" / "servers" / server.name / "server.log"
        text = log.read_text(errors="replace")
        if _CAPTURED[server.backend] not in text:
            raise FailedError(f"no {_CAPTURED[server.backend]!r} in its log")
        lines = [line for line in text.splitlines() if _CAPTURED[server.backend] in line]
        seen["seen"] = lines[-1].strip()


def checked(host: Host, server: Server, model: Path | None = None) -> None:
    """See that every code and scale in every worker is the source's."""
    with host.leg.step(f"check --level weights{f' --model {model.name}' if model else ''}") as seen:
        more = () if model is None else ("--model", str(model))
        data = host.data("check", server.url, "--level", "weights", *more, limit=90)
        seen |= {"verdict": data["verdict"], "seen": data["weights"]["message"]}
        if data["verdict"] != "fp8-ok":
            raise FailedError(f"{data['verdict']}: {data['weights']['message']}")


def pushed(host: Host, server: Server, model: Path, *more: str) -> None:
    with host.leg.step(f"push {model.name}") as seen:
        data = host.data("push", server.url, "--model", str(model), *more, limit=90)
        seen |= {"update": data["update"], "verdict": data["verdict"]}
        total = data["update"]["stages"].get("total", 0.0)
        seen["seen"] = f"{data['verdict']}, {data['update']['sent']} tensors in {total:.2f} s"


def served(
    host: Host,
    seen: Seen,
    name: str,
    backend: Backend,
    options: tuple[str, ...],
    models: tuple[Path, Path],
    *,
    limit: float,
    proves: bool = True,
    between: Callable[[Server], None] | None = None,
) -> None:
    """Launch A, push B, push A again; keep what the server said each time.

    Args:
        host: where.
        seen: takes "NAME a fresh", "NAME b pushed", "NAME a pushed".
        name: of the configuration.
        backend: whose server.
        options: of the launch.
        models: A and B.
        limit: seconds for a start.
        proves: whether `check --level weights` can: not where the engine quantises.
        between: what else to do with the server.
    """
    leg = host.leg
    one, two = models
    with leg.step("launch") as told:
        start = host.launched(backend, one, *options, limit=limit, again=backend == "vllm")
        server = start.__enter__()
        told |= {"ready": server.seconds, "seen": f"ready after {server.seconds:.1f} s"}
    try:
        graphs(host, server)
        if proves:
            checked(host, server)
        with leg.step("log-probabilities of A"):
            seen.said[f"{name} a fresh"] = finite(server.said())
        pushed(host, server, two)
        if proves:
            checked(host, server, two)
        with leg.step("log-probabilities of B"):
            seen.said[f"{name} b pushed"] = finite(server.said())
        pushed(host, server, one)
        with leg.step("log-probabilities of A, pushed"):
            seen.said[f"{name} a pushed"] = finite(server.said())
        if between is not None:
            between(server)
    finally:
        start.__exit__(None, None, None)


def fresh(
    host: Host,
    seen: Seen,
    name: str,
    backend: Backend,
    options: tuple[str, ...],
    model: Path,
    *,
    limit: float,
) -> None:
    """Launch B: what a pushed B is compared with."""
    with (
        host.leg.step("launch, log-probabilities") as told,
        host.launched(backend, model, *options, limit=limit, again=backend == "vllm") as server,
    ):
        told |= {"ready": server.seconds, "seen": f"ready after {server.seconds:.1f} s"}
        seen.said[f"{name} b fresh"] = finite(server.said())


def finite(said: Said) -> Said:
    """Return it.

    Raises:
        FailedError: a log-probability is no number.
    """
    if not said.finite():
        bad = sum(value != value for value in said.values)
        raise FailedError(f"{bad} of {len(said.values)} log-probabilities are no numbers")
    return said


def reverted(host: Host, backend: Backend) -> None:
    """Stop what runs, take the patches off, and see that the files are the release's."""
    host.leg.overtime()
    with host.leg.step("revert") as seen:
        host.fp8ctl("stop", "--all", limit=60)
        host.fp8ctl("revert", *host.target, "--backend", backend, limit=60)
        seen |= host.require_released(backend)
