"""Everything a person or a program sees.

The only module that prints and the only importer of rich. Data goes to stdout,
talk to stderr; under `--json` stdout carries one JSON document and nothing
else. A command's body gets a `Reporter`, says what it does through it, and
returns its data as a dict of JSON types.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8ctl.errors import Fp8ctlError

JsonObject = dict[str, object]

_STYLES = {
    "ok": "32",
    "warn": "33",
    "fail": "31",
    "dim": "2",
    "bold": "1",
    "path": "36",
}
# For a stream whose encoding cannot carry them.
_PLAIN = str.maketrans({"✓": "ok", "✗": "x", "▸": ">", "·": "-", "…": "..."})
# The narrowest last column of a table that is still read with ease.
_NARROWEST = 24
# A longer document is not indented: that takes json four times as long.
_READ_BY_PEOPLE = 1 << 20


class StdoutError(OSError):
    """Stdout takes nothing: its disk is full, say. `cli` turns it into an error of ours."""


class Reporter:
    """What a command says while it works, for a terminal, a pipe or a program.

    Attributes:
        json_mode: True under `--json`; `data` and `table` then print nothing.
    """

    def __init__(
        self, *, json_mode: bool = False, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.json_mode = json_mode
        # A stream that was closed (`>&-`) is None.
        self._out = out or sys.stdout or io.StringIO()
        self._err = err or sys.stderr or io.StringIO()
        self._closed = False
        self._lines = False

    def line_by_line(self) -> None:
        """Have each JSON document take one line: there will be several."""
        self._lines = True

    def silent(self) -> Reporter:
        """Return a reporter that says nothing at all."""
        return Reporter(json_mode=True, out=io.StringIO(), err=io.StringIO())

    def muted(self) -> Reporter:
        """Return a reporter that talks as this one does and prints no data."""
        return Reporter(json_mode=True, out=self._out, err=self._err)

    def say(self, text: str = "") -> None:
        """Print one line of talk to stderr."""
        self._write(self._err, text + "\n")

    def warn(self, text: str) -> None:
        """Print a warning to stderr."""
        self.say(f"{self.style('warning:', 'warn', self._err)} {text}")

    def data(self, text: str = "") -> None:
        """Print a line of the answer itself to stdout; nothing under `--json`."""
        if not self.json_mode:
            self._write(self._out, text + "\n")

    def raw(self, data: bytes) -> None:
        """Print bytes of the answer to stdout as they are, in no encoding; as `data` otherwise."""
        if self.json_mode or not data:
            return
        binary = getattr(self._out, "buffer", None)
        if binary is None:  # a stream of text alone, in memory
            self._write(self._out, data.decode("utf-8", "surrogateescape"))
            return
        self._write(self._out, "")
        with self._guarded(self._out):
            binary.write(data)
            binary.flush()

    def style(self, text: str, name: str, stream: TextIO | None = None) -> str:
        """Return `text` in a style of this module, or as it is where colour is off."""
        return f"\x1b[{_STYLES[name]}m{text}\x1b[0m" if self._colour(stream or self._out) else text

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table to stdout: ruled on a terminal, plain aligned columns in a pipe.

        On a terminal only the last column is folded. One too narrow for that gets
        the plain form, whose cells are whole.
        """
        if self.json_mode:
            return
        widths = [
            max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)
        ]
        if self._out.isatty():
            from rich.box import SIMPLE_HEAD
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            console = Console(file=self._out, no_color=not self._colour(self._out))
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for column in columns[:-1]:
                table.add_column(column, no_wrap=True)
            table.add_column(columns[-1], overflow="fold")
            for row in rows:
                table.add_row(*(Text(_fit(self._out, cell)) for cell in row))
            last = min(widths[-1], _NARROWEST)
            if sum(widths[:-1]) + 2 * len(widths[:-1]) + last <= console.width:
                console.print(table)
                return
        for row in (columns, *rows):
            line = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
            self._write(self._out, line.rstrip() + "\n")

    @contextlib.contextmanager
    def step(self, title: str, *, talks: bool = False) -> Iterator[Step]:
        """Show one step as it happens, with its time, on stderr.

        Args:
            title: what is done.
            talks: the body prints lines of its own, so the title gets one too.
        """
        step = Step()
        live = self._err.isatty() and not talks
        if live or talks:
            end = "\n" if talks else " …"
            self._write(self._err, f"{self.style('▸', 'dim', self._err)} {title}{end}")
        started = time.monotonic()
        mark = self.style("✗", "fail", self._err)
        try:
            yield step
            mark = self.style("✓", "ok", self._err)
        finally:
            took = time.monotonic() - started
            note = f": {step.note}" if step.note else ""
            clear = "\r\x1b[2K" if live else ""
            self._write(self._err, f"{clear}{mark} {title}{note}  [{took:.1f} s]\n")

    @contextlib.contextmanager
    def progress(self, title: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Yield a function that takes the amount done so far (absolute).

        A bar on a terminal, with rate and time left where the amounts are bytes; in a pipe
        one plain line at each tenth.

        Args:
            title: what is done.
            total: the amount at the end.
            unit: printed behind the amounts; `B`: they are bytes, written as `human_bytes` does.
        """
        if self._err.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            console = Console(file=self._err, no_color=not self._colour(self._err))
            columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
            if unit == "B":
                columns += [TransferSpeedColumn(), TimeRemainingColumn()]
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(_fit(self._err, title), total=total)
                yield lambda done: bar.update(task, completed=done)
            return
        shown = -1

        def tell(done: int) -> None:
            nonlocal shown
            tenth = 10 if total <= 0 else min(10, done * 10 // total)
            if tenth > shown:
                shown = tenth
                amount = f"{done}/{total} {unit}".rstrip()
                if unit == "B":
                    amount = f"{human_bytes(done)} of {human_bytes(total)}"
                self.say(f"{title}: {tenth * 10} % ({amount})")

        yield tell

    def finish(self, command: str, data: JsonObject, *, ok: bool = True) -> None:
        """Print the JSON document of a command that ran; nothing in text mode."""
        if self.json_mode:
            self._document({"ok": ok, "command": command, "data": data})

    def fail(self, command: str, error: Fp8ctlError) -> None:
        """Print an error: message, blank line, hint; or its JSON document.

        It goes to stderr as text in any case where stdout takes nothing.
        """
        if self.json_mode and not self._closed:
            body = {
                "id": error.id,
                "message": error.message,
                "hint": error.hint,
                "data": error.data,
            }
            with contextlib.suppress(StdoutError):
                self._document({"ok": False, "command": command, "error": body})
                return
        self.say(f"{self.style('error:', 'fail', self._err)} {error.message}")
        if error.hint:
            self.say()
            self.say(f"{self.style('hint:', 'bold', self._err)} {error.hint}")

    def _document(self, document: JsonObject) -> None:
        text = json.dumps(document, default=str)
        if len(text) < _READ_BY_PEOPLE and not self._lines:
            text = json.dumps(document, default=str, indent=2)
        self._write(self._out, text + "\n")

    def _colour(self, stream: TextIO) -> bool:
        return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def _write(self, stream: TextIO, text: str) -> None:
        with self._guarded(stream):
            stream.write(_fit(stream, text))
            stream.flush()

    @contextlib.contextmanager
    def _guarded(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            forget(stream)
            # A reader that has gone away (`fp8ctl ps | head -1`) is no error of ours,
            # and of a lost stderr nobody can be told.
            if isinstance(e, BrokenPipeError) or stream is not self._out:
                return
            self._closed = True
            raise StdoutError(e.errno, f"cannot write to stdout: {e.strerror}") from e


def forget(stream: TextIO) -> None:
    """Have nothing more written; what is left in the buffer would fail again at the very end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fit(stream: TextIO, text: str) -> str:
    """Return `text` as the stream's encoding can carry it."""
    encoding, errors = stream.encoding or "utf-8", stream.errors or "strict"
    try:
        text.encode(encoding, errors)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


class Step:
    """Handle of a running step; `note` is printed behind its title when it ends."""

    note: str = ""


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return a count with its noun: `1 file`, `2 files`, `0 files`."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def human_bytes(count: float) -> str:
    """Return a byte count as people write it: `0.9 kB`, `93.8 MB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
