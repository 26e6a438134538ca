"""The patches for vLLM 0.9.1, on its released sources and real classes, on a CPU."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import HunkError
from fp8ctl.patching import catalog
from fp8ctl.patching.names import parse_relpath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.wheels

STANDINS = "tests.engines.vllm_standins"
V1, V2, REFIT, GUARD = ALL = (
    "force-fp8-serialized",
    "disable-cutlass-fp8",
    "refit",
    "unscaled-guard",
)
FP8 = parse_relpath("vllm/model_executor/layers/quantization/fp8.py")
W8A8 = parse_relpath("vllm/model_executor/layers/quantization/utils/w8a8_utils.py")
SUBSETS = [s for n in range(5) for s in itertools.combinations(ALL, n)]


@pytest.fixture(scope="module")
def series() -> catalog.Series:
    return catalog.load("vllm", "0.9.1")


@pytest.fixture(scope="module")
def sources(engine_sources: Callable[[str], Path]) -> Path:
    return engine_sources("vllm")


@pytest.fixture(scope="module")
def tree(
    series: catalog.Series, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...]], Path]:
    """Return a function: ids of patches -> a folder whose `vllm/` has them, the rest as links."""
    made: dict[tuple[str, ...], Path] = {}

    def make(ids: tuple[str, ...]) -> Path:
        if ids not in made:
            folder = made[ids] = tmp_path_factory.mktemp("tree")
            _link(sources / "vllm", folder / "vllm", {Path(FP8), Path(W8A8)}, Path("vllm"))
            for path in (FP8, W8A8):
                data = series.build(path, (sources / path).read_bytes(), ids).data
                assert data is not None
                (folder / path).write_bytes(data)
        return made[ids]

    return make


def _link(source: Path, target: Path, files: set[Path], at: Path) -> None:
    """Link what is in `source` into `target`, all but `files`; folders above them are made."""
    target.mkdir()
    for child in source.iterdir():
        here = at / child.name
        if here in files:
            continue
        if any(file.is_relative_to(here) for file in files):
            _link(child, target / child.name, files, here)
        elif child.name != "__pycache__":
            (target / child.name).symlink_to(child)


@pytest.fixture(scope="module")
def run(tree: Callable[[tuple[str, ...]], Path]) -> Iterator[Run]:
    """Return a function that runs one scenario of vllm_standins.py in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FP8CTL_", "VLLM_"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the sources are shared, and read-only
    with subprocess.Popen(
        [sys.executable, "-m", STANDINS],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        requests, answers = zygote.stdin, zygote.stdout

        def one(
            ids: tuple[str, ...], scenario: str, *args: str, cutlass: bool = False, **env: str
        ) -> dict[str, Any]:
            job = {"tree": str(tree(ids)), "scenario": scenario, "args": args}
            requests.write(json.dumps({**job, "cutlass": cutlass, "env": env}) + "\n")
            requests.flush()
            answer: dict[str, Any] = json.loads(answers.readline())
            assert "traceback" not in answer, answer["traceback"]
            return answer

        yield one
        requests.close()


def git_blob(data: bytes | None) -> str:
    """Return what `git hash-object` says of a file's content."""
    assert data is not None
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# --- the diffs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", SUBSETS, ids="+".join)
def test_every_subset_applies_to_the_release_and_compiles(
    ids: tuple[str, ...], series: catalog.Series, sources: Path
) -> None:
    for path in (FP8, W8A8):
        image = series.build(path, (sources / path).read_bytes(), ids)
        assert image.data is not None
        compile(image.data, path, "exec")
        if len(ids) == 1:
            assert not image.offsets, "a patch alone stands where its diff says"


def test_the_released_files_are_those_of_the_seed(sources: Path) -> None:
    assert git_blob((sources / FP8).read_bytes()).startswith("c785e0d")
    assert git_blob((sources / W8A8).read_bytes()).startswith("adc67aa")


def test_disable_cutlass_alone_leaves_the_seeds_blob(series: catalog.Series, sources: Path) -> None:
    data = series.build(W8A8, (sources / W8A8).read_bytes(), [V2]).data
    assert git_blob(data).startswith("361316b")


def test_force_serialized_is_found_in_another_build_by_its_context_alone(
    series: catalog.Series, sources: Path
) -> None:
    released = (sources / FP8).read_bytes()
    # Another build of 0.9.1: a line more above, other code below.
    other = released.replace(b"import functools\n", b"import functools\nimport math\n", 1)
    other = other.replace(b"ACTIVATION_SCHEMES = [", b"SCHEMES = ACTIVATION_SCHEMES = [", 1)
    other = other.replace(b"Unsupported activation scheme", b"No such activation scheme", 1)
    with pytest.raises(HunkError):
        series.build(FP8, other, [V1])
    image = series.build(FP8, other, [V1], drift=True)
    assert image.offsets == ((V1, (1,)),)
    assert image.data is not None
    added = set(image.data.splitlines()) - set(other.splitlines())
    assert b"        is_checkpoint_fp8_serialized = True" in added


def test_nothing_of_fp8ctl_is_imported(series: catalog.Series, sources: Path) -> None:
    for path in (FP8, W8A8):
        data = series.build(path, (sources / path).read_bytes(), ALL).data
        assert data is not None
        assert b"import fp8ctl" not in data
        assert b"from fp8ctl" not in data


# --- as stock where nothing was asked -----------------------------------------------------------


def test_force_serialized_and_disable_cutlass_do_what_they_say(run: Run) -> None:
    stock = run((), "serialized", cutlass=True)
    assert stock == {"serialized": False, "cutlass": True, "per_token": True}
    assert run((V1,), "serialized", cutlass=True)["serialized"] is True
    off = run((V2,), "serialized", cutlass=True)
    assert off == {"serialized": False, "cutlass": False, "per_token": False}


@pytest.mark.parametrize("experts", ["none", "moe"])
def test_refit_in_block_mode_answers_as_stock_to_the_last_bit(run: Run, experts: str) -> None:
    assert run((REFIT,), "forward", "block", experts) == run((), "forward", "block", experts)


@pytest.mark.parametrize("mode", ["block", "per-tensor", "static"])
def test_the_guard_alone_answers_as_stock_to_the_last_bit(run: Run, mode: str) -> None:
    assert run((GUARD,), "forward", mode, "none") == run((), "forward", mode, "none")


def test_stock_cannot_be_loaded_twice_and_refit_can(run: Run) -> None:
    assert "self_attn.q_proj.weight" in run((), "second-load", "block")["failed"]
    assert run((REFIT,), "second-load", "block")["failed"] == []


def test_a_gpu_that_repacks_weights_keeps_to_stock(run: Run) -> None:
    with pytest.raises(AssertionError, match="prepare_fp8_layer_for_marlin"):
        run((REFIT,), "forward", "per-tensor", "none", STANDIN_OLD_GPU="1")


# --- refit --------------------------------------------------------------------------------------


LIMIT = {"block": 0.1, "per-tensor": 0.1, "static": 0.1, "online": 0.15}
"""Relative error of the output against an FP32 forward of the checkpoint."""


def _check_refit(found: dict[str, Any], limit: float) -> None:
    assert found["equal"] == [True] * 4, "A, B, A, B against nets built afresh"
    assert found["addresses_kept"]
    assert found["grown"] == 0, "no second copy of the weights"
    assert found["plain"], "torch.compile takes no Parameter subclasses"
    assert found["host_syncs"] == []
    assert found["different"] > 0.5, "A and B must differ, or equality proves nothing"
    assert max(found["error"].values()) < limit


@pytest.mark.parametrize("mode", ["block", "per-tensor", "static", "online"])
def test_refit_of_linear_layers_is_bit_equal_to_a_fresh_start(run: Run, mode: str) -> None:
    # Six GEMMs in a row with activations in FP8; online, the weights' own rounding on top.
    _check_refit(run((REFIT,), "refit", mode, "none", "eager"), LIMIT[mode])


@pytest.mark.parametrize("mode", ["block", "per-tensor", "static", "online"])
def test_refit_of_experts_is_bit_equal_to_a_fresh_start(run: Run, mode: str) -> None:
    # A router decides otherwise for a token or two, so the limit is wider.
    _check_refit(run((REFIT,), "refit", mode, "moe", "eager"), 0.2)


@pytest.mark.parametrize("ids", [(REFIT,), (REFIT, GUARD)], ids="+".join)
@pytest.mark.parametrize("how", ["tensor", "expert", "stacked"])
def test_every_rank_quantises_its_own_part_of_the_experts(
    run: Run, ids: tuple[str, ...], how: str
) -> None:
    found = run(ids, "spread", how)
    assert len(found["equal"]) == (6 if how == "stacked" else 12)
    assert all(found["equal"]), "as a rank that started on these weights"
    assert max(found["errors"]) < 0.05, "and they are those of its own part"


@pytest.mark.parametrize("mode", ["per-tensor", "static"])
def test_refit_holds_with_all_patches_and_cutlass_switched_off(run: Run, mode: str) -> None:
    _check_refit(run(ALL, "refit", mode, "none", "eager", cutlass=True), 0.1)


@pytest.mark.parametrize("cutlass", [True, False])
def test_rows_that_pad_a_batch_reach_no_answer(run: Run, cutlass: bool) -> None:
    # CUDA graphs pad batches, and attention leaves memory there that nothing wrote.
    assert run(ALL, "padded", "per-tensor", cutlass=cutlass)["equal"]
    assert run((V1, REFIT), "padded", "per-tensor", cutlass=cutlass)["equal"]
    assert not run((V1, V2), "padded", "per-tensor", cutlass=cutlass)["equal"], "the fault"


@pytest.mark.parametrize("mode", ["per-tensor", "online"])
def test_refit_holds_on_the_cutlass_path(run: Run, mode: str) -> None:
    ids = (REFIT, GUARD)
    _check_refit(run(ids, "refit", mode, "none", "eager", cutlass=True), LIMIT[mode])


def test_a_compiled_graph_sees_the_refit(run: Run) -> None:
    # fullgraph: nothing in apply() leaves the graph, a host synchronisation would.
    _check_refit(run(ALL, "refit", "per-tensor", "none", "compiled"), 0.1)


@pytest.mark.parametrize("ids", [(), (REFIT,), (GUARD,), (REFIT, GUARD)], ids="+".join)
def test_a_module_fused_on_disk_fills_the_scale_of_every_shard(
    run: Run, ids: tuple[str, ...]
) -> None:
    found = run(ids, "fused")
    assert found["finite"]
    if REFIT in ids:
        assert found["equal"]
        assert found["one_scale"]
    if GUARD in ids:
        assert found["unfilled"] == {}


# --- unscaled guard -----------------------------------------------------------------------------

AT = "model.layers.0."
GUARDED = pytest.mark.parametrize("ids", [(GUARD,), (REFIT, GUARD)], ids="+".join)


def _refused(found: dict[str, Any], name: str, part: str) -> None:
    error = found["error"]
    assert error.startswith("fp8ctl unscaled-guard:"), error
    assert f"{AT}{name} ({part}" in error
    assert "fp8ctl launch" in error
    assert "--await-push" in error
    assert f"{AT}{name}" in found["unfilled"]


@GUARDED
@pytest.mark.parametrize("mode", ["block", "per-tensor", "static"])
def test_a_complete_checkpoint_passes(run: Run, ids: tuple[str, ...], mode: str) -> None:
    assert run(ids, "guard", mode, "complete") == {"unfilled": {}, "error": "", "warnings": []}


@GUARDED
@pytest.mark.parametrize(
    ("mode", "lost", "name", "part"),
    [
        ("block", "experts.2.up_proj.weight_scale_inv", "experts.w13_weight_scale_inv",
         "experts 2, 1 of 4, w3"),
        ("per-tensor", "experts.1.gate_proj.weight_scale", "experts.w13_weight_scale",
         "experts 1, 1 of 4, w1"),
        ("per-tensor", "experts.3.down_proj.weight_scale", "experts.w2_weight_scale",
         "experts 3, 1 of 4"),
        ("static", "experts.0.down_proj.input_scale", "experts.w2_input_scale",
         "experts 0, 1 of 4"),
        ("block", "experts.3.down_proj.weight", "experts.w2_weight", "experts 3, 1 of 4"),
        ("per-tensor", "self_attn.k_proj.weight_scale", "self_attn.qkv_proj.weight_scale",
         "entries 1 of 3, in shards 1"),
        ("per-tensor", "self_attn.v_proj.weight", "self_attn.qkv_proj.weight",
         "rows 384-511 of 512, in shards 2"),
        ("block", "mlp.up_proj.weight_scale_inv", "mlp.gate_up_proj.weight_scale_inv",
         "entries 4-7 of 8, in shards 1"),
        ("static", "mix.input_scale", "mix.input_scale", "entries 0 of 1"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)  # fmt: skip
def test_a_tensor_missing_from_the_checkpoint_is_named(
    run: Run, ids: tuple[str, ...], mode: str, lost: str, name: str, part: str
) -> None:
    found = run(ids, "guard", mode, lost)
    _refused(found, name, part)
    assert len(found["unfilled"]) == 1, "what was loaded is not blamed"


@GUARDED
def test_sixteen_bits_cast_into_fp8_are_no_weights(run: Run, ids: tuple[str, ...]) -> None:
    _refused(
        run(ids, "guard", "block", "bf16"),
        "self_attn.qkv_proj.weight",
        "rows 0-511 of 512, in shards 0-2, 16-bit values were loaded there",
    )


def test_forced_serialized_on_a_16_bit_checkpoint_is_refused(run: Run) -> None:
    found = run((V1, GUARD), "guard", "online", "complete")
    assert found["error"].startswith("fp8ctl unscaled-guard:")
    stock = run((GUARD,), "guard", "online", "complete")
    assert stock == {"unfilled": {}, "error": "", "warnings": []}


@GUARDED
def test_a_16_bit_checkpoint_that_lost_an_expert_is_refused_too(
    run: Run, ids: tuple[str, ...]
) -> None:
    _refused(
        run(ids, "guard", "online", "experts.2.up_proj.weight"),
        "experts.w13_weight",
        "experts 2, 1 of 4, w3",
    )


def test_what_the_engine_quantises_itself_is_counted_from_nothing_again(run: Run) -> None:
    found = run((REFIT, GUARD), "online")
    steps = found["steps"]
    assert steps["started"] == {}
    assert len(steps["forgotten"]) == 7, "five linear modules, w13 and w2 of the experts"
    assert (
        steps["short"]
        == steps["refused"]
        == {
            f"{AT}self_attn.qkv_proj.weight": "rows 256-383 of 512, in shards 1",
            f"{AT}experts.w13_weight": "experts 0, 1 of 4, w3",
        }
    )
    assert steps["whole"] == {}
    assert len(found["refused"]) == 2, "FP8 codes are not 16-bit weights"
    assert found["kept"]


@GUARDED
def test_an_all_zero_block_with_scale_one_passes(run: Run, ids: tuple[str, ...]) -> None:
    assert run(ids, "guard", "block", "zero-block")["error"] == ""


@GUARDED
def test_dummy_weights_start_with_a_warning_and_count_as_unfilled(
    run: Run, ids: tuple[str, ...]
) -> None:
    found = run(ids, "guard", "block", "dummy")
    assert found["error"] == ""
    assert f"{AT}experts.w13_weight_scale_inv" in found["unfilled"]
    assert found["warnings"]


@pytest.mark.parametrize("mode", ["block", "per-tensor"])
def test_await_push_starts_and_counts_down_to_nothing(run: Run, mode: str) -> None:
    found = run((REFIT, GUARD), "await-push", mode, FP8CTL_AWAIT_PUSH="1")
    steps = found["steps"]
    assert len(steps["started"]) == 14, "seven modules' weights and scales"
    assert 0 < len(steps["half"]) <= 14
    assert steps["pushed"] == {}
    assert found["equal"], "what was pushed is what answers"
    assert list(steps["spoilt"]) == [f"{AT}mix.weight"], "16 bits over FP8 spoil it"
    assert steps["mended"] == {}
    assert len(steps["forgotten"]) == 14
    assert any("unscaled-guard" in w for w in found["warnings"])


# --- the worker extension -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["block", "per-tensor", "static"])
def test_the_worker_loads_folders_and_reports_what_the_kernels_read(run: Run, mode: str) -> None:
    found = run((REFIT, GUARD), "worker", mode)
    assert found["started"] == []
    loaded = found["loaded"]
    assert (loaded["error"], loaded["broken"], loaded["missing_count"]) == ("", False, 0)
    assert loaded["unfilled"] == {}
    assert found["after"] == []
    assert found["flipped_code"] == ["mlp.down_proj.weight"]
    scales = {"experts.2.up_proj.weight_scale", "experts.2.up_proj.weight_scale_inv"}
    scales.add("self_attn.k_proj.weight_scale")
    assert scales & set(found["flipped_scales"]) == set(found["flipped_scales"]) - {
        "mlp.down_proj.weight"
    }
    assert len(found["flipped_scales"]) == (2 if mode == "block" else 3)
    absent, torn = found["absent"], found["torn"]
    assert absent["error"].startswith("FileNotFoundError")
    assert not absent["broken"]
    assert absent["missing_count"] == 0, "what arrived before is still there"
    assert torn["broken"]
    assert torn["missing_count"] == loaded["loaded"], "counted from nothing after a broken update"
    assert torn["unfilled"]


@pytest.mark.parametrize("mode", ["block", "per-tensor", "online"])
def test_buckets_make_the_model_of_their_weights_again_and_again(run: Run, mode: str) -> None:
    found = run((REFIT, GUARD), "push", mode)
    assert found["refittable"]["refittable"] is True, found["refittable"]
    assert "failed" not in found["connected"]
    for one in found["pushes"]:
        assert one["errors"] == ["", ""]
        assert one["logits"] is True
        assert (one["progress"]["broken"], one["progress"]["missing_count"]) == (False, 0)
        assert one["progress"]["unfilled"] == {}
        assert one["format"] == ("online" if mode == "online" else "checkpoint")
        if mode != "online":
            assert one["unequal"] == []
    first, *later = found["pushes"]
    assert first["copies"] == 0
    if mode != "online":
        # What digests have proven is copied; per-tensor scales are their loaders' business.
        assert all(one["copies"] >= one["loaders"] for one in later)
    assert found["moved"] == []
    assert found["unknown"]["error"]
    assert found["unknown"]["broken"] is False
    assert found["nonsense"]["failed"] == "ValueError: unknown question 'nonsense'"


def test_an_engine_without_the_patch_says_so_before_anything_is_sent(run: Run) -> None:
    found = run((), "refittable", "block")["alone"]
    assert (found["refittable"], found["why"][:32]) == (False, "the patch `refit` is not applied")


def test_an_engine_of_several_sets_of_weights_says_so_too(run: Run) -> None:
    found = run((REFIT,), "refittable", "block")
    assert found["alone"]["refittable"] is True
    assert (found["several"]["refittable"], found["several"]["why"][:16]) == (
        False,
        "data parallelism",
    )


def test_the_hook_knows_the_patched_modules_after_a_refit_and_sees_a_method_replaced(
    run: Run,
) -> None:
    found = run(ALL, "code", str(FP8), str(W8A8))
    assert [one["found"] for one in found["before"]["modules"]] == ["ok", "ok"]
    fp8, w8a8 = found["after"]["modules"]
    assert (fp8["found"], fp8["names"]) == ("replaced", ["Fp8LinearMethod.apply"])
    assert w8a8["found"] == "ok"
