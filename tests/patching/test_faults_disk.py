"""A disk that is really full, and one that is really read-only: a tmpfs of 64 KiB."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.patching.conftest import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

# Runs with mounts of its own, which go with it.
SCRIPT = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fp8ctl.errors import Fp8ctlError
from fp8ctl.patching import catalog, transaction
from tests.patching.conftest import Lab, tree
from tests.patching.faulty import next_command, unlocked

source, disk = Path(sys.argv[2]), Path(sys.argv[3])
patches = source / "patches"
lab = Lab(disk, patches, catalog.load("sglang", "0.4.8", root=patches))

def attempt(body):
    try:
        body()
    except Fp8ctlError as e:
        return {"code": e.exit_code, "message": e.message}
    return {"code": 0, "message": ""}

def free():
    info = os.statvfs(disk)
    return info.f_bavail * info.f_frsize

def fill(left):
    number = 0
    while free() > left * 4096:
        (disk / f"full-{number}").write_bytes(bytes(4096))
        number += 1

def empty():
    for path in disk.glob("full-*"):
        path.unlink()

def now():
    return {k: v for k, v in unlocked(tree(disk)).items() if not k.startswith("full-")}

subprocess.run(["cp", "-r", f"{source}/site/.", str(disk)], check=True)
(disk / "sglang/untouched.py").unlink()
old = now()
told = {"free": free(), "refused": attempt(lambda: lab.patch("third")), "ends": []}
assert now() == old
# A quota knows of less than statvfs tells: then the disk is full half-way.
transaction._check_space = lambda *_: None
lab.patch("third")
new = now()
for verb in ("patch", "revert"):
    for left in range(12):
        empty()
        next_command(disk)
        lab.patch("third") if verb == "revert" else lab.revert()
        start, goal = (new, old) if verb == "revert" else (old, new)
        assert now() == start
        fill(left)
        end = attempt(lab.revert if verb == "revert" else lambda: lab.patch("third"))
        empty()
        next_command(disk)
        end["whole"] = now() == (start if end["code"] else goal)
        told["ends"].append(end | {"verb": verb, "left": left})
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
before = now()
told["read-only"] = attempt(lambda: lab.patch("first"))
assert now() == before
print(json.dumps(told))
"""


def _mounted(disk: Path, *words: str) -> list[str]:
    mount = f'mount -t tmpfs -o size=64k tmpfs {disk} && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", mount, "sh", *words]


def _no_mounts(tmp_path: Path) -> str:
    """Return why nothing can be mounted here, "" if it can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    done = subprocess.run(_mounted(tmp_path, "true"), capture_output=True, check=False)
    return "" if done.returncode == 0 else "this machine gives no mount namespaces"


def test_a_tmpfs_of_64_kib(lab: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    reason = _no_mounts(disk)
    if reason:
        pytest.skip(reason)
    words = [sys.executable, "-c", SCRIPT, str(REPOSITORY), str(tmp_path), str(disk)]
    done = subprocess.run(
        _mounted(disk, *words), capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["refused"]["code"] == 6
    assert "bytes free, expected at least" in told["refused"]["message"]
    assert str(disk) in told["refused"]["message"]
    codes: dict[str, set[int]] = {"patch": set(), "revert": set()}
    for end in told["ends"]:
        codes[end["verb"]].add(end["code"])
        assert end["whole"], end
        if end["code"]:
            assert end["code"] == 6, end
            assert f"{disk}/" in end["message"], end
            assert "No space left on device (" in end["message"], end
    # Some had room and some had not, or this test says nothing.
    assert codes == {"patch": {0, 6}, "revert": {0, 6}}
    assert told["read-only"]["code"] == 6
    assert str(disk) in told["read-only"]["message"]
