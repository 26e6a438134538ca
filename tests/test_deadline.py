"""An answer has a time as a whole, however little at a time it comes."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from fp8ctl import gate
from fp8ctl.deadline import Deadline
from tests.broken_server import BRACKETS, DRIPS, FLOODS, serving, whole

if TYPE_CHECKING:
    from pathlib import Path


def test_what_is_watched_is_cut_when_the_time_is_up_and_not_before() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(10)
        began = time.monotonic()
        with Deadline(0.2) as deadline:
            deadline.watch(one)
            assert not deadline.passed
            assert one.recv(1) == b""
        assert 0.15 < time.monotonic() - began < 5
        assert deadline.passed


def test_what_is_watched_late_is_cut_at_once() -> None:
    one, other = socket.socketpair()
    with one, other, Deadline(0.01) as deadline:
        time.sleep(0.1)
        deadline.watch(one)
        assert (deadline.passed, one.recv(1)) == (True, b"")


def test_a_block_that_ends_in_time_leaves_the_connection_and_no_thread() -> None:
    one, other = socket.socketpair()
    before = threading.active_count()
    with one, other:
        with Deadline(0.1) as deadline:
            deadline.watch(one)
        time.sleep(0.2)
        other.sendall(b"x")
        assert (one.recv(1), deadline.passed) == (b"x", False)
    assert threading.active_count() <= before


def test_a_connection_that_is_gone_already_is_no_error() -> None:
    one, other = socket.socketpair()
    one.close()
    with other, Deadline(10) as deadline:
        deadline.watch(one)


@pytest.mark.parametrize("where", DRIPS)
def test_a_server_that_drips_does_not_hold_up_a_question_about_its_state(where: str) -> None:
    with serving(lambda _: DRIPS[where]) as url:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no whole answer within 0\.3 s"):
            gate.get(url, "/health", None, 0.3)
        found = gate.ask(url, None, 0.3)
        assert time.monotonic() - began < 5
    assert (found.state, found.gated) == ("starting", False)
    assert "no whole answer" in found.message


def test_a_server_that_drips_behind_tls_is_cut_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that is wrapped for TLS is another object than the one that was connected."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(lambda _: whole(b"{}"), context) as url:  # the control
        assert gate.get(url, "/x", None, 10.0) == (200, b"{}")
    with serving(lambda _: DRIPS["in chunks"], context) as url:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no whole answer within 1 s"):
            gate.get(url, "/x", None, 1.0)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("where", FLOODS)
def test_of_a_flood_so_much_is_read_as_was_said(where: str) -> None:
    with serving(lambda _: FLOODS[where]) as url:
        status, body = gate.get(url, "/x", None, 30.0, limit=100_000)
    assert (status, len(body)) == (200, 100_000)


def test_a_million_brackets_are_no_state() -> None:
    with serving(lambda _: BRACKETS) as url:
        assert gate.ask(url).data == {}
    with serving(lambda _: whole(b'{"state": "ready"}')) as url:  # the control
        assert gate.ask(url).gated
