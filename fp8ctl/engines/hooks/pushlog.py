"""The flight recorder's server side: a line for every tensor and every update.

Lines are made and written a moment after an update, when its client has the answer; whoever
reads them waits for that.

`push-log.jsonl` in the run folder, readable by its owner alone. At `LIMIT` bytes it
becomes `push-log.1.jsonl`, in place of the one before: so at most twice that lies on
the disk, and the newest lines are always there. Lines are numbered from the start of
the server; a reader says after which one it wants more.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

LIMIT = 64 << 20
#: Lines of one answer: a client asks again from `next`.
LINES = 5000


class PushLog:
    """The log of one server.

    Attributes:
        path: of the newer file.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        """Start an empty log.

        Args:
            folder: the run folder; None keeps no log.
            limit: bytes of a file at which the next one begins.
        """
        self.path = folder / "push-log.jsonl" if folder else None
        self._older = folder / "push-log.1.jsonl" if folder else None
        self._limit = limit
        self._in_older = 0
        self._in_newer = 0
        #: Number of the first line in the older file.
        self._first = 0
        self._one_at_a_time = threading.Lock()
        self._due: deque[Iterable[Mapping[str, object]]] = deque()

    def later(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Append lines when it is settled or read next, behind those that came before."""
        self._due.append(lines)

    def settle(self) -> None:
        """Write what is due; what the file system refuses is told on stderr, not raised."""
        with self._one_at_a_time:
            self._settle()

    def _settle(self) -> None:
        while self._due:
            self._write(self._due.popleft())

    def _write(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Append lines, all or none."""
        texts = [json.dumps(line) + "\n" for line in lines]
        if self.path is None or self._older is None or not texts:
            return
        try:
            if self.path.exists() and self.path.stat().st_size >= self._limit:
                self.path.replace(self._older)
                self._first += self._in_older
                self._in_older, self._in_newer = self._in_newer, 0
            _append(self.path, "".join(texts).encode())
            self._in_newer += len(texts)
        except OSError as e:
            sys.stderr.write(f"fp8ctl: {self.path} could not be written: {e}\n")

    def read(self, after: int, most: int = LINES) -> tuple[list[Any], int]:
        """Return lines from number `after` on, and the number to ask with next."""
        with self._one_at_a_time:
            self._settle()
            after = min(max(after, self._first), self._first + self._in_older + self._in_newer)
            files = ((self._older, self._first), (self.path, self._first + self._in_older))
            found: list[Any] = []
            for path, first in files:
                if path is None or not path.exists():
                    continue
                with open(path) as file:
                    for number, line in enumerate(file, first):
                        if number >= after + most:
                            break
                        if number >= after:
                            found.append(json.loads(line))
            return found, after + len(found)


def _append(path: Path, data: bytes) -> None:
    """Write all or nothing at the end of a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
