"""A series as a whole: every set of its patches, every order of commands, lost state, newer texts.

Plans are pure, so an engine of released files in memory will do: every set of every bundled
series is looked at, and every command from each of them.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8ctl import environment, hardware
from fp8ctl.errors import CatalogError, ConflictError, DriftError, HunkError, UnsupportedError
from fp8ctl.patching import catalog, commands, diff
from fp8ctl.patching.names import RelPath, Sha256, sha256_of, sha256_or_none
from fp8ctl.patching.plan import plan_patch, plan_revert
from fp8ctl.patching.status import SeriesStatus, Snapshot, judge
from tests.patching.conftest import PRISTINE, write_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from fp8ctl.patching.catalog import Series
    from fp8ctl.patching.plan import PatchPlan
    from fp8ctl.patching.store import LedgerEntry
    from fp8ctl.render import Reporter

A = RelPath("sglang/srt/a.py")
Ids = frozenset[str]


@dataclass
class Engine:
    """An installed engine in memory, which plans are run on."""

    series: Series
    files: dict[RelPath, bytes | None]
    ledger: LedgerEntry | None = None
    blobs: dict[Sha256, bytes] = field(default_factory=dict)

    def snapshot(self) -> Snapshot:
        known = {*self.series.pristine, *(self.ledger.files if self.ledger else ())}
        record = {p: s for p, s in self.series.pristine.items() if s}
        files = {p: self.files.get(p) for p in known}
        version = environment.SUPPORTED[environment.parse_backend(self.series.backend)]
        return Snapshot(version, files, record, self.ledger, self.blobs, interrupted=False)

    def status(self) -> SeriesStatus:
        return judge(self.series, self.snapshot())

    def run(self, plan: PatchPlan) -> PatchPlan:
        """Do what `transaction` does with a plan."""
        for op in plan.ops:
            assert self.files.get(op.path) == op.old_bytes
            self.files[op.path] = op.new_bytes
        if not plan.empty:
            self.ledger = plan.ledger
            held = {f.pre for f in plan.ledger.files.values()} if plan.ledger else set()
            contents = self.blobs | plan.pre_images
            self.blobs = {sha: data for sha, data in contents.items() if sha in held}
        return plan

    def patch(self, ids: Iterable[str]) -> PatchPlan:
        return self.run(plan_patch(self.series, self.snapshot(), asked=sorted(ids)))

    def revert(self, ids: Iterable[str] | None = None) -> PatchPlan:
        asked = None if ids is None else sorted(ids)
        return self.run(plan_revert(self.series, self.snapshot(), asked=asked))

    def lose_store(self) -> None:
        self.ledger, self.blobs = None, {}

    def copy(self) -> Engine:
        return replace(self, files=dict(self.files), blobs=dict(self.blobs))

    def check(self, ids: Ids) -> None:
        """See that these patches are there, to the byte, and that it says so."""
        for path, table in self.series.images.items():
            assert sha256_or_none(self.files.get(path)) == table[self.series.touching(path) & ids]
        assert self.status().applied == ids
        assert self.status().state == ("applied" if ids else "pristine")
        # Whatever is applied, the way back is stored; where nothing is, nothing is kept.
        if self.ledger is not None:
            assert set(self.blobs) == {f.pre for f in self.ledger.files.values()} - {None}
            assert set(self.ledger.patches) == ids


@pytest.fixture(params=["small", *(f.name for f in catalog.folders())])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Give the small series, and each bundled one on its released files."""
    if request.param == "small":
        series = request.getfixturevalue("lab").series
        return Engine(series, {p: PRISTINE.get(p) for p in series.pristine})
    (folder,) = (f for f in catalog.folders() if f.name == request.param)
    series = catalog.load_folder(folder)
    source: Path = request.getfixturevalue("engine_sources")(series.backend)
    files = {p: (source / p).read_bytes() if (source / p).is_file() else None
             for p in series.pristine}  # fmt: skip
    return Engine(series, files)


def after(series: Series, ids: Ids, verb: str, patch_id: str) -> Ids | None:
    """Return what a command leaves, None where it is refused: the contract in four lines."""
    if verb == "patch":
        wanted = series.closure(ids | {patch_id})
        return None if series.conflict(wanted) else wanted
    left = ids - {patch_id}
    return None if any(patch_id in series.patch(p).requires for p in left) else left


