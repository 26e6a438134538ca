"""The live level and its verdict, against a stand-in that answers as told."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fp8ctl import gate
from fp8ctl.check import command, live
from fp8ctl.check.verdict import VERDICTS, as_verdict, not_visible
from fp8ctl.errors import CheckFailedError, UsageError
from fp8ctl.process import free_port
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8ctl.check.verdict import LevelReport

    Serve = Callable[..., str]

FAKE = Path(__file__).parent.parent / "fake_engine.py"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a stand-in with the given arguments; returns its address."""
    children: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str, env: dict[str, str] | None = None) -> str:
        port = free_port("127.0.0.1")
        argv = [sys.executable, str(FAKE), "--port", str(port), *arguments]
        children.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=env))
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 15
        while gate.ask(url).state == "starting" and time.monotonic() < end:
            time.sleep(0.02)
        return url

    yield begin
    for child in children:
        child.kill()
        child.wait()


def results(found: LevelReport) -> dict[str, str]:
    return {one.check: one.result for one in found.evidence}


def test_a_healthy_server_passes_and_is_never_called_fp8_ok(serve: Serve) -> None:
    url = serve("--quantization", "fp8")
    found = live.check(url, "Paris")
    assert results(found) == {
        "health": "ok",
        "state": "ok",
        "code": "not visible",
        "patches": "not visible",
        "model": "ok",
        "quantisation": "ok",
        "versions": "ok",
        "mode": "not visible",
        "chat": "ok",
        "generation": "ok",
        "log-probabilities": "ok",
        "repeat": "ok",
    }
    assert (found.result, found.verdict) == ("ok", None)
    assert found.facts["engine"] == "sglang 0.4.8"
    assert found.facts["answer"] == "The capital of France is Paris."
    report = Reporter(out=io.StringIO(), err=io.StringIO())
    data = command.run(report, url=url)
    assert data["verdict"] is None
    assert data["weights"] == {"result": "not visible", "verdict": None}


def test_a_stock_server_is_checked_and_what_is_not_visible_is_said(serve: Serve) -> None:
    found = live.check(serve("--state", "none"))
    assert found.result == "ok"
    assert results(found)["state"] == "not visible"
    # No --quantization, and a folder that cannot be read from here.
    assert results(found)["quantisation"] == "not visible"


def test_another_answer_than_expected_fails(serve: Serve) -> None:
    found = live.check(serve("--answer", "Lyon"), "Paris")
    assert results(found)["chat"] == "failed"
    assert found.fault is not None
    assert "'Lyon'" in found.fault.found
    assert found.fault.expected == "an answer with 'Paris'"
    # Positive control: without an expectation any text will do.
    assert live.check(serve("--answer", "Lyon")).result == "ok"


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        (["--nan"], "log-probabilities"),
        (["--moody"], "repeat"),
        (["--torn", "2.5"], "repeat"),
        (["--torn", "0.1", "--bare"], "repeat"),
        (["--answer", "  "], "chat"),
    ],
)
def test_what_makes_no_sense_fails(serve: Serve, arguments: list[str], check: str) -> None:
    found = live.check(serve(*arguments))
    assert [one.check for one in found.evidence if one.result == "failed"] == [check]
    assert found.result == "failed"


def test_an_answer_that_rounding_may_have_exchanged_is_no_fault(serve: Serve) -> None:
    found = live.check(serve("--torn", "0.1"))
    assert found.result == "ok"
    [told] = [one for one in found.evidence if one.check == "repeat"]
    assert told.found.endswith("Paris. b': as likely to 0.100 nats, so rounding decides")


def test_an_answer_that_rounding_hardly_exchanged_is_not_decided(serve: Serve) -> None:
    found = live.check(serve("--torn", "0.9"))
    assert found.result == "ok"
    assert results(found)["repeat"] == "not visible"


def test_a_server_without_a_chat_template_is_judged_by_its_raw_generation(serve: Serve) -> None:
    found = live.check(serve("--quantization", "fp8", "--no-template"))
    seen = results(found)
    assert (seen["chat"], seen["generation"], found.result) == ("not visible", "ok", "ok")
    [told] = [one for one in found.evidence if one.check == "log-probabilities"]
    assert (told.result, told.found) == ("ok", "2, from -1.50 to -0.50")
    found = live.check(serve("--quantization", "fp8", "--no-template", "--nan"))
    assert results(found)["log-probabilities"] == "failed"
    # And where neither answer carries any, that is said.
    found = live.check(serve("--quantization", "fp8", "--no-template", "--bare"))
    assert (results(found)["log-probabilities"], found.result) == ("not visible", "ok")


def test_both_kinds_of_request_have_their_latency(serve: Serve) -> None:
    found = live.check(serve("--quantization", "fp8"))
    assert {"latency_s", "generation_s"} <= found.facts.keys()
    for name in ("chat", "generation"):
        [one] = [one for one in found.evidence if one.check == name]
        assert re.search(r" in \d+\.\d\d s$", one.found), one


