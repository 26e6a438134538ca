"""Whatever happens, and whenever: all-old or all-new, and nothing left lying about."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import py_compile
import shutil
import subprocess
import sys
import time
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
from fp8ctl.patching.fsops import Root
from tests.patching.faulty import Faulty, killed_at, recover, restore, without_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.patching.fsops import Syscalls

A = "sglang/srt/a.py"
B = "sglang/srt/b.py"
C = "sglang/c.py"
NEW = "sglang/added/d.py"


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
        with pytest.raises(DriftError, match="interrupted"):
            recover(lab.site, Faulty())
        assert without_store(lab.tree()) == before
        assert _journal(lab.site)


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
        text = dataclasses.replace(broken, path="sglang/data.json")
        transaction.check_compiles(text, (3, 11))

    def test_a_file_edited_between_plan_and_write_is_not_overwritten(self, lab: Any) -> None:
        with Root(lab.site, Faulty()) as root, transaction.begin(root):
            plan = lab.plan_patch("first", "second")
            (lab.site / B).write_bytes(b"edited just now\n")
            with pytest.raises(DriftError, match="changed by somebody else"):
                transaction.run(root, [plan], python_version=(3, 11))
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
        info = (lab.site / A).stat()
        assert (info.st_uid, info.st_gid) == (12345, 54321)

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
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            try:
                lab.patch("first")
                os.write(writer, b"no error")
            except Fp8ctlError as e:
                os.write(writer, f"{e.exit_code} {e.message}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with open(reader) as stream:
            said = stream.read()
        assert said.startswith("6 ")
        assert str(lab.site) in said
        assert lab.tree() == before


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

    def test_the_time_of_change_only_goes_up(self, lab: Any) -> None:
        future = time.time_ns() + 10**12
        os.utime(lab.site / C, ns=(future, future))
        lab.patch("third")
        first = (lab.site / C).stat().st_mtime_ns
        assert first >= future + 2 * 10**9
        lab.revert()
        assert (lab.site / C).stat().st_mtime_ns >= first + 2 * 10**9


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
