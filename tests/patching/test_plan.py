from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.errors import ConflictError, DriftError, NotFoundError
from fp8ctl.patching.names import RelPath, sha256_of

if TYPE_CHECKING:
    from pathlib import Path

A = RelPath("sglang/srt/a.py")
B = RelPath("sglang/srt/b.py")
C = RelPath("sglang/c.py")
NEW = RelPath("sglang/added/d.py")


class TestState:
    """One file's state follows from its hash, and from what fp8ctl wrote down."""

    def test_untouched_is_pristine(self, lab: Any) -> None:
        status = lab.status()
        assert status.state == "pristine"
        assert not status.applied
        assert {f.matches_record for f in status.files} == {True, None}

    def test_patched_is_applied_and_hashes_name_what_holds_a_patch(self, lab: Any) -> None:
        lab.patch("third")
        status = lab.status()
        assert (status.state, status.applied) == ("applied", {"third"})
        assert set(status.hashes) == {C, NEW}

    def test_patched_is_applied_also_when_the_store_is_lost(self, lab: Any) -> None:
        lab.patch("first", "second")
        shutil.rmtree(lab.site / ".fp8ctl")
        assert lab.status().applied == {"first", "second"}

    def test_half_a_patch_is_partial(self, lab: Any) -> None:
        before = lab.read(B)
        lab.patch("second")
        shutil.rmtree(lab.site / ".fp8ctl")
        (lab.site / B).write_bytes(before)
        status = lab.status()
        assert (status.file(A).state, status.state) == ("partial", "partial")
        assert (status.applied, status.present) == (frozenset(), {"second"})

    def test_an_edit_on_top_is_drift(self, lab: Any) -> None:
        lab.patch("first")
        (lab.site / A).write_bytes(lab.read(A) + b"# mine\n")
        assert lab.status().file(A).state == "drifted"

    def test_a_reinstalled_file_is_superseded(self, lab: Any) -> None:
        before = lab.read(A)
        lab.patch("first")
        (lab.site / A).write_bytes(before)
        assert lab.status().file(A).state == "superseded"

    def test_a_removed_file_is_missing(self, lab: Any) -> None:
        (lab.site / A).unlink()
        assert lab.status().file(A).state == "missing"

    def test_files_after_an_upgrade_are_superseded(self, lab: Any) -> None:
        lab.patch("first")
        (lab.site / "sglang-0.4.8.dist-info").rename(lab.site / "sglang-0.4.9.dist-info")
        (lab.site / A).write_bytes(b"# a newer release\n")
        assert lab.status().file(A).state == "superseded"


class TestChoice:
    def test_defaults_are_taken_where_they_fit_the_host(self, lab: Any) -> None:
        assert lab.plan_patch().after == ("first", "second", "third", "fourth")
        assert "gpu-only" in lab.plan_patch(device="cuda").after
        reasons = {c.id: c.reason for c in lab.plan_patch().choices}
        assert reasons["gpu-only"] == "for cuda, and this host has no GPU"
        assert reasons["rival"].startswith("not a default")

    def test_a_patch_for_hosts_without_a_gpu_is_left_out_where_there_is_one(self, lab: Any) -> None:
        for_cpu = dataclasses.replace(lab.series.patch("third"), devices=("cpu",))
        lab.series = dataclasses.replace(lab.series, patches=(for_cpu,))
        assert lab.plan_patch().after == ("third",)
        (choice,) = lab.plan_patch(device="cuda").choices
        assert choice.reason == "for cpu, and this host has a GPU"

    def test_requirements_are_pulled_in_and_said(self, lab: Any) -> None:
        plan = lab.plan_patch("fourth")
        assert plan.after == ("first", "fourth")
        assert {c.id: c.reason for c in plan.choices}["first"] == "required by fourth"

    def test_conflicts_are_refused(self, lab: Any) -> None:
        lab.plan_patch("rival")
        with pytest.raises(ConflictError, match="second and rival"):
            lab.plan_patch("second", "rival")
        lab.patch("second")
        with pytest.raises(ConflictError, match="second and rival"):
            lab.plan_patch("rival")

    def test_an_unknown_patch_is_refused(self, lab: Any) -> None:
        for plan in (lab.plan_patch, lab.plan_revert):
            with pytest.raises(NotFoundError):
                plan("nope")

    def test_what_another_patch_requires_is_not_taken_back_alone(self, lab: Any) -> None:
        lab.patch("fourth")
        with pytest.raises(ConflictError, match="fourth is applied and requires first") as e:
            lab.plan_revert("first")
        assert e.value.hint == "fp8ctl revert --backend sglang --patch fourth --patch first"
        assert lab.plan_revert("first", "fourth").after == ()

    def test_a_plan_changes_nothing(self, lab: Any) -> None:
        before = lab.tree()
        assert lab.plan_patch().ops
        assert lab.tree() == before


