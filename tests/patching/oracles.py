"""The other two engines: real `git diff`, `git apply` and GNU `patch`, on folders of their own.

None of them may see a configuration, a repository around the folder, or a
language: they would then say something else on another machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

GNU_PATCH = shutil.which("patch")
_SECTION = re.compile(rb"^(?=diff --git )", re.MULTILINE)


def run(
    folder: Path, *argv: str, stdin: bytes = b"", check: bool = True
) -> subprocess.CompletedProcess[bytes]:
    """Run a tool in a folder, with nothing of the machine's own settings."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        # Thousands of small objects that no power cut has to spare.
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.fsync",
        "GIT_CONFIG_VALUE_0": "none",
    }
    return subprocess.run(
        argv,
        cwd=folder,
        input=stdin,
        capture_output=True,
        check=check,
        env=environment,
        timeout=300,
    )


def git_trees(repository: Path, *folders: Path) -> list[str]:
    """Store folders in a new repository; return the ids of their trees."""
    repository.mkdir()
    run(repository, "git", "init", "-q", "--bare", ".")
    ids = []
    for folder in folders:
        work = ("git", "--git-dir", str(repository), "--work-tree", str(folder))
        run(folder, *work, "read-tree", "--empty")
        run(folder, *work, "-c", "core.safecrlf=false", "add", "-A", "-f", ".")
        ids.append(run(folder, *work, "write-tree").stdout.decode().strip())
    return ids


def git_import(repository: Path, *trees: Iterable[tuple[str, bytes, int]]) -> list[str]:
    """Store files that lie nowhere (path, content, mode) in a new repository; return the trees."""
    repository.mkdir()
    run(repository, "git", "init", "-q", "--bare", ".")
    stream = []
    for number, files in enumerate(trees):
        stream.append(b"commit refs/heads/t%d\ncommitter t <t@t> 0 +0000\ndata 0\n" % number)
        for path, data, mode in files:
            stream.append(b"M %o inline %s\ndata %d\n" % (mode, path.encode(), len(data)))
            stream += [data, b"\n"]
    run(repository, "git", "fast-import", "--quiet", stdin=b"".join(stream))
    return [f"refs/heads/t{number}" for number in range(len(trees))]


def git_diff(repository: Path, old: str, new: str, *options: str) -> dict[str, bytes]:
    """Return what git says leads from one tree to another: one diff per path."""
    argv = ("git", "diff", "--text", "--no-renames", "--no-color", "--full-index", *options)
    return split(run(repository, *argv, old, new).stdout)


def split(text: bytes) -> dict[str, bytes]:
    """Split a diff by file. Only a header begins in the first column with `diff --git`."""
    parts = _SECTION.split(text)
    assert parts[0] == b"", parts[0][:80]
    return {path_of(part): part for part in parts[1:]}


def path_of(part: bytes) -> str:
    """Return the path of a file's diff, from its first line."""
    rest = part[: part.index(b"\n")].removeprefix(b"diff --git ")
    path = rest[2 : 2 + (len(rest) - 5) // 2]
    assert rest == b"a/%s b/%s" % (path, path), rest
    return path.decode()


def git_apply(folder: Path, text: bytes, *options: str) -> bool:
    """Apply a diff as `git apply` does; False if it refuses some of it (`--reject`) or all."""
    argv = ("git", "apply", "--whitespace=nowarn", *options, "-")
    return run(folder, *argv, stdin=text, check=False).returncode == 0


def gnu_patch(folder: Path, text: bytes, *options: str) -> bool:
    """Apply a diff as GNU `patch -F0` does; False if it refuses some of it."""
    argv = ("patch", "-p1", "-F0", "-s", "-f", "--binary", "--no-backup-if-mismatch", *options)
    return run(folder, *argv, stdin=text, check=False).returncode == 0
