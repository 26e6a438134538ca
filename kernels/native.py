"""The exact FP8 arithmetic on a CPU, in C that is compiled at first use.

`native.c` beside this file is the arithmetic; this module compiles it with the
system's C compiler, keeps the library in fp8ctl's cache, and shares the work out to
as many threads as torch has. Codes and scales are `reference`'s, bit for bit.

Where that cannot be done nothing is raised: `available` is False and `why_not` says
why. `FP8CTL_NATIVE=0` asks for that. A library is loaded only from a folder that is
this user's and that nobody else can write, if the file is as it was written, and used
only if it computes known codes and scales.

Runs in an engine's interpreter: standard library and torch only.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import threading
from array import array
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels import compiled
from fp8ctl.kernels.recipes import NON_FINITE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8ctl.kernels.groups import Groups
    from fp8ctl.kernels.recipes import NonFinite, Recipe

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno")
# Tried in turn. Compilers prefer half of a 512-bit register, for the sake of old CPUs; on a
# Xeon of 2023 whole ones encode a third faster.
_TUNING: tuple[tuple[str, ...], ...] = (
    ("-march=native", "-mprefer-vector-width=512"),
    ("-march=native",),
    (),
)

# Elements for each thread at least: a thread takes as long to start as these take to encode.
_GRAIN = 1 << 18
# Parts for each thread, so that one which starts late or is held up leaves its work to others.
_PARTS = 4

_BF16, _FP16, _FP32 = range(3)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ARITHMETIC = ("divide", "reciprocal", "inverse-scale", "power-of-two")
_NOWHERE = (1 << 63) - 1
_NON_FINITE_FOUND = 1 << 31


class _Job(ctypes.Structure):
    """Job of native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_column")),
        *((name, ctypes.c_int64) for name in ("codes_row", "codes_column")),
        *((name, ctypes.c_int64) for name in ("scales_row", "scales_column")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group_rows", "group_columns")),
        *((name, ctypes.c_int64) for name in ("place_row", "place_column")),
        *((name, ctypes.c_int32) for name in ("dtype", "arithmetic", "policy")),
        ("floor", ctypes.c_float),
    )


def available() -> bool:
    """Say whether the library can be used; the first call may compile it."""
    return not isinstance(_library(), str)


def why_not() -> str:
    """Return why it cannot, "" if it can."""
    library = _library()
    return library if isinstance(library, str) else ""


def quantize(
    x: torch.Tensor,
    groups: Groups,
    recipe: Recipe,
    non_finite: NonFinite,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[int, int] | None:
    """Write the codes and scales of a matrix.

    Args:
        x: BF16, FP16 or FP32, [N, K], on the CPU; any strides.
        groups: what shares a scale.
        recipe: the arithmetic.
        non_finite: what becomes of NaN and Inf.
        codes: float8_e4m3fn or uint8, [N, K]; any strides.
        scales: FP32 of shape `groups.grid(x.shape)`; any strides.

    Returns:
        The first index, in row-major order, that is NaN or Inf. Then outputs are half written
        where the policy is "error".

    Raises:
        RuntimeError: the library is not available.
        MemoryError: there was none for a thread's own tile.
        ValueError: torch has put off a negation of an output, and would undo what is written.
    """
    return _quantize(_usable(), x, groups, recipe, non_finite, codes, scales)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, groups: Groups, out: torch.Tensor
) -> None:
    """Write code times scale, multiplied in FP32 and rounded once, to nearest even.

    Args:
        codes: float8_e4m3fn or uint8, [N, K], on the CPU; any strides.
        scales: FP32 of shape `groups.grid(codes.shape)`; any strides.
        groups: what shares a scale.
        out: BF16, FP16 or FP32, [N, K]; any strides.

    Raises:
        RuntimeError: the library is not available.
        MemoryError: there was none for a thread's own tile.
        ValueError: torch has put off a negation of an output, and would undo what is written.
    """
    _dequantize(_usable(), codes, scales, groups, out)


def _usable() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


# ---- the work, and who does it ----


