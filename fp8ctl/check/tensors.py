"""What became of each tensor, and the word for it all. Pure; called by `weights`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fp8ctl import formats
from fp8ctl.policy import Reason
from fp8ctl.render import plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8ctl.check.verdict import Verdict
    from fp8ctl.held import Held
    from fp8ctl.manifest import Plan

#: "cast": a kept tensor that the engine holds in another 16- or 32-bit type; decides nothing.
Found = Literal["equal", "different", "missing", "unexpected", "cast"]
#: What a tensor that is not equal looks like; "" where it looks like nothing known.
Looks = Literal[
    "",
    "stale",
    "transposed",
    "swapped",
    "unscaled",
    "bf16",
    "other block",
    "quantised",
    "dummy",
    "one step",
]
#: Types of kept tensors, from the spelling of safetensors to that of torch.
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
CODES = "float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one tensor of the expectation, or of one that nobody expected.

    Attributes:
        name: in the checkpoint.
        found: how it compares.
        dtype: that is held; "" where it is missing.
        quantize: it is codes or scales.
        detail: what else is known, for people.
        codes: how many elements differ, and of how many; None where nobody counted.
        rows: which rows differ, as text; "" where nobody looked.
        looks: like what.
        version: of `stale`: whose it is.
        like: of `swapped`: which tensor's values it has.
        by_digest: whether nothing else differs: neither shape nor type, nor copies of it.
    """

    name: str
    found: Found
    dtype: str
    quantize: bool
    detail: str = ""
    codes: tuple[int, int] | None = None
    rows: str = ""
    looks: Looks = ""
    version: str = ""
    like: str = ""
    by_digest: bool = False

    @property
    def bad(self) -> bool:
        """Whether it is a fault: what was kept may live elsewhere, as a tied head does."""
        if self.found == "different":
            return True
        return self.quantize and self.found in ("missing", "unexpected")

    def told(self) -> str:
        """Return what is known of it in a few words, such as `1 of 4096 codes, row 3`."""
        parts = [self.detail]
        if self.looks == "stale":
            parts.append(f"is that of {self.version}")
        elif self.looks == "swapped":
            parts.append(f"is that of {self.like}")
        elif self.looks and self.looks not in ("bf16", "one step"):
            parts.append(f"looks {self.looks}")
        if self.codes is not None:
            kind = "codes" if self.dtype == CODES else "values"
            parts.append(f"{self.codes[0]} of {self.codes[1]} {kind}")
        if self.rows:
            parts.append(f"row {self.rows}" if self.rows.isdigit() else f"rows {self.rows}")
        return ", ".join(filter(None, parts))

    def to_json(self) -> dict[str, object]:
        """Return the line as JSON types."""
        return {
            "name": self.name,
            "found": self.found,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "detail": self.detail,
            "codes": self.codes and {"different": self.codes[0], "of": self.codes[1]},
            "rows": self.rows or None,
            "looks": self.looks,
            "version": self.version,
            "with": self.like,
        }


def compare(
    plan: Plan,
    expected: Mapping[str, Sequence[int]],
    held: Mapping[str, Held],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Line]:
    """Return a line for every tensor that is expected or held, in the plan's order.

    Args:
        plan: of the server's weights.
        expected: by name, the digests that are right: one for each recipe that the engine may
            have followed.
        held: by all ranks together.
        shapes: of codes and scales that are not as the plan says.
    """
    lines = []
    planned = {tensor.name: tensor for tensor in plan.tensors}
    shapes = {**shapes_of(plan), **(shapes or {})}
    for name, digests in expected.items():
        tensor = planned.get(name)
        quantize = tensor is None or tensor.quantize  # scales have no entry of their own
        dtype = CODES if tensor and quantize else "float32"
        if tensor is not None and not quantize:
            dtype = TORCH.get(tensor.dtype, tensor.dtype)
        one = held.get(name)
        if one is None:
            line = Line(name, "missing", "", quantize)
            if name.endswith("lm_head.weight") and not any(
                other.digest in digests and other.shape == shapes.get(name, other.shape)
                for other in held.values()
            ):
                # Not tied, and not there: the engine answers with another head.
                line = replace(line, found="different", detail="no tensor of the server is it")
            lines.append(line)
            continue
        line = Line(name, "equal", one.dtype, quantize)
        if one.dtype != dtype:
            # Equal bits of another type are other numbers.
            found: Found = "different" if quantize or "float8" in one.dtype else "cast"
            line = replace(line, found=found, detail=f"expected {dtype}")
        elif quantize and one.shape and one.shape != shapes[name]:
            sides = f"{_sides(one.shape)} where {_sides(shapes[name])} is expected"
            line = replace(line, found="different", detail=sides)
        elif one.digest not in digests:
            line = replace(line, found="different", detail=_ranks(one), by_digest=True)
        elif not one.replicas_agree:
            detail = f"copies on {_ranks(one)} are not alike"
            line = replace(line, found="different", detail=detail)
        lines.append(line)
    lines += [
        Line(name, "unexpected", one.dtype, "float8" in one.dtype)
        for name, one in held.items()
        if name not in expected
    ]
    return lines


