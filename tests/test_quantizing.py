"""`fp8ctl quantize`, and a cache that is right, reused and safe for two at once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8ctl import formats, interpreter, partial, paths, quantizing
from fp8ctl.errors import (
    BusyError,
    ConflictError,
    NotPermittedError,
    PlanDoesNotFitError,
    UsageError,
)
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.groups import block
from fp8ctl.kernels.quantize import quantize_block
from fp8ctl.manifest import Plan, dumps
from fp8ctl.planning import make_plan
from fp8ctl.render import Reporter

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8CTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def report() -> Reporter:
    return Reporter(out=io.StringIO(), err=io.StringIO())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 64, generator=generator).bfloat16()
    save_file({NAME: weight, "model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(quantizing, "run_worker", refuse)


def test_the_command_writes_the_kernel_s_codes(
    source: Path, tmp_path: Path, report: Reporter
) -> None:
    out = tmp_path / "out"
    data = quantizing.run(
        report,
        model=str(source),
        out=out,
        mode="block",
        block_size=None,
        backend=None,
        tp=1,
        python=None,
    )
    assert data["block_size"] == [64, 64]
    found = load_file(out / "model.safetensors")
    codes, scales = quantize_block(load_file(source / "model.safetensors")[NAME], (64, 64))
    assert torch.equal(found[NAME].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found[NAME + "_scale_inv"], scales)
    assert "torch.float8_e4m3fn" in str(found[NAME].dtype)
    assert data["verified"] == data["bytes_after"], "a small result is read again in full"
    assert data["resumed"] == []
    assert isinstance(data["peak_memory"], int)
    assert data["peak_memory"] > 1 << 20


def test_a_second_command_for_the_same_folder_is_told_to_wait(
    source: Path, tmp_path: Path, report: Reporter
) -> None:
    out = tmp_path / "out"
    with partial.opened(out, "somebody else's"), pytest.raises(BusyError, match=str(out)):
        quantizing.run(
            report,
            model=str(source),
            out=out,
            mode="block",
            block_size=None,
            backend=None,
            tp=1,
            python=None,
        )
    assert not out.exists()


def test_a_plan_that_was_written_is_followed(
    source: Path, tmp_path: Path, report: Reporter
) -> None:
    plan = make_plan(source, "sglang", Mode.BLOCK, 1, BlockSize(32, 32))
    path = tmp_path / "plan.json"
    path.write_text(dumps(plan.to_json()))
    data = quantizing.run(report, plan_file=path, out=tmp_path / "out")
    assert data["plan_digest"] == plan.digest
    assert load_file(tmp_path / "out" / "model.safetensors")[NAME + "_scale_inv"].shape == (4, 2)


def test_scales_that_are_powers_of_two_are_asked_for_and_said(
    source: Path, tmp_path: Path, report: Reporter
) -> None:
    data = quantizing.run(report, model=str(source), out=tmp_path / "out", scale="ue8m0")
    assert data["recipe"] == "ue8m0"
    found = load_file(tmp_path / "out" / "model.safetensors")
    weight = load_file(source / "model.safetensors")[NAME]
    codes, scales = kernels.quantize(weight, block(64, 64), "ue8m0")
    assert torch.equal(found[NAME].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found[NAME + "_scale_inv"], scales)


def test_the_cache_keeps_recipes_apart(source: Path, report: Reporter) -> None:
    folders = {}
    for recipe in formats.SCALES.values():
        plan = make_plan(source, "sglang", Mode.BLOCK, recipe=recipe)
        folders[recipe] = quantizing.quantize_cached(report, plan)
        assert quantizing.quantize_cached(report, plan) == folders[recipe]
    scales = [
        load_file(folder / "model.safetensors")[NAME + "_scale_inv"] for folder in folders.values()
    ]
    assert folders["ieee"] != folders["ue8m0"]
    assert not torch.equal(*scales)


def test_a_plan_and_another_option_or_neither_plan_nor_model_are_refused(
    source: Path, tmp_path: Path, report: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)
    path = tmp_path / "plan.json"
    path.write_text(dumps(make_plan(source, "sglang", Mode.BLOCK).to_json()))
    with pytest.raises(UsageError, match="--tp 2 beside --plan"):
        quantizing.run(report, plan_file=path, tp=2, out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"--scale ue8m0 beside --plan .* says fp32"):
        quantizing.run(report, plan_file=path, scale="ue8m0", out=tmp_path / "out")
    with pytest.raises(UsageError, match="--scale 'e8m0'"):
        quantizing.run(report, plan_file=path, scale="e8m0", out=tmp_path / "out")
    with pytest.raises(UsageError, match="--model is missing"):
        quantizing.run(report, out=tmp_path / "out")


def test_what_cannot_be_done_is_refused_before_a_worker_starts(
    source: Path, tmp_path: Path, report: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)

    def run(out: Path, block_size: str | None, verify: str = "auto") -> None:
        quantizing.run(
            report,
            model=str(source),
            out=out,
            mode="block",
            block_size=block_size,
            backend="sglang",
            tp=1,
            python=None,
            verify=verify,
        )

    with pytest.raises(ConflictError, match="not empty"):
        run(source, None)
    with pytest.raises(PlanDoesNotFitError):
        run(tmp_path / "out", "128,128")
    with pytest.raises(UsageError, match="--verify 'some'"):
        run(tmp_path / "out", None, "some")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_place_that_takes_no_folder_is_told_so(source: Path, report: Reporter) -> None:
    with pytest.raises(NotPermittedError, match="takes no new folders"):
        quantizing.run(
            report,
            model=str(source),
            out=Path("/proc/zz/q"),
            mode="block",
            block_size=None,
            backend=None,
            tp=1,
            python=None,
        )


def test_the_cache_is_made_once_and_again_when_the_source_changes(
    source: Path, report: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(source, "sglang", Mode.BLOCK)
    stale = paths.cache_dir() / "quantized" / f".{quantizing.cache_key(plan)}.fp8ctl-partial"
    stale.mkdir(parents=True)
    folder = quantizing.quantize_cached(report, plan)
    assert not stale.exists()
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    with monkeypatch.context() as patch:
        forbid(patch)
        assert quantizing.quantize_cached(report, plan) == folder
        # Half a checkpoint is none, whoever left it.
        os.truncate(folder / "model.safetensors", 100)
        with pytest.raises(AssertionError, match="a worker was started"):
            quantizing.quantize_cached(report, plan)
    before = quantizing.cache_key(plan)
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert quantizing.cache_key(plan) != before
    other = make_plan(source, "vllm", Mode.PER_TENSOR)
    assert quantizing.cache_key(other) != quantizing.cache_key(plan)


_ASK = """
import io, json, sys
from pathlib import Path
from fp8ctl import quantizing
from fp8ctl.manifest import Plan, dumps
from fp8ctl.render import Reporter
plan = Plan.from_json(json.loads(Path(sys.argv[1]).read_text()))
print(quantizing.quantize_cached(Reporter(out=io.StringIO()), plan))
"""


def test_two_processes_at_once_make_one_checkpoint(source: Path, tmp_path: Path) -> None:
    plan = make_plan(source, "sglang", Mode.BLOCK)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    argv = [sys.executable, "-c", _ASK, str(tmp_path / "plan.json")]
    environment = interpreter.worker_environment()
    asking = [
        subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [process.communicate() for process in asking]
    assert told[0][0] == told[1][0]
    # Only one of the two did the work: it alone has progress to tell.
    assert sorted("quantise source" in talk for _, talk in told) == [False, True]
    folder = Path(told[0][0].strip())
    assert Plan.from_json(json.loads((folder / "fp8ctl.json").read_text())["plan"]) == plan
    beside = [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")]
    assert beside == [folder.name]
