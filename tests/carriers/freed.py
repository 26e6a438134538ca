"""Slots whose memory says when it is free."""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING

import torch

from fp8ctl.carriers import offers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest


def count_freed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have carriers of a CPU allocate such memory; return the sizes of what is freed."""
    freed: list[int] = []

    def allocate(sizes: Sequence[int], _device: torch.device) -> list[torch.Tensor]:
        slots = []
        for size in sizes:
            memory = (ctypes.c_uint8 * size)()
            weakref.finalize(memory, freed.append, size).atexit = False
            slots.append(torch.frombuffer(memory, dtype=torch.uint8))
        return slots

    monkeypatch.setattr(offers, "allocate", allocate)
    return freed
