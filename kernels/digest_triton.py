"""The Triton kernel of `fp8ctl.kernels.digest`: one read, in 16-byte pieces where memory allows.

A program keeps a sum for each of its columns while it goes down rows, and multiplies by the
columns' keys once at the end: a row costs an element one multiplication. Triton 3.3.1 to 3.9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Bytes of a row that a program reads at a time, and such rows at a time; tuned on an H100.
_WIDTH = 4096
_ROWS = 2
_STEPS = 4
_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(  # type: ignore[no-untyped-def]
    bits_ptr,
    outer_ptr,
    inner_ptr,
    sum_ptr,
    N,
    K,
    step_n,
    step_k,
    across,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Add one tile's sum to `sum_ptr`: STEPS * ROWS rows of COLUMNS elements."""
    pid = tl.program_id(0)
    top = (pid // across).to(tl.int64) * (ROWS * STEPS)
    k = (pid % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < K
    sums = tl.zeros([ROWS, COLUMNS], tl.int64)
    for step in range(STEPS):
        n = top + step * ROWS + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & inside[None, :]
        at = bits_ptr + n[:, None] * step_n + k[None, :] * step_k
        bits = tl.load(at, mask=mask, other=0)
        if SIZE == 1:
            bits = bits.to(tl.uint8, bitcast=True)
        elif SIZE == 2:
            bits = bits.to(tl.uint16, bitcast=True)
        else:
            bits = bits.to(tl.uint32, bitcast=True)
        keys = tl.load(outer_ptr + n, mask=n < N, other=0)
        sums += bits.to(tl.int64) * keys[:, None]
    keys = tl.load(inner_ptr + k, mask=inside, other=0)
    total = tl.sum(tl.sum(sums, axis=0) * keys, axis=0)
    tl.atomic_add(sum_ptr, total, sem="relaxed")


def add_up(bits: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return the sum of bits[i, j] * outer[i] * inner[j], modulo 2^64, as an int64 on the device.

    Args:
        bits: [N, K] of uint8, int16 or int32, taken as unsigned; any strides.
        outer, inner: int64 keys, [N] and [K], contiguous.
    """
    n, k = bits.shape
    size = bits.element_size()
    columns = min(triton.next_power_of_2(k), _WIDTH // size)
    # Narrow matrices have more rows at a time, so that programs are as large.
    rows = min(triton.next_power_of_2(n), max(_ROWS, _ROWS * _WIDTH // size // columns))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    down, across = triton.cdiv(n, rows * _STEPS), triton.cdiv(k, columns)
    with torch.cuda.device_of(bits):  # type: ignore[no-untyped-call]
        _add_up[(down * across,)](
            bits,
            outer,
            inner,
            total,
            n,
            k,
            *bits.stride(),
            across,
            SIZE=size,
            ROWS=rows,
            COLUMNS=columns,
            STEPS=_STEPS,
            num_warps=_WARPS,
        )
    return total
