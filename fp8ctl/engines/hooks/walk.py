"""What a walk over a model found, looked up again only where something has moved.

A walk over an 8B model takes Python 10 to 25 ms, and every push asks for it twice: where to
copy to, and what is held. Both times all of the model is looked at first, at once: module by
module that takes longer than a GPU needs for half of the weights. Standard library and torch;
runs in an engine's worker.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8ctl.engines.hooks.shards import Shard, Walk

_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")


class Known:
    """What walks over one model found."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.forget()

    def forget(self) -> None:
        """Look at every module anew the next time."""
        self._walk: Walk | None = None
        self._seen: list[_Seen] = []
        self._all: list[Shard] | None = None
        self._made = False
        self._look: _Look | None = None

    @property
    def same(self) -> bool:
        """Whether all modules and parameters are those that were walked, and where they were."""
        return self._look is not None and self._look.same

    @property
    def kept(self) -> list[Shard] | None:
        """What `shards` would return if nothing had moved; None where some is made anew."""
        return None if self._made else self._all

    def of(self, walk: Walk) -> Known:
        """Return itself, knowing what this walk finds now."""
        if walk == self._walk and self.same:
            return self
        # A module that was wrapped, or taken out: the list itself is another one.
        if walk != self._walk or not all(one.look.same_modules for one in self._seen):
            modules = list(walk.model.named_modules())
            parents = dict(modules)
            self._walk = walk
            self._seen = [
                _see(walk, prefix, module, parents.get(prefix.rpartition(".")[0]))
                for prefix, module in modules
            ]
        else:
            self._seen = [
                one if one.look.same else _see(walk, one.prefix, one.module, one.parent)
                for one in self._seen
            ]
        self._all = None
        self._made = any(one.found is None for one in self._seen)
        self._look = _Look([one.module for one in self._seen])
        return self

    def shards(self) -> list[Shard]:
        """Return what `Walk.shards` of the last walk yields; the same list where nothing moved.

        What a form makes of a parameter, where it is not that parameter's own memory, is made
        again every time: it may depend on any value.
        """
        walk = self._walk
        if walk is None:
            return []
        if self._all is None or self._made:
            self._all = []
            for one in self._seen:
                found = one.found
                self._all += walk.of(one.prefix, one.module, one.parent) if found is None else found
        return self._all


class _Look:
    """What of some modules says that their shards are where they were.

    All of them at once, by calls in C.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules
        self._children, self._held = _inside(modules)
        self._parameters = [one for one in self._held[1] if isinstance(one, torch.Tensor)]
        self._where = _where(self._parameters)

    @property
    def same_modules(self) -> bool:
        """Whether the same modules are in them."""
        return _alike(_inside(self._modules)[0], self._children)

    @property
    def same(self) -> bool:
        """Whether the same is in them, and parameters are at the same addresses."""
        children, held = _inside(self._modules)
        return (
            _alike(children, self._children)
            and _alike(held, self._held)
            and _where(self._parameters) == self._where
        )


@dataclass(frozen=True)
class _Seen:
    """A module as it was.

    Attributes:
        prefix, module, parent: as `Walk.of` takes them.
        look: at it alone.
        found: its shards; None where they have to be looked up every time.
    """

    prefix: str
    module: Any
    parent: Any
    look: _Look
    found: list[Shard] | None


def _see(walk: Walk, prefix: str, module: Any, parent: Any) -> _Seen:
    parameters = [*module.parameters(recurse=False)]
    found = walk.of(prefix, module, parent) if parameters or walk.more is not None else []
    memory = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    own = all(shard.tensor.untyped_storage().data_ptr() in memory for shard in found)
    known = found if own and walk.more is None else None
    return _Seen(prefix, module, parent, _Look([module]), known)


#: Facts, which must be equal, and objects, which must be the same.
_Found = tuple[list[object], list[object]]


def _inside(modules: Sequence[Any]) -> tuple[_Found, _Found]:
    """Return what modules are in each module, and what else: parameters and what tells a form."""
    # named_parameters is slow.
    attributes = [*map(vars, modules)]
    children, parameters, buffers = (
        [one[kind] for one in attributes] for kind in ("_modules", "_parameters", "_buffers")
    )
    names = [*map(len, children), *chain.from_iterable(children)]
    sizes = [*map(len, parameters), *map(len, buffers), *map(len, attributes)]
    objects = [*_values(parameters), *[one.get("quant_method") for one in attributes]]
    return (names, _values(children)), ([*sizes, *chain.from_iterable(parameters)], objects)


def _values(dicts: Iterable[Mapping[str, Any]]) -> list[object]:
    return [value for one in dicts for value in one.values()]


def _alike(now: _Found, then: _Found) -> bool:
    return now[0] == then[0] and all(map(operator.is_, now[1], then[1]))


def _where(parameters: Sequence[torch.Tensor]) -> tuple[list[object], ...]:
    """Return address, shape, strides and dtype: `.data` may be set to another view of the same."""
    return (
        [*map(torch.Tensor.data_ptr, parameters)],
        [*map(_SHAPE, parameters)],
        [*map(torch.Tensor.stride, parameters)],
        [*map(_DTYPE, parameters)],
    )
