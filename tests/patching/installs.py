"""Real installations of the small engine: a wheel, virtual environments, pip and uv."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.patching.conftest import PRISTINE, write_engine

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FICLONE = 0x40049409

DATA = "sglang/configs/table.json"
RELEASED: dict[str, bytes] = {**dict(PRISTINE.items()), DATA: b'{"a": 1}\n'}


def write_wheel(folder: Path, version: str, files: Mapping[str, bytes] | None = None) -> Path:
    """Build a wheel of the small engine, as an index would serve it."""
    content = folder / f"content-{version}"
    write_engine(content, dict(files or RELEASED), version)  # type: ignore[arg-type]
    info = content / f"sglang-{version}.dist-info"
    # The installer's own file, which no wheel brings.
    (info / "INSTALLER").unlink()
    record = info / "RECORD"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if "INSTALLER" not in line))
    wheel = folder / f"sglang-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(p for p in content.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(content))
    shutil.rmtree(content)
    return wheel


@dataclass(frozen=True)
class Venv:
    """A virtual environment, and the installers that work on it.

    Attributes:
        folder: where it is.
        wheels: folder that takes the place of an index.
        uv: the program, None where there is none.
        cache: uv's.
    """

    folder: Path
    wheels: Path
    uv: Path | None = None
    cache: Path | None = None

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        [found] = self.folder.glob("lib/python3*/site-packages")
        return found

    def make(self, *, pip: bool = False) -> Venv:
        """Make it; with pip inside, as users have it, by links to the pip that runs the tests."""
        argv = [sys.executable, "-m", "venv", "--without-pip", str(self.folder)]
        subprocess.run(argv, check=True, timeout=60)
        if pip:
            [found] = importlib.metadata.distributions(name="pip")
            for name in ("pip", f"pip-{found.version}.dist-info"):
                (self.site / name).symlink_to(str(found.locate_file(name)))
        return self

    @property
    def settings(self) -> dict[str, str]:
        """Variables that give pip and uv the wheels of the test, and nothing else."""
        found = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        found |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        found |= {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(self.wheels), "UV_OFFLINE": "1"}
        return found | {"UV_CACHE_DIR": str(self.cache), "UV_NO_CONFIG": "1"}

    def pip(self, *words: str) -> None:
        """Run pip on it, with nothing but the wheels of the test to install from."""
        argv = [sys.executable, "-m", "pip", "--python", str(self.python), *words]
        _run(argv, self.settings)

    def uv_pip(self, *words: str) -> None:
        """Run uv on it, with a cache of the test's own."""
        assert self.uv is not None
        argv = [str(self.uv), "pip", words[0], "--python", str(self.python), *words[1:]]
        _run(argv, self.settings)


def _run(argv: list[str], settings: dict[str, str]) -> None:
    done = subprocess.run(
        argv,
        env={**plain_environment(), **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}"


def plain_environment() -> dict[str, str]:
    """Return the caller's environment without what changes pip, uv or Python."""
    foreign = ("PIP_", "UV_", "PYTHON", "FP8CTL_", "VIRTUAL_ENV", "CONDA_")
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign)}


def photograph(*folders: Path) -> dict[str, tuple[object, ...]]:
    """Return all that may not change of other environments and caches; link counts aside."""
    seen: dict[str, tuple[object, ...]] = {}
    for path in sorted(p for folder in folders for p in (folder, *folder.rglob("*"))):
        info = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        owner = (info.st_uid, info.st_gid)
        seen[str(path)] = (content, info.st_mtime_ns, info.st_ino, info.st_mode, owner)
    return seen


def can_reflink(folder: Path) -> bool:
    """Tell whether two files of this file system can share their blocks."""
    source, target = folder / "reflink-from", folder / "reflink-to"
    source.write_bytes(b"x" * 4096)
    try:
        with source.open("rb") as a, target.open("wb") as b:
            fcntl.ioctl(b.fileno(), _FICLONE, a.fileno())
    except OSError:
        return False
    finally:
        source.unlink()
        target.unlink(missing_ok=True)
    return True
