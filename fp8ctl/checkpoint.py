"""Hugging Face checkpoints in, FP8 checkpoints out, streaming.

Runs in an interpreter with torch and numpy, fp8ctl's own or an engine's, from
`fp8ctl.worker`. Memory is bounded by a few parts of tensors (`pipeline`); what a kill
leaves is found again (`partial`); the result gets its name by one rename, when it is
complete. Python 3.10.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import __version__, formats, models, partial
from fp8ctl.errors import (
    ConflictError,
    Fp8ctlError,
    NotPermittedError,
    PlanDoesNotFitError,
)
from fp8ctl.kernels import digest as digests
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.layout import PART, Layout, layouts
from fp8ctl.manifest import RECORD, dumps
from fp8ctl.models import INDEX, Checkpoint
from fp8ctl.pipeline import Bad, Pipeline, Shard, groups_of, writing
from fp8ctl.quality import measure
from fp8ctl.reading import default_device, each

if TYPE_CHECKING:
    from fp8ctl.layout import Part
    from fp8ctl.manifest import Plan, PlannedTensor
    from fp8ctl.partial import Partial

Progress = Callable[[int, int], None]
Made = dict[str, torch.Tensor]

# Raised when the same plan and source would give other bytes: no partial counts then.
_SCHEMA = 1

# A result of up to this many bytes is read again in full, of a larger one as much.
_VERIFIED = 8 << 30

# Weights in another form, and what belongs to the folder and not to the model.
_LEFT_BEHIND = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
# How huggingface_hub names the files that its snapshots link to, where they are large.
_SHA256 = re.compile(r"[0-9a-f]{64}")


def quantize_tensor(
    name: str, weight: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of one planned weight, on the device of `weight`.

    Raises:
        PlanDoesNotFitError: the weight holds NaN or Inf; says where.
    """
    try:
        return kernels.quantize(weight, groups_of(plan), plan.recipe)
    except NonFiniteError as e:
        raise _no_code([Bad(name, e.index, e.value)]) from e


def convert(
    plan: Plan,
    out: Path,
    progress: Progress | None = None,
    extra: Mapping[str, Any] | None = None,
    verify: str = "auto",
    device: torch.device | None = None,
) -> dict[str, object]:
    """Write the FP8 checkpoint of `plan` to the folder `out`.

    Where it is broken off after its first file, what is finished stays beside `out` and
    the next call with the same plan and source goes on from there.

    Args:
        plan: must fit; its model is read.
        out: must not exist, or be an empty folder.
        progress: called with bytes of the source done and in all.
        extra: more fields for fp8ctl.json.
        verify: how much of the result is read again and compared: `all`, `sample`, `off`
            or `auto`, which is all of a small result and a sample of a large one.
        device: that quantises; None takes a GPU if there is one. Beside a GPU, in block mode,
            the cores do, too.

    Returns:
        `files` (name to bytes), `bytes_before`, `bytes_after`, `device` (`cuda` where a GPU
        took part), `verified` (bytes that were read again), `resumed` (files that an earlier
        call had finished), `peak_memory` of this process in bytes.

    Raises:
        BusyError: another process writes `out`.
        CheckpointError: the source cannot be read.
        ConflictError: `out` holds something, or the source is not what was planned.
        DriftError: what was written reads differently.
        NotPermittedError: `out` cannot be written, or the disk is too small.
        PlanDoesNotFitError: a weight holds NaN or Inf.
    """
    source = models.read_checkpoint(plan.model)
    require_planned(source, plan)
    _require_free(out, source, plan)
    device = device or default_device()
    tell = progress or (lambda done, total: None)
    key = _key(source, plan)
    with contextlib.ExitStack() as stack:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(partial.opened(out, key))
        try:
            files = layouts(source, plan)
            shards = [
                Shard(layout, source.folder / name, work.folder / name, work.finished.get(name))
                for name, layout in files.items()
            ]
            resumed = [shard.layout.name for shard in shards if shard.made]
            chosen = _chooser(verify, sum(layout.size for layout in files.values()))
            line = Pipeline(plan, work, chosen, device)
            line.run(shards, lambda done: tell(done, plan.bytes_before))
            bad = [one for shard in shards for one in shard.bad]
            if bad:
                raise _no_code(bad)
            if _key(source, plan) != key:
                raise ConflictError(
                    f"{source.folder} changed while it was read", hint="run it again"
                )
            sizes = {name: layout.size for name, layout in files.items()}
            with writing(out):
                _write_rest(source, plan, files, sizes, work.folder, extra or {})
            _complete(work, out)
        except (ConflictError, PlanDoesNotFitError):
            work.discard()  # the same command would end in the same way
            raise
        except Fp8ctlError as e:
            if not work.finished:
                work.discard()
                raise
            kept = f"{len(work.finished)} of {len(source.files)} files are kept"
            e.hint = f"{e.hint or 'free some space'}; {kept}, the same command goes on from there"
            e.data |= {"partial": str(work.folder), "kept": sorted(work.finished)}
            raise
        except BaseException:
            if not work.finished:
                work.discard()
            raise
    return {
        "files": sizes,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "device": "cuda" if "cuda" in line.used else "cpu",
        "verified": line.verified,
        "resumed": [name for name in resumed if name not in line.lost],
        "peak_memory": _peak_memory(),
    }


