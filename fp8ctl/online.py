"""What an engine should have made of a checkpoint that it quantised itself (`--mode online`).

Both patched engines give every row of a weight a scale, of the columns that one rank holds, and
round it in a kernel of their own. The recipe of that kernel is known (`check.online`); on a GPU,
Triton's division may be off by the last places of FP32, so that a code next to a tie falls to
the other side. Such codes are looked at row by row: they must be those of a scale, and of its
inverse, that are within `_ULPS` units in the last place. Runs where torch is, called by `worker`;
Python 3.10.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import checkpoint, difference, formats, models, reading
from fp8ctl.kernels import digest as digests
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.groups import PER_CHANNEL
from fp8ctl.kernels.recipes import FP8_MAX, named
from fp8ctl.quality import measure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8ctl.checkpoint import Progress
    from fp8ctl.difference import Part
    from fp8ctl.manifest import Plan, PlannedTensor

_ULPS = 2


@dataclass(frozen=True)
class Kernel:
    """How an engine quantises.

    Attributes:
        recipes: that its kernels may have followed, the likeliest first.
        parts: by name, into how many ranks' parts the columns of a weight are cut; 1 of others.
        dtype: that 16-bit weights have in the engine, as torch spells it.
    """

    recipes: tuple[str, ...]
    parts: Mapping[str, int]
    dtype: str

    def to_json(self) -> dict[str, object]:
        """Return it as JSON types."""
        return {"recipes": list(self.recipes), "parts": dict(self.parts), "dtype": self.dtype}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Kernel:
        """Read it back."""
        return cls(tuple(found["recipes"]), dict(found["parts"]), str(found["dtype"]))


def become(
    planned: PlannedTensor, tensor: torch.Tensor, plan: Plan, kernel: Kernel, recipe: str
) -> dict[str, torch.Tensor]:
    """Return what a tensor of the source becomes: itself, or codes [N, K] and scales [N, parts]."""
    if not planned.quantize:
        return {planned.name: tensor}
    weight = tensor.to(getattr(torch, kernel.dtype))
    cuts = weight.chunk(kernel.parts.get(planned.name, 1), dim=1)
    made = [kernels.quantize(cut.contiguous(), PER_CHANNEL, named(recipe)) for cut in cuts]
    codes = torch.cat([codes.view(torch.uint8) for codes, _ in made], dim=1)
    scales = torch.cat([scales for _, scales in made], dim=1)
    name = formats.scale_name(planned.name, plan.mode)
    return {planned.name: codes.view(torch.float8_e4m3fn), name: scales}


def expected_digests(
    plan: Plan,
    kernel: Kernel,
    progress: Progress | None = None,
    quality: dict[str, dict[str, float]] | None = None,
) -> dict[str, list[int]]:
    """Return of every tensor the digests that would be right, one for each recipe.

    Args:
        plan: with a scale per channel; says what is quantised.
        kernel: of the engine.
        progress: as of `checkpoint.expected_digests`.
        quality: as there; of the first recipe, and of weights that are not cut.
    """
    found: dict[str, list[int]] = defaultdict(list)
    source = models.read_checkpoint(plan.model)
    checkpoint.require_planned(source, plan)

    def make(
        planned: PlannedTensor, weight: torch.Tensor
    ) -> tuple[list[checkpoint.Made], dict[str, float] | None]:
        recipes = kernel.recipes if planned.quantize else kernel.recipes[:1]
        made = [become(planned, weight, plan, kernel, recipe) for recipe in recipes]
        if quality is None or not planned.quantize:
            return made, None
        codes, scales = made[0].values()
        of_rows = scales.shape[1] == 1
        return made, measure(weight, codes, scales, PER_CHANNEL) if of_rows else None

    with contextlib.closing(reading.each(source, plan, make, progress)) as several:
        for planned, (made, measured) in several:
            for name, value in (pair for one in made for pair in one.items()):
                found[name].append(digests.digest(value))
            if quality is not None and measured is not None:
                quality[planned.name] = measured
    return dict(found)


def examine(
    plan: Plan,
    kernel: Kernel,
    told: Sequence[Mapping[str, Any]],
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Say of each tensor what differs, as `difference.examine`; looks may be "one step"."""
    recipe = kernel.recipes[0]

    def made(planned: PlannedTensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return become(planned, weight, plan, kernel, recipe)

    found = difference.examine(plan, told, progress, made)
    parts: dict[str, list[Part]] = defaultdict(list)
    for line in told:
        parts[str(line["name"])].append(difference.read_part(line))
    names = {name for name in parts if name.endswith(".weight") and f"{name}_scale" in parts}
    source = models.read_checkpoint(plan.model)
    for planned, _, tensor in reading.read_planned(source, plan, names):
        scales = formats.scale_name(planned.name, plan.mode)
        weight = tensor.to(getattr(torch, kernel.dtype))
        width = weight.shape[1] // kernel.parts.get(planned.name, 1)
        pairs = list(_pairs(parts[planned.name], parts[scales], width))
        whole = sum(math.prod(part.shape) for part in parts[planned.name] if part.primary)
        there = whole == weight.numel() and len(pairs) == len(parts[planned.name])
        if there and all(
            _is_close(weight, codes, part, width, named(recipe).floor) for codes, part in pairs
        ):
            for name in (planned.name, scales):
                found.setdefault(name, {"codes": None, "rows": "", "wanted": []})
                found[name] |= {"looks": "one step", "detail": "within one step of a code"}
    return found


def _pairs(
    codes: Iterable[Part], scales: Sequence[Part], width: int
) -> Iterable[tuple[Part, torch.Tensor]]:
    """Yield parts of codes with the scales of their rows."""
    for part in codes:
        for other in scales:
            same = (other.row, other.column, other.height) == (
                *(part.row, part.column // width),
                part.height,
            )
            if same and other.values is not None and other.rows is None:
                yield part, other.values.view(-1, 1)
                break


def _is_close(
    weight: torch.Tensor, part: Part, scales: torch.Tensor, width: int, floor: float
) -> bool:
    """Say whether codes are those of scales next to the right ones, bit for bit."""
    rows = weight[part.row : part.row + part.height, part.column : part.column + width].float()
    right = rows.abs().amax(1, keepdim=True).clamp(min=floor) / FP8_MAX
    if bool((_ordered(scales) - _ordered(right)).abs().max() > _ULPS):
        return False
    left = torch.arange(len(rows))
    near = [scales.reciprocal().view(torch.int32) + d for d in (0, 1, -1, 2, -2)]
    factors = [bits.view(torch.float32) for bits in near]
    for factor in (None, *factors):
        x = rows[left] / scales[left] if factor is None else rows[left] * factor[left]
        codes = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        left = left[digests.row_sums(codes, part.column) != part.sums[left]]
        if not len(left):
            return True
    return False


def _ordered(positive: torch.Tensor) -> torch.Tensor:
    return positive.contiguous().view(torch.int32).to(torch.int64)
