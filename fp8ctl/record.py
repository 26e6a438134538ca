"""An engine's files against its RECORD, the independent witness of what was released.

Reads only. RECORD is never edited by the patcher, and pip and uv never verify it.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class RecordReport:
    """An engine's Python files against its RECORD.

    Attributes:
        present: whether there is a RECORD with hashes at all.
        checked: number of .py files that were read.
        modified: those whose sha256 differs, relative to site-packages.
        missing: those that are not there.
        linked: number of files that share their inode, with an installer's
            cache or another environment.
        read_only_dirs: folders of the package that this user cannot write.
    """

    present: bool = False
    checked: int = 0
    modified: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    linked: int = 0
    read_only_dirs: tuple[str, ...] = ()


def verify_record(dist_info: Path, package: str) -> RecordReport:
    """Compare a package's .py files with their RECORD (sha256, all of them).

    Args:
        dist_info: metadata folder; RECORD's paths are relative to its parent.
        package: top folder of the files that matter.
    """
    site = dist_info.parent
    try:
        text = (dist_info / "RECORD").read_text(encoding="utf-8")
    except OSError:
        return RecordReport()
    modified, missing, folders = [], [], {site / package}
    checked = linked = 0
    for row in csv.reader(text.splitlines()):
        if len(row) < 2 or not row[0].startswith(package + "/") or not row[0].endswith(".py"):
            continue
        algorithm, _, digest = row[1].partition("=")
        # A path with `..` is no file of this package, whatever RECORD says.
        if algorithm != "sha256" or ".." in row[0].split("/"):
            continue
        path = site / row[0]
        checked += 1
        folders.add(path.parent)
        try:
            with path.open("rb") as f:
                linked += os.fstat(f.fileno()).st_nlink > 1
                found = hashlib.sha256(f.read()).digest()
        except OSError:
            missing.append(row[0])
            continue
        if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != digest:
            modified.append(row[0])
    closed = sorted(str(f) for f in folders if f.is_dir() and not is_writable(f))
    return RecordReport(
        bool(checked), checked, tuple(modified), tuple(missing), linked, tuple(closed)
    )


def is_writable(folder: Path) -> bool:
    """Say whether this user can make and replace files in a folder; asks, writes nothing."""
    return os.access(folder, os.W_OK | os.X_OK)
