"""The command line: help, exit codes, and bad input that changes nothing."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from fp8ctl import __version__, cli
from fp8ctl.errors import BusyError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMMANDS = [settings["name"] for _, settings in cli._commands]


@dataclass(frozen=True)
class Done:
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    def error(self) -> dict[str, Any]:
        """Return the error of a run with --json: stdout is that document alone."""
        document = json.loads(self.out)
        assert document["ok"] is False
        assert set(document) == {"ok", "command", "error"}
        error: dict[str, Any] = document["error"]
        assert set(error) == {"id", "message", "hint", "data"}
        assert error["message"]
        assert error["hint"]
        assert "Traceback" not in self.err
        return error


def fp8ctl(*argv: object, **options: Any) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "fp8ctl", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def invoke(*argv: object) -> Done:
    """Run the program here, as `fp8ctl ARGV` does: quicker, and its parts can be replaced."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fp8ctl", *map(str, argv)])
        # From this the parser takes the program's name: that of a script, not of a module.
        patch.setattr(sys.modules["__main__"], "__package__", "")
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def tree(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return mode, time of change and content of everything below a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, data)
    return found


def engine(site: Path, version: str = "0.4.8", url: str | None = None) -> Path:
    """Lay the metadata of an SGLang and one module of it into a folder."""
    info = site / f"sglang-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    (info / "RECORD").write_text("sglang/__init__.py,,\n")
    (site / "sglang").mkdir()
    (site / "sglang" / "__init__.py").write_text("")
    if url is not None:
        document = {"url": url, "dir_info": {"editable": True}}
        (info / "direct_url.json").write_text(json.dumps(document))
    return site


def model(folder: Path) -> Path:
    """Write a checkpoint of one small layer, in BF16."""
    folder.mkdir()
    layer = "model.layers.0.self_attn"
    header: dict[str, object] = {}
    for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
        at = [i * 8192, (i + 1) * 8192]
        header[f"{layer}.{name}.weight"] = {"dtype": "BF16", "shape": [64, 64], "data_offsets": at}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(4 * 8192)
    (folder / "model.safetensors").write_bytes(data)
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    return folder


# --- help and usage -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    done = invoke(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: fp8ctl {name}" in done.out
    assert "--json" in done.out
    assert invoke(name, "-h") == done


def test_the_program_lists_the_same_commands_whichever_one_it_was_built_for() -> None:
    runner = CliRunner()
    whole = runner.invoke(cli.build(), ["--help"]).output
    assert all(f"  {name} " in whole for name in COMMANDS)
    for only in ("", "plan", "nonsense"):
        assert runner.invoke(cli.build(only), ["--help"]).output == whole


def test_no_arguments_show_the_help_and_are_a_usage_error() -> None:
    done = invoke()
    assert done.code == 2
    assert "Usage: fp8ctl" in done.out + done.err


