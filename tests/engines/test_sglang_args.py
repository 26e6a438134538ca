"""SGLang 0.4.8: every mode's command line, every refusal; names against the released source."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8ctl.engines import sglang
from fp8ctl.engines.base import CPU, Device, LaunchPlan, LaunchRequest, ModelFacts
from fp8ctl.errors import (
    ConflictError,
    Fp8ctlError,
    PlanDoesNotFitError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

H100 = Device("cuda", (9, 0), 8, "H100")
L40 = Device("cuda", (8, 9), 1, "L40S")
A100 = Device("cuda", (8, 0), 1, "A100")
T4 = Device("cuda", (7, 5), 1, "T4")
BF16 = ModelFacts(Path("/models/m"), "m")
BLOCK_64 = ModelFacts(Path("/models/m"), "m", "fp8", (64, 64))
BLOCK_128 = ModelFacts(Path("/models/m"), "m", "fp8", (128, 128))
ALL = frozenset({"cpu-fp8", "block-quant-override", "refit", "unscaled-guard"})
PACKAGES = frozenset({"vllm"})
CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"]}


def build(**more: object) -> LaunchPlan:
    fields: dict[str, object] = {
        "python": Path("/env/bin/python"),
        "model": BLOCK_128,
        "source": "checkpoint",
        "device": CPU,
        "host": "127.0.0.1",
        "port": 30000,
        "run_dir": Path("/run/sglang-30000"),
        "hook_path": Path("/hook"),
        "applied": ALL,
        "installed": PACKAGES,
    }
    return sglang.build(LaunchRequest(**{**fields, **more}))  # type: ignore[arg-type]


def flags(plan: LaunchPlan) -> list[str]:
    return [word for word in plan.argv if word.startswith("--")]


def value(plan: LaunchPlan, name: str) -> str:
    return plan.argv[plan.argv.index(name) + 1]


def test_the_line_for_a_cpu_is_the_one_that_was_run() -> None:
    plan = build()
    assert plan.argv[:3] == ("/env/bin/python", "-m", "fp8ctl.engines.hooks.sglang_server")
    text = " ".join(plan.argv)
    assert (
        "--device cpu --attention-backend torch_native --sampling-backend pytorch "
        "--disable-cuda-graph --disable-overlap-schedule --disable-custom-all-reduce "
        "--sleep-on-idle" in text
    )
    assert dict(plan.env)["SGLANG_USE_CPU_ENGINE"] == "1"
    assert plan.url == "http://127.0.0.1:30000"


def test_a_gpu_gets_none_of_the_cpu_options() -> None:
    plan = build(device=H100)
    assert not {"--device", "--disable-cuda-graph", "--max-total-tokens"} & set(plan.argv)
    assert "SGLANG_USE_CPU_ENGINE" not in dict(plan.env)


def test_a_checkpoint_with_its_own_configuration_gets_no_quantization_argument() -> None:
    plan = build()
    assert not {"--quantization", "--json-model-override-args"} & set(plan.argv)


def test_the_override_carries_the_whole_configuration() -> None:
    plan = build(model=BF16, source="override", override=CONFIG, await_push=True)
    assert value(plan, "--quantization") == "fp8"
    assert value(plan, "--load-format") == "auto"
    overrides = json.loads(value(plan, "--json-model-override-args"))
    assert overrides == {"quantization_config": CONFIG}
    assert dict(plan.env)["FP8CTL_AWAIT_PUSH"] == "1"
    assert plan.await_push


def test_the_users_arguments_win_and_nothing_is_given_twice() -> None:
    extra = ("--mem-fraction-static", "0.3", "--max-total-tokens=4096", "--random-seed", "0")
    plan = build(extra=extra)
    assert plan.argv[-5:] == extra
    assert flags(plan).count("--mem-fraction-static") == 1
    assert not any(word == "--max-total-tokens" for word in plan.argv)


def test_the_users_own_address_is_where_the_server_is_looked_for() -> None:
    assert build(extra=("--port", "31000")).url == "http://127.0.0.1:31000"
    with pytest.raises(UsageError, match="not a port"):
        build(extra=("--port", "http"))


@pytest.mark.parametrize(
    "extra",
    [
        ("--model-path", "x"),
        ("--tp", "2"),
        ("--tp-size=2",),
        ("--tensor_parallel_size", "2"),
        ("--quantization", "fp8"),
        ("--torchao-config", "int8wo"),
    ],
)
def test_what_the_plan_depends_on_is_not_taken_behind_the_dashes(extra: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="fp8ctl has --"):
        build(extra=extra)
    # Positive control: an option whose name only begins the same.
    build(extra=("--quantization-param-path", "p"))


def test_an_override_of_the_users_must_not_lose_the_configuration() -> None:
    push: dict[str, object] = {"model": BF16, "source": "override", "override": CONFIG}
    with pytest.raises(ConflictError, match="replaces the one") as caught:
        build(**push, extra=("--json-model-override-args", '{"rope_theta": 1}'))
    assert '"quantization_config"' in str(caught.value.hint)
    own = '{"rope_theta": 1, "quantization_config": {"quant_method": "fp8"}}'
    assert own in build(**push, extra=("--json-model-override-args", own)).argv
    # Where nothing of ours is in it, theirs goes through.
    build(extra=("--json-model-override-args", "{}"))


@pytest.mark.parametrize("method", ["fp4", "FP8", "blockwise_int8", "compressed-tensors", ""])
def test_an_unknown_method_is_refused_with_the_list(method: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(model=BF16, source="method", quantization=method)
    assert all(one in caught.value.message for one in sglang.QUANTIZATION)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "method", sorted(set(sglang.QUANTIZATION) - {"fp8", "w8a8_fp8", "bitsandbytes"})
)
def test_a_method_with_a_checkpoint_of_its_own_refuses_a_16_bit_model(method: str) -> None:
    for device in (CPU, H100):
        with pytest.raises(PlanDoesNotFitError, match="is a 16-bit checkpoint") as caught:
            build(model=BF16, source="method", quantization=method, device=device)
        assert f"--quantization {method} loads" in caught.value.message


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("awq", "awq"),
        ("gptq", "gptq"),
        ("marlin", "gptq"),
        ("marlin", "awq"),
        ("gptq_marlin", "gptq"),
        ("awq_marlin", "awq"),
        ("modelopt", "modelopt"),
        ("w8a8_int8", "compressed-tensors"),
        ("w8a8_fp8", "compressed-tensors"),
        ("moe_wna16", "gptq"),
        ("qoq", "qoq"),
        ("fp8", "fp8"),
        ("fp8", None),
        ("w8a8_fp8", None),
    ],
)
def test_a_method_takes_the_checkpoints_of_its_kind(method: str, kind: str | None) -> None:
    model = ModelFacts(Path("/m"), "m", kind)
    plan = build(model=model, source="method", quantization=method, device=H100)
    assert value(plan, "--quantization") == method


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    model = ModelFacts(Path("/m"), "m", "gptq")
    with pytest.raises(PlanDoesNotFitError, match="quantised with 'gptq'"):
        build(model=model, source="method", quantization="fp8", device=H100)


def test_a_configuration_beside_config_json_counts() -> None:
    model = ModelFacts(Path("/m"), "m", sidecars=frozenset({"quantize_config.json"}))
    build(model=model, source="method", quantization="gptq", device=H100)


def test_methods_that_borrow_from_vllm_need_it() -> None:
    model = ModelFacts(Path("/m"), "m", "awq")
    with pytest.raises(UnsupportedError, match="package vllm"):
        build(model=model, source="method", quantization="awq", device=H100, installed=frozenset())


def test_bitsandbytes_cannot_load_beside_the_vllm_it_borrows_from() -> None:
    with pytest.raises(UnsupportedError, match="named qweight") as caught:
        build(model=BF16, source="method", quantization="bitsandbytes", device=H100)
    assert "--backend vllm" in (caught.value.hint or "")


GOOD_TORCHAO = [
    "int8dq",
    "int8wo",
    "int4wo-32",
    "int4wo-64",
    "int4wo-128",
    "int4wo-256",
    "fp8wo",
    "fp8dq-per_tensor",
    "fp8dq-per_row",
]


@pytest.mark.parametrize("config", GOOD_TORCHAO)
def test_every_torchao_config_of_the_list_is_passed_on(config: str) -> None:
    plan = build(model=BF16, source="torchao", torchao_config=config, device=H100)
    assert value(plan, "--torchao-config") == config
    assert ("--disable-cuda-graph" in plan.argv) is (config == "int8dq")
    assert any("int8dq" in note for note in plan.notes) is (config == "int8dq")


@pytest.mark.parametrize(
    "config",
    [
        "int4wo",
        "int4wo-16",
        "int4wo-128x",
        "fp8dq",
        "fp8dq-per_col",
        "gemlite",
        "",
        "fp8",
        "gemlite-2-64",
        "gemlite-4",
        "gemlite-8-64",
        "my-int8wo",
        "int8wo-2",
    ],
)
def test_any_other_torchao_config_is_refused_with_the_list(config: str) -> None:
    with pytest.raises(UsageError, match="int4wo-256") as caught:
        build(model=BF16, source="torchao", torchao_config=config, device=H100)
    assert caught.value.exit_code == 2


def test_torchao_quantises_16_bit_models_only() -> None:
    with pytest.raises(PlanDoesNotFitError, match="quantised with 'fp8'"):
        build(source="torchao", torchao_config="int8wo", device=H100)


@pytest.mark.parametrize(
    "config",
    ["gemlite-4-64", "gemlite-8-4-64", "gemlite-32-4-128", "gemlite-8-None", "gemlite-16-8-None"],
)
def test_gemlite_would_serve_16_bits_and_say_nothing(config: str) -> None:
    with pytest.raises(UnsupportedError, match="quantises nothing"):
        build(model=BF16, source="torchao", torchao_config=config, device=H100)


@pytest.mark.parametrize("config", ["fp8wo", "fp8dq-per_tensor", "fp8dq-per_row"])
def test_fp8_of_torchao_needs_8_9(config: str) -> None:
    with pytest.raises(UnsupportedError, match=r">= 8\.9.*A100 \(compute capability 8\.0\)"):
        build(model=BF16, source="torchao", torchao_config=config, device=A100)
    build(model=BF16, source="torchao", torchao_config=config, device=L40)


@pytest.mark.parametrize("source", ["checkpoint", "online"])
def test_fp8_needs_8_9(source: str) -> None:
    model = BF16 if source == "online" else BLOCK_128
    with pytest.raises(UnsupportedError, match=r">= 8\.9") as caught:
        build(model=model, source=source, device=A100)
    assert caught.value.exit_code == 4
    build(model=model, source=source, device=L40)


@pytest.mark.parametrize(
    ("more", "device"),
    [
        ({"source": "torchao", "torchao_config": "int4wo-64", "model": BF16}, T4),
        ({"source": "method", "quantization": "w8a8_fp8", "model": BF16}, A100),
        (
            {
                "source": "method",
                "quantization": "marlin",
                "model": ModelFacts(Path("/"), "m", "gptq"),
            },
            T4,
        ),
    ],
)
def test_an_older_gpu_is_refused_with_what_it_has(more: dict[str, object], device: Device) -> None:
    with pytest.raises(UnsupportedError, match=device.name):
        build(**more, device=device)
    build(**more, device=H100)


@pytest.mark.parametrize("config", sorted(set(GOOD_TORCHAO) - {"int8wo", "int8dq"}))
def test_torchao_on_a_cpu_is_int8_only(config: str) -> None:
    with pytest.raises(UnsupportedError, match="no GPU") as caught:
        build(model=BF16, source="torchao", torchao_config=config)
    assert caught.value.exit_code == 4
    build(model=BF16, source="torchao", torchao_config="int8wo")


def test_methods_on_a_cpu_are_fp8_only() -> None:
    with pytest.raises(UnsupportedError, match="CUDA kernels only"):
        build(model=ModelFacts(Path("/"), "m", "awq"), source="method", quantization="awq")
    build(model=BF16, source="method", quantization="fp8")


def test_a_cpu_needs_its_patch_and_says_how_to_get_it() -> None:
    with pytest.raises(ConflictError, match="cpu-fp8") as caught:
        build(applied=ALL - {"cpu-fp8"})
    assert caught.value.exit_code == 5
    assert caught.value.hint == "fp8ctl patch --python /env/bin/python --backend sglang"
    build(applied=frozenset(), device=H100)


def test_a_push_needs_refit() -> None:
    push: dict[str, object] = {
        "model": BF16,
        "source": "override",
        "override": CONFIG,
        "await_push": True,
        "device": H100,
    }
    with pytest.raises(ConflictError, match="refit"):
        build(**push, applied=frozenset())
    build(**push, applied=frozenset({"refit"}))


@pytest.mark.parametrize(
    "more",
    [
        {"source": "online"},
        {"source": "method", "quantization": "fp8"},
        {"source": "torchao", "torchao_config": "int8wo"},
    ],
)
def test_only_fp8_weights_can_be_awaited(more: dict[str, object]) -> None:
    with pytest.raises(ConflictError, match="--await-push waits for FP8 weights"):
        build(model=BF16, await_push=True, **more)


def test_more_shards_than_gpus_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="--tp 16 needs 16 GPUs"):
        build(device=H100, tp=16)
    assert value(build(device=H100, tp=8), "--tp-size") == "8"
    # On a CPU the shards are processes.
    assert value(build(tp=2), "--tp-size") == "2"


def test_blocks_of_another_size_keep_away_from_kernels_for_128() -> None:
    off = {"SGL_ENABLE_JIT_DEEPGEMM", "SGLANG_SUPPORT_CUTLASS_BLOCK_FP8"}
    env = dict(build(model=BLOCK_64, device=H100).env)
    assert {env[name] for name in off} == {"0"}
    for model, device in ((BLOCK_128, H100), (BLOCK_64, L40), (BLOCK_64, CPU)):
        assert not off & set(dict(build(model=model, device=device).env))


def test_blackwell_does_without_deepgemm() -> None:
    b200 = Device("cuda", (10, 0), 1, "B200")
    assert dict(build(device=b200).env)["SGL_ENABLE_JIT_DEEPGEMM"] == "0"


def test_the_trainers_variable_does_not_reach_a_server_of_ours() -> None:
    plan = build(environ={"FP8CTL_BLOCK_QUANT_CONFIG": "{}"})
    assert dict(plan.env)["FP8CTL_BLOCK_QUANT_CONFIG"] == ""
    assert "FP8CTL_BLOCK_QUANT_CONFIG" not in dict(build().env)


def test_no_key_is_in_the_plan() -> None:
    plan = build(host="0.0.0.0", environ={"FP8CTL_API_KEY": "s3cret"})
    assert "s3cret" not in repr(plan)
    with pytest.raises(ConflictError):
        build(host="0.0.0.0")


def test_every_refusal_can_be_acted_on() -> None:
    refused: list[dict[str, object]] = [
        {"applied": frozenset()},
        {"device": A100},
        {"source": "method", "quantization": "x"},
        {"host": "0.0.0.0"},
        {"extra": ("--tp", "2")},
    ]
    for more in refused:
        with pytest.raises(Fp8ctlError) as caught:
            build(**more)
        assert caught.value.hint


def test_the_loader_is_the_hooks_own() -> None:
    source = Path(sglang.__file__).with_name("hooks") / "sglang_worker.py"
    assert f'LOADER = "{sglang.WEIGHT_LOADER}"' in source.read_text()


@pytest.mark.wheels
def test_names_are_those_of_the_released_source(engine_sources: Callable[[str], Path]) -> None:
    srt = engine_sources("sglang") / "sglang" / "srt"
    arguments = (srt / "server_args.py").read_text()
    known = set(re.findall(r'"(--[a-z0-9-]+)"', arguments))
    plans = [
        build(tp=2),
        build(model=BF16, source="override", override=CONFIG),
        build(model=BF16, source="method", quantization="w8a8_fp8", device=H100),
        build(model=BF16, source="torchao", torchao_config="int8dq", device=H100),
    ]
    for plan in plans:
        assert set(flags(plan)) <= known
    block = arguments[arguments.index('"--quantization",') :]
    choices = ast.literal_eval(re.search(r"choices=(\[.*?\])", block, re.S)[1])  # type: ignore[index]
    assert tuple(choices) == sglang.QUANTIZATION
    everything = "".join(
        (srt / name).read_text()
        for name in (
            "layers/quantization/deep_gemm_wrapper/configurer.py",
            "layers/quantization/fp8_utils.py",
            "layers/quantization/fp8.py",
            "model_executor/model_runner.py",
            "utils.py",
        )
    )
    b64 = dict(build(model=BLOCK_64, device=H100).env)
    for variable in (v for v in b64 if v.startswith(("SGL_", "SGLANG_"))):
        assert f'"{variable}"' in everything, variable


@pytest.mark.parametrize("extra", [("--hos", "0.0.0.0"), ("--load=dummy",), ("--api", "k")])
def test_a_shortened_flag_does_not_pass_the_refusals(extra: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="may be short for"):
        build(extra=extra)


@pytest.mark.parametrize(
    "extra",
    [
        ("--dp", "2"),
        ("--pp-size=2",),
        ("--ep-size", "2"),
        ("--nnodes", "2"),
        ("--enable-dp-attention",),
    ],
)
def test_only_tensor_parallelism_is_covered(extra: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedError, match="is not covered, expected tensor parallelism only"):
        build(extra=extra)


def test_random_weights_wait_for_a_push() -> None:
    with pytest.raises(ConflictError, match="--load-format dummy serves random weights"):
        build(extra=("--load-format", "dummy"))
    build(extra=("--load-format", "dummy"), await_push=True)


@pytest.mark.parametrize("extra", [("--host", "0.0.0.0"), ("--host=::",)])
def test_the_users_own_host_is_the_one_that_needs_a_key(extra: tuple[str, ...]) -> None:
    with pytest.raises(ConflictError, match="FP8CTL_API_KEY is not set"):
        build(extra=extra)
    assert build(extra=extra, environ={"FP8CTL_API_KEY": "k"}).host in {"0.0.0.0", "::"}
    # Ours is not listened on where the user's is.
    assert build(host="0.0.0.0", extra=("--host", "127.0.0.1")).host == "127.0.0.1"
