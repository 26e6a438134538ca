"""Finding a model and reading its headers: what is broken is told apart and named."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8ctl import models
from fp8ctl.errors import CheckpointError, NotFoundError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
SMALL: Tensors = {"a.weight": ("BF16", (4, 3)), "b.bias": ("F32", (2,)), "c": ("F8_E4M3", ())}


def save(path: Path, tensors: Tensors) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start = end
        count = models.DTYPE_BYTES[dtype]
        for side in shape:
            count *= side
        end = start + count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    save(model / "model.safetensors", SMALL)
    return model


def shard(folder: Path) -> None:
    """Turn the model into two shards and an index."""
    (folder / "model.safetensors").unlink()
    save(folder / "m-1.safetensors", {"a.weight": ("BF16", (4, 3))})
    save(folder / "m-2.safetensors", {"b.bias": ("F32", (2,))})
    mapping = {"a.weight": "m-1.safetensors", "b.bias": "m-2.safetensors"}
    (folder / models.INDEX).write_text(json.dumps({"weight_map": mapping}))


def test_a_folder_reads_to_its_tensors(folder: Path) -> None:
    found = models.read_checkpoint(folder)
    assert found.config["model_type"] == "llama"
    assert not found.sharded
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in found.tensors.items()} == {
        "a.weight": ("BF16", (4, 3), 24),
        "b.bias": ("F32", (2,), 8),
        "c": ("F8_E4M3", (), 1),
    }
    assert found.nbytes == 33
    size = (folder / "model.safetensors").stat().st_size
    assert found.tensors["c"].start + 1 == size


def test_shards_read_as_one(folder: Path) -> None:
    shard(folder)
    found = models.read_checkpoint(folder)
    assert found.sharded
    assert found.files == ("m-1.safetensors", "m-2.safetensors")
    assert {name: info.file for name, info in found.tensors.items()} == {
        "a.weight": "m-1.safetensors",
        "b.bias": "m-2.safetensors",
    }


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files missing, first m-2"):
        models.read_checkpoint(folder)


def test_an_index_that_lies_is_refused(folder: Path) -> None:
    shard(folder)
    save(folder / "m-2.safetensors", {"other": ("F32", (2,))})
    with pytest.raises(CheckpointError, match=r"places b.bias in m-2"):
        models.read_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "a/../../model.safetensors", "/model.safetensors", "./m", ""]
)
def test_an_index_cannot_point_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / models.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        models.read_checkpoint(folder)


def test_weights_may_lie_in_a_folder_below(folder: Path) -> None:
    before = models.read_checkpoint(folder).tensors
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "model.safetensors")
    mapping = dict.fromkeys(before, "weights/model.safetensors")
    (folder / models.INDEX).write_text(json.dumps({"weight_map": mapping}))
    found = models.read_checkpoint(folder)
    assert {info.file for info in found.tensors.values()} == {"weights/model.safetensors"}
    assert found.tensors.keys() == before.keys()


def test_a_tensor_in_two_files_without_an_index_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    save(folder / "y.safetensors", {"c": ("F32", ())})
    with pytest.raises(CheckpointError, match=r"c is in both x.safetensors and y.safetensors"):
        models.read_checkpoint(folder)


def test_a_truncated_file_is_refused_at_every_length(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors"):
            models.read_checkpoint(folder)


@given(st.binary(max_size=80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_a_header_or_a_clear_error(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(noise)) + noise)
    with contextlib.suppress(CheckpointError):
        models.read_header(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 5]},
        {"dtype": "BF16", "shape": [-2], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [-4, 0]},
        {"dtype": "NOPE", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [0]},
        [1],
    ],
)
def test_a_bad_entry_names_its_tensor(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"t": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match="bad header entry for t"):
        models.read_header(path)


def test_what_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        models.read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        models.read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin") as caught:
        models.read_checkpoint(tmp_path)
    assert caught.value.exit_code == 3


def test_a_folder_resolves_to_itself_and_a_file_to_nothing(folder: Path) -> None:
    assert models.resolve(str(folder)) == folder
    with pytest.raises(CheckpointError, match="is a file"):
        models.resolve(str(folder / "config.json"))
    with pytest.raises(NotFoundError, match="no such folder"):
        models.resolve(str(folder / "absent"))
    with pytest.raises(UsageError):
        models.resolve(" ")


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds owner/name at main."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return snapshot


def test_a_cached_hub_id_resolves_without_the_network(hub: Path) -> None:
    assert models.resolve("owner/name") == hub
    assert models.resolve("owner/name@main") == hub
    assert models.resolve("owner/name@abc123") == hub


def test_an_interrupted_download_does_not_count(hub: Path) -> None:
    shard(hub)
    assert models.find_cached("owner/name") == hub
    (hub / "m-2.safetensors").unlink()
    assert models.find_cached("owner/name") is None


def test_what_is_not_cached_is_fetched_or_named(hub: Path) -> None:
    asked = []

    def fetch(repository: str, revision: str | None) -> Path:
        asked.append((repository, revision))
        return hub

    assert models.resolve("owner/other@v2", fetch) == hub
    assert models.resolve("owner/name", fetch) == hub
    assert asked == [("owner/other", "v2")]
    with pytest.raises(NotFoundError, match=r"owner/other.*Hugging Face cache") as caught:
        models.resolve("owner/other")
    assert caught.value.hint == "huggingface-cli download owner/other"
