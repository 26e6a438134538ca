"""Division by multiplication: every quotient of 16-bit numbers, and hard ones of FP32.

On a CPU the kernels' own functions run in Triton's interpreter, whose fma must round once
for that (Triton 3.9; 3.3.1 rounds twice). On a GPU they are compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from tests.kernels.implementations import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only"
)


def _run(where: str, every: int, rounds: int, home: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_HOME": str(home)}
    environment |= {"OMP_NUM_THREADS": "1"}
    if where == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.division_cases", where, str(every), str(rounds)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    if found["fused"] and where == "cpu":
        pytest.skip(found["fused"])
    assert len(found) == 8
    assert not {case: text for case, text in found.items() if text}


def test_every_significand_of_bf16_and_some_of_fp16(tmp_path: Path) -> None:
    _run("cpu", 16, 2, tmp_path)


@pytest.mark.long
def test_every_significand_of_amax(tmp_path: Path) -> None:
    _run("cpu", 1, 40, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_significand_of_amax_on_a_gpu(tmp_path: Path) -> None:
    _run("cuda", 1, 200, tmp_path)
