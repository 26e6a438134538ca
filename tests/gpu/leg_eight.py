"""An 8B-shaped random model in 16 bits, FP8 in blocks, FP8 per tensor and online.

Legs `speed-...`: start, memory, tokens per second by the engine's own benchmark client. Legs
`push-...`: updates of every weight by ipc. Legs `8b-...`: both, of one start each.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.gpu import ask, path
from tests.gpu.host import Trainer
from tests.gpu.leg import FailedError, SkippedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.gpu.ask import Backend
    from tests.gpu.host import Host, Server

Json = dict[str, Any]
_START = 200.0
_INPUT, _OUTPUT = 256, 128
WEIGHTS = ("block", "16-bit", "per-tensor", "online")
UPDATES = 7  # the first is told apart: it compiles
#: Seconds of an update, its part of ours in 16 bits, seconds of a worker that is checked.
UPDATE, PART, CHECK = 1.0, 0.6, 1.0


def run(host: Host) -> None:
    """Do the leg of one engine."""
    leg = host.leg
    what, _, engine = leg.name.partition("-")
    backend: Backend = "vllm" if engine == "vllm" else "sglang"
    model = host.model("8b-a" if host.device == "cuda" else "tiny8b-a")
    data = leg.folder / "conversations.json"

    def prepare() -> None:
        with leg.step("models"):
            host.models(model.name, limit=150)
            conversations(data)
        with leg.step("begin as released"):
            host.released(backend)
        with leg.step("patch"):
            # Not force-fp8-serialized: with it vLLM does not quantise by itself.
            some = ("--patch", "refit", "--patch", "unscaled-guard") if backend == "vllm" else ()
            host.fp8ctl("patch", *host.target, "--backend", backend, *some, limit=60)

    if not leg.job("prepare", prepare):
        return
    rows: list[Json] = []
    with contextlib.ExitStack() as stack:
        trainer = None if what == "speed" else stack.enter_context(Trainer(host))
        if trainer is not None and host.device == "cuda":
            leg.job("copy", partial(copy_rate, host, trainer))
        for name in WEIGHTS:
            if not leg.wants(name):
                continue
            row: Json = {"engine": backend, "weights": name}
            rows.append(row)
            measured = data if what != "push" else None
            leg.job(name, partial(one, host, backend, model, row, measured, trainer))
            table(host, rows)
    if what != "speed" and host.device == "cuda":
        leg.job("bars", partial(bars, host, rows))
    leg.job("end", partial(path.reverted, host, backend))


def one(
    host: Host, backend: Backend, model: Path, row: Json, data: Path | None, trainer: Trainer | None
) -> None:
    """Start one of them; ask it alone and at once; push into it."""
    leg = host.leg
    with contextlib.ExitStack() as stack:
        with leg.step("start") as seen:
            before = used()
            server = stack.enter_context(_started(host, backend, model, row["weights"]))
            row["start_s"] = round(server.seconds, 1)
            row |= memory(host, server)
            if before is not None:
                row["gpu_used_gb"] = round(row["gpu_used_gb"] - before, 2)
            seen |= {**row, "seen": f"ready after {server.seconds:.1f} s; {row['log']}"}
        if row["weights"] in ("block", "per-tensor"):
            leg.job(f"{row['weights']} check", partial(proof, host, server, row))
            leg.enter(row["weights"])
        if data is not None:
            leg.job(f"{row['weights']} speed", partial(speed, host, server, model, row, data))
            leg.enter(row["weights"])
        if trainer is not None:
            push(host, server, model, row, trainer)


def speed(host: Host, server: Server, model: Path, row: Json, data: Path) -> None:
    """Run the engine's client with one request at a time, then with more."""
    for at_once, count in ((1, 8), (8, 64), (64, 256)):
        if host.device == "cpu":
            at_once, count = min(at_once, 2), 2
        with host.leg.step(f"{at_once} at once") as seen:
            told = client(host, server, model, data, at_once, count)
            row[f"tokens_s_{at_once}"] = round(told["output_throughput"], 1)
            seen |= {"client": told, "seen": f"{told['output_throughput']:.1f} tokens/s"}


