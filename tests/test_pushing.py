"""`fp8ctl push`: what is refused before anything is sent, what is sent, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8ctl import checkpoint, history, pushing, wire
from fp8ctl.errors import (
    BusyError,
    CheckFailedError,
    CheckpointError,
    ConflictError,
    NotFoundError,
    PlanDoesNotFitError,
    UnsupportedError,
    UsageError,
)
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels.quantize import quantize_block
from fp8ctl.planning import make_plan
from fp8ctl.render import Reporter
from tests.e2e.conftest import free_port
from tests.push.serving import serving
from tests.test_render import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fp8ctl.manifest import Plan

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def write(folder: Path, seed: int = 1, rows: int = 128, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    save_file({UP: weight, NORM: torch.ones(64).bfloat16()}, folder / "model.safetensors")
    return folder


def weight_of(seed: int) -> torch.Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source")


@pytest.fixture
def plan(source: Path) -> Plan:
    return make_plan(source, "sglang", Mode.BLOCK, 1, BlockSize(32, 32))


@pytest.fixture
def report() -> Reporter:
    return Reporter(out=io.StringIO(), err=io.StringIO())


def out(report: Reporter) -> str:
    stream = report._out
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def said(report: Reporter) -> str:
    stream = report._err
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def push(report: Reporter, *urls: str, model: Path, **more: Any) -> Any:
    return pushing.run(report, urls=urls, model=str(model), check=False, **more)


def test_servers_hold_what_the_kernel_makes_of_the_checkpoint(
    source: Path, plan: Plan, report: Reporter, tmp_path: Path
) -> None:
    other = write(tmp_path / "other", seed=2)
    # What engines compute themselves may come with a checkpoint.
    tensors = {UP: weight_of(2), NORM: torch.ones(64).bfloat16()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, other / "model.safetensors")
    with serving(plan, ranks=2, folder=tmp_path) as one, serving(plan) as two:
        first = push(report, one.url, two.url, model=source, version="v1")
        data = push(report, one.url, f"{one.url}/", model=other, version="v2", delta=True)
        codes, scales = quantize_block(weight_of(2), (32, 32))
        for held in one.table.held:
            assert torch.equal(held[UP].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(held[f"{UP}_scale_inv"], scales)
        assert not torch.equal(two.table.held[0][f"{UP}_scale_inv"], scales), "it got v1 alone"
        assert (first["tensors"], first["verified"], first["verdict"]) == (3, 3, "fp8-ok")
        assert data["servers"] == [one.url], "a server that is named twice is one"
        assert data["update"]["skipped"] == 1, "the norm was there"
        assert (data["verified"], data["verdict"]) == (3, "fp8-ok")
        log: Any = history.run(report, source=one.url, versions=("v1", "v2"))
        assert log["counts"] == {"changed": 2, "unchanged": 1, "unknown": 0}
    assert "weights: 3 of 3 tensors equal in every rank of 2 servers" in out(report)
    assert "NCCL" not in out(report)
    # It takes two GPUs that do not reach each other.
    by_nccl = {"carrier": {"name": "nccl", "why": "they do not reach each other"}}
    pushing._tell(report, data, {**data["update"], **by_nccl, "bytes_sent": 0})
    assert ", 0 B/s" not in out(report), "nothing was sent at no rate"
    assert "by NCCL, not by copies from GPU to GPU" in out(report)
    assert "which are faster: they do not reach each other" in out(report)
    told = "verdict: fp8-ok, 3 tensors equal what was sent, in every rank, version v2"
    assert told in out(report)


def test_the_librarys_options_reach_it(
    source: Path, plan: Plan, report: Reporter, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    async def note(body: dict[str, Any]) -> None:
        seen.update(body)

    with serving(plan) as server:
        server.faults[wire.BEGIN] = server.faults[wire.BUCKET] = note
        push(report, server.url, model=source, via="disk", folder=tmp_path / "shared", timeout=33)
        assert seen["path"].startswith(str(tmp_path / "shared" / "fp8ctl-push-"))
        assert seen["within"] == 33
        assert not any((tmp_path / "shared").iterdir())
        server.faults.clear()
        push(report, server.url, model=source, via="nccl", master="127.0.0.2")
        assert server.table.offers[-1]["host"] == "127.0.0.2"


def test_a_terminal_shows_a_bar_with_a_rate_and_a_pipe_plain_lines(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)]
    save_file({n: torch.ones(16384, 64).bfloat16() for n in names}, folder / "model.safetensors")
    plan = make_plan(folder, "sglang", Mode.BLOCK, 1, BlockSize(32, 32))
    shown, plain = Terminal(), io.StringIO()
    with serving(plan) as server, contextlib.closing(shown):
        server.table.delay = 0.25  # as long as it takes to be drawn
        for err in (shown.stream, plain):
            push(Reporter(out=io.StringIO(), err=err), server.url, model=folder, bucket_size=1)
        drawn = shown.read()
    bars = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", drawn).replace("\n", "")
    rates = re.findall(r"push large ━[━╺╸]* +\d+% [\d.]+ [kMG]B/s", bars)
    assert len(rates) > 1, bars
    assert "\x1b[" not in plain.getvalue()
    lines = re.findall(r"^push large: (\d+) % \(.* of .*\)$", plain.getvalue(), re.MULTILINE)
    assert lines[-1] == "100"
    assert len(lines) > 2


def test_a_stock_server_is_refused_with_the_patch_command(
    source: Path, plan: Plan, report: Reporter
) -> None:
    with serving(plan, stock=True) as server:
        with pytest.raises(UnsupportedError, match="was not started by fp8ctl") as caught:
            push(report, server.url, model=source)
        assert "fp8ctl patch --backend sglang" in str(caught.value.hint)
        assert not [path for path in server.asked if path.startswith("/fp8ctl/push/")]


def test_a_server_without_the_patch_is_refused_before_its_update_begins(
    source: Path, plan: Plan, report: Reporter
) -> None:
    with serving(plan) as server:
        server.table.refit = False
        with pytest.raises(UnsupportedError, match="refit") as caught:
            push(report, server.url, model=source)
        assert "fp8ctl patch --backend sglang" in str(caught.value.hint)
        assert wire.BEGIN not in server.asked
        assert caught.value.data["states"] == {server.url: "ready"}


def test_servers_of_different_plans_are_refused(source: Path, plan: Plan, report: Reporter) -> None:
    other = make_plan(source, "sglang", Mode.PER_TENSOR, 1, None)
    with serving(plan) as one, serving(other) as two:
        with pytest.raises(ConflictError, match="different plans") as caught:
            push(report, one.url, two.url, model=source)
        assert caught.value.data["plans"] == {one.url: plan.digest, two.url: other.digest}
        assert wire.CONNECT not in [*one.asked, *two.asked]


def _no_norm(folder: Path) -> Path:
    write(folder)
    save_file({UP: weight_of(1)}, folder / "model.safetensors")
    return folder


def _more(folder: Path) -> Path:
    write(folder)
    tensors = {UP: weight_of(1), NORM: torch.ones(64).bfloat16()}
    tensors["model.layers.1.mlp.up_proj.weight"] = weight_of(1)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda folder: write(folder, rows=64), r"up_proj.weight is \[64, 64\], planned \[128"),
        (_no_norm, r"model.norm.weight is absent, planned \[64\]"),
        (_more, r"layers.1.mlp.up_proj.weight is \[128, 64\], planned absent"),
    ],
    ids=["shape", "missing", "more"],
)
def test_a_model_of_another_shape_is_refused(
    make: Callable[[Path], Path], found: str, plan: Plan, report: Reporter, tmp_path: Path
) -> None:
    other = make(tmp_path / "other")
    with serving(plan) as server:
        with pytest.raises(ConflictError, match=found):
            push(report, server.url, model=other)
        assert wire.CONNECT not in server.asked


def made(plan: Plan, folder: Path) -> Path:
    """Write the FP8 form of a plan, by the worker's own code."""
    checkpoint.convert(plan, folder, lambda done, total: None)
    return folder


