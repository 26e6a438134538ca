"""Short turns are had as long as anybody wants them, and then what was before."""

from __future__ import annotations

import contextlib
import sys

from fp8ctl.carriers import turns


def test_turns_are_short_until_the_last_who_wants_them_ends() -> None:
    before = sys.getswitchinterval()
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(turns.short())
    short = sys.getswitchinterval()
    assert short < before
    second.enter_context(turns.short())
    first.close()
    assert sys.getswitchinterval() == short, "the second still wants them"
    second.close()
    assert sys.getswitchinterval() == before


def test_who_has_shorter_ones_keeps_them() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        mine = sys.getswitchinterval()
        with turns.short():
            assert sys.getswitchinterval() == mine
        assert sys.getswitchinterval() == mine
    finally:
        sys.setswitchinterval(before)
