"""`fp8ctl check`: which levels run, what the verdict is, and how it ends."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

import fp8ctl.check
from fp8ctl import cli, gate
from fp8ctl.check import command, weights
from fp8ctl.check.verdict import VERDICTS
from fp8ctl.errors import CheckFailedError, NotFoundError, NotPermittedError, UsageError
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
    ("state", "verdict"),
    [("unpushed", "unpushed"), ("failed", "wrong-weights"), ("updating", None)],
)
def test_a_server_without_its_weights_ends_the_check_with_8_before_they_are_asked_for(
    serve: Serve, state: str, verdict: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = answers(monkeypatch, verdict="fp8-ok")
    url = serve("--state", state)
    with pytest.raises(CheckFailedError) as caught:
        run(url, "weights")
    assert calls == []
    error = caught.value
    assert error.exit_code == 8
    assert url in error.message
    assert f"state: {state}" in error.message
    assert error.data["verdict"] == verdict
    told: Any = error.data["weights"]
    assert (told["result"], told["message"]) == ("not visible", f"the server is {state}")
    assert error.hint
    json.dumps(error.data)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--nan"], "log-probabilities: 1 of 1 are not finite"), (["--moody"], "repeat:")],
)
def test_a_live_fault_fails_the_check_and_the_weights_are_looked_at_all_the_same(
    serve: Serve, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(*arguments)
    calls = answers(monkeypatch, verdict="fp8-ok", message="all equal")
    with pytest.raises(CheckFailedError, match="is not well") as caught:
        run(url, "weights")
    assert len(calls) == 1
    assert said in caught.value.message
    assert caught.value.data["verdict"] is None, "right weights that answer with nonsense"
    answers(monkeypatch, result="failed", verdict="unscaled", message="layer 3")
    with pytest.raises(CheckFailedError, match="is unscaled: layer 3"):
        run(url, "weights")


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
    calls = answers(monkeypatch, verdict="fp8-ok", message="all equal")
    data, out = run(healthy + "/", "weights")
    assert data["verdict"] == "fp8-ok"
    assert data["weights"]["verdict"] == "fp8-ok"
    assert data["live"]["result"] == "ok"
    assert out.splitlines()[-1] == "verdict: fp8-ok, all equal"
    assert "secret" not in json.dumps(data)
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


@pytest.mark.parametrize("level", ["", "LIVE", "all"])
def test_a_level_that_is_none_is_refused(level: str) -> None:
    with pytest.raises(UsageError, match="there is live, weights and logprobs") as caught:
        run("http://127.0.0.1:1", level)
    assert repr(level) in caught.value.message


def test_a_model_that_would_not_be_looked_at_is_refused() -> None:
    with pytest.raises(UsageError, match="--model m is compared at the weights level") as e:
        command.run(reporter()[0], url="http://127.0.0.1:1", model="m")
    assert e.value.hint == "fp8ctl check http://127.0.0.1:1 --level weights --model m"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": "weights", "record": Path("r")}, "--record is about log-probabilities"),
        ({"level": "live", "against": Path("r")}, "--against is about log-probabilities"),
        ({"record": Path("r"), "against": Path("r")}, "would write over what --against reads"),
        ({"metrics": "127.0.0.1:0"}, "is for a check that goes on"),
    ],
)
def test_options_that_cannot_be_meant_together_are_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        command.run(reporter()[0], url="http://127.0.0.1:1", **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    "url", ["http://me:pa55@127.0.0.1:1", "http://127.0.0.1:1/?key=pa55", "http://127.0.0.1:1#pa55"]
)
def test_an_address_with_a_secret_in_it_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(UsageError, match="more than an address") as caught:
        run(url)
    assert "pa55" not in caught.value.message + str(caught.value.hint)


def logprobs(monkeypatch: pytest.MonkeyPatch, **found: object) -> list[dict[str, object]]:
    """Have the logprobs level find something."""
    calls: list[dict[str, object]] = []

    def verify(url: str, model: str | None, *_: object, **files: object) -> dict[str, object]:
        calls.append({"url": url, "model": model, **files})
        return {"result": "ok", "verdict": None, "message": "", **found}

    module = types.ModuleType("fp8ctl.check.logprobs")
    module.__dict__["verify"] = verify
    monkeypatch.setitem(sys.modules, "fp8ctl.check.logprobs", module)
    monkeypatch.setattr(fp8ctl.check, "logprobs", module, raising=False)
    return calls


def test_what_is_not_visible_inside_does_not_stop_the_look_from_outside(
    healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, result="not visible", message="no such route")
    calls = logprobs(monkeypatch, verdict="fp8-ok", message="fp8-block fits, by 2.1")
    data, out = run(healthy, "logprobs")
    assert calls == [{"url": healthy, "model": None, "against": None, "record": None}]
    assert data["verdict"] == "fp8-ok"
    assert out.splitlines()[-1] == (
        "verdict: fp8-ok, fp8-block fits, by 2.1; seen from outside only: the weights level is "
        "not visible"
    )
    assert [one["check"] for one in data["evidence"]] == ["live", "weights", "logprobs"]


def raising(error: Exception) -> Callable[..., object]:
    def verify(*_: object, **__: object) -> object:
        raise error

    return verify


def test_a_server_that_refuses_to_be_looked_at_has_failed_that_level(
    healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "verify", raising(CheckFailedError("it answers 500")))
    with pytest.raises(CheckFailedError, match="is not well: it answers 500") as caught:
        run(healthy, "weights")
    told: Any = caught.value.data["weights"]
    assert (told["result"], told["verdict"]) == ("failed", None)


def test_a_level_that_cannot_be_judged_from_here_hides_no_other_fault(
    serve: Serve, healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "verify", raising(NotFoundError("no torch", hint="type this")))
    with pytest.raises(NotFoundError, match="no torch"):
        run(healthy, "weights")
    with pytest.raises(CheckFailedError, match="repeat:") as caught:
        run(serve("--moody"), "weights")
    told: Any = caught.value.data["weights"]
    assert (told["result"], told["message"]) == ("not visible", "no torch")
    # Nor what a level before it has found.
    answers(monkeypatch, result="failed", verdict="wrong-weights", message="one code")
    logprobs(monkeypatch)
    monkeypatch.setattr(fp8ctl.check.logprobs, "verify", raising(NotFoundError("no record")))
    with pytest.raises(CheckFailedError, match="is wrong-weights: one code") as caught:
        run(healthy, "logprobs")
    seen: Any = caught.value.data["logprobs"]
    assert seen["message"] == "no record"


def test_record_and_against_mean_the_level_of_log_probabilities(
    healthy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers(monkeypatch, verdict="fp8-ok", message="all equal")
    calls = logprobs(monkeypatch, verdict="fp8-ok")
    file = tmp_path / "record.json"
    data: Any = command.run(reporter()[0], url=healthy, record=file)
    assert (data["level"], calls[0]["record"], calls[0]["against"]) == ("logprobs", file, None)
    assert f"--record {file}" in data["commands"][-1]
    command.run(reporter()[0], url=healthy, against=file)
    assert calls[1]["against"] == file


def test_a_record_of_a_bf16_server_is_a_success_and_one_of_a_broken_server_is_none(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers(monkeypatch, result="failed", verdict="bf16-fallback", message="16 bits")
    logprobs(monkeypatch, result="failed", verdict="bf16-fallback", recorded=True)
    record = tmp_path / "record.json"
    data: Any = command.run(reporter()[0], url=serve(), record=record)
    assert data["verdict"] == "bf16-fallback"
    with pytest.raises(CheckFailedError, match="is bf16-fallback"):
        run(serve(), "logprobs")  # without a record it is what it is
    with pytest.raises(CheckFailedError):
        command.run(reporter()[0], url=serve("--moody"), record=record)
    logprobs(monkeypatch, result="not visible", message="no prompt log-probabilities")
    with pytest.raises(CheckFailedError):
        command.run(reporter()[0], url=serve(), record=record)


def test_a_key_stands_nowhere_in_the_data_whatever_a_server_answers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = "k-that-comes-back"
    monkeypatch.setenv("FP8CTL_API_KEY", key)
    answers(monkeypatch, verdict="fp8-ok", message=f"Bearer {key}", tensors=[{"name": key}])
    page = tmp_path / "check.html"
    url = serve("--answer", f"I was sent {key}", "--tell-key", key)
    data: Any = command.run(reporter()[0], url=url, level="weights", page=page)
    assert key not in json.dumps(data)
    assert "I was sent ***" in data["live"]["facts"]["answer"], "the control"
    text = page.read_text(encoding="utf-8")
    assert key not in text
    assert "I was sent ***" in text
    assert data["environment"]["FP8CTL_API_KEY"] == "set"


def test_the_commands_of_a_check_can_be_typed(
    healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, verdict="fp8-ok")
    data: Any = command.run(reporter()[0], url=healthy, level="weights", model="a folder")
    program: Any = typer.main.get_command(cli.build())
    lines = [line for line in data["commands"] if line.startswith("fp8ctl ")]
    assert len(lines) == 2
    for line in lines:
        first, name, *words = shlex.split(line)
        context = program.commands[name].make_context(name, words)
        assert (first, context.params["model"], context.params["level"]) == (
            "fp8ctl",
            "a folder",
            "weights",
        )


def test_a_report_is_written_also_where_the_verdict_is_bad(serve: Serve, tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    with pytest.raises(CheckFailedError):
        command.run(reporter()[0], url=serve("--state", "unpushed"), page=page)
    assert '<span class="verdict failed">unpushed</span>' in page.read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    for path in (tmp_path, tmp_path / "none" / "check.html"):
        with pytest.raises(NotPermittedError, match=re.escape(str(path))) as caught:
            command.run(reporter()[0], url="http://127.0.0.1:1", page=path)
        assert caught.value.exit_code == 6
