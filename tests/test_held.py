"""What all ranks hold: digests of parts add up, copies count once and must be alike."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.held import Held, Layouts, constant_digest, gather, packed, unpacked
from fp8ctl.kernels.digest import digest, to_text

if TYPE_CHECKING:
    from collections.abc import Mapping


def shard(name: str, value: int, **changes: object) -> dict[str, object]:
    plain = {"name": name, "row": 0, "column": 0, "dtype": "bfloat16", "primary": True}
    return {**plain, "digest": to_text(value), **changes}


def rank(shards: list[dict[str, object]], number: int = 0) -> dict[str, Any]:
    return {"rank": number, "tensors": shards}


def test_parts_of_a_tensor_on_several_ranks_add_up() -> None:
    whole = torch.arange(24, dtype=torch.int32).view(6, 4)
    ranks = [
        rank([shard("a.weight", digest(part, row, 0), row=row)], number)
        for number, (row, part) in enumerate([(0, whole[:2]), (2, whole[2:])])
    ]
    [held] = gather(ranks).values()
    assert held == Held("bfloat16", digest(whole), replicas_agree=True, ranks=(0, 1))


def test_the_sum_is_taken_modulo_64_bits() -> None:
    ranks = [rank([shard("a", (1 << 64) - 1)]), rank([shard("a", 3, row=1)], 1)]
    assert gather(ranks)["a"].digest == 2


def test_copies_count_once_and_must_be_alike() -> None:
    first = rank([shard("a", 5)])
    assert gather([first, rank([shard("a", 5, primary=False)], 1)])["a"] == Held(
        "bfloat16", 5, replicas_agree=True, ranks=(0, 1)
    )
    other = gather([first, rank([shard("a", 6, primary=False)], 1)])["a"]
    assert (other.digest, other.replicas_agree) == (5, False)


@pytest.mark.parametrize("primaries", [(True, True), (False, False)])
def test_a_place_that_two_ranks_or_none_answer_for_is_no_agreement(
    primaries: tuple[bool, bool],
) -> None:
    ranks = [rank([shard("a", 5, primary=p)], i) for i, p in enumerate(primaries)]
    assert not gather(ranks)["a"].replicas_agree


def test_ranks_that_hold_different_types_are_told() -> None:
    ranks = [rank([shard("a", 1)]), rank([shard("a", 1, row=1, dtype="float8_e4m3fn")], 1)]
    assert gather(ranks)["a"].dtype == "bfloat16/float8_e4m3fn"


def test_a_sum_is_written_as_digests_are() -> None:
    assert Held("bfloat16", 255, True, (0,)).text == to_text(255)


def test_the_shape_is_what_the_parts_cover() -> None:
    parts = [shard("a", 1, shape=[2, 4]), shard("a", 2, row=2, shape=[4, 4])]
    parts += [shard("a", 3, column=4, shape=[2, 3]), shard("b", 1, shape=[])]
    held = gather([rank(parts)])
    assert (held["a"].shape, held["b"].shape) == ((6, 7), ())
    assert gather([rank([shard("e", 1, shape=[2, 3, 4])])])["e"].shape == (2, 3, 4)


@pytest.mark.parametrize("value", [1.0, 0.0, -3.4028234663852886e38])
@pytest.mark.parametrize("shape", [(5, 7), (1,), (), (33,), (2, 3, 4)])
def test_the_digest_of_one_value_everywhere_needs_no_tensor(
    value: float, shape: tuple[int, ...]
) -> None:
    found = constant_digest(struct.pack("<f", value), shape)
    assert found == digest(torch.full(shape, value))


def told(name: str, shards: list[dict[str, object]], number: int = 0) -> dict[str, Any]:
    return {**rank(shards, number), "layout": name}


def only_sums(name: str, *values: int, number: int = 0) -> dict[str, Any]:
    return {"rank": number, "layout": name, "sums": packed(values)}


def test_digests_are_packed_as_they_are_written() -> None:
    values = (0, 1, (1 << 64) - 1, 0x0123456789ABCDEF)
    assert packed(values) == "".join(map(to_text, values))
    assert unpacked(packed(values)) == values
    assert unpacked("") == ()
    for wrong in ("0" * 15, "0" * 18, "g" * 16):
        with pytest.raises(ValueError, match=r"digests|hexadecimal"):
            unpacked(wrong)


def test_sums_of_a_known_layout_add_up_to_what_whole_answers_would() -> None:
    def ranks(*values: int) -> list[dict[str, Any]]:
        a, b, c, d, e = values
        zero = [shard("a", a, shape=[2, 4]), shard("b", b), shard("c", c)]
        one = [shard("a", d, row=2, shape=[2, 4]), shard("b", e, primary=False)]
        return [told("x", zero), told("y", one, 1)]

    layouts = Layouts()
    assert layouts.known == []
    assert layouts.gather(ranks(1, 2, 3, 4, 2)) == gather(ranks(1, 2, 3, 4, 2))
    assert layouts.known == ["x", "y"]
    for a, b, c, d, e in [(1, 2, 3, 4, 2), ((1 << 64) - 1, 7, 8, 9, 7), (5, 6, 7, 8, 9)]:
        held = layouts.gather([only_sums("x", a, b, c), only_sums("y", d, e, number=1)])
        assert held == gather(ranks(a, b, c, d, e))
        assert held["b"].replicas_agree == (b == e)


def test_a_rank_that_tells_its_layout_anew_is_heard_beside_one_that_need_not() -> None:
    layouts = Layouts()
    layouts.gather([told("x", [shard("a", 1)]), told("y", [shard("a", 2, row=1)], 1)])
    again = [only_sums("x", 5), told("z", [shard("b", 7), shard("a", 6, row=1)], 1)]
    held = layouts.gather(again)
    assert {name: one.digest for name, one in held.items()} == {"a": 11, "b": 7}
    assert layouts.known == ["x", "z"]
    held = layouts.gather([only_sums("x", 1), only_sums("z", 2, 3, number=1)])
    assert {name: one.digest for name, one in held.items()} == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    "wrong",
    [only_sums("another", 1, 2), only_sums("x", 1), only_sums("x", 1, 2, 3), only_sums("x")],
)
def test_sums_of_something_else_are_refused_and_all_is_asked_again(wrong: dict[str, Any]) -> None:
    layouts = Layouts()
    layouts.gather([told("x", [shard("a", 1), shard("b", 2)])])
    with pytest.raises(ValueError, match=r"layout|parts"):
        layouts.gather([wrong])
    assert layouts.known == []


def test_sums_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="layout"):
        Layouts().gather([only_sums("x", 1)])


def test_ranks_without_a_name_for_their_layout_are_asked_for_all_of_it() -> None:
    layouts = Layouts()
    held = layouts.gather([told("x", [shard("a", 1)]), rank([shard("a", 2, row=1)], 1)])
    assert held["a"].digest == 3
    assert layouts.known == []


def right(values: Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, str]]:
    return {name: (dtype, to_text(value)) for name, (dtype, value) in values.items()}


def test_what_is_held_as_it_should_be_is_seen_without_adding_all_up() -> None:
    """By the same law as by name: dtype, digest over all parts, copies alike."""
    most = (1 << 64) - 1
    layouts = Layouts()
    parts = [shard("a", most), shard("b", 2), shard("c", 3, dtype="float32")]
    more = [shard("a", 5, row=2), shard("b", 2, primary=False), shard("d", 9, primary=False)]
    held = layouts.gather([told("x", parts), told("y", more, 1)])
    good = {"c": ("float32", 3), "a": ("bfloat16", 4), "b": ("bfloat16", 2)}
    for _ in range(2):
        assert held.are(right(good))
        assert held.are(right({"b": good["b"]}))
        assert held.are({})
    bad = [("c", ("bfloat16", 3)), ("a", ("bfloat16", 5)), ("b", ("bfloat16", 3))]
    bad += [("d", ("bfloat16", 9)), ("e", ("bfloat16", 0)), ("d", ("bfloat16", 0))]
    for name, wrong in bad:
        assert not held.are(right({**good, name: wrong})), (name, wrong)
    for text in ("", "3", "000000000000000g", "00000000000000003"):
        assert not held.are({**right(good), "c": ("float32", text)}), text
    a, b = to_text(4), to_text(2)
    assert not held.are({"a": ("bfloat16", a[:15]), "b": ("bfloat16", a[15:] + b)})
    again = layouts.gather([only_sums("x", 1, 2, 3), only_sums("y", 3, 7, 9, number=1)])
    assert again.are(right({"a": good["a"]}))
    assert not again.are(right(good)), "a copy is another one"
    assert not again["b"].replicas_agree


def test_what_one_rank_will_tell_is_known_where_it_has_no_choice() -> None:
    """Its sums, packed, in its own order, if it holds what is wanted and nothing else."""
    shards = [shard("b", 5), shard("a", 7), shard("a", 7, primary=False)]
    layouts = Layouts()
    wanted = {"a": ("bfloat16", to_text(7)), "b": ("bfloat16", to_text(5)), "c": ("x", "0" * 16)}
    assert layouts.sums(wanted) == "", "it has told nothing yet"
    layouts.gather([{"rank": 0, "layout": "one", "tensors": shards}])
    assert layouts.sums(wanted) == packed([5, 7, 7])
    assert layouts.sums(dict(reversed(wanted.items()))) == packed([5, 7, 7])
    assert layouts.sums({**wanted, "a": ("bfloat16", to_text(9))}) == packed([5, 9, 9])
    for other in (
        {"a": wanted["a"]},
        {**wanted, "b": ("float32", to_text(5))},
        {**wanted, "b": ("bfloat16", "")},
        {**wanted, "b": ("bfloat16", "5")},
    ):
        assert layouts.sums(other) == ""
    layouts.gather([{"rank": 0, "layout": "two", "tensors": [*shards, shard("b", 1, row=1)]}])
    assert layouts.sums(wanted) == "", "two parts add up to it"
