"""What a server's weights are compared with: the plan, the source, and who made the codes.

By the plan of the server, by what is known of an engine that quantises by itself (`online`), or of
a stock one that gives all that it fuses one scale. Called by `weights`; torch is the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8ctl import interpreter
from fp8ctl.check import online
from fp8ctl.errors import UnsupportedError
from fp8ctl.manifest import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.held import Held
    from fp8ctl.render import Reporter


@dataclass(frozen=True)
class Task:
    """What a server is compared with.

    Attributes:
        plan: its model is the source.
        kernel: `fp8ctl.online.Kernel` as JSON, where the engine quantised by itself.
        python: an interpreter with torch.
        shared: the engine gave all that it fuses one scale (`fp8ctl.requantised`).
    """

    plan: Plan
    kernel: Mapping[str, Any] | None
    python: Path
    shared: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of scales that are not as the plan says."""
        return online.shapes(self.plan, self.kernel) if self.kernel is not None else {}

    def arguments(self, **more: object) -> dict[str, object]:
        """Return arguments of a task of the worker."""
        about: dict[str, object] = {"plan": self.plan.to_json()}
        about |= {"online": self.kernel} if self.kernel is not None else {}
        return about | ({"shared": True} if self.shared else {}) | more


def planned(url: str, answer: Mapping[str, Any], model: str | None, report: Reporter) -> Task:
    """Return what a server with a plan is compared with.

    Raises:
        NotFoundError: the source, or an interpreter with torch, is not there.
        UnsupportedError: the plan does not fit its model.
    """
    plan = Plan.from_json(answer["manifest"])
    if model is not None:
        plan = replace(plan, model=interpreter.resolve_model(report, model))
    if not plan.fits:
        raise UnsupportedError(
            "the server's plan does not fit its model", hint="fp8ctl plan --model M --backend B"
        )
    shared = {rank["format"] for rank in answer["ranks"]} == {"shared"}
    return Task(plan, None, interpreter.torch_python(_engine_python(url)), shared)


def own(
    url: str,
    answer: Mapping[str, Any],
    model: str | None,
    held: Mapping[str, Held],
    report: Reporter,
) -> Task | str:
    """Return what an engine's own quantisation is compared with, or why with nothing."""
    if any(rank["format"] != "online" for rank in answer["ranks"]) or not answer["ranks"]:
        return "the server was started without a plan: nobody knows what its weights were made of"
    own = str(answer.get("model") or "")
    if model is None and not Path(own).is_dir():
        return (
            f"the engine quantised {own or 'its model'} itself: --model M says which folder it is"
        )
    folder = interpreter.resolve_model(report, model or own)
    guessed = online.guess(folder, answer["state"].get("engine", ""), len(answer["ranks"]), held)
    if guessed is None:
        return f"how the engine quantises {folder} by itself is not known"
    return Task(*guessed, interpreter.torch_python(_engine_python(url)))


def _engine_python(url: str) -> Path | None:
    """Return the interpreter of a server that fp8ctl started here: it has torch."""
    from fp8ctl import registry

    records = (registry.read(name) for name in registry.names())
    return next((Path(r.python) for r in records if r and r.url.rstrip("/") == url), None)


def expect(
    task: Task, report: Reporter, only: Sequence[str] | None = None
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Have the worker make the expectation.

    Args:
        task: what is compared with.
        report: shows the progress.
        only: names of the source's tensors to read; None for all.

    Returns:
        By name, the digests that are right; and `quality.measure` of what is quantised.
    """
    arguments = task.arguments(**({} if only is None else {"only": list(only)}))
    title = "expected weights" if only is None else "weights that were"
    result = interpreter.run_worker(task.python, "expect", arguments, report, title)
    digests = {name: [int(t, 16) for t in texts] for name, texts in result["digests"].items()}
    return digests, result["quality"]
