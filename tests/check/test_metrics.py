"""What Prometheus is told, and the address at which it asks."""

from __future__ import annotations

import re
import socket
from typing import Any

import httpx
import pytest

from fp8ctl.check import levels, metrics
from fp8ctl.check.levels import Request
from fp8ctl.check.verdict import VERDICTS, Evidence, LevelReport
from fp8ctl.errors import BusyError, UsageError
from fp8ctl.process import free_port

URL = "http://127.0.0.1:30000"


def document(**weights: object) -> dict[str, Any]:
    facts = {"latency_s": 0.25, "generation_s": 0.125}
    live = LevelReport("live", "ok", None, (Evidence("health", "ok", "HTTP 200"),), facts)
    told = {"result": "ok", "verdict": "fp8-ok", "message": "all equal", **weights}
    told.setdefault("counts", {"equal": 420, "different": 0})
    logprobs = {
        "result": "ok",
        "verdict": "fp8-ok",
        "message": "fits",
        "fits": "fp8-block",
        "hypotheses": {"fp8-block": {"mean_abs": 0.125}, "bf16": {"mean_abs": 0.5}},
    }
    found = {"weights": told, "logprobs": logprobs}
    return levels.assemble(Request(URL, "logprobs"), live, found).data  # type: ignore[arg-type]


def samples(text: str) -> dict[str, float]:
    """Parse the text format, strictly."""
    found: dict[str, float] = {}
    typed: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# "):
            mark, name, _ = line[2:].split(" ", 2)
            assert mark in {"HELP", "TYPE"}
            typed |= {name} if mark == "TYPE" else set()
            continue
        match = re.fullmatch(r'(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (\S+)', line)
        assert match, line
        assert match[1] in typed
        key = f"{match[1]}{{{match[2]}}}"
        assert key not in found
        found[key] = float(match[3])
    assert text.endswith("\n")
    return found


def test_a_round_is_told_in_full() -> None:
    rounds = metrics.Rounds(URL)
    rounds.add(document(), "ok", 1000.5)
    found = samples(rounds.text())
    server = f'server="{URL}"'
    assert found[f'fp8ctl_checks_total{{{server},result="ok"}}'] == 1
    assert found[f"fp8ctl_check_ok{{{server}}}"] == 1
    assert found[f"fp8ctl_check_last_timestamp_seconds{{{server}}}"] == 1000.5
    assert found[f'fp8ctl_check_latency_seconds{{{server},request="chat"}}'] == 0.25
    assert found[f'fp8ctl_check_latency_seconds{{{server},request="generation"}}'] == 0.125
    assert found[f'fp8ctl_check_tensors{{{server},found="equal"}}'] == 420
    assert found[f'fp8ctl_check_tensors{{{server},found="different"}}'] == 0
    assert found[f"fp8ctl_check_logprob_mean_abs_difference{{{server}}}"] == 0.125
    words = {k: v for k, v in found.items() if k.startswith("fp8ctl_check_verdict{")}
    assert len(words) == len(VERDICTS) + 1
    assert [k for k, v in words.items() if v == 1] == [
        f'fp8ctl_check_verdict{{{server},verdict="fp8-ok"}}'
    ]


def test_what_is_not_known_has_no_sample() -> None:
    rounds = metrics.Rounds(URL)
    assert set(samples(rounds.text()).values()) == {0.0}, "before the first round: counters alone"
    live = LevelReport("live", "ok", None, (Evidence("health", "ok", "HTTP 200"),), {})
    rounds.add(levels.assemble(Request(URL), live, {}).data, "ok", 1.0)
    text = rounds.text()
    assert 'verdict="none"} 1.0' in text
    for name in ("latency", "tensors", "logprob"):
        assert name not in text


def test_a_skipped_round_is_counted_and_the_last_verdict_stays() -> None:
    rounds = metrics.Rounds(URL)
    rounds.add(document(), "ok", 1.0)
    rounds.add(document(verdict="stale", result="failed"), "skipped", 2.0)
    text = rounds.text()
    assert 'result="skipped"} 1.0' in text
    assert 'verdict="fp8-ok"} 1.0' in text
    rounds.add(document(verdict="stale", result="failed"), "failed", 3.0)
    assert 'verdict="stale"} 1.0' in rounds.text()
    assert "check_ok{" in rounds.text()


def test_a_label_cannot_be_broken_out_of() -> None:
    rounds = metrics.Rounds('a"} 1\nevil{x="\\')
    assert 'server="a\\"} 1\\nevil{x=\\"\\\\"' in rounds.text()
    assert samples(rounds.text())


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:9464", ("::1", 9464)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert metrics.parse_address(text) == address


@pytest.mark.parametrize("text", ["", "localhost", "a:b", "a:65536", "a:-1", "http://a:1", "a b:1"])
def test_what_is_no_address_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is not HOST:PORT") as caught:
        metrics.parse_address(text)
    assert repr(text) in caught.value.message


def test_metrics_are_served_until_the_end_of_the_block() -> None:
    with metrics.serving("127.0.0.1:0", lambda: "a 1\n") as at:
        found = httpx.get(at, trust_env=False)
        assert (found.status_code, found.text) == (200, "a 1\n")
        assert found.headers["content-type"] == metrics.CONTENT_TYPE
        assert httpx.get(at + "?x=1", trust_env=False).status_code == 200
        assert httpx.get(at.removesuffix("/metrics"), trust_env=False).status_code == 404
        assert httpx.post(at, trust_env=False).status_code == 501
    with pytest.raises(httpx.TransportError):
        httpx.get(at, trust_env=False)


def test_a_client_that_says_nothing_keeps_nobody() -> None:
    with metrics.serving("127.0.0.1:0", lambda: "a 1\n") as at:
        port = int(at.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)):
            assert httpx.get(at, trust_env=False).text == "a 1\n"


def test_a_port_that_is_taken_is_busy() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        with (
            pytest.raises(BusyError, match=f"127.0.0.1:{port}: the port is taken") as caught,
            metrics.serving(f"127.0.0.1:{port}", str),
        ):
            pass
    assert caught.value.exit_code == 7
    assert caught.value.hint


def test_an_address_of_another_machine_is_a_usage_error() -> None:
    port = free_port("127.0.0.1")
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with (
            pytest.raises(UsageError, match="is no address of this machine"),
            metrics.serving(f"{host}:{port}", str),
        ):
            pass
