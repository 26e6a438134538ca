"""What lies where in buckets, as the ranks of a test's server are told it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    Entries = Sequence[dict[str, Any]]


class Listed:
    """Lists by their names: each is told once."""

    def __init__(self) -> None:
        self._known: dict[str, Entries] = {}

    def entries(self, asked: dict[str, Any]) -> Entries:
        """Return the entries of a question "receive", which may have their name alone."""
        name: str = asked["list"]
        found: Entries = asked.get("entries") or self._known[name]
        self._known[name] = found
        return found
