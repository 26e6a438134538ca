"""Input that wants out of its folder, or costs too much: refused, by what was found.

Classes from the bugs of other patch tools (CVE-2010-4651, -2014-3227, -2015-1196, -2018-1000156,
-2023-23946 and their kin) and from the hazards that git's own t41xx scripts test. Every refusal
has a twin beside it that is taken, so that it is the hazard that is refused.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import CatalogError, ConflictError, DiffError, DriftError, Fp8ctlError
from fp8ctl.patching import catalog, diff, parser
from fp8ctl.patching.names import RelPath

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
P = RelPath("pkg/a.py")
OLD = b"".join(b"line %d\n" % i for i in range(20))
NEW = OLD.replace(b"line 9\n", b"line nine\n")
GOOD = diff.render(P, OLD, NEW)
BIG = diff.render(P, OLD, OLD.replace(b"e 4\n", b"e four\n").replace(b"e 14\n", b"e x\n"))
HEAD, INDEX = (line + b"\n" for line in GOOD.split(b"\n")[:2])
SIDES = b"--- a/pkg/a.py\n+++ b/pkg/a.py\n"
HUNK = GOOD[GOOD.index(b"@@") :]


def named(path: bytes, text: bytes = GOOD) -> bytes:
    return text.replace(b"pkg/a.py", path)


def but(old: bytes, new: bytes, text: bytes = GOOD) -> bytes:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def made(mode: bytes, text: bytes = b"target") -> bytes:
    body = b"@@ -0,0 +1 @@\n+" + text + b"\n\\ No newline at end of file\n"
    return HEAD + b"new file mode " + mode + b"\n--- /dev/null\n+++ b/pkg/a.py\n" + body


# name: (diff, what the reason says); grouped by what they attack.
REFUSED: dict[str, tuple[bytes, str]] = {
    # Where a name may lead.
    "absolute": (named(b"/etc/x"), "path '/etc/x' is absolute"),
    "parent": (named(b"../x.py"), "has the component '..'"),
    "parent inside": (named(b"pkg/../../x.py"), "has the component '..'"),
    "parent at the end": (named(b"pkg/.."), "has the component '..'"),
    "here": (named(b"./x.py"), "has the component '.'"),
    "empty component": (named(b"pkg//a.py"), "has the component ''"),
    "folder": (named(b"pkg/"), "has the component ''"),
    "drive": (named(b"C:/x.py"), "path 'C:/x.py' is absolute"),
    "drive without a slash": (named(b"c:x.py"), "path 'c:x.py' is absolute"),
    "backslash": (named(b"pkg\\a.py"), "backslash"),
    "UNC": (named(b"\\\\host\\x"), "backslash"),
    "NUL": (named(b"pkg/a\0.py"), "control"),
    "escape sequence": (named(b"pkg/\x1b[2J.py"), "control"),
    "tab": (named(b"pkg/a\t.py"), "control"),
    "space": (named(b"pkg/a b.py"), "space"),
    "not ASCII": (named(b"pkg/\xc3\xa9.py"), "non-ASCII"),
    "quoted": (named(b'pkg/a".py'), "quoted name"),
    "quoted as git does": (
        but(b"a/pkg/a.py b/pkg/a.py", b'"a/pkg/\\303\\251.py" "b/pkg/\\303\\251.py"'),
        "quoted name",
    ),
    "fp8ctl's own folder": (named(b".fp8ctl/ledger.json"), "fp8ctl's own folder"),
    "no name": (but(b" a/pkg/a.py b/pkg/a.py", b" a/ b/"), "path '' is empty"),
    "nothing at all": (but(b" a/pkg/a.py b/pkg/a.py", b" "), "not one name twice"),
    "deep": (named(b"/".join([b"d"] * 600)), "1199 characters, expected at most 1024"),
    "long component": (named(b"x" * 201), "201 characters, limit 200"),
    # Two names for one file.
    "other prefixes": (GOOD.replace(b"a/pkg", b"w/pkg"), "not one name twice"),
    "no prefixes": (GOOD.replace(b"a/pkg", b"pkg").replace(b"b/pkg", b"pkg"), "not one name twice"),
    "combined diff of several": (b"diff --combined a\n", "is a combined diff, expected"),
    "combined hunk behind a diff": (GOOD + b"@@@ -1 -1 +1 @@@\n", "is a combined diff, expected"),
    "another name in the header": (
        but(b" b/pkg/a.py\nindex", b" b/pkg/b.py\nindex"), "not one name twice"
    ),
    "another old name": (but(b"--- a/pkg/a.py", b"--- a/pkg/b.py"), "expected `--- a/pkg/a.py`"),
    "another new name": (but(b"+++ b/pkg/a.py", b"+++ b/pkg/b.py"), "expected `+++ b/pkg/a.py`"),
    "escaping new name": (but(b"+++ b/pkg/a.py", b"+++ b/../x"), "'+++ b/../x', expected"),
    "name with a time": (but(b"--- a/pkg/a.py", b"--- a/pkg/a.py\t2025-01-01"), "expected `---"),
    "name with a CR": (but(b"--- a/pkg/a.py\n", b"--- a/pkg/a.py\r\n"), "expected `---"),
    "header with CRs": (GOOD.replace(b"\n", b"\r\n"), "not one name twice"),
    "old side is missing": (but(b"--- a/pkg/a.py", b"--- /dev/null"), "'--- /dev/null', expected"),
    "new side is missing": (but(b"+++ b/pkg/a.py", b"+++ /dev/null"), "'+++ /dev/null', expected"),
    "sides swapped": (but(SIDES, b"+++ b/pkg/a.py\n--- a/pkg/a.py\n"), "'+++ b/pkg/a.py', exp"),
    "two diffs for one file": (GOOD + GOOD, "pkg/a.py occurs twice"),
    "made and edited": (
        diff.render(P, None, OLD) + GOOD, "pkg/a.py occurs twice"
    ),
    # What is no regular file, and what is no edit.
    "symbolic link": (made(b"120000"), "mode 120000 is a symbolic link"),
    "submodule": (made(b"160000", b"Subproject commit " + b"0" * 40), "160000 is a submodule"),
    "folder's mode": (made(b"040000"), "mode 040000 is a folder"),
    "setuid": (made(b"104755"), "mode 104755 is not a plain file"),
    "group may write": (made(b"100664"), "mode 100664 is not a plain file"),
    "no mode": (made(b"644"), "'new file mode 644', expected `--- a/pkg/a.py`"),
    "symbolic link by its index": (but(b" 100644\n", b" 120000\n"), "120000 is a symbolic link"),
    "submodule by its index": (but(b" 100644\n", b" 160000\n"), "160000 is a submodule"),
    "link removed": (
        HEAD + b"deleted file mode 120000\n" + SIDES + HUNK, "120000 is a symbolic link"
    ),
    "rename": (HEAD + b"rename from pkg/a.py\nrename to pkg/b.py\n", "is a rename, expected"),
    "rename with its index": (HEAD + b"similarity index 90%\nrename from x\n", "is a rename or"),
    "copy": (HEAD + b"copy from pkg/a.py\ncopy to pkg/b.py\n", "is a copy, expected"),
    "rewrite": (HEAD + b"dissimilarity index 90%\n" + INDEX + SIDES + HUNK, "is a rewrite,"),
    "change of mode": (HEAD + b"old mode 100644\nnew mode 100755\n", "is a change of mode,"),
    "change of mode and text": (
        HEAD + b"old mode 100644\nnew mode 100755\n" + INDEX + SIDES + HUNK, "is a change of mode,"
    ),
    "made from something": (
        HEAD + b"new file mode 100644\nindex 0000100..e69de29\n", "expected zeros for a file that"
    ),
    "removed and not gone": (
        HEAD + b"deleted file mode 100644\nindex e69de29..0000100\n", "expected zeros for a file"
    ),
    "edited and gone": (
        but(INDEX, b"index 1234567..0000000 100644\n"), "0000000 100644', expected zeros"
    ),
    "edited from nothing": (
        but(INDEX, b"index 0000000..1234567 100644\n"), "1234567 100644', expected zeros"
    ),
    "made empty without an index": (HEAD + b"new file mode 100644\n", "expected `index` or `---`"),
    "made twice over": (
        HEAD + b"new file mode 100644\nnew file mode 100644\n", "'new file mode 100644', expected"
    ),
    "made and removed": (
        HEAD + b"new file mode 100644\ndeleted file mode 100644\n", "'deleted file mode 100644'"
    ),
    "made with old lines": (
        HEAD + b"new file mode 100644\n--- /dev/null\n+++ b/pkg/a.py\n" + HUNK,
        "creates the file, but",
    ),
    "removed with lines left": (
        HEAD + b"deleted file mode 100644\n--- a/pkg/a.py\n+++ /dev/null\n" + HUNK,
        "deletes the file, but",
    ),
    "made in two hunks": (
        HEAD + b"new file mode 100644\n--- /dev/null\n+++ b/pkg/a.py\n"
        + b"@@ -0,0 +1 @@\n+a\n@@ -0,0 +2 @@\n+b\n", "lacks context behind"
    ),
    "binary": (HEAD + INDEX + b"Binary files a/pkg/a.py and b/pkg/a.py differ\n", "a binary patch"),
    "binary patch": (
        HEAD + INDEX + b"GIT binary patch\nliteral 1\nIcmZQz00IC2\n\n", "is a binary patch,"
    ),
    "header only": (HEAD + INDEX, "line 3: the end, expected `--- a/pkg/a.py`"),
    "names only": (HEAD + SIDES, "the end, expected a hunk"),
    # Other languages.
    "empty": (b"", "is empty"),
    "a newline": (b"\n", "line 1: '', expected `diff --git"),
    "garbage": (b"hello\n", "'hello', expected `diff --git"),
    "ed script": (b"1d\nw\n", "'1d' is an ed script, expected"),
    "ed script that runs a shell": (b"!touch /tmp/x\n", "is an ed script, expected"),
    "ed script behind a diff": (GOOD + b"1,2c\nx\n.\nw\n", "'1,2c' is an ed script, expected"),
    "normal diff": (b"1c1\n< a\n---\n> b\n", "'1c1', expected"),
    "context diff": (b"*** a/x\n--- b/x\n***************\n*** 1 ****\n", "is a context diff,"),
    "context diff behind a diff": (GOOD + b"*** a/x\n--- b/x\n", "is a context diff, expected"),
    "plain unified diff": (SIDES + HUNK, "is a file without a `diff --git` line, expected"),
    "plain unified diff behind": (GOOD + SIDES + HUNK, "a file without a `diff --git` line,"),
    "diff -ru": (b"diff -ru a/pkg/a.py b/pkg/a.py\n" + SIDES + HUNK, "a diff that is not git's,"),
    "combined diff": (b"diff --cc pkg/a.py\n", "is a combined diff, expected"),
    "combined hunk": (HEAD + INDEX + SIDES + b"@@@ -1 -1 +1 @@@\n", "'@@@ -1 -1 +1 @@@', expected"),
    "mail": (b"From 0123 Mon Sep 17 00:00:00 2001\n" + GOOD, "is a mail header, expected"),
    "mail sender": (b"From: me\n" + GOOD, "'From: me' is a mail header, expected"),
    "mail header": (b"Subject: x\n\n" + GOOD, "is a mail header, expected"),
    "mail signature": (GOOD + b"-- \n2.39.5\n", "'-- ' is a mail signature, expected"),
    "Index": (b"Index: pkg/a.py\n" + SIDES + HUNK, "a line for other version control, expected"),
    "Prereq": (HEAD + b"Prereq: 1.0\n" + SIDES + HUNK, "a line for other version control,"),
    "shell": (b"#!/bin/sh\nrm -rf x\n", "'#!/bin/sh', expected"),
    "gzip": (b"\x1f\x8b\x08\0\n", "expected `diff --git"),
    "UTF-16": ("diff --git a/x b/x\n".encode("utf-16"), "cut off"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "expected `diff --git"),
    # Counts, numbers and order.
    "cut off": (GOOD[:-1], "cut off"),
    "one line short": (GOOD[: GOOD.rindex(b" line 12")], "the end, expected 1 old and 1 new lines"),
    "trailing blank line": (GOOD + b"\n", "line 14: '', expected a hunk or `diff --git`"),
    "line beyond the count": (GOOD + b"+extra\n", "'+extra', expected a hunk"),
    "context beyond the count": (GOOD + b" line 13\n", "' line 13', expected a hunk"),
    "blank line in a hunk": (but(b" line 8\n", b"\n"), "line 8: '', expected 5 old and 5 new"),
    "a tab for a blank": (but(b" line 8\n", b"\tline 8\n"), "'\\tline 8', expected"),
    "old count too large": (but(b"-7,7", b"-7,8"), "the end, expected 1 old and 0 new"),
    "new count too large": (but(b"+7,7", b"+7,8"), "the end, expected 0 old and 1 new"),
    "old count too small": (but(b"-7,7", b"-7,6"), "more lines in this hunk than its header"),
    "new count too small": (but(b"+7,7", b"+7,6"), "more lines in this hunk than its header"),
    "huge count": (but(b"-7,7", b"-7,999999999"), "expected 999999992 old"),
    "count beyond any file": (but(b"-7,7", b"-7,99999999999999999999"), "expected `@@ -LINE"),
    "line beyond any file": (but(b"-7,7", b"-" + b"9" * 5_000 + b",7"), "expected `@@ -LINE"),
    "negative count": (but(b"-7,7", b"-7,-7"), "expected `@@ -LINE"),
    "zero-padded count": (but(b"-7,7", b"-07,7"), "expected `@@ -LINE"),
    "hexadecimal": (but(b"-7,7", b"-0x7,7"), "expected `@@ -LINE"),
    "no count": (but(b"@@ -7,7 +7,7 @@", b"@@ -7, +7, @@"), "expected `@@ -LINE"),
    "header without its end": (but(b" @@\n", b"\n"), "expected `@@ -LINE"),
    "header and no blank": (but(b" @@\n", b" @@x\n"), "expected `@@ -LINE"),
    "line numbers that disagree": (but(b"+7,7", b"+8,7"), "two line numbers do not agree"),
    "line 0": (but(b"-7,7 +7,7", b"-0,7 +0,7"), "line 13: a hunk that starts at line 0"),
    "overlapping hunks": (GOOD + HUNK, "overlaps the one before, or is out of order"),
    "hunks out of order": (
        BIG[: BIG.index(b"@@ -2,")] + BIG[BIG.index(b"@@ -12,") :]
        + BIG[BIG.index(b"@@ -2,") : BIG.index(b"@@ -12,")],
        "out of order",
    ),
    "no context": (
        HEAD + SIDES + b"@@ -9 +9 @@\n-line 8\n+x\n", "hunk 1 lacks context in front"
    ),
    "context on one side": (
        HEAD + SIDES + b"@@ -9,2 +9,2 @@\n a\n-b\n+x\n@@ -15,3 +15,3 @@\n a\n-b\n+c\n d\n",
        "hunk 1 lacks context behind",
    ),
    "less context in front": (
        HEAD + SIDES + b"@@ -9,4 +9,4 @@\n a\n-b\n+c\n d\n e\n", "lacks context in front"
    ),
    "no change": (HEAD + SIDES + b"@@ -1 +1 @@\n line 0\n", "a hunk that changes nothing"),
    "empty hunk": (HEAD + SIDES + b"@@ -0,0 +0,0 @@\n", "a hunk that changes nothing"),
    "marker first": (
        HEAD + SIDES + b"@@ -1 +1 @@\n\\ No newline at end of file\n-a\n+b\n",
        "expected 1 old and 1 new",
    ),
    "marker in the middle": (
        but(b" line 8\n", b" line 8\n\\ No newline at end of file\n"), "a line without a newline is"
    ),
    "marker in a hunk that is not the last": (
        HEAD + SIDES + b"@@ -1,3 +1,3 @@\n a\n-b\n+c\n d\n\\ No newline at end of file\n"
        + b"@@ -8,3 +8,3 @@\n a\n-b\n+c\n d\n",
        "hunk 1 ends the file, but is not the last",
    ),
    "marker behind nothing": (
        HEAD + SIDES + b"@@ -1 +1,2 @@\n a\n+\n\\ No newline at end of file\n",
        "line 7: an empty line without a newline is no line",
    ),
    "marker twice": (
        GOOD + b"\\ No newline at end of file\n\\ No newline at end of file\n", "expected a hunk"
    ),
    "marker in another language": (GOOD + b"\\ Kein Zeilenumbruch\n", "expected `\\ No newline"),
    "marker behind a header": (HEAD + b"\\ No newline at end of file\n" + SIDES, "expected `---"),
}  # fmt: skip


def test_the_diffs_that_the_others_are_made_of_are_taken() -> None:
    (one,) = parser.parse(GOOD)
    assert diff.apply(one, OLD).data == NEW
    assert len(parser.parse(BIG)[0].hunks) == 2
    (file,) = parser.parse(made(b"100755"))
    assert (diff.apply(file, None).data, file.mode) == (b"target", 0o755)
    for path in (b"d/" * 500 + b"a.py", b"x" * 200, b"w/a,b=c@~#%+.json", b"..a/b..", b"..."):
        (file,) = parser.parse(named(path))
        assert file.path == path.decode()


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_a_reason_that_names_what_was_found(name: str) -> None:
    text, reason = REFUSED[name]
    with pytest.raises(DiffError) as e:
        parser.parse(text, name="0001-x.patch")
    assert reason in e.value.message
    assert e.value.message.startswith("0001-x.patch: ")
    assert e.value.message.isprintable()
    assert len(e.value.message) < 1_600


# --- nothing outside the tree changes -----


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """Give a folder outside site-packages, and see that not one byte or time of it changes."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.py", "b.py", "sub/a.py"):
        (folder / name).write_bytes(b"canary\n")
        os.utime(folder / name, ns=(1, 1))
    os.utime(folder / "sub", ns=(1, 1))
    os.utime(folder, ns=(1, 1))
    before = _stamped(folder)
    yield folder
    assert _stamped(folder) == before


