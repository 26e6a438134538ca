"""Run a function right after a module is imported, or watch how it is, in this process.

The engines start their workers with `multiprocessing` in spawn mode, and a
spawned child imports the parent's main module before it unpickles its target.
So what our entry module registers here at import time is in force in every
worker before the worker's own code is imported.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Protocol

Callback = Callable[[ModuleType], None]


class Watcher(Protocol):
    """Who wants to see how a module is imported; it must not raise."""

    def executing(
        self, module: ModuleType, loader: importlib.abc.Loader
    ) -> AbstractContextManager[None]:
        """Surround the execution of a module by its own loader; also when it is reloaded."""
        ...

    def wrapping(self, module: ModuleType) -> AbstractContextManager[None]:
        """Surround the callbacks that change a module which is executed."""
        ...


_pending: dict[str, list[Callback]] = {}
_watchers: dict[str, Watcher] = {}


class _Loader(importlib.abc.Loader):
    """A module's own loader, with the callbacks behind its execution."""

    def __init__(self, inner: importlib.abc.Loader, name: str) -> None:
        self._inner = inner
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        watcher = _watchers.get(self._name)
        with watcher.executing(module, self._inner) if watcher else contextlib.nullcontext():
            self._inner.exec_module(module)
        _call(_pending.pop(self._name, []), module, self._name)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or "_inner" not in vars(self):
            raise AttributeError(name)  # while it is being copied
        # inspect.getsource and pkgutil ask the loader for get_source, is_package, ...
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a watched module as everybody else would, then wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _pending and fullname not in _watchers:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, fullname)
                return spec
        return None


_finder = _Finder()


def after_import(name: str, callback: Callback) -> None:
    """Call `callback(module)` when module `name` has been imported, or now if it was.

    Several callbacks of one module run in the order of registration.
    """
    module = sys.modules.get(name)
    if module is not None:
        _call([callback], module, name)
        return
    _pending.setdefault(name, []).append(callback)
    _find_first()


def watch(names: Iterable[str], watcher: Watcher) -> None:
    """Show `watcher` every import of these modules from now on."""
    _watchers.update(dict.fromkeys(names, watcher))
    _find_first()


def _find_first() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _call(callbacks: Sequence[Callback], module: ModuleType, name: str) -> None:
    if not callbacks:
        return
    watcher = _watchers.get(name)
    with watcher.wrapping(module) if watcher else contextlib.nullcontext():
        for callback in callbacks:
            callback(module)
