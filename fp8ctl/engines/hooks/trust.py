"""Which tensors the ranks were told that they hold as they were sent.

Being told makes the next update faster (`rectangles`): so it is told once, of each tensor.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fp8ctl.engines.hooks.resting import quietly

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp8ctl.engines.hooks.workers import Workers


class Trust:
    """What all ranks of one server trust."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._told: set[str] = set()

    def has(self, names: Iterable[str]) -> bool:
        """Whether the ranks were told all of these."""
        return self._told.issuperset(names)

    async def resume(self, names: Iterable[str], *, resumed: bool = False) -> None:
        """Let the engine compute again, and tell the ranks which tensors lie where they should.

        What they could not be told is told again next time.

        Args:
            names: of them.
            resumed: it computes already.

        Raises:
            Exception: the engine could not be brought back.
        """
        more = [name for name in names if name not in self._told]
        if resumed and not more:
            return
        why = await self._workers.resume(more)
        if not why:
            self._told.update(more)
        else:
            sys.stderr.write(f"fp8ctl: the ranks do not trust what was proven: {why}\n")

    def lost(self) -> None:
        """Note that the ranks trust nothing any more: something else has written weights."""
        self._told.clear()

    async def withdraw(self) -> None:
        """Have the ranks trust nothing, and count what arrives from nothing."""
        self._told.clear()
        await quietly(self._workers.ask("forget"))
