"""What all ranks hold: digests of parts add up, copies count once and must be alike."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

from fp8ctl.held import Held, constant_digest, gather
from fp8ctl.kernels.digest import digest, to_text


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
