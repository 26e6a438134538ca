from __future__ import annotations

import pytest

from fp8ctl.errors import DiffError
from fp8ctl.patching.names import parse_relpath, parse_sha256, sha256_of, sha256_or_none, short


@pytest.mark.parametrize("text", ["a.py", "vllm/x/y.py", "w/a.py", ".x/y"])
def test_a_plain_relative_path_is_taken_as_it_is(text: str) -> None:
    assert parse_relpath(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/etc/passwd",
        "../a",
        "a/../b",
        "a/./b",
        "./a",
        "a//b",
        "a/",
        "C:/a",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\tb",
        'a"b',
        "\xe9.py",
        "a /b",
        " a",
        "a b/c.py",
        ".fp8ctl/ledger.json",
        "x/.fp8ctl/y",
        "a" * 201,
        "/".join(["a"] * 600),
    ],
)
def test_a_path_that_could_lead_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(DiffError):
        parse_relpath(text)


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, None, 1])
def test_only_a_lower_case_sha256_is_one(text: object) -> None:
    assert parse_sha256(sha256_of(b"")) == sha256_of(b"")
    with pytest.raises(DiffError):
        parse_sha256(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "path '' is empty"),
        ("/a", "path '/a' is absolute, expected one relative to site-packages"),
        ("a/../b", "path 'a/../b' has the component '..'"),
        ("x/.fp8ctl/y", "path 'x/.fp8ctl/y' lies in fp8ctl's own folder"),
        ("a b", "path 'a b' has a control, space, quote, backslash or non-ASCII character"),
        ("a" * 201, f"path {'a' * 201!r} has a component of 201 characters, limit 200"),
        ("a/" * 512 + "b", f"path {'a/' * 512 + 'b'!r} has 1025 characters, expected at most 1024"),
    ],
)
def test_the_reason_is_said(text: str, reason: str) -> None:
    with pytest.raises(DiffError) as e:
        parse_relpath(text)
    assert e.value.message == reason
    assert e.value.hint == "use a plain relative path"


def test_the_longest_path_is_taken() -> None:
    for text in ("a/" * 511 + "bb", "a" * 200):
        assert parse_relpath(text) == text


def test_hashes_are_shown_by_their_first_twelve_digits_and_absence_in_a_word() -> None:
    assert sha256_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert short(sha256_of(b"")) == "e3b0c44298fc"
    assert (short(None), sha256_or_none(None), sha256_or_none(b"")) == (
        "absent",
        None,
        sha256_of(b""),
    )
    with pytest.raises(DiffError, match="'x' is not a sha256, expected 64 lower-case hexadecimal"):
        parse_sha256("x")
