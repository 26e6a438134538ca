"""`fp8ctl check`: which levels run, what the verdict is, and how it ends."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import gate
from fp8ctl.check import command, weights
from fp8ctl.check.verdict import VERDICTS, Evidence, LevelReport, as_verdict
from fp8ctl.errors import CheckFailedError, UsageError
from fp8ctl.process import free_port
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Serve = Callable[..., str]

FAKE = Path(__file__).parents[1] / "fake_engine.py"


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Return a function: arguments of the stand-in engine -> its address, once it answers."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> str:
        port = free_port("127.0.0.1")
        argv = [sys.executable, str(FAKE), "--port", str(port), "--quantization", "fp8"]
        started.append(subprocess.Popen([*argv, *arguments], stdout=subprocess.DEVNULL))
        url = f"http://127.0.0.1:{port}"
        for _ in range(500):
            if gate.ask(url).state != "starting":
                return url
            time.sleep(0.02)
        raise AssertionError("the stand-in does not answer")

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def healthy(serve: Serve) -> str:
    return serve()


def reporter() -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(out=out, err=io.StringIO()), out


def run(url: str, level: str = "live") -> tuple[dict[str, Any], str]:
    report, out = reporter()
    return command.run(report, url=url, level=level), out.getvalue()


def answers(monkeypatch: pytest.MonkeyPatch, **found: object) -> list[tuple[object, ...]]:
    """Have the weights level find something (tests/check/test_weights.py has the real one)."""
    calls: list[tuple[object, ...]] = []

    def verify(*given: object) -> dict[str, object]:
        calls.append(given)
        return {
            "result": "ok",
            "verdict": None,
            "message": "",
            "counts": {},
            "tensors": [],
            **found,
        }

    monkeypatch.setattr(weights, "verify", verify)
    return calls


def test_the_live_level_proves_no_fp8(healthy: str) -> None:
    data, out = run(healthy)
    assert data["live"]["result"] == "ok"
    assert data["verdict"] is None
    assert data["weights"] == {"result": "not visible", "verdict": None}
    assert out.splitlines()[-1] == "live: ok; weights: not visible at this level"
    assert "fp8-ok" not in out


@pytest.mark.parametrize(
    ("arguments", "verdict", "said"),
    [
        (["--state", "unpushed"], "unpushed", "state: unpushed"),
        (["--state", "failed"], "wrong-weights", "state: failed"),
        (["--nan"], None, "log-probabilities: 1 of 1 are not finite"),
        (["--moody"], None, "repeat:"),
    ],
)
def test_a_live_fault_ends_the_check_with_8_before_the_weights(
    serve: Serve,
    arguments: list[str],
    verdict: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = answers(monkeypatch, verdict="fp8-ok")
    url = serve(*arguments)
    with pytest.raises(CheckFailedError) as caught:
        run(url, "weights")
    assert calls == []
    error = caught.value
    assert error.exit_code == 8
    assert url in error.message
    assert said in error.message
    assert error.data["verdict"] == verdict
    assert error.data["weights"] == {"result": "not visible", "verdict": None}
    assert error.hint
    json.dumps(error.data)


def test_a_server_that_is_not_there_is_unreachable() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(CheckFailedError, match="is unreachable") as caught:
        run(url, "weights")
    assert caught.value.data["verdict"] == "unreachable"
    # The fault is the connection's own; it is not announced twice.
    assert re.fullmatch(rf"{url} is unreachable: ConnectError: .*refused", caught.value.message)
    assert caught.value.hint == "fp8ctl ps"


def test_weights_that_are_right_give_the_one_good_word(
    healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8CTL_API_KEY", "secret")
    calls = answers(monkeypatch, verdict="fp8-ok")
    data, out = run(healthy + "/", "weights")
    assert data["verdict"] == "fp8-ok"
    assert data["weights"]["verdict"] == "fp8-ok"
    assert data["live"]["result"] == "ok"
    assert out.splitlines()[-1] == "verdict: fp8-ok"
    [(asked, model, _, key)] = calls
    assert (asked, model, key) == (healthy, None, "secret")


@pytest.mark.parametrize("verdict", [v for v in VERDICTS if v != "fp8-ok"])
def test_every_other_word_fails_the_check(
    healthy: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, result="failed", verdict=verdict, message="because")
    with pytest.raises(CheckFailedError, match=f"is {verdict}: because") as caught:
        run(healthy, "weights")
    assert caught.value.data["verdict"] == verdict
    assert caught.value.hint


def test_weights_that_are_not_visible_are_never_ok(
    healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, result="not visible", message="no such route")
    with pytest.raises(CheckFailedError, match="not proven to serve FP8: no such route") as caught:
        run(healthy, "weights")
    assert caught.value.data["verdict"] is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:30000",
        "localhost",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "http://",
        "http://:30000",
        "http://host:0",
        "http://host:99999",
        "http://host:port",
        "http://[::1",
        "sglang-30000",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_asked(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address") as caught:
        run(text)
    assert repr(text) in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:30000/", "http://127.0.0.1:30000"),
        ("https://host", "https://host"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://host/behind/a/proxy/", "http://host/behind/a/proxy"),
    ],
)
def test_an_address_loses_its_last_slash_only(text: str, url: str) -> None:
    assert command.parse_url(text) == url


@pytest.mark.parametrize("level", ["", "logprobs", "LIVE", "all"])
def test_a_level_that_is_none_is_refused(level: str) -> None:
    with pytest.raises(UsageError, match="there is live and weights") as caught:
        run("http://127.0.0.1:1", level)
    assert repr(level) in caught.value.message


def test_a_model_that_would_not_be_looked_at_is_refused() -> None:
    with pytest.raises(UsageError, match="--model m is compared at the weights level only") as e:
        command.run(reporter()[0], url="http://127.0.0.1:1", model="m")
    assert e.value.hint == "fp8ctl check http://127.0.0.1:1 --level weights --model m"


def test_the_fault_of_a_verdict_is_its_own() -> None:
    evidence = (
        Evidence("health", "failed", "HTTP 503", "200"),
        Evidence("connection", "failed", "refused", "an answer"),
    )
    fault = LevelReport("live", "failed", "unreachable", evidence, {}).fault
    assert fault is not None
    assert fault.check == "connection"
    fault = LevelReport("live", "failed", "unpushed", evidence, {}).fault
    assert fault is not None
    assert fault.check == "health"


def test_a_fault_is_worded_with_what_was_expected_in_one_place() -> None:
    failed = Evidence("chat", "failed", "'Lyon'", "an answer with 'Paris'")
    found = LevelReport("live", "failed", None, (failed,), {})
    assert command.fault_text(found) == "chat: 'Lyon' (expected an answer with 'Paris')"
    gone = Evidence("connection", "failed", "ConnectError: refused", "an answer")
    found = LevelReport("live", "failed", "unreachable", (failed, gone), {})
    assert command.fault_text(found) == "ConnectError: refused"


@pytest.mark.parametrize("given", [None, "", "ok", "FP8-OK", 3])
def test_a_word_that_is_no_verdict_is_none(given: object) -> None:
    assert as_verdict(given) is None
    assert as_verdict("fp8-ok") == "fp8-ok"
