"""What the ranks hold when a push ends: is all of it there, and is it what was sent?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ctl.engines.hooks.expected import CODES
from fp8ctl.engines.hooks.refused import RefusedError
from fp8ctl.engines.hooks.shards import FUSED
from fp8ctl.held import Layouts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.engines.hooks.expected import Expected
    from fp8ctl.engines.hooks.openpush import OpenPush
    from fp8ctl.engines.hooks.workers import Workers
    from fp8ctl.held import Gathered, Held
    from fp8ctl.wire import Entry

_HEAD = "lm_head.weight"
#: What a client sends that no parameter has the name of: a tied head, a table that is computed.
_UNASKED = (_HEAD, ".rotary_emb.inv_freq")


class Digests(NamedTuple):
    """What all ranks hold.

    Attributes:
        held: by name.
        plain: all ranks show it as the checkpoint has it.
    """

    held: Gathered
    plain: bool

    @property
    def checkpoint(self) -> Gathered | None:
        """What is held; None where a rank holds it in a kernel's own form."""
        return self.held if self.plain else None


class Seen(NamedTuple):
    """What the ranks told when an update was settled.

    Attributes:
        lacking: how many tensors the rank misses that has least.
        names: of some of them.
        digests: of all that is held; None where nobody asked.
        resumed: the one rank holds what was sent, and computes again.
    """

    lacking: int
    names: list[str]
    digests: Digests | None
    resumed: bool = False


class Evidence:
    """Asks the ranks, and compares with the plan and with what was sent."""

    def __init__(self, workers: Workers, expected: Expected) -> None:
        self._workers = workers
        self._expected = expected
        self._layouts = Layouts()

    async def held(self) -> Gathered | None:
        """Return what all ranks hold; None where they hold it in a kernel's own form."""
        return (await self._digests()).checkpoint

    async def _digests(self) -> Digests:
        known = self._layouts.known
        return self._gathered(
            await self._workers.ask("digests", **({"layouts": known} if known else {}))
        )

    def _gathered(self, ranks: Sequence[Mapping[str, Any]]) -> Digests:
        plain = all(rank["format"] == "checkpoint" for rank in ranks)
        return Digests(self._layouts.gather(ranks), plain)

    async def settle(self, push: OpenPush, *, digests: bool, goes_on: bool = False) -> Seen:
        """Have the ranks bring up to date what they derive from weights, and forget their caches.

        One question to them, however much it is to tell; none where nothing was written and no
        digests are wanted.

        Args:
            push: that ends.
            digests: of what the ranks hold are wanted.
            goes_on: as `asked` takes it.

        Raises:
            RefusedError: something that was skipped may not be there, or a rank broke off.
        """
        known = push.held or {}
        stray = [n for n in push.skipped if n not in known or n in push.entries]
        if stray:
            told = f"{stray[0]} was skipped, and its digest was not told or it was sent"
            raise RefusedError(422, "FP8-INCOMPLETE", told, data={"names": stray[:20]})
        seen = push.seen
        # One that has gone on by itself could not forget its caches a second time.
        if seen is not None and (seen.resumed or digests == (seen.digests is not None)):
            return seen
        if not push.touched:
            return Seen(0, [], await self._digests() if digests else None)
        asked = self.asked(push, push.entries, digests=digests, goes_on=goes_on)
        return self.seen(await self._workers.settle(**asked))

    def asked(
        self, push: OpenPush, entries: Mapping[str, Entry], *, digests: bool, goes_on: bool = False
    ) -> dict[str, Any]:
        """Return what ranks are asked with the last bucket of an update, or after it.

        Args:
            push: that ends.
            entries: of all that it has brought.
            digests: of what the ranks hold are wanted.
            goes_on: they trust all of it already: a rank that is the only one may compute again
                as soon as it holds what was sent, if that is all that is to be seen.
        """
        # Whoever has all weights in place may send a part; a complete update says it itself.
        needed = push.settled != "ready" and not push.begin.complete
        expected = self._expected.missing(()) if needed else []
        asked: dict[str, Any] = {"expected": expected}
        if not digests:
            return asked
        asked["layouts"] = self._layouts.known
        if goes_on and not needed and self._workers.ranks == 1:
            missing = self._expected.missing({*entries, *push.skipped})
            known = bool(self._expected.tensors) and not missing
            if known or not push.begin.complete:
                sums = self._layouts.sums(self._wanted(push, entries))
                asked |= {"sums": sums} if sums else {}
        return asked

    def _wanted(self, push: OpenPush, entries: Mapping[str, Entry]) -> dict[str, tuple[str, str]]:
        """Return dtype and digest of all that was sent, or left out because it is there."""
        wanted = {n: (e.dtype, e.digest) for n, e in entries.items() if e.digest}
        for name in push.skipped:
            one = (push.held or {})[name]
            wanted[name] = (one.dtype, one.text)
        return wanted

    def seen(self, answers: Sequence[Mapping[str, Any]]) -> Seen:
        """Return what all ranks answered to that.

        Raises:
            RefusedError: a rank broke off.
        """
        if any(a["broken"] for a in answers):
            raise RefusedError(500, "FP8-LOAD", "a rank broke off half-way through its weights")
        told = [a["digests"] for a in answers if "digests" in a]
        resumed = all(a.get("resumed") for a in answers)
        return Seen(*worst(answers), self._gathered(told) if told else None, resumed)

    async def missing(self, push: OpenPush, seen: Seen, *, folder: bool = False) -> tuple[int, str]:
        """Return how much is missing after an update that is not said to be complete, and what.

        Args:
            push: that ends.
            seen: when it was settled.
            folder: a checkpoint was loaded: without a plan it counts as all there is.

        Raises:
            RefusedError: the update is said to be complete and is not.
        """
        whole = push.begin.complete
        count, names = seen.lacking, seen.names
        if whole:
            unsent = await self._not_sent(push, seen)
            count, names = count + len(unsent), [*unsent, *names]
        if count:
            told = f"{count} tensors have not arrived, such as {names[0]}"
            if whole:
                data: dict[str, object] = {"names": names[:20], "count": count}
                raise RefusedError(422, "FP8-INCOMPLETE", told, data=data)
            return count, told
        if whole or folder or push.settled == "ready" or self._expected.tensors:
            return 0, ""
        return 1, "without a plan only a complete update makes the weights whole again"

    async def _not_sent(self, push: OpenPush, seen: Seen) -> list[str]:
        """Return the names that a complete update should have brought, or skipped, and did not."""
        there = {*push.entries, *push.skipped}
        if self._expected.tensors:
            missing = self._expected.missing(there)
            if missing:  # a tied head, a layer that this engine leaves out
                held = (seen.digests or await self._digests()).checkpoint
                nowhere = self._expected.held_nowhere(missing, held) if held else set()
                missing = [name for name in missing if name not in nowhere]
            return missing
        return await self._not_sent_unplanned(there, seen, sure=push.settled != "ready")

    async def _not_sent_unplanned(self, there: set[str], seen: Seen, *, sure: bool) -> list[str]:
        """Return what the ranks hold and was not sent: the engine quantises, and there is no plan.

        Args:
            there: what was sent.
            seen: when the update was settled.
            sure: weights are mixed, so that everything must have been sent; otherwise names that
                the engine has no parameter for say that its names are not the checkpoint's.
        """
        answers = await self._workers.ask("names")
        held = list(dict.fromkeys(name for a in answers for name in a["names"]))
        same: dict[str, str] = {n: other for a in answers for n, other in a["same"].items()}
        known = {*held, *(whole for name in held for whole in _fused(name))}
        if not sure and any(n not in known and not n.endswith(_UNASKED) for n in there):
            return []
        came = {same.get(name, name) for name in there}
        missing = [
            name
            for name in held
            if same.get(name, name) not in came and not _fused(name) & there
            if "_scale" not in name
        ]
        # vLLM may name a tied head beside the embedding that it is, and nobody sends it.
        if any(name.endswith(_HEAD) for name in missing):
            digests = (seen.digests or await self._digests()).held
            sent = {(digests[n].dtype, digests[n].digest) for n in there if n in digests}
            missing = [
                n
                for n in missing
                if not (n.endswith(_HEAD) and (digests[n].dtype, digests[n].digest) in sent)
            ]
        return missing

    def equal(self, push: OpenPush, seen: Seen) -> list[str] | None:
        """Return the names of what is held as it was sent; None where nobody can see that.

        Raises:
            RefusedError: something is not what was sent.
        """
        held = seen.digests and seen.digests.checkpoint
        if held is None:
            return None
        wanted = self._wanted(push, push.entries)
        if held.are(wanted):
            return [*wanted]
        found = compare(wanted, self._expected, held)
        if found is None:
            return None
        equal, unequal = found
        if unequal:
            told = f"{len(unequal)} tensors are not what was sent, such as {unequal[0]}"
            data: dict[str, object] = {"names": unequal[:20], "count": len(unequal)}
            raise RefusedError(500, "FP8-UNEQUAL", told, data=data)
        return equal


