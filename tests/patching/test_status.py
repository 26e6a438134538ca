"""States of what is no longer installed, and the way out of each state; see test_plan for the rest.

`test_lifecycle` has the same with real installers.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fp8ctl.patching import status
from fp8ctl.patching.names import RelPath
from fp8ctl.patching.status import MEANING, SeriesStatus, way_out

A = RelPath("sglang/srt/a.py")
B = RelPath("sglang/srt/b.py")
C = RelPath("sglang/c.py")
NEW = RelPath("sglang/added/d.py")
INFO = "sglang-0.4.8.dist-info"


def uninstall(lab: Any) -> None:
    """Take away what RECORD names, as pip does."""
    for line in (lab.site / INFO / "RECORD").read_text().splitlines():
        (lab.site / line.split(",")[0]).unlink()
    shutil.rmtree(lab.site / INFO)
    for folder in sorted(lab.site.glob("sglang/**/"), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()


def claim(lab: Any, path: str) -> None:
    """Have RECORD say that a file is as it was installed."""
    record = lab.site / INFO / "RECORD"
    data = lab.read(path)
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    kept = [x for x in record.read_text().splitlines() if not x.startswith(path + ",")]
    record.write_text("\n".join([*kept, f"{path},sha256={digest},{len(data)}"]) + "\n")


def left(lab: Any) -> SeriesStatus | None:
    return status.leftover(lab.site, "sglang")


@pytest.mark.parametrize("store", [True, False], ids=["with its store", "without"])
def test_what_is_left_of_an_uninstalled_engine_is_an_orphan(bundled: Any, *, store: bool) -> None:
    bundled.patch("first", "third")
    if not store:
        shutil.rmtree(bundled.site / ".fp8ctl")
    uninstall(bundled)
    found = left(bundled)
    assert found is not None
    assert (found.state, found.version) == ("orphan", None)
    assert {f.path for f in found.files if f.state == "orphan"} == {NEW}
    # Of the others the ledger knows: they are gone, and will be forgotten.
    others = {f.path: f.state for f in found.files if f.path != NEW}
    assert others == ({A: "superseded", C: "superseded"} if store else {})
    bundled.revert()
    assert list(bundled.site.iterdir()) == []


def test_nothing_is_left_of_an_engine_that_fp8ctl_never_saw(bundled: Any) -> None:
    uninstall(bundled)
    assert left(bundled) is None
    (bundled.site / "sglang" / "srt").mkdir(parents=True, exist_ok=True)
    (bundled.site / A).write_bytes(b"somebody else's\n")
    assert left(bundled) is None


def test_a_healthy_engine_has_no_orphans(bundled: Any) -> None:
    bundled.patch()
    assert left(bundled) is None
    assert bundled.status().state == "applied"


def test_an_editable_install_over_a_patched_one_leaves_orphans(bundled: Any) -> None:
    bundled.patch("third")
    uninstall(bundled)
    (bundled.site / INFO).mkdir()
    told = {"url": "file:///home/me/sglang", "dir_info": {"editable": True}}
    (bundled.site / INFO / "direct_url.json").write_text(json.dumps(told))
    found = left(bundled)
    assert found is not None
    assert found.state == "orphan"


def test_a_local_version_is_the_same_release(bundled: Any) -> None:
    bundled.patch("third")
    (bundled.site / INFO).rename(bundled.site / "sglang-0.4.8+cu126.dist-info")
    assert left(bundled) is None


@pytest.mark.parametrize("ledger", [True, False], ids=["with a ledger", "without"])
def test_a_file_of_another_release_with_our_bytes_is_that_release_s(
    bundled: Any, *, ledger: bool
) -> None:
    """The fix went upstream word for word: reverting it would damage the newer release."""
    bundled.patch("first", "third")
    fixed = bundled.read(A)
    claim(bundled, A)
    (bundled.site / INFO).rename(bundled.site / "sglang-0.4.9.dist-info")
    if not ledger:
        shutil.rmtree(bundled.site / ".fp8ctl")
    found = left(bundled)
    assert found is not None
    assert A not in {f.path for f in found.files if f.state == "orphan"}
    bundled.revert()
    assert bundled.read(A) == fixed
    assert not (bundled.site / NEW).exists()
    assert not (bundled.site / ".fp8ctl").exists()


def test_an_interrupted_command_and_then_an_uninstall_end_in_nothing(bundled: Any) -> None:
    """What the journal knows and is no longer there cannot be lost any more."""
    from tests.patching.faulty import Faulty, killed_at

    step = 40
    while True:
        step += 1
        assert killed_at(step, lambda calls: bundled.patch("second", "third", calls=calls))
        journals = list(bundled.site.glob(".fp8ctl/journal/[!.]*.json"))
        if any(json.loads(j.read_text())["committed"] for j in journals):
            break
        bundled.revert(calls=Faulty())
    uninstall(bundled)
    bundled.revert()
    assert list(bundled.site.iterdir()) == []


def way(lab: Any) -> str:
    return way_out(
        lab.status(), site_packages=Path("/s p"), target=" --python P", reinstall="REINSTALL"
    )


def test_each_state_has_a_meaning_and_a_way_out(lab: Any) -> None:
    assert set(MEANING) == {"partial", "superseded", "drifted", "missing", "orphan"}
    pristine = lab.read(A)
    patch = "fp8ctl patch --backend sglang --python P"
    lab.patch("second", "third")
    (lab.site / A).write_bytes(pristine)
    assert (lab.status().state, way(lab)) == ("partial", patch)
    (lab.site / B).write_bytes(b"edited\n")
    assert (lab.status().state, way(lab)) == ("drifted", "REINSTALL")
    claim(lab, B)
    assert (lab.status().state, way(lab)) == ("superseded", patch)
    (lab.site / B).unlink()
    assert (lab.status().state, way(lab)) == ("missing", "REINSTALL")
    uninstall_info(lab)
    assert way(lab) == "fp8ctl revert --backend sglang --site-packages '/s p'"


def uninstall_info(lab: Any) -> None:
    shutil.rmtree(lab.site / INFO)


def test_another_build_is_no_case_for_a_reinstall(lab: Any) -> None:
    (lab.site / A).write_bytes(b"# another build\n" + lab.read(A))
    claim(lab, A)
    assert lab.status().state == "drifted"
    assert way(lab) == "fp8ctl patch --backend sglang --python P --allow-drift"
    (lab.site / B).write_bytes(b"edited\n")
    assert way(lab) == "REINSTALL"
