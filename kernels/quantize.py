"""Choose the kernel for a tensor: Triton where it is on a GPU, the reference elsewhere.

Every choice gives the same bits; this module only decides who computes them.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from fp8ctl.kernels import reference

if TYPE_CHECKING:
    import torch


def quantize_block(
    x: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a [N, K] tensor in blocks; see `reference.quantize_block`."""
    if x.is_cuda and importlib.util.find_spec("triton") is not None:
        from fp8ctl.kernels import block as triton_block

        if triton_block.fits(block):
            return triton_block.quantize_block(x, block)
    return reference.quantize_block(x, block)


quantize_per_tensor = reference.quantize_per_tensor
quantize_per_channel = reference.quantize_per_channel
