"""Ranks are told once which tensors they may copy, and again where they have forgotten it."""

from __future__ import annotations

import pytest

from fp8ctl.engines.hooks.workers import Reloaded
from tests.engines.hooks.pushing import NAMES, Server, error, from_disk, run

pytestmark = pytest.mark.filterwarnings("error")


def test_what_is_verified_may_be_copied_and_is_told_once() -> None:
    async def test() -> None:
        server = Server()
        assert (await server.push("B"))[0] == 200
        assert (await server.push("C"))[0] == 200
        trusted = [d["names"] for d in server.workers.details if "names" in d]
        assert [sorted(names) for names in trusted] == [sorted(NAMES)]
        # After a failure the ranks trust nothing, and are told again.
        server.workers.faults["rank 1"] = "half-way"
        assert (await server.push("D"))[0] == 500
        server.workers.faults.clear()
        assert (await server.push("A"))[0] == 200
        assert server.workers.calls.count("trust") == 2

    run(test())


def test_ranks_that_cannot_be_told_that_are_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        server = Server()
        server.workers.faults["trust"] = RuntimeError("busy")
        assert (await server.push("B"))[0] == 200
        assert (await server.push("C"))[0] == 200
        assert server.workers.calls.count("trust") == 2
        assert server.workers.versions == {"C"}

    run(test())


def test_after_weights_were_given_up_the_ranks_are_told_again_what_they_may_copy() -> None:
    async def test() -> None:
        server = Server()
        await server.push("B")
        async with server.updates.alone("/release_memory_occupation"):
            server.gate.lose("released")
        assert server.gate.describe()["version"] is None
        assert (await server.push("C"))[0] == 200
        assert server.workers.calls.count("trust") == 2

    run(test())


def test_after_a_folder_that_was_rejected_the_ranks_are_told_again_what_they_may_copy() -> None:
    """They trust nothing after a reload of the engine's own, however it ended."""

    async def rejected(path: str) -> Reloaded:
        return Reloaded(False, "no such folder", changed=False)

    async def test() -> None:
        server = Server()
        await server.push("B")
        server.workers.load_from_disk, load = rejected, server.workers.load_from_disk  # type: ignore[method-assign]
        assert error(await from_disk(server, "/C", "C")) == (500, "FP8-LOAD", "ready")
        server.workers.load_from_disk = load  # type: ignore[method-assign]
        await server.connect()
        assert (await server.push("D"))[0] == 200
        assert server.workers.calls.count("trust") == 2

    run(test())
