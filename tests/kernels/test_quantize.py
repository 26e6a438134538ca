"""The front door: who computes, names, lists, plans, outputs, and what is refused."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl.kernels import native, quantize, reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.kernels.recipes import IEEE, RECIPES, UE8M0
from tests.kernels import matrix
from tests.kernels.lists import (
    NOT_TRITON,
    apart,
    needs_triton,
    on_each_device,
    outputs,
    same,
    tensors,
    through_triton,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Pair = tuple[torch.Tensor, torch.Tensor]


@on_each_device
def test_the_default_is_ieee_in_blocks_of_128_and_refuses_nan(device: str) -> None:
    x = matrix.numbers("normal", (130, 140), torch.bfloat16).to(device)
    wanted = reference.quantize(x.cpu(), block(128, 128), IEEE)
    assert same(quantize.quantize(x), wanted)
    assert same(quantize.quantize_many([x])[0], wanted)
    assert same(quantize.prepare([x]).run()[0], wanted)
    x[3, 4] = math.nan
    for run in (
        lambda: quantize.quantize(x),
        lambda: quantize.quantize_many([x]),
        lambda: quantize.prepare([x]).run(),
    ):
        with pytest.raises(NonFiniteError, match=r"nan at index \[3, 4\]"):
            run()


@on_each_device
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_go_by_name_or_as_they_are(name: str, device: str) -> None:
    x = matrix.numbers("wide", (30, 40), torch.float32).to(device)
    for recipe, spelled in (
        (RECIPES[name], name),
        (RECIPES[name].with_floor(2), f"{name}:floor=2"),
    ):
        wanted = reference.quantize(x.cpu(), block(8, 8), recipe)
        for given_as in (recipe, spelled):
            assert same(quantize.quantize(x, block(8, 8), given_as), wanted)
            assert same(quantize.quantize_many([x], block(8, 8), given_as)[0], wanted)
            assert same(quantize.prepare([x], block(8, 8), given_as).run()[0], wanted)


@on_each_device
def test_the_short_forms(device: str) -> None:
    x = matrix.numbers("normal", (30, 40), torch.float16).to(device)
    pairs = (
        (quantize.quantize_block(x), block(128, 128)),
        (quantize.quantize_block(x, (8, 16)), block(8, 16)),
        (quantize.quantize_per_tensor(x), PER_TENSOR),
        (quantize.quantize_per_channel(x), PER_CHANNEL),
    )
    for found, groups in pairs:
        assert same(found, reference.quantize(x.cpu(), groups))
    with pytest.raises(ValueError, match="not 0x4"):
        quantize.quantize_block(x, (0, 4))


@on_each_device
@pytest.mark.parametrize("groups", [block(16, 16), PER_CHANNEL, PER_TENSOR], ids=str)
def test_a_list_is_its_tensors_one_by_one(groups: Groups, device: str) -> None:
    xs = tensors(device)
    found = quantize.quantize_many(xs, groups, "ue8m0")
    assert len(found) == len(xs)
    for x, one in zip(xs, found, strict=True):
        assert one[0].shape == x.shape
        assert one[0].dtype == torch.float8_e4m3fn
        assert one[0].device == one[1].device == x.device
        assert one[0].is_contiguous()
        assert one[1].is_contiguous()
        assert same(one, reference.quantize(x.cpu(), groups, UE8M0))
    # No two results share memory: what is done to one does not show in another.
    for codes, scales in found:
        codes.view(torch.uint8).fill_(1)
        scales.fill_(2)
    for codes, scales in found:
        codes.view(torch.uint8).add_(1)
        scales.add_(1)
    assert all(bool((codes.view(torch.uint8) == 2).all()) for codes, _ in found)
    assert all(bool((scales == 3).all()) for _, scales in found)


@on_each_device
def test_the_same_tensor_may_stand_in_a_list_twice(device: str) -> None:
    x = matrix.numbers("normal", (9, 9), torch.float32).to(device)
    one, other = quantize.quantize_many([x, x], block(4, 4))
    assert same(one, other)
    assert one[0].data_ptr() != other[0].data_ptr()


def test_a_list_of_none_is_a_list_of_none() -> None:
    assert quantize.quantize_many([], block(2, 2)) == []
    assert quantize.quantize_many((), block(2, 2), out=[]) == []
    plan = quantize.prepare([], block(2, 2))
    assert plan.run() == []
    assert plan.run([]) == []
    with pytest.raises(ValueError, match="1"):
        plan.run([torch.zeros(2, 2)])


def test_a_list_may_be_any_sequence() -> None:
    xs = tensors()
    wanted = quantize.quantize_many(xs, PER_TENSOR)
    for sequence in (tuple(xs), torch.nn.ParameterList(xs)):
        found = quantize.quantize_many(sequence, PER_TENSOR)  # type: ignore[arg-type]
        assert all(same(one, other) for one, other in zip(found, wanted, strict=True))


@on_each_device
@pytest.mark.parametrize("groups", [block(16, 16), PER_CHANNEL, PER_TENSOR], ids=str)
def test_an_error_names_the_first_tensor_of_a_list_and_its_first_index(
    groups: Groups, device: str
) -> None:
    for bad in (1, 4, 8):
        xs = [x.clone() for x in tensors(device)]
        xs[8][3, 4] = math.inf
        xs[bad][4, 6] = -math.inf
        xs[bad][3, 5] = math.nan
        index = (3, 4) if bad == 8 else (3, 5)
        plan = quantize.prepare(xs, groups)
        for run in (lambda xs=xs: quantize.quantize_many(xs, groups), plan.run, plan.run):
            with pytest.raises(
                NonFiniteError, match=rf"\[{index[0]}, {index[1]}\] of tensor {bad}"
            ):
                run()
            with pytest.raises(NonFiniteError) as caught:
                run()
            assert (caught.value.tensor, caught.value.index) == (bad, index)
            assert math.isinf(caught.value.value) == (bad == 8)
        # Nothing of it is left: neither in the plan nor for the next call.
        for x in xs:
            x.nan_to_num_(0.5, 0.5, 0.5)
        for found in (plan.run(), quantize.quantize_many(xs, groups)):
            for x, one in zip(xs, found, strict=True):
                assert same(one, reference.quantize(x.cpu(), groups))


@on_each_device
def test_an_error_is_of_the_first_tensor_whatever_finds_it(device: str) -> None:
    # A group that a program holds, one that it does not, and a tensor of no single matrix:
    # each is the work of another kernel or launch, and they end in any order.
    shapes = {"small": (3, 5), "large": (257, 256), "parts": (4, 3, 2)}
    for order in itertools.permutations(shapes):
        xs = [torch.ones(3, 5), *(torch.ones(shapes[kind]) for kind in order)]
        for x in xs[2:]:
            x.view(-1)[-2:] = math.inf
        xs = [matrix.lay_out(x, "transposed" if x.dim() == 3 else "contiguous", device) for x in xs]
        index = (*(side - 1 for side in xs[2].shape[:-1]), xs[2].shape[-1] - 2)
        with pytest.raises(NonFiniteError) as caught:
            quantize.quantize_many(xs, PER_TENSOR)
        assert (caught.value.tensor, caught.value.index) == (2, index), order
        assert caught.value.value == math.inf


@on_each_device
def test_given_outputs_are_returned_as_they_are(device: str) -> None:
    xs, groups = tensors(device), block(16, 16)
    out = outputs(xs, groups)
    one = quantize.quantize(xs[1], groups, out=out[1])
    assert one[0] is out[1][0]
    assert one[1] is out[1][1]
    found = quantize.quantize_many(xs, groups, out=out)
    plan = quantize.prepare(xs, groups, out=out)
    for result in (found, plan.run(), plan.run(tensors(device, 1))):
        for (codes, scales), mine in zip(result, out, strict=True):
            assert codes is mine[0]
            assert scales is mine[1]
            assert codes.dtype == torch.uint8
    for x, mine in zip(tensors(device, 1), out, strict=True):
        assert same(mine, reference.quantize(x.cpu(), groups))


@on_each_device
def test_a_whole_bucket_is_filled_by_one_call(device: str) -> None:
    # As a trainer sends it: the codes of all, one behind the other, then their scales.
    xs, groups = tensors(device), block(16, 16)
    sizes = [x.numel() for x in xs]
    counts = [math.prod(groups.scale_shape(x.shape)) for x in xs]
    start = -(-sum(sizes) // 4) * 4
    bucket = torch.full((start + 4 * sum(counts),), 0xA5, dtype=torch.uint8, device=device)
    floats = bucket[start:].view(torch.float32)
    out, at, scale_at = [], 0, 0
    for x, size, count in zip(xs, sizes, counts, strict=True):
        scales = floats[scale_at : scale_at + count].view(groups.scale_shape(x.shape))
        out.append((bucket[at : at + size].view(x.shape), scales))
        at, scale_at = at + size, scale_at + count
    quantize.quantize_many(xs, groups, out=out)
    wanted = [reference.quantize(x.cpu(), groups) for x in xs]
    codes = torch.cat([one.view(torch.uint8).flatten() for one, _ in wanted])
    expected = torch.cat([one.flatten() for _, one in wanted])
    assert torch.equal(bucket[: len(codes)].cpu(), codes)
    assert bool((bucket[len(codes) : start] == 0xA5).all())
    assert torch.equal(floats.cpu(), expected)


@on_each_device
def test_outputs_that_overlap_are_refused(device: str) -> None:
    groups = block(4, 4)
    x = torch.ones(8, 8, device=device)
    bytes_ = torch.zeros(200, dtype=torch.uint8, device=device)
    first, scales = bytes_[:64].view(8, 8), torch.zeros(2, 2, device=device)
    over = bytes_[60:124].view(8, 8)
    other = torch.zeros(2, 2, device=device)
    inside = bytes_[16:32].view(torch.float32).view(2, 2)
    onto = x.view(torch.uint8)[:, :8]
    before = x.clone()
    for bad in ((first, inside), (onto, scales)):
        for run in (
            lambda bad=bad: quantize.quantize(x, groups, out=bad),
            lambda bad=bad: quantize.quantize_many([x], groups, out=[bad]),
            lambda bad=bad: quantize.prepare([x], groups, out=[bad]),
        ):
            with pytest.raises(ValueError, match="overlap"):
                run()
    for pair in (
        [(first, scales), (over, other)],
        [(first, scales), (bytes_[64:128].view(8, 8), scales)],
    ):
        for function in (quantize.quantize_many, quantize.prepare):
            with pytest.raises(ValueError, match="two outputs overlap"):
                function([x, x], groups, out=pair)
    # The second tensor is where the first one's codes would go.
    with pytest.raises(ValueError, match="an output and an input overlap"):
        quantize.quantize_many(
            [torch.ones(8, 8, device=device), x], groups, out=[(onto, scales), (first, other)]
        )
    assert not bytes_.any()
    assert torch.equal(x, before)


@on_each_device
def test_a_plan_does_not_write_over_tensors_that_it_is_given_later(device: str) -> None:
    x = torch.ones(8, 8, device=device)
    memory = torch.ones(8, 8, device=device)
    out = memory.view(torch.uint8)[:, :8], torch.zeros(2, 2, device=device)
    plan = quantize.prepare([x], block(4, 4), out=[out])
    with pytest.raises(ValueError, match="overlap"):
        plan.run([memory])
    assert bool((memory == 1).all())
    [(codes, scales)] = plan.run()  # and it still is the plan for `x`
    assert same((codes, scales), reference.quantize(x.cpu(), block(4, 4)))


@on_each_device
def test_a_plan_takes_other_tensors_of_the_same_kind(device: str) -> None:
    groups = block(16, 16)
    xs = tensors(device)
    plan = quantize.prepare(xs, groups, "reciprocal")
    for again in (0, 1, 2, 1):
        given = tensors(device, again)
        for x, one in zip(given, plan.run(given), strict=True):
            assert same(one, reference.quantize(x.cpu(), groups, RECIPES["reciprocal"]))


@on_each_device
def test_a_plan_holds_for_tensors_that_are_better_aligned(device: str) -> None:
    # One launch for both: the first has the alignment of its strides, the second at first that
    # of its address. With a better address it is the first that says what may be assumed.
    x = matrix.numbers("normal", (40, 20), torch.bfloat16).to(device)[:, :16]
    memory = matrix.numbers("normal", (4 + 40 * 16,), torch.bfloat16).to(device)
    plan = quantize.prepare([x, memory[4:].view(40, 16)], block(16, 16))
    given = [x, memory[:-4].view(40, 16)]
    for one, found in zip(given, plan.run(given), strict=True):
        assert same(found, reference.quantize(one.cpu(), block(16, 16)))


@on_each_device
def test_a_plan_reads_its_tensors_anew(device: str) -> None:
    groups = PER_TENSOR
    xs = [x.clone() for x in tensors(device)]
    plan = quantize.prepare(xs, groups)
    for again in (1, 2):
        for x, new in zip(xs, tensors(device, again), strict=True):
            x.copy_(new)
        for x, one in zip(xs, plan.run(), strict=True):
            assert same(one, reference.quantize(x.cpu(), groups))


@on_each_device
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :39], r"tensor 1\b.*\[64, 39\]"),
        (lambda x: x.t(), r"tensor 1\b.*\[40, 64\]"),
        (lambda x: x.contiguous(), r"tensor 1\b"),
        (lambda x: x.bfloat16(), r"tensor 1\b"),
        (lambda x: x.to("meta"), r"tensor 1\b"),
        (lambda x: x[0], r"tensor 1\b"),
        (lambda x: None, r"tensor 1\b"),
    ],
    ids=["narrower", "transposed", "contiguous", "bf16", "meta", "row", "none"],
)
def test_a_plan_refuses_tensors_of_another_kind_and_stays_as_it_was(
    device: str, change: Any, message: str
) -> None:
    groups = PER_TENSOR
    xs = tensors(device)
    plan = quantize.prepare(xs, groups)
    wanted = [reference.quantize(x.cpu(), groups) for x in xs]
    others = tensors(device, 1)
    others[1] = change(others[1])
    with pytest.raises((ValueError, TypeError), match=message):
        plan.run(others)
    assert all(same(one, other) for one, other in zip(plan.run(), wanted, strict=True))


@on_each_device
@pytest.mark.parametrize("count", [0, 1, 8, 10])
def test_a_plan_refuses_another_number_of_tensors(device: str, count: int) -> None:
    xs = tensors(device)
    plan = quantize.prepare(xs, PER_TENSOR)
    with pytest.raises(ValueError, match=rf"\b{count}\b.*\b9\b|\b9\b.*\b{count}\b"):
        plan.run((xs * 2)[:count])


@on_each_device
def test_a_list_needs_as_many_outputs_as_tensors(device: str) -> None:
    xs = tensors(device)
    out = outputs(xs, PER_TENSOR)
    for function in (quantize.quantize_many, quantize.prepare):
        for some in (out[:8], [], [*out, *outputs(xs[:1], PER_TENSOR)]):
            with pytest.raises(ValueError, match=rf"\b{len(some)}\b.*\b9\b|\b9\b.*\b{len(some)}\b"):
                function(xs, PER_TENSOR, out=some)


@on_each_device
@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (None, TypeError, "NoneType"),
        (torch.zeros(2, 2, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(2, 2, dtype=torch.int8), TypeError, "int8"),
        (torch.zeros(2, 2, device="meta"), TypeError, "meta"),
        (torch.zeros(2, 2).to_sparse(), TypeError, "sparse"),
        (torch.zeros(2), ValueError, "2 dimensions"),
        (torch.zeros(2, 2, 2), ValueError, "2 dimensions"),
    ],
    ids=["none", "fp64", "int8", "meta", "sparse", "1-d", "3-d"],
)
def test_what_is_no_input_is_refused_and_named_in_a_list(
    device: str, x: Any, kind: type[Exception], message: str
) -> None:
    if isinstance(x, torch.Tensor) and not x.is_meta:
        x = x.to(device)
    good = torch.ones(2, 2, device=device)
    with pytest.raises(kind, match=message):
        quantize.quantize(x, block(2, 2))
    for function in (quantize.quantize_many, quantize.prepare):
        with pytest.raises(kind, match=message) as caught:
            function([good, good, x], block(2, 2))
        assert "tensor 2" in str(caught.value)


@on_each_device
def test_outputs_that_do_not_fit_are_refused_and_named_in_a_list(device: str) -> None:
    xs = tensors(device)
    changes: tuple[Callable[[torch.Tensor, torch.Tensor], Pair], ...] = (
        lambda codes, scales: (codes.float(), scales),
        lambda codes, scales: (codes, scales.double()),
        lambda codes, scales: (codes[1:], scales),
        lambda codes, scales: (codes, scales[:, :0]),
        lambda codes, scales: (codes.to("meta"), scales),
        lambda codes, scales: (codes[:1].expand(codes.shape), scales),
    )
    for i, change in enumerate(changes):
        out = outputs(xs, block(16, 16))
        out[1] = change(*out[1])
        with pytest.raises((TypeError, ValueError), match=r"codes|scales"):
            quantize.quantize(xs[1], block(16, 16), out=out[1])
        for function in (quantize.quantize_many, quantize.prepare):
            with pytest.raises((TypeError, ValueError), match=r"codes|scales") as caught:
                function(xs, block(16, 16), out=out)
            assert "tensor 1" in str(caught.value), i


@on_each_device
def test_unknown_names_are_refused_by_every_function(device: str) -> None:
    x = torch.ones(2, 2, device=device)
    for what, function in (
        (x, quantize.quantize),
        ([x], quantize.quantize_many),
        ([x], quantize.prepare),
        ([], quantize.quantize_many),
        ([], quantize.prepare),
    ):
        call: Any = function
        with pytest.raises(ValueError, match="unknown recipe 'fast'"):
            call(what, PER_TENSOR, "fast")
        with pytest.raises(ValueError, match="unknown policy 'ignore'"):
            call(what, PER_TENSOR, "ieee", "ignore")


@given(st.integers(0, 2**31), st.sampled_from(matrix.NUMBERS), st.sampled_from(matrix.DTYPES))
@settings(max_examples=40, deadline=None)
def test_the_front_door_is_the_reference(seed: int, kind: str, dtype: torch.dtype) -> None:
    x = matrix.numbers(kind, (seed % 7, seed % 301), dtype, seed)
    for groups in (block(3, 50), PER_TENSOR):
        wanted = reference.quantize(x, groups, UE8M0, "propagate")
        assert same(quantize.quantize(x, groups, UE8M0, "propagate"), wanted)


def test_on_a_cpu_the_c_kernel_is_chosen_where_it_can_be_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not native.available():
        pytest.skip(native.why_not())
    calls = []
    own = native.quantize

    def count(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return own(*arguments, **named)

    monkeypatch.setattr(native, "quantize", count)
    x = matrix.numbers("normal", (64, 64), torch.bfloat16)
    quantize.quantize(x, block(16, 16))
    assert len(calls) == 1
    quantize.quantize_many([x, x], block(16, 16))
    assert len(calls) == 3


@needs_triton
@pytest.mark.parametrize("native", ["1", "0"])
def test_plans_and_refusals_by_triton_interpreted(native: str, tmp_path: Path) -> None:
    some = f"(plan or refused or given or whatever) and {NOT_TRITON}"
    through_triton(__file__, some, tmp_path, FP8CTL_NATIVE=native)


@pytest.mark.long
@needs_triton
def test_all_of_these_by_triton_interpreted(tmp_path: Path) -> None:
    through_triton(__file__, NOT_TRITON, tmp_path)


_SCRIPT = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import torch
from fp8ctl.kernels import known, native, quantize, reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, block
from fp8ctl.kernels.recipes import RECIPES
x = torch.randn(70, 90).t()
bad = x.clone()
bad[7, 3] = float("nan")
assert native.available() == {native}, native.why_not()
for groups in (block(16, 16), PER_CHANNEL, PER_TENSOR):
    for recipe in RECIPES.values():
        codes, scales = reference.quantize(x, groups, recipe)
        plan = quantize.prepare([x], groups, recipe)
        for found in (
            quantize.quantize(x, groups, recipe),
            quantize.quantize_many([x, x], groups, recipe)[1],
            plan.run()[0],
            plan.run([x])[0],
        ):
            assert torch.equal(found[0].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(found[1], scales)
    try:
        quantize.quantize_many([x, bad], groups)
    except quantize.NonFiniteError as e:
        assert (e.tensor, e.index) == (1, (7, 3))
    else:
        raise AssertionError("no error")
assert not [name for name in sys.modules if name.split(".")[0] == "triton" and sys.modules[name]]
print("all equal")
"""


