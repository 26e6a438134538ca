"""What one folder allows: every call does one thing, leaks nothing and follows no link."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import ConflictError, NotPermittedError
from fp8ctl.patching.diff import MAX_FILE_BYTES
from fp8ctl.patching.fsops import Root, Syscalls
from tests.patching.faulty import Failing, Faulty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ME = (os.geteuid(), os.getegid())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    (folder / "p" / "q").mkdir(parents=True)
    (folder / "p" / "a.py").write_bytes(b"a = 1\n")
    (folder / "p" / "a.py").chmod(0o640)
    return folder


@pytest.fixture
def root(site: Path) -> Iterator[Root]:
    """Open a folder; whatever a test does with it, no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd"))
    with Root(site) as opened:
        yield opened
    assert len(os.listdir("/proc/self/fd")) == before


class TestReading:
    def test_a_file_with_all_that_belongs_to_it(self, root: Root, site: Path) -> None:
        info = (site / "p/a.py").stat()
        found = root.read("p/a.py")
        assert found is not None
        assert (found.data, found.mode, found.mtime_ns) == (b"a = 1\n", 0o640, info.st_mtime_ns)
        assert (found.uid, found.gid) == ME == root.owner("p/a.py")
        (site / "p/a.py").chmod(0o4755)
        assert getattr(root.read("p/a.py"), "mode", 0) == 0o4755

    def test_what_is_not_there(self, root: Root) -> None:
        assert root.read("p/none.py") is None
        assert root.read("none/a.py") is None
        assert root.names("none") == ()
        assert root.has_folder("none") is False
        assert root.xattrs("p/none.py") == ()
        assert root.identity("p/none.py") is None
        assert root.identity("none/a.py") is None

    def test_what_is_not_there_is_named_by_its_path(self, root: Root) -> None:
        """The system names one component; a person needs to know in which folder."""
        cases: tuple[tuple[Callable[[], object], str], ...] = (
            (lambda: root.owner("none/a.py"), "none"),
            (lambda: root.owner("p/q/none/x/a.py"), "p/q/none"),
            (lambda: root.rename("p/q/none.py", "x.py"), "p/q/none.py"),
        )
        for act, named in cases:
            with pytest.raises(FileNotFoundError) as e:
                act()
            assert e.value.filename == named

    def test_names_are_sorted_and_a_file_is_no_folder(self, root: Root, site: Path) -> None:
        (site / "p" / "B").touch()
        assert root.names("p") == ("B", "a.py", "q")
        assert root.has_folder("p/q") is True
        with pytest.raises(ConflictError):
            root.has_folder("p/a.py")

    def test_the_limit_is_the_last_size_that_is_read(self, root: Root) -> None:
        assert root.read("p/a.py", limit=6) is not None
        with pytest.raises(ConflictError, match=r"p/a\.py has 6 bytes, expected at most 5"):
            root.read("p/a.py", limit=5)

    def test_what_is_no_file_is_refused_without_waiting(self, root: Root, site: Path) -> None:
        os.mkfifo(site / "p" / "pipe")
        for path in ("p/pipe", "p/q"):
            with pytest.raises(ConflictError, match="is not a regular file"):
                root.read(path)

    def test_links_are_followed_nowhere(self, root: Root, site: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "a.py").write_bytes(b"theirs\n")
        (site / "link.py").symlink_to(outside / "a.py")
        (site / "link").symlink_to(outside)
        # Of the working folder: a path that is read from there would find it.
        for path in ("link.py", "link/a.py"):
            for act in (root.read, root.xattrs):
                with pytest.raises(ConflictError, match="is a symbolic link") as e:
                    act(path)
                assert str(site / path) in e.value.message
                assert "--link-mode copy" in (e.value.hint or "")
        with pytest.raises(ConflictError, match="is a symbolic link"):
            root.lock_file("link.py")
        with pytest.raises(ConflictError, match="is a symbolic link"):
            root.names("link")

    def test_a_link_is_made_where_nothing_is_and_what_it_leads_to_is_read(
        self, root: Root, site: Path
    ) -> None:
        root.link("p/q/l.py", "../a.py")
        assert os.readlink(site / "p/q/l.py") == "../a.py"
        assert root.leads_to("p/q/l.py", "../a.py") == b"a = 1\n"
        found = root.read("p/q/l.py", through=True)
        assert found is not None
        assert (found.data, found.link) == (b"a = 1\n", "../a.py")
        with pytest.raises(NotPermittedError, match=r"p/a\.py: File exists"):
            root.link("p/a.py", "q")
        assert root.leads_to("p/q/l.py", "none.py") is None
        with (site / "p" / "big").open("wb") as stream:
            stream.truncate(MAX_FILE_BYTES)
        assert root.leads_to("p/x", "big") == bytes(MAX_FILE_BYTES)
        os.truncate(site / "p" / "big", MAX_FILE_BYTES + 1)
        assert root.leads_to("p/x", "big") is None

    def test_the_folder_itself_may_be_named_by_a_link(self, site: Path, tmp_path: Path) -> None:
        (tmp_path / "lib64").symlink_to(site)
        with Root(tmp_path / "lib64") as opened:
            assert opened.path == site.resolve()
            assert opened.read("p/a.py") is not None

    def test_a_folder_that_cannot_be_opened_is_named(self, site: Path) -> None:
        with pytest.raises(NotPermittedError, match=r"p/a\.py: Not a directory"):
            Root(site / "p" / "a.py")

    def test_free_bytes_are_those_of_the_file_system(self, root: Root, site: Path) -> None:
        info = os.statvfs(site)
        assert root.free_bytes() == pytest.approx(info.f_bavail * info.f_frsize, rel=0.05)

    def test_an_identity_changes_with_each_change(self, root: Root, site: Path) -> None:
        first, folder = root.identity("p/a.py"), root.identity("")
        assert first is not None
        assert first[1] == (site / "p/a.py").stat().st_ino
        assert folder is not None
        assert folder[1] == site.stat().st_ino
        assert root.identity("p/a.py") == first
        root.replace("p/a.py", b"a = 1\n", mode=0o640)
        assert root.identity("p/a.py") != first
        (site / "new").touch()
        assert root.identity("") != folder
        (site / "dangling").symlink_to("nowhere")
        assert root.identity("dangling") is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_writable_is_about_this_user_and_the_nearest_folder(site: Path) -> None:
    (site / "p").chmod(0o777)
    (site / "p" / "q").chmod(0o755)
    for folder in site.parents:
        if folder.owner() == "root" and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
        if folder == Path("/tmp"):
            break
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.seteuid(65534)  # the effective user decides
        with Root(site) as root:
            paths = ("p/a.py", "p/none/none/x", "p/q/x", "p/q/none/x", "x", "none/x")
            os.write(writer, repr([root.writable(p) for p in paths]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader) as stream:
        assert stream.read() == "[True, True, False, False, False, False]"


class Log(Syscalls):
    """Remembers the order of calls, and how a file was made."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.made: list[tuple[str, int, int]] = []

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in vars(Syscalls) and not name.startswith("_"):
            self.names.append(name)
        return value

    def open(self, name: str, flags: int, mode: int, *, dir_fd: int) -> int:
        self.made.append((name, flags, mode))
        return super().open(name, flags, mode, dir_fd=dir_fd)


class TestWriting:
    def test_a_staged_file_is_private_until_it_is_whole_and_flushed_last(self, site: Path) -> None:
        log = Log()
        with Root(site, log) as root:
            root.stage("p/new", b"data", mode=0o751, owner=ME, mtime_ns=10**18)
        assert log.names == ["open", "write", "attributes", "times", "fsync"]
        [(name, flags, mode)] = log.made
        assert (name, mode) == ("new", 0o600)
        assert flags & os.O_EXCL
        assert flags & os.O_NOFOLLOW
        info = (site / "p/new").stat()
        assert (info.st_mode & 0o7777, info.st_mtime_ns) == (0o751, 10**18)
        assert (site / "p/new").read_bytes() == b"data"

    def test_without_a_time_it_is_now(self, site: Path) -> None:
        log = Log()
        with Root(site, log) as root:
            root.stage("p/new", b"", mode=0o600, owner=ME, mtime_ns=None)
        assert "times" not in log.names
        assert "write" not in log.names

    def test_a_short_write_is_gone_on_with(self, site: Path) -> None:
        class Short(Faulty):
            def write(self, fd: int, data: bytes) -> int:
                return super().write(fd, data[:3])

        with Root(site, Short()) as root:
            root.stage("p/new", b"0123456789", mode=0o600, owner=ME, mtime_ns=None)
        assert (site / "p/new").read_bytes() == b"0123456789"

    def test_staging_replaces_the_name_and_never_writes_through_it(
        self, root: Root, site: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"theirs")
        os.link(other, site / "p" / "new")
        (site / "p" / "dangling").symlink_to(tmp_path / "made")
        for name in ("new", "dangling"):
            root.stage(f"p/{name}", b"ours", mode=0o600, owner=ME, mtime_ns=None)
            assert (site / "p" / name).read_bytes() == b"ours"
            assert not (site / "p" / name).is_symlink()
        assert other.read_bytes() == b"theirs"
        assert not (tmp_path / "made").exists()

    def test_no_descriptor_is_left_where_it_fails(self, site: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for at in range(1, 5):
            with Root(site, Failing(at, errno.EIO)) as root, pytest.raises(NotPermittedError):
                root.stage("p/new", b"data", mode=0o600, owner=ME, mtime_ns=None)
            (site / "p/new").unlink(missing_ok=True)
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_the_owner_is_set(self, root: Root, site: Path) -> None:
        root.stage("p/new", b"", mode=0o600, owner=(1234, 4321), mtime_ns=None)
        info = (site / "p/new").stat()
        assert (info.st_uid, info.st_gid) == (1234, 4321)
        os.chown(site / "p", 55, 66)
        root.replace("p/ours", b"")
        info = (site / "p/ours").stat()
        assert (info.st_uid, info.st_gid) == (55, 66)
        root.replace("p/ours", b"", owner=(1, 2))
        assert (site / "p/ours").stat().st_uid == 1

    def test_fsync_is_a_real_one(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flushed: list[str] = []
        monkeypatch.setattr(
            os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        )
        with Root(site) as root:
            root.replace("p/x", b"1")
            root.sync_folder("p")
            root.sync_folder("")
            root.sync_folder("none")
        assert flushed == [str(site / "p" / ".tmp-x"), str(site / "p"), str(site)]

    def test_replace_leaves_one_file_readable_for_all(self, root: Root, site: Path) -> None:
        for path in ("p/x.json", "top.json"):
            for data in (b"1", b"2"):
                root.replace(path, data)
                assert (site / path).read_bytes() == data
            assert (site / path).stat().st_mode & 0o7777 == 0o644
        assert not list(site.rglob(".tmp-*"))

    def test_unlink_tells_whether_there_was_something(self, root: Root, site: Path) -> None:
        (site / "dangling").symlink_to("nowhere")
        assert root.unlink("dangling") is True
        assert root.unlink("p/a.py") is True
        assert root.unlink("p/a.py") is False
        assert root.unlink("none/a.py") is False
        assert os.listdir(site / "p") == ["q"]
        with pytest.raises(NotPermittedError, match=str(site / "p/q")):
            root.unlink("p/q")

    def test_nothing_is_called_for_what_is_so_already(self, site: Path) -> None:
        log = Log()
        with Root(site, log) as root:
            root.unlink("p/none")
            root.make_folder("p/q")
            root.remove_folder("p")
            root.remove_folder("p/none")
        assert log.names == []

    def test_make_folder_tells_whether_it_made_one(self, root: Root, site: Path) -> None:
        before = os.umask(0)
        try:
            assert root.make_folder("p/new") is True
            assert root.make_folder("p/private", 0o700) is True
        finally:
            os.umask(before)
        assert root.make_folder("p/new") is False
        assert stat.S_IMODE((site / "p/new").stat().st_mode) == 0o755
        assert stat.S_IMODE((site / "p/private").stat().st_mode) == 0o700
        (site / "p" / "dangling").symlink_to("nowhere")
        assert root.make_folder("p/dangling") is False

    def test_one_that_is_made_by_somebody_else_just_now_is_no_error(self, site: Path) -> None:
        class Raced(Faulty):
            def mkdir(self, name: str, mode: int, *, dir_fd: int) -> None:
                os.mkdir(name, dir_fd=dir_fd)
                super().mkdir(name, mode, dir_fd=dir_fd)

        with Root(site, Raced()) as root:
            assert root.make_folder("p/new") is False

    def test_remove_folder_removes_empty_ones_only(self, site: Path) -> None:
        with Root(site) as root:
            root.remove_folder("p")
            assert (site / "p").is_dir()
            root.remove_folder("p/q")
            assert not (site / "p/q").exists()
            root.remove_folder("p/q")
        (site / "p/q").mkdir()
        # Filled, or gone, between the look and the call; anything else is an error.
        for code in (errno.ENOTEMPTY, errno.ENOENT):
            with Root(site, Failing(1, code)) as root:
                root.remove_folder("p/q")
        with Root(site, Failing(1, errno.EBUSY)) as root, pytest.raises(NotPermittedError):
            root.remove_folder("p/q")

    def test_rename_replaces_within_one_folder(self, root: Root, site: Path) -> None:
        (site / "p" / "b.py").write_bytes(b"b")
        root.rename("p/b.py", "a.py")
        assert sorted(os.listdir(site / "p")) == ["a.py", "q"]
        assert (site / "p/a.py").read_bytes() == b"b"
        with pytest.raises(FileNotFoundError):
            root.rename("p/b.py", "a.py")

    def test_an_error_carries_path_reason_and_number(self, root: Root, site: Path) -> None:
        (site / "p" / "full").mkdir()
        (site / "p" / "full" / "x").touch()
        with pytest.raises(NotPermittedError) as e:
            root.rename("p/a.py", "full")
        assert e.value.message == f"{site / 'p/a.py'}: {os.strerror(errno.EISDIR)}"
        assert e.value.data == {"path": str(site / "p/a.py"), "errno": errno.EISDIR}
        assert "owner" in (e.value.hint or "")


class TestBytecode:
    @pytest.mark.parametrize("folder", ["", "p/"])
    def test_of_this_module_alone_goes(self, root: Root, site: Path, folder: str) -> None:
        cache = site / folder / "__pycache__"
        cache.mkdir()
        gone = ["m.cpython-311.pyc", "m.cpython-311.opt-1.pyc", "m.pyc"]
        kept = ["m.cpython-311.opt-1.x.pyc", "m.cpython-311.pyo", "mm.cpython-311.pyc", "m_pyc"]
        for name in gone + kept:
            (cache / name).touch()
        root.drop_bytecode(f"{folder}m.txt")
        assert len(os.listdir(cache)) == len(gone + kept)
        root.drop_bytecode(f"{folder}m.py")
        assert sorted(os.listdir(cache)) == sorted(kept)

    def test_without_a_cache_there_is_nothing_to_do(self, root: Root) -> None:
        root.drop_bytecode("p/q/m.py")


class TestLock:
    def test_it_is_made_once_and_written_in_place(self, root: Root, site: Path) -> None:
        before = os.umask(0)
        fd = root.lock_file("p/lock")
        os.umask(before)
        assert (site / "p/lock").stat().st_mode & 0o7777 == 0o644
        root.overwrite("p/lock", fd, b"12345\n")
        other = root.lock_file("p/lock")
        root.overwrite("p/lock", other, b"1\n")
        assert (site / "p/lock").read_bytes() == b"1\n"
        assert root.same_file("p/lock", fd) is True
        root.overwrite("p/lock", fd, b"")
        assert (site / "p/lock").read_bytes() == b""
        root.unlink("p/lock")
        assert root.same_file("p/lock", fd) is False
        (site / "p/lock").symlink_to(site / "p/a.py")
        held = os.open(site / "p/a.py", os.O_RDONLY)
        assert root.same_file("p/lock", held) is False
        for one in (fd, other, held):
            os.close(one)

    def test_the_second_does_not_wait(self, root: Root) -> None:
        one, two = root.lock_file("lock"), root.lock_file("lock")
        assert root.lock("lock", one) is True
        assert root.lock("lock", two) is False
        os.close(one)
        assert root.lock("lock", two) is True
        os.close(two)

    def test_a_lock_is_one_that_other_programs_see(self, root: Root, site: Path) -> None:
        fd = root.lock_file("lock")
        assert root.lock("lock", fd)
        with (site / "lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)


def _has_xattrs(folder: Path) -> bool:
    try:
        os.setxattr(folder, "user.fp8ctl", b"1")
    except OSError:
        return False
    os.removexattr(folder, "user.fp8ctl")
    return True


class TestAttributes:
    @pytest.fixture(autouse=True)
    def needs_xattrs(self, tmp_path: Path) -> None:
        if not _has_xattrs(tmp_path):
            pytest.skip("this file system has no extended attributes")

    @pytest.fixture
    def acl(self) -> bytes:
        # Version 2; owner rw, user 1234 r, group r, mask rw, others nothing (acl(5)).
        rows = [(1, 6, -1), (2, 4, 1234), (4, 4, -1), (16, 6, -1), (32, 0, -1)]
        return struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", tag, bits, who & 0xFFFFFFFF) for tag, bits, who in rows
        )

    def test_a_patched_and_a_reverted_file_keep_them(self, lab: Any, acl: bytes) -> None:
        file = lab.site / "sglang/srt/a.py"
        os.setxattr(file, "user.note", b"keep me")
        wanted = {"user.note": b"keep me"}
        try:
            os.setxattr(file, "system.posix_acl_access", acl)
            wanted["system.posix_acl_access"] = acl
        except OSError:
            pass  # a file system without ACLs
        mode = file.stat().st_mode
        for act in (lambda: lab.patch("first"), lab.revert):
            act()
            assert {n: os.getxattr(file, n) for n in os.listxattr(file)} == wanted
            assert file.stat().st_mode == mode
        assert os.listxattr(lab.site / "sglang/srt/b.py") == []

    def test_signatures_of_the_old_content_stay_behind(
        self, root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ["user.b", "security.ima", "security.evm", "security.selinux", "trusted.x"]
        monkeypatch.setattr(os, "listxattr", lambda _: names)
        monkeypatch.setattr(os, "getxattr", lambda _, name: name.encode())
        assert root.xattrs("p/a.py") == (
            ("security.selinux", b"security.selinux"),
            ("user.b", b"user.b"),
        )

    @pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EIO])
    def test_where_they_cannot_be_read_there_are_none(
        self, root: Root, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def fail(_: int) -> list[str]:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "listxattr", fail)
        if code == errno.EIO:
            with pytest.raises(NotPermittedError, match=os.strerror(code)):
                root.xattrs("p/a.py")
        else:
            assert root.xattrs("p/a.py") == ()

    @pytest.mark.parametrize(
        ("name", "code", "fails"),
        [
            ("security.selinux", errno.EPERM, False),
            ("security.selinux", errno.ENOSPC, True),
            ("user.note", errno.EPERM, True),
        ],
    )
    def test_a_label_that_may_not_be_set_is_left_and_what_is_the_user_s_is_not(
        self, site: Path, name: str, code: int, fails: bool
    ) -> None:
        class Refusing(Faulty):
            def xattr(self, fd: int, attribute: str, value: bytes) -> None:
                if attribute == name:
                    raise OSError(code, os.strerror(code))
                super().xattr(fd, attribute, value)

        given = ((name, b"x"), ("user.z", b"z"))
        with Root(site, Refusing()) as root:
            if fails:
                with pytest.raises(NotPermittedError, match=os.strerror(code)):
                    root.stage("p/x", b"", mode=0o600, owner=ME, mtime_ns=None, xattrs=given)
            else:
                root.stage("p/x", b"", mode=0o600, owner=ME, mtime_ns=None, xattrs=given)
                assert os.getxattr(site / "p/x", "user.z") == b"z"
