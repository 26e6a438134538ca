"""A checkpoint of Llama's shapes and random numbers, as large as one asks for."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, HIDDEN_MLP, HEADS, KV_HEADS, WORDS = 4096, 14336, 32, 8, 32000


def layer(number: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one decoder layer, 436 MB in BF16."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN_MLP, HIDDEN),
        "mlp.up_proj": (HIDDEN_MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, HIDDEN_MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


def make(folder: Path, size: int, shards: int) -> int:
    """Write a checkpoint of about `size` bytes in `shards` files; return its bytes.

    One that is there already is taken as it is.
    """
    done = folder / "made.json"
    want = {"size": size, "shards": shards}
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == want:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"model.embed_tokens.weight": (WORDS, HIDDEN), "lm_head.weight": (WORDS, HIDDEN)}
    around = 2 * sum(rows * columns for rows, columns in ends.values())
    layers = max(1, round((size - around) / 436_200_000))
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (WORDS, HIDDEN))]
    for number in range(layers):
        tensors += layer(number).items()
    tensors += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (WORDS, HIDDEN))]
    each = -(-sum(_bytes(shape) for _, shape in tensors) // shards)
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for tensor in tensors:
        if len(parts) < shards and sum(_bytes(shape) for _, shape in parts[-1]) >= each:
            parts.append([])
        parts[-1].append(tensor)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN_MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": WORDS,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    # Random numbers take longer to make than to write: every tensor begins elsewhere in these.
    noise = (torch.randn(1 << 26, generator=generator) * 0.02).bfloat16().view(torch.uint8)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        weight_map |= {tensor: name for tensor, _ in part}
        _write(folder / name, part, noise)
    total = sum(_bytes(shape) for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    done.write_text(json.dumps(want), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _write(path: Path, tensors: list[tuple[str, tuple[int, ...]]], noise: torch.Tensor) -> None:
    header, position = {}, 0
    for name, shape in tensors:
        end = position + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = memoryview(noise.numpy())  # type: ignore[arg-type]
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (_, shape) in enumerate(tensors):
            left, at = _bytes(shape), 4096 * (number % 1000)
            while left:
                count = min(left, len(data) - at)
                file.write(data[at : at + count])
                left, at = left - count, 0


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()
