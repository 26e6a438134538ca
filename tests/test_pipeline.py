"""Parts in any order, by any number of threads, broken off anywhere: always the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from fp8ctl import checkpoint, interpreter, layout, models, partial, pipeline
from fp8ctl.errors import CheckpointError, DriftError, NotPermittedError, PlanDoesNotFitError
from fp8ctl.formats import Mode
from tests.test_checkpoint import LAYER, planned, save, weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fp8ctl.formats import RecipeName

DOWN = f"{LAYER}.mlp.down_proj.weight"
CPU = torch.device("cpu")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards_of(source: Path, target: Path, mode: Mode) -> list[pipeline.Shard]:
    found = layout.layouts(models.read_checkpoint(source), planned(source, mode))
    return [pipeline.Shard(one, source / name, target / name) for name, one in found.items()]


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
@pytest.mark.parametrize(
    ("threads", "part", "batch"), [(1, 1 << 22, None), (7, 512, None), (3, 2048, 20_000)]
)
def test_neither_threads_nor_parts_change_a_bit(
    tmp_path: Path,
    mode: Mode,
    threads: int,
    part: int,
    batch: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = save(tmp_path / "source", weights(), 3)
    plan = planned(source, mode)
    checkpoint.convert(plan, tmp_path / "wanted")
    monkeypatch.setattr(layout, "PART", part)
    before = torch.get_num_threads(), sys.getswitchinterval()
    with partial.opened(tmp_path / "out", "key") as work:
        line = pipeline.Pipeline(plan, work, lambda part: True, CPU, threads, batch)
        shards = shards_of(source, work.folder, mode)
        line.run(shards, lambda done: None)
        for name, data in content(work.folder).items():
            assert data == (tmp_path / "wanted" / name).read_bytes(), name
        assert line.verified == plan.bytes_after
        assert work.finished.keys() == {shard.layout.name for shard in shards}
    assert (torch.get_num_threads(), sys.getswitchinterval()) == before


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["ieee", "ue8m0"])
@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
def test_a_gpu_writes_the_same_bytes(tmp_path: Path, mode: Mode, recipe: RecipeName) -> None:
    source = save(tmp_path / "source", weights(), 3)
    plan = planned(source, mode, recipe)
    assert checkpoint.convert(plan, tmp_path / "cpu", device=CPU)["device"] == "cpu"
    # Whoever comes first: the cores may have made it all before the GPU is ready.
    checkpoint.convert(plan, tmp_path / "both", device=torch.device("cuda"))
    assert content(tmp_path / "cpu") == content(tmp_path / "both")
    with partial.opened(tmp_path / "gpu", "key") as work:
        line = pipeline.Pipeline(plan, work, lambda part: True, torch.device("cuda"), 3)
        line.run(shards_of(source, work.folder, mode), lambda done: None)
        assert line.used == {"cuda"}
        for name, data in content(work.folder).items():
            assert data == (tmp_path / "cpu" / name).read_bytes(), name


@pytest.mark.gpu
def test_a_gpu_names_every_weight_with_nan_or_inf(tmp_path: Path) -> None:
    tensors = weights()
    tensors[DOWN][40, 3] = float("nan")
    tensors[f"{LAYER}.self_attn.q_proj.weight"][1, 2] = float("-inf")
    source = save(tmp_path / "bad", tensors, 2)
    plan = planned(source)
    with partial.opened(tmp_path / "gpu", "key") as work:
        line = pipeline.Pipeline(plan, work, lambda part: True, torch.device("cuda"), 2)
        shards = shards_of(source, work.folder, Mode.BLOCK)
        line.run(shards, lambda done: None)
    found = {(one.tensor, one.index) for shard in shards for one in shard.bad}
    assert found == {(DOWN, (40, 3)), (f"{LAYER}.self_attn.q_proj.weight", (1, 2))}


def test_the_cores_do_not_wait_for_a_gpu(tmp_path: Path) -> None:
    """Which takes seconds to begin; with whole tensors they would need all of their memory."""
    source, cuda = save(tmp_path / "source", weights()), torch.device("cuda")

    def devices(mode: Mode, device: torch.device, threads: int | None = None) -> Counter[str]:
        with partial.opened(tmp_path / "out", "key") as work:
            plan = planned(source, mode)
            line = pipeline.Pipeline(plan, work, lambda part: True, device, threads)
            return Counter(one.type for one in line._devices(16))

    assert devices(Mode.BLOCK, cuda) == {"cuda": 6, "cpu": 18}
    assert devices(Mode.BLOCK, CPU) == {"cpu": 18}
    assert devices(Mode.PER_TENSOR, cuda) == {"cuda": 6}
    assert devices(Mode.PER_TENSOR, CPU) == {"cpu": 3}
    assert devices(Mode.BLOCK, cuda, 2) == {"cuda": 2}


def test_every_weight_with_nan_or_inf_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "PART", 1024)
    tensors = weights()
    tensors[DOWN][50, 95] = float("inf")
    tensors[DOWN][40, 3] = float("nan")
    tensors[f"{LAYER}.self_attn.q_proj.weight"][1, 2] = float("-inf")
    plan = planned(save(tmp_path / "bad", tensors, 2))
    with pytest.raises(PlanDoesNotFitError) as caught:
        checkpoint.convert(plan, tmp_path / "out")
    assert caught.value.data["tensors"] == {
        DOWN: [40, 3],
        f"{LAYER}.self_attn.q_proj.weight": [1, 2],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


# --- what the disk does ---------------------------------------------------------------------------


def pwrites(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any], Any]) -> None:
    """Have `change` see each write: its number and data; it may return other data, or raise."""
    real, count = os.pwrite, 0

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        real(descriptor, change(count, data), offset)
        return len(data)

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_what_reads_differently_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", {DOWN: weights()[DOWN]})
    plan = planned(source)

    def flip(number: int, data: Any) -> Any:
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 4
        return changed if number == 2 else data  # the first is the header

    with monkeypatch.context() as patch:
        pwrites(patch, flip)
        with pytest.raises(DriftError, match=f"{DOWN} reads differently"):
            checkpoint.convert(plan, tmp_path / "out", verify="all")
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing was finished"
    with monkeypatch.context() as patch:
        pwrites(patch, flip)
        checkpoint.convert(plan, tmp_path / "out", verify="off")  # the control


def test_a_disk_that_fills_up_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(save(tmp_path / "source", weights(), 4))
    checkpoint.convert(plan, tmp_path / "wanted")

    def full(number: int, data: Any) -> Any:
        if number > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return data

    with monkeypatch.context() as patch:
        pwrites(patch, full)
        with pytest.raises(NotPermittedError, match="No space left") as caught:
            checkpoint.convert(plan, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert "the same command goes on" in (caught.value.hint or "")
    assert caught.value.data["kept"]
    assert not (tmp_path / "out").exists()
    made = checkpoint.convert(plan, tmp_path / "out")
    assert made["resumed"] == caught.value.data["kept"]
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
    assert not list(tmp_path.glob(".out*"))


def test_a_finished_file_that_was_changed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(save(tmp_path / "source", weights(), 4))
    checkpoint.convert(plan, tmp_path / "wanted")
    for spoil in ("byte", "header", "length", "absent"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write_rest", interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.convert(plan, tmp_path / "out")
        folder = partial.left(tmp_path / "out")
        assert folder is not None
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == 4
        data = bytearray(files[1].read_bytes())
        if spoil == "absent":
            files[1].unlink()
        elif spoil == "length":
            os.truncate(files[1], len(data) - 1)
        else:
            data[9 if spoil == "header" else -1] ^= 1
            files[1].write_bytes(data)
        seen: list[int] = []
        made = checkpoint.convert(plan, tmp_path / "out", lambda done, _: seen.append(done))  # noqa: B023
        assert made["resumed"] == [file.name for file in files if file != files[1]], spoil
        assert content(tmp_path / "out") == content(tmp_path / "wanted"), spoil
        assert seen[-1] == plan.bytes_before
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_a_source_that_ends_too_early_is_told(tmp_path: Path) -> None:
    source = save(tmp_path / "source", weights())
    plan = planned(source)

    read = models.read_checkpoint
    file = source / "model.safetensors"

    def then_cut(folder: Path) -> models.Checkpoint:
        found = read(folder)
        os.truncate(file, file.stat().st_size - 5000)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "read_checkpoint", then_cut)
        with pytest.raises(CheckpointError, match=r"model.safetensors ends too early"):
            checkpoint.convert(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- kills ----------------------------------------------------------------------------------------

# Ends itself by SIGKILL at the n-th change to a disk, behind half of what it was to write.
_MORTAL = """
import json, os, signal, sys
from pathlib import Path
from fp8ctl import checkpoint
from fp8ctl.manifest import Plan
left = int(sys.argv[3])
def mortal(name, half):
    real = getattr(os, name)
    def call(*args, **options):
        global left
        left -= 1
        if left == 0:
            if half:
                real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(os, name, call)
