"""Answers have a size and a time: no server, however broken, keeps `check` or fills its memory."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from fp8ctl.check import answers, asking, live, prompts
from fp8ctl.check.answers import Server
from fp8ctl.errors import CheckFailedError
from tests.broken_server import BRACKETS, DRIPS, FLOODS, PACKED, serving, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.broken_server import Send


@pytest.mark.parametrize("where", DRIPS)
def test_an_answer_that_drips_ends_with_its_time(where: str) -> None:
    with serving(lambda _: DRIPS[where]) as url, Server(url, None, 0.3) as server:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout, match=r"no whole answer within 0\.3 s"):
            server.get("/x")
        assert time.monotonic() - began < 5


def test_the_time_of_a_connection_that_was_kept_is_bounded_too() -> None:
    """The second answer comes over the first one's connection."""

    def first_well(send: Send) -> None:
        send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        time.sleep(0.2)
        DRIPS["in a body with a length"](send)

    with serving(lambda _: first_well) as url, Server(url, None, 0.6) as server:
        assert server.get("/x").body == {}
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout, match=r"no whole answer within 0\.6 s"):
            server.get("/x")
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("where", FLOODS)
def test_of_an_answer_that_has_no_end_no_more_is_read_than_was_said(where: str) -> None:
    with (
        serving(lambda _: FLOODS[where]) as url,
        Server(url, None, 60.0) as server,
        pytest.raises(httpx.RequestError, match="the answer is larger than 1 MiB"),
    ):
        server.post("/x", {}, limit=1 << 20)


@pytest.mark.parametrize("key", ["abcd", "1234", "model", "rank"])
def test_a_key_whose_letters_stand_in_a_report_changes_no_digest(key: str) -> None:
    told = {"state": {"state": "ready"}, "manifest": {"model": "m"}, "ranks": [{"rank": 0}]}
    told["ranks"][0]["tensors"] = [{"digest": "00abcd1234567890"}]  # type: ignore[index]
    body = json.dumps(told).encode()
    with serving(lambda _: whole(body)) as url:
        assert asking.report(url, key) == told
        with Server(url, key, 10.0) as server:  # elsewhere it is blotted out of everything
            reply = server.post("/x")
            assert key not in json.dumps(reply.body) + reply.text


def test_an_answer_of_the_limit_is_read_whole() -> None:
    body = json.dumps("x" * 998).encode()
    with serving(lambda _: whole(body)) as url, Server(url, None, 10.0) as server:
        assert server.post("/x", limit=1000).body == "x" * 998
        with pytest.raises(httpx.RequestError, match="larger"):
            server.post("/x", limit=999)


def test_what_is_packed_is_not_unpacked_and_brackets_are_no_json() -> None:
    for path, answer in (("/packed", PACKED), ("/brackets", BRACKETS)):
        with serving(only(path.encode(), answer)) as url, Server(url, None, 10.0) as server:
            reply = server.get(path)
        assert (reply.status, reply.body) == (200, None)
        assert len(reply.text) <= 1_000_000


# --- the questions that are asked with it ---------------------------------------------------------


def only(path: bytes, broken: Callable[[Send], None]) -> Callable[[bytes], Callable[[Send], None]]:
    """Return answers of a server that is broken at one path, and says little at all others."""
    models = whole(b'{"data": [{"id": "m"}], "model_path": "/m"}')
    return lambda line: broken if path in line else models


@pytest.mark.parametrize("path", [b"/health", b"/v1/models", b"/v1/chat/completions"])
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (DRIPS["in a body without one"], "no whole answer within 0.5 s"),
        (FLOODS["in chunks"], "the answer is larger than 1 MiB"),
    ],
)
def test_the_live_level_says_what_a_server_did_instead_of_answering(
    path: bytes, broken: Callable[[Send], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 0.5 if "within" in told else 60.0
    monkeypatch.setattr(live, "_GET_TIMEOUT", limit)
    monkeypatch.setattr(live, "STATE_TIMEOUT", limit)
    monkeypatch.setattr(answers, "LIMIT", 1 << 20)
    began = time.monotonic()
    with serving(only(path, broken)) as url:
        found = live.check(url, timeout=limit)
    assert time.monotonic() - began < 20
    assert (found.verdict, found.fault and found.fault.check) == ("unreachable", "connection")
    assert found.fault is not None
    assert told in found.fault.found


@pytest.mark.parametrize("where", ["in its headers", "in chunks"])
def test_questions_about_prompts_and_reports_have_their_time(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TIMEOUT", 0.3)
    began = time.monotonic()
    with serving(lambda _: DRIPS[where]) as url:
        with pytest.raises(CheckFailedError, match="no whole answer within"):
            asking.report(url, None)
        assert asking.more(url, None, ["a"], {}, 1) == []
    with (
        serving(only(b"/generate", DRIPS[where])) as url,
        prompts.Prompts(url, None, 0.3) as asked,
        pytest.raises(CheckFailedError, match=r"/generate does not answer: .* within 0\.3 s"),
    ):
        asked.score([(1, 2)])
    assert time.monotonic() - began < 10


def test_questions_about_prompts_and_reports_have_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_REPORT", "_VALUES"):
        monkeypatch.setattr(asking, name, 1 << 20)
    with serving(lambda _: FLOODS["in chunks"]) as url:
        with pytest.raises(CheckFailedError, match="the answer is larger than 1 MiB"):
            asking.report(url, None)
        assert asking.more(url, None, ["a"], {}, 1) == []
    asked: list[bytes] = []

    def answer(line: bytes) -> Callable[[Send], None]:
        asked.append(line)
        return only(b"/generate", FLOODS["in chunks"])(line)

    with (
        serving(answer) as url,
        prompts.Prompts(url, None, 60.0) as one,
        pytest.raises(CheckFailedError, match="the answer is larger than 16 MiB"),
    ):
        one.score([(1, 2)])
    assert sum(b"/generate" in line for line in asked) == 1, "it is not asked for a flood twice"
