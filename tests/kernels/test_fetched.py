"""Numbers that were fetched are there when the device has come so far, and not later."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fp8ctl.kernels.fetched import Fetched

#: Cycles of a GPU's clock: some 0.2 s.
LONG = 400_000_000


def test_on_a_cpu_they_are_there() -> None:
    numbers = torch.arange(5)
    assert Fetched(numbers).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.gpu
def test_on_a_gpu_nothing_that_is_queued_later_is_waited_for_or_seen() -> None:
    cuda: Any = torch.cuda
    numbers = torch.arange(5, device="cuda")
    Fetched(numbers).tolist()  # the first takes pinned memory from the system
    torch.cuda.synchronize()
    fetched = Fetched(numbers)
    cuda._sleep(LONG)
    numbers.fill_(7)
    began = time.perf_counter()
    assert fetched.tolist() == [0, 1, 2, 3, 4]
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    assert took < (time.perf_counter() - began) / 4
    assert Fetched(numbers).tolist() == [7] * 5
