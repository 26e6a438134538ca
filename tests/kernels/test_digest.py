"""The digest adds up over any parts, and any change of place or value changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8ctl.kernels import digest as module
from fp8ctl.kernels.digest import combine, digest, digests, from_text, row_sums, to_text
from tests.kernels.lists import apart, needs_triton

ROOT = Path(__file__).resolve().parents[2]
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


def by_hand(t: torch.Tensor, row_offset: int = 0, col_offset: int = 0) -> int:
    """The definition in the module's docstring, in Python's whole numbers, byte by byte."""
    total = 0
    size = t.element_size()
    lines = t.contiguous().view(torch.uint8).view(t.shape[0], -1).tolist() if t.numel() else []
    for r, line in enumerate(lines, row_offset):
        row_key = finish(2 * r + 1) | 1
        for place, byte in enumerate(line, col_offset * size):
            word, within = divmod(place, 4)
            total += row_key * (finish(2 * word) | 1) * (byte << 8 * within)
    return total & MASK


@pytest.fixture(params=["torch", "c"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test to both that serve a CPU; the interpreted kernel has a test below."""
    if request.param == "c" and module._compiled() is None:
        pytest.skip("no C compiler")
    chosen = {"torch": module.by_torch, "c": module.by_c}[request.param]
    monkeypatch.setattr(module, "_path", lambda _: chosen)


on_each_path = pytest.mark.usefixtures("path")
each_path = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@on_each_path
@given(
    seeds,
    st.sampled_from(DTYPES),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)
@each_path
def test_it_is_the_written_definition(
    seed: int, dtype: torch.dtype, n: int, k: int, row: int, column: int
) -> None:
    x = random((n, k), seed, dtype)
    assert digest(x, row, column) == by_hand(x, row, column)
    assert digest(x) == by_hand(x)


@on_each_path
@given(seeds, st.data(), st.sampled_from(DTYPES))
@each_path
def test_parts_add_up_to_the_whole(seed: int, data: st.DataObject, dtype: torch.dtype) -> None:
    n, k = data.draw(st.tuples(st.integers(0, 30), st.integers(0, 30)))
    x = random((n, k), seed, dtype)
    i = data.draw(st.integers(0, n))
    j = data.draw(st.integers(0, k))
    corners = [(slice(a, b), slice(c, d)) for a, b in ((0, i), (i, n)) for c, d in ((0, j), (j, k))]
    parts = [digest(x[r, c], r.start, c.start) for r, c in corners]
    assert combine(*parts) == digest(x)
    assert combine(*reversed(parts)) == digest(x)


@on_each_path
@given(seeds, st.integers(2, 12), st.integers(2, 12))
@each_path
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
    monkeypatch.setattr(module, "_path", lambda _: module.by_torch)
    whole = digest(x, 3, 4)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert digest(x, 3, 4) == whole == by_hand(x, 3, 4)


@on_each_path
def test_strides_do_not_show_and_the_input_stays() -> None:
    base = random((40, 60), 6)
    before = base.clone()
    for view in (base.t(), base[::3, 1::2], base[2:3].expand(9, 60)):
        assert digest(view) == digest(view.contiguous())
    assert torch.equal(base, before)


@on_each_path
def test_other_dimensions_are_rows() -> None:
    x = random((3, 4, 5), 7)
    assert digest(x) == digest(x.view(12, 5))
    bias = random((6,), 8)
    assert digest(bias) == digest(bias[:, None])
    assert digest(bias) == combine(digest(bias[:2]), digest(bias[2:], row_offset=2))
    assert digest(bias[0]) == digest(bias[:1])
    assert digest(bias[:0]) == 0


@on_each_path
def test_bits_count_not_values() -> None:
    assert digest(torch.tensor([[0.0]])) != digest(torch.tensor([[-0.0]]))
    nan = torch.tensor([[float("nan")]])
    assert digest(nan) == digest(nan.clone())


@on_each_path
def test_every_layout_and_alignment_has_the_same_digest() -> None:
    for dtype in DTYPES:
        size = torch.empty((), dtype=dtype).element_size()
        for row, column in ((0, 0), (5, 3), (128, 1024)):
            x = random((33, 41), row, dtype)
            wanted = by_hand(x, row, column)
            memory = torch.empty(x.numel() * size + 16, dtype=torch.uint8)
            for skew in range(0, 5 if size < 8 else 1, size):
                # Views of memory at every offset that the dtype may lie at.
                y = memory[skew : skew + x.numel() * size].view(dtype).view(x.shape).copy_(x)
                assert digest(y, row, column) == wanted
            wide = torch.empty(x.shape[0], x.shape[1] + 3).to(dtype)
            assert digest(wide[:, :41].copy_(x), row, column) == wanted
            assert digest(x.t().contiguous().t(), row, column) == wanted


def test_many_at_once_are_one_by_one() -> None:
    parts = [(random((n, 6), n), n, 2 * n) for n in range(5)]
    assert digests(parts) == [digest(*part) for part in parts]
    assert digests([]) == []


@on_each_path
def test_what_is_prepared_is_read_anew_each_time() -> None:
    memory = torch.zeros(3, 40, 64)
    tensors = [memory[0], memory[1, ::2, 1:], memory[2].t(), memory[0, 0, 0], memory[:0]]
    # Of what must be copied to be read, the copy would stay as it was.
    tensors += [torch._neg_view(memory[0]), torch.zeros(6, 4, dtype=torch.int64).t()]
    parts = [(t, i % 2, i % 3) for i, t in enumerate(tensors)]
    prepared = module.Prepared(parts)
    for seed in range(3):
        memory.copy_(random((3, 40, 64), seed))
        tensors[-1].fill_(seed)
        assert prepared.start()() == [digest(*part) for part in parts]
    plain = module.Prepared(iter(parts[:5]))
    started = plain.start()
    assert started() == [digest(*part) for part in parts[:5]]
    assert module.Prepared([]).start()() == []


