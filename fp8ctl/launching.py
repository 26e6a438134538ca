"""Body of `fp8ctl launch`: from what was typed to a server with a verdict.

Gathers the facts (environment, patches, model, GPUs), decides where the
quantised weights come from, has the engine's builder make or refuse the plan,
prints it, and hands it to `supervisor`. `--dry-run` stops after the printing:
nothing is quantised, nothing started.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from fp8ctl import (
    environment,
    interpreter,
    launchoptions,
    models,
    paths,
    planning,
    registry,
    server,
)
from fp8ctl.engines import base, sglang, vllm
from fp8ctl.engines.base import CPU, Device, LaunchRequest, ModelFacts, Source
from fp8ctl.errors import ConflictError, UsageError
from fp8ctl.formats import BlockSize, parse_mode
from fp8ctl.manifest import dumps
from fp8ctl.patching import overlay, status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.check.levels import Level
    from fp8ctl.engines.base import LaunchPlan
    from fp8ctl.environment import BackendName, Environment
    from fp8ctl.fitting import Module
    from fp8ctl.launchoptions import Asked
    from fp8ctl.manifest import Plan
    from fp8ctl.patching.status import SeriesStatus
    from fp8ctl.render import Reporter

_OPTIONAL_PACKAGES: Final = ("vllm",)
_SIDECARS: Final = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
)


def run(
    report: Reporter,
    *,
    backend: str,
    python: Path | None = None,
    site_packages: Path | None = None,
    model: str | None = None,
    mode: str | None = None,
    block_size: str | None = None,
    quantization: str | None = None,
    torchao_config: str | None = None,
    await_push: bool = False,
    trace: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    tp: int | None = None,
    detach: bool = False,
    wait: bool = True,
    timeout: float = 600.0,
    check: str | None = None,
    no_check: bool = False,
    dry_run: bool = False,
    extra: Sequence[str] = (),
    expect: str | None = None,
    front: Path | None = None,
    plan_file: Path | None = None,
    keep: Sequence[str] = (),
    quantize: Sequence[str] = (),
) -> dict[str, object]:
    """Start a server in FP8; arguments are those of `fp8ctl launch`.

    Args:
        plan_file: a manifest to follow; options beside it must say what it says.
        check: level of the closing check; None for live.
        expect: text that the answer of the closing check must contain.
        front: folder of the overlay that the engine is imported from.

    Raises:
        UsageError, NotFoundError, UnsupportedError, ConflictError, PlanDoesNotFitError: it was
            refused before anything started.
        BusyError: the port is taken.
        EngineFailedError, CheckFailedError, AbortedError: see `supervisor.serve`.
    """
    from fp8ctl.supervisor import About, RunFiles, Watch, serve

    name = environment.parse_backend(backend)
    level = launchoptions.parse_check(check, no_check=no_check, await_push=await_push, wait=wait)
    given = None
    if plan_file is not None:
        if quantization is not None or torchao_config is not None or mode == "online":
            raise UsageError(
                f"--plan {plan_file} is FP8 in blocks or per tensor; another method excludes it",
                hint="drop --plan, or the method",
            )
        given = planning.read_plan(
            plan_file,
            planning.Typed(
                backend=name,
                mode=None if mode is None else parse_mode(mode),
                tp=tp,
                block=None if block_size is None else BlockSize.parse(block_size),
                keep=tuple(keep),
                quantize=tuple(quantize),
            ),
            None if model is None else Path(model).expanduser(),
        )
        model, mode, tp = str(given.model), given.mode.value, given.tp
        block_size = None if given.block is None else str(given.block)
    tp = tp or 1
    asked = launchoptions.parse(
        name,
        mode or "block",
        quantization,
        torchao_config,
        await_push=await_push,
        tp=tp,
        block_size=block_size,
        keep=keep,
        quantize=quantize,
    )
    if not wait and not detach:
        raise UsageError("--no-wait leaves the server alone, so it needs --detach", hint="--detach")
    point = base.parse_trace(trace) if trace is not None else None

    if front is None:
        found = environment.find(python, site_packages, name)
    else:
        front = overlay.parse(front)
        overlay.require_current(front)
        found = overlay.overlaid(overlay.source(front, python, site_packages, name), front)
    engine = found.engine(name)
    if found.python is None:
        raise UsageError(
            f"{found.site_packages} has no interpreter beside it to start {engine.label} with",
            hint="--python /path/to/an/environment/bin/python",
        )
    if engine.shadowed_by is not None:
        raise ConflictError(
            f"{found.python} imports {engine.shadowed_by}, not {engine.package_dir}: "
            "what is patched is not what would run",
            hint=f"take {shlex.quote(str(engine.shadowed_by.parent))} out of PYTHONPATH",
        )
    report.say(f"{engine.label} in {found.site_packages} ({found.origin})")
    target = environment.target_options(found.python, None)
    patches = _patches(report, found, name, overlay.option(front) if front else target)

    folder, shown = _model(report, name, model, found.python, fetch=not dry_run)
    facts = read_facts(folder, shown, tp)
    device = device_of(found)
    source, plan = _source(asked, facts, folder, device, given)
    method = quantization or torchao_config
    launchoptions.require_provable(level, source, method, planned=plan is not None)
    default_port = sglang.DEFAULT_PORT if name == "sglang" else vllm.DEFAULT_PORT
    port = base.parse_port(base.option_value(extra, "--port"), port or default_port)
    request = LaunchRequest(
        python=found.python,
        model=facts,
        source=source,
        device=device,
        host=host,
        port=port,
        run_dir=registry.servers_dir() / registry.free_name(name, port),
        hook_path=interpreter.hook_path(),
        overlay=front,
        applied=patches.applied,
        present=patches.present,
        installed=frozenset(p for p in _OPTIONAL_PACKAGES if p in found.packages),
        tp=tp,
        quantization=quantization,
        torchao_config=torchao_config,
        await_push=await_push,
        trace=point,
        cache_root=_cache_root(patches) if name == "vllm" else None,
        extra=tuple(extra),
        environ=os.environ,
    )
    request = _with_plan(request, plan, name)
    built = _build(request, found, name)
    _print(report, built, plan, level)
    data: dict[str, object] = {
        "launch": built.to_json(),
        "engine": engine.label,
        "mode": asked.label(),
        "source": str(folder),
        "weights": source,
        "served": str(request.model.path),
        "plan": _summary(plan) if plan is not None else None,
        "check_level": level,
        "dry_run": dry_run,
    }
    if dry_run:
        return data
    server.refuse_occupied(built.host, built.port)
    if plan is not None and source == "checkpoint":
        from fp8ctl import quantizing

        made = quantizing.quantize_cached(report, plan, found.python)
        if made != request.model.path:
            request = replace(request, model=replace(request.model, path=made))
            built = base.builder(name)(request)
            data |= {"launch": built.to_json(), "served": str(made)}
    about = About(
        engine=engine.label,
        source=str(folder),
        mode=asked.label(),
        site_packages=str(found.site_packages),
    )
    watch = Watch(
        detach=detach,
        wait=wait,
        timeout=timeout,
        check=level,
        # A server with a plan tells what it was made from.
        model=None if plan is not None or level == "live" else str(folder),
        expect=expect,
    )
    left = RunFiles(
        manifest=dumps(plan.to_json()) if plan is not None else None,
        # Of a work tree fp8ctl knows no hash: what runs there is version control's to say.
        code=None
        if engine.kind == "editable"
        else _document(patches.expectation(found.site_packages)),
    )
    return data | serve(report, built, about, watch, left)


def _document(data: dict[str, object]) -> str:
    return json.dumps(data, indent=2) + "\n"


def read_facts(folder: Path, name: str, tp: int = 1) -> ModelFacts:
    """Return what the builders must know of a model, from its config.json and headers.

    Args:
        folder: the model's.
        name: under which it is served.
        tp: tensor-parallel size.

    Raises:
        CheckpointError: it is not a model's folder.
    """
    config = models.read_config(folder)
    own = config.get("quantization_config") or config.get("compression_config") or {}
    method = str(own.get("quant_method") or "").lower() or None if isinstance(own, dict) else None
    modules: tuple[Module, ...] = ()
    block = None
    if method == "fp8" and own.get("weight_block_size"):
        n, k = own["weight_block_size"]
        block = (int(n), int(k))
        checkpoint = models.read_checkpoint(folder)
        names = [
            tensor.name
            for tensor in checkpoint.tensors.values()
            if tensor.dtype == "F8_E4M3" and len(tensor.shape) == 2
        ]
        modules = planning.engine_modules(checkpoint, names, tp)
    return ModelFacts(
        path=folder,
        name=name,
        quant_method=method,
        weight_block_size=block,
        sidecars=frozenset(f for f in _SIDECARS if (folder / f).is_file()),
        modules=modules,
    )


def device_of(found: Environment) -> Device:
    """Return the device that an engine of this environment computes on.

    A GPU counts only where the environment's torch was built for CUDA.
    """
    torch = found.packages.get("torch", "")
    if not found.gpus or "+cpu" in torch:
        return CPU
    known = [gpu.capability for gpu in found.gpus if gpu.capability is not None]
    capability = min(known) if known else None
    return Device("cuda", capability, len(found.gpus), found.gpus[0].name)


def _model(
    report: Reporter, backend: BackendName, model: str | None, python: Path, *, fetch: bool
) -> tuple[Path, str]:
    """Return the model's folder, and the name under which it is served."""
    if model is not None:
        folder = interpreter.resolve_model(report, model, python, fetch=fetch)
        return folder, folder.name if Path(model).expanduser().is_dir() else model
    if backend == "vllm":
        raise UsageError(
            "--model is missing: the embedded demo model is SGLang's",
            hint="--model /path/to/a/checkpoint, or --backend sglang",
        )
    from fp8ctl import demo

    folder = demo.ensure_model(report, python, fetch=fetch)
    report.say(f"no --model: serving the embedded demo model {folder.name}")
    return folder, folder.name


