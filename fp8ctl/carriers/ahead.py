"""A rank's end of a group: a thread takes each bucket when the trainer gives it.

So the next one is on its way while the last is loaded, and while the server is asked to load
it. The trainer is told which slots have room, and may give the next bucket while one is on its
way: it follows on the device. Buckets are handed on in order: when their bytes are there, or to
who has its device wait for them as soon as they are on their way.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from fp8ctl.carriers import link, turns
from fp8ctl.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from fp8ctl.carriers.sent import Launched

#: Seconds after a bucket in which another one is likely.
_SOON = 1.0
#: Part of what the quickest bucket took, for its size, before which another is not expected; and
#: by how much it may have been too quick.
_EARLY, _SLOWER = 0.8, 1.2
#: Seconds between two looks until then: a small bucket says little of a large one.
_SELDOM = 0.0005
#: Seconds in which the first bucket of an update comes after the trainer has said so.
_FIRST = 0.005
#: Seconds that the thread gets to end; what holds it longer ends by its own time-out.
_LEAVING = 15.0


class Backend(Protocol):
    """What carries the bytes.

    Attributes:
        pulled: ranks take them out of the trainer's slot themselves. Its device has to have
            written it before they are told, and it is in use until all of them have the bucket.
    """

    pulled: bool

    def broadcast(
        self, tensor: torch.Tensor, after: Any, deadline: float, check: Callable[[], None]
    ) -> Launched:
        """Launch it: the tensor is given, or got.

        Args:
            tensor: the whole of it.
            after: an event of the device that comes first; None: nothing does.
            deadline: of time.monotonic(), for launching it.
            check: raises where nobody wants it any more.
        """
        ...

    def warm(self) -> None:
        """Have the device ready: a bucket will come in a moment. Fails for nobody."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class _Coming:
    """A bucket that is on its way, or here."""

    def __init__(self, slot: int, nbytes: int, launched: Launched) -> None:
        self.slot, self.nbytes, self.launched = slot, nbytes, launched
        self.here = False


