"""What all servers are asked at once, and when their threads end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from fp8ctl.push.client import Server
from fp8ctl.push.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 20.0


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    servers = [Server(f"http://127.0.0.1:{port}", None, 1.0, "sglang") for port in (1, 2)]
    made = Fleet(servers)
    yield made
    made.close()


@pytest.mark.parametrize("beside", [False, True])
def test_who_closes_it_waits_for_what_is_on_its_way(fleet: Fleet, beside: bool) -> None:
    """A sign of life that is late would use a connection of the next update's."""
    go_on, over = threading.Event(), threading.Event()

    def ask(i: int, _: Server) -> None:
        if i == 1:
            go_on.wait(PATIENCE)
            over.set()

    fleet.start(ask, beside=beside)
    fleet.start(lambda *_: None, [1], beside=not beside)[0].result(PATIENCE)
    with ThreadPoolExecutor(1) as thread:
        closing = thread.submit(fleet.close)
        time.sleep(0.1)
        assert not closing.done()
        go_on.set()
        closing.result(PATIENCE)
    assert over.is_set()


def test_a_server_that_is_asked_something_gets_no_sign_of_life(fleet: Fleet) -> None:
    go_on = threading.Event()
    asked: list[str] = []
    [busy] = fleet.start(lambda *_: go_on.wait(PATIENCE), [0])
    fleet.start(lambda *_: None, [0], beside=True)[0].result(PATIENCE)
    fleet.start(lambda *_: None, [1])[0].result(PATIENCE)
    fleet.idle(lambda server: asked.append(server.url))
    go_on.set()
    busy.result(PATIENCE)
    fleet.close()
    assert asked == ["http://127.0.0.1:2"]


def test_its_threads_end_with_it(fleet: Fleet) -> None:
    before = threading.active_count()
    fleet.start(lambda *_: None)
    fleet.keep_alive(lambda _: None, 60.0)
    fleet.close()
    end = time.monotonic() + PATIENCE
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before