for name in ("pwrite", "write"):
    mortal(name, True)
for name in ("fsync", "truncate", "ftruncate", "rename", "unlink", "mkdir"):
    mortal(name, False)
plan = Plan.from_json(json.loads(Path(sys.argv[1]).read_text()))
made = checkpoint.convert(plan, Path(sys.argv[2]))
print(json.dumps(made))
"""


@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
def test_killed_again_and_again_it_ends_in_the_same_bytes(tmp_path: Path, kills: int) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"model.layers.{i}.mlp.down_proj.weight": torch.randn(64, 48, generator=generator).half()
        for i in range(16 * kills)
    }
    source = save(tmp_path / "source", tensors, 8 * kills)
    plan = planned(source)
    checkpoint.convert(plan, tmp_path / "wanted")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    chance = random.Random(7)

    def run(calls: int) -> subprocess.CompletedProcess[str]:
        words = [str(tmp_path / "plan.json"), str(tmp_path / "out"), str(calls)]
        return subprocess.run(
            [sys.executable, "-c", _MORTAL, *words],
            # Nothing is compiled, that a kill could hit instead.
            env={**interpreter.worker_environment(), "OMP_NUM_THREADS": "1", "FP8CTL_NATIVE": "0"},
            capture_output=True,
            text=True,
            check=False,
        )

    for number in range(kills):
        # A file takes about ten, and three threads are at three files: the first run
        # finishes none, the others some.
        done = run(chance.randint(50, 70) if number else chance.randint(1, 12))
        assert done.returncode == -9, f"run {number}: {done.stderr[-2000:]}"
        assert not (tmp_path / "out").exists()
    last = run(-1)
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["resumed"], "nothing was kept"
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plan.json", "source", "wanted"]


def test_a_changed_source_is_not_mixed_with_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", weights(), 3)
    plan = planned(source)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_rest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.convert(plan, tmp_path / "out")
    file = next(iter(models.read_checkpoint(source).tensors.values())).file
    tensors = {n: t for n, t in weights(seed=1).items() if n in names_in(source, file)}
    save_file(tensors, source / file)
    made = checkpoint.convert(plan, tmp_path / "out")
    assert made["resumed"] == []
    checkpoint.convert(plan, tmp_path / "wanted")
    assert content(tmp_path / "out") == content(tmp_path / "wanted")


def names_in(source: Path, file: str) -> set[str]:
    return {i.name for i in models.read_checkpoint(source).tensors.values() if i.file == file}
