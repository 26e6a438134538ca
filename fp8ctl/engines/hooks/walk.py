"""What a walk over a model found, looked up again only where something has moved.

A walk over an 8B model takes Python 10 to 25 ms, and every push asks for it twice: where to
copy to, and what is held. Standard library and torch; runs in an engine's worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.engines.hooks.shards import Shard, Walk


@dataclass
class _Seen:
    """A module as it was: what of it says that its shards are where they were.

    Attributes:
        prefix, module, parent: as `Walk.of` takes them.
        sizes: how many buffers and attributes it has.
        parameters: name, parameter and address of each.
        found: its shards; None where they have to be looked up every time.
    """

    prefix: str
    module: Any
    parent: Any
    sizes: tuple[int, int]
    parameters: list[tuple[str, Any, int]]
    found: list[Shard] | None

    @property
    def same(self) -> bool:
        """Whether its parameters are the same ones, at the same addresses."""
        held: Any = self.module._parameters  # named_parameters is slow
        return (
            _sizes(self.module) == self.sizes
            and sum(one is not None for one in held.values()) == len(self.parameters)
            and all(
                held.get(name) is parameter and parameter.data_ptr() == address
                for name, parameter, address in self.parameters
            )
        )


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
        if walk != self._walk:
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
        (name, parameter, parameter.data_ptr())
        for name, parameter in module.named_parameters(recurse=False)
    ]
    found = walk.of(prefix, module, parent) if parameters or walk.more is not None else []
    memory = {parameter.untyped_storage().data_ptr() for _, parameter, _ in parameters}
    own = all(shard.tensor.untyped_storage().data_ptr() in memory for shard in found)
    known = found if own and walk.more is None else None
    return _Seen(prefix, module, parent, _sizes(module), parameters, known)


def _sizes(module: Any) -> tuple[int, int]:
    return len(module._buffers), len(module.__dict__)
