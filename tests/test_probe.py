"""The probe reads metadata and imports nothing that it finds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fp8ctl import probe


def make_dist(site: Path, name: str, version: str, **files: str) -> Path:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (info / file.replace("__", ".")).write_text(text)
    return info


def the_engine(site: Path) -> dict[str, object]:
    engines = probe.describe_site(str(site))["engines"]
    assert isinstance(engines, list)
    (engine,) = engines
    assert isinstance(engine, dict)
    return engine


def test_it_parses_as_python_3_8() -> None:
    ast.parse(Path(probe.__file__).read_text(), feature_version=(3, 8))


def test_it_uses_the_standard_library_only() -> None:
    tree = ast.parse(Path(probe.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names | {"__future__"}


def test_a_local_version_suffix_is_kept(tmp_path: Path) -> None:
    make_dist(tmp_path, "vllm", "0.9.1+cu126", INSTALLER="uv\n")
    engine = the_engine(tmp_path)
    assert engine["version"] == "0.9.1+cu126"
    assert engine["installer"] == "uv"
    assert engine["editable"] is False


def test_packages_are_named_as_indexes_name_them(tmp_path: Path) -> None:
    make_dist(tmp_path, "Compressed_Tensors", "0.10.1")
    assert probe.describe_site(str(tmp_path))["packages"] == {"compressed-tensors": "0.10.1"}


def test_an_editable_install_leads_to_its_work_tree(tmp_path: Path) -> None:
    tree = tmp_path / "a checkout" / "python" / "sglang"
    tree.mkdir(parents=True)
    (tree / "__init__.py").touch()
    url = (tmp_path / "a checkout").as_uri()
    direct = json.dumps({"url": url, "dir_info": {"editable": True}})
    site = tmp_path / "site"
    make_dist(site, "sglang", "0.4.8", direct_url__json=direct)
    engine = the_engine(site)
    assert engine["editable"] is True
    assert engine["package_dir"] == str(tree)


def test_an_egg_link_is_an_editable_install(tmp_path: Path) -> None:
    tree = tmp_path / "checkout" / "vllm"
    tree.mkdir(parents=True)
    (tree / "__init__.py").touch()
    site = tmp_path / "site"
    make_dist(site, "vllm", "0.9.1")
    (site / "vllm.egg-link").write_text(f"{tmp_path / 'checkout'}\n.\n")
    assert the_engine(site)["package_dir"] == str(tree)


@pytest.mark.parametrize("text", ["{", "[]", '{"dir_info": 3}', ""])
def test_a_damaged_direct_url_is_no_editable_install(tmp_path: Path, text: str) -> None:
    make_dist(tmp_path, "vllm", "0.9.1", direct_url__json=text)
    assert the_engine(tmp_path)["editable"] is False


def test_a_conda_package_is_seen_by_its_own_metadata(tmp_path: Path) -> None:
    meta = tmp_path / "conda-meta"
    meta.mkdir()
    (meta / "vllm-0.9.1-py312_0.json").write_text("{}")
    (meta / "vllm-extras-1.0-py312_0.json").write_text("{}")
    site = tmp_path / "site"
    make_dist(site, "vllm", "0.9.1")
    engines = probe.describe_site(str(site), str(tmp_path))["engines"]
    assert isinstance(engines, list)
    assert engines[0]["conda"] == "vllm-0.9.1-py312_0.json"


def test_two_metadata_folders_of_one_package_are_reported(tmp_path: Path) -> None:
    make_dist(tmp_path, "sglang", "0.4.7")
    make_dist(tmp_path, "sglang", "0.4.8")
    make_dist(tmp_path, "torch", "2.7.1")
    assert probe.describe_site(str(tmp_path))["duplicates"] == {"sglang": ["0.4.7", "0.4.8"]}


def test_an_engine_found_is_not_imported(tmp_path: Path) -> None:
    make_dist(tmp_path, "vllm", "0.9.1")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, "-B", probe.__file__],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    data = json.loads(done.stdout)
    assert data["imports"]["vllm"] == str(tmp_path / "vllm")
    assert [e["name"] for s in data["sites"] for e in s["engines"]] == ["vllm"]


def test_fp8ctl_does_not_lend_its_own_module_names_to_the_target(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-i", probe.__file__],
        input="import importlib.util as u\nraise SystemExit(u.find_spec('patching') and 7)\n",
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
