"""A rank's thread: it takes what is on its way, and hands it on when it is here, or before."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fp8ctl.carriers import group as carrier
from fp8ctl.carriers import turns
from fp8ctl.errors import ConflictError
from tests.carriers.processes import alive
from tests.carriers.transport import (
    NBYTES,
    PATIENCE,
    WHILE,
    Transport,
    becomes,
    errors,
    give,
    group,
    sent,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_rank_that_has_what_came_before_the_end_takes_it(transport: Transport) -> None:
    """What fails is read before the trainer's own device is asked."""
    with group(0) as (sender, [rank]), ThreadPoolExecutor(1) as threads:
        futures = [give(sender, slot, seed=7) for slot in range(2)]
        becomes(lambda: (transport.count(0), transport.count(1)), (2, 2))
        transport.lost[1, 1] = ConflictError("the second did not come")
        transport.done.update({0: 2, 1: 1})
        taken = threads.submit(rank.bucket, 0, NBYTES)
        assert taken.result(PATIENCE).tolist() == [7] * NBYTES
        with pytest.raises(ConflictError, match="the second did not come"):
            rank.bucket(1, NBYTES)
        assert errors(futures) == [None, None]
        becomes(lambda: alive(sender), False)


def test_a_rank_that_hears_of_the_end_first_takes_what_has_come(transport: Transport) -> None:
    with group(0) as (sender, [rank]):

        def end() -> None:
            sender.cancel("the update was cancelled")
            while 0 not in transport.closed:
                time.sleep(0.005)
            transport.done[1] = 1

        futures = [give(sender, slot, seed=7) for slot in range(2)]
        becomes(lambda: (transport.count(0), transport.count(1)), (2, 2))
        transport.meanwhile[1] = end
        assert all(errors(futures))
        assert rank.bucket(0, NBYTES).tolist() == [7] * NBYTES
        with pytest.raises(ConflictError, match="was cancelled"):
            rank.bucket(1, NBYTES)


