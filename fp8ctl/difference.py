"""What a few tensors that differ look like beside what they should be, from what ranks tell.

The ranks' answers (`hooks/inspection.py`) give sums of rows, which say where, and values, which say
how many and like what. Runs where torch is, called by `worker`; Python 3.10.
"""

from __future__ import annotations

import base64
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl import checkpoint, models, reading
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.dequantize import dequantize
from fp8ctl.kernels.digest import row_sums
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR
from fp8ctl.kernels.recipes import RECIPES
from fp8ctl.pipeline import groups_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from fp8ctl.checkpoint import Progress
    from fp8ctl.manifest import Plan, PlannedTensor

#: Rows of a large tensor whose values are asked for, to count what differs in them.
ROWS = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSET = (1.0, torch.finfo(torch.float32).min, 0.0)
#: What load format dummy fills weights with is at most this; FP8's next number is the double.
_DUMMY = 1.001e-3


@dataclass
class Part:
    """A rectangle that one rank told of.

    Attributes:
        sums: of each row, without its key.
        rows: of the whole tensor, whose values `values` are; None for all of the part.
        values: None where they are too many.
    """

    row: int
    column: int
    shape: tuple[int, ...]
    primary: bool
    sums: torch.Tensor
    rows: list[int] | None
    values: torch.Tensor | None

    @property
    def height(self) -> int:
        """Its number of rows, as digests count them."""
        return len(self.sums)


def read_part(line: Mapping[str, Any]) -> Part:
    """Return what a rank's line says.

    Raises:
        KeyError, ValueError, zlib.error: it is none.
    """
    shape = tuple(int(side) for side in line["shape"])
    sums = torch.frombuffer(bytearray(base64.b64decode(line["sums"])), dtype=torch.int64)
    rows = line["rows"]
    values = None
    if line["values"] is not None:
        data = bytearray(zlib.decompress(base64.b64decode(line["values"])))
        dtype: torch.dtype = getattr(torch, line["dtype"])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        values = flat.view(shape if rows is None else (len(rows), *shape[1:]))
    return Part(
        int(line["row"]), int(line["column"]), shape, bool(line["primary"]), sums, rows, values
    )


