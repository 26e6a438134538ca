"""Installers share files between environments and caches: none of those changes by a byte."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import ConflictError, DriftError, NotPermittedError
from fp8ctl.patching import commands, store, transaction
from fp8ctl.patching.fsops import Root
from tests.patching.faulty import Faulty, killed_at
from tests.patching.installs import Venv, can_reflink, photograph, write_wheel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fp8ctl.patching.fsops import Syscalls
    from fp8ctl.render import Reporter

A = "sglang/srt/a.py"


@pytest.fixture
def venv(tmp_path: Path, uv: Path) -> Callable[[str], Venv]:
    """Return a function: name -> a new virtual environment, all on one cache of uv."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "0.4.8")
    return lambda name: Venv(tmp_path / name, wheels, uv, tmp_path / "uv-cache").make()


def shares(path: Path, mode: str) -> bool:
    """Tell whether a file lies in the environment in the way of a link mode."""
    if mode == "symlink":
        return path.is_symlink()
    return not path.is_symlink() and (path.stat().st_nlink > 1) == (mode == "hardlink")


@pytest.mark.parametrize("mode", ["hardlink", "symlink", "copy", "clone"])
def test_no_other_environment_and_no_cache_changes(
    bundled: Any, venv: Callable[[str], Venv], reporter: Reporter, tmp_path: Path, mode: str
) -> None:
    if mode == "clone" and not can_reflink(tmp_path):
        pytest.skip("this file system has no reflinks")
    ours, other = venv("ours"), venv("other")
    for one in (ours, other):
        one.uv_pip("install", "--link-mode", mode, "sglang==0.4.8")
        assert shares(one.site / A, mode)
    before = photograph(other.folder, tmp_path / "uv-cache")
    assert any(path.endswith(A) and "uv-cache" in path for path in before)
    pristine = photograph(ours.site)
    contents = {path: seen[0] for path, seen in pristine.items()}
    for _ in range(2):
        data = commands.patch(reporter, python=ours.python)
        assert data["changed"]
        assert b"first" in (ours.site / A).read_bytes()
        assert photograph(other.folder, tmp_path / "uv-cache") == before
        commands.revert(reporter, python=ours.python)
        assert photograph(other.folder, tmp_path / "uv-cache") == before
        assert {path: seen[0] for path, seen in photograph(ours.site).items()} == contents
    commands.patch(reporter, python=ours.python)
    third = venv("third")
    third.uv_pip("install", "--link-mode", mode, "sglang==0.4.8")
    bundled.site = third.site
    assert bundled.status().state == "pristine"


@pytest.fixture
def linked(lab: Any, tmp_path: Path) -> Any:
    """Return the lab with every file of the engine a link, as uv makes them on request."""
    cache = tmp_path / "cache"
    for path in sorted(p for p in (lab.site / "sglang").rglob("*") if p.is_file()):
        kept = cache / path.relative_to(lab.site)
        kept.parent.mkdir(parents=True, exist_ok=True)
        path.rename(kept)
        path.symlink_to(kept)
    return lab


def laid(lab: Any) -> dict[str, tuple[object, object]]:
    """Return where each name leads, or its content; times aside."""
    return {path: (seen[0], seen[3]) for path, seen in photograph(lab.site).items()}


def test_a_link_becomes_a_file_and_the_same_link_again(linked: Any, tmp_path: Path) -> None:
    pristine, cache = laid(linked), photograph(tmp_path / "cache")
    linked.patch("first")
    linked.patch("second", "third")
    assert not (linked.site / A).is_symlink()
    assert (linked.site / "sglang/untouched.py").is_symlink()
    linked.revert("first")
    assert not (linked.site / A).is_symlink()
    linked.revert()
    assert laid(linked) == pristine
    assert photograph(tmp_path / "cache") == cache


def test_where_the_cache_was_cleaned_the_stored_content_is_put_back(
    linked: Any, tmp_path: Path
) -> None:
    released = (linked.site / A).read_bytes()
    linked.patch("first")
    shutil.rmtree(tmp_path / "cache")
    linked.revert()
    assert not (linked.site / A).is_symlink()
    assert linked.read(A) == released
    assert linked.status().file(A).state == "pristine"


class Ending(Faulty):
    """The disk fails once, at the ledger: every file has its new content by then."""

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.first, self.failed = first, False

    def rename(self, old: str, new: str, *, dir_fd: int) -> None:
        if new == "ledger.json" and not self.failed:
            self.failed = True
            self.first()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().rename(old, new, dir_fd=dir_fd)


