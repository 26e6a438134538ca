"""What a delivery tells of several buckets that fail together."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8ctl.errors import AbortedError, BusyError, Fp8ctlError
from fp8ctl.push.delivery import ByCarrier, Clock
from fp8ctl.wire import Entry

ENTRY = Entry("a.weight", "uint8", (4,), 0)


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
    asked = iter([first, second])
    fleet: Any = SimpleNamespace(start=lambda _, beside: [next(asked)])
    slots = [torch.zeros(4, dtype=torch.uint8) for _ in range(2)]
    sender = SimpleNamespace(buffer=lambda slot: slots[slot], ready=lambda _: None)
    link: Any = SimpleNamespace(sender=sender, places={}, kind="memory")
    delivery = ByCarrier(link, fleet, "push", lambda: None, Clock())
    try:
        for slot in range(2):
            delivery.deliver(slot, 4, [ENTRY._replace(name=f"{slot}.weight")])
        with ThreadPoolExecutor(1) as threads, pytest.raises(Fp8ctlError) as e:
            threads.submit(delivery.drain).result(20)
        assert e.value.message == "the server's own reason (bucket of 0.weight to 0.weight)"
    finally:
        delivery.close()
