"""The ranks of a trainer in one update: who gives, who is gone, and how it ended.

Where there is one process nothing here happens. Else the ranks meet before the first tensor and
hear the outcome at the end; in between they meet in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from fp8ctl import ranks as together
from fp8ctl.errors import Fp8ctlError
from fp8ctl.push.fleet import Heart

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.ranks import Ranks

#: Seconds until the source hears that another rank was cancelled, while it waits for servers.
HEARING = 0.25


class Company:
    """The ranks that go through one update together.

    Attributes:
        gives: whether this one quantises and talks to servers.
    """

    def __init__(self, ranks: Ranks | None, push: str, timeout: float) -> None:
        """Meet nobody yet.

        Args:
            ranks: all of them; None: there is one process.
            push: name of the update, on the source.
            timeout: seconds that anything with servers may take.
        """
        self.gives = ranks is None or ranks.is_source
        self._ranks, self._timeout = ranks, timeout
        #: Where a rank that is cancelled leaves word for the source; "" until all know.
        self._word = f"fp8ctl/{push}" if self.gives else ""
        self._ear: Heart | None = None
        self._called_off: Fp8ctlError | None = None
        self._concluding = False

    # ---- on the source ----

    def begin(self, stop: Callable[[Fp8ctlError], None]) -> None:
        """Have the others begin, when the servers are able to.

        Args:
            stop: ends what waits for servers, when another rank has called the update off.
        """
        if self._ranks is None:
            return
        together.meet(self._ranks, "more", note=self._word)
        self._ear = Heart(lambda: self._listen(stop), HEARING)

    def unable(self, why: BaseException) -> None:
        """Tell the others that nothing begins."""
        if self._ranks is not None:
            together.leave(self._ranks, why)

    def require_all(self) -> None:
        """Listen to nobody any more: from here on it is too late to call it off.

        Raises:
            Fp8ctlError: somebody has.
        """
        self.deafen()
        if self._called_off is not None:
            raise self._called_off

    def deafen(self) -> None:
        """Listen to nobody any more."""
        if self._ear is not None:
            self._ear.stop()

    def tell(self, why: BaseException | None = None) -> None:
        """Tell the others how it ended; None: well."""
        if self._ranks is not None:
            together.tell(self._ranks, why)

    def _listen(self, stop: Callable[[Fp8ctlError], None]) -> None:
        if self._called_off is None and self._ranks is not None:
            self._called_off = together.called_off(self._ranks, self._word)
            if self._called_off is not None:
                stop(self._called_off)

    # ---- on the others ----

    def follow(self) -> None:
        """Wait until the source has found the servers able to.

        Raises:
            TimeoutError: it did not come.
            Fp8ctlError: it found something else.
        """
        assert self._ranks is not None
        self._word = together.meet(self._ranks, "more", patience=self._timeout)

    def hear(self) -> None:
        """Wait until the source says that it ended well.

        Raises:
            TimeoutError: it does not say it in time.
            Fp8ctlError: it ended otherwise.
        """
        assert self._ranks is not None
        together.tell(self._ranks, patience=2 * self._timeout)

    def call_off(self) -> None:
        """Leave word for the source that this rank was cancelled, where it knows how."""
        if self._ranks is not None and self._word:
            error = asyncio.CancelledError("the update was cancelled there")
            together.call_off(self._ranks, self._word, error)

    # ---- on all ----

    def conclude(self) -> None:
        """Note that this rank will tell, or hear, the outcome."""
        self._concluding = True

    def part(self, why: BaseException) -> None:
        """Say how it ended, or hear it: all tensors have come, so that the others wait for it."""
        if self._ranks is None or self._concluding:
            return
        with contextlib.suppress(TimeoutError, Fp8ctlError):
            if self.gives:
                self.tell(why)
            else:
                self.hear()
