"""Everything a person or a program sees.

The only module that prints and the only importer of rich. Data goes to stdout,
talk to stderr; under `--json` stdout carries one JSON document and nothing
else. A command's body gets a `Reporter`, says what it does through it, and
returns its data as a dict of JSON types.
"""

from __future__ import annotations

import contextlib
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


class Reporter:
    """What a command says while it works, for a terminal, a pipe or a program.

    Attributes:
        json_mode: True under `--json`; `data` and `table` then print nothing.
    """

    def __init__(
        self, *, json_mode: bool = False, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.json_mode = json_mode
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr

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

    def style(self, text: str, name: str, stream: TextIO | None = None) -> str:
        """Return `text` in a style of this module, or as it is where colour is off."""
        return f"\x1b[{_STYLES[name]}m{text}\x1b[0m" if self._colour(stream or self._out) else text

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table to stdout: boxed on a terminal, plain aligned columns in a pipe."""
        if self.json_mode:
            return
        if self._out.isatty():
            from rich.box import SIMPLE_HEAD
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            Console(file=self._out, no_color=not self._colour(self._out)).print(table)
            return
        widths = [
            max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)
        ]
        for row in (columns, *rows):
            line = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
            self._write(self._out, line.rstrip() + "\n")

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show one step as it happens, with its time, on stderr."""
        step = Step()
        live = self._err.isatty()
        if live:
            self._write(self._err, f"{self.style('▸', 'dim', self._err)} {title} …")
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

        A bar on a terminal; in a pipe one plain line at each tenth.
        """
        if self._err.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            console = Console(file=self._err, no_color=not self._colour(self._err))
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(title, total=total)
                yield lambda done: bar.update(task, completed=done)
            return
        shown = -1

        def tell(done: int) -> None:
            nonlocal shown
            tenth = 10 if total <= 0 else min(10, done * 10 // total)
            if tenth > shown:
                shown = tenth
                amount = f"{done}/{total}" + (f" {unit}" if unit else "")
                self.say(f"{title}: {tenth * 10} % ({amount})")

        yield tell

    def finish(self, command: str, data: JsonObject, *, ok: bool = True) -> None:
        """Print the JSON document of a command that ran; nothing in text mode."""
        if self.json_mode:
            self._document({"ok": ok, "command": command, "data": data})

    def fail(self, command: str, error: Fp8ctlError) -> None:
        """Print an error: message, blank line, hint; or its JSON document."""
        if self.json_mode:
            body = {
                "id": error.id,
                "message": error.message,
                "hint": error.hint,
                "data": error.data,
            }
            self._document({"ok": False, "command": command, "error": body})
            return
        self.say(f"{self.style('error:', 'fail', self._err)} {error.message}")
        if error.hint:
            self.say()
            self.say(f"{self.style('hint:', 'bold', self._err)} {error.hint}")

    def _document(self, document: JsonObject) -> None:
        self._write(self._out, json.dumps(document, indent=2, default=str) + "\n")

    def _colour(self, stream: TextIO) -> bool:
        return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def _write(self, stream: TextIO, text: str) -> None:
        # A reader that has gone away (`fp8ctl ps | head -1`) is no error of ours.
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Step:
    """Handle of a running step; `note` is printed behind its title when it ends."""

    note: str = ""


def human_bytes(count: float) -> str:
    """Return a byte count as people write it: `0.9 kB`, `93.8 MB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
