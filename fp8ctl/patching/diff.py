"""Unified git diffs on bytes: apply, reverse, render. Pure.

Knows bytes, not folders; `parser` reads a diff's text. Called by `catalog`,
`status` and `commands`; touches no file.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fp8ctl.errors import HunkError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.patching.names import RelPath

MAX_FILE_BYTES = 4 << 20
# A hunk whose rarest line is more common than this is not looked for: it would take minutes.
MAX_PLACES = 1_000

Kind = Literal["modify", "create", "delete"]

_NO_NEWLINE = b"\\ No newline at end of file\n"
_REVERSED: dict[Kind, Kind] = {"modify": "modify", "create": "delete", "delete": "create"}
_DOES: dict[Kind, str] = {"modify": "modifies", "create": "creates", "delete": "deletes"}


@dataclass(frozen=True, slots=True)
class Hunk:
    """One replaced run of lines.

    Attributes:
        old_start: number of lines before the hunk in the old file.
        new_start: the same in the new file.
        before: the lines it expects, with their ends; only a file's last line may lack one.
        after: the lines it leaves.
        leading: how many lines of context stand before the first change.
        trailing: how many stand behind the last change.
    """

    old_start: int
    new_start: int
    before: tuple[bytes, ...]
    after: tuple[bytes, ...]
    leading: int
    trailing: int


@dataclass(frozen=True, slots=True)
class FileDiff:
    """What a diff does to one file.

    Attributes:
        path: the file, relative to site-packages.
        kind: whether it modifies, creates or deletes the file.
        hunks: in file order, not overlapping.
        mode: permission bits of a created or deleted file, else None.
    """

    path: RelPath
    kind: Kind
    hunks: tuple[Hunk, ...]
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """A diff's result.

    Attributes:
        data: the new content; None when the file is deleted.
        offsets: per hunk, how many lines away from its stated place it was found.
    """

    data: bytes | None
    offsets: tuple[int, ...]


def apply(diff: FileDiff, old: bytes | None, *, search: bool = False) -> Applied:
    """Apply a diff to a file's bytes.

    Args:
        diff: what to do.
        old: the file's content, None when it is not there.
        search: let a hunk be found elsewhere, if its lines occur exactly once.

    Raises:
        HunkError: the file is not what the diff expects.
    """
    if (old is None) != (diff.kind == "create"):
        there = "is not there" if old is None else "is there already"
        raise HunkError(f"{diff.path}: {there}, and the patch {_DOES[diff.kind]} it")
    if old is not None and len(old) > MAX_FILE_BYTES:
        raise HunkError(f"{diff.path}: {len(old)} bytes, expected at most {MAX_FILE_BYTES}")
    lines = split_lines(old or b"")
    index = _index(lines) if search else {}
    result: list[bytes] = []
    offsets: list[int] = []
    end = 0
    for number, hunk in enumerate(diff.hunks, 1):
        where = f"{diff.path}: hunk {number}"
        at = _search(hunk, lines, index, where) if search else _exact(hunk, lines, where)
        if at < end:
            raise HunkError(f"{where}: found at line {at + 1}, before the end of hunk {number - 1}")
        result += lines[end:at]
        result += hunk.after
        end = at + len(hunk.before)
        offsets.append(at - hunk.old_start)
    result += lines[end:]
    data = b"".join(result)
    if diff.kind == "delete":
        if data:
            raise HunkError(f"{diff.path}: is longer than the file that the patch deletes")
        return Applied(None, tuple(offsets))
    return Applied(data, tuple(offsets))


def split_lines(data: bytes) -> list[bytes]:
    r"""Return the lines of `data` with their ends, split at `\n` alone."""
    *whole, rest = data.split(b"\n")
    lines = [line + b"\n" for line in whole]
    return [*lines, rest] if rest else lines


def _fits(hunk: Hunk, lines: Sequence[bytes], at: int) -> bool:
    """Tell whether the hunk stands at line `at`; with no context it must end the file there."""
    stop = at + len(hunk.before)
    may_start = hunk.leading > 0 or at == 0
    may_stop = hunk.trailing > 0 or stop == len(lines)
    return may_start and may_stop and tuple(lines[at:stop]) == hunk.before


def _exact(hunk: Hunk, lines: Sequence[bytes], where: str) -> int:
    # Less context behind than in front: the file ended there when the diff was made.
    grown = hunk.trailing < hunk.leading and hunk.old_start + len(hunk.before) < len(lines)
    if _fits(hunk, lines, hunk.old_start) and not grown:
        return hunk.old_start
    for i, expected in enumerate(hunk.before, hunk.old_start):
        found = lines[i] if i < len(lines) else b""
        if found != expected:
            raise HunkError(f"{where}: line {i + 1} is {_show(found)}, expected {_show(expected)}")
    raise HunkError(f"{where}: must stand at an end of the file, and does not")


def _index(lines: Sequence[bytes]) -> dict[bytes, list[int]]:
    index: dict[bytes, list[int]] = {}
    for i, line in enumerate(lines):
        index.setdefault(line, []).append(i)
    return index


def _search(hunk: Hunk, lines: Sequence[bytes], index: dict[bytes, list[int]], where: str) -> int:
    if not hunk.before:
        if lines:
            raise HunkError(f"{where}: has no line to look for")
        return 0
    # Looking only where the rarest line stands keeps this linear on real files.
    places, anchor = min(
        ((index.get(line, []), i) for i, line in enumerate(hunk.before)), key=lambda p: len(p[0])
    )
    if len(places) > MAX_PLACES:
        raise HunkError(
            f"{where}: each of its lines occurs {len(places)} times or more, "
            f"expected one that occurs at most {MAX_PLACES} times"
        )
    found = [p - anchor for p in places if p >= anchor and _fits(hunk, lines, p - anchor)]
    if len(found) == 1:
        return found[0]
    if found:
        at = ", ".join(str(p + 1) for p in found[:4])
        raise HunkError(
            f"{where}: its lines occur {len(found)} times, at lines {at}; expected once"
        )
    raise HunkError(
        f"{where}: its lines are nowhere in the file; the first is {_show(hunk.before[0])}"
    )


def _show(line: bytes) -> str:
    return repr(line[:80].decode(errors="backslashreplace")) if line else "the end of the file"


def reverse(diff: FileDiff) -> FileDiff:
    """Return the diff that takes `diff` back."""
    hunks = tuple(
        Hunk(h.new_start, h.old_start, h.after, h.before, h.leading, h.trailing) for h in diff.hunks
    )
    return FileDiff(diff.path, _REVERSED[diff.kind], hunks, diff.mode)


def render(
    path: RelPath, old: bytes | None, new: bytes | None, *, mode: int | None = 0o644
) -> bytes:
    """Return the git diff from `old` to `new`; empty when they are equal.

    Args:
        path: the file.
        old: its content before, None if it is not there.
        new: its content after, None if it is removed.
        mode: its permission bits; None: they are not known, and an edit does without.
    """
    if old == new:
        return b""
    git_mode = "100755" if mode and mode & 0o100 else "100644"
    head = f"diff --git a/{path} b/{path}\n"
    suffix = ""
    if old is None:
        head += f"new file mode {git_mode}\n"
    elif new is None:
        head += f"deleted file mode {git_mode}\n"
    elif mode is not None:
        suffix = f" {git_mode}"
    head += f"index {git_blob(old)}..{git_blob(new)}{suffix}\n"
    body = difflib.diff_bytes(
        difflib.unified_diff,
        split_lines(old or b""),
        split_lines(new or b""),
        b"/dev/null" if old is None else f"a/{path}".encode(),
        b"/dev/null" if new is None else f"b/{path}".encode(),
    )
    whole = (line if line.endswith(b"\n") else line + b"\n" + _NO_NEWLINE for line in body)
    return head.encode() + b"".join(whole)


def git_blob(data: bytes | None) -> str:
    """Return git's blob id of a content; all zeros for an absent file."""
    if data is None:
        return "0" * 40
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
