"""One update that is on its way: what it has brought, and what the log says of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fp8ctl.engines.hooks.evidence import Seen
    from fp8ctl.engines.hooks.gate import Outcome
    from fp8ctl.held import Held
    from fp8ctl.wire import Begin, Entry


class Taken:
    """The last two buckets that were taken: the client may ask again for both."""

    def __init__(self) -> None:
        self._answers: dict[int, tuple[object, dict[str, Any]]] = {}

    def add(self, number: int, request: object, answer: dict[str, Any]) -> None:
        """Remember what a bucket was answered, and forget the one before the last."""
        self._answers.pop(number - 2, None)
        self._answers[number] = request, answer

    def again(self, number: object, request: object) -> dict[str, Any] | None:
        """Return what this very bucket was answered; None where it is not one of the two."""
        before = self._answers.get(number) if type(number) is int else None
        if before is None or request != before[0]:
            return None
        return {**before[1], "repeated": True}


class Ending(NamedTuple):
    """An END that waits for the last bucket.

    Attributes:
        buckets: how many the update has.
        digests: of what the ranks hold are wanted.
        skips: it names what was left out.
    """

    buckets: int
    digests: bool
    skips: bool = False


@dataclass
class OpenPush:
    """An update between BEGIN and its end.

    Attributes:
        begin: what opened it.
        settled: the gate's state before.
        begun: the answer to BEGIN, once there is one.
        held: what the server held before, by name; None where nobody asked, or where nothing
            may be skipped.
        touched: True from when a weight may have been written.
        entries: what was loaded, by name.
        skipped: what the client left out because it is there.
        taken: what the last two buckets were answered.
        number: of the bucket that is expected next.
        ending: its END, where that has come before the last bucket was taken.
        seen: what the ranks told with the last bucket; None where they were not asked.
        moved: set when that is another, or the update is over.
        serving: requests of the client that are being worked off.
        heard: when the client was last heard of, on the monotonic clock.
        seconds: by stage, summed over buckets.
    """

    begin: Begin
    settled: str
    begun: dict[str, Any] | None = None
    held: Mapping[str, Held] | None = None
    touched: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    taken: Taken = field(default_factory=Taken)
    number: int = 0
    ending: Ending | None = None
    seen: Seen | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    serving: int = 0
    heard: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def lapsed(self) -> bool:
        """Whether the client was not heard of for as long as it said itself."""
        return not self.serving and time.monotonic() > self.heard + self.begin.lease

    def has_taken(self, request: object, answer: dict[str, Any]) -> None:
        """Expect the next bucket, or END."""
        self.taken.add(self.number, request, answer)
        self.number += 1
        self.moves()

    def moves(self) -> None:
        """Wake the requests that wait for their turn."""
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    def took(self, seconds: Mapping[str, float]) -> None:
        """Add to the time of each stage."""
        for stage, more in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + more

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that what is inside takes to a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.took({stage: time.monotonic() - started})

    def lines(self, outcome: Outcome, ended: float) -> Iterator[dict[str, object]]:
        """Yield the log's lines: each tensor, then the update.

        Args:
            outcome: how it ended.
            ended: when.
        """
        known = {name: one.text for name, one in (self.held or {}).items()}
        version = self.begin.version
        for entry in self.entries.values():
            yield {
                **entry.facts,
                "kind": "tensor",
                "version": version,
                "name": entry.name,
                "sent": True,
                "digest": entry.digest,
                "before": known.get(entry.name, ""),
                "bytes": entry.nbytes,
            }
        for name in self.skipped:
            same = known.get(name, "")
            yield {
                "kind": "tensor",
                "version": version,
                "name": name,
                "sent": False,
                "digest": same,
                "before": same,
                "bytes": 0,
            }
        yield {
            "kind": "update",
            "push": self.begin.push,
            "version": version,
            "outcome": outcome.kind,
            "tensors": len(self.entries),
            "skipped": len(self.skipped),
            "bytes": sum(entry.nbytes for entry in self.entries.values()),
            "buckets": self.number,
            "seconds": {stage: round(s, 6) for stage, s in self.seconds.items()},
            "started": self.started,
            "ended": ended,
            "message": outcome.message,
        }
