"""What people and programs see: two streams, one JSON document, terminals and pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, TextIO

import pytest

from fp8ctl.errors import UsageError
from fp8ctl.render import Reporter, human_bytes, plural

if TYPE_CHECKING:
    from collections.abc import Iterator

ESCAPE = "\x1b["
# Colours of the foreground and the background; bold is none (https://no-color.org).
COLOUR = re.compile(r"\x1b\[([0-9]+;)*(3[0-9]|4[0-9]|9[0-7]|10[0-7])(;[0-9]+)*m")


class Terminal:
    """A pseudo-terminal that two streams write to and that is read here."""

    def __init__(self) -> None:
        self._reader, self._writer = os.openpty()
        self.stream: TextIO = os.fdopen(os.dup(self._writer), "w", encoding="utf-8")

    def read(self) -> str:
        """Return what was shown so far, and hang up."""
        self.stream.close()
        os.close(self._writer)
        data = b""
        with contextlib.suppress(OSError):  # Linux says EIO where the other end is closed
            while chunk := os.read(self._reader, 65536):
                data += chunk
        os.close(self._reader)
        self._reader = -1
        return data.decode()

    def close(self) -> None:
        if self._reader >= 0:
            self.read()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = Terminal()
    yield made
    made.close()


def pipes(*, json_mode: bool = False) -> tuple[Reporter, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Reporter(json_mode=json_mode, out=out, err=err), out, err


def use_everything(report: Reporter) -> None:
    """Call whatever a command may call while it works."""
    report.say("talk")
    report.warn("careful")
    report.data("answer")
    report.data()
    report.table(("a", "b"), [("1", "2")])
    with report.step("quick") as step:
        step.note = "noted"
    with report.step("slow", talks=True):
        report.say("inside")
    with report.progress("copy", 2, "files") as tell:
        tell(1)
        tell(2)
    report.muted().data("never")


# --- streams and JSON ---------------------------------------------------------------------------


def test_the_answer_goes_to_stdout_and_talk_to_stderr() -> None:
    report, out, err = pipes()
    use_everything(report)
    report.finish("plan", {"x": 1})
    assert out.getvalue() == "answer\n\na  b\n1  2\n"
    for text in ("talk", "warning: careful", "quick: noted", "inside", "copy: 100 % (2/2 files)"):
        assert text in err.getvalue()
    assert ESCAPE not in out.getvalue() + err.getvalue()


def test_under_json_stdout_is_one_document_and_nothing_else() -> None:
    report, out, err = pipes(json_mode=True)
    use_everything(report)
    assert out.getvalue() == ""
    report.finish("plan", {"x": [1, None, "ü"], "where": __file__})
    assert json.loads(out.getvalue()) == {
        "ok": True,
        "command": "plan",
        "data": {"x": [1, None, "ü"], "where": __file__},
    }
    assert out.getvalue().endswith("}\n")
    assert "talk" in err.getvalue()


def test_an_error_under_json_is_one_document_with_its_four_parts() -> None:
    report, out, err = pipes(json_mode=True)
    report.fail("patch", UsageError("no 'x'", hint="--y", data={"found": "x"}))
    assert json.loads(out.getvalue()) == {
        "ok": False,
        "command": "patch",
        "error": {"id": "FP8-USAGE", "message": "no 'x'", "hint": "--y", "data": {"found": "x"}},
    }
    assert err.getvalue() == ""


@pytest.mark.parametrize("hint", [None, "fp8ctl ps"])
def test_an_error_for_people_is_message_and_hint_on_stderr(hint: str | None) -> None:
    report, out, err = pipes()
    report.fail("stop", UsageError("no name", hint=hint))
    assert out.getvalue() == ""
    assert err.getvalue() == "error: no name\n" + (f"\nhint: {hint}\n" if hint else "")


def test_a_muted_reporter_talks_and_prints_no_data() -> None:
    report, out, err = pipes()
    muted = report.muted()
    muted.say("talk")
    muted.data("answer")
    muted.table(("a",), [("1",)])
    assert (out.getvalue(), err.getvalue()) == ("", "talk\n")


# --- terminals ----------------------------------------------------------------------------------


def test_a_terminal_gets_colour_a_live_step_and_a_boxed_table(terminal: Terminal) -> None:
    report = Reporter(out=terminal.stream, err=terminal.stream)
    report.warn("careful")
    report.table(("name", "state"), [("[bold]x[/bold]", "ok")])
    with report.step("work") as step:
        step.note = "done"
    shown = terminal.read()
    assert COLOUR.search(shown)
    assert f"{ESCAPE}33mwarning:{ESCAPE}0m careful" in shown
    assert "───" in shown
    assert "[bold]x[/bold]" in shown, "data was taken for markup"
    assert "work …" in shown
    assert f"\r{ESCAPE}2K{ESCAPE}32m✓{ESCAPE}0m work: done  [0.0 s]" in shown


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_turned_off(
    name: str, value: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    report = Reporter(out=terminal.stream, err=terminal.stream)
    report.warn("careful")
    report.table(("name",), [("x",)])
    report.fail("ps", UsageError("no", hint="try"))
    with report.progress("copy", 2) as tell:
        tell(2)
    shown = terminal.read()
    assert "warning: careful" in shown
    assert "error: no" in shown
    assert not COLOUR.search(shown)


def test_a_bar_on_a_terminal_is_gone_when_it_is_done(terminal: Terminal) -> None:
    report = Reporter(out=io.StringIO(), err=terminal.stream)
    with report.progress("copy", 4) as tell:
        for done in range(5):
            tell(done)
    report.say("after")
    shown = terminal.read()
    assert "copy" in shown
    assert "100 %" not in shown, "plain lines are for pipes"
    assert f"{ESCAPE}2K" in shown[shown.rindex("copy") :], "the bar is left on the screen"
    assert shown.endswith("after\r\n")


def test_each_stream_is_judged_alone(terminal: Terminal) -> None:
    """`fp8ctl ps > file` on a terminal: colour in the talk, none in the file."""
    out = io.StringIO()
    report = Reporter(out=out, err=terminal.stream)
    report.warn("careful")
    report.data(report.style("answer", "ok"))
    report.table(("a",), [("1",)])
    assert out.getvalue() == "answer\na\n1\n"
    assert ESCAPE in terminal.read()


def test_a_narrow_terminal_folds_the_last_column_and_cuts_no_other(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "model.layers.*.self_attn.q_proj.weight"
    why = "a linear layer whose two sides are multiples of the block"
    Reporter(out=terminal.stream).table(("tensor", "why"), [(name, why)])
    shown = terminal.read()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert name in shown
    assert len(lines) > 4, "the last column was not folded"
    assert all(len(line) <= 80 for line in lines)


def test_a_table_that_a_terminal_cannot_hold_is_plain_and_whole(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = ("model.layers.*.self_attn.q_proj.weight", "30", "576x576", "fp8", "9x9", "19.9 MB")
    rows = [(*row, "10.0 MB", "linear layer of the decoder")]
    columns = ("tensor", "count", "shape", "as", "scales", "before", "after", "why")
    Reporter(out=terminal.stream).table(columns, rows)
    shown = terminal.read()
    assert "  ".join((row[0], "30   ", row[2])) in shown
    assert "linear layer of the decoder" in shown
    assert "…" not in shown
    assert "──" not in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_cannot_carry_a_mark_gets_a_plain_one(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    report = Reporter(out=stream, err=stream)
    report.data("✓ Zürich 山")
    with report.step("work"):
        report.say("…")
    shown = raw.getvalue().decode(encoding)
    assert shown.startswith("ok Z" + ("ü" if encoding == "latin-1" else "\\xfc"))
    assert "\\u5c71" in shown
    assert "\nok work  [" in shown
    stream.close()


def test_a_terminal_that_cannot_carry_a_mark_gets_its_tables_too(terminal: Terminal) -> None:
    stream = io.TextIOWrapper(
        os.fdopen(os.dup(terminal.stream.fileno()), "wb", buffering=0),
        encoding="ascii",
        write_through=True,
    )
    report = Reporter(out=stream, err=stream)
    report.table(("name", "state"), [("✓ 山", "·")])
    with report.progress("✓ 山", 2) as tell:
        tell(2)
    stream.close()
    assert "ok \\u5c71" in terminal.read()


# --- steps and progress -------------------------------------------------------------------------


def test_a_step_that_fails_is_marked_so_and_its_error_goes_on() -> None:
    report, _, err = pipes()
    with report.step("first") as step:
        step.note = "fine"

    def break_off() -> None:
        with report.step("second") as step:
            step.note = "half"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    first, second = err.getvalue().splitlines()
    assert first.startswith("✓ first: fine  [")
    assert second.startswith("✗ second: half  [")


def test_a_step_that_talks_has_its_title_above_what_it_says() -> None:
    report, _, err = pipes()
    with report.step("outer", talks=True):
        report.say("inside")
    lines = err.getvalue().splitlines()
    assert lines[:2] == ["▸ outer", "inside"]
    assert lines[2].startswith("✓ outer  [")


def test_progress_in_a_pipe_is_a_line_at_each_tenth_and_no_more() -> None:
    report, _, err = pipes()
    with report.progress("copy", 1000, "MB") as tell:
        for done in range(1001):
            tell(done)
        tell(1000)
    lines = err.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "copy: 0 % (0/1000 MB)"
    assert lines[-1] == "copy: 100 % (1000/1000 MB)"


def test_bytes_are_counted_as_people_write_them() -> None:
    report, _, err = pipes()
    with report.progress("copy", 2_000_000_000, "B") as tell:
        tell(500_000_000)
    assert err.getvalue() == "copy: 20 % (500.0 MB of 2.0 GB)\n"


@pytest.mark.parametrize(("count", "text"), [(0, "0 patches"), (1, "1 patch"), (2, "2 patches")])
def test_one_is_not_several(count: int, text: str) -> None:
    assert plural(count, "patch", "patches") == text
    assert plural(count, "file") == text.replace("patches", "files").replace("patch", "file")


@pytest.mark.parametrize(("total", "done"), [(0, 0), (0, 5), (3, 9)])
def test_a_total_that_is_wrong_or_nothing_ends_at_100(total: int, done: int) -> None:
    report, _, err = pipes()
    with report.progress("copy", total) as tell:
        tell(done)
    assert err.getvalue() == f"copy: 100 % ({done}/{total})\n"


def test_progress_in_bytes_is_written_as_people_write_it() -> None:
    report, _, err = pipes()
    with report.progress("fetch", 2_000_000, "B") as tell:
        tell(1_000_000)
    assert err.getvalue() == "fetch: 50 % (1.0 MB of 2.0 MB)\n"


# --- tables and sizes ---------------------------------------------------------------------------


def test_columns_in_a_pipe_are_aligned_by_their_widest_cell() -> None:
    report, out, _ = pipes()
    report.table(("name", "n", "last"), [("a", "1000", ""), ("longer name", "1", "x")])
    assert out.getvalue().splitlines() == [
        "name         n     last",
        "a            1000",
        "longer name  1     x",
    ]


@pytest.mark.parametrize(("columns", "ruled"), [("200", True), ("40", False)])
def test_a_terminal_too_narrow_for_a_table_gets_every_cell_whole(
    columns: str, ruled: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    names = ["a" * 30, "b" * 30]
    Reporter(out=terminal.stream).table(("name", "other", "last"), [(*names, "c d")])
    shown = terminal.read()
    assert ("─" in shown) == ruled
    assert all(name in shown for name in names)


def test_a_table_of_no_rows_is_its_head() -> None:
    report, out, _ = pipes()
    report.table(("name", "state"), [])
    assert out.getvalue() == "name  state\n"


def test_a_row_with_a_cell_too_few_is_a_fault_and_not_a_shifted_column() -> None:
    with pytest.raises(ValueError, match="zip"):
        pipes()[0].table(("a", "b"), [("1",)])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (93_800_000, "93.8 MB"),
        (1_234_000_000, "1.2 GB"),
        (5_000_000_000_000, "5000.0 GB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_sizes_are_written_as_people_write_them(count: int, text: str) -> None:
    assert human_bytes(count) == text


# --- readers that go away -----------------------------------------------------------------------

# What is left in a buffer is written once more when the interpreter ends.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

_TALKER = """
import sys
from fp8ctl.render import Reporter
from fp8ctl.errors import UsageError

