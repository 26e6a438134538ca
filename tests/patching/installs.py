"""Real installations of the small engine: a wheel, virtual environments, pip and uv."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.patching.conftest import PRISTINE, write_engine

if TYPE_CHECKING:
    from collections.abc import Mapping

_FICLONE = 0x40049409

DATA = "sglang/configs/table.json"
RELEASED = {**PRISTINE, DATA: b'{"a": 1}\n'}


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
    """A virtual environment without pip, and the installers that work on it from outside.

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

    def make(self) -> Venv:
        argv = [sys.executable, "-m", "venv", "--without-pip", str(self.folder)]
        subprocess.run(argv, check=True, timeout=60)
        return self

    def pip(self, *words: str) -> None:
        """Run pip on it, with nothing but the wheels of the test to install from."""
        argv = [sys.executable, "-m", "pip", "--python", str(self.python), *words]
        _run(argv, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)})

    def uv_pip(self, *words: str) -> None:
        """Run uv on it, with a cache of the test's own."""
        assert self.uv is not None
        argv = [str(self.uv), "pip", words[0], "--python", str(self.python), *words[1:]]
        settings = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(self.wheels), "UV_OFFLINE": "1"}
        _run(argv, settings | {"UV_CACHE_DIR": str(self.cache), "UV_NO_CONFIG": "1"})


def _run(argv: list[str], settings: dict[str, str]) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "PYTHON"))}
    quiet = {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        argv,
        env={**kept, **quiet, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}"


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
