"""The gate: which state follows from which update, and which route it holds back."""

from __future__ import annotations

import ast
import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl.engines.hooks.gate import OPEN, Gate, GateMiddleware, Outcome, is_open

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

APPLIED = Outcome("applied")
PART = Outcome("applied", missing=2, message="2 tensors have not arrived")
FAILED = Outcome("failed", message="the loader raised")
REJECTED = Outcome("rejected", message="no such folder")

CLOSED = ("unpushed", "updating", "failed")

#: Routes of SGLang 0.4.8 and vLLM 0.9.1 whose answer comes out of the weights. The gate
#: lists the others: with both lists, a route of a release that nobody thought of is seen.
GENERATING = frozenset(
    {
        "/generate",
        "/generate_from_file",
        "/encode",
        "/classify",
        "/health_generate",
        "/invocations",
        "/vertex_generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/audio/transcriptions",
        "/v1/score",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/score",
        "/pooling",
    }
)


def gate(*, await_push: bool = False) -> Gate:
    return Gate(engine="sglang", engine_version="0.4.8", await_push=await_push)


def gate_in(state: str) -> Gate:
    made = gate(await_push=state == "unpushed")
    if state in ("updating", "failed"):
        made.begin_update()
    if state == "failed":
        made.end_update(FAILED)
    assert made.state == state
    return made


def update(made: Gate, outcome: Outcome) -> None:
    made.begin_update()
    made.end_update(outcome)


class Client:
    """Sends one request through a gate to an app that answers 200, and notes what passed."""

    def __init__(self, made: Gate) -> None:
        self.passed: list[Any] = []
        self._app = GateMiddleware(self._engine, made)

    async def _engine(self, scope: Any, receive: Any, send: Any) -> None:
        self.passed.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def ask(
        self, path: str, kind: str = "http", method: str = "POST", root: str = ""
    ) -> tuple[int, dict[bytes, bytes], Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        async def call() -> None:
            scope: dict[str, Any] = {"type": kind, "headers": []}
            if kind != "lifespan":
                scope |= {"method": method, "path": path, "root_path": root}
            await self._app(scope, receive, send)

        asyncio.run(call())
        start, *bodies = sent
        data = b"".join(message["body"] for message in bodies)
        return start["status"], dict(start["headers"]), json.loads(data)


# --- states -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("await_push", "outcomes", "state"),
    [
        (False, [], "ready"),
        (True, [], "unpushed"),
        (True, [APPLIED], "ready"),
        (True, [PART], "unpushed"),
        (True, [PART, APPLIED], "ready"),
        (True, [REJECTED], "unpushed"),
        (True, [FAILED], "failed"),
        (False, [APPLIED], "ready"),
        (False, [REJECTED], "ready"),
        (False, [PART], "unpushed"),  # weights that were there are gone
        (False, [FAILED], "failed"),
        (False, [FAILED, REJECTED], "failed"),  # a rejected update mends nothing
        (False, [FAILED, PART], "unpushed"),
        (False, [FAILED, APPLIED], "ready"),
    ],
)
def test_the_state_follows_from_how_updates_ended(
    await_push: bool, outcomes: list[Outcome], state: str
) -> None:
    made = gate(await_push=await_push)
    for outcome in outcomes:
        update(made, outcome)
    assert made.state == made.settled == made.describe()["state"] == state


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("outcome", [APPLIED, PART, FAILED, REJECTED])
def test_the_gate_is_closed_while_an_update_is_on_its_way(start: bool, outcome: Outcome) -> None:
    made = gate(await_push=start)
    before = made.settled
    made.begin_update()
    assert made.state == made.describe()["state"] == "updating"
    assert made.settled == before
    made.end_update(outcome)
    assert made.state != "updating"


def test_updates_that_overlap_keep_it_closed_until_the_last_has_ended() -> None:
    made = gate(await_push=True)
    made.begin_update()
    made.begin_update()
    made.end_update(APPLIED)
    assert (made.state, made.settled) == ("updating", "ready")
    made.end_update(REJECTED)
    assert (made.state, made.settled) == ("ready", "ready")


def test_a_failure_is_not_forgotten_when_an_overlapping_update_is_rejected() -> None:
    made = gate()
    made.begin_update()
    made.begin_update()
    made.end_update(FAILED)
    made.end_update(REJECTED)
    assert made.state == "failed"
    assert made.describe()["message"] == FAILED.message