def test_an_error_ends_in_the_links_or_files_that_were_there(linked: Any) -> None:
    pristine = laid(linked)
    with pytest.raises(NotPermittedError, match=os.strerror(errno.EIO)):
        linked.patch("second", calls=Ending())
    assert laid(linked) == pristine
    linked.patch("third", "second")
    patched = laid(linked)
    with pytest.raises(NotPermittedError, match=os.strerror(errno.EIO)):
        linked.revert("second", calls=Ending())
    lock = str(linked.site / store.LOCK)
    assert {**laid(linked), lock: None} == {**patched, lock: None}


def test_an_error_behind_which_the_cache_was_cleaned_ends_in_what_the_links_led_to(
    linked: Any, tmp_path: Path
) -> None:
    before = {path: linked.read(path) for path in (A, "sglang/srt/b.py")}
    with pytest.raises(NotPermittedError, match=os.strerror(errno.EIO)):
        linked.patch("second", calls=Ending(lambda: shutil.rmtree(tmp_path / "cache/sglang/srt")))
    for path, content in before.items():
        assert not (linked.site / path).is_symlink()
        assert linked.read(path) == content


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_a_link_led_to_does_not_lend_its_owner(linked: Any, tmp_path: Path) -> None:
    """A cache is its owner's; what stands in the environment is the environment's owner's."""
    os.chown(tmp_path / "cache" / A, 12345, 54321)
    with contextlib.suppress(OSError):  # a file system without extended attributes
        os.setxattr(tmp_path / "cache" / A, "user.note", b"of the cache")
    os.chown((linked.site / A).parent, 23456, 23456)
    linked.patch("first")
    info = (linked.site / A).stat()
    assert (info.st_uid, info.st_gid) == (23456, 23456)
    assert os.listxattr(linked.site / A) == []


def test_a_link_that_leads_nowhere_is_missing(linked: Any, tmp_path: Path) -> None:
    (tmp_path / "cache" / A).unlink()
    assert linked.status().file(A).state == "missing"
    with pytest.raises(DriftError, match="is not there"):
        linked.patch("first")


def test_a_link_to_something_else_is_drift(linked: Any, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_bytes(b"other\n")
    (linked.site / A).unlink()
    (linked.site / A).symlink_to(tmp_path / "other.py")
    with pytest.raises(DriftError):
        linked.patch("first")
    assert (tmp_path / "other.py").read_bytes() == b"other\n"
    os.mkfifo(tmp_path / "pipe")
    (linked.site / A).unlink()
    (linked.site / A).symlink_to(tmp_path / "pipe")
    with pytest.raises(ConflictError, match="not a regular file"):
        linked.patch("first")


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("verb", ["patch", "revert"])
def test_death_at_every_step_leaves_all_links_or_all_files(
    linked: Any, tmp_path: Path, verb: str, stride: int
) -> None:
    if verb == "revert":
        linked.patch("second", "third")
    start = tmp_path / "start"
    shutil.copytree(linked.site, start, symlinks=True)
    cache = photograph(tmp_path / "cache")

    def body(calls: Syscalls) -> object:
        return (
            linked.patch("second", "third", calls=calls)
            if verb == "patch"
            else (linked.revert(calls=calls))
        )

    ends = {"old": laid(linked)}
    body(Faulty())
    ends["new"] = laid(linked)
    seen, step = set(), 1 - stride
    while True:
        step += stride
        shutil.rmtree(linked.site)
        shutil.copytree(start, linked.site, symlinks=True)
        if not killed_at(step, body):
            break
        with Root(linked.site, Faulty()) as root, transaction.begin(root):
            pass
        [end] = [name for name, tree in ends.items() if tree == laid(linked)]
        seen.add(end)
        assert photograph(tmp_path / "cache") == cache
    assert seen == {"old", "new"}


def test_writing_into_a_hard_link_would_reach_the_others(venv: Callable[[str], Venv]) -> None:
    """The hazard itself: without it the law above would say nothing."""
    ours, other = venv("ours"), venv("other")
    for one in (ours, other):
        one.uv_pip("install", "--link-mode", "hardlink", "sglang==0.4.8")
    with (ours.site / A).open("ab") as file:
        file.write(b"# edited\n")
    assert (other.site / A).read_bytes().endswith(b"# edited\n")
    assert os.path.samefile(ours.site / A, other.site / A)
