"""Threads of this process take turns more often while weights are on their way.

Python lets a thread hold its lock for 5 ms while others wait for it: longer than a bucket takes
on the wire. Whoever fills the next one, or a scheduler that looks for requests, would keep those
waiting that send, ask and receive.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_TURN = 0.0002
#: Seconds between two looks at what should end soon, and at what has not ended so soon.
_NAP, _LONG_NAP = 0.00003, 0.001
#: Seconds that are soon.
_SOON = 0.02
_changing = threading.Lock()
_inside = 0
_before = 0.0


@contextlib.contextmanager
def short() -> Iterator[None]:
    """Have them until the end of the block; blocks may overlap in any order."""
    global _inside, _before
    with _changing:
        if _inside == 0:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, _TURN))
        _inside += 1
    try:
        yield
    finally:
        with _changing:
            _inside -= 1
            if _inside == 0:
                sys.setswitchinterval(_before)


def nap(since: float) -> bool:
    """Sleep between two looks at the device: shortly at first, a bucket takes milliseconds.

    Not without any: other threads of this process are at work.

    Args:
        since: when this began to look, of time.monotonic().

    Returns:
        Whether it is a while ago, so that there is time to look at something else as well.
    """
    late = time.monotonic() - since > _SOON
    time.sleep(_LONG_NAP if late else _NAP)
    return late
