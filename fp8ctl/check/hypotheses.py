"""What the third level lays beside a server: what its model says in BF16 and in forms of FP8.

Which forms, and by which rules, is decided here; the worker computes them (`expectation`, in an
interpreter with torch and transformers). Called by `logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ctl import interpreter, models, planning, registry
from fp8ctl.check import texts
from fp8ctl.check.likelihood import BF16, FP8, UNSCALED, Hypothesis
from fp8ctl.check.prompts import Scores
from fp8ctl.errors import CheckpointError, Fp8ctlError, NotFoundError, UnsupportedError
from fp8ctl.formats import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8ctl.check.prompts import Ids
    from fp8ctl.families import Backend
    from fp8ctl.manifest import Plan
    from fp8ctl.render import Reporter


@dataclass(frozen=True, slots=True)
class Expected:
    """What was computed here.

    Attributes:
        ids: of the texts.
        hypotheses: what each would say of them.
        peak_memory: of the worker, in bytes.
    """

    ids: Ids
    hypotheses: list[Hypothesis]
    peak_memory: int


def expect(
    folder: Path,
    engine: Backend,
    report: Reporter,
    plan: Plan | None = None,
    ids: Ids | None = None,
    url: str = "",
) -> Expected:
    """Have the worker compute BF16 and both forms of an FP8 checkpoint.

    Args:
        folder: a 16-bit checkpoint.
        engine: whose rules decide what is quantised, where `plan` does not.
        report: shows the progress.
        plan: of one of the forms.
        ids: of the texts; None has them made here.
        url: of a server whose interpreter may be used, if it runs here.

    Raises:
        UnsupportedError: the model cannot be computed here.
    """
    if models.read_config(folder).get("quantization_config"):
        raise UnsupportedError(
            f"{folder} is quantised already: there is no 16-bit source to compare with"
        )
    wanted: dict[str, Any] = {BF16: {"plan": None, "scaled": True}}
    for mode in (Mode.BLOCK, Mode.PER_TENSOR):
        wanted[FP8[mode]] = _hypothesis(folder, engine, plan, mode)
    return _work(url, folder, wanted, ids, report, "expected log-probabilities")


def expect_more(
    folder: Path,
    engine: Backend,
    report: Reporter,
    plan: Plan | None,
    ids: Ids,
    url: str = "",
    *,
    faults: bool = True,
) -> Expected:
    """Have rarer explanations computed: what engines quantise at start, and known `faults`.

    Args are those of `expect`.
    """
    wanted: dict[str, Any] = {
        FP8[Mode.PER_CHANNEL]: _hypothesis(folder, engine, plan, Mode.PER_CHANNEL)
    }
    for mode in (Mode.BLOCK, Mode.PER_TENSOR) if faults else ():
        if plan is None or plan.mode is mode:
            one = _hypothesis(folder, engine, plan, mode)
            wanted[UNSCALED + FP8[mode]] = one and one | {"scaled": False}
    return _work(url, folder, wanted, ids, report, "more log-probabilities")


def _hypothesis(
    folder: Path, engine: Backend, plan: Plan | None, mode: Mode
) -> dict[str, Any] | None:
    """Return a hypothesis as the worker takes it: the plan's own where it is of this mode."""
    if plan is not None and plan.mode is mode:
        chosen = replace(plan, model=folder)
    else:
        keep, quantize = (plan.keep, plan.quantize) if plan is not None else ((), ())
        try:
            chosen = planning.make_plan(folder, engine, mode, keep=keep, quantize=quantize)
        except CheckpointError:
            raise
        except Fp8ctlError:
            return None
    if mode is Mode.BLOCK and chosen.block is None:
        return None
    return {"plan": chosen.to_json(), "scaled": True}


def _work(
    url: str,
    folder: Path,
    wanted: Mapping[str, Any],
    ids: Ids | None,
    report: Reporter,
    title: str,
) -> Expected:
    records = (registry.read(name) for name in registry.names())
    engine = next((r.python for r in records if r and url and r.url.rstrip("/") == url), None)
    try:
        python = interpreter.torch_python(
            None if engine is None else Path(engine), also=("transformers",)
        )
    except NotFoundError as e:
        raise UnsupportedError(f"no interpreter here can compute it: {e.message}") from e
    arguments: dict[str, Any] = {
        "model": str(folder),
        "texts": list(texts.TEXTS),
        "cap": texts.CAP,
        "hypotheses": {name: one for name, one in wanted.items() if one},
    }
    if ids is not None:
        arguments["ids"] = [list(text) for text in ids]
    told = interpreter.run_worker(python, "logprobs", arguments, report, title)
    hypotheses = [
        Hypothesis(
            name,
            _scores(both["plain"]),
            _scores(both["engine"]),
            sound=not name.startswith(UNSCALED),
        )
        for name, both in told["expected"].items()
    ]
    return Expected(tuple(map(tuple, told["ids"])), hypotheses, int(told["peak_memory"]))


def _scores(told: Mapping[str, Any]) -> Scores:
    return Scores(tuple(map(tuple, told["logprobs"])), tuple(map(tuple, told["top"])))
