"""The versions of a server's log: digests by name, of what may be in place."""

from __future__ import annotations

from typing import Any

from fp8ctl.check.versions import group, pushed


def tensor(name: str, digest: str) -> dict[str, Any]:
    return {"kind": "tensor", "name": name, "digest": digest}


def update(version: str, outcome: str = "applied") -> dict[str, Any]:
    return {"kind": "update", "version": version, "outcome": outcome}


def test_each_update_has_the_tensors_in_front_of_it() -> None:
    lines = [tensor("a", f"{1:016x}"), tensor("b", ""), update("1"), tensor("a", f"{2:016x}")]
    lines += [update("2")]
    assert [(v.name, dict(v.digests)) for v in group(lines)] == [
        ("version 1", {"a": 1}),
        ("version 2", {"a": 2}),
    ]


def test_what_broke_off_may_be_in_place_and_what_was_rejected_is_not() -> None:
    lines = [tensor("a", f"{1:016x}"), update("1", "failed")]
    lines += [tensor("a", f"{2:016x}"), update("2", "rejected")]
    assert [v.name for v in group(lines)] == ["version 1, which broke off"]


def test_a_server_without_a_log_has_no_versions() -> None:
    assert pushed("http://127.0.0.1:1", None) == []
