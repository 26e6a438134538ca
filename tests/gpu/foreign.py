"""Checkpoints of other methods, rounded from a random model: `foreign.make(FOLDER, "dense-gptq")`.

As plain as the formats allow: round to nearest, four bits in groups of 128, or eight bits.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.source import read_tensors
from tests.gpu import models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]
GROUP = 128
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def make(folder: Path, name: str, root: Path) -> None:
    """Write the model `KIND-METHOD` from `KIND-a`, which must be there."""
    kind, _, method = name.partition("-")
    form, about, files = METHODS[method]
    state: Tensors = {}
    for tensor_name, tensor in read_tensors(root / f"{kind}-a"):
        if "_proj." in tensor_name:
            prefix = tensor_name.removesuffix(".weight")
            state |= {f"{prefix}.{part}": value for part, value in form(tensor).items()}
        elif about.get("quant_method") in ("gptq", "awq"):
            state[tensor_name] = tensor.half()
        else:
            state[tensor_name] = tensor.clone()
    config = models.config(models.KINDS[kind])
    if about:
        config["quantization_config"] = about
    if about.get("quant_method") in ("gptq", "awq"):
        config["torch_dtype"] = "float16"
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    models.write(folder, config, state)


def _groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes 0 to 15 and scales of groups of K, zero point 8: shapes (N, K), (N, K/GROUP)."""
    rows, columns = weight.shape
    parts = weight.float().view(rows, columns // GROUP, GROUP)
    scales = (parts.abs().amax(-1) / 7).clamp(min=1e-6).half()
    codes = (parts / scales.float()[:, :, None]).round().clamp(-8, 7) + 8
    return codes.view(rows, columns).to(torch.int64), scales


def _pack(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack eight codes of the last dimension into an int32, the first into the lowest bits."""
    eight = codes.view(*codes.shape[:-1], -1, 8)
    packed = torch.zeros(eight.shape[:-1], dtype=torch.int64)
    for place, which in enumerate(order):
        packed |= eight[..., which] << (4 * place)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq(weight: torch.Tensor) -> Tensors:
    """Return GPTQ's tensors: packed along K, zero points less one."""
    codes, scales = _groups(weight)
    rows, columns = weight.shape
    zeros = torch.full((columns // GROUP, rows), 7, dtype=torch.int64)
    return {
        "qweight": _pack(codes).T.contiguous(),
        "qzeros": _pack(zeros),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(columns) // GROUP).to(torch.int32),
    }


def awq(weight: torch.Tensor) -> Tensors:
    """Return AWQ's tensors: packed along N, in its order."""
    codes, scales = _groups(weight)
    rows, columns = weight.shape
    zeros = torch.full((columns // GROUP, rows), 8, dtype=torch.int64)
    return {
        "qweight": _pack(codes.T.contiguous(), _AWQ_ORDER),
        "qzeros": _pack(zeros, _AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


def int8(weight: torch.Tensor) -> Tensors:
    """Return a code and a scale per row."""
    scales = (weight.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
    codes = (weight.float() / scales).round().clamp(-127, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scales}


def modelopt(weight: torch.Tensor) -> Tensors:
    """Return FP8 with one scale, and one of the activations, which are of a few units at most."""
    scale = (weight.float().abs().amax() / 448).clamp(min=1e-8)
    return {
        "weight": (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn),
        "weight_scale": scale.reshape(()).clone(),
        "input_scale": torch.tensor(0.03),
    }


_GPTQ = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
METHODS: dict[str, tuple[Callable[[torch.Tensor], Tensors], Json, dict[str, Json]]] = {
    "gptq": (gptq, {"quant_method": "gptq", **_GPTQ}, {}),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        {},
    ),
    "int8": (int8, {"quant_method": "w8a8_int8"}, {}),
    "modelopt": (
        modelopt,
        {},
        {
            "hf_quant_config.json": {
                "producer": {"name": "modelopt", "version": "0.25"},
                "quantization": {
                    "quant_algo": "FP8",
                    "kv_cache_quant_algo": None,
                    "exclude_modules": ["lm_head"],
                },
            }
        },
    ),
}
