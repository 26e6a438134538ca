"""Signals that end a command: which, how often, and what is as before afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from fp8ctl.signals import interruptible

if TYPE_CHECKING:
    from collections.abc import Iterator

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers(interrupts_count: None) -> Iterator[list[object]]:
    """Return what each does, and see that it does so again."""
    found: list[object] = [signal.getsignal(one) for one in ALL]
    yield found
    assert [signal.getsignal(one) for one in ALL] == found


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("number", ALL)
def test_each_interrupts(number: signal.Signals, once: bool) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible(once=once):
        signal.raise_signal(number)


@pytest.mark.parametrize("second", ALL)
@pytest.mark.parametrize("first", ALL)
def test_the_first_is_the_last_one_where_there_is_to_be_only_one(
    first: signal.Signals, second: signal.Signals
) -> None:
    put_back = False

    def work() -> None:
        nonlocal put_back
        with interruptible(once=True):
            try:
                signal.raise_signal(first)
            finally:
                signal.raise_signal(second)
                put_back = True

    with pytest.raises(KeyboardInterrupt):
        work()
    assert put_back


@pytest.mark.parametrize("once", [False, True])
def test_it_is_the_last_one_for_who_is_around_it_as_well(once: bool) -> None:
    """`demo` takes its patch off when the server that it launches was interrupted."""
    put_back = False

    def work() -> None:
        nonlocal put_back
        with interruptible(once=True):
            try:
                with interruptible(once=once):
                    signal.raise_signal(signal.SIGTERM)
            finally:
                with interruptible(once=once):
                    signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                put_back = True

    with pytest.raises(KeyboardInterrupt):
        work()
    assert put_back


def test_a_background_job_of_a_shell_hears_no_ctrl_c(handlers: list[object]) -> None:
    handlers[0] = signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible(once=True):
        signal.raise_signal(signal.SIGINT)


def test_what_is_started_to_put_things_back_hears_signals() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    told = b""

    def work() -> None:
        nonlocal told
        with interruptible(once=True):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                told = subprocess.check_output([sys.executable, "-c", code])

    with pytest.raises(KeyboardInterrupt):
        work()
    assert told.strip() == b"True"


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(
    number: signal.Signals, once: bool, handlers: list[object]
) -> None:
    """`nohup` has a server outlive its terminal."""
    handlers[ALL.index(number)] = signal.SIG_IGN
    signal.signal(number, signal.SIG_IGN)
    with interruptible(once=once):
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt), interruptible(once=once):
        signal.raise_signal(signal.SIGINT)


def test_another_thread_gets_none(handlers: list[object]) -> None:
    found: list[object] = []

    def run() -> None:
        with interruptible(once=True):
            found.extend(signal.getsignal(one) for one in ALL)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == handlers
