"""Threads of this process take turns more often while weights are on their way.

Python lets a thread hold its lock for 5 ms while others wait for it: longer than a bucket takes
on the wire. Whoever fills the next one, or a scheduler that looks for requests, would keep those
waiting that send, ask and receive.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_TURN = 0.0002
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