class TestImages:
    """Files are rebuilt from pristine: the order of commands does not matter."""

    @pytest.mark.parametrize("order", list(itertools.permutations(["first", "second", "third"])))
    def test_any_order_gives_the_same_bytes(self, lab: Any, order: tuple[str, ...]) -> None:
        pristine = lab.tree()
        for patch_id in order:
            lab.patch(patch_id)
        for path, table in lab.series.images.items():
            want = table[lab.series.touching(path) & set(order)]
            assert sha256_of(lab.read(path)) == want
        for patch_id in order:
            lab.revert(patch_id)
        assert lab.tree() == pristine

    def test_an_offset_that_an_earlier_patch_makes_is_no_drift(self, lab: Any) -> None:
        plan = lab.plan_patch("first", "second")
        assert {o.path: o.offsets for o in plan.ops} == {A: (("second", (2,)),), B: ()}
        assert plan.drifted == ()

    def test_the_second_time_there_is_nothing_to_do(self, lab: Any) -> None:
        assert lab.plan_revert().empty
        lab.patch()
        assert lab.plan_patch().empty
        assert lab.plan_patch("first").empty
        assert not lab.plan_revert().empty

    def test_each_file_is_modified_created_or_deleted(self, lab: Any) -> None:
        there = {o.path: o.action for o in lab.patch("third").ops}
        assert there == {C: "modify", NEW: "create"}
        back = {o.path: o.action for o in lab.revert().ops}
        assert back == {C: "modify", NEW: "delete"}

    def test_a_half_applied_patch_is_completed(self, lab: Any) -> None:
        before = lab.read(B)
        lab.patch("second")
        (lab.site / B).write_bytes(before)
        assert [o.path for o in lab.plan_patch("first").ops] == [A, B]
        lab.patch("first")
        assert lab.status().applied == {"first", "second"}


class TestLostStore:
    def test_revert_takes_the_patches_off_by_their_diffs(self, lab: Any) -> None:
        pristine = lab.tree()
        lab.patch()
        shutil.rmtree(lab.site / ".fp8ctl")
        lab.revert()
        assert lab.tree() == pristine

    def test_a_further_patch_is_built_from_what_was_before(self, lab: Any) -> None:
        pristine = lab.tree()
        lab.patch("second")
        shutil.rmtree(lab.site / ".fp8ctl")
        lab.patch("first")
        assert lab.status().applied == {"first", "second"}
        lab.revert()
        assert lab.tree() == pristine

    def test_a_lost_pre_image_alone_is_survived(self, lab: Any) -> None:
        pristine = lab.tree()
        lab.patch()
        shutil.rmtree(lab.site / ".fp8ctl" / "blobs")
        lab.revert()
        assert lab.tree() == pristine

    def test_a_lost_pre_image_is_made_again_by_the_next_command(self, lab: Any) -> None:
        """While the patches that lead back are at hand: the next fp8ctl may have other texts."""
        pristine = lab.tree()
        lab.patch("first", "second")
        shutil.rmtree(lab.site / ".fp8ctl" / "blobs")
        lab.patch("third")
        for path in (A, B, C):
            blob = lab.site / ".fp8ctl" / "blobs" / lab.series.pristine[path]
            assert blob.read_bytes() == pristine[path][0]

    def test_without_its_pre_image_another_build_s_file_is_not_reverted(self, lab: Any) -> None:
        """Its patches lead back to the released file only; what came before is not known."""
        (lab.site / A).write_bytes(b"# another build\n" + lab.read(A))
        lab.patch("first", "second", allow_drift=True)
        shutil.rmtree(lab.site / ".fp8ctl" / "blobs")
        # Nor is it in the way of what does not need it.
        assert lab.plan_patch("first").empty
        lab.patch("third")
        assert lab.status().applied == {"first", "second", "third"}
        before = lab.tree()
        message = f"^{A} cannot be put back: {A}: its stored pre-image is lost$"
        for installed in (True, False):
            if not installed:
                shutil.rmtree(lab.site / "sglang-0.4.8.dist-info")
                before = lab.tree()
            with pytest.raises(DriftError, match=message) as e:
                lab.revert("second")
            assert e.value.hint == "pip install --force-reinstall --no-deps sglang==0.4.8"
            assert lab.tree() == before


