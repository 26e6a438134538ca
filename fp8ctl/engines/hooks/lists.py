"""What lies where in a bucket: read, compared with the plan and told to the ranks once.

Most updates bring the same tensors at the same places of the same buckets; only digests and
facts are others. So a list that comes again is known by one comparison, and ranks are told the
name that it was given.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ctl.engines.hooks import intake
from fp8ctl.wire import NO_FACTS, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fp8ctl.engines.hooks.expected import Expected

#: What a list says of a tensor at every update, and ranks are told.
_PLACE = ("name", "dtype", "shape", "offset")
_Place = tuple[str, str, list[int], int]


class _List(NamedTuple):
    """A list that the plan takes.

    Attributes:
        nbytes: of the bucket.
        places: as the request has them.
        entries: as they were read.
        name: that ranks know it by.
    """

    nbytes: int
    places: list[_Place]
    entries: list[Entry]
    name: str

    def again(self, found: Mapping[str, Any]) -> list[Entry] | None:
        """Return the entries of a request that has this list; None where it may be another."""
        try:
            listed = found["entries"]
            if found["nbytes"] != self.nbytes or [_place(one) for one in listed] != self.places:
                return None
            digests = [one.get("digest", "") for one in listed]
            facts = [dict(one["facts"]) if one.get("facts") else NO_FACTS for one in listed]
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        if not {str}.issuperset(map(type, digests)):
            return None
        more = zip(self.entries, digests, facts, strict=True)
        return [Entry(*old[:4], digest, fact) for old, digest, fact in more]


class Lists:
    """The lists of one server's buckets, by the bucket's number."""

    def __init__(self, expected: Expected) -> None:
        """Know none.

        Args:
            expected: of this server.
        """
        self._expected = expected
        self._known: dict[int, _List] = {}
        self._told: dict[int, str] = {}
        self._names = map(str, itertools.count())

    def read(self, found: Mapping[str, Any], sent: Mapping[str, Entry]) -> list[Entry]:
        """Return the entries of a bucket.

        Args:
            found: the request; its number is one.
            sent: what this update has brought before.

        Raises:
            WireError: it does not say what it should.
            RefusedError: it does not bring what the plan says.
        """
        intake.require_place(found)
        known = self._known.get(found["number"])
        again = known.again(found) if known is not None else None
        if again is not None and sent.keys().isdisjoint(entry.name for entry in again):
            return again
        entries = intake.read(found, disk=False)
        self._expected.check(entries, sent)
        places = [_place(one) for one in found["entries"]]
        self._known[found["number"]] = _List(found["nbytes"], places, entries, next(self._names))
        return entries

    @contextlib.contextmanager
    def telling(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield what ranks are told of the list of a bucket that was read.

        When it ends well they all have that list; where it does not they may have none at all.
        """
        one = self._known[number]
        told, self._told = self._told, {}
        if told.get(number) == one.name:
            yield {"list": one.name}
        else:
            entries = [dict(zip(_PLACE, place, strict=True)) for place in one.places]
            yield {"list": one.name, "entries": entries}
        self._told = {**told, number: one.name}

    def forgotten(self) -> None:
        """Note that a rank may have no list any more."""
        self._told.clear()


def _place(one: Mapping[str, Any]) -> _Place:
    return one["name"], one["dtype"], one["shape"], one["offset"]
