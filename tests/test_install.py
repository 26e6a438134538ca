"""Installing: what is planned, what a half-made folder means, how pip's failures read.

The real installation is what every engine test runs in (`engine_python` in
conftest.py). Here pip is replaced only by programs that fail as pip fails.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest

from fp8ctl import environment, install, installplan
from fp8ctl.environment import MARKER
from fp8ctl.errors import (
    BusyError,
    ConflictError,
    EngineFailedError,
    Fp8ctlError,
    NotFoundError,
    NotPermittedError,
    UnsupportedError,
    UsageError,
)
from fp8ctl.hardware import Gpu, Hardware
from fp8ctl.render import Reporter

LOCKS = sorted((Path(install.__file__).parent / "locks").glob("*.txt"))


@pytest.fixture(autouse=True)
def no_uv_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quiet() -> Reporter:
    return Reporter(out=io.StringIO(), err=io.StringIO())


def make_plan(folder: Path) -> installplan.Plan:
    return installplan.make_plan("sglang", "cpu", folder)


def finish(plan: installplan.Plan) -> None:
    """Leave what a finished installation leaves, as far as fp8ctl looks at it."""
    plan.python.parent.mkdir(parents=True)
    plan.python.touch()
    (plan.folder / MARKER).write_text(json.dumps({"lock": plan.lock.sha256}))


def failing(plan: installplan.Plan, *words: str, code: int = 1) -> installplan.Plan:
    """Return the plan with a program in pip's place that says `words` and fails."""
    script = f"import sys; print({chr(10).join(words)!r}); sys.exit({code})"
    make = (sys.executable, "-m", "venv", "--without-pip", str(plan.folder))
    return replace(plan, commands=(make, (sys.executable, "-c", script, "-m", "pip")))


class TestLocks:
    @pytest.mark.parametrize("path", LOCKS, ids=lambda p: p.stem)
    def test_every_line_is_a_pin_with_its_size(self, path: Path) -> None:
        engine, version, device = path.stem.rsplit("-", 2)
        lock = installplan.read_lock(environment.parse_backend(engine), device)
        lines = [t for t in path.read_text().splitlines() if t and not t.startswith("#")]
        assert len(lock.pins) == len(lines)
        assert f"{engine}=={version}" in lock.pins
        assert all(size > 0 for size in lock.pins.values())

    @pytest.mark.parametrize("path", LOCKS, ids=lambda p: p.stem)
    def test_the_size_in_the_header_is_the_sum_of_the_lines(self, path: Path) -> None:
        engine, _, device = path.stem.rsplit("-", 2)
        total = installplan.read_lock(environment.parse_backend(engine), device).download
        words = f"{total / 1e6:.0f} MB" if total < 1e9 else f"{total / 1e9:.1f} GB"
        assert f"# download: about {words}" in path.read_text()

    def test_every_lock_keeps_the_triton_that_the_engines_can_import(self) -> None:
        assert len(LOCKS) == 3
        assert all("\ntriton==3.3.1 " in path.read_text() for path in LOCKS)

    def test_no_lock_names_a_host(self) -> None:
        assert all("://" not in path.read_text() for path in LOCKS)

    def test_vllm_for_the_cpu_is_refused_with_the_reason(self) -> None:
        with pytest.raises(UnsupportedError, match="released wheel is a CUDA build") as e:
            installplan.make_plan("vllm", "cpu", None)
        assert e.value.exit_code == 4


