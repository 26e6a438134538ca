"""Every refusal of an input or an output, and what must not be refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl.kernels import reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block
from fp8ctl.kernels.inputs import (
    CODE_DTYPES,
    INPUT_DTYPES,
    NonFiniteError,
    check_disjoint,
    check_input,
    make_outputs,
    matrices,
)

X = torch.zeros(6, 10)
GROUPS = (block(2, 4), PER_TENSOR, PER_CHANNEL)


class _Distributed(torch.Tensor):
    """What a DTensor looks like: a tensor that has a local part."""

    def to_local(self) -> torch.Tensor:
        return torch.zeros(1)


def codes(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(dtype)


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    return codes(6, 10), torch.zeros(3, 3)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_plain_tensors_are_taken(groups: Groups, dtype: torch.dtype) -> None:
    check_input(torch.zeros(6, 10, dtype=dtype), groups)
    check_input(torch.nn.Parameter(torch.zeros(6, 10, dtype=dtype)), groups)
    check_input(torch.zeros(0, 10, dtype=dtype), groups)


@pytest.mark.parametrize(
    ("x", "groups", "kind", "message"),
    [
        (None, PER_TENSOR, TypeError, "cannot quantise NoneType; expected a torch.Tensor"),
        ([[1.0]], PER_TENSOR, TypeError, "cannot quantise list; expected a torch.Tensor"),
        (np.zeros((2, 2), np.float32), PER_TENSOR, TypeError, "cannot quantise ndarray"),
        (X.double(), PER_TENSOR, TypeError, "cannot quantise torch.float64; expected bfloat16,"),
        (X.int(), PER_TENSOR, TypeError, "cannot quantise torch.int32"),
        (X.bool(), PER_TENSOR, TypeError, "cannot quantise torch.bool"),
        (X + 0j, PER_TENSOR, TypeError, "cannot quantise torch.complex64"),
        (codes(2, 2), PER_TENSOR, TypeError, "cannot quantise torch.float8_e4m3fn"),
        (X.as_subclass(_Distributed), PER_TENSOR, TypeError, "a distributed tensor; give its full"),
        (X.to("meta"), PER_TENSOR, TypeError, "torch.strided tensor on meta; it has no memory"),
        (X.to_sparse(), PER_TENSOR, TypeError, "torch.sparse_coo tensor on cpu"),
        (X.to_mkldnn(), PER_TENSOR, TypeError, "torch._mkldnn tensor on cpu"),
        (
            (X + 0j).conj().imag,
            PER_TENSOR,
            TypeError,
            "a view that negates what it reads: give resolve_neg()",
        ),
        (X[0], block(2, 4), ValueError, "expected 2 dimensions for 2x4 scales, found shape [10]"),
        (X[None], PER_CHANNEL, ValueError, "2 dimensions for per-channel scales, found shape [1,"),
        (X[0, 0], PER_CHANNEL, ValueError, "2 dimensions for per-channel scales, found shape []"),
    ],
    ids=str,
)
def test_what_is_no_input_is_refused(
    x: Any, groups: Groups, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        check_input(x, groups)
    with pytest.raises(kind, match=re.escape(message)):
        reference.quantize(x, groups)


def test_new_outputs_are_contiguous_and_of_the_inputs_device() -> None:
    for groups in GROUPS:
        for x in (X, X.t(), X[::2, ::3], X[:0]):
            made, scales = make_outputs(x, groups, None)
            assert (made.shape, made.dtype) == (x.shape, torch.float8_e4m3fn)
            assert (tuple(scales.shape), scales.dtype) == (
                groups.scale_shape(x.shape),
                torch.float32,
            )
            assert made.is_contiguous()
            assert scales.is_contiguous()


@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_given_outputs_are_returned_whatever_their_strides(dtype: torch.dtype) -> None:
    for mine in (
        codes(6, 10, dtype=dtype),
        codes(10, 6, dtype=dtype).t(),
        codes(12, 30, dtype=dtype)[::2, ::3],
        codes(7, 11, dtype=dtype)[1:, 1:],
    ):
        for scales in (torch.zeros(3, 3), torch.zeros(3, 3).t(), torch.zeros(6, 9)[::2, 2::3]):
            found = make_outputs(X, block(2, 4), (mine, scales))
            assert found[0] is mine
            assert found[1] is scales


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"codes": X}, TypeError, "codes of torch.float32; expected float8_e4m3fn or uint8"),
        ({"codes": X.to(torch.float8_e5m2)}, TypeError, "codes of torch.float8_e5m2"),
        ({"codes": X.to(torch.int8)}, TypeError, "codes of torch.int8"),
        ({"scales": torch.zeros(3, 3).double()}, TypeError, "scales of torch.float64; expected fl"),
        ({"scales": torch.zeros(3, 3).bfloat16()}, TypeError, "scales of torch.bfloat16"),
        ({"codes": codes(10, 6)}, ValueError, "codes of shape [10, 6]; expected [6, 10] for an in"),
        ({"codes": codes(60)}, ValueError, "codes of shape [60]; expected [6, 10]"),
        ({"scales": torch.zeros(3)}, ValueError, "scales of shape [3]; expected [3, 3] for an inp"),
        ({"scales": torch.zeros(3, 2)}, ValueError, "input of [6, 10], 2x4"),
        ({"codes": codes(6, 10).to("meta")}, ValueError, "codes on meta; expected cpu, where the"),
        ({"scales": torch.zeros(3, 3).to("meta")}, ValueError, "scales on meta; expected cpu"),
        (
            {"codes": codes(1, 10).expand(6, 10)},
            ValueError,
            "codes of strides [0, 1] write one place more than once",
        ),
        (
            {"codes": codes(60).as_strided((6, 10), (5, 1))},
            ValueError,
            "codes of strides [5, 1] write one place more than once",
        ),
        ({"scales": torch.zeros(1).expand(3, 3)}, ValueError, "scales of strides [0, 0] write"),
    ],
    ids=str,
)
def test_what_is_no_output_is_refused(
    change: dict[str, torch.Tensor], kind: type[Exception], message: str
) -> None:
    mine, scales = outputs()
    given = change.get("codes", mine), change.get("scales", scales)
    with pytest.raises(kind, match=re.escape(message)):
        make_outputs(X, block(2, 4), given)
    with pytest.raises(kind, match=re.escape(message)):
        reference.quantize(X, block(2, 4), out=given)


@pytest.mark.parametrize("out", [(codes(6, 10),), codes(6, 10), (None, None), 7], ids=type)
def test_what_is_no_pair_of_outputs_is_refused(out: Any) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        make_outputs(X, block(2, 4), out)


def test_an_output_of_no_elements_may_have_any_strides() -> None:
    # Nothing is written, so nothing twice; expand() makes strides of 0 there.
    empty = codes(0, 1).expand(0, 10)
    assert make_outputs(X[:0], PER_TENSOR, (empty, torch.zeros(1)))[0] is empty


def test_outputs_side_by_side_are_taken() -> None:
    bucket = torch.zeros(4, 30, dtype=torch.uint8)
    # Columns that interleave: their spans overlap, their bytes do not.
    check_disjoint([bucket[:, :10], bucket[:, 10:11], bucket[:, 11:]], [X])
    check_disjoint([bucket[:, ::2], bucket[:, 1::2]], [X])
    check_disjoint([bucket[::2], bucket[1::2]], [])
    flat = bucket.view(-1)
    check_disjoint([flat[:40].view(4, 10), flat[40:80].view(torch.float32)], [])
    check_disjoint([flat[:0], flat[:0], flat], [flat[:0]])
    check_disjoint([], [])


def test_inputs_may_share_memory_and_stand_next_to_outputs() -> None:
    fused = torch.zeros(64, dtype=torch.uint8)
    x = fused[:32].view(torch.float32)
    check_disjoint([fused[32:]], [x, x, x[2:], x.view(2, 4).t()])
    wide = torch.zeros(8, 8)
    check_disjoint([wide[:, :2]], [wide[:, 2:], wide[:, 4:]])


@pytest.mark.parametrize("swap", [False, True])
def test_outputs_that_share_a_byte_are_refused(swap: bool) -> None:
    bucket = torch.zeros(64, dtype=torch.uint8)
    for one, other in (
        (bucket[:33], bucket[32:]),
        (bucket, bucket[63:]),
        (bucket, bucket),
        (bucket[:36].view(6, 6), bucket[:36].view(6, 6).t()),
        (bucket.view(8, 8)[:, :5], bucket.view(8, 8)[:, 4:]),
        (bucket[3:10], bucket[8:12].view(torch.float32)),
        (bucket.view(8, 8)[::2], bucket[16:17]),
    ):
        both = [other, one] if swap else [one, other]
        with pytest.raises(ValueError, match="two outputs overlap"):
            check_disjoint(both, [])
        with pytest.raises(ValueError, match="two outputs overlap"):
            check_disjoint([bucket[:0], *both], [X])
        with pytest.raises(ValueError, match="an output and an input overlap"):
            check_disjoint(both[:1], [X, both[1]])


def test_an_overlap_names_both_shapes_and_the_place() -> None:
    bucket = torch.zeros(64, dtype=torch.uint8)
    place = re.escape(f"at {bucket.data_ptr() + 20:#x}")
    with pytest.raises(ValueError, match=rf"(\[10\] and \[5, 6\]|\[5, 6\] and \[10\]) {place}"):
        check_disjoint([bucket[20:30], bucket[:30].view(5, 6)], [])


def test_an_overlap_is_found_among_many_and_across_a_gap() -> None:
    bucket = torch.zeros(1 << 16, dtype=torch.uint8)
    parts = [bucket[i : i + 16] for i in range(0, 1 << 16, 16)]
    check_disjoint(parts, [])
    # One that begins before many others and reaches over them.
    with pytest.raises(ValueError, match="overlap"):
        check_disjoint([*parts[1:100], bucket[:1000:999], bucket[990:1008]], [])


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20),
            st.integers(1, 4),
            st.integers(1, 4),
            st.integers(1, 9),
            st.integers(1, 9),
        ),
        min_size=2,
        max_size=5,
    ),
    st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_overlap_is_what_sets_of_addresses_say(
    views: list[tuple[int, int, int, int, int]], inputs: int
) -> None:
    base = torch.zeros(200, dtype=torch.uint8)
    tensors = [base[start:].as_strided((n, k), (a, b)) for start, n, k, a, b in views]
    touched = [
        {start + i * a + j * b for i in range(n) for j in range(k)} for start, n, k, a, b in views
    ]
    written = tensors[inputs:]
    clash = any(
        touched[i] & touched[j]
        for i in range(len(views))
        for j in range(i)
        if i >= inputs or j >= inputs
    )
    try:
        check_disjoint(written, tensors[:inputs])
    except ValueError:
        assert clash
    else:
        assert not clash


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_no_output_that_writes_a_place_twice_is_taken(dimensions: list[tuple[int, int]]) -> None:
    shape, strides = zip(*dimensions, strict=True)
    mine = torch.zeros(500, dtype=torch.uint8).as_strided(shape, strides)
    x = torch.zeros(shape)
    places = [sum(i * s for i, s in zip(at, strides, strict=True)) for at in np.ndindex(*shape)]
    twice = len(set(places)) < len(places)
    # Nested as a matrix's and its transposes' are: those must be taken.
    nested = sorted((s, n) for n, s in dimensions if n > 1)
    reach, simple = 0, bool(places)
    for stride, size in nested:
        simple = simple and stride > reach
        reach += stride * (size - 1)
    refused = False
    try:
        make_outputs(x, PER_TENSOR, (mine, torch.zeros(1)))
    except ValueError:
        refused = True
    assert not (refused and simple)
    assert refused or not twice


@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.randoms(use_true_random=False),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_matrices_are_the_tensors_in_row_major_order(
    shape: list[int], order: Any, sliced: bool
) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    big = [shape[axis] + sliced for axis in axes]
    base = torch.arange(int(np.prod(big, dtype=int)), dtype=torch.int32).view(big)
    if sliced:
        base = base[tuple(slice(1, None) for _ in big)]
    x = base.permute([axes.index(i) for i in range(len(shape))])
    assert list(x.shape) == shape
    y = torch.zeros(shape, dtype=torch.int32)
    parts = matrices(x, y)
    assert all(part.dim() == 2 for pair in parts for part in pair)
    assert all(a.shape == b.shape for a, b in parts)
    found = [value for part, _ in parts for value in part.flatten().tolist()]
    assert found == x.flatten().tolist()
    for part, target in parts:
        target.copy_(part)
    assert torch.equal(x, y)


def test_one_view_is_enough_where_strides_allow_it() -> None:
    assert len(matrices(torch.zeros(2, 3, 4, 5))) == 1
    assert len(matrices(torch.zeros(2, 3, 4, 9)[..., :5])) == 1
    assert len(matrices(torch.zeros(3, 2, 4).transpose(0, 1))) == 2


def test_an_error_says_where_and_what() -> None:
    e = NonFiniteError((3, 4), float("-inf"))
    assert str(e) == "non-finite value -inf at index [3, 4]"
    assert (e.index, e.value, e.tensor) == ((3, 4), float("-inf"), None)
    assert isinstance(e, ValueError)
    assert str(NonFiniteError((0,), 1.0, 17)) == "non-finite value 1.0 at index [0] of tensor 17"
    assert NonFiniteError((0,), 1.0, 17).tensor == 17
