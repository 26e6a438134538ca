"""Updates that are over, for clients that did not get the last answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks.openpush import Taken

if TYPE_CHECKING:
    from fp8ctl.engines.hooks.gate import Outcome
    from fp8ctl.engines.hooks.openpush import OpenPush
    from fp8ctl.engines.hooks.refused import RefusedError

#: How many are remembered.
REMEMBERED = 16


@dataclass
class Ended:
    """An update that is over.

    Attributes:
        begun: whether its BEGIN succeeded.
        taken: what its last buckets were answered; of the last update alone, the client of an
            earlier one has gone on.
        answer: to its END; None where it ended otherwise.
    """

    outcome: Outcome
    begun: bool
    taken: Taken
    answer: dict[str, Any] | RefusedError | None = None

    @property
    def told(self) -> str:
        """How it ended, in words."""
        return self.outcome.kind + (f" ({self.outcome.message})" if self.outcome.message else "")


class Past:
    """The last updates of one server, by name."""

    def __init__(self) -> None:
        self._ended: dict[str, Ended] = {}

    def of(self, name: object) -> Ended | None:
        """Return how the update of this name ended; None where nobody remembers one."""
        return self._ended.get(str(name))

    def add(self, push: OpenPush, outcome: Outcome) -> None:
        """Remember one; a name that comes again is that of the last."""
        self._ended.pop(push.begin.push, None)
        for one in self._ended.values():
            one.taken = Taken()
        self._ended[push.begin.push] = Ended(outcome, push.begun is not None, push.taken)
        while len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def answered(self, push: OpenPush, answer: dict[str, Any] | RefusedError) -> None:
        """Remember what the END of an update that is over was answered."""
        self._ended[push.begin.push].answer = answer
