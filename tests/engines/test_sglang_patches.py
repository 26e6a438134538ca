"""The patches for SGLang 0.4.8, in the real engine on a CPU (see sglang_scenarios.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.wheels, pytest.mark.engine]

SCENARIOS = Path(__file__).parent / "sglang_scenarios.py"
PATCHES = ("cpu-fp8", "block-quant-override", "refit", "unscaled-guard")

Seen = dict[str, Any]


@pytest.fixture(scope="session")
def patched_tree(
    engine_sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return SGLang's released sources with the whole series applied by fp8ctl itself."""
    import shutil

    tree = tmp_path_factory.mktemp("tree") / "site-packages"
    shutil.copytree(engine_sources("sglang"), tree)
    argv = [sys.executable, "-m", "fp8ctl", "patch", "--site-packages", str(tree)]
    for patch in PATCHES:
        argv += ["--patch", patch]
    subprocess.run([*argv, "--backend", "sglang"], check=True, capture_output=True)
    return tree


def run(python: Path, tree: Path, folder: Path, *names: str, **environment: str) -> Seen:
    done = subprocess.run(
        [str(python), str(SCENARIOS), str(folder), *names],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("FP8CTL_", "SGLANG_"))},
            "PYTHONPATH": str(tree),
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen: Seen = json.loads((folder / "seen.json").read_text())
    return seen


@pytest.fixture(scope="session")
def seen(engine_python: Path, patched_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return run(engine_python, patched_tree, tmp_path_factory.mktemp("scenarios"))


REFITS = (
    "dense block",
    "dense per-tensor",
    "square per-tensor",  # o_proj is square: stock code loads it untransposed with no error
    "dense static",
    "dense online",
    "moe block",
    "moe per-tensor",
    "moe online",
    "tied block",  # lm_head is the embedding, and comes with it
    "tied online",
)


@pytest.mark.parametrize("case", REFITS)
def test_a_refit_gives_the_logits_of_a_freshly_started_engine(seen: Seen, case: str) -> None:
    result = seen[f"refit {case}"]
    assert result["finite"]
    assert result["a_and_b_differ"], "the control: the two checkpoints must not look alike"
    assert result["equal"] == [True] * 4


@pytest.mark.parametrize("case", REFITS)
def test_a_refit_moves_no_tensor_that_a_captured_graph_may_read(seen: Seen, case: str) -> None:
    assert seen[f"refit {case}"]["moved"] == []


@pytest.mark.parametrize("case", REFITS)
def test_a_refit_leaves_no_second_copy_of_the_weights(seen: Seen, case: str) -> None:
    assert seen[f"refit {case}"]["grown"] == 0


@pytest.mark.parametrize("case", REFITS)
def test_no_layer_asks_a_tensor_for_its_value_in_apply(seen: Seen, case: str) -> None:
    assert seen[f"refit {case}"]["host_syncs"] == 0


@pytest.mark.long
def test_two_ranks_quantise_their_own_halves_as_fresh_ones_do(
    engine_python: Path, patched_tree: Path, tmp_path: Path
) -> None:
    found = run(engine_python, patched_tree, tmp_path, "two ranks")["two ranks"]
    assert len(found) == 2
    for result in found:
        assert result["a_and_b_differ"]
        assert result["equal"] == [True] * 4
        assert result["moved"] == []


def test_the_guard_counts_what_the_engine_quantises_itself(seen: Seen) -> None:
    result = seen["online"]
    lost = "model.layers.1.mlp.experts.w13_weight"
    assert result["lost"].startswith("fp8ctl unscaled-guard:")
    assert f"{lost} (experts 0 of 4, w3)" in result["lost"]
    started, forgotten, short, refused, whole = result["unfilled"]
    assert started == {}
    assert len(forgotten) == 8, "of two layers: qkv_proj, o_proj, w13 and w2 of the experts"
    assert short == {lost: "experts 0 of 4, w3"}
    assert refused == short
    assert whole == {}


def test_fp8_sent_to_an_engine_that_quantises_itself_is_refused_and_changes_nothing(
    seen: Seen,
) -> None:
    assert "send 16-bit weights" in seen["online"]["fp8"]
    assert seen["online"]["kept"]


@pytest.mark.parametrize("case", ["complete", "zero block", "fused on disk", "dummy"])
def test_the_guard_lets_a_loaded_checkpoint_pass(seen: Seen, case: str) -> None:
    assert seen["guard"][case] == "served"


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("missing expert scale", "layers.1.mlp.experts.w13_weight_scale (experts 2 of 4, w3)"),
        (
            "missing expert block scale",
            "layers.1.mlp.experts.w13_weight_scale_inv (experts 2 of 4, w3)",
        ),
        ("missing shard of qkv", "layers.0.self_attn.qkv_proj.weight (rows 256-383 of 512)"),
        ("missing per-tensor scale", "layers.1.self_attn.qkv_proj.weight_scale (rows 2 of 3)"),
        ("16-bit as FP8", "layers.0.self_attn.qkv_proj.weight_scale_inv (rows 0-3 of 4)"),
    ],
)
def test_the_guard_refuses_what_no_loader_filled_and_names_it(
    seen: Seen, case: str, named: str
) -> None:
    said = seen["guard"][case]
    assert said.startswith("fp8ctl unscaled-guard:")
    assert named in said
    assert "--await-push" in said


def test_a_server_that_awaits_a_push_knows_what_is_still_missing(
    engine_python: Path, patched_tree: Path, tmp_path: Path
) -> None:
    result = run(engine_python, patched_tree, tmp_path, "await", FP8CTL_AWAIT_PUSH="1")
    started, half, whole, sixteen_bit, forgotten = result["await"]["unfilled"]
    assert started == 16  # 8 fused layers, weight and scale each
    assert 0 < half < started
    assert whole == 0
    assert sixteen_bit == 1, "16-bit values cast into an FP8 weight take its load back"
    assert forgotten == started


def test_the_block_override_acts_only_where_it_was_asked_for(seen: Seen) -> None:
    result = seen["override"]
    assert result["set"]["weight_block_size"] == [64, 64]
    assert result["unset"] is None
    assert result["not fp8"] is None
    assert result["draft"] is None
    assert result["own config"]["weight_block_size"] == [128, 128]
    assert result["command line"]["weight_block_size"] == [32, 32]