def _quantize(
    library: ctypes.CDLL,
    x: torch.Tensor,
    groups: Groups,
    recipe: Recipe,
    non_finite: NonFinite,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[int, int] | None:
    x = x.resolve_neg()  # half of a conjugated complex tensor is one
    job, grid = _job(x, codes, scales, groups, read=x)
    job.arithmetic = _ARITHMETIC.index(recipe.arithmetic)
    job.policy = NON_FINITE.index(non_finite)
    job.floor = recipe.floor
    threads = _threads(x)
    if threads > 1 and grid[0] * grid[1] < threads * _PARTS:
        first = _together(library, job, grid, threads)
    else:
        parts = _cut((0, grid[0]), (0, grid[1]), threads * _PARTS if threads > 1 else 1)
        firsts = [ctypes.c_int64() for _ in parts]
        at = ctypes.byref(job)
        calls = [(at, *part, ctypes.byref(f)) for part, f in zip(parts, firsts, strict=True)]
        _share(threads, library.fp8_quantize, calls)
        first = min((f.value for f in firsts), default=_NOWHERE)
    return None if first == _NOWHERE else divmod(first, x.shape[1])


def _together(library: ctypes.CDLL, job: _Job, grid: tuple[int, int], threads: int) -> int:
    """Quantise groups too few to share out: all threads look at each, then all encode it."""
    at = ctypes.byref(job)
    firsts = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = (i * job.group_rows, min((i + 1) * job.group_rows, job.rows))
            columns = (j * job.group_columns, min((j + 1) * job.group_columns, job.columns))
            parts = _cut(rows, columns, threads * _PARTS)
            peaks = [ctypes.c_uint32() for _ in parts]
            places = [ctypes.c_int64() for _ in parts]
            calls = [
                (at, *part, ctypes.byref(peak), ctypes.byref(place))
                for part, peak, place in zip(parts, peaks, places, strict=True)
            ]
            _share(threads, library.fp8_peak, calls)
            found = max(peak.value & ~_NON_FINITE_FOUND for peak in peaks)
            if any(peak.value & _NON_FINITE_FOUND for peak in peaks):
                found |= _NON_FINITE_FOUND
            library.fp8_scale(at, i, j, found)
            _share(threads, library.fp8_encode, [(at, *part, found) for part in parts])
            firsts += [place.value for place in places]
    return min(firsts)


def _dequantize(
    library: ctypes.CDLL,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: Groups,
    out: torch.Tensor,
) -> None:
    scales = scales.resolve_neg()
    job, _ = _job(out, codes, scales, groups, read=codes)
    threads = _threads(out)
    parts = _cut((0, job.rows), (0, job.columns), threads * _PARTS if threads > 1 else 1)
    _share(threads, library.fp8_dequantize, [(ctypes.byref(job), *part) for part in parts])


def _job(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: Groups,
    *,
    read: torch.Tensor,
) -> tuple[_Job, tuple[int, int]]:
    """Return the job of a tensor but for its recipe, and the grid of its groups.

    The loops run along rows. Where what is `read` of `x` and `codes` lies by columns in
    memory, rows and columns of everything change places; what is written goes where it must.

    Raises:
        ValueError: torch has put off a negation of an output, and would undo what is written.
    """
    for t in (x, codes, scales):
        if t.is_neg():
            raise ValueError("an output with a negation that torch has not carried out")
    shape = (x.shape[0], x.shape[1])
    order = (1, 0) if _lies_by_columns(read) else (0, 1)
    rows, columns = (shape[way] for way in order)
    size, grid = groups.size(shape), groups.grid(shape)
    steps = [[t.stride(way) * t.element_size() for way in order] for t in (x, codes, scales)]
    places = (shape[1], 1)
    job = _Job(
        *(t.data_ptr() for t in (x, codes, scales)),
        *(step for pair in steps for step in pair),
        *(rows, columns),
        # A side may be any whole number; what is longer than the matrix is as long.
        *(min(size[way], max(1, shape[way])) for way in order),
        *(places[way] for way in order),
        _DTYPES.index(x.dtype),
    )
    return job, (grid[order[0]], grid[order[1]])


def _lies_by_columns(x: torch.Tensor) -> bool:
    """Say whether going down a column takes smaller steps than going along a row."""
    if x.shape[1] == 1 or x.shape[0] == 1:
        return x.shape[0] != 1
    return x.stride(1) != 1 and (x.stride(0) == 1 or 0 < x.stride(0) < x.stride(1))


def _threads(x: torch.Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _GRAIN))


