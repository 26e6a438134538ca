"""The real SGLang 0.4.8 on the CPU, patched by fp8ctl for as long as these tests run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import HOME

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]


@dataclass(frozen=True)
class Cli:
    """fp8ctl as a user runs it, on the managed engine.

    Attributes:
        python: the engine's interpreter.
        api_key: in the environment of every command; "" for none.
    """

    python: Path
    api_key: str = ""

    def run(self, *argv: str, expect: int = 0, timeout: float = 600) -> Json:
        """Run a command with --json; return the document after checking the exit code."""
        done = self.raw(argv[0], "--json", *argv[1:], timeout=timeout)
        assert done.returncode == expect, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        document: Json = json.loads(done.stdout)
        assert document["ok"] is (expect == 0)
        body: Json = document["data" if expect == 0 else "error"]
        return body

    def raw(self, *argv: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command as it is."""
        key = {"FP8CTL_API_KEY": self.api_key} if self.api_key else {}
        return subprocess.run(
            [sys.executable, "-m", "fp8ctl", *argv],
            env=self.environment() | key,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @staticmethod
    def environment() -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FP8CTL_")}
        return {**clean, "FP8CTL_HOME": str(HOME), "FP8CTL_TESTER": str(os.getpid())}

    def engine(self, script: Path, *argv: str) -> str:
        """Run a script with the engine's interpreter; return what it printed last."""
        # Into a file: torch's shared-memory manager inherits stdout and would hold a pipe open.
        with tempfile.TemporaryFile("w+") as out:
            done = subprocess.run(
                [str(self.python), str(script), *argv],
                env={**self.environment(), "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"},
                stdout=out,
                stderr=out,
                timeout=300,
                check=False,
            )
            out.seek(0)
            text = out.read()
        assert done.returncode == 0, text
        return text.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def cli(engine_python: Path) -> Iterator[Cli]:
    """Return fp8ctl on a patched engine; afterwards the engine is pristine again."""
    cli = Cli(engine_python)
    target = ("--python", str(engine_python))
    cli.run("stop", "--all")
    cli.run("patch", *target)
    yield cli
    cli.run("stop", "--all")
    cli.run("revert", *target)
    [engine] = cli.run("patch", *target, "--list")["engines"]
    assert engine["state"] == "pristine"


@pytest.fixture(scope="session")
def demo_model(engine_python: Path) -> Path:
    """Return SmolLM2-135M-Instruct in BF16, fetched as the demo does; nothing is patched."""
    cli = Cli(engine_python)
    code = (
        "import sys; from pathlib import Path; from fp8ctl.demo import ensure_model;"
        "from fp8ctl.render import Reporter;"
        "print(ensure_model(Reporter(json_mode=True), Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(cli.python)],
        env=cli.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def other_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo model one large training step later: noise on every MLP."""
    folder = tmp_path_factory.mktemp("other") / "SmolLM2-other"
    state = load_file(str(demo_model / "model.safetensors"))
    noise = torch.Generator().manual_seed(7)
    for name, weight in state.items():
        if ".mlp." in name:
            step = torch.randn(weight.shape, generator=noise) * weight.float().std() * 0.3
            state[name] = (weight.float() + step).to(weight.dtype)
    return write_model(folder, demo_model, state, {})


@pytest.fixture(scope="session")
def small_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the first two layers of the demo model: quick to start, no sense to talk to."""
    folder = tmp_path_factory.mktemp("small") / "SmolLM2-two-layers"
    state = load_file(str(demo_model / "model.safetensors"))
    kept = {
        name: weight
        for name, weight in state.items()
        if ".layers." not in name or name.split(".layers.")[1].split(".")[0] in ("0", "1")
    }
    return write_model(folder, demo_model, kept, {"num_hidden_layers": 2})


def _attention(at: str) -> dict[str, tuple[int, ...]]:
    """Return four heads of 64, two of keys."""
    return {
        f"{at}.self_attn.q_proj.weight": (256, 256),
        f"{at}.self_attn.k_proj.weight": (128, 256),
        f"{at}.self_attn.v_proj.weight": (128, 256),
        f"{at}.self_attn.o_proj.weight": (256, 256),
    }


@pytest.fixture(scope="session")
def even_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random model whose heads can be shared by two ranks: SmolLM2 has nine."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    vocabulary = json.loads((demo_model / "config.json").read_text())["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, 256), "model.norm.weight": (256,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {
            **_attention(at),
            f"{at}.mlp.gate_proj.weight": (512, 256),
            f"{at}.mlp.up_proj.weight": (512, 256),
            f"{at}.mlp.down_proj.weight": (256, 512),
            f"{at}.input_layernorm.weight": (256,),
            f"{at}.post_attention_layernorm.weight": (256,),
        }
    random = torch.Generator().manual_seed(3)
    state = {
        name: (torch.randn(shape, generator=random) * 0.05 + (len(shape) == 1)).bfloat16()
        for name, shape in shapes.items()
    }
    folder = tmp_path_factory.mktemp("even") / "random-two-layers"
    return write_model(folder, demo_model, state, sizes)


def write_model(folder: Path, source: Path, state: dict[str, torch.Tensor], changes: Json) -> Path:
    """Write a checkpoint with the tokenizer and the configuration of another."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, route: str, body: Json) -> httpx.Response:
    return httpx.post(url + route, json=body, timeout=300, trust_env=False)


def logprobs(url: str, text: str) -> tuple[list[int], list[float]]:
    """Return the token ids of a text, and the log-probability of every one but the first."""
    body = {
        "text": text,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = post(url, "/generate", body)
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["meta_info"]["input_token_logprobs"]
    return [token[1] for token in tokens], [token[0] for token in tokens[1:]]


def random_experts(demo_model: Path, folder: Path, spread: float = 0.05) -> Path:
    """Write a tiny random mixture of experts with the demo model's tokenizer.

    Args:
        demo_model: whose tokenizer it gets.
        folder: where to write it.
        spread: standard deviation of its weights: with more of it, the model is surer of itself.
    """
    sizes = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "tie_word_embeddings": False,  # SGLang's class does not tie them
    }
    vocabulary = json.loads((demo_model / "config.json").read_text())["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, 256),
        "lm_head.weight": (vocabulary, 256),
        "model.norm.weight": (256,),
    }
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {
            **_attention(at),
            f"{at}.self_attn.q_norm.weight": (64,),
            f"{at}.self_attn.k_norm.weight": (64,),
            f"{at}.mlp.gate.weight": (4, 256),
            f"{at}.input_layernorm.weight": (256,),
            f"{at}.post_attention_layernorm.weight": (256,),
            **{
                f"{at}.mlp.experts.{e}.{part}_proj.weight": (256, 256)
                for e in range(4)
                for part in ("gate", "up", "down")
            },
        }
    random = torch.Generator().manual_seed(5)
    state = {
        name: (torch.randn(shape, generator=random) * spread + (len(shape) == 1)).bfloat16()
        for name, shape in shapes.items()
    }
    return write_model(folder, demo_model, state, sizes)
