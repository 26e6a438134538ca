"""Reads git diffs, and refuses everything that is not a plain edit of a regular file. Pure.

One strict reading, line by line, on bytes: what a tool lets through or repairs,
two tools read differently, and that is how a diff comes to do more than its
reader saw. Called by `catalog`; touches no file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8ctl.errors import DiffError
from fp8ctl.patching.diff import FileDiff, Hunk, Kind
from fp8ctl.patching.names import RelPath, parse_relpath

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DIFF_BYTES = 1 << 20
MAX_HUNKS = 10_000

_GIT = b"diff --git "
_NUMBER = rb"(0|[1-9][0-9]{0,8})"
_HUNK = re.compile(rb"@@ -%b(?:,%b)? \+%b(?:,%b)? @@(?: .*)?" % ((_NUMBER,) * 4), re.DOTALL)
_INDEX = re.compile(rb"index ([0-9a-f]{4,64})\.\.([0-9a-f]{4,64})(?: ([0-7]{6}))?")
_MODE = re.compile(rb"(new|deleted) file mode ([0-7]{6})")
_MODES = {b"100644": 0o644, b"100755": 0o755}
_NO_NEWLINE = b"\\ No newline at end of file"
# What a line that does not belong is taken for, by how it begins; first match wins.
_FOREIGN = (
    (b"rename ", "a rename"),
    (b"copy ", "a copy"),
    (b"similarity index ", "a rename or a copy"),
    (b"dissimilarity index ", "a rewrite"),
    (b"old mode ", "a change of mode"),
    (b"new mode ", "a change of mode"),
    (b"GIT binary patch", "a binary patch"),
    (b"Binary files ", "a binary patch"),
    (b"diff --cc ", "a combined diff"),
    (b"diff --combined ", "a combined diff"),
    (b"@@@ ", "a combined diff"),
    (b"*** ", "a context diff"),
    (b"diff ", "a diff that is not git's"),
    (b"--- ", "a file without a `diff --git` line"),
    (b"-- ", "a mail signature"),
    (b"From ", "a mail header"),
    (b"From: ", "a mail header"),
    (b"Subject: ", "a mail header"),
    (b"Index: ", "a line for other version control"),
    (b"Prereq: ", "a line for other version control"),
)
_ED = re.compile(rb"(\d+(,\d+)?[acdis]|w|q|!.*|\.)")


@dataclass(slots=True)
class _Lines:
    """The lines of a diff without their ends, and the one to be read next.

    Attributes:
        name: what error messages call the diff.
        lines: all of them.
        at: index of the next one.
    """

    name: str
    lines: list[bytes]
    at: int = 0

    def peek(self) -> bytes | None:
        """Return the next line, None at the end."""
        return self.lines[self.at] if self.at < len(self.lines) else None

    def next_is(self, prefix: bytes) -> bool:
        """Tell whether the next line begins so."""
        return self.at < len(self.lines) and self.lines[self.at].startswith(prefix)

    def error(self, what: str, *, back: int = 0, hint: str | None = None) -> DiffError:
        """Return an error about the next line, or one that was read before it."""
        return DiffError(f"{self.name}: line {self.at - back + 1}: {what}", hint=hint)


def parse(
    data: bytes, *, name: str = "diff", max_bytes: int = MAX_DIFF_BYTES
) -> tuple[FileDiff, ...]:
    """Parse a git diff that touches one file or more.

    Args:
        data: the diff, nothing before its first `diff --git` line.
        name: what error messages call it.
        max_bytes: largest input accepted.

    Raises:
        DiffError: anything but plain edits, creations and deletions of regular files;
            the message has the line, and what was found there.
    """
    if len(data) > max_bytes:
        raise DiffError(f"{name}: {len(data)} bytes, expected at most {max_bytes}")
    if not data:
        raise DiffError(f"{name}: is empty, expected a git diff")
    if not data.endswith(b"\n"):
        raise DiffError(f"{name}: is cut off: its last line has no newline")
    # Split at "\n" alone: CR, form feed and the rest are part of a line.
    lines = _Lines(name, data[:-1].split(b"\n"))
    files: list[FileDiff] = []
    seen: set[RelPath] = set()
    hunks = 0
    while lines.peek() is not None:
        file = _file(lines, MAX_HUNKS - hunks)
        if file.path in seen:
            raise DiffError(f"{name}: {file.path} occurs twice, expected one diff for each file")
        seen.add(file.path)
        files.append(file)
        hunks += len(file.hunks)
    return tuple(files)


def _file(lines: _Lines, most_hunks: int) -> FileDiff:
    """Read one file's part, from its `diff --git` line on."""
    path = _path(lines)
    kind: Kind = "modify"
    mode = None
    found = _MODE.fullmatch(lines.peek() or b"")
    if found:
        kind = "create" if found[1] == b"new" else "delete"
        mode = _mode(lines, found[2])
        lines.at += 1
    index = _INDEX.fullmatch(lines.peek() or b"")
    if index:
        # GNU patch takes a file that is not there from its id, git from the line before.
        absent = tuple(not blob.strip(b"0") for blob in index.group(1, 2))
        if absent != (kind == "create", kind == "delete"):
            wanted = "zeros for a file that is not there, and for no other"
            raise lines.error(f"{_found(lines.peek())}, expected {wanted}")
        if index[3] is not None:
            _mode(lines, index[3])
        lines.at += 1
    hunks: list[Hunk] = []
    if lines.next_is(b"--- "):
        _side(lines, b"--- ", "/dev/null" if kind == "create" else f"a/{path}")
        _side(lines, b"+++ ", "/dev/null" if kind == "delete" else f"b/{path}")
        if not lines.next_is(b"@@ "):
            raise lines.error(f"{path}: {_found(lines.peek())}, expected a hunk")
        while lines.next_is(b"@@ "):
            if len(hunks) == most_hunks:
                raise lines.error(f"more than {MAX_HUNKS} hunks")
            hunks.append(_hunk(lines))
    elif kind == "modify":
        raise _foreign(lines, f"`--- a/{path}`")
    elif not index:
        raise _foreign(lines, "`index` or `---`")
    if lines.peek() is not None and not lines.next_is(_GIT):
        raise _foreign(lines, "a hunk or `diff --git`" if hunks else "`---` or `diff --git`")
    _check_order(hunks, kind, f"{lines.name}: {path}")
    return FileDiff(path, kind, tuple(hunks), mode)