def test_the_description_says_why_and_counts_what_changed_the_weights() -> None:
    made = gate(await_push=True)
    made.ranks = 2
    assert "no complete set of weights" in str(made.describe()["message"])
    update(made, REJECTED)
    assert made.describe()["updates"] == 0
    assert "no complete set of weights" in str(made.describe()["message"])
    update(made, PART)
    assert made.describe()["message"] == PART.message
    update(made, APPLIED)
    about = made.describe()
    assert (about["updates"], about["message"], about["ranks"]) == (2, "", 2)
    assert about["await_push"] is True
    json.dumps(about)


@pytest.mark.parametrize("state", ["ready", *CLOSED])
def test_a_started_server_tells_its_state_with_200(state: str) -> None:
    status, body = gate_in(state).answer()
    assert (status, body["state"]) == (200, state)


def test_a_server_that_warms_up_says_503_and_lets_its_own_requests_pass() -> None:
    made = gate()
    made.started = False
    status, body = made.answer()
    assert (status, body["state"]) == (503, "starting")
    assert Client(made).ask("/generate")[0] == 200
    made.started = True
    assert made.answer()[0] == 200


# --- routes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", CLOSED)
@pytest.mark.parametrize("path", sorted(GENERATING))
def test_no_route_that_generates_passes_a_closed_gate(path: str, state: str) -> None:
    client = Client(gate_in(state))
    status, headers, body = client.ask(path)
    assert status == 503
    assert client.passed == []
    assert headers[b"retry-after"] == b"1"
    assert headers[b"content-type"] == b"application/json"
    assert body["error"]["id"] == "FP8-GATE"
    assert body["error"]["state"] == state
    assert body["error"]["message"]


def test_the_length_of_the_refusal_is_its_length_in_bytes() -> None:
    made = gate()
    update(made, Outcome("failed", message="größer ✗"))
    client = Client(made)
    _, headers, body = client.ask("/generate")
    assert int(headers[b"content-length"]) == len(json.dumps(body).encode())


@pytest.mark.parametrize("path", sorted(GENERATING))
def test_every_route_that_generates_passes_an_open_gate(path: str) -> None:
    client = Client(gate())
    assert client.ask(path)[0] == 200
    [scope] = client.passed
    assert scope["path"] == path


@pytest.mark.parametrize("state", CLOSED)
@pytest.mark.parametrize(
    "path",
    [*sorted(OPEN), "/fp8ctl/state", "/fp8ctl/report", "/v1/models/tiny", "/metrics/"],
)
def test_routes_that_do_not_generate_always_pass(path: str, state: str) -> None:
    assert Client(gate_in(state)).ask(path)[0] == 200


@pytest.mark.parametrize("path", ["/v1/tomorrow", "/health/", "/v1/modelsx", "/fp8ctl", "/healthy"])
def test_a_route_that_nobody_thought_of_is_held_back(path: str) -> None:
    assert Client(gate_in("failed")).ask(path)[0] == 503
    assert Client(gate()).ask(path)[0] == 200


@pytest.mark.parametrize("root", ["", "/api", "/api/v2"])
def test_the_path_is_the_one_below_the_root_of_the_app(root: str) -> None:
    """vLLM's --root-path: a proxy may take the prefix off, or leave it on."""
    client = Client(gate_in("unpushed"))
    assert client.ask(f"{root}/v1/completions", root=root)[0] == 503
    assert client.ask("/v1/completions", root=root)[0] == 503
    assert client.ask(f"{root}/health", root=root)[0] == 200
    assert client.ask("/health", root=root)[0] == 200


def test_a_browser_that_asks_what_it_may_is_answered() -> None:
    assert Client(gate_in("failed")).ask("/v1/completions", method="OPTIONS")[0] == 200


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_what_is_no_http_request_passes(kind: str) -> None:
    assert Client(gate_in("failed")).ask("/generate", kind)[0] == 200


def test_the_gate_closes_and_opens_between_two_requests_of_one_client() -> None:
    made = gate()
    client = Client(made)
    assert client.ask("/generate")[0] == 200
    made.begin_update()
    assert client.ask("/generate")[0] == 503
    made.end_update(APPLIED)
    assert client.ask("/generate")[0] == 200


# --- requests on their way ----------------------------------------------------------------------


class Running:
    """One request that is inside the engine, step by step."""

    def __init__(self, made: Gate, path: str = "/generate") -> None:
        self.sent: list[Any] = []
        self.seen: list[int] = []
        self._gate = made
        self._path = path

    def go(self, *steps: Callable[[], None] | dict[str, Any] | Exception) -> None:
        """Do in the engine what each step says: call it, send it, or raise it."""

        async def engine(scope: Any, receive: Any, send: Any) -> None:
            self.seen.append(self._gate.in_flight)
            for step in steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, dict):
                    await send(step)
                else:
                    step()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            self.sent.append(message)

        app = GateMiddleware(engine, self._gate)
        scope = {"type": "http", "method": "POST", "path": self._path}

        async def call() -> None:
            await app(scope, receive, send)

        asyncio.run(call())


