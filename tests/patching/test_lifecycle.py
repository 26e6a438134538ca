"""What pip, uv and people do to a patched engine, and the ways out that fp8ctl names, typed.

Everything is real: a wheel, pip and uv, the command line, a shell that runs the hints as they
were printed. Only the series of patches is the small one of these tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import cli, hardware
from fp8ctl.patching import catalog
from tests.patching.installs import (
    RELEASED,
    Venv,
    photograph,
    plain_environment,
    write_wheel,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
A = "sglang/srt/a.py"
B = "sglang/srt/b.py"
C = "sglang/c.py"
NEW = "sglang/added/d.py"

SHIM = """#!{python}
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from fp8ctl import hardware
from fp8ctl.patching import catalog
catalog.ROOT = Path({series!r})
hardware.detect = lambda: hardware.Hardware()
from fp8ctl.cli import main
main()
"""


@dataclass(frozen=True)
class Answer:
    """What a command line ended with."""

    code: int
    text: str
    data: dict[str, Any]

    @property
    def hint(self) -> str:
        found: str = self.data["error"]["hint"]
        return found

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        body = self.data.get("data") or self.data["error"]["data"]
        return {f["id"]: f for f in body["findings"]}


@dataclass(frozen=True)
class Shell:
    """A user's shell: fp8ctl on PATH, an environment, an index with the wheels of the test."""

    venv: Venv
    environ: dict[str, str]

    def type(self, line: str, expect: int = 0) -> Answer:
        """Run a command line as a user types it."""
        done = subprocess.run(
            ["/bin/bash", "-c", line],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=self.venv.folder.parent,
        )
        assert done.returncode == expect, f"$ {line}\n{done.stdout}{done.stderr}"
        data = json.loads(done.stdout) if "--json" in line else {}
        return Answer(done.returncode, done.stdout + done.stderr, data)

    def fp8ctl(self, words: str, expect: int = 0) -> Answer:
        """Run a command on the environment, in this process for speed."""
        arguments = [*words.split(), "--python", str(self.venv.python), "--json"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.build(arguments[0])(args=arguments, standalone_mode=False) or 0
        assert code == expect, f"{words}: {code}\n{out.getvalue()}{err.getvalue()}"
        return Answer(code, out.getvalue() + err.getvalue(), json.loads(out.getvalue()))

    def contents(self) -> dict[str, object]:
        """Return what lies in site-packages, bytecode and metadata aside."""
        site = self.venv.site
        return {
            str(p.relative_to(site)): p.read_bytes() if p.is_file() else None
            for p in sorted((*site.glob("sglang/**/*"), *site.glob(".fp8ctl/**/*")))
            if "__pycache__" not in p.parts
        }

    @property
    def state(self) -> str:
        [engine] = self.fp8ctl("patch --list").data["data"]["engines"]
        found: str = engine["state"]
        return found


@pytest.fixture(scope="module")
def shell(lab_template: Path, uv: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("life")
    wheels = folder / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "0.4.8")
    newer = {**RELEASED, A: RELEASED[A] + b"newer = True\n"}
    write_wheel(wheels, "0.4.9", newer)
    venv = Venv(folder / "venv", wheels, uv, folder / "uv-cache").make(pip=True)
    programs = folder / "bin"
    programs.mkdir()
    shim = programs / "fp8ctl"
    shim.write_text(
        SHIM.format(python=sys.executable, root=str(ROOT), series=str(lab_template / "patches"))
    )
    shim.chmod(0o755)
    path = os.pathsep.join([str(programs), str(uv.parent), os.environ["PATH"]])
    environ = {**plain_environment(), **venv.settings, "PATH": path}
    return Shell(venv, environ | {"FP8CTL_HOME": str(folder / "home")})


@pytest.fixture(autouse=True)
def small_series(lab_template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "ROOT", lab_template / "patches")
    monkeypatch.setattr(hardware, "detect", lambda: hardware.Hardware())


@pytest.fixture
def installed(shell: Shell) -> Iterator[Shell]:
    """Return the shell with the engine as released; afterwards nothing of it is there."""
    shell.venv.uv_pip("install", "--link-mode", "copy", "sglang==0.4.8")
    yield shell
    for path in shell.venv.site.glob("*sglang*"):
        shutil.rmtree(path)
    shutil.rmtree(shell.venv.site / ".fp8ctl", ignore_errors=True)


def test_uninstalled_leaves_orphans_that_doctor_names_and_revert_takes_away(
    installed: Shell,
) -> None:
    installed.venv.pip("install", "-q", "--force-reinstall", "--no-deps", "sglang==0.4.8")
    installed.fp8ctl("patch")
    subprocess.run([installed.venv.python, "-OO", "-c", "import sglang.added.d"], check=True)
    installed.venv.pip("uninstall", "-qy", "sglang")
    assert NEW in installed.contents(), "the hazard: pip leaves it, and it can be imported"

    finding = installed.fp8ctl("doctor", 3).findings["orphan"]
    assert NEW in finding["message"]
    for words in ("patch", "patch --list"):
        refused = installed.fp8ctl(words, 3)
        assert "no longer installed: 1 file" in refused.data["error"]["message"]
        assert refused.hint.startswith("fp8ctl revert --site-packages ")
    dry = installed.fp8ctl("revert --dry-run").data["data"]
    assert [c["path"] for c in dry["engines"][0]["changes"]] == [NEW]
    assert NEW in installed.contents()

    done = installed.type(finding["fix"])
    assert "SGLang 0.4.8, no longer installed" in done.text
    assert "nothing of fp8ctl's for SGLang is left there" in done.text
    assert installed.contents() == {}
    assert not (installed.venv.site / "sglang").exists()
    assert "orphan" not in installed.fp8ctl("doctor", 3).findings
    assert installed.fp8ctl("revert", 3).hint.startswith("fp8ctl install sglang")


def test_an_orphan_without_its_store_is_known_by_its_hash(installed: Shell) -> None:
    installed.fp8ctl("patch")
    shutil.rmtree(installed.venv.site / ".fp8ctl")
    installed.venv.pip("uninstall", "-qy", "sglang")
    installed.type(installed.fp8ctl("patch", 3).hint)
    assert installed.contents() == {}


@pytest.mark.long
def test_an_orphan_that_somebody_edited_is_left_and_the_store_goes(installed: Shell) -> None:
    installed.fp8ctl("patch")
    installed.venv.pip("uninstall", "-qy", "sglang")
    (installed.venv.site / NEW).write_bytes(b"mine\n")
    installed.type(installed.fp8ctl("doctor", 3).findings["orphan"]["fix"])
    assert installed.contents() == {"sglang/added": None, NEW: b"mine\n"}


def test_a_store_alone_goes_as_well(installed: Shell) -> None:
    """Nothing was created, so nothing but the store is left."""
    installed.fp8ctl("patch --patch first")
    installed.venv.pip("uninstall", "-qy", "sglang")
    assert ".fp8ctl/ledger.json" in installed.contents()
    installed.type(installed.fp8ctl("doctor", 3).findings["orphan"]["fix"])
    assert installed.contents() == {}


def test_reinstalled_underneath_is_superseded_and_patched_again(installed: Shell) -> None:
    installed.fp8ctl("patch --patch first")
    installed.venv.pip("install", "-q", "--force-reinstall", "--no-deps", "sglang==0.4.8")
    assert installed.state == "superseded"
    listed = installed.fp8ctl("patch --list").text
    assert f"{A} is superseded: installed anew since it was patched" in listed
    finding = installed.fp8ctl("doctor").findings["patches"]
    assert finding["status"] == "warn"
    assert finding["message"].startswith("superseded, installed anew")
    before = installed.contents()
    installed.fp8ctl("revert")
    after = installed.contents()
    assert {k: v for k, v in before.items() if not k.startswith(".fp8ctl")} == after
    installed.type(finding["fix"])
    assert installed.state == "applied"


def test_reinstalled_with_a_file_of_ours_left_is_partial_and_made_whole(installed: Shell) -> None:
    installed.fp8ctl("patch")
    installed.venv.pip("install", "-q", "--force-reinstall", "--no-deps", "sglang==0.4.8")
    finding = installed.fp8ctl("doctor").findings["patches"]
    assert finding["status"] == "fail"
    assert "applied in part: third; superseded, installed anew" in finding["message"]
    assert installed.state == "partial"
    installed.type(finding["fix"])
    assert installed.state == "applied"
    installed.fp8ctl("revert")
    assert not (installed.venv.site / ".fp8ctl").exists()


def test_another_version_on_top_keeps_its_files_and_loses_ours(installed: Shell) -> None:
    installed.fp8ctl("patch")
    installed.venv.pip("install", "-q", "sglang==0.4.9")
    finding = installed.fp8ctl("doctor", 4).findings["orphan"]
    newer = {path: data for path, data in RELEASED.items() if path != A}
    newer[A] = RELEASED[A] + b"newer = True\n"
    release = photograph(*(installed.venv.site / path for path in newer))
    warned = installed.fp8ctl("patch", 4)
    assert "1 file and the store that fp8ctl made are left" in warned.text
    installed.type(finding["fix"])
    assert photograph(*(installed.venv.site / path for path in newer)) == release
    assert (installed.venv.site / A).read_bytes() == newer[A]
    assert not (installed.venv.site / ".fp8ctl").exists()
    assert not (installed.venv.site / NEW).exists()
    assert "orphan" not in installed.fp8ctl("doctor", 4).findings


def test_an_edit_on_top_is_kept_until_a_reinstall_is_typed(installed: Shell) -> None:
    installed.fp8ctl("patch")
    edited = (installed.venv.site / A).read_bytes() + b"# mine\n"
    (installed.venv.site / A).write_bytes(edited)
    assert installed.state == "drifted"
    refused = installed.fp8ctl("revert", 5)
    assert (installed.venv.site / A).read_bytes() == edited
    assert installed.fp8ctl("doctor").findings["patches"]["fix"] == refused.hint
    assert f"the way out: {refused.hint}" in installed.fp8ctl("patch --list").text
    installed.type(refused.hint)
    installed.fp8ctl("revert")
    assert not (installed.venv.site / ".fp8ctl").exists()
    assert installed.state == "pristine"


def test_a_missing_file_comes_back_by_the_hint(installed: Shell) -> None:
    (installed.venv.site / A).unlink()
    refused = installed.fp8ctl("patch", 5)
    assert f"{A} is not there" in refused.data["error"]["message"]
    assert installed.fp8ctl("doctor").findings["patches"]["fix"] == refused.hint
    installed.type(refused.hint)
    installed.fp8ctl("patch")
    assert installed.state == "applied"


def test_a_patch_in_half_of_its_files_is_made_whole(installed: Shell) -> None:
    installed.fp8ctl("patch")
    shutil.rmtree(installed.venv.site / ".fp8ctl")
    (installed.venv.site / B).write_bytes(RELEASED[B])
    assert installed.state == "partial"
    installed.type(installed.fp8ctl("doctor").findings["patches"]["fix"])
    assert installed.state == "applied"


@pytest.mark.long
def test_a_lost_store_is_survived(installed: Shell) -> None:
    pristine = installed.contents()
    installed.fp8ctl("patch")
    shutil.rmtree(installed.venv.site / ".fp8ctl")
    assert installed.state == "applied"
    installed.fp8ctl("revert")
    assert installed.contents() == pristine


@pytest.mark.long
def test_another_build_as_installed_is_patched_when_the_hint_is_typed(
    installed: Shell, tmp_path: Path
) -> None:
    build = {**RELEASED, A: b"# another build\n" + RELEASED[A]}
    write_wheel(tmp_path, "0.4.8", build)
    installed.venv.pip(
        "install", "-q", "--force-reinstall", f"{tmp_path}/sglang-0.4.8-py3-none-any.whl"
    )
    assert installed.state == "drifted"
    fix = installed.fp8ctl("doctor").findings["patches"]["fix"]
    assert fix == installed.fp8ctl("patch", 5).hint
    installed.type(fix)
    installed.fp8ctl("revert")
    assert (installed.venv.site / A).read_bytes() == build[A]


def test_a_cache_that_an_editor_wrote_into_is_gone_round(shell: Shell, tmp_path: Path) -> None:
    """A reinstall from a hard-linked cache would bring the edit back."""
    venv = Venv(tmp_path / "uv", shell.venv.wheels, shell.venv.uv, shell.venv.cache).make()
    venv.uv_pip("install", "--link-mode", "hardlink", "sglang==0.4.8")
    ours = Shell(venv, shell.environ)
    with (venv.site / A).open("ab") as file:
        file.write(b"# edited in place\n")
    venv.uv_pip("install", "--link-mode", "hardlink", "--reinstall", "sglang==0.4.8")
    assert b"edited in place" in (venv.site / A).read_bytes(), "the hazard"
    fix = ours.fp8ctl("doctor").findings["patches"]["fix"]
    assert fix.startswith("uv pip install --python ")
    ours.type(fix)
    assert ours.state == "pristine"


@pytest.mark.long
def test_a_bare_folder_gets_a_reinstall_that_works(shell: Shell, tmp_path: Path) -> None:
    bare = tmp_path / "bare folder"
    argv = [sys.executable, "-m", "pip", "install", "-q", "--target", str(bare), "sglang==0.4.8"]
    subprocess.run(argv, env=shell.environ, check=True, capture_output=True)
    (bare / A).write_bytes(b"edited\n")
    line = f"fp8ctl patch --site-packages '{bare}' --json"
    shell.type(line, 5)
    listed = shell.type(line.replace("patch ", "patch --list ")).text
    out = listed.partition("the way out: ")[2].splitlines()[0]
    assert out.startswith("pip install --upgrade --target ")
    shell.type(out)
    shell.type(line)
    assert b"first = True" in (bare / A).read_bytes()
