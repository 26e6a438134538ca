"""The live level and its verdict, against a stand-in that answers as told."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        "model": "ok",
        "quantisation": "ok",
        "chat": "ok",
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
        (["--answer", "  "], "chat"),
    ],
)
def test_what_makes_no_sense_fails(serve: Serve, arguments: list[str], check: str) -> None:
    found = live.check(serve(*arguments))
    assert [one.check for one in found.evidence if one.result == "failed"] == [check]
    assert found.result == "failed"


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
    assert {seen[c] for c in ("chat", "log-probabilities", "repeat")} == {"not visible"}
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
    with pytest.raises(UsageError, match="live and weights"):
        command.run(Reporter(), url="http://127.0.0.1:1", level="deep")


BLOCKS: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("info", "config", "word", "is_16_bit"),
    [
        pytest.param({}, None, None, False, id="nothing asked, folder not visible"),
        pytest.param({}, {}, "none: a 16-bit checkpoint", True, id="16 bits"),
        pytest.param({"quantization": "fp8"}, None, "fp8, by argument", False, id="remote"),
        pytest.param({"quantization": "fp8"}, {}, "fp8, quantised at load", False, id="online"),
        pytest.param({"torchao_config": "int8wo"}, {}, "torchao int8wo", False, id="torchao"),
        pytest.param(
            {"quantization": "fp8", "quantization_config": BLOCKS},
            {},
            "fp8 in blocks of 128x128, put over",
            False,
            id="override",
        ),
        pytest.param(
            {}, {"quantization_config": BLOCKS}, "from the checkpoint", False, id="checkpoint"
        ),
    ],
)
def test_the_word_of_sglang(
    info: dict[str, Any], config: dict[str, Any] | None, word: str | None, is_16_bit: bool
) -> None:
    own = info.pop("quantization_config", None)
    override = json.dumps({"quantization_config": own}) if own else "{}"
    found, plain = live.sglang_word({**info, "json_model_override_args": override}, config)
    assert plain is is_16_bit
    assert (found is None) if word is None else (found is not None and word in found)


def test_the_word_of_vllm_is_read_from_its_server_info() -> None:
    text = '{"vllm_config": "model=\'m\', quantization=fp8, enforce_eager=False"}'
    assert live._vllm_word(live.Reply(200, {}, text, 0.0)) == "fp8, by the engine's config"
    assert live._vllm_word(live.Reply(200, {}, text.replace("fp8", "None"), 0.0)) is None
    assert live._vllm_word(live.Reply(404, {}, text, 0.0)) is None


def test_only_the_words_of_the_contract_are_verdicts() -> None:
    assert [as_verdict(word) for word in VERDICTS] == list(VERDICTS)
    assert as_verdict("ok") is None
    assert as_verdict(None) is None
    assert not_visible("weights", "no hooks").verdict is None


def test_the_weights_level_is_not_reached_where_live_fails(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fp8ctl.check.weights", None)
    with pytest.raises(CheckFailedError):
        command.run(
            Reporter(out=io.StringIO(), err=io.StringIO()),
            url=serve("--nan"),
            level="weights",
        )


@pytest.mark.parametrize("word", ["fp8-ok", "stale", "not visible"])
def test_only_fp8_ok_ends_the_weights_level_well(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    import types

    weights = types.ModuleType("fp8ctl.check.weights")
    seen: list[object] = []

    def verify(url: str, model: str | None, report: Reporter, api_key: str | None) -> object:
        seen.append((url, model, api_key))
        return {"verdict": word, "message": "layer 3"}

    weights.__dict__["verify"] = verify
    monkeypatch.setitem(sys.modules, "fp8ctl.check.weights", weights)
    import fp8ctl.check

    monkeypatch.setattr(fp8ctl.check, "weights", weights, raising=False)
    url = serve("--quantization", "fp8")
    report = Reporter(out=io.StringIO(), err=io.StringIO())
    if word == "fp8-ok":
        data = command.run(report, url=url, model="m", level="weights")
        assert data["verdict"] == "fp8-ok"
    else:
        with pytest.raises(CheckFailedError, match="layer 3"):
            command.run(report, url=url, model="m", level="weights")
    assert seen == [(url, "m", None)]
