"""A position-keyed 64-bit digest of a tensor's bits that adds up over its parts.

A tensor is seen as a matrix, and each row of the whole as little-endian words of 32 bits:

    D(t) = sum over rows r and words w of R(r) * C(w) * word(r, w)   mod 2^64
    R(p) = fin(2 p + 1) | 1        C(p) = fin(2 p) | 1
    fin(x): x ^= x >>> 30; x *= 0xbf58476d1ce4e5b9; x ^= x >>> 27;
            x *= 0x94d049bb133111eb; x ^= x >>> 31           (splitmix64)

`r` and `w` are places in the whole tensor, and a part of a word is that word with zeros
elsewhere. So the digests of row slices, column slices or the parts of a fused module, each
computed with its own offsets, add up to the digest of the whole, in any order and on any
rank. One changed element always changes it, since keys are odd; moved, swapped or several
changed elements change it up to chance: 2^-64, and 2^-32 where all words differ in their
highest bit alone. Zeros add nothing: shapes are compared beside it. It is no defence
against an adversary: it finds mistakes.

A matrix is a 2-D tensor as it is; more dimensions with all but the last flattened into
rows; 1-D as n rows of one column (a bias is sharded like the rows of its weight); 0-D as one
element at (0, 0).

A multiplication and an addition for 4 bytes: the speed is memory's. On a GPU by Triton, on a
CPU by C that is built at first use, without either by torch. Runs in an engine's interpreter.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fp8ctl.kernels import compiled
from fp8ctl.kernels.fetched import Fetched
from fp8ctl.kernels.inputs import has_triton
from fp8ctl.kernels.known import Known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fp8ctl.kernels import digest_triton

    #: A tensor, and the row and column of the whole at which it begins.
    Part = tuple[torch.Tensor, int, int]
    #: Adds up one matrix.
    Way = Callable[["Sums"], int | torch.Tensor]

_MASK = (1 << 64) - 1
_M1 = 0xBF58476D1CE4E5B9 - (1 << 64)  # as int64: torch multiplies modulo 2^64
_M2 = 0x94D049BB133111EB - (1 << 64)

# torch runs an operation on up to 2^15 elements in the calling thread. Larger chunks take
# both of 2 idle cores, but beside other work their threads wait for each other at every step.
_CHUNK = 1 << 15
_CHUNK_CUDA = 1 << 24
# Keys of places below this are kept: 16 MB for each of the four kinds.
_KEPT = 1 << 21

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sums(NamedTuple):
    """A digest as sums over two sides: of the inner side within those of the outer one.

    Attributes:
        bits: [outer, inner], of elements of 1, 2 or 4 bytes.
        outer, inner: int64 keys of each side, on the device of `bits`.
    """

    bits: torch.Tensor
    outer: torch.Tensor
    inner: torch.Tensor


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
    return digests([(t, row_offset, col_offset)])[0]


def digests(parts: Iterable[tuple[torch.Tensor, int, int]]) -> list[int]:
    """Return the digest of each (tensor, row_offset, col_offset), as `digest` does.

    With Triton a GPU gets all of its tensors in a few launches and is waited for once.
    """
    return start(parts)()


@torch.no_grad()
def start(parts: Iterable[tuple[torch.Tensor, int, int]]) -> Callable[[], list[int]]:
    """Begin with `digests`; return what waits for them, and for nothing that is queued later.

    With Triton a GPU's come later.
    """
    found: list[int | torch.Tensor] = []
    paths: dict[torch.device, Way | None] = {}
    lists: dict[torch.device, list[tuple[int, Part]]] = {}
    for part in parts:
        t, row_offset, col_offset = part
        where = t.device
        if where not in paths:
            paths[where] = _path(where)
        path = paths[where]
        if path is None:
            if t.numel():
                lists.setdefault(where, []).append((len(found), part))
            found.append(0)
            continue
        sums = _sums(t.detach(), row_offset, col_offset)
        found.append(0 if sums is None else path(sums))
    return _ending(
        found,
        [
            ([i for i, _ in those], _lists().start([part for _, part in those]))
            for those in lists.values()
        ],
    )


class Prepared:
    """Digests of tensors that stay where they are, computed again and again.

    To find out how a tensor is added up takes longer than to do it where it is small; here that
    is done once. The tensors are kept.
    """

    @torch.no_grad()
    def __init__(self, parts: Iterable[Part]) -> None:
        """Find out how each is added up.

        Args:
            parts: (tensor, row_offset, col_offset) as in `digest`.
        """
        self._parts = [*parts]
        self._way = _path(self._parts[0][0].device) if self._parts else None
        sums = [_sums(t.detach(), row, column) for t, row, column in self._parts]
        self._sums = [(i, one) for i, one in enumerate(sums) if one is not None]
        # What had to be copied first is another number the next time.
        self._stays = all(_begin(self._parts[i][0]) == _begin(one.bits) for i, one in self._sums)
        # One way for all of them.
        self._stays &= len({t.device for t, _, _ in self._parts}) <= 1
        #: On a GPU: the stream that its tables were made on, and that runs it.
        self._list: tuple[int, digest_triton.Prepared] | None = None

    @torch.no_grad()
    def start(self) -> Callable[[], list[int]]:
        """Begin; return what waits for the digests, and for nothing that is queued later."""
        if not self._stays:
            return start(self._parts)
        found: list[int | torch.Tensor] = [0] * len(self._parts)
        way = self._way
        if way is None:
            those = [([i for i, _ in self._sums], self._there().run())] if self._sums else []
            return _ending(found, those)
        for i, sums in self._sums:
            found[i] = way(sums)
        return _ending(found, [])

    def _there(self) -> digest_triton.Prepared:
        """Return what runs on the current stream: tables are made anew for another one."""
        from fp8ctl.kernels import digest_triton
        from fp8ctl.kernels.launch import current_stream

        stream = current_stream(self._parts[0][0].device)
        if self._list is None or self._list[0] != stream:
            self._list = stream, digest_triton.Prepared([one for _, one in self._sums])
        return self._list[1]


def _ending(
    found: list[int | torch.Tensor], lists: Sequence[tuple[Sequence[int], torch.Tensor]]
) -> Callable[[], list[int]]:
    """Return what waits for digests.

    Args:
        found: those that are known, or on their way one by one.
        lists: places of others, and their sums on a device.
    """
    started = [(places, Fetched(sums)) for places, sums in lists]

    def ended() -> list[int]:
        for places, totals in started:
            for i, value in zip(places, totals.tolist(), strict=True):
                found[i] = value
        return [int(one) & _MASK for one in found]

    return ended


@torch.no_grad()
def row_sums(t: torch.Tensor, col_offset: int = 0) -> torch.Tensor:
    """Return what each row puts into the digest, before its own key: int64 [rows], on the CPU.

    So `digest` is the sum of R(row) * row_sums, and rows are told apart wherever they lie.
    What column slices give adds up. With torch alone, in pieces.

    Args:
        t: as in `digest`.
        col_offset: column of the whole at which `t` begins, in elements.

    Raises:
        TypeError, ValueError: as `digest`.
    """
    if col_offset < 0:
        raise ValueError(f"offsets must not be negative, not {col_offset}")
    if t.is_complex() or t.element_size() not in _BITS:
        raise TypeError(f"cannot digest {t.dtype}")
    matrix = _matrix(t.detach().resolve_neg())
    if t.numel() == 0:
        return torch.zeros(matrix.shape[0], dtype=torch.int64)
    matrix = matrix.view(_BITS[t.element_size()])
    size = matrix.element_size()
    if size == 8:
        matrix, col_offset, size = matrix.contiguous().view(torch.int32), col_offset * 2, 4
    n, k = matrix.shape
    keys = _keys(size, col_offset, k, matrix.device)
    unsigned = (1 << (8 * size)) - 1
    height = max(1, (_CHUNK_CUDA if matrix.is_cuda else _CHUNK) // k)
    sums = [
        matrix[top : top + height].to(torch.int64).bitwise_and_(unsigned).mul_(keys).sum(1)
        for top in range(0, n, height)
    ]
    return torch.cat(sums).cpu()


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


# ---- three ways to add up ----


def by_torch(sums: Sums) -> torch.Tensor:
    """Add up with torch alone, on any device."""
    bits, outer, inner = sums
    n, k = bits.shape
    limit = _CHUNK_CUDA if bits.is_cuda else _CHUNK
    width = min(k, limit)
    height = max(1, min(n, limit // width))
    unsigned = (1 << (8 * bits.element_size())) - 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for left in range(0, k, width):
        keys = inner[left : left + width]
        for top in range(0, n, height):
            part = bits[top : top + height, left : left + width].to(torch.int64)
            part.bitwise_and_(unsigned).mul_(keys)
            total += part.sum(1).mul_(outer[top : top + height]).sum()
    return total


def by_c(sums: Sums) -> int:
    """Add up by digest.c, which has to be there (`_compiled`)."""
    bits, outer, inner = sums
    size = bits.element_size()
    function = _compiled()
    assert function is not None
    return int(
        function(
            bits.data_ptr(),
            *bits.shape,
            *(step * size for step in bits.stride()),
            size,
            outer.data_ptr(),
            inner.data_ptr(),
        )
    )


def by_triton(sums: Sequence[Sums]) -> torch.Tensor:
    """Add up each of a list on one GPU."""
    from fp8ctl.kernels import digest_triton

    return digest_triton.Prepared(sums).run()


class Lists:
    """Lists of tensors on GPUs, and what was found out about those that were asked for before.

    To find out how a tensor is cut takes Python 40 us, as long as an H100 takes to read 100 MB
    of it; and a rank is asked for the same tensors at every update.
    """

    def __init__(self, most: int = 256) -> None:
        """Remember up to `most` lists; a list of 500 tensors takes some 0.5 MB of the device."""
        self._known: Known[digest_triton.Prepared] = Known(most)

    def start(self, parts: Sequence[Part]) -> torch.Tensor:
        """Return the sums of a list, int64 on the device, without waiting for it.

        Args:
            parts: at least one, all of one device and none empty.
        """
        from fp8ctl.kernels import digest_triton
        from fp8ctl.kernels.launch import current_stream

        tensors = [t for t, _, _ in parts]
        key = None
        if not any(map(torch.Tensor.is_neg, tensors)):
            places = tuple([(r, c) for _, r, c in parts])
            key = self._known.key(tensors, places, current_stream(tensors[0].device))
        found = None if key is None else self._known.get(key)
        if found is None:
            sums = [_sums(t.detach(), r, c) for t, r, c in parts]
            held = [one for one in sums if one is not None]
            found = digest_triton.Prepared(held)
            # What had to be copied first is elsewhere the next time.
            memory = zip(tensors, held, strict=True)
            if key is not None and all(_begin(t) == _begin(one.bits) for t, one in memory):
                self._known.put(key, found)
        return found.run()


def _begin(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _path(device: torch.device) -> Way | None:
    """Return what adds up one matrix of a device; None: `by_triton`, which takes lists."""
    if device.type == "cuda" and has_triton():
        return None
    return by_c if device.type == "cpu" and _compiled() is not None else by_torch


@functools.cache
def _compiled() -> Callable[..., int] | None:
    """Return the function of digest.c, None where it cannot be built."""
    if compiled.disabled():
        return None
    source = Path(__file__).with_name("digest.c").read_bytes()
    fast = ("-march=native",)
    try:
        function = ctypes.CDLL(str(compiled.build(source, ("-O3",), (fast, ())))).fp8_digest
    except (OSError, RuntimeError, ValueError, AttributeError):
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = ctypes.c_uint64
    function.argtypes = (address, *(number,) * 5, address, address)
    checked: Callable[..., int] = function
    return checked


# ---- what is added up ----


def _sums(t: torch.Tensor, row_offset: int, col_offset: int) -> Sums | None:
    """Return what is to be added up, None where there are no elements."""
    if row_offset < 0 or col_offset < 0:
        raise ValueError(f"offsets must not be negative, not ({row_offset}, {col_offset})")
    if t.is_complex() or t.element_size() not in _BITS:
        raise TypeError(f"cannot digest {t.dtype}")
    if t.numel() == 0:
        return None
    matrix = _matrix(t.resolve_neg()).view(_BITS[t.element_size()])
    size = matrix.element_size()
    if size == 8 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()  # such tensors are small: positions, counters
    if size == 8 or (size < 4 and _is_of_words(matrix, col_offset)):
        matrix, col_offset, size = matrix.view(torch.int32), col_offset * size // 4, 4
    n, k = matrix.shape
    rows = _keys("row", row_offset, n, matrix.device)
    columns = _keys(size, col_offset, k, matrix.device)
    # What lies beside each other in memory is the inner side.
    if matrix.stride(1) > matrix.stride(0) > 0 or (k == 1 and n > 1):
        return Sums(matrix.t(), columns, rows)
    return Sums(matrix, rows, columns)


def _matrix(t: torch.Tensor) -> torch.Tensor:
    if t.dim() == 0:
        return t.reshape(1, 1)
    if t.dim() == 1:
        return t.unsqueeze(1)
    return t if t.dim() == 2 else t.flatten(0, -2)


def _is_of_words(matrix: torch.Tensor, col_offset: int) -> bool:
    """Say whether every row is whole words of the whole tensor, and aligned as such."""
    size = matrix.element_size()
    steps = (col_offset, matrix.shape[1], matrix.storage_offset(), matrix.stride(0))
    return (
        matrix.stride(1) == 1
        and all(step * size % 4 == 0 for step in steps)
        and matrix.data_ptr() % 4 == 0
    )


def _keys(kind: str | int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return int64 keys of places first, first + 1, ...: of rows, or of elements of so many bytes
    within a row, for which the word's key is shifted to where they lie in it.
    """
    last = first + count
    if last > _KEPT:
        return _made_keys(kind, first, count, device)
    # A few sizes, so that not every tensor makes keys of its own.
    return _kept_keys(kind, 1 << max(12, (last - 1).bit_length()), device)[first:last]


@functools.lru_cache(maxsize=64)
def _kept_keys(kind: str | int, count: int, device: torch.device) -> torch.Tensor:
    return _made_keys(kind, 0, count, device)


def _made_keys(kind: str | int, first: int, count: int, device: torch.device) -> torch.Tensor:
    places = torch.arange(first, first + count, dtype=torch.int64, device=device)
    if kind == "row":
        return _finish(places * 2 + 1).bitwise_or_(1)
    each = 4 // int(kind)
    keys = _finish(places.div(each, rounding_mode="floor") * 2).bitwise_or_(1)
    return keys.bitwise_left_shift_(places % each * (8 * int(kind)))


@functools.cache
def _lists() -> Lists:
    """Return the lists of this process."""
    return Lists()


def _finish(x: torch.Tensor) -> torch.Tensor:
    """Apply splitmix64's finaliser in place; int64 shifts are arithmetic, so mask them."""
    shifts: tuple[tuple[int, Any], ...] = ((30, _M1), (27, _M2), (31, None))
    for shift, factor in shifts:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            x.mul_(factor)
    return x
