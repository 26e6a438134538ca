"""What a worker prints is in its own log and in the server's: all of it, in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8ctl.engines.hooks import ranklog

_BEGIN = """
import os, pathlib, subprocess, sys, time
from fp8ctl.engines.hooks import ranklog

sys.stdout.write("before\\n")  # into a buffer, where it goes to a pipe
ranklog.redirect({rank})
{body}
"""

# The worker ends when its rank's log has the last line.
_END = """
os.write(2, b"the end\\n")
log = pathlib.Path(os.environ["FP8CTL_RUN_DIR"]) / "rank-{rank}.log"
for _ in range(500):
    if log.read_bytes().endswith(b"the end\\n"):
        break
    time.sleep(0.01)
else:
    os._exit(9)
time.sleep(0.05)
"""

_VOICES = """
for i in range(0, 40, 4):
    print("line", i, flush=True)
    os.write(1, b"line %d\\n" % (i + 1))
    os.write(2, b"line %d\\n" % (i + 2))
    subprocess.run(["sh", "-c", "sh -c 'echo line %d >&2'" % (i + 3)], check=True)
"""

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def work(
    folder: Path, body: str, rank: int = 0, *, stderr: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a worker whose server's log is what comes back as its stdout."""
    return subprocess.run(
        [sys.executable, "-c", (_BEGIN + _END).format(body=body, rank=rank)],
        env={**BUFFERED, ranklog.RUN_DIR: str(folder)},
        stdout=subprocess.PIPE if stderr is None else subprocess.DEVNULL,
        stderr=subprocess.STDOUT if stderr is None else stderr,
        timeout=60,
        check=False,
    )


def test_both_logs_have_every_voice_in_order(tmp_path: Path) -> None:
    done = work(tmp_path, _VOICES, rank=3)
    lines = [f"line {i}" for i in range(40)] + ["the end"]
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == ["before", *lines]
    assert (tmp_path / "rank-3.log").read_text().splitlines() == lines
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3.log"]


def test_more_than_a_pipe_holds_arrives_whole(tmp_path: Path) -> None:
    done = work(tmp_path, "sys.stdout.write('x' * 299_999 + '\\n'); sys.stdout.flush()")
    text = b"x" * 299_999 + b"\nthe end\n"
    assert done.stdout == b"before\n" + text
    assert (tmp_path / "rank-0.log").read_bytes() == text


def test_a_worker_that_is_started_again_keeps_what_the_first_wrote(tmp_path: Path) -> None:
    work(tmp_path, "print('first', flush=True)")
    work(tmp_path, "print('second', flush=True)")
    text = (tmp_path / "rank-0.log").read_text()
    assert text.splitlines() == ["first", "the end", "second", "the end"]


def test_the_log_is_its_owners_alone(tmp_path: Path) -> None:
    work(tmp_path, "")
    assert (tmp_path / "rank-0.log").stat().st_mode & 0o777 == 0o600


def test_a_server_log_that_takes_no_more_does_not_stop_the_worker(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = work(tmp_path, "print('x' * 100_000, flush=True)", stderr=full.fileno())
    assert done.returncode == 0
    assert (tmp_path / "rank-0.log").read_text().splitlines()[-1] == "the end"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise RuntimeError('last words')", "RuntimeError: last words"),
        ("print('last words')", "last words"),
        ("import faulthandler; faulthandler.enable(); os.abort()", "Fatal Python error: Aborted"),
        ("os.write(1, b'last words'); os.kill(os.getpid(), 9)", "last words"),
    ],
    ids=["raise", "exit", "abort", "kill"],
)
def test_the_last_words_of_a_worker_are_in_both_logs(end: str, said: str, tmp_path: Path) -> None:
    """They say why it died. Not waited for by the worker, unlike above."""
    body = f"for i in range(2000): print('line', i)\n{end}"
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN.format(body=body, rank=0)],
        env={**BUFFERED, "PYTHONUNBUFFERED": "1", ranklog.RUN_DIR: str(tmp_path)},
        stdout=subprocess.PIPE,  # ends when the last who writes to it has
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    log = (tmp_path / "rank-0.log").read_text()
    for text in (done.stdout.removeprefix("before\n"), log):
        assert text.startswith("".join(f"line {i}\n" for i in range(2000)))
        assert said in text


def test_code_that_prints_and_lets_no_other_thread_run_is_not_stopped(tmp_path: Path) -> None:
    # A C++ library that prints more than a pipe holds, with Python's lock held.
    body = "import ctypes; ctypes.PyDLL(None).write(2, b'x' * 200_000, 200_000); print(flush=True)"
    assert work(tmp_path, body).returncode == 0
    assert len((tmp_path / "rank-0.log").read_text().splitlines()[0]) == 200_000


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_run_folder_nothing_is_touched(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv(ranklog.RUN_DIR, value)
    before = [os.fstat(fd)[1:3] for fd in (1, 2)]
    ranklog.redirect(0)
    assert ranklog.run_dir() is None
    assert [os.fstat(fd)[1:3] for fd in (1, 2)] == before
    assert list(tmp_path.iterdir()) == []


def test_the_run_folder_is_what_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ranklog.RUN_DIR, str(tmp_path))
    assert ranklog.run_dir() == tmp_path


def test_a_server_log_whose_reader_is_gone_does_not_stop_the_worker(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = work(tmp_path, "print('x' * 100_000, flush=True)", stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "rank-0.log").read_text().splitlines()[-1] == "the end"
