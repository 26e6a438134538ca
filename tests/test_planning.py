"""Plans of real layouts, from headers alone: what fits, what does not, and what to type."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

from fp8ctl import fitting, planning
from fp8ctl.errors import (
    CheckpointError,
    NotFoundError,
    PlanDoesNotFitError,
    UnsupportedError,
    UsageError,
)
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.manifest import Plan, dumps
from fp8ctl.models import read_checkpoint
from fp8ctl.planning import Typed, make_plan, read_plan, require_fit
from fp8ctl.policy import Backend, Reason
from fp8ctl.render import Reporter
from tests import public_models

if TYPE_CHECKING:
    from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]


def save(folder: Path, config: Mapping[str, object], shapes: Shapes, dtype: str = "BF16") -> Path:
    """Write a checkpoint with headers and a hole where the weights would be."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        start = end
        count = 1 if dtype.startswith("F8") else 2
        for side in shape:
            count *= side
        end = start + count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def dense(
    hidden: int, intermediate: int, heads: int, kv: int, head_dim: int, layers: int = 2
) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    config: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, hidden)}
    for i in range(layers):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes |= {
            f"{at}.q_proj.weight": (heads * head_dim, hidden),
            f"{at}.k_proj.weight": (kv * head_dim, hidden),
            f"{at}.v_proj.weight": (kv * head_dim, hidden),
            f"{at}.o_proj.weight": (hidden, heads * head_dim),
            f"{mlp}.gate_proj.weight": (intermediate, hidden),
            f"{mlp}.up_proj.weight": (intermediate, hidden),
            f"{mlp}.down_proj.weight": (hidden, intermediate),
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
        }
    return config, shapes


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    return save(tmp_path / "smollm2", *dense(576, 1536, 9, 3, 64))


@pytest.fixture
def llama8b(tmp_path: Path) -> Path:
    return save(tmp_path / "llama8b", *dense(4096, 14336, 32, 8, 128))


@pytest.fixture
def qwen3_moe(tmp_path: Path) -> Path:
    """Qwen3-30B-A3B's shapes, two layers and four experts of them."""
    config, shapes = dense(2048, 6144, 32, 4, 128)
    shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    for i in range(2):
        shapes[f"model.layers.{i}.mlp.gate.weight"] = (4, 2048)
        for j in range(4):
            expert = f"model.layers.{i}.mlp.experts.{j}"
            shapes[f"{expert}.gate_proj.weight"] = (768, 2048)
            shapes[f"{expert}.up_proj.weight"] = (768, 2048)
            shapes[f"{expert}.down_proj.weight"] = (2048, 768)
    return save(tmp_path / "moe", {**config, "model_type": "qwen3_moe"}, shapes)


def rules(plan: Plan) -> set[str]:
    return {problem.rule for problem in plan.problems}


def test_smollm2_gets_64_since_576_and_192_do_not_divide_by_128(smollm2: Path) -> None:
    plan = make_plan(smollm2, "sglang", Mode.BLOCK)
    assert plan.fits
    assert plan.block == BlockSize(64, 64)
    ((rejected, problems),) = plan.rejected
    assert rejected == BlockSize(128, 128)
    assert {p.rule for p in problems} == {"merged-n", "group-k"}
    said = " ".join(planning.explain(plan))
    assert "128x128 does not fit" in said
    assert "K = 576, not a multiple of 128" in said
    assert "k of qkv_proj has N = 192" in said


def test_an_explicit_block_that_does_not_fit_is_refused_with_one_that_does(smollm2: Path) -> None:
    plan = make_plan(smollm2, "sglang", Mode.BLOCK, 1, BlockSize(128, 128))
    with pytest.raises(PlanDoesNotFitError, match="blocks of 128x128 do not fit") as caught:
        require_fit(plan)
    assert caught.value.exit_code == 8
    assert caught.value.hint == "--block-size 64,64"
    require_fit(make_plan(smollm2, "sglang", Mode.BLOCK, 1, BlockSize(64, 64)))


