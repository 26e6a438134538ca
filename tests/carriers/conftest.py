"""Processes that play the ranks of servers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch

from fp8ctl.carriers import gloo
from tests.carriers.processes import Pool
from tests.carriers.rank import left
from tests.carriers.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def pool() -> Iterator[Pool]:
    # torch starts threads of its own at its first large operation; they are not a carrier's.
    torch.zeros(1 << 22).add(1).long().sum()
    pool = Pool()
    yield pool
    pool.end()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Compare what this process holds with what it held before the test."""
    before = left()
    yield
    end = time.monotonic() + 10  # threads of gloo and the store end a moment later
    while (after := left()) != before and time.monotonic() < end:
        time.sleep(0.05)
    assert after == before


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Transport:
    made = Transport()
    monkeypatch.setattr(gloo, "Gloo", made.backend)
    monkeypatch.setattr(gloo, "open_store", lambda *_: (None, 1))
    monkeypatch.setattr(gloo, "reach_store", lambda *_: None)
    return made
