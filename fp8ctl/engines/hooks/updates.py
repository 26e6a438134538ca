"""What clients ask of a server: connect, begin, buckets, end; all of it or nothing.

`Updates` knows no engine: it asks `workers.Workers`. An engine's server module makes one,

    updates = Updates(gate, workers, manifest.read(), device="cuda", folder=ranklog.run_dir())

and mounts `routes.PushRoutes(app, updates)`, an ASGI middleware, behind the gate and the API
key. A route of the engine's own that writes weights, or gives them up, runs inside

    async with updates.alone("/update_weights_from_disk"): ...

which raises `RefusedError` (409) while a push is open, and keeps pushes out meanwhile.

One request at a time has its turn; a BEGIN of a second client is refused at once. Buckets are
numbered from 0; a client may send one while the one before is on its way, and END while the last
one is. Every request is a sign of life, a repeated BEGIN too. No request may be
cancelled half-way: `routes` works each off to its end, so that one that is repeated finds the
first one's answer and never half of its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any

from fp8ctl import wire
from fp8ctl.engines.hooks import intake
from fp8ctl.engines.hooks.admission import Admission
from fp8ctl.engines.hooks.connection import Connection, read_offer
from fp8ctl.engines.hooks.evidence import Evidence
from fp8ctl.engines.hooks.expected import Expected
from fp8ctl.engines.hooks.gate import Outcome
from fp8ctl.engines.hooks.lists import Lists
from fp8ctl.engines.hooks.memory import Memory
from fp8ctl.engines.hooks.openpush import Ending
from fp8ctl.engines.hooks.pushlog import PushLog
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.session import Session, broken

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from pathlib import Path

    from fp8ctl.engines.hooks.gate import Gate
    from fp8ctl.engines.hooks.openpush import OpenPush
    from fp8ctl.engines.hooks.workers import Workers

    Body = dict[str, Any]

#: Seconds that a bucket, or END, waits for the bucket before it, before it is out of order.
PREDECESSOR = 60.0


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
        self._lists = Lists(self._expected)
        self._evidence = Evidence(workers, self._expected)
        self._session = Session(gate, workers, self._evidence, self.log)
        self._admission = Admission(gate, self._session, self.memory)
        self._connection = Connection(workers, gate.engine)
        gate.about.update(device=device, version=None, push=wire.PROTOCOL, plan=_brief(plan))
        gate.about["connection"] = ""

    @property
    def state(self) -> str:
        """Of the gate, now."""
        return self._gate.state

    @property
    def open(self) -> bool:
        """Whether a push is on its way."""
        return self._session.push is not None

    def hearing(self, push: object) -> AbstractContextManager[None]:
        """Surround a request: while it is worked off the client of `push` is alive."""
        return self._session.hearing(push)

    def alone(self, what: str) -> AbstractAsyncContextManager[None]:
        """Surround what else writes weights; as `Admission.alone`."""
        return self._admission.alone(what)

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
        async with self._admission.engines_turn:
            self._admission.require_free()
            async with self._session.turn:
                await self._session.expire()
                self._admission.require_free()
                name = f"reload-{uuid.uuid4().hex}"
                begin = wire.Begin(name, "", version="", manifest="", complete=False)
                push = await self._session.open(begin)
                async with self._session.or_ends(push):
                    self._session.trust.lost()
                    push.took(await intake.folder(self._workers, push, path))
                    with push.timed("settle"):
                        seen = await self._evidence.settle(push, digests=False)
                        missing, message = await self._evidence.missing(push, seen, folder=True)
                outcome = await self._session.close(push, Outcome("applied", missing, message))
        if outcome.kind != "applied":
            raise RefusedError(500, "FP8-ENGINE", outcome.message)
        return outcome

    # --- connection -------------------------------------------------------------------------

    async def connect(self, found: Body) -> Body:
        """Open a client's carrier in every rank; a connection before it is closed."""
        offer = read_offer(found)
        self._admission.require_free()
        async with self._session.turn:
            await self._session.expire()
            self._admission.require_free()
            self._lists.forgotten()  # with the connection before
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
        async with self._session.turn:
            self._connection.check(found.get("connection"))
            push = self._session.push
            if push is not None:
                await self._session.close(push, broken(push, "the client disconnected"))
            await self._connection.close()
            self._gate.about["connection"] = ""
            return {"connection": found["connection"]}

    # --- an update --------------------------------------------------------------------------

    async def begin(self, found: Body) -> Body:
        """Close the gate, bring the engine to rest, open an update."""
        begin = wire.Begin.from_json(found)
        if not (0 < begin.lease < 1e6 and 0 <= begin.within < 1e6):
            raise wire.WireError(f"lease {begin.lease}, within {begin.within}: expected seconds")
        if not self._is_open(begin.push):
            self._admission.require_free()
        async with self._session.turn:
            push = self._session.push
            if push is not None and push.begin.push == begin.push:
                if push.begin != begin or push.begun is None:
                    raise RefusedError(409, "FP8-ORDER", f"{begin.push} was begun otherwise")
                return push.begun
            await self._session.expire()
            self._admission.require_free()
            ended = self._session.past.of(begin.push)
            if ended is not None and ended.begun:
                raise RefusedError(409, "FP8-ORDER", f"{begin.push} has ended: {ended.told}")
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
            push = await self._session.open(begin)
            push.begun = {
                "push": begin.push,
                "ranks": self._workers.ranks,
                "version": before,
                "state": push.settled,
                "digests": push.held and {name: one.text for name, one in push.held.items()},
            }
            self._session.watch(push)
            return push.begun

    async def bucket(self, found: Body) -> Body:
        """Load one bucket, after all of it was compared with the plan."""
        number = found.get("number")
        await _predecessor(self._early(found, number))
        request = {k: v for k, v in found.items() if k != "push"}
        async with self._session.turn:
            ended = self._session.past.of(found.get("push"))
            if ended is not None and ended.answer is not None:
                # END may overtake the answer to the last bucket, and that may be lost.
                again = ended.taken.again(number, request)
                if again is not None:
                    return again
            push = await self._mine(found)
            if type(number) is not int:
                raise RefusedError(409, "FP8-ORDER", f"bucket {number!r:.40}; expected a number")
            again = push.taken.again(number, request)
            if again is not None:
                return again
            if number != push.number:
                raise RefusedError(
                    409,
                    "FP8-ORDER",
                    f"bucket {number}; expected {push.number}"
                    + (", or the one before again as it was" if push.number else ""),
                )
            async with self._session.or_ends(push):
                if push.seen is not None and push.seen.resumed:
                    told = f"bucket {number}; the one before was the last, and the engine computes"
                    raise RefusedError(409, "FP8-ORDER", told)
                if self._connection.disk:
                    entries = intake.read(found, disk=True)
                    self._expected.check(entries, push.entries)
                    self._session.trust.lost()  # the engine's own reload: the ranks lose it, too
                    loaded = await intake.load(self._workers, push, found, None)
                else:
                    entries = self._lists.read(found, push.entries)
                    then = None
                    ending = push.ending
                    if ending is not None and ending.buckets == number + 1:
                        all_ = {**push.entries, **{entry.name: entry for entry in entries}}
                        # What is left out is looked at when END is worked off.
                        goes_on = not ending.skips and self._session.trust.has(all_)
                        then = self._evidence.asked(
                            push, all_, digests=ending.digests, goes_on=goes_on
                        )
                    with self._lists.telling(number) as listed:
                        loaded = await intake.load(self._workers, push, found, listed, then)
                push.seen = self._evidence.seen(loaded.then) if loaded.then else None
                push.entries.update((entry.name, entry) for entry in entries)
                answer = {"number": number, **loaded.told}
                push.has_taken(request, answer)
                push.took(loaded.told["seconds"])
            return answer

    def _early(self, found: Body, number: object) -> OpenPush | None:
        """Return the update of a request that comes before the bucket before it was taken.

        Args:
            found: the request.
            number: of its bucket; of END that of the bucket that would be next.
        """
        push = self._session.push
        if push is None or push.begin.push != found.get("push") or type(number) is not int:
            return None
        return push if number == push.number + 1 else None

    async def end(self, found: Body) -> Body:
        """Take an update as complete, prove what the ranks hold, open the gate."""
        skipped, verify = found.get("skipped", []), found.get("verify", True)
        if not isinstance(skipped, list) or not all(isinstance(n, str) for n in skipped):
            raise wire.WireError("skipped: expected a list of names")
        early = self._early(found, found.get("buckets"))
        if early is not None:  # ranks are asked for what its end wants with their last bucket
            early.ending = Ending(early.number + 1, bool(verify), bool(skipped))
        await _predecessor(early)
        async with self._session.turn:
            ended = self._session.past.of(found.get("push"))
            if ended is not None and ended.answer is not None:
                if isinstance(ended.answer, RefusedError):
                    raise ended.answer
                return ended.answer
            push = await self._mine(found)
            if found.get("buckets") != push.number:
                push.ending = None  # a bucket that comes now is not the last
                told = f"{found.get('buckets')!r} buckets were sent; {push.number} arrived"
                raise RefusedError(409, "FP8-ORDER", told)
            push.skipped = tuple(skipped)
            async with self._session.or_ends(push, at_end=True):
                goes_on = self._session.trust.has([*push.entries, *push.skipped])
                with push.timed("settle"):
                    seen = await self._evidence.settle(push, digests=bool(verify), goes_on=goes_on)
                with push.timed("verify"):
                    missing, message = await self._evidence.missing(push, seen)
                    equal = self._evidence.equal(push, seen)
            # The engine's own reload: ranks trust none of it.
            proven = () if self._connection.disk else equal or ()
            applied = Outcome("applied", missing, message)
            outcome = await self._session.close(push, applied, proven, resumed=seen.resumed)
            if outcome.kind != "applied":
                refused = RefusedError(500, "FP8-ENGINE", outcome.message)
                self._session.past.answered(push, refused)
                raise refused
            answer = {
                "outcome": outcome.kind,
                "state": self.state,
                "version": push.begin.version,
                "missing": missing,
                "message": message,
                "verified": None if equal is None else len(equal),
                "seconds": push.seconds,
            }
            self._session.past.answered(push, answer)
            return answer

    async def abort(self, found: Body) -> Body:
        """End an update whose client gives up; one that still waits for requests at once."""
        name, told = found.get("push"), f"aborted: {str(found.get('reason', ''))[:500]}"
        if self._is_open(name):
            self._session.rest.cancel()
        async with self._session.turn:
            ended = self._session.past.of(name)
            if ended is None:
                push = await self._mine(found)
                outcome = await self._session.close(push, broken(push, told))
            else:
                outcome = ended.outcome
            return {"outcome": outcome.kind, "state": self.state, "message": outcome.message}

    # --- of which update it is ---------------------------------------------------------------

    def _is_open(self, name: object) -> bool:
        push = self._session.push
        return push is not None and push.begin.push == name

    async def _mine(self, found: Body) -> OpenPush:
        """Return the open update that a request is of."""
        await self._session.expire()
        name = found.get("push")
        push = self._session.push
        if push is not None and push.begin.push == name:
            return push
        ended = self._session.past.of(name)
        how = f"it has ended: {ended.told}" if ended else "it was not begun"
        raise RefusedError(409, "FP8-ORDER", f"{name!r:.80} is no open update: {how}")


async def _predecessor(push: OpenPush | None) -> None:
    """Wait until the bucket before a request that is `early` has been taken.

    They come by two connections, so that the ranks need not wait for the client's next.
    """
    if push is not None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(push.moved.wait(), PREDECESSOR)


def _brief(plan: Mapping[str, Any]) -> dict[str, object] | None:
    """Return what the state tells of the plan; None where the engine quantises itself."""
    keys = ("mode", "block_size", "recipe", "digest")
    return {key: plan.get(key) for key in keys} if plan else None
