"""A recording reads back as it was written; what is none is refused."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.check import recording
from fp8ctl.check.prompts import Scores
from fp8ctl.check.recording import Recording
from fp8ctl.errors import NotFoundError, NotPermittedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

ONE = Recording(
    texts=1,
    model="m",
    engine="sglang 0.4.8",
    recorded="2026-01-02T03:04:05+00:00",
    noise=0.25,
    fits="fp8-block",
    verdict="fp8-ok",
    apart=0.16,
    ids=((1, 2, 3), (4, 5)),
    scores=Scores(((-0.1, -2.5), (-1e-7,)), ((2, -1), (9,))),
)


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    ONE.write(tmp_path / "r.json")
    assert recording.read(tmp_path / "r.json") == ONE


def test_what_was_no_number_is_none_after_reading(tmp_path: Path) -> None:
    document = ONE.to_json()
    document["logprobs"] = [[None, -2.5], [-1e-7]]
    (tmp_path / "r.json").write_text(json.dumps(document))
    read = recording.read(tmp_path / "r.json")
    assert math.isnan(read.scores.logprobs[0][0])
    assert read.scores.not_finite == 1
    again: Any = read.to_json()["logprobs"]
    assert again[0][0] is None, "JSON has no NaN"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fp8ctl_logprobs": 2}, "version 2; expected 1"),
        ({"fp8ctl_logprobs": None}, "no fp8ctl_logprobs"),
        ({"ids": [[1, 2, 3]]}, "not of the same lengths"),
        ({"logprobs": [[-0.1], [-0.2]]}, "not of the same lengths"),
        ({"top": []}, "not of the same lengths"),
        ({"ids": [], "logprobs": [], "top": []}, "without two tokens"),
        ({"ids": [[1]], "logprobs": [[]], "top": [[]]}, "without two tokens"),
        ({"ids": "what"}, "no recording"),
        ({"noise": None}, "no recording"),
    ],
)
def test_what_is_no_recording_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(ONE.to_json() | change))
    with pytest.raises(UsageError, match=words):
        recording.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=str(tmp_path / "r.json")):
        recording.read(tmp_path / "r.json")


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        recording.read(tmp_path / "absent")
    with pytest.raises(NotPermittedError, match="no/where"):
        ONE.write(tmp_path / "no" / "where")
