"""Updates by SGLang's own routes, in its schedulers: safe, and counted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8ctl.engines.hooks import sglang_worker
from tests.engines.hooks.sglang_engine import workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.engines.hooks.sglang_engine import Engine


def loads(names: Sequence[str]) -> Any:
    """Return a request to load tensors of these names."""
    return SimpleNamespace(names=names, load_format=None)


class Worker:
    """SGLang's TpModelWorker and ModelRunner, as far as they are wrapped."""

    model: Any
    tp_rank = 0

    def load_model(self) -> None:
        self.model = nn.Linear(3, 2)
        self.model.load_weights = self._load

    def _load(self, weights: Any) -> None:
        for name, _ in weights:
            if name == "bad":
                raise ValueError("shape mismatch")

    def update_weights_from_disk(self, request: Any) -> tuple[bool, str]:
        self.model.load_weights((name, torch.zeros(1)) for name in request.names)
        return True, "Success"

    update_weights_from_tensor = update_weights_from_disk
    update_weights_from_distributed = update_weights_from_disk
    init_weights_update_group = update_weights_from_disk


@pytest.fixture
def worker(engine: Engine) -> Any:
    kind = type("Worker", (Worker,), dict(vars(Worker)))
    module: Any = SimpleNamespace(TpModelWorker=kind, ModelRunner=kind)
    sglang_worker._take_updates_safely(module)
    sglang_worker._watch_loading(module)
    made = kind()
    made.load_model()
    return made


WAYS = (
    "init_weights_update_group",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
)


@pytest.mark.parametrize("way", WAYS)
def test_a_loader_that_raises_is_an_answer_and_not_the_end_of_the_server(
    worker: Any, way: str, run_dir: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    update: Callable[[Any], tuple[bool, str]] = getattr(worker, way)
    assert update(loads(["a", "b"])) == (True, "Success")
    receiver = sglang_worker._receivers[worker.model]
    assert receiver.arrived == {"a", "b"}
    assert update(loads(["c", "bad", "d"])) == (False, "ValueError: shape mismatch")
    assert "Traceback" in capsys.readouterr().err
    assert receiver.progress(["a", "b"])["broken"]


def test_a_way_around_the_loaders_is_refused(worker: Any) -> None:
    request = loads(["a"])
    request.load_format = "direct"
    ok, message = worker.update_weights_from_tensor(request)
    assert (ok, "'direct'" in message) == (False, True)
    assert sglang_worker._receivers[worker.model].arrived == set()


@pytest.mark.parametrize("way", ["broken", "forget"])
def test_what_was_loaded_before_does_not_count_any_more(
    way: str, worker: Any, run_dir: Path, engine: Engine
) -> None:
    """After a push that broke off, and where the server says so: on every rank."""
    engine.models = (worker.model,)

    def progress() -> tuple[bool, list[str]]:
        [answer] = asyncio.run(workers(engine).ask("progress", expected=["a", "b"]))
        return answer["broken"], answer["missing"]

    worker.update_weights_from_tensor(loads(["a", "bad"] if way == "broken" else ["a"]))
    if way == "forget":
        asyncio.run(workers(engine).ask("forget"))
    assert progress() == (way == "broken", ["a", "b"])
    worker.update_weights_from_tensor(loads(["b"]))
    assert progress() == (False, ["a"])
    worker.update_weights_from_tensor(loads(["a"]))
    assert progress() == (False, [])
