"""Cuts a connection when its time is up, whatever still comes of it.

The timeout of a socket is for one step: a server that sends a byte now and then never meets it.
Standard library only; called by `gate` and `check.answers`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading


class Deadline:
    """So many seconds for all that happens in its block.

    Attributes:
        seconds: how many.
        passed: whether they were over before the block was.
    """

    def __init__(self, seconds: float) -> None:
        """Set the time; it runs from the beginning of the block."""
        self.seconds = seconds
        self.passed = False
        self._over = False
        self._one_at_a_time = threading.Lock()
        self._watched: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def watch(self, connection: socket.socket) -> None:
        """Cut this connection, too, when the time is up; at once if it is."""
        try:
            # A socket that is wrapped for TLS, or closed by its owner, keeps no descriptor.
            own = socket.socket(fileno=os.dup(connection.fileno()))
        except (OSError, ValueError):
            return
        with self._one_at_a_time:
            self._watched.append(own)
            if self.passed:
                _shut(own)

    def _cut(self) -> None:
        with self._one_at_a_time:
            if not self._over:
                self.passed = True
                for one in self._watched:
                    _shut(one)

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        with self._one_at_a_time:
            self._over = True
            for one in self._watched:
                one.close()


def _shut(connection: socket.socket) -> None:
    """End both directions: whoever reads has an end of file, whoever writes an error."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
