"""`fp8ctl push`: a checkpoint's weights into running servers, as a trainer sends its own.

What can be refused is refused here, before anything is sent: a server that cannot take a
push, one of another plan, a model of another shape. Then the worker (`worker`, in an
interpreter with torch) streams the checkpoint through `push.Rollout`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from fp8ctl import gate, models, registry, sendable, wire
from fp8ctl.check import command, levels, live, weights
from fp8ctl.check.command import parse_url
from fp8ctl.check.levels import Request
from fp8ctl.errors import (
    AbortedError,
    CheckFailedError,
    ConflictError,
    EngineFailedError,
    Fp8ctlError,
    UsageError,
)
from fp8ctl.interpreter import remembering, resolve_model, run_worker, torch_python
from fp8ctl.manifest import Plan
from fp8ctl.push.client import Server
from fp8ctl.render import human_bytes, plural
from fp8ctl.signals import interruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fp8ctl.models import Checkpoint
    from fp8ctl.render import Reporter

VIA: Final = ("ipc", "nccl", "disk")
BUCKET: Final = 512
"""MB of a bucket where nobody says otherwise."""
TIMEOUT: Final = 600.0
"""Seconds of a request where nobody says otherwise."""
_ASK: Final = 60.0
# Of a manifest: 70 000 tensors take 15 MB.
_LIMIT: Final = 256 << 20
# Until a worker that was told to stop has told the servers.
_PATIENCE: Final = 30.0


def _megabytes(found: re.Match[str]) -> str:
    return f"--bucket-size {-(-int(found[1]) // 1_000_000)}"


# What `Rollout` calls what, and the command.
_SPELLED: Final[Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]] = (
    (r", or Rollout\(urls, plan, api_key=KEY\)", ""),
    (r'Rollout\(urls, plan, via="nccl", master=ADDRESS\)', "--via nccl --master ADDRESS"),
    (r'Rollout\(urls, plan, via="disk", folder=PATH\)', "--via disk --folder PATH"),
    (r"Rollout\(urls, plan, (.*?)\)", r"\1"),
    (r'via="(\w+)"', r"--via \1"),
    (r'in_flight="(\w+)"', r"--in-flight \1"),
    (r"bucket_bytes=(\d+)", _megabytes),
    (r"bucket_bytes", "--bucket-size"),
    (r"record=PATH", "--record FILE"),
    (r"timeout=([\d.]+)", r"--timeout \1"),
)


def run(
    report: Reporter,
    *,
    urls: Sequence[str],
    model: str,
    via: str = "ipc",
    version: str | None = None,
    delta: bool = False,
    record: Path | None = None,
    in_flight: str = "finish",
    bucket_size: int = BUCKET,
    timeout: float = TIMEOUT,
    master: str | None = None,
    folder: Path | None = None,
    check: bool = True,
    dry_run: bool = False,
    python: Path | None = None,
) -> dict[str, object]:
    """Send a checkpoint to servers; arguments are those of `fp8ctl push`.

    Args:
        bucket_size: in MB.
        timeout: seconds that any request, or waiting for requests in flight, may take.
        master: address of this host that the servers reach, for a process group.
        folder: where `disk` writes, and the servers read.
        check: end with the live check of every server.

    Raises:
        UsageError, NotFoundError, UnsupportedError, ConflictError: it was refused, and nothing
            was sent.
        CheckFailedError: a server holds something else than was sent, or does not answer well.
        AbortedError: Ctrl-C or SIGTERM; the message says what state the servers are in.
        Fp8ctlError: what `push.Rollout` raises.
    """
    _require_sense(urls, via, in_flight, delta)
    _require_fitting(via, timeout, master, folder)
    addresses = list(dict.fromkeys(parse_url(url) for url in urls))
    states = {url: state_of(url) for url in addresses}
    plan = plan_of(addresses)
    local = local_python(addresses)
    where = resolve_model(report, model, python or local, fetch=not dry_run)
    source = models.read_checkpoint(where)
    sendable.require(source, plan)
    version = version or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for url, state in states.items():
        report.say(f"{url}: {_told(state)}")
    report.say(_planned(source, plan, via))
    data: dict[str, Any] = {
        "servers": addresses,
        "model": str(where),
        "version": version,
        "via": via,
        "plan_digest": None if plan is None else plan.digest,
        "mode": "online" if plan is None else plan.mode.value,
        "states": states,
        "dry_run": dry_run,
    }
    if dry_run:
        return data
    arguments = {
        "urls": addresses,
        "plan": None if plan is None else plan.to_json(),
        "model": str(where.absolute()),
        "quantized": sendable.is_quantized(source),
        "via": via,
        "version": version,
        "delta": delta,
        "in_flight": in_flight,
        "bucket_bytes": bucket_size * 1_000_000,
        "timeout": timeout,
        "master": master,
        "record": _spelled(record),
        "folder": _spelled(folder),
    }
    update = _pushed(report, sending_python(python, local), arguments)
    data |= {"update": update} | _evidence(plan, update)
    _tell(report, data, update)
    proof = _proof(data)
    message = str(proof["message"])
    if check:
        with remembering(*levels.OF_THE_SOURCE):
            message = _check(report, plan, data, proof)
    report.data(f"{command.worded(data['verdict'], message)}, version {version}")
    return data


def _require_sense(urls: Sequence[str], via: str, in_flight: str, delta: bool) -> None:
    if not urls:
        raise UsageError("no server was named", hint="fp8ctl ps lists the servers of fp8ctl")
    require_via(via)
    if in_flight not in get_args(wire.InFlight):
        known = ", ".join(get_args(wire.InFlight))
        raise UsageError(
            f"--in-flight {in_flight!r}; expected one of {known}", hint="--in-flight finish"
        )
    if via == "disk" and delta:
        raise UsageError(
            "--delta with --via disk: an engine's own reload takes whole checkpoints",
            hint="--via ipc or --via nccl",
        )


def require_via(via: str) -> None:
    """Refuse a way that nobody knows.

    Raises:
        UsageError: `via` is none of `VIA`.
    """
    if via not in VIA:
        raise UsageError(f"--via {via!r}; expected one of {', '.join(VIA)}", hint="--via ipc")


def _require_fitting(via: str, timeout: float, master: str | None, folder: Path | None) -> None:
    if not 0 < timeout < 1e6:
        raise UsageError(f"--timeout {timeout:g}; expected seconds", hint="--timeout 600")
    for option, said, of in (("--master", master, "nccl"), ("--folder", folder, "disk")):
        if said is not None and via != of:
            raise UsageError(
                f"{option} {said} with --via {via}: it is for --via {of}", hint=f"--via {of}"
            )


def _spelled(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())


def state_of(url: str) -> dict[str, Any]:
    """Return what a server says of itself.

    Raises:
        Fp8ctlError: it is none that could take a push.
    """
    with (
        hints_of_options(),
        contextlib.closing(Server(url, gate.api_key(), _ASK, None)) as server,
    ):
        return server.state()


def plan_of(urls: Sequence[str]) -> Plan | None:
    """Return the plan that all servers were started with; None where the engine quantises.

    Raises:
        ConflictError: they have different ones.
    """
    found = {url: _manifest(url) for url in urls}
    digests = {url: str(document.get("digest", "")) for url, document in found.items()}
    if len(set(digests.values())) > 1:
        told = ", ".join(f"{url} {digest[:16] or 'none'}" for url, digest in digests.items())
        raise ConflictError(
            f"the servers have different plans: {told}",
            hint="push to each by itself, or launch all with one --plan",
            data={"plans": digests},
        )
    document = next(iter(found.values()))
    return Plan.from_json(document) if document else None


def _manifest(url: str) -> dict[str, Any]:
    """Return the manifest by which a server takes weights; {} where it has none.

    Raises:
        EngineFailedError: it does not tell.
    """
    try:
        status, body = gate.get(url, wire.PLAN, gate.api_key(), _ASK, _LIMIT)
        manifest: dict[str, Any] | None = json.loads(body)["manifest"] if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as e:
        raise _untold(url, f"{type(e).__name__}: {e}") from e
    if manifest is None:
        raise _untold(url, f"it answers {status}")
    return manifest


def _untold(url: str, why: str) -> EngineFailedError:
    return EngineFailedError(
        f"{url} does not tell its plan ({wire.PLAN}): {why}",
        hint="fp8ctl ps; fp8ctl logs NAME",
    )


def local_python(urls: Sequence[str]) -> Path | None:
    """Return the interpreter of a server that fp8ctl started on this machine: it has torch."""
    records = (registry.read(name) for name in registry.names())
    return next((Path(r.python) for r in records if r and r.url.rstrip("/") in urls), None)


def sending_python(asked: Path | None, local: Path | None) -> Path:
    """Return the interpreter that sends: one that sees the same devices as the server does."""
    from fp8ctl import environment

    if asked is not None:
        found = environment.find(asked, None).python
        assert found is not None  # only a bare folder has none
        return found
    return local if local is not None and local.exists() else torch_python()


def _pushed(report: Reporter, python: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Have the worker push; on a signal see to it that the servers were told."""
    title = f"push {Path(arguments['model']).name}"
    try:
        with interruptible(), hints_of_options():
            return run_worker(python, "push", arguments, report, title, patience=_PATIENCE)
    except (KeyboardInterrupt, AbortedError):
        raise _interrupted(arguments["urls"]) from None
    except Fp8ctlError as e:
        told = _states(arguments["urls"])
        e.data["states"] = {url: answer.state for url, answer in told.items()}
        broken = [url for url, answer in told.items() if answer.state == "failed"]
        if broken:
            report.warn(
                f"{', '.join(broken)}: part of an update may be in place, so it answers 503"
                " until a push succeeds"
            )
        raise


