"""A client goes where it was told, by itself, and says no more than it should."""

from __future__ import annotations

import http.client
import socket
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import wire
from fp8ctl.errors import ConflictError, EngineFailedError, UsageError
from fp8ctl.push import client, replies
from fp8ctl.push.link import _here
from tests.push.serving import serving
from tests.test_stream import PLAN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def one() -> Iterator[client.Server]:
    with serving(PLAN) as server:
        made = client.Server(server.url, None, 5.0, None)
        yield made
        made.close()


def test_proxies_of_the_environment_are_not_asked(
    one: client.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert one.state()["push"] == wire.PROTOCOL


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://a:1/", "http://a:1"),
        ("http://a/below/", "http://a/below"),
        ("https://[::1]:8/x", "https://[::1]:8/x"),
    ],
)
def test_an_address_is_shown_as_it_is_used(url: str, shown: str) -> None:
    assert client.Server(url, "key", 5.0, None).url == shown


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(UsageError) as e:
        client.Server("http://me:s3cr3t@a:1", None, 5.0, None)
    assert "s3cr3t" not in f"{e.value} {e.value.hint} {e.value.data}"
    with pytest.raises(UsageError) as e:
        client.Server("http://a:1/?api_key=s3cr3t", None, 5.0, None)
    assert "s3cr3t" not in f"{e.value} {e.value.hint} {e.value.data}"


def test_this_hosts_address_is_that_of_the_connection(one: client.Server) -> None:
    assert one.here == ""
    one.state()
    assert one.here == "127.0.0.1"


@pytest.mark.parametrize(
    ("found", "host"),
    [
        (["127.0.0.1"], "127.0.0.1"),
        (["::1", ""], "127.0.0.1"),
        (["127.0.0.1", "10.0.0.5"], "10.0.0.5"),
        (["fd00::5", "127.0.0.1"], "fd00::5"),
    ],
)
def test_servers_of_other_hosts_decide_where_a_group_meets(found: list[str], host: str) -> None:
    servers: Any = [SimpleNamespace(here=one) for one in found]
    assert _here(servers) == host


def test_a_connection_is_kept_and_a_cut_one_refuses_until_it_is_mended(one: client.Server) -> None:
    one.state()
    kept = one._connection
    one.state()
    assert one._connection is kept
    one.cut()
    with pytest.raises(Exception, match="given up"):
        one.state()
    one.mend()
    assert one.state()["state"] == "ready"


@pytest.mark.parametrize("number", [1, 2])
def test_what_follows_a_bucket_goes_by_the_connection_that_the_bucket_does_not_use(
    one: client.Server, number: int
) -> None:
    def by(ask: Callable[[], object]) -> list[bool]:
        one.close()
        with pytest.raises(ConflictError, match="no open update"):
            ask()
        return [line is not None and line._connection is not None for line in (one, one._odd)]

    before, following = (by(partial(one.bucket, "a", n, 0, 0, [])) for n in (number - 1, number))
    assert following == [not used for used in before]
    assert by(partial(one.end, "a", number, [], True)) == following


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_request_leaves_in_one_piece(method: str) -> None:
    """A server that rests wakes for each piece."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        connection = client._Plain("127.0.0.1", 1)
        connection.sock = near
        connection.request(method, "/x", body=b"{}" if method == "POST" else None, headers={})
        piece = far.recv(1 << 16)
        assert piece.startswith(f"{method} /x HTTP/1.1\r\n".encode())
        assert piece.endswith(b"\r\n\r\n" + (b"{}" if method == "POST" else b""))


def test_the_log_is_read_from_where_one_is(one: client.Server) -> None:
    assert one.log(after=0) == {"lines": [], "next": 0}


def test_half_an_answer_is_none_and_is_asked_for_again(
    one: client.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read = http.client.HTTPResponse.read

    def half(self: http.client.HTTPResponse, amount: int | None = None) -> bytes:
        asked.append(amount or 0)
        whole = read(self, amount)
        return whole if len(asked) > 1 else whole[:5]

    monkeypatch.setattr(http.client.HTTPResponse, "read", half)
    assert one.state()["state"] == "ready"
    assert len(asked) == 2
    # Python 3.10 fills as much memory as it is asked for.
    assert max(asked) < 10_000


@pytest.mark.parametrize("body", [None, [], "text", {"error": "text"}, {"error": None}])
def test_an_answer_that_is_none_of_ours_is_an_error_all_the_same(body: object) -> None:
    error = replies.refused("http://a", 502, body, backend="vllm", secret="")
    assert type(error) is EngineFailedError
    assert "502" in str(error)
    assert error.hint


def test_a_key_that_a_server_repeats_is_shown_nowhere() -> None:
    told = {
        "id": "FP8-ENGINE",
        "message": "no s3cr3t",
        "hint": "curl -H s3cr3t URL/x",
        "data": {"headers": [{"Authorization": "Bearer s3cr3t"}], "s3cr3t": 1},
    }
    error = replies.refused("http://a", 500, {"error": told}, backend="vllm", secret="s3cr3t")
    assert "s3cr3t" not in f"{error} {error.hint} {error.data}"
    assert error.data["headers"] == [{"Authorization": "Bearer ***"}]
    assert error.hint == "curl -H *** http://a/x", "what can be typed names the server"
