"""`launch --trace MODULE:FUNCTION`: show once per worker how a function is reached.

A breakpoint cannot be used in a server's child processes. This prints the
stack and the types of the arguments at the first call, into the worker's log.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from fp8ctl.engines.hooks.imports import after_import

if TYPE_CHECKING:
    from types import ModuleType

ENVIRONMENT = "FP8CTL_TRACE"


def describe(value: object) -> str:
    """Return a type as short as it says enough: `Tensor[2, 576] bfloat16 cpu`, `list[3]`."""
    shape = getattr(value, "shape", None)
    dtype = getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        device = getattr(value, "device", "")
        return f"{type(value).__name__}{list(shape)} {str(dtype).removeprefix('torch.')} {device}"
    if isinstance(value, (list, tuple, dict, set)):
        return f"{type(value).__name__}[{len(value)}]"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return type(value).__name__


def traced(function: Any, label: str) -> Any:
    """Return `function` with its first call in this process told on stderr."""
    done = threading.Lock()

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if done.acquire(blocking=False):
            with contextlib.suppress(Exception):  # whatever an argument's attributes raise
                given = [describe(a) for a in args]
                given += [f"{k}={describe(v)}" for k, v in kwargs.items()]
                stack = "".join(traceback.format_list(traceback.extract_stack()[:-1]))
                call = f"{label}({', '.join(given)})"
                sys.stderr.write(f"fp8ctl trace: {call} in process {os.getpid()}\n{stack}")
                sys.stderr.flush()
        return function(*args, **kwargs)

    return wrapper


def install(spec: str | None = None) -> None:
    """Trace what `spec` ("MODULE:FUNCTION", FUNCTION may be `Class.method`) names.

    Taken from the environment where not given; nothing happens without it. A
    name that the module does not have is told on stderr: a trace must never
    end a server.
    """
    spec = spec if spec is not None else os.environ.get(ENVIRONMENT)
    if not spec:
        return
    module_name, _, path = spec.partition(":")

    def wrap(module: ModuleType) -> None:
        owner: Any = module
        *parents, name = path.split(".")
        try:
            for parent in parents:
                owner = getattr(owner, parent)
            found = inspect.getattr_static(owner, name)
        except AttributeError:
            sys.stderr.write(f"fp8ctl trace: {module_name} has no {path!r}, nothing is traced\n")
            return
        if isinstance(found, (staticmethod, classmethod)):
            setattr(owner, name, type(found)(traced(found.__func__, spec)))
        elif inspect.isfunction(found):
            setattr(owner, name, traced(found, spec))
        else:  # a class, a property, a compiled kernel: wrapping would break its users
            kind = type(found).__name__
            sys.stderr.write(f"fp8ctl trace: {spec} is a {kind}, no function: nothing is traced\n")

    after_import(module_name, wrap)
