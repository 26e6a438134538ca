"""What `fp8ctl.kernels.bench` measures: shapes of real models, groups, recipes, dtypes.

Standard library and torch only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels import recipes
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, Shape, block

if TYPE_CHECKING:
    from fp8ctl.kernels.recipes import Recipe

BLOCK = block(128, 128)

# Names as in the documents and on the command line.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

SINGLES: tuple[Shape, ...] = (
    *((151936, 4096), (129280, 7168), (14336, 4096), (4096, 14336)),
    *((4096, 4096), (6144, 4096), (1024, 4096)),
)
EXPERTS: Shape = (768, 2048)
# The Linear weights of one layer: Llama-3.1-8B, of 32 layers, and Qwen3-30B-A3B, of 48.
LLAMA_LAYER: tuple[Shape, ...] = (
    *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),
    *((14336, 4096), (14336, 4096), (4096, 14336)),
)
QWEN_LAYER: tuple[Shape, ...] = (
    *((4096, 2048), (512, 2048), (512, 2048), (2048, 4096)),
    *(((768, 2048), (768, 2048), (2048, 768)) * 128),
)
LLAMA_LAYERS, QWEN_LAYERS = 32, 48


@dataclass(frozen=True)
class Work:
    """What is measured: a tensor, or a list of tensors in one call.

    Attributes:
        name: as the table shows it.
        shapes: one [N, K], or those of a list.
        groups: what shares a scale.
        recipe: the arithmetic.
        dtype: of the input.
        threads: of torch on a CPU; None leaves them as they are.
        listed: these are the tensors of a list, be it of one.
        rounds: how often a tensor is timed; None: by the time it takes.
    """

    name: str
    shapes: tuple[Shape, ...]
    groups: Groups = BLOCK
    recipe: Recipe = recipes.IEEE
    dtype: torch.dtype = torch.bfloat16
    threads: int | None = None
    listed: bool = False
    rounds: int | None = None

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(n * k for n, k in self.shapes)

    @property
    def read(self) -> int:
        """Bytes of the inputs."""
        return self.elements * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of inputs and outputs: codes of one byte, scales of four."""
        scales = sum(math.prod(self.groups.scale_shape(shape)) for shape in self.shapes)
        return self.read + self.elements + 4 * scales

    @property
    def limit_bytes(self) -> int:
        """Bytes that cannot but be moved."""
        return self.bytes + (self.read if self.groups.kind == "per-tensor" else 0)


def for_cuda(recipe: Recipe, quick: bool, free: int) -> list[Work]:
    """Return what is measured on a GPU with so many bytes for tensors, in order."""
    singles = SINGLES[4:] if quick else SINGLES
    found = [Work(_by(shape), (shape,), recipe=recipe) for shape in singles]
    base = found[singles.index((4096, 4096) if quick else (14336, 4096))]
    found += _variants(base)
    found += [
        replace(base, name=f"{base.name} {DTYPES[dtype]}", dtype=dtype)
        for dtype in (torch.float16, torch.float32)
    ]
    count = 64 if quick else 1024
    found.append(_list(f"{count:,} x {_by(EXPERTS)}", (EXPERTS,) * count, recipe))
    layers = 2 if quick else LLAMA_LAYERS
    found.append(_list(_model("Llama-3.1-8B", layers, LLAMA_LAYERS), LLAMA_LAYER * layers, recipe))
    # Last, since it takes all the memory there is.
    one = _list("", QWEN_LAYER, recipe).bytes
    layers = min(1 if quick else QWEN_LAYERS, free // one)
    if layers:
        name = _model("Qwen3-30B-A3B", layers, QWEN_LAYERS)
        found.append(_list(name, QWEN_LAYER * layers, recipe))
    return found


def for_cpu(recipe: Recipe, quick: bool) -> list[Work]:
    """Return what is measured on a CPU, in order: all of it with as many as two threads."""
    shape = (512, 512) if quick else (4096, 4096)
    rounds = 2 if quick else 5
    two = min(2, torch.get_num_threads())
    base = Work(_by(shape), (shape,), recipe=recipe, threads=1, rounds=2 if quick else 7)
    found = [base] if two == 1 else [base, replace(base, threads=two)]
    found += [replace(one, rounds=rounds) for one in _variants(found[-1])]
    count = 2 if quick else 16
    listed = _list(f"{count} x {_by(EXPERTS)}", (EXPERTS,) * count, recipe)
    return [*found, replace(listed, threads=two)]


def _variants(base: Work) -> list[Work]:
    """Return the same work with other groups, and with other recipes."""
    found = [
        replace(base, name=f"{base.name} {groups}", groups=groups)
        for groups in (block(64, 64), block(1, 128), PER_TENSOR, PER_CHANNEL)
    ]
    others = [recipe for recipe in recipes.RECIPES.values() if recipe != base.recipe]
    return found + [replace(base, name=f"{base.name} {recipe}", recipe=recipe) for recipe in others]


def _list(name: str, shapes: tuple[Shape, ...], recipe: Recipe) -> Work:
    return Work(name, shapes, recipe=recipe, listed=True)


def _by(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _model(name: str, layers: int, of: int) -> str:
    return name if layers == of else f"{name}, {layers} of {of} layers"
