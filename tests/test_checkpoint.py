"""Converted checkpoints hold exactly what the kernel makes of the source, or do not exist."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8ctl import checkpoint, models
from fp8ctl.errors import ConflictError, NotPermittedError, PlanDoesNotFitError
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels import groups, native, recipes, reference
from fp8ctl.kernels.digest import digest
from fp8ctl.layout import Part
from fp8ctl.manifest import Plan, PlannedTensor
from fp8ctl.planning import make_plan
from fp8ctl.policy import Reason

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.formats import RecipeName

LAYER = "model.layers.0"
BLOCK = BlockSize(32, 16)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    return {
        "model.embed_tokens.weight": normal(50, 64),
        f"{LAYER}.self_attn.q_proj.weight": normal(64, 64),
        f"{LAYER}.self_attn.q_proj.bias": normal(64),
        f"{LAYER}.self_attn.k_proj.weight": normal(32, 64),
        f"{LAYER}.self_attn.v_proj.weight": normal(32, 64),
        f"{LAYER}.self_attn.o_proj.weight": normal(64, 64),
        f"{LAYER}.mlp.gate_proj.weight": normal(96, 64).half(),
        f"{LAYER}.mlp.up_proj.weight": normal(96, 64).float(),
        # 51 rows: an odd number of code bytes, behind which nothing may be misaligned.
        f"{LAYER}.mlp.down_proj.weight": normal(51, 96),
        f"{LAYER}.input_layernorm.weight": normal(64).float(),
        "model.steps": torch.tensor(7),
        "model.empty": torch.zeros(0, 3),
    }


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir()
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 16, "rope": [1]}))
    (folder / "tokenizer.json").write_text('{"a": "ü"}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "pytorch_model.bin").write_bytes(b"left behind")
    (folder / ".hidden").write_text("left behind")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    mapping: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file)
        mapping |= dict.fromkeys(part, file)
    (folder / models.INDEX).write_text(json.dumps({"weight_map": mapping}))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", weights())


def planned(model: Path, mode: Mode = Mode.BLOCK, recipe: RecipeName = "ieee") -> Plan:
    block = BLOCK if mode is Mode.BLOCK else None
    return make_plan(model, None, mode, 1, block, recipe=recipe)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def wanted(
    tensors: dict[str, torch.Tensor], mode: Mode, recipe: RecipeName = "ieee"
) -> dict[str, torch.Tensor]:
    how = recipes.named(recipe)
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = tensor
        elif mode is Mode.BLOCK:
            per = groups.block(BLOCK.n, BLOCK.k)
            result[name], result[name + "_scale_inv"] = reference.quantize(tensor, per, how)
        else:
            pair = reference.quantize(tensor, groups.PER_TENSOR, how)
            result[name], result[name + "_scale"] = pair
    return result


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
@pytest.mark.parametrize("compiled", [True, False])
def test_scales_are_powers_of_two_where_the_plan_says_so(
    source: Path, tmp_path: Path, mode: Mode, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the plan to the file and to what `check` expects: the reference, to the last bit."""
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    plan = planned(source, mode, "ue8m0")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).recipe == "ue8m0"
    checkpoint.convert(plan, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = wanted(weights(), mode, "ue8m0")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(found[name], tensor), name
    scales = [tensor for name, tensor in found.items() if "_scale" in name]
    assert all(bool((s.frexp().mantissa == 0.5).all()) for s in scales)
    assert all(s.dtype == torch.float32 for s in scales)
    # The control: any FP32 number gives others, in scales and in codes.
    other = wanted(weights(), mode)
    assert not any(same(other[name], found[name]) for name in found if "_scale" in name)
    assert not any(same(other[t.name], found[t.name]) for t in plan.quantized)
    digests = checkpoint.expected_digests(source, plan)
    assert digests == {name: digest(tensor) for name, tensor in found.items()}
    record = json.loads((tmp_path / "out" / "fp8ctl.json").read_text())
    assert (record["recipe"], record["plan"]["recipe"]) == ("ue8m0", "ue8m0")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Engines multiply by these as by any other; the key of DeepSeek-V3.1 would say more.
    assert "scale_fmt" not in config["quantization_config"]


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_the_kernel_s_or_the_source_s_own(
    tmp_path: Path, mode: Mode, shards: int
) -> None:
    source = save(tmp_path / "sharded", weights(), shards)
    plan = planned(source, mode)
    seen = []
    checkpoint.convert(plan, tmp_path / "out", lambda done, total: seen.append((done, total)))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(path.name for path in source.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(tmp_path / "out" / file)
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    expected = wanted(weights(), mode)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(found[name], tensor), name
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == plan.bytes_before


def test_the_index_places_scales_beside_weights_and_counts_bytes(tmp_path: Path) -> None:
    plan = planned(save(tmp_path / "sharded", weights(), 3))
    checkpoint.convert(plan, tmp_path / "out")
    index = json.loads((tmp_path / "out" / models.INDEX).read_text())
    found = models.read_checkpoint(tmp_path / "out")
    assert index["weight_map"] == {name: info.file for name, info in found.tensors.items()}
    assert index["metadata"]["total_size"] == found.nbytes == plan.bytes_after
    for tensor in plan.quantized:
        assert index["weight_map"][tensor.name] == index["weight_map"][f"{tensor.name}_scale_inv"]


def test_folders_below_go_along_with_weights_and_without(tmp_path: Path) -> None:
    source = save(tmp_path / "nested", weights(), 2)
    (source / "weights").mkdir()
    index = json.loads((source / models.INDEX).read_text())
    for file in set(index["weight_map"].values()):
        (source / file).rename(source / "weights" / file)
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (source / models.INDEX).write_text(json.dumps(index))
    (source / "assets" / "deep").mkdir(parents=True)
    (source / "assets" / "deep" / "vocab.txt").write_text("a")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"left behind")
    checkpoint.convert(planned(source), tmp_path / "out")
    found = models.read_checkpoint(tmp_path / "out")
    assert {info.file for info in found.tensors.values()} == set(index["weight_map"].values())
    for name, tensor in wanted(weights(), Mode.BLOCK).items():
        with safe_open(tmp_path / "out" / found.tensors[name].file, "pt") as opened:
            assert same(opened.get_tensor(name), tensor), name
    assert (tmp_path / "out" / "assets" / "deep" / "vocab.txt").read_text() == "a"
    assert not (tmp_path / "out" / "original").exists()


def test_the_record_tells_sources_apart(tmp_path: Path) -> None:
    # The Hub's cache: a link to a file that is named by the SHA-256 of its content.
    source = save(tmp_path / "source", weights())
    blob = tmp_path / ("5" * 64)
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)
    checkpoint.convert(planned(source), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "fp8ctl.json").read_text())
    config, weight = record["source"]
    text = (source / "config.json").read_bytes()
    assert config["header_sha256"] == hashlib.sha256(text).hexdigest()
    assert weight["sha256"] == blob.name
    assert weight["bytes"] == blob.stat().st_size
    data = blob.read_bytes()
    head = data[: 8 + int.from_bytes(data[:8], "little")]
    assert weight["header_sha256"] == hashlib.sha256(head).hexdigest()


