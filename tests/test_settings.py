"""One object for a trainer: laws of what it gives, what it sets, and what it prints."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import os
import pickle
import re
import shlex
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from fp8ctl import cli, formats, planning, policy, snippets
from fp8ctl.engines import base, sglang, vllm
from fp8ctl.engines.base import Device, LaunchRequest, ModelFacts
from fp8ctl.engines.hooks.manifest import expected_names
from fp8ctl.errors import (
    ConflictError,
    NotFoundError,
    PlanDoesNotFitError,
    UnsupportedError,
    UsageError,
)
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.manifest import Plan, Problem
from fp8ctl.settings import OFF, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.policy import Backend

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "library.md"
BACKENDS: tuple[Backend, ...] = ("vllm", "sglang")
KINDS = tuple(snippets.KINDS)


def checkpoint(folder: Path) -> Path:
    """Write a two-layer Qwen3-MoE: headers and a hole where the weights would be."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 2048)}
    for i in range(2):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes |= {f"{at}.{p}_proj.weight": (512, 2048) for p in "kv"}
        shapes[f"{at}.q_proj.weight"] = (4096, 2048)
        shapes[f"{at}.o_proj.weight"] = (2048, 4096)
        shapes[f"{mlp}.gate.weight"] = (4, 2048)
        for j in range(4):
            shapes[f"{mlp}.experts.{j}.gate_proj.weight"] = (768, 2048)
            shapes[f"{mlp}.experts.{j}.up_proj.weight"] = (768, 2048)
            shapes[f"{mlp}.experts.{j}.down_proj.weight"] = (2048, 768)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (2048,)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, count = end, 2
        for side in shape:
            count *= side
        end += count
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "moe")


def plan_of(folder: Path, backend: Backend | None, mode: Mode = Mode.BLOCK, tp: int = 2) -> Plan:
    return planning.make_plan(folder, backend, mode, tp)


@pytest.fixture(params=["plan", "plan per-tensor", "mode", "mode per-tensor", "mode 64"])
def settings(request: pytest.FixtureRequest, moe: Path) -> Settings:
    """Settings of every kind, for either engine."""
    kind, _, rest = request.param.partition(" ")
    if kind == "plan":
        mode = Mode.PER_TENSOR if rest else Mode.BLOCK
        return Settings.from_plan(plan_of(moe, None, mode))
    if rest == "64":
        return Settings.from_mode("block", "64,64")
    return Settings.from_mode(rest or "block")


# --- what it is made from -------------------------------------------------------------------------


def test_it_reads_back_equal(settings: Settings) -> None:
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert Settings.from_json(OFF.to_json()) == OFF


@pytest.mark.parametrize(
    "change",
    [
        *({"schema": 9}, {"mode": "x"}, {"mode": 1}, {"block_size": "a"}, {"block_size": [1, 1]}),
        *({"backend": "tgi"}, {"tp": 0}, {"tp": "2"}, {"plan": {}}, {"plan": 1}),
    ],
)
def test_a_document_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    document = Settings.from_mode("block", backend="vllm", tp=2).to_json()
    with pytest.raises(UsageError):
        Settings.from_json({**document, **change})
    for key in change:
        with pytest.raises(UsageError):
            Settings.from_json({k: v for k, v in document.items() if k != key})


def test_a_plan_that_does_not_fit_gives_no_settings(moe: Path) -> None:
    plan = dataclasses.replace(
        plan_of(moe, "vllm"), problems=(Problem("row-k", "x.weight", 1, "K = 5"),)
    )
    with pytest.raises(PlanDoesNotFitError, match=r"x\.weight: K = 5"):
        Settings.from_plan(plan)


@pytest.mark.parametrize("word", [None, "", "off"])
def test_words_for_off(word: str | None) -> None:
    assert Settings.from_mode(word) is OFF
    assert not OFF
    with pytest.raises(UsageError, match="off"):
        Settings.from_mode(word, "128,128")


def test_trainers_say_fp8_for_blocks() -> None:
    assert Settings.from_mode("fp8") == Settings.from_mode("block", "128,128")


