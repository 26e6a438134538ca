"""What fp8ctl puts around SGLang's server: updates move the gate.

SGLang itself is absent; the real server is in tests/e2e.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fp8ctl.engines.hooks import sglang_server
from fp8ctl.engines.hooks.gate import Gate
from fp8ctl.engines.hooks.sglang_server import UPDATING
from tests.engines.hooks.sglang_app import (
    BROKEN,
    COMPLETE,
    DISK,
    EXPECTED,
    FORGET,
    PART,
    TENSOR,
    UNFILLED,
    Server,
)

# --- updates and the gate -----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(UPDATING))
def test_the_gate_is_closed_during_an_update_and_open_before_its_answer_leaves(path: str) -> None:
    server = Server(COMPLETE)
    assert server.ask("/generate")[0] == 503
    server.seen.clear()
    assert server.ask(path) == (200, b'{"success": true}')
    assert server.seen == ["updating", "ready", "ready"]
    assert server.ask("/generate")[0] == 200


@pytest.mark.parametrize(
    ("answers", "status", "state"),
    [
        ([COMPLETE, COMPLETE], 200, "ready"),
        ([COMPLETE, PART], 200, "unpushed"),
        ([UNFILLED, COMPLETE], 200, "unpushed"),
        ([COMPLETE, BROKEN], 400, "failed"),
        ([COMPLETE], 400, "ready"),
    ],
)
def test_the_state_follows_from_the_worst_rank(
    answers: list[dict[str, Any]], status: int, state: str
) -> None:
    server = Server(*answers, await_push=False, status=status)
    assert server.ask(DISK)[0] == status
    assert server.gate.state == state


def test_a_rejected_update_leaves_a_waiting_server_waiting() -> None:
    server = Server(COMPLETE, status=400)
    assert server.ask(DISK)[0] == 400
    assert server.gate.state == "unpushed"


def test_the_message_names_a_tensor_that_is_missing_and_how_many_are() -> None:
    server = Server(COMPLETE, PART)
    server.ask(DISK)
    assert server.message == "1 tensors have not arrived, such as norm.weight"
    server = Server(PART, UNFILLED)
    server.ask(DISK)
    assert server.message == "2 tensors have not arrived, such as a.weight"


def test_the_message_of_a_failure_is_what_the_engine_said() -> None:
    server = Server(BROKEN, status=400, parts=(b'{"message": "no', b" such file " + b'"}'))
    assert server.ask(DISK) == (400, b'{"message": "no such file "}')
    assert server.message == '{"message": "no such file "}'


def test_only_a_server_that_lacks_weights_asks_for_all_of_them() -> None:
    waiting = Server(COMPLETE)
    waiting.ask(DISK)
    assert waiting.workers.questions == [("progress", {"expected": EXPECTED})]
    # Now it has them: a trainer may send one tensor.
    waiting.ask(DISK)
    assert waiting.workers.questions[1] == ("progress", {"expected": []})
    broken = Server(BROKEN, await_push=False, status=400)
    broken.ask(DISK)
    broken.ask(DISK)
    asked = [details.get("expected") for _, details in broken.workers.questions]
    assert asked == [[], None, EXPECTED, None]
    assert broken.workers.questions[1::2] == [FORGET, FORGET]


def test_a_rank_that_failed_alone_turns_the_engines_good_answer_into_an_error() -> None:
    """Rank 0 alone answers SGLang's request."""
    server = Server(COMPLETE, BROKEN, await_push=False, status=200)
    status, body = server.ask(DISK)
    assert (status, json.loads(body)["success"]) == (500, False)
    assert server.gate.state == "failed"
    assert server.seen == ["updating", "failed", "failed"]


@pytest.mark.parametrize(("path", "state"), [(DISK, "ready"), (TENSOR, "unpushed")])
def test_without_a_plan_only_a_whole_checkpoint_opens_the_gate(path: str, state: str) -> None:
    server = Server(COMPLETE, expected=[])
    assert server.ask(path)[0] == 200
    assert server.gate.state == state
    # Who has its weights may send a part either way.
    ready = Server(COMPLETE, expected=[], await_push=False)
    ready.ask(path)
    assert ready.gate.state == "ready"


def test_updates_are_taken_one_at_a_time() -> None:
    server = Server(COMPLETE, COMPLETE, await_push=False)
    most = asyncio.run(server.at_once(DISK, TENSOR, DISK))
    assert most == 1
    assert server.gate.state == "ready"
    # Positive control: what is no update does run beside others.
    assert asyncio.run(server.at_once("/health", "/get_load", "/ping")) == 3


def test_an_update_that_breaks_off_in_the_server_closes_the_gate() -> None:
    server = Server(COMPLETE, await_push=False, raises=RuntimeError("connection lost"))
    with pytest.raises(RuntimeError, match="connection lost"):
        server.ask(DISK)
    assert server.gate.state == "failed"
    assert server.message == "the update broke off"


def test_ranks_that_do_not_answer_close_the_gate() -> None:
    # What they hold now, nobody knows.
    server = Server(await_push=False, error=RuntimeError("rank 1 did not answer"))
    with pytest.raises(RuntimeError, match="rank 1"):
        server.ask(DISK)
    assert server.gate.state == "failed"


@pytest.mark.parametrize(
    "path", ["/generate", "/health", "/fp8ctl/state", "/init_weights_update_group"]
)
def test_other_routes_pass_as_they_are_and_ask_nobody(path: str) -> None:
    server = Server(COMPLETE, await_push=False, parts=(b"one ", b"two"))
    assert server.ask(path) == (200, b"one two")
    assert server.seen == ["ready"] * 4
    assert server.workers.questions == []


# --- requests, and the start --------------------------------------------------------------------


def test_every_http_request_makes_sure_that_the_schedulers_are_heard() -> None:
    server = Server(COMPLETE)
    for path in ("/get_server_info", DISK):
        server.ask(path)
    assert server.workers.listening == 2
    server.ask("/update_weights_from_disk", "websocket")
    assert server.workers.listening == 2, "there is no event loop to listen on at the start"


def test_the_gate_tells_a_state_only_when_the_warm_up_is_over() -> None:
    gate = Gate(engine="sglang", engine_version="0.4.8", await_push=False)
    gate.started = False
    during: list[object] = []

    def warm_up(*args: object, **kwargs: object) -> None:
        during.append((args, kwargs, gate.answer()[0]))

    sglang_server._then_start(gate, warm_up)("args", pipe=1)
    assert during == [(("args",), {"pipe": 1}, 503)]
    assert gate.answer()[0] == 200


def test_a_warm_up_that_fails_leaves_the_server_not_started() -> None:
    gate = Gate(engine="sglang", engine_version="0.4.8", await_push=False)
    gate.started = False

    def warm_up() -> None:
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        sglang_server._then_start(gate, warm_up)()
    assert gate.answer()[0] == 503
