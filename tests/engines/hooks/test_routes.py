"""The push routes over HTTP: what is no request of a push, and what is none at all."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fp8ctl import wire
from fp8ctl.engines.hooks import routes
from fp8ctl.engines.hooks.refused import RefusedError
from tests.engines.hooks.pushing import NAMES, Server


def ask(server: Server, method: str, path: str, body: bytes = b"", query: str = "") -> Any:
    return asyncio.run(server.http(method, path, body, query=query))


def test_what_is_no_route_of_a_push_is_passed_on() -> None:
    assert ask(Server(), "POST", "/generate") == (200, "text")
    assert ask(Server(), "GET", "/fp8ctl/state") == (200, "text")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/fp8ctl/push/beginning"), ("GET", wire.BEGIN), ("POST", wire.LOG)],
)
def test_an_unknown_route_below_the_pushes_never_reaches_the_engine(method: str, path: str) -> None:
    status, answer = ask(Server(), method, path, b"{}")
    assert (status, answer["error"]["id"]) == (404, "FP8-WIRE")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"\xff", b'{"push": 1}', b"{}"])
@pytest.mark.parametrize(
    "path", [wire.CONNECT, wire.DISCONNECT, wire.BEGIN, wire.BUCKET, wire.END, wire.ABORT]
)
def test_no_body_is_a_fault_of_ours(path: str, body: bytes) -> None:
    server = Server()
    status, answer = ask(server, "POST", path, body)
    assert status in {400, 404, 409}
    assert answer["error"]["id"] in {"FP8-WIRE", "FP8-ORDER", "FP8-CONNECTION"}
    assert answer["state"] == server.state == "ready"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slot", None),
        ("slot", "0"),
        ("nbytes", 1.5),
        ("nbytes", None),
        ("entries", {}),
        ("entries", [7]),
        ("entries", None),
    ],
)
def test_a_bucket_with_a_field_of_another_kind_is_refused(name: str, value: object) -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        body = {"push": "push-B", "number": 0, "slot": 0, "nbytes": 64, "entries": [], name: value}
        status, answer = await server.post(wire.BUCKET, **body)
        assert (status, answer["error"]["id"], answer["state"]) == (400, "FP8-WIRE", "ready")

    asyncio.run(test())


@pytest.mark.parametrize("skipped", [None, "a.weight", [7]])
def test_an_end_with_skipped_of_another_kind_is_refused_and_may_be_sent_again(
    skipped: object,
) -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        await server.bucket(0, NAMES)
        assert (await server.end(1, skipped=skipped))[0] == 400
        assert (await server.end(1))[0] == 200

    asyncio.run(test())


def test_a_body_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_BODY", 10)
    status, answer = ask(Server(), "POST", wire.BEGIN, b" " * 11)
    assert (status, answer["error"]["id"]) == (413, "FP8-WIRE")


def test_a_body_comes_in_parts() -> None:
    parts = [{"type": "http.request", "body": p, "more_body": m} for p, m in ((b"{", 1), (b"}", 0))]

    async def receive() -> Any:
        return parts.pop(0)

    assert asyncio.run(routes.read_body(receive, 2)) == b"{}"
    parts = [{"type": "http.request", "body": b"123", "more_body": True}]
    with pytest.raises(RefusedError, match="more than 2 bytes"):
        asyncio.run(routes.read_body(receive, 2))


def test_a_fault_of_ours_is_an_answer_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(found: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(wire, "check_protocol", broken)
    status, answer = ask(Server(), "POST", wire.CONNECT, b"{}")
    assert (status, answer["error"]["id"]) == (500, "FP8-INTERNAL")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_below_a_root_the_routes_are_the_same() -> None:
    server = Server()
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/llm" + wire.END, "root_path": "/llm"}
    asyncio.run(routes.PushRoutes(server._engine, server.updates)(scope, receive, send))
    assert json.loads(sent[1]["body"])["error"]["id"] == "FP8-ORDER"
