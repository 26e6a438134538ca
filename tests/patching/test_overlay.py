"""An overlay: the environment is only read, and what is imported is the patched copy."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import cli, doctor, environment
from fp8ctl.engines import base
from fp8ctl.errors import (
    BusyError,
    ConflictError,
    DriftError,
    Fp8ctlError,
    NotFoundError,
    NotPermittedError,
    UsageError,
)
from fp8ctl.patching import commands, overlay
from fp8ctl.patching.fsops import Root, Syscalls
from fp8ctl.render import Reporter
from tests.patching.conftest import live_server
from tests.patching.installs import DATA, RELEASED, Venv, photograph, write_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator

A = "sglang/srt/a.py"
UNTOUCHED = "sglang/untouched.py"
LIBRARY = "sglang/lib.so"

# What an engine does: import, look beside its files, ask for its version, start a worker.
LOOK = """
import importlib.metadata, json, multiprocessing, os, sys

def look(answers=None):
    import sglang.srt.a as a
    import sglang.untouched as untouched
    top = os.path.dirname(os.path.dirname(a.__file__))
    seen = {
        "file": a.__file__,
        "first": getattr(a, "first", None),
        "version": importlib.metadata.version("sglang"),
        "untouched": untouched.__file__,
        "data": open(os.path.join(top, "configs", "table.json")).read(),
        "library": open(os.path.join(top, "lib.so")).read(),
        "plugins": len(list(importlib.metadata.distributions(name="sglang"))),
    }
    if answers is not None:
        answers.put(seen)
    return seen

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=look, args=(answers,))
    worker.start()
    print(json.dumps([look(), answers.get(timeout=60)]))
    worker.join()
"""


@pytest.fixture
def venv(bundled: Any, tmp_path: Path, uv: Path) -> Iterator[Venv]:
    """Return an environment with the small engine; the small series is the bundled one."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "0.4.8", {**RELEASED, LIBRARY: b"shared object"})
    made = Venv(tmp_path / "venv", wheels, uv, tmp_path / "uv-cache").make(pip=True)
    made.uv_pip("install", "--link-mode", "copy", "sglang==0.4.8")
    yield made
    bundled.site = made.site


def patch(front: Path, **options: Any) -> tuple[dict[str, Any], str]:
    err = io.StringIO()
    report = Reporter(json_mode=True, out=io.StringIO(), err=err)
    return commands.patch(report, front=front, **options), err.getvalue()


def revert(front: Path, **options: Any) -> tuple[dict[str, Any], str]:
    err = io.StringIO()
    report = Reporter(json_mode=True, out=io.StringIO(), err=err)
    return commands.revert(report, front=front, **options), err.getvalue()


def state(front: Path) -> str:
    [engine] = patch(front, list_only=True)[0]["engines"]
    found: str = engine["state"]
    return found


def launched(front: Path | None, tmp_path: Path, **environ: str) -> dict[str, str]:
    """Return the variables that `launch` gives an engine."""
    hook = tmp_path / "hook"
    hook.mkdir(exist_ok=True)
    request = base.LaunchRequest(
        python=Path(sys.executable),
        model=base.ModelFacts(tmp_path, "m"),
        source="checkpoint",
        device=base.CPU,
        host="127.0.0.1",
        port=1,
        run_dir=tmp_path,
        hook_path=hook,
        overlay=front,
        environ=environ,
    )
    return base.common_env(request)


