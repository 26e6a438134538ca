"""A folder is a bucket that the engine's own reload takes."""

from __future__ import annotations

from typing import Any

import pytest

from fp8ctl.engines.hooks.workers import Reloaded
from tests.engines.hooks.pushing import NAMES, Server, error, from_disk, run

pytestmark = pytest.mark.filterwarnings("error")


def test_a_folder_is_a_bucket_and_goes_through_the_engines_own_reload() -> None:
    async def test() -> None:
        server = Server()
        status, ended = await from_disk(server, "/shared/B")
        assert (status, ended["state"]) == (200, "ready")
        assert server.workers.versions == {"B"}
        assert "connect" not in server.workers.calls
        assert "trust" not in server.workers.calls

    run(test())


@pytest.mark.parametrize(("changed", "state"), [(False, "ready"), (True, "failed")])
def test_a_reload_that_fails_closes_the_gate_only_where_it_may_have_written(
    changed: bool, state: str
) -> None:
    async def test() -> None:
        server = Server()

        async def fails(path: str) -> Reloaded:
            return Reloaded(False, f"no such folder: {path}", changed)

        server.workers.load_from_disk = fails  # type: ignore[method-assign]
        answer = await from_disk(server, "/shared/B")
        assert error(answer) == (500, "FP8-LOAD", state)
        assert answer[1]["error"]["message"] == "no such folder: /shared/B"

    run(test())


def test_ranks_are_told_of_a_bucket_what_is_the_same_at_every_update() -> None:
    async def test() -> None:
        server = Server()
        assert (await server.push("B"))[0] == 200
        told = [d["entries"] for d in server.workers.details if "entries" in d]
        assert [entry["name"] for bucket in told for entry in bucket] == NAMES
        assert {tuple(entry) for bucket in told for entry in bucket} == {
            ("name", "dtype", "shape", "offset")
        }

    run(test())


@pytest.mark.parametrize("path", ["relative/B", None, 7])
def test_a_folder_must_be_named_whole(path: Any) -> None:
    async def test() -> None:
        server = Server()
        assert error(await from_disk(server, path)) == (400, "FP8-WIRE", "ready")
        assert "disk" not in server.workers.calls

    run(test())
