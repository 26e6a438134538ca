"""The second level: is every FP8 code and scale in every worker the right one?

The workers digest what they hold, in place; the bundled kernel makes the
expectation from the source checkpoint under the plan. Digests are keyed by
position and add up over shards, so fused modules and tensor parallelism do not
matter. What differs is compared with what the server has had before, and of a few
tensors the workers are asked for more. Called by `command`, `launching` and `demo`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from fp8ctl import formats, interpreter
from fp8ctl.check import online
from fp8ctl.check.tensors import (
    Found,
    Line,
    Version,
    compare,
    explain,
    judge,
    unmapped,
)
from fp8ctl.check.versions import pushed
from fp8ctl.engines.base import is_loopback
from fp8ctl.errors import CheckFailedError, Fp8ctlError, UnsupportedError
from fp8ctl.held import Held, gather
from fp8ctl.manifest import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.verdict import Verdict
    from fp8ctl.render import Reporter

REPORT_PATH, INSPECT_PATH = "/fp8ctl/report", "/fp8ctl/inspect"
#: Seconds for all workers to digest their weights: about 1 s per GB on a busy CPU core.
TIMEOUT = 900.0
_SHOWN = 8
#: How many tensors that differ are looked at closely, and bytes of values of each part.
_CLOSELY, _VALUES = 8, 4 << 20
#: Of weights that the engine quantised itself all that differ are, up to so many.
_ONLINE, _TOGETHER, _SCALES = 2048, 32, 1 << 18


@dataclass(frozen=True)
class _Task:
    """What a server is compared with.

    Attributes:
        plan: its model is the source.
        kernel: `fp8ctl.online.Kernel` as JSON, where the engine quantised by itself.
        python: an interpreter with torch.
    """

    plan: Plan
    kernel: Mapping[str, Any] | None
    python: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of scales that are not as the plan says."""
        return online.shapes(self.plan, self.kernel) if self.kernel is not None else {}

    def arguments(self, **more: object) -> dict[str, object]:
        """Return arguments of a task of the worker."""
        about: dict[str, object] = {"plan": self.plan.to_json()}
        return about | ({"online": self.kernel} if self.kernel is not None else {}) | more


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
    answer = _ask(url, api_key)
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
    found = _online(url, answer, model, held, report) if not answer.get("manifest") else None
    if isinstance(found, str):
        return _not_visible(found)
    task = found or _planned(url, answer, model, report)
    if task.kernel is None and any(rank["format"] != "checkpoint" for rank in answer["ranks"]):
        return _not_visible("the workers hold weights in a kernel's format, not the checkpoint's")
    expected, quality = _expect(task, report)
    lines = compare(task.plan, expected, held, task.shapes)
    if unmapped(lines):
        names = ", ".join(line.name for line in lines if line.found == "unexpected")
        return _not_visible(
            f"the engine fuses tensors in a way that is not mapped to the checkpoint: {names[:300]}"
        )
    if any(line.bad for line in lines):
        versions = _versions(url, api_key, task, answer, model, lines, expected, report)
        lines = explain(task.plan, lines, expected, held, versions, task.shapes)
        lines = _look_closer(url, api_key, task, lines, report)
    verdict, message = judge(task.plan, lines, held)
    if task.kernel is not None and verdict == "fp8-ok":
        proven = [x for x in lines if x.found == "equal" and x.quantize]
        near = sum(1 for x in proven if x.looks == "one step")
        message = online.tell(state["engine"], str(state.get("device", "")), len(proven), near)
    told = _tell(report, task.plan, lines, verdict, message, answer["ranks"])
    return told | {"quality": quality}


# --- what it is compared with -------------------------------------------------------------------


def _planned(url: str, answer: Mapping[str, Any], model: str | None, report: Reporter) -> _Task:
    plan = Plan.from_json(answer["manifest"])
    if model is not None:
        plan = replace(plan, model=interpreter.resolve_model(report, model))
    if not plan.fits:
        raise UnsupportedError(
            "the server's plan does not fit its model", hint="fp8ctl plan --model M --backend B"
        )
    return _Task(plan, None, interpreter.torch_python(_engine_python(url)))


