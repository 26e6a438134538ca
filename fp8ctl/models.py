"""Finds a model and reads what it says about itself: config.json and headers.

Standard library only, no weights: a plan needs names, dtypes and shapes, which
the header of a safetensors file gives (8 bytes of length, then JSON;
https://github.com/huggingface/safetensors#format). A Hub id is looked up in the
local Hugging Face cache by reading its folders; a caller may give a function
that fetches what is not there.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ctl.errors import CheckpointError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

# The format's own limit; a longer one is not a header.
_MAX_HEADER = 100_000_000
_HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?", re.ASCII)


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: its name, dtype (safetensors' spelling), shape and place.

    A tuple, since a model may have 70 000 and a frozen dataclass takes four times as long to make.

    Attributes:
        file: path of the file in the model's folder.
        start: first byte of the tensor in that file.
        nbytes: bytes of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's folder as read: configuration, tensors by name, weight files in order."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[str, ...]

    @property
    def sharded(self) -> bool:
        """Whether the weights are in files that an index lists."""
        return (self.folder / INDEX).is_file()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def resolve(text: str, fetch: Callable[[str, str | None], Path] | None = None) -> Path:
    """Return the folder of the model that `text` names: a folder, or a Hub id.

    Args:
        text: a folder, or `owner/name`, `owner/name@revision`.
        fetch: called with id and revision when the local cache does not hold it.

    Raises:
        NotFoundError: neither a folder nor a model that can be had.
        UsageError: an empty name.
    """
    if not text.strip():
        raise UsageError("--model is empty", hint="--model /path/to/a/checkpoint")
    path = Path(text).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; a model is a folder with config.json and *.safetensors",
            hint=f"--model {path.absolute().parent}",
        )
    looks_like_path = text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_like_path or not _HUB_ID.fullmatch(text):
        raise NotFoundError(
            f"no such folder: {path.absolute()}",
            hint="give a folder, or a Hub id such as owner/name",
        )
    repository, _, revision = text.partition("@")
    cached = find_cached(repository, revision or None)
    if cached is not None:
        return cached
    if fetch is not None:
        return fetch(repository, revision or None)
    raise NotFoundError(
        f"no folder {path.absolute()}, and no model {text} in the Hugging Face cache {hub_cache()}",
        hint=f"huggingface-cli download {repository}",
    )


def hub_cache() -> Path:
    """Return the folder of huggingface_hub's cache, by its own rules and variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "huggingface" / "hub"


def find_cached(repository: str, revision: str | None = None) -> Path | None:
    """Return the snapshot of a Hub model in the local cache, or None.

    A snapshot counts when it has config.json and every weight file that its
    index names: an interrupted download does not.
    """
    folder = hub_cache() / ("models--" + repository.replace("/", "--"))
    wanted = revision or "main"
    commit = wanted
    reference = folder / "refs" / wanted
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    if not (snapshot / "config.json").is_file():
        return None
    try:
        names = _weight_files(snapshot, _weight_map(snapshot))
    except CheckpointError:
        return None
    return snapshot if all((snapshot / name).is_file() for name in names) else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration and every header of the model in `folder`.

    Raises:
        CheckpointError: not a model's folder, or a part is missing or broken.
    """
    config = read_config(folder)
    mapping = _weight_map(folder)
    files = _weight_files(folder, mapping)
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        found = {tensor.name: tensor for tensor in read_header(folder / name, name)}
        for twice in sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"{folder}: tensor {twice} is in both {tensors[twice].file}"
                f" and {name}, and no {INDEX} says which counts",
                hint="remove the file that does not belong to the model",
            )
        tensors |= found
    places = {tensor.name: tensor.file for tensor in tensors.values()}
    # Most often the index is all that there is, and Python compares that at once.
    absent = [] if mapping in (None, places) else _misplaced(mapping or {}, places)
    if mapping and absent:
        raise CheckpointError(
            f"{folder / INDEX} places {absent[0]} in {mapping[absent[0]]}, which does not hold it"
            f" ({len(absent)} such)",
            hint="fetch the model again; its files are of different versions",
        )
    return Checkpoint(folder, config, tensors, files)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of the model in `folder`.

    Raises:
        CheckpointError: it is missing or is no JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: {folder}", hint="give a checkpoint folder or Hub id"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a model's folder: no config.json",
            hint="give the folder that holds config.json and *.safetensors",
        )
    return _json(path)


def read_header(path: Path, file_name: str | None = None) -> tuple[TensorInfo, ...]:
    """Return the tensors that a safetensors file says it holds, by name.

    Args:
        path: of the file.
        file_name: as the model's index calls it; None: its last name.

    Raises:
        CheckpointError: missing, truncated, or not such a file.
    """
    again = "fetch or save the model again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a header", hint=again)
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes and the file has {size};"
                    " it is truncated or no safetensors file",
                    hint=again,
                )
            document = json.loads(file.read(length))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}", hint=again) from e
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not JSON: {e}", hint=again) from e
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object", hint=again)
    document.pop("__metadata__", None)
    # The bytes of each dtype and shape that was found good.
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    tensors = []
    name, file_name, data = "", file_name or path.name, 8 + length
    try:
        # One loop without a call: a large model has 70 000 of these.
        for name in sorted(document):
            entry = document[name]
            if type(entry) is not dict:
                raise TypeError(f"{type(entry).__name__} instead of an object")
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            count = sizes.get((dtype, shape))
            if count is None:
                if any(type(side) is not int or side < 0 for side in shape):
                    raise ValueError(f"{entry['shape']} is no shape")
                count = sizes[dtype, shape] = DTYPE_BYTES[dtype] * math.prod(shape)
            if type(start) is not int or start < 0 or end - start != count:
                raise ValueError(f"{dtype} {list(shape)} does not take bytes {start} to {end}")
            if data + end > size:
                raise CheckpointError(
                    f"{path}: {name} ends at byte {data + end} and the file has {size};"
                    " it is truncated",
                    hint=again,
                )
            tensors.append(TensorInfo(name, dtype, shape, file_name, data + start, count))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: bad header entry for {name}: {e}", hint=again) from e
    return tuple(tensors)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return which file holds which tensor, by the index; None where there is none."""
    index = folder / INDEX
    if not index.is_file():
        return None
    mapping = _json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index} has no weight_map", hint="fetch the model again")
    return mapping


def _misplaced(mapping: Mapping[str, str], places: Mapping[str, str]) -> list[str]:
    """Return the tensors that do not lie where the index says."""
    return [name for name, file in mapping.items() if places.get(name) != file]


def _weight_files(folder: Path, mapping: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return the names of the weight files of a model, in order, as loaders choose them."""
    index = folder / INDEX
    if mapping is not None:
        names = sorted({str(name) for name in mapping.values()})
        for name in names:
            # A name from a file of somebody else's: it must stay in the folder, or below.
            inside = Path(name)
            if inside.is_absolute() or str(inside) != name or ".." in inside.parts:
                raise CheckpointError(f"{index} names {name!r}, not a file of its folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(names)} weight files missing,"
                f" first {missing[0]}",
                hint="fetch the model again",
            )
        return tuple(names)
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if names:
        return tuple(names)
    others = sorted(
        path.name
        for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf")
        for path in folder.glob(pattern)
    )
    found = f"; it holds {others[0]}, which fp8ctl does not read" if others else ""
    raise CheckpointError(
        f"{folder}: no *.safetensors{found}",
        hint="save the model with save_pretrained(folder, safe_serialization=True)",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}", hint="fetch the model again") from e
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object", hint="fetch the model again")
    return document
