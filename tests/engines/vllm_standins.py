"""vLLM 0.9.1's real FP8 classes on a CPU, for tests of the patches.

`python -m tests.engines.vllm_standins` reads jobs from stdin, one JSON line each, and runs
each in a process of its own on the `vllm/` below the job's tree; what the
scenario found is the line that it answers.
Real are: fp8.py, w8a8_utils.py, linear.py, parameter.py, FusedMoE and what
they take from each other. Stand-ins replace what needs a GPU, a network of
ranks or a package that only an engine's environment has; kernels are replaced
by their definition in plain torch.
"""

from __future__ import annotations

import enum
import importlib
import json
import logging
import os
import random
import sys
import traceback
import types
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.engines import forks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
HIDDEN, INTER, EXPERTS, BLOCK = 256, 512, 4, 128
SHAPES = {
    "self_attn.q_proj": (256, HIDDEN),
    "self_attn.k_proj": (128, HIDDEN),
    "self_attn.v_proj": (128, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 256),
    "mlp.gate_proj": (INTER, HIDDEN),
    "mlp.up_proj": (INTER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTER),
    "mix": (HIDDEN, HIDDEN),
}
EXPERT_SHAPES = {"gate_proj": (128, HIDDEN), "up_proj": (128, HIDDEN), "down_proj": (HIDDEN, 128)}
SHARDS = [
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]

Checkpoint = dict[str, torch.Tensor]
_torch: Any = torch  # for what torch has no types for

cutlass = False  # whether the platform that stands in has cutlass; set before install()


# --- kernels, by their definition ---------------------------------------------------------------


