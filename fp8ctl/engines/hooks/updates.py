"""A push as a server sees it: connect, begin, buckets, end; all of it or nothing.

`Updates` knows no engine: it asks `workers.Workers`. An engine's server module makes one,

    updates = Updates(gate, workers, manifest.read(), device="cuda", folder=ranklog.run_dir())

and mounts `routes.PushRoutes(app, updates)`, an ASGI middleware, behind the gate and the API
key. A route of the engine's own that writes weights, or gives them up, runs inside

    async with updates.alone("/update_weights_from_disk"): ...

which raises `RefusedError` (409) while a push is open, and keeps pushes out meanwhile.

One request at a time has its turn; a BEGIN of a second client is refused at once. Buckets are
numbered from 0. Every request is a sign of life, a repeated BEGIN too. No request may be
cancelled half-way: `routes` works each off to its end, so that one that is repeated finds the
first one's answer and never half of its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8ctl import wire
from fp8ctl.engines.hooks import intake
from fp8ctl.engines.hooks.connection import Connection, read_offer
from fp8ctl.engines.hooks.evidence import Evidence
from fp8ctl.engines.hooks.expected import Expected
from fp8ctl.engines.hooks.gate import Outcome
from fp8ctl.engines.hooks.memory import Memory
from fp8ctl.engines.hooks.openpush import OpenPush
from fp8ctl.engines.hooks.pushlog import PushLog
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.resting import Rest, quietly

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator, Mapping
    from pathlib import Path

    from fp8ctl.engines.hooks.gate import Gate
    from fp8ctl.engines.hooks.workers import Workers

    Body = dict[str, Any]

#: How many ended updates are remembered, for a client that did not get the last answer.
REMEMBERED = 16


@dataclass
class _Ended:
    """An update that is over.

    Attributes:
        begun: whether its BEGIN succeeded.
        answer: to its END; None where it ended otherwise.
    """

    outcome: Outcome
    begun: bool
    answer: Body | RefusedError | None = None


class Updates:
    """The updates of one server, one at a time.

    Attributes:
        log: what they brought.
        plan: the manifest of what they must bring; {} without one.
        memory: what the engine's own routes have released of it.
    """

    def __init__(
        self,
        gate: Gate,
        workers: Workers,
        plan: Mapping[str, Any],
        *,
        device: str,
        folder: Path | None,
    ) -> None:
        """Make the session; nothing is asked yet.

        Args:
            gate: of this server.
            workers: of its engine.
            plan: the manifest that it was started with; {} where the engine quantises itself.
            device: "cuda" or "cpu".
            folder: of this run, for the log.
        """
        self.log = PushLog(folder)
        self.plan = plan
        self.memory = Memory(gate.engine)
        self._gate = gate
        self._workers = workers
        self._expected = Expected(plan)
        self._evidence = Evidence(workers, self._expected)
        #: Tensors that the ranks were told they hold as they were sent.
        self._trusted: set[str] = set()
        self._turn = asyncio.Lock()
        self._engines_turn = asyncio.Lock()
        self._alone = ""
        self._connection = Connection(workers, gate.engine)
        self._rest = Rest(workers)
        self._push: OpenPush | None = None
        self._ended: dict[str, _Ended] = {}
        self._watching: asyncio.Future[None] | None = None
        gate.about.update(device=device, version=None, push=wire.PROTOCOL, plan=_brief(plan))
        gate.about["connection"] = ""

    @property
    def state(self) -> str:
        """Of the gate, now."""
        return self._gate.state

    @property
    def open(self) -> bool:
        """Whether a push is on its way."""
        return self._push is not None

    @contextlib.contextmanager
    def hearing(self, push: object) -> Iterator[None]:
        """Surround a request: while it is worked off the client of `push` is alive."""
        mine = self._push
        if mine is None or mine.begin.push != push:
            yield
            return
        mine.serving += 1
        try:
            yield
        finally:
            mine.serving -= 1
            mine.heard = time.monotonic()

    @contextlib.asynccontextmanager
    async def alone(self, what: str) -> AsyncIterator[None]:
        """Surround what else writes weights: no push meanwhile, and one of these at a time.

        Args:
            what: the route, for messages.

        Raises:
            RefusedError: a push is open, or the engine rests and cannot be woken.
        """
        self._without_push()
        async with self._engines_turn:
            async with self._turn:
                await self._expire()
                self._without_push()
                await self._rest.let_go()
                self._alone = what
            before = self._gate.updates
            try:
                yield
            finally:
                self._alone = ""
                # Written, or given up: then the ranks have forgotten, too.
                if self._gate.updates != before or self._gate.settled != "ready":
                    self._trusted.clear()
                    self._gate.about["version"] = None  # nobody said which these are

    async def reload(self, path: str) -> Outcome:
        """Load a folder that the server can read: all of an update, without a client.

        A server that has its weights takes a part; another counts what has arrived.

        Args:
            path: of the folder.

        Returns:
            How it ended; "applied", or it raises.

        Raises:
            RefusedError: a push is open, requests still run, or it failed.
        """
        async with self._engines_turn:
            self._free()
            async with self._turn:
                await self._expire()
                self._free()
                name = f"reload-{uuid.uuid4().hex}"
                begin = wire.Begin(name, "", version="", manifest="", complete=False)
                push = await self._open(begin)
                async with self._or_ends(push):
                    self._trusted.clear()
                    push.took(await intake.folder(self._workers, push, path))
                    with push.timed("settle"):
                        missing, message = await self._evidence.missing(push, folder=True)
                    with push.timed("flush"):
                        await self._workers.flush()
                outcome = await self._close(push, Outcome("applied", missing, message))
        if outcome.kind != "applied":
            raise RefusedError(500, "FP8-ENGINE", outcome.message)
        return outcome

    # --- connection -------------------------------------------------------------------------

    async def connect(self, found: Body) -> Body:
        """Open a client's carrier in every rank; a connection before it is closed."""
        offer = read_offer(found)
        self._free()
        async with self._turn:
            await self._expire()
            self._free()
            try:
                await self._connection.open(offer)
            finally:
                self._gate.about["connection"] = wire.shown(self._connection.id)
            return {
                "connection": self._connection.id,
                "ranks": self._workers.ranks,
                "engine": self._gate.engine,
                "device": self._gate.about["device"],
                "manifest": self._expected.digest,
                "refittable": True,
            }

    async def disconnect(self, found: Body) -> Body:
        """Close a connection; an update that came over it ends."""
        async with self._turn:
            self._connection.check(found.get("connection"))
            if self._push is not None:
                await self._close(self._push, _broken(self._push, "the client disconnected"))
            await self._connection.close()
            self._gate.about["connection"] = ""
            return {"connection": found["connection"]}

    # --- an update --------------------------------------------------------------------------

    async def begin(self, found: Body) -> Body:
        """Close the gate, bring the engine to rest, open an update."""
        begin = wire.Begin.from_json(found)
        if not (0 < begin.lease < 1e6 and 0 <= begin.within < 1e6):
            raise wire.WireError(f"lease {begin.lease}, within {begin.within}: expected seconds")
        if self._push is None or self._push.begin.push != begin.push:
            self._free()
        async with self._turn:
            push = self._push
            if push is not None and push.begin.push == begin.push:
                if push.begin != begin or push.begun is None:
                    raise RefusedError(409, "FP8-ORDER", f"{begin.push} was begun otherwise")
                return push.begun
            await self._expire()
            self._free()
            ended = self._ended.get(begin.push)
            if ended is not None and ended.begun:
                raise RefusedError(
                    409, "FP8-ORDER", f"{begin.push} has ended: {_told(ended.outcome)}"
                )
            self._connection.check(begin.connection)
            if begin.manifest != self._expected.digest:
                raise RefusedError(
                    409,
                    "FP8-MANIFEST",
                    f"these weights are made by plan {begin.manifest[:16] or '(none)'}, the"
                    f" server's is {self._expected.digest[:16] or '(none)'}",
                    hint="the plan in the server's run folder: manifest.json",
                    data={"found": begin.manifest, "expected": self._expected.digest},
                )
            before = self._gate.about["version"]
            push = await self._open(begin)
            push.begun = {
                "push": begin.push,
                "ranks": self._workers.ranks,
                "version": before,
                "state": push.settled,
                "digests": push.held and {name: one.text for name, one in push.held.items()},
            }
            push.serving -= 1
            push.heard = time.monotonic()
            self._watching = asyncio.ensure_future(self._watch(push))
            return push.begun

    async def bucket(self, found: Body) -> Body:
        """Load one bucket, after all of it was compared with the plan."""
        async with self._turn:
            push = await self._mine(found)
            number = found.get("number")
            if type(number) is not int:
                raise RefusedError(409, "FP8-ORDER", f"bucket {number!r:.40}; expected a number")
            request = {k: v for k, v in found.items() if k != "push"}
            if number == push.number - 1 and request == push.bucket:
                return {**push.taken, "repeated": True}
            if number != push.number:
                raise RefusedError(
                    409,
                    "FP8-ORDER",
                    f"bucket {number}; expected {push.number}"
                    + (", or the one before again as it was" if push.number else ""),
                )
            async with self._or_ends(push):
                entries = intake.read(found, disk=self._connection.disk)
                self._expected.check(entries, push.entries)
                if self._connection.disk:
                    self._trusted.clear()  # the engine's own reload: the ranks lose it, too
                loaded = await intake.load(self._workers, push, found, disk=self._connection.disk)
                push.entries.update((entry.name, entry) for entry in entries)
                push.number += 1
                push.bucket, push.taken = request, {"number": number, **loaded}
                push.took(loaded["seconds"])
            return push.taken

    async def end(self, found: Body) -> Body:
        """Take an update as complete, prove what the ranks hold, open the gate."""
        skipped, verify = found.get("skipped", []), found.get("verify", True)
        if not isinstance(skipped, list) or not all(isinstance(n, str) for n in skipped):
            raise wire.WireError("skipped: expected a list of names")
        async with self._turn:
            ended = self._ended.get(str(found.get("push")))
            if ended is not None and ended.answer is not None:
                if isinstance(ended.answer, RefusedError):
                    raise ended.answer
                return ended.answer
            push = await self._mine(found)
            if found.get("buckets") != push.number:
                told = f"{found.get('buckets')!r} buckets were sent; {push.number} arrived"
                raise RefusedError(409, "FP8-ORDER", told)
            push.skipped = tuple(skipped)
            async with self._or_ends(push, at_end=True):
                with push.timed("settle"):
                    missing, message = await self._evidence.missing(push)
                with push.timed("verify"):
                    equal = await self._evidence.equal(push) if verify else None
                await self._trust(equal or ())
                if push.touched:
                    with push.timed("flush"):
                        await self._workers.flush()
            outcome = await self._close(push, Outcome("applied", missing, message))
            if outcome.kind != "applied":
                self._ended[push.begin.push].answer = e = RefusedError(
                    500, "FP8-ENGINE", outcome.message
                )
                raise e
            answer = {
                "outcome": outcome.kind,
                "state": self.state,
                "version": push.begin.version,
                "missing": missing,
                "message": message,
                "verified": None if equal is None else len(equal),
                "seconds": push.seconds,
            }
            self._ended[push.begin.push].answer = answer
            return answer

    async def abort(self, found: Body) -> Body:
        """End an update whose client gives up; one that still waits for requests at once."""
        name, told = found.get("push"), f"aborted: {str(found.get('reason', ''))[:500]}"
        push = self._push
        if push is not None and push.begin.push == name:
            self._rest.cancel()
        async with self._turn:
            ended = self._ended.get(str(name))
            if ended is None:
                push = await self._mine(found)
                outcome = await self._close(push, _broken(push, told))
            else:
                outcome = ended.outcome
            return {"outcome": outcome.kind, "state": self.state, "message": outcome.message}

    # --- what may be asked now --------------------------------------------------------------

    def _free(self) -> None:
        """Refuse a client where the server is not for it now."""
        if not self._gate.started:
            raise RefusedError(503, "FP8-BUSY", "the engine warms up")
        if self._alone:
            raise RefusedError(409, "FP8-BUSY", f"{self._alone} is on its way")
        self._without_push()
        self.memory.require_weights()

    def _without_push(self) -> None:
        push = self._push
        if push is not None and not push.lapsed:
            told = f"update {push.begin.push} to version {push.begin.version} is on its way"
            raise RefusedError(409, "FP8-BUSY", told, data={"push": push.begin.push})

    async def _mine(self, found: Body) -> OpenPush:
        """Return the open update that a request is of."""
        await self._expire()
        name = found.get("push")
        if self._push is not None and self._push.begin.push == name:
            return self._push
        ended = self._ended.get(str(name))
        how = f"it has ended: {_told(ended.outcome)}" if ended else "it was not begun"
        raise RefusedError(409, "FP8-ORDER", f"{name!r:.80} is no open update: {how}")

    async def _expire(self) -> None:
        push = self._push
        if push is not None and push.lapsed:
            told = f"its client was not heard of for {push.begin.lease:g} s"
            await self._close(push, _broken(push, told))

    async def _watch(self, push: OpenPush) -> None:
        """End an update whose client is gone."""
        while self._push is push:
            left = push.heard + push.begin.lease - time.monotonic()
            await asyncio.sleep(max(left, min(1.0, push.begin.lease)))
            async with self._turn:
                if self._push is push:
                    await self._expire()

    # --- steps ------------------------------------------------------------------------------

    async def _open(self, begin: wire.Begin) -> OpenPush:
        """Close the gate and bring the engine to rest; note what it holds where that is asked."""
        self._push = push = OpenPush(begin, settled=self._gate.settled)
        self._gate.begin_update()
        push.serving += 1
        async with self._or_ends(push):
            with push.timed("hold"):
                await self._rest.hold(push.begin.in_flight, push.begin.within)
            # Where weights are mixed or missing, all must be sent.
            if push.begin.digests and push.settled == "ready":
                with push.timed("digests"):
                    held = await self._evidence.held()
                # What is not alike on all ranks must not be left out.
                alike = {n: one for n, one in (held or {}).items() if one.replicas_agree}
                push.held = None if held is None else alike
        return push

    async def _trust(self, names: Collection[str]) -> None:
        """Tell the ranks which tensors lie where they should: it makes the next update faster."""
        if self._connection.disk:
            return
        more = [name for name in names if name not in self._trusted]
        if more and not await quietly(self._workers.ask("trust", names=more)):
            self._trusted.update(more)

    async def _distrust(self) -> None:
        """Have the ranks count from nothing."""
        self._trusted.clear()
        await quietly(self._workers.ask("forget"))

    # --- the end of an update ---------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _or_ends(self, push: OpenPush, *, at_end: bool = False) -> AsyncIterator[None]:
        """End the update where what is inside fails; weights that may be mixed close the gate."""
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
            await self._close(push, _broken(push, refused.message))
            if at_end:
                self._ended[push.begin.push].answer = refused
            raise refused from e

    async def _close(self, push: OpenPush, outcome: Outcome) -> Outcome:
        """Let the engine compute again and settle the gate.

        Returns:
            The outcome; "failed" also where the engine could not be brought back.
        """
        if outcome.kind == "failed":
            await self._distrust()
        with push.timed("resume"):
            trouble = await self._rest.release(mixed=outcome.kind == "failed")
        if trouble:
            if outcome.kind != "failed":
                await self._distrust()
            told = f"the engine could not be brought back: {trouble}"
            outcome = Outcome("failed", message="; ".join(filter(None, (outcome.message, told))))
        if outcome.kind != "rejected":
            applied = outcome.kind == "applied"
            self._gate.about["version"] = (push.begin.version or None) if applied else None
        self._push = None
        self._ended.pop(push.begin.push, None)
        self._ended[push.begin.push] = _Ended(outcome, begun=push.begun is not None)
        while len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]
        self._gate.end_update(outcome)
        if self._watching is not None and self._watching is not asyncio.current_task():
            self._watching.cancel()
        self._watching = None
        await asyncio.to_thread(self.log.write, list(push.lines(outcome)))
        return outcome


def _brief(plan: Mapping[str, Any]) -> dict[str, object] | None:
    """Return what the state tells of the plan; None where the engine quantises itself."""
    keys = ("mode", "block_size", "recipe", "digest")
    return {key: plan.get(key) for key in keys} if plan else None


def _broken(push: OpenPush, why: str) -> Outcome:
    """Return how an update ends that goes no further."""
    return Outcome("failed" if push.touched else "rejected", message=why)


def _told(outcome: Outcome) -> str:
    return outcome.kind + (f" ({outcome.message})" if outcome.message else "")