class TestNewerText:
    def test_a_changed_patch_replaces_the_old_text_from_the_stored_pre_image(
        self, lab: Any
    ) -> None:
        pristine = lab.tree()
        lab.patch("first")
        old_text = lab.read(A)
        change = lab.series.patch("first")
        newer = lab.series
        hunk = change.files[0].hunks[0]
        after = tuple(b"newer = 1\n" if b"first = " in x else x for x in hunk.after)
        file = dataclasses.replace(change.files[0], hunks=(dataclasses.replace(hunk, after=after),))
        patch = dataclasses.replace(change, files=(file,), diff_sha256=sha256_of(b"newer"))
        newer = dataclasses.replace(newer, patches=(patch,))
        base = pristine[A][0]
        image = sha256_of(newer.build(A, base, ["first"]).data or b"")
        pre = newer.pristine[A]
        lab.series = dataclasses.replace(
            newer,
            pristine={A: pre},
            images={A: {frozenset(): pre, frozenset({"first"}): image}},
        )
        assert lab.status().applied == {"first"}
        lab.patch("first")
        assert lab.read(A) == old_text.replace(b"first = True\n", b"newer = 1\n")
        lab.revert()
        assert lab.tree() == pristine


class TestDrift:
    """An unknown file is patched only when asked and where it fits once; and exactly undone."""

    def drift(self, lab: Any) -> bytes:
        other: bytes = b"# another build\n" + lab.read(A)
        (lab.site / A).write_bytes(other)
        return other

    def test_is_refused_naming_file_hashes_and_the_way_out(self, lab: Any) -> None:
        other = self.drift(lab)
        before = lab.tree()
        with pytest.raises(DriftError, match="edited after it was installed") as e:
            lab.patch("first", target=" --python P")
        assert A in e.value.message
        assert sha256_of(other)[:12] in e.value.message
        assert (lab.series.pristine[A] or "")[:12] in e.value.message
        assert e.value.hint == "fp8ctl patch --backend sglang --python P --allow-drift"
        assert lab.tree() == before

    def test_is_refused_also_in_a_file_that_was_installed_anew_since(self, lab: Any) -> None:
        lab.patch("first")
        (lab.site / "sglang-0.4.8.dist-info").rename(lab.site / "sglang-0.4.8+cu126.dist-info")
        (lab.site / A).write_bytes(b"a5 = 5\n")
        assert lab.status().file(A).state == "superseded"
        with pytest.raises(DriftError, match="edited after it was installed") as e:
            lab.plan_patch("first")
        assert e.value.hint == "fp8ctl patch --backend sglang --allow-drift"

    def test_says_when_the_file_is_as_installed(self, lab: Any) -> None:
        import base64
        import hashlib

        other = self.drift(lab)
        record = lab.site / "sglang-0.4.8.dist-info" / "RECORD"
        digest = base64.urlsafe_b64encode(hashlib.sha256(other).digest()).decode().rstrip("=")
        lines = [
            f"{A},sha256={digest},{len(other)}" if line.startswith(A) else line
            for line in record.read_text().splitlines()
        ]
        record.write_text("\n".join(lines) + "\n")
        with pytest.raises(DriftError, match="another build"):
            lab.patch("first")

    def test_is_patched_at_an_offset_when_allowed_and_put_back_exactly(self, lab: Any) -> None:
        other = self.drift(lab)
        before = lab.tree()
        plan = lab.patch("first", allow_drift=True)
        assert plan.drifted == (A,)
        assert plan.ops[0].offsets == (("first", (1,)),)
        assert b"first = True" in lab.read(A)
        assert lab.status().applied == {"first"}
        assert lab.plan_patch("first").empty
        lab.patch("second")
        assert b"second = True" in lab.read(A)
        lab.revert("first")
        assert lab.read(A).startswith(b"# another build\n")
        assert b"first" not in lab.read(A)
        lab.revert()
        assert lab.read(A) == other
        assert lab.tree() == before

    def test_is_refused_where_the_context_is_not_unique(self, lab: Any) -> None:
        (lab.site / A).write_bytes(lab.read(A) * 2)
        with pytest.raises(DriftError, match=r"does not fit.*2 times"):
            lab.patch("first", allow_drift=True)

    def test_in_a_file_that_no_asked_patch_touches_is_of_no_matter(self, lab: Any) -> None:
        self.drift(lab)
        assert [o.path for o in lab.plan_patch("third").ops] == [NEW, C]

    def test_a_file_in_the_way_of_a_new_one_is_never_overwritten(self, lab: Any) -> None:
        (lab.site / NEW).parent.mkdir()
        (lab.site / NEW).write_bytes(b"somebody else's\n")
        for allow in (False, True):
            with pytest.raises(DriftError, match="in the way"):
                lab.patch("third", allow_drift=allow)
        assert lab.read(NEW) == b"somebody else's\n"

    def test_a_missing_file_is_refused(self, lab: Any) -> None:
        (lab.site / A).unlink()
        with pytest.raises(DriftError, match=f"^{A} is not there$") as e:
            lab.patch("first", allow_drift=True)
        assert e.value.hint == "pip install --force-reinstall --no-deps sglang==0.4.8"
        assert e.value.data["expected"] == lab.series.pristine[A]
        assert e.value.data["found"] is None

    def test_a_hint_to_reinstall_names_the_very_version_that_is_installed(self, lab: Any) -> None:
        (lab.site / "sglang-0.4.8.dist-info").rename(lab.site / "sglang-0.4.8+cu126.dist-info")
        (lab.site / A).unlink()
        with pytest.raises(DriftError) as e:
            lab.patch("first")
        assert e.value.hint == "pip install --force-reinstall --no-deps sglang==0.4.8+cu126"


