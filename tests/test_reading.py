"""Tensors of a source that are worked on several at a time come as if one by one."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from fp8ctl import models, reading
from fp8ctl.errors import CheckpointError
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.planning import make_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.manifest import Plan, PlannedTensor

COUNT, SIDE = 12, 64
NAMES = [f"model.layers.{i:02}.mlp.down_proj.weight" for i in range(COUNT)]
EACH = SIDE * SIDE * 2


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("model")
    state = {name: torch.full((SIDE, SIDE), float(i + 1)) for i, name in enumerate(NAMES)}
    save_file({n: t.bfloat16() for n, t in state.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    return make_plan(folder, "sglang", Mode.BLOCK, 1, BlockSize(32, 32))


@pytest.fixture(autouse=True)
def four_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def first(planned: PlannedTensor, weight: torch.Tensor) -> float:
    return float(weight[0, 0])


def test_all_come_in_order_whoever_is_ready_first(plan: Plan) -> None:
    def uneven(planned: PlannedTensor, weight: torch.Tensor) -> float:
        value = float(weight[0, 0])
        time.sleep(0.02 if value % 3 else 0.1)
        return value

    told: list[tuple[int, int]] = []
    source = models.read_checkpoint(plan.model)
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    found = [(p.name, value) for p, value in reading.each(source, plan, uneven, progress)]
    assert found == [(name, i + 1.0) for i, name in enumerate(NAMES)]
    assert told == [(EACH * (i + 1), EACH * COUNT) for i in range(COUNT)]
    some = reading.each(source, plan, first, only=NAMES[3:5])
    assert [(p.name, value) for p, value in some] == [(NAMES[3], 4.0), (NAMES[4], 5.0)]


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_more_is_in_memory_than_is_allowed(
    plan: Plan, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_IN_MEMORY", most * EACH)
    lock, now, peak = threading.Lock(), 0, 0

    def counted(planned: PlannedTensor, weight: torch.Tensor) -> None:
        nonlocal now, peak
        with lock:
            now += 1
            peak = max(peak, now)
        time.sleep(0.03)
        with lock:
            now -= 1

    for _ in reading.each(models.read_checkpoint(plan.model), plan, counted):
        pass
    assert peak == most  # and so many at a time, or it is not several


def test_what_one_raises_ends_all_and_leaves_no_thread(plan: Plan) -> None:
    begun: list[str] = []

    def fails(planned: PlannedTensor, weight: torch.Tensor) -> None:
        begun.append(planned.name)
        assert torch.get_num_threads() == 1
        if planned.name == NAMES[1]:
            raise ValueError("as asked")
        time.sleep(0.05)

    before = threading.active_count()
    with pytest.raises(ValueError, match="as asked"):
        list(reading.each(models.read_checkpoint(plan.model), plan, fails))
    assert len(begun) < COUNT
    assert (threading.active_count(), torch.get_num_threads()) == (before, 4)


def test_who_takes_no_more_leaves_no_thread_either(plan: Plan) -> None:
    before = threading.active_count()
    with contextlib.closing(
        reading.each(models.read_checkpoint(plan.model), plan, first)
    ) as several:
        assert next(several)[1] == 1.0
    assert (threading.active_count(), torch.get_num_threads()) == (before, 4)


def test_a_gpu_has_one_at_a_time_in_this_thread_and_what_has_no_room_is_done_here(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No GPU is needed for that: its tensors are on "meta" here, which has no room for any.
    monkeypatch.setattr(reading, "default_device", lambda: torch.device("meta"))
    seen: list[tuple[str, str]] = []

    def work(planned: PlannedTensor, weight: torch.Tensor) -> float:
        assert threading.current_thread() is threading.main_thread()
        seen.append((planned.name, weight.device.type))
        if weight.is_meta:
            raise torch.OutOfMemoryError("no room")
        return float(weight[0, 0])

    found = reading.each(models.read_checkpoint(plan.model), plan, work)
    assert [value for _, value in found] == [i + 1.0 for i in range(COUNT)]
    assert seen == [(name, where) for name in NAMES for where in ("meta", "cpu")]


def test_a_file_that_was_cut_is_an_error_with_the_tensor(plan: Plan) -> None:
    source = models.read_checkpoint(plan.model)
    file = plan.model / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-100])
        with pytest.raises(CheckpointError, match=f"ends inside {NAMES[-1]}"):
            list(reading.each(source, plan, first))
    finally:
        file.write_bytes(whole)
