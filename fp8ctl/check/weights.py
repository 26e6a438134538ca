"""The second level: is every FP8 code and scale in every worker the right one?

The workers digest what they hold, in place; the bundled kernel makes the
expectation from the source checkpoint under the plan. Digests are keyed by
position and add up over shards, so fused modules and tensor parallelism do not
matter. What differs is compared with what the server has had before, and of a few
tensors the workers are asked for more. Called by `command`, `launching` and `demo`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from fp8ctl import formats
from fp8ctl.check import asking, closer, comparison, online
from fp8ctl.check.looks import Version, explain
from fp8ctl.check.tensors import Found, Line, compare, judge, unmapped
from fp8ctl.check.versions import pushed
from fp8ctl.errors import Fp8ctlError
from fp8ctl.held import gather
from fp8ctl.manifest import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.comparison import Task
    from fp8ctl.check.verdict import Verdict
    from fp8ctl.render import Reporter

_SHOWN = 8


def verify(url: str, model: str | None, report: Reporter, api_key: str | None) -> dict[str, object]:
    """Compare the weights in a running server with what they should be.

    Args:
        url: address of the server.
        model: source checkpoint to compare with; None takes the one of the
            server's own plan.
        report: where to show progress and the lines that are not equal.
        api_key: sent as a Bearer token.

    Returns:
        JSON with `result`, `verdict` (None where nothing can be proven), `message`, `counts`,
        `tensors` (those that are not equal: `tensors.Line`), `quality` (of each quantised tensor
        `sqnr_db` and `amax`) and `seconds` (of each rank: `total`, `longest`, `slices`).

    Raises:
        CheckFailedError: the server refused to report.
        NotFoundError: the source checkpoint, or an interpreter with torch, is not there.
    """
    try:
        answer = asking.report(url, api_key)
    except asking.ChangingError as e:
        return _not_visible(str(e))
    if answer is None:
        return _not_visible("this server has no /fp8ctl/report: it was not started by fp8ctl")
    state = answer["state"]
    if state["state"] != "ready":
        message = f"the server is {state['state']}: {state['message']}"
        # A broken update may have left half of two sets; one on its way proves nothing yet.
        verdicts = {"unpushed": "unpushed", "failed": "wrong-weights"}
        verdict = verdicts.get(state["state"])
        return _not_visible(message) | {"result": "failed", "verdict": verdict}
    held = gather(answer["ranks"])
    found = comparison.own(url, answer, model, held, report) if not answer.get("manifest") else None
    if isinstance(found, str):
        return _not_visible(found)
    task = found or comparison.planned(url, answer, model, report)
    forms = {rank["format"] for rank in answer["ranks"]}
    if task.kernel is None and forms not in ({"checkpoint"}, {"shared"}):
        return _not_visible("the workers hold weights in a kernel's format, not the checkpoint's")
    expected, quality = comparison.expect(task, report)
    lines = compare(task.plan, expected, held, task.shapes)
    if unmapped(lines):
        names = ", ".join(line.name for line in lines if line.found == "unexpected")
        return _not_visible(
            f"the engine fuses tensors in a way that is not mapped to the checkpoint: {names[:300]}"
        )
    if any(line.bad for line in lines):
        versions = _versions(url, api_key, task, answer, model, lines, expected, report)
        lines = explain(task.plan, lines, expected, held, versions, task.shapes)
        if not task.shared:  # what it made of the codes is known by digests alone
            lines = closer.look(url, api_key, task, lines, report)
    verdict, message = judge(task.plan, lines, held)
    if task.kernel is not None and verdict == "fp8-ok":
        proven = [x for x in lines if x.found == "equal" and x.quantize]
        near = sum(1 for x in proven if x.looks == "one step")
        message = online.tell(state["engine"], str(state.get("device", "")), len(proven), near)
    if task.shared and verdict == "fp8-ok":
        message += ", after the engine gave all that it fuses one scale"
    told = _tell(report, task.plan, lines, verdict, message, answer["ranks"])
    return told | {"quality": quality}


def _versions(
    url: str,
    api_key: str | None,
    task: Task,
    answer: Mapping[str, Any],
    model: str | None,
    lines: Sequence[Line],
    expected: Mapping[str, Sequence[int]],
    report: Reporter,
) -> list[Version]:
    """Return what the server has had, the oldest first: its checkpoint, then what was pushed."""
    if task.kernel is not None or task.shared:
        return []  # what was pushed is not what the engine made of it
    name = "the checkpoint that it was started with"
    first = Version(name, {n: digests[0] for n, digests in expected.items()})
    own = Plan.from_json(answer["manifest"])
    if model is not None and own.model != task.plan.model:
        wrong = {x.name.removesuffix("_inv").removesuffix("_scale") for x in lines if x.bad}
        first = Version(name)
        try:
            found, _ = comparison.expect(replace(task, plan=own), report, sorted(wrong))
            first = Version(name, {n: digests[0] for n, digests in found.items()})
        except Fp8ctlError as e:  # it is not on this machine any more
            report.say(f"weights: {own.model} cannot be compared: {e.message}")
    return [first, *pushed(url, api_key)]


def _not_visible(why: str) -> dict[str, object]:
    return {
        "result": "not visible",
        "verdict": None,
        "message": why,
        "counts": {},
        "tensors": [],
        "quality": {},
        "seconds": [],
    }


def _tell(
    report: Reporter,
    plan: Plan,
    lines: Sequence[Line],
    verdict: Verdict,
    message: str,
    ranks: Sequence[Mapping[str, Any]],
) -> dict[str, object]:
    counts = {found: sum(1 for line in lines if line.found == found) for found in get_args(Found)}
    unequal = [line for line in lines if line.found != "equal"]
    if unequal:
        # What is wrong comes before what was kept and lives elsewhere.
        first = sorted(unequal, key=lambda line: not line.bad)[:_SHOWN]
        rows = [[x.name, x.found, x.dtype, x.told()] for x in first]
        report.table(("tensor", "found", "dtype", "where"), rows)
        if len(unequal) > _SHOWN:
            report.data(f"and {len(unequal) - _SHOWN} more (--json lists them)")
    workers = "1 worker" if len(ranks) == 1 else f"{len(ranks)} workers"
    mode = plan.mode.value + (f" {plan.block.label}" if plan.block else "")
    mode += "" if plan.recipe == formats.RECIPE else f", {plan.recipe}"
    report.data(
        f"weights: {counts['equal']} of {len(lines)} equal in {workers} ({mode}): {message}"
    )
    return {
        "result": "ok" if verdict == "fp8-ok" else "failed",
        "verdict": verdict,
        "message": message,
        "model": str(plan.model),
        "mode": plan.mode.value,
        "recipe": plan.recipe,
        "ranks": len(ranks),
        "counts": counts,
        "tensors": [line.to_json() for line in unequal],
        "seconds": [{"rank": rank["rank"], **(rank.get("seconds") or {})} for rank in ranks],
    }