def _patches(
    report: Reporter, found: Environment, backend: BackendName, target: str
) -> SeriesStatus:
    """Return what is applied; refuse a tree that is half one thing and half another."""
    state = status.inspect(found.site_packages, backend)
    if state.interrupted or state.state == "partial":
        raise ConflictError(
            f"{found.site_packages} is partly patched: a command of fp8ctl was cut short there, "
            "or its files were changed since",
            hint=f"fp8ctl patch --backend {backend}{target}",
        )
    drifted = [f.path for f in state.files if f.state == "drifted"]
    if drifted:
        report.warn(f"not as released, and not fp8ctl's work: {', '.join(drifted)}")
    applied = ", ".join(p.id for p in state.patches if p.id in state.applied)
    report.say(f"patches applied: {applied or 'none'}")
    return state


def _source(
    asked: Asked, facts: ModelFacts, folder: Path, device: Device = CPU, given: Plan | None = None
) -> tuple[Source, Plan | None]:
    """Decide where the quantised weights come from.

    Args:
        given: a plan that was read from a file; None: one is made where it takes one.

    Raises:
        ConflictError: the checkpoint is quantised already, in another way than asked for.
        PlanDoesNotFitError: the model cannot be quantised as asked.
        UnsupportedError: it is not of a kind that fp8ctl quantises.
    """
    if asked.torchao_config is not None:
        return "torchao", None
    if asked.quantization is not None:
        return "method", None
    if facts.quant_method is not None:
        return _quantised_already(asked, facts)
    if asked.mode == "online":
        return "online", None
    block = None if asked.block_size is None else BlockSize.parse(asked.block_size)
    plan = given or planning.make_plan(
        folder,
        asked.backend,
        parse_mode(asked.mode),
        asked.tp,
        block,
        gpu=device.capability,
        keep=asked.keep,
        quantize=asked.quantize,
    )
    planning.require_fit(plan)
    return ("override" if asked.await_push else "checkpoint"), plan


