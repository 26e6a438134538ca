"""fp8ctl's own folder: what is written is read back, and what is not understood is said."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import BusyError, DriftError, Fp8ctlError
from fp8ctl.patching import store
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.names import RelPath, sha256_of
from fp8ctl.patching.store import Journal, JournalOp, Ledger, LedgerEntry, LedgerFile
from tests.patching.conftest import Quick
from tests.patching.faulty import Faulty

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ONE, TWO, THREE = (sha256_of(x) for x in (b"1", b"2", b"3"))
A, B = RelPath("sglang/a.py"), RelPath("b.py")
ENTRY = LedgerEntry(
    "0.4.8",
    "sglang-0.4.8",
    {"first": THREE},
    {A: LedgerFile(ONE, TWO, ("first",)), B: LedgerFile(None, THREE, ("first", "second"))},
)
LEDGER = Ledger({"sglang": ENTRY})
JOURNAL = Journal(
    "1a-7",
    True,
    (
        JournalOp(A, ".a.py.fp8ctl-1a-7", ONE, TWO, 0o644, (1, 2)),
        JournalOp(B, "", THREE, None, 0o755, (3, 4)),
        JournalOp(B, ".b.py.fp8ctl-1a-7", None, ONE, 0o600, (0, 0)),
    ),
    (RelPath("sglang/new"),),
    (RelPath("sglang/old"),),
    Ledger(),
    LEDGER,
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site" / ".fp8ctl").mkdir(parents=True)
    return tmp_path / "site"


@pytest.fixture
def root(site: Path) -> Iterator[Root]:
    with Root(site, Quick()) as opened:
        yield opened


class TestForms:
    """Other versions of fp8ctl read these: they are written here as they lie on the disk."""

    def test_of_a_ledger(self, root: Root, site: Path) -> None:
        store.write_ledger(root, LEDGER)
        text = (site / ".fp8ctl/ledger.json").read_text()
        raw = json.loads(text)
        assert raw == {
            "schema": 1,
            "engines": {
                "sglang": {
                    "version": "0.4.8",
                    "series": "sglang-0.4.8",
                    "patches": {"first": THREE},
                    "files": {
                        A: {"pre": ONE, "post": TWO, "patches": ["first"]},
                        B: {"pre": None, "post": THREE, "patches": ["first", "second"]},
                    },
                }
            },
        }
        # For people, who look into it, and for diffs.
        assert text == json.dumps(raw, indent=1, sort_keys=True) + "\n"
        assert store.read_ledger(root) == LEDGER
        store.write_ledger(root, Ledger())
        assert os.listdir(site / ".fp8ctl") == []
        assert store.read_ledger(root) == Ledger()

    def test_of_a_journal(self, root: Root, site: Path) -> None:
        store.write_journal(root, JOURNAL)
        raw = json.loads((site / ".fp8ctl/journal/1a-7.json").read_text())
        assert raw["schema"] == 1
        assert (raw["tx"], raw["committed"]) == ("1a-7", True)
        assert raw["ops"][0] == {
            "path": A, "staged": ".a.py.fp8ctl-1a-7", "old": ONE, "new": TWO,
            "mode": 0o644, "owner": [1, 2], "old_link": None, "new_link": None,
        }  # fmt: skip
        assert (raw["made"], raw["dropped"]) == (["sglang/new"], ["sglang/old"])
        assert raw["before"] == {"schema": 1, "engines": {}}
        assert raw["ledger"] == LEDGER.to_json()
        assert store.read_journal(root) == JOURNAL
        open_one = dataclasses.replace(JOURNAL, committed=False)
        store.write_journal(root, open_one)
        assert store.read_journal(root) == open_one
        store.end_journal(root, JOURNAL)
        assert store.read_journal(root) is None

    def test_names_beside_a_file(self) -> None:
        deep, top = JOURNAL.ops[0], JOURNAL.ops[2]
        assert deep.staged_path == "sglang/.a.py.fp8ctl-1a-7"
        assert deep.back_path == "sglang/.a.py.fp8ctl-back"
        assert (top.staged_path, top.back_path) == (".b.py.fp8ctl-1a-7", ".b.py.fp8ctl-back")

    def test_no_ledger_is_an_empty_one(self, root: Root) -> None:
        assert store.read_ledger(root) == Ledger()


def changed(raw: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of JSON with one value replaced."""
    copy = json.loads(json.dumps(raw))
    at = copy
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return copy


