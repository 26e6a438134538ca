"""What tensors of a list share, and where each begins.

Shape, strides, dtype and device of 1,024 tensors take Python half a millisecond, a third of
what a GPU takes to quantise them. Where torch has DLPack's C exchange (2.10 and up) and a C
compiler is there, as Triton needs one, `facts.c` asks it instead; else, and for tensors that
it cannot tell, calls from C into torch are strung together.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fp8ctl.kernels import compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Numbers = np.ndarray[Any, np.dtype[np.int64]]

# More kinds than these are told apart in Python.
_ROOM = 256
_WORDS = 14  # of facts.c
# A subclass may mean something else by what it answers.
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_DTYPE, _SHAPE, _DEVICE = (operator.attrgetter(name) for name in ("dtype", "shape", "device"))
# Place of a function in DLPack's table, in words; before it are the header and three others.
_DESCRIBE = 5


class Facts:
    """Gives tensors numbers, equal ones to tensors alike in dtype, device, shape and strides.

    A tensor that is asked for again, or one like it, gets the same number again.
    """

    def __init__(self) -> None:
        self._look = _compiled()
        self._keys: dict[object, int] = {}
        self._naming = threading.Lock()
        if self._look is not None:
            self._seen = np.zeros((_ROOM, _WORDS), dtype=np.int64)
            self._known = ctypes.c_int64(0)

    def look(self, xs: Sequence[torch.Tensor]) -> tuple[Numbers, Numbers]:
        """Return the number of each tensor, and its address.

        Raises:
            TypeError, AttributeError, RuntimeError: something is not a tensor, or has no memory.
        """
        count = len(xs)
        if self._look is None:
            return self._asked(xs)
        numbers = np.empty(count, dtype=np.int64)
        addresses = np.empty(count, dtype=np.int64)
        objects = np.fromiter(map(id, xs), np.uintp, count)
        self._look(
            objects.ctypes.data,
            count,
            self._seen.ctypes.data,
            ctypes.byref(self._known),
            _ROOM,
            numbers.ctypes.data,
            addresses.ctypes.data,
        )
        if not _PLAIN.issuperset(map(type, xs)):
            numbers[[type(x) not in _PLAIN for x in xs]] = -1
        rest = np.flatnonzero(numbers < 0)
        if len(rest):
            numbers[rest], addresses[rest] = self._asked([xs[i] for i in rest.tolist()])
        return numbers, addresses

    def _asked(self, xs: Sequence[torch.Tensor]) -> tuple[Numbers, Numbers]:
        """Do it by calls of torch's methods."""
        found = [*map(self._keys.get, _keys(xs))]
        if None in found:
            with self._naming:  # or two kinds could get one number
                for key in _keys(xs):
                    self._keys.setdefault(key, _ROOM + len(self._keys))
            found = [*map(self._keys.get, _keys(xs))]
        addresses = np.fromiter(map(torch.Tensor.data_ptr, xs), np.int64, len(xs))
        return np.array(found, dtype=np.int64), addresses


def _keys(xs: Sequence[torch.Tensor]) -> Iterator[object]:
    """Yield what makes each tensor one of a kind.

    By calls in C, without an object that is kept: a list of tuples would have Python
    collect garbage, for longer than a GPU takes.
    """
    # Strides count where they are not what the shape says; asking for them is slow.
    strides: list[object] = [*map(torch.Tensor.is_contiguous, xs)]
    if not all(strides):
        strides = [dense or x.stride() for dense, x in zip(strides, xs, strict=True)]
    names = map(_DTYPE, xs), map(_DEVICE, xs), map(_SHAPE, xs)
    return zip(map(type, xs), *names, strides)  # noqa: B905


@functools.cache
def _compiled() -> Callable[..., object] | None:
    """Return the function of facts.c, with its first two arguments; None where it cannot be."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or compiled.disabled():
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        table = pointer(capsule, b"dlpack_exchange_api")
        if table is None or ctypes.c_uint32.from_address(table).value != 1:
            return None  # another major version, of another layout
        describe = (ctypes.c_void_p * (_DESCRIBE + 1)).from_address(table)[_DESCRIBE]
        if not describe:
            return None
        source = Path(__file__).with_name("facts.c").read_bytes()
        # PyDLL: Python's lock is held, as DLPack wants it.
        function = ctypes.PyDLL(str(compiled.build(source, ("-O2",)))).fp8_facts
    except (OSError, RuntimeError, ValueError, AttributeError):
        return None
    forget = ctypes.cast(ctypes.pythonapi.PyErr_Clear, ctypes.c_void_p)
    address, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = None
    function.argtypes = (
        *(address, address, address, number),
        *(address, ctypes.POINTER(number), number, address, address),
    )
    return functools.partial(function, describe, forget)