def expected_digests(
    model: Path,
    plan: Plan,
    progress: Progress | None = None,
    *,
    only: Container[str] | None = None,
    quality: dict[str, dict[str, float]] | None = None,
) -> dict[str, int]:
    """Return the digest of every tensor that the FP8 checkpoint of `model` must have.

    Keys are names in the checkpoint: `X.weight` (codes), its scales, and each
    kept tensor. Values are `fp8ctl.kernels.digest.digest` of the whole tensor.
    Computed from the source, with the kernel that quantises; nothing is written.

    Args:
        model: folder of the source.
        plan: by which it is quantised.
        progress: called with bytes of the source done and in all.
        only: names of the source's tensors that are read; None for all.
        quality: gets an entry of `quality.measure` for every quantised tensor.

    Raises:
        ConflictError, PlanDoesNotFitError: as `convert`.
    """
    source = models.read_checkpoint(model)
    require_planned(source, plan)

    result: dict[str, int] = {}
    with contextlib.closing(
        each(source, plan, making(plan, measured=quality is not None), progress, only)
    ) as several:
        for planned, (made, measured) in several:
            for name, value in made.items():
                result[name] = digests.digest(value)
            if quality is not None and measured is not None:
                quality[planned.name] = measured
    return result


def making(
    plan: Plan, *, measured: bool
) -> Callable[[PlannedTensor, torch.Tensor], tuple[Made, dict[str, float] | None]]:
    """Return work for `reading.each`: what a tensor becomes, and its `quality.measure`.

    Args:
        plan: by which it is quantised.
        measured: whether what is quantised is measured.
    """

    def make(planned: PlannedTensor, weight: torch.Tensor) -> tuple[Made, dict[str, float] | None]:
        made = become(planned, weight, plan)
        if not measured or not planned.quantize:
            return made, None
        codes, scales = made.values()
        return made, measure(weight, codes, scales, groups_of(plan))

    return make


def become(planned: PlannedTensor, tensor: torch.Tensor, plan: Plan) -> Made:
    """Return what a tensor of the source becomes, by name: itself, or codes and scales."""
    if not planned.quantize:
        return {planned.name: tensor}
    codes, scales = quantize_tensor(planned.name, tensor, plan)
    return {planned.name: codes, formats.scale_name(planned.name, plan.mode): scales}


def _write_rest(
    source: Checkpoint,
    plan: Plan,
    files: Mapping[str, Layout],
    sizes: Mapping[str, int],
    folder: Path,
    extra: Mapping[str, Any],
) -> None:
    """Write all that is no weight: index, configuration, what is carried over, the record."""
    if source.sharded:
        weight_map = {name: file for file, layout in files.items() for name in layout.offsets}
        index = {
            "metadata": {"total_size": plan.bytes_after},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / INDEX, index)
    config = {**source.config, "quantization_config": plan.quantization_config()}
    _write_json(folder / "config.json", config)
    for path in _carried(source):
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    record = {
        "fp8ctl": __version__,
        "recipe": plan.recipe,
        "files": dict(sizes),
        "source": _identity(source),
        "plan": plan.to_json(),
        **extra,
    }
    _write_text(folder / RECORD, dumps(record))


