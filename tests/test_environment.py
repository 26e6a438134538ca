"""Finding the environment: who wins, what is an engine, what RECORD says."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from fp8ctl import environment
from fp8ctl.errors import ConflictError, NotFoundError, UnsupportedError, UsageError
from fp8ctl.hardware import Gpu, Hardware


@pytest.fixture(autouse=True)
def nothing_active(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fp8ctl.hardware.detect", Hardware)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("FP8CTL_HOME", str(tmp_path / "home"))


def make_engine(site: Path, name: str = "sglang", version: str = "0.4.8", **extra: str) -> Path:
    """Put an engine of two modules, with a true RECORD, into a folder."""
    rows = []
    for file in ("__init__.py", "srt/model.py"):
        path = site / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {file}\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest())
        rows.append(f"{name}/{file},sha256={digest.decode().rstrip('=')},9")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    for file, text in extra.items():
        (info / file.replace("__", ".")).write_text(text)
    return site


def make_venv(root: Path) -> Path:
    """Make a virtual environment without pip, and return its site-packages folder."""
    import venv

    venv.create(root, symlinks=True, with_pip=False)
    return root / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"


class TestOrder:
    def test_a_named_interpreter_wins_and_says_so(self, tmp_path: Path) -> None:
        make_engine(make_venv(tmp_path / "v"))
        found = environment.find(tmp_path / "v" / "bin" / "python", None)
        assert found.engine("sglang").label == "SGLang 0.4.8"
        assert found.origin == "named by --python"
        assert found.python == tmp_path / "v" / "bin" / "python"  # the link, not what it leads to
        assert found.python_version == sys.version_info[:2]

    def test_the_folder_of_an_environment_names_its_interpreter(self, tmp_path: Path) -> None:
        make_venv(tmp_path / "v")
        found = environment.find(tmp_path / "v", None)
        assert found.python == tmp_path / "v" / "bin" / "python"

    def test_the_active_environment_comes_before_a_managed_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        managed = environment.managed_dir("sglang", "cpu")
        make_engine(make_venv(managed))
        (managed / environment.MARKER).write_text("{}")
        active = make_venv(tmp_path / "active")
        monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
        # Active, but empty of the engine: the managed one holds it.
        assert environment.find(None, None, "sglang").site_packages.is_relative_to(managed)
        make_engine(active)
        found = environment.find(None, None, "sglang")
        assert found.site_packages == active
        assert found.origin == "the active virtual environment"

    def test_an_unfinished_managed_environment_is_not_seen(self) -> None:
        managed = environment.managed_dir("sglang", "cpu")
        make_engine(make_venv(managed))
        assert environment.managed_environments() == ()
        assert environment.managed_python("sglang", "cpu") is None
        (managed / environment.MARKER).write_text("{}")
        assert environment.managed_python("sglang", "cpu") == managed / "bin" / "python"
        assert environment.managed_environments() == (managed / "bin" / "python",)

    def test_with_no_engine_anywhere_the_first_place_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_venv(tmp_path / "active")
        monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
        found = environment.find(None, None, "vllm")
        assert found.origin == "the active virtual environment"
        with pytest.raises(NotFoundError, match=r"vLLM 0\.9\.1 is not in .*no engine") as e:
            found.engine("vllm")
        # vLLM cannot be installed without a GPU, so nobody is sent to do it.
        assert e.value.hint == "fp8ctl install sglang"
        assert "its wheel needs a GPU" in e.value.message
        gpu = Hardware((Gpu("GPU", (9, 0), 1),))
        monkeypatch.setattr("fp8ctl.hardware.detect", lambda: gpu)
        with pytest.raises(NotFoundError) as e:
            environment.find(None, None, "vllm").engine("vllm")
        assert e.value.hint == "fp8ctl install vllm"

    @pytest.mark.parametrize("fault", ["not supported", "editable"])
    @pytest.mark.parametrize("backend", ["sglang", None])
    def test_an_active_engine_that_cannot_be_used_gives_way_to_a_managed_one(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        fault: str,
        backend: environment.BackendName | None,
    ) -> None:
        active = make_venv(tmp_path / "active")
        monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
        if fault == "editable":
            direct = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
            make_engine(active, direct_url__json=json.dumps(direct))
        else:
            make_engine(active, version="0.4.7")
        # Alone it is what there is, and the way out is to install one.
        found = environment.find(None, None, backend)
        assert found.site_packages == active
        with pytest.raises((UnsupportedError, ConflictError)) as e:
            found.require_patchable("sglang")
        assert (e.value.hint or "").split(",")[0] == "fp8ctl install sglang"
        # Named, it is taken again whatever is installed: so the hint names the new one.
        with pytest.raises((UnsupportedError, ConflictError)) as e:
            environment.find(tmp_path / "active", None).require_patchable("sglang")
        managed = environment.managed_dir("sglang", "cpu")
        ways = (e.value.hint or "").split(",")
        assert ways[0].endswith(f" && fp8ctl doctor --python {managed / 'bin' / 'python'}")
        make_engine(make_venv(managed))
        (managed / environment.MARKER).write_text("{}")
        found = environment.find(None, None, backend)
        assert found.require_patchable("sglang").version == "0.4.8"
        assert found.python == managed / "bin" / "python"
        assert found.origin.endswith(f", which is {fault}")

    def test_a_stale_virtual_env_is_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "gone"))
        assert environment.find(None, None).origin == "fp8ctl's own environment"


class TestRefusals:
    def test_a_missing_interpreter(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="no Python interpreter at"):
            environment.find(tmp_path / "python", None)

    def test_a_program_that_is_no_python(self) -> None:
        with pytest.raises(NotFoundError, match="does not run as a Python"):
            environment.find(Path("/bin/true"), None)

    @pytest.mark.parametrize(
        ("script", "told"),
        [
            ("echo words", r"\(exit 0\): printed no JSON"),
            ("echo noise >&2; exit 0", r"\(exit 0\): printed no JSON"),
            ("printf '\\n first\\nlast\\n' >&2; exit 3", r"\(exit 3\): first$"),
            ("exit 4", r"\(exit 4\): printed no JSON"),
        ],
    )
    def test_what_a_program_said_instead_is_told(
        self, tmp_path: Path, script: str, told: str
    ) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        with pytest.raises(NotFoundError, match=told):
            environment.find(program, None)

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="cannot read the site-packages folder"):
            environment.find(None, tmp_path / "no")

    def test_both_targets_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError):
            environment.find(Path(sys.executable), tmp_path)

    def test_an_unknown_backend_names_both(self) -> None:
        with pytest.raises(UsageError, match="'trt', expected vllm or sglang"):
            environment.parse_backend("trt")
        assert environment.parse_backend("vllm") == "vllm"

    def test_the_options_of_a_target_survive_a_shell(self) -> None:
        options = environment.target_options(Path("/a b/python"), None)
        assert shlex.split(options) == ["--python", "/a b/python"]
        options = environment.target_options(None, Path("/it's"))
        assert shlex.split(options) == ["--site-packages", "/it's"]
        assert environment.target_options(None, None) == ""

    @pytest.mark.parametrize("version", ["0.4.7", "0.4.8.post1", "0.4.8rc1", "0.4.9+cu126", "dev"])
    def test_another_version_is_not_supported(self, tmp_path: Path, version: str) -> None:
        found = environment.find(None, make_engine(tmp_path, version=version))
        with pytest.raises(UnsupportedError, match=r"fp8ctl knows SGLang 0\.4\.8"):
            found.engine("sglang")

    @pytest.mark.parametrize("version", ["0.9.1", "0.9.1+cu126", "0.9.1+precompiled", "0.9.1.0"])
    def test_a_local_build_of_the_version_is_supported(self, tmp_path: Path, version: str) -> None:
        found = environment.find(None, make_engine(tmp_path, "vllm", version))
        assert found.require_patchable("vllm").version == version

    def test_an_editable_install_is_not_patchable(self, tmp_path: Path) -> None:
        direct = json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
        found = environment.find(None, make_engine(tmp_path, direct_url__json=direct))
        assert found.engine("sglang").kind == "editable"
        with pytest.raises(ConflictError, match="work tree") as e:
            found.require_patchable("sglang")
        assert e.value.exit_code == 5


class TestRecord:
    def report(self, site: Path) -> environment.RecordReport:
        return environment.find(None, site).engine("sglang").record

    def test_files_as_released(self, tmp_path: Path) -> None:
        report = self.report(make_engine(tmp_path))
        assert (report.checked, report.modified, report.missing, report.linked) == (2, (), (), 0)

    def test_one_changed_byte_is_seen_at_equal_size_and_time(self, tmp_path: Path) -> None:
        path = make_engine(tmp_path) / "sglang" / "srt" / "model.py"
        before = path.stat()
        path.write_bytes(path.read_bytes().replace(b"#", b"%"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert self.report(tmp_path).modified == ("sglang/srt/model.py",)

    def test_an_absent_file_is_missing_and_not_modified(self, tmp_path: Path) -> None:
        (make_engine(tmp_path) / "sglang" / "srt" / "model.py").unlink()
        report = self.report(tmp_path)
        assert (report.missing, report.modified) == (("sglang/srt/model.py",), ())

    def test_no_record_is_not_a_clean_one(self, tmp_path: Path) -> None:
        (make_engine(tmp_path) / "sglang-0.4.8.dist-info" / "RECORD").unlink()
        assert not self.report(tmp_path).present

    def test_a_line_that_leaves_the_package_is_not_followed(self, tmp_path: Path) -> None:
        record = make_engine(tmp_path) / "sglang-0.4.8.dist-info" / "RECORD"
        record.write_text("sglang/../../outside.py,sha256=AAAA,1\n" + record.read_text())
        assert self.report(tmp_path).checked == 2

    def test_hard_links_are_counted(self, tmp_path: Path) -> None:
        path = make_engine(tmp_path / "a") / "sglang" / "__init__.py"
        os.link(path, tmp_path / "cache")
        assert self.report(tmp_path / "a").linked == 1

    def test_a_folder_closed_to_this_user_makes_it_read_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site = make_engine(tmp_path)
        assert environment.find(None, site).writable
        closed = site / "sglang" / "srt"
        really = os.access

        # Modes bind no root, and tests may run as root: the kernel's answer is given instead.
        def access(path: Path, mode: int) -> bool:
            return really(path, mode) and not (path == closed and mode & os.W_OK)

        monkeypatch.setattr(os, "access", access)
        found = environment.find(None, site)
        assert not found.writable
        assert found.engine("sglang").record.read_only_dirs == (str(closed),)


def test_another_copy_in_front_on_the_path_shadows_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_engine(make_venv(tmp_path / "v"))
    (tmp_path / "tree" / "sglang").mkdir(parents=True)
    (tmp_path / "tree" / "sglang" / "__init__.py").touch()
    python = tmp_path / "v" / "bin" / "python"
    assert environment.find(python, None).engine("sglang").shadowed_by is None
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tree"))
    found = environment.find(python, None).engine("sglang")
    assert found.shadowed_by == tmp_path / "tree" / "sglang"


@pytest.mark.parametrize(
    ("dists", "cuda"),
    [
        ({"torch": "2.7.1+cu126"}, "12.6"),
        ({"torch": "2.7.1", "nvidia_cuda_runtime_cu12": "12.6.77"}, "12.6"),
        ({"torch": "2.13.0+cpu", "nvidia_cuda_runtime_cu12": "12.6.77"}, None),
        ({}, None),
    ],
)
def test_the_cuda_of_torch_is_read_without_importing_it(
    tmp_path: Path, dists: dict[str, str], cuda: str | None
) -> None:
    for name, version in dists.items():
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
    assert environment.find(None, tmp_path).cuda == cuda


def test_a_bare_folder_inside_an_environment_finds_its_interpreter(tmp_path: Path) -> None:
    site = make_engine(make_venv(tmp_path / "v"))
    assert environment.find(None, site).python == tmp_path / "v" / "bin" / "python"
    assert environment.find(None, make_engine(tmp_path / "bare")).python is None


@pytest.mark.wheels
@pytest.mark.parametrize(("name", "files"), [("vllm", 821), ("sglang", 402)])
def test_a_released_engine_is_as_its_record_says(
    engine_sources: object, name: str, files: int
) -> None:
    assert callable(engine_sources)
    found = environment.find(None, engine_sources(name))
    record = found.require_patchable(environment.parse_backend(name)).record
    assert (record.checked, record.modified, record.missing) == (files, (), ())
