"""Whatever happens, and whenever: all-old or all-new, and nothing left lying about."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import py_compile
import shutil
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import (
    BusyError,
    ConflictError,
    DriftError,
    Fp8ctlError,
    NotPermittedError,
)
from fp8ctl.patching import store, transaction
from fp8ctl.patching.fsops import Root, Syscalls
from fp8ctl.patching.names import RelPath, sha256_of
from tests.patching.conftest import PRISTINE, tree
from tests.patching.faulty import (
    Failing,
    Faulty,
    killed_at,
    recover,
    restore,
    unlocked,
    without_store,
)
from tests.patching.test_status import uninstall

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.patching.plan import PatchPlan

A = "sglang/srt/a.py"
B = "sglang/srt/b.py"
C = "sglang/c.py"
NEW = "sglang/added/d.py"
SECOND = (frozenset[str](), frozenset({"second"}))


class TestDeath:
    """A SIGKILL at each change leaves all-old or all-new after the next command."""

    @pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
    @pytest.mark.parametrize("verb", ["patch", "revert", "rebuild"])
    def test_at_every_step(self, lab: Any, tmp_path: Path, verb: str, stride: int) -> None:
        if verb != "patch":
            lab.patch("second", "third")
        old = lab.tree()
        body: Callable[[Syscalls], object] = {
            "patch": lambda c: lab.patch("second", "third", calls=c),
            "revert": lambda c: lab.revert(calls=c),
            "rebuild": lambda c: lab.patch("first", calls=c),
        }[verb]
        start = tmp_path / "start"
        shutil.copytree(lab.site, start, symlinks=True)
        body(Faulty())
        new = lab.tree()
        assert old != new
        ends = {"old": 0, "new": 0}
        step = 1 - stride
        while True:
            step += stride
            shutil.rmtree(lab.site)
            shutil.copytree(start, lab.site, symlinks=True)
            if not killed_at(step, body):
                break
            with Root(lab.site, Faulty()) as root:
                with transaction.begin(root):
                    pass
                assert not store.needs_recovery(root)
            found = lab.tree()
            assert found in (old, new), f"after death at step {step}"
            ends["old" if found == old else "new"] += 1
            # And the store agrees: the command can be given again, and taken back.
            body(Faulty())
            assert lab.tree() == new
            lab.revert()
            assert ".fp8ctl" not in lab.tree()
        assert ends["old"] >= 20 // stride
        assert ends["new"] >= 7 // stride

    def test_during_recovery_is_recovered_from(self, lab: Any) -> None:
        old = lab.tree()
        probe = Faulty()
        lab.patch("second", "third", calls=probe)
        new = lab.tree()
        for first in range(40, probe.count, 12):
            step = 0
            while True:
                step += 1
                restore(lab.site, old)
                killed_at(first, lambda c: lab.patch("second", "third", calls=c))
                again = killed_at(step, lambda c: recover(lab.site, c))
                recover(lab.site, Faulty())
                assert lab.tree() in (old, new), (first, step)
                if not again:
                    break
                step += 3

    def test_of_a_staged_file_after_the_commit_rolls_back(self, lab: Any) -> None:
        old = lab.tree()
        step = 40
        seen = False
        while not seen:
            step += 1
            restore(lab.site, old)
            assert killed_at(step, lambda c: lab.patch("second", "third", calls=c))
            staged = list(lab.site.rglob(".*.fp8ctl-*"))
            journal = _journal(lab.site)
            if journal and journal["committed"] and staged:
                staged[0].unlink()
                seen = True
                recover(lab.site, Faulty())
                assert lab.tree() == old

    def test_then_a_foreign_edit_stops_recovery_and_nothing_is_touched(self, lab: Any) -> None:
        old = lab.tree()
        step = 30
        while True:
            step += 1
            restore(lab.site, old)
            assert killed_at(step, lambda c: lab.patch("second", calls=c))
            journal = _journal(lab.site)
            if journal and journal["committed"]:
                break
        (lab.site / B).write_bytes(b"somebody else's\n")
        before = without_store(lab.tree())
        with pytest.raises(DriftError) as e:
            recover(lab.site, Faulty())
        assert without_store(lab.tree()) == before
        (journal,) = lab.site.glob(".fp8ctl/journal/*.json")
        hashes = [sha256_of(b"somebody else's\n"), *(lab.series.images[B][ids] for ids in SECOND)]
        found, pristine, patched = (sha[:12] for sha in hashes)
        assert e.value.message == (
            f"{lab.site / B} has sha256 {found}, the interrupted command knows "
            f"{pristine} and {patched}"
        )
        assert e.value.hint == f"put one of them back, or remove {journal}"
        # Either is a way out.
        (lab.site / B).write_bytes(old[B][0])
        recover(lab.site, Faulty())
        assert lab.status().applied == {"second"}


def cut(lab: Any, body: Callable[[Syscalls], PatchPlan], *, renamed: int | None) -> None:
    """Kill a command when so many files have their new content; None: behind all staging."""
    start = lab.site.with_name("start")
    shutil.copytree(lab.site, start, symlinks=True)
    probe = Faulty()
    plan = body(probe)
    shutil.rmtree(lab.site)
    start.rename(lab.site)
    renames = [n for n, name in enumerate(probe.names, 1) if name == "rename"]
    # The last one is the ledger's; in front of the first file's is that of the commit.
    files = sum(op.new_bytes is not None for op in plan.ops)
    at = renames[-2 - files] if renamed is None else renames[-1 - files + renamed]
    assert killed_at(at, body)


def mended(lab: Any, calls: Syscalls | None = None) -> str | None:
    """Return what the next command says of the one before."""
    with Root(lab.site, calls or Faulty()) as root, transaction.begin(root) as words:
        return words


class TestRecovery:
    """What the next command finds, does and says."""

    def test_nothing_is_said_where_nothing_was_cut_short(self, lab: Any) -> None:
        assert mended(lab) is None
        lab.patch("first")
        assert mended(lab) is None

    def test_before_the_commit_it_is_undone(self, lab: Any) -> None:
        old = lab.tree()
        cut(lab, lambda c: lab.patch("second", "third", calls=c), renamed=None)
        assert list(lab.site.rglob(".*.fp8ctl-*"))
        assert mended(lab) == "an interrupted command was undone: it had changed no file"
        assert lab.tree() == old

    @pytest.mark.parametrize("renamed", [0, 2, 4])
    def test_behind_the_commit_it_is_finished(self, lab: Any, renamed: int) -> None:
        cut(lab, lambda c: lab.patch("second", "third", calls=c), renamed=renamed)
        assert mended(lab) == "an interrupted command was finished"
        assert lab.status().applied == {"second", "third"}
        assert not list(lab.site.rglob(".*.fp8ctl-*"))

    def test_without_what_was_staged_it_is_undone(self, lab: Any) -> None:
        old = lab.tree()
        for number in range(2):
            cut(lab, lambda c: lab.patch("second", "third", calls=c), renamed=1)
            staged = sorted(lab.site.rglob(".*.fp8ctl-*"))
            assert len(staged) == 3
            # Gone, or not what it was.
            staged[0].unlink() if number else staged[0].write_bytes(b"damaged\n")
            assert mended(lab) == "an interrupted command was undone"
            assert lab.tree() == old

    def test_without_the_stored_content_nothing_is_touched(self, lab: Any) -> None:
        cut(lab, lambda c: lab.patch("first", "second", calls=c), renamed=1)
        (staged,) = lab.site.rglob(".*.fp8ctl-*")
        staged.unlink()
        shutil.rmtree(lab.site / store.BLOBS)
        before = without_store(lab.tree())
        (changed,) = (p for p in (A, B) if lab.read(p) != PRISTINE[RelPath(p)])
        with pytest.raises(DriftError) as e:
            mended(lab)
        pristine = lab.series.pristine[changed]
        message = f"{lab.site / changed}: its content {pristine[:12]} is not in the store"
        assert (e.value.message, e.value.hint) == (message, "reinstall the engine")
        assert without_store(lab.tree()) == before

    def test_a_file_that_somebody_gave_its_new_content_leaves_no_stray(self, lab: Any) -> None:
        lab.patch("second")
        new = lab.tree()
        lab.revert()
        cut(lab, lambda c: lab.patch("second", calls=c), renamed=0)
        (lab.site / B).write_bytes(new[B][0])
        assert mended(lab) == "an interrupted command was finished"
        assert lab.tree() == new

    def test_a_folder_that_goes_meanwhile_is_named_and_stops_nothing_later(
        self, lab: Any, tmp_path: Path
    ) -> None:
        cut(lab, lambda c: lab.patch("first", "third", calls=c), renamed=1)
        start = tmp_path / "kept"
        shutil.copytree(lab.site, start)
        probe = Faulty()
        mended(lab, probe)
        told: list[DriftError] = []
        for step in range(1, probe.count):
            shutil.rmtree(lab.site)
            shutil.copytree(start, lab.site)
            folder = lab.site / "sglang/srt"
            try:
                mended(lab, Faulty(step, partial(shutil.rmtree, folder)))
            except DriftError as e:
                told.append(e)
            mended(lab)
            assert not (lab.site / store.JOURNAL).exists()
            assert not list(lab.site.rglob(".*.fp8ctl-*"))
        assert all(str(folder) in e.message for e in told)
        assert f"{folder} was changed by somebody else just now" in {e.message for e in told}
        assert all((e.hint or "").startswith("run the same command again") for e in told)


class Watching(Syscalls):
    """Notes the names that change, until their folder is flushed, and which step outruns them.

    A step is a journal or a ledger that gets or loses its name. Does not wait for the disk.
    """

    def __init__(self, site: Path) -> None:
        self.site = site
        self.changed: dict[int, str] = {}
        self.flushed: set[int] = set()
        self.steps: list[str] = []
        self.outrun: list[str] = []

    def _change(self, name: str, dir_fd: int) -> None:
        self.changed[os.fstat(dir_fd).st_ino] = name

    def _step(self, name: str, *, ends: bool) -> None:
        folders = [self.site, *(p for p in self.site.rglob("*") if p.is_dir())]
        there = {p.stat().st_ino for p in folders if ".fp8ctl" not in p.parts}
        self.steps.append(name.rpartition("-")[2])
        self.outrun += [changed for inode, changed in self.changed.items() if inode in there]
        if ends and (self.site / store.FOLDER).stat().st_ino not in self.flushed:
            self.outrun.append("ledger.json")

    def open(self, name: str, flags: int, mode: int, *, dir_fd: int) -> int:
        self._change(name, dir_fd)
        return super().open(name, flags, mode, dir_fd=dir_fd)

    def symlink(self, target: str, name: str, *, dir_fd: int) -> None:
        self._change(name, dir_fd)
        super().symlink(target, name, dir_fd=dir_fd)

    def mkdir(self, name: str, mode: int, *, dir_fd: int) -> None:
        if name != store.FOLDER:  # without that name there is no journal either
            self._change(name, dir_fd)
        super().mkdir(name, mode, dir_fd=dir_fd)

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        super().rmdir(name, dir_fd=dir_fd)
        self._change(name, dir_fd)

    def rename(self, old: str, new: str, *, dir_fd: int) -> None:
        if new.endswith(".json"):
            self._step(new, ends=False)
        super().rename(old, new, dir_fd=dir_fd)
        self._change(new, dir_fd)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        if name.endswith(".json") and not name.startswith(".tmp-"):
            self._step(name, ends=name != "ledger.json")
        super().unlink(name, dir_fd=dir_fd)
        self._change(name, dir_fd)

    def fsync(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        self.flushed.add(inode)
        self.changed.pop(inode, None)


class TestFlushing:
    """No step is written down before what it follows from is on the disk."""

    @pytest.mark.parametrize("verb", ["patch", "rebuild", "revert"])
    def test_of_a_command(self, lab: Any, verb: str) -> None:
        if verb != "patch":
            lab.patch("second", "third")
        cache = lab.site / "sglang/__pycache__"
        cache.mkdir()
        (cache / "c.cpython-311.pyc").write_bytes(b"")
        calls = Watching(lab.site)
        if verb == "revert":
            lab.revert(calls=calls)
        else:
            lab.patch("first", "third", calls=calls)
        assert calls.outrun == []
        # The journal, its commit, the ledger, and the end of the journal.
        assert len(calls.steps) == 4
        assert calls.steps[2] == "ledger.json"

    def test_of_one_that_is_finished(self, lab: Any) -> None:
        cut(lab, lambda c: lab.patch("second", "third", calls=c), renamed=4)
        calls = Watching(lab.site)
        assert mended(lab, calls) == "an interrupted command was finished"
        assert (calls.outrun, len(calls.steps)) == ([], 2)

    def test_of_one_that_is_undone(self, lab: Any) -> None:
        """Also of one whose ledger was put back by an earlier way back, which flushed nothing."""
        lab.patch("third")
        cut(lab, lambda c: lab.patch("first", "second", calls=c), renamed=1)
        for staged in lab.site.rglob(".*.fp8ctl-*"):
            staged.unlink()
        calls = Watching(lab.site)
        assert mended(lab, calls) == "an interrupted command was undone"
        assert (calls.outrun, len(calls.steps)) == ([], 1)

    def test_of_one_whose_engine_has_gone_since(self, lab: Any) -> None:
        lab.patch("third")
        cut(lab, lambda c: lab.patch("first", "second", calls=c), renamed=1)
        uninstall(lab)
        calls = Watching(lab.site)
        assert mended(lab, calls) == "an interrupted command was undone"
        assert calls.outrun == []
        assert [p.name for p in (lab.site / "sglang").iterdir()] == ["added"]


def _journal(site: Path) -> dict[str, Any] | None:
    for path in site.glob(".fp8ctl/journal/*.json"):
        if not path.name.startswith("."):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
    return None


class TestErrors:
    """An error of the system at each change ends in all-old, and names the path."""

    def test_an_interrupt_from_the_keyboard_ends_in_all_old(self, lab: Any) -> None:
        old = lab.tree()

        def interrupt() -> None:
            raise KeyboardInterrupt

        for step in range(1, 200, 9):
            try:
                lab.patch("second", "third", calls=Faulty(step, interrupt))
            except KeyboardInterrupt:
                recover(lab.site, Faulty())
                if lab.tree() == old:
                    continue
            lab.revert()
            assert lab.tree() == old

    def test_too_little_space_is_said_before_anything_is_written(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = lab.tree()
        monkeypatch.setattr(Root, "free_bytes", lambda _: 1000)
        with pytest.raises(NotPermittedError, match="has 1000 bytes free, expected at least"):
            lab.patch()
        assert lab.tree() == old

    def test_the_space_needed_is_that_of_old_and_new_twice_and_a_mebibyte(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contents are staged and stored; the rest is for the journal and the ledger."""
        contents = [data for o in lab.plan_patch().ops for data in (o.old_bytes, o.new_bytes)]
        needed = 2 * sum(len(data) for data in contents if data) + 1024 * 1024
        monkeypatch.setattr(Root, "free_bytes", lambda _: needed - 1)
        old = lab.tree()
        with pytest.raises(NotPermittedError) as e:
            lab.patch()
        free = f"{needed - 1} bytes free, expected at least {needed}"
        assert e.value.message == f"{lab.site} has {free}"
        assert e.value.hint == "free some space and run it again; nothing was changed"
        assert lab.tree() == old
        monkeypatch.setattr(Root, "free_bytes", lambda _: needed)
        lab.patch()

    @pytest.mark.parametrize("gone", ["sglang/srt", A])
    def test_what_goes_while_it_is_patched_is_named(
        self, lab: Any, gone: str, tmp_path: Path
    ) -> None:
        start = tmp_path / "kept"
        shutil.copytree(lab.site, start)
        probe = Faulty()
        lab.patch("first", "third", calls=probe)
        path = lab.site / gone
        told: list[DriftError] = []
        for step in range(6, probe.count, 4):
            shutil.rmtree(lab.site)
            shutil.copytree(start, lab.site)
            take_away = path.unlink if gone == A else partial(shutil.rmtree, path)
            try:
                lab.patch("first", "third", calls=Faulty(step, take_away))
            except DriftError as e:
                told.append(e)
                # Everything else is as before: once it is there again, all is.
                shutil.copytree(start, lab.site, dirs_exist_ok=True)
                assert lab.tree() == tree(start), step
        changed = " was changed by somebody else just now"
        read_back = f"{lab.site / A} reads back as absent"
        messages = {e.message.partition(",")[0] for e in told}
        assert {f"{path}{changed}", read_back} <= messages
        assert messages <= {f"{path}{changed}", f"{lab.site / A}{changed}", read_back}
        assert all("run the same command again" in (e.hint or "") for e in told)

    def test_what_reads_back_otherwise_is_said_and_left_to_who_wrote_it(self, lab: Any) -> None:
        old = lab.tree()
        new = lab.plan_patch("second", "third").ops

        class Writing(Faulty):
            """Somebody writes into a file as soon as it has its new content."""

            def rename(self, old: str, new: str, *, dir_fd: int) -> None:
                super().rename(old, new, dir_fd=dir_fd)
                if new == "b.py":
                    with (lab.site / B).open("ab") as stream:
                        stream.write(b"# mine\n")

        with pytest.raises(DriftError) as e:
            lab.patch("second", "third", calls=Writing())
        (written,) = (o.new_bytes for o in new if o.path == B)
        found, meant = sha256_of(written + b"# mine\n")[:12], sha256_of(written)[:12]
        assert e.value.message == f"{lab.site / B} reads back as {found}, {meant} was written"
        assert (e.value.hint or "").startswith("run the same command again")
        assert lab.read(B) == written + b"# mine\n"
        assert {**lab.tree(), B: old[B]} == old

    def test_an_error_behind_the_ledger_puts_the_ledger_back(self, lab: Any) -> None:
        lab.patch("second", "third")
        old = lab.tree()
        probe = Faulty()
        lab.patch("first", calls=probe)
        lab.revert("first")
        at = len(probe.names) - probe.names[::-1].index("rename") + 1
        assert probe.names[at - 1] == "fsync"
        with pytest.raises(NotPermittedError):
            lab.patch("first", calls=Failing(at, errno.EIO))
        assert unlocked(lab.tree()) == unlocked(old)

    def test_an_error_behind_the_last_file_of_a_folder_makes_it_again(self, lab: Any) -> None:
        lab.patch("third")
        old = lab.tree()
        probe = Faulty()
        lab.revert(calls=probe)
        lab.patch("third")
        at = 1 + probe.names.index("unlink", probe.names.index("rmdir"))  # of the ledger
        with pytest.raises(NotPermittedError, match="ledger"):
            lab.revert(calls=Failing(at, errno.EIO))
        assert unlocked(lab.tree()) == unlocked(old)

    def test_an_empty_folder_that_was_there_before_is_there_after_an_error(self, lab: Any) -> None:
        (lab.site / NEW).parent.mkdir()
        old = lab.tree()
        probe = Faulty()
        lab.patch("third", calls=probe)
        lab.revert()
        (lab.site / NEW).parent.mkdir(exist_ok=True)
        at = len(probe.names) - probe.names[::-1].index("rename")
        with pytest.raises(NotPermittedError):
            lab.patch("third", calls=Failing(at, errno.EIO))
        assert lab.tree() == old

    def test_a_result_that_is_no_python_is_refused(self, lab: Any) -> None:
        plan = lab.plan_patch("first")
        op = plan.ops[0]
        transaction.check_compiles(op, (3, 11))
        broken = dataclasses.replace(op, new_bytes=b"x = 1\ndef f(:\n")
        with pytest.raises(ConflictError, match=r"a\.py line 2: .* not valid Python 3\.11"):
            transaction.check_compiles(broken, (3, 11))
        outside = dataclasses.replace(op, new_bytes=b"return 1\n")
        with pytest.raises(ConflictError):
            transaction.check_compiles(outside, (3, 11))
        newer = dataclasses.replace(op, new_bytes=b"match x:\n    case 1: pass\n")
        transaction.check_compiles(newer, (3, 10))
        with pytest.raises(ConflictError, match=r"not valid Python 3\.9"):
            transaction.check_compiles(newer, (3, 9))
        groups = dataclasses.replace(op, new_bytes=b"try: pass\nexcept* OSError: pass\n")
        transaction.check_compiles(groups, (3, 11))
        with pytest.raises(ConflictError, match=r"a\.py line \d: .* not valid Python 3\.10: ") as e:
            transaction.check_compiles(groups, (3, 10))
        assert e.value.hint == "run fp8ctl with the engine's own Python version"
        # What has no line has no line in the message.
        nul = dataclasses.replace(op, new_bytes=b"x = 1\0\n")
        with pytest.raises(ConflictError, match=r"a\.py( line 1)?: the patched .* null bytes"):
            transaction.check_compiles(nul, (3, 11))

    def test_it_is_refused_before_anything_is_written(self, lab: Any) -> None:
        plan = lab.plan_patch("first", "second")
        *rest, last = plan.ops
        broken = dataclasses.replace(last, new_bytes=b"def f(:\n", new_sha=sha256_of(b"def f(:\n"))
        plan = dataclasses.replace(plan, ops=(*rest, broken))
        old = lab.tree()
        calls = Faulty()
        with Root(lab.site, calls) as root, transaction.begin(root):
            changes = calls.count
            with pytest.raises(ConflictError, match=r"b\.py line 1"):
                transaction.run(root, [plan], python_version=(3, 11))
            assert calls.count == changes
        assert lab.tree() == old

    def test_what_is_not_fp8ctl_s_python_is_not_compiled(self, lab: Any) -> None:
        plan = lab.plan_patch("first")
        broken = dataclasses.replace(plan.ops[0], new_bytes=b"def f(:\n")
        for change in ({"path": "sglang/data.json"}, {"patches": ()}, {"new_bytes": None}):
            transaction.check_compiles(dataclasses.replace(broken, **change), (3, 11))

    def test_a_result_is_compiled_as_an_import_of_it_would(self, lab: Any) -> None:
        """With no `__future__` of this program, and whatever Python would warn of."""
        (op,) = lab.plan_patch("first").ops
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            escapes = dataclasses.replace(op, new_bytes=b"x = '\\d'\n")
            transaction.check_compiles(escapes, (3, 11))
            transaction.check_compiles(escapes, (3, 10))
        text = b"def f(a: (b := 1)) -> None: pass\n"
        if sys.version_info < (3, 14):  # annotations are always put off from there on
            transaction.check_compiles(dataclasses.replace(op, new_bytes=text), (3, 11))

    def test_a_file_edited_between_plan_and_write_is_not_overwritten(self, lab: Any) -> None:
        calls = Faulty()
        with Root(lab.site, calls) as root, transaction.begin(root):
            plan = lab.plan_patch("first", "second")
            (lab.site / B).write_bytes(b"edited just now\n")
            changes = calls.count
            with pytest.raises(DriftError) as e:
                transaction.run(root, [plan], python_version=(3, 11))
            assert calls.count == changes
        assert e.value.message == f"{lab.site / B} was changed by somebody else just now"
        assert e.value.hint == "nothing was changed: run the same command again"
        assert lab.read(B) == b"edited just now\n"
        assert not lab.status().applied
        assert not (lab.site / ".fp8ctl").exists()


