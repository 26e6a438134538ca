"""The second level: is every FP8 code and scale in every worker the right one?

The workers digest what they hold, in place; the bundled kernel makes the
expectation from the source checkpoint under the plan. Digests are keyed by
position and add up over shards, so fused modules and tensor parallelism do not
matter. Called by `command`, `launching` and `demo`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import urlsplit

from fp8ctl import formats, interpreter
from fp8ctl.engines.base import is_loopback
from fp8ctl.errors import CheckFailedError, UnsupportedError
from fp8ctl.held import Held, gather
from fp8ctl.manifest import Plan
from fp8ctl.policy import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.verdict import Verdict
    from fp8ctl.render import Reporter

#: "cast": a kept tensor that the engine holds in another 16- or 32-bit type; decides nothing.
Found = Literal["equal", "different", "missing", "unexpected", "cast"]
REPORT_PATH = "/fp8ctl/report"
#: Seconds for all workers to digest their weights: about 1 s per GB on a busy CPU core.
TIMEOUT = 900.0
#: Types of kept tensors, from the spelling of safetensors to that of torch.
_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one tensor of the expectation, or of one that nobody expected."""

    name: str
    found: Found
    dtype: str
    quantize: bool
    detail: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the line as JSON types."""
        return {
            "name": self.name,
            "found": self.found,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "detail": self.detail,
        }


def verify(url: str, model: str | None, report: Reporter, api_key: str | None) -> dict[str, object]:
    """Compare the weights in a running server with what they should be.

    Args:
        url: address of the server.
        model: source checkpoint to compare with; None takes the one of the
            server's own plan.
        report: where to show progress and the lines that are not equal.
        api_key: sent as a Bearer token.

    Returns:
        JSON with `result`, `verdict` (None where nothing can be proven),
        `message`, `counts` and `tensors` (those that are not equal).

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
    if not answer.get("manifest"):
        return _not_visible("the engine quantised this model itself: there is no plan to compare")
    plan = Plan.from_json(answer["manifest"])
    if model is not None:
        plan = replace(plan, model=interpreter.resolve_model(report, model))
    if any(rank["format"] != "checkpoint" for rank in answer["ranks"]):
        return _not_visible("the workers hold weights in a kernel's format, not the checkpoint's")
    expected = _expect(url, plan, report)
    held = gather(answer["ranks"])
    lines = compare(plan, expected, held)
    if unmapped(lines):
        names = ", ".join(line.name for line in lines if line.found == "unexpected")
        return _not_visible(
            f"the engine fuses tensors in a way that is not mapped to the checkpoint: {names[:300]}"
        )
    verdict, message = judge(plan, lines, held)
    return _tell(report, plan, lines, verdict, message, len(answer["ranks"]))


def compare(plan: Plan, expected: Mapping[str, int], held: Mapping[str, Held]) -> list[Line]:
    """Return a line for every tensor that is expected or held, in the plan's order."""
    lines = []
    quantized = {tensor.name: tensor.quantize for tensor in plan.tensors}
    sources = {tensor.name: _TORCH.get(tensor.dtype, tensor.dtype) for tensor in plan.tensors}
    for name, digest in expected.items():
        quantize = quantized.get(name, True)  # scales have no entry of their own
        codes = quantize and name in quantized
        dtype = "float8_e4m3fn" if codes else "float32" if quantize else sources[name]
        one = held.get(name)
        if one is None:
            lines.append(Line(name, "missing", "", quantize))
        elif one.dtype != dtype:
            # Equal bits of another type are other numbers.
            found: Found = "different" if quantize or "float8" in one.dtype else "cast"
            lines.append(Line(name, found, one.dtype, quantize, f"expected {dtype}"))
        elif one.digest != digest:
            lines.append(Line(name, "different", one.dtype, quantize, _ranks(one)))
        elif not one.replicas_agree:
            detail = f"copies on {_ranks(one)} are not alike"
            lines.append(Line(name, "different", one.dtype, quantize, detail))
        else:
            lines.append(Line(name, "equal", one.dtype, quantize))
    lines += [
        Line(name, "unexpected", one.dtype, "float8" in one.dtype)
        for name, one in held.items()
        if name not in expected
    ]
    return lines


