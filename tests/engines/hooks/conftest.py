"""A run folder, and two ranks of SGLang without SGLang."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from torch import nn

from fp8ctl.engines.hooks import ranklog, sglang_worker
from tests.engines.hooks.sglang_engine import Engine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ranklog.RUN_DIR, str(tmp_path))
    return tmp_path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine(nn.Linear(3, 2), nn.Linear(3, 2))

    def module(name: str, **names: object) -> None:
        stub = ModuleType(name)
        vars(stub).update(names)
        monkeypatch.setitem(sys.modules, name, stub)
        parent, _, last = name.rpartition(".")
        if parent in sys.modules and parent.startswith("sglang"):
            setattr(sys.modules[parent], last, stub)

    for package in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.layers"):
        module(package)
    serializer = SimpleNamespace(serialize=pickle.dumps)
    module("sglang.srt.utils", MultiprocessingSerializer=serializer)
    module("sglang.srt.managers.io_struct", UpdateWeightsFromTensorReqInput=SimpleNamespace)
    module("sglang.srt.distributed", get_tensor_model_parallel_rank=lambda: made.rank)
    module("sglang.srt.layers.quantization")
    fp8 = "sglang.srt.layers.quantization.fp8"
    module(fp8, Fp8LinearMethod=type("Fp8LinearMethod", (), {"refittable": True}))
    monkeypatch.setattr(sglang_worker, "_receivers", {})
    return made
