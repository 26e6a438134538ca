"""The engine of a push, brought to rest and back, whatever it answers."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING

from fp8ctl.engines.hooks.refused import RefusedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fp8ctl.engines.hooks.workers import Workers
    from fp8ctl.wire import InFlight

#: Seconds by which holding may overrun what the client allows, before it counts as hung; and
#: within which what is paused must be ended after a failure.
GRACE = 30.0


class Rest:
    """Holds an engine for one update after the other.

    Attributes:
        stuck: it was left at rest, with requests that nobody could end.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.stuck = False
        self._holding: asyncio.Future[None] | None = None

    async def hold(self, in_flight: InFlight, within: float) -> None:
        """Bring the engine to rest.

        Raises:
            RefusedError: requests still run, the engine hangs, or `cancel` was called.
            Exception: whatever else the engine says.
        """
        if self.stuck:
            in_flight = "abort"  # they would wait for this update, and it for them
        holding = asyncio.ensure_future(self._workers.hold(in_flight, within))
        self._holding = holding
        try:
            done, _ = await asyncio.wait({holding}, timeout=within + GRACE)
            if not done:
                holding.cancel()
                await asyncio.wait({holding}, timeout=GRACE)
        finally:
            self._holding = None
        if not done:
            raise RefusedError(408, "FP8-DRAIN", f"the engine did not rest in {within:g} s")
        if holding.cancelled():
            raise RefusedError(409, "FP8-ORDER", "the update was aborted before it began")
        error = holding.exception()
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            raise RefusedError(
                408,
                "FP8-DRAIN",
                f"requests still run after {within:g} s",
                hint='in_flight="pause", or in_flight="abort"',
            )
        if error is not None:
            raise error
        self.stuck = False

    async def let_go(self) -> None:
        """End what an earlier failure left, for the engine's own routes: they wait for it.

        Raises:
            RefusedError: it cannot be.
        """
        if not self.stuck:
            return
        await self.hold("abort", GRACE)
        trouble = await self.release(mixed=False)
        if trouble:
            told = f"the engine rests since an update failed, and could not be woken: {trouble}"
            raise RefusedError(500, "FP8-ENGINE", told)

    def cancel(self) -> None:
        """End a `hold` that waits."""
        if self._holding is not None:
            self._holding.cancel()

    async def release(
        self, *, mixed: bool, resume: Callable[[], Awaitable[object]] | None = None
    ) -> str:
        """Let the engine compute again.

        Args:
            resume: instead of the engine's own.
            mixed: its weights may be of two versions: what is paused is ended first, and where
                that fails the engine stays at rest.

        Returns:
            Why it could not be brought back; "" where it was, or stays at rest.
        """
        if mixed:
            ended = asyncio.wait_for(self._workers.hold("abort", GRACE), 2 * GRACE)
            trouble = await quietly(ended)
            await quietly(self._workers.flush())
            if trouble:
                self.stuck = True
                return ""
        trouble = await quietly((resume or self._workers.resume)())
        self.stuck = bool(trouble)
        return trouble


async def quietly(doing: Awaitable[object]) -> str:
    """Wait for what may fail; return why it did, "" where it did not."""
    try:
        await doing
    except Exception as e:  # noqa: BLE001 - the caller goes on either way
        traceback.print_exc()
        return f"{type(e).__name__}: {e}"
    return ""