def _online(
    url: str,
    answer: Mapping[str, Any],
    model: str | None,
    held: Mapping[str, Held],
    report: Reporter,
) -> _Task | str:
    """Return what an engine's own quantisation is compared with, or why with nothing."""
    if any(rank["format"] != "online" for rank in answer["ranks"]) or not answer["ranks"]:
        return "the engine quantised this model itself: there is no plan to compare"
    own = str(answer.get("model") or "")
    if model is None and not Path(own).is_dir():
        return (
            f"the engine quantised {own or 'its model'} itself: --model M says which folder it is"
        )
    folder = interpreter.resolve_model(report, model or own)
    guessed = online.guess(folder, answer["state"].get("engine", ""), len(answer["ranks"]), held)
    if guessed is None:
        return f"how the engine quantises {folder} by itself is not known"
    return _Task(*guessed, interpreter.torch_python(_engine_python(url)))


def _engine_python(url: str) -> Path | None:
    """Return the interpreter of a server that fp8ctl started here: it has torch."""
    from fp8ctl import registry

    records = (registry.read(name) for name in registry.names())
    return next((Path(r.python) for r in records if r and r.url.rstrip("/") == url), None)


def _expect(
    task: _Task, report: Reporter, only: Sequence[str] | None = None
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    arguments = task.arguments(**({} if only is None else {"only": list(only)}))
    title = "expected weights" if only is None else "weights that were"
    result = interpreter.run_worker(task.python, "expect", arguments, report, title)
    digests = {name: [int(t, 16) for t in texts] for name, texts in result["digests"].items()}
    return digests, result["quality"]


def _versions(
    url: str,
    api_key: str | None,
    task: _Task,
    answer: Mapping[str, Any],
    model: str | None,
    lines: Sequence[Line],
    expected: Mapping[str, Sequence[int]],
    report: Reporter,
) -> list[Version]:
    """Return what the server has had, the oldest first: its checkpoint, then what was pushed."""
    if task.kernel is not None:
        return []  # 16-bit weights were pushed
    name = "the checkpoint that it was started with"
    first = Version(name, {n: digests[0] for n, digests in expected.items()})
    own = Plan.from_json(answer["manifest"])
    if model is not None and own.model != task.plan.model:
        wrong = {x.name.removesuffix("_inv").removesuffix("_scale") for x in lines if x.bad}
        first = Version(name)
        try:
            found, _ = _expect(replace(task, plan=own), report, sorted(wrong))
            first = Version(name, {n: digests[0] for n, digests in found.items()})
        except Fp8ctlError as e:  # it is not on this machine any more
            report.say(f"weights: {own.model} cannot be compared: {e.message}")
    return [first, *pushed(url, api_key)]


# --- a closer look ------------------------------------------------------------------------------


def _look_closer(
    url: str, api_key: str | None, task: _Task, lines: Sequence[Line], report: Reporter
) -> list[Line]:
    """Have the workers tell more of some tensors that differ: where, how many, like what."""
    wrong = [x for x in lines if x.found == "different" and x.looks not in ("bf16", "other block")]
    if task.kernel is not None:
        codes = [x for x in wrong if x.quantize and len(wrong) <= _ONLINE]
        names = list(dict.fromkeys(n for x in codes for n in _pair(x.name)))
        seen = _examine(url, api_key, task, names, _SCALES, report)
        lines = [_near(line, seen.get(line.name)) for line in lines]
        wrong = [x for x in lines if x in wrong]
    # What looks like nothing known comes first.
    chosen = sorted(wrong, key=lambda line: bool(line.looks))[:_CLOSELY]
    seen = _examine(url, api_key, task, [line.name for line in chosen], _VALUES, report)
    return [_seen(line, seen.get(line.name)) for line in lines]


def _pair(name: str) -> tuple[str, str]:
    weight = name.removesuffix("_scale")
    return weight, f"{weight}_scale"


def _near(line: Line, seen: Mapping[str, Any] | None) -> Line:
    """Take what an approximate division makes for right."""
    if seen is None or seen["looks"] != "one step":
        return line
    return replace(line, found="equal", looks="one step", detail=seen["detail"])


def _seen(line: Line, seen: Mapping[str, Any] | None) -> Line:
    if seen is None:
        return line
    detail = ", ".join(filter(None, (line.detail, seen["detail"])))
    codes = seen["codes"]
    return replace(
        line,
        detail=detail,
        codes=(int(codes[0]), int(codes[1])) if codes else None,
        rows=seen["rows"],
        looks=line.looks or seen["looks"],
    )


def _examine(
    url: str,
    api_key: str | None,
    task: _Task,
    names: Sequence[str],
    most: int,
    report: Reporter,
) -> dict[str, dict[str, Any]]:
    """Return by name what `fp8ctl.difference` says; nothing of a server that tells no more."""
    told: list[dict[str, Any]] = []
    for first in range(0, len(names), _TOGETHER):
        told += _more(url, api_key, names[first : first + _TOGETHER], {}, most)
    if not told:
        return {}
    seen = _examined(task, told, report)
    rows = {name: one["wanted"] for name, one in seen.items() if one["wanted"]}
    if rows and task.kernel is None:
        # Too large to be sent whole: the rows that differ are counted.
        told = _more(url, api_key, list(rows), rows, most)
        for name, one in (_examined(task, told, report) if told else {}).items():
            seen[name] |= {"codes": one["codes"], "detail": one["detail"]}
    return seen


def _examined(
    task: _Task, told: Sequence[Mapping[str, Any]], report: Reporter
) -> dict[str, dict[str, Any]]:
    arguments = task.arguments(told=list(told))
    found = interpreter.run_worker(task.python, "examine", arguments, report, "a closer look")
    tensors: dict[str, dict[str, Any]] = found["tensors"]
    return tensors


def _more(
    url: str,
    api_key: str | None,
    names: Sequence[str],
    rows: Mapping[str, Sequence[int]],
    most: int,
) -> list[dict[str, Any]]:
    """Return the lines of all ranks about some tensors; none where the server cannot say."""
    import httpx

    if not names:
        return []
    body = {"names": list(names), "rows": dict(rows), "most": most}
    try:
        answer = _post(url + INSPECT_PATH, api_key, body)
        lines = answer.json()["tensors"] if answer.status_code == 200 else []
    except (httpx.TransportError, ValueError, KeyError, TypeError):
        return []
    return lines if isinstance(lines, list) else []


# --- asking -------------------------------------------------------------------------------------


def _post(url: str, api_key: str | None, body: object = None) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    trust = not is_loopback(urlsplit(url).hostname or "")
    return httpx.post(url, json=body, headers=headers, timeout=TIMEOUT, trust_env=trust)


def _ask(url: str, api_key: str | None) -> dict[str, Any] | None:
    """Return the server's report; None where it has no such route."""
    import httpx

    try:
        answer = _post(url + REPORT_PATH, api_key)
    except httpx.TransportError as e:
        raise CheckFailedError(
            f"{url}{REPORT_PATH} does not answer: {type(e).__name__}: {e}", hint="fp8ctl ps"
        ) from e
    if answer.status_code == 404:
        return None
    if answer.status_code != 200:
        raise CheckFailedError(
            f"{url}{REPORT_PATH} answers {answer.status_code}: {answer.text[:300]}",
            hint="fp8ctl logs NAME",
        )
    try:
        found: dict[str, Any] = answer.json()
        sound = {"state", "manifest", "ranks"} <= found.keys()
    except (ValueError, AttributeError):
        sound = False
    return found if sound else None  # something else answers any POST with 200


# --- telling ------------------------------------------------------------------------------------


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
