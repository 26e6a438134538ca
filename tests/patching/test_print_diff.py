"""`--print-diff`: the whole change as one diff on stdout, which git and GNU patch take."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.patching import catalog, parser
from tests.patching import oracles
from tests.patching.conftest import PRISTINE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

A, B = "sglang/srt/a.py", "sglang/srt/b.py"
SCRIPT = """
import sys
from pathlib import Path
from fp8ctl import hardware
from fp8ctl.patching import catalog
catalog.ROOT = Path(sys.argv.pop(1))
hardware.detect = lambda: hardware.Hardware()
from fp8ctl.__main__ import main
main()
"""


def fp8ctl(lab: Any, *argv: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    """Run the program with the small series as its own, in a process of its own."""
    import os

    words = [*argv, "--site-packages", str(lab.site)]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(lab.patches), *words],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )


def content(site: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(f.relative_to(site)): (f.read_bytes(), f.stat().st_mode)
        for f in sorted(site.rglob("*"))
        if f.is_file() and ".fp8ctl" not in f.parts and f.suffix != ".pyc"
    }


def gnu_patch(folder: Path, text: bytes) -> bool:
    if not oracles.GNU_PATCH:
        pytest.skip("no GNU patch")
    return oracles.gnu_patch(folder, text)


TOOLS = {"git apply": oracles.git_apply, "patch -p1": gnu_patch}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_what_is_printed_makes_of_a_copy_what_patch_makes(
    lab: Any, tmp_path: Path, tool: str, mode: int
) -> None:
    (lab.site / A).chmod(mode)
    copy = tmp_path / "copy"
    shutil.copytree(lab.site, copy)
    before = content(lab.site)
    dry = fp8ctl(lab, "patch", "--dry-run", "--print-diff")
    assert dry.returncode == 0, dry.stderr
    assert content(lab.site) == before
    done = fp8ctl(lab, "patch", "--print-diff")
    assert done.stdout == dry.stdout
    # One diff, and not a byte beside it: a created file, CRLF and a missing last newline in it.
    assert [f.path for f in parser.parse(done.stdout)] == [
        "sglang/added/d.py", "sglang/c.py", A, B
    ]  # fmt: skip
    assert b"\r\n" in done.stdout
    assert b"\n\\ No newline" in done.stdout
    assert TOOLS[tool](copy, dry.stdout)
    assert content(copy) == content(lab.site) != before
    # And back: the diff of a revert is the way back for whoever applied the first by hand.
    back = fp8ctl(lab, "revert", "--print-diff")
    assert TOOLS[tool](copy, back.stdout)
    assert content(copy) == content(lab.site) == before
    assert fp8ctl(lab, "revert", "--print-diff").stdout == b""


def test_bytes_that_no_encoding_carries_come_out_as_they_are(
    lab: Any, tmp_path: Path, refresh: Any
) -> None:
    odd = b"gpu = '\xff\x80 \xe2\x9c\x93'\n"
    patch = lab.series.folder / "0006-gpu-only.patch"
    patch.write_bytes(patch.read_bytes().replace(b"gpu = True\n", odd))
    assert refresh.main(["--patches", str(lab.patches), str(lab.site)]) == 0
    argv = ("patch", "--patch", "gpu-only", "--dry-run", "--print-diff")
    for encoding in ("utf-8", "ascii", "latin-1"):
        done = fp8ctl(lab, *argv, encoding=encoding)
        assert b"\n+" + odd in done.stdout
    assert oracles.git_apply(lab.site, done.stdout)
    assert odd in lab.read(A)
    oracles.git_apply(lab.site, done.stdout, "-R")
    data = json.loads(fp8ctl(lab, *argv, "--json").stdout)["data"]
    assert data["diff"].encode("utf-8", "surrogateescape") == done.stdout


def test_json_alone_is_on_stdout_with_json(lab: Any) -> None:
    document = json.loads(fp8ctl(lab, "patch", "--dry-run", "--print-diff", "--json").stdout)
    assert document["data"]["diff"].startswith("diff --git a/sglang/added/d.py ")
    assert "diff" not in json.loads(fp8ctl(lab, "patch", "--dry-run", "--json").stdout)["data"]


def test_a_work_tree_takes_it_by_the_command_in_the_hint(lab: Any, tmp_path: Path) -> None:
    """An editable install is refused, and its package may lie deeper than the work tree's top."""
    tree = tmp_path / "it's a clone"
    for path, data in PRISTINE.items():
        (tree / "python" / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / "python" / path).write_bytes(data)
    oracles.run(tree, "git", "init", "-q")
    text = fp8ctl(lab, "patch", "--print-diff").stdout
    assert gnu_patch(tree / "python", text)
    assert oracles.git_apply(tree, text, "-R", "--directory=python")
    assert oracles.git_apply(tree, text, "--directory=python")
    for name, (patched, _) in content(lab.site).items():
        if name.startswith("sglang/"):
            assert (tree / "python" / name).read_bytes() == patched


@pytest.mark.wheels
@pytest.mark.parametrize("folder", catalog.folders(), ids=lambda f: f.name)
def test_the_bundled_series_are_printed_whole(
    folder: Path, tmp_path: Path, engine_sources: Callable[[str], Path]
) -> None:
    series = catalog.load_folder(folder)
    source = engine_sources(series.backend)
    names = [str(p.relative_to(source)) for p in source.glob("*.dist-info/*")]
    for path in (*series.pristine, *names):
        if (source / path).is_file():
            for place in ("site", "copy"):
                (tmp_path / place / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / path, tmp_path / place / path)
    site = str(tmp_path / "site")
    ids = [w for p in sorted(list(series.permitted())[-1]) for w in ("--patch", p)]
    done = subprocess.run(
        [sys.executable, "-m", "fp8ctl", "patch", "--site-packages", site, "--print-diff", *ids],
        capture_output=True,
        check=True,
    )
    assert oracles.git_apply(tmp_path / "copy", done.stdout)
    assert content(tmp_path / "copy") == content(tmp_path / "site")