@contextlib.contextmanager
def hints_of_options() -> Iterator[None]:
    """Turn hints for who calls `Rollout` into such that can be typed behind `fp8ctl push`."""
    try:
        yield
    except Fp8ctlError as e:
        for found, spelled in _SPELLED:
            e.hint = e.hint and re.sub(found, spelled, e.hint)
        raise


def _interrupted(urls: Sequence[str]) -> AbortedError:
    meaning = {
        "ready": "serves what it served before",
        "unpushed": "still waits for its weights",
        "updating": "ends the update by itself",
        "failed": "answers 503 until a push succeeds",
    }
    told = _states(urls)
    words = [f"{u} is {a.state} ({meaning.get(a.state, a.message)})" for u, a in told.items()]
    again = any(answer.state != "ready" for answer in told.values())
    return AbortedError(
        f"interrupted; {'; '.join(words)}",
        hint="fp8ctl push again, or fp8ctl ps" if again else None,
        data={"states": {url: answer.state for url, answer in told.items()}},
    )


def _states(urls: Sequence[str]) -> dict[str, gate.Answer]:
    return {url: gate.ask(url, gate.api_key(), timeout=10.0) for url in urls}


def _evidence(plan: Plan | None, update: Mapping[str, Any]) -> dict[str, object]:
    """Return the verdict that the servers' own digests give."""
    tensors = int(update["sent"]) + int(update["skipped"])
    verified = update["verified"]
    proven = plan is not None and verified is not None and int(verified) >= tensors > 0
    return {"tensors": tensors, "verified": verified, "verdict": "fp8-ok" if proven else None}


