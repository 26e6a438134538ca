"""The part of fp8ctl that imports torch, in a process and an interpreter of its own.

    python -m fp8ctl.worker TASK

Arguments come as one JSON object on stdin. Each line on stdout is one JSON
object: {"progress": [done, total]}, then {"result": {...}} or
{"error": {"id", "message", "hint", "data"}}. Whatever a library prints goes to
stderr. `TASKS` is the registry: a task takes its arguments and a progress
function and returns a JSON object. Python 3.10, standard library and torch;
`interpreter.run_worker` is the other end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fp8ctl.errors import AbortedError, Fp8ctlError, NotFoundError, UsageError
from fp8ctl.signals import interruptible

Progress = Callable[[int, int], None]
Task = Callable[[dict[str, Any], Progress], dict[str, Any]]


def quantize(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the checkpoint of `plan` (a manifest) to `out`; see `checkpoint.convert`."""
    from fp8ctl import checkpoint
    from fp8ctl.manifest import Plan

    return checkpoint.convert(
        Plan.from_json(arguments["plan"]),
        Path(arguments["out"]),
        progress,
        arguments.get("extra"),
        arguments.get("verify", "auto"),
    )


def expect(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Say what the FP8 form of `plan`'s model is.

    `only`, if given, names the source's tensors to read. With `online` (`online.Kernel` as JSON)
    it is what an engine makes of it by itself, with `shared` what a stock one does (`requantised`).

    Returns:
        `digests`: name to 16 hexadecimal digits, one for each recipe that would be right;
        `quality`: `quality.measure` of each quantised tensor, where nothing is left out.
    """
    from fp8ctl import checkpoint, online, requantised
    from fp8ctl.kernels.digest import to_text
    from fp8ctl.manifest import Plan

    plan = Plan.from_json(arguments["plan"])
    only = arguments.get("only")
    quality: dict[str, dict[str, float]] = {}
    found: dict[str, list[int]]
    if arguments.get("online"):
        kernel = online.Kernel.from_json(arguments["online"])
        found = online.expected_digests(plan, kernel, progress, quality)
    elif arguments.get("shared"):
        found = requantised.expected_digests(plan, progress, quality)
    else:
        wanted = None if only is not None else quality
        told = checkpoint.expected_digests(plan.model, plan, progress, only=only, quality=wanted)
        found = {name: [value] for name, value in told.items()}
    digests = {name: [to_text(value) for value in values] for name, values in found.items()}
    return {"digests": digests, "quality": quality}


def examine(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Return `tensors`: of each that the lines `told` are of, what `difference.examine` says."""
    from fp8ctl import difference, online
    from fp8ctl.manifest import Plan

    plan = Plan.from_json(arguments["plan"])
    if arguments.get("online"):
        kernel = online.Kernel.from_json(arguments["online"])
        return {"tensors": online.examine(plan, kernel, arguments["told"], progress)}
    return {"tensors": difference.examine(plan, arguments["told"], progress)}


def logprobs(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Return what `model` says of fixed texts: `ids`, and `expected` as `expectation.compute`.

    Texts come as `ids`, or as `texts` of which at most `cap` tokens count. `hypotheses` has for
    each name a `plan`, or none, and whether weights are `scaled`.
    """
    from fp8ctl import expectation
    from fp8ctl.manifest import Plan

    folder = Path(arguments["model"])
    ids = arguments.get("ids")
    if ids is None:
        ids = expectation.tokenise(folder, arguments["texts"], arguments["cap"])
    hypotheses = {
        name: (Plan.from_json(one["plan"]) if one["plan"] else None, bool(one["scaled"]))
        for name, one in arguments["hypotheses"].items()
    }
    expected = expectation.compute(folder, ids, hypotheses, progress)
    return {"ids": ids, "expected": expected, "peak_memory": expectation.peak_memory()}


def fetch(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fetch the Hub model `repository` at `revision`; return its `path`."""
    repository, revision = arguments["repository"], arguments.get("revision")
    try:
        snapshot_download = importlib.import_module("huggingface_hub").snapshot_download
    except ImportError as e:
        raise NotFoundError(
            f"model {repository} is not in the local cache, and {sys.executable} has no"
            " huggingface_hub to fetch it with",
            hint="pip install huggingface_hub",
        ) from e
    try:
        path = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"],
        )
    except (OSError, ValueError) as e:
        # huggingface_hub's errors, offline included, derive from one of the two.
        raise NotFoundError(
            f"cannot fetch model {repository}: {str(e).strip().splitlines()[0]}",
            hint="give the folder of a checkpoint, or fetch the model where there is a network",
        ) from e
    return {"path": path}


def demo_model(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the GGUF file `gguf` as a BF16 checkpoint to the folder `out`."""
    from fp8ctl import gguf

    return gguf.convert(Path(arguments["gguf"]), Path(arguments["out"]), progress)


def bench_kernel(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure the kernels; return the `document`, and its table: `heading`, `columns`, `cells`."""
    try:
        from fp8ctl.kernels import bench, recipes
        from fp8ctl.kernels.timing import NoCudaError
    except ImportError as e:
        raise NotFoundError(
            f"{sys.executable} cannot run the kernels: {e}",
            hint="--python /path/to/bin/python of an environment with torch",
        ) from e
    try:
        recipe = recipes.named(arguments["recipe"])
    except ValueError as e:
        raise UsageError(str(e), hint="fp8ctl bench kernel --recipe ieee") from e
    try:
        document = bench.run(arguments["device"], recipe, arguments["quick"], progress=progress)
    except NoCudaError as e:
        raise NotFoundError(f"no CUDA device: {e}", hint="fp8ctl bench kernel --device cpu") from e
    columns, cells = bench.table(document)
    return {
        "document": document,
        "heading": bench.describe(document),
        "columns": columns,
        "cells": cells,
    }


def push(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Send the checkpoint `model` to the servers `urls`; return what `push.Update` says."""
    from fp8ctl import models
    from fp8ctl.push import Rollout

    _as_engines()
    folder = Path(arguments["model"])
    rollout = Rollout(
        arguments["urls"],
        arguments["plan"],
        via=arguments["via"],
        bucket_bytes=arguments["bucket_bytes"],
        in_flight=arguments["in_flight"],
        delta=arguments["delta"],
        record=arguments["record"],
        folder=arguments["folder"],
        timeout=arguments["timeout"],
        master=arguments["master"],
    )
    total = models.read_checkpoint(folder).nbytes
    with _once_interrupted(), rollout:
        update = rollout.update(
            _weights(arguments),
            arguments["version"],
            on_progress=lambda told: progress(told.nbytes, told.total_bytes or total),
            quantized=arguments["quantized"],
        )
        return update.to_json()


def _weights(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return what is pushed: the tensors of `model`, or its codes and scales."""
    from fp8ctl import source
    from fp8ctl.manifest import Plan

    folder = Path(arguments["model"])
    if arguments["quantized"]:
        return source.read_made(folder, Plan.from_json(arguments["plan"]))
    return source.read_tensors(folder)


def bench_push(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Push `model` once and `updates` times more; return what `push.Update` says of each."""
    from fp8ctl.push import Rollout

    _as_engines()
    where = arguments["device"]
    # In memory, as a trainer has them.
    weights = [
        (name, tensor.clone() if where is None else tensor.to(where))
        for name, tensor in _weights(arguments)
    ]
    rollout = Rollout(
        arguments["urls"],
        arguments["plan"],
        via=arguments["via"],
        bucket_bytes=arguments["bucket_bytes"],
    )
    found: list[dict[str, Any]] = []
    count = 1 + int(arguments["updates"])
    with _once_interrupted(), rollout:
        for i in range(count):
            progress(i, count)
            done = rollout.update(weights, arguments["version"], quantized=arguments["quantized"])
            found.append(done.to_json())
    progress(count, count)
    return {"updates": found}


def _as_engines() -> None:
    """Have NCCL share memory as it does in both engines: ranks that differ in it wait for ever."""
    from fp8ctl.carriers.nccl import CUMEM

    os.environ.setdefault(CUMEM, "0")


@contextlib.contextmanager
def _once_interrupted() -> Iterator[None]:
    """Have the first signal end the work, and no other disturb what is put in order then.

    Raises:
        AbortedError: there was a signal.
    """
    try:
        with interruptible(once=True):
            yield
    except KeyboardInterrupt:
        raise AbortedError("interrupted") from None


TASKS: dict[str, Task] = {
    "quantize": quantize,
    "expect": expect,
    "examine": examine,
    "logprobs": logprobs,
    "fetch": fetch,
    "demo-model": demo_model,
    "bench-kernel": bench_kernel,
    "bench-push": bench_push,
    "push": push,
}


def run(task: str, arguments: dict[str, Any], out: TextIO) -> int:
    """Run one task and write its lines to `out`; return the exit code."""

    def send(document: dict[str, Any]) -> None:
        out.write(json.dumps(document) + "\n")
        out.flush()

    last = 0.0

    def progress(done: int, total: int) -> None:
        # Ten lines a second are plenty for a bar.
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.1 or done >= total:
            last = now
            send({"progress": [done, total]})

    error: Fp8ctlError
    try:
        if task not in TASKS:
            raise UsageError(f"unknown task {task!r}; expected one of {', '.join(sorted(TASKS))}")
        result = TASKS[task](arguments, progress)
    except Fp8ctlError as e:
        error = e
    except Exception as e:  # noqa: BLE001 - the other end must hear of anything
        traceback.print_exc()
        error = Fp8ctlError(f"worker task {task}: unexpected {type(e).__name__}: {e}")
    else:
        send({"result": result})
        return 0
    body = {"id": error.id, "message": error.message, "hint": error.hint, "data": error.data}
    send({"error": body})
    return error.exit_code


def main() -> int:
    """Serve one task; stdout is kept for the protocol alone."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        if len(sys.argv) != 2:
            sys.stderr.write("usage: python -m fp8ctl.worker TASK < arguments.json\n")
            return UsageError.exit_code
        return run(sys.argv[1], json.load(sys.stdin), out)


if __name__ == "__main__":
    sys.exit(main())
