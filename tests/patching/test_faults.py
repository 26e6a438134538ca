"""A system call that fails, at every place where one can: all-old or all-new, and a clear error."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import BusyError, Fp8ctlError, NotPermittedError
from fp8ctl.patching import store, transaction
from fp8ctl.patching.fsops import Root, Syscalls
from tests.patching.faulty import (
    Failing,
    Faulty,
    next_command,
    recover,
    restore,
    unlocked,
    without_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable

A = "sglang/srt/a.py"

# What goes on working where the error is for good. EROFS and EIO: a disk that has gone.
SPARED = {
    errno.ENOSPC: ("fsync", "unlink", "rmdir", "rename", "attributes", "times", "truncate", "lock"),
    errno.EDQUOT: ("fsync", "unlink", "rmdir", "rename", "attributes", "times", "truncate", "lock"),
    errno.EACCES: ("fsync", "write", "attributes", "times", "truncate", "lock"),
    errno.EMFILE: tuple(n for n in vars(Syscalls) if n != "open"),
    errno.EIO: (),
    errno.EROFS: ("fsync", "lock"),
}
VERBS: dict[str, tuple[tuple[str, ...], Callable[[Any, Syscalls], object]]] = {
    "patch": ((), lambda lab, calls: lab.patch("second", "third", calls=calls)),
    "revert": (("second", "third"), lambda lab, calls: lab.revert(calls=calls)),
    "rebuild": (("second", "third"), lambda lab, calls: lab.patch("first", calls=calls)),
}


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", SPARED, ids=lambda c: errno.errorcode[c])
@pytest.mark.parametrize("verb", VERBS)
def test_at_every_call(lab: Any, verb: str, code: int, for_good: bool, stride: int) -> None:
    before, body = VERBS[verb]
    if before:
        lab.patch(*before)
    old = lab.tree()
    probe = Faulty()
    body(lab, probe)
    new = lab.tree()
    ends = {"old": 0, "new": 0}
    # Each number is hit once over all strides: every verb and error starts elsewhere.
    for step in range(1 + (code + len(verb)) % stride, probe.count + 1, stride):
        restore(lab.site, old)
        lab.warnings.clear()
        calls = Failing(step, code, for_good=for_good, spared=SPARED[code])
        error: NotPermittedError | None = None
        try:
            body(lab, calls)
        except NotPermittedError as e:
            error = e
        at_once = without_store(lab.tree())
        where = f"{verb}: {errno.errorcode[code]} at call {step}, {calls.names[step - 1]}"
        if error is None:
            # The change stands; what was left to tidy is said, but for the pid in the lock.
            assert at_once == without_store(new), where
            told = any(os.strerror(code) in w and str(lab.site) in w for w in lab.warnings)
            assert told or calls.names[step:] == [], where
        else:
            assert error.exit_code == 6
            assert str(lab.site) in error.message, where
            assert os.strerror(code) in error.message, where
            full = code in (errno.ENOSPC, errno.EDQUOT)
            assert ("bytes free" in error.message) == full, where
            if "some files may be changed" not in (error.hint or ""):
                assert at_once == without_store(old), where
            else:
                assert for_good, where
        next_command(lab.site)
        found = unlocked(lab.tree())
        ends["new" if found == unlocked(new) else "old"] += 1
        assert found in (unlocked(old), unlocked(new)), where
        if error is None:
            assert found == unlocked(new), where
    if stride == 1:
        print(f"faults, {verb}, {errno.errorcode[code]}: {probe.count} points, {ends}")
        assert min(ends.values()) > 0


def last(calls: Faulty, name: str) -> int:
    """Return the number of the last call of a kind."""
    return len(calls.names) - calls.names[::-1].index(name)


class TestTidying:
    """Once the ledger is written the change stands, whatever becomes of fp8ctl's own folder."""

    def test_an_error_is_a_warning_that_names_path_and_reason(self, lab: Any) -> None:
        probe = Faulty()
        old = lab.tree()
        lab.patch("second", "third", calls=probe)
        new = lab.tree()
        restore(lab.site, old)
        # Of the journal's folder, which is empty by then.
        lab.patch("second", "third", calls=Failing(last(probe, "rmdir"), errno.EIO))
        [warning] = lab.warnings
        assert "the files are as they should be" in warning
        assert f"{lab.site / store.JOURNAL}: {os.strerror(errno.EIO)}" in warning
        assert lab.status().applied == {"second", "third"}
        assert lab.status().interrupted
        recover(lab.site, Faulty())
        assert lab.tree() == new

    def test_a_journal_that_cannot_be_removed_changes_nothing(self, lab: Any) -> None:
        probe = Faulty()
        old = lab.tree()
        lab.patch("second", "third", calls=probe)
        new = lab.tree()
        # Writes end with the pid's; behind the ledger's rename comes the journal's end.
        at = last(probe, "rename") + probe.names[last(probe, "rename") :].index("unlink") + 1
        restore(lab.site, old)
        lab.patch("second", "third", calls=Failing(at, errno.EACCES))
        assert len(lab.warnings) == 1
        assert list((lab.site / store.JOURNAL).glob("*.json"))
        assert without_store(lab.tree()) == without_store(new)
        # It is finished a second time, which does nothing; only then the store is swept.
        with Root(lab.site, Faulty()) as root, transaction.begin(root) as mended:
            assert mended == "an interrupted command was finished"
        assert lab.tree() == new

    def test_an_error_of_the_command_is_not_hidden_by_one_of_tidying(self, lab: Any) -> None:
        with (
            pytest.raises(NotPermittedError, match=os.strerror(errno.ENOSPC)),
            Root(lab.site, Failing(6, errno.EIO, for_good=True)) as root,
            transaction.begin(root, lab.warnings.append),
        ):
            raise NotPermittedError(os.strerror(errno.ENOSPC))
        assert lab.warnings == []