def look(venv: Venv, front: Path | None, tmp_path: Path, **environ: str) -> list[dict[str, Any]]:
    """Return what server and worker import in the variables of `launch`."""
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    done = subprocess.run(
        [str(venv.python), str(script)],
        env={"PATH": os.environ["PATH"], **environ, **launched(front, tmp_path, **environ)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen: list[dict[str, Any]] = json.loads(done.stdout)
    return seen


def test_server_and_worker_import_the_patched_copy_and_the_environment_is_untouched(
    venv: Venv, tmp_path: Path
) -> None:
    before = photograph(venv.folder)
    front = tmp_path / "front"
    data, said = patch(front, python=venv.python)
    assert data["changed"] is True
    assert (data["overlay"], data["site_packages"]) == (str(front), str(front))
    assert "copies and 2 links of" in said
    assert state(front) == "applied"
    for path, is_link in ((A, False), (UNTOUCHED, False), (DATA, True), (LIBRARY, True)):
        assert (front / path).is_symlink() == is_link
        assert is_link or (front / path).stat().st_nlink == 1
    assert photograph(venv.folder) == before
    # A PYTHONPATH of the user's own does not come in front of it.
    inherited = str(venv.site)
    seen = look(venv, front, tmp_path, PYTHONPATH=inherited, PYTHONDONTWRITEBYTECODE="1")
    assert seen[0] == seen[1]
    assert seen[0]["first"] is True
    assert seen[0]["file"] == str(front / A)
    assert seen[0]["untouched"] == str(front / UNTOUCHED)
    assert (seen[0]["version"], seen[0]["data"]) == ("0.4.8", '{"a": 1}\n')
    assert seen[0]["library"] == "shared object"
    assert look(venv, None, tmp_path, PYTHONDONTWRITEBYTECODE="1")[1]["first"] is None
    assert photograph(venv.folder) == before


def test_the_second_time_nothing_is_written(
    venv: Venv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    before = photograph(front)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a second patch changed something")

    for name in (n for n in vars(Syscalls) if not n.startswith("_")):
        monkeypatch.setattr(Syscalls, name, refuse)
    for options in ({}, {"python": venv.python}, {"site_packages": venv.site}):
        data, said = patch(front, **options)
        assert data["changed"] is False
        assert "already so" in said
    assert photograph(front) == before


def test_dry_run_makes_nothing_and_shows_the_same_plan(venv: Venv, tmp_path: Path) -> None:
    front = tmp_path / "front"
    data, said = patch(front, python=venv.python, dry_run=True)
    assert not front.exists()
    assert f"{front} would be made" in said
    done, _ = patch(front, python=venv.python)
    assert data["engines"][0]["changes"] == done["engines"][0]["changes"]
    assert revert(front, dry_run=True)[0]["changed"] is False
    assert state(front) == "applied"


def test_revert_takes_single_patches_off_and_at_last_everything_away(
    venv: Venv, tmp_path: Path
) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    look(venv, front, tmp_path)  # leaves bytecode
    revert(front, patch_ids=["fourth"])
    [engine] = patch(front, list_only=True)[0]["engines"]
    assert {p["id"]: p["state"] for p in engine["patches"]}["fourth"] == "not applied"
    before = photograph(venv.folder)
    data, said = revert(front)
    assert data["changed"] is True
    assert "was never changed" in said
    assert not front.exists()
    assert photograph(venv.folder) == before
    with pytest.raises(NotFoundError, match="no overlay") as e:
        revert(front)
    assert e.value.hint == f"fp8ctl patch --overlay {front}"


@pytest.mark.parametrize("change", ["edit", "new", "gone", "data"])
def test_a_changed_environment_makes_it_stale_and_the_hint_makes_it_anew(
    venv: Venv, tmp_path: Path, change: str
) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python, patch_ids=["first", "gpu-only"])
    overlay.require_current(front)
    if change == "edit":
        (venv.site / UNTOUCHED).write_bytes(b"x = 2\n")
    elif change == "new":
        (venv.site / "sglang" / "fresh.py").write_bytes(b"")
    elif change == "gone":
        (venv.site / UNTOUCHED).unlink()
    else:
        (venv.site / "sglang" / "configs" / "other.json").write_bytes(b"{}")
    with pytest.raises(DriftError, match="is stale") as e:
        overlay.require_current(front)
    assert e.value.hint == f"fp8ctl patch --overlay {front}"
    data, said = patch(front)
    assert data["changed"] is True
    assert "is made anew" in said
    overlay.require_current(front)
    # What was applied stays, as everywhere.
    [engine] = data["engines"]
    assert {"first", "gpu-only"} <= set(engine["after"])
    seen = {p.name for p in (front / "sglang").iterdir()} - {"__pycache__", "added"}
    assert seen == {p.name for p in (venv.site / "sglang").iterdir()} - {"__pycache__"}
    assert (front / "sglang/configs/table.json").read_bytes() == RELEASED[DATA]


def test_an_upgrade_underneath_is_named_and_the_overlay_can_still_be_removed(
    venv: Venv, tmp_path: Path
) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    write_wheel(venv.wheels, "0.4.9")
    venv.uv_pip("install", "--link-mode", "copy", "sglang==0.4.9")
    with pytest.raises(DriftError, match=r"has sglang-0\.4\.9 by now"):
        overlay.require_current(front)
    finding = findings(front)["overlay"]
    assert finding["status"] == "fail"
    assert finding["fix"] == f"fp8ctl patch --overlay {front}"
    with pytest.raises(Fp8ctlError) as e:
        patch(front)
    assert e.value.exit_code == 4
    venv.uv_pip("uninstall", "sglang")
    revert(front)
    assert not front.exists()


def findings(front: Path) -> dict[str, dict[str, Any]]:
    report = Reporter(json_mode=True, out=io.StringIO(), err=io.StringIO())
    data: Any = doctor.run(report, python=None, site_packages=None, strict=False, front=front)
    return {f["id"]: f for f in data["findings"]}


def test_doctor_looks_at_the_copy(venv: Venv, tmp_path: Path) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    found = findings(front)
    assert found["overlay"]["status"] == "ok"
    assert found["patches"]["message"] == "applied: first, second, third, fourth"
    assert "3 that fp8ctl patched" in found["engine-files"]["message"]
    (front / A).write_bytes(b"mine\n")
    assert found["patches"]["status"] == "ok"
    finding = findings(front)["patches"]
    assert f"drifted, neither as released nor as fp8ctl left it: {A}" in finding["message"]
    # The copy is what is wrong: it is made again, nothing is installed.
    assert finding["fix"] == (
        f"rm -r {front} && fp8ctl patch --python {venv.python} --overlay {front}"
    )


def test_a_folder_with_something_in_it_is_not_touched(venv: Venv, tmp_path: Path) -> None:
    front = tmp_path / "front"
    front.mkdir()
    (front / "mine.txt").write_text("mine")
    before = photograph(front)
    with pytest.raises(ConflictError, match="no overlay of fp8ctl's"):
        patch(front, python=venv.python)
    with pytest.raises(NotFoundError):
        revert(front)
    assert photograph(front) == before
    with pytest.raises(UsageError, match="lies in the environment"):
        patch(venv.site / "front", python=venv.python)
    with pytest.raises(UsageError, match="PYTHONPATH"):
        patch(tmp_path / "a:b", python=venv.python)
    with pytest.raises(NotFoundError, match="is not a folder") as e:
        patch(tmp_path / "no" / "front", python=venv.python)
    assert e.value.hint == f"mkdir -p {tmp_path / 'no'}"


@pytest.mark.parametrize("path", ["mine.txt", "sglang/mine.py", UNTOUCHED, A, DATA])
def test_what_somebody_put_into_it_is_not_removed(venv: Venv, tmp_path: Path, path: str) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    (front / path).unlink(missing_ok=True)
    (front / path).write_bytes(b"mine\n")
    before = photograph(front)
    with pytest.raises(DriftError, match="did not make") as e:
        revert(front)
    assert path in e.value.message
    assert photograph(front) == before
    (venv.site / "sglang" / "fresh.py").write_bytes(b"")
    with pytest.raises(DriftError):
        patch(front)
    assert (front / path).read_bytes() == b"mine\n"


def test_a_patch_that_does_not_fit_makes_no_overlay(venv: Venv, tmp_path: Path) -> None:
    (venv.site / A).write_bytes(b"of another build\n")
    with pytest.raises(DriftError):
        patch(tmp_path / "front", python=venv.python)
    assert not (tmp_path / "front").exists()


def test_another_environments_overlay_is_refused(venv: Venv, tmp_path: Path) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    other = Venv(tmp_path / "other", venv.wheels, venv.uv, venv.cache).make()
    other.uv_pip("install", "--link-mode", "copy", "sglang==0.4.8")
    with pytest.raises(ConflictError, match="is an overlay of"):
        patch(front, python=other.python)


def test_an_overlay_on_pythonpath_is_not_taken_for_the_environment(
    venv: Venv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    monkeypatch.setenv("PYTHONPATH", str(front))
    for options in ({}, {"python": venv.python}):
        assert patch(front, **options)[0]["changed"] is False
    assert overlay.source(front, None, None, None).site_packages == venv.site


def test_a_server_that_runs_on_it_is_noticed(venv: Venv, tmp_path: Path) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    live_server(front)
    (venv.site / UNTOUCHED).write_bytes(b"x = 2\n")
    before = photograph(front)
    for body in (patch, revert):
        with pytest.raises(BusyError, match="sglang-30000"):
            body(front)
    assert photograph(front) == before


def test_installed_by_links_into_a_cache_is_patched_in_an_overlay(
    bundled: Any, tmp_path: Path, uv: Path
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "0.4.8")
    linked = Venv(tmp_path / "venv", wheels, uv, tmp_path / "uv-cache").make()
    linked.uv_pip("install", "--link-mode", "symlink", "sglang==0.4.8")
    assert (linked.site / A).is_symlink()
    before = photograph(linked.folder, tmp_path / "uv-cache")
    front = tmp_path / "front"
    patch(front, python=linked.python)
    assert not (front / A).is_symlink()
    bundled.site = front
    assert bundled.status().state == "applied"
    assert photograph(linked.folder, tmp_path / "uv-cache") == before


def dying_at(step: int, front: Path, **options: Any) -> bool:
    """Run `patch` in a child that is killed at its n-th change; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            count = 0

            def counted(name: str) -> Any:
                real = getattr(Syscalls, name)

                def call(self: Syscalls, *args: Any, **kwargs: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return None if name == "fsync" else real(self, *args, **kwargs)

                return call

            for name in [n for n in vars(Syscalls) if not n.startswith("_")]:
                setattr(Syscalls, name, counted(name))
            patch(front, **options)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("again", [False, True], ids=["new", "anew"])
def test_death_at_every_step_of_making_it_is_mended_by_the_next_patch(
    venv: Venv, tmp_path: Path, *, again: bool, stride: int
) -> None:
    front, start = tmp_path / "front", tmp_path / "start"
    if again:
        patch(front, python=venv.python)
        (venv.site / "sglang" / "fresh.py").write_bytes(b"")
        shutil.copytree(front, start, symlinks=True)
    before = photograph(venv.folder)
    step = 1 - stride
    incomplete = 0
    while True:
        step += stride
        shutil.rmtree(front, ignore_errors=True)
        if again:
            shutil.copytree(start, front, symlinks=True)
        if not dying_at(step, front, python=venv.python):
            break
        with contextlib.suppress(NotFoundError):
            # Never launched half-made; whole, and perhaps not patched yet, it may be.
            found = overlay.require(front)
            incomplete += not found.complete
            if overlay.stale(found) is None:
                with Root(front) as root:
                    assert not [s for s in overlay.strangers(root, found) if ".fp8ctl-" not in s]
        patch(front, python=venv.python)
        overlay.require_current(front)
        assert state(front) == "applied", step
        revert(front)
        assert not front.exists(), step
    assert incomplete >= 60 // stride
    assert photograph(venv.folder) == before


def test_launch_imports_from_it_and_refuses_it_when_stale(
    venv: Venv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python)
    (venv.site / UNTOUCHED).write_bytes(b"x = 2\n")
    arguments = ["launch", "--backend", "sglang", "--overlay", str(front), "--model", "m"]
    code = cli.build("launch")(args=[*arguments, "--json"], standalone_mode=False)
    error = json.loads(capsys.readouterr().out)["error"]
    assert (code, error["id"]) == (5, "FP8-DRIFT")
    assert error["hint"] == f"fp8ctl patch --overlay {front}"


def isolated(venv: Venv, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the environment is a read-only file system, or skip."""
    inner = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    argv = ["unshare", "-rm", "--propagation", "private", "sh", "-c", inner, "sh"]
    argv += [str(venv.folder), sys.executable, "-c", script, *arguments]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    probe = [*argv[:8], str(venv.folder), "true"]
    if subprocess.run(probe, capture_output=True, check=False, timeout=60).returncode:
        pytest.skip("this machine lets no mount namespaces be made")
    settings = {"PYTHONPATH": str(Path(__file__).parents[2])}
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        argv, env=environ | settings, capture_output=True, text=True, check=False, timeout=120
    )


TYPED = """
import shlex, sys
from pathlib import Path
from fp8ctl import hardware
from fp8ctl.patching import catalog
catalog.ROOT = Path(sys.argv[1])
hardware.detect = lambda: hardware.Hardware()
from fp8ctl.cli import main
sys.argv = ["fp8ctl", *sys.argv[2:]]
main()
"""


def test_a_read_only_environment_exits_6_and_the_overlay_it_names_works(
    bundled: Any, venv: Venv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = photograph(venv.folder)
    first = ("patch", "--python", str(venv.python), "--json")
    refused = isolated(venv, TYPED, str(bundled.patches), *first)
    assert refused.returncode == 6, refused.stderr
    error = json.loads(refused.stdout)["error"]
    assert str(venv.site) in error["message"]
    line, _, rest = error["hint"].partition(", which")
    assert "owner of this environment" in rest
    words = line.split()
    assert words == [
        *("fp8ctl", "patch", "--python", str(venv.python)),
        *("--overlay", "./fp8ctl-overlay"),
    ]
    told = isolated(venv, TYPED, str(bundled.patches), *("doctor", *first[1:]))
    fix = {f["id"]: f for f in json.loads(told.stdout)["data"]["findings"]}["engine-writable"]
    assert fix["fix"].endswith("--overlay ./fp8ctl-overlay")
    done = isolated(venv, TYPED, str(bundled.patches), *words[1:])
    assert done.returncode == 0, done.stderr
    assert photograph(venv.folder) == before
    front = tmp_path / "fp8ctl-overlay"
    assert state(front) == "applied"
    assert [s["first"] for s in look(venv, front, tmp_path, PYTHONDONTWRITEBYTECODE="1")] == [
        True,
        True,
    ]
    removed = isolated(venv, TYPED, str(bundled.patches), "revert", "--overlay", str(front))
    assert removed.returncode == 0, removed.stderr
    assert not front.exists()
    assert photograph(venv.folder) == before


def test_an_overlay_that_may_not_be_written_names_its_own_folder(
    venv: Venv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = tmp_path / "front"
    patch(front, python=venv.python, patch_ids=["first"])
    monkeypatch.setattr(Root, "writable", lambda *_: False)
    with pytest.raises(NotPermittedError, match=str(front)) as e:
        patch(front)
    assert "--overlay" not in (e.value.hint or "")


REAL = """
import importlib.metadata, json, multiprocessing, os, sys

def look(answers=None):
    import importlib
    names = json.loads(sys.argv[1]) if answers is None else answers.get(timeout=60)
    files = {n: importlib.import_module(n).__file__ for n in names}
    return {"version": importlib.metadata.version("sglang"), "files": files}

def work(names, answers):
    questions = multiprocessing.get_context("spawn").Queue()
    questions.put(names)
    answers.put(look(questions))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=work, args=(json.loads(sys.argv[1]), answers))
    worker.start()
    print(json.dumps([look(), answers.get(timeout=300)]))
    worker.join()
"""


@pytest.mark.engine
@pytest.mark.long
def test_the_real_engine_runs_from_an_overlay(engine_python: Path, tmp_path: Path) -> None:
    front = tmp_path / "front"
    found = environment.find(engine_python, None, "sglang")
    links = photograph(found.site_packages / "sglang", *found.engines[0].dist_info.glob("*"))
    data, _ = patch(front, python=engine_python, backends=["sglang"])
    [engine] = data["engines"]
    patched = {f["path"]: f["patches"] for f in engine["files"]}
    assert all(patched.values())
    # These two need a GPU's packages to be imported at all.
    skipped = ("moe/", "moe_wna16", "deepseek", "compressed_tensors")
    names = [
        path.removesuffix(".py").replace("/", ".")
        for path in patched
        if not any(s in path for s in skipped)
    ]
    script = tmp_path / "look.py"
    script.write_text(REAL)
    done = subprocess.run(
        [str(engine_python), str(script), json.dumps(names)],
        env={
            "PATH": os.environ["PATH"],
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **launched(front, tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    server, worker = json.loads(done.stdout.splitlines()[-1])
    assert server == worker
    assert server["version"] == "0.4.8"
    assert server["files"] == {n: str(front / (n.replace(".", "/") + ".py")) for n in names}
    after = photograph(found.site_packages / "sglang", *found.engines[0].dist_info.glob("*"))
    assert {k: v for k, v in after.items() if "__pycache__" not in k} == {
        k: v for k, v in links.items() if "__pycache__" not in k
    }