class TestRevertIsNoVandal:
    def test_an_edit_on_top_is_not_lost(self, lab: Any) -> None:
        lab.patch("first", "third")
        edited = lab.read(A) + b"# mine\n"
        (lab.site / A).write_bytes(edited)
        before = lab.tree()
        with pytest.raises(DriftError, match="edited since"):
            lab.revert()
        assert lab.tree() == before
        lab.revert("third")
        assert lab.read(A) == edited
        assert not (lab.site / NEW).exists()

    def test_a_reinstalled_file_is_forgotten_only(self, lab: Any) -> None:
        pristine = lab.tree()
        lab.patch("first")
        (lab.site / A).write_bytes(pristine[A][0])
        plan = lab.revert()
        assert plan.ops == ()
        assert plan.notes == (f"{A} was reinstalled since; forgotten, not changed",)
        assert lab.tree() == pristine

    def test_an_upgraded_engine_is_left_alone_and_what_fp8ctl_made_goes(self, lab: Any) -> None:
        lab.patch("first", "third")
        (lab.site / "sglang-0.4.8.dist-info").rename(lab.site / "sglang-0.4.9.dist-info")
        for path in (A, C):
            (lab.site / path).write_bytes(b"# a newer release\n")
        lab.revert()
        assert lab.read(A) == lab.read(C) == b"# a newer release\n"
        assert not (lab.site / NEW).exists()
        assert not (lab.site / ".fp8ctl").exists()

    @pytest.mark.parametrize("path", [C, NEW])
    def test_a_file_that_is_gone_is_forgotten(self, lab: Any, path: RelPath) -> None:
        lab.patch("third")
        (lab.site / path).unlink()
        plan = lab.revert()
        assert plan.notes == (f"{path} was removed since; forgotten, not changed",)
        assert plan.ledger is None
        assert not (lab.site / ".fp8ctl").exists()

    def test_what_a_ledger_says_of_a_file_that_was_never_changed_is_forgotten(
        self, lab: Any
    ) -> None:
        pristine = lab.tree()
        lab.patch("first")
        (lab.site / A).write_bytes(pristine[A][0])
        ledger = lab.site / ".fp8ctl" / "ledger.json"
        facts = json.loads(ledger.read_text())
        file = facts["engines"]["sglang"]["files"][A]
        file["post"] = file["pre"]
        ledger.write_text(json.dumps(facts))
        plan = lab.revert()
        assert (plan.ops, plan.ledger) == ((), None)
        assert lab.tree() == pristine


