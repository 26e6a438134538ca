"""Installers share files between environments and caches: none of those changes by a byte."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.patching import commands
from tests.patching.installs import Venv, can_reflink, photograph, write_wheel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fp8ctl.render import Reporter

A = "sglang/srt/a.py"


@pytest.fixture
def venv(tmp_path: Path, uv: Path) -> Callable[[str], Venv]:
    """Return a function: name -> a new virtual environment, all on one cache of uv."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "0.4.8")
    return lambda name: Venv(tmp_path / name, wheels, uv, tmp_path / "uv-cache").make()


def shares(path: Path, mode: str) -> bool:
    """Tell whether a file lies in the environment in the way of a link mode."""
    if mode == "symlink":
        return path.is_symlink()
    return not path.is_symlink() and (path.stat().st_nlink > 1) == (mode == "hardlink")


@pytest.mark.parametrize("mode", ["hardlink", "copy", "clone"])
def test_no_other_environment_and_no_cache_changes(
    bundled: Any, venv: Callable[[str], Venv], reporter: Reporter, tmp_path: Path, mode: str
) -> None:
    if mode == "clone" and not can_reflink(tmp_path):
        pytest.skip("this file system has no reflinks")
    ours, other = venv("ours"), venv("other")
    for one in (ours, other):
        one.uv_pip("install", "--link-mode", mode, "sglang==0.4.8")
        assert shares(one.site / A, mode)
    before = photograph(other.folder, tmp_path / "uv-cache")
    assert any(path.endswith(A) and "uv-cache" in path for path in before)
    pristine = photograph(ours.site)
    contents = {path: seen[0] for path, seen in pristine.items()}
    for _ in range(2):
        data = commands.patch(reporter, python=ours.python)
        assert data["changed"]
        assert b"first" in (ours.site / A).read_bytes()
        assert photograph(other.folder, tmp_path / "uv-cache") == before
        commands.revert(reporter, python=ours.python)
        assert photograph(other.folder, tmp_path / "uv-cache") == before
        assert {path: seen[0] for path, seen in photograph(ours.site).items()} == contents
    commands.patch(reporter, python=ours.python)
    third = venv("third")
    third.uv_pip("install", "--link-mode", mode, "sglang==0.4.8")
    bundled.site = third.site
    assert bundled.status().state == "pristine"


def test_writing_into_a_hard_link_would_reach_the_others(venv: Callable[[str], Venv]) -> None:
    """The hazard itself: without it the law above would say nothing."""
    ours, other = venv("ours"), venv("other")
    for one in (ours, other):
        one.uv_pip("install", "--link-mode", "hardlink", "sglang==0.4.8")
    with (ours.site / A).open("ab") as file:
        file.write(b"# edited\n")
    assert (other.site / A).read_bytes().endswith(b"# edited\n")
    assert os.path.samefile(ours.site / A, other.site / A)