class TestPlan:
    def test_torch_goes_first_with_its_dependencies_and_without_the_lock_s_triton(
        self, tmp_path: Path
    ) -> None:
        plan = make_plan(tmp_path / "e")
        _, torch, rest = plan.commands
        assert torch[-3:] == ("-c", installplan.CONSTRAINTS, "torch==2.13.0")
        assert rest[-3:] == ("--no-deps", "-r", str(plan.lock.path))
        # An index's torch wants a triton of its own: constrained to ours it could not be had.
        assert "triton==3.3.1" in plan.lock.pins
        assert not any(pin.startswith("triton==") for pin in plan.constraints)
        # pip tells a pin that is constrained and cannot be had as a conflict with itself.
        assert not any(pin.startswith("torch==") for pin in plan.constraints)

    def test_cuda_is_one_exact_step(self, tmp_path: Path) -> None:
        plan = installplan.make_plan("vllm", "cuda", tmp_path / "e")
        assert len(plan.commands) == 2
        assert "--no-deps" in plan.commands[1]

    def test_the_device_follows_the_gpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fp8ctl.hardware.detect", Hardware)
        assert installplan.make_plan("sglang", None, tmp_path).device == "cpu"
        some = Hardware((Gpu("GPU", (9, 0), 1),))
        monkeypatch.setattr("fp8ctl.hardware.detect", lambda: some)
        assert installplan.make_plan("sglang", None, tmp_path).device == "cuda"

    def test_an_unknown_device_is_a_usage_error(self) -> None:
        with pytest.raises(UsageError, match="'tpu', expected cpu or cuda"):
            installplan.make_plan("sglang", "tpu", None)

    def test_a_python_without_wheels_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installplan, "PYTHONS", ((3, 99),))
        with pytest.raises(UnsupportedError, match=r"with Python 3\.99; fp8ctl runs on"):
            installplan.make_plan("sglang", "cpu", None)

    def test_uv_is_taken_where_the_user_set_it_up_or_asked_for_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uv = tmp_path / "uv"
        uv.write_text("#!/bin/sh\n")
        uv.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert make_plan(tmp_path / "e").tool == "pip"
        monkeypatch.setenv("UV_INDEX_URL", "file:///index")
        plan = make_plan(tmp_path / "e")
        assert plan.tool == "uv"
        assert plan.commands[1][:3] == (str(uv), "pip", "install")
        monkeypatch.setenv("FP8CTL_INSTALLER", "pip")
        assert make_plan(tmp_path / "e").tool == "pip"
        monkeypatch.delenv("UV_INDEX_URL")
        monkeypatch.setenv("FP8CTL_INSTALLER", "uv")
        assert make_plan(tmp_path / "e").tool == "uv"
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(NotFoundError, match="no uv on PATH"):
            make_plan(tmp_path / "e")


class TestDryRun:
    def test_it_prints_commands_that_a_shell_takes_and_changes_nothing(
        self, tmp_path: Path
    ) -> None:
        out, err = io.StringIO(), io.StringIO()
        folder = tmp_path / "a b"
        data = install.run(
            Reporter(out=out, err=err), engine="sglang", device="cpu", folder=folder, dry_run=True
        )
        assert data["changed"] is False
        assert list(tmp_path.iterdir()) == []
        assert "about 4" in err.getvalue()  # the size, before anything is fetched
        lines = out.getvalue().splitlines()
        assert len(lines) == 3
        for line in lines:
            subprocess.run(["bash", "-n", "-c", line], check=True)
        assert str(folder) in shlex.split(lines[0])