@pytest.mark.wheels
def test_every_permitted_set_has_its_image_and_every_other_is_refused(engine: Engine) -> None:
    series = engine.series
    permitted = set(series.permitted())
    ids = [p.id for p in series.patches]
    everything = [frozenset(c) for n in range(len(ids) + 1) for c in itertools.combinations(ids, n)]
    assert permitted == {
        s for s in everything if series.closure(s) == s and series.conflict(s) is None
    }
    for subset in everything:
        one = engine.copy()
        if subset in permitted:
            one.patch(subset)
            one.check(subset)
            assert one.patch(subset).empty
            one.revert()
            assert one.files == engine.files
            one.check(frozenset())
        elif series.conflict(series.closure(subset)):
            with pytest.raises(ConflictError, match="exclude each other"):
                one.patch(subset)
            assert one == engine
        else:  # what it requires comes with it
            one.patch(subset)
            one.check(series.closure(subset))


@pytest.mark.wheels
def test_every_command_from_every_set_leaves_what_the_contract_says(engine: Engine) -> None:
    series = engine.series
    for subset in series.permitted():
        start = engine.copy()
        start.patch(subset)
        for verb, patch in itertools.product(("patch", "revert"), series.patches):
            wanted = after(series, subset, verb, patch.id)
            for lost in (False, True):
                one = start.copy()
                if lost:
                    one.lose_store()
                if wanted is None:
                    with pytest.raises(ConflictError):
                        getattr(one, verb)([patch.id])
                    one.check(subset)
                else:
                    getattr(one, verb)([patch.id])
                    one.check(wanted)
                one.revert()
                assert one.files == engine.files
                one.check(frozenset())


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_sequence_of_commands_on_disk_ends_in_the_image_of_what_remains(
    lab: Any, data: st.DataObject
) -> None:
    _sequence(lab, data)


@pytest.mark.long
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_sequence_of_commands_on_disk_300_times(lab: Any, data: st.DataObject) -> None:
    _sequence(lab, data)


def _sequence(lab: Any, data: st.DataObject) -> None:
    lab.revert()
    pristine = lab.tree()
    ids: Ids = frozenset()
    commands_of = st.tuples(
        st.sampled_from(["patch", "patch", "revert", "revert all", "lose the store"]),
        st.sampled_from([p.id for p in lab.series.patches]),
    )
    for verb, patch_id in data.draw(st.lists(commands_of, min_size=1, max_size=8)):
        if verb == "lose the store":
            shutil.rmtree(lab.site / ".fp8ctl", ignore_errors=True)
        elif verb == "revert all":
            lab.revert()
            ids = frozenset()
        else:
            wanted = after(lab.series, ids, verb, patch_id)
            if wanted is None:
                with pytest.raises(ConflictError):
                    getattr(lab, verb)(patch_id)
            else:
                getattr(lab, verb)(patch_id)
                ids = wanted
        assert lab.status().applied == ids
        for path, table in lab.series.images.items():
            file = lab.site / path
            found = sha256_of(file.read_bytes()) if file.exists() else None
            assert found == table[lab.series.touching(path) & ids]
    lab.revert()
    assert lab.tree() == pristine


@pytest.mark.wheels
def test_every_set_comes_off_without_the_store_and_the_hash_is_the_judge(engine: Engine) -> None:
    series = engine.series
    for subset in series.permitted():
        one = engine.copy()
        one.patch(subset)
        one.lose_store()
        assert one.status().applied == subset
        for path in series.pristine:
            held = series.touching(path) & subset
            image = one.files.get(path)
            if not held or image is None:
                continue
            assert series.unbuild(path, image, held) == engine.files[path]
            # The same hunks come off a file that was edited elsewhere: that is not the release.
            with pytest.raises(HunkError, match=r"released file|its lines"):
                series.unbuild(path, b"# edited\n" + image, held)
        one.revert()
        assert one.files == engine.files


# --- damage -----


def test_an_image_of_a_wrong_hash_fails_loudly_and_changes_nothing(lab: Any) -> None:
    path = lab.series.folder / "images.toml"
    good = lab.series.images[A][frozenset({"first"})]
    path.write_text(path.read_text().replace(good, "0" * 64))
    lab.series = catalog.load_folder(lab.series.folder)
    before = lab.tree()
    with pytest.raises(CatalogError, match=r"srt/a\.py with first comes out as .*expected 0000"):
        lab.patch("first")
    assert lab.tree() == before
    lab.patch("third")
    assert lab.status().applied == {"third"}


