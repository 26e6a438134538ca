from __future__ import annotations

from typing import Any

import pytest

from fp8ctl.patching import verify
from fp8ctl.patching.fsops import Root
from fp8ctl.patching.names import RelPath, sha256_of

A = RelPath("sglang/srt/a.py")


def test_record_gives_the_hash_of_what_was_installed(lab: Any) -> None:
    data = lab.read(A)
    lab.patch("first")
    with Root(lab.site) as root:
        assert verify.record_hashes(root, "sglang", [A]) == {A: sha256_of(data)}
        assert verify.record_hashes(root, "vllm", [A]) == {}


@pytest.mark.parametrize(
    "row", ["a.py,,", "a.py,md5=x,1", "a.py,sha256=!!!,1", "a.py,sha256=AAAA,1", "a.py", '"', ""]
)
def test_rows_of_other_shapes_are_passed_over(row: str) -> None:
    assert verify.parse_record(row + "\n", {"a.py"}) == {}


@pytest.mark.parametrize(
    ("folder", "version"),
    [("sglang-0.4.8.dist-info", "0.4.8"), ("SGLang-0.4.8+cu1.dist-info", "0.4.8+cu1")],
)
def test_the_installed_version_is_that_of_the_metadata_folder(
    lab: Any, folder: str, version: str
) -> None:
    (lab.site / "sglang-0.4.8.dist-info").rename(lab.site / folder)
    (lab.site / "sglang_router-9.9.dist-info").mkdir()
    with Root(lab.site) as root:
        assert verify.installed_version(root, "sglang") == version
        assert verify.installed_version(root, "vllm") is None


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ('{"url": "file:///w", "dir_info": {"editable": true}}', False),
        ('{"url": "file:///w", "dir_info": {}}', True),
        ('{"url": "https://x/w.whl", "archive_info": {}}', True),
        ("[]", True),
        ("{", True),
    ],
)
def test_the_files_of_an_editable_install_are_elsewhere(lab: Any, text: str, *, here: bool) -> None:
    (lab.site / "sglang-0.4.8.dist-info" / "direct_url.json").write_text(text)
    with Root(lab.site) as root:
        assert (verify.installed_version(root, "sglang") == "0.4.8") is here
