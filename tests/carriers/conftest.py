"""Processes that play the ranks of servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.carriers.processes import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def pool() -> Iterator[Pool]:
    # torch starts threads of its own at its first large operation; they are not a carrier's.
    torch.zeros(1 << 22).add(1).long().sum()
    pool = Pool()
    yield pool
    pool.end()