def unmapped(lines: Sequence[Line]) -> bool:
    """Say whether nothing is wrong but names: FP8 tensors that are there under another one.

    A module that is fused on disk too (Phi-3), or that this engine alone fuses.
    """
    strays = [line for line in lines if line.found == "unexpected" and line.quantize]
    gone = [line for line in lines if line.found == "missing" and line.quantize]
    wrong = [line for line in lines if line.found == "different"]
    return bool(strays and gone and not wrong)


def judge(plan: Plan, lines: Sequence[Line], held: Mapping[str, Held]) -> tuple[Verdict, str]:
    """Return the verdict and why, most telling fault first."""
    for tensor in plan.tensors:
        one = held.get(tensor.name)
        if one and not tensor.quantize and "float8" in one.dtype:
            word: Verdict = "wrong-weights"
            if tensor.reason is Reason.ROUTER:
                word = "router-quantised"
            return (
                word,
                f"{tensor.name} is {one.dtype}, and the plan keeps it: {tensor.reason.value}",
            )
    planned = [held[t.name].dtype for t in plan.quantized if t.name in held]
    if planned and not any("float8" in dtype for dtype in planned):
        return "bf16-fallback", f"the server holds {planned[0]} where the plan says FP8"
    # A tensor that was kept may live elsewhere: a tied lm_head, a buffer, a pruned layer.
    bad = [x for x in lines if x.found == "different" or (x.found == "missing" and x.quantize)]
    bad += [x for x in lines if x.found == "unexpected" and x.quantize]
    if bad:
        first = bad[0]
        many = f"{len(bad)} tensors are not what the source makes: {first.name} is {first.found}"
        return "wrong-weights", many
    proven = sum(1 for x in lines if x.found == "equal" and x.quantize)
    return "fp8-ok", f"{proven} tensors of codes and scales equal the source's, bit for bit"


def _ranks(held: Held) -> str:
    if len(held.ranks) == 1:
        return f"rank {held.ranks[0]}"
    return "ranks " + ", ".join(map(str, held.ranks))


def _ask(url: str, api_key: str | None) -> dict[str, Any] | None:
    """Return the server's report; None where it has no such route."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    trust = not is_loopback(urlsplit(url).hostname or "")
    try:
        answer = httpx.post(url + REPORT_PATH, headers=headers, timeout=TIMEOUT, trust_env=trust)
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


def _engine_python(url: str) -> Path | None:
    """Return the interpreter of a server that fp8ctl started here: it has torch."""
    from fp8ctl import registry

    records = (registry.read(name) for name in registry.names())
    return next((Path(r.python) for r in records if r and r.url.rstrip("/") == url), None)


def _expect(url: str, plan: Plan, report: Reporter) -> dict[str, int]:
    if not plan.fits:
        raise UnsupportedError(
            "the server's plan does not fit its model", hint="fp8ctl plan --model M --backend B"
        )
    python = interpreter.torch_python(_engine_python(url))
    arguments = {"plan": plan.to_json()}
    result = interpreter.run_worker(python, "expect", arguments, report, "expected weights")
    return {name: int(text, 16) for name, text in result["digests"].items()}


def _not_visible(why: str) -> dict[str, object]:
    return {"result": "not visible", "verdict": None, "message": why, "counts": {}, "tensors": []}


def _tell(
    report: Reporter, plan: Plan, lines: Sequence[Line], verdict: Verdict, message: str, ranks: int
) -> dict[str, object]:
    counts = {found: sum(1 for line in lines if line.found == found) for found in get_args(Found)}
    unequal = [line for line in lines if line.found != "equal"]
    if unequal:
        rows = [[x.name, x.found, x.dtype, x.detail] for x in unequal[:_SHOWN]]
        report.table(("tensor", "found", "dtype", "where"), rows)
        if len(unequal) > _SHOWN:
            report.data(f"and {len(unequal) - _SHOWN} more (--json lists them)")
    workers = "1 worker" if ranks == 1 else f"{ranks} workers"
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
        "ranks": ranks,
        "counts": counts,
        "tensors": [line.to_json() for line in unequal],
    }