@pytest.mark.parametrize("backend", ["vllm", "sglang", None])
@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_llama_8b_fits_128_up_to_tp_16(llama8b: Path, backend: Backend | None, tp: int) -> None:
    # 14336 / 16 = 896 = 7 * 128; 8 key-value heads on 16 ranks are doubled.
    plan = make_plan(llama8b, backend, Mode.BLOCK, tp)
    assert plan.block == BlockSize(128, 128)
    assert plan.fits


def test_tensor_parallelism_counts_per_rank(llama8b: Path) -> None:
    # 14336 / 32 = 448 = 7 * 64, for gate and up as N and for down as K.
    plan = make_plan(llama8b, "sglang", Mode.BLOCK, 32, BlockSize(128, 128))
    assert rules(plan) == {"merged-n", "row-k"}
    assert make_plan(llama8b, "sglang", Mode.BLOCK, 32).block == BlockSize(64, 64)


def test_heads_that_cannot_be_cut_fit_no_block_and_no_mode(smollm2: Path) -> None:
    for mode in (Mode.BLOCK, Mode.PER_TENSOR):
        plan = make_plan(smollm2, "vllm", mode, 2)
        assert "tp" in rules(plan)
        with pytest.raises(PlanDoesNotFitError) as caught:
            require_fit(plan)
        assert caught.value.hint is not None
        assert caught.value.hint.endswith("--tp 1")


def test_experts_of_768_do_not_fit_128_over_four_ranks(qwen3_moe: Path) -> None:
    # https://github.com/vllm-project/vllm/pull/44763
    assert make_plan(qwen3_moe, "vllm", Mode.BLOCK, 2).block == BlockSize(128, 128)
    plan = make_plan(qwen3_moe, "vllm", Mode.BLOCK, 4, BlockSize(128, 128))
    assert rules(plan) == {"expert-n", "row-k"}
    assert {p.count for p in plan.problems} == {8}
    assert make_plan(qwen3_moe, "sglang", Mode.BLOCK, 4).block == BlockSize(64, 64)


def test_routers_are_kept_and_spelled_out(qwen3_moe: Path) -> None:
    plan = make_plan(qwen3_moe, "sglang", Mode.BLOCK)
    kept = {t.name for t in plan.tensors if t.reason is Reason.ROUTER}
    assert kept == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    config = plan.quantization_config()
    names = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert config["ignored_layers"] == names
    assert config["modules_to_not_convert"] == names
    assert config["weight_block_size"] == [128, 128]


def test_parts_fused_on_disk_are_measured_one_by_one(tmp_path: Path) -> None:
    # Phi-3-mini: qkv 9216 = 3 * 3072; gate_up 16384 = 2 * 8192. Its N as a whole would
    # hide a part that does not divide.
    config = {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 3,
    }
    shapes = {
        "model.layers.0.self_attn.qkv_proj.weight": (3072 + 2 * 384, 3072),
        "model.layers.0.mlp.gate_up_proj.weight": (2 * 192, 3072),
    }
    model = save(tmp_path / "phi", config, shapes)
    plan = make_plan(model, None, Mode.BLOCK, 1, BlockSize(128, 128))
    assert [p.message for p in plan.problems if p.rule == "merged-n"] == [
        "gate of gate_up_proj has N = 192, not a multiple of 128"
    ]


def test_block_scales_of_parts_fused_on_disk_are_refused_and_single_scales_are_not(
    tmp_path: Path,
) -> None:
    # Both engines' _load_fused_module_from_checkpoint cut scales at the weight's rows.
    config = {"model_type": "phi3", "hidden_size": 256, "num_attention_heads": 2}
    shapes = {
        "model.layers.0.self_attn.qkv_proj.weight": (768, 256),
        "model.layers.0.self_attn.o_proj.weight": (256, 256),
    }
    model = save(tmp_path / "phi", config, shapes)
    for backend in ("vllm", "sglang"):
        plan = make_plan(model, backend, Mode.BLOCK)
        assert [(p.rule, p.tensor) for p in plan.problems] == [
            ("fused-on-disk", "model.layers.0.self_attn.qkv_proj.weight")
        ]
        assert make_plan(model, backend, Mode.PER_TENSOR).fits


