"""Callbacks behind an import: in this process and, through spawn, in a worker."""

from __future__ import annotations

import copy
import importlib
import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import os
import pkgutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.engines.hooks import imports
from fp8ctl.engines.hooks.imports import after_import

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

SOURCE = '''\
"""A module of an engine."""

ready = True


def answer():
    """Tell."""
    return 42
'''


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `fp8_engine` with a module `core`, and an import system to be put back."""
    folder = tmp_path / "fp8_engine"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(SOURCE)
    (folder / "user.py").write_text("from fp8_engine.core import answer\n")
    (folder / "data.txt").write_text("data")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not imports._finder])
    monkeypatch.setattr(imports, "_pending", {})
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "fp8_engine"]:
        del sys.modules[name]


def load(name: str = "fp8_engine.core") -> Any:
    return importlib.import_module(name)


def test_a_callback_gets_the_module_when_its_body_has_run(engine: Path) -> None:
    seen: list[bool] = []
    after_import("fp8_engine.core", lambda module: seen.append(module.ready))
    assert seen == []
    load("fp8_engine")
    assert seen == [], "called for the package"
    load()
    assert seen == [True]
    load()
    assert seen == [True], "called again for a module that is there"


def test_callbacks_run_in_the_order_of_registration(engine: Path) -> None:
    seen: list[int] = []

    def note(number: int) -> Callable[[object], None]:
        return lambda _module: seen.append(number)

    for number in range(3):
        after_import("fp8_engine.core", note(number))
    load()
    assert seen == [0, 1, 2]


def test_a_module_that_is_there_is_handed_over_at_once(engine: Path) -> None:
    module = load()
    seen: list[ModuleType] = []
    after_import("fp8_engine.core", seen.append)
    assert seen == [module]


def test_another_module_that_imports_the_name_gets_the_wrapped_one(engine: Path) -> None:
    def wrap(module: Any) -> None:
        module.answer = lambda: 43

    after_import("fp8_engine.core", wrap)
    assert load("fp8_engine.user").answer() == 43


def test_tools_still_find_the_source_and_the_data(engine: Path) -> None:
    after_import("fp8_engine.core", lambda _module: None)
    after_import("fp8_engine", lambda _module: None)
    core, package = load(), load("fp8_engine")
    # Triton compiles kernels from what inspect finds.
    assert inspect.getsource(core.answer) == SOURCE[SOURCE.index("def answer") :]
    assert core.__spec__.loader.get_source("fp8_engine.core") == SOURCE
    assert core.__file__ == str(engine / "core.py")
    assert not core.__spec__.loader.is_package("fp8_engine.core")
    assert (importlib.resources.files("fp8_engine") / "data.txt").read_text() == "data"
    assert pkgutil.get_data("fp8_engine", "data.txt") == b"data"
    names = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert names == {"core", "user"}


def test_nothing_registered_means_nothing_found(engine: Path) -> None:
    assert imports._finder.find_spec("fp8_engine.core", [str(engine)]) is None
    assert imports._finder not in sys.meta_path
    after_import("fp8_engine.core", lambda _module: None)
    assert imports._finder.find_spec("fp8_engine.user", [str(engine)]) is None
    # Positive control: the one that is watched is found.
    load("fp8_engine")
    assert imports._finder.find_spec("fp8_engine.core", [str(engine)]) is not None


def test_to_look_for_a_module_is_not_to_import_it(engine: Path) -> None:
    seen: list[object] = []
    after_import("fp8_engine.core", seen.append)
    assert importlib.util.find_spec("fp8_engine.core") is not None
    assert seen == []
    load()
    assert len(seen) == 1


def test_a_module_that_is_not_there_is_missing_as_ever(engine: Path) -> None:
    after_import("fp8_engine.absent", lambda _module: None)
    with pytest.raises(ModuleNotFoundError, match=r"fp8_engine\.absent"):
        load("fp8_engine.absent")


def test_a_module_that_fails_is_hooked_when_it_is_tried_again(engine: Path) -> None:
    (engine / "core.py").write_text("raise ImportError('not yet')\n")
    seen: list[object] = []
    after_import("fp8_engine.core", seen.append)
    with pytest.raises(ImportError, match="not yet"):
        load()
    assert seen == []
    (engine / "core.py").write_text(SOURCE + "# longer than before\n")
    importlib.invalidate_caches()
    load()
    assert len(seen) == 1


def test_a_callback_that_fails_fails_the_import(engine: Path) -> None:
    # A worker without its hooks would serve, and nobody would know.
    def break_off(_module: ModuleType) -> None:
        raise AttributeError("the engine has no such class")

    after_import("fp8_engine.core", break_off)
    with pytest.raises(AttributeError, match="no such class"):
        load()
    assert "fp8_engine.core" not in sys.modules


def test_two_threads_that_import_at_once_cause_one_call(engine: Path) -> None:
    (engine / "core.py").write_text("import time\ntime.sleep(0.05)\n" + SOURCE)
    seen: list[object] = []
    after_import("fp8_engine.core", seen.append)
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1


_ENTRY = """\
import multiprocessing
import sys

from fp8ctl.engines.hooks.imports import after_import


def install():
    def wrap(module):
        inner = module.work

        def work(text):
            inner("hooked " + text)

        work.__module__, work.__qualname__ = inner.__module__, inner.__qualname__
        module.work = work

    after_import("fp8_app.worker", wrap)


if {at_top}:
    install()

if __name__ == "__main__":
    install()
    from fp8_app import worker

    child = multiprocessing.get_context("spawn").Process(target=worker.work, args=("child",))
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


@pytest.mark.parametrize(("at_top", "said"), [(True, "hooked child"), (False, "child")])
def test_a_spawned_worker_has_what_the_entry_module_registers_at_its_top(
    tmp_path: Path, at_top: bool, said: str
) -> None:
    """The control, with the registration under `__main__` only, shows that it is the re-import."""
    package = tmp_path / "fp8_app"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "entry.py").write_text(_ENTRY.format(at_top=at_top))
    (package / "worker.py").write_text("def work(text):\n    print(text, flush=True)\n")
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, "-m", "fp8_app.entry"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *inherited])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_the_loader_of_a_watched_module_can_be_copied() -> None:
    source = importlib.machinery.SourceFileLoader("watched", "watched.py")
    copied = copy.copy(imports._Loader(source, "watched"))
    assert copied.path == "watched.py"
