"""All ranks of a trainer return together, or raise together; then the next update works."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from fp8ctl import wire
from fp8ctl.stream import quantize_weights
from tests import stream_ranks, two_ranks
from tests.push.serving import Server, serving
from tests.push.test_rollout import holds
from tests.test_stream import planned

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def weights() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in stream_ranks.net().named_parameters()}


def run(tmp_path: Path, good: Server, bad: Server, *cases: str) -> list[tuple[int, Any]]:
    """Run updates with two ranks; return exit status and answers of each."""
    more = (str(tmp_path / "meet"), good.url, bad.url, ",".join(cases))
    return two_ranks.run("tests.push.push_ranks", planned(weights()).to_json(), *more)


def test_ranks_return_and_raise_together(tmp_path: Path) -> None:
    ended = 0

    async def second_end_fails(_: Any) -> Any:
        nonlocal ended
        ended += 1
        error = {"id": "FP8-UNEQUAL", "message": "3 tensors are not what was sent"}
        return (500, {"error": error, "state": "failed"}) if ended == 2 else None

    plan = planned(weights())
    with serving(plan) as good, serving(plan, stock=True) as bad:
        good.faults[wire.END] = second_end_fails
        cases = ("all", "end", "refused", "nan", "raises", "fewer", "async")
        (_, source), (_, other) = run(tmp_path, good, bad, *cases)
        assert good.state == "ready"
        assert holds(good, [*quantize_weights(weights().items(), plan)])
        assert good.asked.count(wire.CONNECT) == 1
    count = len(dict(quantize_weights(weights().items(), plan)))
    assert [one.get("sent") for one in source] == [count, *[None] * 5, count], source
    assert [one.get("sent") for one in other] == [0, *[None] * 5, 0], other
    errors = [(one.get("error"), two.get("error")) for one, two in zip(source, other, strict=True)]
    assert errors[1:-1] == [
        ("CheckFailedError", "CheckFailedError"),
        ("UnsupportedError", "UnsupportedError"),
        ("PlanDoesNotFitError", "PlanDoesNotFitError"),
        ("ConflictError", "OSError"),
        ("ConflictError", "ConflictError"),
    ]
    assert "rank 0 ended" in other[1]["message"]
    assert "3 tensors are not what was sent" in other[1]["message"]
    assert "OSError: rank 1 has trouble" in source[4]["message"]
    # At once, and not after the ranks' time-out.
    assert max(one["seconds"] for one in source + other) < 60


def test_a_cancelled_rank_is_heard_by_a_source_that_waits_for_servers(tmp_path: Path) -> None:
    """Requests in flight may take ten minutes; the group of the ranks works afterwards.

    It is cancelled where it waits for the others, then where it waits for tensors of its own.
    """

    async def requests_run(begin: Any) -> Any:
        if begin["version"] in ("0", "1"):
            await asyncio.sleep(60)
        return None

    plan = planned(weights())
    with serving(plan) as good, serving(plan, stock=True) as bad:
        good.faults[wire.BEGIN] = requests_run
        (_, source), (_, other) = run(tmp_path, good, bad, "cancelled", "awaits", "async")
        assert good.state == "ready"
        assert holds(good, [*quantize_weights(weights().items(), plan)])
    for one, two in zip(source[:2], other, strict=False):
        assert (one.get("error"), two.get("error")) == ("ConflictError", "CancelledError")
        assert "rank 1 ended the stream before its end: CancelledError" in one["message"]
        assert max(one["seconds"], two["seconds"]) < 30
    assert source[2].get("sent")


def test_a_rank_that_is_cancelled_before_its_first_tensor_keeps_nobody_waiting(
    tmp_path: Path,
) -> None:
    """The source looks for the servers then; the others have yet to hear that it has begun."""
    asked = 0

    async def slow_at_first(_: Any) -> Any:
        nonlocal asked
        asked += 1
        await asyncio.sleep(6 if asked == 1 else 0)

    plan = planned(weights())
    with serving(plan) as good, serving(plan, stock=True) as bad:
        good.faults[wire.CONNECT] = slow_at_first
        (_, source), (_, other) = run(tmp_path, good, bad, "early", "async")
        assert good.state == "ready"
    errors = [(one.get("error"), two.get("error")) for one, two in zip(source, other, strict=True)]
    assert errors == [("ConflictError", "CancelledError"), (None, None)]
    assert max(one["seconds"] for one in source + other) < 40


def test_a_rank_that_is_cancelled_when_all_tensors_have_come_keeps_nobody_waiting(
    tmp_path: Path,
) -> None:
    """The others wait for the outcome then: a source tells it, another rank hears it."""
    plan = planned(weights())
    with serving(plan) as good, serving(plan, stock=True) as bad:
        (_, source), (_, other) = run(tmp_path, good, bad, "late-1", "late-0", "async")
        assert good.state == "ready"
        assert holds(good, [*quantize_weights(weights().items(), plan)])
    errors = [(one.get("error"), two.get("error")) for one, two in zip(source, other, strict=True)]
    assert errors == [
        ("ConflictError", "CancelledError"),
        ("CancelledError", "ConflictError"),
        (None, None),
    ]
    assert max(one["seconds"] for one in source + other) < 60


@pytest.mark.long
def test_a_dead_rank_is_an_error_after_the_time_out(tmp_path: Path) -> None:
    plan = planned(weights())
    with serving(plan) as good, serving(plan, stock=True) as bad:
        (_, [answer]), (code, nothing) = run(tmp_path, good, bad, "dead")
        assert (code, nothing) == (7, None)
        assert answer["error"] == "TimeoutError"
        assert good.asked[-2:] == [wire.ABORT, wire.DISCONNECT]
