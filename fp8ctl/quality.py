"""How much of a weight its FP8 form keeps: the ratio of signal to quantisation noise.

    SQNR = 10 log10(sum w^2 / sum (w - codes * scales)^2)   in decibels

Computed while the expected digests are (`checkpoint.expected_digests`), in the same pass over the
source: a few rows at a time, so that they stay in a core's cache, and on a CPU of a large weight
`_SAMPLES` such tiles, evenly spread: all of it would take longer than to quantise it. Runs where
torch is; Python 3.10.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels.dequantize import dequantize

if TYPE_CHECKING:
    from fp8ctl.kernels.groups import Groups

#: Stands for "no noise at all": more than FP32 can show.
NOISELESS = 200.0

_TILE, _TILE_CUDA = 1 << 17, 1 << 24
#: Some 4 million weights: their SQNR is that of all to 0.01 dB where rows are alike.
_SAMPLES = 32


@torch.no_grad()
def measure(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, groups: Groups
) -> dict[str, float]:
    """Return `sqnr_db` and `amax` of a quantised weight.

    Args:
        weight: [N, K], finite.
        codes: float8_e4m3fn [N, K].
        scales: FP32 of `groups.scale_shape(weight.shape)`.
        groups: what shares a scale.
    """
    n, k = weight.shape
    if not n or not k:
        return {"sqnr_db": NOISELESS, "amax": 0.0}
    height = max(1, (_TILE_CUDA if weight.is_cuda else _TILE) // k)
    side = groups.sides[0] if groups.kind == "block" else 1
    height = min(-(-n // side), max(1, height // side)) * side
    tops = list(range(0, n, height))
    if not weight.is_cuda and len(tops) > _SAMPLES:
        tops = [tops[i * len(tops) // _SAMPLES] for i in range(_SAMPLES)]
    # Memory of its own for every tile would cost more than the arithmetic.
    signal = torch.empty((height, k), dtype=torch.float32, device=weight.device)
    noise = torch.empty_like(signal)
    sums: list[torch.Tensor] = []
    for top in tops:
        rows = slice(top, top + height)
        those = slice(top // side, -(-rows.stop // side))
        part = scales if groups.kind == "per-tensor" else scales[those]
        w = signal[: min(height, n - top)].copy_(weight[rows])
        error = dequantize(codes[rows], part, groups, out=noise[: len(w)]).sub_(w).view(-1)
        w = w.view(-1)
        sums.append(torch.stack((w.dot(w), error.dot(error))))
    # FP32 sums of a tile are good to some 1e-5; tiles are added up in FP64.
    powers = torch.stack(sums).double().sum(0).tolist()
    low, high = torch.aminmax(weight)
    amax = max(-float(low), float(high))
    sqnr = 10 * math.log10(powers[0] / powers[1]) if all(powers) else NOISELESS
    return {"sqnr_db": round(sqnr, 3), "amax": amax}
