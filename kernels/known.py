"""Lists of tensors that come again, and what was made for them the first time.

A push asks for the same tensors at every update, at the same addresses. What a list is and where
it lies is its key, so that the list itself need not be kept: memory that was freed and used again
by tensors of the same kinds is the same list to whoever reads it anew.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import torch

    Key = tuple[Hashable, ...]

T = TypeVar("T")

_all: weakref.WeakSet[Known[Any]] = weakref.WeakSet()


class Known(Generic[T]):
    """What was made for lists of tensors, by what these are and where they lie.

    What is put here must hold no tensor of the list, or memory would stay that its owner freed.
    """

    def __init__(self, most: int = 256) -> None:
        """Remember up to `most` lists."""
        from fp8ctl.kernels.facts import Facts  # needs numpy, as Triton's part does, and a CPU not

        self._most = most
        # Kept for ever: a number must not come to mean another kind.
        self._facts = Facts()
        self._made: dict[Key, T] = {}
        _all.add(self)

    def __len__(self) -> int:
        """Return how many lists are remembered."""
        return len(self._made)

    def key(self, tensors: Sequence[torch.Tensor], *more: Hashable) -> Key:
        """Return the key of a list of tensors, and of what else counts.

        Raises:
            TypeError, AttributeError, RuntimeError: something is no tensor, or has no memory.
        """
        numbers, addresses = self._facts.look(tensors)
        return (numbers.tobytes(), addresses.tobytes(), *more)

    def get(self, key: Key) -> T | None:
        """Return what was made for a list."""
        return self._made.get(key)

    def put(self, key: Key, made: T) -> None:
        """Remember what was made for a list; where there are too many, no others."""
        if len(self._made) >= self._most:
            self._made.clear()
        self._made[key] = made

    def clear(self) -> None:
        """Forget them."""
        self._made.clear()


def forget() -> None:
    """Give back what is remembered anywhere: tensors of a connection that ended come no more."""
    for known in [*_all]:
        known.clear()