@pytest.fixture
def awaited(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the events that a rank's device was told to wait for."""
    transport.events = True
    events: list[str] = []
    monkeypatch.setattr(carrier, "_wait_on_device", lambda _, event: events.append(event))
    return events


def test_a_device_waits_for_what_is_on_its_way(transport: Transport, awaited: list[str]) -> None:
    """The rank is told as soon as it is launched; whether it came, later."""
    with group(0) as (sender, [rank]), ThreadPoolExecutor(1) as threads:
        futures = [give(sender, slot, seed=7) for slot in range(2)]
        for slot in range(2):
            assert rank.bucket(slot, NBYTES, here=False).numel() == NBYTES
        assert awaited == ["event 0", "event 1"]
        rank.loaded()
        # Its slot has room, and the device its order: a third is launched when one is over.
        third = sent(sender, 0, seed=8)
        coming = threads.submit(rank.arrived)
        transport.done.update({0: 1, 1: 1})
        becomes(lambda: transport.count(1), 3)
        time.sleep(WHILE)
        assert not coming.done()
        transport.done.update({0: 3, 1: 3})
        assert coming.result(PATIENCE) is None
        assert errors([*futures, third.arrived]) == [None] * 3
        assert rank.bucket(0, NBYTES, here=False).tolist() == [8] * NBYTES
        assert awaited == ["event 0", "event 1"], "what is here needs none"
        rank.arrived()


def test_where_no_device_can_wait_the_rank_does(transport: Transport) -> None:
    with group(0) as (sender, [rank]), ThreadPoolExecutor(1) as threads:
        give(sender, 0, seed=7)
        taken = threads.submit(rank.bucket, 0, NBYTES, here=False)
        becomes(lambda: transport.count(1), 1)
        time.sleep(WHILE)
        assert not taken.done()
        transport.done.update({0: 1, 1: 1})
        assert taken.result(PATIENCE).tolist() == [7] * NBYTES


def test_who_wants_a_bucket_here_waits_for_it(transport: Transport, awaited: list[str]) -> None:
    with group(0) as (sender, [rank]), ThreadPoolExecutor(1) as threads:
        give(sender, 0, seed=7)
        taken = threads.submit(rank.bucket, 0, NBYTES)
        becomes(lambda: transport.count(1), 1)
        time.sleep(WHILE)
        assert not taken.done()
        transport.done.update({0: 1, 1: 1})
        assert taken.result(PATIENCE).tolist() == [7] * NBYTES
        assert not awaited


def test_what_a_device_waits_for_and_is_lost_is_told(
    transport: Transport, awaited: list[str]
) -> None:
    with group(0) as (sender, [rank]):
        futures = [give(sender, slot, seed=7) for slot in range(2)]
        rank.bucket(0, NBYTES, here=False)
        rank.bucket(1, NBYTES, here=False)
        becomes(lambda: (transport.count(0), transport.count(1)), (2, 2))
        transport.lost[1, 1] = ConflictError("the second did not come")
        transport.done.update({0: 2, 1: 1})
        with pytest.raises(ConflictError, match="the second did not come"):
            rank.arrived()
        with pytest.raises(ConflictError, match="the group has ended"):
            rank.arrived()
        assert errors(futures) == [None, None]
        assert len(awaited) == 2
        becomes(lambda: alive(sender), False)


def test_after_the_end_nothing_is_handed_on_that_is_on_its_way(
    transport: Transport, awaited: list[str]
) -> None:
    with group(0) as (sender, [rank]):
        give(sender, 0)
        becomes(lambda: transport.count(1), 1)
        sender.cancel("the update was cancelled")
        becomes(lambda: 1 in transport.closed, True)
        with pytest.raises(ConflictError, match="was cancelled"):
            rank.bucket(0, NBYTES, here=False)
        assert not awaited


def test_what_a_device_waits_for_too_long_is_a_time_out(
    transport: Transport, awaited: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rank's own: the trainer waits longer.
    monkeypatch.setattr(carrier, "_LATER", 2.0 - 2 * PATIENCE)
    with group(0, timeout=2 * PATIENCE) as (sender, [rank]):
        give(sender, 0)
        rank.bucket(0, NBYTES, here=False)
        began = time.monotonic()
        with pytest.raises((TimeoutError, ConflictError), match="did not come in time"):
            rank.arrived()
        assert time.monotonic() - began < PATIENCE
        assert awaited == ["event 0"]


def test_a_rank_that_has_heard_that_one_comes_takes_it(transport: Transport) -> None:
    with group(0) as (sender, [rank]):
        for number in range(3):
            sender.look()
            if number == 1:
                time.sleep(WHILE)  # it sleeps again
            give(sender, number, seed=number)
            becomes(lambda: transport.count(1), number + 1)
            transport.done.update({0: number + 1, 1: number + 1})
            assert rank.bucket(number, NBYTES).tolist() == [number] * NBYTES
            rank.loaded()
        assert transport.warmed == [1] * 3


def test_a_bucket_is_looked_for_when_one_like_it_would_be_here(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then each look would take Python's lock from whoever loads the one before."""
    naps: list[float] = []
    nap = turns.nap

    def napped(since: float) -> bool:
        if threading.current_thread().name == "fp8ctl-push-take":
            naps.append(since)
        return nap(since)

    monkeypatch.setattr(turns, "nap", napped)
    with group(0) as (sender, [rank]):
        futures = [give(sender, slot) for slot in range(2)]
        becomes(lambda: transport.count(1), 2)
        time.sleep(2.0)
        assert naps
        transport.done.update({0: 1, 1: 1})
        rank.bucket(0, NBYTES)
        naps.clear()
        looks = transport.looks
        time.sleep(WHILE)
        assert not naps, "the first took two seconds"
        assert transport.looks > looks, "and the second may be quicker"
        transport.done.update({0: 2, 1: 2})
        rank.bucket(1, NBYTES)
        assert errors(futures) == [None] * 2
        # The second of two that are there together says nothing of how long one takes.
        rank.loaded()
        futures = [give(sender, slot) for slot in range(2)]
        becomes(lambda: transport.count(1), 4)
        time.sleep(WHILE)
        transport.done.update({0: 4, 1: 4})
        for slot in range(2):
            rank.bucket(slot, NBYTES)
        assert errors(futures) == [None] * 2
        assert rank._ahead._pace > 0.5 * WHILE / NBYTES  # type: ignore[attr-defined]
