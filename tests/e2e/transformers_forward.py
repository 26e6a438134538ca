"""Load checkpoints in transformers as they are, on a CPU; print what became of them as JSON.

    python transformers_forward.py SOURCE FP8 TEXT

`kl`: mean over the tokens of TEXT of KL(source || FP8) in nats; `same_top`: the share of
tokens whose likeliest successor is the same; `differs`: weights that are not code times
scale, rounded to the dtype in which they were loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def dequantised(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return code times scale of every FP8 weight, by name."""
    raw: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        raw |= load_file(str(file))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    high, wide = config["quantization_config"]["weight_block_size"]
    found = {}
    for name, codes in raw.items():
        if codes.dtype == torch.float8_e4m3fn:
            rows, columns = (
                torch.arange(codes.shape[0]) // high,
                torch.arange(codes.shape[1]) // wide,
            )
            scales = raw[f"{name}_scale_inv"][rows][:, columns]
            found[name] = (codes.float() * scales).to(dtype)
    return found


def main() -> None:
    source, fp8, text = sys.argv[1:]
    ids = transformers.AutoTokenizer.from_pretrained(fp8)(text, return_tensors="pt")["input_ids"]
    logits = []
    differs: list[str] = []
    for folder in (source, fp8):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        parameters = dict(model.named_parameters())
        if folder == fp8:
            wanted = dequantised(Path(fp8), torch.bfloat16)
            differs = [n for n, t in wanted.items() if not torch.equal(parameters[n].data, t)]
        with torch.no_grad():
            logits.append(torch.log_softmax(model.float()(ids).logits[0].double(), dim=-1))
    ours, theirs = logits
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    answer = {
        "transformers": transformers.__version__,
        "tokens": ids.numel(),
        "kl": kl.mean().item(),
        "largest_kl": kl.max().item(),
        "same_top": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "differs": differs,
        "weights": len(wanted),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
