"""The table as Markdown: written, and read back for tests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .cases import CASES, TABLES, Case, cell, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .cases import Adapter, Sides

IMPLEMENTATIONS = "Implementations"

_INTRODUCTION = """\
What implementations of FP8 (e4m3fn) quantisation do with inputs at the edge, on a CPU. Every cell
was executed; none is written by hand. A CUDA or Triton kernel of the same package may do something
else: none is in this table.

- *Group*: the elements that share a scale; "Scales per" says which.
- *Error*: root mean square of codes x scales - x, over that of x, in per cent.
- *One NaN, one +Inf*: in element [0, 3] of a random matrix. What it comes back as (`448 s`: 448
  times its scale), then what became of its group, against the same input with 0 there.
- *130x200*: scales as returned; whether all that comes back equals what the same function makes of
  the matrix with zeros behind it, in 256x256. The last element is 1.0, far above the rest.
- *Below one block*: half a block of rows, three quarters of one of columns.
- *Transposed view*: against the same numbers in a contiguous tensor.
- *Codes against x / s*: 1024x1024 BF16 numbers of N(0, 0.02), per-tensor as 64 tensors of 128x128;
  s = amax / 448 in FP32, or, where all returned scales are powers of two, the next one from there
  up; one FP32 division.
- *Same bits as*: the recipes of this project that make the same codes and scales of those numbers;
  a floor of amax is too low to show there.
- *1 ulp above a power of two*: amax / 448 = 2^-14 (1 + 2^-23), in FP32.
- *no such path*: scales per row or tensor have no blocks.

Policies of one recipe share a row where they do the same. Rows `torch ...` are expressions written
out as in the project that is named (padded: with the last element; the others with zeros).
Functions of SGLang, vLLM and FlashInfer were compiled out of the source in their released wheels
and run on the torch named above."""


@dataclass
class Row:
    """One implementation in one variant, with its words; what a worker hands back as JSON."""

    name: str
    variant: str
    source: str
    version: str
    call: str
    groups: str
    sides: tuple[int, int]
    fingerprint: str
    cells: dict[str, str] = field(default_factory=dict)


def judge(adapters: Iterable[Adapter], version: str) -> list[Row]:
    """Run every case on every adapter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing by more
    try:
        return [
            Row(
                name=one.name,
                variant=one.variant,
                source=one.source,
                version=version,
                call=one.call,
                groups=one.groups,
                sides=one.sides,
                fingerprint=cell(Case("", "", fingerprint), one),
                cells={case.key: cell(case, one) for case in CASES},
            )
            for one in adapters
        ]
    finally:
        torch.set_num_threads(threads)


def compare(rows: Iterable[Row], models: Iterable[Adapter]) -> None:
    """Write into every row which recipes it equals."""
    prints: dict[tuple[Sides, str], list[str]] = {}
    for model in models:
        key = model.sides, cell(Case("", "", fingerprint), model)
        prints.setdefault(key, []).append(model.name)
    for row in rows:
        same = prints.get((row.sides, row.fingerprint), [])
        row.cells["same"] = ", ".join(same) or "none"


def render(rows: Sequence[Row], head: Sequence[str]) -> str:
    """Return the page."""
    parts = ["# Conformance", "\n".join(head), _INTRODUCTION, tables(rows)]
    return "\n\n".join(parts) + "\n"


def tables(rows: Sequence[Row]) -> str:
    """Return the tables: what the rows are, then one for each kind of case."""
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row.name, []).append(row)
    what = [
        (name, of[0].source, of[0].version, of[0].groups, of[0].call) for name, of in named.items()
    ]
    heading = ("Implementation", "Package", "Version", "Scales per", "What is called")
    parts = [_table(IMPLEMENTATIONS, heading, what)]
    for title, cases in TABLES.items():
        columns = [(case.key, case.title) for case in cases]
        if title == "Arithmetic":
            columns.append(("same", "Same bits as"))
        lines = []
        for name, of in named.items():
            alike: dict[tuple[str, ...], list[str]] = {}
            for row in of:
                alike.setdefault(tuple(row.cells[key] for key, _ in columns), []).append(
                    row.variant
                )
            for cells, variants in alike.items():
                which = "" if len(alike) == 1 else f" ({', '.join(variants)})"
                lines.append((name + which, *cells))
        parts.append(_table(title, ("Implementation", *(name for _, name in columns)), lines))
    return "\n\n".join(parts)


def _table(title: str, heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|".join("---" for _ in heading)
    body = [f"| {' | '.join(line)} |" for line in (heading, *lines)]
    return "\n".join([f"## {title}", "", body[0], f"|{rule}|", *body[1:]])


def parse(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Read tables back: heading of a table, name of a row, heading of a column, word."""
    found = {}
    pattern = r"^## (.+)\n\n\| (.+) \|\n\|[-|]+\|\n((?:\|.*\n?)*)"
    for title, heading, body in re.findall(pattern, text, re.MULTILINE):
        columns = heading.split(" | ")[1:]
        lines = [line[2:-2].split(" | ") for line in body.splitlines()]
        found[title] = {name: dict(zip(columns, cells, strict=True)) for name, *cells in lines}
    return found
