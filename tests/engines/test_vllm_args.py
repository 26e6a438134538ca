"""vLLM 0.9.1: every mode's command line, every refusal; names against the released source."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8ctl.engines import vllm
from fp8ctl.engines.base import CPU, Device, LaunchPlan, LaunchRequest, ModelFacts
from fp8ctl.errors import ConflictError, PlanDoesNotFitError, UnsupportedError, UsageError
from fp8ctl.fitting import Module

if TYPE_CHECKING:
    from collections.abc import Callable

H100 = Device("cuda", (9, 0), 8, "H100")
B200 = Device("cuda", (10, 0), 1, "B200")
L40 = Device("cuda", (8, 9), 1, "L40S")
A100 = Device("cuda", (8, 0), 1, "A100")
T4 = Device("cuda", (7, 5), 1, "T4")
BF16 = ModelFacts(Path("/models/m"), "m")
BLOCK_128 = ModelFacts(Path("/models/m"), "m", "fp8", (128, 128))
CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"]}


def build(**more: object) -> LaunchPlan:
    fields: dict[str, object] = {
        "python": Path("/env/bin/python"),
        "model": BLOCK_128,
        "source": "checkpoint",
        "device": H100,
        "host": "127.0.0.1",
        "port": 8000,
        "run_dir": Path("/run/vllm-8000"),
        "hook_path": Path("/hook"),
        "applied": frozenset({"refit"}),
        "cache_root": Path("/cache/vllm/abc"),
    }
    return vllm.build(LaunchRequest(**{**fields, **more}))  # type: ignore[arg-type]


def value(plan: LaunchPlan, name: str) -> str:
    return plan.argv[plan.argv.index(name) + 1]


def test_a_checkpoint_is_served_with_its_own_configuration() -> None:
    plan = build()
    assert plan.argv[:5] == (
        "/env/bin/python",
        "-m",
        "fp8ctl.engines.hooks.vllm_server",
        "--model",
        "/models/m",
    )
    assert not {"--quantization", "--hf-overrides"} & set(plan.argv)
    assert dict(plan.env)["VLLM_CACHE_ROOT"] == "/cache/vllm/abc"


def test_the_override_carries_the_whole_configuration() -> None:
    plan = build(model=BF16, source="override", override=CONFIG, await_push=True)
    assert value(plan, "--quantization") == "fp8"
    assert value(plan, "--load-format") == "auto"
    assert json.loads(value(plan, "--hf-overrides")) == {"quantization_config": CONFIG}
    assert dict(plan.env)["FP8CTL_AWAIT_PUSH"] == "1"


def test_without_a_gpu_it_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="CUDA GPUs only") as caught:
        build(device=CPU)
    assert caught.value.exit_code == 4
    assert "sglang" in str(caught.value.hint)


def test_online_on_a_forced_tree_is_refused_with_the_revert_command() -> None:
    forced = frozenset({"force-fp8-serialized"})
    online: list[dict[str, object]] = [
        {"source": "online"},
        {"source": "method", "quantization": "fp8"},
    ]
    for more in online:
        for there in ({"applied": forced}, {"applied": frozenset(), "present": forced}):
            with pytest.raises(ConflictError, match="force-fp8-serialized") as caught:
                build(model=BF16, **more, **there)
            assert caught.value.exit_code == 5
            assert caught.value.hint == (
                "fp8ctl revert --python /env/bin/python --backend vllm --patch force-fp8-serialized"
            )
        assert value(build(model=BF16, **more, applied=frozenset()), "--quantization") == "fp8"
    # What is FP8 already is what the patch is for.
    build(applied=forced)
    build(source="method", quantization="fp8", applied=forced)


def test_a_push_needs_refit() -> None:
    push: dict[str, object] = {
        "model": BF16,
        "source": "override",
        "override": CONFIG,
        "await_push": True,
    }
    with pytest.raises(ConflictError, match="patch refit of vllm is not applied"):
        build(**push, applied=frozenset())
    with pytest.raises(UnsupportedError, match="repacks"):
        build(**push, device=A100)
    with pytest.raises(ConflictError, match="waits for FP8 weights"):
        build(model=BF16, source="online", await_push=True)


@pytest.mark.parametrize("method", ["fp4", "", "w8a8_fp8"])
def test_an_unknown_method_is_refused_with_the_list(method: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(model=BF16, source="method", quantization=method)
    assert all(one in caught.value.message for one in vllm.QUANTIZATION)


def test_torchao_config_is_sglangs() -> None:
    with pytest.raises(UsageError, match="SGLang's"):
        build(model=BF16, source="torchao", torchao_config="int8wo")


@pytest.mark.parametrize("method", vllm.QUANTIZATION)
def test_every_method_has_an_answer_for_a_16_bit_model(method: str) -> None:
    if method in {"fp8", "bitsandbytes", "experts_int8"}:
        plan = build(model=BF16, source="method", quantization=method)
        assert value(plan, "--quantization") == method
    elif method in {"tpu_int8", "neuron_quant", "ptpc_fp8", "ipex"}:
        with pytest.raises(UnsupportedError, match=f"--quantization {method} .* runs on"):
            build(model=BF16, source="method", quantization=method)
    else:
        with pytest.raises(PlanDoesNotFitError, match="is a 16-bit checkpoint"):
            build(model=BF16, source="method", quantization=method)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("marlin", "gptq"),
        ("gptq_marlin", "gptq"),
        ("awq_marlin", "awq"),
        ("fp8", "fp8"),
        ("compressed-tensors", "compressed-tensors"),
        ("quark", "quark"),
        ("aqlm", "aqlm"),
    ],
)
def test_a_method_takes_the_checkpoints_of_its_kind(method: str, kind: str) -> None:
    build(model=ModelFacts(Path("/m"), "m", kind), source="method", quantization=method)
    with pytest.raises(PlanDoesNotFitError, match="quantised with 'other'"):
        build(model=ModelFacts(Path("/m"), "m", "other"), source="method", quantization=method)


def test_older_gpus_serve_weights_only_or_not_at_all() -> None:
    assert any("Marlin" in note for note in build(device=A100).notes)
    assert not any("Marlin" in note for note in build(device=L40).notes)
    with pytest.raises(UnsupportedError, match=r">= 8\.0"):
        build(device=T4)


WIDE = (Module("down_proj", 256, 512),)
NARROW = (Module("down_proj", 576, 1536),)


def test_other_blocks_must_not_enter_the_kernel_for_128() -> None:
    def model(modules: tuple[Module, ...]) -> ModelFacts:
        return ModelFacts(Path("/m"), "m", "fp8", (64, 64), modules=modules)

    with pytest.raises(PlanDoesNotFitError, match=r"64x64: .* down_proj \(256x512") as caught:
        build(model=model(WIDE))
    assert caught.value.exit_code == 8
    # What cannot be seen is not called safe.
    with pytest.raises(PlanDoesNotFitError, match="some layers"):
        build(model=model(()))
    build(model=model(NARROW))
    # No such kernel there, or one that looks at the scales.
    for device in (L40, B200):
        build(model=model(WIDE), device=device)


def test_the_revert_command_of_a_folder_with_a_space_can_be_typed() -> None:
    forced = frozenset({"force-fp8-serialized"})
    with pytest.raises(ConflictError) as caught:
        build(model=BF16, source="online", applied=forced, python=Path("/my env/bin/python"))
    assert shlex.split(str(caught.value.hint))[3] == "/my env/bin/python"


def test_short_flags_are_options_too() -> None:
    for extra in (("-tp", "2"), ("-q", "fp8"), ("--tensor_parallel_size=2",), ("--model", "x")):
        with pytest.raises(UsageError, match="fp8ctl has --"):
            build(extra=extra)
    # vLLM's --block-size is of its KV cache, and the user's.
    assert build(extra=("--block-size", "16")).argv[-2:] == ("--block-size", "16")


def test_the_key_goes_by_name_only() -> None:
    plan = build(environ={"FP8CTL_API_KEY": "s3cret"})
    assert plan.env_from == (("VLLM_API_KEY", "FP8CTL_API_KEY"),)
    assert "s3cret" not in repr(plan)
    assert build().env_from == ()


def test_more_shards_than_gpus_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="--tp 16 needs 16 GPUs"):
        build(tp=16)
    assert value(build(tp=8), "--tensor-parallel-size") == "8"


@pytest.mark.wheels
def test_names_are_those_of_the_released_source(engine_sources: Callable[[str], Path]) -> None:
    root = engine_sources("vllm") / "vllm"
    text = "".join(
        (root / name).read_text()
        for name in ("engine/arg_utils.py", "entrypoints/openai/cli_args.py")
    )
    known = set(re.findall(r"[\"'](--[a-z0-9-]+)[\"']", text))
    plans = [build(tp=2), build(model=BF16, source="override", override=CONFIG)]
    for plan in plans:
        assert {word for word in plan.argv if word.startswith("--")} <= known
    methods = (root / "model_executor/layers/quantization/__init__.py").read_text()
    listed = ast.literal_eval(
        re.search(r"QuantizationMethods = Literal(\[.*?\])", methods, re.S)[1]  # type: ignore[index]
    )
    assert tuple(listed) == vllm.QUANTIZATION
    assert '"VLLM_CACHE_ROOT"' in (root / "envs.py").read_text()


@pytest.mark.parametrize("extra", [("--hos", "0.0.0.0"), ("--load=dummy",), ("--api", "k")])
def test_a_shortened_flag_does_not_pass_the_refusals(extra: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="may be short for"):
        build(extra=extra)


@pytest.mark.parametrize(
    "extra",
    [("-dp", "2"), ("--data_parallel_size=2",), ("-pp", "2"), ("--enable-expert-parallel",)],
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