def test_deepseek_s_576_rows_are_legal(tmp_path: Path) -> None:
    at = "model.layers.0.self_attn"
    shapes = {
        f"{at}.q_a_proj.weight": (1536, 7168),
        f"{at}.kv_a_proj_with_mqa.weight": (576, 7168),
        f"{at}.q_b_proj.weight": (24576, 1536),
        f"{at}.kv_b_proj.weight": (32768, 512),
        f"{at}.o_proj.weight": (7168, 16384),
    }
    config = {"model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128}
    model = save(tmp_path / "deepseek", config, shapes)
    for tp in (1, 8):
        plan = make_plan(model, "sglang", Mode.BLOCK, tp)
        assert plan.block == BlockSize(128, 128)
        assert {plan.scale_shape(t) for t in plan.tensors if "kv_a" in t.name} == {(5, 56)}


def test_a_kernel_for_128_refuses_other_blocks_on_the_gpus_that_have_it(
    llama8b: Path, smollm2: Path
) -> None:
    small = BlockSize(64, 64)
    plan = make_plan(llama8b, "vllm", Mode.BLOCK, 1, small)
    [problem] = plan.problems
    assert problem.rule == "kernel-128"
    assert problem.count == 14
    assert "compute capability 9.0" in problem.message
    assert "down_proj (4096x14336 per GPU) and 3 more" in problem.message
    for gpu in ((8, 9), (10, 0), None):
        assert make_plan(llama8b, "vllm", Mode.BLOCK, 1, small, gpu=gpu).fits
    assert make_plan(llama8b, "vllm", Mode.BLOCK).fits
    # 576 does not divide by 128.
    assert make_plan(smollm2, "vllm", Mode.BLOCK, 1, small).fits


def test_what_launch_switches_off_by_itself_is_not_refused(llama8b: Path) -> None:
    small = BlockSize(64, 64)
    assert make_plan(llama8b, "sglang", Mode.BLOCK, 1, small).fits
    # A plan for both engines holds vLLM's rule.
    assert rules(make_plan(llama8b, None, Mode.BLOCK, 1, small)) == {"kernel-128"}


def test_a_fused_moe_has_a_kernel_that_is_told_the_block(qwen3_moe: Path) -> None:
    plan = make_plan(qwen3_moe, "vllm", Mode.BLOCK, 1, BlockSize(64, 64))
    [problem] = plan.problems
    assert "experts" not in problem.tensor
    assert problem.count == 8  # q, k, v and o of two layers


def modules(folder: Path, tp: int) -> set[tuple[str, int, int]]:
    checkpoint = read_checkpoint(folder)
    names = [n for n in checkpoint.tensors if ".self_attn." in n or ".mlp." in n]
    return {(m.name, m.n, m.k) for m in planning.engine_modules(checkpoint, names, tp)}


def test_a_kernel_sees_what_is_fused_and_cut(llama8b: Path) -> None:
    assert modules(llama8b, 1) == {
        ("qkv_proj", 6144, 4096),
        ("o_proj", 4096, 4096),
        ("gate_up_proj", 28672, 4096),
        ("down_proj", 4096, 14336),
    }
    # 8 key-value heads on 16 ranks are doubled: 2 query heads and one of each kind.
    assert modules(llama8b, 16) == {
        ("qkv_proj", 512, 4096),
        ("o_proj", 4096, 256),
        ("gate_up_proj", 1792, 4096),
        ("down_proj", 4096, 896),
    }


def test_modules_of_one_name_in_two_sizes_are_not_added_up(tmp_path: Path) -> None:
    config, shapes = dense(256, 512, 2, 2, 128)
    for part in ("gate_proj", "up_proj"):
        shapes[f"model.layers.1.mlp.{part}.weight"] = (96, 256)
    shapes["model.layers.1.mlp.down_proj.weight"] = (256, 96)
    found = modules(save(tmp_path / "uneven", config, shapes), 1)
    assert {one for one in found if one[0] == "gate_up_proj"} == {
        ("gate_up_proj", 1024, 256),
        ("gate_up_proj", 192, 256),
    }


@pytest.mark.parametrize(
    ("n", "k", "taken"), [(128, 128, True), (64, 128, False), (128, 64, False), (192, 256, False)]
)
def test_the_kernel_for_128_takes_whole_multiples_of_both_sides(
    n: int, k: int, taken: bool
) -> None:
    one = fitting.Module("m", n, k)
    assert fitting.in_128_kernel((one,)) == ((one,) if taken else ())
    # Experts have another kernel.
    assert fitting.in_128_kernel((fitting.Module("m", n, k, expert=True),)) == ()


def test_an_unknown_architecture_is_planned_by_names_with_a_warning(tmp_path: Path) -> None:
    config, shapes = dense(256, 512, 4, 4, 64)
    model = save(tmp_path / "new", {**config, "model_type": "brand_new"}, shapes)
    plan = make_plan(model, "vllm", Mode.BLOCK)
    assert plan.family == "unknown"
    assert "brand_new" in plan.notes[0]
    assert sum(1 for _ in plan.quantized) == 14


def test_a_quantised_source_is_refused(tmp_path: Path) -> None:
    config, shapes = dense(256, 512, 4, 4, 64)
    eight = save(tmp_path / "eight", config, shapes, dtype="F8_E4M3")
    with pytest.raises(UnsupportedError, match="quantised already"):
        make_plan(eight, None, Mode.BLOCK)
    marked = save(
        tmp_path / "marked", {**config, "quantization_config": {"quant_method": "awq"}}, shapes
    )
    with pytest.raises(UnsupportedError, match="'awq'"):
        make_plan(marked, None, Mode.BLOCK)


def test_options_that_cannot_be_meant_are_refused(smollm2: Path) -> None:
    with pytest.raises(UsageError, match="no meaning"):
        make_plan(smollm2, None, Mode.PER_TENSOR, 1, BlockSize(64, 64))
    with pytest.raises(UsageError, match="not positive"):
        make_plan(smollm2, None, Mode.BLOCK, 0)


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_manifest_reads_back_equal(smollm2: Path, mode: Mode, tp: int) -> None:
    plan = make_plan(smollm2, "sglang", mode, tp)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_manifest_that_was_edited_is_refused(smollm2: Path) -> None:
    good = make_plan(smollm2, "sglang", Mode.BLOCK).to_json()
    Plan.from_json(good)
    for key, value in (("tp", 2), ("schema", 99), ("tensors", []), ("mode", "x"), ("notes", None)):
        with pytest.raises(UsageError):
            Plan.from_json({**good, key: value})
    with pytest.raises(UsageError, match="was edited"):
        Plan.from_json({**good, "recipe": "ue8m0"})
    with pytest.raises(UsageError, match="recipe 'inverse-scale'"):
        Plan.from_json({**good, "recipe": "inverse-scale"})
    # Of that schema every plan was for one recipe, whatever it said.
    with pytest.raises(UsageError, match="schema 2; expected 3: another version of fp8ctl") as e:
        Plan.from_json({**good, "schema": 2})
    assert "fp8ctl plan" in (e.value.hint or "")
    moved = Plan.from_json({**good, "model": "/elsewhere"})
    assert moved.digest == good["digest"]


def test_bytes_count_codes_and_scales(smollm2: Path) -> None:
    plan = make_plan(smollm2, "sglang", Mode.BLOCK)
    q = next(t for t in plan.tensors if t.name.endswith("q_proj.weight"))
    assert q.bytes_before == 576 * 576 * 2
    assert plan.bytes_of(q) == 576 * 576 + 4 * 9 * 9


def run(model: Path, out: Path | None = None, **options: object) -> tuple[dict[str, object], str]:
    """Return what the command gives to a program, and what it prints for people."""
    arguments: dict[str, object] = {"backend": "sglang", "mode": "block", "tp": 1}
    arguments |= {"block_size": None, "model": str(model), **options}
    text = io.StringIO()
    planning.run(Reporter(out=text, err=io.StringIO()), out=out, **arguments)  # type: ignore[arg-type]
    quiet = Reporter(json_mode=True, out=io.StringIO(), err=io.StringIO())
    return planning.run(quiet, out=None, **arguments), text.getvalue()  # type: ignore[arg-type]


def test_a_name_without_layers_is_printed_as_it_is(tmp_path: Path) -> None:
    config, shapes = dense(256, 512, 4, 4, 64)
    names = {"lm_head.weight": (32, 256), "model.norm.weight": (256,), "odd": (3,)}
    _, text = run(save(tmp_path / "model", config, {**shapes, **names}))
    assert names.keys() <= {line.split()[0] for line in text.splitlines()}


def test_the_command_groups_layers_and_writes_the_manifest(smollm2: Path, tmp_path: Path) -> None:
    data, text = run(smollm2, tmp_path / "plan.json")
    rows = [line for line in text.splitlines() if "q_proj" in line and "K =" not in line]
    assert len(rows) == 1
    assert rows[0].split()[:5] == [
        "model.layers.*.self_attn.q_proj.weight",
        "2",
        "576x576",
        "fp8",
        "9x9",
    ]
    assert "14 of 17 tensors become FP8" in text
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written == data
    assert Plan.from_json(written).fits


def test_the_command_plans_scales_that_are_powers_of_two(smollm2: Path) -> None:
    data, text = run(smollm2, scale="ue8m0")
    assert data["recipe"] == "ue8m0"
    assert "blocks of 64x64, scales powers of two, tp 1" in text
    plain, said = run(smollm2, scale="fp32")
    assert plain == run(smollm2)[0]
    assert (plain["recipe"], "powers of two" in said) == ("ieee", False)
    assert plain["digest"] != data["digest"]


def test_the_command_shows_and_writes_a_plan_that_does_not_fit(
    smollm2: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanDoesNotFitError) as caught:
        run(smollm2, tmp_path / "plan.json", block_size="128,128")
    assert caught.value.data["fits"] is False
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


# --- a plan that others follow --------------------------------------------------------------------


def written(model: Path, out: Path, **options: object) -> Path:
    run(model, out, **options)
    return out


def test_a_plan_is_followed_as_it_was_written(smollm2: Path, tmp_path: Path) -> None:
    keep = ["model.layers.0"]
    path = written(smollm2, tmp_path / "plan.json", keep=keep, gpu="8.9")
    plan = read_plan(path, Typed())
    assert plan == make_plan(smollm2, "sglang", Mode.BLOCK, gpu=(8, 9), keep=keep)
    # What says the same may stand beside it.
    same = Typed("sglang", Mode.BLOCK, 1, BlockSize(64, 64), (8, 9), tuple(keep))
    assert read_plan(path, same) == plan


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (Typed(backend="vllm"), "--backend vllm beside --plan"),
        (Typed(mode=Mode.PER_TENSOR), "--mode per-tensor beside"),
        (Typed(tp=2), "--tp 2 beside"),
        (Typed(block=BlockSize(32, 32)), "--block-size 32,32 beside"),
        (Typed(gpu=(8, 9)), r"--gpu 8\.9 beside"),
        (Typed(keep=("lm_head",)), "--keep lm_head beside"),
        (Typed(quantize=("x",)), "--quantize x beside"),
    ],
)
def test_an_option_that_a_plan_contradicts_is_refused(
    smollm2: Path, tmp_path: Path, typed: Typed, said: str
) -> None:
    path = written(smollm2, tmp_path / "plan.json")
    with pytest.raises(UsageError, match=said) as caught:
        read_plan(path, typed)
    assert str(caught.value.hint).startswith("leave --")