def _path(lines: _Lines) -> RelPath:
    """Read `diff --git a/P b/P` and return P; its length follows from the line's."""
    if not lines.next_is(_GIT):
        raise _foreign(lines, "`diff --git a/PATH b/PATH`")
    rest = lines.lines[lines.at].removeprefix(_GIT).decode("latin-1")
    if '"' in rest:
        raise lines.error(f"a quoted name in {_show(rest)}", hint="use plain ASCII names")
    path = rest[2 : 2 + max((len(rest) - 5) // 2, 0)]
    if rest != f"a/{path} b/{path}":
        raise lines.error(f"{_show(rest)} is not one name twice, expected `a/PATH b/PATH`")
    try:
        checked = parse_relpath(path)
    except DiffError as e:
        raise lines.error(e.message, hint=e.hint) from e
    lines.at += 1
    return checked


def _mode(lines: _Lines, text: bytes) -> int:
    if text not in _MODES:
        kinds = {b"12": "a symbolic link", b"16": "a submodule", b"04": "a folder"}
        what = kinds.get(text[:2], "not a plain file")
        raise lines.error(f"mode {text.decode()} is {what}, expected 100644 or 100755")
    return _MODES[text]


def _side(lines: _Lines, prefix: bytes, name: str) -> None:
    """Read `--- a/P` or `+++ b/P`."""
    wanted = prefix + name.encode()
    if lines.peek() != wanted:
        raise lines.error(f"{_found(lines.peek())}, expected `{wanted.decode()}`")
    lines.at += 1


def _hunk(lines: _Lines) -> Hunk:
    """Read one hunk: exactly as many lines as its header counts."""
    head = _HUNK.fullmatch(lines.lines[lines.at])
    if head is None:
        raise lines.error(f"{_found(lines.peek())}, expected `@@ -LINE,COUNT +LINE,COUNT @@`")
    lines.at += 1
    old_line, old_count, new_line, new_count = (1 if n is None else int(n) for n in head.groups())
    before: list[bytes] = []
    after: list[bytes] = []
    tags = bytearray()
    while len(before) < old_count or len(after) < new_count:
        line = lines.peek()
        tag = line[:1] if line else b""
        if not tag or tag not in b" -+":
            left = f"{old_count - len(before)} old and {new_count - len(after)} new"
            raise lines.error(f"{_found(line)}, expected {left} lines more in this hunk")
        assert line is not None
        if tag != b"+":
            before.append(line[1:] + b"\n")
        if tag != b"-":
            after.append(line[1:] + b"\n")
        if len(before) > old_count or len(after) > new_count:
            raise lines.error("more lines in this hunk than its header counts")
        tags += tag
        lines.at += 1
        if lines.next_is(b"\\"):
            _marker(lines, tag, before, after)
    for side in (before, after):
        if any(not line.endswith(b"\n") for line in side[:-1]):
            raise lines.error("a line without a newline is not the last one", back=1)
    changes = [i for i, tag in enumerate(tags) if tag != ord(" ")]
    if not changes:
        raise lines.error("a hunk that changes nothing", back=1)
    # An empty side is numbered by the line before it, any other by its first line.
    old_start, new_start = old_line - (1 if before else 0), new_line - (1 if after else 0)
    if old_start < 0 or new_start < 0:
        raise lines.error("a hunk that starts at line 0", back=1)
    return Hunk(
        old_start,
        new_start,
        tuple(before),
        tuple(after),
        changes[0],
        len(tags) - 1 - changes[-1],
    )


def _marker(lines: _Lines, tag: bytes, before: list[bytes], after: list[bytes]) -> None:
    if lines.peek() != _NO_NEWLINE:
        raise lines.error(f"{_found(lines.peek())}, expected `{_NO_NEWLINE.decode()}`")
    if lines.lines[lines.at - 1] == tag:
        # Nothing at all: git takes it for no line, GNU patch stops with a write error.
        raise lines.error("an empty line without a newline is no line")
    lines.at += 1
    if tag != b"+":
        before[-1] = before[-1][:-1]
    if tag != b"-":
        after[-1] = after[-1][:-1]


def _check_order(hunks: Sequence[Hunk], kind: Kind, where: str) -> None:
    end = shift = 0
    for i, hunk in enumerate(hunks, 1):
        if hunk.old_start < end:
            raise DiffError(f"{where}: hunk {i} overlaps the one before, or is out of order")
        if hunk.new_start != hunk.old_start + shift:
            raise DiffError(f"{where}: hunk {i}: its two line numbers do not agree")
        # Context that is cut short on one side says that the file begins or ends there:
        # GNU patch insists on that, git apply where there is none at all, `diff.apply` always.
        if hunk.leading < max(hunk.trailing, 1) and hunk.old_start > 0:
            raise DiffError(f"{where}: hunk {i} lacks context in front", hint="git diff -U3")
        if hunk.trailing < max(hunk.leading, 1) and i < len(hunks):
            raise DiffError(f"{where}: hunk {i} lacks context behind", hint="git diff -U3")
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


def _foreign(lines: _Lines, expected: str) -> DiffError:
    """Return the error about a line that belongs to no file, with a word for what it is."""
    line = lines.peek()
    what = next((w for prefix, w in _FOREIGN if line and line.startswith(prefix)), None)
    if what is None and line is not None and _ED.fullmatch(line):
        what = "an ed script"
    if what is None:
        return lines.error(f"{_found(line)}, expected {expected}")
    return lines.error(
        f"{_found(line)} is {what}, expected {expected}",
        hint="write it with `git diff --no-renames`: edits, new files and removed files alone",
    )


def _found(line: bytes | None) -> str:
    return "the end" if line is None else _show(line.decode("utf-8", "backslashreplace"))


def _show(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