def _carried(source: Checkpoint) -> Iterator[Path]:
    """Yield the files that go along as they are: tokenizer, templates, code, generation config."""
    ours = {"config.json", INDEX, RECORD, *source.files}
    for folder, folders, names in os.walk(source.folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            inside = str(path.relative_to(source.folder))
            skip = name.startswith(".") or name.endswith(_LEFT_BEHIND) or inside in ours
            if not skip and path.is_file():
                yield path


def _complete(work: Partial, out: Path) -> None:
    try:
        work.complete(out)
    except OSError as e:
        raise ConflictError(
            f"cannot put the checkpoint at {out}: {e.strerror}", hint="--out /another/folder"
        ) from e


def _identity(source: Checkpoint) -> list[dict[str, object]]:
    """Return what is cheaply known of the source's files: no weight is read for it."""
    found: list[dict[str, object]] = []
    for name in ("config.json", *source.files):
        path = source.folder / name
        facts = path.stat()
        one = {"file": name, "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
        with path.open("rb") as file:
            if name == "config.json":
                head = file.read()
            else:
                head = file.read(8)
                head += file.read(int.from_bytes(head, "little"))
        found.append({**one, "header_sha256": hashlib.sha256(head).hexdigest()})
        if _SHA256.fullmatch(path.resolve().name):
            found[-1]["sha256"] = path.resolve().name  # of the whole file, by the Hub
    return found


def _key(source: Checkpoint, plan: Plan) -> str:
    """Return what the bytes of the result depend on, as 64 hexadecimal digits."""
    identity = [_SCHEMA, __version__, PART, plan.recipe, plan.digest, _identity(source)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _chooser(verify: str, size: int) -> Callable[[Part], bool]:
    """Return the function that says whether a part of the result is read again."""
    if verify == "off":
        return lambda part: False
    every = max(1, -(-size // _VERIFIED))
    if verify == "sample":
        every = max(every, 8)
    if verify == "all" or every == 1:
        return lambda part: True

    def wanted(part: Part) -> bool:
        text = f"{part.tensor.name} {part.place}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % every == 0

    return wanted


def _no_code(bad: list[Bad]) -> PlanDoesNotFitError:
    """Return the error about weights that hold NaN or Inf: it names every one of them."""
    first: dict[str, Bad] = {}
    for one in sorted(bad, key=lambda one: (one.tensor, one.index)):
        first.setdefault(one.tensor, one)
    names = sorted(first)
    one = first[names[0]]
    others = f"; {len(names) - 1} more weights hold such, next {names[1]}" if names[1:] else ""
    return PlanDoesNotFitError(
        f"{one.tensor}: non-finite value {one.value} at index {list(one.index)};"
        f" FP8 has no code for it{others}",
        hint="repair the checkpoint: one such value spoils its whole block",
        data={
            "tensor": one.tensor,
            "index": list(one.index),
            "tensors": {name: list(first[name].index) for name in names},
        },
    )


def _peak_memory() -> int:
    """Return the largest resident size of this process so far, 0 where it is not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def require_planned(source: Checkpoint, plan: Plan) -> None:
    """Refuse a source that is not the one that was planned, or a plan that does not fit.

    Raises:
        ConflictError, PlanDoesNotFitError: so.
    """
    if not plan.fits:
        raise PlanDoesNotFitError(f"the plan does not fit: {plan.problems[0].message}")
    planned = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    found = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    if planned != found:
        odd = sorted(n for n in planned.keys() | found.keys() if planned.get(n) != found.get(n))
        raise ConflictError(
            f"{source.folder} is not the model that was planned: {odd[0]} is"
            f" {found.get(odd[0], 'absent')}, planned {planned.get(odd[0], 'absent')}",
            hint="plan it again",
        )


def _require_free(out: Path, source: Checkpoint, plan: Plan) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConflictError(f"{out} exists and is not empty", hint="--out /another/folder")
    near = next(parent for parent in (out, *out.parents) if parent.exists())
    # What an earlier command left is kept, or makes room.
    free = shutil.disk_usage(near).free + partial.used(out)
    needed = plan.bytes_after + sum(path.stat().st_size for path in _carried(source))
    if free < needed:
        raise NotPermittedError(
            f"{near} has {free} bytes free, the checkpoint needs {needed}",
            hint="--out /a/folder/on/a/larger/disk",
            data={"free": free, "needed": needed},
        )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write what others read, too, as they write it."""
    _write_text(path, json.dumps(document, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