def test_a_plan_for_both_engines_serves_each(smollm2: Path, tmp_path: Path) -> None:
    plan = make_plan(smollm2, None, Mode.BLOCK)
    path = tmp_path / "plan.json"
    path.write_text(dumps(plan.to_json()))
    for backend in ("vllm", "sglang"):
        assert read_plan(path, Typed(backend=backend)) == plan


def test_a_plan_goes_with_a_copy_of_its_model_and_with_no_other(
    smollm2: Path, llama8b: Path, tmp_path: Path
) -> None:
    path = written(smollm2, tmp_path / "plan.json")
    moved = smollm2.rename(tmp_path / "moved")
    assert read_plan(path, Typed(), moved).model == moved
    with pytest.raises(CheckpointError, match="is not the model of"):
        read_plan(path, Typed(), llama8b)
    with pytest.raises(CheckpointError):
        read_plan(path, Typed())


def test_a_file_that_is_no_plan_is_told_apart(smollm2: Path, tmp_path: Path) -> None:
    path = written(smollm2, tmp_path / "plan.json")
    text = path.read_text()
    with pytest.raises(NotFoundError, match="cannot read"):
        read_plan(tmp_path / "none.json", Typed())
    for broken in (
        "",
        "[]",
        "{}",
        text[:-30],
        text.replace('"quantize": true', '"quantize": false'),
    ):
        path.write_text(broken)
        with pytest.raises(UsageError):
            read_plan(path, Typed())


