"""What a walk over a model found, looked up again only where something has moved.

A walk over an 8B model takes Python 10 to 25 ms, and every push asks for it twice: where to
copy to, and what is held. Standard library and torch; runs in an engine's worker.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.engines.hooks.shards import Shard, Walk

    _Where = tuple[int, tuple[int, ...], tuple[int, ...], object]


@dataclass
class _Seen:
    """A module as it was: what of it says that its shards are where they were.

    Attributes:
        prefix, module, parent: as `Walk.of` takes them.
        sizes: how many buffers and attributes it has.
        children: the modules in it.
        parameters: name and parameter of each, and where and how it lies.
        found: its shards; None where they have to be looked up every time.
    """

    prefix: str
    module: Any
    parent: Any
    sizes: tuple[int, int]
    children: list[Any]
    parameters: list[tuple[str, Any, _Where]]
    found: list[Shard] | None

    @property
    def same(self) -> bool:
        """Whether its parameters are the same ones, at the same addresses."""
        held: Any = self.module._parameters  # named_parameters is slow
        return (
            _sizes(self.module) == self.sizes
            and sum(one is not None for one in held.values()) == len(self.parameters)
            and all(
                held.get(name) is parameter and _where(parameter) == where
                for name, parameter, where in self.parameters
            )
        )

    @property
    def same_children(self) -> bool:
        """Whether the same modules are in it."""
        held = self.module._modules.values()
        return len(held) == len(self.children) and all(map(operator.is_, held, self.children))


class Known:
    """What walks over one model found."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._walk: Walk | None = None
        self._seen: list[_Seen] = []
        self._all: list[Shard] | None = None

    def forget(self) -> None:
        """Look at every module anew the next time."""
        self._walk = self._all = None
        self._seen = []

    def of(self, walk: Walk) -> Known:
        """Return itself, after a look whether what it knows is of this walk."""
        # A module that was wrapped, or taken out: the list itself is another one.
        if walk != self._walk or not all(one.same_children for one in self._seen):
            modules = list(walk.model.named_modules())
            parents = dict(modules)
            self._walk, self._all = walk, None
            self._seen = [
                _look(walk, prefix, module, parents.get(prefix.rpartition(".")[0]))
                for prefix, module in modules
            ]
        return self

    def by_module(self, start: int = 0) -> Iterator[tuple[int, list[Shard]]]:
        """Yield what `Walk.by_module` yields.

        What a form makes of a parameter, where it is not that parameter's own memory, is made
        again every time: it may depend on any value.
        """
        walk = self._walk
        assert walk is not None
        for number in range(start, len(self._seen)):
            one = self._seen[number]
            if not one.same:
                one = self._seen[number] = _look(walk, one.prefix, one.module, one.parent)
                self._all = None
            found = one.found
            if found is None:
                found = walk.of(one.prefix, one.module, one.parent)
            yield number, found

    def shards(self) -> list[Shard]:
        """Return what `Walk.shards` yields; the same list where nothing has moved."""
        listed = [found for _, found in self.by_module()]
        if self._all is None or any(one.found is None for one in self._seen):
            self._all = [shard for found in listed for shard in found]
        return self._all


def _look(walk: Walk, prefix: str, module: Any, parent: Any) -> _Seen:
    parameters = [
        (name, parameter, _where(parameter))
        for name, parameter in module.named_parameters(recurse=False)
    ]
    found = walk.of(prefix, module, parent) if parameters or walk.more is not None else []
    memory = {parameter.untyped_storage().data_ptr() for _, parameter, _ in parameters}
    own = all(shard.tensor.untyped_storage().data_ptr() in memory for shard in found)
    known = found if own and walk.more is None else None
    children = [*module._modules.values()]
    return _Seen(prefix, module, parent, _sizes(module), children, parameters, known)


def _where(parameter: Any) -> _Where:
    """Return address, shape, strides and dtype: `.data` may be set to another view of the same."""
    return parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype


def _sizes(module: Any) -> tuple[int, int]:
    return len(module._buffers), len(module.__dict__)
