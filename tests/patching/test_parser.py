"""What a diff may say, line by line. What it may not is in test_hostile.py."""

from __future__ import annotations

import pytest

from fp8ctl.errors import DiffError
from fp8ctl.patching import diff, parser
from fp8ctl.patching.diff import FileDiff, Hunk
from fp8ctl.patching.names import RelPath

P = RelPath("pkg/a.py")
Q = RelPath("pkg/b.py")
OLD = b"".join(b"line %d\n" % i for i in range(20))
NEW = OLD.replace(b"line 9\n", b"line nine\n")


def test_a_plain_edit_is_read_as_it_stands() -> None:
    text = (
        b"diff --git a/pkg/a.py b/pkg/a.py\n"
        b"index 1234567..89abcde 100644\n"
        b"--- a/pkg/a.py\n"
        b"+++ b/pkg/a.py\n"
        b"@@ -2,4 +2,5 @@ def f(): # \xff\n"
        b" one\n"
        b"-two\r\n"
        b"+2\n"
        b"+\n"
        b" \n"
        b"-end\n"
        b"\\ No newline at end of file\n"
        b"+end\n"
    )
    before = (b"one\n", b"two\r\n", b"\n", b"end")
    after = (b"one\n", b"2\n", b"\n", b"\n", b"end\n")
    hunk = Hunk(1, 1, before, after, leading=1, trailing=0)
    assert parser.parse(text) == (FileDiff(P, "modify", (hunk,)),)


@pytest.mark.parametrize("index", [b"", b"index 1234..5678\n", b"index 1234567..89abcde 100755\n"])
@pytest.mark.parametrize("head", [b"@@ -1 +1 @@", b"@@ -1,1 +1 @@", b"@@ -1 +1,1 @@ x"])
def test_an_index_line_and_a_count_of_one_may_be_left_out(index: bytes, head: bytes) -> None:
    text = b"diff --git a/p b/p\n" + index + b"--- a/p\n+++ b/p\n" + head + b"\n-a\n+b\n"
    (file,) = parser.parse(text)
    assert file == FileDiff(RelPath("p"), "modify", (Hunk(0, 0, (b"a\n",), (b"b\n",), 0, 0),))


def test_what_a_hunk_adds_moves_those_behind_it() -> None:
    lines = [b"%d\n" % n for n in range(40)]
    new = [*lines[:9], b"a\n", b"b\n", *lines[9:25], *lines[28:]]
    text = diff.render(P, b"".join(lines), b"".join(new))
    assert b"@@ -7,6 +7,8 @@" in text
    assert b"@@ -23,9 +25,6 @@" in text
    (file,) = parser.parse(text)
    assert [(h.old_start, h.new_start) for h in file.hunks] == [(6, 6), (22, 24)]
    with pytest.raises(DiffError, match=r"a\.py: hunk 2: its two line numbers do not agree"):
        parser.parse(text.replace(b"+25,6", b"+21,6"))


@pytest.mark.parametrize("mode", [0o644, 0o755])
@pytest.mark.parametrize("data", [b"", b"x\n", b"x"])
def test_files_are_made_and_removed_with_their_mode(mode: int, data: bytes) -> None:
    (made,) = parser.parse(diff.render(P, None, data, mode=mode))
    (removed,) = parser.parse(diff.render(P, data, None, mode=mode))
    assert (made.kind, made.mode, removed.kind, removed.mode) == ("create", mode, "delete", mode)
    assert diff.apply(made, None).data == data
    assert diff.apply(removed, data).data is None
    assert len(made.hunks) == len(removed.hunks) == bool(data)


def test_several_files_come_in_their_order() -> None:
    text = (
        diff.render(Q, OLD, NEW) + diff.render(RelPath("e"), None, b"") + diff.render(P, NEW, OLD)
    )
    assert [f.path for f in parser.parse(text)] == [Q, "e", P]


def test_as_much_as_is_allowed_is_taken_and_no_more() -> None:
    text = diff.render(P, OLD, NEW)
    assert parser.parse(text, max_bytes=len(text))
    with pytest.raises(
        DiffError, match=f"name: {len(text)} bytes, expected at most {len(text) - 1}"
    ):
        parser.parse(text, name="name", max_bytes=len(text) - 1)
    assert parser.MAX_DIFF_BYTES == 1 << 20
    with pytest.raises(DiffError, match="expected at most 1048576"):
        parser.parse(b"x" * (1 << 20) + b"\n")


def test_as_many_hunks_as_are_allowed_are_taken_and_no_more() -> None:
    def text(count: int) -> bytes:
        head = b"diff --git a/pkg/a.py b/pkg/a.py\n--- a/pkg/a.py\n+++ b/pkg/a.py\n"
        hunk = b"@@ -%d,3 +%d,3 @@\n x\n-y\n+z\n x\n"
        return head + b"".join(hunk % (n, n) for n in range(1, 3 * count, 3))

    assert parser.MAX_HUNKS == 10_000
    half = text(4_000)
    rest = text(2_000)
    assert len(parser.parse(half)[0].hunks) == 4_000
    other = half.replace(b"pkg/a.py", b"pkg/b.py")
    whole = half + other + rest.replace(b"pkg/a.py", b"pkg/c.py")
    assert sum(len(f.hunks) for f in parser.parse(whole)) == 10_000
    with pytest.raises(DiffError, match="more than 10000 hunks"):
        parser.parse(whole + text(1).replace(b"pkg/a.py", b"pkg/d.py"))


def test_messages_name_the_diff_the_line_and_what_was_found() -> None:
    text = diff.render(P, OLD, NEW)
    with pytest.raises(DiffError) as e:
        parser.parse(text + b"what\n", name="x")
    assert e.value.message == "x: line 14: 'what', expected a hunk or `diff --git`"
    with pytest.raises(DiffError) as e:
        parser.parse(diff.render(P, None, b"") + b"what\n", name="x")
    assert e.value.message == "x: line 4: 'what', expected `---` or `diff --git`"
    for number, line in enumerate(text.splitlines(keepends=True)[:-1], 1):
        mangled = text.replace(line, b"\x1b[31mwhat\n", 1)
        with pytest.raises(DiffError) as e:
            parser.parse(mangled, name="0001-x.patch")
        assert e.value.message.startswith(f"0001-x.patch: line {number}: "), e.value.message
        assert "what" in e.value.message
        assert "\x1b" not in e.value.message


def test_a_long_line_is_cut_in_messages() -> None:
    with pytest.raises(DiffError) as e:
        parser.parse(b"x" * 5_000 + b"\n")
    assert len(e.value.message) < 200
