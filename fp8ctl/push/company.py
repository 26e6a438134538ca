"""The ranks of a trainer in one update: who gives, who is gone, and how it ended.

Where there is one process nothing here happens. Else the ranks meet before the first tensor and
hear the outcome at the end; in between they meet in the stream.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from fp8ctl import ranks as together
from fp8ctl.errors import Fp8ctlError
from fp8ctl.push.fleet import Heart

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.ranks import Ranks

#: Seconds until the source hears that another rank is gone, while it waits for servers.
HEARING = 0.25
#: Seconds that a rank takes at most to leave word.
_LEAVING = 1.0


class Company:
    """The ranks that go through one update together.

    Attributes:
        gives: whether this one quantises and talks to servers.
        begun: whether the ranks have met, so that the others come to the stream's meetings.
    """

    def __init__(self, ranks: Ranks | None, push: str, timeout: float) -> None:
        """Meet nobody yet.

        Args:
            ranks: all of them; None: there is one process.
            push: name of the update, on the source.
            timeout: seconds that anything with servers may take.
        """
        self.gives = ranks is None or ranks.is_source
        self.begun = False
        self._ranks, self._timeout = ranks, timeout
        #: Where a rank that is gone leaves word for the source; "" until all know.
        self._word = f"fp8ctl/{push}" if self.gives else ""
        self._ear: Heart | None = None
        self._called_off: Fp8ctlError | None = None
        self._deaf = False
        self._one_at_a_time = threading.Lock()
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
        self.begun = True
        if together.can_call_off(self._ranks):
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
        """Listen to nobody any more.

        What still looks is not waited for: the store has one connection for all groups of a
        process, and who waits for a key there keeps it from all others.
        """
        with self._one_at_a_time:
            self._deaf = True
        if self._ear is not None:
            self._ear.stop(wait=False)

    def tell(self, why: BaseException | None = None) -> None:
        """Tell the others how it ended; None: well."""
        if self._ranks is not None:
            together.tell(self._ranks, why)

    def _listen(self, stop: Callable[[Fp8ctlError], None]) -> None:
        if self._called_off is not None or self._ranks is None:
            return
        heard = together.called_off(self._ranks, self._word)
        with self._one_at_a_time:
            if heard is not None and not self._deaf:
                self._called_off = heard
                stop(heard)

    # ---- on the others ----

    def follow(self) -> None:
        """Wait until the source has found the servers able to.

        Raises:
            TimeoutError: it did not come.
            Fp8ctlError: it found something else.
        """
        assert self._ranks is not None
        self._word = together.meet(self._ranks, "more", patience=self._timeout)
        self.begun = True

    def hear(self) -> None:
        """Wait until the source says that it ended well.

        Raises:
            TimeoutError: it does not say it in time.
            Fp8ctlError: it ended otherwise.
        """
        assert self._ranks is not None
        together.tell(self._ranks, patience=2 * self._timeout)

    def call_off(self, why: BaseException) -> None:
        """Leave word for the source that this rank is gone, where it knows how; nothing on it."""
        if self.gives or self._ranks is None or not self._word:
            return
        # Aside: the store may be busy, and who asks may be an event loop.
        work = (self._ranks, self._word, why)
        leaving = threading.Thread(target=together.call_off, args=work, daemon=True)
        leaving.start()
        leaving.join(_LEAVING)

    # ---- on all ----

    def leave(self, why: BaseException) -> None:
        """Tell the others that nothing comes, at the meeting that they come to next."""
        if self._ranks is not None and self.begun:
            together.leave(self._ranks, why)

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
