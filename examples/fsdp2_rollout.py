"""Train in BF16 under FSDP2, serve in FP8, and update the server after every step.

    torchrun --nproc-per-node 2 examples/fsdp2_rollout.py
    python examples/fsdp2_rollout.py --steps 5 --lr 1e-5 --delta --record updates.jsonl
    python examples/fsdp2_rollout.py --via nccl -- --base-gpu-id 2

Starts a server of SmolLM2-135M-Instruct with `fp8ctl launch` (or takes one by --url), trains
the same model on this repository's own text, and after each step of Adam

- sends the weights with `fp8ctl.push.Rollout`: gathered by all ranks, quantised and sent by
  rank 0, from memory to memory,
- lets the server generate, and compares the log-probabilities of the generated tokens with
  those of the trainer: k3 is exp(d) - 1 - d of their difference d, which estimates the KL
  divergence between the two. `stale` is the same for the answers from before the update: what
  a server would show that missed it.

On CPUs by gloo, on GPUs by NCCL. With `--via nccl` the weights go to the server over such a group,
too; there the server needs GPUs that the trainer's ranks have not: `--base-gpu-id` is SGLang's
word for that. Needs torch and fp8ctl, and an engine that fp8ctl finds
(`fp8ctl install sglang`, `fp8ctl patch`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script sees its own folder only

from examples import llama  # noqa: E402
from fp8ctl.manifest import Plan  # noqa: E402
from fp8ctl.push import Rollout  # noqa: E402
from fp8ctl.signals import interruptible  # noqa: E402
from fp8ctl.stream import Ranks  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Sample = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    asked = arguments()
    if "RANK" not in os.environ:  # python instead of torchrun
        words = ["--standalone", "--nproc-per-node", "2", __file__, *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])
    with interruptible(), process_group() as (rank, device):
        with served(asked) if rank == 0 else contextlib.nullcontext() as found:
            setup: Any = shared({**found, "ids": texts(found["url"], asked)} if found else None)
            rows = train(asked, setup, rank, device)
        if rank == 0 and asked.json:
            print(json.dumps({"url": setup["url"], "steps": rows}, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="FSDP2 in BF16, rollouts in FP8.")
    parser.add_argument("--model", help="a Llama's folder; left out: the demo model of fp8ctl")
    parser.add_argument("--backend", default="sglang", choices=("sglang", "vllm"))
    parser.add_argument("--python", help="interpreter of the engine's environment")
    parser.add_argument("--mode", default="block", choices=("block", "per-tensor"))
    parser.add_argument("--tp", type=int, default=1, help="GPUs of the server")
    parser.add_argument("--url", help="a server that runs already; needs --plan")
    parser.add_argument("--plan", help="its plan: manifest.json of `fp8ctl plan --out`")
    parser.add_argument("--via", default="ipc", choices=("ipc", "nccl", "disk"))
    parser.add_argument("--delta", action="store_true", help="send only what changed")
    parser.add_argument("--record", type=Path, help="write a line for each tensor to this file")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--tokens", type=int, default=256, help="of a step, on each rank")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answer", type=int, default=16, help="tokens that are generated")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("engine", nargs="*", help="arguments of the engine, behind --")
    asked = parser.parse_args()
    if asked.url and not asked.plan:
        parser.error("--url needs --plan: the plan that the server was started with")
    return asked


# --- the update: all that a trainer needs ---------------------------------------------------------


def train(asked: Any, setup: Any, rank: int, device: torch.device) -> list[dict[str, Any]]:
    """Train, update, generate, compare; return a row for each step."""
    model = llama.load(Path(setup["model"])).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Master weights and Adam in FP32, arithmetic and communication of weights in BF16.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers: Any = model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    adam = torch.optim.Adam(model.parameters(), lr=asked.lr)

    plan = Plan.from_json(setup["plan"])
    # The ranks wait for each other on a CPU group; rank 0 quantises and sends.
    ranks = Ranks(dist.new_group(backend="gloo"), source=0)
    rows: list[dict[str, Any]] = []
    with Rollout(
        setup["url"], plan, via=asked.via, delta=asked.delta, record=asked.record
    ) as rollout:
        sample = generate(setup, asked, device)
        for step in range(1, asked.steps + 1):
            loss = optimise(model, adam, batch(setup["ids"], asked, step, rank).to(device))
            stale = k3(model, sample)
            done = rollout.update(model.named_parameters(), version=f"step-{step}", ranks=ranks)
            sample = generate(setup, asked, device)
            rows.append({"step": step, "loss": loss, "k3": k3(model, sample), "stale": stale})
            if rank == 0:
                rows[-1]["update"] = done.to_json()
                say(rows[-1])
    return rows


def optimise(model: torch.nn.Module, adam: torch.optim.Adam, ids: torch.Tensor) -> float:
    """Take one step on a text; return the loss over all ranks."""
    loss = -llama.log_probabilities(model(ids), ids).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    adam.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    return round(total.item() / dist.get_world_size(), 4)


@torch.no_grad()
def k3(model: torch.nn.Module, sample: Sample) -> float:
    """Return the mean k3 over generated tokens, between trainer and server."""
    ids, theirs = sample
    ours = llama.log_probabilities(model(ids), ids)[:, -theirs.shape[1] :]
    d = ours - theirs
    return round((d.exp() - 1 - d).mean().item(), 6)


def batch(ids: Sequence[int], asked: Any, step: int, rank: int) -> torch.Tensor:
    """Return the text of a step and a rank: the tokens go round."""
    start = ((step - 1) * dist.get_world_size() + rank) * asked.tokens
    return torch.tensor([ids[(start + i) % len(ids)] for i in range(asked.tokens + 1)])[None]


# --- the server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def served(asked: Any) -> Iterator[dict[str, Any]]:
    """Start a server, and stop it afterwards; or take the one that was named."""
    target = ["--backend", asked.backend, *(("--python", asked.python) if asked.python else ())]
    if asked.url:
        plan = json.loads(Path(asked.plan).read_text())
        model = asked.model or plan["model"]
        yield {"url": asked.url, "plan": plan, "model": model, "backend": asked.backend}
        return
    model = asked.model or fp8ctl("launch", *target, "--dry-run")["source"]
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/plan.json"
        gpu = () if torch.cuda.is_available() else ("--gpu", "none")
        words = ("--model", model, "--backend", asked.backend, "--mode", asked.mode)
        fp8ctl("plan", *words, "--tp", str(asked.tp), *gpu, "--out", file)
        # Trainer and server follow the one plan.
        plan = json.loads(Path(file).read_text())
        started = ("--plan", file, "--port", str(free_port()), "--detach")
        engine = ("--", *asked.engine) if asked.engine else ()
        server = fp8ctl("launch", *target, *started, *engine)
    try:
        yield {"url": server["url"], "plan": plan, "model": model, "backend": asked.backend}
    finally:
        fp8ctl("stop", server["name"])


def fp8ctl(*words: str) -> dict[str, Any]:
    """Run a command of fp8ctl; return what it says."""
    end = words.index("--") if "--" in words else len(words)
    command = [sys.executable, "-m", "fp8ctl", *words[:end], "--json", *words[end:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        told, _ = process.communicate()
    except BaseException:
        process.terminate()  # it ends what it started, and takes its time for it
        process.wait()
        raise
    answer: dict[str, Any] = json.loads(told)
    if not answer["ok"]:
        error = answer["error"]
        sys.exit(f"fp8ctl {words[0]}: {error['message']}\n\nhint: {error['hint']}")
    data: dict[str, Any] = answer["data"]
    return data


def generate(setup: Any, asked: Any, device: torch.device) -> Sample:
    """Return token ids of prompts with answers, and the server's log-probabilities of these."""
    ids, each = setup["ids"], 24
    prompts = [ids[i * each : (i + 1) * each] for i in range(asked.prompts)]
    found = answered(setup, prompts, asked.answer) if dist.get_rank() == 0 else None
    answers: Any = shared(found)
    whole = [p + [token for token, _ in a] for p, a in zip(prompts, answers, strict=True)]
    told = [[value for _, value in answer] for answer in answers]
    return torch.tensor(whole, device=device), torch.tensor(told, device=device)


