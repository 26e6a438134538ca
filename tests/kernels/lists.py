"""Lists of tensors on each device, and how a test of them is run by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from tests.kernels import matrix
from tests.kernels.implementations import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fp8ctl.kernels.groups import Groups

    Pair = tuple[torch.Tensor, torch.Tensor]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only"
)
on_each_device = pytest.mark.parametrize("device", DEVICES)


def same(found: Pair, wanted: Pair) -> bool:
    return torch.equal(
        found[0].cpu().view(torch.uint8), wanted[0].cpu().view(torch.uint8)
    ) and torch.equal(found[1].cpu().view(torch.int32), wanted[1].cpu().view(torch.int32))


def tensors(device: str = "cpu", again: int = 0) -> list[torch.Tensor]:
    """Return tensors of all dtypes, some shapes twice, some empty, some not contiguous."""
    shapes = ((5, 7), (64, 40), (5, 7), (0, 3), (130, 20), (64, 40), (2, 0), (1, 1), (5, 7))
    return [
        matrix.lay_out(
            matrix.numbers("normal", shape, matrix.DTYPES[i % 3], again),
            ("contiguous", "transposed", "steps", "fused")[i % 4],
            device,
        )
        for i, shape in enumerate(shapes)
    ]


def outputs(xs: Sequence[torch.Tensor], groups: Groups) -> list[Pair]:
    return [
        (
            torch.empty(x.shape, dtype=torch.uint8, device=x.device),
            torch.empty(groups.scale_shape(x.shape), device=x.device),
        )
        for x in xs
    ]


_INTERPRETED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import pytest, torch
from fp8ctl.kernels import quantize
assert quantize._on_gpu(torch.zeros(1)) is False
quantize._on_gpu = lambda x: isinstance(x, torch.Tensor)
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
sys.exit(pytest.main([*options, {path!r}, "-k", {selection!r}]))
"""
NOT_TRITON = "not meta and not c_kernel and not compiler and not threads and not by_triton"


def through_triton(file: str, selection: str, home: Path, **more: str) -> None:
    """Run tests of a file with the kernels on a CPU, as if that were a GPU."""
    script = _INTERPRETED.format(path=file, selection=f"cpu and {selection}")
    done = apart(script, TRITON_HOME=str(home), OMP_NUM_THREADS="1", **more)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def apart(script: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, with more in its environment."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
