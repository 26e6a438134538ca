"""Tensors that are copied together are copied as they would be one by one."""

from __future__ import annotations

import pytest
import torch

from fp8ctl import gathering


@pytest.mark.parametrize("small", [0, 400, 1 << 20])
def test_copies_together_are_copies_one_by_one(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_SMALL", small)
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((64,), (8, 16), (40, 20), (), (0, 3))
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    given += [given[4].t(), torch.nn.Parameter(given[7]), (given[3] * torch.ones(())).neg()]
    for dtype in (torch.bfloat16, torch.float32):
        places = [torch.full(t.shape, 9.0, dtype=dtype) for t in given]
        with torch.no_grad():
            gathering.copy(places, given)
        for place, tensor in zip(places, given, strict=True):
            assert torch.equal(place, tensor.to(dtype))
    gathering.copy([], [])


def test_one_launch_copies_what_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may take the first place's dtype for that of all, and write beside the others."""
    launches: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    copies = torch._foreach_copy_

    def noted(into: list[torch.Tensor], those: list[torch.Tensor]) -> None:
        launches.append((into, those))
        copies(into, those)

    class Other(torch.Tensor):
        pass

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    places = [torch.zeros(8, dtype=dtype) for dtype in dtypes for _ in dtypes for _ in range(2)]
    tensors = [torch.ones(8, dtype=dtype) for _ in dtypes for dtype in dtypes for _ in range(2)]
    gathering.copy([*places, torch.zeros(8)], [*tensors, torch.ones(8).as_subclass(Other)])
    for into, those in launches:
        assert len({t.dtype for t in (*into, *those)}) == len({type(t) for t in those}) == 1
    assert [len(into) for into, _ in launches] == [2, 2, 2]
    assert all(bool((place == 1).all()) for place in places)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_copies_the_same_from_where_it_lies() -> None:
    given = [
        torch.randn(n, 300).to(dtype) for n in (1, 7, 2000) for dtype in (torch.half, torch.double)
    ]
    for where in ("cpu", "cuda"):
        places = [torch.zeros(t.shape, dtype=torch.bfloat16, device="cuda") for t in given]
        gathering.copy(places, [t.to(where) for t in given])
        for place, tensor in zip(places, given, strict=True):
            assert torch.equal(place.cpu(), tensor.bfloat16())