FILES = ("engines", "sglang", "files")
BAD_LEDGERS: list[tuple[tuple[Any, ...], Any]] = [
    (("schema",), 2),
    (("engines",), []),
    (("engines", "sglang"), 1),
    ((*FILES,), []),
    ((*FILES, A, "pre"), "x"),
    ((*FILES, A, "post"), None),
    ((*FILES, A, "patches"), "first"),
    ((*FILES, A, "patches"), [1]),
    ((*FILES, "../x"), {"pre": None, "post": ONE, "patches": []}),
    (("engines", "sglang", "patches"), {"first": "zz"}),
]
BAD_JOURNALS: list[tuple[tuple[Any, ...], Any]] = [
    (("schema",), 2),
    (("ops", 0, "path"), "/etc/passwd"),
    (("ops", 0, "staged"), "../x"),
    (("ops", 0, "old"), "x"),
    (("ops", 0, "new"), 7),
    (("ops", 0, "mode"), "644"),
    (("ops", 0, "owner"), [1]),
    (("ops", 0, "owner"), ["a", "b"]),
    (("ops", 0, "owner"), 5),
    (("made",), ["/x"]),
    (("dropped",), "x"),
    (("before",), {}),
    (("ledger",), None),
]


class TestRefusals:
    """What is not of our making is never acted upon."""

    @pytest.mark.parametrize(("path", "value"), BAD_LEDGERS, ids=str)
    def test_a_ledger(self, root: Root, site: Path, path: tuple[Any, ...], value: Any) -> None:
        file = site / store.LEDGER
        file.write_text(json.dumps(changed(LEDGER.to_json(), path, value)))
        with pytest.raises(DriftError, match=r"ledger\.json cannot be read") as e:
            store.read_ledger(root)
        assert (e.value.hint or "").startswith(f"mv {file} {file}.broken && fp8ctl doctor")

    @pytest.mark.parametrize(("path", "value"), BAD_JOURNALS, ids=str)
    def test_a_journal(self, root: Root, site: Path, path: tuple[Any, ...], value: Any) -> None:
        (site / store.JOURNAL).mkdir()
        file = site / store.JOURNAL / "1a-7.json"
        file.write_text(json.dumps(changed(JOURNAL.to_json(), path, value)))
        with pytest.raises(DriftError, match=r"1a-7\.json cannot be read") as e:
            store.read_journal(root)
        assert (e.value.hint or "").startswith(f"mv {file} {site} && fp8ctl doctor")

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
    def test_what_is_no_object(self, root: Root, site: Path, text: str) -> None:
        (site / store.JOURNAL).mkdir()
        (site / store.LEDGER).write_bytes(text.encode("latin-1"))
        (site / store.JOURNAL / "1.json").write_bytes(text.encode("latin-1"))
        for read in (store.read_ledger, store.read_journal):
            with pytest.raises(DriftError):
                read(root)

    def test_only_a_plain_true_commits(self) -> None:
        for value in (1, "true", None):
            raw = changed(JOURNAL.to_json(), ("committed",), value)
            assert Journal.from_json(raw).committed is False


def test_a_journal_is_told_from_a_draft_of_one(root: Root, site: Path) -> None:
    (site / store.JOURNAL).mkdir()
    (site / store.JOURNAL / ".tmp-0.json").write_text("{")
    assert store.read_journal(root) is None
    store.write_journal(root, JOURNAL)
    assert store.read_journal(root) == JOURNAL


def test_a_journal_that_vanishes_while_it_is_looked_for_is_none(
    root: Root, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Root, "names", lambda *_: ("gone.json",))
    assert store.read_journal(root) is None


