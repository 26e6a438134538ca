"""What an installed engine's own records say: version and RECORD hashes.

`RECORD` is never edited by fp8ctl: it is the independent witness of what was
installed. Reads only; called by `status`.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import re
from typing import TYPE_CHECKING

from fp8ctl.errors import DiffError
from fp8ctl.patching.names import RelPath, Sha256, parse_relpath, parse_sha256

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from fp8ctl.patching.fsops import Root

_MAX_RECORD_BYTES = 64 << 20


def dist_info(root: Root, distribution: str) -> str | None:
    """Return the name of a distribution's `.dist-info` folder, None if there is none."""
    wanted = _normal(distribution)
    for name in root.names("."):
        stem = name.removesuffix(".dist-info")
        if stem != name and _normal(stem.rpartition("-")[0]) == wanted:
            return name
    return None


def installed_version(root: Root, distribution: str) -> str | None:
    """Return the installed version of a distribution, None if its files are not here.

    Those of an editable install lie in a work tree.
    """
    folder = dist_info(root, distribution)
    if folder is None or _is_editable(root, folder):
        return None
    return folder.removesuffix(".dist-info").rpartition("-")[2]


def _is_editable(root: Root, folder: str) -> bool:
    file = root.read(f"{folder}/direct_url.json")
    if file is None:
        return False
    try:
        raw = json.loads(file.data)
        return raw["dir_info"]["editable"] is True
    except (KeyError, TypeError, ValueError):
        return False


def record_hashes(root: Root, distribution: str, paths: Iterable[RelPath]) -> dict[RelPath, Sha256]:
    """Return what RECORD says of some files; those without a SHA-256 there are left out."""
    folder = dist_info(root, distribution)
    file = root.read(f"{folder}/RECORD", limit=_MAX_RECORD_BYTES) if folder else None
    if file is None:
        return {}
    return parse_record(file.data.decode("utf-8", "replace"), frozenset(paths))


def parse_record(text: str, wanted: Collection[str]) -> dict[RelPath, Sha256]:
    """Return some rows of a wheel's RECORD: path, `sha256=<urlsafe base64>`, size.

    Source: PEP 376 and the wheel specification. Rows of other shapes are left out.
    """
    result: dict[RelPath, Sha256] = {}
    for row in csv.reader(text.splitlines()):
        if len(row) != 3 or row[0] not in wanted or not row[1].startswith("sha256="):
            continue
        try:
            digest = base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "==")
            result[parse_relpath(row[0])] = parse_sha256(digest.hex())
        except (DiffError, binascii.Error, ValueError):
            continue
    return result


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
