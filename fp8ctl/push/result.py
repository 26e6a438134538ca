"""What an update tells of itself: while it runs, and when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.carriers.sent import Carrier


@dataclass(frozen=True)
class Progress:
    """How far an update is.

    Attributes:
        tensors, nbytes: that the servers were sent, or hold already; scales count as tensors.
        total_tensors, total_bytes: of the plan; None where there is none.
        buckets: sent until now.
    """

    tensors: int
    nbytes: int
    total_tensors: int | None
    total_bytes: int | None
    buckets: int


@dataclass(frozen=True)
class Update:
    """How an update ended: all servers serve these weights.

    Attributes:
        version: as the trainer calls it.
        push: the update's own name, as the servers' logs have it.
        servers: their addresses; empty on ranks that are not the source.
        buckets: how many requests brought the weights to each server.
        sent, skipped: tensors, a scale counting as one; skipped are those that all servers held.
        bytes_sent, bytes_skipped: of them, once, whatever the number of servers.
        carrier: what carried the bytes; None on ranks that are not the source.
        stages: seconds of `gather` (from all ranks, from another device or dtype), `quantise`,
            `digest` (with facts and the search for NaN in what is kept), `wait` (for servers that
            take buckets, carriers included), `write` (via disk), `end`, and `total`.
        loading: seconds by stage as each server tells them, by its address.
        verified: tensors whose digest the servers found equal; None where not asked.
    """

    version: str
    push: str = ""
    servers: tuple[str, ...] = ()
    buckets: int = 0
    sent: int = 0
    skipped: int = 0
    bytes_sent: int = 0
    bytes_skipped: int = 0
    carrier: Carrier | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    loading: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    verified: int | None = None

    @property
    def fraction_skipped(self) -> float:
        """The part of the bytes that did not have to be sent."""
        total = self.bytes_sent + self.bytes_skipped
        return self.bytes_skipped / total if total else 0.0

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON types."""
        return {
            "version": self.version,
            "push": self.push,
            "servers": list(self.servers),
            "buckets": self.buckets,
            "sent": self.sent,
            "skipped": self.skipped,
            "bytes_sent": self.bytes_sent,
            "bytes_skipped": self.bytes_skipped,
            "fraction_skipped": round(self.fraction_skipped, 6),
            "carrier": None if self.carrier is None else self.carrier._asdict(),
            "stages": {stage: round(s, 6) for stage, s in self.stages.items()},
            "loading": {url: dict(stages) for url, stages in self.loading.items()},
            "verified": self.verified,
        }
