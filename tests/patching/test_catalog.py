from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from fp8ctl.errors import CatalogError, NotFoundError, UnsupportedError
from fp8ctl.patching import catalog
from fp8ctl.patching.diff import git_blob
from fp8ctl.patching.names import RelPath, sha256_or_none

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

REAL = catalog.folders()
A = RelPath("sglang/srt/a.py")


def edit(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def test_a_series_is_what_its_folder_says(lab: Any) -> None:
    series = lab.series
    assert [p.id for p in series.patches][:2] == ["first", "second"]
    assert series.touching(A) == {"first", "second", "fourth", "gpu-only"}
    assert series.patch("fourth").requires == ("first",)
    assert series.patch("rival").default is False
    assert series.closure(["fourth"]) == {"first", "fourth"}


@pytest.mark.parametrize("version", ["0.4.8", "0.4.8+cu126", "0.4.8+local.7"])
def test_a_local_version_part_is_ignored(lab: Any, version: str) -> None:
    assert catalog.load("sglang", version, root=lab.patches).name == "sglang-0.4.8"


@pytest.mark.parametrize("version", ["0.4.7", "0.4.8.post1", "0.4.9", "garbage"])
def test_another_version_is_refused_with_those_there_are(lab: Any, version: str) -> None:
    with pytest.raises(UnsupportedError, match=r"expected ==0\.4\.8"):
        catalog.load("sglang", version, root=lab.patches)


def test_an_unknown_patch_is_refused_with_those_there_are(lab: Any) -> None:
    with pytest.raises(NotFoundError, match="expected one of: first, second"):
        lab.series.patch("nope")


def test_permitted_sets_are_closed_under_requires_and_free_of_conflicts(lab: Any) -> None:
    permitted = set(lab.series.permitted())
    assert frozenset({"first", "fourth"}) in permitted
    assert frozenset({"fourth"}) not in permitted
    assert frozenset({"second", "rival"}) not in permitted
    # 2 patches free (third, gpu-only), 3 sets of {first, fourth}, 3 of {second, rival}.
    assert len(permitted) == 4 * 3 * 3


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a changed diff": lambda f: edit(f, "0001-first.patch", "first = True", "first = None"),
    "a missing diff": lambda f: (f / "0001-first.patch").unlink(),
    "a missing table of images": lambda f: (f / "images.toml").unlink(),
    "an image left out": lambda f: edit(f, "images.toml", 'patches = ["first"]', "patches = []"),
    "a schema of the future": lambda f: edit(f, "series.toml", "schema = 1", "schema = 2"),
    "a requirement that comes later": lambda f: edit(
        f, "series.toml", 'id = "first"', 'id = "first"\nrequires = ["second"]'
    ),
    "an unknown device": lambda f: edit(f, "series.toml", '["cuda"]', '["tpu"]'),
    "a file of another package": lambda f: edit(
        f, "series.toml", 'package = "sglang"', 'package = "vllm"'
    ),
    "a diff outside its folder": lambda f: edit(f, "series.toml", '"0001-', '"../0001-'),
    "broken TOML": lambda f: (f / "series.toml").write_text("schema ="),
    "a pristine hash that the images deny": lambda f: (f / "series.toml").write_text(
        re.sub(r'(srt/a.py" = ")[0-9a-f]{8}', r"\g<1>00000000", (f / "series.toml").read_text())
    ),
    "a file without a pristine hash": lambda f: (f / "series.toml").write_text(
        re.sub(r'"sglang/srt/a.py" = .*\n', "", (f / "series.toml").read_text())
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_series_is_not_loaded(lab: Any, name: str) -> None:
    catalog.load_folder(lab.series.folder)
    DAMAGE[name](lab.series.folder)
    with pytest.raises(CatalogError, match=r"sglang-0\.4\.8"):
        catalog.load_folder(lab.series.folder)


def test_the_tool_writes_what_it_finds_and_finds_nothing_the_second_time(
    lab: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import util

    path = catalog.ROOT.resolve().parent / "tools" / "refresh_series.py"
    spec = util.spec_from_file_location("refresh_series_cli", path)
    assert spec is not None
    assert spec.loader is not None
    tool = util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    argv = ["--patches", str(lab.patches), str(lab.site)]
    assert tool.main(["--check", *argv]) == 0
    edit(lab.series.folder, "0006-gpu-only.patch", "gpu = True", "gpu = None")
    assert tool.main(["--check", *argv]) == 1
    assert tool.main(argv) == 0, capsys.readouterr()
    assert tool.main(["--check", *argv]) == 0
    assert catalog.load("sglang", "0.4.8", root=lab.patches) != lab.series
    # A source that is not as released.
    (lab.site / A).write_bytes(lab.read(A) + b"# edited\n")
    assert tool.main(argv) == 1
    assert "RECORD" in capsys.readouterr().err


def test_every_permitted_set_builds_its_image_and_comes_off_again(lab: Any) -> None:
    for path in lab.series.pristine:
        base = (lab.site / path).read_bytes() if (lab.site / path).exists() else None
        for subset in lab.series.permitted_on(path):
            image = lab.series.build(path, base, subset).data
            assert sha256_or_none(image) == lab.series.images[path][subset]
            assert lab.series.held(path, sha256_or_none(image)) == subset
            assert lab.series.unbuild(path, image, subset) == base


@pytest.mark.parametrize("folder", REAL, ids=lambda f: f.name)
def test_a_bundled_series_loads_whole(folder: Path) -> None:
    series = catalog.load_folder(folder)
    assert series.name == folder.name
    assert all(p.why and p.title and p.files for p in series.patches)
    unused = {p.name for p in folder.glob("*.patch")} - {p.diff_file for p in series.patches}
    assert not unused


@pytest.mark.wheels
@pytest.mark.parametrize("folder", REAL, ids=lambda f: f.name)
def test_every_hash_of_a_bundled_series_comes_out_of_the_released_wheel(
    folder: Path, engine_sources: Callable[[str], Path], refresh: Any
) -> None:
    series = catalog.load_folder(folder)
    for name, text in refresh.generate(folder, engine_sources(series.backend)).items():
        assert (folder / name).read_text(encoding="utf-8") == text, name


@pytest.mark.wheels
def test_cutlass_off_alone_gives_the_file_that_its_users_run(
    engine_sources: Callable[[str], Path],
) -> None:
    """The blob id is the one in the diff of the people who found the need for it."""
    series = catalog.load("vllm", "0.9.1")
    path = RelPath("vllm/model_executor/layers/quantization/utils/w8a8_utils.py")
    base = (engine_sources("vllm") / path).read_bytes()
    assert git_blob(base).startswith("adc67aa")
    assert git_blob(series.build(path, base, ["disable-cutlass-fp8"]).data).startswith("361316b")