def scaled_fp8_quant(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vllm._custom_ops.scaled_fp8_quant, padding rows included."""
    wide = x.float()
    if scale is None:
        amax = wide.abs().amax(1, keepdim=True) if use_per_token_if_dynamic else wide.abs().amax()
        scale = amax.clamp(min=1e-12) / FP8_MAX
        scale = scale if use_per_token_if_dynamic else scale.reshape(1)
    q = (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    if num_token_padding is not None and q.shape[0] < num_token_padding:
        rest = torch.zeros(num_token_padding - q.shape[0], q.shape[1]).to(FP8)
        q = torch.cat([q.view(torch.uint8), rest.view(torch.uint8)]).view(FP8)
    return q, scale


def cutlass_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    assert scale_a.numel() in (1, a.shape[0])
    assert scale_b.numel() in (1, b.shape[1])
    out = (a.float() @ b.float()) * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)
    return (out if bias is None else out + bias).to(out_dtype)


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch._scaled_mm with one scale each, as on CUDA; torch's own is slow on a CPU."""
    assert scale_a.numel() == scale_b.numel() == 1
    return cutlass_scaled_mm(a, b, scale_a, scale_b, out_dtype, bias)


def block_dequantise(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return w.float() * wide[: w.shape[0], : w.shape[1]]


def block_linear(
    input: torch.Tensor,  # noqa: A002 - vLLM's name
    weight: torch.Tensor,
    block_size: list[int],
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    cutlass_block_fp8_supported: bool = False,
    use_aiter_and_is_supported: bool = False,
) -> torch.Tensor:
    x = input.reshape(-1, input.shape[-1])
    groups = x.float().view(x.shape[0], -1, block_size[1])
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_MAX
    q = (groups / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale
    out = q.view(x.shape) @ block_dequantise(weight, weight_scale).t()
    out = out if bias is None else out + bias
    return out.to(input.dtype).view(*input.shape[:-1], -1)


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_shape: list[int] | None = None,
    per_channel_quant: bool = False,
    **_: Any,
) -> torch.Tensor:
    """What the Triton kernel computes; scales are read as it reads them."""

    def mm(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, a: Any) -> torch.Tensor:
        if block_shape is not None:
            return block_linear(x, w, block_shape, s)
        q, scale = scaled_fp8_quant(x, a, use_per_token_if_dynamic=per_channel_quant)
        assert s.numel() == (w.shape[0] if per_channel_quant else 1)
        return ((q.float() @ w.float().t()) * scale.reshape(-1, 1) * s.reshape(1, -1)).to(x.dtype)

    out = torch.zeros_like(hidden_states)
    for e in range(w1.shape[0]):
        gate, up = mm(hidden_states, w1[e], w1_scale[e], a1_scale).chunk(2, -1)
        y = mm(torch.nn.functional.silu(gate) * up, w2[e], w2_scale[e], a2_scale)
        out = out + y * (topk_weights * (topk_ids == e)).sum(-1, keepdim=True).to(y.dtype)
    return out


def fused_topk(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    weights, ids = torch.softmax(gating_output.float(), -1).topk(topk)
    return weights, ids, None


# --- modules that stand in ----------------------------------------------------------------------


class _Level(enum.IntEnum):
    PIECEWISE = 3


class _Config:
    class compilation_config:  # noqa: N801 - vLLM's name
        level = 0  # eager: rows are padded, so unpadding is exercised

    class parallel_config:  # noqa: N801
        enable_expert_parallel = False


class _Platform:
    dispatch_key = "CPU"

    def is_cuda(self) -> bool:
        return cutlass

    def has_device_capability(self, capability: int) -> bool:
        return not os.environ.get("STANDIN_OLD_GPU")

    def get_device_capability(self) -> None:
        return None

    def fp8_dtype(self) -> torch.dtype:
        return FP8

    def __getattr__(self, name: str) -> Callable[[], bool]:
        if name.startswith("is_"):
            return lambda: False
        raise AttributeError(name)


class _Logger(logging.Logger):
    def warning_once(self, message: str) -> None:
        self.warning(message)

    info_once = warning_once


def _module(name: str, path: Path | None = None, **names: object) -> types.ModuleType:
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]  # a package whose own __init__ is not run
    module.__dict__.update(names)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module


warnings_logged: list[str] = []


def _init_logger(name: str) -> _Logger:
    logger = _Logger(name)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings_logged.append(record.getMessage())

    logger.addHandler(Keep())
    return logger


def _refuse(*args: object, **kwargs: object) -> Any:
    raise AssertionError("this stand-in must not be called")


def install(tree: Path) -> Any:
    """Make `vllm` importable from `tree` and return its fp8 module."""
    _torch._scaled_mm = scaled_mm
    root = tree / "vllm"
    layers = root / "model_executor" / "layers"
    _module("vllm", root)
    _module("vllm.model_executor", root / "model_executor")
    _module("vllm.model_executor.layers", layers)
    _module(
        "vllm.model_executor.layers.quantization",
        layers / "quantization",
        QuantizationMethods=str,
    )
    _module(
        "vllm.model_executor.layers.quantization.utils",
        layers / "quantization" / "utils",
    )
    _module(
        "vllm._custom_ops",
        scaled_fp8_quant=scaled_fp8_quant,
        cutlass_scaled_mm=cutlass_scaled_mm,
        cutlass_scaled_mm_supports_fp8=lambda capability: cutlass,
        cutlass_scaled_mm_supports_block_fp8=lambda capability: False,
        cutlass_group_gemm_supported=lambda capability: False,
    )
    _module("vllm.logger", init_logger=_init_logger)
    platform = _Platform()
    _module("vllm.platforms", current_platform=platform)
    _module("vllm.platforms.interface", CpuArchEnum=enum.Enum("CpuArchEnum", "X86"))
    _module(
        "vllm.config",
        CompilationLevel=_Level,
        ParallelConfig=object,
        get_current_vllm_config=_Config,
    )
    _module(
        "vllm.distributed",
        divide=lambda a, b: a // b,
        get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_world_size=lambda: 1,
        get_dp_group=lambda: types.SimpleNamespace(world_size=1, rank_in_group=0),
        get_ep_group=_refuse,
        split_tensor_along_last_dim=_refuse,
        tensor_model_parallel_all_gather=_refuse,
        tensor_model_parallel_all_reduce=_refuse,
    )
    _module("vllm.forward_context", ForwardContext=object, get_forward_context=_refuse)
    _module(
        "vllm.utils", direct_register_custom_op=lambda **kwargs: None, cdiv=lambda a, b: -(-a // b)
    )
    _module("vllm.triton_utils", HAS_TRITON=False)
    _module("vllm.attention")
    _module("vllm.attention.layer", Attention=type("Attention", (), {}))
    args = types.SimpleNamespace(FLOAT="float")
    _module("compressed_tensors")
    _module(
        "compressed_tensors.quantization",
        QuantizationArgs=object,
        QuantizationStrategy=args,
        QuantizationType=args,
    )
    _module(
        "vllm.model_executor.layers.quantization.utils.marlin_utils_fp8",
        apply_fp8_marlin_linear=_refuse,
        prepare_fp8_layer_for_marlin=_refuse,
        prepare_moe_fp8_layer_for_marlin=_refuse,
    )
    _module(
        "vllm.model_executor.layers.quantization.utils.quant_utils",
        is_layer_skipped=lambda prefix, ignored_layers, fused_mapping: False,
    )
    moe = "vllm.model_executor.layers.fused_moe"
    package = _module(moe, layers / "fused_moe", fused_experts=fused_experts)
    _module(f"{moe}.fused_moe", fused_topk=fused_topk, grouped_topk=_refuse)
    from vllm.model_executor.layers.fused_moe import layer

    for name in ("FusedMoE", "FusedMoEMethodBase", "FusedMoeWeightScaleSupported"):
        setattr(package, name, getattr(layer, name))

    library = _torch.library.Library("vllm", "DEF")
    library.define(
        "apply_w8a8_block_fp8_linear(Tensor input, Tensor weight, int[] block_size, "
        "Tensor weight_scale, Tensor? input_scale=None, Tensor? bias=None, "
        "bool cutlass_block_fp8_supported=False, bool use_aiter_and_is_supported=False) -> Tensor"
    )
    library.impl("apply_w8a8_block_fp8_linear", block_linear, "CPU")
    _torch.library.register_fake(
        "vllm::apply_w8a8_block_fp8_linear",
        lambda input, weight, *args, **kwargs: input.new_empty(  # noqa: A006
            (*input.shape[:-1], weight.shape[0])
        ),
        lib=library,
    )
    from vllm.model_executor.layers.quantization import fp8

    fp8.standin_library = library  # its registrations live as long as it does
    return fp8


# --- a model, checkpoints -----------------------------------------------------------------------


def config(fp8: Any, mode: str) -> Any:
    made = fp8.Fp8Config(
        is_checkpoint_fp8_serialized=mode != "online",
        activation_scheme="static" if mode == "static" else "dynamic",
        weight_block_size=[BLOCK, BLOCK] if mode == "block" else None,
    )
    made.packed_modules_mapping = {}
    return made


class Net(torch.nn.Module):
    """One decoder layer's linear modules and, on request, experts."""

    self_attn: Any
    mlp: Any
    mix: Any
    experts: Any

    def __init__(self, fp8: Any, mode: str, moe: bool = False, ranks: int = 1) -> None:
        super().__init__()
        from vllm.model_executor.layers import linear
        from vllm.model_executor.layers.fused_moe import FusedMoE

        torch.set_default_dtype(torch.bfloat16)
        quant: Any = {"quant_config": config(fp8, mode), "prefix": ""}

        def at(prefix: str) -> Any:
            return {**quant, "prefix": f"model.layers.0.{prefix}"}

        self.fp8 = fp8
        self.self_attn = torch.nn.Module()
        self.self_attn.qkv_proj = linear.QKVParallelLinear(
            HIDDEN, 64, 4, 2, bias=False, **at("self_attn.qkv_proj")
        )
        self.self_attn.o_proj = linear.RowParallelLinear(
            256, HIDDEN, bias=False, **at("self_attn.o_proj")
        )
        self.mlp = torch.nn.Module()
        self.mlp.gate_up_proj = linear.MergedColumnParallelLinear(
            HIDDEN, [INTER, INTER], bias=False, **at("mlp.gate_up_proj")
        )
        self.mlp.down_proj = linear.RowParallelLinear(
            INTER, HIDDEN, bias=False, **at("mlp.down_proj")
        )
        self.mix = linear.ReplicatedLinear(HIDDEN, HIDDEN, bias=False, **at("mix"))
        self.moe = moe
        if moe:
            self.experts = FusedMoE(
                EXPERTS, 2, HIDDEN, 128, renormalize=False, tp_size=ranks, **at("experts")
            )
        torch.set_default_dtype(torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.self_attn.qkv_proj(x)[0][..., :256]
        h = self.self_attn.o_proj(h)[0]
        gate, up = self.mlp.gate_up_proj(h)[0].chunk(2, -1)
        h = self.mlp.down_proj(torch.nn.functional.silu(gate) * up)[0]
        h = self.mix(h)[0]
        if self.moe:
            h = self.experts.quant_method.apply(
                layer=self.experts, x=h, router_logits=h[:, :EXPERTS].contiguous(),
                top_k=2, renormalize=False, activation="silu",
            )  # fmt: skip
        return h  # type: ignore[no-any-return]

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load as the model files of vLLM 0.9.1 do (qwen2.py:378-419, qwen3_moe.py:400-460)."""
        from vllm.model_executor.layers.fused_moe import FusedMoE

        def default_loader(param: Any, weight: torch.Tensor) -> None:
            assert param.size() == weight.size()
            param.data.copy_(weight)

        mapping = FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", EXPERTS)
        params: dict[str, Any] = dict(self.named_parameters())
        for name, weight in tensors:
            for fused, shard, shard_id in SHARDS:
                if f".{shard}." in name and "experts" not in name:
                    param = params[name.replace(shard, fused)]
                    param.weight_loader(param, weight, shard_id)
                    break
            else:
                for fused, shard, expert, shard_id in mapping:
                    if shard in name:
                        target = name.replace(shard, fused)
                        param = params[target]
                        param.weight_loader(
                            param, weight, target, shard_id=shard_id, expert_id=expert
                        )
                        break
                else:
                    param = params[name]
                    getattr(param, "weight_loader", default_loader)(param, weight)

    def process(self) -> None:
        for module in self.modules():
            method: Any = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)


def quantise_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = w.shape
    blocks = w.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    q = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return q.view(n, k), scale


def checkpoint(seed: int, mode: str, moe: bool = False) -> Checkpoint:
    """Return tensors by name; magnitudes differ per matrix and seed, so a stale scale shows."""
    torch.manual_seed(seed)
    shapes = dict(SHAPES)
    if moe:
        for e in range(EXPERTS):
            shapes |= {f"experts.{e}.{name}": shape for name, shape in EXPERT_SHAPES.items()}
    out: Checkpoint = {}
    for i, (name, (n, k)) in enumerate(shapes.items()):
        w = torch.randn(n, k) * (0.02 + 0.03 * ((i * seed) % 5))
        if mode in ("bf16", "online"):
            out[f"{name}.weight"] = w.bfloat16()
            continue
        if mode == "block":
            out[f"{name}.weight"], out[f"{name}.weight_scale_inv"] = quantise_blocks(w)
            continue
        scale = w.abs().max() / FP8_MAX
        out[f"{name}.weight"] = (w / scale).to(FP8)
        out[f"{name}.weight_scale"] = scale.reshape(1) if i % 2 else scale
        if mode == "static":
            shared = name.replace("up_proj", "gate_proj")  # w1 and w3 share one slot
            out[f"{name}.input_scale"] = torch.tensor(0.03 + 0.01 * seed + 0.001 * len(shared))
    return out


def dense(tensors: Checkpoint, moe: bool, x: torch.Tensor) -> torch.Tensor:
    """Return the model's output in FP32 from dequantised weights, nothing of vLLM involved."""

    def w(name: str) -> torch.Tensor:
        q = tensors[f"{name}.weight"]
        if f"{name}.weight_scale_inv" in tensors:
            return block_dequantise(q, tensors[f"{name}.weight_scale_inv"])
        return q.float() * tensors.get(f"{name}.weight_scale", torch.ones(()))

    def glu(x: torch.Tensor, at: str) -> torch.Tensor:
        gate, up = x @ w(f"{at}.gate_proj").t(), x @ w(f"{at}.up_proj").t()
        return (torch.nn.functional.silu(gate) * up) @ w(f"{at}.down_proj").t()

    h = x.float() @ w("self_attn.q_proj").t() @ w("self_attn.o_proj").t()
    h = glu(h, "mlp") @ w("mix").t()
    if not moe:
        return h
    weights, ids, _ = fused_topk(h, h[:, :EXPERTS], 2)
    out = torch.zeros_like(h)
    for e in range(EXPERTS):
        out += glu(h, f"experts.{e}") * (weights * (ids == e)).sum(-1, keepdim=True)
    return out


class HostSyncs(_torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
    """Collects operations that on a GPU wait for the device: fatal in a captured graph."""

    SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.SYNCS:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# --- scenarios ----------------------------------------------------------------------------------


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _fresh(fp8: Any, mode: str, moe: bool, tensors: Checkpoint, ranks: int = 1) -> Net:
    net = Net(fp8, mode, moe, ranks)
    net.load(tensors.items())
    net.process()
    return net


def _held(net: Net) -> int:
    """Return the bytes of all tensors that layers have, by whatever name."""
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for m in net.modules()
        for t in (*vars(m).values(), *m._parameters.values(), *m._buffers.values())
        if isinstance(t, torch.Tensor)
    }
    return sum(found.values())


def _inputs() -> torch.Tensor:
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(7)).bfloat16()


def refit(tree: Path, mode: str, experts: str, how: str) -> dict[str, Any]:
    """Load A, then B, A, B again into one net; compare each with a net built afresh."""
    fp8 = install(tree)
    moe, x = experts == "moe", _inputs()
    sets = {name: checkpoint(seed, mode, moe) for name, seed in (("A", 1), ("B", 2))}
    fresh = {name: _fresh(fp8, mode, moe, tensors)(x) for name, tensors in sets.items()}
    net = _fresh(fp8, mode, moe, sets["A"])

    def addresses() -> dict[str, int]:
        kept = [*net.named_parameters(), *net.named_buffers()]
        return {name: t.data_ptr() for name, t in kept}

    run: Callable[[torch.Tensor], torch.Tensor] = net
    syncs = HostSyncs()
    watch: Callable[[], AbstractContextManager[Any]] = lambda: syncs  # noqa: E731
    if how == "compiled":
        run = torch.compile(net, backend="eager", fullgraph=True)
        watch = nullcontext
    before, equal = addresses(), [torch.equal(run(x), fresh["A"])]
    held = _held(net)
    for step, name in enumerate(("B", "A", "B")):
        pieces = list(sets[name].items())
        random.Random(step).shuffle(pieces)  # any order, one tensor at a time
        for piece in pieces:
            net.load([piece])
        if step == 1:
            net.process()  # some trainers do; nothing is left to do
        with watch():
            equal.append(torch.equal(run(x), fresh[name]))
    return {
        "equal": equal,
        "addresses_kept": before == addresses(),
        "grown": _held(net) - held,
        "plain": all(type(p) is torch.nn.Parameter for p in net.parameters()),
        "host_syncs": [op for op in syncs.seen if op != "equal"],
        "different": _relative(fresh["A"], fresh["B"]),
        "error": {n: _relative(fresh[n], dense(sets[n], moe, x)) for n in sets},
    }


def spread(tree: Path, how: str) -> dict[str, Any]:
    """Refit experts that the engine quantises itself on each of two ranks.

    how: "tensor" or "expert" parallel; or "stacked", which is one rank that gets all
    experts as one tensor, as Llama 4 has them.
    """
    fp8 = install(tree)
    from vllm.model_executor.layers.fused_moe import layer

    _Config.parallel_config.enable_expert_parallel = how == "expert"
    ranks = 1 if how == "stacked" else 2
    a, b = (checkpoint(seed, "online", moe=True) for seed in (1, 2))
    equal, errors = [], []
    for rank in range(ranks):
        layer.get_tensor_model_parallel_rank = lambda rank=rank: rank
        net, want = (_fresh(fp8, "online", True, t, ranks).experts for t in (a, b))
        owner: Any = types.SimpleNamespace(experts=net)
        before = {k: v.clone() for k, v in net.state_dict(keep_vars=True).items()}
        pieces = [item for item in b.items() if item[0].startswith("experts.")]
        random.Random(rank).shuffle(pieces)
        if how == "stacked":
            for name, shard in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                stack = torch.stack([b[f"experts.{e}.{name}.weight"] for e in range(EXPERTS)])
                param = net.w2_weight if shard == "w2" else net.w13_weight
                param.weight_loader(param, stack, "w13_weight", shard_id=shard, expert_id=0)
        else:
            owner.named_parameters = lambda net=net: (
                (f"experts.{k}", v) for k, v in net.named_parameters()
            )
            Net.load(owner, pieces)
        for name in ("w13_weight", "w2_weight"):
            codes, scales = (getattr(net, n).data for n in (name, f"{name}_scale_expanded"))
            equal += [
                torch.equal(codes.view(torch.uint8), getattr(want, name).data.view(torch.uint8)),
                torch.equal(scales, getattr(want, f"{name}_scale_expanded")),
                not torch.equal(codes.view(torch.uint8), before[name].view(torch.uint8)),
            ]
        errors += _experts_errors(net, b, rank, how)
    return {"equal": equal, "errors": errors}


def _experts_errors(net: Any, tensors: Checkpoint, rank: int, how: str) -> list[float]:
    """Return how far what a rank holds is from the part of the checkpoint that is its own."""
    errors = []
    for e in range(net.w2_weight.shape[0]):
        expert = e + rank * net.w2_weight.shape[0] if how == "expert" else e
        w1, w2, w3 = (
            tensors[f"experts.{expert}.{n}.weight"] for n in ("gate_proj", "down_proj", "up_proj")
        )
        if how == "tensor":
            w1, w3, w2 = w1.chunk(2)[rank], w3.chunk(2)[rank], w2.chunk(2, 1)[rank]
        for name, w in (("w13_weight", torch.cat([w1, w3])), ("w2_weight", w2)):
            scale = getattr(net, f"{name}_scale_expanded")[e]
            errors.append(_relative(getattr(net, name)[e].float() * scale, w))
    return errors


def second_load(tree: Path, mode: str) -> dict[str, Any]:
    """Load a second time and say which tensors fail."""
    fp8 = install(tree)
    tensors = checkpoint(1, mode)
    net, failed = _fresh(fp8, mode, False, tensors), []
    for name, weight in tensors.items():
        try:
            net.load([(name, weight)])
        except (AttributeError, AssertionError):
            failed.append(name)
    return {"failed": failed}


def forward(tree: Path, mode: str, experts: str) -> dict[str, Any]:
    """Return what a net answers, as numbers that two trees can be compared by."""
    fp8 = install(tree)
    net = _fresh(fp8, mode, experts == "moe", checkpoint(1, mode, experts == "moe"))
    return {"out": net(_inputs()).float().flatten().tolist()}


def padded(tree: Path, mode: str) -> dict[str, Any]:
    """Say whether rows that nothing wrote reach the answers of those before them."""
    fp8 = install(tree)
    net, x = _fresh(fp8, mode, False, checkpoint(1, mode)), _inputs()
    beside = net(torch.cat([x, x.new_full((3, x.shape[1]), torch.inf)]))[: len(x)]
    return {"equal": torch.equal(net(x), beside)}


def fuse(tensors: Checkpoint) -> Checkpoint:
    """Return a per-tensor checkpoint whose qkv and gate_up are fused on disk, as Phi-3's are."""
    out = dict(tensors)
    for fused, parts in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        wide = [out.pop(f"{p}.weight").float() * out.pop(f"{p}.weight_scale") for p in parts]
        scale = torch.cat(wide).abs().max() / FP8_MAX
        out[f"{fused}.weight"] = (torch.cat(wide) / scale).to(FP8)
        out[f"{fused}.weight_scale"] = scale
    return out


def fused(tree: Path) -> dict[str, Any]:
    """Load a module that is fused on disk, twice where the tree can."""
    fp8 = install(tree)
    a, b = (fuse(checkpoint(seed, "per-tensor")) for seed in (1, 2))
    net, x = _fresh(fp8, "per-tensor", False, a), _inputs()
    result: dict[str, Any] = {"finite": bool(net(x).isfinite().all())}
    if hasattr(fp8, "_kernel_view"):
        want = _fresh(fp8, "per-tensor", False, b)(x)
        net.load(b.items())
        result["equal"] = torch.equal(net(x), want)
        qkv = net.self_attn.qkv_proj.weight_scale
        result["one_scale"] = bool((qkv == b["self_attn.qkv_proj.weight_scale"]).all())
    if hasattr(fp8, "fp8ctl_unfilled"):
        result["unfilled"] = fp8.fp8ctl_unfilled(net)
    return result


def guard(tree: Path, mode: str, what: str) -> dict[str, Any]:
    """Start from a checkpoint with something wrong, and say how the guard takes it."""
    fp8 = install(tree)
    tensors = checkpoint(1, mode, moe=True)
    net = Net(fp8, mode, moe=True)
    if what == "zero-block":
        tensors["mix.weight"], tensors["mix.weight_scale_inv"] = quantise_blocks(
            torch.zeros(HIDDEN, HIDDEN)
        )
        tensors["experts.0.down_proj.weight"].view(torch.uint8).zero_()
        tensors["experts.0.down_proj.weight_scale_inv"].fill_(1.0)
    elif what == "bf16":
        tensors = checkpoint(1, "bf16", moe=True)
    elif what == "dummy":
        tensors = {}
        for p in net.parameters():
            p.data.copy_(torch.rand(p.shape) * 1e-3)  # as initialize_dummy_weights
    elif what != "complete":
        del tensors[what]
    net.load(tensors.items())
    result: dict[str, Any] = {"unfilled": fp8.fp8ctl_unfilled(net), "error": ""}
    try:
        net.process()
    except RuntimeError as e:
        result["error"] = str(e)
    result["warnings"] = [w for w in warnings_logged if "unscaled-guard" in w]
    return result


def await_push(tree: Path, mode: str) -> dict[str, Any]:
    """Start from 16 bits, push FP8 in two halves, then push 16 bits over it."""
    fp8 = install(tree)
    net = Net(fp8, mode, moe=True)
    bf16, tensors = (checkpoint(1, kind, moe=True) for kind in ("bf16", mode))
    net.load(bf16.items())
    net.process()
    steps = {"started": fp8.fp8ctl_unfilled(net)}
    pieces = list(tensors.items())
    net.load(pieces[::2])
    steps["half"] = fp8.fp8ctl_unfilled(net)
    net.load(pieces[1::2])
    steps["pushed"] = fp8.fp8ctl_unfilled(net)
    x = _inputs()
    equal = torch.equal(net(x), _fresh(fp8, mode, True, tensors)(x))
    net.load([("mix.weight", bf16["mix.weight"])])
    steps["spoilt"] = fp8.fp8ctl_unfilled(net)
    net.load([("mix.weight", tensors["mix.weight"])])
    steps["mended"] = fp8.fp8ctl_unfilled(net)
    fp8.fp8ctl_forget(net)
    steps["forgotten"] = fp8.fp8ctl_unfilled(net)
    return {"steps": steps, "equal": equal, "warnings": warnings_logged}


def online(tree: Path) -> dict[str, Any]:
    """Count what a refit of a net that quantises itself brings, and send it FP8."""
    fp8 = install(tree)
    tensors, x = checkpoint(1, "online", moe=True), _inputs()
    net = _fresh(fp8, "online", True, tensors)
    steps = {"started": fp8.fp8ctl_unfilled(net)}
    fp8.fp8ctl_forget(net)
    steps["forgotten"] = fp8.fp8ctl_unfilled(net)
    # An expert's tensors are loaded through one that looks like the first expert's.
    lost = ("experts.0.up_proj.weight", "self_attn.k_proj.weight")
    net.load((k, v) for k, v in tensors.items() if k not in lost)
    steps["short"] = fp8.fp8ctl_unfilled(net)
    before, refused = net(x), []
    for name in lost:
        try:
            net.load([(name, tensors[name].to(FP8))])
        except ValueError as e:
            refused.append(str(e))
    kept = torch.equal(net(x), before)
    steps["refused"] = fp8.fp8ctl_unfilled(net)
    net.load((k, tensors[k]) for k in lost)
    steps["whole"] = fp8.fp8ctl_unfilled(net)
    return {"steps": steps, "refused": refused, "kept": kept}


def serialized(tree: Path) -> dict[str, Any]:
    """Say what `--quantization fp8` alone makes of a checkpoint, and which GEMM it takes."""
    fp8 = install(tree)
    made = config(fp8, "online")
    return {
        "serialized": made.is_checkpoint_fp8_serialized,
        "cutlass": fp8.cutlass_fp8_supported(),
        "per_token": fp8.Fp8LinearMethod(made).fp8_linear.use_per_token_if_dynamic,
    }


def worker(tree: Path, mode: str) -> dict[str, Any]:
    """Load folders through the worker extension, and compare its digests with the folders'."""
    from safetensors.torch import save_file

    from fp8ctl.kernels.digest import digest, to_text

    fp8 = install(tree)
    sets = {name: checkpoint(seed, mode, moe=True) for name, seed in (("A", 1), ("B", 2))}
    net: Any = _fresh(fp8, mode, True, sets["A"])
    _, ask = _extension(net)
    torn = {**sets["A"], "mix.weight": torch.zeros(1, 1)}

    def differing(want: Checkpoint) -> list[str]:
        report = ask("digests")
        assert "failed" not in report, report
        assert report["format"] == "checkpoint"
        held = {shard["name"]: shard["digest"] for shard in report["tensors"]}
        names = {k: v for k, v in want.items() if not k.endswith("input_scale")}
        assert held.keys() == names.keys()
        return [
            k
            for k, v in names.items()
            if held[k] != to_text(digest(v.reshape(-1) if v.dim() < 2 else v))
        ]

    result: dict[str, Any] = {"started": differing(sets["A"])}
    for name, tensors in (*sets.items(), ("torn", torn)):
        folder = tree / f"{mode}-{name}"
        folder.mkdir(exist_ok=True)
        save_file(tensors, str(folder / "model.safetensors"))
    expected = list(sets["B"])

    def reload(folder: str) -> dict[str, Any]:
        done = ask("reload", path=str(tree / folder))
        return {**done, **ask("progress", expected=expected)}

    result["loaded"] = reload(f"{mode}-B")
    result["after"] = differing(sets["B"])
    net.mlp.down_proj.weight.data.view(torch.uint8)[3, 5] ^= 1
    result["flipped_code"] = differing(sets["B"])
    scale = (
        net.experts.w13_weight_scale_inv
        if mode == "block"
        else net.experts.w13_weight_scale_expanded
    )
    scale.data[2, -1, 0] *= 1.5
    if mode != "block":
        net.self_attn.qkv_proj.weight_scale.data[300] *= 1.5
    result["flipped_scales"] = differing(sets["B"])
    result["absent"] = reload("nowhere")
    result["torn"] = reload(f"{mode}-torn")
    return result


def _extension(net: Any) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """Return the worker extension around a net, and what asks it as the server does."""
    from fp8ctl.engines.hooks.vllm_worker import Extension

    net.load_weights = net.load
    extension = Extension()
    extension.rank = 0
    extension.model_runner = types.SimpleNamespace(get_model=lambda: net)
    extension.model_config = types.SimpleNamespace(dtype=torch.bfloat16)
    extension.parallel_config = types.SimpleNamespace(data_parallel_size=1)

    def ask(what: str, **details: object) -> dict[str, Any]:
        answer: dict[str, Any] = extension.fp8ctl_ask(what, json.dumps(details))
        return answer

    return extension, ask


def refittable(tree: Path, mode: str) -> dict[str, Any]:
    """Say whether the model can be loaded a second time."""
    fp8 = install(tree)
    extension, ask = _extension(_fresh(fp8, mode, True, checkpoint(1, mode, moe=True)))
    alone = ask("refittable")
    extension.parallel_config.data_parallel_size = 2
    return {"alone": alone, "several": ask("refittable")}


def push(tree: Path, mode: str) -> dict[str, Any]:
    """Push B, A, B in buckets through shared memory; say what each is worth."""
    from fp8ctl import wire
    from fp8ctl.carriers import ends
    from fp8ctl.held import gather
    from fp8ctl.kernels.digest import digest, to_text

    fp8 = install(tree)
    moe = mode != "online"
    sets = {name: checkpoint(seed, mode, moe=moe) for name, seed in (("A", 1), ("B", 2))}
    net: Any = _fresh(fp8, mode, moe, sets["A"])
    _, ask = _extension(net)
    result: dict[str, Any] = {"refittable": ask("refittable"), "pushes": []}
    addresses = {name: p.data_ptr() for name, p in net.named_parameters()}
    x = _inputs()
    with closing(ends.sender("memory", 1 << 20)) as sender:
        result["connected"] = ask("connect", carrier=sender.offer())
        for name in "BAB":
            tensors = {k: v.contiguous() for k, v in sets[name].items() if "input_scale" not in k}
            names, done = list(tensors), []
            for number, part in enumerate((names[::2], names[1::2])):
                slots = [
                    wire.Slot(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
                    for n in part
                    for t in (tensors[n],)
                ]
                offsets, nbytes = wire.place(slots)
                buffer = sender.buffer(number)
                entries = []
                for slot, at in zip(slots, offsets, strict=True):
                    bits = tensors[slot.name].reshape(-1).view(torch.uint8)
                    buffer[at : at + len(bits)].copy_(bits)
                    entries.append(
                        json.loads(wire.Entry(slot.name, slot.dtype, slot.shape, at).to_text())
                    )
                sender.ready(number)
                done.append(
                    ask("receive", number=number, slot=number, nbytes=nbytes, entries=entries)
                )
            progress = ask("progress", expected=names)
            digests = ask("digests")
            held = gather([digests])
            wanted = {n: to_text(digest(t)) for n, t in tensors.items()}
            equal = [n for n, w in wanted.items() if n in held and held[n].text == w]
            trusted = ask("trust", names=equal)
            result["pushes"].append(
                {
                    "errors": [one.get("failed", "") or one["error"] for one in done],
                    "copies": sum(one["ways"]["copies"] for one in done),
                    "loaders": sum(one["ways"]["loaders"] for one in done),
                    "progress": progress,
                    "format": digests["format"],
                    "unequal": sorted(wanted.keys() - set(equal)),
                    "trusted": trusted.get("trusted"),
                    "logits": torch.equal(net(x), _fresh(fp8, mode, moe, sets[name])(x)),
                }
            )
        result["unknown"] = ask("receive", number=0, slot=7, nbytes=1, entries=[])
        ask("disconnect")
    result["moved"] = [n for n, p in net.named_parameters() if p.data_ptr() != addresses[n]]
    result["nonsense"] = ask("nonsense")
    return result


def code(tree: Path, *files: str) -> dict[str, Any]:
    """Say what fp8ctl's hook says of the patched modules after a refit under torch.compile.

    Then again with one of their methods replaced, as trainers do.
    """
    import hashlib

    from fp8ctl.engines.hooks import imports, loaded

    hashes = {path: hashlib.sha256((tree / path).read_bytes()).hexdigest() for path in files}
    witness = loaded.Witness({"root": str(tree), "files": hashes})
    imports.watch(witness.paths, witness)
    refit(tree, "block", "moe", "compiled")
    result: dict[str, Any] = {"before": witness.report()}
    from vllm.model_executor.layers.quantization import fp8

    fp8.Fp8LinearMethod.apply = _refuse
    return {**result, "after": witness.report()}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "refit": refit,
    "spread": spread,
    "second-load": second_load,
    "padded": padded,
    "forward": forward,
    "fused": fused,
    "guard": guard,
    "await-push": await_push,
    "online": online,
    "serialized": serialized,
    "worker": worker,
    "push": push,
    "refittable": refittable,
    "code": code,
}


def _run(job: dict[str, Any]) -> str:
    global cutlass
    os.environ.update(job["env"])
    cutlass = job["cutlass"]
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return json.dumps(SCENARIOS[job["scenario"]](Path(job["tree"]), *job["args"]))
    except BaseException:  # noqa: BLE001 - whatever it is, the test is to see it
        return json.dumps({"traceback": traceback.format_exc()})


def main() -> None:
    """Answer jobs, one JSON line each; torch is imported once, nothing else is shared."""
    importlib.import_module("torch._dynamo")  # seconds, and every dispatch mode wants it

    forks.answer(_run)


if __name__ == "__main__":
    main()
