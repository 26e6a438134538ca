"""Unified git diffs on bytes: parse, apply, reverse, render. Pure.

Knows bytes, not folders. `unidiff` parses and this module validates, because
unidiff lets through `..` paths, overlapping hunks and lines beyond the counted
length. Called by `catalog`, `status` and `plan`; touches no file.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fp8ctl.errors import DiffError, HunkError
from fp8ctl.patching.names import RelPath, parse_relpath

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_DIFF_BYTES = 1 << 20
MAX_FILE_BYTES = 4 << 20
MAX_HUNKS = 10_000

Kind = Literal["modify", "create", "delete"]

_MODES = {"100644": 0o644, "100755": 0o755}
_HUNK_HEAD = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", re.MULTILINE)
_INDEX = re.compile(r"index [0-9a-f]{4,64}\.\.[0-9a-f]{4,64}(?: (\d+))?")
_NO_NEWLINE = " No newline at end of file\n"


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


def parse(
    data: bytes, *, name: str = "diff", max_bytes: int = MAX_DIFF_BYTES
) -> tuple[FileDiff, ...]:
    """Parse a git diff that touches one file or more.

    Args:
        data: the diff, nothing before its first `diff --git` line.
        name: what error messages call it.
        max_bytes: largest input accepted.

    Raises:
        DiffError: anything but plain edits, creations and deletions of regular files.
    """
    if len(data) > max_bytes:
        raise DiffError(f"{name}: {len(data)} bytes, expected at most {max_bytes}")
    if not data.endswith(b"\n"):
        raise DiffError(f"{name}: empty or cut off, expected a final newline")
    from unidiff import PatchSet

    # latin-1 keeps every byte; a str (not a file) is split at "\n" alone, so
    # CRLF, form feeds and lone CRs stay inside their lines.
    text = data.decode("latin-1")
    try:
        patches = PatchSet(text)
        round_trip = str(patches)
    except Exception as e:
        raise DiffError(f"{name}: not a unified diff: {str(e).strip() or type(e).__name__}") from e
    # unidiff drops lines that it does not understand; what it cannot print
    # again it has not read. `,1` in a hunk header is the one thing it adds.
    if round_trip != _HUNK_HEAD.sub(_full_head, text):
        raise DiffError(
            f"{name}: has lines that belong to no hunk and no git header",
            hint="write it with `git diff`, without a mail header or signature",
        )
    files = tuple(_file(p, name) for p in patches)
    if not files:
        raise DiffError(f"{name}: touches no file")
    if sum(len(f.hunks) for f in files) > MAX_HUNKS:
        raise DiffError(f"{name}: more than {MAX_HUNKS} hunks")
    seen: set[RelPath] = set()
    for file in files:
        if file.path in seen:
            raise DiffError(f"{name}: {file.path} occurs twice")
        seen.add(file.path)
    return files


def _full_head(match: re.Match[str]) -> str:
    a, b, c, d = match.groups()
    return f"@@ -{a},{b or 1} +{c},{d or 1} @@" if b is None or d is None else match.group()


def _file(patched: Iterable[object], name: str) -> FileDiff:
    info: list[str] = list(getattr(patched, "patch_info", None) or ())
    if not info or not info[0].startswith("diff --git "):
        raise DiffError(f"{name}: a file without a `diff --git` line")
    path = _path(info[0].removesuffix("\n"), name)
    kind: Kind = "modify"
    mode = None
    for line in info[1:]:
        head = line.removesuffix("\n")
        index = _INDEX.fullmatch(head)
        if index:
            if index[1] is not None:
                _mode(index[1], path, name)
        elif kind == "modify" and head.startswith("new file mode "):
            kind, mode = "create", _mode(head[14:], path, name)
        elif kind == "modify" and head.startswith("deleted file mode "):
            kind, mode = "delete", _mode(head[18:], path, name)
        else:
            raise DiffError(
                f"{name}: {path}: {head[:60]!r} is not allowed",
                hint="renames, copies, mode changes and binary files cannot be patched",
            )
    raw = list(patched)
    source = str(getattr(patched, "source_file", ""))
    target = str(getattr(patched, "target_file", ""))
    if raw:
        _sides(source, target, path, kind, name)
    elif kind == "modify":
        raise DiffError(f"{name}: {path}: header without a hunk")
    hunks = tuple(_hunk(h, f"{name}: {path}: hunk {i}") for i, h in enumerate(raw, 1))
    _check_order(hunks, kind, f"{name}: {path}")
    return FileDiff(path, kind, hunks, mode)


def _path(line: str, name: str) -> RelPath:
    """Return the one path of `diff --git a/P b/P`; its length follows from the line's."""
    rest = line.removeprefix("diff --git ")
    if '"' in rest:
        raise DiffError(f"{name}: quoted name in {line[:80]!r}")
    size = (len(rest) - 5) // 2
    path = rest[2 : 2 + max(size, 0)]
    if rest != f"a/{path} b/{path}":
        raise DiffError(f"{name}: {line[:80]!r} names two files, expected `a/PATH b/PATH`")
    return parse_relpath(path)


def _mode(text: str, path: RelPath, name: str) -> int:
    if text not in _MODES:
        raise DiffError(f"{name}: {path}: mode {text}, expected 100644 or 100755")
    return _MODES[text]


def _sides(source: str, target: str, path: RelPath, kind: Kind, name: str) -> None:
    expected = (
        "/dev/null" if kind == "create" else f"a/{path}",
        "/dev/null" if kind == "delete" else f"b/{path}",
    )
    if (source, target) != expected:
        raise DiffError(
            f"{name}: `--- {source}` and `+++ {target}`, expected {expected[0]} and {expected[1]}"
        )