def worst(answers: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """Return how much the rank that lacks most of its weights misses, and some names.

    Args:
        answers: of all ranks, to "progress".
    """
    told = max(answers, key=lambda a: int(a["missing_count"]) + len(a["unfilled"]))
    count = int(told["missing_count"]) + len(told["unfilled"])
    return count, [*told["missing"], *told["unfilled"]]


def _fused(name: str) -> set[str]:
    """Return the tensors of a checkpoint that may hold this part of a fused module."""
    module, _, attribute = name.rpartition(".")
    parent, _, part = module.rpartition(".")
    return {
        ".".join(filter(None, (parent, whole, attribute)))
        for whole, parts in FUSED.items()
        if part in parts
    }


def compare(
    wanted: Mapping[str, tuple[str, str]], expected: Expected, held: Mapping[str, Held]
) -> tuple[list[str], list[str]] | None:
    """Compare what ranks hold with what was sent.

    Args:
        wanted: by name, dtype and digest.
        expected: of this server.
        held: of all ranks together.

    Returns:
        The names of those that are equal, and of those that are not. A kept tensor that the
        engine holds in another dtype, or not at all, is neither. None where codes lie under
        names that are not the checkpoint's, so that nothing can be said.
    """
    equal, unequal = [], []
    for name, (dtype, digest) in wanted.items():
        one = held.get(name)
        if one is None or one.dtype != dtype:
            tensor = expected.tensors.get(name)
            if tensor is not None and tensor.quantized:
                unequal.append(name)
        elif one.text == digest and one.replicas_agree:
            equal.append(name)
        else:
            unequal.append(name)
    if unequal and not any(name in held for name in unequal):
        strays = (CODES in one.dtype and n not in expected.tensors for n, one in held.items())
        if any(strays):
            return None
    return equal, unequal
