"""Who may write weights now: one push, or one route of the engine's own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from fp8ctl.engines.hooks.refused import RefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fp8ctl.engines.hooks.gate import Gate
    from fp8ctl.engines.hooks.memory import Memory
    from fp8ctl.engines.hooks.session import Session


class Admission:
    """Keeps pushes, and what else writes weights, out of each other's way.

    Attributes:
        engines_turn: held by what writes weights and is no push.
    """

    def __init__(self, gate: Gate, session: Session, memory: Memory) -> None:
        self.engines_turn = asyncio.Lock()
        self._gate = gate
        self._session = session
        self._memory = memory
        self._alone = ""

    def require_free(self) -> None:
        """Refuse a client where the server is not for it now.

        Raises:
            RefusedError: the engine warms up, something else writes weights, or their memory
                is released.
        """
        if not self._gate.started:
            raise RefusedError(503, "FP8-BUSY", "the engine warms up")
        if self._alone:
            raise RefusedError(409, "FP8-BUSY", f"{self._alone} is on its way")
        self._require_no_push()
        self._memory.require_weights()

    @contextlib.asynccontextmanager
    async def alone(self, what: str) -> AsyncIterator[None]:
        """Surround what else writes weights: no push meanwhile, and one of these at a time.

        Args:
            what: the route, for messages.

        Raises:
            RefusedError: a push is open, or the engine rests and cannot be woken.
        """
        self._require_no_push()
        async with self.engines_turn:
            async with self._session.turn:
                await self._session.expire()
                self._require_no_push()
                await self._session.rest.let_go()
                self._alone = what
            before = self._gate.updates
            try:
                yield
            finally:
                self._alone = ""
                # Written, or given up: then the ranks have forgotten, too.
                if self._gate.updates != before or self._gate.settled != "ready":
                    self._session.trust.lost()
                    self._gate.about["version"] = None  # nobody said which these are

    def _require_no_push(self) -> None:
        push = self._session.push
        if push is not None and not push.lapsed:
            told = f"update {push.begin.push} to version {push.begin.version} is on its way"
            raise RefusedError(409, "FP8-BUSY", told, data={"push": push.begin.push})