@pytest.mark.parametrize("mode", ["block", pytest.param("per-tensor", marks=pytest.mark.long)])
def test_a_checkpoint_in_fp8_is_sent_as_it_is(
    mode: str, source: Path, report: Reporter, tmp_path: Path
) -> None:
    block = BlockSize(32, 32) if mode == "block" else None
    plan = make_plan(source, "sglang", Mode(mode), 1, block)
    fp8 = made(plan, tmp_path / "fp8")
    scale = f"{UP}_scale_inv" if block else f"{UP}_scale"
    if not block:  # as others write it
        state = load_file(str(fp8 / "model.safetensors"))
        save_file({**state, scale: state[scale].view(())}, fp8 / "model.safetensors")
    with serving(plan, ranks=2) as one, serving(plan) as other:
        data = push(report, one.url, model=fp8, version="made")
        push(report, other.url, model=source)
        for name, tensor in other.table.held[0].items():
            for held in one.table.held:
                assert torch.equal(held[name].view(torch.uint8), tensor.view(torch.uint8)), name
        assert (data["verified"], data["verdict"]) == (3, "fp8-ok")
        # Codes and their scale are there, or they are sent.
        again = push(report, one.url, model=fp8, delta=True)
        assert (again["update"]["sent"], again["update"]["skipped"]) == (0, 3)
    assert "in FP8 as they are" in "".join([out(report), said(report)])