def _stamped(folder: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        info = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (data, info.st_mtime_ns, info.st_mode, info.st_ino, info.st_nlink)
    return found


def _state(site: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(site.rglob("*")):
        kind = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        )
        found[str(path)] = kind
    return found


A = "sglang/srt/a.py"
TRAPS = {
    "a link for the file": (A, "outside/a.py"),
    "a link that leads nowhere": (A, "nowhere/a.py"),
    "a link for its folder": ("sglang/srt", "outside"),
    "a link for the package": ("sglang", "outside"),
    "a link inside the tree": (A, "site/sglang/untouched.py"),
    "a link for the store": (".fp8ctl", "outside"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_link_in_the_tree_is_refused_by_name_and_followed_by_nobody(
    lab: Any, canary: Path, tmp_path: Path, name: str
) -> None:
    lab.patch("first")
    lab.revert()
    place, target = TRAPS[name]
    path = lab.site / place
    moved = tmp_path / "moved"
    if path.exists():
        path.rename(moved)
    path.symlink_to(tmp_path / target)
    before = _state(lab.site)
    # An installer may have linked a file into its cache: that is read, and judged by its hash.
    refused, told = (DriftError, None) if place == A else (ConflictError, "symbolic link")
    with pytest.raises(refused, match=told) as e:
        lab.patch("first")
    assert place in e.value.message
    assert _state(lab.site) == before
    path.unlink()
    if moved.exists():
        moved.rename(path)
    lab.patch("first")
    assert lab.status().applied == {"first"}


def test_a_folder_that_becomes_a_link_between_the_plan_and_the_change_is_not_followed(
    lab: Any, canary: Path, tmp_path: Path
) -> None:
    from fp8ctl.patching import transaction
    from fp8ctl.patching.fsops import Root
    from fp8ctl.patching.plan import plan_patch
    from fp8ctl.patching.status import take

    original = lab.read(A)
    with Root(lab.site) as root, transaction.begin(root):
        plan = plan_patch(lab.series, take(root, lab.series), asked=["first"])
        (lab.site / "sglang/srt").rename(tmp_path / "moved")
        (lab.site / "sglang/srt").symlink_to(canary)
        with pytest.raises(ConflictError, match="symbolic link"):
            transaction.run(root, [plan], python_version=(3, 11))
    assert (tmp_path / "moved" / "a.py").read_bytes() == original


@pytest.mark.parametrize("name", ["absolute", "parent", "symbolic link", "rename", "binary patch"])
def test_a_hostile_diff_in_a_series_is_a_damaged_series_that_names_it(
    lab: Any, canary: Path, name: str, refresh: Any
) -> None:
    before = lab.tree()
    folder = lab.series.folder
    (folder / "0001-first.patch").write_bytes(REFUSED[name][0])
    with pytest.raises(CatalogError, match=r"0001-first\.patch: sha256 is"):
        catalog.load_folder(folder)
    # With a hash that agrees, too; and for the tool that makes the hashes.
    for body in (
        lambda: catalog.load_folder(folder, verify=False, images=False),
        lambda: refresh.generate(folder, lab.site),
    ):
        with pytest.raises(CatalogError, match=r"0001-first\.patch: ") as e:
            body()
        assert REFUSED[name][1] in e.value.message
    assert lab.tree() == before


@pytest.mark.parametrize("path", ["other/x.py", "sglang-0.4.8.dist-info/RECORD", "sglangx/a.py"])
def test_a_diff_of_another_package_s_file_is_refused(lab: Any, path: str, refresh: Any) -> None:
    text = diff.render(RelPath(path), None, b"x\n")
    (lab.series.folder / "0001-first.patch").write_bytes(text)
    with pytest.raises(CatalogError, match="touches") as e:
        refresh.generate(lab.series.folder, lab.site)
    assert path in e.value.message


# --- time and memory -----

# Each builds a diff, or a diff and a file, that costs a careless engine minutes or gigabytes.
COSTLY = {
    "one line of a MiB": "parse(b'x' * (MIB - 1) + b'\\n')",
    "a MiB of newlines": "parse(b'\\n' * MIB)",
    "a MiB of hunk headers": "parse(HEAD + b'@@ -1 +1 @@\\n' * (MIB // 12 - 9))",
    "a MiB of files": "parse(b'diff --git a/p b/p\\n' * (MIB // 19))",
    "a MiB of names": "parse(b'diff --git ' + b'a/' * (MIB // 2 - 99) + b'\\n')",
    "a MiB of new files": "parse(b''.join(b'diff --git a/%06d b/%06d\\nnew file mode 100644\\n' "
    "% (i, i) for i in range(MIB // 50)))",
    "huge counts": "parse(HEAD + b'@@ -1,%d +1,%d @@\\n' % (BIG, BIG) + b' x\\n' * (MIB // 4))",
    "only context": "parse(HEAD + b'@@ -1,%d +1,%d @@\\n' % (N, N + 1) + b' \\n' * N + b'+\\n')",
    "a MiB of digits": "parse(HEAD + b'@@ -' + b'9' * (MIB - 99) + b' +1 @@\\n')",
    "a MiB of markers": "parse(HEAD + b'@@ -1 +1 @@\\n-a\\n' + MARKER * (MIB // 30))",
    "a MiB of blanks in a header": "parse(HEAD + b'@@ -1 +1 @@' + b' ' * (MIB - 99) + b'x\\r\\n')",
    "a file of newlines": "find(b'\\n' * 1000, b'\\n' * (4 * MIB))",
    "a file of two lines in turns": "find(b'a\\n' * 1000 + b'b\\n' * 1000, b'a\\nb\\n' * MIB)",
    "a file of one long line": "find(b'a\\n' * 1000, b'a' * 4 * MIB)",
    "hunks that are everywhere": "find(b'a\\nb\\n' * 60_000, b'a\\nb\\n' * MIB)",
    "a file that is too long": "find(b'a\\n', b'a' * (4 * MIB + 1))",
}
PRELUDE = """
import resource, sys
MIB, N, BIG = 1 << 20, (1 << 18) - 99, 999_999_999
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
from fp8ctl.errors import Fp8ctlError
from fp8ctl.patching import diff, parser
HEAD = b"diff --git a/p b/p\\n--- a/p\\n+++ b/p\\n"
MARKER = b"\\\\ No newline at end of file\\n"
def parse(text):
    return parser.parse(text)
def find(old, base):
    n = old.count(b"\\n")
    body = b"".join(b" " + line + b"\\n" for line in old.split(b"\\n")[:-1])
    (change,) = parser.parse(HEAD + b"@@ -1,%d +1,%d @@\\n" % (n + 1, n) + body + b"-a\\n")
    for search in (False, True):
        try:
            diff.apply(change, base, search=search)
        except Fp8ctlError as e:
            print(search, e.message)
"""


@pytest.mark.parametrize("name", COSTLY)
def test_no_input_costs_more_than_seconds_and_a_gibibyte(name: str) -> None:
    script = (
        f"{PRELUDE}\ntry:\n    {COSTLY[name]}\nexcept Fp8ctlError as e:\n    print(e.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_an_error_is_always_of_the_tree() -> None:
    """Every prefix and every suffix of a diff is read, or refused with one of our errors."""
    text = (
        BIG + diff.render(RelPath("pkg/new.py"), None, b"x") + diff.render(RelPath("e"), b"", None)
    )
    for at in range(len(text)):
        for part in (text[:at], text[at:], text[:at] + b"\n"):
            try:
                parser.parse(part)
            except Fp8ctlError:
                continue
