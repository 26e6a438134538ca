"""A folder holds a checkpoint while its update runs, and is gone afterwards, however that ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import wire
from fp8ctl.errors import CarrierError, EngineFailedError, NotPermittedError
from fp8ctl.push import Rollout
from fp8ctl.push.folder import PREFIX
from tests.push.serving import read_safetensors, serving
from tests.push.test_rollout import quantised
from tests.test_stream import PLAN, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path


def test_it_is_a_checkpoint_that_is_whole_before_anybody_is_disturbed(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def look(_: Any) -> None:
        [folder] = tmp_path.iterdir()
        assert folder.name.startswith(PREFIX)
        config = json.loads((folder / "config.json").read_text())
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        tensors: dict[str, Any] = {}
        for file in sorted({*index.values()}):
            header = (folder / file).read_bytes()
            assert int.from_bytes(header[:8], "little") % 8 == 0
            tensors |= read_safetensors(folder / file)
        seen.append((config, {*index}, tensors))

    with (
        serving(PLAN) as server,
        Rollout(server.url, PLAN, via="disk", folder=tmp_path, bucket_bytes=9000) as rollout,
    ):
        server.faults[wire.BEGIN] = look
        rollout.update(WEIGHTS.items(), 1)
    [(config, names, tensors)] = seen
    assert config["quantization_config"] == PLAN.quantization_config()
    wanted = dict(quantised(WEIGHTS))
    assert names == set(tensors) == set(wanted)
    assert all(
        torch.equal(tensors[n].view(torch.uint8), t.view(torch.uint8)) for n, t in wanted.items()
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", [wire.BEGIN, wire.BUCKET, wire.END])
def test_it_goes_when_the_update_fails(path: str, tmp_path: Path) -> None:
    async def broken(_: Any) -> Any:
        return 500, {"error": {"id": "FP8-LOAD", "message": "no"}, "state": "failed"}

    with (
        serving(PLAN) as server,
        Rollout(server.url, PLAN, via="disk", folder=tmp_path) as rollout,
    ):
        server.faults[path] = broken
        with pytest.raises(EngineFailedError):
            rollout.update(WEIGHTS.items(), 1)
    assert not any(tmp_path.iterdir())


def test_what_a_killed_trainer_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    script = (
        "import sys, time, torch; from pathlib import Path;"
        " from fp8ctl.push.folder import ByFolder;"
        " from fp8ctl.push.delivery import Clock;"
        " f = ByFolder(Path(sys.argv[1]), None, 64, torch.device('cpu'), Clock());"
        " print(f.path, flush=True); time.sleep(300)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            theirs = other.stdout.readline().strip()
            assert os.listdir(tmp_path) == [os.path.basename(theirs)]
            with (
                serving(PLAN) as server,
                Rollout(server.url, PLAN, via="disk", folder=tmp_path) as rollout,
            ):
                rollout.update(WEIGHTS.items(), 1)
                assert os.path.isdir(theirs)
                other.kill()
                other.wait()
                rollout.update(WEIGHTS.items(), 2)
        finally:
            other.kill()
    assert not any(tmp_path.iterdir())


def test_a_folder_whose_trainer_was_killed_before_it_had_its_name_is_swept(tmp_path: Path) -> None:
    made = {}
    for name, files in (("bare", ()), ("locked", (".lock",)), ("fresh", ()), ("theirs", ("x",))):
        folder = made[name] = tmp_path / f".new-{name}"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
        if name != "fresh":  # who has just begun takes its lock in a moment
            os.utime(folder, (1e9, 1e9))
    with (
        serving(PLAN) as server,
        Rollout(server.url, PLAN, via="disk", folder=tmp_path) as rollout,
    ):
        rollout.update(WEIGHTS.items(), 1)
    assert sorted(tmp_path.iterdir()) == [made["fresh"], made["theirs"]]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with serving(PLAN) as server:
        with pytest.raises(NotPermittedError, match=f"cannot write {file}") as e:
            Rollout(server.url, PLAN, via="disk", folder=file).update(WEIGHTS.items(), 1)
        assert "folder=" in (e.value.hint or "")
        assert wire.BEGIN not in server.asked


def test_buckets_without_memory_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        serving(PLAN) as server,
        Rollout(server.url, PLAN, via="disk", folder=tmp_path) as rollout,
    ):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", none)
            with pytest.raises(CarrierError, match="slots") as e:
                rollout.update(WEIGHTS.items(), 1)
            assert "bucket_bytes" in str(e.value.hint)
        assert not any(tmp_path.iterdir())
        rollout.update(WEIGHTS.items(), 2)
