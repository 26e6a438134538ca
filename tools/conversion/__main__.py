"""Measure conversions to FP8 in blocks of 128, beside `cp` and another converter, in turns.

    python -m tools.conversion FOLDER [--gb 3] [--shards 4] [--rounds 3] [--other PYTHON]
                               [--verify off,auto] [--device cpu,cuda] [--flush yes,no]
                               [--seconds 150]

Prints one JSON document. FOLDER gets a synthetic checkpoint (kept, for the next run) and
what is made of it (removed). Needs torch, and fp8ctl's repository on PYTHONPATH. `cuda` is
what fp8ctl does where there is a GPU: cores and GPU; left out, both are measured there, and
`cpu` alone elsewhere. --other names an interpreter with llm-compressor, whose
`model_free_ptq` then converts the same checkpoint; `make conformance` installs one.

A rate is bytes of the source for each second of the conversion itself, without the start of
an interpreter, and with that of the GPU. `cp` copies the source's files, all of its bytes,
without sharing blocks; `seconds` until it returns, `on_disk` until all of it is on the disk.
A conversion of fp8ctl is not done before its result is on the disk; `flush=no` is one that is
measured without that, as `cp` returns. So `of_cp` compares what is flushed with the copy on
the disk and what is not with the copy as it returns; `of_cp_unflushed` compares the first
with the second. `bar` says whether 90 % is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import synthetic

if TYPE_CHECKING:
    from collections.abc import Sequence

_BAR = 0.9

_OURS = """
import json, os, sys, time
from pathlib import Path
import torch
from fp8ctl import checkpoint
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels import native
from fp8ctl.planning import make_plan
plan = make_plan(Path(sys.argv[1]), None, Mode.BLOCK, 1, BlockSize(128, 128))
if sys.argv[5] == "no":  # as cp leaves it: in the system's memory
    os.fsync = lambda descriptor: None
    os.posix_fadvise = lambda *ignored: None
began = time.perf_counter()
device = torch.device(sys.argv[4])
native.available()  # compiled once on a machine, and then no more
made = checkpoint.convert(plan, Path(sys.argv[2]), verify=sys.argv[3], device=device)
seconds = time.perf_counter() - began
keep = {k: made[k] for k in ("device", "peak_memory", "verified", "bytes_after")}
print(json.dumps({"seconds": seconds, **keep}))
"""
_OTHER = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
from llmcompressor import model_free_ptq, __version__
began = time.perf_counter()
kept = ["lm_head", "re:.*embed_tokens"]
workers = int(sys.argv[3])
model_free_ptq(sys.argv[1], sys.argv[2], scheme="FP8_BLOCK", ignore=kept, max_workers=workers)
seconds = time.perf_counter() - began
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        peak = int(line.split()[1]) * 1024
print(json.dumps({"seconds": seconds, "peak_memory": peak, "version": __version__}))
"""


def ask(python: Path, script: str, words: Sequence[str], env: dict[str, str]) -> dict[str, Any]:
    """Run a script and return the JSON object that its last line is."""
    argv = [str(python), "-c", script, *words]
    before = os.times()
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode:
        raise SystemExit(f"error: {python} exited with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    spent = sum(after[i] - before[i] for i in (2, 3))  # of children, the interpreter's start too
    return {**found, "cpu_seconds": round(spent, 2)}


def copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy as `cp` does; the time until it returns, and until it is on the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    seconds = time.perf_counter() - began
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": seconds, "on_disk": time.perf_counter() - began}


def warm(source: Path) -> None:
    """Have all of the source in the system's memory, as far as it fits."""
    buffer = bytearray(1 << 24)
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=3.0, help="of the checkpoint, 10^9 bytes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path, help="an interpreter with llm-compressor")
    parser.add_argument("--workers", default="1,2", help="max_workers of llm-compressor, tried all")
    parser.add_argument("--verify", default="off,auto", help="ways of ours to measure")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cpu,cuda" if gpu else "cpu", help="measured in turns")
    parser.add_argument("--flush", default="yes,no", help="on the disk or not, measured in turns")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin no round after these")
    args = parser.parse_args(argv)

    began = time.monotonic()
    folder = args.folder.absolute()
    source = folder / "source"
    size = synthetic.make(source, int(args.gb * 1e9), args.shards)
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    threads = str(len(os.sched_getaffinity(0)))
    ways = [
        (device, way, flush)
        for flush in args.flush.split(",")
        for device in args.device.split(",")
        for way in (args.verify.split(",") if flush == "yes" else ("off",))
    ]
    if "cuda" in args.device and not gpu:
        parser.error("--device cuda: torch sees no GPU")
    kinds = ["cp", *(f"fp8ctl {device} verify={way} flush={flush}" for device, way, flush in ways)]
    if args.other is not None:
        kinds += [f"llm-compressor max_workers={n}" for n in args.workers.split(",")]
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    own = {**os.environ, "FP8CTL_HOME": str(folder / "home")}
    other = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    warm(source)
    for number in range(args.rounds):
        if number and time.monotonic() - began > args.seconds:
            break
        for kind in kinds:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            name, _, option = kind.partition(" ")
            if name == "cp":
                one = copy(source, out)
            elif name == "fp8ctl":
                device, way, flush = (word.rpartition("=")[2] for word in option.split())
                words = [str(source), str(out), way, device, flush]
                one = ask(Path(sys.executable), _OURS, words, own)
            else:
                words = [str(source), str(out), option.partition("=")[2], threads]
                one = ask(args.other, _OTHER, words, other)
            runs[kind].append({**one, "gb_s": round(size / one["seconds"] / 1e9, 3)})
            print(kind, runs[kind][-1], file=sys.stderr)
    shutil.rmtree(folder / "out", ignore_errors=True)
    best = {kind: max(run["gb_s"] for run in found) for kind, found in runs.items()}
    copied = min(run["on_disk"] for run in runs["cp"])
    rival = max((best[kind] for kind in kinds if kind.startswith("llm")), default=None)
    ours = [kind for kind in kinds if kind.startswith("fp8ctl")]
    flushed = {kind: kind.endswith("flush=yes") for kind in ours}
    to_disk = size / copied / 1e9
    of_cp = {k: round(best[k] / (to_disk if flushed[k] else best["cp"]), 3) for k in ours}
    of_cp_unflushed = {k: round(best[k] / best["cp"], 3) for k in ours if flushed[k]}
    document = {
        "source_bytes": size,
        "largest_shard": largest,
        "cores": int(threads),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "load": os.getloadavg()[0],
        "gb_s": best,
        "cp_on_disk_gb_s": round(to_disk, 3),
        "of_cp": of_cp,
        "of_cp_unflushed": of_cp_unflushed,
        "bar": {kind: of_cp[kind] >= _BAR for kind in ours},
        "of_other": rival and {kind: round(best[kind] / rival, 2) for kind in ours},
        "peak_of_largest_shard": {
            kind: round(max(run["peak_memory"] for run in runs[kind]) / largest, 2)
            for kind in kinds
            if kind != "cp"
        },
        "runs": runs,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(document, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
