"""Log-probabilities of token ids by transformers, from dequantised weights in FP32.

    python forward.py CHECKPOINT_16_BIT IDS_JSON [CHECKPOINT_FP8]    (an engine's interpreter)

Independent of fp8ctl and of the engine: the FP8 file is read, multiplied out
and put into transformers' own model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """Return the FP32 values of the FP8 weights, by name."""
    from safetensors.torch import load_file

    raw: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        raw |= load_file(str(file))
    block = json.loads((folder / "config.json").read_text())["quantization_config"].get(
        "weight_block_size"
    )
    weights = {}
    for name, codes in raw.items():
        if codes.dtype != torch.float8_e4m3fn:
            continue
        values = codes.float()
        if block:
            scale = raw[f"{name}_scale_inv"]
            rows = torch.arange(values.shape[0]) // block[0]
            columns = torch.arange(values.shape[1]) // block[1]
            values = values * scale[rows][:, columns]
        else:
            values = values * raw[f"{name}_scale"]
        weights[name] = values
    return weights


def main() -> None:
    from transformers import AutoModelForCausalLM

    source, ids = Path(sys.argv[1]), json.loads(sys.argv[2])
    model: Any = AutoModelForCausalLM.from_pretrained(str(source), torch_dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for served in sys.argv[3:]:
            for name, values in dequantised(Path(served)).items():
                parameters[name].copy_(values)
        logits = model(torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    print(json.dumps([logprobs[i, t].item() for i, t in enumerate(ids[1:])]))


if __name__ == "__main__":
    main()
