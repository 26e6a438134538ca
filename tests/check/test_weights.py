"""The weights level beside a server's answers: what is asked, and what is told of it."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import checkpoint
from fp8ctl.check import comparison, weights
from fp8ctl.check.tensors import compare
from fp8ctl.errors import CheckFailedError, NotFoundError, UsageError
from fp8ctl.held import Held
from fp8ctl.render import Reporter
from tests.check.reports import SCALE, Q, held_of, rank, shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fp8ctl.manifest import Plan

    Serve = Callable[[int, object], str]

# --- verify -------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function: status and body of POST /fp8ctl/report -> address of a server."""
    with contextlib.ExitStack() as stack:

        def start(status: int, body: object) -> str:
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    found = self.path == "/fp8ctl/report"
                    key = self.headers.get("Authorization")
                    code = status if found else 404
                    if code == 200 and key not in (None, "Bearer secret"):
                        code = 401
                    data = body if isinstance(body, bytes) else json.dumps(body).encode()
                    self.send_response(code)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

                def log_message(self, *arguments: object) -> None:
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("", 0), Handler))
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


def answer(plan: Plan | None, shards: list[dict[str, object]], **changes: object) -> dict[str, Any]:
    state = {"state": "ready", "message": "", **changes}
    document = plan.to_json() if plan is not None else {}
    return {"state": state, "manifest": document, "ranks": [rank(shards)]}


def reporter() -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(out=out, err=io.StringIO()), out


def test_a_server_is_compared_with_what_the_kernel_makes_of_the_source(
    serve: Serve, plan: Plan, expected: dict[str, int]
) -> None:
    """With the real worker, in a process of its own."""
    shards = [shard(name, value) for name, value in expected.items()]
    report, out = reporter()
    found = weights.verify(serve(200, answer(plan, shards)), None, report, "secret")
    assert (found["result"], found["verdict"]) == ("ok", "fp8-ok")
    assert found["counts"] == {"equal": 8, "different": 0, "missing": 0, "unexpected": 0, "cast": 0}
    assert found["tensors"] == []
    assert found["mode"] == "block"
    assert "weights: 8 of 8 equal in 1 worker (block 32x32)" in out.getvalue()
    assert found["recipe"] == "ieee"
    json.dumps(found)


def test_the_expectation_is_made_under_the_plan_s_recipe(
    serve: Serve, plan: Plan, expected: dict[str, int]
) -> None:
    """With the real worker: powers of two are right where they were planned."""
    powers = replace(plan, recipe="ue8m0")
    held = checkpoint.expected_digests(plan.model, powers)
    report, out = reporter()
    shards = [shard(name, value) for name, value in held.items()]
    found = weights.verify(serve(200, answer(powers, shards)), None, report, None)
    assert (found["verdict"], found["recipe"]) == ("fp8-ok", "ue8m0")
    assert "(block 32x32, ue8m0)" in out.getvalue()
    assert held[SCALE] != expected[SCALE]


def test_a_bit_that_differs_is_told_with_its_place(
    serve: Serve, plan: Plan, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: [value] for name, value in expected.items()}
    monkeypatch.setattr(comparison, "expect", lambda *_: (given, {}))
    shards = [shard(n, value ^ (n == Q)) for n, value in expected.items()]
    report, out = reporter()
    url = serve(200, answer(plan, shards))
    found = weights.verify(url, str(plan.model), report, None)
    assert (found["result"], found["verdict"]) == ("failed", "wrong-weights")
    assert [t["name"] for t in found["tensors"]] == [Q]  # type: ignore[attr-defined]
    row = next(line for line in out.getvalue().splitlines() if line.startswith(Q))
    assert row.split() == [Q, "different", "float8_e4m3fn", "rank", "0"]


def test_a_stock_server_is_not_visible(serve: Serve) -> None:
    found = weights.verify(serve(404, {"detail": "Not Found"}), None, reporter()[0], None)
    assert (found["result"], found["verdict"]) == ("not visible", None)
    assert "no /fp8ctl/report" in str(found["message"])


def test_a_server_that_is_updated_all_the_time_is_no_faulty_one(serve: Serve) -> None:
    said = {"error": "the weights changed 4 times while they were digested", "id": "FP8-BUSY"}
    found = weights.verify(serve(503, said), None, reporter()[0], None)
    assert (found["result"], found["verdict"]) == ("not visible", None)
    assert "the weights changed 4 times" in str(found["message"])