class TestFolder:
    def test_a_finished_one_of_the_same_lock_is_reused(
        self, tmp_path: Path, quiet: Reporter
    ) -> None:
        plan = make_plan(tmp_path / "e")
        finish(plan)
        assert install.install(quiet, "sglang", "cpu", plan.folder) == plan.python
        data = install.run(quiet, engine="sglang", device="cpu", folder=plan.folder, dry_run=False)
        assert data["changed"] is False

    @pytest.mark.parametrize("marker", ['{"lock": "other"}', "{", "[]"])
    def test_one_of_another_lock_is_not_finished(self, tmp_path: Path, marker: str) -> None:
        plan = make_plan(tmp_path / "e")
        finish(plan)
        assert install.is_finished(plan)
        (plan.folder / MARKER).write_text(marker)
        assert not install.is_finished(plan)

    def test_one_whose_interpreter_is_gone_is_not_finished(self, tmp_path: Path) -> None:
        plan = make_plan(tmp_path / "e")
        finish(plan)
        plan.python.unlink()
        assert not install.is_finished(plan)

    def test_a_failed_installation_leaves_no_folder(self, tmp_path: Path, quiet: Reporter) -> None:
        plan = failing(make_plan(tmp_path / "e"), "ERROR: broken")
        with pytest.raises(EngineFailedError, match="broken"):
            install.execute(quiet, plan)
        assert not plan.folder.exists()

    def test_an_unfinished_one_is_removed_and_made_again(
        self, tmp_path: Path, quiet: Reporter
    ) -> None:
        plan = failing(make_plan(tmp_path / "e"), "ERROR: reached pip")
        (plan.folder / "lib").mkdir(parents=True)
        (plan.folder / ".fp8ctl-unfinished").touch()
        with pytest.raises(EngineFailedError, match="reached pip"):
            install.execute(quiet, plan)

    def test_a_folder_of_somebody_else_is_left_as_it_is(
        self, tmp_path: Path, quiet: Reporter
    ) -> None:
        (tmp_path / "e").mkdir()
        (tmp_path / "e" / "thesis.tex").write_text("dear")
        with pytest.raises(ConflictError, match="not made by fp8ctl"):
            install.execute(quiet, make_plan(tmp_path / "e"))
        assert (tmp_path / "e" / "thesis.tex").read_text() == "dear"

    def test_a_link_is_not_followed(self, tmp_path: Path, quiet: Reporter) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / MARKER).write_text("{}")
        (tmp_path / "e").symlink_to(tmp_path / "real")
        with pytest.raises(ConflictError):
            install.execute(quiet, make_plan(tmp_path / "e"))
        assert (tmp_path / "real" / MARKER).exists()

    def test_a_second_installation_waits_for_nobody(self, tmp_path: Path, quiet: Reporter) -> None:
        plan = make_plan(tmp_path / "e")
        path = install.lock_path(plan.folder)
        path.parent.mkdir(parents=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(BusyError, match="another installation"):
                install.execute(quiet, plan)
        assert not plan.folder.exists()

    def test_an_environment_in_use_is_not_replaced(self, tmp_path: Path, quiet: Reporter) -> None:
        plan = make_plan(tmp_path / "e")
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(plan.folder)], check=True
        )
        (plan.folder / MARKER).write_text('{"lock": "an older one"}')
        user = subprocess.Popen([plan.python, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            with pytest.raises(BusyError, match=str(user.pid)):
                install.execute(quiet, plan)
            assert (plan.folder / MARKER).exists()
        finally:
            user.kill()
            user.communicate()

    def test_a_disk_that_is_too_small_is_told_before_the_download(
        self, tmp_path: Path, quiet: Reporter
    ) -> None:
        plan = make_plan(tmp_path / "e")
        plan = replace(plan, lock=replace(plan.lock, installed=1 << 60))
        with pytest.raises(NotPermittedError, match="free; the environment takes about") as e:
            install.execute(quiet, plan)
        assert "5.2 GB where the index has the CUDA build only" in e.value.message
        assert not plan.folder.exists()

    def test_a_disk_for_the_cpu_build_is_large_enough(
        self, tmp_path: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = failing(make_plan(tmp_path / "e"), "ERROR: reached pip")
        assert plan.lock.installed is not None
        assert plan.lock.installed_cuda is not None
        assert plan.lock.installed < plan.lock.installed_cuda
        free = plan.lock.installed + 1
        usage = type(shutil.disk_usage("/"))(free * 2, free - 1, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(EngineFailedError, match="reached pip"):
            install.execute(quiet, plan)

    def test_what_failed_or_was_refused_leaves_nothing_where_it_was_asked_for(
        self, tmp_path: Path, quiet: Reporter, isolated_home: Path
    ) -> None:
        place = tmp_path / "new" / "folders"
        with pytest.raises(EngineFailedError):
            install.execute(quiet, failing(make_plan(place / "e"), "ERROR: broken"))
        assert list(tmp_path.iterdir()) == []
        shutil.rmtree(isolated_home)
        (tmp_path / "file").touch()
        with pytest.raises(ConflictError):
            install.execute(quiet, make_plan(tmp_path / "file"))
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        assert not isolated_home.exists(), "a refusal took the lock"

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
    def test_a_place_that_takes_no_folder_is_told_so(self, quiet: Reporter) -> None:
        with pytest.raises(NotPermittedError, match="takes no new folders") as e:
            install.execute(quiet, make_plan(Path("/proc/x")))
        assert e.value.hint == "fp8ctl install sglang --device cpu --dir /a/folder/you/own"

    def test_where_no_folder_was_named_the_hint_names_none_either(
        self, quiet: Reporter, isolated_home: Path
    ) -> None:
        (isolated_home / "data").write_text("in the way")
        with pytest.raises(NotPermittedError) as e:
            install.install(quiet, "sglang", "cpu")
        assert e.value.hint == "export FP8CTL_HOME=/a/folder/you/own"


class TestNext:
    def environment(self, root: Path, version: str) -> Path:
        venv.create(root, symlinks=True, with_pip=False)
        site = root / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        (site / f"sglang-{version}.dist-info").mkdir()
        return root / "bin" / "python"

    @pytest.mark.parametrize(("active", "named"), [("0.4.7", False), ("0.4.8", True)])
    def test_it_names_the_environment_unless_that_is_found_by_itself(
        self,
        tmp_path: Path,
        quiet: Reporter,
        monkeypatch: pytest.MonkeyPatch,
        active: str,
        named: bool,
    ) -> None:
        monkeypatch.setattr("fp8ctl.hardware.detect", Hardware)
        self.environment(tmp_path / "active", active)
        monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
        monkeypatch.delenv("CONDA_PREFIX", raising=False)
        plan = installplan.make_plan("sglang", None, None)
        self.environment(plan.folder, "0.4.8")
        (plan.folder / MARKER).write_text(json.dumps({"lock": plan.lock.sha256}))
        data = install.run(quiet, engine="sglang", device=None, folder=None, dry_run=False)
        assert data["changed"] is False
        assert data["next"] == "fp8ctl doctor" + (f" --python {plan.python}" if named else "")
        # Where something else would be found again, so say the hints of other commands.
        hint = environment.install_hint("sglang", stays=True)
        assert hint == f"fp8ctl install sglang && fp8ctl doctor --python {plan.python}"


class TestRealPip:
    """pip itself, of fp8ctl's own environment, with no index to ask."""

    @pytest.mark.parametrize(
        ("settings", "message", "hint"),
        [
            (
                {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"},
                "no answer from its index",
                "PIP_INDEX_URL=https://an.index/simple fp8ctl install sglang --device cpu --dir {}",
            ),
            (
                {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"},
                "cannot reach its index",
                "PIP_INDEX_URL=https://an.index/simple fp8ctl install sglang --device cpu --dir {}",
            ),
            (
                {"PIP_NO_INDEX": "1"},
                "no answer from its index",
                "PIP_NO_INDEX=0 fp8ctl install sglang --device cpu --dir {}",
            ),
            (
                {"PIP_NO_INDEX": "1", "PIP_CONSTRAINT": "{}.txt"},
                "a constraint of yours, torch==2.7.0",
                "PIP_CONSTRAINT=/dev/null fp8ctl install sglang --device cpu --dir {}",
            ),
        ],
        ids=["refused", "retried", "no-index", "own-pin"],
    )
    def test_an_index_that_does_not_have_it_is_not_found(
        self,
        tmp_path: Path,
        quiet: Reporter,
        monkeypatch: pytest.MonkeyPatch,
        settings: dict[str, str],
        message: str,
        hint: str,
    ) -> None:
        folder = tmp_path / "e"
        (tmp_path / "e.txt").write_text("torch==2.7.0\n")
        for name in [n for n in os.environ if n.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name, value in settings.items():
            monkeypatch.setenv(name, value.format(folder))
        plan = make_plan(folder)
        # Without a pip in the environment, which takes seconds to make.
        make, torch, _ = plan.commands
        make = (*make[:3], "--without-pip", *make[3:])
        pip = (sys.executable, "-m", "pip", "--python", str(plan.python), *torch[3:])
        with pytest.raises(NotFoundError, match=message) as e:
            install.execute(quiet, replace(plan, commands=(make, pip)))
        assert e.value.hint == hint.format(folder)
        assert "127.0.0.1" not in (e.value.hint or "")
        assert list(tmp_path.iterdir()) == [tmp_path / "e.txt"]

    def test_another_failure_points_to_the_commands_and_not_to_what_is_gone(
        self, tmp_path: Path, quiet: Reporter
    ) -> None:
        for code in (0, 1):
            plan = failing(make_plan(tmp_path / "e"), "ERROR: broken", code=code)
            with pytest.raises(EngineFailedError) as e:
                install.execute(quiet, plan)
            again = f"fp8ctl install sglang --device cpu --dir {tmp_path / 'e'}"
            assert e.value.hint == f"{again} --dry-run"

    def test_pip_that_ends_well_without_the_engine_is_a_failure(
        self, tmp_path: Path, quiet: Reporter
    ) -> None:
        plan = failing(make_plan(tmp_path / "e"), "done", code=0)
        with pytest.raises(EngineFailedError, match=r"holds no SGLang 0\.4\.8"):
            install.execute(quiet, plan)
        assert not plan.folder.exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            "ERROR: No matching distribution found for torch==2.13.0",
            NotFoundError,
        ),
        (
            "WARNING: Retrying ... NewConnectionError('Name or service not known')\n"
            "ERROR: No matching distribution found for torch==2.13.0",
            NotFoundError,
        ),
        (
            "ERROR: Could not install packages: OSError: [Errno 28] No space left on device",
            NotPermittedError,
        ),
        (
            "ERROR: Could not install packages: OSError: [Errno 13] Permission denied: '/x'",
            NotPermittedError,
        ),
        ("ERROR: Failed building wheel for x", EngineFailedError),
        ("", EngineFailedError),
    ],
)
def test_a_failure_of_pip_becomes_the_error_it_speaks_of(
    tmp_path: Path, quiet: Reporter, words: str, error: type[Fp8ctlError]
) -> None:
    plan = failing(make_plan(tmp_path / "e"), *words.splitlines())
    with pytest.raises(error) as e:
        install.execute(quiet, plan)
    assert type(e.value) is error
    assert e.value.hint
    last = e.value.data["last_lines"]
    assert isinstance(last, list)
    assert last == words.splitlines() or not words


def test_the_user_s_index_settings_reach_pip_and_misleading_ones_do_not(
    tmp_path: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "file:///mine")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    script = "import os; print('E', os.environ.get('PIP_INDEX_URL'), os.environ.get('PIP_TARGET'))"
    plan = failing(make_plan(tmp_path / "e"))
    spy = (sys.executable, "-c", f"{script}; raise SystemExit(1)", "-m", "pip")
    with pytest.raises(EngineFailedError) as e:
        install.execute(quiet, replace(plan, commands=(plan.commands[0], spy)))
    assert e.value.data["last_lines"] == ["E file:///mine None"]