class Ahead:
    """The buckets of one rank; owns the connection and the backend, and closes both."""

    def __init__(
        self,
        line: link.Line,
        backend: Backend,
        slots: Sequence[torch.Tensor],
        after: Any,
        timeout: float,
    ) -> None:
        """Begin to listen.

        Args:
            line: to the trainer, which has opened the group.
            backend: of the group.
            slots: this rank's own memory.
            after: an event of the device that comes before the first use of it; None: nothing.
            timeout: seconds that a bucket may take.
        """
        self._line, self._backend, self._slots = line, backend, [*slots]
        self._timeout = timeout
        #: What the trainer said while something was launched.
        self._said: deque[link.Message] = deque()
        #: What is not here yet; the thread's own.
        self._flying: deque[_Coming] = deque()
        #: When the first of these became that; the seconds that a byte takes, rather too few.
        self._since = self._pace = 0.0
        #: It was looked for in vain.
        self._awaited = False
        #: Until when a bucket is awaited without sleep.
        self._awake = 0.0
        self._changed = threading.Condition()
        #: What was not taken yet, and what was before it was here.
        self._untaken: deque[_Coming] = deque()
        self._unsure: list[_Coming] = []
        #: Slots that may be written, and the event of the device that is to come first.
        self._free: dict[int, Any] = {}
        #: Why there are no more. Words: an exception would keep what its frames hold, the slots.
        self._why = ""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fp8ctl-push-take", daemon=True)
        self._thread.start()
        for slot in range(len(self._slots)):
            self.free(slot, after)

    def take(self, slot: int, nbytes: int, *, here: bool = True) -> Any:
        """Wait until the next bucket has come, which has to be this one.

        Args:
            slot, nbytes: of it.
            here: False: it may be on its way, where the device can wait for it.

        Returns:
            The event of the device that it is here with; None: it is.

        Raises:
            ConflictError: it is another one, or the group has ended.
            TimeoutError: it does not come.
        """

        def there() -> bool:
            if not self._untaken:
                return False
            first = self._untaken[0]
            can_wait = first.launched.done is not None and not self._why
            return first.here or (can_wait and not here)

        with self._changed:
            if not self._changed.wait_for(lambda: there() or bool(self._why), self._timeout):
                raise TimeoutError("the trainer did not give the bucket in time")
            if there():
                given = self._untaken.popleft()
                if (given.slot, given.nbytes) == (slot, nbytes):
                    if given.here:
                        return None
                    self._unsure.append(given)
                    return given.launched.done
                asked = f"asked for slot {slot} with {nbytes} bytes"
                gave = given.slot, given.nbytes
                self._why = self._why or f"{asked}, and the trainer gave {gave}"
            raise ConflictError(self._why)

    def arrived(self) -> None:
        """Wait until all that was taken is here.

        Raises:
            ConflictError: the group has ended before.
            TimeoutError: it does not come.
        """
        with self._changed:

            def all_here() -> bool:
                return all(one.here for one in self._unsure)

            if not self._changed.wait_for(lambda: all_here() or bool(self._why), self._timeout):
                raise TimeoutError("a bucket did not come in time")
            if not all_here():
                raise ConflictError(self._why)
            self._unsure.clear()

    def free(self, slot: int, after: Any) -> None:
        """Let the slot be written again, when the device has reached the event `after`."""
        with self._changed:
            self._free[slot] = after
            with contextlib.suppress(ConflictError):  # the thread hears of it, too
                self._line.say(room=slot)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group; the trainer is told an error."""
        with self._changed:
            self._closing = True
            self._why = self._why or "the group has ended: connect anew"
            self._changed.notify_all()
            if error is not None:
                self._say_failed(error)
        # Who lends its memory hears of the end when nothing of it is read any more.
        self._line.end(quietly=self._backend.pulled)
        self._thread.join(_LEAVING)

    # --- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._some(self._line.hear(None))
        except BaseException as e:  # noqa: BLE001 - who waits for a bucket is told
            # What ends the group may have come together with the end of a bucket.
            with contextlib.suppress(Exception):
                while self._flying and self._hand_on():
                    pass
            with self._changed:
                if not self._closing:
                    self._say_failed(e)
                kind = "" if isinstance(e, ConflictError) else f"{type(e).__name__}: "
                self._why = self._why or f"{kind}{e}"
                self._changed.notify_all()
        finally:
            # Its end tells the trainer that nothing of its memory is read any more.
            with contextlib.closing(self._line):
                self._backend.close()
            self._flying.clear()
            self._slots.clear()

    def _some(self, message: link.Message | None) -> None:
        """Take one bucket, and those that follow soon."""
        with turns.short():
            while True:
                if message is not None:
                    self._launch(message)
                elif not self._flying and time.monotonic() < self._awake:
                    turns.nap(time.monotonic())
                elif not self._flying:
                    try:
                        message = self._line.hear(time.monotonic() + _SOON)
                    except TimeoutError:
                        return
                    continue
                elif not self._hand_on():
                    if time.monotonic() - self._since > self._timeout:
                        raise TimeoutError("a bucket did not come in time")
                    self._nap()
                message = self._said.popleft() if self._said else self._line.heard()

    def _nap(self) -> None:
        """Wait for a message, or until the first bucket that is on its way may be here.

        Each look takes Python's lock for a moment, and whoever loads what is here needs it.
        """
        self._awaited = True
        now = time.monotonic()
        early = self._since + _EARLY * self._pace * self._flying[0].nbytes
        if self._said or now >= early:
            turns.nap(self._since)
            return
        with contextlib.suppress(TimeoutError):
            self._said.append(self._line.hear(min(early, now + _SELDOM)))

    def _launch(self, message: link.Message) -> None:
        if "soon" in link.refuse(message):
            self._awake = time.monotonic() + _FIRST
            self._backend.warm()
            return
        slot, nbytes = message["go"]
        if slot not in self._free:
            raise ConflictError(f"the trainer gives slot {slot}, which has no room")
        part, after = self._slots[slot][:nbytes], self._free.pop(slot)
        deadline = time.monotonic() + self._timeout
        launched = self._backend.broadcast(part, after, deadline, self._check)
        if not self._flying:
            self._since = time.monotonic()
        coming = _Coming(slot, nbytes, launched)
        self._flying.append(coming)
        with self._changed:
            self._untaken.append(coming)
            self._changed.notify_all()

    def _hand_on(self) -> bool:
        """Hand on the first bucket of those on their way, if it is there."""
        first = self._flying[0]
        if not first.launched.over():
            return False
        self._flying.popleft()
        now = time.monotonic()
        pace = (now - self._since) / max(1, first.nbytes)
        if self._awaited:  # of one that was here at the first look nothing is known
            self._pace = min(_SLOWER * self._pace or pace, pace)
        self._since, self._awaited = now, False
        with self._changed:
            first.here = True
            self._changed.notify_all()
            self._line.say(got=first.slot)
        return True

    def _check(self) -> None:
        """Raise where the group has ended."""
        if self._closing:
            raise ConflictError(self._why)
        # It may give the next one already.
        message = self._line.heard()
        if message is not None:
            self._said.append(link.refuse(message))

    def _say_failed(self, error: BaseException) -> None:
        with contextlib.suppress(ConflictError):  # it knows
            self._line.say(failed=f"{type(error).__name__}: {error}")
