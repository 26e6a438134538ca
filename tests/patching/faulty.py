"""Calls that go wrong at a chosen step, and folders that are put back as they were."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

from fp8ctl.patching import store, transaction
from fp8ctl.patching.fsops import Root, Syscalls

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Faulty(Syscalls):
    """Counts the calls that change something, and does `fault` instead of the n-th."""

    def __init__(self, at: int = -1, fault: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self.at = at
        self.fault = fault
        self.names: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in {n for n in vars(Syscalls) if not n.startswith("_")}:
            return value

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.names.append(name)
            if self._due():
                self.fault()
            # No test here cuts the power: only death is modelled, so no waiting for a disk.
            return None if name == "fsync" else value(*args, **kwargs)

        return counted

    def _due(self) -> bool:
        return self.count == self.at


class Failing(Faulty):
    """Fails with an error of the system from the n-th call on: once, or for good.

    Args:
        at: the call, counted from 1.
        code: the error.
        spared: kinds of calls that go on working where it is for good: a full disk can be flushed.
        for_good: whether it stays like that.
    """

    def __init__(
        self, at: int, code: int, *, for_good: bool = False, spared: tuple[str, ...] = ()
    ) -> None:
        super().__init__(at, self._fail)
        self.code, self.for_good, self.spared = code, for_good, spared

    def _due(self) -> bool:
        later = self.for_good and self.count > self.at and self.names[-1] not in self.spared
        return self.count == self.at or later

    def _fail(self) -> None:
        raise OSError(self.code, os.strerror(self.code))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step: int, body: Callable[[Syscalls], object]) -> bool:
    """Run `body` in a child that dies at its n-th change; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            body(Faulty(step, die))
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def restore(site: Path, tree: dict[str, tuple[bytes, int]]) -> None:
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir()
    for name, (data, mode) in tree.items():
        path = site / name
        if mode & 0o040000:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data)
            path.chmod(mode & 0o7777)


def recover(site: Path, calls: Syscalls) -> None:
    with Root(site, calls) as root, transaction.begin(root):
        pass


def next_command(site: Path, calls: Syscalls | None = None) -> None:
    """Do what `patch` and `revert` do first, whatever they were asked for."""
    with Root(site, calls or Faulty()) as root:
        if store.needs_recovery(root):
            with transaction.begin(root):
                pass


def unlocked(tree: dict[str, tuple[bytes, int]]) -> dict[str, tuple[bytes, int]]:
    """Leave the lock out of a tree: it comes back by itself, and its content is for people."""
    return {path: entry for path, entry in tree.items() if path != store.LOCK}


def without_store(tree: dict[str, tuple[bytes, int]]) -> dict[str, tuple[bytes, int]]:
    """Leave fp8ctl's own folder out of a tree."""
    return {k: v for k, v in tree.items() if not k.startswith(".fp8ctl")}
