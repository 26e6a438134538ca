"""One update from the closed gate to its outcome: applied, or rejected, or failed.

What a client asks in between is in `updates`. Whoever opens or closes an update has `turn`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import traceback
from typing import TYPE_CHECKING

from fp8ctl import wire
from fp8ctl.engines.hooks.ended import Past
from fp8ctl.engines.hooks.gate import Outcome
from fp8ctl.engines.hooks.openpush import OpenPush
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.resting import Rest
from fp8ctl.engines.hooks.trust import Trust

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from fp8ctl.engines.hooks.evidence import Evidence
    from fp8ctl.engines.hooks.gate import Gate
    from fp8ctl.engines.hooks.pushlog import PushLog
    from fp8ctl.engines.hooks.workers import Workers

#: Seconds after an update's end in which its answer leaves.
ANSWERED = 0.02


class Session:
    """Opens updates and closes them; one is open at a time.

    Attributes:
        push: the one that is on its way.
        past: those that are over.
        turn: held by the request that is worked off.
        rest: brings the engine to rest and back.
        trust: what the ranks were told of earlier updates.
    """

    def __init__(self, gate: Gate, workers: Workers, evidence: Evidence, log: PushLog) -> None:
        """Begin without an update.

        Args:
            gate: of this server.
            workers: of its engine.
            evidence: of what they hold.
            log: gets the lines of every update that has ended.
        """
        self.push: OpenPush | None = None
        self.past = Past()
        self.turn = asyncio.Lock()
        self.rest = Rest(workers)
        self.trust = Trust(workers)
        self._gate = gate
        self._evidence = evidence
        self._log = log
        self._watching: asyncio.Future[None] | None = None
        self._writing: set[asyncio.Future[None]] = set()

    async def open(self, begin: wire.Begin) -> OpenPush:
        """Close the gate and bring the engine to rest; note what it holds where that is asked.

        Raises:
            RefusedError: it does not rest, or does not tell; the update has ended.
        """
        self.push = push = OpenPush(begin, settled=self._gate.settled)
        self._gate.begin_update()
        push.serving += 1
        async with self.or_ends(push):
            with push.timed("hold"):
                await self.rest.hold(push.begin.in_flight, push.begin.within)
            # Where weights are mixed or missing, all must be sent.
            if push.begin.digests and push.settled == "ready":
                with push.timed("digests"):
                    held = await self._evidence.held()
                # What is not alike on all ranks must not be left out.
                alike = {n: one for n, one in (held or {}).items() if one.replicas_agree}
                push.held = None if held is None else alike
        return push

    async def close(
        self,
        push: OpenPush,
        outcome: Outcome,
        proven: Iterable[str] = (),
        *,
        resumed: bool = False,
    ) -> Outcome:
        """Let the engine compute again and settle the gate.

        Args:
            push: that is open.
            outcome: how it ends.
            proven: names of what the ranks may copy from now on; none where it failed.
            resumed: the engine has found them itself, and computes.

        Returns:
            The outcome; "failed" also where the engine could not be brought back.
        """
        if outcome.kind == "failed":
            await self.trust.withdraw()
        with push.timed("resume"):
            resume = functools.partial(self.trust.resume, proven, resumed=resumed)
            trouble = await self.rest.release(mixed=outcome.kind == "failed", resume=resume)
        if trouble:
            if outcome.kind != "failed":
                await self.trust.withdraw()
            told = f"the engine could not be brought back: {trouble}"
            outcome = Outcome("failed", message="; ".join(filter(None, (outcome.message, told))))
        if outcome.kind != "rejected":
            applied = outcome.kind == "applied"
            self._gate.about["version"] = (push.begin.version or None) if applied else None
        self.push = None
        push.moves()
        self.past.add(push, outcome)
        self._gate.end_update(outcome)
        if self._watching is not None and self._watching is not asyncio.current_task():
            self._watching.cancel()
        self._watching = None
        self._log.later(push.lines(outcome, time.time()))
        writing = asyncio.ensure_future(self._write())
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        return outcome

    async def _write(self) -> None:
        """Write the log when the answer is under way: its client waits for nothing else."""
        try:
            await asyncio.sleep(ANSWERED)
            await asyncio.to_thread(self._log.settle)
        except asyncio.CancelledError:  # the server ends
            self._log.settle()
            raise

    @contextlib.asynccontextmanager
    async def or_ends(self, push: OpenPush, *, at_end: bool = False) -> AsyncIterator[None]:
        """End the update where what is inside fails; weights that may be mixed close the gate.

        Args:
            push: that is open.
            at_end: what is raised is the answer to END, also when that is repeated.

        Raises:
            RefusedError: whatever was raised inside.
        """
        try:
            yield
        except Exception as e:
            if isinstance(e, RefusedError):
                refused = e
            elif isinstance(e, wire.WireError):
                refused = RefusedError(400, "FP8-WIRE", str(e))
            else:
                traceback.print_exc()
                refused = RefusedError(500, "FP8-ENGINE", f"{type(e).__name__}: {e}")
            await self.close(push, broken(push, refused.message))
            if at_end:
                self.past.answered(push, refused)
            raise refused from e

    # --- is the client alive ----------------------------------------------------------------

    @contextlib.contextmanager
    def hearing(self, name: object) -> Iterator[None]:
        """Surround a request: while it is worked off the client of this update is alive."""
        mine = self.push
        if mine is None or mine.begin.push != name:
            yield
            return
        mine.serving += 1
        try:
            yield
        finally:
            mine.serving -= 1
            mine.heard = time.monotonic()

    def watch(self, push: OpenPush) -> None:
        """Let the lease of an update run, whose client has the answer to BEGIN now."""
        push.serving -= 1
        push.heard = time.monotonic()
        self._watching = asyncio.ensure_future(self._watch(push))

    async def expire(self) -> None:
        """End the update whose client was not heard of for too long."""
        push = self.push
        if push is not None and push.lapsed:
            told = f"its client was not heard of for {push.begin.lease:g} s"
            await self.close(push, broken(push, told))

    async def _watch(self, push: OpenPush) -> None:
        while self.push is push:
            left = push.heard + push.begin.lease - time.monotonic()
            await asyncio.sleep(max(left, min(1.0, push.begin.lease)))
            async with self.turn:
                if self.push is push:
                    await self.expire()


def broken(push: OpenPush, why: str) -> Outcome:
    """Return how an update ends that goes no further."""
    return Outcome("failed" if push.touched else "rejected", message=why)