class TestLinksAndModes:
    def test_another_environment_that_shares_the_files_keeps_its_bytes_and_times(
        self, lab: Any, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        subprocess.run(["cp", "-al", lab.site, other], check=True)
        before = {p: (p.stat(), p.read_bytes()) for p in other.rglob("*") if p.is_file()}
        assert (lab.site / A).stat().st_nlink == 2
        lab.patch()
        lab.revert()
        lab.patch()
        assert (lab.site / A).stat().st_nlink == 1
        for path, (info, data) in before.items():
            now = path.stat()
            assert path.read_bytes() == data
            assert (now.st_ino, now.st_mtime_ns, now.st_mode) == (
                info.st_ino, info.st_mtime_ns, info.st_mode,
            )  # fmt: skip

    @pytest.mark.parametrize("mode", [0o444, 0o640, 0o755])
    def test_permission_bits_are_kept(self, lab: Any, mode: int) -> None:
        (lab.site / A).chmod(mode)
        before = lab.tree()
        lab.patch("first")
        assert (lab.site / A).stat().st_mode & 0o7777 == mode
        lab.revert()
        assert lab.tree() == before

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_the_owner_is_kept(self, lab: Any) -> None:
        os.chown(lab.site / A, 12345, 54321)
        os.chown(lab.site / "sglang", 12345, 54321)
        lab.patch("first", "third")
        # A file that is made in a folder that is made has the owner of what was there.
        for path in (A, NEW):
            info = (lab.site / path).stat()
            assert (info.st_uid, info.st_gid) == (12345, 54321)
        info = (lab.site / C).stat()
        assert (info.st_uid, info.st_gid) == (0, 0)

    def test_a_link_in_the_place_of_a_folder_is_refused(self, lab: Any, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        (lab.site / "sglang" / "srt").rename(outside)
        (lab.site / "sglang" / "srt").symlink_to(outside)
        before = {p: p.read_bytes() for p in outside.iterdir()}
        with pytest.raises(ConflictError, match="symbolic link"):
            lab.patch("first")
        assert {p: p.read_bytes() for p in outside.iterdir()} == before

    def test_a_link_in_the_place_of_the_store_is_refused(self, lab: Any, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (lab.site / ".fp8ctl").symlink_to(outside)
        with pytest.raises(ConflictError, match="symbolic link"):
            lab.patch("first")
        assert list(outside.iterdir()) == []

    def test_a_folder_behind_a_link_may_be_named(self, lab: Any, tmp_path: Path) -> None:
        link = tmp_path / "lib64"
        link.symlink_to(lab.site)
        real, lab.site = lab.site, link
        lab.patch("first")
        assert (real / ".fp8ctl" / "ledger.json").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
    def test_a_folder_that_may_not_be_written_is_refused(self, lab: Any) -> None:
        for folder in lab.site.parents:
            if folder.owner() == "root" and folder != Path("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o055)
            if folder == Path("/tmp"):
                break
        before = lab.tree()
        code, message, _, _ = _as_nobody(lambda: lab.patch("first"))
        assert code == 6
        assert str(lab.site) in message
        assert lab.tree() == before
        # One of the engine's folders alone.
        for folder in (lab.site, lab.site / "sglang"):
            folder.chmod(0o777)
        before = lab.tree()
        srt = lab.site / "sglang" / "srt"
        assert _as_nobody(lambda: lab.patch("third", "first")) == [
            6,
            f"{srt} cannot be written by user 65534",
            "run it as the owner of this environment, or while the image is built",
            {"path": str(srt)},
        ]
        assert lab.tree() == before


def _as_nobody(body: Callable[[], object]) -> list[Any]:
    """Run it as a user who owns nothing; return exit code, message, hint and data."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told: list[object] = [0, "no error", None, {}]
        os.setgid(65534)
        os.setuid(65534)
        try:
            body()
        except Fp8ctlError as e:
            told = [e.exit_code, e.message, e.hint, e.data]
        finally:
            os.write(writer, json.dumps(told).encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader) as stream:
        said: list[Any] = json.load(stream)
    return said


class TestBytecode:
    """A stale .pyc cannot hide a patch: the law is about what an import gives."""

    @pytest.mark.parametrize("mode", ["TIMESTAMP", "CHECKED_HASH", "UNCHECKED_HASH"])
    @pytest.mark.parametrize("optimize", [0, 1, 2])
    def test_import_gives_the_new_code_and_then_the_old(
        self, lab: Any, mode: str, optimize: int
    ) -> None:
        invalidation = py_compile.PycInvalidationMode[mode]

        def compiled() -> None:
            py_compile.compile(str(lab.site / C), invalidation_mode=invalidation, optimize=optimize)

        def value() -> str:
            flags = ["-" + "O" * optimize] if optimize else []
            code = "import sglang.c; print(sglang.c.d)"
            argv = [sys.executable, "-S", *flags, "-c", code]
            env = {"PYTHONPATH": str(lab.site), "PYTHONDONTWRITEBYTECODE": "1"}
            return subprocess.run(
                argv, env=env, capture_output=True, text=True, check=True, cwd=lab.site
            ).stdout.strip()

        compiled()
        lab.patch("third")  # `d = 2` becomes `d = 3`: same size, and the same second
        assert value() == "3"
        compiled()
        lab.revert()
        assert value() == "2"

    def test_only_that_module_s_files_go(self, lab: Any) -> None:
        cache = lab.site / "sglang" / "__pycache__"
        cache.mkdir()
        kept = ["c.txt", "cc.cpython-311.pyc", "untouched.cpython-311.pyc", "c.d.e.f.pyc"]
        gone = ["c.cpython-311.pyc", "c.cpython-39.opt-2.pyc", "c.pypy310.pyc"]
        for name in kept + gone:
            (cache / name).write_bytes(b"")
        lab.patch("third")
        assert sorted(p.name for p in cache.iterdir()) == sorted(kept)

    def test_a_made_folder_goes_with_the_bytecode_in_it(self, lab: Any) -> None:
        old = lab.tree()
        lab.patch("third")
        cache = lab.site / "sglang/added/__pycache__"
        cache.mkdir()
        (cache / "d.cpython-311.pyc").write_bytes(b"")
        lab.revert()
        assert lab.tree() == old
        lab.patch("third")
        cache.mkdir()
        (cache / "somebody-else-s.txt").write_bytes(b"")
        lab.revert()
        assert [p.name for p in cache.iterdir()] == ["somebody-else-s.txt"]

    def test_the_time_of_change_only_goes_up(self, lab: Any) -> None:
        future = (time.time_ns() // 10**9 + 1000) * 10**9
        os.utime(lab.site / C, ns=(future, future))
        lab.patch("third")
        first = (lab.site / C).stat().st_mtime_ns
        assert first == future + 2 * 10**9
        lab.revert()
        assert (lab.site / C).stat().st_mtime_ns == first + 2 * 10**9
        # One that lies in the past is simply now.
        os.utime(lab.site / C, ns=(10**9, 10**9))
        before = time.time_ns()
        lab.patch("third")
        assert before <= (lab.site / C).stat().st_mtime_ns <= time.time_ns()


class TestLock:
    def test_the_second_is_told_who_is_at_work(self, lab: Any) -> None:
        with Root(lab.site) as root, transaction.begin(root):
            with pytest.raises(BusyError, match=f"process {os.getpid()}") as e:
                lab.patch("first")
            assert e.value.data == {"pid": os.getpid()}
        assert not (lab.site / ".fp8ctl").exists()
        lab.patch("first")
        with Root(lab.site) as root, transaction.begin(root), pytest.raises(BusyError):
            lab.revert()

    def test_many_at_once_leave_one_state(self, lab: Any) -> None:
        children = []
        for number in range(6):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    for step in range(6):
                        with contextlib.suppress(BusyError):
                            if (number + step) % 2:
                                lab.patch("second", "third")
                            else:
                                lab.revert()
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        assert [os.waitpid(c, 0)[1] for c in children] == [0] * len(children)
        assert lab.status().state in ("pristine", "applied")
        lab.revert()
        assert ".fp8ctl" not in lab.tree()


class TestStore:
    def test_a_broken_ledger_is_an_error_with_a_way_out(self, lab: Any) -> None:
        pristine = lab.tree()
        lab.patch("first")
        (lab.site / store.LEDGER).write_text("{")
        with pytest.raises(DriftError, match="cannot be read") as e:
            lab.revert()
        assert (e.value.hint or "").startswith("mv ")
        (lab.site / store.LEDGER).rename(lab.site / "elsewhere")
        lab.revert()
        (lab.site / "elsewhere").unlink()
        assert lab.tree() == pristine

    def test_a_blob_that_is_not_what_its_name_says_is_not_used(self, lab: Any) -> None:
        pristine = lab.tree()
        lab.patch("first")
        for blob in (lab.site / store.BLOBS).iterdir():
            blob.write_bytes(b"rotten")
        lab.revert()
        assert lab.tree() == pristine

    def test_only_what_a_revert_needs_is_kept(self, lab: Any) -> None:
        lab.patch("first")
        lab.patch("second", "third")
        kept = {p.name for p in (lab.site / store.BLOBS).iterdir()}
        assert kept == {lab.series.pristine[p] for p in (A, B, C)}
        names = {p.name for p in (lab.site / ".fp8ctl").iterdir()}
        assert names == {"lock", "ledger.json", "blobs"}

    def test_what_is_only_forgotten_leaves_no_store(self, lab: Any) -> None:
        pristine = lab.tree()
        lab.patch("first")
        (lab.site / A).write_bytes(PRISTINE[RelPath(A)])
        assert lab.revert().ops == ()
        assert lab.tree() == pristine

    def test_what_a_revert_needs_and_the_store_has_lost_is_stored_again(self, lab: Any) -> None:
        lab.patch("first")
        shutil.rmtree(lab.site / store.BLOBS)
        lab.patch("third")
        kept = {p.name for p in (lab.site / store.BLOBS).iterdir()}
        assert kept == {lab.series.pristine[p] for p in (A, C)}