class Relapsing(Failing):
    """Fails once, works for a few calls, and is gone."""

    def __init__(self, at: int, length: int) -> None:
        super().__init__(at, errno.EIO)
        self.length = length

    def _due(self) -> bool:
        return self.count == self.at or self.count > self.at + self.length


class TestHalfWay:
    """Where the way back fails too, the user is told, and the next command mends it."""

    @pytest.mark.parametrize("verb", ["patch", "revert"])
    def test_the_hint_says_so_and_the_next_command_mends(self, lab: Any, verb: str) -> None:
        before, body = VERBS[verb]
        if before:
            lab.patch(*before)
        old = lab.tree()
        probe = Faulty()
        body(lab, probe)
        new = lab.tree()
        restore(lab.site, old)
        # One file has its new content, then the disk is gone.
        step = last(probe, "rename") - 1
        while probe.names[step - 1] != "rename":
            step -= 1
        with pytest.raises(NotPermittedError) as e:
            body(lab, Failing(step, errno.EIO, for_good=True))
        assert f"fp8ctl revert --site-packages {lab.site}" in (e.value.hint or "")
        assert without_store(lab.tree()) not in (without_store(old), without_store(new))
        assert lab.status().interrupted
        recover(lab.site, Faulty())
        assert lab.tree() in (old, new)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
    def test_a_full_disk_never_stands_in_the_way_of_undoing_what_was_staged(
        self, lab: Any, code: int
    ) -> None:
        lab.patch("second", "third")
        old = lab.tree()
        probe = Faulty()
        lab.patch("first", calls=probe)
        commit = [n for n, name in enumerate(probe.names, 1) if name == "rename"][-3]
        for step in (n for n, name in enumerate(probe.names, 1) if name == "open" and n < commit):
            restore(lab.site, old)
            with pytest.raises(NotPermittedError) as e:
                lab.patch("first", calls=Failing(step, code, for_good=True, spared=SPARED[code]))
            assert "some files" not in (e.value.hint or ""), step
            assert unlocked(lab.tree()) == unlocked(old), step

    def test_a_way_back_that_dies_leaves_no_stray(self, lab: Any) -> None:
        # Found: the old content of a deleted file lay beside it for ever.
        lab.patch("second", "third")
        old = lab.tree()
        probe = Faulty()
        lab.revert(calls=probe)
        new = lab.tree()
        first = probe.names.index("rename")
        for step in range(first, probe.count, 9):
            for length in range(1, 40, 6):
                restore(lab.site, old)
                try:
                    lab.revert(calls=Relapsing(step, length))
                except Fp8ctlError:
                    recover(lab.site, Faulty())
                assert without_store(lab.tree()) in (without_store(old), without_store(new))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_an_error_with_a_way_out(lab: Any, code: int) -> None:
    old = lab.tree()

    class NoLocks(Faulty):
        def lock(self, fd: int) -> None:
            raise OSError(code, os.strerror(code))

    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotPermittedError) as e:
        lab.patch("first", calls=NoLocks())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert f"{lab.site / store.LOCK}: {os.strerror(code)}" in e.value.message
    assert "local disk" in (e.value.hint or "")
    assert without_store(lab.tree()) == old
    lab.patch("first")
    lab.revert()
    assert lab.tree() == old


def test_a_held_lock_is_busy_and_not_an_error_of_the_system(lab: Any) -> None:
    class Held(Faulty):
        def lock(self, fd: int) -> None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with pytest.raises(BusyError, match="process unknown") as e:
        lab.patch("first", calls=Held())
    assert e.value.data == {"pid": None}


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.ENOSPC, "space"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "dmesg"),
        (errno.EMFILE, "ulimit"),
        (errno.EROFS, "owner"),
        (errno.EACCES, "owner"),
    ],
)
def test_the_hint_fits_the_error(lab: Any, code: int, word: str) -> None:
    with pytest.raises(NotPermittedError) as e:
        lab.patch("first", calls=Failing(9, code))
    assert word in (e.value.hint or "")
    assert e.value.data["errno"] == code


def test_too_few_descriptors_are_told_like_any_other_error(lab: Any) -> None:
    import resource

    before = lab.tree()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Root(lab.site) as root:
        used = os.dup(0)
        os.close(used)
        try:
            # What fails is the folder itself, then one on the way to the file.
            for more in range(2):
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))
                for read in (root.read, root.xattrs, root.unlink, root.writable, root.identity):
                    with pytest.raises(NotPermittedError, match=os.strerror(errno.EMFILE)):
                        read(A)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert lab.tree() == before
