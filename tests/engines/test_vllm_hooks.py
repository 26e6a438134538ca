"""What fp8ctl puts around vLLM: its routes, and (with the real classes) its worker."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from fp8ctl.engines.hooks import loaded
from fp8ctl.engines.hooks.gate import Gate
from fp8ctl.engines.hooks.vllm_server import CODE, REPORT, STATE, UPDATE, Control

COMPLETE = {
    "rank": 0,
    "loaded": 3,
    "error": "",
    "broken": False,
    "unfilled": {},
    "missing": [],
    "missing_count": 0,
}
MANIFEST = {"mode": "block", "tensors": [{"name": "a.weight", "quantize": True}]}


class Workers:
    """Stands in for AsyncLLM: one answer per rank, and a note of every call."""

    def __init__(self, *answers: dict[str, Any], busy: int = 0) -> None:
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.resets = 0
        self.busy = busy
        self.output_processor = self

    def has_unfinished_requests(self) -> bool:
        self.busy -= 1
        return self.busy >= 0

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        if method == "fp8ctl_load_from_disk":
            assert self.busy < 0, "requests of the old weights still run"
        self.calls.append((method, args))
        return list(self.answers)

    async def reset_prefix_cache(self) -> None:
        self.resets += 1


class Server:
    """The gate and the routes over a server that answers 200 to everything."""

    def __init__(self, workers: Workers, *, await_push: bool = True, key: str = "") -> None:
        self.gate = Gate(engine="vllm", engine_version="0.9.1", await_push=await_push)
        self.workers = workers

        async def engine_app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b'"answer"'})

        self._app = self.gate.wrap(Control(engine_app, self.gate, MANIFEST, key or None))

    def ask(self, method: str, path: str, body: object = None, key: str = "") -> tuple[int, Any]:
        sent: list[Any] = []
        app = SimpleNamespace(state=SimpleNamespace(engine_client=self.workers))
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "app": app}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        async def call() -> None:
            await self._app(scope, receive, send)

        asyncio.run(call())
        return sent[0]["status"], json.loads(sent[1]["body"])

    def update(self) -> tuple[int, Any]:
        return self.ask("POST", UPDATE, {"model_path": "/b"})

    @property
    def state(self) -> str:
        return str(self.ask("GET", STATE)[1]["state"])


def test_a_complete_update_opens_the_gate_and_forgets_the_prefix_cache() -> None:
    workers = Workers(COMPLETE, {**COMPLETE, "rank": 1})
    server = Server(workers)
    assert server.state == "unpushed"
    assert server.ask("POST", "/v1/completions")[0] == 503
    assert server.update() == (200, {"success": True, "message": "", "missing": 0})
    names = ["a.weight", "a.weight_scale_inv"]
    assert workers.calls == [("fp8ctl_load_from_disk", ("/b", names))]
    assert workers.resets == 1
    assert server.state == "ready"
    assert server.ask("POST", "/v1/completions") == (200, "answer")


def test_a_part_of_the_weights_leaves_the_gate_closed() -> None:
    part = {**COMPLETE, "unfilled": {"x.weight": "rows 0-3 of 4"}}
    server = Server(Workers(COMPLETE, part))
    status, answer = server.update()
    assert status == 200
    assert answer["missing"] == 1
    assert "x.weight" in answer["message"]
    assert server.state == "unpushed"


def test_a_server_with_weights_takes_a_part() -> None:
    workers = Workers(COMPLETE)
    server = Server(workers, await_push=False)
    server.update()
    assert workers.calls == [("fp8ctl_load_from_disk", ("/b", []))]
    assert server.state == "ready"


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ([{**COMPLETE, "error": "E", "broken": True}], "failed"),
        ([COMPLETE, {**COMPLETE, "error": "E"}], "failed"),  # the ranks differ now
        ([{**COMPLETE, "error": "E"}], "ready"),  # nothing was changed
    ],
)
def test_an_error_closes_the_gate_only_where_weights_may_be_mixed(
    answers: list[dict[str, Any]], state: str
) -> None:
    server = Server(Workers(*answers), await_push=False)
    status, answer = server.update()
    assert (status, answer["success"]) == (400, False)
    assert "rank 0: E" in answer["message"]
    assert server.state == state


def test_an_update_waits_for_the_requests_that_run() -> None:
    workers = Workers(COMPLETE, busy=3)
    assert Server(workers).update()[0] == 200
    assert workers.busy < 0


@pytest.mark.parametrize("body", [None, [], {}, {"model_path": 3}])
def test_a_request_that_names_no_folder_changes_nothing(body: object) -> None:
    workers = Workers(COMPLETE)
    server = Server(workers, await_push=False)
    assert server.ask("POST", UPDATE, body)[0] == 400
    assert workers.calls == []
    assert server.state == "ready"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", STATE), ("GET", CODE), ("POST", REPORT), ("POST", UPDATE)]
)
def test_the_key_guards_every_route_of_fp8ctl(method: str, path: str) -> None:
    workers = Workers(COMPLETE)
    server = Server(workers, key="secret")
    body = {"model_path": "/b"}
    assert server.ask(method, path, body)[0] == 401
    assert server.ask(method, path, body, key="wrong")[0] == 401
    assert workers.calls == []
    assert server.ask(method, path, body, key="secret")[0] == 200


def test_a_report_carries_state_plan_and_ranks() -> None:
    server = Server(Workers({"rank": 0, "tensors": []}), await_push=False)
    status, answer = server.ask("POST", REPORT)
    assert status == 200
    assert answer["state"]["state"] == "ready"
    assert answer["manifest"] == MANIFEST
    assert answer["ranks"] == [{"rank": 0, "tensors": []}]
    broken = Server(Workers({"rank": 0, "error": "E"}))
    assert broken.ask("POST", REPORT) == (500, {"error": "rank 0: E"})


def test_every_process_is_asked_for_its_code_also_while_the_gate_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(Workers())
    server.gate.ranks = 2
    monkeypatch.setattr(loaded, "everyone", lambda ranks: {"ranks": ranks})
    assert server.state == "unpushed"
    assert server.ask("GET", CODE) == (200, {"ranks": 2})


def test_other_routes_of_fp8ctl_do_not_reach_the_engine() -> None:
    assert Server(Workers()).ask("POST", STATE)[0] == 404
    assert Server(Workers()).ask("GET", "/health") == (200, "answer")
