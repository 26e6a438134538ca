"""What client and server say to each other survives JSON, and nothing else is taken for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fp8ctl import wire

ENTRY: dict[str, Any] = {
    "name": "a.weight",
    "dtype": "float8_e4m3fn",
    "shape": [3, 5],
    "offset": 0,
    "digest": "00ff",
    "facts": {"amax": 1.5},
}


def test_what_is_placed_is_aligned_and_does_not_overlap() -> None:
    slots = [
        wire.Slot("a", "float8_e4m3fn", (3, 5)),
        wire.Slot("b", "float32", (0, 7)),
        wire.Slot("c", "bfloat16", (128, 3)),
        wire.Slot("d", "float32", ()),
    ]
    offsets, end = wire.place(slots)
    assert offsets == [0, 256, 256, 1024]
    assert end == 1280
    entries = [
        wire.Entry(s.name, s.dtype, s.shape, offset)
        for s, offset in zip(slots, offsets, strict=True)
    ]
    assert wire.read_entries([json.loads(e.to_text()) for e in entries], end) == entries


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"offset": 8}, "offset 8"),
        ({"offset": -256}, "offset -256"),
        ({"offset": 256}, "byte 271 of a bucket of 256"),
        ({"dtype": "float8_e5m2"}, "float8_e5m2"),
        ({"shape": [3, -5]}, r"shape \[3, -5\]"),
        ({"shape": [3, True]}, "True is no int"),
        ({"shape": 3}, "not an entry"),
        ({"name": 7}, "7 is no str"),
        ({"digest": None}, "None is no str"),
        ({"facts": ["amax"]}, "not an entry"),
    ],
)
def test_an_entry_that_is_none_is_refused(change: dict[str, Any], told: str) -> None:
    wire.read_entries([ENTRY], 256)
    with pytest.raises(wire.WireError, match=told):
        wire.read_entries([ENTRY | change], 256)


@pytest.mark.parametrize("found", [{}, "x", None, [7], [[]], [{}]])
def test_what_is_no_list_of_entries_is_refused(found: object) -> None:
    with pytest.raises(wire.WireError):
        wire.read_entries(found, 256)


def test_two_tensors_on_one_place_are_refused() -> None:
    with pytest.raises(wire.WireError, match="offset 0"):
        wire.read_entries([ENTRY, ENTRY | {"name": "b"}], 1024)


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(wire.WireError, match="twice"):
        wire.read_entries([ENTRY, ENTRY | {"offset": 256}], 1024)


def test_a_beginning_survives_json() -> None:
    begin = wire.Begin("p", "c", "step 1", "ff", "pause", 1.5, 2.5, complete=False, digests=True)
    assert wire.Begin.from_json(json.loads(json.dumps(begin.to_json()))) == begin


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"protocol": wire.PROTOCOL + 1}, f"protocol {wire.PROTOCOL + 1}"),
        ({"protocol": None}, "protocol None"),
        ({"in_flight": "drop"}, "'drop'"),
        ({"in_flight": []}, "in_flight"),
        ({"within": "soon"}, "soon"),
        ({"complete": 1}, "1 is no bool"),
        ({"push": 1}, "1 is no str"),
    ],
)
def test_a_beginning_that_is_none_is_refused(change: dict[str, Any], told: str) -> None:
    good = wire.Begin("p", "c", "1", "ff").to_json()
    with pytest.raises(wire.WireError, match=told):
        wire.Begin.from_json(good | change)


def test_an_entrys_text_is_its_json_however_it_is_called() -> None:
    for name in ("a.weight", 'odd "name"\\', "Gewichte \u00fc"):
        for digest, facts in (("", {}), ("00ff", {"amax": 1.5, "saturated": 3.0})):
            one = wire.Entry(name, "bfloat16", (3, 4), 256, digest, facts)
            for again in (one, one._replace(offset=512), one._replace(shape=())):
                wanted = {**again._asdict(), "shape": [*again.shape], "facts": dict(facts)}
                assert json.loads(again.to_text()) == wanted
