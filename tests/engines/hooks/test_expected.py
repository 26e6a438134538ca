"""What comes is compared with the plan before any rank is asked to load it."""

from __future__ import annotations

import pytest

from tests.engines.hooks.pushing import Server, error, push_16_bits, run

pytestmark = pytest.mark.filterwarnings("error")


def test_the_first_of_many_wrong_tensors_is_named_and_the_others_are_counted() -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        answer = await server.bucket(0, ["x.weight", "y.weight", "norm.weight"])
        told = answer[1]["error"]
        assert told["message"] == "x.weight: the server's plan has no such tensor, and 1 more"
        assert told["data"] == {"names": ["x.weight", "y.weight"], "count": 2}
        assert "receive" not in server.workers.calls

    run(test())


def test_an_engine_that_quantises_itself_takes_floats_under_any_name() -> None:
    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        # Names that no parameter has: the engine calls its own otherwise.
        status, ended = await push_16_bits(server, ["embed.weight", "new.weight"], "B")
        assert (status, ended["verified"], ended["state"]) == (200, None, "ready")
        await server.begin("C")
        answer = await server.bucket(0, ["a.weight"], "C")
        assert error(answer) == (422, "FP8-TENSOR", "ready")

    run(test())
