"""What a delivery tells of several buckets that fail together."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.carriers.sent import Sent
from fp8ctl.errors import AbortedError, BusyError, ConflictError, Fp8ctlError
from fp8ctl.push.delivery import ByCarrier, Clock
from fp8ctl.wire import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable

BEGUN: Any = SimpleNamespace(begin=lambda: None, begun=lambda: None)
ENTRY = Entry("a.weight", "uint8", (4,), 0)


def by_carrier(asked: Iterable[Future[Any]], sends: Iterable[Sent | None], slots: int) -> ByCarrier:
    """Return a delivery whose servers answer, and whose carrier sends, as is told in turn."""
    memory = [torch.zeros(4, dtype=torch.uint8) for _ in range(slots)]
    answers, sent = iter(asked), iter(sends)
    sender = SimpleNamespace(
        slots=slots,
        buffer=lambda slot: memory[slot],
        ready=lambda _: None,
        settle=lambda _: None,
        send=lambda *_: next(sent),
    )
    fleet: Any = SimpleNamespace(start=lambda _, beside: [next(answers)])
    link: Any = SimpleNamespace(sender=sender, places={}, kind="any")
    return ByCarrier(link, fleet, "push", BEGUN, Clock())


class Overtaken(Future[Any]):
    """Not done when it is looked at first; then it fails, and so does what waited for it."""

    def __init__(self, consequence: Future[Any]) -> None:
        super().__init__()
        self._looks, self._consequence = 0, consequence

    def done(self) -> bool:
        if self._looks == 1 and not super().done():
            before = False
            self.set_exception(BusyError("the server's own reason", hint="fp8ctl ps"))
            self._consequence.set_exception(AbortedError("did not take the bucket before"))
            self._looks += 1
            return before
        self._looks += 1
        return super().done()


def test_the_cause_is_told_also_where_it_comes_between_two_looks() -> None:
    second: Future[Any] = Future()
    first = Overtaken(second)
    delivery = by_carrier([first, second], [None, None], 2)
    try:
        for slot in range(2):
            entries = [ENTRY._replace(name=f"{slot}.weight")]
            delivery.give(slot, 4, entries)
            delivery.deliver(slot, 4, entries)
        with ThreadPoolExecutor(1) as threads, pytest.raises(Fp8ctlError) as e:
            threads.submit(delivery.drain).result(20)
        assert e.value.message == "the server's own reason (bucket of 0.weight to 0.weight)"
    finally:
        delivery.close()


class Looked(Future[Any]):
    """Fails at one of the looks at whether it is done."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._looks, self._at = 0, at

    def done(self) -> bool:
        if self._looks == self._at:
            self.set_exception(BusyError("the server's own reason", hint="fp8ctl ps"))
        self._looks += 1
        return super().done()


@pytest.mark.parametrize("look", range(4))
def test_a_bucket_that_fails_between_two_looks_is_not_taken_for_one_that_arrived(look: int) -> None:
    delivery = by_carrier([Looked(look)], [None], 2)
    try:
        delivery.give(0, 4, [ENTRY])
        delivery.deliver(0, 4, [ENTRY])
        with ThreadPoolExecutor(1) as threads, pytest.raises(Fp8ctlError, match="own reason"):
            threads.submit(delivery.drain).result(20)
        assert delivery.failed()
    finally:
        delivery.close()


def test_a_slot_is_free_when_it_is_sent_and_not_when_it_is_loaded() -> None:
    """As many slots in turn as the carrier has; where the ranks read it themselves, later."""
    sent = [Sent(Future(), Future()) for _ in range(2)]
    asked: list[Future[Any]] = [Future(), Future()]
    delivery = by_carrier(asked, sent, 3)
    try:
        assert delivery.slots == 3
        with ThreadPoolExecutor(1) as threads:
            for slot in range(2):
                delivery.give(slot, 4, [ENTRY])
                delivery.deliver(slot, 4, [ENTRY])
            assert len(delivery.buffer(2)) == 4
            free = threads.submit(delivery.buffer, 0)
            with pytest.raises(TimeoutError):
                free.result(0.2)
            sent[0].left.set_result(None)
            assert free.result(20) is delivery.buffer(0)
            free = threads.submit(delivery.buffer, 1)
            sent[1].left.set_exception(ConflictError("a rank is gone"))
            with pytest.raises(ConflictError, match="a rank is gone"):
                free.result(20)
    finally:
        delivery.close()


def test_who_has_not_got_what_has_left_ends_the_wait_for_servers() -> None:
    sent, asked = Sent(Future(), Future()), Future[Any]()
    delivery = by_carrier([asked], [sent], 2)
    try:
        delivery.give(0, 4, [ENTRY])
        delivery.deliver(0, 4, [ENTRY])
        sent.left.set_result(None)
        with ThreadPoolExecutor(1) as threads:
            draining = threads.submit(delivery.drain)
            with pytest.raises(TimeoutError):
                draining.result(0.2)
            sent.arrived.set_exception(ConflictError("a rank is gone"))
            with pytest.raises(ConflictError, match="a rank is gone"):
                draining.result(20)
    finally:
        delivery.close()