def unmapped(lines: Sequence[Line]) -> bool:
    """Say whether nothing is wrong but names: FP8 tensors that are there under another one.

    A module that this engine alone fuses.
    """
    strays = [line for line in lines if line.found == "unexpected" and line.quantize]
    gone = [line for line in lines if line.found == "missing" and line.quantize]
    wrong = [line for line in lines if line.found == "different"]
    return bool(strays and gone and not wrong)


def judge(plan: Plan, lines: Sequence[Line], held: Mapping[str, Held]) -> tuple[Verdict, str]:
    """Return the verdict and why, most telling fault first."""
    kept = {t.name: t for t in plan.tensors if not t.quantize}
    for line in lines:
        tensor = kept.get(line.name)
        if tensor is None or not ("float8" in line.dtype or line.looks == "quantised"):
            continue
        router = tensor.reason is Reason.ROUTER
        held_as = line.dtype if "float8" in line.dtype else f"quantised, in {line.dtype}"
        told = f"{line.name} is {held_as}, and the plan keeps it: {tensor.reason.value}"
        return "router-quantised" if router else "wrong-weights", told
    planned = [held[t.name].dtype for t in plan.quantized if t.name in held]
    if planned and not any("float8" in dtype for dtype in planned):
        return "bf16-fallback", f"the server holds {planned[0]} where the plan says FP8"
    bad = [line for line in lines if line.bad]
    if not bad:
        proven = sum(1 for x in lines if x.found == "equal" and x.quantize)
        told = f"{proven} tensors of codes and scales equal the source's, bit for bit"
        unseen = [x for x in lines if x.found in ("cast", "missing", "unexpected")]
        if unseen:
            told += f"; {plural(len(unseen), 'kept tensor')} not compared, such as {unseen[0].name}"
        return "fp8-ok", told
    plain = [x for x in bad if x.looks == "bf16" and x.found == "different"]
    if plain:
        all_of_them = plural(sum(1 for _ in plan.quantized), "tensor")
        told = f"{len(plain)} of {all_of_them} that the plan quantises: {plain[0].name}"
        return "bf16-fallback", f"{told} is {plain[0].dtype}"
    unscaled = [x for x in bad if x.looks == "unscaled"]
    if unscaled:
        count = _count(unscaled, "has no scales that were loaded", "have")
        return "unscaled", count + _first(unscaled)
    old = [x for x in bad if x.looks == "stale"]
    if len(old) == len(bad):
        whose = " and ".join(name for name, _ in Counter(x.version for x in old).most_common(3))
        told = f"{plural(len(old), 'tensor')} of {len(lines)}"
        return "stale", f"{told} {'is' if len(old) == 1 else 'are'} of {whose}: {old[0].name}"
    others = [x for x in bad if x.looks != "stale"]
    return "wrong-weights", _count(bad, "is not what the source makes", "are") + _first(others)


def _count(lines: Sequence[Line], one: str, many: str) -> str:
    rest = one.partition(" ")[2]
    return f"1 tensor {one}" if len(lines) == 1 else f"{len(lines)} tensors {many} {rest}"


def _first(lines: Sequence[Line]) -> str:
    line = lines[0]
    told = line.told()
    return f": {line.name} is {line.found}" + (f" ({told})" if told else "")


def shapes_of(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all codes and scales."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor in plan.quantized:
        found[tensor.name] = tensor.shape
        found[formats.scale_name(tensor.name, plan.mode)] = plan.scale_shape(tensor)
    return found


def _ranks(held: Held) -> str:
    if len(held.ranks) == 1:
        return f"rank {held.ranks[0]}"
    return "ranks " + ", ".join(map(str, held.ranks))


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
