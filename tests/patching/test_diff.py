from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8ctl.errors import HunkError
from fp8ctl.patching import diff, parser
from fp8ctl.patching.names import RelPath

if TYPE_CHECKING:
    from pathlib import Path

P = RelPath("pkg/a.py")
OLD = b"".join(b"line %d\n" % i for i in range(20))
NEW = OLD.replace(b"line 9\n", b"line nine\n")
GOOD = diff.render(P, OLD, NEW)

# Every kind of end and every line that looks like part of a diff.
LINE = st.sampled_from(
    [
        b"", b"x", b"y", b"same", b"same", b"\r", b"a\rb", b"\x0c", b"\x0b", b"\xe2\x80\xa8",
        b"\xff\x80", b"-- a/x", b"++ b/x", b"@@ -1 +1 @@", b"diff --git a/x b/x",
        b"\\ No newline at end of file", b" lead", b"\tb", b"-", b"+",
    ]
)  # fmt: skip
CONTENT = st.builds(
    lambda lines, end: b"\n".join(lines) + (b"\n" if end and lines else b""),
    st.lists(LINE, max_size=14),
    st.booleans(),
)


def one(data: bytes) -> diff.FileDiff:
    (file,) = parser.parse(data)
    return file


class TestLaws:
    @given(CONTENT, CONTENT)
    @settings(max_examples=150, deadline=None)
    def test_apply_gives_the_new_bytes_and_reverse_the_old_ones(
        self, old: bytes, new: bytes
    ) -> None:
        if old == new:
            return
        change = one(diff.render(P, old, new))
        assert diff.apply(change, old) == diff.Applied(new, (0,) * len(change.hunks))
        assert diff.apply(diff.reverse(change), new).data == old
        assert diff.reverse(diff.reverse(change)) == change

    @given(CONTENT)
    @settings(max_examples=40, deadline=None)
    def test_a_created_file_is_made_and_its_reverse_removes_it(self, new: bytes) -> None:
        change = one(diff.render(P, None, new, mode=0o755))
        assert (change.kind, change.mode) == ("create", 0o755)
        assert diff.apply(change, None).data == new
        back = diff.reverse(change)
        assert diff.apply(back, new).data is None
        assert diff.reverse(back) == change
        # There is one place for it, and a search finds that.
        assert diff.apply(change, None, search=True) == diff.apply(change, None)

    @given(CONTENT)
    @settings(max_examples=20, deadline=None)
    def test_equal_contents_have_an_empty_diff(self, content: bytes) -> None:
        assert diff.render(P, content, content) == diff.render(P, None, None) == b""

    @given(CONTENT, CONTENT, CONTENT)
    @settings(max_examples=100, deadline=None)
    def test_a_search_never_gives_other_bytes_than_the_exact_place(
        self, old: bytes, new: bytes, base: bytes
    ) -> None:
        if old == new:
            return
        change = one(diff.render(P, old, new))
        for content in (old, base):
            try:
                found = diff.apply(change, content, search=True)
            except HunkError:
                continue
            if not any(found.offsets):
                assert found == diff.apply(change, content)


