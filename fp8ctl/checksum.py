"""A 64-bit sum that tells whether bytes were written as they were meant (torch).

The 8-byte words of the data, each times an odd number of its place, added up modulo
2^64: several times as fast as a CRC or a cryptographic hash, and as good at finding
mistakes. No defence against an adversary.
"""

from __future__ import annotations

import functools

import torch

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
# Factors of a stretch: with as much data they fit a core's cache.
_WORDS = 1 << 16


def checksum(data: torch.Tensor, start: int = 0) -> int:
    """Return the sum of `data`, going on from `start`.

    Args:
        data: bytes (uint8), one dimension, contiguous, on the CPU, at a multiple of 8 in memory.
        start: what came before: sums go on in order, `checksum(b, checksum(a))`.

    Returns:
        0 .. 2^64 - 1.
    """
    count = data.numel()
    whole = count - count % 8
    words = data[:whole].view(torch.int64)
    factors = _factors()
    total = ((start + 1) * _STEP + count) & _MASK
    for at in range(0, whole // 8, _WORDS):
        stretch = words[at : at + _WORDS]
        found = int(torch.dot(stretch, factors[: stretch.numel()]))
        total = (total * _STEP + found) & _MASK
    if whole < count:
        total = (total * _STEP + int.from_bytes(bytes(data[whole:].tolist()), "little")) & _MASK
    return total


@functools.cache
def _factors() -> torch.Tensor:
    """Return splitmix64's numbers, made odd: a single changed word always shows."""
    factors = []
    for place in range(1, _WORDS + 1):
        x = (place * _STEP) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x = (x ^ (x >> 31)) | 1
        factors.append(x - (1 << 64) if x >> 63 else x)
    return torch.tensor(factors, dtype=torch.int64)
