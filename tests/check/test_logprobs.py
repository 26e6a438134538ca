"""The level of log-probabilities: what comes first, and the texts that are asked.

The numbers of a real engine are tests/e2e/test_logprobs.py's.
"""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

import pytest

from fp8ctl.check import logprobs, recording, texts
from fp8ctl.check.prompts import Scores
from fp8ctl.check.recording import Recording
from fp8ctl.errors import CheckFailedError, UsageError
from fp8ctl.process import free_port
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from pathlib import Path

SCORES = Scores(((-1.0, -9.0), (-4.0, -2.0)), ((2, 3), (5, 6)))
RECORDED = Recording(
    1, "m", "vllm 0.9.1", "2026", 0.01, "fp8-block", "fp8-ok", 0.3, ((1, 2, 3), (4, 5, 6)), SCORES
)


def quiet() -> Reporter:
    return Reporter(out=io.StringIO(), err=io.StringIO())


def test_a_recording_is_read_before_a_server_is_asked(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(UsageError):
        logprobs.verify(url, None, quiet(), None, against=tmp_path / "r.json")
    RECORDED.write(tmp_path / "r.json")
    assert recording.read(tmp_path / "r.json") == RECORDED
    with pytest.raises(CheckFailedError):
        logprobs.verify(url, None, quiet(), None, against=tmp_path / "r.json")


def test_texts_are_those_of_their_version() -> None:
    # Recordings of one version are of the same texts: change them, and raise VERSION.
    digest = hashlib.sha256(repr((texts.TEXTS, texts.CAP)).encode()).hexdigest()[:16]
    assert (texts.VERSION, digest) == (1, "cf32e3b901b5f666")


def test_texts_are_many_and_each_is_another() -> None:
    assert len(set(texts.TEXTS)) == len(texts.TEXTS) >= 24
    assert any(ord(letter) > 0x4E00 for text in texts.TEXTS for letter in text)
    assert any("def " in text for text in texts.TEXTS)