class TestBlobs:
    def test_they_are_written_once_and_checked(self, root: Root, site: Path) -> None:
        store.write_blobs(root, {ONE: b"1"})
        first = (site / store.BLOBS / ONE).stat().st_ino
        store.write_blobs(root, {ONE: b"1", TWO: b"2"})
        assert (site / store.BLOBS / ONE).stat().st_ino == first
        assert store.read_blob(root, ONE) == b"1"
        assert store.read_blob(root, THREE) is None
        (site / store.BLOBS / ONE).write_bytes(b"rotten")
        assert store.read_blob(root, ONE) is None
        store.write_blobs(root, {ONE: b"1"})
        assert store.read_blob(root, ONE) == b"1"
        assert os.listdir(site / store.FOLDER) == ["blobs"]


class TestLeftovers:
    """`needs_recovery` is what makes the next command mend; a clean store needs none."""

    def clean(self, root: Root) -> None:
        store.write_blobs(root, {ONE: b"1"})
        store.write_ledger(root, LEDGER)

    def test_nothing_and_a_clean_store_need_none(self, root: Root, site: Path) -> None:
        self.clean(root)
        assert store.needs_recovery(root) is False
        (site / store.FOLDER).rename(site / "elsewhere")
        assert store.needs_recovery(root) is False

    @pytest.mark.parametrize(
        "path", ["journal/1.json", "journal/", ".tmp-ledger.json", "blobs/x", f"blobs/{TWO}"]
    )
    def test_each_of_these_does(self, root: Root, site: Path, path: str) -> None:
        self.clean(root)
        stray = site / store.FOLDER / path
        (stray if path.endswith("/") else stray.parent).mkdir(exist_ok=True)
        if not path.endswith("/"):
            stray.touch()
        assert store.needs_recovery(root) is True

    def test_a_store_without_a_ledger_does(self, root: Root) -> None:
        assert store.needs_recovery(root) is True

    def test_the_end_of_a_lock_sweeps_them(self, root: Root, site: Path) -> None:
        self.clean(root)
        store.write_blobs(root, {TWO: b"2"})
        (site / store.FOLDER / ".tmp-x").touch()
        (site / store.JOURNAL).mkdir()
        (site / store.JOURNAL / ".tmp-1.json").touch()
        with store.locked(root, pytest.fail):
            pass
        assert sorted(os.listdir(site / store.FOLDER)) == ["blobs", "ledger.json", "lock"]
        assert os.listdir(site / store.BLOBS) == [ONE]
        assert store.needs_recovery(root) is False

    def test_a_journal_keeps_all_that_it_may_need(self, root: Root, site: Path) -> None:
        self.clean(root)
        store.write_blobs(root, {TWO: b"2"})
        store.write_journal(root, JOURNAL)
        with store.locked(root, pytest.fail):
            pass
        assert sorted(os.listdir(site / store.BLOBS)) == sorted([ONE, TWO])
        assert store.read_journal(root) == JOURNAL

    def test_with_nothing_applied_the_folder_goes_and_a_stranger_s_file_stays(
        self, root: Root, site: Path
    ) -> None:
        store.write_ledger(root, Ledger({}))
        (site / store.LEDGER).write_text(json.dumps(Ledger().to_json()))
        (site / store.FOLDER / "notes.txt").touch()
        with store.locked(root, pytest.fail):
            pass
        assert sorted(os.listdir(site / store.FOLDER)) == ["lock", "notes.txt"]
        (site / store.FOLDER / "notes.txt").unlink()
        with store.locked(root, pytest.fail):
            store.write_blobs(root, {TWO: b"2"})
        assert not (site / store.FOLDER).exists()

    def test_it_goes_for_good(self, site: Path) -> None:
        calls = Faulty()
        with Root(site, calls) as root, store.locked(root, pytest.fail):
            pass
        # Flushed last, but for the pid in a lock that is no more.
        assert calls.names[-3:] == ["rmdir", "fsync", "truncate"]