def test_what_is_prepared_of_two_devices_is_added_up_by_each_ones_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines may keep some weights in a CPU's memory."""
    path = module._path

    def of(device: torch.device) -> Any:
        return (lambda _: 7) if device.type == "meta" else path(device)

    monkeypatch.setattr(module, "_path", of)
    there, here = torch.empty(4, 4, device="meta"), random((4, 4), 1)
    assert module.Prepared([(there, 0, 0), (here, 0, 0)]).start()() == [7, digest(here)]


def test_one_changed_element_always_shows() -> None:
    # Keys are odd: a change of a word's highest bit alone is the least that can be left.
    x = torch.zeros(3, 4, dtype=torch.uint8)
    for r in range(3):
        for c in range(4):
            for bit in range(8):
                y = x.clone()
                y[r, c] = 1 << bit
                assert digest(y) != 0


_INTERPRETED = """
import sys, torch
from fp8ctl.kernels import digest as module
held = []
for n, k, dtype in ((1, 1, "uint8"), (70, 33, "uint8"), (9, 1030, "bfloat16"), (5, 7, "float32"),
                    (300, 2, "float16"), (64, 4096, "float8_e4m3fn"), (3, 5, "int64")):
    x = torch.randint(-128, 127, (n, k), generator=torch.Generator().manual_seed(n))
    x = x.to(torch.int8).view(torch.uint8) if "8" in dtype else x
    x = x.view(torch.float8_e4m3fn) if dtype == "float8_e4m3fn" else x.to(getattr(torch, dtype))
    for y in (x, x.t().contiguous().t(), x[:, 1:], x[::2]):
        if not y.numel():
            continue
        sums = module._sums(y, 3, 5)
        assert int(module.by_triton([sums])) == int(module.by_torch(sums)), (n, k, dtype)
        held.append((y, sums))
many = module.by_triton([sums for _, sums in held]).tolist()
assert many == [int(module.by_torch(sums)) for _, sums in held]
assert {sums.bits.element_size() for _, sums in held} == {1, 2, 4}

# A list that comes again is known by what it is and where; its values are read anew.
M = (1 << 64) - 1
lists = module.Lists(most=2)
xs = [torch.randn(70, 33), torch.randn(5).bfloat16(), torch.randn(4, 8, 6).half()]
def agree(parts, known):
    wanted = [int(module.by_torch(module._sums(*part))) & M for part in parts]
    assert [one & M for one in lists.start(parts).tolist()] == wanted
    assert len(lists._known) == known, len(lists._known)
parts = [(x, 7 * i, 0) for i, x in enumerate(xs)]
agree(parts, 1)
for x in xs:
    x.mul_(-3)
agree(parts, 1)
agree([(x, 8 * i, 0) for i, x in enumerate(xs)], 2)  # elsewhere in the whole
agree([(x.clone(), 0, 0) for x in xs], 2)  # elsewhere in memory; there is room for two alone
agree([(x.t(), 0, 0) for x in xs[:1]], 2)  # the same memory, another way
# What has to be copied before it is read is no tensor that could be known again.
before = dict(lists._known._made)
agree([(torch.arange(12).view(3, 4).t(), 0, 0)], 2)
agree([(xs[2].transpose(0, 2), 0, 0)], 2)
minus = torch.imag(torch.complex(xs[0], xs[0]).conj())
assert minus.is_neg()
agree([(minus, 0, 0)], 2)
assert lists._known._made == before
"""


@needs_triton
def test_the_interpreted_kernel_equals_torch(tmp_path: Path) -> None:
    done = apart(_INTERPRETED, TRITON_INTERPRET="1", TRITON_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same() -> None:
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for dtype in DTYPES:
        for n, k in ((1, 1), (33, 41), (1000, 4096), (5000, 12), (4096, 1027)):
            x = random((n, k), n, dtype)
            y = x.cuda()
            for a, b in ((x, y), (x.t(), y.t()), (x[:, 1:], y[:, 1:]), (x[::2], y[::2])):
                sums = module._sums(b, 3, 5)
                assert digest(b, 3, 5) == digest(a, 3, 5)
                if sums is not None:
                    assert int(module.by_torch(sums)) & MASK == digest(a, 3, 5)
                held.append((a, b))
    assert digests((b, 3, 5) for _, b in held) == digests((a, 3, 5) for a, _ in held)
    prepared = module.Prepared((b, 3, 5) for _, b in held)
    streams: list[Any] = [torch.cuda.Stream(), torch.cuda.current_stream()]  # type: ignore[no-untyped-call]
    for stream in streams:
        with torch.cuda.stream(stream):
            assert prepared.start()() == digests((a, 3, 5) for a, _ in held)


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


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (16, 64), (9,), (2, 3, 8), (70000, 3)])
def test_sums_of_rows_with_their_keys_are_the_digest(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    t = random(shape, 3).to(dtype)
    keys = [finish(2 * row + 1) | 1 for row in range(len(row_sums(t)))]
    total = sum(key * int(one) for key, one in zip(keys, row_sums(t), strict=True))
    assert total & MASK == digest(t)


def test_sums_of_rows_of_column_slices_add_up() -> None:
    t = random((9, 40), 1).to(torch.float8_e4m3fn)
    for at in (1, 4, 13):
        assert torch.equal(row_sums(t), row_sums(t[:, :at]) + row_sums(t[:, at:], at))
    assert torch.equal(row_sums(t[:, :0]), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="negative"):
        row_sums(t, -1)
    with pytest.raises(TypeError):
        row_sums(t.to(torch.complex64))