def test_a_manifest_has_a_line_for_each_tensor(smollm2: Path, tmp_path: Path) -> None:
    lines = written(smollm2, tmp_path / "plan.json").read_text().splitlines()
    plan = make_plan(smollm2, "sglang", Mode.BLOCK)
    assert len(lines) == len(plan.tensors)
    # A rule that looks like what is between tensors changes nothing of that.
    odd = 're:.*}, {"name": "|.*o_proj'
    plan = make_plan(smollm2, "sglang", Mode.BLOCK, keep=[odd])
    text = dumps(plan.to_json())
    assert Plan.from_json(json.loads(text)) == plan
    assert len(text.splitlines()) == len(plan.tensors)


@pytest.mark.parametrize("text", ["9", "9.x", "hopper", "", "-9.0"])
def test_a_gpu_is_a_compute_capability(text: str) -> None:
    assert planning.parse_gpu("8.9") == (8, 9)
    assert planning.parse_gpu("12.0") == (12, 0)
    assert planning.parse_gpu("none") is None
    with pytest.raises(UsageError, match="no compute capability"):
        planning.parse_gpu(text)


def test_a_model_that_the_engine_s_version_has_no_class_for_is_noted(tmp_path: Path) -> None:
    config, shapes = dense(256, 512, 4, 4, 64)
    model = save(tmp_path / "new", {**config, "model_type": "qwen3_next"}, shapes)
    [note] = make_plan(model, None, Mode.BLOCK).notes
    assert "vLLM 0.9.1 and SGLang 0.4.8 have no class of Qwen3-Next" in note


