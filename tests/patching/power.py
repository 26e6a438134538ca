"""What a disk may hold after a power cut: a model, and a recorder that feeds it.

`Recorder` stands in the place of `Syscalls`, does what it is told to a real folder (but for
fsync, which nobody waits for here) and writes down every call. `Disk` replays such a list up
to a cut and yields the states that the disk may then be in.

What the model allows is more than any one file system does (compare ALICE, OSDI 2014, and
CrashMonkey, OSDI 2018), so what passes here does not lean on the ordering of ext4 or XFS:

- A folder holds the names that it had at its last fsync, plus any subset of the changes of
  names since: each may be there or not, whatever became of earlier and later ones, in this
  folder and in others. Only a rename within one folder is one change: never half of it.
- The fsync of a file makes its content and permission bits durable, not its name. The fsync
  of a folder makes its names durable, not its own name in the folder above.
- The content of a file without fsync is any of: as at the last fsync, empty, a first half,
  as many zeros, all of it; its permission bits are those before or those after. So a rename
  that is kept while the data behind it is lost is among the states.
- What was there at the start is durable. A fsync that returns has done its work: a disk that
  lies is not in the model, nor is one that rots.

The lock file is written in place and for people only: its content is taken as it is.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fp8ctl.patching.fsops import Syscalls

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Event = tuple[Any, ...]
State = frozenset[tuple[str, bytes | None, int]]
"""Path, content (None: a folder) and permission bits of everything below site-packages."""


class Died(BaseException):
    """The process is dead: nothing that it would still do reaches the disk."""


class Recorder(Syscalls):
    """Does every call but fsync, and writes it down.

    Args:
        site: the folder.
        dies_at: the call before which the process dies, counted from 1.
        fails_at: the call that fails instead, with EIO.
        forgets: "files" or "folders": no fsync of these is written down.
    """

    def __init__(
        self, site: Path, *, dies_at: int = 0, fails_at: int = 0, forgets: str = ""
    ) -> None:
        self.site = os.path.realpath(site)
        self.log: list[Event] = []
        self.count = 0
        self.dies_at, self.fails_at, self.forgets = dies_at, fails_at, forgets
        self.failed_after = -1

    def revive(self) -> None:
        """Go on as the process of the next command."""
        self.dies_at = self.fails_at = 0

    def _path(self, fd: int, name: str = "") -> str:
        folder = os.readlink(f"/proc/self/fd/{fd}")
        path = f"{folder}/{name}" if name else folder
        return path.removeprefix(self.site).lstrip("/")

    def _step(self) -> None:
        self.count += 1
        if self.dies_at and self.count >= self.dies_at:
            raise Died
        if self.count == self.fails_at:
            self.failed_after = len(self.log)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _done(self, *event: Any) -> None:
        self.log.append(event)

    def open(self, name: str, flags: int, mode: int, *, dir_fd: int) -> int:
        self._step()
        file = super().open(name, flags, mode, dir_fd=dir_fd)
        self._done("create", self._path(dir_fd, name), mode)
        return file

    def write(self, fd: int, data: bytes) -> int:
        self._step()
        self._done("write", self._path(fd), data)
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._step()
        if self.forgets != ("files" if stat.S_ISREG(os.fstat(fd).st_mode) else "folders"):
            self.log.append(("sync", self._path(fd)))

    def rename(self, old: str, new: str, *, dir_fd: int) -> None:
        self._step()
        super().rename(old, new, dir_fd=dir_fd)
        self._done("rename", self._path(dir_fd, old), self._path(dir_fd, new))

    def unlink(self, name: str, *, dir_fd: int) -> None:
        self._step()
        super().unlink(name, dir_fd=dir_fd)
        self._done("remove", self._path(dir_fd, name))

    def mkdir(self, name: str, mode: int, *, dir_fd: int) -> None:
        self._step()
        super().mkdir(name, mode, dir_fd=dir_fd)
        made = os.stat(name, dir_fd=dir_fd).st_mode & 0o7777
        self._done("mkdir", self._path(dir_fd, name), made)

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        self._step()
        super().rmdir(name, dir_fd=dir_fd)
        self._done("remove", self._path(dir_fd, name))

    def attributes(self, fd: int, mode: int, uid: int, gid: int) -> None:
        self._step()
        super().attributes(fd, mode, uid, gid)
        self._done("mode", self._path(fd), mode)

    def times(self, fd: int, mtime_ns: int) -> None:
        self._step()
        super().times(fd, mtime_ns)

    def truncate(self, fd: int) -> None:
        self._step()
        super().truncate(fd)
        self._done("truncate", self._path(fd))


@dataclass
class _File:
    data: bytes
    mode: int
    durable: tuple[bytes, int] | None = None  # None while it is as durable as it is

    def touch(self) -> None:
        if self.durable is None:
            self.durable = (self.data, self.mode)

    def variants(self) -> list[tuple[bytes, int]]:
        """Return what may be read of it, the least first."""
        if self.durable is None:
            return [(self.data, self.mode)]
        before, mode = self.durable
        half = self.data[: len(self.data) // 2]
        found = [(before, mode), (b"", mode), (half, self.mode), (bytes(len(self.data)), self.mode)]
        return list(dict.fromkeys([*found, (self.data, mode), (self.data, self.mode)]))


@dataclass
class _Folder:
    mode: int
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[dict[str, _File | _Folder | None]] = field(default_factory=list)

    def now(self) -> dict[str, _File | _Folder]:
        return self.after([True] * len(self.pending))

    def after(self, kept: Sequence[bool]) -> dict[str, _File | _Folder]:
        names: dict[str, _File | _Folder | None] = dict(self.durable)
        for change, keep in zip(self.pending, kept, strict=True):
            if keep:
                names.update(change)
        return {name: node for name, node in names.items() if node is not None}


class Disk:
    """A disk that starts as `tree` and is told of one event after another."""

    def __init__(self, tree: Mapping[str, tuple[bytes | None, int]]) -> None:
        self.top = _Folder(0o755)
        for path, (data, mode) in sorted(tree.items()):
            folder, name = self._parent(path)
            folder.durable[name] = _Folder(mode) if data is None else _File(data, mode)

    def _parent(self, path: str) -> tuple[_Folder, str]:
        *folders, name = path.split("/")
        at = self.top
        for one in folders:
            below = at.now()[one]
            assert isinstance(below, _Folder)
            at = below
        return at, name

    def _node(self, path: str) -> _File | _Folder | None:
        if not path:
            return self.top
        if path.endswith(" (deleted)"):
            return None
        folder, name = self._parent(path)
        return folder.now()[name]

    def tell(self, event: Event) -> None:
        """Let an event happen: in memory, not yet on the disk."""
        kind, path, *rest = event
        if kind in ("create", "mkdir", "remove", "rename"):
            folder, name = self._parent(path)
            if kind == "create":
                folder.pending.append({name: _File(b"", rest[0])})
            elif kind == "mkdir":
                folder.pending.append({name: _Folder(rest[0])})
            elif kind == "remove":
                folder.pending.append({name: None})
            else:
                new = rest[0].rpartition("/")[2]
                folder.pending.append({new: folder.now()[name], name: None})
            return
        node = self._node(path)
        if isinstance(node, _Folder):
            assert kind == "sync"
            node.durable, node.pending = node.now(), []
        elif node is not None and kind == "sync":
            node.durable = None
        elif node is not None:
            if not path.endswith("/lock"):
                node.touch()
            if kind == "write":
                node.data += rest[0]
            elif kind == "truncate":
                node.data = b""
            else:
                node.mode = rest[0]

    def states(self, limit: int, chance: random.Random) -> Iterator[State]:
        """Yield the states that a cut may leave now: all, or the extremes and a sample."""
        folders = [f for f in self._folders(self.top) if f.pending]
        files = [f for f in self._files() if f.durable is not None]
        sizes = [2] * sum(len(f.pending) for f in folders) + [len(f.variants()) for f in files]
        total = 1
        for size in sizes:
            total *= size
        if total <= limit:
            choices: Iterator[tuple[int, ...]] = itertools.product(*map(range, sizes))
        else:
            choices = self._sample(sizes, limit, chance)
        for choice in choices:
            yield self._state(folders, files, choice)

    @staticmethod
    def _sample(
        sizes: Sequence[int], limit: int, chance: random.Random
    ) -> Iterator[tuple[int, ...]]:
        most, least = tuple(s - 1 for s in sizes), (0,) * len(sizes)
        yield from (most, least)
        if limit >= 2 * len(sizes):
            for place in range(len(sizes)):
                yield (*most[:place], *least[place:])
                yield (*least[:place], *most[place:])
                for base in (most, least):
                    for value in range(sizes[place]):
                        yield (*base[:place], value, *base[place + 1 :])
        for _ in range(limit):
            # Losing almost nothing and losing almost all are rare among fair coins.
            keep = chance.choice((0.15, 0.5, 0.85))
            yield tuple(
                chance.randrange(s) if s > 2 else int(chance.random() < keep) for s in sizes
            )

    def _folders(self, folder: _Folder) -> Iterator[_Folder]:
        """Yield every folder that may be reached in any state."""
        yield folder
        nodes = [*folder.durable.values(), *(n for c in folder.pending for n in c.values())]
        for node in {id(n): n for n in nodes if isinstance(n, _Folder)}.values():
            yield from self._folders(node)

    def _files(self) -> list[_File]:
        found: dict[int, _File] = {}
        for folder in self._folders(self.top):
            nodes = [*folder.durable.values(), *(n for c in folder.pending for n in c.values())]
            found.update({id(n): n for n in nodes if isinstance(n, _File)})
        return list(found.values())

    def _state(
        self, folders: Sequence[_Folder], files: Sequence[_File], choice: Sequence[int]
    ) -> State:
        kept: dict[int, list[bool]] = {}
        at = 0
        for folder in folders:
            kept[id(folder)] = [bool(c) for c in choice[at : at + len(folder.pending)]]
            at += len(folder.pending)
        read = {id(f): f.variants()[c] for f, c in zip(files, choice[at:], strict=True)}
        found: set[tuple[str, bytes | None, int]] = set()

        def walk(folder: _Folder, prefix: str) -> None:
            for name, node in folder.after(kept.get(id(folder), [])).items():
                if isinstance(node, _Folder):
                    found.add((prefix + name, None, node.mode))
                    walk(node, f"{prefix}{name}/")
                else:
                    data, mode = read.get(id(node), (node.data, node.mode))
                    found.add((prefix + name, data, mode))

        walk(self.top, "")
        return frozenset(found)


def states_after(
    tree: Mapping[str, tuple[bytes | None, int]],
    log: Sequence[Event],
    *,
    first: int = 0,
    limit: int,
    chance: random.Random,
) -> Iterator[tuple[int, State]]:
    """Yield each cut from event `first` on, with the states that it may leave."""
    disk = Disk(tree)
    for cut in range(len(log) + 1):
        if cut >= first:
            for state in disk.states(limit, chance):
                yield cut, state
        if cut < len(log):
            disk.tell(log[cut])