def examine(
    plan: Plan,
    told: Iterable[Mapping[str, Any]],
    progress: Progress | None = None,
    become: Callable[[PlannedTensor, torch.Tensor], dict[str, torch.Tensor]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Say of each tensor what differs.

    Args:
        plan: by which the source is quantised.
        told: lines of all ranks about these tensors.
        progress: as of `checkpoint.expected_digests`.
        become: what a tensor of the source should become; None: as `checkpoint.become` has it.

    Returns:
        By name: codes: [how many elements differ, of how many] or None; rows: as text; looks, as
        `check.tensors.Looks`, or ""; detail; wanted: rows whose values would let it count.
    """
    parts: dict[str, list[Part]] = defaultdict(list)
    for line in told:
        parts[str(line["name"])].append(read_part(line))
    owners = {_owner(name): name for name in parts}
    found: dict[str, dict[str, Any]] = {}
    source = models.read_checkpoint(plan.model)
    for planned, info, tensor in reading.read_planned(source, plan, owners):
        weight = tensor.to(reading.default_device())
        made = become(planned, weight) if become else checkpoint.become(planned, weight, plan)
        for name, want in made.items():
            if name in parts:
                found[name] = _examine(name, want.cpu(), parts[name], weight, plan)
        if progress is not None:
            progress(info.nbytes, plan.bytes_before)
    return found


def _owner(name: str) -> str:
    return name.removesuffix("_inv").removesuffix("_scale")


def _examine(
    name: str, want: torch.Tensor, parts: Sequence[Part], weight: torch.Tensor, plan: Plan
) -> dict[str, Any]:
    answer: dict[str, Any] = {"codes": None, "rows": "", "looks": "", "detail": "", "wanted": []}
    some = next((part.values for part in parts if part.values is not None), None)
    fits = all(len(part.shape) == want.dim() for part in parts) and all(
        part.row + part.height <= max(1, len(_matrix(want))) for part in parts
    )
    if not fits or (some is not None and some.dtype != want.dtype):
        return answer  # another shape or type says it all
    rows = _rows(want, parts)
    answer["rows"] = spans(rows)
    if all(part.rows is not None for part in parts):
        answer |= _counted_in_rows(want, parts, rows)
        return answer
    if any(part.values is None for part in parts):
        answer["wanted"] = rows[:ROWS]
        return answer
    held = _whole(want, parts)
    different = _bits(held) != _bits(want)
    answer["codes"] = [int(different.sum()), want.numel()]
    looks, detail = _looks(name, held, want, parts, weight, plan)
    return {**answer, "looks": looks, "detail": detail}


def _rows(want: torch.Tensor, parts: Sequence[Part]) -> list[int]:
    """Return the rows of which some part is not as it should be."""
    whole = _matrix(want)
    mine = torch.zeros(len(whole), dtype=torch.int64)
    for part in parts:
        if part.primary:
            mine[part.row : part.row + part.height] += part.sums
    wrong = mine != row_sums(want)
    for part in parts:
        if not part.primary:  # a copy counts for itself
            rows = slice(part.row, part.row + part.height)
            wrong[rows] |= part.sums != row_sums(_cut(want, part), part.column)
    return [int(row) for row in wrong.nonzero().flatten()]


def _counted_in_rows(
    want: torch.Tensor, parts: Sequence[Part], rows: Sequence[int]
) -> dict[str, Any]:
    """Count what differs in the rows that were asked for."""
    different = 0
    looked: set[int] = set()
    for part in parts:
        if part.values is None or part.rows is None or not part.primary:
            continue
        right = _cut(want, part)[[row - part.row for row in part.rows]]
        different += int((_bits(part.values) != _bits(right)).sum())
        looked.update(part.rows)
    if looked >= set(rows):
        return {"codes": [different, want.numel()]}
    seen = len(looked) * want.numel() // max(1, len(_matrix(want)))
    return {"detail": f"{different} of {seen} in the first {len(looked)} of these rows"}


def _looks(
    name: str,
    held: torch.Tensor,
    want: torch.Tensor,
    parts: Sequence[Part],
    weight: torch.Tensor,
    plan: Plan,
) -> tuple[str, str]:
    """Return what the values look like, and more about it."""
    if _is_transposed(want, parts):
        return "transposed", ""
    scales = name != _owner(name)
    if scales:
        wrong = held[_bits(held) != _bits(want)]
        unset = torch.stack([wrong == value for value in _UNSET]).any(0)
        if len(wrong) and bool(unset.all()):
            return "unscaled", "scales that nobody loaded"
        if bool((held < 0).any()) and float(held.abs().max()) <= _DUMMY:  # no scale is negative
            return "dummy", "small random numbers"
        return "", ""
    if want.dtype == torch.float8_e4m3fn:
        cast = weight.float().clamp(-448, 448).to(torch.float8_e4m3fn).cpu()
        if torch.equal(_bits(cast), _bits(held)):
            return "unscaled", "the weights cast to FP8 without a scale"
        if float(held.float().abs().max()) <= 2 * _DUMMY < float(want.float().abs().max()):
            return "dummy", "small random numbers"
        return "", _other_recipe(held, weight, plan)
    if want.dim() == 2 and _was_quantised(held, weight, plan):
        return "quantised", "the weights after a way through FP8"
    return "", ""


def _is_transposed(want: torch.Tensor, parts: Sequence[Part]) -> bool:
    """Say whether what is wrong is: each part by itself, or as it was cut from the whole."""
    if want.dim() != 2:
        return False
    wrong = 0
    for part in parts:
        assert part.values is not None
        right = _cut(want, part)
        if torch.equal(_bits(part.values), _bits(right)):
            continue
        wrong += 1
        turned = [right.t()] if right.shape[0] == right.shape[1] else []
        if want.shape[0] == want.shape[1]:
            turned.append(_cut(want.t(), part))
        if not any(torch.equal(_bits(part.values), _bits(one)) for one in turned):
            return False
    return wrong > 0


def _other_recipe(held: torch.Tensor, weight: torch.Tensor, plan: Plan) -> str:
    """Return which other recipe would have made these codes."""
    for recipe in RECIPES.values():
        codes, _ = kernels.quantize(weight, groups_of(plan), recipe)
        if torch.equal(_bits(codes.cpu()), _bits(held)):
            return f"as recipe {recipe.name} makes them"
    return ""


def _was_quantised(held: torch.Tensor, weight: torch.Tensor, plan: Plan) -> bool:
    """Say whether a kept matrix holds codes as numbers, or what quantisation left of it."""
    for groups in {groups_of(plan), PER_TENSOR, PER_CHANNEL}:
        for recipe in (plan.recipe, "reciprocal"):
            codes, scales = kernels.quantize(weight, groups, recipe)
            back = dequantize(codes, scales, groups, torch.float32)
            for one in (codes.float(), back):
                if torch.equal(_bits(one.to(held.dtype).cpu()), _bits(held)):
                    return True
    return False


def _whole(want: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Put the parts together that count."""
    held = torch.zeros_like(want, memory_format=torch.contiguous_format)
    for part in parts:
        assert part.values is not None
        if part.primary:
            _cut(held, part).copy_(part.values)
    return held


def _cut(whole: torch.Tensor, part: Part) -> torch.Tensor:
    """Return where a part lies in the whole."""
    if whole.dim() == 0:
        return whole
    rows = whole[part.row : part.row + part.shape[0]]
    if whole.dim() != 2:
        return rows
    return rows[:, part.column : part.column + part.shape[1]]


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1)
    return tensor if tensor.dim() == 2 else tensor.flatten(0, -2)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def spans(rows: Sequence[int], most: int = 6) -> str:
    """Return numbers as text: `3`, `0-63`, `1, 4-7, ...`."""
    found: list[list[int]] = []
    for row in rows:
        if found and row == found[-1][1] + 1:
            found[-1][1] = row
        else:
            found.append([row, row])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in found[:most]]
    return ", ".join(texts) + (", ..." if len(found) > most else "")
