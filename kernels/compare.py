"""Whether codes and scales are the reference's, bit for bit, and all of them written.

Standard library and torch only.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import torch

from fp8ctl.kernels import reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.kernels.groups import Groups
    from fp8ctl.kernels.recipes import Recipe

    Outputs = tuple[torch.Tensor, torch.Tensor]

# NaN: no finite input has this code, or this scale.
_POISON_CODE = 0x7F
_POISON_SCALE = math.nan

_ALL = 1 << 31  # elements of a list up to which all of it is compared
_SAMPLE = 64  # tensors of a longer one


def poison(outs: Sequence[Outputs]) -> None:
    """Fill outputs with what no kernel writes, so that what is left unwritten shows."""
    for codes, scales in outs:
        codes.view(torch.uint8).fill_(_POISON_CODE)
        scales.fill_(_POISON_SCALE)


def with_reference(x: torch.Tensor, groups: Groups, recipe: Recipe, out: Outputs) -> str | None:
    """Return how codes and scales of `x` differ from the reference's, or None."""
    return outputs(out, reference.quantize(x, groups, recipe))


def with_the_cpu(x: torch.Tensor, groups: Groups, recipe: Recipe, out: Outputs) -> str | None:
    """Return how they differ from the reference on the CPU: in bands at both edges and between.

    On a GPU the reference itself is the work of that GPU's compiler and arithmetic.
    """
    codes, scales = out
    n = x.shape[0]
    height = groups.size((n, x.shape[1]))[0]
    for first in sorted({0, n // 2 // height * height, (n - 1) // height * height}):
        rows = slice(first, first + height)
        bands = slice(first // height, first // height + 1)
        found = (codes[rows].cpu(), scales[bands].cpu())
        told = with_reference(x[rows].cpu(), groups, recipe, found)
        if told:
            return f"on the CPU, rows from {first}: {told}"
    return None


def with_references(
    xs: Sequence[torch.Tensor], groups: Groups, recipe: Recipe, outs: Sequence[Outputs]
) -> tuple[str | None, float]:
    """Return how the outputs of a list differ, and which share of its elements was compared.

    All of a list is searched for what is left of `poison`. A long list is compared in
    part: at both ends, a tensor of each shape, and others at random.
    """
    if len(outs) != len(xs):
        return f"{len(outs)} results for {len(xs)} tensors", 0.0
    unwritten = torch.stack([_unwritten(out) for out in outs]).nonzero()
    if len(unwritten):
        return f"tensor {int(unwritten[0])}: not all of it is written", 0.0
    elements = sum(x.numel() for x in xs)
    chosen = range(len(xs)) if elements <= _ALL else _sample([tuple(x.shape) for x in xs])
    compared = 0
    for number in chosen:
        told = with_reference(xs[number], groups, recipe, outs[number])
        if told:
            return f"tensor {number}: {told}", compared / elements
        compared += xs[number].numel()
    return None, compared / elements


def outputs(found: Outputs, expected: Outputs) -> str | None:
    """Return how many bits of codes and scales differ, and the first of them, or None."""
    told = (
        _difference("codes", found[0].view(torch.uint8), expected[0].view(torch.uint8)),
        _difference("scales", found[1], expected[1]),
    )
    return "; ".join(one for one in told if one) or None


def _difference(what: str, found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"{what} of shape {list(found.shape)}, expected {list(expected.shape)}"
    bits = torch.uint8 if found.dtype == torch.uint8 else torch.int32
    wrong = found.view(bits) != expected.view(bits)
    count = int(wrong.sum())
    if not count:
        return None
    place = int(wrong.flatten().to(torch.uint8).argmax())
    index: list[int] = []
    for size in reversed(wrong.shape):
        place, rest = divmod(place, size)
        index.insert(0, rest)
    one, other = (t[tuple(index)].item() for t in (found, expected))
    shown = f"{one:#04x}, expected {other:#04x}" if what == "codes" else f"{one}, expected {other}"
    return f"{count} of {wrong.numel()} {what}, first at {index}: {shown}"


def _unwritten(out: Outputs) -> torch.Tensor:
    return (out[0].view(torch.uint8) == _POISON_CODE).any() | torch.isnan(out[1]).any()


def _sample(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    each = {shape: number for number, shape in enumerate(shapes)}
    some = random.Random(0).sample(range(len(shapes)), min(_SAMPLE, len(shapes)))  # noqa: S311
    return sorted({0, len(shapes) - 1, *each.values(), *some})