def test_a_wheel_of_other_content_is_noticed_by_the_tool(
    lab: Any, refresh: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--check", "--patches", str(lab.patches), str(lab.site)]
    assert refresh.main(argv) == 0
    shutil.rmtree(lab.site)
    other = dict(PRISTINE)
    other[A] += b"# rebuilt\n"
    write_engine(lab.site, other)
    assert refresh.main(argv) == 1
    assert "series.toml: changed" in capsys.readouterr().out
    # One whose hunks have no place any more, too.
    shutil.rmtree(lab.site)
    other[A] = b"".join(PRISTINE[A].splitlines(keepends=True)[20:])
    write_engine(lab.site, other)
    assert refresh.main(argv) == 1
    assert "hunk 1" in capsys.readouterr().err


def test_a_release_that_is_not_there_is_said_and_left_alone(
    lab: Any, refresh: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (lab.site / "sglang-0.4.8.dist-info").rename(lab.site / "sglang-0.4.9.dist-info")
    before = {p: p.read_bytes() for p in lab.patches.rglob("*.toml")}
    assert refresh.main(["--patches", str(lab.patches), str(lab.site)]) == 0
    assert "sglang-0.4.8: skipped" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in lab.patches.rglob("*.toml")} == before


# --- a newer fp8ctl -----


@pytest.fixture
def newer(lab: Any, tmp_path: Path, refresh: Any) -> Series:
    """Give the catalogue of a newer fp8ctl: one text changed, one patch gone, one new."""
    root = tmp_path / "newer"
    shutil.copytree(lab.patches, root)
    folder = root / "sglang-0.4.8"
    for name in ("0001-first.patch", "0004-fourth.patch"):
        text = (folder / name).read_bytes().replace(b"first = True", b"first = 'newer'")
        (folder / name).write_bytes(text)
    toml = (folder / "series.toml").read_text().split("\n[[patch]]\n")
    (folder / "0003-third.patch").unlink()
    path = RelPath("sglang/untouched.py")
    (folder / "0007-new.patch").write_bytes(diff.render(path, PRISTINE[path], b"x = 2\n"))
    new = 'id = "new"\ntitle = "t"\nwhy = "w"\ndiff = "0007-new.patch"\n'
    kept = [t for t in toml if 'id = "third"' not in t]
    head, tail = kept[-1].split("# Generated below")[0], "\n[[patch]]\n"
    (folder / "series.toml").write_text(tail.join([*kept[:-1], head, new]))
    pristine = tmp_path / "pristine"
    write_engine(pristine, PRISTINE)
    assert refresh.main(["--patches", str(root), str(pristine)]) == 0
    return catalog.load("sglang", "0.4.8", root=root)


def test_a_newer_text_replaces_the_old_one_from_every_set(lab: Any, newer: Series) -> None:
    pristine: dict[RelPath, bytes | None] = dict(PRISTINE)
    for subset in lab.series.permitted():
        start = Engine(lab.series, dict(pristine))
        start.patch(subset)
        start.series = newer
        left = frozenset(subset - {"third"})
        # The old text counts as applied, until the next command.
        assert start.status().applied == left
        for ids in ([], ["new"], ["first"]):
            one = start.copy()
            one.patch(ids)
            one.check(newer.closure({*left, *ids}))
            one.revert()
            assert {p: d for p, d in one.files.items() if d is not None} == pristine
            assert one.ledger is None
        back = start.copy()
        back.revert()
        assert {p: d for p, d in back.files.items() if d is not None} == pristine
        assert back.ledger is None


def test_a_newer_text_replaces_the_old_one_on_disk(lab: Any, newer: Series) -> None:
    before = lab.tree()
    lab.patch()
    assert b"first = True\n" in lab.read(A)
    lab.series = newer
    lab.patch()
    assert b"first = 'newer'\n" in lab.read(A)
    assert not (lab.site / "sglang/added").exists()
    assert lab.status().applied == {"first", "second", "fourth", "new"}
    lab.revert()
    assert lab.tree() == before


def test_an_old_text_without_the_store_is_not_guessed_at(lab: Any, newer: Series) -> None:
    lab.patch("first")
    shutil.rmtree(lab.site / ".fp8ctl")
    before = lab.tree()
    lab.series = newer
    assert lab.status().file(A).state == "drifted"
    with pytest.raises(DriftError, match="edited after it was installed"):
        lab.patch("first")
    assert lab.tree() == before


# --- another engine version -----


@pytest.fixture
def other_version(
    lab: Any, tmp_path: Path, refresh: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Path]:
    """Return a function that lays a folder for SGLang 9.9.1 into the catalogue."""
    monkeypatch.setattr(catalog, "ROOT", lab.patches)
    monkeypatch.setattr(hardware, "detect", lambda: hardware.Hardware())

    def add() -> Path:
        folder: Path = lab.patches / "sglang-9.9.1"
        folder.mkdir()
        text = diff.render(A, PRISTINE[A], PRISTINE[A] + b"made_up = 1\n")
        (folder / "0001-only.patch").write_bytes(text)
        (folder / "series.toml").write_text(
            'schema = 1\nbackend = "sglang"\ndistribution = "sglang"\nversion = "==9.9.1"\n'
            'package = "sglang"\n\n[[patch]]\nid = "only"\ntitle = "t"\nwhy = "w"\n'
            'diff = "0001-only.patch"\n'
        )
        source = tmp_path / "source"
        write_engine(source, PRISTINE, "9.9.1")
        assert refresh.main(["--patches", str(lab.patches), str(source)]) == 0
        return folder

    return add


def test_a_new_engine_version_is_a_new_folder(
    lab: Any,
    other_version: Callable[[], Path],
    tmp_path: Path,
    reporter: Reporter,
) -> None:
    site = tmp_path / "other"
    write_engine(site, PRISTINE, "9.9.1+cu126")
    with pytest.raises(UnsupportedError, match=r"9\.9\.1"):
        commands.patch(reporter, site_packages=site)
    other_version()
    for backends in (None, ["sglang"]):
        data: Any = commands.patch(reporter, site_packages=site, backends=backends)
        assert data["changed"] is True
        assert data["engines"][0]["series"] == "sglang-9.9.1"
        assert (site / A).read_bytes() == PRISTINE[A] + b"made_up = 1\n"
        data = commands.patch(reporter, site_packages=site, list_only=True)
        assert data["engines"][0]["patches"][0]["state"] == "applied"
        commands.revert(reporter, site_packages=site, backends=backends)
        assert (site / A).read_bytes() == PRISTINE[A]
    # The version that was there before goes on as before.
    data = commands.patch(reporter, site_packages=lab.site)
    assert data["engines"][0]["series"] == "sglang-0.4.8"


def test_what_is_applied_to_a_new_version_is_seen_by_those_who_ask(
    lab: Any, other_version: Callable[[], Path], tmp_path: Path, reporter: Reporter
) -> None:
    from fp8ctl.patching.status import inspect

    site = tmp_path / "other"
    write_engine(site, PRISTINE, "9.9.1")
    other_version()
    commands.patch(reporter, site_packages=site)
    status = inspect(site, "sglang")
    assert status.series == "sglang-9.9.1"
    assert status.applied == {"only"}
    # An engine of a version that has no series is looked at by that of the supported one.
    (site / "sglang-9.9.1.dist-info").rename(site / "sglang-9.9.2.dist-info")
    assert inspect(site, "sglang").series == "sglang-0.4.8"


def test_two_series_for_one_version_are_told_apart_by_their_specifiers(
    lab: Any, other_version: Callable[[], Path]
) -> None:
    folder = other_version()
    assert catalog.covers("sglang", "9.9.1+local")
    assert not catalog.covers("sglang", "9.9.2")
    assert not catalog.covers("vllm", "9.9.1")
    assert not catalog.covers("sglang", "not a version")
    text = (folder / "series.toml").read_text()
    (folder / "series.toml").write_text(text.replace('"==9.9.1"', '"=9.9.1"'))
    with pytest.raises(CatalogError, match=r"version = '=9\.9\.1', expected a specifier"):
        catalog.load("sglang", "9.9.1")
    # A damaged catalogue is what is told, not that there is none.
    assert catalog.covers("sglang", "9.9.1")
