"""`fp8ctl bench push`: a server is sent what it holds, and serves what it served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl import bench, interpreter, pushbench, wire
from fp8ctl.errors import CheckFailedError, ConflictError, UsageError
from tests.push.serving import serving
from tests.test_pushing import out, plan, push, report, source, write

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.manifest import Plan
    from fp8ctl.render import Reporter

__all__ = ["plan", "report", "source"]  # fixtures


def measure(report: Reporter, url: str | None, **more: Any) -> Any:
    given = {"device": None, "recipe": None, "quick": False, "python": None}
    return bench.run(report, what="push", url=url, push=more, **given)  # type: ignore[arg-type]


def test_the_server_gets_its_own_weights_again_and_every_stage_is_told(
    source: Path, plan: Plan, report: Reporter
) -> None:
    with serving(plan) as server:
        push(report, server.url, model=source, version="step 7")
        before = {name: t.clone() for name, t in server.table.held[0].items()}
        data = measure(report, server.url, updates=2, model=str(source))
        after = server.table.held[0]
        same = [
            torch.equal(after[n].view(torch.uint8), t.view(torch.uint8)) for n, t in before.items()
        ]
        assert all(same)
        assert len(same) == 3
        assert server.gate.describe()["version"] == "step 7"
        assert server.asked.count(wire.END) == 1 + 3
        assert server.asked.count(wire.CONNECT) == 2, "one connection for all"
    assert [one["verified"] for one in data["updates"]] == [3, 3, 3]
    assert set(data["stages"]) >= {"gather", "quantise", "end", "total"}
    total = data["stages"]["total"]
    assert total["best"] <= total["median"] == data["seconds"]
    assert data["gb_s"] == pytest.approx(data["bytes"] / data["seconds"] / 1e9)
    assert data["bytes"] < data["bytes_16_bit"]
    assert "load" in data["loading"]
    assert "2 updates of 3 tensors" in out(report)


def test_what_nobody_knows_is_not_put_in_place_of_what_is_served(
    source: Path, plan: Plan, report: Reporter, tmp_path: Path
) -> None:
    other = write(tmp_path / "other", seed=2)
    with serving(plan) as server:
        push(report, server.url, model=other, version="step 7")
        with pytest.raises(ConflictError, match="version step 7") as e:
            measure(report, server.url)
        assert "--model" in str(e.value.hint)
        server.gate.lose("gone")
        with pytest.raises(ConflictError, match="is unpushed"):
            measure(report, server.url, model=str(other))
        assert server.asked.count(wire.END) == 1


def test_a_server_that_proves_less_is_no_measurement(
    source: Path, plan: Plan, report: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_worker = interpreter.run_worker

    def less(*given: Any) -> Any:
        found = run_worker(*given)
        found["updates"][-1]["verified"] = None
        return found

    monkeypatch.setattr(pushbench, "run_worker", less)
    with serving(plan) as server:
        with pytest.raises(CheckFailedError, match="could not prove") as e:
            measure(report, server.url, updates=1)
        assert server.gate.describe()["version"] == "bench-push"
    assert e.value.data["tensors"] == 3


def test_what_cannot_be_meant_is_refused(report: Reporter) -> None:
    with pytest.raises(UsageError, match="no server was named"):
        measure(report, None)
    with pytest.raises(UsageError, match="unknown benchmark 'kernel http://a:1'"):
        bench.run(
            report,
            what="kernel",
            url="http://a:1",
            device=None,
            recipe="ieee",
            quick=True,
            python=None,
        )
    with pytest.raises(UsageError, match="--via 'post'"):
        measure(report, "http://127.0.0.1:1", via="post")