def test_the_version_is_the_packages() -> None:
    assert fp8ctl("--version") == invoke("--version") == Done(0, f"fp8ctl {__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nonsense"], "'nonsense'"),
        (["plan"], "'--model'"),
        (["plan", "--model", "m"], "'--backend'"),
        (["plan", "--model", "m", "--backend", "sglang", "--tp", "0"], "--tp"),
        (["plan", "--model", "m", "--backend", "sglang", "--tp", "two"], "--tp"),
        (["launch", "--backend", "sglang", "--port", "70000"], "--port"),
        (["launch", "--backend", "sglang", "--timeout", "0"], "--timeout"),
        (["launch", "--backend", "sglang", "--prot", "1"], "--prot"),
        (["launch", "--backend", "sglang", "surplus"], "'surplus'"),
        (["logs", "x", "--rank", "-1"], "--rank"),
        (["check"], "'url'"),
        (["doctor", "surplus"], "surplus"),
        (["ps", "--all"], "--all"),
        (["patch", "--backend"], "--backend"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be_read_is_an_error_as_any_other(
    argv: list[str], said: str
) -> None:
    done = invoke(*argv)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert said in done.err
    assert "\nhint: fp8ctl" in done.err
    data = invoke(argv[0], "--json", *argv[1:])
    error = data.error()
    assert (data.code, data.err, error["id"]) == (2, "", "FP8-USAGE")
    assert said in error["message"]


def test_a_flag_of_the_engine_is_not_one_of_ours() -> None:
    """What stands behind `--` is the engine's, `--json` too."""
    done = invoke("launch", "--bakend", "sglang", "--", "--json")
    assert (done.code, done.out) == (2, "")
    assert "--bakend" in done.err


def test_a_real_process_ends_the_same_way() -> None:
    assert fp8ctl("plan", "--json") == invoke("plan", "--json")


# --- what a body ends with ----------------------------------------------------------------------


def end_with(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    def run_ps(_report: object) -> dict[str, object]:
        if error is not None:
            raise error
        return {"servers": []}

    monkeypatch.setattr("fp8ctl.server.run_ps", run_ps)


def test_an_error_of_ours_exits_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    end_with(monkeypatch, BusyError("port 1 is taken", hint="--port 2"))
    assert invoke("ps") == Done(7, "", "error: port 1 is taken\n\nhint: --port 2\n")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_error_that_nobody_expected_is_1_and_says_how_to_see_more(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end_with(monkeypatch, ZeroDivisionError("division by zero"))
    done = invoke("ps", *flags)
    assert done.code == 1
    text = done.out if flags else done.err
    assert "unexpected ZeroDivisionError: division by zero" in text
    assert " ".join(["FP8CTL_TRACEBACK=1 fp8ctl ps", *flags]) in text
    if flags:
        assert done.error()["id"] == "FP8-INTERNAL"


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8CTL_TRACEBACK", "1")
    end_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        invoke("ps")


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    end_with(monkeypatch, KeyboardInterrupt())
    done = invoke("ps", "--json")
    assert done.code == 130
    assert json.loads(done.out)["error"]["id"] == "FP8-INTERRUPTED"


def test_a_body_that_returns_is_0_with_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    end_with(monkeypatch, None)
    done = invoke("ps", "--json")
    assert done.code == 0
    assert json.loads(done.out) == {"ok": True, "command": "ps", "data": {"servers": []}}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_stdout_that_takes_nothing_is_not_permitted(flags: list[str], tmp_path: Path) -> None:
    site = engine(tmp_path / "site")
    argv = [sys.executable, "-m", "fp8ctl", "doctor", "--site-packages", str(site), *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr.startswith("error: cannot write to stdout: No space left on device\n")
    assert "Traceback" not in done.stderr
    # An error that stdout does not take is told on stderr.
    argv = [sys.executable, "-m", "fp8ctl", "logs", "nobody", *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "'nobody'" in done.stderr or "nobody" in done.stderr


@pytest.mark.parametrize(
    "argv", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_a_help_that_stdout_does_not_take_is_told_in_a_line(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fp8ctl", *argv],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 6
    first, _, hint = done.stderr.partition("\n\n")
    assert first == "error: cannot write to stdout: No space left on device"
    assert hint.startswith("hint: df -h")
    assert len(hint.splitlines()) == 1


def test_a_stdout_of_another_encoding_does_not_end_a_command(tmp_path: Path) -> None:
    site = engine(tmp_path / "site")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "FP8CTL_TRACEBACK": "1"}
    done = fp8ctl("doctor", "--site-packages", site, env=environment)
    assert done.code == 0, done.err
    assert "\nok Python 3." in done.out


def test_json_alone_is_an_error_in_json() -> None:
    done = invoke("--json")
    assert (done.code, done.err) == (2, "")
    assert done.error()["id"] == "FP8-USAGE"


def test_the_hint_of_a_traceback_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_logs(*_: object, **__: object) -> dict[str, object]:
        raise ZeroDivisionError

    monkeypatch.setattr("fp8ctl.server.run_logs", run_logs)
    assert "hint: FP8CTL_TRACEBACK=1 fp8ctl logs 'a b'" in invoke("logs", "a b").err


def test_an_unknown_engine_to_install_is_no_matter_of_an_option() -> None:
    done = invoke("install", "foo")
    assert done.code == 2
    assert "unknown engine 'foo'" in done.err
    assert "fp8ctl install sglang" in done.err
    assert "--backend" not in done.err


# --- answers for programs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["doctor", "--site-packages", "SITE"], "findings"),
        (["patch", "--list", "--backend", "sglang", "--site-packages", "SITE"], None),
        (["plan", "--backend", "sglang", "--model", "MODEL"], "tensors"),
        (["ps"], "servers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_under_json_stdout_is_one_document(
    command: list[str], key: str | None, tmp_path: Path
) -> None:
    places = {"SITE": engine(tmp_path / "site"), "MODEL": model(tmp_path / "model")}
    argv = [str(places.get(word, word)) for word in command]
    done = fp8ctl(*argv, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["ok"], document["command"]) == (True, command[0])
    assert key is None or key in document["data"]
    plain = invoke(*argv)
    assert plain.code == 0
    assert "\x1b[" not in plain.out + plain.err
    assert plain.out or command == ["ps"]


def test_scales_that_were_asked_for_are_in_both_documents(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    for word, recipe in (("fp32", "ieee"), ("ue8m0", "ue8m0")):
        file = tmp_path / f"{word}.json"
        argv = ["plan", "--model", folder, "--backend", "sglang", "--scale", word, "--json"]
        planned = invoke(*argv, "--out", file)
        assert json.loads(planned.out)["data"]["recipe"] == recipe
        assert json.loads(file.read_text())["recipe"] == recipe
    out = tmp_path / "out"
    made = fp8ctl("quantize", "--plan", file, "--scale", "ue8m0", "--out", out, "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["data"]["recipe"] == "ue8m0"
    assert json.loads((out / "fp8ctl.json").read_text())["recipe"] == "ue8m0"
    refused = invoke("plan", "--model", folder, "--backend", "sglang", "--scale", "bf16", "--json")
    assert (refused.code, refused.error()["hint"]) == (2, "--scale fp32")


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "--model", "MODEL", "--backend", "trt"],
        ["patch", "--backend", "trt", "--site-packages", "SITE"],
        ["revert", "--backend", "trt", "--site-packages", "SITE"],
        ["quantize", "--model", "MODEL", "--out", "OUT", "--backend", "trt"],
        ["launch", "--backend", "trt", "--site-packages", "SITE"],
        ["install", "trt"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_backend_that_nobody_knows_is_refused_with_those_that_are(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(tmp_path / "SITE")
    model(tmp_path / "MODEL")
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = invoke(*argv, "--json")
    error = done.error()
    assert (done.code, error["id"]) == (2, "FP8-USAGE")
    for word in ("'trt'", "vllm", "sglang"):
        assert word in error["message"]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "--backend", "sglang"],
        ["quantize", "--out", "OUT"],
    ],
    ids=lambda argv: argv[0],
)
@pytest.mark.parametrize("kind", ["empty", "no-weights", "broken", "file", "absent"])
def test_a_folder_that_is_no_model_is_not_found(
    kind: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not-a-model"
    if kind == "file":
        folder.write_text("{}")
    elif kind != "absent":
        folder.mkdir()
    if kind == "no-weights":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif kind == "broken":
        shutil.copytree(model(tmp_path / "good"), folder, dirs_exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = invoke(*argv, "--model", folder, "--json")
    assert done.code == 3
    assert str(folder) in done.error()["message"]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "argv",
    [["doctor"], ["patch", "--backend", "sglang"], ["patch"], ["launch", "--backend", "sglang"]],
    ids=" ".join,
)
def test_an_engine_that_is_missing_is_not_found(argv: list[str], tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    done = invoke(*argv, "--site-packages", site, "--json")
    error = done.error()
    assert (done.code, error["id"]) == (3, "FP8-NOT-FOUND")
    assert str(site) in error["message"]
    assert "fp8ctl install" in error["hint"]
    assert list(site.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [["doctor"], ["patch", "--backend", "sglang"], ["launch", "--backend", "sglang"]],
    ids=lambda argv: argv[0],
)
def test_another_version_of_an_engine_is_unsupported(argv: list[str], tmp_path: Path) -> None:
    site = engine(tmp_path / "site", "0.4.9")
    before = tree(site)
    done = invoke(*argv, "--site-packages", site, "--json")
    error = done.error()
    assert (done.code, error["id"]) == (4, "FP8-UNSUPPORTED")
    assert "0.4.9" in error["message"]
    assert "0.4.8" in error["message"] + error["hint"]
    assert tree(site) == before


def test_an_editable_install_is_refused_with_the_reason(tmp_path: Path) -> None:
    site = engine(tmp_path / "site", url="file:///home/somebody/sglang")
    before = tree(site)
    done = fp8ctl("patch", "--backend", "sglang", "--site-packages", site, "--json")
    error = done.error()
    assert (done.code, error["id"]) == (5, "FP8-CONFLICT")
    assert "editable" in error["message"]
    assert tree(site) == before


def as_a_plain_user() -> None:
    """Take from root, in a child before exec, the right to pass over permissions.

    A second user would do as well, where it could read this checkout and its Python.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
        if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.wheels
def test_without_permission_to_write_nothing_is_changed(
    engine_sources: Callable[[str], Path], tmp_path: Path
) -> None:
    site = tmp_path / "site-packages"
    shutil.copytree(engine_sources("sglang"), site)
    paths = [site, *site.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    before = tree(site)
    argv = ("patch", "--backend", "sglang", "--site-packages", site)
    preexec = as_a_plain_user if os.geteuid() == 0 else None
    try:
        done = fp8ctl(*argv, "--json", preexec_fn=preexec)
        error = done.error()
        assert (done.code, error["id"]) == (6, "FP8-NOT-PERMITTED")
        assert str(site) in error["message"]
        assert tree(site) == before
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)
    # Positive control: who may write can patch this very folder.
    assert fp8ctl(*argv, preexec_fn=preexec).code == 0
    assert tree(site) != before


def test_an_error_for_people_has_its_value_and_a_hint_and_leaves_stdout_alone(
    tmp_path: Path,
) -> None:
    done = fp8ctl("plan", "--model", tmp_path / "absent", "--backend", "sglang")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: ")
    assert str(tmp_path / "absent") in done.err
    assert "\nhint: " in done.err


def test_an_unreadable_working_folder_does_not_matter_to_what_needs_none(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
    code += f"os.execv({sys.executable!r}, {[sys.executable, '-P', '-m', 'fp8ctl', 'ps']!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
