"""`check --watch`: rounds until a verdict is bad, told to people, programs and Prometheus."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from fp8ctl import checkpoint, gate, interpreter
from fp8ctl.check import command, levels, watch
from fp8ctl.check.levels import Request
from fp8ctl.check.verdict import Evidence, LevelReport
from fp8ctl.errors import CheckFailedError
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels.digest import to_text
from fp8ctl.planning import make_plan
from fp8ctl.process import free_port
from fp8ctl.render import Reporter

if TYPE_CHECKING:
    from collections.abc import Iterator

FAKE = Path(__file__).parents[1] / "fake_engine.py"


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the stand-in engine; yield its address and its process."""
    port = free_port("127.0.0.1")
    argv = [sys.executable, str(FAKE), "--port", str(port), "--quantization", "fp8", *arguments]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(500):
            if gate.ask(url).state != "starting":
                break
            time.sleep(0.02)
        yield url, process
    finally:
        process.kill()
        process.wait()


class Watch:
    """`fp8ctl check --watch` as a process of its own, its lines as they come."""

    def __init__(self, url: str, *options: str, every: float = 0.1) -> None:
        argv = [sys.executable, "-m", "fp8ctl", "check", url, "--watch", str(every), *options]
        self.process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k != "NO_PROXY"},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line())
        return found

    def said(self, pattern: str) -> str:
        """Return the first line of talk that has this in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"nothing like {pattern} was said")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_round_is_a_line_and_a_bad_verdict_is_the_end(tmp_path: Path) -> None:
    turn = tmp_path / "state"
    with served("--turn", str(turn)) as (url, _), Watch(url) as seen:
        for number in (1, 2):
            assert re.fullmatch(
                rf"\d\d:\d\d:\d\d  {number}  ok  the live level proves no FP8; "
                r"chat \d+\.\d\d s; took \d+\.\d s",
                seen.line(),
            )
        turn.write_text("failed")
        code, out, err = seen.end()
    assert code == 8
    assert "wrong-weights" in out.splitlines()[-1]
    assert f"error: {url} is wrong-weights: state: failed" in err


def test_with_json_a_round_is_a_document_and_the_last_is_the_error(tmp_path: Path) -> None:
    turn = tmp_path / "state"
    with served("--turn", str(turn)) as (url, _), Watch(url, "--json") as seen:
        first, second = seen.document(), seen.document()
        turn.write_text("unpushed")
        code, out, err = seen.end()
    assert (first["ok"], first["command"]) == (True, "check")
    assert [one["data"]["round"] for one in (first, second)] == [1, 2]
    *_, last = [json.loads(line) for line in out.splitlines()]
    assert (code, last["ok"], last["error"]["id"]) == (8, False, "FP8-CHECK-FAILED")
    assert last["error"]["data"]["verdict"] == "unpushed"
    assert last["error"]["data"]["round"] >= 3
    assert err == ""


def test_an_update_on_its_way_is_no_verdict(tmp_path: Path) -> None:
    turn = tmp_path / "state"
    turn.write_text("updating")
    with served("--turn", str(turn)) as (url, _), Watch(url, "--json") as seen:
        first = seen.document()
        assert first["ok"]
        assert first["data"]["live"]["result"] == "failed", "it is told as it was seen"
        turn.write_text("ready")
        while seen.document()["data"]["live"]["result"] != "ok":
            pass
        turn.write_text("failed")
        assert seen.end()[0] == 8


@pytest.mark.parametrize(
    ("before", "now", "result"),
    [
        ({"state": "ready", "updates": 1}, {"updates": 1}, "failed"),
        ({"state": "ready", "updates": 1}, {"updates": 2}, "skipped"),
        ({"state": "updating", "updates": 1}, {"updates": 1}, "skipped"),
        (None, {}, "failed"),
    ],
)
def test_a_fault_that_an_update_ran_beside_is_not_judged(
    before: object, now: dict[str, object], result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "ask", lambda *_: gate.Answer("ready", gated=True, data=now))
    evidence = (Evidence("chat", "failed", "HTTP 503", "an answer"),)
    live = LevelReport("live", "failed", None, evidence, {"server": before})
    found = levels.assemble(Request("http://127.0.0.1:1"), live, {})
    assert watch._result(found) == result


@pytest.mark.parametrize(("updates", "result"), [(1, "not visible"), (2, "skipped")])
def test_what_a_mixture_of_two_sets_leaves_open_is_not_judged_either(
    updates: int, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the texts were asked of one set and half of the next: no form of FP8 explains it."""
    now = gate.Answer("ready", gated=True, data={"updates": updates})
    monkeypatch.setattr(gate, "ask", lambda *_: now)
    live = LevelReport("live", "ok", None, (), {"server": {"state": "ready", "updates": 1}})
    level = levels.unseen("logprobs", "FP8 of another kind, or a fault of its size")
    found = levels.assemble(Request("http://127.0.0.1:1", "logprobs"), live, {"logprobs": level})
    assert watch._result(found) == result


