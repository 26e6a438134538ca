"""Reading the end of a log, and what is added to it. Called by `server` and `launching`."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# The server's own access log of whoever waits for it.
_ASKED: Final = re.compile(r'"GET /fp8ctl/state HTTP/')
_CHUNK: Final = 1 << 16
_LONGEST: Final = 1 << 16


class Tail:
    """A log that is read as it grows; it keeps its file when the folder moves.

    A line is handed out when it is complete; what has no end yet stays for the
    next call, up to 64 KiB, so that a flood without a newline takes no memory.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def lines(self, *, final: bool = False) -> list[str]:
        """Return some of the lines added since the last call; none only when there are none.

        Args:
            final: hand out an unfinished last line too.
        """
        while chunk := self._file.read(_CHUNK):
            whole, separator, rest = (self._rest + chunk).rpartition(b"\n")
            if len(rest) >= _LONGEST:
                whole, separator, rest = whole + separator + rest, b"\n", b""
            self._rest = rest
            if separator:
                return _split(whole)
        if final and self._rest:
            whole, self._rest = self._rest, b""
            return _split(whole)
        return []


def _split(whole: bytes) -> list[str]:
    return [line.rstrip("\r") for line in whole.decode(errors="replace").split("\n")]


def last_lines(path: Path, count: int) -> tuple[str, ...]:
    """Return the last lines of a log, none where there is no log; reads 256 KiB at most."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4 * _CHUNK))
            text = file.read(4 * _CHUNK).decode(errors="replace")
    except OSError:
        return ()
    lines = text.splitlines()
    return tuple(line for line in lines if line.strip())[-count:]


def telling(lines: Iterable[str]) -> tuple[str, ...]:
    """Return the lines without those of the access log that fp8ctl's own questions leave."""
    return tuple(line for line in lines if not _ASKED.search(line))
