"""A small installed engine and a series of patches for it, made anew for each test."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fp8ctl import hardware, process, registry
from fp8ctl.patching import catalog, diff, transaction
from fp8ctl.patching.fsops import Root, Syscalls
from fp8ctl.patching.names import RelPath
from fp8ctl.patching.plan import PatchPlan, plan_patch, plan_revert
from fp8ctl.patching.status import SeriesStatus, judge, take
from fp8ctl.render import Reporter
from tests.conftest import CACHE

REPOSITORY = Path(__file__).parents[2]

A = RelPath("sglang/srt/a.py")
B = RelPath("sglang/srt/b.py")
C = RelPath("sglang/c.py")
NEW = RelPath("sglang/added/d.py")

PRISTINE = {
    A: b"".join(b"a%d = %d\n" % (i, i) for i in range(60)),
    B: b"".join(b"b%d = %d\r\n" % (i, i) for i in range(30)),
    C: b"c = 1\nd = 2",
    RelPath("sglang/__init__.py"): b"",
    RelPath("sglang/srt/__init__.py"): b"",
    RelPath("sglang/untouched.py"): b"x = 1\n",
}


def with_line(data: bytes, after: bytes, line: bytes) -> bytes:
    """Return `data` with a line put in behind another."""
    assert data.count(after) == 1
    return data.replace(after, after + line)


# What each patch does to the file it is given, by path; in series order.
_FIRST_A = with_line(PRISTINE[A], b"a5 = 5\n", b"first = True\nfirst_too = True\n")
PATCHES: dict[str, dict[RelPath, tuple[bytes | None, bytes]]] = {
    "first": {A: (PRISTINE[A], _FIRST_A)},
    "second": {
        A: (PRISTINE[A], with_line(PRISTINE[A], b"a50 = 50\n", b"second = True\n")),
        B: (PRISTINE[B], with_line(PRISTINE[B], b"b9 = 9\r\n", b"second = True\r\n")),
    },
    "third": {
        C: (PRISTINE[C], b"c = 1\nd = 3"),
        NEW: (None, b"made = 'by fp8ctl'\n"),
    },
    # Needs `first`: it changes one of its lines.
    "fourth": {
        A: (_FIRST_A, _FIRST_A.replace(b"first_too = True", b"first_too = 'fourth'")),
    },
    "rival": {B: (PRISTINE[B], with_line(PRISTINE[B], b"b20 = 20\r\n", b"rival = True\r\n"))},
    "gpu-only": {
        A: (PRISTINE[A], with_line(PRISTINE[A], b"a30 = 30\n", b"gpu = True\n")),
    },
}
_EXTRA = {
    "fourth": 'requires = ["first"]\n',
    "rival": 'conflicts = ["second"]\ndefault = false\n',
    "gpu-only": 'devices = ["cuda"]\n',
}
DEFAULTS = ("first", "second", "third", "fourth")


def refresh_tool() -> Any:
    """Import tools/refresh_series.py, which is no package."""
    spec = importlib.util.spec_from_file_location(
        "refresh_series", REPOSITORY / "tools" / "refresh_series.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_engine(site: Path, files: dict[RelPath, bytes], version: str = "0.4.8") -> None:
    """Lay an installed SGLang into a folder, with a RECORD that agrees."""
    info = site / f"sglang-{version}.dist-info"
    info.mkdir(parents=True)
    rows = []
    for path, data in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(data)}")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    rows += [f"{info.name}/{n},," for n in ("METADATA", "INSTALLER", "WHEEL", "RECORD")]
    (info / "RECORD").write_text("\n".join(rows) + "\n")


def write_series(root: Path) -> Path:
    """Write the series of this file, without what the tool generates."""
    folder = root / "sglang-0.4.8"
    folder.mkdir(parents=True)
    text = (
        'schema = 1\nbackend = "sglang"\ndistribution = "sglang"\n'
        'version = "==0.4.8"\npackage = "sglang"\n'
    )
    for number, (patch_id, changes) in enumerate(PATCHES.items(), 1):
        name = f"{number:04}-{patch_id}.patch"
        rendered = b"".join(diff.render(p, old, new) for p, (old, new) in changes.items())
        (folder / name).write_bytes(rendered)
        text += (
            f'\n[[patch]]\nid = "{patch_id}"\ntitle = "Title of {patch_id}"\n'
            f'why = "because"\ndiff = "{name}"\n' + _EXTRA.get(patch_id, "")
        )
    (folder / "series.toml").write_text(text)
    return folder


class Quick(Syscalls):
    """Does not wait for the disk: only a power cut would tell the difference."""

    def fsync(self, fd: int) -> None:
        pass


@dataclass
class Lab:
    """An installed engine, a series for it, and the two commands without a command line."""

    site: Path
    patches: Path
    series: catalog.Series
    warnings: list[str] = field(default_factory=list)

    def status(self) -> SeriesStatus:
        with Root(self.site) as root:
            return judge(self.series, take(root, self.series))

    def plan_patch(self, *asked: str, **options: Any) -> PatchPlan:
        with Root(self.site) as root:
            return plan_patch(self.series, take(root, self.series), asked=asked or None, **options)

    def plan_revert(self, *asked: str) -> PatchPlan:
        with Root(self.site) as root:
            return plan_revert(self.series, take(root, self.series), asked=asked or None)

    def patch(self, *asked: str, calls: Syscalls | None = None, **options: Any) -> PatchPlan:
        warn = self.warnings.append
        with Root(self.site, calls or Quick()) as root, transaction.begin(root, warn):
            plan = plan_patch(self.series, take(root, self.series), asked=asked or None, **options)
            transaction.run(root, [plan], python_version=(3, 11), warn=warn)
            return plan

    def revert(self, *asked: str, calls: Syscalls | None = None) -> PatchPlan:
        warn = self.warnings.append
        with Root(self.site, calls or Quick()) as root, transaction.begin(root, warn):
            plan = plan_revert(self.series, take(root, self.series), asked=asked or None)
            transaction.run(root, [plan], python_version=(3, 11), warn=warn)
            return plan

    def read(self, path: str) -> bytes:
        return (self.site / path).read_bytes()

    def tree(self) -> dict[str, tuple[bytes, int]]:
        """Return every file with its permission bits; fp8ctl's own folder included."""
        return tree(self.site)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and permission bits of every file below a folder; folders as well."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else b"", p.stat().st_mode)
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def lab_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    write_engine(folder / "site", PRISTINE)
    series = write_series(folder / "patches")
    tool = refresh_tool()
    for name, text in tool.generate(series, folder / "site").items():
        (series / name).write_text(text)
    return folder


