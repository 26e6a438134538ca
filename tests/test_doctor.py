"""Doctor: every rule fires on its cause, stays silent without it, and has a fix."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8ctl import doctor, rules
from fp8ctl.environment import BackendName, Engine, Environment, RecordReport
from fp8ctl.errors import CheckFailedError, NotFoundError, UnsupportedError
from fp8ctl.findings import Facts, Finding
from fp8ctl.hardware import Gpu, Hardware
from fp8ctl.patching.status import FileStatus, PatchStatus, SeriesStatus
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GOOD = {"torch": "2.7.1", "transformers": "4.52.3", "numpy": "2.2.6", "sgl-kernel": "0.1.9"}
PRISTINE = {"sglang": SeriesStatus("sglang", "sglang-0.4.8", "0.4.8", (), (), False)}


def engine(backend: BackendName = "sglang", version: str = "0.4.8", **changes: object) -> Engine:
    base = Engine(
        backend=backend,
        version=version,
        supported=True,
        kind="wheel",
        dist_info=Path("/site/x.dist-info"),
        package_dir=Path("/site") / backend,
        installer="pip",
        record=RecordReport(present=True, checked=402),
    )
    return replace(base, **changes)  # type: ignore[arg-type]  # fields by name, from a test


def facts(
    *engines: Engine,
    site: Path = Path("/site"),
    packages: Mapping[str, str] = GOOD,
    gpus: tuple[Gpu, ...] = (),
    driver_cuda: tuple[int, int] = (12, 8),
    variables: Mapping[str, str] | None = None,
    patches: Mapping[BackendName, SeriesStatus | str] | None = None,
    **changes: object,
) -> Facts:
    environment = Environment(
        python=Path("/venv/bin/python"),
        python_version=(3, 12),
        site_packages=site,
        origin="named by --python",
        engines=engines or (engine(),),
        packages=packages,
        writable=True,
        gpus=gpus,
        cuda="12.6" if gpus else None,
    )
    machine = Hardware(gpus, "570.1", driver_cuda) if gpus else Hardware()
    return Facts(
        replace(environment, **changes),  # type: ignore[arg-type]
        machine,
        variables or {},
        PRISTINE if patches is None else patches,  # type: ignore[arg-type]
    )


def found(given: Facts) -> dict[str, Finding]:
    return {f.id: f for f in rules.examine(given)}


def gpu(major: int, minor: int) -> tuple[Gpu, ...]:
    return (Gpu("GPU", (major, minor), 80 << 30),)


def bad(given: Facts) -> set[str]:
    return {f.id for f in rules.examine(given) if f.status in ("warn", "fail")}


@pytest.fixture
def with_triton(tmp_path: Path) -> Path:
    module = tmp_path / "triton" / "runtime" / "cache.py"
    module.parent.mkdir(parents=True)
    module.write_text("def default_cache_dir():\n    pass\n")
    (tmp_path / "deep_gemm").mkdir()
    return tmp_path


def test_a_healthy_gpu_host_has_nothing_to_mend(with_triton: Path) -> None:
    packages = GOOD | {"triton": "3.3.1"}
    assert bad(facts(packages=packages, site=with_triton, gpus=gpu(9, 0))) == set()


@pytest.mark.parametrize(
    ("id_", "status", "given"),
    [
        ("python", "fail", facts(python_version=(3, 13))),
        ("python", "fail", facts(python_version=(3, 9))),
        ("engine-version", "fail", facts(engine(version="0.4.9", supported=False))),
        ("engine-editable", "fail", facts(engine(kind="editable"))),
        ("engine-shadowed", "warn", facts(engine(shadowed_by=Path("/tree/sglang")))),
        ("engine-files", "warn", facts(engine(record=RecordReport()))),
        (
            "engine-files",
            "fail",
            facts(engine(record=RecordReport(True, 2, (), ("sglang/a.py",)))),
        ),
        ("engine-files", "warn", facts(engine(record=RecordReport(True, 2, ("sglang/a.py",))))),
        ("engine-writable", "warn", facts(writable=False)),
        ("both-engines", "warn", facts(engine(), engine("vllm", "0.9.1"))),
        ("duplicate-metadata", "warn", facts(duplicates={"vllm": ("0.9.0", "0.9.1")})),
        ("torch", "fail", facts(packages={})),
        ("torch", "warn", facts(packages={"torch": "2.7.1+cpu"}, gpus=gpu(9, 0))),
        ("torch", "warn", facts(packages={"torch": "2.13.0"}, gpus=gpu(9, 0))),
        ("triton", "fail", facts()),
        ("sgl-kernel", "fail", facts(packages={"torch": "2.7.1"}, gpus=gpu(9, 0))),
        ("transformers", "fail", facts(packages={"torch": "2.7.1"})),
        ("transformers", "warn", facts(packages=GOOD | {"transformers": "4.57.0"})),
        (
            "transformers",
            "fail",
            facts(engine("vllm", "0.9.1"), packages=GOOD | {"transformers": "4.54.0"}),
        ),
        ("numpy", "warn", facts(packages=GOOD | {"numpy": "2.3.0"})),
        ("gpu", "fail", facts(gpus=gpu(7, 5))),
        ("gpu", "warn", facts(gpus=gpu(8, 6))),
        ("gpu", "warn", facts(gpus=gpu(12, 0))),
        ("gpu", "warn", facts(gpus=gpu(10, 0))),
        ("gpu-mixed", "warn", facts(gpus=gpu(9, 0) + gpu(8, 9))),
        ("driver", "fail", facts(gpus=gpu(9, 0), driver_cuda=(11, 8))),
        ("deep-gemm", "warn", facts(gpus=gpu(9, 0))),
        ("variable", "warn", facts(variables={"PYTHONPYCACHEPREFIX": "/x"})),
        ("variable", "warn", facts(variables={"SGLANG_FORCE_FP8_MARLIN": "1"})),
        (
            "variable",
            "warn",
            facts(variables={"SGLANG_USE_CPU_ENGINE": "1"}, gpus=gpu(9, 0)),
        ),
        (
            "variable",
            "warn",
            facts(engine("vllm", "0.9.1"), variables={"VLLM_TEST_FORCE_FP8_MARLIN": "true"}),
        ),
        ("patches", "warn", facts(patches={"sglang": "the series is damaged"})),
    ],
)
def test_a_rule_fires_on_its_cause(id_: str, status: str, given: Facts) -> None:
    finding = found(given)[id_]
    assert finding.status == status
    assert finding.fix or id_ == "patches"


@pytest.mark.parametrize(
    ("id_", "given"),
    [
        ("variable", facts(variables={"SGLANG_FORCE_FP8_MARLIN": "0"})),
        ("variable", facts(variables={"SGLANG_USE_CPU_ENGINE": "1"})),  # no GPU: as it should be
        ("variable", facts(variables={"VLLM_USE_V1": "0"})),  # no vLLM here
        ("sgl-kernel", facts(packages={"torch": "2.13.0+cpu"})),
        ("numpy", facts(packages=GOOD | {"numpy": "2.2.6"})),
        ("both-engines", facts(engine())),
        ("int8dq", facts()),
        ("deep-gemm", facts()),
        ("deep-gemm", facts(gpus=gpu(8, 9))),  # it never had any
        ("deep-gemm", facts(engine("vllm", "0.9.1"), gpus=gpu(9, 0))),
    ],
)
def test_a_rule_is_silent_without_its_cause(id_: str, given: Facts) -> None:
    assert id_ not in found(given)


def test_triton_is_judged_by_what_it_has_and_not_by_its_number(with_triton: Path) -> None:
    packages = GOOD | {"triton": "9.9"}
    assert found(facts(packages=packages, site=with_triton))["triton"].status == "ok"
    (with_triton / "triton" / "runtime" / "cache.py").write_text("knobs = 1\n")
    finding = found(facts(packages=packages, site=with_triton))["triton"]
    assert finding.status == "fail"
    assert "default_cache_dir" in finding.message
    assert finding.fix == "/venv/bin/python -m pip install --no-deps triton==3.3.1"


@pytest.mark.parametrize(("value", "told"), [("0", True), ("off", True), ("1", False), ("", False)])
def test_deep_gemm_can_be_there_and_switched_off(value: str, told: bool, with_triton: Path) -> None:
    given = facts(site=with_triton, gpus=gpu(9, 0), variables={"SGL_ENABLE_JIT_DEEPGEMM": value})
    finding = found(given).get("deep-gemm")
    assert (finding is not None) is told
    assert finding is None or finding.fix == "unset SGL_ENABLE_JIT_DEEPGEMM"


def test_one_is_not_several() -> None:
    status = patched("pristine", "not applied")
    assert "1 patch known" in found(facts(patches={"sglang": status}))["patches"].message
    record = RecordReport(True, 1, linked=1)
    told = found(facts(engine(record=record)))
    assert told["engine-files"].message == "1 file as released"
    assert told["engine-links"].message.startswith("1 file shared")


def test_an_environment_that_stays_first_is_left_by_name() -> None:
    for id_, given in (
        ("both-engines", facts(engine(), engine("vllm", "0.9.1"))),
        ("engine-version", facts(engine(version="0.4.9", supported=False), named=True)),
    ):
        fix = found(given)[id_].fix or ""
        assert fix.startswith("fp8ctl install sglang && fp8ctl doctor --python /")
    closed = found(facts(writable=False))["engine-writable"].fix
    assert closed == "fp8ctl patch --backend sglang --overlay ./fp8ctl-overlay"
    other = facts(engine("vllm", "0.9.2", supported=False))
    assert found(other)["engine-version"].fix == "fp8ctl install sglang"  # no GPU for vLLM


def test_int8dq_and_cuda_graphs_are_told_where_there_is_a_gpu() -> None:
    assert "--disable-cuda-graph" in found(facts(gpus=gpu(9, 0)))["int8dq"].message


def patched(state: str, patch: str, *, interrupted: bool = False) -> SeriesStatus:
    holds = frozenset({"refit"}) if patch != "not applied" else frozenset()
    return SeriesStatus(
        "sglang",
        "sglang-0.4.8",
        "0.4.8",
        (FileStatus("sglang/a.py", state, None, None, holds, None, None),),  # type: ignore[arg-type]
        (PatchStatus("refit", "Refit", patch),),  # type: ignore[arg-type]
        interrupted,
    )


def test_a_file_that_fp8ctl_patched_is_no_stranger() -> None:
    record = RecordReport(True, 2, ("sglang/a.py", "sglang/b.py"))
    status = patched("applied", "applied")
    finding = found(facts(engine(record=record), patches={"sglang": status}))["engine-files"]
    assert finding.status == "warn"
    assert finding.data == {"modified": ["sglang/b.py"]}
    record = replace(record, modified=("sglang/a.py",))
    finding = found(facts(engine(record=record), patches={"sglang": status}))["engine-files"]
    assert finding.status == "ok"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (patched("pristine", "not applied"), "info"),
        (patched("applied", "applied"), "ok"),
        (patched("partial", "partial"), "fail"),
        (patched("drifted", "not applied"), "warn"),
        (patched("applied", "applied", interrupted=True), "fail"),
    ],
)
def test_the_state_of_the_patches_is_told(status: SeriesStatus, expected: str) -> None:
    assert found(facts(patches={"sglang": status}))["patches"].status == expected


@pytest.mark.parametrize(
    ("patches", "told"),
    [
        (("disable-cutlass-fp8",), "NaN"),
        (("disable-cutlass-fp8", "refit"), "costs speed"),
        (("refit",), None),
    ],
)
def test_the_patch_that_lost_its_use_is_named(patches: tuple[str, ...], told: str | None) -> None:
    status = replace(
        patched("applied", "applied"),
        patches=tuple(PatchStatus(one, one, "applied") for one in patches),
    )
    vllm = facts(engine("vllm", "0.9.1"), patches={"vllm": status}, gpus=gpu(9, 0))
    finding = found(vllm).get("cutlass")
    assert (finding is None) == (told is None)
    if finding is not None and told is not None:
        assert told in finding.message
        assert "revert --backend vllm --patch disable-cutlass-fp8" in (finding.fix or "")
    other = facts(engine("vllm", "0.9.1"), patches={"vllm": status}, gpus=gpu(12, 0))
    assert "cutlass" not in found(other)  # there it is the way to have FP8 at all


# The command itself, on real folders.


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the settings of the caller's shell away."""
    for name in list(os.environ):
        if name.startswith(("VLLM_", "SGLANG_", "PYTHON", "VIRTUAL_ENV", "CONDA_")):
            monkeypatch.delenv(name)


