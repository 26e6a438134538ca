"""`python -m tests.gpu`, or better `sh tests/gpu/run.sh`: the legs, one after the other."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fp8ctl import environment
from fp8ctl.hardware import detect
from tests.gpu.host import Host
from tests.gpu.leg import Leg

Json = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a leg is and needs.

    Attributes:
        module: of this folder, with a function `run` that takes a Host.
        engines: that must be installed.
        gpus: that must be there.
        together: servers on the GPU at a time, unless --together says otherwise.
        about: in a line.
    """

    module: str
    engines: tuple[str, ...]
    about: str
    gpus: int = 1
    together: int = 1


LEGS = {
    "vllm": Kind("leg_vllm", ("vllm",), "the whole path on vLLM", together=4),
    "vllm-patches": Kind("leg_vllm_patches", ("vllm",), "V1, V2, refit and all three", together=4),
    "sglang": Kind("leg_sglang", ("sglang",), "the whole path on SGLang, and S3", together=4),
    "matrix": Kind("leg_matrix", ("sglang",), "every --quantization, --torchao-config", together=4),
    "8b-sglang": Kind("leg_eight", ("sglang",), "an 8B-shaped model: tokens/s and updates by ipc"),
    "8b-vllm": Kind("leg_eight", ("vllm",), "the same on vLLM"),
    "kernels": Kind("leg_kernels", (), "bench kernel, and the tests marked gpu"),
    "two": Kind("leg_two", (), "two GPUs: tensor parallelism, ipc and nccl", gpus=2),
}
# Parts of 8b-...: not of a run without names.
PARTS = {
    f"{part}-{engine}": LEGS[f"8b-{engine}"]
    for part in ("speed", "push")
    for engine in ("vllm", "sglang")
}
_MODULES = {"vllm": "vLLM 0.9.1", "sglang": "SGLang 0.4.8"}


def main() -> int:
    """Run the legs; return 1 where something failed."""
    asked = _arguments()
    out = Path(asked.out).resolve()
    work = Path(asked.work or tempfile.mkdtemp(prefix="fp8ctl-gpu-")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = _engine_python(asked.python)
    facts = _facts(python, asked.device)
    print(json.dumps(facts), flush=True)
    (out / "host.jsonl").open("a").write(json.dumps(facts) + "\n")
    failed: list[str] = []
    try:
        for name in asked.legs or LEGS:
            reason = _missing(name, facts, asked.device)
            if reason:
                print(f"skip {name}: {reason}", flush=True)
                continue
            assert python is not None or not (LEGS | PARTS)[name].engines
            failed += _leg(name, asked, out, work, python or Path(sys.executable))
    finally:
        if not asked.work:
            shutil.rmtree(work, ignore_errors=True)
    print(f"failed: {len(failed)}{''.join(f'{chr(10)}  {one}' for one in failed)}", flush=True)
    return bool(failed)


def _leg(name: str, asked: argparse.Namespace, out: Path, work: Path, python: Path) -> list[str]:
    """Run a leg; return what failed."""
    kind = (LEGS | PARTS)[name]
    together = asked.together or kind.together
    print(f"=== {name}: {kind.about} (at most {asked.seconds:.0f} s)", flush=True)
    began = time.monotonic()
    leg = Leg(name, out / name, asked.seconds, together, tuple(asked.job))
    host = Host(leg, python, work, asked.device)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: host.give_up())
    try:
        module = import_module(f"tests.gpu.{kind.module}")
        leg.job("main", lambda: module.run(host))
    finally:
        leg.overtime()
        leg.job("stop", lambda: _stop(host))
        leg.close()
        told = ", ".join(f"{count} {result}" for result, count in sorted(leg.counts.items()))
        print(f"=== {name}: {told}; {time.monotonic() - began:.0f} s; {leg.folder}", flush=True)
    if leg.given_up:
        sys.exit(130)
    return [f"{name}/{one}" for one in leg.failed]


def _stop(host: Host) -> None:
    with host.leg.step("stop --all"):
        host.fp8ctl("stop", "--all", limit=60)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__)
    parser.add_argument("legs", nargs="*", metavar="LEG", help=f"of {', '.join(LEGS | PARTS)}")
    parser.add_argument("--python", type=Path, help="interpreter of the engines' environment")
    parser.add_argument("--out", default="gpu-evidence", help="folder for what is seen")
    parser.add_argument("--work", help="folder for models and caches, kept; default a temporary")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse")
    parser.add_argument("--together", type=int, help="servers at a time")
    parser.add_argument("--seconds", type=float, default=480.0, help="for each leg")
    parser.add_argument("--job", action="append", default=[], help="only jobs like this; repeat")
    asked = parser.parse_args()
    for name in asked.legs:
        if name not in LEGS | PARTS:
            parser.error(f"no leg {name!r}; there is {', '.join(LEGS | PARTS)}")
    return asked


def _engine_python(asked: Path | None) -> Path | None:
    if asked is not None:
        return asked.absolute()
    active = os.environ.get("VIRTUAL_ENV")
    if active and _version(Path(active) / "bin" / "python", "vllm", "sglang"):
        return Path(active) / "bin" / "python"
    return next(iter(environment.managed_environments()), None)


def _facts(python: Path | None, device: str) -> Json:
    """Return date, GPUs and engines."""
    machine = detect()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpus": [gpu.name for gpu in machine.gpus],
        "capabilities": [gpu.capability for gpu in machine.gpus],
        "driver": machine.driver,
        "problem": machine.problem,
        "python": None if python is None else str(python),
        "packages": {}
        if python is None
        else _version(
            python, "vllm", "sglang", "torch", "triton", "torchao", "gemlite", "bitsandbytes"
        ),
    }


def _version(python: Path, *packages: str) -> dict[str, str]:
    code = (
        "import sys, json, importlib.metadata as m\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    try:
        done = subprocess.run(
            [str(python), "-c", code, *packages], capture_output=True, check=False, timeout=60
        )
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, ValueError):
        return {}
    return found


def _missing(name: str, facts: Json, device: str) -> str:
    """Return why a leg cannot run here; "" if it can."""
    kind = (LEGS | PARTS)[name]
    if device == "cpu":
        # SGLang's CPU engine stands in for vLLM where the leg's course is to be rehearsed.
        if name.endswith("-vllm"):
            return "vLLM 0.9.1 does not run on a CPU"
    elif len(facts["gpus"]) < kind.gpus:
        seen = ", ".join(facts["gpus"]) or facts["problem"] or "no GPU"
        return f"needs {kind.gpus} CUDA device(s), found {seen}"
    for engine in ("sglang",) if device == "cpu" else kind.engines:
        found = facts["packages"].get(engine)
        if found is None:
            return f"{_MODULES[engine]} is not in {facts['python'] or 'any environment here'}"
        if found not in _MODULES[engine]:
            return f"{facts['python']} has {engine} {found}, expected {_MODULES[engine]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
