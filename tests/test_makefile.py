"""`make`: what it installs, and that it installs nothing a second time."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Makes an environment whose programs only write down what they were asked for.
_PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
mkdir -p "$3/bin"
for name in python fp8ctl ruff mypy; do
    printf '#!/bin/sh\\necho "%s $*" >> "$LOG"\\n' $name > "$3/bin/$name"
    chmod +x "$3/bin/$name"
done
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(_PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def make(clone: Path, target: str) -> list[str]:
    """Run make and return the commands that it ran in the environment."""
    log = clone / "log"
    log.write_text("")
    # Whoever runs these tests may be make itself, whose settings are none of this one's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    subprocess.run(
        ["make", "PYTHON=./python", target],
        cwd=clone,
        env=environment | {"LOG": str(log)},
        check=True,
        capture_output=True,
    )
    return log.read_text().splitlines()


def installed(commands: list[str]) -> list[str]:
    return [c.split(" -c constraints.txt ")[1] for c in commands if " pip install " in c]


def test_what_was_touched_and_not_changed_installs_nothing(clone: Path) -> None:
    assert installed(make(clone, "demo")) == ["-e ."]
    assert installed(make(clone, "test")) == ["torch", "-e .[torch,dev]"]
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(clone / name, (2**32, 2**32))
    assert installed(make(clone, "demo")) == []
    assert installed(make(clone, "test")) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_what_was_changed_is_installed_and_leaves_one_stamp_of_a_kind(
    clone: Path, name: str
) -> None:
    make(clone, "test")
    with (clone / name).open("a") as file:
        file.write("# another one\n")
    assert installed(make(clone, "test")) == ["-e .", "torch", "-e .[torch,dev]"]
    assert len(list((clone / ".venv").glob(".base*"))) == 1
    assert len(list((clone / ".venv").glob(".dev*"))) == 1


def test_the_constraints_fit_a_cuda_build_of_torch_too() -> None:
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert "torch" in pinned
    assert "triton" not in pinned
    # nvidia-ml-py asks the driver and is no part of torch.
    assert {name for name in pinned if name.startswith(("nvidia", "cuda"))} == {"nvidia-ml-py"}