def test_a_server_that_goes_away_is_the_end(tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    with served() as (url, server), Watch(url, "--report", str(page)) as seen:
        assert "  1  ok  " in seen.line()
        assert ">live: ok</span>" in page.read_text()
        server.kill()
        code, out, err = seen.end()
        assert ">unreachable</span>" in page.read_text(), "the page is of the last round"
    assert code == 8
    assert "unreachable" in out.splitlines()[-1]
    assert "is unreachable" in err
    assert os.listdir(tmp_path) == ["check.html"]


@pytest.mark.usefixtures("interrupts_count")
def test_metrics_are_told_beside_the_rounds() -> None:
    with served() as (url, _), Watch(url, "--metrics", "127.0.0.1:0") as seen:
        at = seen.said(r"metrics: (http://127\.0\.0\.1:\d+/metrics)")
        seen.line()
        seen.line()
        text = httpx.get(at, trust_env=False).text
        assert f'fp8ctl_check_ok{{server="{url}"}} 1.0' in text
        count = re.search(r'checks_total\{[^}]*result="ok"\} (\S+)', text)
        assert count
        assert float(count[1]) >= 2
        seen.process.send_signal(signal.SIGINT)
        assert seen.end()[0] == 130


def test_a_port_for_metrics_that_is_taken_is_busy_before_any_round() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        at = f"127.0.0.1:{other.getsockname()[1]}"
        with Watch("http://127.0.0.1:1", "--metrics", at, "--json") as seen:
            code, out, _ = seen.end()
    assert (code, json.loads(out)["error"]["id"]) == (7, "FP8-BUSY")


@pytest.mark.usefixtures("interrupts_count")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_signal_ends_it_with_130_also_in_the_middle_of_a_round(number: int) -> None:
    # It accepts nobody, so that the first round hangs in its first question.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Watch(url, "--json") as seen:
            connection, _ = listener.accept()
            seen.process.send_signal(number)
            began = time.monotonic()
            code, out, _ = seen.end()
            connection.close()
    assert time.monotonic() - began < 5
    [last] = [json.loads(line) for line in out.splitlines()]
    assert (code, last["error"]["id"]) == (130, "FP8-INTERRUPTED")
    assert last["error"]["message"] == "interrupted in round 1; no verdict was bad in 0 before it"


# --- the weights, round after round ---------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"


class Weights(http.server.BaseHTTPRequestHandler):
    """A server that reports `held` as its weights, three times, and then fails."""

    held: dict[str, Any]
    asked: int

    def answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        state = "ready" if Weights.asked < 3 else "failed"
        about = {"state": state, "message": "", "engine": "fake", "pid": 1, "updates": 0}
        models = {"data": [{"id": "tiny"}]}
        info = {"quantization": "fp8", "model_path": "/nowhere"}
        self.answer(
            {"/fp8ctl/state": about, "/v1/models": models, "/get_server_info": info}.get(
                self.path, {"why": "a stand-in"}
            )
        )

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        message = {"message": {"content": "Paris"}, "text": "Paris"}
        Weights.asked += self.path == "/fp8ctl/report"
        self.answer(self.held if self.path == "/fp8ctl/report" else {"choices": [message]})

    def log_message(self, *_: object) -> None:
        pass


def test_what_the_source_makes_is_computed_once_for_all_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({Q: weight}, model / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    (model / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    plan = make_plan(model, "sglang", Mode.BLOCK, 1, BlockSize(32, 32))
    expected = checkpoint.expected_digests(plan.model, plan)
    shards = [
        {"name": name, "row": 0, "column": 0, "shape": [64, 64] if name == Q else [2, 2],
         "dtype": "float8_e4m3fn" if name == Q else "float32", "digest": to_text(value),
         "primary": True}
        for name, value in expected.items()
    ]  # fmt: skip
    rank = {"rank": 0, "pid": 1, "format": "checkpoint", "unfilled": {}, "tensors": shards}
    rank["seconds"] = {"total": 0.1, "longest": 0.1, "slices": 1}
    state = {"state": "ready", "message": ""}
    Weights.held = {"state": state, "manifest": plan.to_json(), "ranks": [rank]}
    Weights.asked = 0
    runs: list[str] = []
    really = interpreter._run_worker

    def run(python: Path, task: str, *rest: Any) -> dict[str, Any]:
        runs.append(task)
        return really(python, task, *rest)

    monkeypatch.setattr(interpreter, "_run_worker", run)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Weights)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    out = io.StringIO()
    report = Reporter(out=out, err=io.StringIO())
    try:
        with pytest.raises(CheckFailedError, match="wrong-weights"):
            command.run(report, url=url, level="weights", every=0.01)
    finally:
        server.shutdown()
        server.server_close()
    *rounds, last = out.getvalue().splitlines()
    assert len(rounds) == 3
    for number, line in enumerate(rounds, 1):
        assert f"  {number}  fp8-ok  2 tensors of codes and scales equal" in line
    assert "  4  wrong-weights  state: failed" in last
    assert runs == ["expect"]


def test_a_task_is_run_again_where_its_arguments_or_the_files_of_its_model_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def run(_: Path, task: str, *rest: object) -> dict[str, Any]:
        runs.append(task)
        return {"list": []}

    monkeypatch.setattr(interpreter, "_run_worker", run)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    report = Reporter(json_mode=True)

    def ask(task: str = "expect", **more: object) -> dict[str, Any]:
        arguments = {"plan": {"model": str(tmp_path)}, **more}
        return interpreter.run_worker(Path(sys.executable), task, arguments, report, "")

    ask(), ask()
    assert len(runs) == 2, "outside of the block nothing is kept"
    runs.clear()
    with interpreter.remembering("expect"):
        ask()["list"].append("what a caller does to its own copy")
        assert ask() == {"list": []}
        assert len(runs) == 1
        ask("push"), ask("push")
        assert runs == ["expect", "push", "push"], "what was not named"
        ask(other=1)
        assert len(runs) == 4
        os.utime(file, (1, 1))
        ask()
        assert len(runs) == 5
    ask()
    assert len(runs) == 6


def test_of_what_changes_in_every_round_little_is_kept_and_what_does_not_change_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trainer writes its checkpoint anew all the time, and a watch runs for weeks."""
    runs: list[object] = []

    def run(_: Path, task: str, arguments: dict[str, Any], *rest: object) -> dict[str, Any]:
        runs.append(arguments["round"])
        return {"round": arguments["round"]}

    monkeypatch.setattr(interpreter, "_run_worker", run)
    report = Reporter(json_mode=True)

    def ask(round_: object) -> None:
        found = interpreter.run_worker(
            Path(sys.executable), "expect", {"round": round_}, report, ""
        )
        assert found == {"round": round_}

    with interpreter.remembering("expect"):
        for number in range(40):
            ask("every round")
            ask(number)
        kept = interpreter._KEPT.get()
        assert kept is not None
        assert len(kept.results) == interpreter._MOST
        assert runs.count("every round") == 1
        ask(39)
        assert len(runs) == 41, "the last is kept"
        ask(0)
        assert len(runs) == 42, "the first is not"
