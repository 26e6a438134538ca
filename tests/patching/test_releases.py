"""Real diffs between released versions, through the diff engine: both directions, byte for byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from typing import TYPE_CHECKING

import pytest

from fp8ctl.patching import diff, parser
from tests.conftest import CACHE
from tests.patching import oracles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAIRS = [
    ("vllm==0.9.1", "vllm==0.9.2"),
    ("sglang==0.4.8", "sglang==0.4.8.post1"),
    ("sglang==0.4.8", "sglang==0.4.9"),
]
# What git 2.39 makes of them, each way; another git may cut hunks a little differently.
HUNKS = 2_800
SECONDS = 3.0


@pytest.fixture(scope="module")
def release() -> Callable[[str], Path]:
    """Return a function: requirement -> folder with every text file of that wheel, read-only.

    Fetched once by pip; the texts are kept, the wheel (380 MB of vLLM) is not.
    """

    def unpack(requirement: str) -> Path:
        folder = CACHE / "texts" / requirement
        if folder.exists():
            return folder
        draft = folder.with_name(f"{requirement}.draft{os.getpid()}")
        try:
            with zipfile.ZipFile(_download(requirement, draft)) as archive:
                for member in archive.infolist():
                    data = b"" if member.is_dir() else archive.read(member)
                    if member.is_dir() or ".dist-info/" in member.filename or b"\0" in data:
                        continue
                    path = draft / "texts" / member.filename
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
            (draft / "texts").rename(folder)
        except OSError:
            if not folder.exists():  # else another run was quicker
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder

    return unpack


def _download(requirement: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*argv, "-d", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot download {requirement}: {done.stderr[-300:].strip()}")
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.wheels
@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["myers", "patience", "histogram"])
def test_a_release_becomes_the_next_one_and_back(
    release: Callable[[str], Path], tmp_path: Path, algorithm: str
) -> None:
    for direction in (1, -1):
        hunks = files = 0
        seconds = 0.0
        for number, pair in enumerate(PAIRS):
            old, new = (release(r) for r in pair[::direction])
            repository = tmp_path / f"repository{direction}{number}"
            trees = oracles.git_trees(repository, old, new)
            changes = oracles.git_diff(repository, *trees, f"--diff-algorithm={algorithm}")
            before = {p: (old / p).read_bytes() for p in changes if (old / p).exists()}
            # Each file by itself: the limits of the engine are those of one patch.
            started = time.process_time()
            parsed = {p: parser.parse(text, name=p)[0] for p, text in changes.items()}
            after = {p: diff.apply(one, before.get(p)).data for p, one in parsed.items()}
            seconds += time.process_time() - started
            for path, one in parsed.items():
                wanted = (new / path).read_bytes() if (new / path).exists() else None
                assert after[path] == wanted, path
                assert diff.apply(diff.reverse(one), wanted).data == before.get(path), path
            untouched = {str(f.relative_to(old)) for f in old.rglob("*") if f.is_file()}
            for path in untouched - set(changes):
                assert (new / path).read_bytes() == (old / path).read_bytes(), path
            hunks += sum(len(one.hunks) for one in parsed.values())
            files += len(parsed)
        print(f"{algorithm} {direction:+d}: {files} files, {hunks} hunks, {seconds:.2f} s")
        assert hunks == pytest.approx(HUNKS, rel=0.05)
        assert seconds < SECONDS
