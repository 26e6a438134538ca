"""What a wheel, an sdist and an editable install hold, and that none leaks a top-level name.

Everything is built from a copy: setuptools leaves its traces in the folder that it builds in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from fp8ctl import __version__

ROOT = Path(__file__).resolve().parent.parent
LEAKS = ("kernels", "patches", "locks", "hooks")
_SITE = sysconfig.get_path("purelib")

# Where each of these is found, from a folder that holds nothing of ours.
_FIND = f"""
import importlib.util as u
print([name for name in {LEAKS!r} if u.find_spec(name) is not None])
for name in ("fp8ctl", "fp8ctl.kernels.reference", "fp8ctl.kernels.launch"):
    print(u.find_spec(name).origin)
"""


def project(folder: Path) -> Path:
    """Copy what belongs to the distribution, links as links."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    for name in ("fp8ctl", "kernels", "patches", "docs", "tools"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


def run(*argv: str, cwd: Path | str = "/", path: str | None = None) -> str:
    """Run a command with no PYTHONPATH but `path`, and return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_wheel(source: Path, out: Path) -> Path:
    # torch, of the extra that tests need, requires setuptools: no download.
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"),
        *("--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."),
        cwd=source,
    )
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("source") / "fp8ctl")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = project(tmp_path_factory.mktemp("sdist") / "fp8ctl")
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    (source / "dist").mkdir()
    run(sys.executable, "-c", build, cwd=source)
    [archive] = (source / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the wheel is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("target")
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", "--target", str(folder), str(wheel)),
    )
    return folder


def content(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            info.filename: archive.read(info)
            for info in archive.infolist()
            if ".dist-info/" not in info.filename
        }


def expected() -> dict[str, bytes]:
    """Return what must be in the wheel: every file of the package, read through the links."""
    found = {}
    for top, inside in (("fp8ctl", "fp8ctl"), ("kernels", "fp8ctl/kernels")):
        for path in (ROOT / top).rglob("*"):
            name = path.relative_to(ROOT / top).as_posix()
            linked = top == "fp8ctl" and name.split("/")[0] in {"kernels", "patches"}
            if path.is_file() and not linked and "__pycache__" not in path.parts:
                found[f"{inside}/{name}"] = path.read_bytes()
    for path in (ROOT / "patches").glob("*/*"):
        found[f"fp8ctl/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    return found


# --- the tree -------------------------------------------------------------------------------------


def test_kernels_and_patches_are_relative_links_to_the_top() -> None:
    for name in ("kernels", "patches"):
        assert os.readlink(ROOT / "fp8ctl" / name) == f"../{name}"


def test_kernels_is_no_package_of_its_own() -> None:
    # Hugging Face publishes one of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "patches" / "__init__.py").exists()


def test_every_folder_with_modules_is_in_the_list_of_packages() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "fp8ctl").rglob("*.py")}
    names = {folder.replace("/", ".") for folder in folders} | {"fp8ctl.kernels"}
    assert set(settings["tool"]["setuptools"]["packages"]) == names


def test_the_licence_is_apache_2_0_unchanged() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_notice_names_whose_lines_the_patches_hold() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for folder in (ROOT / "patches").iterdir():
        assert f"patches/{folder.name}/*.patch" in notice
    assert "Copyright contributors to the vLLM project" in notice
    assert "Copyright 2023-2024 SGLang Team" in notice


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^\]]+)\]", changelog, re.M)[0] == __version__


# --- wheel and sdist ------------------------------------------------------------------------------


def test_the_wheel_holds_every_file_of_the_package_byte_for_byte(wheel: Path) -> None:
    found, wanted = content(wheel), expected()
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_the_list_that_the_wheel_is_compared_with_has_what_matters() -> None:
    names = expected()
    for name in (
        "fp8ctl/py.typed",
        "fp8ctl/check/page.html",
        "fp8ctl/kernels/reference.py",
        "fp8ctl/locks/sglang-0.4.8-cpu.txt",
        "fp8ctl/patches/sglang-0.4.8/series.toml",
        "fp8ctl/patches/sglang-0.4.8/images.toml",
        "fp8ctl/patches/sglang-0.4.8/0001-cpu-fp8.patch",
        "fp8ctl/patches/vllm-0.9.1/series.toml",
        "fp8ctl/patches/vllm-0.9.1/images.toml",
        "fp8ctl/patches/vllm-0.9.1/0001-force-fp8-serialized.patch",
    ):
        assert name in names


def test_the_wheel_brings_no_top_level_name_but_fp8ctl(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"fp8ctl", f"fp8ctl-{__version__}.dist-info"}


def test_the_wheels_metadata_asks_for_no_torch_and_carries_the_licence(wheel: Path) -> None:
    info = f"fp8ctl-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
        names = archive.namelist()
        assert b"fp8ctl = fp8ctl.__main__:main" in archive.read(f"{info}/entry_points.txt")
    always = {
        line.split(": ")[1].split(";")[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert {re.split(r"[<>=]", one)[0] for one in always} == {
        *("typer", "rich", "packaging", "httpx", "psutil", "nvidia-ml-py")
    }
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_an_sdist_makes_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    again = make_wheel(tmp_path / "unpacked" / f"fp8ctl-{__version__}", tmp_path / "wheel")
    assert content(again) == content(wheel)


# --- installed ------------------------------------------------------------------------------------


def test_an_installed_wheel_finds_its_kernels_and_leaks_none(installed: Path) -> None:
    # `-S` and no other path: only what the wheel brought.
    leaks, *origins = run(sys.executable, "-S", "-c", _FIND, path=str(installed)).splitlines()
    assert leaks == "[]"
    package = installed / "fp8ctl"
    assert origins == [
        str(package / "__init__.py"),
        str(package / "kernels" / "reference.py"),
        str(package / "kernels" / "launch.py"),
    ]
    assert not list(installed.rglob("*.pth"))


def test_an_installed_wheel_runs_and_reads_its_patches(installed: Path) -> None:
    path = os.pathsep.join([str(installed), _SITE])
    said = run(sys.executable, "-m", "fp8ctl", "--version", path=path)
    assert said == f"fp8ctl {__version__}\n"
    script = (
        "from fp8ctl.patching import catalog as c\n"
        "print(c.__file__, *[c.load_folder(f).name for f in c.folders()])"
    )
    where, *series = run(sys.executable, "-c", script, path=path).split()
    assert Path(where).is_relative_to(installed)
    assert series == ["sglang-0.4.8", "vllm-0.9.1"]


def test_the_script_of_an_installed_wheel_is_the_program(installed: Path) -> None:
    path = os.pathsep.join([str(installed), _SITE])
    said = run(str(installed / "bin" / "fp8ctl"), "--version", path=path)
    assert said == f"fp8ctl {__version__}\n"


def test_an_editable_install_finds_its_kernels_and_leaks_none(tmp_path: Path) -> None:
    source = project(tmp_path / "checkout")
    venv, builder = tmp_path / "venv", tmp_path / "builder"
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    # setuptools alone, without the rest of this environment.
    builder.mkdir()
    for entry in Path(_SITE).iterdir():
        if re.match(r"setuptools(-.*\.dist-info)?$|_distutils_hack$", entry.name):
            (builder / entry.name).symlink_to(entry)
    python = str(venv / "bin" / "python")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-q"),
        *("--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"),
        *("-e", str(source)),
        path=str(builder),
    )
    leaks, *origins = run(python, "-c", _FIND).splitlines()
    assert leaks == "[]"
    found = [Path(origin).resolve() for origin in origins]
    assert found == [
        source / "fp8ctl" / "__init__.py",
        source / "kernels" / "reference.py",
        source / "kernels" / "launch.py",
    ]


def test_the_environment_of_these_tests_leaks_none() -> None:
    leaks, *_ = run(sys.executable, "-c", _FIND).splitlines()
    assert leaks == "[]"
