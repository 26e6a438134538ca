from __future__ import annotations

import pytest

from fp8ctl.errors import DiffError
from fp8ctl.patching.names import parse_relpath, parse_sha256, sha256_of


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
