"""What only a GPU can be asked: its conversion to FP8 and its division, on all numbers.

    python -m pytest -m gpu tests/kernels/test_on_gpu.py

All FP32 as they stand; BF16 and FP16 under every amax that they have; FP32 under random
ones and as near to the middle of two codes as FP32 can be. Up to 12 GB of memory.
"""

from __future__ import annotations

import itertools
import math
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from fp8ctl.kernels import quantize, reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.kernels.recipes import RECIPES
from tests.kernels import matrix, model

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

_ROW = matrix.ROW
_CHUNK = 1 << 26


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference launch few large kernels."""
    monkeypatch.setattr(reference, "_TILE", 1 << 24)


def rows_of(magnitudes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return rows of numbers behind the largest of each, `largest` where they run out."""
    each = _ROW - 1
    padded = -(-magnitudes.numel() // each) * each
    x = torch.full((padded // each, _ROW), 0.0, dtype=largest.dtype, device="cuda")
    x[:] = largest
    flat = torch.cat([magnitudes, largest.expand(padded - magnitudes.numel())])
    x[:, 1:] = flat.view(-1, each)
    return x


def differing(x: torch.Tensor, recipe: str, groups: Groups) -> str:
    codes, scales = quantize.quantize(x, groups, recipe)
    wanted, wanted_scales = reference.quantize(x, groups, RECIPES[recipe])
    if not torch.equal(scales.view(torch.int32), wanted_scales.view(torch.int32)):
        return "scales"
    if torch.equal(codes.view(torch.int64), wanted.view(torch.int64)):
        return ""
    wrong = (codes.view(torch.uint8) != wanted.view(torch.uint8)).nonzero()
    i, j = wrong[0].tolist()
    found, expected = codes[i, j].view(torch.uint8), wanted[i, j].view(torch.uint8)
    return f"{len(wrong)}, the first {float(x[i, j])!r}: {int(found):#x}, not {int(expected):#x}"


def thresholds() -> torch.Tensor:
    """Return the least FP32 of each code from 1 on: a middle, or what follows if it is even."""
    middles = torch.from_numpy((model.VALUES[1:] + model.VALUES[:-1]) / 2).float()
    above = torch.nextafter(middles, torch.tensor(math.inf))
    to_above = torch.arange(126) % 2 == 1
    return torch.where(to_above, middles, above).cuda()


def chunks(words: int, size: int) -> Iterator[torch.Tensor]:
    for first in range(0, words, size):
        last = min(first + size, words)
        yield torch.arange(first, last, dtype=torch.int32, device="cuda").view(torch.float32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_fp32_up_to_448_has_the_nearest_code(recipe: str) -> None:
    least = thresholds()
    end = 0x43E00000 + 1  # 448 itself is the last
    seen = 0
    for values in chunks(end, _CHUNK):
        seen += values.numel()
        x = rows_of(values, torch.tensor(448.0, device="cuda"))
        wanted = torch.bucketize(x, least, out_int32=True, right=True).to(torch.uint8)
        for sign in (0, 0x80):
            signed = -x if sign else x
            codes, scales = quantize.quantize(signed, block(128, 128), recipe)
            assert bool((scales == 1).all())
            assert torch.equal(codes.view(torch.uint8), wanted | sign)
    assert seen == end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_16_bit_number_under_every_amax(recipe: str, dtype: torch.dtype) -> None:
    for exponent in range(matrix.EXPONENTS[dtype]):
        for x in matrix.under_every_amax(dtype, exponent, "cuda"):
            found = differing(x, recipe, block(1, _ROW))
            assert not found, f"amax of exponent {exponent}: {found}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp32_numbers_under_random_amax(recipe: str) -> None:
    generator = torch.Generator("cuda").manual_seed(7)
    rows = _CHUNK // _ROW

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32, device="cuda")

    middles = torch.from_numpy((model.VALUES[1:] + model.VALUES[:-1]) / 2).float().cuda()
    for turn in range(16):
        words = whole(0x7F800000, rows, 1)
        amax = words.view(torch.float32)
        if turn % 4 == 0:
            x = torch.minimum(whole(0x7F800000, rows, _ROW), words).view(torch.float32)
        elif turn % 4 == 1:
            x = torch.ldexp(amax * (whole(1 << 24, rows, _ROW) * 2.0**-24), -whole(20, rows, _ROW))
        else:
            # The middles of codes, times the scale, and up to 3 units beside it.
            scale = reference.scale_and_factor(amax, RECIPES[recipe])[0]
            x = torch.zeros((rows, _ROW), device="cuda")
            x[:, 1:127] = middles * scale
            x = torch.minimum((x.view(torch.int32) + whole(7, rows, _ROW) - 3).clamp_(min=0), words)
            x = x.view(torch.float32)
        x[:, :1] = amax
        x = torch.where(whole(2, rows, _ROW) == 0, x, -x)
        found = differing(x, recipe, block(1, _ROW))
        assert not found, f"round {turn}: {found}"


@pytest.mark.parametrize(
    "groups", [block(128, 128), block(1, 128), block(300, 300), PER_CHANNEL, PER_TENSOR], ids=str
)
def test_more_than_two_to_the_31_elements(groups: Groups) -> None:
    n, k = (1 << 17) + 40, 1 << 14
    x = torch.empty((n, k), dtype=torch.bfloat16, device="cuda")
    x[: 1 << 10].normal_(generator=torch.Generator("cuda").manual_seed(1))
    for first in range(1 << 10, n, 1 << 10):  # all rows of the first, but none at its place
        part = x[first : first + (1 << 10)]
        part.copy_(x[: len(part)].roll(first // 7, dims=1))
    codes, scales = quantize.quantize(x, groups)
    size = groups.size((n, k))
    if groups is PER_TENSOR:
        wanted, wanted_scales = reference.quantize(x, groups)
        assert torch.equal(scales, wanted_scales)
        assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
        del wanted
    else:
        for first in (0, (n // 2) // size[0] * size[0], (n - 600) // size[0] * size[0]):
            last = first + 4 * size[0] if first + 1200 < n else n
            wanted, wanted_scales = reference.quantize(x[first:last], groups)
            assert torch.equal(codes[first:last].view(torch.uint8), wanted.view(torch.uint8))
            top = first // size[0]
            assert torch.equal(scales[top : top + len(wanted_scales)], wanted_scales)
    x[n - 1, k - 3] = math.nan
    x[n - 1, k - 1] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        quantize.quantize(x, groups)
    assert caught.value.index == (n - 1, k - 3)
    with pytest.raises(NonFiniteError) as caught:
        quantize.quantize_many([x[:5], x], groups)
    assert (caught.value.tensor, caught.value.index) == (1, (n - 1, k - 3))


@pytest.mark.parametrize("groups", [block(128, 128), PER_CHANNEL, PER_TENSOR], ids=str)
def test_strides_and_offsets_beyond_32_bits(groups: Groups) -> None:
    memory = torch.zeros((1 << 31) + (1 << 20), dtype=torch.bfloat16, device="cuda")
    far = memory[(1 << 31) - 5 :]
    for view in (
        far[: 200 * 300].view(200, 300),
        memory.as_strided((3, 200), ((1 << 30) + 9, 1), 5),
        memory.as_strided((200, 3), (1, (1 << 30) + 9), 5),
        memory.as_strided((2, 200), (1 << 31, 3)),
    ):
        view.copy_(matrix.numbers("wide", tuple(view.shape), torch.bfloat16))
        codes, scales = quantize.quantize(view, groups)
        wanted, wanted_scales = reference.quantize(view.cpu(), groups)
        assert torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(scales.cpu(), wanted_scales)
        [(again, _)] = quantize.quantize_many([view], groups)
        assert torch.equal(again.cpu().view(torch.uint8), wanted.view(torch.uint8))
    del far, view
    bucket = memory.view(torch.uint8)
    del memory
    x = matrix.numbers("normal", (3, 200), torch.bfloat16).cuda()
    out = bucket.as_strided((3, 200), ((1 << 31) - 7, 1), 3)
    scales = torch.empty(groups.scale_shape(x.shape), device="cuda")
    quantize.quantize(x, groups, out=(out, scales))
    wanted, _ = reference.quantize(x, groups)
    assert torch.equal(out, wanted.view(torch.uint8))


def test_it_is_triton_that_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8ctl.kernels import launch

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "quantize", refuse)
    monkeypatch.setattr(reference, "_encode", refuse)
    x = torch.ones(256, 256, device="cuda")
    for groups in matrix.GROUPS:
        assert quantize.quantize(x, groups)[0].is_cuda
        assert quantize.quantize_many([x, x], groups)[1][0].is_cuda
    assert launch.__name__ == "fp8ctl.kernels.launch"


def test_several_threads_and_streams_at_a_time() -> None:
    shapes = ((128, 128), (300, 77), (40, 576), (1024, 1024))
    xs = [matrix.numbers("normal", shape, torch.bfloat16, 3).cuda() for shape in shapes]
    bad = xs[1].clone()
    bad[7, 5] = math.nan
    wanted = [
        [reference.quantize(x, groups) for x in xs] for groups in (block(128, 128), PER_TENSOR)
    ]
    torch.cuda.synchronize()
    problems: list[str] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for turn in range(40):
                which = (turn + seed) % 2
                groups = (block(128, 128), PER_TENSOR)[which]
                if turn % 5 == seed % 5:
                    try:
                        quantize.quantize_many([*xs, bad], groups)
                    except NonFiniteError as e:
                        if (e.tensor, e.index) != (4, (7, 5)):
                            problems.append(str(e))
                    else:
                        problems.append("no error")
                found = list(quantize.quantize_many(xs, groups))
                found += [quantize.quantize(x, groups) for x in xs]
                stream.synchronize()
                for (codes, scales), (right, its) in zip(
                    found, itertools.cycle(wanted[which]), strict=False
                ):
                    if not torch.equal(codes.view(torch.uint8), right.view(torch.uint8)):
                        problems.append(f"codes of {list(codes.shape)}, {groups}")
                    if not torch.equal(scales, its):
                        problems.append(f"scales of {list(codes.shape)}, {groups}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_work_on_another_stream_waits_for_its_input() -> None:
    # Launched on the caller's stream, behind what makes the input: no copy of old memory.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    x = torch.zeros(2048, 2048, device="cuda")
    plan = quantize.prepare([x], block(128, 128))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        x.fill_(3.0)
        one, _ = quantize.quantize(x, block(128, 128))
        [(many, _)] = quantize.quantize_many([x], block(128, 128))
        [(planned, _)] = plan.run()
        found = [bool((c.view(torch.uint8) == 0x7E).all()) for c in (one, many, planned)]
    assert found == [True] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_device_than_the_current_one() -> None:
    x = matrix.numbers("wide", (300, 200), torch.bfloat16)
    for groups in (block(128, 128), PER_TENSOR):
        wanted, _ = reference.quantize(x, groups)
        there = x.to("cuda:1")
        with torch.cuda.device(0):
            codes, _ = quantize.quantize(there, groups)
            [(again, _)] = quantize.quantize_many([there], groups)
        for found in (codes, again):
            assert found.device == there.device
            assert torch.equal(found.cpu().view(torch.uint8), wanted.view(torch.uint8))
        with pytest.raises(ValueError, match="cuda"):
            quantize.quantize_many([there, x.to("cuda:0")], groups)


def test_outputs_and_inputs_of_other_devices_are_refused() -> None:
    x = torch.ones(4, 4)
    codes = torch.empty((4, 4), dtype=torch.uint8)
    with pytest.raises(ValueError, match="codes on cpu; expected cuda"):
        quantize.quantize(x.cuda(), PER_TENSOR, out=(codes, torch.ones(1, device="cuda")))
    with pytest.raises(ValueError, match="scales on cpu; expected cuda"):
        quantize.quantize(x.cuda(), PER_TENSOR, out=(codes.cuda(), torch.ones(1)))
    with pytest.raises(ValueError, match=r"codes on cuda:0; expected cpu"):
        quantize.quantize(x, PER_TENSOR, out=(codes.cuda(), torch.ones(1)))
    with pytest.raises(ValueError, match=r"c(pu|uda)"):
        quantize.quantize_many([x, x.cuda()], PER_TENSOR)