@pytest.mark.parametrize("compiled", [True, False])
def test_a_cpu_without_triton_or_a_compiler_gives_the_same(compiled: bool) -> None:
    if compiled and not native.available():
        pytest.skip(native.why_not())
    script = _SCRIPT.format(blocked=("triton", "triton.language"), native=compiled)
    done = apart(script, FP8CTL_NATIVE="1" if compiled else "0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "all equal\n"


def test_a_lazy_negation_is_refused() -> None:
    # torch keeps -x as x and a mark, which what reads memory by itself would not see.
    x = torch.complex(torch.zeros(6, 6), torch.randn(6, 6)).conj().imag
    assert x.is_neg()
    plain = x.resolve_neg()
    plan = quantize.prepare([plain], PER_TENSOR)
    for run in (
        lambda: quantize.quantize(x, PER_TENSOR),
        lambda: quantize.quantize_many([x], PER_TENSOR),
        lambda: quantize.prepare([x], PER_TENSOR),
        lambda: reference.quantize(x, PER_TENSOR),
        lambda: plan.run([x]),
    ):
        with pytest.raises((TypeError, ValueError), match=r"resolve_neg|another kind"):
            run()
    scales = torch.complex(torch.zeros(1), torch.zeros(1)).conj().imag
    out = torch.zeros(6, 6, dtype=torch.uint8), scales
    with pytest.raises((TypeError, ValueError)):
        quantize.quantize(plain, PER_TENSOR, out=out)


def test_several_threads_at_a_time() -> None:
    xs = [matrix.numbers("normal", (300, 200), torch.bfloat16, i) for i in range(8)]
    wanted = [reference.quantize(x, block(128, 128)) for x in xs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: quantize.quantize(x, block(128, 128)), xs))
            assert all(same(one, other) for one, other in zip(found, wanted, strict=True))


def test_the_message_of_an_error_in_a_list_is_readable() -> None:
    x = torch.ones(3, 3)
    x[1, 2] = -math.inf
    text = re.escape("non-finite value -inf at index [1, 2] of tensor 1")
    with pytest.raises(NonFiniteError, match=f"^{text}$"):
        quantize.quantize_many([torch.ones(3, 3), x], PER_CHANNEL)