def proof(host: Host, server: Server, row: Json) -> None:
    """Check every weight, twice, while somebody asks the server for tokens."""
    for turn in ("cold", "warm"):
        with (
            host.leg.step(f"check --level weights, {turn}") as seen,
            ask.meanwhile(server.url, server.backend, server.model) as waits,
        ):
            began = time.monotonic()
            told = host.data("check", server.url, "--level", "weights", limit=120)
            wall = time.monotonic() - began
            workers = told["weights"]["seconds"]
            spent = max(worker["total"] for worker in workers)
            row[f"check_{turn}_s"] = round(spent, 3)
            seen |= {"workers": workers, "wall": wall, "waits": sorted(waits)[-3:]}
            seen["seen"] = f"{told['verdict']}; {spent:.3f} s in the worker, {wall:.1f} s in all; "
            seen["seen"] += f"meanwhile {len(waits)} answers, after {max(waits, default=0):.2f} s"
            if told["verdict"] != "fp8-ok" or not waits:
                raise FailedError(f"{seen['seen']}: {told['weights']['message']}")
            if turn == "warm" and spent > CHECK and host.device == "cuda":
                raise FailedError(f"{spent} s in the worker; the bar is {CHECK} s")


def push(
    host: Host, server: Server, model: Path, row: Json, trainer: Trainer, via: str = "ipc"
) -> None:
    """Push every weight, changed each time."""
    leg, name = host.leg, row["weights"]
    for megabytes in (1024, 512) if host.device == "cuda" else (64,):
        with leg.step(f"{UPDATES} updates, buckets of {megabytes} MiB") as seen:
            told = []
            for turn in range(UPDATES):
                more: Json = {"bucket_mb": megabytes, "version": f"{name}-{megabytes}-{turn}"}
                more["via"] = via
                more |= {"factor": 0.995 if turn % 2 else 1.01}
                more |= {"sixteen": name in ("16-bit", "online")}
                told.append(trainer.push(server, model, 60, **more))
            with (leg.folder / "push.jsonl").open("a") as file:
                file.writelines(json.dumps({"weights": name, **one}) + "\n" for one in told)
            walls = [round(one["wall"], 4) for one in told]
            if name != "online" and any(one["verified"] != one["sent"] for one in told):
                raise FailedError(f"equal: {[(one['verified'], one['sent']) for one in told]}")
            middle = round(statistics.median(walls[1:]), 4)
            row |= {
                f"push_s_{megabytes}": middle,
                "push_gb": round(told[-1]["bytes_sent"] / 1e9, 3),
            }
            seen |= {"walls": walls, "stages": told[-1]["stages"], "loading": told[-1]["loading"]}
            seen["seen"] = f"first {walls[0]} s, then {min(walls[1:])} to {max(walls[1:])} s"
            seen["seen"] += f", median {middle} s; {row['push_gb']:.2f} GB"


def bars(host: Host, rows: list[Json]) -> None:
    """Compare the updates with what was promised."""
    by_name = {row["weights"]: row for row in rows}
    fp8, wide = by_name.get("block", {}), by_name.get("16-bit", {})
    for size in ("512", "1024"):
        with host.leg.step(f"bars, buckets of {size} MiB") as seen:
            ours, theirs = fp8.get(f"push_s_{size}"), wide.get(f"push_s_{size}")
            if ours is None or theirs is None:
                raise SkippedError("block and 16-bit were not both measured")
            seen["seen"] = f"{ours} s, bar {UPDATE} s; {ours / theirs:.2f} of 16 bits, bar {PART}"
            if ours > UPDATE or ours > PART * theirs:
                raise FailedError(seen["seen"])


def copy_rate(host: Host, trainer: Trainer) -> None:
    with host.leg.step("a copy on the GPU") as seen:
        seen |= trainer.do({"copy": True}, 60)
        seen["seen"] = f"{seen['copy_gb_s']:.0f} GB/s, reads and writes, {seen['device']}"


