"""Checked strings: a path inside site-packages and a SHA-256.

A value of these types was made by the parse function beside it, so no other
module checks again. Called by every module of this package; touches nothing.
"""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from fp8ctl.errors import DiffError

RelPath = NewType("RelPath", str)
Sha256 = NewType("Sha256", str)

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Printable ASCII without the quote, the backslash and the space. A name outside of it would be
# read differently by different tools (CVE-2014-3227): git quotes it, or GNU patch, where the
# file is empty and the diff has no `+++`, ends it at the space.
_NAME = re.compile(r"[!#-\[\]-~]+")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_PATH = 1024
_MAX_COMPONENT = 200  # a staged name adds its own prefix and suffix; NAME_MAX is 255


def parse_relpath(text: str) -> RelPath:
    """Return `text` as a path relative to site-packages.

    Raises:
        DiffError: it is empty, absolute, leaves its folder, or has an unusual character.
    """
    reason = _path_fault(text)
    if reason:
        raise DiffError(f"path {text!r} {reason}", hint="use a plain relative path")
    return RelPath(text)


def _path_fault(text: str) -> str | None:
    if not text:
        return "is empty"
    if text.startswith("/") or _DRIVE.match(text):
        return "is absolute, expected one relative to site-packages"
    if len(text) > _MAX_PATH:
        return f"has {len(text)} characters, expected at most {_MAX_PATH}"
    for component in text.split("/"):
        if component in ("", ".", ".."):
            return f"has the component {component!r}"
        if component == ".fp8ctl":
            return "lies in fp8ctl's own folder"
        if not _NAME.fullmatch(component):
            return "has a control, space, quote, backslash or non-ASCII character"
        if len(component) > _MAX_COMPONENT:
            return f"has a component of {len(component)} characters, limit {_MAX_COMPONENT}"
    return None


def parse_sha256(text: object) -> Sha256:
    """Return `text` as a SHA-256 in lower-case hexadecimal.

    Raises:
        DiffError: it is not 64 such digits.
    """
    if not isinstance(text, str) or not _SHA256.fullmatch(text):
        raise DiffError(f"{text!r} is not a sha256, expected 64 lower-case hexadecimal digits")
    return Sha256(text)


def sha256_of(data: bytes) -> Sha256:
    """Return the SHA-256 of `data`."""
    return Sha256(hashlib.sha256(data).hexdigest())


def sha256_or_none(data: bytes | None) -> Sha256 | None:
    """Return the SHA-256 of `data`, or None for a file that is not there."""
    return None if data is None else sha256_of(data)


def short(sha: Sha256 | None) -> str:
    """Return a hash as messages show it: 12 digits, or `absent`."""
    return "absent" if sha is None else sha[:12]
