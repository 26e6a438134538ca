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

#: Times as many questions as there is room for: more than the lists of any one update.
_LONG = 64

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
        #: With the turn in which each was asked for last; the longest ago comes first.
        self._made: dict[Key, tuple[T, int]] = {}
        self._turn = 0
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
        self._turn += 1
        found = self._made.pop(key, None)
        if found is None:
            return None
        self._made[key] = found[0], self._turn
        return found[0]

    def put(self, key: Key, made: T) -> None:
        """Remember what was made for a list; where there are too many, no others.

        Those of an update come in a circle: if new ones took the places of old ones, none would be
        there when it is asked for again. One that was not asked for in a long time gives its own.
        """
        if len(self._made) >= self._most and key not in self._made:
            oldest = next(iter(self._made))
            if self._turn - self._made[oldest][1] < _LONG * self._most:
                return
            del self._made[oldest]
        self._made[key] = made, self._turn

    def clear(self) -> None:
        """Forget them."""
        self._made.clear()


def forget() -> None:
    """Give back what is remembered anywhere: tensors of a connection that ended come no more."""
    for known in [*_all]:
        known.clear()
