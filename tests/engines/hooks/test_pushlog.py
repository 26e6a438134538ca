"""The flight recorder in the server: what is written, how much of it, and how it is read."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import time
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import wire
from fp8ctl.engines.hooks import session
from fp8ctl.engines.hooks.pushlog import PushLog
from tests.engines.hooks.pushing import NAMES, Server, digest, until

if TYPE_CHECKING:
    from pathlib import Path


def lines(*numbers: int) -> list[dict[str, object]]:
    return [{"kind": "update", "number": n} for n in numbers]


def write(log: PushLog, found: list[dict[str, object]]) -> None:
    log.later(found)
    log.settle()


def numbers(found: list[Any]) -> list[int]:
    return [line["number"] for line in found]


def read(server: Server, query: str = "") -> Any:
    return asyncio.run(server.http("GET", wire.LOG, query=query))


def test_an_update_leaves_a_line_of_each_tensor_and_one_of_its_own(tmp_path: Path) -> None:
    server = Server(tmp_path)

    async def push() -> None:
        await server.begin("B", digests=True)
        await server.bucket(0, NAMES[1:])
        assert (await server.end(1, skipped=NAMES[:1]))[0] == 200

    asyncio.run(push())
    status, answer = read(server)
    assert (status, answer["next"]) == (200, 5)
    *tensors, update = answer["lines"]
    assert [(t["name"], t["sent"], t["bytes"]) for t in tensors] == [
        ("a.weight", True, 16),
        ("a.weight_scale_inv", True, 16),
        ("norm.weight", True, 8),
        ("embed.weight", False, 0),
    ]
    assert tensors[0]["digest"] == digest("B", "a.weight")
    assert tensors[0]["before"] == digest("A", "a.weight")
    assert (tensors[0]["version"], tensors[0]["amax"]) == ("B", 1.0)
    assert tensors[3]["digest"] == tensors[3]["before"] == digest("A", "embed.weight")
    assert {"hold", "digests", "load", "settle", "verify", "resume"} == set(update["seconds"])
    assert (update["push"], update["version"], update["outcome"]) == ("push-B", "B", "applied")
    assert (update["tensors"], update["skipped"], update["bytes"]) == (3, 1, 40)
    assert update["buckets"] == 1
    assert update["started"] <= update["ended"]


@pytest.mark.parametrize(("buckets", "outcome"), [(0, "rejected"), (1, "failed")])
def test_an_update_that_broke_off_is_told_too(buckets: int, outcome: str, tmp_path: Path) -> None:
    server = Server(tmp_path)

    async def push() -> None:
        await server.begin()
        for _ in range(buckets):
            await server.bucket(0, NAMES[:1])
        await server.abort()

    asyncio.run(push())
    update = read(server)[1]["lines"][-1]
    assert (update["outcome"], update["message"]) == (outcome, "aborted: tired")


def test_facts_of_the_client_do_not_replace_what_the_server_knows(tmp_path: Path) -> None:
    server = Server(tmp_path)

    async def push() -> None:
        await server.begin(complete=False)
        await server.bucket(0, NAMES[3:], facts={"kind": "lie", "bytes": 7, "saturated": 2})
        await server.end(1)

    asyncio.run(push())
    line = read(server)[1]["lines"][0]
    assert (line["kind"], line["bytes"], line["saturated"]) == ("tensor", 8, 2)


def test_the_log_is_its_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write(PushLog(tmp_path), lines(0))
    finally:
        os.umask(old)
    assert (tmp_path / "push-log.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_reader_goes_on_where_it_was(tmp_path: Path) -> None:
    log = PushLog(tmp_path)
    assert log.read(0) == ([], 0)
    write(log, lines(0, 1, 2))
    found, following = log.read(0, most=2)
    assert (numbers(found), following) == ([0, 1], 2)
    found, following = log.read(following)
    assert (numbers(found), following) == ([2], 3)
    assert log.read(3) == ([], 3)
    assert log.read(99) == ([], 3)  # of a server that ran before
    write(log, lines(3))
    assert numbers(log.read(3)[0]) == [3]


def test_at_its_limit_the_log_keeps_the_newest_lines_under_their_numbers(tmp_path: Path) -> None:
    log = PushLog(tmp_path, limit=100)
    for n in range(0, 40, 2):
        write(log, lines(n, n + 1))
        files = list(tmp_path.iterdir())
        assert len(files) <= 2
        assert all(f.stat().st_size < 200 for f in files)
        found, following = log.read(0)
        assert following == n + 2
        assert numbers(found) == list(range(numbers(found)[0], n + 2))
        assert numbers(log.read(n + 1)[0]) == [n + 1]
    assert numbers(log.read(0)[0])[0] > 30


def test_a_disk_that_is_full_costs_the_lines_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = PushLog(tmp_path)
    write(log, lines(0))
    size = log.path.stat().st_size if log.path else 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        write(log, lines(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in capsys.readouterr().err
    write(log, lines(2))
    assert numbers(log.read(0)[0]) == [0, 2]


def test_without_a_run_folder_there_is_no_log() -> None:
    server = Server()
    asyncio.run(server.push())
    assert read(server) == (200, {"lines": [], "next": 0})


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=%C2%B2", f"after={10**30}"])
def test_a_place_that_is_no_number_is_refused(query: str) -> None:
    status, answer = read(Server(), query)
    assert (status, answer["error"]["id"]) == (400, "FP8-WIRE")


def test_lines_are_written_when_the_client_has_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make them takes longer than all else of an END; whoever reads waits for it."""
    monkeypatch.setattr(session, "ANSWERED", 60.0)
    server = Server(tmp_path)
    log = server.updates.log
    assert log.path is not None

    async def push() -> None:
        assert (await server.push("B"))[0] == 200
        ended = time.time()
        assert not log.path.exists()  # type: ignore[union-attr]
        found = (await server.http("GET", wire.LOG))[1]["lines"]
        assert [line["kind"] for line in found] == ["tensor"] * 4 + ["update"]
        assert found[-1]["ended"] <= ended, "it is the update's end, not the line's"
        assert len(log.path.read_text().splitlines()) == 5  # type: ignore[union-attr]
        await server.push("C")
        # Nobody reads it; the server ends.

    asyncio.run(push())
    assert len(log.path.read_text().splitlines()) == 10


def test_lines_come_without_a_reader_too(tmp_path: Path) -> None:
    server = Server(tmp_path)

    async def push() -> None:
        await server.push("B")
        path = server.updates.log.path
        await until(lambda: path is not None and path.exists())

    asyncio.run(push())


def test_updates_that_follow_each_other_at_once_are_logged_in_their_order(tmp_path: Path) -> None:
    server = Server(tmp_path)

    async def push() -> None:
        for version in "BCD":
            assert (await server.push(version))[0] == 200
        await server.begin("A")
        await server.bucket(0, NAMES[:1], "A")
        await server.abort("A")

    asyncio.run(push())
    found = read(server)[1]["lines"]
    assert [(line["kind"], line["version"]) for line in found] == [
        *(one for v in "BCD" for one in [*[("tensor", v)] * 4, ("update", v)]),
        *[("tensor", "A"), ("update", "A")],
    ]
    assert [line["digest"] for line in found if line["kind"] == "tensor"][:-1] == [
        digest(v, name) for v in "BCD" for name in NAMES
    ]
    ended = [line["ended"] for line in found if line["kind"] == "update"]
    assert ended == sorted(ended)
