"""The only module that changes files.

Everything goes through folder descriptors opened one component at a time with
O_NOFOLLOW, so that no link placed between check and use leads elsewhere. Files
are replaced by rename, never written in place: installers hard-link one file
into many environments, and a write would reach all of them. Called by `store`
and `transaction`; `status` only reads through it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8ctl.errors import ConflictError, NotPermittedError
from fp8ctl.patching.diff import MAX_FILE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PERMISSIONS = 0o7777
_HINTS = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "free some of your quota and run it again",
    errno.EIO: "the disk fails: see dmesg",
    errno.EMFILE: "ulimit -n 1024, and run it again",
}
_ACL = "system.posix_acl_access"
# Of the rest, `trusted` is the kernel's, and IMA's and EVM's are signatures of the old content.
_XATTRS = ("user.", "security.", _ACL)
_SIGNATURES = ("security.ima", "security.evm")
_NO_XATTRS = (errno.ENOTSUP, errno.EPERM, errno.EACCES)


@dataclass(frozen=True, slots=True)
class FileData:
    """A file as it was read: content, permission bits, owner, times in nanoseconds.

    Attributes:
        link: where the name leads, if it is a link that was read through; else None.
    """

    data: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    link: str | None = None


class Syscalls:
    """The calls that change a file system, one method each.

    Tests put a subclass in its place that fails, or kills the process, at the n-th call.
    """

    def open(self, name: str, flags: int, mode: int, *, dir_fd: int) -> int:
        """Create or truncate a file."""
        return os.open(name, flags, mode, dir_fd=dir_fd)

    def write(self, fd: int, data: bytes) -> int:
        """Write some of `data`, return how many bytes."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Flush a file or a folder to the disk."""
        os.fsync(fd)

    def rename(self, old: str, new: str, *, dir_fd: int) -> None:
        """Replace `new` by `old`, both in one folder."""
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=dir_fd)

    def symlink(self, target: str, name: str, *, dir_fd: int) -> None:
        """Make a symbolic link."""
        os.symlink(target, name, dir_fd=dir_fd)

    def mkdir(self, name: str, mode: int, *, dir_fd: int) -> None:
        """Make a folder."""
        os.mkdir(name, mode, dir_fd=dir_fd)

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        """Remove an empty folder."""
        os.rmdir(name, dir_fd=dir_fd)

    def attributes(self, fd: int, mode: int, uid: int, gid: int) -> None:
        """Set permission bits and owner of an open file."""
        now = os.fstat(fd)
        if (now.st_uid, now.st_gid) != (uid, gid):
            os.fchown(fd, uid, gid)
        os.fchmod(fd, mode)

    def times(self, fd: int, mtime_ns: int) -> None:
        """Set access and modification time of an open file."""
        os.utime(fd, ns=(mtime_ns, mtime_ns))

    def xattr(self, fd: int, name: str, value: bytes) -> None:
        """Set an extended attribute of an open file."""
        os.setxattr(fd, name, value)

    def truncate(self, fd: int) -> None:
        """Empty an open file."""
        os.ftruncate(fd, 0)

    def lock(self, fd: int) -> None:
        """Lock an open file for this process alone, or fail at once."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Root:
    """A folder (site-packages) and what may be done below it.

    Paths are relative to it, components separated by `/`; a context manager.

    Attributes:
        path: the folder, with links resolved once, here.
    """

    def __init__(self, path: Path, calls: Syscalls | None = None) -> None:
        self.path = path.resolve()
        self.calls = calls or Syscalls()
        with self._named(""):
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    # Reading.

    def read(
        self, path: str, *, limit: int = MAX_FILE_BYTES, through: bool = False
    ) -> FileData | None:
        """Return a regular file, None if it or its folder is not there.

        Args:
            path: the file.
            limit: bytes that it may have.
            through: the file itself, not its folder, may be a link.

        Raises:
            ConflictError: it is a link, lies behind one, is no regular file or is too large.
            NotPermittedError: it cannot be read.
        """
        try:
            with self.folder(path) as (fd, name), self._named(path):
                file, link = self._open(name, fd, through=through)
                try:
                    info = os.fstat(file)
                    if not stat.S_ISREG(info.st_mode):
                        raise ConflictError(f"{self.path / path} is not a regular file")
                    if info.st_size > limit:
                        raise ConflictError(
                            f"{self.path / path} has {info.st_size} bytes, expected at most {limit}"
                        )
                    with open(file, "rb", closefd=False) as stream:
                        return FileData(
                            stream.read(),
                            info.st_mode & _PERMISSIONS,
                            info.st_uid,
                            info.st_gid,
                            info.st_mtime_ns,
                            link,
                        )
                finally:
                    os.close(file)
        except FileNotFoundError:
            return None

    def leads_to(self, path: str, link: str) -> bytes | None:
        """Return what a link in the place of a file would lead to, None if to no readable file."""
        try:
            target = (self.path / path).parent / link
            return target.read_bytes() if target.stat().st_size <= MAX_FILE_BYTES else None
        except OSError:
            return None

    @staticmethod
    def _open(name: str, fd: int, *, through: bool) -> tuple[int, str | None]:
        try:
            return os.open(name, _READ | os.O_NONBLOCK, dir_fd=fd), None
        except OSError as e:
            if e.errno != errno.ELOOP or not through:
                raise
            link = os.readlink(name, dir_fd=fd)
            return os.open(name, _READ & ~os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd), link

    def names(self, path: str) -> tuple[str, ...]:
        """Return the sorted names in a folder; none if it is not there."""
        try:
            with self.folder(f"{path}/.") as (fd, _), self._named(path):
                return tuple(sorted(os.listdir(fd)))
        except FileNotFoundError:
            return ()

    def has_folder(self, path: str) -> bool:
        """Tell whether a folder is there."""
        try:
            with self.folder(f"{path}/."):
                return True
        except FileNotFoundError:
            return False

    def writable(self, path: str) -> bool:
        """Tell whether names in a file's folder may be changed by this process."""
        try:
            with self.folder(path) as (fd, _):
                return os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True)
        except FileNotFoundError:
            return "/" in path and self.writable(path.rpartition("/")[0])

    def owner(self, path: str) -> tuple[int, int]:
        """Return user and group of the folder that a file lies in."""
        with self.folder(path) as (fd, _), self._named(path):
            info = os.fstat(fd)
            return info.st_uid, info.st_gid

    def free_bytes(self) -> int:
        """Return how many bytes this user may still write here."""
        with self._named(""):
            info = os.fstatvfs(self._fd)
        return info.f_bavail * info.f_frsize

    def identity(self, path: str) -> tuple[int, ...] | None:
        """Return what changes whenever a file is replaced, or a name in a folder; None: not there.

        "" is the folder itself.
        """
        try:
            with self.folder(path) as (fd, name), self._named(path):
                info = os.stat(name or ".", dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns

    def xattrs(self, path: str) -> tuple[tuple[str, bytes], ...]:
        """Return the extended attributes that a new version of a file must keep, ACL included.

        Empty where the file is not there, or where its file system has none.
        """
        try:
            with self.folder(path) as (fd, name), self._named(path):
                file = os.open(name, _READ | os.O_NONBLOCK, dir_fd=fd)
                try:
                    names = [n for n in os.listxattr(file) if n.startswith(_XATTRS)]
                    kept = sorted(n for n in names if n not in _SIGNATURES)
                    return tuple((n, os.getxattr(file, n)) for n in kept)
                except OSError as e:
                    if e.errno in _NO_XATTRS:
                        return ()
                    raise
                finally:
                    os.close(file)
        except FileNotFoundError:
            return ()

    @contextlib.contextmanager
    def folder(self, path: str) -> Iterator[tuple[int, str]]:
        """Yield a descriptor of a path's folder, and its last component.

        Walked anew each time: a cached prefix is a check that has gone stale.
        """
        *folders, name = path.split("/")
        with self._named(path):
            fd = os.dup(self._fd)
        try:
            for depth, component in enumerate(folders, 1):
                try:
                    deeper = os.open(component, _FOLDER, dir_fd=fd)
                except OSError as e:
                    if e.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise self._link(path) from e
                    if e.errno == errno.ENOENT:
                        e.filename = "/".join(folders[:depth])
                        raise
                    raise self._refused(path, e) from e
                os.close(fd)
                fd = deeper
            yield fd, name
        finally:
            os.close(fd)

    # Writing.

    def stage(
        self,
        path: str,
        data: bytes,
        *,
        mode: int,
        owner: tuple[int, int],
        mtime_ns: int | None,
        xattrs: tuple[tuple[str, bytes], ...] = (),
    ) -> None:
        """Write a new file durably; a file of that name that is there already is replaced.

        Its content and attributes are durable then; its name is when the folder is flushed.
        """
        with self.folder(path) as (fd, name), self._named(path):
            with contextlib.suppress(FileNotFoundError):
                os.stat(name, dir_fd=fd, follow_symlinks=False)
                self.calls.unlink(name, dir_fd=fd)
            file = self.calls.open(name, _CREATE, 0o600, dir_fd=fd)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self.calls.write(file, bytes(rest)) :]
                self.calls.attributes(file, mode, *owner)
                for attribute, value in xattrs:
                    try:
                        self.calls.xattr(file, attribute, value)
                    except OSError as e:
                        # A label may be the administrator's to give; the folder's default stays.
                        if attribute.startswith("security.") and e.errno in _NO_XATTRS:
                            continue
                        raise
                if mtime_ns is not None:
                    self.calls.times(file, mtime_ns)
                self.calls.fsync(file)
            finally:
                os.close(file)

    def rename(self, path: str, new_name: str) -> None:
        """Give a file a new name in its folder, replacing what has it."""
        with self.folder(path) as (fd, name), self._named(path):
            self.calls.rename(name, new_name, dir_fd=fd)

    def unlink(self, path: str) -> bool:
        """Remove a file; False if it was not there."""
        try:
            with self.folder(path) as (fd, name), self._named(path):
                os.stat(name, dir_fd=fd, follow_symlinks=False)
                self.calls.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            return False
        return True

    def link(self, path: str, target: str) -> None:
        """Make a symbolic link; what is there already is an error."""
        with self.folder(path) as (fd, name), self._named(path):
            self.calls.symlink(target, name, dir_fd=fd)

    def make_folder(self, path: str, mode: int = 0o755) -> bool:
        """Make a folder; False if it was there."""
        with self.folder(path) as (fd, name), self._named(path):
            try:
                os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    self.calls.mkdir(name, mode, dir_fd=fd)
                    return True
        return False

    def remove_folder(self, path: str) -> None:
        """Remove a folder if it is there and empty."""
        with contextlib.suppress(FileNotFoundError):
            if not self.has_folder(path) or self.names(path):
                return
            with self.folder(path) as (fd, name), self._named(path):
                try:
                    self.calls.rmdir(name, dir_fd=fd)
                except OSError as e:
                    if e.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                        raise

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        with (
            contextlib.suppress(FileNotFoundError),
            self.folder(f"{path}/." if path else ".") as (fd, _),
            self._named(path),
        ):
            self.calls.fsync(fd)

    def replace(
        self, path: str, data: bytes, *, mode: int = 0o644, owner: tuple[int, int] | None = None
    ) -> None:
        """Write a file of fp8ctl's own: beside it, durably, then by rename."""
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.tmp-{name}" if folder else f".tmp-{name}"
        self.stage(temporary, data, mode=mode, owner=owner or self.owner(temporary), mtime_ns=None)
        self.rename(temporary, name)

    def drop_bytecode(self, path: str) -> None:
        """Remove the compiled files of a module, of every tag and optimisation level.

        An unchecked-hash .pyc is never compared with its source, and a timestamp
        one only in whole seconds (PEP 552): either would hide the new source.
        """
        folder, _, name = path.rpartition("/")
        if not name.endswith(".py"):
            return
        cache = f"{folder}/__pycache__" if folder else "__pycache__"
        stem = name.removesuffix(".py") + "."
        for entry in self.names(cache):
            if entry.startswith(stem) and entry.endswith(".pyc") and entry.count(".") <= 3:
                self.unlink(f"{cache}/{entry}")

    def lock_file(self, path: str) -> int:
        """Open a lock file, made if it is not there; the caller closes it."""
        with self.folder(path) as (fd, name), self._named(path):
            try:
                return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                return self.calls.open(name, flags, 0o644, dir_fd=fd)

    def overwrite(self, path: str, fd: int, data: bytes) -> None:
        """Write a lock file's content: the one file written in place, and never linked."""
        with self._named(path):
            self.calls.truncate(fd)
            if data:
                self.calls.write(fd, data)

    def lock(self, path: str, fd: int) -> bool:
        """Lock an open lock file; False where another process holds it.

        Raises:
            NotPermittedError: this file system has no locks.
        """
        try:
            with self._named(path):
                self.calls.lock(fd)
        except NotPermittedError as e:
            if isinstance(e.__cause__, BlockingIOError):
                return False
            e.hint = "without locks two commands could meet: use an environment on a local disk"
            raise
        return True

    def same_file(self, path: str, fd: int) -> bool:
        """Tell whether a name still stands for an open file."""
        try:
            with self.folder(path) as (folder, name), self._named(path):
                a = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        b = os.fstat(fd)
        return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)

    # Errors.

    @contextlib.contextmanager
    def _named(self, path: str) -> Iterator[None]:
        """Turn the errors of the operating system into ours, with the path in them."""
        try:
            yield
        except FileNotFoundError as e:
            e.filename = path  # the system knows only its last component
            raise
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise self._link(path) from e
            raise self._refused(path, e) from e

    def _link(self, path: str) -> ConflictError:
        return ConflictError(
            f"{self.path / path} is a symbolic link, or lies behind one, expected a regular file",
            hint="reinstall the engine with `uv pip install --link-mode copy`, or with pip",
        )

    def _refused(self, path: str, e: OSError) -> NotPermittedError:
        free = ""
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                free = f" ({self.free_bytes()} bytes free)"
        owner = "run it as the owner of this environment, or while the image is built"
        return NotPermittedError(
            f"{self.path / path if path else self.path}: {e.strerror}{free}",
            hint=_HINTS.get(e.errno or 0, owner),
            data={"path": str(self.path / path), "errno": e.errno},
        )
