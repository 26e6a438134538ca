"""Tasks of the worker that touch no engine and no weight."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest

import fp8ctl.push
from fp8ctl import worker
from fp8ctl.carriers.nccl import CUMEM


class ReachedError(Exception):
    """Nothing is sent in this test."""


@pytest.mark.parametrize("task", [worker.push, worker.bench_push])
@pytest.mark.parametrize(("before", "expected"), [(None, "0"), ("1", "1")])
def test_nccl_shares_memory_as_the_engines_have_it_unless_the_user_says_so(
    task: worker.Task, before: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CUMEM, before or "")
    if before is None:
        monkeypatch.delenv(CUMEM)
    seen: list[str | None] = []

    def rollout(*_: object, **__: object) -> None:
        seen.append(os.environ.get(CUMEM))
        raise ReachedError

    monkeypatch.setattr(fp8ctl.push, "Rollout", rollout)
    monkeypatch.setattr(worker, "_weights", lambda _: [])
    arguments: dict[str, Any] = defaultdict(int, model="/nowhere", device=None)
    with pytest.raises(ReachedError):
        task(arguments, lambda _done, _total: None)
    assert seen == [expected]
