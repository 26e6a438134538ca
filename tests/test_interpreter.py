"""The worker's two ends: what another interpreter sees, and how errors come back."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fp8ctl
from fp8ctl import environment, interpreter, worker
from fp8ctl.errors import ConflictError, Fp8ctlError, NotFoundError, UsageError
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8CTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def report() -> Reporter:
    return Reporter(out=io.StringIO(), err=io.StringIO())


def fake_python(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_hook_folder_shows_this_package_and_nothing_else() -> None:
    folder = interpreter.hook_path()
    assert [path.name for path in folder.iterdir()] == ["fp8ctl"]
    assert (folder / "fp8ctl").resolve() == Path(fp8ctl.__file__).resolve().parent
    code = "import fp8ctl, sys; print(fp8ctl.__version__)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == fp8ctl.__version__


def test_a_wrong_link_is_replaced_and_nothing_is_left_beside_it() -> None:
    folder = interpreter.hook_path()
    (folder / "fp8ctl").unlink()
    (folder / "fp8ctl").symlink_to("/nowhere")
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: interpreter.hook_path(), range(32)))
    assert found == {folder}
    assert (folder / "fp8ctl" / "worker.py").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interpreter_with_torch_is_preferred_to_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interpreter.torch_python() == Path(sys.executable)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="has no torch"):
        interpreter.torch_python()
    assert interpreter.torch_python(Path(sys.executable)) == Path(sys.executable)
    for script in ("exit 1", "exec /nowhere"):
        with pytest.raises(NotFoundError, match="nor has"):
            interpreter.torch_python(fake_python(tmp_path, script))


def test_a_managed_engine_lends_its_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    managed = environment.managed_dir("sglang", "cpu")
    (managed / "bin").mkdir(parents=True)
    fake_python(managed / "bin", "exit 0")
    with pytest.raises(NotFoundError) as caught:
        interpreter.torch_python()  # it is not finished
    root = Path(fp8ctl.__file__).resolve().parent.parent
    extra = f"{root}[torch]"
    pip, _, install = (caught.value.hint or "").partition(", or ")
    assert shlex.split(pip) == [sys.executable, "-m", "pip", "install", "-e", extra]
    assert install == "fp8ctl install sglang"
    (managed / environment.MARKER).write_text("{}")
    assert interpreter.torch_python() == managed / "bin" / "python"
    own = fake_python(tmp_path, "exit 0")
    assert interpreter.torch_python(own) == own


def test_a_worker_s_error_comes_back_as_its_class(report: Reporter) -> None:
    with pytest.raises(UsageError, match="unknown task 'nothing'") as caught:
        interpreter.run_worker(Path(sys.executable), "nothing", {}, report, "do nothing")
    assert "quantize" in caught.value.message


def test_a_user_s_folder_does_not_shadow_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Reporter
) -> None:
    # `python -m` looks into the working folder first.
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "fp8ctl").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        interpreter.run_worker(Path(sys.executable), "nothing", {}, report, "do nothing")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo half a sentence >&2; exit 3", "exited with code 3"),
        ("kill -9 $$", "was killed"),
        ("kill -15 $$", "signal 15"),
        ("echo '{\"resul'", "exited with code 0"),
        ("echo '{\"result\": {}}'; exit 1", "exited with code 1"),
    ],
)
def test_a_worker_that_dies_is_reported_with_its_last_words(
    tmp_path: Path, script: str, words: str
) -> None:
    talk = io.StringIO()
    reporter = Reporter(out=io.StringIO(), err=talk)
    python = fake_python(tmp_path, script)
    with pytest.raises(Fp8ctlError, match=words):
        # More than a pipe holds: nobody reads it.
        interpreter.run_worker(python, "quantize", {"x": "y" * 200_000}, reporter, "t")
    assert ("half a sentence" in talk.getvalue()) == ("half" in script)


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path, report: Reporter) -> None:
    with pytest.raises(NotFoundError, match="cannot start"):
        interpreter.run_worker(tmp_path / "absent", "quantize", {}, report, "t")


def test_progress_reaches_the_reporter(tmp_path: Path) -> None:
    lines = [f'{{"progress": [{n}, 2500000000]}}' for n in (0, 2_500_000_000)]
    lines.append('{"result": {"a": 1}}')
    script = "cat > /dev/null\n" + "\n".join(f"echo '{line}'" for line in lines)
    talk = io.StringIO()
    reporter = Reporter(out=io.StringIO(), err=talk)
    result = interpreter.run_worker(fake_python(tmp_path, script), "t", {}, reporter, "quantise x")
    assert result == {"a": 1}
    assert "quantise x: 100 % (2.5 GB of 2.5 GB)" in talk.getvalue()


def run_task(task: worker.Task, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Any]]:
    monkeypatch.setitem(worker.TASKS, "test", task)
    out = io.StringIO()
    code = worker.run("test", {"a": 1}, out)
    return code, [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_task_s_lines_are_progress_then_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def task(arguments: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
        for done in range(1001):
            progress(done, 1000)
        return {"got": arguments}

    code, lines = run_task(task, monkeypatch)
    assert code == 0
    assert lines[-1] == {"result": {"got": {"a": 1}}}
    assert lines[-2] == {"progress": [1000, 1000]}
    # The whole loop takes well under the second that ten lines would stand for.
    assert len(lines) < 20


def test_a_task_s_failure_is_one_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: dict[str, Any], progress: object) -> dict[str, Any]:
        raise ConflictError("taken", hint="go away", data={"n": 1})

    code, lines = run_task(refuse, monkeypatch)
    body = {"id": "FP8-CONFLICT", "message": "taken", "hint": "go away", "data": {"n": 1}}
    assert (code, lines) == (5, [{"error": body}])

    def crash(arguments: dict[str, Any], progress: object) -> dict[str, Any]:
        raise ZeroDivisionError("oh")

    code, lines = run_task(crash, monkeypatch)
    assert code == 1
    assert "unexpected ZeroDivisionError: oh" in lines[0]["error"]["message"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_model_that_cannot_be_fetched_is_not_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Reporter
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="owner/name") as caught:
        interpreter.resolve_model(report, "owner/name")
    assert caught.value.exit_code == 3
