"""Hugging Face checkpoints in, FP8 checkpoints out, one tensor at a time.

Runs in an interpreter with torch and numpy, fp8ctl's own or an engine's, from
`fp8ctl.worker`. A tensor is read, quantised and written at its place before the
next is read: memory is bounded by the largest tensor. The result gets its name
by one rename, when it is complete. Python 3.10.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import __version__, formats, models
from fp8ctl.errors import (
    CheckpointError,
    ConflictError,
    NotPermittedError,
    PlanDoesNotFitError,
)
from fp8ctl.formats import Mode
from fp8ctl.kernels import digest as digests
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.manifest import RECORD
from fp8ctl.models import INDEX, Checkpoint, TensorInfo

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.manifest import Plan, PlannedTensor

Progress = Callable[[int, int], None]

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

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


def quantize_tensor(
    name: str, weight: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of one planned weight, on the device of `weight`.

    Raises:
        PlanDoesNotFitError: the weight holds NaN or Inf; says where.
    """
    try:
        if plan.mode is Mode.PER_TENSOR:
            return kernels.quantize_per_tensor(weight)
        if plan.mode is Mode.PER_CHANNEL:
            return kernels.quantize_per_channel(weight)
        assert plan.block is not None
        return kernels.quantize_block(weight, (plan.block.n, plan.block.k))
    except NonFiniteError as e:
        raise PlanDoesNotFitError(
            f"{name}: {e}; FP8 has no code for it",
            hint="repair the checkpoint: one such value spoils its whole block",
            data={"tensor": name, "index": list(e.index)},
        ) from e


def convert(
    plan: Plan, out: Path, progress: Progress | None = None, extra: Mapping[str, Any] | None = None
) -> dict[str, object]:
    """Write the FP8 checkpoint of `plan` to the folder `out`.

    Args:
        plan: must fit; its model is read.
        out: must not exist, or be an empty folder.
        progress: called with bytes of the source done and in all.
        extra: more fields for fp8ctl.json.

    Returns:
        `files` (name to bytes), `bytes_before`, `bytes_after`, `device`.

    Raises:
        ConflictError: `out` holds something, or the source is not what was planned.
        NotPermittedError: `out` cannot be written, or the disk is too small.
        PlanDoesNotFitError: a weight holds NaN or Inf.
    """
    source = models.read_checkpoint(plan.model)
    _require_planned(source, plan)
    _require_free(out, plan)
    # Beside the target, so that the rename at the end is one on its file system.
    work = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        with _permission(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir()
            files = _write_all(source, plan, work, progress or (lambda done, total: None))
            _write_json(work / "config.json", _config(source, plan))
            _copy_rest(source.folder, work)
            record = {
                "fp8ctl": __version__,
                "recipe": formats.RECIPE,
                "files": files,
                "plan": plan.to_json(),
                **(extra or {}),
            }
            _write_json(work / RECORD, record)
            _sync_folder(work)
            try:
                # Replaces an empty folder, and nothing else.
                work.rename(out)
            except OSError as e:
                raise ConflictError(
                    f"cannot put the checkpoint at {out}: {e.strerror}",
                    hint="--out /another/folder",
                ) from e
            _sync_folder(out.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "files": files,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "device": _device().type,
    }


def expected_digests(model: Path, plan: Plan, progress: Progress | None = None) -> dict[str, int]:
    """Return the digest of every tensor that the FP8 checkpoint of `model` must have.

    Keys are names in the checkpoint: `X.weight` (codes), its scales, and each
    kept tensor. Values are `fp8ctl.kernels.digest.digest` of the whole tensor.
    Computed from the source, with the kernel that quantises; nothing is written.

    Raises:
        ConflictError, PlanDoesNotFitError: as `convert`.
    """
    source = models.read_checkpoint(model)
    _require_planned(source, plan)
    tell = progress or (lambda done, total: None)
    done, total = 0, plan.bytes_before
    result: dict[str, int] = {}
    for planned, info, tensor in _read_all(source, plan):
        for name, value in _become(planned, tensor.to(_device()), plan):
            result[name] = digests.digest(value)
        done += info.nbytes
        tell(done, total)
    return result


def _become(
    planned: PlannedTensor, tensor: torch.Tensor, plan: Plan
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a tensor of the source becomes: itself, or codes and scales."""
    if not planned.quantize:
        yield planned.name, tensor
        return
    codes, scales = quantize_tensor(planned.name, tensor, plan)
    yield planned.name, codes
    yield formats.scale_name(planned.name, plan.mode), scales


def _read_all(
    source: Checkpoint, plan: Plan
) -> Iterator[tuple[PlannedTensor, TensorInfo, torch.Tensor]]:
    """Yield every tensor in the order of the disk."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    order = sorted(source.tensors.values(), key=lambda info: (info.file, info.start))
    with contextlib.ExitStack() as stack:
        name, file = "", None
        for info in order:
            if file is None or info.file != name:
                stack.pop_all().close()
                name, file = info.file, stack.enter_context((source.folder / info.file).open("rb"))
            yield planned[info.name], info, _read(file, info)


def _read(file: Any, info: TensorInfo) -> torch.Tensor:
    if info.dtype not in _DTYPES:
        raise CheckpointError(f"{info.file}: {info.name} has dtype {info.dtype}, unknown here")
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=_DTYPES[info.dtype])
    data = bytearray(info.nbytes)
    file.seek(info.start)
    if file.readinto(data) != info.nbytes:
        raise CheckpointError(f"{info.file} ends inside {info.name}; it changed while it was read")
    return torch.frombuffer(data, dtype=_DTYPES[info.dtype]).view(info.shape)


def _write_all(source: Checkpoint, plan: Plan, folder: Path, progress: Progress) -> dict[str, int]:
    """Write every weight file and the index; return their sizes."""
    layouts = {name: _Layout(source, plan, name) for name in source.files}
    done, total = 0, plan.bytes_before
    name, target = "", -1
    try:
        for planned, info, tensor in _read_all(source, plan):
            if info.file != name:
                _close(target)
                name, target = info.file, layouts[info.file].create(folder)
            for written, value in _become(planned, tensor.to(_device()), plan):
                _write(target, layouts[name].offsets[written], value.cpu())
            done += info.nbytes
            progress(done, total)
    finally:
        _close(target)
    # A file of no tensors is never met above.
    for name, layout in layouts.items():
        if not (folder / name).exists():
            _close(layout.create(folder))
    if source.sharded:
        weight_map = {n: f for f, layout in layouts.items() for n in layout.offsets}
        index = {
            "metadata": {"total_size": plan.bytes_after},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / INDEX, index)
    return {name: layout.size for name, layout in layouts.items()}


class _Layout:
    """Where each tensor of one output file lies; known before any is computed.

    As safetensors' own writer: larger elements first, so that every tensor is
    aligned to its element size; data begin at a multiple of 8 bytes.

    Attributes:
        offsets: tensor name to position in the file, in bytes.
        size: of the whole file, in bytes.
    """

    def __init__(self, source: Checkpoint, plan: Plan, file: str) -> None:
        entries: list[tuple[str, str, tuple[int, ...]]] = []
        for tensor in plan.tensors:
            if source.tensors[tensor.name].file != file:
                continue
            if tensor.quantize:
                scales = formats.scale_name(tensor.name, plan.mode)
                entries.append((tensor.name, formats.CODE_DTYPE, tensor.shape))
                entries.append((scales, formats.SCALE_DTYPE, plan.scale_shape(tensor)))
            else:
                entries.append((tensor.name, tensor.dtype, tensor.shape))
        entries.sort(key=lambda entry: (-models.DTYPE_BYTES[entry[1]], entry[0]))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, position = {}, 0
        for name, dtype, shape in entries:
            nbytes = models.DTYPE_BYTES[dtype]
            for side in shape:
                nbytes *= side
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [position, position + nbytes],
            }
            places[name] = position
            position += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.name = file
        self.head = struct.pack("<Q", len(text)) + text
        self.offsets = {name: len(self.head) + place for name, place in places.items()}
        self.size = len(self.head) + position

    def create(self, folder: Path) -> int:
        """Create the file with its header and full size; return its descriptor."""
        descriptor = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(descriptor, self.size)
        _write_bytes(descriptor, 0, memoryview(self.head))
        return descriptor


