"""Scenarios in the real SGLang 0.4.8 on a CPU, run by the engine's own interpreter.

    PYTHONPATH=PATCHED_TREE SGLANG_USE_CPU_ENGINE=1 python sglang_scenarios.py FOLDER [SCENARIO...]

Writes FOLDER/seen.json: scenario -> what was seen. Models are tiny and random;
nothing here knows what a test expects.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FP8_MAX = 448.0
State = dict[str, torch.Tensor]
TWO_RANKS = "two ranks"
_HIDDEN, _INNER, _VOCAB, _HEAD = 256, 512, 512, 64


def config(kind: str, quantization: dict[str, object] | None) -> dict[str, object]:
    """Return the config.json of a tiny model."""
    common: dict[str, object] = {
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "square" else 2,
        "head_dim": _HEAD,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": kind == "tied",
        "torch_dtype": "bfloat16",
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    if kind == "moe":
        common |= {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "moe_intermediate_size": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    else:
        common |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if quantization:
        common["quantization_config"] = quantization
    return common


def weights(kind: str, seed: int) -> State:
    """Return random BF16 weights; matrices differ in size by an order of magnitude,
    so that a stale or swapped scale shows."""
    g = torch.Generator().manual_seed(seed)
    kv = (4 if kind == "square" else 2) * _HEAD
    q = 4 * _HEAD
    state: State = {}

    def put(name: str, *shape: int) -> None:
        size = 0.03 * (1 + (len(state) * 7 + seed * 5) % 6)
        state[name] = (torch.randn(*shape, generator=g) * size).bfloat16()

    put("model.embed_tokens.weight", _VOCAB, _HIDDEN)
    for i in range(2):
        at = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", q, _HIDDEN),
            ("self_attn.k_proj", kv, _HIDDEN),
            ("self_attn.v_proj", kv, _HIDDEN),
            ("self_attn.o_proj", _HIDDEN, q),
        ):
            put(f"{at}{name}.weight", rows, columns)
        if kind == "moe":
            put(f"{at}mlp.gate.weight", 4, _HIDDEN)
            for norm in ("q_norm", "k_norm"):
                state[f"{at}self_attn.{norm}.weight"] = torch.ones(_HEAD).bfloat16()
            for e in range(4):
                put(f"{at}mlp.experts.{e}.gate_proj.weight", 128, _HIDDEN)
                put(f"{at}mlp.experts.{e}.up_proj.weight", 128, _HIDDEN)
                put(f"{at}mlp.experts.{e}.down_proj.weight", _HIDDEN, 128)
        else:
            put(f"{at}mlp.gate_proj.weight", _INNER, _HIDDEN)
            put(f"{at}mlp.up_proj.weight", _INNER, _HIDDEN)
            put(f"{at}mlp.down_proj.weight", _HIDDEN, _INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{norm}.weight"] = torch.ones(_HIDDEN).bfloat16()
    state["model.norm.weight"] = torch.ones(_HIDDEN).bfloat16()
    if kind != "tied":
        put("lm_head.weight", _VOCAB, _HIDDEN)
    return state


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def quantized(state: State, mode: str) -> State:
    """Return a checkpoint in FP8: block (128x128), per-tensor or static; BF16 for online."""
    out: State = {}
    for name, tensor in state.items():
        if mode == "online" or not is_linear(name):
            out[name] = tensor
            continue
        w = tensor.float()
        if mode == "block":
            n, k = w.shape
            blocks = w.view(n // 128, 128, k // 128, 128)
            scale = blocks.abs().amax((1, 3)) / FP8_MAX
            codes = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view(n, k)
            out[f"{name}_scale_inv"] = scale
        else:
            scale = (w.abs().max() / FP8_MAX).reshape(1)
            codes = (w / scale).clamp(-FP8_MAX, FP8_MAX)
            out[f"{name}_scale"] = scale
            if mode == "static":
                # gate and up of a fused module share a slot, so they must agree.
                out[name.replace(".weight", ".input_scale")] = torch.tensor([0.02])
        out[name] = codes.to(torch.float8_e4m3fn)
    return out


def quantization_config(mode: str) -> dict[str, object] | None:
    if mode == "online":
        return None
    scheme = "static" if mode == "static" else "dynamic"
    found: dict[str, object] = {"quant_method": "fp8", "activation_scheme": scheme}
    if mode == "block":
        found["weight_block_size"] = [128, 128]
    return found


def save(folder: Path, state: State, cfg: dict[str, object]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        str(folder / "model.safetensors"),
        metadata={"format": "pt"},
    )
    return folder


class Engine:
    """The engine's own model runner on one checkpoint."""

    def __init__(
        self,
        path: Path,
        *,
        quantization: str | None = None,
        load_format: str = "auto",
        rank: int = 0,
        ranks: int = 1,
        port: int | None = None,
    ):
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import parallel_state
        from sglang.srt.managers import expert_location
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.server_args import PortArgs, ServerArgs

        if parallel_state.model_parallel_is_initialized():  # by the engine before this one
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            expert_location._global_expert_location_metadata = None
        self.args = ServerArgs(
            model_path=str(path),
            device="cpu",
            attention_backend="torch_native",
            disable_cuda_graph=True,
            max_total_tokens=512,
            mem_fraction_static=0.2,
            dtype="bfloat16",
            quantization=quantization,
            random_seed=0,
            disable_overlap_schedule=True,
            load_format=load_format,
            log_level="error",
            skip_tokenizer_init=True,
            tp_size=ranks,
        )
        self.runner = ModelRunner(
            model_config=ModelConfig.from_server_args(self.args),
            mem_fraction_static=0.2,
            gpu_id=0,
            tp_rank=rank,
            tp_size=ranks,
            pp_rank=0,
            pp_size=1,
            nccl_port=port or PortArgs.init_new(self.args).nccl_port,
            server_args=self.args,
        )

    @property
    def model(self) -> Any:
        return self.runner.model

    def fresh(self, path: Path) -> Any:
        """Build another model from a checkpoint, as a new server would."""
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_loader import get_model

        return get_model(
            model_config=ModelConfig(
                str(path),
                model_override_args="{}",
                dtype="bfloat16",
                quantization=self.args.quantization,
            ),
            load_config=LoadConfig(load_format="auto"),
            device_config=DeviceConfig("cpu"),
        )

    def logits(self, model: Any = None) -> torch.Tensor:
        """Return the logits of one prefill and two decode steps."""
        from sglang import bench_one_batch
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        own, self.runner.model = self.runner.model, model or self.runner.model
        try:
            ids = [40, 72, 101, 33, 5, 17, 200, 61, 90, 12]
            request = Req(
                rid="0",
                origin_input_text="",
                origin_input_ids=ids,
                sampling_params=SamplingParams(temperature=0, max_new_tokens=4),
            )
            request.prefix_indices = []
            request.fill_ids = request.origin_input_ids
            request.extend_input_len = len(ids)
            request.logprob_start_len = len(ids) - 1
            self.runner.req_to_token_pool.clear()
            self.runner.token_to_kv_pool_allocator.clear()
            token, logits, batch = bench_one_batch.extend([request], self.runner)
            out = [logits.float().clone()]
            for _ in range(2):
                token, logits = bench_one_batch.decode(token, batch, self.runner)
                out.append(logits.float().clone())
            return torch.cat(out)
        finally:
            self.runner.model = own

    def addresses(self) -> dict[str, int]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: t.data_ptr() for name, t in named}

    def held(self) -> int:
        """Return the bytes of all tensors that the model's layers have, by whatever name."""
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for module in self.model.modules()
            for t in (
                *vars(module).values(),
                *module._parameters.values(),
                *module._buffers.values(),
            )
            if isinstance(t, torch.Tensor)
        }
        return sum(found.values())


