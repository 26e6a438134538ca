"""A position-keyed 64-bit digest of a tensor's bits that adds up over its parts.

    D(t) = sum over elements of mix(bits, row, column)   mod 2^64

`row` and `column` are positions in the whole tensor, so the digests of row
slices, column slices or the parts of a fused module, each computed with its
own offsets, add up to the digest of the whole, in any order and on any rank.
Moving, swapping or changing elements changes it, up to chance of 2^-64.

    mix(b, r, c) = fin(fin(2 r + 1) + fin(2 c) + b * G)      b sign-extended
    fin(x): x ^= x >>> 30; x *= 0xbf58476d1ce4e5b9; x ^= x >>> 27;
            x *= 0x94d049bb133111eb; x ^= x >>> 31           (splitmix64)
    G = 0x9e3779b97f4a7c15

A tensor is seen as a matrix: 2-D as it is; more dimensions with all but the
last flattened into rows; 1-D as n rows of one column (a bias is sharded like
the rows of its weight); 0-D as one element at (0, 0). It is no defence against
an adversary: it finds mistakes.

Runs in an engine's interpreter, on any device: torch only.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_M1 = 0xBF58476D1CE4E5B9 - (1 << 64)  # as int64: torch multiplies modulo 2^64
_M2 = 0x94D049BB133111EB - (1 << 64)
_G = 0x9E3779B97F4A7C15 - (1 << 64)

# torch runs an operation on up to 2^15 elements in the calling thread. Larger
# chunks take both of 2 idle cores (0.6 s instead of 1.2 s for 135 million), but
# beside other work their threads wait for each other at every step: 20 s and more.
_CHUNK = 1 << 15
_CHUNK_CUDA = 1 << 24

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(t: torch.Tensor, row_offset: int = 0, col_offset: int = 0) -> int:
    """Return the digest of `t` as the part at (row_offset, col_offset) of a whole.

    Args:
        t: any shape, strides and device; elements of 1, 2, 4 or 8 bytes (no complex).
        row_offset: row of the whole at which `t` begins, in elements.
        col_offset: column of the whole at which `t` begins, in elements.

    Returns:
        0 .. 2^64 - 1; 0 for a tensor with no elements.

    Raises:
        TypeError: an element is not 1, 2, 4 or 8 bytes of plain number.
        ValueError: an offset is negative.
    """
    if row_offset < 0 or col_offset < 0:
        raise ValueError(f"offsets must not be negative, not ({row_offset}, {col_offset})")
    if t.is_complex() or t.element_size() not in _BITS:
        raise TypeError(f"cannot digest {t.dtype}")
    if t.numel() == 0:
        return 0
    matrix = _matrix(t.detach()).view(_BITS[t.element_size()])
    n, k = matrix.shape
    limit = _CHUNK_CUDA if t.is_cuda else _CHUNK
    width = min(k, limit)
    height = max(1, min(n, limit // width))
    keys = torch.empty(height * width, dtype=torch.int64, device=t.device)
    spare = torch.empty_like(keys)
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for left in range(0, k, width):
        columns = min(width, k - left)
        col_key = _positions(col_offset + left, columns, 0, t.device)
        for top in range(0, n, height):
            rows = min(height, n - top)
            row_key = _positions(row_offset + top, rows, 1, t.device)
            key = keys[: rows * columns].view(rows, columns)
            torch.add(row_key[:, None], col_key, out=key)
            key.add_(matrix[top : top + rows, left : left + columns], alpha=_G)
            total += _finish(key, spare[: rows * columns].view(rows, columns)).sum()
    return int(total.item()) & _MASK


def combine(*parts: int) -> int:
    """Return the digest of a whole from those of its parts, in any order."""
    return sum(parts) & _MASK


def to_text(value: int) -> str:
    """Return a digest as 16 hexadecimal digits: JSON readers lose bits of large numbers."""
    return f"{value & _MASK:016x}"


def from_text(text: str) -> int:
    """Return the digest that `to_text` wrote.

    Raises:
        ValueError: not 16 hexadecimal digits.
    """
    if len(text) != 16:
        raise ValueError(f"expected 16 hexadecimal digits, not {text!r}")
    return int(text, 16)


def _matrix(t: torch.Tensor) -> torch.Tensor:
    if t.dim() == 0:
        return t.reshape(1, 1)
    if t.dim() == 1:
        return t.unsqueeze(1)
    return t if t.dim() == 2 else t.flatten(0, -2)


def _positions(first: int, count: int, odd: int, device: torch.device) -> torch.Tensor:
    """Return fin(2 * p + odd) of the positions p = first, first + 1, ... ."""
    start = 2 * first + odd
    keys = torch.arange(start, start + 2 * count, 2, dtype=torch.int64, device=device)
    return _finish(keys, torch.empty_like(keys))


def _finish(x: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Apply splitmix64's finaliser in place; int64 shifts are arithmetic, so mask them."""
    for shift, factor in ((30, _M1), (27, _M2), (31, None)):
        torch.bitwise_right_shift(x, shift, out=spare)
        spare.bitwise_and_((1 << (64 - shift)) - 1)
        x.bitwise_xor_(spare)
        if factor is not None:
            x.mul_(factor)
    return x