def test_a_server_without_a_plan_is_not_visible(serve: Serve) -> None:
    found = weights.verify(serve(200, answer(None, [])), None, reporter()[0], None)
    assert (found["result"], found["verdict"]) == ("not visible", None)
    assert "started without a plan" in str(found["message"])


def test_weights_in_the_form_of_a_kernel_are_not_visible(serve: Serve, plan: Plan) -> None:
    said = answer(plan, [])
    said["ranks"][0]["format"] = "engine"
    found = weights.verify(serve(200, said), None, reporter()[0], None)
    assert (found["result"], found["verdict"]) == ("not visible", None)
    assert "kernel's format" in str(found["message"])


@pytest.mark.parametrize(
    ("state", "verdict"),
    [("unpushed", "unpushed"), ("failed", "wrong-weights"), ("updating", None)],
)
def test_a_server_that_is_not_ready_is_judged_by_its_state(
    state: str, verdict: str | None, serve: Serve, plan: Plan
) -> None:
    said = answer(plan, [], state=state, message="because")
    found = weights.verify(serve(200, said), None, reporter()[0], None)
    assert (found["result"], found["verdict"]) == ("failed", verdict)
    assert f"{state}: because" in str(found["message"])
    assert found["tensors"] == []


def test_weights_under_names_that_are_not_mapped_are_not_visible(
    serve: Serve, plan: Plan, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: [value] for name, value in expected.items()}
    monkeypatch.setattr(comparison, "expect", lambda *_: (given, {}))
    shards = [shard(n.replace("q_proj", "qkv_proj"), value) for n, value in expected.items()]
    found = weights.verify(serve(200, answer(plan, shards)), None, reporter()[0], None)
    assert (found["result"], found["verdict"]) == ("not visible", None)
    assert "qkv_proj.weight" in str(found["message"])


@pytest.mark.parametrize("status", [401, 500, 503])
def test_a_server_that_refuses_is_a_failed_check_with_its_words(serve: Serve, status: int) -> None:
    url = serve(status, b"out of order")
    with pytest.raises(CheckFailedError, match=f"answers {status}: out of order") as caught:
        weights.verify(url, None, reporter()[0], None)
    assert caught.value.exit_code == 8
    assert url in caught.value.message
    assert caught.value.hint


def test_a_wrong_key_is_not_taken_for_a_stock_server(serve: Serve, plan: Plan) -> None:
    url = serve(200, answer(plan, []))
    with pytest.raises(CheckFailedError, match="answers 401"):
        weights.verify(url, None, reporter()[0], "wrong")


def test_a_server_that_is_gone_is_a_failed_check() -> None:
    with pytest.raises(CheckFailedError, match="does not answer") as caught:
        weights.verify("http://127.0.0.1:1", None, reporter()[0], None)
    assert caught.value.hint == "fp8ctl ps"


def test_a_plan_that_was_edited_is_refused(serve: Serve, plan: Plan) -> None:
    said = answer(plan, [])
    said["manifest"]["tensors"][1]["quantize"] ^= True
    with pytest.raises(UsageError, match="the plan was edited"):
        weights.verify(serve(200, said), None, reporter()[0], None)


def test_a_source_that_is_not_there_is_not_found(serve: Serve, plan: Plan, tmp_path: Path) -> None:
    url = serve(200, answer(plan, []))
    with pytest.raises(NotFoundError) as caught:
        weights.verify(url, str(tmp_path / "absent"), reporter()[0], None)
    assert caught.value.exit_code == 3


def test_a_long_list_of_faults_is_cut_on_the_screen_and_whole_in_the_data(
    plan: Plan, expected: dict[str, int]
) -> None:
    strays = {f"stray.{i}.weight": Held("float8_e4m3fn", i, True, (0, 1)) for i in range(20)}
    given = {name: [value] for name, value in expected.items()}
    lines = compare(plan, given, held_of(expected) | strays)
    report, out = reporter()
    ranks = [{"rank": 0}, {"rank": 1}]
    found = weights._tell(report, plan, lines, "wrong-weights", "why", ranks)
    assert len(found["tensors"]) == 20  # type: ignore[arg-type]
    assert "and 12 more (--json lists them)" in out.getvalue()
    assert "stray.7.weight" in out.getvalue()
    assert "stray.8.weight" not in out.getvalue()
    assert "in 2 workers" in out.getvalue()


@pytest.mark.parametrize("body", ["all is well", {}, [], {"choices": []}])
def test_a_server_that_answers_200_to_anything_proves_nothing(serve: Serve, body: Any) -> None:
    report, _ = reporter()
    found = weights.verify(serve(200, body), None, report, None)
    assert (found["result"], found["verdict"]) == ("not visible", None)
