"""`expectation.compute` beside transformers' own forward, for tiny random models of families.

    python expectation_families.py FOLDER FAMILY...    (an engine's interpreter)

Prints, for each family, the largest difference of log-probabilities in BF16 and in FP8
blocks, and how far FP8 is from BF16. The oracle is transformers with all weights in memory;
the FP8 weights are put into it from fp8ctl's own quantised checkpoint tensors.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

# FOLDER has a link to the package alone: beside the repository's own folders an engine would
# take `kernels` for another package of that name.
sys.path.insert(0, sys.argv[1])

from fp8ctl import expectation
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels.dequantize import dequantize
from fp8ctl.kernels.quantize import quantize
from fp8ctl.manifest import Plan, PlannedTensor
from fp8ctl.models import read_checkpoint
from fp8ctl.pipeline import groups_of
from fp8ctl.policy import Reason

LINEAR = re.compile(r"proj\.weight$|proj_with_mqa\.weight$|\.w[123]\.weight$")
IDS = [[5, 17, 99, 3, 64, 28, 7], [1, 2, 3, 4, 5], [120, 7, 7, 90, 11, 12, 13]]
COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def build(family: str, folder: Path) -> Any:
    """Save a random model of a family in BF16; return it with all weights, in FP32."""
    name, more = FAMILIES[family]
    torch.manual_seed(11)
    config = getattr(transformers, name)(**(COMMON | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of one and biases of zero hide mistakes
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.02))
    model.to(torch.bfloat16).save_pretrained(folder)
    # Anew, since what is no parameter went to BF16 and back as well.
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    return again.eval()


def plan_of(folder: Path) -> Plan:
    """Return a plan that quantises every matrix of the decoder layers, the head and no more."""
    tensors = tuple(
        PlannedTensor(one.name, one.dtype, one.shape, bool(LINEAR.search(one.name)), Reason.LINEAR)
        for one in read_checkpoint(folder).tensors.values()
    )
    tensors = tuple(t if len(t.shape) == 2 else t._replace(quantize=False) for t in tensors)
    return Plan(folder, "test", "test", None, Mode.BLOCK, 1, BlockSize(32, 32), tensors)


def scores(model: Any) -> list[list[float]]:
    """Return the log-probabilities by the whole model in memory, one text at a time."""
    result = []
    for text in IDS:
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0].float()
        spread = torch.log_softmax(logits, -1)
        result.append([spread[i, token].item() for i, token in enumerate(text[1:])])
    return result


def furthest(a: list[list[float]], b: list[list[float]]) -> float:
    pairs = zip(a, b, strict=True)
    return max(abs(x - y) for one, two in pairs for x, y in zip(one, two, strict=True))


def main() -> None:
    found = {}
    for family in sys.argv[2:]:
        folder = Path(sys.argv[1]) / family
        model = build(family, folder)
        plan = plan_of(folder)
        hypotheses = {"bf16": (None, True), "fp8-block": (plan, True)}
        told = expectation.compute(folder, IDS, hypotheses, lambda done, total: None)
        plain = scores(model)
        parameters = dict(model.named_parameters())
        for tensor in plan.quantized:
            value = parameters[tensor.name]
            codes, scales = quantize(value.data.bfloat16(), groups_of(plan))
            value.data.copy_(dequantize(codes, scales, groups_of(plan)))
        fp8 = scores(model)
        found[family] = {
            "bf16": furthest(told["bf16"]["plain"]["logprobs"], plain),
            "fp8": furthest(told["fp8-block"]["plain"]["logprobs"], fp8),
            "apart": furthest(plain, fp8),
            "engine": furthest(told["fp8-block"]["engine"]["logprobs"], fp8),
            "quantised": len(list(plan.quantized)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
