"""What differs, what it looks like, and the word for it: from digests, dtypes and shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import checkpoint
from fp8ctl.check.looks import Version, explain
from fp8ctl.check.tensors import Line, compare, judge, unmapped
from fp8ctl.held import Held
from fp8ctl.kernels.digest import digest
from tests.check.reports import HEAD, NORM, OUT, ROUTER, SCALE, Q, held_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.manifest import Plan

    Digests = dict[str, int]
    Many = dict[str, Held]


def lines_of(
    plan: Plan, expected: Digests, held: Many, versions: Sequence[Version] = ()
) -> list[Line]:
    right = {name: [value] for name, value in expected.items()}
    return explain(plan, compare(plan, right, held), right, held, versions)


def word(
    plan: Plan, expected: Digests, held: Many, versions: Sequence[Version] = ()
) -> tuple[str, str]:
    return judge(plan, lines_of(plan, expected, held, versions), held)


def unequal(plan: Plan, expected: Digests, held: Many) -> list[tuple[str, str]]:
    return [(x.name, x.found) for x in lines_of(plan, expected, held) if x.found != "equal"]


def seen(lines: Sequence[Line], name: str) -> Line:
    return next(line for line in lines if line.name == name)


def with_(held: Many, name: str, **changes: Any) -> Many:
    return {**held, name: held[name]._replace(**changes)}


# --- equal or not ---------------------------------------------------------------------------------


def test_weights_that_are_the_sources_are_ok(plan: Plan, expected: Digests) -> None:
    assert {Q, SCALE, NORM, ROUTER, HEAD} <= expected.keys()
    held = held_of(expected)
    assert unequal(plan, expected, held) == []
    verdict, why = word(plan, expected, held)
    assert verdict == "fp8-ok"
    assert why.startswith("4 tensors of codes and scales equal the source's")


@pytest.mark.parametrize("name", [Q, SCALE, NORM, HEAD])
def test_one_digest_that_differs_is_found_by_name(name: str, plan: Plan, expected: Digests) -> None:
    held = held_of(expected)
    held = with_(held, name, digest=held[name].digest ^ 1)
    assert unequal(plan, expected, held) == [(name, "different")]
    assert word(plan, expected, held) == (
        "wrong-weights",
        f"1 tensor is not what the source makes: {name} is different (rank 0)",
    )


def test_any_of_several_digests_is_right(plan: Plan, expected: Digests) -> None:
    """An engine that quantises by itself has kernels of several recipes."""
    right = {name: [0, value] for name, value in expected.items()}
    held = held_of(expected)
    lines = compare(plan, right, held)
    assert {line.found for line in lines} == {"equal"}
    assert judge(plan, lines, held)[0] == "fp8-ok"


def test_weights_of_another_recipe_are_wrong(plan: Plan, expected: Digests) -> None:
    other = replace(plan, recipe="ue8m0")
    made = checkpoint.expected_digests(plan.model, other)
    assert word(other, made, held_of(expected))[0] == "wrong-weights"


def test_a_code_that_is_missing_is_wrong(plan: Plan, expected: Digests) -> None:
    held = held_of({n: d for n, d in expected.items() if n != Q})
    assert unequal(plan, expected, held) == [(Q, "missing")]
    verdict, why = word(plan, expected, held)
    assert (verdict, f"{Q} is missing" in why) == ("wrong-weights", True)


def test_a_kept_tensor_that_lives_elsewhere_is_no_fault_and_is_told(
    plan: Plan, expected: Digests
) -> None:
    held = held_of({n: d for n, d in expected.items() if n != NORM})
    assert unequal(plan, expected, held) == [(NORM, "missing")]
    verdict, why = word(plan, expected, held)
    assert verdict == "fp8-ok"
    assert f"1 kept tensor not compared, such as {NORM}" in why


def test_a_head_that_is_no_tensor_of_the_server_is_wrong_and_a_tied_one_is_not(
    plan: Plan, expected: Digests
) -> None:
    """With tie_word_embeddings put over its configuration an engine drops the head."""
    held = held_of({n: d for n, d in expected.items() if n != HEAD})
    verdict, why = word(plan, expected, held)
    assert (verdict, HEAD in why) == ("wrong-weights", True)
    other = next(n for n in expected if "embed" in n)
    tied = {**expected, HEAD: expected[other]}
    held = held_of({n: d for n, d in tied.items() if n != HEAD})
    assert unequal(plan, tied, held) == [(HEAD, "missing")]
    assert word(plan, tied, held)[0] == "fp8-ok"


def test_fp8_that_nobody_planned_is_wrong_and_a_buffer_is_not(
    plan: Plan, expected: Digests
) -> None:
    buffer = {**held_of(expected), "rope.inv_freq": Held("float32", 1, True, (0,))}
    assert unequal(plan, expected, buffer) == [("rope.inv_freq", "unexpected")]
    assert word(plan, expected, buffer)[0] == "fp8-ok"
    codes = {**held_of(expected), "model.extra.weight": Held("float8_e4m3fn", 1, True, (0,))}
    verdict, why = word(plan, expected, codes)
    assert (verdict, "model.extra.weight is unexpected" in why) == ("wrong-weights", True)


def test_copies_that_are_not_alike_are_different(plan: Plan, expected: Digests) -> None:
    held = with_(held_of(expected), Q, replicas_agree=False, ranks=(0, 3))
    line = seen(lines_of(plan, expected, held), Q)
    assert line.found == "different"
    assert "0, 3" in line.detail
    assert word(plan, expected, held)[0] == "wrong-weights"


@pytest.mark.parametrize(("name", "dtype"), [(Q, "float8_e5m2"), (SCALE, "bfloat16")])
def test_equal_bits_of_another_type_are_different(
    name: str, dtype: str, plan: Plan, expected: Digests
) -> None:
    held = with_(held_of(expected), name, dtype=dtype)
    assert unequal(plan, expected, held) == [(name, "different")]
    assert word(plan, expected, held)[0] == "wrong-weights"


def test_a_kept_tensor_that_the_engine_cast_decides_nothing(plan: Plan, expected: Digests) -> None:
    """Engines hold everything in one type; an F32 norm of the checkpoint is not lost by that."""
    held = with_(held_of(expected), NORM, dtype="float16", digest=1)
    assert unequal(plan, expected, held) == [(NORM, "cast")]
    assert word(plan, expected, held)[0] == "fp8-ok"


def test_equal_digests_of_another_shape_are_different(plan: Plan, expected: Digests) -> None:
    """Zeros add nothing to a digest: a row of them more would not be seen."""
    held = with_(held_of(expected), Q, shape=(65, 64))
    assert unequal(plan, expected, held) == [(Q, "different")]
    assert "65x64 where 64x64 is expected" in word(plan, expected, held)[1]


def test_tensors_that_are_there_under_another_name_only_are_not_mapped(
    plan: Plan, expected: Digests
) -> None:
    def other_names(held: Many) -> bool:
        return unmapped(compare(plan, {n: [d] for n, d in expected.items()}, held))

    held = held_of(expected)
    assert not other_names(held)
    renamed = {n: h for n, h in held.items() if n != Q} | {"other.weight": held[Q]}
    assert other_names(renamed)
    assert not other_names({n: h for n, h in held.items() if n != Q}), "one that is gone is wrong"
    assert not other_names({**held, "other.weight": held[Q]}), "one too many is wrong"
    wrong = {**renamed, SCALE: held[SCALE]._replace(digest=0)}
    assert not other_names(wrong), "what can be seen to differ is not hidden"


# --- the word for it ------------------------------------------------------------------------------


def test_a_router_in_fp8_is_named_before_anything_else(plan: Plan, expected: Digests) -> None:
    held = with_(held_of(expected), ROUTER, dtype="float8_e4m3fn", digest=0)
    held = with_(held, SCALE, digest=digest(torch.ones(2, 2)))
    verdict, why = word(plan, expected, held)
    assert verdict == "router-quantised"
    assert why.startswith(f"{ROUTER} is float8_e4m3fn, and the plan keeps it: router")


def test_a_router_that_went_through_fp8_is_a_quantised_one(plan: Plan, expected: Digests) -> None:
    """Engines take FP8 codes raw into a 16-bit router; values tell (`difference`)."""
    held = with_(held_of(expected), ROUTER, digest=0)
    lines = lines_of(plan, expected, held)
    assert judge(plan, lines, held)[0] == "wrong-weights"
    quantised = [replace(x, looks="quantised") if x.name == ROUTER else x for x in lines]
    verdict, why = judge(plan, quantised, held)
    assert verdict == "router-quantised"
    assert why.startswith(f"{ROUTER} is quantised, in bfloat16, and the plan keeps it")


def test_a_head_in_fp8_is_wrong_but_no_router(plan: Plan, expected: Digests) -> None:
    held = with_(held_of(expected), HEAD, dtype="float8_e4m3fn", digest=0)
    verdict, why = word(plan, expected, held)
    assert verdict == "wrong-weights"
    assert HEAD in why


def test_sixteen_bits_everywhere_is_a_fallback(plan: Plan, expected: Digests) -> None:
    held = {n: h._replace(dtype="bfloat16") for n, h in held_of(expected).items() if n != SCALE}
    for tensor in plan.quantized:
        held = with_(held, tensor.name, digest=0)
    assert word(plan, expected, held) == (
        "bf16-fallback",
        "the server holds bfloat16 where the plan says FP8",
    )


def test_sixteen_bits_in_one_place_are_a_fallback_too(plan: Plan, expected: Digests) -> None:
    """56 parameters of a dense model were, by a rule that matched too much."""
    held = {n: h for n, h in held_of(expected).items() if n != SCALE}
    held = with_(held, Q, dtype="bfloat16", digest=0)
    assert word(plan, expected, held) == (
        "bf16-fallback",
        f"1 of 2 tensors that the plan quantises: {Q} is bfloat16",
    )
    assert seen(lines_of(plan, expected, held), SCALE).looks == "bf16"


def test_a_server_that_holds_nothing_is_not_ok(plan: Plan, expected: Digests) -> None:
    assert word(plan, expected, {})[0] == "wrong-weights"


@pytest.mark.parametrize("value", [1.0, torch.finfo(torch.float32).min, 0.0])
def test_scales_of_one_value_that_loaders_start_from_are_unscaled(
    value: float, plan: Plan, expected: Digests
) -> None:
    held = with_(held_of(expected), SCALE, digest=digest(torch.full((2, 2), value)))
    held = with_(held, NORM, digest=0)
    line = seen(lines_of(plan, expected, held), SCALE)
    assert (line.looks, line.detail.startswith("every scale is")) == ("unscaled", True)
    verdict, why = word(plan, expected, held)
    assert verdict == "unscaled"
    assert why.startswith(f"1 tensor has no scales that were loaded: {SCALE} is different")


def test_a_scale_of_one_that_is_right_is_no_fault(plan: Plan, expected: Digests) -> None:
    ones = {**expected, SCALE: digest(torch.ones(2, 2))}
    assert word(plan, ones, held_of(ones))[0] == "fp8-ok"


def test_scales_that_are_missing_are_unscaled(plan: Plan, expected: Digests) -> None:
    held = held_of({n: d for n, d in expected.items() if n != SCALE})
    verdict, why = word(plan, expected, held)
    assert (verdict, f"{SCALE} is missing" in why) == ("unscaled", True)


def test_a_grid_of_other_sides_is_another_block(plan: Plan, expected: Digests) -> None:
    held = with_(held_of(expected), SCALE, shape=(4, 4), digest=digest(torch.ones(4, 4)))
    line = seen(lines_of(plan, expected, held), SCALE)
    assert (line.looks, line.detail) == ("other block", "4x4 where 2x2 is expected")
    assert word(plan, expected, held)[0] == "wrong-weights"


# --- versions, and other tensors ------------------------------------------------------------------


def versions_of(*of_q: int) -> list[Version]:
    return [Version(f"version {i}", {Q: value}) for i, value in enumerate(of_q)]


def test_weights_of_an_earlier_version_are_stale_and_it_is_named(
    plan: Plan, expected: Digests
) -> None:
    """Also where the one that is expected was never seen: its push did not come."""
    held = with_(held_of(expected), Q, digest=7)
    for versions in (versions_of(7, expected[Q]), versions_of(5, 7)):
        line = seen(lines_of(plan, expected, held, versions), Q)
        name = next(v.name for v in versions if v.digests[Q] == 7)
        assert (line.looks, line.version) == ("stale", name)
        verdict, why = word(plan, expected, held, versions)
        assert verdict == "stale"
        assert why == f"1 tensor of 8 is of {name}: {Q}"


def test_weights_of_a_later_version_are_not_stale(plan: Plan, expected: Digests) -> None:
    held = with_(held_of(expected), Q, digest=7)
    versions = versions_of(7, expected[Q], 7)
    verdict, why = word(plan, expected, held, versions)
    assert verdict == "wrong-weights"
    assert "is that of version 2, which was brought later" in why


def test_what_half_an_update_did_not_bring_is_stale_also_where_the_whole_came_long_ago(
    plan: Plan, expected: Digests
) -> None:
    """B, back to A, then a part of B: what the part left out is of before, not of later.

    Neither a part of another version nor one that is alike in all of them is a part of B.
    """
    held = with_(held_of(expected), Q, digest=7)
    a, b = {Q: 7, OUT: 8, NORM: expected[NORM]}, {n: expected[n] for n in (Q, OUT, NORM)}
    before = [Version("A", a), Version("B", b), Version("A again", a)]
    half = Version("B, a part", {OUT: expected[OUT], NORM: expected[NORM]})
    assert word(plan, expected, held, [*before, half]) == (
        "stale",
        f"1 tensor of 8 is of A again: {Q}",
    )
    for last in ({NORM: expected[NORM]}, {OUT: 9}, {OUT: expected[OUT], NORM: 9}):
        verdict, why = word(plan, expected, held, [*before, Version("C, a part", last)])
        assert verdict == "wrong-weights"
        assert "is that of A again, which was brought later" in why
    verdict, why = word(plan, expected, held, [*before, half, Version("A once more", a)])
    assert (verdict, "is that of A once more" in why) == ("wrong-weights", True)


def test_a_mixture_is_judged_by_what_is_of_no_version(plan: Plan, expected: Digests) -> None:
    held = with_(with_(held_of(expected), OUT, digest=7), Q, digest=8)
    verdict, why = word(plan, expected, held, [Version("version 0", {OUT: 7})])
    assert verdict == "wrong-weights"
    assert f"{Q} is different" in why, "though the old one comes first"


def test_copies_of_which_one_is_stale_are_not_of_that_version(
    plan: Plan, expected: Digests
) -> None:
    held = with_(held_of(expected), Q, digest=7, replicas_agree=False)
    assert seen(lines_of(plan, expected, held, versions_of(7)), Q).looks == ""


def test_a_tensor_in_anothers_place_is_swapped(plan: Plan, expected: Digests) -> None:
    held = held_of(expected)
    held = with_(with_(held, Q, digest=expected[OUT]), OUT, digest=expected[Q])
    lines = lines_of(plan, expected, held)
    assert (seen(lines, Q).looks, seen(lines, Q).like) == ("swapped", OUT)
    assert (seen(lines, OUT).looks, seen(lines, OUT).like) == ("swapped", Q)
    assert f"{OUT} is different (rank 0, is that of {Q})" in judge(plan, lines, held)[1]


def test_a_kept_tensor_in_anothers_place_is_swapped_too(plan: Plan, expected: Digests) -> None:
    held = with_(held_of(expected), HEAD, digest=expected["model.embed_tokens.weight"])
    line = seen(lines_of(plan, expected, held), HEAD)
    assert (line.looks, line.like) == ("swapped", "model.embed_tokens.weight")


def test_tensors_that_are_alike_are_nobodys(plan: Plan, expected: Digests) -> None:
    alike = {**expected, OUT: 7, Q: 8}
    alike[f"{OUT}_scale_inv"] = 7
    held = with_(held_of(alike), Q, digest=7)
    assert seen(lines_of(plan, alike, held), Q).looks == ""


def test_what_is_told_of_a_line_is_short() -> None:
    line = Line(Q, "different", "float8_e4m3fn", True, "rank 0", (3, 64), "4-5")
    assert line.told() == "rank 0, 3 of 64 codes, rows 4-5"
    assert replace(line, rows="4", looks="transposed").told() == (
        "rank 0, looks transposed, 3 of 64 codes, row 4"
    )
    assert line.to_json()["codes"] == {"different": 3, "of": 64}
    assert Line(Q, "missing", "", True).to_json()["codes"] is None