def _hunk(raw: object, where: str) -> Hunk:
    before: list[bytes] = []
    after: list[bytes] = []
    kinds: list[str] = []
    for line in raw:  # type: ignore[attr-defined]
        tag, value = str(line.line_type), str(line.value)
        if tag == "\\":
            if value != _NO_NEWLINE or not kinds or kinds[-1] == "\\":
                raise DiffError(f"{where}: unexpected line {value.strip()!r}")
            for side, tags in ((before, " -"), (after, " +")):
                if kinds[-1] in tags:
                    side[-1] = side[-1][:-1]
        elif tag in (" ", "-", "+"):
            if tag in " -":
                before.append(value.encode("latin-1"))
            if tag in " +":
                after.append(value.encode("latin-1"))
        else:
            raise DiffError(f"{where}: blank line behind the hunk")
        kinds.append(tag)
    body = [k for k in kinds if k != "\\"]
    changes = [i for i, k in enumerate(body) if k != " "]
    if not changes:
        raise DiffError(f"{where}: changes nothing")
    for side in (before, after):
        if any(not line.endswith(b"\n") for line in side[:-1]):
            raise DiffError(f"{where}: a line without a newline is not the last one")
    old_count, new_count = raw.source_length, raw.target_length  # type: ignore[attr-defined]
    if (len(before), len(after)) != (old_count, new_count):
        raise DiffError(f"{where}: {len(before)} and {len(after)} lines, not as its header says")
    # An empty side is numbered by the line before it, any other by its first line.
    old_start = int(raw.source_start) - (1 if before else 0)  # type: ignore[attr-defined]
    new_start = int(raw.target_start) - (1 if after else 0)  # type: ignore[attr-defined]
    if old_start < 0 or new_start < 0:
        raise DiffError(f"{where}: starts at line 0")
    return Hunk(
        old_start,
        new_start,
        tuple(before),
        tuple(after),
        changes[0],
        len(body) - 1 - changes[-1],
    )


def _check_order(hunks: Sequence[Hunk], kind: Kind, where: str) -> None:
    end = shift = 0
    for i, hunk in enumerate(hunks, 1):
        if hunk.old_start < end:
            raise DiffError(f"{where}: hunk {i} overlaps the one before, or is out of order")
        if hunk.new_start != hunk.old_start + shift:
            raise DiffError(f"{where}: hunk {i}: its two line numbers do not agree")
        # Without context a hunk says nothing about where it belongs, except at
        # an end of the file, which `_place` then insists on (as git apply does).
        if (hunk.leading == 0 and hunk.old_start > 0) or (hunk.trailing == 0 and i < len(hunks)):
            raise DiffError(f"{where}: hunk {i} has no context", hint="git diff -U3")
        if any(not s[-1].endswith(b"\n") for s in (hunk.before, hunk.after) if s) and i < len(
            hunks
        ):
            raise DiffError(f"{where}: hunk {i} ends the file, but is not the last one")
        end = hunk.old_start + len(hunk.before)
        shift += len(hunk.after) - len(hunk.before)
    if kind == "modify":
        return
    whole = len(hunks) <= 1 and not any(h.before if kind == "create" else h.after for h in hunks)
    if not whole:
        raise DiffError(f"{where}: {kind}s the file, but has lines of the other side")


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
        raise HunkError(f"{diff.path}: {there}, and the patch {diff.kind}s it")
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
    if stop > len(lines) or (hunk.leading == 0 and at > 0):
        return False
    if hunk.trailing == 0 and stop < len(lines):
        return False
    return tuple(lines[at:stop]) == hunk.before


def _exact(hunk: Hunk, lines: Sequence[bytes], where: str) -> int:
    if _fits(hunk, lines, hunk.old_start):
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
    return repr(line[:80].decode("utf-8", "backslashreplace")) if line else "the end of the file"


def reverse(diff: FileDiff) -> FileDiff:
    """Return the diff that takes `diff` back."""
    kinds: dict[Kind, Kind] = {"modify": "modify", "create": "delete", "delete": "create"}
    hunks = tuple(
        Hunk(h.new_start, h.old_start, h.after, h.before, h.leading, h.trailing) for h in diff.hunks
    )
    return FileDiff(diff.path, kinds[diff.kind], hunks, diff.mode)


def render(path: RelPath, old: bytes | None, new: bytes | None, *, mode: int = 0o644) -> bytes:
    """Return the git diff from `old` to `new`; empty when they are equal.

    None stands for a file that is not there.
    """
    if old == new:
        return b""
    git_mode = "100755" if mode & 0o100 else "100644"
    head = [f"diff --git a/{path} b/{path}\n"]
    if old is None:
        head.append(f"new file mode {git_mode}\n")
    elif new is None:
        head.append(f"deleted file mode {git_mode}\n")
    suffix = f" {git_mode}" if old is not None and new is not None else ""
    head.append(f"index {git_blob(old)}..{git_blob(new)}{suffix}\n")
    a = [line.decode("latin-1") for line in split_lines(old or b"")]
    b = [line.decode("latin-1") for line in split_lines(new or b"")]
    names = (
        "/dev/null" if old is None else f"a/{path}",
        "/dev/null" if new is None else f"b/{path}",
    )
    body = (
        line if line.endswith("\n") else line + "\n\\" + _NO_NEWLINE
        for line in difflib.unified_diff(a, b, *names)
    )
    return "".join([*head, *body]).encode("latin-1")


def git_blob(data: bytes | None) -> str:
    """Return git's blob id of a content; all zeros for an absent file."""
    if data is None:
        return "0" * 40
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
