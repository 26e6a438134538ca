"""A list that comes again is told by its name, and refused where it would be refused at first."""

from __future__ import annotations

from typing import Any

import pytest

from fp8ctl.engines.hooks.refused import RefusedError
from tests.engines.hooks.pushing import NAMES, TENSORS, Server, entries, error, run
from tests.engines.hooks.receiving import NORM, serve, servers
from tests.engines.hooks.receiving import Server as Ranks
from tests.engines.hooks.test_shards import checkpoint

__all__ = ["servers"]  # a fixture

pytestmark = pytest.mark.filterwarnings("error")


def told(server: Server) -> list[bool]:
    """Return of each bucket since the last look whether the ranks were told what lies in it."""
    found = ["entries" in d for d in server.workers.details if "slot" in d]
    server.workers.details.clear()
    return found


def test_ranks_are_told_once_and_again_where_anything_is_another() -> None:
    async def test() -> None:
        server = Server()
        for version, new in (("B", [True, True]), ("C", [False, False])):
            assert (await server.push(version))[0] == 200
            assert told(server) == new
        # Another order of the first bucket; the second is as it was.
        await server.begin("D")
        assert (await server.bucket(0, NAMES[1::-1], "D"))[0] == 200
        assert (await server.bucket(1, NAMES[2:], "D"))[0] == 200
        assert (await server.end(2, "D"))[1]["verified"] == len(NAMES)
        assert told(server) == [True, False]
        # Another place, another dtype.
        for push, change in (("E", {"offset": 1024}), ("F", {"offset": 1024, "dtype": "float32"})):
            await server.begin("A", push=push)
            assert (await server.bucket(0, NAMES[:1], "A", push=push, **change))[0] == 200
            assert told(server) == [True]
            await server.post("/fp8ctl/push/abort", push=push)

    run(test())


@pytest.mark.parametrize("lost", ["rank 1", "receive", "connect"])
def test_ranks_that_may_have_forgotten_are_told_again(
    lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        server = Server()
        await server.push("B")
        if lost == "connect":
            await server.connect()
        else:
            fault: Any = RuntimeError("silent") if lost == "receive" else "no carrier"
            server.workers.faults[lost] = fault
            assert (await server.push("C"))[0] == 500
            server.workers.faults.clear()
        told(server)
        assert (await server.push("D"))[0] == 200
        assert told(server) == [True, True]

    run(test())


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"digest": 7}, (400, "FP8-WIRE")),
        ({"facts": 7}, (400, "FP8-WIRE")),
        ({"offset": 256 * 1000000}, (400, "FP8-WIRE")),
        ({"shape": [4, 8]}, (422, "FP8-TENSOR")),
        ({"name": "nobody.knows"}, (422, "FP8-TENSOR")),
    ],
)
def test_a_list_that_was_taken_opens_no_way_for_what_would_be_refused(
    change: dict[str, Any], refusal: tuple[int, str]
) -> None:
    async def test() -> None:
        server = Server()
        await server.push("B")
        await server.begin("C")
        assert error(await server.bucket(0, NAMES[:2], "C", **change))[:2] == refusal

    run(test())


def test_what_was_sent_before_in_this_update_is_refused_also_in_a_list_that_is_known() -> None:
    async def test() -> None:
        server = Server()
        await server.push("B")
        await server.begin("C")
        await server.bucket(0, NAMES[1:], "C")
        assert error(await server.bucket(1, NAMES[2:], "C"))[:2] == (422, "FP8-TENSOR")

    run(test())


def test_digests_and_facts_are_those_of_this_update() -> None:
    lists = Server().updates._lists
    for version in "BC":
        listed: list[Any] = entries(version, NAMES, facts={"amax": ord(version)})
        found = {"number": 0, "slot": 0, "nbytes": 1 << 20, "entries": listed}
        read = lists.read(found, {})
        assert [one.digest for one in read] == [one["digest"] for one in listed]
        assert [one.shape for one in read] == [shape for _, shape in TENSORS.values()]
        assert read[0].facts == {"amax": ord(version)}
    with pytest.raises(RefusedError):
        lists.read(found, {NAMES[0]: read[0]})


def test_a_rank_loads_by_name_only_what_it_was_told_under_it(
    servers: list[Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = checkpoint("block")
    server = serve(servers, whole)
    [rank, *_] = server.ranks
    asked = server.write([(NORM, whole[NORM])]) | {"number": 0, "list": "one"}
    named = {k: v for k, v in asked.items() if k != "entries"}
    assert "not known" in rank.answer("receive", named)["error"]
    assert not rank.answer("receive", asked)["error"]
    assert rank.answer("receive", named)["loaded"] == 1
    for other in ({"list": "two"}, {"number": 1}, {"nbytes": asked["nbytes"] + 256}):
        assert "not known" in rank.answer("receive", named | other)["error"]
        assert not rank.broken
        rank.answer("receive", asked)
    # What failed has been forgotten with the views: nothing may use the carrier's memory.
    rank.answer("receive", named | {"slot": 7})
    assert "not known" in rank.answer("receive", named)["error"]
    capsys.readouterr()