def _quantised_already(asked: Asked, facts: ModelFacts) -> tuple[Source, None]:
    if facts.quant_method != "fp8":
        raise ConflictError(
            f"{facts.path} is quantised with {facts.quant_method!r}, not with FP8",
            hint=f"--quantization {shlex.quote(facts.quant_method or '')}, or a 16-bit checkpoint",
        )
    if asked.await_push:
        raise ConflictError(
            f"--await-push starts from the 16-bit checkpoint, and {facts.path} is in FP8: "
            "without a plan nobody knows when all tensors have come",
            hint="give the 16-bit checkpoint that it was made from as --model",
        )
    is_mode = "block" if facts.weight_block_size else "per-tensor"
    if asked.mode != is_mode:
        raise ConflictError(
            f"{facts.path} is an FP8 checkpoint already, {is_mode}; --mode {asked.mode} was asked",
            hint=f"--mode {is_mode}, or a 16-bit checkpoint",
        )
    return "checkpoint", None


def _build(request: LaunchRequest, found: Environment, backend: BackendName) -> LaunchPlan:
    """Return the engine's plan; where a patch is missing that cannot be applied, say that."""
    try:
        return base.builder(backend)(request)
    except ConflictError as e:
        if "missing_patch" in e.data:
            found.require_patchable(backend)
            if request.overlay is not None:
                e.hint = f"fp8ctl patch --backend {backend}{overlay.option(request.overlay)}"
        raise


