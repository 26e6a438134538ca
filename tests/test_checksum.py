"""The sum of what is written differs as soon as anything does."""

from __future__ import annotations

import pytest
import torch

from fp8ctl.checksum import checksum


def numbers(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096, (1 << 19) + 8, (1 << 19) * 2 + 3])
def test_any_flipped_bit_shows(count: int) -> None:
    data = numbers(count)
    before = checksum(data)
    assert before == checksum(data.clone())
    for at in {0, count // 2, count - 1}:
        for bit in (0, 7):
            data[at] ^= 1 << bit
            assert checksum(data) != before, (at, bit)
            data[at] ^= 1 << bit


def test_words_that_change_places_and_pieces_that_are_missing_show() -> None:
    data = numbers(1 << 21)
    before = checksum(data)
    other = data.clone()
    other[:8], other[8:16] = data[8:16], data[:8]
    assert checksum(other) != before
    half = 1 << 19  # the length of the table of factors, in bytes
    assert checksum(torch.cat([data[half:], data[:half]])) != before
    lost = data.clone()
    lost[4096:8192] = 0
    assert checksum(lost) != before
    assert checksum(torch.zeros(8, dtype=torch.uint8)) != checksum(
        torch.zeros(16, dtype=torch.uint8)
    )


def test_sums_go_on_in_order() -> None:
    a, b = numbers(800), numbers(808)
    assert checksum(b, checksum(a)) != checksum(a, checksum(b))
    assert 0 <= checksum(b, checksum(a)) < 1 << 64


def test_the_sum_is_the_same_everywhere() -> None:
    # Journals are read by other processes, with another torch perhaps.
    data = torch.arange(256, dtype=torch.uint8)
    assert f"{checksum(data):016x}" == "a57cf6f22fc598b9"
