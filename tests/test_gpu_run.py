"""`tests/gpu/run.sh` where there is no GPU; and what its legs rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8ctl.hardware import detect
from fp8ctl.patching import diff, parser
from tests.gpu import ask, models
from tests.gpu.leg import FailedError, Leg
from tests.gpu.leg_sglang import PATCH

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent


def run(*argv: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FP8CTL_")}
    return subprocess.run(
        ["sh", str(ROOT / "tests" / "gpu" / "run.sh"), *argv],
        env=clean | {"PYTHON": python},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def leg(tmp_path: Path) -> Leg:
    return Leg("a-leg", tmp_path / "evidence", seconds=30, together=2)


def lines(leg: Leg) -> list[dict[str, object]]:
    return [json.loads(line) for line in (leg.folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.skipif(bool(detect().gpus), reason="this machine has a GPU")
def test_without_a_gpu_every_leg_is_skipped_with_the_reason(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skip ")]
    assert len(skipped) == 8
    assert all("CUDA device(s), found no GPU" in line for line in skipped)
    assert "failed: 0" in done.stdout


def test_without_what_fp8ctl_needs_it_is_skipped_too(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"), python="false")
    assert done.returncode == 0
    assert done.stdout.startswith("skip: false has not what fp8ctl needs")


def test_a_leg_that_is_not_there_is_an_error() -> None:
    assert run("no-such-leg").returncode == 2


def test_a_step_that_fails_ends_its_job_and_no_other(leg: Leg) -> None:
    done: list[str] = []

    def fail() -> None:
        raise FailedError("as asked")

    def broken() -> None:
        with leg.step("breaks"):
            fail()
        done.append("after it")

    def sound() -> None:
        with leg.step("holds") as seen:
            seen["answer"] = 42
        done.append("sound")

    leg.jobs({"broken": broken, "sound": sound})
    leg.close()
    assert done == ["sound"]
    assert leg.failed == ["broken: breaks"]
    told = {line["job"]: line for line in lines(leg)}
    assert told["broken"]["reason"] == "FailedError: as asked"
    assert told["sound"]["answer"] == 42


def test_when_the_time_is_up_steps_are_skipped_and_say_so(leg: Leg) -> None:
    leg.seconds = 1

    def late() -> None:
        with leg.step("too late"):
            leg.left(10)

    leg.job("late", late)
    leg.close()
    assert leg.failed == []
    assert [line["result"] for line in lines(leg)] == ["skip"]


def test_what_does_not_end_in_time_is_killed_with_its_children(leg: Leg, tmp_path: Path) -> None:
    mark = tmp_path / "child"
    script = f"sleep 60 & echo $! > {mark}; wait"
    began = time.monotonic()
    with pytest.raises(FailedError, match="not done after"):
        leg.run(["sh", "-c", script], dict(os.environ), 1)
    leg.close()
    assert time.monotonic() - began < 15
    state = Path(f"/proc/{mark.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split(") ")[1].startswith("Z")


@pytest.mark.wheels
def test_the_seeds_fault_can_still_be_put_into_the_release(
    engine_sources: Callable[[str], Path],
) -> None:
    [one] = parser.parse(PATCH.read_bytes(), name=PATCH.name)
    released = (engine_sources("sglang") / str(one.path)).read_bytes()
    changed = diff.apply(one, released).data
    assert changed is not None
    apply = changed.split(b"    def apply(")[1].split(b"\nclass ")[0]
    assert apply.count(b"requantize_with_max_scale(") == 1
    assert (
        b"requantize_with_max_scale("
        not in released.split(b"    def apply(")[1].split(b"\nclass ")[0]
    )


def test_nan_is_never_equal() -> None:
    nan = ask.Said((("1",),), (float("nan"),))
    with pytest.raises(FailedError):
        ask.require_equal(nan, nan, "two")
    good = ask.Said((("1",),), (-1.0,))
    assert ask.require_equal(good, good, "two")["max_difference"] == 0.0


@pytest.mark.parametrize("kind", sorted(set(models.KINDS) - {"narrow"}))
def test_the_models_divide_by_128(kind: str) -> None:
    for name, shape in models.shapes(models.KINDS[kind]).items():
        if "_proj" in name:
            assert [size % 128 for size in shape] == [0, 0], name