@pytest.mark.parametrize(
    ("mode", "block", "more"),
    [
        ("per-channel", None, {}),
        ("int8", None, {}),
        ("per-tensor", "128,128", {}),
        ("block", "0,1", {}),
        ("block", None, {"tp": 0}),
        ("block", None, {"backend": "tgi"}),
    ],
)
def test_what_cannot_be_meant_is_refused(
    mode: str, block: str | None, more: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as caught:
        Settings.from_mode(mode, block, **more)
    assert caught.value.hint


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_the_configuration_is_the_plans_own(moe: Path, backend: Backend | None) -> None:
    plan = plan_of(moe, None)
    settings = Settings.from_plan(plan)
    assert settings.quantization_config(backend) == plan.quantization_config(backend)
    assert "model.layers.0.mlp.gate" in str(settings.quantization_config(backend))


def keeping(plan: Plan, *names: str) -> Plan:
    """Return a plan that keeps these tensors, too."""
    tensors = tuple(
        t._replace(quantize=False, reason=policy.Reason.UNKNOWN) if t.name in names else t
        for t in plan.tensors
    )
    return dataclasses.replace(plan, tensors=tensors)


def test_kept_modules_are_spelled_as_the_engine_reads_them(moe: Path) -> None:
    at = "model.layers.1.self_attn"
    plan = keeping(plan_of(moe, None), *(f"{at}.{p}_proj.weight" for p in "qkv"))
    settings = Settings.from_plan(plan)

    def ignored(backend: Backend) -> list[str]:
        override: Any = settings.engine_arguments(backend)
        text = override.get("hf_overrides") or json.loads(override["json_model_override_args"])
        return [n for n in text["quantization_config"]["ignored_layers"] if n.startswith(at)]

    assert ignored("vllm") == [f"{at}.{p}_proj" for p in "kqv"]
    assert ignored("sglang") == [f"{at}.qkv_proj"]


def test_without_a_plan_it_is_that_of_the_mode() -> None:
    config = Settings.from_mode("block", "64,32").quantization_config()
    assert config == formats.quantization_config(
        Mode.BLOCK, BlockSize(64, 32), ignored_layers=["lm_head"], not_converted=["lm_head"]
    )
    config = Settings.from_mode("per-tensor").quantization_config()
    assert config is not None
    assert "weight_block_size" not in config


def test_each_answer_is_a_new_one(settings: Settings) -> None:
    first = settings.quantization_config()
    assert first is not None
    first["ignored_layers"].append("x")  # type: ignore[attr-defined]
    first["quant_method"] = "awq"
    second = settings.quantization_config()
    assert second is not None
    assert second["quant_method"] == "fp8"
    assert "x" not in second["ignored_layers"]  # type: ignore[operator]


def test_settings_for_one_engine_say_nothing_for_the_other(moe: Path) -> None:
    settings = Settings.from_plan(plan_of(moe, "sglang"))
    assert settings.engine_flags() == settings.engine_flags("sglang")
    for ask in (settings.engine_flags, settings.engine_arguments, settings.engine_environment):
        with pytest.raises(UsageError, match="for sglang, whose rules"):
            ask("vllm")
    with pytest.raises(UsageError, match="for sglang"):
        settings.quantization_config("vllm")
    with pytest.raises(UsageError, match="either engine"):
        Settings.from_mode("block").engine_flags()


# --- the engines' arguments -----------------------------------------------------------------------


def launched(backend: Backend, settings: Settings) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return command line and environment of `fp8ctl launch --await-push` on an H100."""
    config = settings.quantization_config(backend)
    block = None if settings.block is None else (settings.block.n, settings.block.k)
    request = LaunchRequest(
        python=Path("/env/bin/python"),
        model=ModelFacts(Path("/models/m"), "m", None, block if backend == "sglang" else None),
        source="override",
        device=Device("cuda", (9, 0), 8, "H100"),
        host="127.0.0.1",
        port=30000,
        run_dir=Path("/run/x"),
        hook_path=Path("/hook"),
        applied=frozenset({"refit"}),
        override=config,
        await_push=True,
        tp=settings.tp or 1,
    )
    built = base.builder(backend)(request)
    return built.argv, dict(built.env)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_flags_are_those_of_launch_in_its_order(settings: Settings, backend: Backend) -> None:
    argv, env = launched(backend, settings)
    flags = settings.engine_flags(backend)
    start = argv.index(flags[0])
    assert argv[start : start + len(flags)] == flags
    # Nothing that launch says about weights is left out.
    others = {"--model", "--model-path", "--served-model-name", "--host", "--port"}
    others |= {"--custom-weight-loader"}
    assert {w for w in argv if w.startswith("--")} - others == {
        w for w in flags if w.startswith("--")
    }
    ours = settings.engine_environment(backend)
    assert ours.items() <= env.items()
    theirs = {
        k: v for k, v in env.items() if k.startswith(("SGL", "VLLM")) or k == "FP8CTL_AWAIT_PUSH"
    }
    assert theirs == ours


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_and_flags_say_the_same(settings: Settings, backend: Backend) -> None:
    flags = settings.engine_flags(backend)
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    arguments = settings.engine_arguments(backend)
    assert [f"--{name.replace('_', '-')}" for name in arguments] == list(pairs)
    for value, text in zip(arguments.values(), pairs.values(), strict=True):
        assert (json.loads(text) if isinstance(value, dict) else type(value)(text)) == value


@pytest.mark.parametrize(("tp", "said"), [(None, []), (1, []), (4, [4])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_parallel_size_is_said_where_there_is_one(
    backend: Backend, tp: int | None, said: list[int]
) -> None:
    arguments = Settings.from_mode("block", tp=tp).engine_arguments(backend)
    assert [arguments[k] for k in ("tensor_parallel_size", "tp_size") if k in arguments] == said


@pytest.mark.wheels
def test_keyword_arguments_are_those_of_the_released_vllm(
    engine_sources: Callable[[str], Path], moe: Path
) -> None:
    root = engine_sources("vllm") / "vllm"
    arguments = Settings.from_plan(plan_of(moe, "vllm")).engine_arguments()
    classes = {
        node.name: node
        for path in ("entrypoints/llm.py", "engine/arg_utils.py")
        for node in ast.parse((root / path).read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    fields = {
        node.target.id
        for node in classes["EngineArgs"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {"model", *arguments} <= fields
    [init] = [
        n for n in classes["LLM"].body if isinstance(n, ast.FunctionDef) and n.name == "__init__"
    ]
    # What LLM does not name it hands to EngineArgs.
    assert init.args.kwarg is not None
    named = {a.arg for a in (*init.args.args, *init.args.kwonlyargs)}
    assert named & set(arguments) == set(arguments) - {"load_format"}
    flags = set(re.findall(r'"(--[a-z0-9-]+)"', (root / "engine" / "arg_utils.py").read_text()))
    assert {w for w in Settings.from_plan(plan_of(moe, "vllm")).engine_flags() if w[0] == "-"} <= (
        flags
    )


# --- weight updates -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
def test_an_update_has_the_names_that_a_server_waits_for(moe: Path, mode: Mode) -> None:
    plan = plan_of(moe, "sglang", mode)
    meta: dict[str, Any] = Settings.from_plan(plan).update_metadata()
    assert json.loads(json.dumps(meta)) == meta
    names = []
    for tensor in meta["tensors"]:
        names += [tensor["name"], *([tensor["scale"]["name"]] if tensor["scale"] else [])]
    assert names == expected_names(plan.to_json())
    assert (meta["quantization"], meta["mode"]) == ("fp8", mode.value)
    assert meta["recipe"] == formats.RECIPE
    powers = dataclasses.replace(plan, recipe="ue8m0")
    assert Settings.from_plan(powers).update_metadata()["recipe"] == "ue8m0"
    again = Settings.from_json(Settings.from_plan(powers).to_json())
    assert again.recipe == "ue8m0"
    assert meta["plan_digest"] == plan.digest
    assert meta["quantization_config"] == plan.quantization_config("sglang")
    assert meta["block_size"] == ([128, 128] if mode is Mode.BLOCK else None)


@pytest.mark.parametrize("mode", [Mode.BLOCK, Mode.PER_TENSOR])
def test_the_bytes_of_an_update_are_the_plans(moe: Path, mode: Mode) -> None:
    plan = plan_of(moe, "sglang", mode)
    width = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    meta: dict[str, Any] = Settings.from_plan(plan).update_metadata()
    total = 0
    for tensor in meta["tensors"]:
        for part in (tensor, tensor["scale"]):
            if part:
                count = width[part["dtype"]]
                for side in part["shape"]:
                    count *= side
                total += count
    assert total == plan.bytes_after


def test_without_a_plan_an_update_leaves_the_decision_to_the_policy() -> None:
    meta = Settings.from_mode("block").update_metadata()
    assert meta["tensors"] is None
    assert meta["plan_digest"] is None
    assert policy.should_quantize_param("model.layers.0.mlp.up_proj.weight", (128, 128))


# --- set on a configuration -----------------------------------------------------------------------


@dataclass
class HfConfig:
    model_type: str = "qwen3_moe"
    quantization_config: dict[str, Any] | None = None


@dataclass
class Holder:
    hf_config: Any = None


class Slotted:
    __slots__ = ("hf_config",)

    def __init__(self, hf_config: object = None) -> None:
        self.hf_config = hf_config


class Forbidding(SimpleNamespace):
    """An object that takes no new attributes."""

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(f"no {name} here")


def omegaconf() -> Any:
    return pytest.importorskip("omegaconf", reason="omegaconf is not installed")


def struct_mode(content: dict[str, object]) -> Any:
    config = omegaconf().OmegaConf.create(content)
    omegaconf().OmegaConf.set_struct(config, True)
    return config


HF = {"model_type": "qwen3_moe", "num_hidden_layers": 2}
KINDS_OF_CONFIG: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"hf_config": dict(HF)},
    "dict of an object": lambda: {"hf_config": SimpleNamespace(**HF)},
    "object": lambda: SimpleNamespace(hf_config=SimpleNamespace(**HF)),
    "object of a dict": lambda: SimpleNamespace(hf_config=dict(HF)),
    "slots": lambda: Slotted(SimpleNamespace(**HF)),
    "dataclass": lambda: Holder(HfConfig()),
    "OmegaConf": lambda: omegaconf().OmegaConf.create({"hf_config": HF}),
    "OmegaConf in struct mode": lambda: struct_mode({"hf_config": HF}),
    "object of OmegaConf in struct mode": lambda: SimpleNamespace(hf_config=struct_mode(dict(HF))),
    "OmegaConf of a dataclass": lambda: omegaconf().OmegaConf.structured(
        Holder(omegaconf().OmegaConf.structured(HfConfig))
    ),
}
EMPTY: dict[str, Callable[[], Any]] = {
    "dict": dict,
    "dict with None": lambda: {"hf_config": None},
    "object": SimpleNamespace,
    "slots": Slotted,
    "dataclass": Holder,
    "OmegaConf": lambda: omegaconf().OmegaConf.create({}),
    "OmegaConf in struct mode": lambda: struct_mode({"other": 1}),
    "OmegaConf, missing": lambda: struct_mode({"hf_config": "???"}),
}


@pytest.fixture(params=KINDS_OF_CONFIG)
def config(request: pytest.FixtureRequest) -> Any:
    return KINDS_OF_CONFIG[request.param]()


def hf_of(config: Any) -> Any:
    return config["hf_config"] if isinstance(config, dict) else config.hf_config


def found(hf: Any) -> Any:
    value = hf["quantization_config"] if isinstance(hf, dict) else hf.quantization_config
    if type(value).__module__.startswith("omegaconf"):
        return omegaconf().OmegaConf.to_container(value)
    return value


def test_it_is_set_on_every_kind(settings: Settings, config: Any) -> None:
    before = pickle.dumps(HF)
    assert settings.set_on(config) is config
    assert found(hf_of(config)) == settings.quantization_config()
    assert pickle.dumps(HF) == before


def test_setting_twice_is_setting_once(settings: Settings, config: Any) -> None:
    settings.set_on(config, backend="sglang")
    once = pickle.dumps(config)
    held = found(hf_of(config))
    settings.set_on(config, backend="sglang")
    assert pickle.dumps(config) == once
    if not type(hf_of(config)).__module__.startswith("omegaconf"):
        assert found(hf_of(config)) is held


def test_off_changes_no_byte(config: Any) -> None:
    before = pickle.dumps(config)
    assert OFF.set_on(config) is config
    assert pickle.dumps(config) == before
    # Positive control: on does.
    Settings.from_mode("block").set_on(config)
    assert pickle.dumps(config) != before


@pytest.mark.parametrize("kind", EMPTY)
def test_before_the_model_config_is_there_it_is_refused_and_off_is_not(kind: str) -> None:
    config = EMPTY[kind]()
    before = pickle.dumps(config)
    assert OFF.set_on(config) is config
    with pytest.raises(NotFoundError, match="no hf_config yet") as caught:
        Settings.from_mode("block").set_on(config)
    assert "after the model's configuration was loaded" in str(caught.value.hint)
    assert pickle.dumps(config) == before


def test_another_configuration_is_a_conflict_that_names_both(config: Any) -> None:
    Settings.from_mode("block", "64,64").set_on(config)
    before = pickle.dumps(config)
    with pytest.raises(ConflictError) as caught:
        Settings.from_mode("block", "128,128").set_on(config)
    assert "weight_block_size [64, 64]" in caught.value.message
    assert "weight_block_size [128, 128]" in caught.value.message
    data = json.loads(json.dumps(caught.value.data))  # JSON types, whatever the kind
    assert data["found"]["weight_block_size"] == [64, 64]
    assert data["wanted"]["weight_block_size"] == [128, 128]
    assert pickle.dumps(config) == before


def test_a_foreign_method_is_a_conflict() -> None:
    config = {"hf_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}
    with pytest.raises(ConflictError, match=r"'awq', bits 4; quant_method 'fp8'"):
        Settings.from_mode("per-tensor").set_on(config)
    assert config == {"hf_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}


def test_a_foreign_object_is_compared_by_what_it_says() -> None:
    settings = Settings.from_mode("block")
    wanted = settings.quantization_config()
    theirs = SimpleNamespace(to_dict=lambda: copy.deepcopy(wanted))
    config = SimpleNamespace(hf_config=SimpleNamespace(quantization_config=theirs))
    settings.set_on(config)
    assert config.hf_config.quantization_config is theirs
    with pytest.raises(ConflictError):
        Settings.from_mode("per-tensor").set_on(config)


def test_two_configurations_share_no_list() -> None:
    settings = Settings.from_mode("block")
    one: dict[str, Any] = settings.set_on({"hf_config": {}})
    other: dict[str, Any] = settings.set_on({"hf_config": {}})
    one["hf_config"]["quantization_config"]["ignored_layers"].append("x")
    assert other["hf_config"] == {"quantization_config": settings.quantization_config()}


def test_the_model_config_itself_can_be_given() -> None:
    settings = Settings.from_mode("block")
    config = settings.set_on({"model_type": "qwen3"}, inside=None)
    assert config == {
        "model_type": "qwen3",
        "quantization_config": settings.quantization_config(),
    }
    with pytest.raises(NotFoundError) as caught:
        settings.set_on(config)
    assert "inside=None" in str(caught.value.hint)
    deep = settings.set_on({"model": {"model_type": "qwen3"}}, inside="model")
    assert deep["model"] == config


def test_struct_mode_is_still_on_afterwards_everywhere() -> None:
    config = struct_mode({"hf_config": HF, "other": {"a": 1}})
    Settings.from_mode("block").set_on(config)
    for node in (config, config.hf_config, config.other, config.hf_config.quantization_config):
        with pytest.raises(AttributeError, match="not in struct"):
            node.brand_new = 1


def test_the_failure_that_it_mends_is_still_omegaconfs() -> None:
    # verl-project/verl#5675: without open_dict the key cannot be set at all.
    config = struct_mode({"hf_config": HF})
    with pytest.raises(AttributeError, match="not in struct"):
        config.hf_config.quantization_config = {}


@dataclass(frozen=True)
class Frozen:
    quantization_config: dict[str, Any] | None = None


@dataclass
class WithoutField:
    model_type: str = "qwen3"


def read_only() -> Any:
    config = omegaconf().OmegaConf.create({"hf_config": HF})
    omegaconf().OmegaConf.set_readonly(config, True)
    return config


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Holder(Frozen()), "FrozenInstanceError"),
        (lambda: Holder(WithoutField()), "would drop it"),
        (lambda: Holder(Forbidding()), "no quantization_config here"),
        (lambda: Holder(Slotted()), "AttributeError"),
        (lambda: Holder(1), "AttributeError"),
        (read_only, "read-only"),
    ],
)
def test_what_takes_no_key_is_refused_and_left_alone(make: Callable[[], Any], why: str) -> None:
    config = make()
    before = pickle.dumps(config)
    with pytest.raises(UnsupportedError, match=why) as caught:
        Settings.from_mode("block").set_on(config)
    assert caught.value.hint
    assert pickle.dumps(config) == before


# --- off ------------------------------------------------------------------------------------------


def test_off_gives_nothing_to_pass_on() -> None:
    for backend in BACKENDS:
        assert OFF.engine_flags(backend) == ()
        assert OFF.engine_arguments(backend) == {}
        assert OFF.engine_environment(backend) == {}
        assert OFF.update_metadata(backend) == {}
        assert OFF.quantization_config(backend) is None
        for kind in KINDS:
            if kind.partition("-")[0] in (backend, "verl", "areal"):
                assert OFF.snippet(kind, backend=backend) == ""
    assert OFF.engine_arguments() == {}


# --- snippets -------------------------------------------------------------------------------------


def example(backend: Backend, mode: str, moe: Path) -> Settings:
    """Return the settings of the examples on the page: those of a dense model at tp 2."""
    plan = plan_of(moe, backend, Mode(mode))
    dense = tuple(t for t in plan.tensors if ".mlp." not in t.name)
    return Settings.from_plan(
        dataclasses.replace(plan, model=Path("/models/Qwen3-8B"), tensors=dense)
    )


def test_the_page_shows_what_the_program_prints(moe: Path) -> None:
    shown = re.findall(
        r"^<!-- snippet: (\S+) (\S+) (\S+) -->\n```(\w+)\n(.*?)^```$",
        PAGE.read_text(encoding="utf-8"),
        re.M | re.S,
    )
    languages = {"verl": "yaml", "areal": "python", "vllm": "bash", "sglang": "bash"}
    assert {kind for kind, *_ in shown} == set(KINDS)
    for kind, backend, mode, language, text in shown:
        assert text == example(backend, mode, moe).snippet(kind), kind
        wanted = "python" if kind.endswith("-python") else languages[kind.partition("-")[0]]
        assert language == wanted


def test_the_python_on_the_page_runs(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(json.dumps(plan_of(moe, "vllm").to_json()))
    text = PAGE.read_text(encoding="utf-8")
    code = re.findall(r"(?<!-->\n)^```python\n(.*?)^```$", text, re.M | re.S)
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, str(PAGE), "exec"), names)
    hf = names["model_config"].hf_config
    assert hf["quantization_config"] == plan_of(moe, "vllm").quantization_config()
    keys = re.findall(r"^\| (`.*?) \|", text.partition("## Send weights")[2], re.M)
    documented = {span for cell in keys for span in re.findall(r"`(\w+)`", cell)}
    assert documented == set(names["settings"].update_metadata())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["block", "per-tensor"])
def test_verls_old_switches_follow_the_mode(backend: Backend, mode: str, moe: Path) -> None:
    create = omegaconf().OmegaConf.create
    text = example(backend, mode, moe).snippet("verl-old")
    # The keys of verl/trainer/config/rollout/rollout.yaml that it says something about.
    verl = create(
        {
            "actor_rollout_ref": {
                "rollout": {
                    "name": "???",
                    "quantization": False,
                    "use_block_quant_rollout": False,
                    "tensor_model_parallel_size": 2,
                    "load_format": "dummy",
                }
            }
        }
    )
    omegaconf().OmegaConf.set_struct(verl, True)
    merged = omegaconf().OmegaConf.merge(verl, create(text))
    assert omegaconf().OmegaConf.to_container(merged.actor_rollout_ref.rollout) == {
        "name": backend,
        "quantization": True,
        "use_block_quant_rollout": mode == "block",
        "tensor_model_parallel_size": 2,
        "load_format": "dummy",
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_verls_new_switch_is_a_word(backend: Backend, moe: Path) -> None:
    create = omegaconf().OmegaConf.create
    text = Settings.from_plan(plan_of(moe, backend)).snippet("verl")
    assert omegaconf().OmegaConf.to_container(create(text)) == {
        "actor_rollout_ref": {
            "rollout": {
                "name": backend,
                "quantization": "fp8",
                "tensor_model_parallel_size": 2,
            }
        }
    }
    ignored = "# export SGLANG_FP8_IGNORED_LAYERS=mlp.gate\n"
    assert (ignored in text) is (backend == "sglang")


def test_a_short_name_that_would_catch_more_is_not_shortened(moe: Path) -> None:
    plan = keeping(plan_of(moe, "sglang"), "model.layers.1.self_attn.q_proj.weight")
    text = Settings.from_plan(plan).snippet("verl")
    assert "IGNORED_LAYERS=mlp.gate,model.layers.1.self_attn.q_proj\n" in text


@pytest.mark.parametrize("kind", ["verl", "verl-old", "areal"])
def test_a_trainer_that_quantises_itself_cannot_be_told_powers_of_two(kind: str, moe: Path) -> None:
    plan = plan_of(moe, "vllm")
    Settings.from_plan(plan).snippet(kind)
    powers = Settings.from_plan(dataclasses.replace(plan, recipe="ue8m0"))
    with pytest.raises(UnsupportedError, match="--scale ue8m0") as caught:
        powers.snippet(kind)
    assert caught.value.hint == "--scale fp32"
    # An engine multiplies by whatever comes.
    assert powers.snippet("vllm") == Settings.from_plan(plan).snippet("vllm")


def test_verl_cannot_be_told_another_format() -> None:
    small = Settings.from_mode("block", "64,64", backend="vllm")
    for kind in ("verl", "verl-old"):
        with pytest.raises(UnsupportedError, match="blocks of 64x64") as caught:
            small.snippet(kind)
        assert caught.value.hint == "--block-size 128,128"
    with pytest.raises(UnsupportedError, match="the plan is per-tensor") as caught:
        Settings.from_mode("per-tensor", backend="vllm").snippet("verl")
    assert caught.value.hint == "--snippet verl-old"


def areal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for AReaL's two modules: dataclasses with a field of its own each."""

    @dataclass
    class SGLangConfig:
        model_path: str = ""

    @dataclass
    class vLLMConfig:  # noqa: N801 AReaL's name
        model: str = ""

    @dataclass
    class WeightUpdateMeta:
        type: str
        peft_config: dict[str, object] = field(default_factory=dict)

    for name, classes in (
        ("areal", ()),
        ("areal.api", ()),
        ("areal.api.cli_args", (SGLangConfig, vLLMConfig)),
        ("areal.api.io_struct", (WeightUpdateMeta,)),
    ):
        module = ModuleType(name)
        for one in classes:
            setattr(module, one.__name__, one)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("backend", BACKENDS)
def test_areals_dataclasses_carry_arguments_and_metadata(
    settings: Settings, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    areal(monkeypatch)
    module = ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)
    names = vars(module)
    exec(compile(settings.snippet("areal", backend=backend), "snippet", "exec"), names)
    name = "Fp8SGLangConfig" if backend == "sglang" else "Fp8VLLMConfig"
    server = dataclasses.asdict(names[name]())
    # AReaL's get_py_cmd: every field that is not empty becomes a flag; it says the rest itself.
    flags = [w for k, v in server.items() if v for w in (f"--{k.replace('_', '-')}", str(v))]
    ours = list(settings.engine_flags(backend))
    ours = ours[ours.index("--quantization") :]
    assert flags == ours
    one, other = (names["Fp8WeightUpdateMeta"](type="xccl") for _ in range(2))
    meta = settings.update_metadata(backend)
    assert one.quantization == meta["quantization"]
    assert one.quantization_config == meta["quantization_config"]
    assert one.quantization_config is not other.quantization_config
    # Their dataclasses' own defaults are as before.
    assert (one.type, one.peft_config) == ("xccl", {})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_command_line_in_a_shell_is_the_one_that_launch_gives(
    settings: Settings, backend: Backend
) -> None:
    text = settings.snippet(backend, model="/models/it's here")
    code = "".join(line for line in text.splitlines(keepends=True) if line[0] != "#")
    words = shlex.split(code.replace("\\\n", ""))
    assert words[0] == "env"
    variables = settings.engine_environment(backend)
    assert words[1 : 1 + len(variables)] == [f"{k}={v}" for k, v in variables.items()]
    rest = words[1 + len(variables) :]
    start = {
        "vllm": ["vllm", "serve", "/models/it's here"],
        "sglang": ["python", "-m", "sglang.launch_server", "--model-path", "/models/it's here"],
    }[backend]
    assert rest == [*start, *settings.engine_flags(backend)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_script_calls_the_engine_with_the_arguments(
    settings: Settings, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    engine = ModuleType(backend)
    setattr(engine, "LLM" if backend == "vllm" else "Engine", lambda **more: calls.append(more))
    monkeypatch.setitem(sys.modules, backend, engine)
    for variable in settings.engine_environment(backend):
        monkeypatch.setenv(variable, "before")
    code = compile(settings.snippet(f"{backend}-python", model='/m/"x"'), "snippet", "exec")
    exec(code, {"__name__": "__mp_main__"})  # a spawned child imports it
    assert not calls
    exec(code, {"__name__": "__main__"})
    model = "model" if backend == "vllm" else "model_path"
    assert calls == [{model: '/m/"x"', **settings.engine_arguments(backend)}]
    for name, value in settings.engine_environment(backend).items():
        assert os.environ[name] == value


def test_a_kind_of_the_other_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="snippet sglang-python is sglang's"):
        Settings.from_mode("block", backend="vllm").snippet("sglang-python")
    with pytest.raises(UsageError, match="unknown snippet 'helm'; there is verl"):
        Settings.from_mode("block", backend="vllm").snippet("helm")
    with pytest.raises(UsageError, match="either engine"):
        Settings.from_mode("block").snippet("verl")


def run(*argv: str, code: int = 0) -> tuple[str, str]:
    """Run `fp8ctl plan` in this process; return stdout and stderr."""
    done = CliRunner().invoke(cli.build("plan"), ["plan", *argv])
    assert done.exit_code == code, done.stderr
    return done.stdout, done.stderr


def test_the_command_prints_the_snippet_and_nothing_else(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    asked = ("--model", str(moe), "--backend", "vllm", "--tp", "2", "--snippet", "verl")
    text, _ = run(*asked, "--out", str(out))
    manifest = json.loads(out.read_text())
    assert text == Settings.from_plan(Plan.from_json(manifest)).snippet("verl")
    data = json.loads(run(*asked, "--json")[0])["data"]
    assert data == {**manifest, "snippet": text}


def test_what_the_plan_warns_of_is_said_beside_the_snippet(moe: Path, tmp_path: Path) -> None:
    new = checkpoint(tmp_path / "new")
    config = (new / "config.json").read_text().replace("qwen3_moe", "brand_new")
    (new / "config.json").write_text(config)
    asked = ("--backend", "vllm", "--snippet", "vllm", "--model")
    text, said = run(*asked, str(new))
    assert "warning: architecture brand_new" in said
    assert "brand_new" not in text
    assert "warning:" not in run(*asked, str(moe))[1]


def test_a_snippet_that_cannot_be_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    asked = ("--model", str(tmp_path / "nowhere"), "--backend", "vllm", "--snippet")
    assert "sglang's, and vllm was asked" in run(*asked, "sglang", code=2)[1]
    assert "unknown snippet 'x'" in run(*asked, "x", code=2)[1]
    run(*asked, "vllm", code=3)


def test_a_snippet_of_a_plan_that_does_not_fit_is_not_printed(moe: Path) -> None:
    asked = ("--model", str(moe), "--backend", "vllm", "--block-size", "512,512")
    text, said = run(*asked, "--snippet", "vllm", code=8)
    assert (text, "do not fit" in said) == ("", True)


# --- the real transformers and the real SGLang ----------------------------------------------------

# Runs in the engine's interpreter, once: importing it takes seconds.
_REAL = """
import argparse, json, sys
from transformers import AutoConfig
from fp8ctl.errors import Fp8ctlError
from fp8ctl.settings import OFF, Settings
from sglang.srt.hf_transformers_utils import get_config
from sglang.srt.server_args import ServerArgs

class Holder:
    hf_config = None

folder, documents = sys.argv[1], json.loads(sys.stdin.read())
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
found = []
for document in documents:
    settings = Settings.from_json(document)
    holder = Holder()
    try:
        settings.set_on(holder)
        early = None
    except Fp8ctlError as e:
        early = e.id
    holder.hf_config = AutoConfig.from_pretrained(folder)
    plain = holder.hf_config.to_json_string()
    OFF.set_on(holder)
    off = holder.hf_config.to_json_string() == plain
    settings.set_on(holder, backend="sglang")
    once = holder.hf_config.to_json_string()
    settings.set_on(holder, backend="sglang")
    twice = holder.hf_config.to_json_string() == once
    try:
        Settings.from_mode("block", "32,32").set_on(holder, backend="sglang")
        conflict = None
    except Fp8ctlError as e:
        conflict = e.message
    parsed = vars(parser.parse_args(["--model-path", folder, *settings.engine_flags("sglang")]))
    override = json.loads(parsed["json_model_override_args"])
    theirs = get_config(folder, trust_remote_code=False, model_override_args=override)
    arguments = settings.engine_arguments("sglang")
    # The command line's name for tp_size is another; from_cli_args renames it.
    parsed["tp_size"] = parsed["tensor_parallel_size"]
    found.append({
        "early": early, "off": off, "twice": twice, "conflict": conflict,
        "ours": holder.hf_config.quantization_config,
        "theirs": theirs.quantization_config,
        "same": theirs.to_dict() == holder.hf_config.to_dict(),
        "arguments": arguments,
        "parsed": {name: parsed[name] for name in arguments},
        "fields": sorted(set(arguments) - set(ServerArgs.__dataclass_fields__)),
    })
print(json.dumps(found))
"""


@pytest.mark.engine
def test_the_real_engine_and_the_real_transformers_agree(
    engine_python: Path, moe: Path, tmp_path: Path
) -> None:
    """The override that SGLang reads makes the same model config as `set_on`."""
    every = [
        Settings.from_plan(plan_of(moe, "sglang")),
        Settings.from_plan(plan_of(moe, "sglang", Mode.PER_TENSOR)),
        Settings.from_mode("block", "64,64"),
    ]
    done = subprocess.run(
        [str(engine_python), "-W", "ignore", "-c", _REAL, str(moe)],
        input=json.dumps([settings.to_json() for settings in every]),
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        | {"HOME": str(tmp_path), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for settings, answer in zip(every, answers, strict=True):
        wanted = settings.quantization_config("sglang")
        assert answer["ours"] == answer["theirs"] == wanted
        assert answer["early"] == "FP8-NOT-FOUND"
        assert [answer[key] for key in ("off", "twice", "same")] == [True, True, True]
        assert "weight_block_size [32, 32]" in answer["conflict"]
        assert answer["parsed"] == answer["arguments"]
        assert not answer["fields"]


# --- the tables -----------------------------------------------------------------------------------


def test_every_kind_says_where_it_was_read() -> None:
    for kind, write in snippets.KINDS.items():
        assert re.search(r"\.(py|md)\b|#\d+", inspect.getdoc(write) or ""), kind


def test_the_kernels_for_128_are_those_that_launch_switches_off() -> None:
    env = launched("sglang", Settings.from_mode("block", "64,64"))[1]
    assert {k for k, v in env.items() if v == "0"} == set(sglang.KERNELS_FOR_128)
    assert vllm.override_options({})[0].flag == "--load-format"