class TestLocked:
    def test_it_holds_the_pid_and_only_while_it_is_held(self, root: Root, site: Path) -> None:
        store.write_ledger(root, LEDGER)
        with store.locked(root, pytest.fail):
            assert (site / store.LOCK).read_bytes() == b"%d\n" % os.getpid()
        assert (site / store.LOCK).read_bytes() == b""

    def test_an_error_inside_is_the_one_that_is_raised(self, root: Root, site: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        (site / store.LEDGER).write_text("{")
        with pytest.raises(KeyError), store.locked(root, pytest.fail):
            raise KeyError
        (site / store.LEDGER).unlink()
        with pytest.raises(KeyError), store.locked(root, pytest.fail):
            raise KeyError
        assert not (site / store.FOLDER).exists()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_what_cannot_be_tidied_is_told(self, root: Root, site: Path) -> None:
        told: list[str] = []
        with store.locked(root, told.append):
            (site / store.LEDGER).write_text("{")
        assert len(told) == 1
        assert "ledger.json cannot be read" in told[0]

    @pytest.mark.parametrize("text", [b"", b"not a pid\n", b"\xff\xfe"])
    def test_a_holder_that_cannot_be_named_is_unknown(
        self, root: Root, site: Path, text: bytes
    ) -> None:
        with store.locked(root, pytest.fail):
            (site / store.LOCK).write_bytes(text)
            with pytest.raises(BusyError, match="process unknown") as e, store.locked(root, print):
                pass
            assert e.value.data == {"pid": None}
            (site / store.LOCK).write_bytes(b"4194304\n")
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(BusyError, match="process 4194304") as e, store.locked(root, print):
                pass
            assert e.value.data == {"pid": 4194304}
            assert len(os.listdir("/proc/self/fd")) == before

    def test_a_lock_that_is_swept_away_while_it_is_taken_is_taken_again(self, site: Path) -> None:
        class Swept(Faulty):
            def lock(self, fd: int) -> None:
                super().lock(fd)
                if self.names.count("lock") == 1:
                    (site / store.LOCK).unlink()
                    (site / store.FOLDER).rmdir()

        calls = Swept()
        before = len(os.listdir("/proc/self/fd"))
        with Root(site, calls) as root, store.locked(root, pytest.fail):
            assert (site / store.LOCK).read_bytes() == b"%d\n" % os.getpid()
            assert len(os.listdir("/proc/self/fd")) == before + 2
        assert calls.names.count("lock") == 2

    def test_one_that_is_always_swept_away_is_given_up(self, site: Path) -> None:
        class Swept(Faulty):
            def lock(self, fd: int) -> None:
                super().lock(fd)
                (site / store.LOCK).unlink()

        calls = Swept()
        before = len(os.listdir("/proc/self/fd"))
        with (
            Root(site, calls) as root,
            pytest.raises(BusyError, match="made and removed all the time"),
            store.locked(root, pytest.fail),
        ):
            pass
        assert calls.names.count("lock") == 100
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_folder_that_goes_while_the_lock_is_made_is_made_again(self, site: Path) -> None:
        class Swept(Faulty):
            def open(self, name: str, flags: int, mode: int, *, dir_fd: int) -> int:
                if self.names.count("open") == 1:
                    raise FileNotFoundError(2, "gone", name)
                return super().open(name, flags, mode, dir_fd=dir_fd)

        with Root(site, Swept()) as root, store.locked(root, pytest.fail):
            pass


def test_tidying_lets_only_our_errors_be_warnings() -> None:
    def fail(error: BaseException) -> None:
        raise error

    told: list[str] = []
    with store.tidying(told.append):
        fail(Fp8ctlError("reason"))
    assert len(told) == 1
    assert told[0].endswith("the rest is left to the next command: reason")
    with pytest.raises(KeyboardInterrupt), store.tidying(told.append):
        fail(KeyboardInterrupt())


def test_a_stamp_changes_with_every_step_that_others_could_see(root: Root, site: Path) -> None:
    (site / store.FOLDER).rmdir()
    seen = [store.stamp(root)]
    assert store.stamp(root) == seen[0]
    root.make_folder(store.FOLDER)
    seen.append(store.stamp(root))
    store.write_journal(root, JOURNAL)
    seen.append(store.stamp(root))
    store.write_ledger(root, LEDGER)
    seen.append(store.stamp(root))
    store.write_ledger(root, LEDGER)  # the same words in a new file
    seen.append(store.stamp(root))
    store.end_journal(root, JOURNAL)
    seen.append(store.stamp(root))
    assert len(set(seen)) == len(seen)
