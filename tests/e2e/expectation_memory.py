"""Log-probabilities of a model that is larger than what the process may hold.

    python expectation_memory.py FOLDER    (an engine's interpreter)

The checkpoint is a file with holes, so that it takes no disk: a Llama of 4.3 GB, all zeros.
Prints its size, and the largest resident size of this process.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

# FOLDER has a link to the package alone: beside the repository's own folders an engine would
# take `kernels` for another package of that name.
sys.path.insert(0, sys.argv[1])

from fp8ctl import expectation
from fp8ctl.formats import Mode
from fp8ctl.planning import make_plan

HIDDEN, INNER, LAYERS, WORDS = 4096, 14336, 8, 64000


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors, as a Llama has them."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "lm_head.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            found[f"{at}.self_attn.{name}_proj.weight"] = (
                HIDDEN if name in "qo" else 1024,
                HIDDEN,
            )
        found |= {
            f"{at}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{at}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found


def write(folder: Path) -> int:
    """Write the model; return its bytes."""
    header, end = {}, 0
    for name, shape in shapes().items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return end


def main() -> None:
    folder = Path(sys.argv[1])
    size = write(folder)
    plan = make_plan(folder, "sglang", Mode.BLOCK)
    hypotheses = {"bf16": (None, True), "fp8-block": (plan, True)}
    told = expectation.compute(folder, [[1, 2, 3, 4]], hypotheses, lambda done, total: None)
    assert len(told["fp8-block"]["engine"]["logprobs"][0]) == 3
    print(json.dumps({"checkpoint": size, "peak": expectation.peak_memory()}))


if __name__ == "__main__":
    main()
