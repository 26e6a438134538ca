"""Equal numbers for tensors that are alike, however they are asked; and their addresses."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl.kernels import facts
from fp8ctl.kernels.facts import Facts

if TYPE_CHECKING:
    from collections.abc import Callable

HAS_EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and shutil.which("cc")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8)
LAYOUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: x,
    lambda x: x.t() if x.dim() == 2 else x,
    lambda x: x[::2],
    lambda x: x[1:],
    lambda x: x[..., 1:],
    torch.nn.Parameter,
)


class Other(torch.Tensor):
    """A tensor of another type."""


def asked() -> Facts:
    """Return facts that ask torch's methods alone."""
    one = Facts()
    one._look = None
    return one


@pytest.fixture(params=["exchange", "methods"])
def make(request: pytest.FixtureRequest) -> Callable[[], Facts]:
    if request.param == "methods":
        return asked
    if not HAS_EXCHANGE:
        pytest.skip("no DLPack exchange in this torch, or no C compiler")
    assert facts._compiled() is not None
    return Facts


def what(x: torch.Tensor) -> object:
    return x.dtype, x.device, x.shape, x.stride()


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=8).map(tuple)
tensors = st.builds(
    lambda shape, dtype, layout: (
        layout(torch.zeros(shape).to(dtype))
        if dtype.is_floating_point or layout is not torch.nn.Parameter
        else torch.zeros(shape, dtype=dtype)
    ),
    shapes | st.just((4, 4)),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
)


@settings(deadline=None)  # the first use compiles
@given(st.lists(tensors, min_size=1, max_size=12))
def test_both_ways_tell_alike_from_unlike(xs: list[torch.Tensor]) -> None:
    for one in (asked(), Facts()):
        numbers, addresses = one.look(xs)
        assert addresses.tolist() == [x.data_ptr() for x in xs]
        for x, mine in zip(xs, numbers.tolist(), strict=True):
            for other, its in zip(xs, numbers.tolist(), strict=True):
                # Strides of what is contiguous, and the type, may or may not count.
                if type(x) is type(other) and what(x) == what(other):
                    assert mine == its
                elif (x.dtype, x.shape) != (other.dtype, other.shape):
                    assert mine != its
                elif x.stride() != other.stride():
                    assert mine != its or (x.is_contiguous() and other.is_contiguous())


def test_a_number_stays_the_same(make: Callable[[], Facts]) -> None:
    one = make()
    xs = [torch.zeros(n, 4) for n in range(1, facts._ROOM + 40)]
    first = one.look(xs)[0].tolist()
    assert len(set(first)) == len(xs)
    assert one.look(xs[::-1])[0].tolist() == first[::-1]
    # Whoever comes when there is no room left is told apart, too, and known again.
    assert one.look([x.clone() for x in xs])[0].tolist() == first


def test_many_sides_and_other_types_are_told_apart(make: Callable[[], Facts]) -> None:
    xs = [torch.zeros((1,) * sides) for sides in range(9)] * 2
    xs += [torch.zeros(1).as_subclass(Other) for _ in range(2)]
    numbers = make().look(xs)[0].tolist()
    assert numbers[:9] == numbers[9:18]
    assert len(set(numbers[:9])) == 9
    assert numbers[18] == numbers[19]
    assert numbers[18] not in numbers[:18], "a subclass may answer for something else"


@pytest.mark.parametrize("bad", [None, 5, "x", [torch.zeros(1)]])
def test_what_is_no_tensor_is_an_error(make: Callable[[], Facts], bad: Any) -> None:
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        make().look([torch.zeros(1), bad])
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        make().look([bad])


def test_what_has_no_memory_is_an_error_or_like_nothing_else(make: Callable[[], Facts]) -> None:
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        make().look([torch.zeros(2).to_sparse()])
    numbers, _ = make().look([torch.zeros(2), torch.zeros(2, device="meta")])
    assert numbers[0] != numbers[1]


def test_nothing_is_kept(make: Callable[[], Facts]) -> None:
    x = torch.zeros(3)
    before = sys.getrefcount(x)
    one = make()
    for _ in range(100):
        one.look([x, x.view(3, 1)])
    assert sys.getrefcount(x) == before


def test_an_error_of_before_is_left_alone(make: Callable[[], Facts]) -> None:
    # Whoever describes a tensor sets Python's error where it cannot; none may be left behind.
    one = make()
    for _ in range(3):
        with pytest.raises((TypeError, AttributeError, RuntimeError)):
            one.look([object()])  # type: ignore[list-item]
        assert one.look([torch.zeros(1)])[0].tolist() == [one.look([torch.ones(1)])[0][0]]


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8CTL_NATIVE", "0")
    assert facts._compiled.__wrapped__() is None
    monkeypatch.delenv("FP8CTL_NATIVE")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "")
    assert facts._compiled.__wrapped__() is None, "no compiler is no error"