@pytest.fixture
def lab(lab_template: Path, tmp_path: Path) -> Lab:
    site, patches = tmp_path / "site", tmp_path / "patches"
    shutil.copytree(lab_template / "site", site)
    shutil.copytree(lab_template / "patches", patches)
    return Lab(site, patches, catalog.load("sglang", "0.4.8", root=patches))


@pytest.fixture
def bundled(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Make the small series the one that fp8ctl carries, on a host without a GPU."""
    monkeypatch.setattr(catalog, "ROOT", lab.patches)
    monkeypatch.setattr(hardware, "detect", lambda: hardware.Hardware())
    monkeypatch.setenv("FP8CTL_HOME", str(tmp_path / "home"))
    return lab


def live_server(site: Path) -> registry.Record:
    """Register this process as a server of fp8ctl that runs on an environment."""
    identity = process.identify(os.getpid())
    assert identity is not None
    registry.claim("sglang-30000")
    record = registry.Record(
        name="sglang-30000",
        identity=identity,
        engine="sglang 0.4.8",
        url="http://127.0.0.1:30000",
        model="m",
        source="s",
        mode="block",
        await_push=False,
        python="python",
        site_packages=str(site),
        since=time.time(),
    )
    registry.write(record)
    return record


@pytest.fixture(scope="session")
def uv() -> Path:
    """Return the program uv: the user's, else one that pip fetches once."""
    found = shutil.which("uv")
    if found:
        return Path(found)
    folder = CACHE / "tools"
    program = folder / "uv" / "bin" / "uv"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        argv += ["--upgrade", "--target", str(folder / "uv"), "uv"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode or not program.exists():
            pytest.skip("pip could not fetch uv")
    return program


@pytest.fixture
def reporter() -> Reporter:
    return Reporter(json_mode=True, out=io.StringIO(), err=io.StringIO())


@pytest.fixture(scope="session")
def refresh() -> Any:
    return refresh_tool()
