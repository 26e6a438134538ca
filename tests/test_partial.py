"""What a broken-off conversion leaves: found by its own key alone, by one command at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fp8ctl import partial
from fp8ctl.errors import BusyError

if TYPE_CHECKING:
    from pathlib import Path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_finished_is_found_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with partial.opened(out, "key") as first:
        (first.folder / "a").write_text("a")
        first.finish("a", [1, (1 << 64) - 1])
        first.finish("b", [2])
        first.lose("b")
    assert partial.left(out) == first.folder
    with partial.opened(out, "key") as second:
        assert second.finished == {"a": (1, (1 << 64) - 1)}
        assert (second.folder / "a").read_text() == "a"
        second.complete(out)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["a"]
    assert partial.left(out) is None


def test_that_of_another_plan_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with partial.opened(out, "key") as first:
        (first.folder / "a").write_text("a")
        first.finish("a", [1])
    with partial.opened(out, "other") as second:
        assert second.finished == {}
        assert names(second.folder) == []
    with partial.opened(out, "key") as third:
        assert third.finished == {}
        third.discard()
    assert names(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"file": "b", "su', "\xff\x00", '{"file": "b", "sums": ["3"]'])
def test_a_line_that_a_kill_cut_in_two_did_not_happen(tmp_path: Path, torn: str) -> None:
    out = tmp_path / "out"
    with partial.opened(out, "key") as first:
        first.finish("a", [1])
    with first.journal.open("a", encoding="latin-1") as file:
        file.write(torn)
    with partial.opened(out, "key") as second:
        assert second.finished == {"a": (1,)}
        second.finish("c", [4])
    with partial.opened(out, "key") as third:
        assert third.finished == {"a": (1,), "c": (4,)}


def test_a_folder_that_is_gone_takes_its_journal_along(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with partial.opened(out, "key") as first:
        first.finish("a", [1])
    first.folder.rmdir()
    with partial.opened(out, "key") as second:
        assert second.finished == {}


_HOLD = """
import sys, time
from pathlib import Path
from fp8ctl import partial
with partial.opened(Path(sys.argv[1]), "key") as held:
    held.finish("a", [1])
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_command_is_locked_out_until_the_first_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [sys.executable, "-c", _HOLD, str(out)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            for key in ("key", "other"):
                with (
                    pytest.raises(BusyError, match="another fp8ctl writes"),
                    partial.opened(out, key),
                ):
                    pass
            assert partial.used(out) >= 0
        finally:
            holder.send_signal(signal.SIGKILL)
    with partial.opened(out, "key") as mine:
        assert mine.finished == {"a": (1,)}


def test_a_completed_one_that_cannot_be_placed_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with partial.opened(out, "key") as one:
        one.finish("a", [1])
        out.mkdir()
        (out / "mine").write_text("mine")
        with pytest.raises(OSError, match="not empty"):
            one.complete(out)
    assert names(out) == ["mine"]
    assert partial.left(out) == one.folder