def host_syncs(model: Any) -> int:
    """Count what in `apply` of any linear layer or experts asks a tensor for its value.

    The experts' kernel itself is left out: what stands in for it on a CPU does ask.
    """
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE, fused_moe
    from torch.utils._python_dispatch import TorchDispatchMode

    asking = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        seen = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Count.seen += func._schema.name in asking
            return func(*args, **(kwargs or {}))

    for module in model.modules():
        if isinstance(module, LinearBase):
            size = getattr(module, "input_size_per_partition", module.input_size)
            x = torch.randn(3, size, dtype=torch.bfloat16)
            with torch.no_grad(), Count():  # type: ignore[no-untyped-call]
                module.quant_method.apply(module, x, None)
        elif isinstance(module, FusedMoE):
            x = torch.randn(3, module.hidden_size, dtype=torch.bfloat16)
            kernel = fused_moe.fused_experts
            fused_moe.fused_experts = lambda x, *args, **kwargs: x
            try:
                with torch.no_grad(), Count():  # type: ignore[no-untyped-call]
                    module(x, torch.randn(3, module.num_experts, dtype=torch.bfloat16))
            finally:
                fused_moe.fused_experts = kernel
    return Count.seen


def refit(folder: Path, kind: str, mode: str, **ranks: Any) -> dict[str, object]:
    """A, then B, A, B, in shuffled pieces, buckets and from disk; against fresh models."""
    quantization = "fp8" if mode == "online" else None
    cfg = config(kind, quantization_config(mode))
    states = {x: quantized(weights(kind, seed), mode) for x, seed in (("A", 1), ("B", 2))}
    # Every rank has a copy of its own, where there are several.
    at = folder / f"{kind}-{mode}-{ranks.get('rank', 0)}"
    paths = {x: save(at / x, s, cfg) for x, s in states.items()}
    engine = Engine(paths["A"], quantization=quantization, **ranks)
    want = {x: engine.logits(engine.fresh(paths[x])) for x in "AB"}
    before, held = engine.addresses(), engine.held()
    equal = [torch.equal(engine.logits(), want["A"])]
    with torch.inference_mode():
        for step, (x, how) in enumerate([("B", "single"), ("A", "buckets"), ("B", "disk")]):
            pieces = list(states[x].items())
            random.Random(step).shuffle(pieces)
            if how == "disk":
                done, message = engine.runner.update_weights_from_disk(str(paths[x]), "auto")
                assert done, message
            else:
                size = 1 if how == "single" else 7
                for i in range(0, len(pieces), size):
                    engine.model.load_weights(pieces[i : i + size])
            equal.append(torch.equal(engine.logits(), want[x]))
    return {
        "equal": equal,
        "a_and_b_differ": not torch.equal(want["A"], want["B"]),
        "finite": bool(torch.isfinite(want["A"]).all() and torch.isfinite(want["B"]).all()),
        "moved": [n for n, at in engine.addresses().items() if before.get(n) != at],
        "grown": engine.held() - held,
        "host_syncs": host_syncs(engine.model),
    }


