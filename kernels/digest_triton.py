"""The Triton kernels of `fp8ctl.kernels.digest`: one read, in 16-byte pieces where memory allows.

A program keeps a sum for each of its columns while it goes down rows, and multiplies by the
columns' keys once at the end: a row costs an element one multiplication. A list of matrices is
a table on the device and a few launches: one for each size of element and width of rows, since
a launch takes the host as long as a small matrix takes the device. Triton 3.3.1 to 3.9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl

from fp8ctl.kernels.launch import INTERPRETED
from fp8ctl.kernels.tables import Numbers, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    # `digest.Sums`: bits, outer, inner.
    Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Bytes of a row that a program reads at a time, and such rows at a time; tuned on an H100.
_WIDTH = 4096
_ROWS = 2
_STEPS = 4
_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    bits_ptr,
    outer_ptr,
    inner_ptr,
    N,
    K,
    step_n,
    step_k,
    top,
    left,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return the sum of one tile: STEPS * ROWS rows of COLUMNS elements, from (top, left)."""
    k = left + tl.arange(0, COLUMNS)
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
    return tl.sum(tl.sum(sums, axis=0) * keys, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up_many(  # type: ignore[no-untyped-def]
    table_ptr,
    owner_ptr,
    sums_ptr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add one tile's sum to that of its matrix, which is a row of the table (`_table`)."""
    pid = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + pid) * 10
    address, step_n, step_k = tl.load(row), tl.load(row + 5), tl.load(row + 6)
    if ALIGNED:
        # What is loaded has no known divisor; a product has, and loads become wide.
        address = address // 16 * 16
        step_n = step_n // (16 // SIZE) * (16 // SIZE)
        step_k = 1
    N, K = tl.load(row + 3), tl.load(row + 4)
    place, across = pid - tl.load(row + 7), tl.load(row + 8)
    total = _tile(
        address.to(tl.pointer_type(DTYPE)),
        tl.load(row + 1).to(tl.pointer_type(tl.int64)),
        tl.load(row + 2).to(tl.pointer_type(tl.int64)),
        N,
        K,
        step_n,
        step_k,
        place // across * (ROWS * STEPS),
        place % across * COLUMNS,
        SIZE,
        ROWS,
        COLUMNS,
        STEPS,
    )
    tl.atomic_add(sums_ptr + tl.load(row + 9), total, sem="relaxed")


_DTYPES = {1: tl.uint8, 2: tl.int16, 4: tl.int32}


class Prepared:
    """Sums of several matrices of one device, their tables on it, to be run again and again.

    Reads what lies at the matrices' addresses when it runs; keeps the keys, not the matrices.
    """

    @torch.no_grad()
    def __init__(self, matrices: Sequence[Sums]) -> None:
        """Make the tables.

        Args:
            matrices: at least one: bits [N, K] of uint8, int16 or int32, taken as unsigned, with
                any strides; int64 keys [N] and [K], contiguous.
        """
        self._where = matrices[0][0].device
        self._count = len(matrices)
        self._keys = [(outer, inner) for _, outer, inner in matrices]
        kinds: dict[tuple[int, int, bool], list[int]] = {}
        for i, (bits, _, _) in enumerate(matrices):
            size = bits.element_size()
            columns = min(triton.next_power_of_2(bits.shape[1]), _WIDTH // size)
            kinds.setdefault((size, columns, _aligned(bits)), []).append(i)
        self._launches = []
        self._compiled: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        for (size, columns, aligned), those in kinds.items():
            # Narrow matrices have more rows at a time, so that programs are as large.
            rows = max(_ROWS, _ROWS * _WIDTH // size // columns)
            table, counts = _table(matrices, those, rows * _STEPS, columns)
            there = torch.from_numpy(table).to(self._where, non_blocking=True)
            owners = spread(counts, self._where)
            self._launches.append((there, owners, (size, rows, columns, aligned)))

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """Return the sums of bits[i, j] * outer[i] * inner[j], modulo 2^64, of each matrix.

        Returns:
            int64 [number of matrices], on the device, which is not waited for.
        """
        found = torch.zeros(self._count, dtype=torch.int64, device=self._where)
        with torch.cuda.device_of(found):  # type: ignore[no-untyped-call]
            for i, (table, owners, how) in enumerate(self._launches):
                arguments, programs = (table, owners, found), len(owners)
                if i in self._compiled:
                    compiled, constants = self._compiled[i]
                    compiled[(programs, 1, 1)](*arguments, *constants)
                    continue
                size, rows, columns, aligned = how
                constants = (size, rows, columns, _STEPS, aligned, _DTYPES[size])
                compiled = _add_up_many[(programs,)](*arguments, *constants, num_warps=_WARPS)
                # The arguments of the next run are alike: Triton need not look at them again,
                # which is most of a launch's time.
                if not INTERPRETED:
                    self._compiled[i] = compiled, constants
        return found


def _aligned(bits: torch.Tensor) -> bool:
    """Say whether each row is elements side by side from a multiple of 16 bytes on."""
    step_n, step_k = bits.stride()
    return step_k == 1 and step_n * bits.element_size() % 16 == 0 and bits.data_ptr() % 16 == 0


def _table(
    matrices: Sequence[Sums], those: Sequence[int], height: int, width: int
) -> tuple[Numbers, Numbers]:
    """Return a row for each of these matrices, and how many programs each takes."""
    table, counts, first = [], [], 0
    for i in those:
        bits, outer, inner = matrices[i]
        n, k = bits.shape
        across = -(-k // width)
        counts.append(-(-n // height) * across)
        addresses = (bits.data_ptr(), outer.data_ptr(), inner.data_ptr())
        table.append((*addresses, n, k, *bits.stride(), first, across, i))
        first += counts[-1]
    return np.array(table, dtype=np.int64), np.array(counts, dtype=np.int64)
