"""The digest adds up over any parts, and any change of place or value changes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl.kernels import digest as module
from fp8ctl.kernels.digest import combine, digest, from_text, to_text

MASK = (1 << 64) - 1
DTYPES = (
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
seeds = st.integers(0, 2**31)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def finish(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def by_hand(rows: list[list[int]], row_offset: int = 0, col_offset: int = 0) -> int:
    """The definition in the module's docstring, in Python's whole numbers."""
    total = 0
    for r, row in enumerate(rows, row_offset):
        for c, value in enumerate(row, col_offset):
            key = finish(2 * r + 1) + finish(2 * c) + value * 0x9E3779B97F4A7C15
            total += finish(key & MASK)
    return total & MASK


@given(seeds, st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**40), st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_it_is_the_written_definition(seed: int, n: int, k: int, row: int, column: int) -> None:
    x = random((n, k), seed, torch.bfloat16)
    assert digest(x, row, column) == by_hand(x.view(torch.int16).tolist(), row, column)
    codes = x.to(torch.float8_e4m3fn)
    assert digest(codes, row, column) == by_hand(codes.view(torch.uint8).tolist(), row, column)


@given(seeds, st.data(), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_parts_add_up_to_the_whole(seed: int, data: st.DataObject, dtype: torch.dtype) -> None:
    n, k = data.draw(st.tuples(st.integers(0, 30), st.integers(0, 30)))
    x = random((n, k), seed, dtype)
    i = data.draw(st.integers(0, n))
    j = data.draw(st.integers(0, k))
    corners = [(slice(a, b), slice(c, d)) for a, b in ((0, i), (i, n)) for c, d in ((0, j), (j, k))]
    parts = [digest(x[r, c], r.start, c.start) for r, c in corners]
    assert combine(*parts) == digest(x)
    assert combine(*reversed(parts)) == digest(x)


@given(seeds, st.integers(2, 12), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_any_move_or_flip_changes_it(seed: int, n: int, k: int) -> None:
    # Distinct values: moving one of two equal elements is no change.
    x = torch.randperm(n * k, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    x = x.view(n, k)
    flipped = x.clone()
    flipped[seed % n, seed % k] ^= 1 << (seed % 15)
    changed = [
        flipped,
        x.roll(1, 0),
        x.roll(1, 1),
        x.flip(0),
        x.flip(1),
        x.t().contiguous(),
        x.t().contiguous().view(n, k),
        x.flatten(),
    ]
    others = [digest(y) for y in changed if y.shape != x.shape or not torch.equal(x, y)]
    assert digest(x) not in others
    assert digest(x, 1) != digest(x) != digest(x, 0, 1)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random((23, 31), 5)
    whole = digest(x, 3, 4)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert digest(x, 3, 4) == whole


def test_strides_do_not_show_and_the_input_stays() -> None:
    base = random((40, 60), 6)
    before = base.clone()
    for view in (base.t(), base[::3, 1::2], base[2:3].expand(9, 60)):
        assert digest(view) == digest(view.contiguous())
    assert torch.equal(base, before)


def test_other_dimensions_are_rows() -> None:
    x = random((3, 4, 5), 7)
    assert digest(x) == digest(x.view(12, 5))
    bias = random((6,), 8)
    assert digest(bias) == digest(bias[:, None])
    assert digest(bias) == combine(digest(bias[:2]), digest(bias[2:], row_offset=2))
    assert digest(bias[0]) == digest(bias[:1])
    assert digest(bias[:0]) == 0


def test_bits_count_not_values() -> None:
    assert digest(torch.tensor([[0.0]])) != digest(torch.tensor([[-0.0]]))
    nan = torch.tensor([[float("nan")]])
    assert digest(nan) == digest(nan.clone())


def test_text_keeps_every_bit() -> None:
    for value in (0, 1, MASK, 1 << 63, digest(random((3, 3), 9))):
        assert from_text(to_text(value)) == value
    with pytest.raises(ValueError, match="16 hexadecimal"):
        from_text("abc")


def test_what_has_no_digest_is_refused() -> None:
    with pytest.raises(TypeError, match="complex"):
        digest(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="negative"):
        digest(torch.zeros(2), -1)