report = Reporter(json_mode={json_mode})
for i in range(5000):
    report.data("line %d %s" % (i, "x" * 50))
report.table(("a",), [("b",)] * 2000)
report.finish("ps", {{"text": "x" * 300_000}})
sys.stderr.write("reached the end\\n")
"""


@pytest.mark.parametrize("json_mode", [False, True])
def test_a_reader_that_has_gone_away_is_no_error(json_mode: bool) -> None:
    """`fp8ctl ps | head -1`"""
    process: Any = subprocess.Popen(
        [sys.executable, "-c", _TALKER.format(json_mode=json_mode)],
        env=BUFFERED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 0
    assert said == "reached the end\n"


def test_a_stdout_that_takes_nothing_is_an_error_of_its_own() -> None:
    script = _TALKER.format(json_mode=True) + "raise SystemExit('not reached')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert "StdoutError: [Errno 28] cannot write to stdout: No space left on device" in done.stderr
    assert "reached the end" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_positive_control_loses_no_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TALKER.format(json_mode=False)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 5000 + 2001


@pytest.mark.parametrize("json_mode", [False, True])
def test_an_output_that_takes_no_more_is_not_permitted_and_told_on_stderr(json_mode: bool) -> None:
    argv = [sys.executable, "-m", "fp8ctl", "ps", *(["--json"] if json_mode else [])]
    code = "from fp8ctl.render import Reporter; Reporter().data('x')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            argv if json_mode else [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            env=BUFFERED,
            text=True,
            check=False,
        )
    assert "cannot write to stdout: No space left on device" in done.stderr
    if json_mode:
        assert done.returncode == 6
        assert "Traceback" not in done.stderr


def test_an_output_that_is_closed_is_no_error() -> None:
    code = "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])"
    argv = [sys.executable, "-m", "fp8ctl", "ps", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


# --- encodings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "✓ größer …"), ("latin-1", "ok größer ..."), ("ascii", "ok gr\\xf6\\xdfer ...")],
)
def test_what_an_encoding_cannot_carry_is_written_in_another_way(encoding: str, shown: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Reporter(out=out).data("✓ größer …")
    out.seek(0)
    assert out.read() == f"{shown}\n"


def test_a_path_that_is_no_text_can_be_shown() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    Reporter(out=out).data(os.fsdecode(b"/models/\xff"))
    out.seek(0)
    assert out.read() == "/models/\\udcff\n"
