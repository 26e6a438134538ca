"""Compiles kernels for sm_90 and prints their PTX and SASS, as JSON: name -> both.

python -m tests.kernels.machine_code_cases NAME...
"""

# ruff: noqa: N803 - kernel parameters are named as in Triton's own examples

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp8ctl.kernels import batch, device, launch
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, block
from fp8ctl.kernels.recipes import check_non_finite, named

if TYPE_CHECKING:
    from collections.abc import Callable

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """Stands in for a kernel: keeps what it is called with, launches nothing."""

    def __init__(
        self, kernel: Any, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        self._kernel, self._calls = kernel, calls
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            self._calls.append((self._kernel, arguments, named))

        return call


def of_kernel(name: str) -> Any:
    """Compile what `launch` or `batch` calls on an H100."""
    dtype, recipe, policy, groups, how, *large = name.split()
    torch.cuda.get_device_capability = lambda *_: (8, 0) if how == "old" else (9, 0)
    launch._capability = torch.cuda.get_device_capability
    launch.current_device = lambda: torch.device("cpu")
    whole = {"per-tensor": PER_TENSOR, "per-channel": PER_CHANNEL}
    cut = whole.get(groups) or block(*map(int, groups.split("x")))
    # Many rows, so that programs are full; of channels that are large, few and long.
    shape = (16, 1 << 17) if large and groups == "per-channel" else (512, 512)
    x = torch.ones(shape, dtype=getattr(torch, dtype))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    kernels = {kernel: getattr(device, kernel) for kernel in ("_quantize", "_large")}
    try:
        for attribute, kernel in kernels.items():
            setattr(device, attribute, Recorder(kernel, calls))
        if how == "list":
            batch.quantize_many([x, x], cut, named(recipe), check_non_finite(policy))
        else:
            launch.quantize(x, cut, named(recipe), check_non_finite(policy))
    finally:
        for attribute, kernel in kernels.items():
            setattr(device, attribute, kernel)
    # Of a large group the first pass finds amax, the second writes codes.
    assert len(calls) == (2 if large else 1), (name, len(calls))
    kernel, arguments, given = calls[-1 if large == ["codes"] else 0]
    given |= dict(zip(kernel.arg_names, arguments, strict=False))
    assert given["LIST"] == (how == "list"), name
    known, signature = {}, {}
    for parameter in kernel.params:
        value = given.pop(parameter.name)
        if parameter.is_constexpr:
            known[parameter.name] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if abs(int(value)) < 1 << 31 else "i64"
    return _compile(kernel, signature, known, given, 80 if how == "old" else 90)


def of_control(name: str) -> Any:
    """Compile a kernel that holds what is looked for."""

    @triton.jit  # type: ignore[untyped-decorator]
    def control(x_ptr, y_ptr, WHAT: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, 128)
        x = tl.load(x_ptr + at)
        y = tl.load(y_ptr + at)
        if WHAT == "a / b":
            z = x / y
        elif WHAT == "exp2":
            z = tl.exp2(x)
        elif WHAT == "log2":
            z = tl.log2(x)
        elif WHAT == "a * b":
            z = x * y
        elif WHAT == "a * b + c":
            z = x * y + x
        else:
            z = tl.div_rn(x, y)
        tl.store(x_ptr + at, z)

    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "WHAT": "constexpr"}
    return _compile(control, signature, {"WHAT": name.removeprefix("control: ")}, {}, 90)


def _compile(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    architecture: int,
) -> Any:
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def main() -> None:
    found = {}
    for name in sys.argv[1:]:
        make: Callable[[str], Any] = of_control if name.startswith("control") else of_kernel
        made = make(name)
        found[name] = {"ptx": made.asm["ptx"], "sass": made.asm["sass"]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