def answered(setup: Any, prompts: list[list[int]], count: int) -> list[list[tuple[int, float]]]:
    """Return the tokens that a server says behind each prompt, and their log-probabilities."""
    if setup["backend"] == "vllm":
        body = {"model": served_name(setup["url"]), "prompt": prompts, "max_tokens": count}
        more = {"temperature": 1.0, "ignore_eos": True, "logprobs": 0}
        more["return_tokens_as_token_ids"] = True
        choices = post(setup["url"], "/v1/completions", body | more)["choices"]
        told = [one["logprobs"] for one in sorted(choices, key=lambda one: one["index"])]
        ids = [[int(token.partition(":")[2]) for token in one["tokens"]] for one in told]
        values = [one["token_logprobs"] for one in told]
        return [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    sampling = {"temperature": 1.0, "max_new_tokens": count, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
    told = [
        one["meta_info"]["output_token_logprobs"] for one in post(setup["url"], "/generate", body)
    ]
    return [[(token, value) for value, token, _ in answer] for answer in told]


def texts(url: str, asked: Any) -> list[int]:
    """Return the tokens of this repository's own texts; the server has the tokenizer."""
    wanted = asked.steps * dist.get_world_size() * asked.tokens + asked.tokens
    ids: list[int] = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for start in range(0, len(text), 2000):
            if len(ids) < wanted:
                ids += tokens(url, text[start : start + 2000], asked.backend)
    return ids


def tokens(url: str, text: str, backend: str) -> list[int]:
    if backend == "vllm":
        found: list[int] = post(url, "/tokenize", {"prompt": text})["tokens"]
        return found
    body = {"text": text, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True}
    told = post(url, "/generate", body | {"logprob_start_len": 0})
    return [token for _, token, _ in told["meta_info"]["input_token_logprobs"]]


def served_name(url: str) -> str:
    with urllib.request.urlopen(url + "/v1/models", timeout=60) as answer:
        return str(json.load(answer)["data"][0]["id"])


def post(url: str, route: str, body: dict[str, Any]) -> Any:
    key = os.environ.get("FP8CTL_API_KEY")
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url + route, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


# --- several processes ----------------------------------------------------------------------------


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, torch.device]]:
    """Join the other ranks; on GPUs each has its own."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # As in the engines' processes: NCCL waits for ever between ranks that differ in it.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()


def shared(value: object) -> object:
    """Return on every rank what rank 0 gives."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def say(row: dict[str, Any]) -> None:
    done = row["update"]
    print(
        f"step {row['step']}: loss {row['loss']:.4f}, k3 {row['k3']:.6f} (stale"
        f" {row['stale']:.6f}); sent {done['sent']} of {done['sent'] + done['skipped']} tensors,"
        f" {done['bytes_sent'] / 1e6:.1f} MB in {done['stages']['total']:.2f} s;"
        f" {done['verified']} equal in every rank",
        file=sys.stderr,
        flush=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
