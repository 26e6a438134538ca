"""`fp8ctl bench push`: updates of a running server, measured stage by stage.

The server is sent the weights that it holds, all of them and by the whole way (no delta, proven
by digests), and serves what it served. The first update stands apart: it connects, and kernels
are compiled.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from fp8ctl import models, pushing, sendable
from fp8ctl.check.command import parse_url
from fp8ctl.errors import CheckFailedError, ConflictError
from fp8ctl.interpreter import resolve_model, run_worker
from fp8ctl.render import human_bytes, plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fp8ctl.manifest import Plan
    from fp8ctl.render import Reporter

NAME: Final = "bench-push"
"""Version of what is sent to a server whose weights have no name yet."""


def run(
    report: Reporter,
    *,
    url: str,
    model: str | None = None,
    updates: int = 3,
    via: str = "ipc",
    bucket_size: int = pushing.BUCKET,
    device: str | None = None,
    python: Path | None = None,
) -> dict[str, object]:
    """Measure updates of one server; arguments are those of `fp8ctl bench push`.

    Args:
        model: the weights that it serves; None: those that it was started with.
        updates: how many, behind the first.
        bucket_size: in MB.
        device: where the weights lie before, as a trainer's would: cpu or cuda; None: on the CPU.

    Raises:
        UsageError: something of this cannot be meant.
        ConflictError: nobody knows which weights the server has.
        CheckFailedError: it did not find what it holds equal to what was sent.
        Fp8ctlError: what a push raises.
    """
    pushing.require_via(via)
    address = parse_url(url)
    state = pushing.state_of(address)
    plan = pushing.plan_of([address])
    local = pushing.local_python([address])
    folder = resolve_model(report, _model(address, state, plan, model), python or local)
    source = models.read_checkpoint(folder)
    sendable.require(source, plan)
    version = state.get("version")
    arguments = {
        "urls": [address],
        "plan": None if plan is None else plan.to_json(),
        "model": str(folder.absolute()),
        "via": via,
        # A name of its own where the server has none: another benchmark must not take what is
        # served now for what the server was started with.
        "version": str(version or (NAME if model is None else f"{NAME} {folder.name}")),
        "bucket_bytes": bucket_size * 1_000_000,
        "quantized": sendable.is_quantized(source),
        "updates": updates,
        "device": device,
    }
    with pushing.hints_of_options():
        interpreter = pushing.sending_python(python, local)
        found = run_worker(interpreter, NAME, arguments, report, "bench push")
    data = _document(found["updates"], address)
    data |= {
        "url": address,
        "model": str(folder),
        "mode": "online" if plan is None else plan.mode.value,
        "via": via,
        "device": device or "cpu",
        "server": {k: state.get(k) for k in ("engine", "engine_version", "device", "ranks")},
        "bytes_16_bit": source.nbytes,
    }
    _tell(report, data)
    if plan is not None and any(one["verified"] is None for one in found["updates"]):
        raise CheckFailedError(
            f"{address} could not prove that it holds what was sent",
            hint=f"fp8ctl check --level weights {address}",
            data=data,
        )
    return data


def _model(url: str, state: Mapping[str, Any], plan: Plan | None, asked: str | None) -> str:
    """Return the model whose weights the server holds.

    Raises:
        ConflictError: nobody knows it.
    """
    if state.get("state") != "ready":
        raise ConflictError(
            f"{url} is {state.get('state')}: it serves no weights that could be sent again",
            hint=f"fp8ctl push {url} --model M",
        )
    if asked is not None:
        return asked
    if state.get("updates") and state.get("version") != NAME:
        named = state.get("version")
        raise ConflictError(
            f"{url} serves {'other weights' if named is None else f'version {named}'} than it was"
            " started with: the benchmark would put those back",
            hint="--model of the weights that it serves",
        )
    if plan is None:
        raise ConflictError(
            f"{url} quantises by itself, and does not tell its model", hint="--model of its weights"
        )
    return str(plan.model)


def _document(updates: Sequence[Mapping[str, Any]], url: str) -> dict[str, object]:
    first, *rest = updates
    stages = list(dict.fromkeys(stage for one in updates for stage in one["stages"]))
    total = _median(rest, "stages", "total")
    return {
        "updates": list(updates),
        "stages": {
            stage: {
                "first": first["stages"].get(stage, 0.0),
                "median": _median(rest, "stages", stage),
                "best": min(one["stages"].get(stage, 0.0) for one in rest),
            }
            for stage in stages
        },
        "loading": {
            stage: _median([one["loading"][url] for one in rest], stage)
            for stage in dict.fromkeys(s for one in rest for s in one["loading"][url])
        },
        "tensors": first["sent"],
        "bytes": first["bytes_sent"],
        "seconds": total,
        "gb_s": first["bytes_sent"] / total / 1e9,
    }


def _median(those: Sequence[Mapping[str, Any]], *path: str) -> float:
    found = []
    for one in those:
        value: Any = one
        for key in path[:-1]:
            value = value[key]
        found.append(float(value.get(path[-1], 0.0)))
    return statistics.median(found)


def _tell(report: Reporter, data: Mapping[str, Any]) -> None:
    stages: Mapping[str, Mapping[str, float]] = data["stages"]
    rows = [
        [stage, *(f"{one[key]:.3f}" for key in ("first", "median", "best"))]
        for stage, one in stages.items()
    ]
    report.table(("stage", "first s", "median s", "best s"), rows)
    loading: Mapping[str, float] = data["loading"]
    report.table(("in the server", "median s"), [[k, f"{v:.3f}"] for k, v in loading.items()])
    count = len(data["updates"]) - 1
    report.data(
        f"{plural(count, 'update')} of {plural(data['tensors'], 'tensor')},"
        f" {human_bytes(data['bytes'])} (16 bits: {human_bytes(data['bytes_16_bit'])}):"
        f" median {data['seconds']:.3f} s, {data['gb_s']:.2f} GB/s"
    )