def _with_plan(request: LaunchRequest, plan: Plan | None, backend: BackendName) -> LaunchRequest:
    """Put what the plan says into the request: the folder it will be in, or the override."""
    if plan is None:
        return request
    config = plan.quantization_config(backend)
    block = cast("Sequence[int] | None", config.get("weight_block_size"))
    model = replace(
        request.model,
        weight_block_size=(block[0], block[1]) if block else None,
        modules=planning.engine_modules(
            models.read_checkpoint(request.model.path),
            [tensor.name for tensor in plan.quantized],
            plan.tp,
        ),
    )
    if request.source == "override":
        return replace(request, model=model, override=config)
    from fp8ctl import quantizing

    folder = paths.cache_dir() / "quantized" / quantizing.cache_key(plan)
    return replace(request, model=replace(model, path=folder, quant_method="fp8"))


def _summary(plan: Plan) -> dict[str, object]:
    """Return the plan without its tensors, of which there may be thousands."""
    return {key: value for key, value in plan.to_json().items() if key != "tensors"}


def _cache_root(patches: SeriesStatus) -> Path:
    """Return the folder for what vLLM compiles from these very files."""
    key = json.dumps([sorted(patches.applied), sorted(patches.hashes.items())])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return paths.cache_dir() / "vllm" / digest


def _print(report: Reporter, built: LaunchPlan, plan: Plan | None, check: Level | None) -> None:
    """Show the command that is going to run, and why it is that one."""
    if plan is not None:
        for line in planning.explain(plan):
            report.say(line)
    for note in (*(plan.notes if plan is not None else ()), *built.notes):
        report.say(f"note: {note}")
    if base.option_value(built.argv, "--api-key") is not None:
        report.warn(
            "--api-key behind `--` is in the process list for everybody; "
            f"set {base.API_KEY_VARIABLE} instead"
        )
    if check != "live":
        report.say(f"ends with {'no check' if check is None else f'a check, --level {check}'}")
    report.data(built.command_line())
