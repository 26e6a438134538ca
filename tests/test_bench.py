"""`fp8ctl bench kernel`: a table, a document, and an exit code that is 8 for a wrong kernel."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import venv
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import bench, worker
from fp8ctl.errors import CheckFailedError, NotFoundError, UsageError
from fp8ctl.kernels import bench as measurement
from fp8ctl.kernels import quantize, timing, workloads
from fp8ctl.kernels.groups import block
from fp8ctl.kernels.workloads import Work
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from pathlib import Path

WORK = Work("256x192", ((256, 192),), groups=block(64, 64), threads=1, rounds=2)


def run(report: Reporter | None = None, **options: Any) -> dict[str, Any]:
    given = {"what": "kernel", "device": "cpu", "recipe": "ieee", "quick": True, "python": None}
    quiet = report or Reporter(out=io.StringIO(), err=io.StringIO())
    return bench.run(quiet, **{**given, **options})


def fp8ctl(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fp8ctl", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker's task in this process, where kernels can be replaced, on one small work."""

    def in_process(
        python: Path, task: str, arguments: dict[str, Any], report: Reporter, title: str
    ) -> dict[str, Any]:
        # Through JSON, as the two processes talk.
        with report.progress(title, 0, "B") as tell:
            result = worker.TASKS[task](arguments, lambda done, total: tell(done))
        found: dict[str, Any] = json.loads(json.dumps(result))
        return found

    class Small(timing.Cpu):
        def __init__(self) -> None:
            super().__init__(quick=True)
            self.piece = 1 << 12

    monkeypatch.setattr(bench, "run_worker", in_process)
    monkeypatch.setattr(measurement, "open_device", lambda *_: Small())
    monkeypatch.setattr(workloads, "for_cpu", lambda *_: [WORK])


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a kernel in place that has one bit of one code wrong."""
    right = quantize.quantize

    def wrong(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = right(x, *arguments)
        codes.view(torch.uint8)[17, 5] ^= 1
        return codes, scales

    monkeypatch.setattr(quantize, "quantize", wrong)


# --- the whole path -------------------------------------------------------------------------------


def test_the_command_measures_in_a_worker_and_prints_one_document() -> None:
    done = fp8ctl("bench", "kernel", "--device", "cpu", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["ok"], document["command"]) == (True, "bench")
    data = document["data"]
    assert data["ok"] is True
    assert data["device"]["type"] == "cpu"
    assert data["versions"]["torch"] == torch.__version__
    assert all(row["exact"] for row in data["rows"])
    assert "bench kernel: 100 %" in done.stderr


@pytest.mark.usefixtures("here")
def test_a_person_gets_the_device_and_a_table() -> None:
    out = io.StringIO()
    document = run(Reporter(out=out, err=io.StringIO()))
    shown = out.getvalue().splitlines()
    assert shown[0] == document["device"]["name"]
    head = next(line for line in shown if line.startswith("work"))
    for column in ("time", "GB/s", "copy GB/s", "of copy", "exact"):
        assert column in head
    assert shown[-1].startswith("256x192, 1 thread")
    assert shown[-1].endswith("exact")


@pytest.mark.usefixtures("here")
def test_a_wrong_kernel_is_a_failed_check_with_all_that_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    out = io.StringIO()
    with pytest.raises(CheckFailedError, match=r"1 row of 1 not exact; 256x192: 1 of 49152") as e:
        run(Reporter(out=out, err=io.StringIO()))
    assert e.value.exit_code == 8
    assert e.value.hint == f"fp8ctl doctor --python {sys.executable}"
    assert e.value.data["ok"] is False
    rows: Any = e.value.data["rows"]
    [row] = rows
    assert row["differs"].startswith("1 of 49152 codes, first at [17, 5]: 0x")
    assert "first at [17, 5]" in out.getvalue().splitlines()[-1]


@pytest.mark.usefixtures("here")
def test_a_wrong_kernel_makes_the_program_exit_8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fp8ctl import cli

    plant(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["fp8ctl", "bench", "kernel", "--quick", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 8
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["command"]) == (False, "bench")
    assert document["error"]["id"] == "FP8-CHECK-FAILED"
    assert document["error"]["data"]["rows"][0]["exact"] is False


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            {"what": "kernels"},
            "unknown benchmark 'kernels', expected kernel",
            "fp8ctl bench kernel",
        ),
        ({"device": "tpu"}, "unknown device 'tpu', expected cpu or cuda", "--device cpu"),
        (
            {"push": {"updates": 5, "model": None, "via": "disk"}},
            "--updates 5 --via disk: of bench push, and bench kernel has no such option",
            "fp8ctl bench kernel, or fp8ctl bench push URL --updates 5 --via disk",
        ),
        (
            {"push": {"bucket_size": 512}},  # a default that was typed was meant all the same
            "--bucket-size 512: of bench push",
            "fp8ctl bench kernel, or fp8ctl bench push URL --bucket-size 512",
        ),
        (
            {"what": "push", "url": "http://a:1", "recipe": "ieee"},
            "--recipe ieee --quick: of bench kernel, and bench push has no such option",
            "fp8ctl bench push http://a:1, or fp8ctl bench kernel --recipe ieee --quick",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_worker_starts(
    options: dict[str, Any], message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(bench, "run_worker", refuse)
    with pytest.raises(UsageError, match=message) as e:
        run(**options)
    assert hint in str(e.value.hint)


def test_an_unknown_recipe_is_a_usage_error_that_lists_them() -> None:
    with pytest.raises(UsageError, match="ieee, reciprocal, inverse-scale, ue8m0") as e:
        run(recipe="exact")
    assert e.value.hint == "fp8ctl bench kernel --recipe ieee"


@pytest.mark.parametrize(
    "argv",
    [
        ("kernel", "--updates", "3"),
        ("kernel", "--model", "M"),
        ("kernel", "--via", "ipc"),
        ("kernel", "--bucket-size", "512"),
        ("push", "http://127.0.0.1:9", "--recipe", "ieee"),
        ("push", "http://127.0.0.1:9", "--quick"),
    ],
)
def test_an_option_of_the_other_benchmark_is_a_usage_error(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fp8ctl import cli

    monkeypatch.setattr(sys, "argv", ["fp8ctl", "bench", *argv, "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["id"] == "FP8-USAGE"
    assert next(word for word in argv if word.startswith("--")) in error["message"]


def test_no_argument_is_a_usage_error() -> None:
    done = fp8ctl("bench", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["hint"] == "fp8ctl bench --help"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_where_there_is_none_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="no CUDA device: torch") as e:
        run(device="cuda")
    assert e.value.exit_code == 3
    assert e.value.hint == "fp8ctl bench kernel --device cpu"


def test_an_interpreter_without_torch_or_that_is_none_is_told(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    with pytest.raises(NotFoundError, match="No module named 'torch'") as e:
        run(python=tmp_path / "bare")  # a virtual environment's folder will do
    assert "--python" in str(e.value.hint)
    with pytest.raises(NotFoundError, match="no Python interpreter at"):
        run(python=tmp_path / "nothing")
