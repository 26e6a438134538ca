"""Random models, written where they are wanted: `python -m tests.gpu.models FOLDER NAME...`.

Runs in any interpreter with torch. Every Linear divides by 128 but those of `narrow`. `-b` is
another model of the same shapes whose matrices differ in size as well, so that a scale that
stayed behind shows.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch

Json = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

_SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
}
_EIGHT = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
KINDS: dict[str, Json] = {
    "dense": {"model_type": "qwen3", **_SMALL},
    "moe": {
        "model_type": "qwen3_moe",
        **_SMALL,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    # 576 and 192 do not divide by 128: only blocks of 64 fit, and no kernel for 128 takes them.
    "narrow": {
        "model_type": "qwen3",
        **_SMALL,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    # The matrices of an 8B model, four layers of them.
    "wide": {"model_type": "llama", **_EIGHT, "num_hidden_layers": 4, "vocab_size": 4096},
    "8b": {"model_type": "llama", **_EIGHT},
    # Wide models for a rehearsal on a CPU.
    "tiny8b": {"model_type": "llama", **_SMALL},
}
_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}


def shapes(kind: Json) -> Shapes:
    """Return the tensors of a model."""
    hidden, middle, heads = kind["hidden_size"], kind["intermediate_size"], kind["head_dim"]
    queries, keys = kind["num_attention_heads"] * heads, kind["num_key_value_heads"] * heads
    found: Shapes = {"model.embed_tokens.weight": (kind["vocab_size"], hidden)}
    for layer in range(kind["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found[f"{at}.self_attn.q_proj.weight"] = (queries, hidden)
        found[f"{at}.self_attn.k_proj.weight"] = (keys, hidden)
        found[f"{at}.self_attn.v_proj.weight"] = (keys, hidden)
        found[f"{at}.self_attn.o_proj.weight"] = (hidden, queries)
        if kind["model_type"] != "llama":
            found[f"{at}.self_attn.q_norm.weight"] = (heads,)
            found[f"{at}.self_attn.k_norm.weight"] = (heads,)
        if kind["model_type"] == "qwen3_moe":
            found[f"{at}.mlp.gate.weight"] = (kind["num_experts"], hidden)
            small = kind["moe_intermediate_size"]
            for expert in range(kind["num_experts"]):
                found |= _mlp(f"{at}.mlp.experts.{expert}", hidden, small)
        else:
            found |= _mlp(f"{at}.mlp", hidden, middle)
        found[f"{at}.input_layernorm.weight"] = (hidden,)
        found[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (kind["vocab_size"], hidden)}


def _mlp(at: str, hidden: int, middle: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (middle, hidden),
        f"{at}.up_proj.weight": (middle, hidden),
        f"{at}.down_proj.weight": (hidden, middle),
    }


def config(kind: Json) -> Json:
    """Return a model's config.json."""
    more: Json = {}
    if kind["model_type"] == "qwen3_moe":
        more = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {
        "architectures": [_CLASSES[kind["model_type"]]],
        **kind,
        **more,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 257,
        "eos_token_id": 256,
    }


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of bytes; every other id is a word, so that any answer is a text."""
    letters = _byte_letters()
    special = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
    words = [f"w{number}" for number in range(vocabulary - len(letters) - len(special))]
    ids = {word: number for number, word in enumerate([*letters, *special, *words])}
    added = [
        {
            "id": ids[word],
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for word in special
    ]
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**levels, "use_regex": True},
        "post_processor": None,
        "decoder": {**levels, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 8192,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


def _byte_letters() -> list[str]:
    """Return the letters by which byte-level tokenizers write the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def state(kind: Json, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Return random weights; those of seed 2 differ from seed 1's in size as well."""
    random = torch.Generator(device=device).manual_seed(seed)
    spread = 0.02 if kind["hidden_size"] >= 2048 else 0.06
    made = {}
    for number, (name, shape) in enumerate(shapes(kind).items()):
        if len(shape) == 1:
            # Near one, as in real models: what is one everywhere proves nothing about its place.
            noise = torch.randn(shape, generator=random, device=device)
            made[name] = (1 + 0.05 * noise).bfloat16()
            continue
        size = spread
        if seed == 2 and "_proj" in name:
            size *= 0.5 + 0.25 * (number % 5)
        made[name] = (torch.randn(shape, generator=random, device=device) * size).bfloat16()
    return made


def write(folder: Path, about: Json, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint; it is there when its configuration is."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float32: "F32",
        torch.int8: "I8",
        torch.int32: "I32",
        torch.float8_e4m3fn: "F8_E4M3",
    }
    head: Json = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        place = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        head[name] = {**place, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.contiguous().reshape(-1).view(torch.uint8).cpu()
            file.write(flat.numpy().tobytes())
    write_tokenizer(folder, about["vocab_size"])
    (folder / "config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def main() -> None:
    root = Path(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in sys.argv[2:]:
        began = time.monotonic()
        folder = root / name
        if (folder / "config.json").exists():
            continue
        kind, _, letter = name.rpartition("-")
        if letter in ("a", "b"):
            about = KINDS[kind]
            write(folder, config(about), state(about, 1 + (letter == "b"), device))
        else:
            from tests.gpu import foreign

            foreign.make(folder, name, root)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