def _tell(report: Reporter, data: Mapping[str, object], update: Mapping[str, Any]) -> None:
    stages: Mapping[str, float] = update["stages"]
    rows = [[stage, f"{seconds:.3f}"] for stage, seconds in stages.items()]
    report.table(("stage", "seconds"), rows)
    total = stages.get("total", 0.0)
    sent = update["bytes_sent"]
    rate = f", {human_bytes(sent / total)}/s" if sent and total else ""
    skipped = ""
    if update["skipped"]:
        held = human_bytes(update["bytes_skipped"])
        skipped = f"; {plural(update['skipped'], 'tensor')} ({held}) were there already"
    report.data(
        f"sent {plural(update['sent'], 'tensor')}, {human_bytes(sent)} in"
        f" {plural(update['buckets'], 'bucket')} and {total:.2f} s{rate}{skipped}"
    )
    if why := update["carrier"]["why"]:
        report.data(f"by NCCL, not by copies from GPU to GPU, which are faster: {why}")
    ranks = "every rank of " + plural(len(update["servers"]), "server")
    if data["verified"] is None:
        report.data("weights: not visible: the engine quantised them itself")
    else:
        report.data(f"weights: {data['verified']} of {data['tensors']} tensors equal in {ranks}")


def _proof(data: Mapping[str, Any]) -> dict[str, object]:
    """Return what the servers' own digests prove, as the weights level says it."""
    counts = {"equal": data["verified"] or 0}
    common = {"verdict": data["verdict"], "counts": counts, "tensors": [], "model": data["model"]}
    if data["verdict"] == "fp8-ok":
        told = f"{data['verified']} tensors equal what was sent, in every rank"
        return {"result": "ok", "message": told, **common}
    if data["verified"] is None:
        told = "nobody can compare what the engine quantised itself"
        return {"result": "not visible", "message": told, **common}
    told = f"{data['verified']} of {data['tensors']} tensors are known to equal what was sent"
    return {"result": "not visible", "message": told, **common}


