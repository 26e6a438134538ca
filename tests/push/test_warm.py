"""What is compiled beforehand is what an update runs.

What a kernel is compiled for is asked of the kernels' own modules; that nothing is left to compile
is seen on a GPU (tests/kernels/test_on_gpu.py has the marker's reason).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import forms
from fp8ctl.kernels import digest
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.groups import PER_TENSOR, block
from fp8ctl.push import warm
from fp8ctl.push.link import Link
from fp8ctl.push.rollout import Rollout
from tests.push.serving import serving
from tests.test_stream import PLAN, WEIGHTS

if TYPE_CHECKING:
    from fp8ctl.kernels.groups import Groups

launch = pytest.importorskip("fp8ctl.kernels.launch")

SIDES = [64, 96, 576, 1000, 1536, 4096, 4224, 12288, 14336, 128256]


def plan_of(*shapes: tuple[int, int]) -> Any:
    tensors = [SimpleNamespace(shape=s, dtype="BF16", quantize=True) for s in shapes]
    return SimpleNamespace(
        tensors=[*tensors, SimpleNamespace(shape=(7,), dtype="BF16", quantize=False)]
    )


def variant(shape: tuple[int, int], groups: Groups) -> Any:
    how = launch.tiling(shape, groups)
    contiguous = ((shape[1], 1), 256)
    return launch.Variant.of(torch.bfloat16, how, shape, contiguous, contiguous)


@pytest.mark.parametrize("groups", [block(128, 128), block(64, 64), block(32, 16), PER_TENSOR])
def test_a_small_tensor_takes_the_kernel_of_a_large_one(groups: Groups) -> None:
    for n in SIDES:
        for k in SIDES:
            found = warm.kinds(plan_of((n, k)), groups)
            [small] = found.weights
            assert variant(small, groups) == variant((n, k), groups), (n, k)
            assert small[0] * small[1] <= max(n * k, 1)
            [more] = found.longer
            if n >= 1000 and n * k > 1 << 19:
                assert variant(more, groups) == variant((n, k), groups), (n, k)
                programs = [launch.tiling(s, groups).programs(s, groups) for s in (small, more)]
                assert programs[0] != programs[1], "else the two are no mixed list"
            assert found.kept == ((7, "BF16"),)


def test_it_runs_what_an_update_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    quantize_many, digests = kernels.quantize_many, digest.digests

    def many(xs: Any, *more: Any, **named: Any) -> Any:
        seen.append(len(xs))
        return quantize_many(xs, *more, **named)

    def sums(parts: Any) -> Any:
        found = [*parts]
        seen.append({t.dtype for t, _, _ in found})
        return digests(found)

    monkeypatch.setattr(kernels, "quantize_many", many)
    monkeypatch.setattr("fp8ctl.push.warm.digests", sums)
    warm.warm(PLAN, None, torch.device("cpu"))
    count = len(warm.kinds(PLAN, forms.of_push(PLAN, None).groups).weights)
    dtypes = {tensor.dtype for tensor in PLAN.quantized}
    assert seen[:-1] == ([1] * count + [2 * count]) * len(dtypes)
    assert {torch.float8_e4m3fn, torch.float32, torch.bfloat16} <= seen[-1]


def test_it_is_done_once_while_the_servers_connect_and_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where: list[Any] = []

    def broken(plan: object, dtype: object, device: torch.device) -> None:
        where.append(device.type)
        raise RuntimeError("no compiler")

    monkeypatch.setattr("fp8ctl.push.update.warm", broken)
    with serving(PLAN) as server, Rollout(server.url, PLAN) as rollout:
        rollout.update(WEIGHTS.items(), 1)
        assert where == [], "a CPU has nothing to compile"
        rollout.close()
        with monkeypatch.context() as patched:
            patched.setattr(Link, "device", property(lambda _: torch.device("cuda")))
            link = rollout._link
            told: list[str] = []
            work = rollout._work("2", True, None, None, False)

            def first() -> None:
                told.append(link.device.type)
                work._warm()

            link.open(work._fleet, 1 << 16, first)
            link.open(work._fleet, 1 << 16, lambda: told.append("again"))
            work._fleet.close()
        assert (told, where) == (["cuda"], ["cuda"])
        assert rollout.update(WEIGHTS.items(), 2).verified