def _spoil(fp8: Path, **changes: torch.Tensor | None) -> None:
    state = {**load_file(str(fp8 / "model.safetensors")), **changes}
    save_file({n: t for n, t in state.items() if t is not None}, fp8 / "model.safetensors")


def _config(fp8: Path, key: str, value: object) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"][key] = value
    (fp8 / "config.json").write_text(json.dumps(config))


def _recipe(fp8: Path) -> None:
    record = json.loads((fp8 / "fp8ctl.json").read_text())
    record["plan"]["recipe"] = "ue8m0"
    (fp8 / "fp8ctl.json").write_text(json.dumps(record))


SCALE = f"{UP}_scale_inv"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda fp8: _config(fp8, "weight_block_size", [64, 64]), "weight_block_size is .64, 64."),
        (lambda fp8: _config(fp8, "quant_method", "awq"), "quant_method is 'awq', planned 'fp8'"),
        (_recipe, "recipe 'ue8m0', planned 'ieee'"),
        (lambda fp8: _spoil(fp8, **{SCALE: None}), "_scale_inv is absent"),
        (lambda fp8: _spoil(fp8, **{SCALE: torch.ones(4, 2).bfloat16()}), "is BF16, planned F32"),
        (lambda fp8: _spoil(fp8, **{SCALE: torch.ones(2, 2)}), r"\[2, 2\], planned \[4, 2\]"),
        (lambda fp8: _spoil(fp8, **{UP: weight_of(1)}), "is BF16, planned F8_E4M3"),
        (lambda fp8: _spoil(fp8, **{NORM: torch.ones(64).to(torch.float8_e4m3fn)}), "norm"),
        (
            lambda fp8: _spoil(fp8, **{"model.layers.9.b": torch.ones(4)}),
            "not in the plan",
        ),
    ],
)
def test_a_checkpoint_in_another_fp8_is_refused_with_the_reason(
    spoil: Callable[[Path], None],
    why: str,
    source: Path,
    plan: Plan,
    report: Reporter,
    tmp_path: Path,
) -> None:
    fp8 = made(plan, tmp_path / "fp8")
    spoil(fp8)
    with serving(plan) as server:
        with pytest.raises(UnsupportedError, match=why) as e:
            push(report, server.url, model=fp8)
        assert "16-bit" in str(e.value.hint)
        assert wire.CONNECT not in server.asked
    with serving(None) as online, pytest.raises(UnsupportedError, match="by themselves"):
        push(report, online.url, model=fp8)


def test_a_code_that_is_no_number_is_not_served(
    source: Path, plan: Plan, report: Reporter, tmp_path: Path
) -> None:
    fp8 = made(plan, tmp_path / "fp8")
    codes = load_file(str(fp8 / "model.safetensors"))[UP].view(torch.uint8)
    codes[3, 5] = 0xFF
    _spoil(fp8, **{UP: codes.view(torch.float8_e4m3fn)})
    with serving(plan) as server:
        with pytest.raises(CheckpointError, match=f"{UP} .* element {3 * 64 + 5}"):
            push(report, server.url, model=fp8)
        assert server.state == "ready"
        assert not server.table.buckets


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    source: Path, plan: Plan, report: Reporter
) -> None:
    with serving(plan) as server:
        data = push(report, server.url, model=source, dry_run=True)
        assert data["dry_run"] is True
        assert data["plan_digest"] == plan.digest
        assert wire.CONNECT not in server.asked


def test_nobody_there_and_options_that_cannot_be_meant(source: Path, report: Reporter) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(NotFoundError, match="no server answers"):
        push(report, nowhere, model=source)
    with pytest.raises(UsageError, match="--via 'post'"):
        push(report, nowhere, model=source, via="post")
    with pytest.raises(UsageError, match="--in-flight 'drop'"):
        push(report, nowhere, model=source, in_flight="drop")
    with pytest.raises(UsageError, match="--delta with --via disk"):
        push(report, nowhere, model=source, via="disk", delta=True)
    with pytest.raises(UsageError, match="--timeout 0; expected seconds"):
        push(report, nowhere, model=source, timeout=0.0)
    with pytest.raises(UsageError, match="--master here with --via ipc"):
        push(report, nowhere, model=source, master="here")
    with pytest.raises(UsageError, match="with --via nccl: it is for --via disk"):
        push(report, nowhere, model=source, via="nccl", folder=source)
    with pytest.raises(UsageError, match="not an address"):
        push(report, "127.0.0.1", model=source)