def _check(
    report: Reporter, plan: Plan | None, data: dict[str, Any], proof: Mapping[str, object]
) -> str:
    """Check every server once, with what it now holds; return what the verdict rests on.

    The weights level is what the push itself has found: every rank digested what it holds. Where
    that proves nothing and there is a plan, the weights are compared with the checkpoint.

    Raises:
        CheckFailedError: a server does not answer well, or holds something else; its data is
            all of the push's.
    """
    data["checks"] = found = {}
    request = Request("", "weights", str(data["model"]))
    ends = []
    for url in data["servers"]:
        began = time.time()
        seen = live.check(url)
        levels.tell(report, seen)
        held = proof
        if held["result"] != "ok" and plan is not None and seen.result == "ok":
            held = weights.verify(url, request.model, report, gate.api_key())
        whole = levels.assemble(replace(request, url=url), seen, {"weights": held}, began)
        found[url] = whole.data
        if whole.conclusion.result == "failed":
            data["verdict"] = whole.conclusion.verdict
            what = "does not answer well" if seen.result != "ok" else "holds something else"
            raise CheckFailedError(
                f"{url} took the weights, and {what}: {whole.conclusion.message}",
                hint=f"fp8ctl check {url}",
                data=data,
            )
        ends.append(whole.conclusion)
    # Of several servers the least that is proven.
    least = min(ends, key=lambda end: end.verdict is not None)
    data["verdict"] = least.verdict
    return least.message


def _told(state: Mapping[str, Any]) -> str:
    version = state.get("version")
    return (
        f"{state.get('engine')} {state.get('engine_version')} on {state.get('device')},"
        f" {state.get('state')}" + (f", version {version}" if version is not None else "")
    )


def _planned(source: Checkpoint, plan: Plan | None, via: str) -> str:
    if plan is None:
        return f"{human_bytes(source.nbytes)} in 16 bits, via {via}: the engine quantises them"
    block = f" in blocks of {plan.block.label}" if plan.block else ""
    count = sum(1 for _ in plan.quantized)
    if sendable.is_quantized(source):
        form = f"{plan.mode.value}{block}"
        return f"{human_bytes(plan.bytes_after)} in FP8 as they are, via {via}: {form}"
    return (
        f"{human_bytes(plan.bytes_before)} -> {human_bytes(plan.bytes_after)}, via {via}:"
        f" {count} of {len(plan.tensors)} tensors to FP8, {plan.mode.value}{block}"
    )
