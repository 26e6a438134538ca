"""The trainer's thread of a group: gives the buckets in order, two of them at a time.

The next broadcast is launched while one runs, so that on the device it follows at once: between
two of them no rank's answer is waited for, only its room. What is under way is looked at in
short naps; with nothing to do the thread sleeps until a rank says something.

Where ranks pull, no stream reaches from this device into theirs: they are told of a bucket when it
is written, and its slot is free when they have said that they have it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fp8ctl.carriers import turns
from fp8ctl.carriers.sent import Sent
from fp8ctl.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch

    from fp8ctl.carriers.ahead import Backend
    from fp8ctl.carriers.hub import Hub
    from fp8ctl.carriers.link import Message

#: Broadcasts that are launched and not over: one that runs, one that follows it.
IN_FLIGHT = 2
#: Seconds that who gives the first bucket leaves to this thread, to launch it.
_FIRST = 0.005
#: Seconds that the ranks get to say why a broadcast failed.
_WHOSE = 1.0


class _Bucket:
    """A bucket that is to be given, or is under way.

    Attributes:
        slot: where it lies.
        nbytes: of it.
        after: an event of the device that comes first.
        sent: for who asked for it.
        asked: when it was.
        over: says whether the device has given it.
        launched: set when this thread has done for it what it can, or it failed.
        left: the device has; where ranks pull, they have it.
        without: ranks that have not said that they have it.
    """

    def __init__(self, slot: int, nbytes: int, after: Any) -> None:
        self.slot, self.nbytes, self.after = slot, nbytes, after
        self.sent = Sent(Future(), Future())
        for future in self.sent:
            future.set_running_or_notify_cancel()  # who waits for it cannot take it back
        self.asked = time.monotonic()
        self.over: Callable[[], bool] | None = None
        self.launched = threading.Event()
        self.left = False
        self.without: set[int] = set()

    def fail(self, kind: type[Exception], why: str) -> None:
        """End what has not ended, each with an error of its own: who raises one adds to it."""
        for future in self.sent:
            if not future.done():
                future.set_exception(kind(why))
        self.launched.set()


class Giver:
    """Gives the slots of an open group; to all that, its thread alone talks."""

    def __init__(
        self,
        hub: Hub,
        backend: Backend,
        slots: Sequence[torch.Tensor],
        ranks: Collection[int],
        timeout: float,
        ended: Callable[[str], None],
        soon: bool = False,
    ) -> None:
        """Begin to listen to the ranks.

        Args:
            hub: has a line to each of them.
            backend: of the group.
            slots: of the trainer; whoever calls owns them, and empties this very list.
            ranks: by their numbers.
            timeout: seconds that a bucket may take, from when the one before it has arrived.
            ended: is called in the thread when it ends, with the reason; leaves the group.
            soon: all ranks know what that means.
        """
        self._hub, self._backend, self._slots = hub, backend, slots
        self._timeout, self._ended = timeout, ended
        self._soon, self._expecting = soon, False
        #: Of each rank, the slots that it has room in.
        self._room: dict[int, set[int]] = {rank: set() for rank in ranks}
        #: Launched, until all ranks have it, in order.
        self._given: deque[_Bucket] = deque()
        #: When the last bucket arrived; when what is under way was looked at first.
        self._arrived = self._looked = 0.0
        #: Why a launch was given up, if that was no failure of the transport.
        self._told = ""
        self._one_at_a_time = threading.Lock()
        self._queue: deque[_Bucket] = deque()
        #: Why there are no more. Words: an exception would keep what its frames hold.
        self._why = ""
        self._thread = threading.Thread(target=self._run, name="fp8ctl-push-give", daemon=True)
        self._thread.start()

    def give(self, slot: int, nbytes: int, after: Any) -> Sent:
        """Put a bucket at the end of the queue; return what tells how far it is."""
        bucket = _Bucket(slot, nbytes, after)
        with self._one_at_a_time:
            why, idle = self._why, not (self._queue or self._given)
            if not why:
                self._queue.append(bucket)
        if why:
            bucket.fail(ConflictError, f"the group has ended: {why}")
            return bucket.sent
        self._hub.wake()
        if idle:
            # Whatever the caller does next would take turns with the thread that launches it.
            bucket.launched.wait(_FIRST)
        return bucket.sent

    def expect(self) -> None:
        """Have the ranks told that a bucket comes soon."""
        if self._soon:
            self._expecting = True
            self._hub.wake()

    def join(self) -> None:
        """Wait for the thread, after `Hub.cancel`."""
        self._thread.join()

    # --- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        kind: type[Exception] = ConflictError
        try:
            while True:
                self._look()
                if self._expecting:
                    self._expecting = False
                    self._hub.tell(soon=True)
                if not self._launch():
                    self._wait()
        except (ConflictError, TimeoutError) as e:
            kind, why = (TimeoutError if isinstance(e, TimeoutError) else ConflictError), str(e)
        except BaseException as e:  # noqa: BLE001 - who waits for a bucket is told
            why = f"{type(e).__name__}: {e}"
        # What ends the group may have come together with the end of a bucket.
        with contextlib.suppress(Exception):
            while (flying := self._flying()) and self._take(flying[0]):
                pass
        self._fail(kind, why)

    def _look(self) -> None:
        """End the futures of what the device has given, and forget what all ranks have."""
        for bucket in self._flying():
            try:
                if not self._take(bucket):
                    break
            except ConflictError as e:
                raise self._whose(e, bucket) from None
        while self._given and self._given[0].left and not self._given[0].without:
            self._given.popleft().sent.arrived.set_result(None)
            self._arrived = time.monotonic()

    def _take(self, bucket: _Bucket) -> bool:
        """End the future of a bucket if the device has given it, or the ranks have pulled it."""
        if self._backend.pulled and bucket.without:
            return False
        if bucket.over is None or not bucket.over():
            return False
        bucket.left, bucket.over = True, None
        self._looked = time.monotonic()
        bucket.sent.left.set_result(None)
        return True

    def _flying(self) -> list[_Bucket]:
        return [bucket for bucket in self._given if not bucket.left]

    def _next(self) -> _Bucket | None:
        """Return the next bucket, if there is one, all have room for it, and it is its turn."""
        if not self._queue or len(self._flying()) >= IN_FLIGHT:
            return None
        bucket = self._queue[0]
        return None if self._crowded(bucket.slot) else bucket

    def _launch(self) -> bool:
        """Give the next bucket, if it can be."""
        bucket = self._next()
        if bucket is None:
            return False
        if self._backend.pulled and bucket.after is not None and not bucket.after.query():
            return False
        for has in self._room.values():
            has.discard(bucket.slot)
        bucket.without = {*self._room}
        if not self._flying():
            self._looked = time.monotonic()
        with self._one_at_a_time:
            self._given.append(self._queue.popleft())
        part = self._slots[bucket.slot][: bucket.nbytes]
        deadline = time.monotonic() + self._timeout
        try:
            self._hub.tell(go=[bucket.slot, bucket.nbytes])
            bucket.over = self._backend.broadcast(part, bucket.after, deadline, self._hear).over
            bucket.launched.set()
        except (TimeoutError, ConflictError) as e:
            raise self._whose(e, bucket) from None
        return True

    def _crowded(self, slot: int) -> list[int]:
        """Return the ranks that have no room in a slot."""
        return [rank for rank, has in self._room.items() if slot not in has]

    def _wait(self) -> None:
        """Wait until something may have changed."""
        if not self._given and not self._queue:
            self._hub.listen(self._note, None)
            return
        oldest = (self._given or self._queue)[0]
        deadline = max(self._arrived, oldest.asked) + self._timeout
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._late(oldest)
        since = self._looks()
        if since is not None:
            turns.nap(since)
            left = 0.0
        self._hub.listen(self._note, left)

    def _looks(self) -> float | None:
        """Return since when this device is looked at, which wakes nobody; None: it need not be."""
        if not self._backend.pulled:
            return self._looked if self._flying() else None
        bucket = self._next()  # it is still written
        return None if bucket is None else max(self._looked, bucket.asked)

    def _hear(self) -> None:
        """Take what the ranks have said until now, while a broadcast is launched."""
        try:
            self._hub.listen(self._note, 0.0)
        except ConflictError as e:
            self._told = str(e)
            raise

    def _note(self, rank: int, message: Message) -> None:
        """Take a rank's word that it has room in a slot, or what was given in one."""
        if "room" in message:
            self._room[rank].add(message["room"])
            return
        its = (one for one in self._given if rank in one.without)
        oldest = next(its, None)
        if oldest is None or message.get("got") != oldest.slot:
            raise ConflictError(f"{self._hub.name(rank)} says {message}")
        oldest.without.discard(rank)

    def _late(self, bucket: _Bucket) -> TimeoutError:
        """Return who keeps a bucket waiting."""
        if bucket not in self._given:
            if crowded := self._crowded(bucket.slot):
                return self._hub.late(crowded, "had no room for a bucket in time")
            return TimeoutError("this device did not write a bucket in time")
        if bucket.without:
            return self._hub.late(bucket.without, "did not get a bucket in time")
        return TimeoutError("all ranks have the bucket, and this device did not end in time")

    def _whose(self, error: Exception, failed: _Bucket) -> Exception:
        """Return a transport's error with what the ranks say: it names addresses at best.

        What was given before has that time, too, to be over.
        """
        if self._told:
            return ConflictError(self._told)
        end = time.monotonic() + _WHOSE
        kind = TimeoutError if isinstance(error, TimeoutError) else ConflictError
        try:
            while (left := end - time.monotonic()) > 0 and failed.without:
                self._hub.listen(self._note, left)
        except ConflictError as who:
            # The rank's own reason first, what the transport made of it behind.
            return ConflictError(f"{who} ({error})")
        if failed.without:
            late = self._hub.late(failed.without, "did not get a bucket")
            return kind(f"{error}; {late}")
        return kind(str(error))

    def _fail(self, kind: type[Exception], why: str) -> None:
        """End the group, and then all that waits."""
        with self._one_at_a_time:
            self._why = why or "the group has ended"
            waiting = [*self._given, *self._queue]
            self._given.clear()
            self._queue.clear()
        try:
            self._ended(why)
        finally:
            for bucket in waiting:
                bucket.fail(kind, why)
