"""A list that is quantised again and again, as a push does at every update."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fp8ctl.kernels import known, quantize, reference
from fp8ctl.kernels.groups import Groups, block
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.kernels.recipes import IEEE, RECIPES, UE8M0
from tests.kernels import matrix
from tests.kernels.lists import (
    NOT_TRITON,
    needs_triton,
    on_each_device,
    outputs,
    same,
    tensors,
    through_triton,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Pair = tuple[torch.Tensor, torch.Tensor]

BLOCK = block(64, 32)


def some(device: str, again: int = 0) -> list[torch.Tensor]:
    """Return the tensors that go into a launch, none of them empty."""
    return [x for x in tensors(device, again) if x.numel()]


def all_right(
    found: Sequence[Pair], xs: Sequence[torch.Tensor], groups: Groups = BLOCK, recipe: str = "ieee"
) -> bool:
    wanted = [reference.quantize(x.cpu(), groups, RECIPES[recipe]) for x in xs]
    return all(same(one, other) for one, other in zip(found, wanted, strict=True))


def remembered(device: str) -> int | None:
    """Return how many lists are known, None where no list is prepared."""
    if not quantize._on_gpu(torch.empty(1, device=device)):
        return None
    from fp8ctl.kernels import batch

    return len(batch._known())


@on_each_device
def test_a_list_that_comes_again_is_read_anew(device: str) -> None:
    known.forget()
    xs = some(device)
    out = outputs(xs, BLOCK)
    for again in range(3):
        for x, new in zip(xs, some(device, again), strict=True):
            x.copy_(new)
        assert all_right(quantize.quantize_many(xs, BLOCK, out=out), xs)
        assert remembered(device) in (None, 1)
    # Another arithmetic, other groups, the same memory in another order: other lists.
    found = quantize.quantize_many(xs, BLOCK, "reciprocal", out=out)
    assert all_right(found, xs, recipe="reciprocal")
    found = quantize.quantize_many(xs, BLOCK, UE8M0, out=out)
    assert all_right(found, xs, recipe="ue8m0")
    assert all_right(quantize.quantize_many(xs[::-1], BLOCK, out=out[::-1]), xs[::-1])
    coarser = block(128, 32)
    wide = outputs(xs, coarser)
    pairs = [(codes, scales) for (codes, _), (_, scales) in zip(out, wide, strict=True)]
    assert all_right(quantize.quantize_many(xs, coarser, out=pairs), xs, coarser)
    # As many scales as of the list before, each of half as many rows.
    finer = block(32, 64)
    pairs = [(c, s.new_empty(finer.scale_shape(c.shape))) for c, s in pairs]
    assert all_right(quantize.quantize_many(xs, finer, out=pairs), xs, finer)
    assert remembered(device) in (None, 6)
    known.forget()
    assert remembered(device) in (None, 0)
    assert all_right(quantize.quantize_many(xs, BLOCK, out=out), xs)


@on_each_device
def test_other_tensors_again_in_the_same_memory_are_another_list(device: str) -> None:
    values = matrix.numbers("normal", (64, 64), torch.float32).to(device)
    memory = values.view(torch.uint8).flatten()
    codes = torch.empty(64 * 64, dtype=torch.uint8, device=device)
    scales = torch.empty(16, device=device)

    def check(x: torch.Tensor, at: int = 0) -> None:
        first = x.shape[0] * x.shape[1]
        found = quantize.quantize_many(
            [x], BLOCK, out=[(codes[at : at + first].view(x.shape), grid(x))]
        )
        assert all_right(found, [x])

    def grid(x: torch.Tensor) -> torch.Tensor:
        n, k = BLOCK.scale_shape(x.shape)
        return scales[: n * k].view(n, k)

    for _ in range(2):
        check(values)
        check(values.t())
        check(values[:, :32])
        check(values[:32])
        check(memory.view(torch.bfloat16)[:4096].view(64, 64).nan_to_num())
        check(memory.view(torch.float16)[:2048].view(32, 64).nan_to_num())
        check(values[:, ::2])
        check(values[:32], at=2048)
    # Halves of one dtype and the other at one address, with no number that is not finite.
    bits = torch.arange(4096, dtype=torch.int16, device=device)
    for _ in range(2):
        check(bits.view(torch.bfloat16).view(64, 64))
        check(bits.view(torch.float16).view(64, 64))


@on_each_device
def test_memory_that_is_freed_is_used_again_and_nothing_is_kept_alive(device: str) -> None:
    known.forget()
    groups = block(64, 64)
    seen = set()
    for again in range(4):
        xs = some(device, again)
        out = outputs(xs, groups)
        for _ in range(2):
            assert all_right(quantize.quantize_many(xs, groups, out=out), xs, groups)
        seen.add(tuple(t.data_ptr() for t in (*xs, *itertools.chain(*out))))
        held = [weakref.ref(t) for t in (*xs, *itertools.chain(*out))]
        ref: Any = StorageWeakRef
        stores = [ref(t.untyped_storage()) for t in (*xs, *itertools.chain(*out))]
        del xs, out
        assert not [one for one in held if one() is not None]
        assert all(one.expired() for one in stores)
    assert remembered(device) in (None, len(seen))
    assert device == "cpu" or len(seen) < 4, "an allocator that never gives memory again"


@on_each_device
def test_an_error_in_a_list_that_comes_again_is_named_and_forgotten(device: str) -> None:
    xs = [x.clone() for x in some(device)]
    out = outputs(xs, BLOCK)
    quantize.quantize_many(xs, BLOCK, out=out)
    clean = [x.clone() for x in xs]
    for tensor, index, value in (
        (3, (11, 7), math.nan),
        (0, (0, 0), math.inf),
        (1, (2, 3), -math.inf),
    ):
        xs[tensor][index] = value
        xs[3][20, 1] = math.nan
        for _ in range(2):
            with pytest.raises(NonFiniteError) as found:
                quantize.quantize_many(xs, BLOCK, out=out)
            assert (found.value.tensor, found.value.index) == (tensor, index)
            assert found.value.value == value or math.isnan(value)
        for x, good in zip(xs, clean, strict=True):
            x.copy_(good)
        assert all_right(quantize.quantize_many(xs, BLOCK, out=out), xs)
    # The other policies take what this one refuses, in the same memory.
    xs[2][1, 1] = math.inf
    found_ = quantize.quantize_many(xs, BLOCK, "ieee", "saturate", out)
    for x, pair in zip(xs, found_, strict=True):
        assert same(pair, reference.quantize(x.cpu(), BLOCK, IEEE, "saturate"))


@on_each_device
def test_what_is_refused_is_refused_again(device: str) -> None:
    numbers = torch.complex(torch.ones(16, 16), torch.ones(16, 16)).to(device)
    plain, minus = numbers.imag, numbers.conj().imag
    assert minus.is_neg()
    assert (plain.data_ptr(), plain.stride()) == (minus.data_ptr(), minus.stride())
    out = outputs([plain], BLOCK)
    quantize.quantize_many([plain], BLOCK, out=out)
    quantize.quantize_many([plain], BLOCK, out=out)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"tensor 0: .*negates"):
            quantize.quantize_many([minus], BLOCK, out=out)
        with pytest.raises(ValueError, match="tensor 0: scales of shape"):
            quantize.quantize_many([plain], block(8, 8), out=out)
        with pytest.raises(ValueError, match="overlap"):
            quantize.quantize_many([plain, plain], BLOCK, out=out * 2)
        with pytest.raises(ValueError, match="1 outputs for 2 tensors"):
            quantize.quantize_many([plain, plain], BLOCK, out=out)


@on_each_device
def test_a_list_that_was_begun_is_waited_for_again_and_again(device: str) -> None:
    lists = [[x.clone() for x in some(device, again)] for again in range(3)]
    outs = [outputs(xs, BLOCK) for xs in lists]
    for _ in range(3):
        begun = [
            quantize.start_many(xs, BLOCK, "ieee", out) for xs, out in zip(lists, outs, strict=True)
        ]
        for xs, out, one in zip(lists, outs, begun, strict=True):
            assert one.wait() == out
            assert all_right(out, xs)
            for x in xs:
                x.mul_(-0.5)
    lists[1][2][3, 4] = math.nan

    first = quantize.start_many(lists[0], BLOCK, "ieee", outs[0])
    with pytest.raises(NonFiniteError) as found:
        quantize.start_many(lists[1], BLOCK, "ieee", outs[1]).wait()
    assert (found.value.tensor, found.value.index) == (2, (3, 4))
    first.wait()
    lists[1][2][3, 4] = 1
    quantize.start_many(lists[1], BLOCK, "ieee", outs[1]).wait()
    assert all_right(outs[0], lists[0])
    assert all_right(outs[1], lists[1])


@on_each_device
@pytest.mark.filterwarnings("error")
def test_a_parameter_that_is_not_finite_is_told_as_any_tensor_is(device: str) -> None:
    xs = [torch.nn.Parameter(x.clone()) for x in some(device)]
    outs = outputs(xs, BLOCK)
    with torch.no_grad():
        xs[1][(0,) * xs[1].dim()] = math.inf
    with pytest.raises(NonFiniteError) as found:
        quantize.start_many(xs, BLOCK, "ieee", outs).wait()
    assert (found.value.tensor, found.value.value) == (1, math.inf)


@needs_triton
@pytest.mark.parametrize("native", ["1", "0"])
def test_these_by_triton_interpreted(native: str, tmp_path: Path) -> None:
    through_triton(__file__, NOT_TRITON, tmp_path, FP8CTL_NATIVE=native)
