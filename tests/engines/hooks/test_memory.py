"""Weights that the engine gives up: the gate closes, and nothing is written where they were."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fp8ctl import wire
from fp8ctl.engines.hooks.routes import PushRoutes
from tests.engines.hooks.sglang_app import (
    COMPLETE,
    DISK,
    FORGET,
    RELEASE,
    RESUME,
    TENSOR,
    Server,
)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"tags": null}', b'{"tags": ["weights", "kv"]}'])
def test_weights_that_are_released_close_the_gate_before_the_answer_leaves(body: bytes) -> None:
    server = Server(COMPLETE, await_push=False)
    assert server.ask(RELEASE, body=body)[0] == 200
    assert server.seen == ["ready", "unpushed", "unpushed"]
    assert "released" in server.message
    assert server.workers.questions == [FORGET], "what was there before does not count"
    states = []
    for path in ("/resume_memory_occupation", DISK):
        server.ask(path)
        states.append(server.gate.state)
    assert states == ["unpushed", "ready"], "resuming brings no weights back, a push does"


@pytest.mark.parametrize(
    "body", [b'{"tags": ["kv_cache"]}', b'{"tags": []}', b'{"tags": 1}', b"no json", b"[]"]
)
def test_what_releases_no_weights_leaves_the_gate_open(body: bytes) -> None:
    server = Server(COMPLETE, await_push=False)
    server.ask(RELEASE, body=body)
    assert server.gate.state == "ready"


def test_weights_that_are_released_close_the_gate_whatever_the_ranks_answer() -> None:
    server = Server(COMPLETE, await_push=False, error=RuntimeError("rank 1 did not answer"))
    assert server.ask(RELEASE)[0] == 200
    assert server.gate.state == "unpushed"


def test_a_release_that_is_refused_or_gives_nothing_up_leaves_the_gate_open() -> None:
    refused = Server(COMPLETE, await_push=False, status=400)
    refused.ask(RELEASE)
    assert refused.gate.state == "ready"
    without_saver = Server(COMPLETE, await_push=False)
    without_saver.workers.can_release = False
    without_saver.ask(RELEASE)
    assert without_saver.gate.state == "ready"


@pytest.mark.parametrize(
    ("released", "resumed", "refused"),
    [
        (b"", None, True),
        (b'{"tags": ["weights"]}', None, True),
        (b"", b'{"tags": ["kv_cache"]}', True),
        (b"", b'{"tags": ["weights"]}', False),  # keys and values may come back later
        (b"", b'{"tags": []}', False),
        (b'{"tags": ["kv_cache"]}', None, False),
    ],
)
def test_nothing_is_written_to_memory_that_is_released(
    released: bytes, resumed: bytes | None, refused: bool
) -> None:
    server = Server({**COMPLETE, "refittable": True}, await_push=False)
    offer = json.dumps({"protocol": wire.PROTOCOL, "client": {}, "carrier": None}).encode()

    async def test() -> tuple[int, dict[str, Any]]:
        await server.ask_soon(RELEASE, body=released)
        if resumed is not None:
            await server.ask_soon(RESUME, body=resumed)
        own, _ = await server.ask_soon(TENSOR)
        status, answer = await PushRoutes(server.engine, server.updates).answer(
            "POST", wire.CONNECT, offer
        )
        assert (own == 409) == (status == 409), "the engine's own updates as well"
        return status, answer

    server.gate.started = True
    status, answer = asyncio.run(test())
    if not refused:
        assert status == 200
        return
    assert (status, answer["error"]["id"]) == (409, "FP8-RELEASED")
    assert RESUME in answer["error"]["hint"]
    assert "progress" not in [what for what, _ in server.workers.questions]


def test_a_release_that_breaks_off_may_have_given_up_everything() -> None:
    server = Server(COMPLETE, await_push=False, raises=RuntimeError("connection lost"))
    with pytest.raises(RuntimeError, match="connection lost"):
        server.ask(RELEASE)
    assert server.gate.state == "unpushed"
    assert server.updates.memory.released == {"weights", "kv_cache"}
