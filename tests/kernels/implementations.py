"""Runs the matrix through one implementation and says which cases differ, and how.

In a process of its own where one is needed: TRITON_INTERPRET counts only if it is set
before triton is imported, and a GPU's kernels are compiled by several processes sooner:
    TRITON_INTERPRET=1 python -m tests.kernels.implementations triton-interpreted small 0 1
Prints one JSON object: how many cases and batches were run, and what differs, by name.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.kernels import recipes, reference
from fp8ctl.kernels.inputs import NonFiniteError
from tests.kernels import matrix, model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8ctl.kernels.groups import Groups
    from tests.kernels.matrix import Batch, Case

    Outputs = tuple[torch.Tensor, torch.Tensor]

ROOT = Path(__file__).resolve().parent.parent.parent

# What each is: the module that computes, and where its tensors lie.
PLACES = {
    "reference-cpu": ("reference", "cpu"),
    "front-cpu": ("quantize", "cpu"),
    "triton-interpreted": ("launch", "cpu"),
    "reference-cuda": ("reference", "cuda"),
    "triton-cuda": ("launch", "cuda"),
    "front-cuda": ("quantize", "cuda"),
}
# The interpreter takes about 10 ms a group.
_INTERPRETED_GROUPS = 12
_ALIKE = ("64x64", "1x1", "200x2")


@dataclass(frozen=True)
class Expected:
    """Bytes of codes, bits of scales; or index and value of the first element not finite."""

    codes: torch.Tensor
    scales: torch.Tensor
    bad: tuple[tuple[int, ...], str] | None = None


@dataclass
class Report:
    """How many were run, what differs in which."""

    cases: int
    batches: int
    differences: dict[str, str]


def by_model(x: torch.Tensor, groups: Groups, recipe: str, policy: str) -> Expected:
    result = model.quantize(x, groups, recipe, policy)
    bad = None if result.bad is None else (result.bad[0], repr(result.bad[1]))
    scales = torch.from_numpy(result.scales).float()
    return Expected(torch.from_numpy(result.codes), scales.view(torch.int32), bad)


def by_reference(x: torch.Tensor, groups: Groups, recipe: str, policy: str) -> Expected:
    try:
        codes, scales = reference.quantize(
            x, groups, recipes.named(recipe), recipes.check_non_finite(policy)
        )
    except NonFiniteError as e:
        return Expected(torch.empty(0), torch.empty(0), (e.index, repr(e.value)))
    return Expected(codes.view(torch.uint8), scales.view(torch.int32))


class Implementation:
    """One module on one device, and who says what is right: the model for the reference."""

    def __init__(self, name: str) -> None:
        self.name = name
        module, self.device = PLACES[name]
        self.expect = by_model if name == "reference-cpu" else by_reference
        self._modules = [importlib.import_module(f"fp8ctl.kernels.{module}")]
        if module == "launch":
            self._modules.append(importlib.import_module("fp8ctl.kernels.batch"))
        self._by_name = module == "quantize"
        self._prepare = "prepare" if self._by_name else "Prepared"

    def recipe(self, name: str) -> object:
        return name if self._by_name else recipes.named(name)

    def call(self, function: str, what: object, of: Case, out: object = None) -> Any:
        module = next(module for module in self._modules if hasattr(module, function))
        return getattr(module, function)(what, of.groups, self.recipe(of.recipe), of.policy, out)

    def case(self, case: Case) -> str:
        """Run one case; return what differs from what is expected, or nothing."""
        wanted = self.expect(case.tensor(), case.groups, case.recipe, case.policy)
        x, outputs = case.tensor(self.device), case.outputs(self.device)
        before = _bits(x).clone()
        try:
            found = self.call("quantize", x, case, outputs.given)
        except NonFiniteError as e:
            difference = _error(e, wanted.bad, None)
        else:
            difference = _difference(x, found, wanted) or _outputs(found, outputs)
        if not torch.equal(_bits(x), before):
            return "the input was written"
        return difference or ("" if outputs.poison_left() else "wrote beside the outputs")

    def batch(self, batch: Batch) -> str:
        """Run a list at once: into new outputs, into given ones, and by a plan, repeatedly."""
        members = batch.members
        first = members[0]
        xs = [member.tensor(self.device) for member in members]
        wanted = [self.expect(x.cpu(), first.groups, first.recipe, first.policy) for x in xs]
        outputs = [member.outputs(self.device) for member in members]
        given = [
            out.given or reference_outputs(x, first.groups)
            for x, out in zip(xs, outputs, strict=True)
        ]

        def differs(what: str, run: Callable[[], Any], expected: Sequence[Expected]) -> str:
            found = self._batch(run, xs, expected)
            return f"{what}: {found}" if found else ""

        plan = self.call(self._prepare, xs, first)
        into = self.call(self._prepare, xs, first, given)
        found = (
            differs("new", lambda: self.call("quantize_many", xs, first), wanted)
            or differs("given", lambda: self.call("quantize_many", xs, first, given), wanted)
            or self._beside(outputs)
            or differs("plan", plan.run, wanted)
        )
        if found:
            return found
        others = [_unaligned(member.tensor(self.device, again=1)) for member in members]
        anew = [self.expect(x.cpu(), first.groups, first.recipe, first.policy) for x in others]
        found = differs("plan, other tensors", lambda: plan.run(others), anew)
        # What was NaN is overwritten: nothing of an earlier error may be left in a plan.
        for held in (others, xs):
            for x, member in zip(held, members, strict=True):
                if member.layout not in {"one-row", "one-column"}:
                    x.copy_(matrix.numbers("normal", member.shape, member.dtype, again=2))
        changed = [
            [self.expect(x.cpu(), first.groups, first.recipe, first.policy) for x in held]
            for held in (others, xs)
        ]
        return (
            found
            or differs("plan, tensors changed", plan.run, changed[0])
            or differs("plan into given, tensors changed", into.run, changed[1])
            or self._beside(outputs)
        )

    def _batch(
        self, run: Callable[[], Any], xs: Sequence[torch.Tensor], wanted: Sequence[Expected]
    ) -> str:
        place = next((i for i, one in enumerate(wanted) if one.bad), None)
        try:
            found = run()
        except NonFiniteError as e:
            return _error(e, None if place is None else wanted[place].bad, place)
        if len(found) != len(xs):
            return f"{len(found)} results of {len(xs)} tensors"
        for i, (x, one, expected) in enumerate(zip(xs, found, wanted, strict=True)):
            if difference := _difference(x, one, expected):
                return f"tensor {i}: {difference}"
        return ""

    @staticmethod
    def _beside(outputs: Sequence[matrix.Outputs]) -> str:
        for i, one in enumerate(outputs):
            if not one.poison_left():
                return f"tensor {i}: wrote beside the outputs"
        return ""


def reference_outputs(x: torch.Tensor, groups: Groups) -> Outputs:
    return (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(groups.scale_shape(x.shape), dtype=torch.float32, device=x.device),
    )


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor anew, one element behind an address that was aligned."""
    if not x.is_contiguous() or x.numel() == 0:
        return x
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].as_strided(x.shape, x.stride()).copy_(x)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def _error(
    e: NonFiniteError, wanted: tuple[tuple[int, ...], str] | None, tensor: int | None
) -> str:
    found = (e.index, repr(e.value))
    if wanted is None:
        return f"unexpected error {found}"
    if found != wanted or not all(type(i) is int for i in e.index):
        return f"error {found}, not {wanted}"
    return "" if e.tensor == tensor else f"error of tensor {e.tensor}, not {tensor}"


