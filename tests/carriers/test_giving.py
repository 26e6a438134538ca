"""The trainer's thread: two buckets in flight, over broadcasts that take time (`transport`)."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.carriers import ends, giving, link, offers, turns
from fp8ctl.carriers import group as carrier
from fp8ctl.carriers.hub import Hub
from fp8ctl.errors import CarrierError, ConflictError
from fp8ctl.wire import WireError
from tests.carriers.freed import count_freed
from tests.carriers.processes import alive
from tests.carriers.transport import (
    CPU,
    NBYTES,
    PATIENCE,
    WHILE,
    Backend,
    Rank,
    Transport,
    becomes,
    errors,
    give,
    group,
    played,
    sent,
)

if TYPE_CHECKING:
    from fp8ctl.carriers.sent import Launched

pytestmark = pytest.mark.usefixtures("nothing_left")


# --- two at a time --------------------------------------------------------------------------------


def test_two_are_launched_before_the_first_is_over(transport: Transport) -> None:
    with group(0) as (sender, [rank]), ThreadPoolExecutor(1) as threads:
        futures = [give(sender, slot, seed=slot + 1) for slot in range(3)]
        becomes(lambda: (transport.count(0), transport.count(1)), (2, 2))
        assert not any(one.done() for one in futures)
        transport.done[0] = 1
        becomes(lambda: (transport.count(0), transport.count(1)), (3, 3))
        assert [one.done() for one in futures] == [True, False, False]
        # The rank has what its own device has, and not before.
        taken = threads.submit(rank.bucket, 0, NBYTES)
        time.sleep(WHILE)
        assert not taken.done()
        transport.done[1] = 1
        assert taken.result(PATIENCE).tolist() == [1] * NBYTES
        taken = threads.submit(rank.bucket, 1, NBYTES)
        time.sleep(WHILE)
        assert not taken.done()
        transport.done.update({0: 3, 1: 3})
        assert taken.result(PATIENCE).tolist() == [2] * NBYTES
        assert rank.bucket(2, NBYTES).tolist() == [3] * NBYTES
        assert errors(futures) == [None] * 3


def test_who_gives_the_first_has_the_thread_launch_it_alone(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that follow are launched behind it: nothing is idle until then."""
    monkeypatch.setattr(giving, "_FIRST", PATIENCE)
    launch = Backend.broadcast
    second = threading.Event()

    def slowly(self: Backend, *more: Any) -> Launched:
        if self.rank == 0 and transport.count(0) == 0:
            time.sleep(WHILE)
        elif self.rank == 0:
            second.wait(PATIENCE)
        return launch(self, *more)

    monkeypatch.setattr(Backend, "broadcast", slowly)
    with group(0) as (sender, _):
        give(sender, 0)
        assert transport.count(0) == 1
        give(sender, 1)
        assert transport.count(0) == 1
        second.set()
        becomes(lambda: transport.count(0), 2)
    transport.unlaunched[0, 0] = ConflictError("no way")
    with group(0) as (sender, _):
        assert "no way" in str(give(sender, 0).exception(PATIENCE))


def test_many_buckets_come_in_their_order(transport: Transport) -> None:
    transport.done.update({0: 1000, 1: 1000, 2: 1000})
    with group(0, 1) as (sender, ranks), ThreadPoolExecutor(2) as threads:

        def read(rank: ends.Receiver) -> list[int]:
            found = []
            for i in range(100):
                found.append(int(rank.bucket(i % 3, NBYTES)[-1]))
                rank.loaded()
            return found

        reading = [threads.submit(read, rank) for rank in ranks]
        futures: list[Future[None]] = []
        for i in range(100):
            if i >= 3:
                futures[i - 3].result(PATIENCE)
            futures.append(give(sender, i % 3, seed=i))
        assert [one.result(PATIENCE) for one in reading] == [[*range(100)]] * 2
        assert errors(futures) == [None] * 100


def test_none_is_launched_before_all_ranks_have_room(transport: Transport) -> None:
    transport.done.update({0: 9, 1: 9, 2: 9})
    with group(0, 1) as (sender, ranks):
        give(sender, 0, seed=1).result(PATIENCE)
        again = give(sender, 0, seed=2)
        for rank in ranks:
            becomes(lambda: transport.count(0), 1)
            rank.bucket(0, NBYTES)
            rank.loaded()
        assert again.exception(PATIENCE) is None
        assert [int(rank.bucket(0, NBYTES)[0]) for rank in ranks] == [2, 2]


