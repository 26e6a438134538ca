"""A trainer and the command push to the real SGLang 0.4.8 on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import free_port, write_model

if TYPE_CHECKING:
    from tests.e2e.conftest import Cli, Json

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("via", ["ipc", pytest.param("nccl", marks=pytest.mark.long)])
def test_the_fsdp2_example_trains_updates_and_agrees_with_its_server(
    via: str, cli: Cli, small_model: Path, tmp_path: Path
) -> None:
    """Large steps, so that a server that missed its update would be seen."""
    record = tmp_path / "updates.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "examples" / "fsdp2_rollout.py"), "--json"),
            *("--model", str(small_model), "--python", str(cli.python), "--record", str(record)),
            *("--steps", "2", "--lr", "1e-3", "--tokens", "64"),
            *("--prompts", "3", "--answer", "8", "--via", via),
        ],
        env=cli.environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    steps: list[Json] = json.loads(done.stdout)["steps"]
    assert [step["update"]["version"] for step in steps] == ["step-1", "step-2"]
    assert all(step["update"]["verified"] == step["update"]["sent"] == 34 for step in steps)
    assert steps[1]["loss"] < steps[0]["loss"], "it trains"
    # 0.002 and 0.02 were seen, of answers from before the update 1.5: the control.
    assert max(step["k3"] for step in steps) < 0.15, steps
    assert max(step["stale"] for step in steps) > 0.4, steps

    log = cli.run("push-log", str(record), "--diff", "step-1", "step-2")
    assert log["counts"]["changed"] >= 20
    assert log["bytes"] == steps[1]["update"]["bytes_sent"]
    assert cli.run("ps")["servers"] == [], "it stops what it started"


@pytest.mark.long
def test_the_command_pushes_and_the_server_s_weights_are_those_of_the_checkpoint(
    cli: Cli, small_model: Path, demo_model: Path, tmp_path: Path
) -> None:
    launched = cli.run(
        "launch",
        *("--backend", "sglang", "--python", str(cli.python), "--model", str(small_model)),
        *("--await-push", "--port", str(free_port()), "--detach"),
    )
    url = launched["url"]
    try:
        wrong = cli.run("push", url, "--model", str(demo_model), expect=5)
        assert "is not the model of the servers' plan" in wrong["message"]
        for via in ("ipc", "nccl", "disk"):
            pushed = cli.run(
                "push", url, "--model", str(small_model), "--via", via, "--version", via
            )
            assert (pushed["verdict"], pushed["verified"]) == ("fp8-ok", 34)
        assert cli.run("check", url, "--level", "weights")["verdict"] == "fp8-ok"
        other = _moved(small_model, tmp_path / "moved")
        delta = cli.run("push", url, "--model", str(other), "--delta", "--version", "moved")
        assert (delta["update"]["sent"], delta["update"]["skipped"]) == (1, 33)
        assert [u["version"] for u in cli.run("push-log", url)["updates"]] == [
            *("ipc", "nccl", "disk", "moved")
        ]
        found = cli.run("push-log", url, "--diff", "disk", "moved")
        assert found["counts"] == {"changed": 1, "unchanged": 33, "unknown": 0}
        stale = cli.run("check", url, "--level", "weights", expect=8)
        assert [t["name"] for t in stale["data"]["weights"]["tensors"]] == ["model.norm.weight"]
    finally:
        cli.run("stop", launched["name"])


def _moved(source: Path, folder: Path) -> Path:
    """Write a checkpoint with another last norm."""
    from safetensors.torch import load_file

    state = load_file(str(source / "model.safetensors"))
    state["model.norm.weight"] = state["model.norm.weight"] * 2
    config = json.loads((source / "config.json").read_text())
    return write_model(folder, source, state, config)