def _difference(x: torch.Tensor, found: Outputs, wanted: Expected) -> str:
    if wanted.bad is not None:
        return f"no error; expected {wanted.bad}"
    codes, scales = found
    for name, tensor, expected in (
        ("scales", scales, wanted.scales),
        ("codes", codes, wanted.codes),
    ):
        bits = tensor.view(torch.int32 if name == "scales" else torch.uint8).cpu()
        if bits.shape != expected.shape:
            return f"{name} {list(bits.shape)}, not {list(expected.shape)}"
        wrong = (bits != expected).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            of = f" for {float(x[at])!r}" if name == "codes" else ""
            return (
                f"{len(wrong)} of {bits.numel()} {name}, the first at {list(at)}:"
                f" {int(bits[at]):#x}, not {int(expected[at]):#x}{of}"
            )
    return ""


def _outputs(found: Outputs, outputs: matrix.Outputs) -> str:
    codes, scales = found
    if outputs.given is not None:
        same = codes is outputs.given[0] and scales is outputs.given[1]
        return "" if same else "did not return the given outputs"
    if codes.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32:
        return f"outputs of {codes.dtype} and {scales.dtype}"
    return "" if codes.is_contiguous() and scales.is_contiguous() else "outputs not contiguous"


def selected(name: str, selection: str) -> tuple[list[Case], list[Batch]]:
    """Return what `name` is asked: `small` or `full`; the interpreter only what is few groups."""
    lists = PLACES[name][0] != "reference"
    if selection == "small":
        cases, batches = matrix.small(), matrix.small_batches() if lists else []
        if name == "triton-interpreted":
            # Half a second for a large group, so a third of them; one of most groups' batches.
            shared = matrix.shared_batches()
            large = [case for case in cases if math.prod(case.groups.sides) > 1 << 16]
            cases = [case for case in cases if case not in large or case in large[::3]]
            batches = [
                batch
                for i, batch in enumerate(batches)
                if batch in shared
                or (i % 3 == i // 3 % 3 and str(batch.members[0].groups) not in _ALIKE)
            ]
        return cases, batches
    cases = matrix.full()
    if name == "triton-interpreted":
        few = [c for c in cases if matrix.group_count(c.groups, c.shape) <= _INTERPRETED_GROUPS]
        return few, matrix.small_batches()
    return cases, matrix.full_batches() if lists else []


def run(name: str, selection: str, part: int = 0, parts: int = 1) -> Report:
    """Run each `parts`-th case and batch, from the `part`-th on."""
    implementation = Implementation(name)
    cases, batches = selected(name, selection)
    differences = {}
    for case in cases[part::parts]:
        if found := _guarded(implementation.case, case):
            differences[str(case)] = found
    for batch in batches[part::parts]:
        if found := _guarded(implementation.batch, batch):
            differences[str(batch)] = found
    return Report(len(cases[part::parts]), len(batches[part::parts]), differences)


def _guarded(check: Callable[[Any], str], what: object) -> str:
    try:
        return check(what)
    except Exception as e:  # noqa: BLE001 - one broken case must not hide the rest
        return f"{type(e).__name__}: {e}"


def run_apart(name: str, selection: str, scratch: Path, parts: int) -> Report:
    """Run the matrix in as many processes as `parts`.

    Raises:
        RuntimeError: one of them ended with an error.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRITON_HOME": str(scratch),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
    }
    if name == "triton-interpreted":
        environment["TRITON_INTERPRET"] = "1"
    argv = [sys.executable, "-m", "tests.kernels.implementations", name, selection]
    running = [
        subprocess.Popen(
            [*argv, str(part), str(parts)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for part in range(parts)
    ]
    ended = [(process, *process.communicate()) for process in running]
    total = Report(0, 0, {})
    for process, output, errors in ended:
        if process.returncode != 0:
            raise RuntimeError(f"{name}: {errors[-3000:]}")
        one = Report(**json.loads(output.splitlines()[-1]))
        total.cases += one.cases
        total.batches += one.batches
        total.differences |= one.differences
    return total


def main() -> None:
    name, selection, part, parts = sys.argv[1:]
    report = run(name, selection, int(part), int(parts))
    sys.stdout.write(json.dumps(vars(report)) + "\n")


if __name__ == "__main__":
    main()
