"""Every update leaves its lines, whole, and in the words of the server's own log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8ctl.errors import NotPermittedError, PlanDoesNotFitError
from fp8ctl.kernels.digest import digest, to_text
from fp8ctl.push import Rollout
from tests.push.serving import serving
from tests.push.test_rollout import CHANGED, quantised
from tests.test_stream import PLAN, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.1.mlp.up_proj.weight"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_every_tensor_and_update_as_the_server_has_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "updates.jsonl"
    with (
        serving(PLAN, folder=tmp_path) as server,
        Rollout(server.url, PLAN, record=path, bucket_bytes=9000) as rollout,
    ):
        first = rollout.update(WEIGHTS.items(), "A")
        rollout.update({**WEIGHTS, NAME: CHANGED[NAME]}.items(), "B")
        [mine] = rollout._servers
        theirs = mine.log()["lines"]
    found = lines(path)
    assert [one["kind"] for one in found] == [*["tensor"] * 19, "update"] * 2
    for old, new in ((WEIGHTS, WEIGHTS), (WEIGHTS, {**WEIGHTS, NAME: CHANGED[NAME]})):
        before = {n: to_text(digest(t)) for n, t in quantised(old)}
        after = {n: to_text(digest(t)) for n, t in quantised(new)}
        batch, found = found[:19], found[20:] if new is WEIGHTS else found
        known = {one["name"]: one for one in batch}
        assert {n: one["digest"] for n, one in known.items()} == after
        if new is not WEIGHTS:
            assert {n: one["before"] for n, one in known.items()} == before
        tensors = dict(quantised(new))
        for name, one in known.items():
            assert one["sent"] is True
            assert one["bytes"] == tensors[name].numel() * tensors[name].element_size()
            assert one["microseconds"] >= 0
            if tensors[name].dtype == torch.float8_e4m3fn:
                assert one["amax"] == pytest.approx(float(new[name].abs().amax()), rel=1e-6)
                assert one["saturated"] > 0
                assert one["zero_blocks"] == 0
    update = lines(path)[19]
    assert (update["push"], update["outcome"], update["tensors"]) == (first.push, "applied", 19)
    assert update["bytes"] == first.bytes_sent == 42240
    # The server's log has the same words, and so the same facts.
    shared = {"kind", "version", "name", "sent", "digest", "bytes"}
    shared |= {"amax", "saturated", "zero_blocks"}
    told = [
        {k: v for k, v in one.items() if k in shared} for one in theirs if one["kind"] == "tensor"
    ]
    ours = [
        {k: v for k, v in one.items() if k in shared}
        for one in lines(path)
        if one["kind"] == "tensor"
    ]
    assert sorted(told, key=str) == sorted(ours, key=str)


def test_what_is_skipped_is_written_down_as_such(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    with serving(PLAN) as server, Rollout(server.url, PLAN, record=path, delta=True) as rollout:
        rollout.update(WEIGHTS.items(), "A")
        rollout.update({**WEIGHTS, NAME: CHANGED[NAME]}.items(), "B")
    found = [one for one in lines(path) if one["kind"] == "tensor" and one["version"] == "B"]
    sent = {one["name"] for one in found if one["sent"]}
    assert sent == {NAME, NAME + "_scale_inv"}
    for one in found:
        assert (one["digest"] == one["before"]) == (not one["sent"])
        assert (one["bytes"] == 0) == (not one["sent"])


def test_what_another_wrote_meanwhile_is_not_taken_for_ours(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    with (
        serving(PLAN) as server,
        Rollout(server.url, PLAN, record=path) as mine,
        Rollout(server.url, PLAN) as other,
    ):
        mine.update(WEIGHTS.items(), "A")
        other.update(CHANGED.items(), "B")
        mine.update(WEIGHTS.items(), "C")
    assert {
        one["before"] for one in lines(path) if one.get("version") == "C" and "name" in one
    } == {""}


def test_a_failure_is_written_down_and_a_torn_line_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    path.write_text('{"kind": "tensor", "na')
    spoilt = {**WEIGHTS, NAME: WEIGHTS[NAME] * torch.nan}
    with serving(PLAN) as server, Rollout(server.url, PLAN, record=path) as rollout:
        with pytest.raises(PlanDoesNotFitError):
            rollout.update(spoilt.items(), "A")
        rollout.update(WEIGHTS.items(), "B")
    torn, *rest = path.read_text().splitlines()
    assert torn == '{"kind": "tensor", "na'
    found = [json.loads(line) for line in rest]
    [failed] = [one for one in found if one["kind"] == "update" and one["version"] == "A"]
    assert failed["outcome"] == "failed"
    assert NAME in failed["message"]
    assert len([one for one in found if one.get("version") == "B"]) == 20


def test_where_nothing_can_be_written_nothing_is_sent(tmp_path: Path) -> None:
    with serving(PLAN) as server:
        with pytest.raises(NotPermittedError, match="cannot write") as e:
            Rollout(server.url, PLAN, record=tmp_path).update(WEIGHTS.items(), "A")
        assert e.value.hint
        assert "/fp8ctl/push/begin" not in server.asked
