"""`fp8ctl demo`, the main job, from a pristine engine back to a pristine engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Cli

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_the_demo_proves_fp8_and_puts_every_byte_back(cli: Cli, demo_model: Path) -> None:
    target = ("--python", str(cli.python))
    cli.run("revert", *target)
    before = _files(cli)
    try:
        seen = cli.run("demo", "--mode", "per-tensor")
        assert seen["model"] == str(demo_model)
        assert "Paris" in seen["answer"]
        assert seen["weights"]["verdict"] == "fp8-ok"
        assert seen["weights"]["counts"]["equal"] >= 420
        assert [s["step"] for s in seen["steps"]][-3:] == ["stop", "revert", "doctor"]
        assert _files(cli) == before
        assert cli.run("ps")["servers"] == []
    finally:
        cli.run("patch", *target)


def _files(cli: Cli) -> dict[str, Any]:
    """Return the state and the hash of every file that a patch may touch, and what RECORD says."""
    [engine] = cli.run("patch", "--python", str(cli.python), "--list")["engines"]
    assert engine["state"] == "pristine"
    [installed] = cli.run("doctor", "--python", str(cli.python))["environment"]["engines"]
    assert installed["record"]["modified"] == []
    assert installed["record"]["missing"] == []
    return {file["path"]: file["sha256"] for file in engine["files"]}
