"""From options to a plan of a start, or a refusal; nothing is started here."""

from __future__ import annotations

import json
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import environment, interpreter, launching, registry, supervisor
from fp8ctl.errors import (
    BusyError,
    CheckpointError,
    ConflictError,
    NotFoundError,
    PlanDoesNotFitError,
    UsageError,
)
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.hardware import Gpu
from fp8ctl.manifest import dumps
from fp8ctl.patching import status
from fp8ctl.patching.names import RelPath, parse_relpath, parse_sha256, sha256_of
from fp8ctl.patching.status import FileStatus, PatchStatus, SeriesStatus
from fp8ctl.planning import make_plan
from fp8ctl.process import free_port
from tests.reporting import reporter

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8ctl.supervisor import RunFiles


def write_model(folder: Path, hidden: int = 128, dtype: str = "BF16", **config: object) -> Path:
    """Write a one-layer Llama of zeros: enough for everything that reads no values.

    `dtype` is that of the layer's Linears.
    """
    folder.mkdir(parents=True)
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(base | config))
    layer = "model.layers.0."
    sizes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [64, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [64, hidden],
        layer + "input_layernorm.weight": [hidden],
        layer + "post_attention_layernorm.weight": [hidden],
        **{f"{layer}self_attn.{p}_proj.weight": [hidden, hidden] for p in "qkvo"},
        layer + "mlp.gate_proj.weight": [2 * hidden, hidden],
        layer + "mlp.up_proj.weight": [2 * hidden, hidden],
        layer + "mlp.down_proj.weight": [hidden, 2 * hidden],
    }
    header: dict[str, object] = {}
    offset = 0
    for name, shape in sizes.items():
        stored = dtype if "_proj." in name else "BF16"
        count = (1 if stored == "F8_E4M3" else 2) * math.prod(shape)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    return folder


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make an environment that holds an engine by metadata; returns the options that name it.

    What is patched in it is told, since there are no files; what GPUs there are too.
    """

    def make(backend: str, *applied: str, gpu: tuple[int, int] | None = None) -> list[str]:
        version = "0.4.8" if backend == "sglang" else "0.9.1"
        site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
        info = site / f"{backend}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {backend}\nVersion: {version}\n"
        )
        (info / "RECORD").write_text("")
        (site / backend).mkdir()
        (site / backend / "__init__.py").write_text("")
        (tmp_path / "venv" / "bin").mkdir()
        (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
        patches = tuple(PatchStatus(one, one, "applied") for one in applied)
        state = SeriesStatus(backend, "series", version, (), patches, interrupted=False)
        monkeypatch.setattr(status, "inspect", lambda *_: state)
        gpus = () if gpu is None else (Gpu("Test GPU", gpu, 80 << 30),)
        find = environment.find

        def found(*arguments: Any) -> environment.Environment:
            return replace(find(*arguments), gpus=gpus)

        monkeypatch.setattr(environment, "find", found)
        return ["--backend", backend, "--site-packages", str(site)]

    return make


def dry_run(options: list[str], **more: Any) -> dict[str, Any]:
    """Run `launch --dry-run`; assert that it made nothing."""
    _, backend, _, site = options
    report, out, _ = reporter()
    data = launching.run(report, backend=backend, site_packages=Path(site), dry_run=True, **more)
    assert list(registry.servers_dir().iterdir()) == []
    launch = data["launch"]
    assert isinstance(launch, dict)
    assert launch["command_line"] in out.getvalue()
    return data


def flag(data: dict[str, Any], name: str) -> str:
    argv: list[str] = data["launch"]["argv"]
    return argv[argv.index(name) + 1]


def test_dry_run_shows_the_line_and_the_folder_and_makes_neither(
    engine: Callable[..., list[str]], tmp_path: Path, isolated_home: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    data = dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model))
    served = Path(flag(data, "--model-path"))
    assert served == Path(data["served"])
    assert served.parent == isolated_home / "cache" / "quantized"
    assert not served.exists()
    assert data["weights"] == "checkpoint"
    assert flag(data, "--served-model-name") == "tiny"
    # The cached checkpoint carries its own configuration.
    assert "--quantization" not in data["launch"]["argv"]
    assert "--json-model-override-args" not in data["launch"]["argv"]
    assert data["launch"]["env"]["PYTHONPATH"].startswith(str(isolated_home / "cache" / "hook"))
    assert data["check_level"] == "live"


@pytest.mark.parametrize(
    ("options", "level", "said"),
    [
        ({"check": "weights"}, "weights", "ends with a check, --level weights\n"),
        ({"no_check": True}, None, "ends with no check\n"),
        ({"wait": False, "detach": True}, None, "ends with no check\n"),
        ({}, "live", ""),
    ],
)
def test_dry_run_shows_how_it_would_end(
    options: dict[str, Any],
    level: str | None,
    said: str,
    engine: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    site = Path(engine("sglang", "refit", "cpu-fp8")[-1])
    report, _, err = reporter()
    model = str(write_model(tmp_path / "tiny"))
    data = launching.run(
        report, backend="sglang", site_packages=site, dry_run=True, model=model, **options
    )
    assert data["check_level"] == level
    assert ("ends with" in err.getvalue(), said in err.getvalue()) == (bool(said), True)


def test_await_push_puts_the_plans_configuration_over_the_16_bit_folder(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", hidden=192)
    data = dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model), await_push=True)
    assert data["weights"] == "override"
    assert flag(data, "--model-path") == str(model)
    assert flag(data, "--quantization") == "fp8"
    assert flag(data, "--load-format") == "auto"
    config = json.loads(flag(data, "--json-model-override-args"))["quantization_config"]
    # 192 does not divide by 128.
    assert config["weight_block_size"] == [64, 64]
    assert config["quant_method"] == "fp8"
    assert data["launch"]["env"]["FP8CTL_AWAIT_PUSH"] == "1"


def test_per_tensor_mode_has_no_blocks(engine: Callable[..., list[str]], tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang", "refit", "cpu-fp8")
    data = dry_run(options, model=str(model), mode="per-tensor", await_push=True)
    config = json.loads(flag(data, "--json-model-override-args"))["quantization_config"]
    assert "weight_block_size" not in config


def test_online_mode_asks_for_fp8_and_nothing_else(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    data = dry_run(engine("sglang", "cpu-fp8"), model=str(model), mode="online")
    assert (flag(data, "--model-path"), flag(data, "--quantization")) == (str(model), "fp8")
    assert "--json-model-override-args" not in data["launch"]["argv"]


def test_an_fp8_checkpoint_is_served_as_it_is(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = write_model(tmp_path / "tiny", quantization_config=config)
    options = engine("sglang", "refit", "cpu-fp8")
    data = dry_run(options, model=str(model))
    assert (data["weights"], data["plan"]) == ("checkpoint", None)
    assert flag(data, "--model-path") == str(model)
    with pytest.raises(ConflictError, match="FP8 checkpoint already, block"):
        dry_run(options, model=str(model), mode="per-tensor")
    with pytest.raises(ConflictError, match="FP8 checkpoint already, block"):
        dry_run(options, model=str(model), mode="online")


def test_a_checkpoint_of_another_method_is_not_called_fp8(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", quantization_config={"quant_method": "awq"})
    with pytest.raises(ConflictError, match="quantised with 'awq'"):
        dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model))


def test_marlin_on_a_16_bit_model_is_refused_with_the_reason(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    with pytest.raises(PlanDoesNotFitError, match=r"marlin loads .* is a 16-bit checkpoint"):
        dry_run(engine("sglang", gpu=(9, 0)), model=str(model), quantization="marlin")


def test_vllm_online_on_a_forced_tree_is_refused_with_the_revert_command(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("vllm", "force-fp8-serialized", "refit", gpu=(9, 0))
    with pytest.raises(ConflictError) as caught:
        dry_run(options, model=str(model), mode="online")
    assert caught.value.exit_code == 5
    assert "--backend vllm --patch force-fp8-serialized" in str(caught.value.hint)
    assert str(caught.value.hint).startswith("fp8ctl revert")
    assert dry_run(options, model=str(model))["weights"] == "checkpoint"


def test_an_editable_install_that_lacks_a_patch_is_told_why_it_gets_none(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang")
    find = environment.find

    def editable(*arguments: Any) -> environment.Environment:
        found = find(*arguments)
        [one] = found.engines
        return replace(found, engines=(replace(one, kind="editable"),))

    with pytest.raises(ConflictError, match="patch cpu-fp8 of sglang is not applied"):
        dry_run(options, model=str(model))
    monkeypatch.setattr(environment, "find", editable)
    with pytest.raises(ConflictError, match="is an editable install") as caught:
        dry_run(options, model=str(model))
    assert "fp8ctl patch --backend" not in str(caught.value.hint), "which is refused there"
    # What its work tree has already is no one's to apply.
    patches = tuple(PatchStatus(one, one, "applied") for one in ("cpu-fp8", "refit"))
    state = SeriesStatus("sglang", "series", "0.4.8", (), patches, interrupted=False)
    monkeypatch.setattr(status, "inspect", lambda *_: state)
    dry_run(options, model=str(model))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_launch_leaves_the_hashes_of_the_patched_files_unless_they_are_a_work_trees(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, backend, _, site = engine("sglang")
    find = environment.find

    def of_kind(*arguments: Any) -> environment.Environment:
        found = find(*arguments)
        [one] = found.engines
        return replace(found, engines=(replace(one, kind=kind),))  # type: ignore[arg-type]

    sha, path = parse_sha256("a" * 64), parse_relpath("sglang/srt/utils.py")
    held = frozenset({"cpu-fp8"})
    file = FileStatus(path, "applied", sha, sha, held, sha, matches_record=False)
    gone = replace(file, path=parse_relpath("sglang/srt/new.py"), state="missing", sha=None)
    patches = tuple(PatchStatus(one, one, "applied") for one in ("cpu-fp8", "refit"))
    state = SeriesStatus("sglang", "series", "0.4.8", (file, gone), patches, interrupted=False)
    monkeypatch.setattr(environment, "find", of_kind)
    monkeypatch.setattr(status, "inspect", lambda *_: state)
    left: list[RunFiles] = []

    def serve(*given: Any) -> dict[str, object]:
        left.append(given[-1])
        return {}

    monkeypatch.setattr(supervisor, "serve", serve)
    launching.run(
        reporter()[0],
        backend=backend,
        site_packages=Path(site),
        model=str(write_model(tmp_path / "tiny")),
        mode="online",
        port=free_port("127.0.0.1"),
    )
    [files] = left
    if kind == "editable":
        assert files.code is None
        return
    assert json.loads(files.code or "") == {
        "schema": 1,
        "root": site,
        "series": "series",
        "patches": ["cpu-fp8", "refit"],
        "files": {path: sha, gone.path: None},
    }


def test_a_push_onto_an_fp8_checkpoint_is_refused_since_no_plan_counts_it(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = write_model(tmp_path / "tiny", quantization_config=config)
    options = engine("sglang", "refit", "cpu-fp8")
    with pytest.raises(ConflictError, match="--await-push starts from the 16-bit checkpoint") as e:
        dry_run(options, model=str(model), await_push=True)
    assert str(model) in e.value.message
    assert e.value.exit_code == 5
    dry_run(options, model=str(model))


@pytest.mark.parametrize(
    ("asked", "quantised", "proves"),
    [
        ({}, False, {"weights", "logprobs"}),
        ({"mode": "online"}, False, {"weights", "logprobs"}),
        ({"quantization": "fp8"}, False, {"weights", "logprobs"}),
        ({"torchao_config": "int8wo"}, False, {"logprobs"}),
        ({}, True, set()),
    ],
)
def test_a_check_that_would_prove_nothing_is_refused_before_anything_is_started(
    asked: dict[str, Any],
    quantised: bool,
    proves: set[str],
    engine: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    more: dict[str, Any] = {"quantization_config": config} if quantised else {}
    model = write_model(tmp_path / "tiny", **more)
    options = engine("sglang", "refit", "cpu-fp8", gpu=(9, 0))
    for level in ("live", "weights", "logprobs"):
        if level == "live" or level in proves:
            dry_run(options, model=str(model), check=level, **asked)
        else:
            with pytest.raises(UsageError, match=f"--check {level} compares with"):
                dry_run(options, model=str(model), check=level, **asked)


def test_a_dry_run_fetches_no_model(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    fetched: list[object] = []

    def worker(*given: object) -> dict[str, object]:
        fetched.append(given)
        return {"path": str(write_model(tmp_path / "fetched"))}

    monkeypatch.setattr(interpreter, "run_worker", worker)
    options = engine("sglang", "refit", "cpu-fp8")
    with pytest.raises(NotFoundError, match="owner/name is not in the local cache") as caught:
        dry_run(options, model="owner/name")
    assert caught.value.exit_code == 3
    assert fetched == []
    # Positive control: without --dry-run it would be fetched.
    assert interpreter.resolve_model(reporter()[0], "owner/name") == tmp_path / "fetched"
    assert len(fetched) == 1


def test_plan_and_launch_say_the_same_of_the_kernel_for_128(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", hidden=256)
    options = engine("vllm", "refit", gpu=(9, 0))
    [problem] = make_plan(model, "vllm", Mode.BLOCK, 1, BlockSize(64, 64)).problems
    with pytest.raises(PlanDoesNotFitError, match="its kernel for 128x128 blocks") as caught:
        dry_run(options, model=str(model), block_size="64,64")
    assert "down_proj (256x512 per GPU)" in problem.message
    assert problem.message in caught.value.message
    assert caught.value.hint == "--block-size 128,128"
    # An FP8 checkpoint that somebody else made, seen as it lies on the disk.
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    fp8 = write_model(tmp_path / "fp8", hidden=256, dtype="F8_E4M3", quantization_config=config)
    with pytest.raises(PlanDoesNotFitError, match=r"would compute \w+_proj \("):
        dry_run(options, model=str(fp8))
    # Every module has a side that 128 does not divide: the kernel takes none, and both say so.
    narrow = write_model(tmp_path / "narrow", hidden=64)
    assert make_plan(narrow, "vllm", Mode.BLOCK, 1, BlockSize(64, 64)).fits
    dry_run(options, model=str(narrow), block_size="64,64")
    fp8 = write_model(tmp_path / "f8", hidden=64, dtype="F8_E4M3", quantization_config=config)
    dry_run(options, model=str(fp8))


def test_a_plan_that_was_written_is_followed(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tiny", hidden=256)
    options = engine("sglang", "refit", "cpu-fp8")
    plan = make_plan(model, "sglang", Mode.BLOCK, 1, BlockSize(64, 64), keep=["*.o_proj"])
    path = tmp_path / "plan.json"
    path.write_text(dumps(plan.to_json()))
    data = dry_run(options, plan_file=path)
    assert data["plan"]["digest"] == plan.digest
    # The same options typed out make another plan only in the GPU that they are for.
    typed = dry_run(options, model=str(model), block_size="64,64", keep=["*.o_proj"])
    assert typed["plan"]["keep"] == ["*.o_proj"]
    assert typed["plan"]["gpu"] is None
    for more in ({"tp": 2}, {"mode": "per-tensor"}, {"mode": "online"}, {"quantization": "fp8"}):
        with pytest.raises(UsageError, match="--plan"):
            dry_run(options, plan_file=path, **more)
    other = write_model(tmp_path / "other", hidden=64)
    with pytest.raises(CheckpointError, match="is not the model of"):
        dry_run(options, plan_file=path, model=str(other))


@pytest.mark.parametrize("more", [{"mode": "online"}, {"quantization": "fp8"}])
def test_rules_are_for_what_fp8ctl_plans(
    engine: Callable[..., list[str]], tmp_path: Path, more: dict[str, str]
) -> None:
    model = write_model(tmp_path / "tiny")
    with pytest.raises(UsageError, match="--keep is for a plan"):
        dry_run(engine("sglang", "refit", "cpu-fp8"), model=str(model), keep=["lm_head"], **more)


def test_vllm_compiles_apart_for_each_state_of_its_patches(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("vllm", "refit", gpu=(9, 0))
    roots: dict[object, set[str]] = {}
    # The same ids on other text, as a newer fp8ctl or another build has it, are another state.
    cases = [((), ""), (("refit",), "a"), (("refit",), "b"), (("refit", "unscaled-guard"), "a")]
    for applied, text in cases * 2:
        held = frozenset(applied)
        file = FileStatus(
            RelPath("vllm/x.py"), "applied", sha256_of(text.encode()), None, held, None, None
        )
        patches = tuple(PatchStatus(one, one, "applied") for one in applied)
        state = SeriesStatus("vllm", "series", "0.9.1", (file,), patches, interrupted=False)
        monkeypatch.setattr(status, "inspect", lambda *_, state=state: state)
        data = dry_run(options, model=str(model))
        roots.setdefault((applied, text), set()).add(data["launch"]["env"]["VLLM_CACHE_ROOT"])
    assert [len(found) for found in roots.values()] == [1] * len(cases)
    assert len(set().union(*roots.values())) == len(cases)


def test_a_half_patched_tree_is_refused(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang", "refit", "cpu-fp8")
    torn = SeriesStatus("sglang", "series", "0.4.8", (), (), interrupted=True)
    monkeypatch.setattr(status, "inspect", lambda *_: torn)
    with pytest.raises(ConflictError, match="partly patched"):
        dry_run(options, model=str(model))


def test_a_tree_that_is_not_imported_is_refused(
    engine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "tiny")
    options = engine("sglang", "refit", "cpu-fp8")
    find = environment.find

    def shadowed(*arguments: Any) -> environment.Environment:
        found = find(*arguments)
        [one] = found.engines
        return replace(found, engines=(replace(one, shadowed_by=Path("/elsewhere/sglang")),))

    monkeypatch.setattr(environment, "find", shadowed)
    with pytest.raises(ConflictError, match="imports /elsewhere/sglang"):
        dry_run(options, model=str(model))


def test_a_bare_folder_has_nothing_to_start(
    engine: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = engine("sglang", "refit", "cpu-fp8")
    (tmp_path / "venv" / "bin" / "python").unlink()
    with pytest.raises(UsageError, match="no interpreter beside it"):
        dry_run(options, model=str(write_model(tmp_path / "tiny")))


def test_vllm_needs_a_model(engine: Callable[..., list[str]]) -> None:
    with pytest.raises(UsageError, match="--model is missing"):
        dry_run(engine("vllm", gpu=(9, 0)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "int4"}, "'int4' is not a mode; there is block, per-tensor, online"),
        ({"quantization": "fp8", "torchao_config": "int8wo"}, "exclude each other"),
        ({"quantization": "fp8", "mode": "per-tensor"}, "exclude each other"),
        ({"torchao_config": "int8wo", "block_size": "64,64"}, "--block-size is for"),
        ({"mode": "online", "block_size": "64,64"}, "--block-size is for"),
        ({"wait": False}, "--no-wait"),
        ({"check": "deep"}, "'deep' is not a level; there is live, weights and logprobs"),
        ({"check": "live", "no_check": True}, "--check live and --no-check exclude each other"),
        ({"check": "weights", "detach": True, "wait": False}, "--no-wait returns before"),
        ({"check": "logprobs", "await_push": True}, "with --await-push they come later"),
        ({"trace": "nonsense"}, "is not MODULE:FUNCTION"),
        ({"backend": "tgi"}, "vllm or sglang"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_looked_at(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        launching.run(reporter()[0], **{"backend": "sglang", "model": "/nowhere", **options})
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_gpu_counts_only_for_an_environment_with_a_cuda_torch() -> None:
    gpus = (Gpu("A", (9, 0), 1), Gpu("B", (8, 0), 1))
    found = environment.Environment(
        None, (3, 11), Path("/s"), "", (), {"torch": "2.7.1+cu126"}, writable=True, gpus=gpus
    )
    device = launching.device_of(found)
    # The weakest one decides.
    assert (device.kind, device.capability, device.count) == ("cuda", (8, 0), 2)
    assert launching.device_of(replace(found, packages={"torch": "2.7.1+cpu"})).kind == "cpu"
    assert launching.device_of(replace(found, gpus=())).kind == "cpu"


def test_launch_of_a_taken_port_fails_before_quantising(
    engine: Callable[..., list[str]], tmp_path: Path, isolated_home: Path
) -> None:
    import socket

    model = write_model(tmp_path / "tiny")
    _, backend, _, site = engine("sglang", "refit", "cpu-fp8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with pytest.raises(BusyError):
            launching.run(
                reporter()[0],
                backend=backend,
                site_packages=Path(site),
                model=str(model),
                port=listener.getsockname()[1],
            )
    assert not (isolated_home / "cache" / "quantized").exists()
