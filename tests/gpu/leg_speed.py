"""16 bits, FP8 in blocks and FP8 per tensor: start, memory, tokens per second, by the engine's own
benchmark client. The model is random and has the shapes of an 8B one.
"""

from __future__ import annotations

import contextlib
import json
import random
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.gpu.leg import FailedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.gpu.ask import Backend
    from tests.gpu.host import Host, Server

Json = dict[str, Any]
_START = 200.0
_INPUT, _OUTPUT = 256, 128


def run(host: Host) -> None:
    """Do the leg of one engine."""
    leg = host.leg
    backend: Backend = "vllm" if leg.name.endswith("vllm") else "sglang"
    model = host.model("8b-a" if host.device == "cuda" else "tiny8b-a")
    data = leg.folder / "conversations.json"

    def prepare() -> None:
        with leg.step("models"):
            host.models(model.name, limit=150)
            conversations(data)
        with leg.step("begin as released"):
            host.released(backend)
        with leg.step("patch"):
            host.fp8ctl("patch", *host.target, "--backend", backend, limit=60)

    if not leg.job("prepare", prepare):
        return
    rows: list[Json] = []
    for name in ("16-bit", "block", "per-tensor"):
        if leg.wants(name):
            leg.job(name, partial(measure, host, backend, model, name, data, rows))
    table(host, rows)
    leg.job("end", lambda: _end(host, backend))


def measure(
    host: Host, backend: Backend, model: Path, name: str, data: Path, rows: list[Json]
) -> None:
    """Start one of them, and ask it alone and at once."""
    leg = host.leg
    row: Json = {"engine": backend, "weights": name}
    with contextlib.ExitStack() as stack:
        with leg.step("start") as seen:
            server = stack.enter_context(_started(host, backend, model, name))
            row["start_s"] = round(server.seconds, 1)
            row |= memory(host, server)
            seen |= {**row, "seen": f"ready after {server.seconds:.1f} s; {row.get('log', '')}"}
        rows.append(row)
        for at_once, count in ((1, 8), (8, 64), (64, 256)):
            if host.device == "cpu":
                at_once, count = min(at_once, 2), 2
            with leg.step(f"{at_once} at once") as seen:
                told = client(host, server, model, data, at_once, count)
                row[f"tokens_s_{at_once}"] = told["output_throughput"]
                seen |= {"client": told, "seen": f"{told['output_throughput']:.1f} tokens/s"}


@contextlib.contextmanager
def _started(host: Host, backend: Backend, model: Path, name: str) -> Iterator[Server]:
    # Graphs for as many requests as are asked at once.
    extra = host.extra(backend, alone=True)
    more = ["--cuda-graph-max-bs", "64"] if backend == "sglang" and host.device == "cuda" else []
    if name == "16-bit":
        with host.stock(backend, model, *more, limit=_START, alone=True) as server:
            yield server
    else:
        options = ("--mode", name, "--no-check")
        with host.launched(backend, model, *options, limit=_START, extra=[*extra, *more]) as server:
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
    lengths = ["--random-input-len", str(_INPUT), "--random-output-len", str(_OUTPUT)]
    common = ["--base-url", server.url, "--dataset-name", "random", "--num-prompts", str(count)]
    common += ["--max-concurrency", str(at_once), "--seed", "1", "--disable-tqdm", *lengths]
    if server.backend == "vllm":
        argv = ["-m", "vllm.entrypoints.cli.main", "bench", "serve", *common, "--ignore-eos"]
        argv += ["--model", server.model, "--tokenizer", str(model), "--save-result"]
        argv += ["--result-dir", str(out.parent), "--result-filename", out.name]
    else:
        argv = ["-m", "sglang.bench_serving", *common, "--backend", "sglang"]
        argv += ["--model", str(model), "--dataset-path", str(data), "--output-file", str(out)]
        argv += ["--random-range-ratio", "1"]
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
        words = ("".join(random_.choices(letters, k=5)) for _ in range(200))
        return " ".join(words)

    talks = [
        {"conversations": [{"from": "human", "value": text()}, {"from": "gpt", "value": text()}]}
        for _ in range(400)
    ]
    file.write_text(json.dumps(talks), encoding="utf-8")


def table(host: Host, rows: list[Json]) -> None:
    """Write the rows as JSON lines and as a table."""
    with (host.leg.folder / "speed.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    keys = ["engine", "weights", "start_s", "gpu_used_gb", "tokens_s_1", "tokens_s_8"]
    keys += ["tokens_s_64"]
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    (host.leg.folder / "speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _end(host: Host, backend: Backend) -> None:
    with host.leg.step("revert") as seen:
        host.fp8ctl("stop", "--all", limit=60)
        host.fp8ctl("revert", *host.target, "--backend", backend, limit=60)
        seen |= host.require_released(backend)
