"""Every byte of a converted file has one place, and is in exactly one part."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from fp8ctl import layout, models
from fp8ctl.formats import Mode
from tests.test_checkpoint import planned, save, weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
@pytest.mark.parametrize("size", [64, 5000, 1 << 22])
def test_the_parts_cover_source_and_result_once(
    tmp_path: Path, mode: Mode, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "PART", size)
    source = save(tmp_path / "source", weights(), 2)
    plan, read = planned(source, mode), models.read_checkpoint(source)
    for one in layout.layouts(read, plan).values():
        parts = list(one.parts())
        found = sorted(
            [(p.place, p.size) for p in parts] + [(p.scales_place, p.scales_size) for p in parts]
        )
        position = len(one.head)
        for place, length in found:
            if length:
                assert place == position
                position += length
        assert position == one.size
        taken = sorted((p.start, p.nbytes) for p in parts if p.nbytes)
        ends = sorted((i.start, i.nbytes) for i in read.tensors.values() if i.file == one.name)
        assert sum(n for _, n in taken) == sum(n for _, n in ends)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(taken))


def test_small_parts_are_whole_rows_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "PART", 1)
    source = save(tmp_path / "source", weights())
    plan = planned(source)
    assert plan.block is not None
    [one] = layout.layouts(models.read_checkpoint(source), plan).values()
    rows = [p for p in one.parts() if p.tensor.name.endswith("down_proj.weight")]
    assert [(p.row, p.shape[0]) for p in rows] == [(0, 32), (32, 19)]  # 51 rows in blocks of 32
