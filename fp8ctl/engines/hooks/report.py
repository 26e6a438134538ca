"""What a server tells of the weights in all its workers; the routes of both engines call this.

A worker that digests computes nothing else, so digests are asked for in slices: requests that
run go on in between. A set that changed meanwhile would be a mixture that never was; then they are
asked for in one piece, until nothing has changed beside it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks.refused import RefusedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.engines.hooks.gate import Gate
    from fp8ctl.engines.hooks.memory import Memory
    from fp8ctl.engines.hooks.workers import Workers

REPORT, INSPECT = "/fp8ctl/report", "/fp8ctl/inspect"

#: Bytes of weights that a worker digests at a time: a third of a second on a busy CPU core.
SLICE = 256 << 20
#: How often that is tried beside a trainer that updates all the time.
AGAIN = 3
#: Of one question about single tensors: how many, and bytes of the values of all.
TENSORS, VALUES = 64, 64 << 20
#: Tensors of one question to the ranks.
TOGETHER = 4


async def answer(
    workers: Workers, gate: Gate, memory: Memory, plan: Mapping[str, Any], model: str
) -> tuple[int, dict[str, Any]]:
    """Answer POST /fp8ctl/report: the gate's state, the plan, and what every rank holds.

    Args:
        workers: of the engine.
        gate: of the server.
        memory: which of it the engine has given up.
        plan: that it was started with; {} without one.
        model: the folder or name that it was started on.
    """
    try:
        # What an update writes is no set of weights, and its ranks have other questions to answer.
        ranks = await digests(workers, gate, memory) if gate.state != "updating" else []
    except RefusedError as e:
        return e.status, {"error": e.message, "id": e.id}
    except Exception as e:  # noqa: BLE001 - whatever the engine raises is the answer
        return 500, {"error": str(e) if isinstance(e, RuntimeError) else repr(e)}
    about = {"state": gate.describe(), "manifest": plan, "model": model}
    return 200, {**about, "ranks": ranks}


async def answer_more(
    workers: Workers, memory: Memory, body: bytes | None
) -> tuple[int, dict[str, Any]]:
    """Answer POST /fp8ctl/inspect: more of a few tensors."""
    try:
        asked = json.loads(body or b"{}")
        return 200, await inspect(workers, memory, asked if isinstance(asked, dict) else {})
    except RefusedError as e:
        return e.status, {"error": e.message}
    except ValueError as e:
        return 400, {"error": f"the body is not JSON: {e}"}
    except Exception as e:  # noqa: BLE001 - whatever the engine raises is the answer
        return 500, {"error": str(e) if isinstance(e, RuntimeError) else repr(e)}


async def digests(workers: Workers, gate: Gate, memory: Memory) -> list[dict[str, Any]]:
    """Return what every rank holds, and how long that took it.

    Returns:
        By rank: `rank`, `format`, `tensors`, `unfilled`, and `seconds`: `total`, `longest` (of
        one slice) and `slices`. Nothing while an update is on its way.

    Raises:
        RefusedError: the weights changed each time.
        RuntimeError: a rank could not say it.
    """
    before = _weights(gate)
    found = await _in_slices(workers, memory)
    for _ in range(AGAIN):
        if _weights(gate) == before:
            return found
        if gate.state == "updating":
            return []
        # Also beside this an update may begin and end.
        before = _weights(gate)
        found = [_timed(answer) for answer in await _ask(workers, memory, "digests")]
    if _weights(gate) == before:
        return found
    raise RefusedError(
        503, "FP8-BUSY", f"the weights changed {AGAIN + 1} times while they were digested"
    )


def _weights(gate: Gate) -> tuple[str, int]:
    return gate.state, gate.updates


async def _ask(workers: Workers, memory: Memory, what: str, **more: Any) -> list[dict[str, Any]]:
    """Ask the ranks, which keep their weights meanwhile."""
    async with memory.turn:
        memory.require_weights()
        return await workers.ask(what, **more)


async def _in_slices(workers: Workers, memory: Memory) -> list[dict[str, Any]]:
    starts: list[int | None] = [0] * workers.ranks
    found: list[dict[str, Any]] = []
    while any(start is not None for start in starts):
        answers = await _ask(workers, memory, "digests", starts=starts, most=SLICE)
        if not found:
            found = [_timed(answer) for answer in answers]
        else:
            for whole, part in zip(found, answers, strict=True):
                whole["tensors"] += part["tensors"]
                _add(whole["seconds"], part["seconds"])
        starts = [answer["next"] for answer in answers]
    return found


def _timed(answer: Mapping[str, Any]) -> dict[str, Any]:
    whole = {key: value for key, value in answer.items() if key not in ("next", "layout")}
    whole["seconds"] = {"total": 0.0, "longest": 0.0, "slices": 0}
    _add(whole["seconds"], answer["seconds"])
    return whole


def _add(seconds: dict[str, Any], more: float) -> None:
    if more:  # a rank that had come to its end was asked along with others
        seconds["slices"] += 1
    seconds["total"] = round(seconds["total"] + more, 6)
    seconds["longest"] = round(max(seconds["longest"], more), 6)


async def inspect(workers: Workers, memory: Memory, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return more of a few tensors: several questions, so that requests go on in between.

    Args:
        workers: of the engine.
        memory: which of it the engine has given up.
        body: `names`, `rows` and `most` as in `inspection.inspect`.

    Returns:
        tensors: the lines of all ranks, each with its `rank`.

    Raises:
        RefusedError: the body does not ask for a few tensors.
        RuntimeError: a rank could not say it.
    """
    names, rows, most = body.get("names"), body.get("rows", {}), body.get("most", VALUES)
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    sound &= isinstance(rows, dict) and isinstance(most, int)
    if not sound or names is None or len(names) > TENSORS:
        raise RefusedError(
            400, "FP8-WIRE", f"expected names of at most {TENSORS} tensors, rows and most"
        )
    lines: list[dict[str, Any]] = []
    left = VALUES
    for first in range(0, len(names), TOGETHER):
        some = names[first : first + TOGETHER]
        about = {"names": some, "rows": {name: rows[name] for name in some if name in rows}}
        limit = max(0, min(int(most), left // workers.ranks))
        for answer in await _ask(workers, memory, "inspect", **about, most=limit):
            lines += [{**line, "rank": answer["rank"]} for line in answer["tensors"]]
            left -= sum(len(line["values"] or "") for line in answer["tensors"])
    return {"tensors": lines}
