"""`push-log`: updates from lines, and what differs between two versions."""

from __future__ import annotations

import http.server
import io
import json
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from fp8ctl import history, wire
from fp8ctl.errors import NotFoundError, NotPermittedError, UsageError
from fp8ctl.render import Reporter
from tests.e2e.conftest import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

A, B = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
Json = dict[str, Any]


def tensor(name: str, version: str, digest: str, *, sent: bool = True, **facts: float) -> Json:
    return {
        "kind": "tensor",
        "version": version,
        "name": name,
        "sent": sent,
        "digest": digest,
        "before": "",
        "bytes": 100 if sent else 0,
        **facts,
    }


def update(version: str, outcome: str = "applied", size: int = 200) -> Json:
    return {
        "kind": "update",
        "push": f"p-{version}",
        "version": version,
        "outcome": outcome,
        "tensors": 2,
        "skipped": 0,
        "bytes": size,
        "buckets": 1,
        "seconds": {"load": 0.1},
        "started": 1_700_000_000.0,
        "ended": 1_700_000_002.0,
        "message": "",
    }


LINES = [
    tensor(A, "v1", "a1", amax=2.0, saturated=0.0),
    tensor(B, "v1", "b1", amax=1.0),
    update("v1"),
    # Broke off: none of it counts.
    tensor("broken.weight", "v2", "bad"),
    update("v2", "failed"),
    # A delta: the norm is there already.
    tensor(A, "v2", "a2", amax=3.0, saturated=4.0),
    tensor(B, "v2", "b1", sent=False),
    update("v2", size=100),
    # Of an update whose writer was killed.
    tensor(A, "v3", "a3"),
]


@pytest.fixture
def report() -> Reporter:
    return Reporter(out=io.StringIO(), err=io.StringIO())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "record.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def out(report: Reporter) -> str:
    stream = report._out
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_a_log_is_a_row_for_each_update_that_ended(report: Reporter, file: Path) -> None:
    data = history.run(report, source=str(file))
    updates: Any = data["updates"]
    assert [(u["version"], u["outcome"]) for u in updates] == [
        ("v1", "applied"),
        ("v2", "failed"),
        ("v2", "applied"),
    ]
    head, *rows = out(report).splitlines()
    assert head.split() == list(history._COLUMNS)
    assert len(rows) == 3
    assert rows[0].split()[-5:] == ["200", "B", "2.00", "100", "B/s"]


def test_versions_differ_in_what_was_applied_and_in_nothing_else(
    report: Reporter, file: Path
) -> None:
    data: Any = history.run(report, source=str(file), versions=("v1", "v2"))
    by_name = {one["name"]: one for one in data["tensors"]}
    assert by_name[A]["changed"] is True
    assert set(by_name) == {A, B}, "the update that failed does not count"
    assert by_name[A]["digests"] == ["a1", "a2"]
    assert (by_name[A]["amax"], by_name[A]["saturated"]) == ([2.0, 3.0], [0.0, 4.0])
    assert by_name[B]["changed"] is False
    assert by_name[B]["amax"] == [1.0, 1.0], "known from when it was sent"
    assert data["counts"] == {"changed": 1, "unchanged": 1, "unknown": 0}
    assert data["bytes"] == 100
    assert "v1 -> v2: 1 tensor of 2 changed, 1 did not; 100 B sent" in out(report)
    back: Any = history.run(report, source=str(file), versions=("v2", "v1"))
    assert back["counts"] == data["counts"]


def test_a_part_that_was_pushed_stands_on_what_was_there_before(report: Reporter) -> None:
    lines = [*LINES[:3], tensor(A, "v2", "a2"), update("v2")]
    state = history.held(history.group(lines), "v2")
    assert {name: line["digest"] for name, line in state.items()} == {A: "a2", B: "b1"}


def test_without_digests_nobody_knows_what_changed() -> None:
    lines = [tensor(A, "v1", ""), update("v1"), tensor(A, "v2", "a2"), update("v2")]
    updates = history.group(lines)
    [found] = history.differences(history.held(updates, "v1"), history.held(updates, "v2"))
    assert found["changed"] is None


def test_a_version_that_is_not_there_is_refused_with_those_that_are(
    report: Reporter, file: Path
) -> None:
    with pytest.raises(NotFoundError, match="'v3' is not in the log; there is v1, v2"):
        history.run(report, source=str(file), versions=("v1", "v3"))


def test_half_a_line_is_a_writer_that_was_killed(report: Reporter, file: Path) -> None:
    with file.open("a") as log:
        log.write('{"kind": "upda\n' + json.dumps(update("v4")) + '\n{"ki')
    data: Any = history.run(report, source=str(file))
    assert [u["version"] for u in data["updates"]] == ["v1", "v2", "v2", "v4"]


def test_what_a_killed_update_left_is_not_taken_for_the_next_one_s(file: Path) -> None:
    killed = [tensor(A, "v3", "a3"), tensor(B, "v3", "b3")]
    lines = [{**line, "push": "p-killed"} for line in killed]
    lines += [{**tensor(A, "v4", "a4"), "push": "p-v4"}, update("v4")]
    [one] = history.group(lines)
    assert set(one.tensors) == {A}


@pytest.mark.parametrize("text", ["no JSON\n{}\n", "[1]\n", "\xff\n"])
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, report: Reporter, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match="has no line of a log"):
        history.run(report, source=str(path))


def test_a_file_that_is_not_there_is_told(tmp_path: Path, report: Reporter) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        history.run(report, source=str(tmp_path / "gone"))


class Pages(http.server.BaseHTTPRequestHandler):
    """The log route of a server that gives two lines at a time."""

    key = ""

    def do_GET(self) -> None:
        at = urlsplit(self.path)
        if at.path != wire.LOG:
            self.answer(404, {"detail": "Not Found"})
        elif self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            self.answer(401, {"error": "Unauthorized"})
        else:
            after = int(parse_qs(at.query)["after"][0])
            lines = LINES[after : after + 2]
            self.answer(200, {"lines": lines, "next": after + len(lines)})

    def answer(self, status: int, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()
    served.server_close()


def test_a_server_s_log_is_read_to_its_end(report: Reporter, server: str, file: Path) -> None:
    by_http = history.run(report, source=f"{server}/")
    assert by_http["url"] == server
    assert by_http["updates"] == history.run(report, source=str(file))["updates"]


def test_a_server_without_the_route_or_the_right_key_says_what_to_do(
    report: Reporter, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="has no log of updates") as caught:
        history.run(report, source=f"{server}/elsewhere")
    assert "fp8ctl launch" in str(caught.value.hint)
    monkeypatch.setattr(Pages, "key", "s3cret")
    with pytest.raises(NotPermittedError, match="wants an API key") as refused:
        history.run(report, source=server)
    assert "FP8CTL_API_KEY" in str(refused.value.hint)
    monkeypatch.setenv("FP8CTL_API_KEY", "s3cret")
    assert history.run(report, source=server)["updates"]


def test_nobody_at_an_address_is_told(report: Reporter) -> None:
    with pytest.raises(NotFoundError, match="does not answer"):
        history.run(report, source=f"http://127.0.0.1:{free_port()}")