class TestAgainstGit:
    @pytest.mark.parametrize("old_end", [b"", b"\n"])
    @pytest.mark.parametrize("new_end", [b"", b"\n"])
    @pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
    def test_what_git_writes_is_read_and_what_is_rendered_git_applies(
        self, tmp_path: Path, old_end: bytes, new_end: bytes, eol: bytes
    ) -> None:
        old = eol.join(b"l%d" % i for i in range(9)) + old_end
        new = old.replace(b"l4", b"L4").removesuffix(old_end) + new_end
        file = tmp_path / P
        file.parent.mkdir()
        _git(tmp_path, "init", "-q")
        file.write_bytes(old)
        _git(tmp_path, "add", "-f", P)
        file.write_bytes(new)
        by_git = _git(tmp_path, "-c", "core.autocrlf=false", "diff", "--no-color", "--", P)
        assert diff.apply(one(by_git), old).data == new
        file.write_bytes(old)
        _git(tmp_path, "apply", "-", stdin=diff.render(P, old, new))
        assert file.read_bytes() == new

    @pytest.mark.parametrize("mode", [0o644, 0o755, 0o744, 0o611])
    def test_the_lines_in_front_of_the_hunks_are_those_of_git(
        self, tmp_path: Path, mode: int
    ) -> None:
        """Also of the modes: git knows one bit, that of the owner who may execute the file."""

        def heading(text: bytes) -> list[bytes]:
            return text.partition(b"\n@@")[0].splitlines()

        _git(tmp_path, "init", "-q")
        file = tmp_path / P
        file.parent.mkdir()
        for old, new in ((None, OLD), (OLD, NEW), (NEW, None)):
            if new is not None:
                file.write_bytes(new)
                file.chmod(mode)
            else:
                file.unlink()
            if old is None:
                _git(tmp_path, "add", "--force", "--intent-to-add", P)
            by_git = _git(tmp_path, "diff", "--full-index")
            assert heading(diff.render(P, old, new, mode=mode)) == heading(by_git)
            _git(tmp_path, "add", "--update")

    def test_where_the_mode_of_an_edited_file_is_not_known_none_is_said(
        self, tmp_path: Path
    ) -> None:
        """So that git keeps the mode that the file has."""
        text = diff.render(P, OLD, NEW, mode=None)
        assert text == GOOD.replace(b" 100644\n", b"\n", 1)
        _git(tmp_path, "init", "-q")
        file = tmp_path / P
        file.parent.mkdir()
        file.write_bytes(OLD)
        file.chmod(0o755)
        _git(tmp_path, "apply", "-", stdin=text)
        assert (file.read_bytes(), file.stat().st_mode & 0o777) == (NEW, 0o755)

    def test_blob_ids_are_those_of_git(self, tmp_path: Path) -> None:
        _git(tmp_path, "init", "-q")
        assert (
            diff.git_blob(OLD)
            == _git(tmp_path, "hash-object", "--stdin", stdin=OLD).decode().strip()
        )


def _git(folder: Path, *args: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(
        ["git", *args],
        cwd=folder,
        input=stdin,
        capture_output=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(folder)},
    )
    return done.stdout