def test_a_weight_that_has_no_code_is_named_and_the_old_ones_are_served(
    source: Path, plan: Plan, report: Reporter, tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt"
    write(spoilt)
    weight = weight_of(2)
    weight[5, 7] = float("nan")
    save_file({UP: weight, NORM: torch.ones(64).bfloat16()}, spoilt / "model.safetensors")
    with serving(plan) as server:
        push(report, server.url, model=source)
        before = dict(server.table.held[0])
        with pytest.raises(PlanDoesNotFitError, match=UP) as caught:
            push(report, server.url, model=spoilt)
        assert caught.value.data["states"] == {server.url: "ready"}
        after = server.table.held[0]
        assert all(after[name] is tensor for name, tensor in before.items()), "nothing came"


@pytest.mark.parametrize(
    ("told", "typed"),
    [
        ('Rollout(urls, plan, in_flight="abort")', "--in-flight abort"),
        ('Rollout(urls, plan, via="disk")', "--via disk"),
        ('Rollout(urls, plan, via="disk", folder=PATH)', "--via disk --folder PATH"),
        (
            'Rollout(urls, plan, via="nccl", master=ADDRESS), one of this host',
            "--via nccl --master ADDRESS, one of this host",
        ),
        ("timeout=600.0", "--timeout 600.0"),
        ("Rollout(urls, plan, record=PATH)", "--record FILE"),
        ("Rollout(urls, plan, bucket_bytes=9000001)", "--bucket-size 10"),
        ('a smaller bucket_bytes, or via="disk"', "a smaller --bucket-size, or --via disk"),
        (
            "export FP8CTL_API_KEY=KEY, or Rollout(urls, plan, api_key=KEY)",
            "export FP8CTL_API_KEY=KEY",
        ),
        ("fp8ctl ps; fp8ctl logs NAME", "fp8ctl ps; fp8ctl logs NAME"),
    ],
)
def test_a_hint_for_rollout_can_be_typed_behind_the_command(told: str, typed: str) -> None:
    with pytest.raises(UsageError) as e, pushing.hints_of_options():
        raise UsageError("no", hint=told)
    assert e.value.hint == typed


def test_requests_that_do_not_end_are_told_with_the_option(
    source: Path, plan: Plan, report: Reporter
) -> None:
    async def drain(_: Any) -> Any:
        return 408, {"error": {"id": "FP8-DRAIN", "message": "requests run"}, "state": "ready"}

    with serving(plan) as server:
        server.faults[wire.BEGIN] = drain
        with pytest.raises(BusyError) as e:
            push(report, server.url, model=source)
        assert e.value.hint == "--in-flight abort"


def test_a_server_that_does_not_answer_well_afterwards_fails_the_command(
    source: Path, plan: Plan, report: Reporter
) -> None:
    with serving(plan) as server:
        with pytest.raises(CheckFailedError, match="took the weights") as caught:
            pushing.run(report, urls=[server.url], model=str(source))
        data: Any = caught.value.data
        assert (data["verified"], data["verdict"]) == (3, None)
        one = data["checks"][server.url]
        assert (one["live"]["result"], one["weights"]["verdict"]) == ("failed", "fp8-ok")
        assert one["verdict"] is None


@pytest.mark.usefixtures("interrupts_count")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_signal_gives_the_update_up_and_says_what_is_served(
    source: Path, plan: Plan, number: int
) -> None:
    reached = threading.Event()

    async def wait(body: dict[str, Any]) -> None:
        reached.set()
        await asyncio.sleep(2.0)

    with serving(plan) as server:
        server.faults[wire.BUCKET] = wait
        argv = [sys.executable, "-m", "fp8ctl", "push", server.url, "--model", str(source)]
        process = subprocess.Popen(
            [*argv, "--no-check", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        try:
            assert reached.wait(60)
            process.send_signal(number)
            told, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        error = json.loads(told)["error"]
        assert process.returncode == 130
        assert error["id"] == "FP8-INTERRUPTED"
        assert wire.ABORT in server.asked
        # The bucket was on its way: the server took it before it heard of the end.
        state = server.state
        assert error["data"]["states"] == {server.url: state}
        assert f"{server.url} is {state}" in error["message"]
        assert state in {"ready", "failed"}
