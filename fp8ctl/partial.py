"""A checkpoint in the making: found again after a kill, one command at a time.

It lies beside its target as the folder `.NAME.fp8ctl-partial`; the file
`.NAME.fp8ctl-journal` says which files of it are finished, and is locked while a
command works on it. The journal's first line says what it is the beginning of: another
plan, source or version starts anew. Python 3.10, standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from typing import TYPE_CHECKING, Any

from fp8ctl.errors import BusyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


class Partial:
    """The folder and its journal, which this process has locked.

    Attributes:
        folder: where the result grows.
        journal: the file beside it.
        finished: file to the checksums of its parts, of those that an earlier command or
            this one finished.
    """

    def __init__(self, out: Path, descriptor: int, key: str) -> None:
        self.folder, self.journal = _places(out)
        self.finished: dict[str, tuple[int, ...]] = {}
        self._descriptor = descriptor
        self._lock = threading.Lock()
        lines = _lines(descriptor)
        if not lines or lines[0] != {"key": key} or not self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)
            os.ftruncate(descriptor, 0)
            self._append({"key": key})
            self.folder.mkdir()
            return
        for line in lines[1:]:
            if "lost" in line:
                self.finished.pop(line["lost"], None)
            else:
                self.finished[line["file"]] = tuple(int(one, 16) for one in line["sums"])
        # Behind a line that a kill cut in two, the next one would be lost as well.
        os.write(descriptor, b"\n")

    def finish(self, file: str, sums: Sequence[int]) -> None:
        """Note that a file is complete and on the disk."""
        self._append({"file": file, "sums": [f"{one:x}" for one in sums]})
        self.finished[file] = tuple(sums)

    def lose(self, file: str) -> None:
        """Note that a file is not what it was; it will be made again."""
        self._append({"lost": file})
        self.finished.pop(file, None)

    def complete(self, out: Path) -> None:
        """Give the folder its name.

        Raises:
            OSError: something is there, or the file system says no.
        """
        sync_folder(self.folder)
        # Replaces an empty folder, and nothing else.
        self.folder.rename(out)
        sync_folder(out.parent)
        self.journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.journal.unlink(missing_ok=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line).encode() + b"\n"
        with self._lock:
            while text:
                text = text[os.write(self._descriptor, text) :]
            os.fsync(self._descriptor)


@contextlib.contextmanager
def opened(out: Path, key: str) -> Iterator[Partial]:
    """Yield the partial of `out` that belongs to `key`, new where there is none.

    It is kept when the block ends, however it does, unless it was completed or discarded.

    Raises:
        BusyError: another command makes the same target.
        OSError: it cannot be written.
    """
    journal = _places(out)[1]
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    while True:
        descriptor = os.open(journal, flags, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"another fp8ctl writes {out}: it has locked {journal}",
                    hint="wait until it has ended, or give --out /another/folder",
                    data={"journal": str(journal)},
                ) from None
            # The one before may have removed the file between our opening and locking it.
            if not _is(journal, descriptor):
                continue
            yield Partial(out, descriptor, key)
            return
        finally:
            os.close(descriptor)


def left(out: Path) -> Path | None:
    """Return the folder of what an earlier command left of `out`, None where there is none."""
    folder, journal = _places(out)
    return folder if journal.is_file() and folder.is_dir() else None


def used(out: Path) -> int:
    """Return the bytes on the disk that the partial of `out` takes now."""
    total = 0
    for folder, _, names in os.walk(_places(out)[0]):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _places(out: Path) -> tuple[Path, Path]:
    return (
        out.parent / f".{out.name}.fp8ctl-partial",
        out.parent / f".{out.name}.fp8ctl-journal",
    )


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lines(descriptor: int) -> list[dict[str, Any]]:
    """Return the lines of a journal; one that a kill cut in two did not happen."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(os.dup(descriptor), "rb") as file:
        found = []
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    found.append(line)
    return found