class TestPlace:
    def test_shifted_lines_are_refused_unless_a_search_was_asked_for(self) -> None:
        shifted = b"# one\n# two\n" + OLD
        with pytest.raises(HunkError, match="line 7 is 'line 4"):
            diff.apply(one(GOOD), shifted)
        assert diff.apply(one(GOOD), shifted, search=True) == diff.Applied(
            b"# one\n# two\n" + NEW, (2,)
        )

    def test_context_that_occurs_twice_is_refused_even_at_its_stated_place(self) -> None:
        with pytest.raises(HunkError, match="2 times, at lines 7, 27"):
            diff.apply(one(GOOD), OLD + OLD, search=True)

    @pytest.mark.parametrize("content", [b"", OLD.replace(b"line 8\n", b"line 8 \n")])
    def test_no_fuzz_is_allowed(self, content: bytes) -> None:
        for search in (False, True):
            with pytest.raises(HunkError):
                diff.apply(one(GOOD), content, search=search)

    def test_hunks_found_in_another_order_are_refused(self) -> None:
        a = b"".join(b"a%d\n" % i for i in range(9))
        b = b"".join(b"b%d\n" % i for i in range(9))
        new = (a + b).replace(b"a4", b"A4").replace(b"b4", b"B4")
        change = one(diff.render(P, a + b, new))
        assert diff.apply(change, b"#\n" + a + b, search=True).offsets == (1, 1)
        with pytest.raises(HunkError, match="before the end"):
            diff.apply(change, b + a, search=True)

    def test_a_hunk_without_trailing_context_stands_at_the_end_only(self) -> None:
        change = one(diff.render(P, OLD, OLD + b"more\n"))
        assert diff.apply(change, b"#\n" + OLD, search=True).data == b"#\n" + OLD + b"more\n"
        with pytest.raises(HunkError):
            diff.apply(change, OLD + b"other\n", search=True)

    def test_a_hunk_without_leading_context_stands_at_the_start_only(self) -> None:
        change = one(diff.render(P, OLD, b"more\n" + OLD))
        assert diff.apply(change, OLD, search=True).offsets == (0,)
        with pytest.raises(HunkError, match="its lines are nowhere in the file"):
            diff.apply(change, b"other\n" + OLD, search=True)
        # One line of context is context.
        change = one(diff.render(P, OLD, OLD.replace(b"line 1\n", b"x\n")))
        assert diff.apply(change, b"other\n" + OLD, search=True).offsets == (1,)

    def test_a_hunk_whose_first_lines_are_common_is_found_by_its_rarest(self) -> None:
        old = b"same\nsame\nsame\nx\nsame\n"
        change = one(diff.render(P, old, old.replace(b"x", b"y")))
        found = diff.apply(change, b"same\n" * 5 + old, search=True)
        assert found == diff.Applied(b"same\n" * 5 + old.replace(b"x", b"y"), (5,))
        with pytest.raises(HunkError, match="nowhere"):
            diff.apply(change, b"same\nx\nsame\nsame\nsame\n", search=True)

    def test_context_cut_short_by_the_end_of_the_file_stands_at_the_end_only(self) -> None:
        """As GNU patch reads it: a file that has grown since is another file."""
        change = one(diff.render(P, OLD, OLD.replace(b"line 18\n", b"x\n")))
        assert (change.hunks[0].leading, change.hunks[0].trailing) == (3, 1)
        assert diff.apply(change, OLD).offsets == (0,)
        with pytest.raises(HunkError, match=r"hunk 1: must stand at an end of the file"):
            diff.apply(change, OLD + b"more\n")
        # Asked to look for it, it is where its lines are, and they are there once.
        assert diff.apply(change, OLD + b"more\n", search=True).offsets == (0,)
        # At the other end as well, where the number says the same.
        change = one(diff.render(P, OLD, OLD.replace(b"line 1\n", b"x\n")))
        with pytest.raises(HunkError, match="line 1 is 'more"):
            diff.apply(change, b"more\n" + OLD)

    def test_lines_that_are_everywhere_are_not_looked_for(self) -> None:
        change = one(diff.render(P, b"a\nb\na\n", b"a\na\n"))
        near = b"b\na\n" * (diff.MAX_PLACES - 1)
        with pytest.raises(HunkError, match="its lines occur 999 times, at lines 2, 4, 6, 8;"):
            diff.apply(change, near + b"b\na\n", search=True)
        message = "each of its lines occurs 1001 times or more, expected one .* at most 1000 times"
        with pytest.raises(HunkError, match=message):
            diff.apply(change, near + b"b\na\n" * 2, search=True)

    def test_line_ends_count(self) -> None:
        with pytest.raises(HunkError):
            diff.apply(one(GOOD), OLD.replace(b"\n", b"\r\n"))

    def test_a_file_that_is_there_is_not_created_and_one_that_is_not_is_not_modified(self) -> None:
        made = one(diff.render(P, None, b"x\n"))
        for change, content, message in (
            (made, b"x\n", "is there already, and the patch creates it"),
            (diff.reverse(made), None, "is not there, and the patch deletes it"),
            (one(GOOD), None, "is not there, and the patch modifies it"),
        ):
            with pytest.raises(HunkError, match=f"^{P}: {message}$"):
                diff.apply(change, content)

    def test_a_file_of_more_than_4_mib_is_not_read_through(self) -> None:
        longest = OLD.ljust(4 << 20, b"x")
        assert diff.apply(one(GOOD), longest).data == longest.replace(OLD, NEW)
        message = f"^{P}: 4194305 bytes, expected at most 4194304$"
        with pytest.raises(HunkError, match=message):
            diff.apply(one(GOOD), longest + b"x")

    def test_a_file_that_ends_too_soon_is_told_where(self) -> None:
        for kept in (8, 7):
            short = b"".join(OLD.splitlines(keepends=True)[:kept])
            message = rf"hunk 1: line {kept + 1} is the end of the file, expected 'line {kept}\\n'$"
            with pytest.raises(HunkError, match=message):
                diff.apply(one(GOOD), short)

    def test_a_long_line_is_shown_by_its_first_80_bytes_and_foreign_ones_escaped(self) -> None:
        line = b"\xffe" + b"x" * 100
        with pytest.raises(HunkError) as e:
            diff.apply(one(diff.render(P, b"old\n", b"new\n")), line)
        shown = "\\\\xffe" + "x" * 78
        assert e.value.message == f"{P}: hunk 1: line 1 is '{shown}', expected 'old\\n'"

    def test_a_file_that_has_grown_is_not_deleted(self) -> None:
        change = diff.reverse(one(diff.render(P, None, b"x\n")))
        with pytest.raises(HunkError):
            diff.apply(change, b"x\ny\n")
        empty = diff.reverse(one(diff.render(P, None, b"")))
        with pytest.raises(HunkError, match="longer"):
            diff.apply(empty, b"x\n")
