"""The shards of a model, looked up once and again only where something has moved.

A walk over an 8B model takes Python 10 to 25 ms, and every push asks for it twice: where to
copy to, and what is held. Standard library and torch; runs in an engine's worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks import shards

if TYPE_CHECKING:
    import torch

    from fp8ctl.engines.hooks.shards import Form, Shard


@dataclass
class _Seen:
    """A module as it was: what of it says that its shards are where they were.

    Attributes:
        sizes: how many buffers and attributes it has.
        parameters: name, parameter and address of each.
        found: the shards of each parameter; None where they have to be looked up every time.
    """

    module: Any
    prefix: str
    sizes: tuple[int, int]
    parameters: list[tuple[str, Any, int]]
    found: list[list[Shard] | None]

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


class Walk:
    """What one rank holds, in one form."""

    def __init__(self, model: torch.nn.Module, tp_rank: int) -> None:
        """Take a model over.

        Args:
            model: as the engine built and loaded it.
            tp_rank: of this process among those that share the same layers.
        """
        self._model, self._tp_rank = model, tp_rank
        self._form: Form | None = None
        self._seen: list[_Seen] = []
        self._all: list[Shard] | None = None

    def forget(self) -> None:
        """Look at every module anew the next time."""
        self._seen.clear()
        self._all = None

    def shards(self, form: Form | None) -> list[Shard]:
        """Return what `shards.shards` yields; the same list where nothing has moved.

        What a form makes of a parameter, where it is not that parameter's own memory, is made
        again every time: it may depend on any value.
        """
        if form is not self._form or not self._seen:
            self._seen = [
                self._look(prefix, module, form)
                for prefix, module in self._model.named_modules()
                if module._parameters
            ]
            self._form, self._all = form, None
        for i, one in enumerate(self._seen):
            if not one.same:
                self._seen[i], self._all = self._look(one.prefix, one.module, form), None
        if self._all is not None:
            return self._all
        listed: list[Shard] = []
        for one in self._seen:
            for (name, _, _), found in zip(one.parameters, one.found, strict=True):
                listed += self._of(one, name) if found is None else found
        if all(found is not None for one in self._seen for found in one.found):
            self._all = listed
        return listed

    def _look(self, prefix: str, module: Any, form: Form | None) -> _Seen:
        # Every parameter, by the same words as `shards`; the same one twice counts once there.
        parameters = [
            (name, parameter, parameter.data_ptr())
            for name, parameter in module.named_parameters(recurse=False)
        ]
        seen = _Seen(module, prefix, _sizes(module), parameters, [])
        self._form = form
        for name, parameter, _ in parameters:
            found = self._of(seen, name)
            memory = parameter.untyped_storage().data_ptr()
            own = all(one.tensor.untyped_storage().data_ptr() == memory for one in found)
            seen.found.append(found if own else None)
        return seen

    def _of(self, seen: _Seen, name: str) -> list[Shard]:
        return [*shards.of(seen.module, seen.prefix, name, self._tp_rank, self._form)]


def _sizes(module: Any) -> tuple[int, int]:
    return len(module._buffers), len(module.__dict__)
