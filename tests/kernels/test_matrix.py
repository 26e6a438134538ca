"""Every implementation answers the matrix alike: codes, scales and errors, to the last bit.

The reference is held to the model, all others to the reference. On a machine with a GPU
the same cases run there: `python -m pytest -m gpu tests/kernels`, of which
`-m "gpu and not long"` is the small part.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
from typing import TYPE_CHECKING

import pytest
import torch

from tests.kernels import implementations, matrix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _pytest.mark.structures import ParameterSet

    from tests.kernels.implementations import Report

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Processes that share the work: the interpreter is slow, and so are compilers. More make
# no sense on a CPU, whose processes torch fills by itself, but in the long run.
PROCESSES = min(16, os.cpu_count() or 1)


def _marked(name: str, *more: pytest.MarkDecorator) -> ParameterSet:
    marks = list(more)
    if name.startswith("triton") and not HAS_TRITON:
        marks.append(pytest.mark.skip(reason="Triton is published for Linux only"))
    if name.endswith("-cuda"):
        marks.append(pytest.mark.gpu)
        if not torch.cuda.is_available():
            marks.append(pytest.mark.skip(reason="no CUDA device"))
    return pytest.param(name, marks=marks)


SMALL = [_marked(name) for name in implementations.PLACES]
# On a GPU the front door is the Triton kernels; its own part is in the small matrix.
FULL = [_marked(name, pytest.mark.long) for name in implementations.PLACES if name != "front-cuda"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Report]:
    """Return a function that runs a selection of the matrix, once."""
    scratch: Path = tmp_path_factory.mktemp("triton")

    @functools.cache
    def run(name: str, selection: str) -> Report:
        if name.endswith("-cpu") and selection == "small":
            return implementations.run(name, selection)
        return implementations.run_apart(name, selection, scratch, PROCESSES)

    return run


def _same(report: Report, name: str, selection: str) -> None:
    cases, batches = implementations.selected(name, selection)
    assert (report.cases, report.batches) == (len(cases), len(batches))
    assert report.cases > 200
    shown = [f"{case}: {found}" for case, found in itertools.islice(report.differences.items(), 20)]
    assert not report.differences, "\n".join([f"{len(report.differences)} differ:", *shown])


@pytest.mark.parametrize("name", SMALL)
def test_every_pair_of_factors(name: str, report: Callable[[str, str], Report]) -> None:
    _same(report(name, "small"), name, "small")


@pytest.mark.parametrize("name", FULL)
def test_the_whole_matrix(name: str, report: Callable[[str, str], Report]) -> None:
    _same(report(name, "full"), name, "full")


def test_the_small_matrix_has_every_pair() -> None:
    found: set[object] = set()
    for case in matrix.small():
        factors = vars(case).items()
        found |= {frozenset(pair) for pair in itertools.combinations(factors, 2)}
    shapes = (*matrix.SMALL_SHAPES, *matrix.OTHER_SHAPES)
    every = {
        "recipe": matrix.RECIPES,
        "groups": matrix.GROUPS,
        "dtype": matrix.DTYPES,
        "shape": shapes,
        "layout": matrix.LAYOUTS,
        "numbers": matrix.NUMBERS,
        "policy": matrix.POLICIES,
        "output": matrix.OUTPUTS,
    }
    missing = [
        pair
        for (a, its), (b, others) in itertools.combinations(every.items(), 2)
        for pair in itertools.product(((a, one) for one in its), ((b, one) for one in others))
        if {a, b} != {"groups", "shape"} and frozenset(pair) not in found
    ]
    assert not missing
    assert {(c.groups, c.shape) for c in matrix.small()} >= {
        (groups, shape)
        for groups in matrix.GROUPS
        for shape in matrix.SMALL_SHAPES
        if matrix.group_count(groups, shape) <= matrix.SMALL_GROUPS
    }
    assert max(side for case in matrix.small() for side in case.shape) <= 256


def test_the_full_matrix_has_its_products() -> None:
    cases = set(matrix.full())
    assert len(cases) == len(matrix.full()) > 9_000
    for recipe, groups, dtype, shape in itertools.product(
        matrix.RECIPES, matrix.GROUPS, matrix.DTYPES, matrix.FULL_SHAPES
    ):
        assert matrix.Case(recipe, groups, dtype, shape) in cases
    found = {(c.recipe, c.dtype, c.numbers, c.policy) for c in cases}
    assert found >= set(
        itertools.product(matrix.RECIPES, matrix.DTYPES, matrix.NUMBERS, matrix.POLICIES)
    )
    outputs = {(c.groups, c.dtype, c.layout, c.output) for c in cases}
    assert outputs >= set(
        itertools.product(matrix.GROUPS, matrix.DTYPES, matrix.LAYOUTS, matrix.OUTPUTS)
    )


def test_a_case_is_the_same_each_time() -> None:
    for case in matrix.small()[::7]:
        one, other = case.tensor(), case.tensor()
        assert one.stride() == other.stride()
        assert torch.equal(implementations._bits(one), implementations._bits(other))
        if case.numbers == "normal" and one.numel():
            again = case.tensor(again=1)
            assert not torch.equal(again, one)
            assert again.stride() == one.stride()


def test_the_numbers_are_what_they_are_called() -> None:
    for dtype in matrix.DTYPES:
        made = {kind: matrix.numbers(kind, (40, 50), dtype) for kind in matrix.NUMBERS}
        for kind, x in made.items():
            assert bool(torch.isfinite(x).all()) == (kind in matrix.FINITE), kind
        info = torch.finfo(dtype)
        assert made["huge"].abs().max() == info.max
        tops = {matrix.numbers("edges", (9, 9), dtype, i).abs().max() for i in range(40)}
        over = [float(top) / 448 for top in tops]
        assert sum(math.log2(value).is_integer() for value in over) > 3
        assert sum(0 < math.log2(value) % 1 < 0.1 for value in over) > 3
        assert sum(0.9 < math.log2(value) % 1 < 1 for value in over) > 3
        assert 0 < made["subnormal"].abs().max() < info.tiny
        assert made["wide"].abs().max() > info.max / 16
        assert made["wide"].abs().min() <= info.tiny * 2
        assert int((made["one-hot"] != 0).sum()) == 1
        assert bool((made["equal"] == made["equal"][0, 0]).all())
        assert torch.signbit(made["negative-zeros"]).all()
        assert not made["negative-zeros"].any()
        assert not torch.isfinite(made["nothing-finite"]).any()
        kept = made["nan-zeros"][torch.isfinite(made["nan-zeros"])]
        assert kept.numel() == 1997
        assert not kept.any()
        signs = torch.signbit(made["nothing-finite"][torch.isnan(made["nothing-finite"])])
        assert signs.any()
        assert not signs.all()
        if dtype != torch.float16:
            assert made["tiny"].abs().max() < 2.0**-115


@pytest.mark.parametrize("layout", matrix.LAYOUTS)
def test_layouts_hold_the_numbers_they_were_given(layout: str) -> None:
    for shape in ((5, 7), (1, 1), (0, 4), (4, 0), (3,), (2, 3, 4), ()):
        x = matrix.numbers("normal", shape, torch.float32)
        view = matrix.lay_out(x, layout)
        assert view.shape == x.shape
        expected = {"one-row": x[:1] if x.dim() else x, "one-column": x[..., :1] if x.dim() else x}
        assert torch.equal(view, expected.get(layout, x).expand(x.shape))
    view = matrix.lay_out(matrix.numbers("normal", (5, 7), torch.float32), layout)
    assert view.is_contiguous() == (layout == "contiguous")


@pytest.mark.parametrize("output", matrix.OUTPUTS)
def test_poison_shows_what_is_written_beside_the_outputs(output: str) -> None:
    case = matrix.Case("ieee", matrix.GROUPS[1], torch.float32, (70, 9), output=output)
    outputs = case.outputs()
    if outputs.given is None:
        return
    codes, scales = outputs.given
    codes.view(torch.uint8).fill_(1)
    scales.fill_(2.0)
    assert outputs.poison_left()
    for buffer in outputs._buffers:
        inside = buffer != 0xA5
        assert not inside.any()
        buffer[-1] = 3
        assert not outputs.poison_left()
        buffer[-1] = 0xA5
