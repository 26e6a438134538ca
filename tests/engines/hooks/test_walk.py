"""A remembered walk tells what a walk would tell now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8ctl.engines.hooks.shards import Walk, shards
from fp8ctl.engines.hooks.walk import Known

if TYPE_CHECKING:
    from fp8ctl.engines.hooks.shards import Form, Shard


def model() -> torch.nn.Module:
    """Two linears in a module."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    )


class Remembered:
    """A walk over one model, remembered."""

    def __init__(self, of: torch.nn.Module) -> None:
        self.model, self.known = of, Known()

    def shards(self, form: Form | None) -> list[Shard]:
        """What it says now."""
        return self.known.of(Walk(self.model, 0, form)).shards()


def told(walk: Remembered, form: Form | None = None) -> list[tuple[str, int, int]]:
    """What a walk says, by addresses."""
    return [(s.name, s.tensor.data_ptr(), s.row) for s in walk.shards(form)]


def now(of: torch.nn.Module, form: Form | None = None) -> list[tuple[str, int, int]]:
    """What there is."""
    return [(s.name, s.tensor.data_ptr(), s.row) for s in shards(of, 0, form)]


def test_where_nothing_moves_nothing_is_looked_up() -> None:
    of = model()
    walk = Remembered(of)
    first = walk.shards(None)
    assert told(walk) == now(of)
    with torch.no_grad():
        next(of.parameters()).add_(1)
    assert walk.shards(None) is first


def test_what_moves_is_seen() -> None:
    of = model()
    walk = Remembered(of)
    told(walk)
    kept = [*of.parameters()]  # so that no address is used again
    linear = of.get_submodule("1.0")

    next(of.parameters()).data = torch.ones(3, 4)  # the same parameter, elsewhere
    assert told(walk) == now(of)
    linear.weight = torch.nn.Parameter(torch.ones(2, 3))  # another one
    assert told(walk) == now(of)
    linear.register_parameter("bias", torch.nn.Parameter(torch.ones(2)))  # one more
    assert told(walk) == now(of)
    del linear.bias
    assert told(walk) == now(of)
    assert kept


def test_another_view_of_the_same_memory_is_seen() -> None:
    of = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False, dtype=torch.float16))
    walk = Remembered(of)
    weight = next(of.parameters())

    def seen() -> list[tuple[object, object]]:
        return [(s.tensor.stride(), s.tensor.dtype) for s in walk.shards(None)]

    assert seen() == [((4, 1), torch.float16)]
    weight.data = weight.data.t()
    assert seen() == [((1, 4), torch.float16)]
    weight.data = weight.data.t().view(torch.bfloat16)
    assert seen() == [((4, 1), torch.bfloat16)]


def test_a_module_that_takes_the_place_of_another_is_seen() -> None:
    of = model()
    walk = Remembered(of)
    told(walk)
    before = of.get_submodule("0")
    of[0] = torch.nn.Linear(4, 3)  # type: ignore[operator]
    assert told(walk) == now(of)
    assert before is not of.get_submodule("0")


def test_a_module_that_was_put_in_is_seen_after_forget() -> None:
    of = model()
    walk = Remembered(of)
    told(walk)
    of.get_submodule("1").add_module("more", torch.nn.Linear(2, 2))
    walk.known.forget()
    assert told(walk) == now(of)


def test_what_a_form_computes_is_computed_every_time() -> None:
    of = model()
    walk = Remembered(of)

    def largest(module: torch.nn.Module, name: str, t: torch.Tensor) -> torch.Tensor | None:
        return t.amax().reshape(1) if t.dim() == 2 else None

    def values() -> list[float]:
        return [float(s.tensor) for s in walk.shards(largest)]

    values()
    with torch.no_grad():
        for i, parameter in enumerate(of.parameters()):
            parameter.fill_(7 + i)
    assert values() == [7, 9]


def test_a_form_depends_on_what_a_module_has() -> None:
    of = model()
    walk = Remembered(of)

    def unless_marked(module: torch.nn.Module, name: str, t: torch.Tensor) -> torch.Tensor | None:
        return None if hasattr(module, "marked") else t

    assert told(walk, unless_marked) == now(of, unless_marked)
    of.get_submodule("0").marked = torch.nn.Buffer(torch.ones(1))
    assert told(walk, unless_marked) == now(of, unless_marked)
    assert told(walk) == now(of)  # another form


def test_a_module_that_was_put_in_or_has_another_name_is_seen() -> None:
    of = model()
    walk = Remembered(of)
    told(walk)
    of.get_submodule("1").add_module("more", torch.nn.Linear(2, 2))
    assert told(walk) == now(of)
    inner = of.get_submodule("1")
    inner._modules["less"] = inner._modules.pop("more")
    assert told(walk) == now(of)
    assert "1.less.weight" in [name for name, _, _ in told(walk)]


def test_modules_that_change_places_are_seen() -> None:
    of = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(torch.nn.Linear(2, 2))
    )
    walk = Remembered(of)
    told(walk)
    first, second = of.get_submodule("0"), of.get_submodule("1")
    first._modules, second._modules = second._modules, first._modules
    assert told(walk) == now(of)
    first.add_module("more", second._modules.pop("0"))  # as many as before, all in one
    assert told(walk) == now(of)


def test_a_look_tells_whether_anything_moved() -> None:
    of = model()
    known = Known()

    def same() -> bool:
        found = known.same
        known.of(Walk(of, 0))
        return found

    assert not same(), "nothing was walked"
    assert same()
    with torch.no_grad():
        next(of.parameters()).add_(1)
    assert same(), "values may change"
    kept = [p.data for p in of.parameters()]  # so that no address is used again
    next(of.parameters()).data = torch.ones(3, 4)
    assert not same()
    for _ in range(2):
        vars(of.get_submodule("0"))["quant_method"] = object()  # what a form may ask
        assert not same()
    assert same()
    known.forget()
    assert not same()
    assert kept


def test_only_the_module_that_changed_is_looked_up() -> None:
    of = model()
    walk = Remembered(of)
    asked: list[torch.nn.Module] = []

    def form(module: torch.nn.Module, name: str, t: torch.Tensor) -> torch.Tensor | None:
        asked.append(module)
        return t

    told(walk, form)
    asked.clear()
    told(walk, form)
    assert asked == []
    kept = [p.data for p in of.parameters()]
    linear = of.get_submodule("1.0")
    linear.weight.data = torch.ones(2, 3)
    assert told(walk, form) == now(of)
    assert asked == [linear]
    assert kept