def test_tensors_are_aligned_to_their_elements(source: Path, tmp_path: Path) -> None:
    checkpoint.convert(planned(source), tmp_path / "out")
    for info in models.read_checkpoint(tmp_path / "out").tensors.values():
        assert info.start % models.DTYPE_BYTES[info.dtype] == 0, info.name


def test_everything_but_weights_is_carried_over(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    result = checkpoint.convert(plan, tmp_path / "out", extra={"cache_key": "k"})
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "fp8ctl.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == plan.quantization_config()
    assert config == json.loads((source / "config.json").read_text())
    record = json.loads((out / "fp8ctl.json").read_text())
    assert record["files"] == result["files"]
    assert record["cache_key"] == "k"
    assert Plan.from_json(record["plan"]) == plan


def test_expected_digests_are_those_of_the_written_tensors(source: Path, tmp_path: Path) -> None:
    for mode in (Mode.BLOCK, Mode.PER_TENSOR):
        plan = planned(source, mode)
        out = tmp_path / mode.value
        checkpoint.convert(plan, out)
        written = load_file(out / "model.safetensors")
        expected = checkpoint.expected_digests(source, plan)
        assert expected == {name: digest(tensor) for name, tensor in written.items()}


def test_a_nan_names_its_tensor_and_place_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = weights()
    tensors[f"{LAYER}.mlp.up_proj.weight"][40, 5] = float("nan")
    source = save(tmp_path / "bad", tensors)
    with pytest.raises(PlanDoesNotFitError, match=r"mlp.up_proj.weight: .*nan at index \[40, 5\]"):
        checkpoint.convert(planned(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_target_that_holds_something_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(ConflictError, match="not empty"):
        checkpoint.convert(planned(source), out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    checkpoint.convert(planned(source), out)
    assert (out / "model.safetensors").exists()


def test_a_target_that_appears_meanwhile_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def intrude(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("mine")

    with pytest.raises(ConflictError, match="cannot put the checkpoint"):
        checkpoint.convert(planned(source), out, intrude)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_full_disk_is_told_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NotPermittedError, match="10 bytes free"):
        checkpoint.convert(planned(source), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_source_that_is_not_the_planned_one_is_refused(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    tensors = weights()
    tensors[f"{LAYER}.mlp.down_proj.weight"] = torch.zeros(52, 96).bfloat16()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConflictError, match=r"down_proj.weight is .*\(52, 96\)"):
        checkpoint.convert(plan, tmp_path / "out")
    with pytest.raises(ConflictError):
        checkpoint.expected_digests(source, plan)


def test_a_large_result_is_read_again_in_samples_that_do_not_change() -> None:
    tensor = PlannedTensor("a.weight", "BF16", (1, 1), quantize=True, reason=Reason.LINEAR)
    parts = [Part(tensor, 0, (1, 1), 0, 2, place, 1) for place in range(4000)]

    def chosen(verify: str, size: int) -> list[int]:
        wanted = checkpoint._chooser(verify, size)
        return [part.place for part in parts if wanted(part)]

    assert len(chosen("auto", 8 << 30)) == len(chosen("all", 1 << 50)) == 4000
    assert chosen("off", 1) == []
    assert 800 < len(chosen("auto", 40 << 30)) < 1200  # 8 GiB of 40
    assert 300 < len(chosen("sample", 1)) < 700
    assert chosen("auto", 40 << 30) == chosen("auto", 40 << 30)


_PEAK = """
import json, sys
from pathlib import Path
from fp8ctl import checkpoint
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.planning import make_plan
from fp8ctl.policy import Reason
plan = make_plan(Path(sys.argv[1]), None, Mode.BLOCK, 1, BlockSize(128, 128))
before = checkpoint._peak_memory()
made = checkpoint.convert(plan, Path(sys.argv[2]))
print(json.dumps({**made, "grown": made["peak_memory"] - before}))
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    # Zeros that take no room on the disk: 32 layers of 32 MB in one file.
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    side, header = 4096, {}
    for i in range(32):
        ends = [2 * side * side * i, 2 * side * side * (i + 1)]
        entry = {"dtype": "BF16", "shape": [side, side], "data_offsets": ends}
        header[f"model.layers.{i}.mlp.down_proj.weight"] = entry
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 64 * side * side)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    # 7 MB for each of at most 18 threads here, and what the kernels load.
    assert made["grown"] < 200 << 20
    shutil.rmtree(tmp_path / "out")


_BLOCKED = """
import sys
for name in ("typer", "rich", "httpx", "packaging", "psutil", "safetensors", "click"):
    sys.modules[name] = None
import fp8ctl.worker, fp8ctl.checkpoint, fp8ctl.manifest
import fp8ctl.kernels.reference, fp8ctl.kernels.digest, fp8ctl.kernels.quantize
try:
    import triton
except ImportError:
    pass
else:
    import fp8ctl.kernels.batch, fp8ctl.kernels.launch
assert "fp8ctl.render" not in sys.modules and "fp8ctl.cli" not in sys.modules
"""


def test_the_worker_needs_none_of_the_command_line_s_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