def test_mode_and_versions_are_what_a_server_of_ours_tells(serve: Serve) -> None:
    plan = {"mode": "block", "block_size": [64, 64], "recipe": "ieee", "digest": "ab" * 32}
    about = {"plan": plan, "torch": "2.7.1", "python": "3.11.9", "fp8ctl": "0.1.0"}
    found = live.check(serve("--quantization", "fp8", "--about", json.dumps(about)))
    told = {one.check: (one.result, one.found) for one in found.evidence}
    assert told["mode"] == ("ok", "block 64x64, ieee, plan abababababab")
    assert told["versions"] == ("ok", "sglang 0.4.8, fp8ctl 0.1.0, torch 2.7.1, python 3.11.9")
    bare = live.check(serve("--quantization", "fp8", "--state", "none"))
    assert results(bare)["mode"] == "not visible"


def test_of_an_engines_arguments_no_secret_is_kept(serve: Serve) -> None:
    found = live.check(serve("--quantization", "fp8", "--tell-key", "k-in-the-arguments"))
    assert found.facts["arguments"] == {"quantization": "fp8", "model_path": "/nowhere"}
    assert "k-in-the-arguments" not in json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("state", "verdict"),
    [("unpushed", "unpushed"), ("updating", None), ("failed", "wrong-weights")],
)
def test_a_closed_gate_is_reported_and_nothing_is_asked(
    serve: Serve, state: str, verdict: str | None
) -> None:
    url = serve("--state", state, "--quantization", "fp8")
    found = live.check(url)
    assert found.verdict == verdict
    assert found.result == "failed"
    seen = results(found)
    assert seen["state"] == "failed"
    assert {seen[c] for c in ("chat", "generation", "log-probabilities", "repeat")} == {
        "not visible"
    }
    with pytest.raises(CheckFailedError) as caught:
        command.run(Reporter(out=io.StringIO(), err=io.StringIO()), url=url)
    assert caught.value.exit_code == 8
    assert caught.value.data["verdict"] == verdict


def test_a_16_bit_server_is_a_bf16_fallback(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = live.check(serve("--model-path", str(tmp_path)))
    assert (found.verdict, found.result) == ("bf16-fallback", "failed")
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}'
    )
    found = live.check(serve("--model-path", str(tmp_path)))
    assert (found.verdict, found.result) == (None, "ok")
    assert found.facts["quantization"] == "fp8 in blocks of 64x64, from the checkpoint"


def test_nobody_there_is_unreachable() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    found = live.check(url)
    assert (found.verdict, found.result) == ("unreachable", "failed")
    with pytest.raises(CheckFailedError, match="unreachable") as caught:
        command.run(Reporter(out=io.StringIO(), err=io.StringIO()), url=url, level="weights")
    assert caught.value.data["verdict"] == "unreachable"


def test_a_server_that_hangs_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(live, "_GET_TIMEOUT", 0.3)
    # It listens with a backlog, and nobody accepts.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(live, "STATE_TIMEOUT", 0.3)
        found = live.check(url)
    assert found.verdict == "unreachable"
    assert found.fault is not None
    assert found.fault.check == "connection"


def test_a_silent_server_info_does_not_make_an_unpushed_server_unreachable(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seen on SGLang 0.4.8 that waits for its first push.
    monkeypatch.setattr(live, "_GET_TIMEOUT", 0.5)
    found = live.check(serve("--mute", "--state", "unpushed"))
    assert found.verdict == "unpushed"
    assert results(found)["quantisation"] == "not visible"


def test_a_key_is_sent_and_a_missing_one_is_named(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    url = serve("--key", "WANTED", env={**os.environ, "WANTED": "k-123"})
    found = live.check(url)
    assert found.fault is not None
    assert found.fault.check == "model"
    assert "FP8CTL_API_KEY" in found.fault.expected
    monkeypatch.setenv("FP8CTL_API_KEY", "k-123")
    found = live.check(url)
    assert found.result == "ok"
    assert "k-123" not in json.dumps(found.to_json())


def test_a_proxy_from_the_environment_does_not_come_between(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert live.check(serve("--quantization", "fp8")).result == "ok"


@pytest.mark.parametrize(
    "url", ["127.0.0.1:30000", "sglang-30000", "", "http://", "ftp://h", "http://h:99999"]
)
def test_what_is_no_address_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        command.run(Reporter(), url=url)


def test_an_unknown_level_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="live, weights and logprobs"):
        command.run(Reporter(), url="http://127.0.0.1:1", level="deep")


def test_only_the_words_of_the_contract_are_verdicts() -> None:
    assert [as_verdict(word) for word in VERDICTS] == list(VERDICTS)
    assert as_verdict("ok") is None
    assert as_verdict(None) is None
    assert not_visible("weights", "no hooks").verdict is None