class TestWhatIsSaid:
    def test_every_choice_has_its_reason(self, lab: Any) -> None:
        def said(plan: Any) -> dict[str, tuple[bool, str]]:
            return {c.id: (c.taken, c.reason) for c in plan.choices}

        fresh = said(lab.plan_patch())
        assert fresh["first"] == (True, "default")
        assert fresh["rival"] == (False, "not a default: name it with --patch")
        assert fresh["gpu-only"] == (False, "for cuda, and this host has no GPU")
        lab.patch("fourth")
        more = said(lab.plan_patch("third"))
        assert more["first"] == more["fourth"] == (True, "applied before")
        assert more["third"] == (True, "asked for")
        assert more["second"] == (False, "not asked for")
        back = said(lab.plan_revert("fourth"))
        assert back["first"] == (True, "stays")
        assert back["fourth"] == (False, "taken back")
        assert back["second"] == (False, "not applied")
        assert lab.plan_patch("gpu-only").notes == ("gpu-only is made for cuda",)

    def test_drift_comes_with_its_facts(self, lab: Any) -> None:
        pristine = lab.series.pristine[A]
        lab.patch("first")
        post = sha256_of(lab.read(A))
        (lab.site / A).write_bytes(b"mine\n")
        mine = sha256_of(b"mine\n")
        with pytest.raises(DriftError) as e:
            lab.plan_revert()
        assert e.value.data == {"path": A, "found": mine, "expected": post}
        with pytest.raises(DriftError) as e:
            lab.plan_patch("first")
        facts = {"path": A, "found": mine, "expected": pristine, "matches_record": False}
        assert e.value.data == facts
        with pytest.raises(DriftError) as e:
            lab.plan_patch("first", allow_drift=True)
        assert e.value.data == {"path": A, "found": mine, "expected": pristine}


