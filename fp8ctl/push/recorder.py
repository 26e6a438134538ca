"""The flight recorder's client side: a line for every tensor and every update.

The lines are those of the server's log (`GET /fp8ctl/push/log`), so that one reader does for
both. A batch of lines is one write to the end of the file: after a kill the file ends
with a whole line, or with a part of one, which the next update closes.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from typing import TYPE_CHECKING

from fp8ctl.errors import NotPermittedError
from fp8ctl.push import facts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from fp8ctl.manifest import Plan
    from fp8ctl.push.result import Update
    from fp8ctl.wire import Entry


class Recorder:
    """Writes down one update."""

    def __init__(
        self,
        path: Path,
        plan: Plan | None,
        version: str,
        push: str,
        before: Callable[[], Mapping[str, str]],
    ) -> None:
        """Open the file.

        Args:
            path: of the file, which is added to.
            plan: of the servers.
            version: as the trainer calls it.
            push: the update's own name.
            before: returns the digests of what the servers held, as far as they are known.

        Raises:
            NotPermittedError: it cannot be written.
        """
        block = None if plan is None else plan.block
        self._block = None if block is None else (block.n, block.k)
        self._path, self._version, self._push = path, version, push
        self._before = before
        self._started = time.time()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise NotPermittedError(
                f"cannot write {path}: {e.strerror}", hint="Rollout(urls, plan, record=PATH)"
            ) from e
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._write(b"\n")

    def facts(
        self, entries: Sequence[Entry], tensors: Sequence[torch.Tensor]
    ) -> list[dict[str, float]]:
        """Return the facts of tensors of a bucket."""
        return facts.facts(entries, tensors, self._block)

    def note(self, pairs: Sequence[tuple[Entry, bool]], seconds: float) -> None:
        """Write down tensors, and whether they are sent.

        Args:
            pairs: the tensors.
            seconds: that quantising and looking at them took; shared out by their bytes.
        """
        before = self._before()
        total = sum(entry.nbytes for entry, _ in pairs) or 1
        lines = [
            {
                **entry.facts,
                "kind": "tensor",
                "push": self._push,
                "version": self._version,
                "name": entry.name,
                "sent": sent,
                "digest": entry.digest,
                "before": before.get(entry.name, ""),
                "bytes": entry.nbytes if sent else 0,
                "microseconds": round(seconds * 1e6 * entry.nbytes / total, 1),
            }
            for entry, sent in pairs
        ]
        self._write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def end(self, done: Update, outcome: str, message: str = "") -> None:
        """Write down how the update ended, and close the file.

        Args:
            done: the update, as far as it came.
            outcome: "applied", or "failed", of which the servers know whether anything changed.
            message: what went wrong.
        """
        line = {
            "kind": "update",
            "push": done.push,
            "version": done.version,
            "outcome": outcome,
            "servers": list(done.servers),
            "tensors": done.sent,
            "skipped": done.skipped,
            "bytes": done.bytes_sent,
            "bytes_skipped": done.bytes_skipped,
            "buckets": done.buckets,
            "seconds": {stage: round(s, 6) for stage, s in done.stages.items()},
            "started": self._started,
            "ended": time.time(),
            "message": message,
        }
        self._write(json.dumps(line).encode() + b"\n")
        self.close()

    def close(self) -> None:
        """Close the file; also a second time."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _write(self, data: bytes) -> None:
        try:
            os.write(self._file, data)
        except OSError as e:
            # A full disk must not leave servers without weights.
            warnings.warn(f"{self._path} could not be written: {e}", RuntimeWarning, stacklevel=2)
