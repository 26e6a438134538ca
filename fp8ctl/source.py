"""The tensors of a checkpoint one after the other, as they lie in its files.

Each is a view of its mapped file: nothing is read before it is used, nothing is kept in
memory after. Runs in the worker and in trainers: torch and the standard library. Python 3.10.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import torch

from fp8ctl import models
from fp8ctl.dtypes import DTYPES
from fp8ctl.errors import CheckpointError
from fp8ctl.sendable import made_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fp8ctl.manifest import Plan


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of a model's folder, in the order of the disk.

    Raises:
        CheckpointError: it is no model's folder, or holds a dtype that is not known.
    """
    found = models.read_checkpoint(folder)
    order = sorted(found.tensors.values(), key=lambda one: (one.file, one.start))
    name, data = "", torch.empty(0, dtype=torch.uint8)
    for one in order:
        if one.file != name:
            name, data = one.file, _mapped(folder / one.file)
        if one.dtype not in DTYPES:
            raise CheckpointError(f"{one.file}: {one.name} has dtype {one.dtype}, unknown here")
        part, dtype = data[one.start : one.start + one.nbytes], DTYPES[one.dtype]
        if one.start % dtype.itemsize:
            part = part.clone()  # a header may end anywhere, and torch wants whole elements
        yield one.name, part.view(dtype).view(one.shape)


def read_made(folder: Path, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an FP8 checkpoint: codes, each followed by its scale.

    Raises:
        CheckpointError: as `read_tensors`; or a code or a scale is no number.
    """
    found = dict(read_tensors(folder))
    for name, (dtype, shape) in made_of(plan).items():
        tensor = found[name].view(shape)
        wrong = _not_a_number(tensor) if dtype else None
        if wrong is not None:
            raise CheckpointError(
                f"{folder}: {name} holds what is no number, at element {wrong}",
                hint="quantise the model again: fp8ctl quantize",
            )
        yield name, tensor


def _not_a_number(tensor: torch.Tensor) -> int | None:
    """Return the first element that is NaN or infinite; None: there is none."""
    if tensor.dtype == torch.float8_e4m3fn:
        wrong = (tensor.reshape(-1).view(torch.uint8) & 0x7F) == 0x7F
    else:
        wrong = ~torch.isfinite(tensor.reshape(-1))
    return int(wrong.to(torch.uint8).argmax()) if bool(wrong.any()) else None


def _mapped(path: Path) -> torch.Tensor:
    try:
        with path.open("rb") as file:
            # Torch wants memory that could be written: then it is a copy, and the file stays.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read {path}: {e}", hint="fetch the model again") from e
    return torch.frombuffer(memory, dtype=torch.uint8)