def _write(descriptor: int, offset: int, tensor: torch.Tensor) -> None:
    if tensor.numel():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        _write_bytes(descriptor, offset, flat.numpy().data)


def _write_bytes(descriptor: int, offset: int, data: memoryview) -> None:
    # One call of pwrite takes at most 2 GiB.
    while data:
        count = os.pwrite(descriptor, data, offset)
        offset, data = offset + count, data[count:]


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.fsync(descriptor)
        os.close(descriptor)


def _config(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    return {**source.config, "quantization_config": plan.quantization_config()}


def _copy_rest(source: Path, target: Path) -> None:
    """Copy what is no weight: tokenizer, templates, generation config."""
    for path in sorted(source.iterdir()):
        skip = path.name.startswith(".") or path.name.endswith(_LEFT_BEHIND)
        if skip or not path.is_file() or (target / path.name).exists() or path.name == RECORD:
            continue
        shutil.copyfile(path, target / path.name)


def _require_planned(source: Checkpoint, plan: Plan) -> None:
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


def _require_free(out: Path, plan: Plan) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConflictError(f"{out} exists and is not empty", hint="--out /another/folder")
    near = next(parent for parent in (out, *out.parents) if parent.exists())
    free = shutil.disk_usage(near).free
    if free < plan.bytes_after:
        raise NotPermittedError(
            f"{near} has {free} bytes free, the checkpoint needs {plan.bytes_after}",
            hint="--out /a/folder/on/a/larger/disk",
            data={"free": free, "needed": plan.bytes_after},
        )


@contextlib.contextmanager
def _permission(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise NotPermittedError(
            f"cannot write {out}: {e.strerror or e}", hint="--out /a/folder/you/own"
        ) from e


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