def _cut(
    rows: tuple[int, int], columns: tuple[int, int], count: int
) -> list[tuple[int, int, int, int]]:
    """Cut a rectangle into about `count` of (row, end, column, end), and rows first."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    down = max(1, min(count, height))
    across = max(1, min(-(-count // down), width))
    return [
        (
            rows[0] + height * i // down,
            rows[0] + height * (i + 1) // down,
            columns[0] + width * j // across,
            columns[0] + width * (j + 1) // across,
        )
        for i in range(down)
        for j in range(across)
    ]


def _share(threads: int, function: Callable[..., int], calls: Sequence[tuple[object, ...]]) -> None:
    """Make all calls, this thread and `threads` - 1 others; ctypes lets them run at once.

    The others live for this alone: a thread that waited for more would not survive a fork.
    """
    left = deque(calls)
    failed: list[int] = []

    def work() -> None:
        while left:
            try:
                call = left.popleft()
            except IndexError:  # another thread was faster
                return
            if function(*call):
                failed.append(1)

    others = [threading.Thread(target=work) for _ in range(min(threads, len(calls)) - 1)]
    started = []
    try:
        for other in others:
            try:
                other.start()
            except RuntimeError:  # no more threads for this process: those there are do it
                break
            started.append(other)
        work()
    finally:
        left.clear()  # where this thread was interrupted
        for other in started:
            other.join()
    if failed:
        raise MemoryError("no memory for the tile of a thread")


# ---- the library ----


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    if compiled.disabled():
        return compiled.disabled()
    try:
        return _open()
    except (OSError, RuntimeError, ValueError) as e:
        return f"cannot build or load the native kernels: {e}"


def _open() -> ctypes.CDLL:
    """Return the tested library, compiled if the cache has none.

    Raises:
        OSError, RuntimeError, ValueError: there can be none, and why.
    """
    library = _load(compiled.build(_SOURCE.read_bytes(), _FLAGS, _TUNING))
    _test(library)
    return library


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    job, place, word = ctypes.POINTER(_Job), ctypes.c_int64, ctypes.c_uint32
    found, first = ctypes.POINTER(word), ctypes.POINTER(place)
    part = (place, place, place, place)
    library.fp8_quantize.argtypes = (job, *part, first)
    library.fp8_peak.argtypes = (job, *part, found, first)
    library.fp8_encode.argtypes = (job, *part, word)
    library.fp8_dequantize.argtypes = (job, *part)
    library.fp8_scale.argtypes = (job, place, place, word)
    library.fp8_scale.restype = None
    return library


def _test(library: ctypes.CDLL) -> None:
    """Compute what is known, in vector code and behind its end; every dtype, recipe and policy.

    Without torch, of which a caller may have changed the default device or the mode.

    Raises:
        RuntimeError: something else came out.
    """
    # All codes in order and what lies between two of them, which goes to the even one.
    exact = [_value(code) for code in range(127)]
    middle = [(a + b) / 2 for a, b in itertools.pairwise(exact)]
    numbers = [*exact, *middle, *(-x for x in exact), *(-x for x in middle)]
    codes = [*range(127), *(c + c % 2 for c in range(126))]
    codes += [c | 0x80 for c in codes]
    for dtype in (_BF16, _FP16, _FP32):
        # Of 448 times these each arithmetic makes such a scale. 2^-13 makes FP16 subnormals.
        scales = [*((a, 2.0**-13) for a in range(4)), (0, 3.0), (1, 3.0), (2, 3.0), (3, 4.0)]
        for arithmetic, factor in scales:
            bits = [_bits(x * factor, dtype) for x in numbers]
            expected = (codes, _bits(factor, _FP32), _NOWHERE)
            if _one_group(library, dtype, arithmetic, 0, bits) != expected:
                raise RuntimeError("the compiled library gives wrong codes")
        back = _one_group_back(library, dtype, codes, 0.5)
        if back != [_bits(_value(c & 0x7F) * (-0.5 if c & 0x80 else 0.5), dtype) for c in codes]:
            raise RuntimeError("the compiled library gives wrong numbers")
    # 1, Inf, -Inf, NaN, and a NaN with a sign.
    special = [0x3F800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001]
    for bits, arithmetic, policy, expected in (
        # A quotient, a product with a reciprocal, and one with 448 / amax; each is another.
        ([0x3F96A675, 0x3796A674], 0, 0, ([0x7E, 3], 0x3B2C2BF3, _NOWHERE)),
        ([0x3F96A675, 0x3796A674], 1, 0, ([0x7E, 4], 0x3B2C2BF3, _NOWHERE)),
        ([0x3F96A675, 0x3796A674], 2, 0, ([0x7E, 3], 0x3B2C2BF4, _NOWHERE)),
        ([0x3FCEB343, 0x385D76EC], 2, 0, ([0x7E, 8], 0x3B6C3A95, _NOWHERE)),
        ([0x3FCEB343, 0x385D76EC], 3, 0, ([0x7D, 7], 0x3B800000, _NOWHERE)),
        # Subnormals, 2^-127 and -2^-130, for which scales are the smallest normal number.
        *(([0x00400000, 0x80080000], a, 0, ([0x30, 0x98], 1 << 23, _NOWHERE)) for a in range(4)),
        (special, 3, 1, ([0x78, 0x7E, 0xFE, 0, 0], 0x3B800000, 1)),
        (special, 3, 2, ([0x78, 0x7F, 0xFF, 0x7F, 0xFF], 0x3B800000, 1)),
    ):
        if _one_group(library, _FP32, arithmetic, policy, bits) != expected:
            raise RuntimeError("the compiled library is not exact")


def _value(code: int) -> float:
    """Return what a code below 0x7f means."""
    exponent, mantissa = divmod(code, 8)
    return (mantissa + 8 * (exponent > 0)) * 2.0 ** (max(exponent, 1) - 10)


def _bits(number: float, dtype: int) -> int:
    """Return the bits of a number that is exact in this dtype."""
    if dtype == _FP16:
        return int.from_bytes(struct.pack("<e", number), "little")
    bits = int.from_bytes(struct.pack("<f", number), "little")
    return bits if dtype == _FP32 else bits >> 16


def _one_group(
    library: ctypes.CDLL, dtype: int, arithmetic: int, policy: int, bits: list[int]
) -> tuple[list[int], int, int]:
    """Return codes, bits of the scale and first non-finite place of one row that is one group."""
    x = array("I" if dtype == _FP32 else "H", bits)
    codes, scale = array("B", bytes(len(x))), array("I", [0])
    place = ctypes.c_int64()
    job = _row(x, codes, scale, dtype)
    job.arithmetic, job.policy = arithmetic, policy
    library.fp8_quantize(ctypes.byref(job), 0, 1, 0, 1, ctypes.byref(place))
    return codes.tolist(), scale[0], place.value


def _one_group_back(library: ctypes.CDLL, dtype: int, codes: list[int], scale: float) -> list[int]:
    """Return the bits of one row, of codes with one scale."""
    x = array("I" if dtype == _FP32 else "H", [0] * len(codes))
    written, scales = array("B", codes), array("f", [scale])
    job = _row(x, written, scales, dtype)
    library.fp8_dequantize(ctypes.byref(job), 0, 1, 0, len(codes))
    return x.tolist()


def _row(x: array[int], codes: array[int], scale: array[int] | array[float], dtype: int) -> _Job:
    n = len(x)
    addresses = (each.buffer_info()[0] for each in (x, codes, scale))
    steps = (step for each in (x, codes) for step in (n * each.itemsize, each.itemsize))
    return _Job(*addresses, *steps, 4, 4, 1, n, 1, n, n, 1, dtype)