START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"{}"}


def test_a_request_is_in_flight_until_it_is_answered_or_broken_off() -> None:
    made = gate()
    running = Running(made)
    running.go(START, BODY)
    with pytest.raises(RuntimeError):
        running.go(RuntimeError("gone"))
    assert running.seen == [1, 1]
    assert made.in_flight == 0
    health = Running(made, "/health")
    health.go(START, BODY)
    assert health.seen == [0], "an update would wait for who asks whether the server is well"


def test_an_answer_from_weights_that_were_lost_meanwhile_is_refused() -> None:
    made = gate()
    running = Running(made)
    running.go(lambda: update(made, FAILED), START, BODY)
    start, body = running.sent
    assert start["status"] == 503
    assert json.loads(body["body"])["error"]["state"] == "failed"
    assert made.in_flight == 0


def test_a_stream_ends_where_the_weights_were_lost() -> None:
    """The rest would be of another set; nothing is sent twice, and nothing behind the end."""
    made = gate()
    running = Running(made)
    more = {**BODY, "more_body": True}
    running.go(START, more, made.begin_update, more, lambda: made.end_update(FAILED), more, BODY)
    assert running.sent == [START, more, more, {"type": "http.response.body", "body": b""}]


@pytest.mark.parametrize("lost", [FAILED, PART])
def test_an_answer_across_weights_that_were_lost_and_came_again_is_refused(lost: Outcome) -> None:
    """It was paused, say: what it computed between the two is of no set."""
    made = gate()
    running = Running(made)
    running.go(lambda: update(made, lost), lambda: update(made, APPLIED), START, BODY)
    assert running.sent[0]["status"] == 503
    assert Client(made).ask("/generate")[0] == 200, "who comes now is answered"
    released = Running(made)
    released.go(lambda: made.lose("released"), lambda: update(made, APPLIED), START, BODY)
    assert released.sent[0]["status"] == 503


@pytest.mark.parametrize("outcome", [APPLIED, REJECTED])
def test_an_answer_across_an_update_that_lost_nothing_is_given(outcome: Outcome) -> None:
    made = gate()
    running = Running(made)
    running.go(made.begin_update, START, lambda: made.end_update(outcome), BODY)
    assert running.sent == [START, BODY]


def test_weights_that_were_given_up_close_the_gate_until_they_are_pushed() -> None:
    made = gate()
    made.lose("released")
    assert (made.state, made.describe()["message"]) == ("unpushed", "released")
    assert Client(made).ask("/generate")[0] == 503
    update(made, APPLIED)
    assert Client(made).ask("/generate")[0] == 200


# --- what the released engines route ------------------------------------------------------------


def routes(source: str) -> Iterator[str]:
    """Yield the path of every route decorator of a FastAPI app or router in a module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute):
                owner = decorator.func.value
                kinds = {"get", "post", "put", "delete", "api_route", "websocket", "route"}
                routed = isinstance(owner, ast.Name) and owner.id in {"app", "router"}
                if routed and decorator.func.attr in kinds:
                    yield _path(decorator.args[0])


def _path(argument: ast.expr) -> str:
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    # os.environ.get(NAME, default)
    assert isinstance(argument, ast.Call), ast.dump(argument)
    return _path(argument.args[1])


def test_the_reader_of_routes_sees_every_spelling() -> None:
    source = (
        "@app.get('/a')\n@router.post('/b', x=1)\nasync def f(): pass\n"
        "if x:\n    @router.api_route('/c', methods=['PUT'])\n    def g(): pass\n"
        "@app.post(os.environ.get('R', '/d'))\ndef h(): pass\n"
        "@app.middleware('http')\ndef i(): pass\n"
    )
    assert sorted(routes(source)) == ["/a", "/b", "/c", "/d"]


@pytest.mark.wheels
@pytest.mark.parametrize(
    ("engine", "module", "known"),
    [
        ("sglang", "sglang/srt/entrypoints/http_server.py", "/generate"),
        ("vllm", "vllm/entrypoints/openai/api_server.py", "/v1/rerank"),
    ],
)
def test_every_route_of_the_released_engines_is_known(
    engine: str, module: str, known: str, engine_sources: Callable[[str], Path]
) -> None:
    found = set(routes((engine_sources(engine) / module).read_text()))
    assert known in found
    assert "/v1/completions" in found
    passing = {path for path in found if is_open({"path": path})}
    assert found - passing == found & GENERATING
    assert len(passing) > 5


def test_no_route_that_generates_is_open() -> None:
    assert not GENERATING & OPEN