def run(folder: Path, *, strict: bool = False) -> tuple[dict[str, object], str]:
    out = io.StringIO()
    data = doctor.run(
        Reporter(out=out, err=io.StringIO()), python=None, site_packages=folder, strict=strict
    )
    return data, out.getvalue()


@pytest.mark.usefixtures("alone")
def test_no_engine_exits_3_with_all_findings_as_data(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no vLLM and no SGLang") as e:
        run(tmp_path)
    assert e.value.exit_code == 3
    # The folder was named and stays empty: what comes next names the new environment.
    hint = e.value.hint or ""
    assert hint.startswith("fp8ctl install sglang && fp8ctl doctor --python /")
    assert e.value.data["next"] == hint
    assert {"environment", "findings", "next"} <= e.value.data.keys()


@pytest.mark.usefixtures("alone")
def test_only_another_version_exits_4_and_names_both(tmp_path: Path) -> None:
    (tmp_path / "vllm-0.10.0.dist-info").mkdir()
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.10\.0 is not supported.*0\.9\.1") as e:
        run(tmp_path)
    assert e.value.exit_code == 4
    assert "findings" in e.value.data


@pytest.mark.wheels
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_a_released_engine_gets_findings_and_the_next_command(
    site: Callable[..., Path], name: str
) -> None:
    folder = site(name)
    data, text = run(folder)
    assert data["next"] == f"fp8ctl patch --backend {name} --site-packages {folder}"
    findings = data["findings"]
    assert isinstance(findings, list)
    assert all(set(f) == {"id", "check", "status", "message", "fix", "data"} for f in findings)
    assert "✓" in text
    json.dumps(data)


@pytest.mark.wheels
@pytest.mark.usefixtures("alone")
def test_strict_turns_a_warning_into_exit_8_and_nothing_else_does(
    site: Callable[..., Path],
) -> None:
    folder = site("sglang")
    source = folder / "sglang" / "version.py"
    source.write_text(source.read_text() + "\n")
    run(folder)
    with pytest.raises(CheckFailedError, match="engine-files") as e:
        run(folder, strict=True)
    assert e.value.exit_code == 8
    assert "findings" in e.value.data


@pytest.mark.wheels
def test_doctor_stays_within_its_budget_and_writes_nothing(site: Callable[..., Path]) -> None:
    folder = site("vllm", "sglang")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    argv = [sys.executable, "-m", "fp8ctl", "doctor", "--json", "--site-packages", str(folder)]
    started = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    # The budget is 1.5 s on an idle machine (0.6 s measured); the slack is for a busy one.
    assert seconds < 3