def test_each_bucket_has_its_own_time(transport: Transport) -> None:
    """The second waits for the first on the device: that is not its own time."""
    with group(0, timeout=3.0) as (sender, [rank]):
        futures = [give(sender, slot) for slot in range(2)]
        for number in (1, 2):
            time.sleep(1.8)
            transport.done.update({0: number, 1: number})
            assert futures[number - 1].exception(PATIENCE) is None
            assert len(rank.bucket(number - 1, NBYTES)) == NBYTES
        assert alive(sender)


def test_who_has_nothing_to_do_does_not_look(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    real, listened = turns.nap, Hub.listen
    listens: list[float | None] = []

    def nap(since: float) -> bool:
        naps.append(since)
        return real(since)

    def listen(self: Hub, take: Any, seconds: float | None) -> None:
        listens.append(seconds)
        listened(self, take, seconds)

    monkeypatch.setattr(turns, "nap", nap)
    monkeypatch.setattr(Hub, "listen", listen)
    with group(0) as (sender, [rank]):
        future = give(sender, 0)
        becomes(lambda: len(naps) > 10, True)
        transport.done.update({0: 1, 1: 1})
        future.result(PATIENCE)
        rank.bucket(0, NBYTES)
        becomes(lambda: listens[-1], None)
        before = len(naps), len(listens), transport.looks
        time.sleep(WHILE)
        assert (len(naps), len(listens), transport.looks) == before


# --- when it fails --------------------------------------------------------------------------------


def test_a_cancellation_ends_what_is_in_flight_and_what_is_queued(transport: Transport) -> None:
    with group(0) as (sender, [rank]), ThreadPoolExecutor(1) as threads:
        futures = [give(sender, slot) for slot in range(3)]
        becomes(lambda: transport.count(1), 2)
        waiting = threads.submit(rank.bucket, 0, NBYTES)
        sender.cancel("the update was cancelled")
        found = errors(futures)
        assert [(type(e), str(e)) for e in found] == [
            (ConflictError, "the update was cancelled")
        ] * 3
        assert len({id(e) for e in found}) == 3, "who raises one adds to it"
        with pytest.raises(ConflictError, match="the update was cancelled"):
            waiting.result(PATIENCE)
        assert not alive(sender)
        becomes(lambda: sorted(transport.closed), [0, 1])
        with pytest.raises(ConflictError, match="has ended: the update was cancelled"):
            give(sender, 0).result(PATIENCE)


def test_a_cancellation_between_two_looks_is_not_slept_over() -> None:
    """What wakes the thread is read away, and then there is nothing more to wake it."""
    hub = Hub("127.0.0.1", [])
    real, calls = hub._woken, iter(["the update was cancelled"])

    def recv(size: int) -> bytes:
        for why in calls:
            hub.cancel(why)
        return real.recv(size)

    woken: Any = SimpleNamespace(fileno=real.fileno, recv=recv, close=real.close)
    hub._woken = woken
    with contextlib.closing(hub):
        hub.listen(lambda *_: None, 0.0)
        hub.wake()
        with pytest.raises(ConflictError, match="was cancelled"):
            hub.listen(lambda *_: None, PATIENCE)


def test_closing_ends_what_is_in_flight(transport: Transport) -> None:
    with group(0) as (sender, _):
        futures = [give(sender, slot) for slot in range(3)]
        becomes(lambda: transport.count(0), 2)
        sender.close()
        assert [str(e) for e in errors(futures)] == ["the trainer has closed the group"] * 3
        late = sender.send(0, NBYTES)
        assert late is not None
        for future in late:
            with pytest.raises(ConflictError, match="has closed the group"):
                future.result(PATIENCE)


@pytest.mark.parametrize("how", ["dies", "says why"])
def test_a_rank_that_leaves_with_two_in_flight_is_the_reason_of_all(
    how: str, transport: Transport
) -> None:
    with played() as (sender, rank):
        futures = [give(sender, slot) for slot in range(3)]
        becomes(lambda: transport.count(0), 2)
        if how == "says why":
            rank.line.say(failed="CarrierError: no room")
        rank.line.close()
        reason = "is gone" if how == "dies" else "CarrierError: no room"
        for e in errors(futures):
            assert isinstance(e, ConflictError)
            assert str(e).startswith("rank 0 of server 0 (process ")
            assert reason in str(e)
        assert not alive(sender)
        assert transport.closed == [0]


def test_what_has_left_has_not_arrived_before_every_rank_has_said_so(transport: Transport) -> None:
    transport.done[0] = 9
    with group(0, 1) as (sender, _):
        found = sent(sender, 0)
        assert found.left.exception(PATIENCE) is None
        for rank in (1, 2):
            time.sleep(WHILE)
            assert not found.arrived.done()
            transport.done[rank] = 1
        assert found.arrived.exception(PATIENCE) is None


@pytest.mark.parametrize("how", ["dies", "is late"])
def test_a_rank_that_has_no_bucket_which_has_left_is_named(how: str, transport: Transport) -> None:
    """NCCL takes small ones whole before a rank does anything."""
    transport.done[0] = 9
    with played(timeout=1.5) as (sender, rank):
        found = sent(sender, 0)
        assert found.left.exception(PATIENCE) is None
        if how == "dies":
            rank.line.close()
        with pytest.raises((TimeoutError, ConflictError), match=r"rank 0 of server 0 \(process"):
            found.arrived.result(PATIENCE)
        assert not alive(sender)


def test_a_rank_that_dies_between_buckets_is_seen_at_once(transport: Transport) -> None:
    with played() as (sender, rank):
        assert alive(sender)
        rank.line.close()
        becomes(lambda: alive(sender), False)
        with pytest.raises(ConflictError, match=r"has ended: rank 0 of server 0 .* is gone"):
            give(sender, 0).result(PATIENCE)


@pytest.mark.parametrize("how", ["is launched", "is under way"])
def test_what_a_rank_says_is_the_reason_and_not_what_the_transport_makes_of_it(
    how: str, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giving, "_WHOSE", PATIENCE)
    error = ConflictError("connection closed by peer")
    with played() as (sender, rank):
        (transport.unlaunched if how == "is launched" else transport.lost)[0, 1] = error
        futures = [give(sender, slot) for slot in range(3)]
        assert rank.hear() == {"go": [0, NBYTES]}
        assert rank.hear() == {"go": [1, NBYTES]}
        transport.done[0] = 1
        rank.line.say(got=0)
        time.sleep(WHILE)
        rank.line.say(failed="OutOfMemoryError: of my own")
        first, *others = errors(futures)
        assert first is None, "that one was given before"
        for e in others:
            assert str(e).endswith(": OutOfMemoryError: of my own (connection closed by peer)")


def test_what_was_given_before_a_failed_launch_has_its_time(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giving, "_WHOSE", 2.5)
    transport.unlaunched[0, 1] = ConflictError("no memory for it")
    with played() as (sender, rank):
        futures = [give(sender, slot) for slot in range(3)]
        assert [rank.hear(), rank.hear()] == [{"go": [0, NBYTES]}, {"go": [1, NBYTES]}]
        time.sleep(WHILE)
        assert not any(one.done() for one in futures)
        transport.done[0] = 1
        first, *others = errors(futures)
        assert first is None
        for e in others:
            assert "no memory for it; 1 of 1 ranks did not get a bucket: rank 0" in str(e)


def test_ranks_that_know_it_hear_that_an_update_begins(transport: Transport) -> None:
    """One of an earlier fp8ctl would take it for the end."""
    with played() as (sender, rank):
        sender.look()
        give(sender, 0)
        assert rank.hear() == {"go": [0, NBYTES]}
    with played(soon=True) as (sender, rank):
        for slot in range(2):
            sender.look()
            assert rank.hear() == {"soon": True}
            give(sender, slot)
            assert rank.hear() == {"go": [slot, NBYTES]}


@pytest.mark.parametrize("missing", ["room", "got"])
def test_who_does_not_answer_in_time_is_named(missing: str, transport: Transport) -> None:
    with played(timeout=1.5) as (sender, rank):
        transport.done[0] = 9
        assert give(sender, 0).exception(PATIENCE) is None
        if missing == "room":
            rank.line.say(got=0)
            with pytest.raises(TimeoutError, match=r"had no room for a bucket .*: rank 0 of"):
                give(sender, 0).result(PATIENCE)
        else:
            becomes(lambda: alive(sender), False)
            with pytest.raises(ConflictError, match=r"did not get a bucket .*: rank 0 of server 0"):
                give(sender, 1).result(PATIENCE)


@pytest.mark.parametrize("said", [{"got": 1}, {"go": 0}, {}])
def test_a_rank_that_says_what_is_not_due_ends_the_group(
    said: dict[str, object], transport: Transport
) -> None:
    with played() as (sender, rank):
        future = give(sender, 0)
        assert rank.hear() == {"go": [0, NBYTES]}
        rank.line.say(**said)
        with pytest.raises(ConflictError, match=r"rank 0 of server 0 .* says \{"):
            future.result(PATIENCE)
    assert transport.closed == [0]


def test_a_device_that_does_not_end_is_a_time_out(transport: Transport) -> None:
    with played(timeout=1.5) as (sender, rank):
        futures = [give(sender, slot) for slot in range(3)]
        assert rank.hear() == {"go": [0, NBYTES]}
        rank.line.say(got=0)
        for e in errors(futures):
            assert isinstance(e, TimeoutError)
            assert "this device did not end" in str(e)
    assert transport.count(0) == 0


def test_what_nobody_foresaw_ends_all_as_well(transport: Transport) -> None:
    with played() as (sender, _):
        transport.unlaunched[0, 0] = ZeroDivisionError("in the transport")
        with pytest.raises(ConflictError, match="ZeroDivisionError: in the transport"):
            give(sender, 0).result(PATIENCE)
        assert not alive(sender)


@pytest.mark.parametrize("how", ["cancel", "transport", "rank"])
def test_futures_that_failed_keep_no_slot(
    how: str, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever shows an error later has it, its traceback and its causes in hand."""
    freed = count_freed(monkeypatch)
    gc.collect()
    gc.disable()
    try:
        with group(0) as (sender, [rank]):
            if how == "transport":
                transport.unlaunched[0, 1] = ConflictError("in the trainer")
            elif how == "rank":
                transport.unlaunched[1, 1] = ConflictError("in the rank")
            futures = [give(sender, slot) for slot in range(3)]
            becomes(lambda: transport.count(0) >= 1 or not alive(sender), True)
            if how == "cancel":
                sender.cancel("no more")
            found = errors(futures)
            assert all(found)
            with pytest.raises(ConflictError) as e:
                rank.bucket(0, NBYTES)
        del rank
        assert e.value
        assert len(freed) == 2 * ends.GROUP_SLOTS
    finally:
        gc.enable()


# --- where ranks pull -----------------------------------------------------------------------------


class Event:
    """Of the trainer's device."""

    def __init__(self) -> None:
        self.reached = False
        self.looks = 0

    def query(self) -> bool:
        self.looks += 1
        return self.reached


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Return the events of what fills slots, as `ready` makes them."""
    events: list[Event] = []

    def reached(_: torch.device) -> Event:
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(carrier, "_reached", reached)
    return events


@pytest.fixture
def pulling(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> Transport:
    """Have a rank pull; what the trainer's own device has to do for it is over at once."""
    # A played rank does not leave when it is told the end.
    monkeypatch.setattr(carrier, "_LEAVING", 0.05)
    transport.pulled = True
    transport.done[0] = 99
    return transport


def heard(rank: Rank) -> link.Message | None:
    """Return what the rank has been told until now."""
    time.sleep(WHILE)
    return rank.line.heard()


def test_a_rank_that_pulls_is_told_when_the_bucket_is_written(
    pulling: Transport, written: list[Event]
) -> None:
    with played() as (sender, rank):
        futures = [give(sender, slot) for slot in range(2)]
        assert heard(rank) is None
        written[1].reached = True
        assert heard(rank) is None, "they go in order"
        written[0].reached = True
        assert [rank.hear(), rank.hear()] == [{"go": [0, NBYTES]}, {"go": [1, NBYTES]}]
        assert not any(one.done() for one in futures)


def test_who_takes_part_in_a_broadcast_is_told_before_the_bucket_is_written(
    transport: Transport, written: list[Event]
) -> None:
    """Its device waits for the trainer's by itself."""
    with played() as (sender, rank):
        give(sender, 0)
        assert rank.hear() == {"go": [0, NBYTES]}
        assert [(one.reached, one.looks) for one in written] == [(False, 0)]


def test_a_slot_is_in_use_until_the_rank_has_pulled(
    pulling: Transport, written: list[Event]
) -> None:
    with played() as (sender, rank):
        found = [sent(sender, slot) for slot in range(3)]
        for one in written:
            one.reached = True
        assert [rank.hear(), rank.hear()] == [{"go": [0, NBYTES]}, {"go": [1, NBYTES]}]
        assert heard(rank) is None, "two at a time"
        assert not any(one.left.done() for one in found)
        rank.line.say(got=0)
        assert errors(found[0]) == [None, None]
        assert rank.hear() == {"go": [2, NBYTES]}
        assert not any(future.done() for one in found[1:] for future in one)
        rank.line.say(got=1)
        rank.line.say(got=2)
        assert errors([*found[1], *found[2]]) == [None] * 4
        assert alive(sender)


@pytest.mark.parametrize("how", ["dies", "says why"])
def test_ranks_are_heard_while_a_bucket_is_written(
    how: str, pulling: Transport, written: list[Event]
) -> None:
    with played() as (sender, rank):
        futures = [give(sender, slot) for slot in range(2)]
        becomes(lambda: written[0].looks > 5, True)
        if how == "says why":
            rank.line.say(failed="CarrierError: no room")
        else:
            rank.line.close()
        reason = "is gone" if how == "dies" else "CarrierError: no room"
        for e in errors(futures):
            assert str(e).startswith("rank 0 of server 0 (process ")
            assert reason in str(e)
        assert not alive(sender)


def test_a_bucket_comes_whole_while_the_next_is_written(
    pulling: Transport, written: list[Event]
) -> None:
    with played() as (sender, rank):
        first, second = sent(sender, 0), sent(sender, 1)
        written[0].reached = True
        assert rank.hear() == {"go": [0, NBYTES]}
        becomes(lambda: written[1].looks > 5, True)
        rank.line.say(got=0)
        assert errors(first) == [None, None]
        assert not second.left.done()


@pytest.mark.parametrize("how", ["dies", "is late"])
def test_a_rank_that_does_not_pull_is_named(
    how: str, pulling: Transport, written: list[Event]
) -> None:
    with played(timeout=1.5) as (sender, rank):
        found = sent(sender, 0)
        written[0].reached = True
        assert rank.hear() == {"go": [0, NBYTES]}
        if how == "dies":
            rank.line.close()
        kind = ConflictError if how == "dies" else TimeoutError
        for e in errors(found):
            assert type(e) is kind
            assert "rank 0 of server 0 (process " in str(e)
        assert not alive(sender)


def test_a_bucket_that_is_never_written_is_no_ranks_fault(
    pulling: Transport, written: list[Event]
) -> None:
    with played(timeout=1.5) as (sender, rank):
        [e] = errors([give(sender, 0)])
        assert isinstance(e, TimeoutError)
        assert str(e) == "this device did not write a bucket in time"
        assert rank.hear() == {"no": str(e)}


def test_nobody_looks_while_a_rank_pulls(
    pulling: Transport, written: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is waited for is what the rank says, and that wakes the thread."""
    naps: list[float] = []
    real = turns.nap

    def nap(since: float) -> bool:
        naps.append(since)
        return real(since)

    monkeypatch.setattr(turns, "nap", nap)
    with played() as (sender, rank):
        futures = [give(sender, slot) for slot in range(3)]
        becomes(lambda: len(naps) > 10, True)
        for one in written:
            one.reached = True
        assert [rank.hear(), rank.hear()] == [{"go": [0, NBYTES]}, {"go": [1, NBYTES]}]
        before = len(naps), [one.looks for one in written]
        time.sleep(WHILE)
        assert (len(naps), [one.looks for one in written]) == before
        for slot in range(3):
            rank.line.say(got=slot)
            futures[slot].result(PATIENCE)


def test_who_pulls_may_leave_before_the_group_is_over(
    pulling: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the trainer's memory open; a rank that does not leave is not waited for for ever."""
    monkeypatch.setattr(carrier, "_LEAVING", PATIENCE)
    with played() as (sender, rank), ThreadPoolExecutor(1) as threads:
        closing = threads.submit(sender.close)
        assert rank.hear() == {"no": "the trainer has closed the group"}
        time.sleep(WHILE)
        assert not closing.done()
        rank.line.close()
        closing.result(PATIENCE / 2)
    monkeypatch.setattr(carrier, "_LEAVING", 1.0)
    with played() as (sender, rank):
        began = time.monotonic()
        sender.close()
        assert 0.9 < time.monotonic() - began < PATIENCE / 2


# --- how many slots -------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "both"), [(3, 3), (2, 2), (7, 3)])
def test_a_group_has_the_slots_that_all_have_room_for(
    theirs: int, both: int, transport: Transport
) -> None:
    sender = ends.sender("group", NBYTES, ranks=[1], timeout=PATIENCE)
    with contextlib.closing(sender):
        assert [one["nbytes"] for one in sender.offer()["slots"]] == [NBYTES] * 3
        third = weakref.ref(sender.buffer(2))
        rank = Rank(sender, slots=theirs)
        with contextlib.closing(rank.line):
            assert sender.slots == rank.agreed["slots"] == both
            assert (third() is not None) == (both == 3)
            with pytest.raises(CarrierError, match=f"slot {both} of a carrier that has {both}"):
                sender.send(both, 1)
    assert transport.closed == [0]


@pytest.mark.parametrize("said", [0, "3", None])
def test_a_rank_that_says_no_number_of_slots_is_refused(said: object, transport: Transport) -> None:
    sender = ends.sender("group", NBYTES, ranks=[1], timeout=PATIENCE)
    with contextlib.closing(sender), ThreadPoolExecutor(1) as threads:
        offer = sender.offer()
        joining = threads.submit(sender.join)
        where = offer["host"], offer["port"], offer["key"]
        line = link.join(*where, 1, {"slots": said}, time.monotonic() + PATIENCE)
        with contextlib.closing(line), pytest.raises(WireError, match="slots"):
            joining.result(PATIENCE)
        assert not alive(sender)
    assert not transport.closed


def test_a_rank_without_room_for_the_third_is_enough(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.done.update({0: 9, 1: 9, 2: 9})
    # The trainer, the first rank, the second one: in the order in which they ask.
    counts = iter([3, 2, 3])
    monkeypatch.setattr(offers, "fitting", lambda *_: next(counts))
    with group(0, 1) as (sender, ranks):
        assert sender.slots == 2
        for slot in (0, 1):
            give(sender, slot, seed=slot).result(PATIENCE)
        for rank in ranks:
            assert [int(rank.bucket(slot, NBYTES)[0]) for slot in (0, 1)] == [0, 1]
            with pytest.raises(CarrierError, match="slot 2 of a carrier that has 2"):
                rank.bucket(2, NBYTES)


@pytest.mark.parametrize(("slots", "had"), [(None, 3), (1, 1), (2, 2), (5, 5)])
def test_more_or_fewer_may_be_asked_for(slots: int | None, had: int, transport: Transport) -> None:
    transport.done.update({0: 9, 1: 9})
    with group(0, slots=slots) as (sender, [rank]):
        assert sender.slots == had
        futures = [give(sender, slot, seed=slot) for slot in range(had)]
        assert errors(futures) == [None] * had
        assert [int(rank.bucket(slot, NBYTES)[0]) for slot in range(had)] == [*range(had)]


@pytest.mark.parametrize(
    ("free", "fits"), [(0, 2), (399, 2), (400, 3), (499, 3), (500, 4), (10_000, 4)]
)
def test_a_third_slot_leaves_a_device_room_for_another(
    free: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80_000))
    assert offers.fitting([100] * 4, torch.device("cuda", 0)) == fits
    assert offers.fitting([100], torch.device("cuda", 0)) == 1
    assert offers.fitting([100] * 4, CPU) == 4
