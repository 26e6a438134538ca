"""End on SIGTERM and SIGHUP as on Ctrl-C: what was started or patched is put back first."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_ALL = (*_SIGNALS, signal.SIGINT)


class _Interrupt:
    """A handler that raises KeyboardInterrupt; see `interruptible`."""

    def __init__(self, *, once: bool) -> None:
        self.once, self.came = once, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Not by SIG_IGN, which what is started from now on would inherit.
        if not (self.once and self.came):
            self.came = True
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(*, once: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt in this block for the signals of time-outs and closed terminals.

    A signal that is ignored stays so: `nohup` and shells that start something in the background
    have it like that. Does nothing in another thread than the main one: only that one gets signals.

    Args:
        once: the first signal, Ctrl-C included, is the last one in this block and in those in it:
            who puts things back is not interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _Interrupt(once=once)
    before = {}
    for one in _ALL if once else _SIGNALS:
        found = signal.getsignal(one)
        outer = isinstance(found, _Interrupt) and found.once
        if found != signal.SIG_IGN and not outer:
            before[one] = found
    try:
        for one in before:
            signal.signal(one, handler)
        yield
    finally:
        for one, found in before.items():
            signal.signal(one, found)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore them all in this block, in which something is put back; what it starts does, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, signal.SIG_IGN) for one in _ALL}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
