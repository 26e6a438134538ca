"""`fp8ctl quantize`, and the cache of quantised checkpoints that launch serves from.

The tensors are worked on by `fp8ctl.worker`; this module decides where the
result goes and whether it is there already.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from typing import TYPE_CHECKING, Any

from fp8ctl import formats, partial, paths
from fp8ctl.errors import ConflictError, NotPermittedError, UsageError
from fp8ctl.formats import BlockSize, Mode, parse_mode, parse_scale
from fp8ctl.interpreter import resolve_model, run_worker, torch_python
from fp8ctl.manifest import RECORD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fp8ctl.manifest import Plan
    from fp8ctl.render import Reporter

# Raised when the bytes that a plan leads to change: then no cached one counts.
_CACHE_SCHEMA = 1

# How much of the result is read again; `checkpoint.convert` says more.
VERIFY = ("auto", "all", "sample", "off")


def run(
    report: Reporter,
    *,
    out: Path,
    model: str | None = None,
    mode: str | None = None,
    block_size: str | None = None,
    backend: str | None = None,
    tp: int | None = None,
    python: Path | None = None,
    plan_file: Path | None = None,
    keep: Sequence[str] = (),
    quantize: Sequence[str] = (),
    gpu: str | None = None,
    scale: str | None = None,
    verify: str = "auto",
) -> dict[str, object]:
    """Convert a checkpoint to FP8 at `out`; return what was written and how fast.

    Args:
        plan_file: a manifest to follow; options beside it must say what it says.
    """
    from fp8ctl import planning
    from fp8ctl.environment import parse_backend
    from fp8ctl.render import human_bytes

    if verify not in VERIFY:
        raise UsageError(
            f"--verify {verify!r}; expected one of {', '.join(VERIFY)}", hint="--verify auto"
        )
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConflictError(f"{out} exists and is not empty", hint="--out /another/folder")
    _require_place(out)
    typed = planning.Typed(
        backend=None if backend is None else parse_backend(backend),
        mode=None if mode is None else parse_mode(mode),
        tp=tp,
        block=None if block_size is None else BlockSize.parse(block_size),
        gpu=None if gpu is None else planning.parse_gpu(gpu),
        keep=tuple(keep),
        quantize=tuple(quantize),
        recipe=None if scale is None else parse_scale(scale),
    )
    if plan_file is not None:
        plan = planning.read_plan(
            plan_file, typed, None if model is None else resolve_model(report, model, python)
        )
    elif model is not None:
        plan = planning.make_plan(
            resolve_model(report, model, python),
            typed.backend,
            typed.mode or Mode.BLOCK,
            typed.tp or 1,
            typed.block,
            gpu=planning.parse_gpu(gpu),
            keep=typed.keep,
            quantize=typed.quantize,
            recipe=typed.recipe or formats.RECIPE,
        )
    else:
        raise UsageError("--model is missing, and no --plan names one", hint="--model FOLDER")
    for line in planning.explain(plan):
        report.say(line)
    for note in plan.notes:
        report.warn(note)
    planning.require_fit(plan)
    started = time.monotonic()
    if partial.left(out) is not None:
        report.say("an earlier command was broken off: what it finished is kept, if it fits")
    try:
        result = _quantize(report, plan, out, torch_python(python), {}, verify)
    except KeyboardInterrupt:
        kept = partial.left(out)
        if kept is not None:
            report.say(f"the same command goes on from {kept}, or remove it")
        raise
    seconds = time.monotonic() - started
    again = f", {human_bytes(result['verified'])} of it read again" if result["verified"] else ""
    report.data(
        f"{out}: {human_bytes(plan.bytes_before)} -> {human_bytes(plan.bytes_after)}{again},"
        f" {human_bytes(plan.bytes_before / seconds)}/s on {result['device']},"
        f" {human_bytes(result['peak_memory'])} of memory at most"
    )
    return {
        "out": str(out),
        "model": str(plan.model),
        "mode": plan.mode.value,
        "block_size": None if plan.block is None else [plan.block.n, plan.block.k],
        "recipe": plan.recipe,
        "plan_digest": plan.digest,
        "seconds": round(seconds, 3),
        **result,
    }


def _require_place(out: Path) -> None:
    """Refuse a place that takes no folder, by making one where `out` will be: /proc has no bit."""
    place = next(folder for folder in out.parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".fp8ctl-", dir=place))
    except OSError as e:
        why = "its file system takes no new folders" if e.errno == errno.ENOENT else e.strerror
        raise NotPermittedError(
            f"cannot make {out} in {place}: {why}", hint="--out /a/folder/you/own"
        ) from e


def quantize_cached(report: Reporter, plan: Plan, python: Path | None = None) -> Path:
    """Return the folder of the FP8 checkpoint of `plan`, made now if it is not cached.

    The key is what the bytes depend on: the source's files (names, sizes and
    times), the plan and the recipe. Two processes that want the same one wait
    for each other; what a killed one left is gone on with.

    Raises:
        Fp8ctlError: what converting raises.
    """
    key = cache_key(plan)
    folder = paths.cache_dir() / "quantized" / key
    if _complete(folder, key):
        return folder
    with _locked(folder.parent, key):
        if _complete(folder, key):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        _quantize(report, plan, folder, torch_python(python), {"cache_key": key})
    return folder


def cache_key(plan: Plan) -> str:
    """Return the name of a plan's result in the cache: 32 hexadecimal digits."""
    files = [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(plan.model.iterdir())
        if path.is_file()
    ]
    identity = [_CACHE_SCHEMA, plan.recipe, plan.digest, str(plan.model.resolve()), files]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _quantize(
    report: Reporter,
    plan: Plan,
    out: Path,
    python: Path,
    extra: dict[str, Any],
    verify: str = "auto",
) -> dict[str, Any]:
    arguments = {"plan": plan.to_json(), "out": str(out), "extra": extra, "verify": verify}
    return run_worker(python, "quantize", arguments, report, f"quantise {plan.model.name}")


def _complete(folder: Path, key: str) -> bool:
    """Say whether `folder` holds the whole checkpoint of this key."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
        return bool(record["cache_key"] == key and sizes == record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    path = folder / f".{key}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as e:
        raise NotPermittedError(
            f"cannot write {path}: {e.strerror}", hint="export FP8CTL_HOME=/a/folder/you/own"
        ) from e
    # The lock file stays: removing one that another process waits for would give two holders.
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