def refit_on_two_ranks(folder: Path, kind: str, mode: str) -> list[dict[str, object]]:
    """The same in two processes, each with one half of every layer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [folder / f"rank-{rank}" for rank in (0, 1)]
    running = []
    try:
        for rank, own in enumerate(folders):
            own.mkdir()
            job = json.dumps({"rank": rank, "ranks": 2, "port": port})
            argv = [sys.executable, __file__, str(own), f"refit {kind} {mode}", "--ranks", job]
            running.append(subprocess.Popen(argv))
        done = [process.wait(timeout=800) for process in running]
        assert done == [0, 0], done
    finally:
        for process in running:
            process.kill()
            process.wait()
    found = [json.loads((own / "seen.json").read_text()) for own in folders]
    return [one[f"refit {kind} {mode}"] for one in found]


def load(folder: Path, name: str, state: State, cfg: dict[str, object], **kw: Any) -> str:
    """Start an engine on a checkpoint; return "served" or the error that ended the start."""
    path = save(folder / name, state, cfg)
    try:
        engine = Engine(path, **kw)
        if not bool(torch.isfinite(engine.logits()).all()):
            return "served garbage"
    except RuntimeError as e:
        return str(e)
    return "served"


def fused_on_disk(state: State) -> State:
    """Return a per-tensor checkpoint with qkv and gate_up as one tensor each, like Phi-3."""
    out = dict(state)
    for i in range(2):
        at = f"model.layers.{i}."
        for fused, parts in (
            ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
        ):
            parent = fused.rpartition(".")[0]
            tensors = [out.pop(f"{at}{parent}.{p}.weight") for p in parts]
            out[f"{at}{fused}.weight"] = torch.cat(tensors)
    return out


def drop(state: State, name: str) -> State:
    return {k: v for k, v in state.items() if k != name}


def guard_cases(folder: Path) -> dict[str, str]:
    """Checkpoints that must and must not be refused."""
    dense, moe = weights("dense", 1), weights("moe", 1)
    per_tensor, block = quantized(dense, "per-tensor"), quantized(dense, "block")
    zero = {**dense, "model.layers.0.mlp.down_proj.weight": torch.zeros(_HIDDEN, _INNER).bfloat16()}
    zero_block = quantized(zero, "block")
    zero_block["model.layers.0.mlp.down_proj.weight_scale_inv"] = torch.ones(2, 4)
    zero_block["model.layers.0.mlp.down_proj.weight"] = torch.zeros(_HIDDEN, _INNER).to(
        torch.float8_e4m3fn
    )
    block_config = config("dense", quantization_config("block"))
    moe_block = config("moe", quantization_config("block"))
    moe_tensor = config("moe", quantization_config("per-tensor"))
    lost = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    return {
        "complete": load(folder, "g0", block, block_config),
        "zero block": load(folder, "g1", zero_block, block_config),
        "fused on disk": load(
            folder,
            "g2",
            quantized_fused(fused_on_disk(dense)),
            config("dense", quantization_config("per-tensor")),
        ),
        "missing expert scale": load(
            folder, "g3", drop(quantized(moe, "per-tensor"), lost), moe_tensor
        ),
        "missing expert block scale": load(
            folder, "g4", drop(quantized(moe, "block"), f"{lost}_inv"), moe_block
        ),
        "missing shard of qkv": load(
            folder, "g5", drop(block, "model.layers.0.self_attn.k_proj.weight"), block_config
        ),
        "missing per-tensor scale": load(
            folder,
            "g6",
            drop(per_tensor, "model.layers.1.self_attn.v_proj.weight_scale"),
            config("dense", quantization_config("per-tensor")),
        ),
        "16-bit as FP8": load(folder, "g7", dense, block_config),
        "dummy": load(folder, "g8", block, block_config, load_format="dummy"),
    }


def quantized_fused(state: State) -> State:
    """Quantise a fused-on-disk checkpoint per tensor: one scale for all parts of a module."""
    return quantized(state, "per-tensor")


def awaiting_push(folder: Path) -> dict[str, object]:
    """Start from 16-bit weights with an FP8 configuration, then bring the FP8 weights."""
    from sglang.srt.layers.quantization import fp8

    dense = weights("dense", 1)
    cfg = config("dense", quantization_config("block"))
    engine = Engine(save(folder / "await", dense, cfg))
    unfilled = [len(fp8.fp8ctl_unfilled(engine.model))]
    pieces = list(quantized(dense, "block").items())
    with torch.inference_mode():
        engine.model.load_weights(pieces[: len(pieces) // 2])
        unfilled.append(len(fp8.fp8ctl_unfilled(engine.model)))
        engine.model.load_weights(pieces[len(pieces) // 2 :])
        unfilled.append(len(fp8.fp8ctl_unfilled(engine.model)))
        engine.model.load_weights(
            [("model.layers.0.mlp.down_proj.weight", dense["model.layers.0.mlp.down_proj.weight"])]
        )
        unfilled.append(len(fp8.fp8ctl_unfilled(engine.model)))
    fp8.fp8ctl_forget(engine.model)
    unfilled.append(len(fp8.fp8ctl_unfilled(engine.model)))
    return {"unfilled": unfilled}


def online(folder: Path) -> dict[str, object]:
    """What the guard counts, and what is refused, where the engine quantises itself."""
    from sglang.srt.layers.quantization import fp8

    state, cfg = weights("moe", 1), config("moe", None)
    # An expert's tensors are loaded through one that looks like the first expert's.
    lost = "model.layers.1.mlp.experts.0.up_proj.weight"
    result: dict[str, object] = {
        "lost": load(folder, "o1", drop(state, lost), cfg, quantization="fp8")
    }
    engine = Engine(save(folder / "o0", state, cfg), quantization="fp8")
    unfilled = [fp8.fp8ctl_unfilled(engine.model)]
    fp8.fp8ctl_forget(engine.model)
    unfilled.append(fp8.fp8ctl_unfilled(engine.model))
    with torch.inference_mode():
        engine.model.load_weights(list(drop(state, lost).items()))
        unfilled.append(fp8.fp8ctl_unfilled(engine.model))
        before = engine.logits()
        try:
            codes = quantized({lost: state[lost]}, "per-tensor")[lost]
            engine.model.load_weights([(lost, codes)])
        except ValueError as e:
            result["fp8"] = str(e)
        result["kept"] = torch.equal(engine.logits(), before)
        unfilled.append(fp8.fp8ctl_unfilled(engine.model))
        engine.model.load_weights([(lost, state[lost])])
        unfilled.append(fp8.fp8ctl_unfilled(engine.model))
    return {**result, "unfilled": unfilled}


def override(folder: Path) -> dict[str, object]:
    """What ModelConfig makes of FP8CTL_BLOCK_QUANT_CONFIG."""
    from sglang.srt.configs.model_config import ModelConfig

    asked = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}
    plain = save(folder / "plain", weights("dense", 1), config("dense", None))
    own = save(folder / "own", {}, config("dense", quantization_config("block")))

    def seen(path: Path, quantization: str | None, overrides: str = "{}", **kw: Any) -> object:
        found = ModelConfig(
            str(path), model_override_args=overrides, quantization=quantization, **kw
        )
        return getattr(found.hf_config, "quantization_config", None)

    typed = json.dumps({"quantization_config": {**asked, "weight_block_size": [32, 32]}})
    os.environ.pop("FP8CTL_BLOCK_QUANT_CONFIG", None)
    result = {"unset": seen(plain, "fp8")}
    os.environ["FP8CTL_BLOCK_QUANT_CONFIG"] = json.dumps(asked)
    try:
        result |= {
            "set": seen(plain, "fp8"),
            "not fp8": seen(plain, None),
            "own config": seen(own, "fp8"),
            "command line": seen(plain, "fp8", typed),
            "draft": seen(plain, "fp8", is_draft_model=True),
        }
    finally:
        del os.environ["FP8CTL_BLOCK_QUANT_CONFIG"]
    return result


def scenarios(folder: Path, **ranks: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    for kind, mode in (
        ("dense", "block"),
        ("dense", "per-tensor"),
        ("square", "per-tensor"),
        ("dense", "static"),
        ("dense", "online"),
        ("moe", "block"),
        ("moe", "per-tensor"),
        ("moe", "online"),
        ("tied", "block"),
        ("tied", "online"),
    ):
        yield f"refit {kind} {mode}", lambda k=kind, m=mode: refit(folder, k, m, **ranks)  # type: ignore[misc]
    yield TWO_RANKS, lambda: refit_on_two_ranks(folder, "moe", "online")
    yield "online", lambda: online(folder)
    yield "guard", lambda: guard_cases(folder)
    if os.environ.get("FP8CTL_AWAIT_PUSH") == "1":  # the engine reads it once, when imported
        yield "await", lambda: awaiting_push(folder)
    yield "override", lambda: override(folder)


def main() -> None:
    folder = Path(sys.argv[1])
    wanted, ranks = sys.argv[2:], {}
    if "--ranks" in wanted:
        *wanted, _, job = wanted
        ranks = json.loads(job)
    known = scenarios(folder, **ranks)
    seen = {
        name: run()
        for name, run in known
        if name in wanted or (not wanted and name != TWO_RANKS)  # that one is long
    }
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