class TestWhatStaysKnown:
    def test_forgetting_a_reinstalled_file_keeps_what_is_known_of_the_others(
        self, lab: Any
    ) -> None:
        pristine = lab.tree()
        lab.patch("first", "third")
        (lab.site / A).write_bytes(pristine[A][0])
        plan = lab.revert("first")
        assert (plan.ops, plan.forgets) == ((), True)
        assert set(plan.ledger.files) == {C, NEW}
        assert set(plan.ledger.patches) == {"third"}
        lab.revert()
        assert lab.tree() == pristine

    def test_a_file_that_is_lost_with_its_pre_image_stops_nothing_else(self, lab: Any) -> None:
        lab.patch("second", "third")
        (lab.site / C).unlink()
        shutil.rmtree(lab.site / ".fp8ctl" / "blobs")
        assert lab.revert("second").after == ("third",)

    @pytest.mark.parametrize("gone", [True, False])
    def test_a_lost_or_edited_file_of_a_patch_that_stays_is_still_known(
        self, lab: Any, gone: bool
    ) -> None:
        lab.patch("second", "third")
        pre = lab.series.pristine[C]
        if gone:
            (lab.site / C).unlink()
        else:
            (lab.site / C).write_bytes(b"mine\n")
        plan = lab.revert("second")
        assert plan.ledger.files[C].pre == pre
        assert (lab.site / ".fp8ctl" / "blobs" / pre).exists()
        # An edited file is then still refused, not taken for an unknown one.
        if not gone:
            with pytest.raises(DriftError, match="edited since"):
                lab.revert()

    def test_a_newer_text_needs_the_pre_image_of_another_build_s_file(self, lab: Any) -> None:
        (lab.site / A).write_bytes(b"# another build\n" + lab.read(A))
        lab.patch("first", allow_drift=True)
        shutil.rmtree(lab.site / ".fp8ctl" / "blobs")
        newer = dataclasses.replace(lab.series.patch("first"), diff_sha256=sha256_of(b"newer"))
        others = [p for p in lab.series.patches if p.id != "first"]
        lab.series = dataclasses.replace(lab.series, patches=(newer, *others))
        with pytest.raises(DriftError, match="cannot be put back"):
            lab.plan_patch("third")

    def test_a_patch_that_has_another_name_now_is_not_built_anew(self, lab: Any) -> None:
        """Its bytes are there: that the way back by the old name is lost does not matter."""
        lab.patch("first")
        shutil.rmtree(lab.site / ".fp8ctl" / "blobs")
        renamed = dataclasses.replace(lab.series.patch("first"), id="renamed")
        table = lab.series.images[A]
        lab.series = dataclasses.replace(
            lab.series,
            patches=(renamed,),
            pristine={A: lab.series.pristine[A]},
            images={
                A: {
                    frozenset(): table[frozenset()],
                    frozenset({"renamed"}): table[frozenset({"first"})],
                }
            },
        )
        plan = lab.plan_patch("renamed")
        assert (plan.ops, plan.forgets) == ((), True)
        assert plan.ledger.files[A].patches == ("renamed",)

    def test_what_is_left_of_an_uninstalled_engine_is_still_of_its_version(self, lab: Any) -> None:
        lab.patch("second", "first")
        shutil.rmtree(lab.site / "sglang-0.4.8.dist-info")
        plan = lab.plan_revert("first")
        assert [o.path for o in plan.ops] == [A]
        assert plan.ledger.version == "0.4.8"
        shutil.rmtree(lab.site / ".fp8ctl")
        assert lab.plan_revert("first").ledger.version == ""


class TestLinks:
    """A file that an installer made a link into its cache is a link again after a revert."""

    @pytest.fixture
    def kept(self, lab: Any, tmp_path: Path) -> str:
        cache = tmp_path / "cache.py"
        (lab.site / A).rename(cache)
        (lab.site / A).symlink_to(cache)
        return str(cache)

    def test_where_it_led_stays_known_from_command_to_command(self, lab: Any, kept: str) -> None:
        plan = lab.patch("first")
        assert (plan.ops[0].link, plan.ledger.files[A].link) == (None, kept)
        for patch_id in ("third", "second"):
            plan = lab.patch(patch_id)
            assert plan.ledger.files[A].link == kept
            assert {o.link for o in plan.ops} == {None}
        (op,) = (o for o in lab.plan_revert().ops if o.path == A)
        assert op.link == kept

    def test_a_file_that_somebody_put_in_its_place_is_no_link(self, lab: Any, kept: str) -> None:
        lab.patch("first")
        image = lab.read(A)
        pristine = (lab.site.parent / "cache.py").read_bytes()
        (lab.site / A).write_bytes(pristine)
        plan = lab.patch("second")
        assert plan.ledger.files[A].link is None
        assert lab.read(A) != image
        assert {o.link for o in lab.plan_revert().ops} == {None}
        assert kept