def test_a_name_that_transformers_would_take_for_part_of_another_is_noted(tmp_path: Path) -> None:
    config, shapes = dense(256, 512, 4, 4, 64)
    router = {"model.layers.1.mlp.gate.weight": (4, 256)}
    model = save(tmp_path / "both", config, {**shapes, **router})
    [note] = make_plan(model, "vllm", Mode.BLOCK).notes
    assert "model.layers.1.mlp.gate in modules_to_not_convert" in note
    assert "model.layers.1.mlp.gate_proj" in note
    assert not make_plan(save(tmp_path / "one", config, shapes), "vllm", Mode.BLOCK).notes


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kimi-K2's layout in 61 files."""
    folder = tmp_path_factory.mktemp("kimi") / "k2"
    return public_models.save(folder, public_models.LAYOUTS["Kimi-K2"](), shards=61)


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--json"], ["--out", "/dev/null"]], ids=str)
def test_a_trillion_parameters_are_planned_in_two_seconds(kimi: Path, more: list[str]) -> None:
    """The whole command, in seconds of CPU, which a busy machine stretches, but not every time."""
    argv = [sys.executable, "-m", "fp8ctl", "plan", "--model", str(kimi), "--backend", "sglang"]
    taken: list[float] = []
    while len(taken) < 8 and min(taken, default=9) > 2:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*argv, "--tp", "8", *more], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if more == ["--json"]:
            assert len(json.loads(done.stdout)["data"]["tensors"]) == 69_975
        else:
            assert b"69608 of 69975 tensors become FP8" in done.stdout
    assert min(taken) <= 2, taken