@contextlib.contextmanager
def _started(host: Host, backend: Backend, model: Path, name: str) -> Iterator[Server]:
    # Graphs for as many requests as are asked at once.
    extra = host.extra(backend, alone=True)
    more = ["--cuda-graph-max-bs", "64"] if backend == "sglang" and host.device == "cuda" else []
    if name == "16-bit":
        # With the entry module, which takes pushes: the others have it as well.
        with host.stock(backend, model, *more, limit=_START, alone=True, hooks=True) as server:
            yield server
    else:
        options = ("--mode", name, "--no-check")
        again = int(backend == "vllm")
        with host.launched(
            backend, model, *options, limit=_START, extra=[*extra, *more], again=again
        ) as server:
            yield server


def memory(host: Host, server: Server) -> Json:
    """Return what the engine's log says of its weights, and what the GPU has in use."""
    log = server.log or host.work / "home" / "state" / "servers" / server.name / "server.log"
    words = ["Model loading took", "Load weight end", "GPU KV cache size", "KV Cache is allocated"]
    words += ["max_total_num_tokens"]
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    told = [line[-200:] for word in words for line in lines if word in line][:4]
    return {"log": " | ".join(told), "gpu_used_gb": used()}


def used() -> float | None:
    """Return GB in use on the first GPU; None without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return round(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / 1e9, 2)
    except pynvml.NVMLError:
        return None


def client(host: Host, server: Server, model: Path, data: Path, at_once: int, count: int) -> Json:
    """Run the engine's benchmark client; return what it saved."""
    out = host.leg.folder / f"{host.leg.job_name}-{at_once}.json"
    out.unlink(missing_ok=True)
    common = ["--base-url", server.url, "--num-prompts", str(count), "--seed", "1"]
    common += ["--max-concurrency", str(at_once), "--disable-tqdm", "--dataset-path", str(data)]
    if server.backend == "vllm":
        # Its random data set draws tokens, which are others once they were text.
        argv = ["-m", "vllm.entrypoints.cli.main", "bench", "serve", *common, "--ignore-eos"]
        argv += ["--dataset-name", "sharegpt", "--sharegpt-output-len", str(_OUTPUT)]
        argv += ["--model", server.model, "--tokenizer", str(model), "--save-result"]
        argv += ["--result-dir", str(out.parent), "--result-filename", out.name]
    else:
        argv = ["-m", "sglang.bench_serving", *common, "--backend", "sglang"]
        argv += ["--dataset-name", "random", "--random-range-ratio", "1"]
        argv += ["--random-input-len", str(_INPUT), "--random-output-len", str(_OUTPUT)]
        argv += ["--model", str(model), "--output-file", str(out)]
    done = host.leg.run([host.python, *argv], host.engine_env, 100)
    if done.returncode or not out.exists():
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise FailedError(f"the client: exit {done.returncode}: {last}")
    found: Json = json.loads(out.read_text().splitlines()[-1])
    if found["completed"] != count:
        raise FailedError(f"{found['completed']} of {count} requests were answered")
    return {key: value for key, value in found.items() if not isinstance(value, list)}


def conversations(file: Path) -> None:
    """Write conversations as ShareGPT has them, which SGLang's client would fetch."""
    random_ = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def text() -> str:
        # A token a byte: with the blanks as many as a prompt is to have.
        words = ("".join(random_.choices(letters, k=5)) for _ in range(_INPUT // 6))
        return " ".join(words)

    talks = [
        {"conversations": [{"from": "human", "value": text()}, {"from": "gpt", "value": text()}]}
        for _ in range(400)
    ]
    file.write_text(json.dumps(talks), encoding="utf-8")


def table(host: Host, rows: list[Json]) -> None:
    """Write the rows as JSON lines and as a table."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (host.leg.folder / "rows.jsonl").write_text(text, encoding="utf-8")
    keys = ["engine", "weights", "start_s", "gpu_used_gb", "tokens_s_1", "tokens_s_8"]
    keys += ["tokens_s_64", "check_warm_s", "push_s_1024", "push_s_512", "push_gb"]
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    (host.leg.folder / "rows.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
