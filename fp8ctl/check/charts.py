"""What the page draws: the error of each layer and projection, the spread of differences. Pure.

The heat map is a table of numbers with a colour each: it is read without its colours, too. The
histogram is an SVG, with its numbers in a table below it. Called by `page`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fp8ctl.check.markup import Html, join, table, tag

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: `model.layers.3.mlp.experts.17.up_proj.weight`: stack, layer, what in it.
_LAYERED = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"(?P<before>.*\bexperts)\.(?P<expert>\d+)\.(?P<after>.+)")
#: Projections in the order of a layer's arithmetic; others come behind them.
_ORDER: Final = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "w1", "up_proj", "w3", "gate_up_proj", "down_proj", "w2"),
)
#: Shades of the heat map, from the least SQNR to the most; page.html has their colours.
SHADES: Final = 7
#: dB that the scale spans at least: less is hardly a difference.
_SPAN: Final = 1.0
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 360, 170, 44, 26
_TICKS: Final = 4


@dataclass
class Cell:
    """One layer's tensors of one projection: a single one, or that of every expert.

    Attributes:
        names: of the tensors.
        sqnr: of each, in dB; None where it is not known.
        amax: the largest value of all of them.
        unequal: names of those that the server holds otherwise.
    """

    names: list[str] = field(default_factory=list)
    sqnr: list[float | None] = field(default_factory=list)
    amax: float = 0.0
    unequal: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float | None:
        """The least SQNR; infinite where the weights are without any error."""
        known = [one for one in self.sqnr if one is not None]
        return min(known) if known else None

    @property
    def told(self) -> str:
        """The cell in words."""
        if len(self.names) == 1:
            text = f"{self.names[0]}: {decibel(self.worst)}"
        else:
            at = min(
                range(len(self.names)), key=lambda i: (self.sqnr[i] is None, self.sqnr[i] or 0.0)
            )
            text = f"worst of {len(self.names)}: {self.names[at]}, {decibel(self.worst)}"
        text += f"; largest value {self.amax:.4g}"
        if self.unequal:
            text += f"; not equal in the server: {', '.join(self.unequal[:3])}"
        return text


@dataclass
class Stack:
    """Layers of one kind, such as `model.layers`.

    Attributes:
        name: what stands in front of the layer's number; empty for what is in no layer.
        cells: by layer and projection.
        layers: their numbers.
        columns: projections, in the order of the checkpoint.
    """

    name: str
    cells: dict[tuple[int, str], Cell] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)


def stacks(quality: Mapping[str, Mapping[str, Any]], unequal: Sequence[str] = ()) -> list[Stack]:
    """Sort tensors into layers and projections; all experts of a layer share a cell.

    Args:
        quality: by name of a quantised tensor, `sqnr_db` and `amax`.
        unequal: names of tensors that the server holds otherwise; of a scale its weight is meant.
    """
    bad = {re.sub(r"_scale(_inv)?$", "", name) for name in unequal}
    found: dict[str, Stack] = {}
    for name, told in quality.items():
        match = _LAYERED.fullmatch(name)
        stack_name, layer, rest = ("", 0, name) if match is None else match.groups()
        if expert := _EXPERT.fullmatch(rest):
            rest = f"{expert['before']}.*.{expert['after']}"
        stack = found.setdefault(stack_name, Stack(stack_name))
        column = rest.removesuffix(".weight")
        key = (int(layer), column)
        if key not in stack.cells:
            stack.cells[key] = Cell()
        cell = stack.cells[key]
        cell.names.append(name)
        cell.sqnr.append(number(told.get("sqnr_db")))
        cell.amax = max(cell.amax, number(told.get("amax")) or 0.0)
        if name in bad:
            cell.unequal.append(name)
    for stack in found.values():
        stack.layers = sorted({layer for layer, _ in stack.cells})
        stack.columns = list(dict.fromkeys(column for _, column in stack.cells))
        # What hangs together stands together, in the order in which a layer computes.
        first = {_group(column): _place(column) for column in reversed(stack.columns)}
        for column in stack.columns:
            first[_group(column)] = min(first[_group(column)], _place(column))
        stack.columns.sort(key=lambda one: (first[_group(one)], _group(one), _place(one)))
    return list(found.values())


def heat_map(stack: Stack, low: float, high: float) -> Html:
    """Return one stack as a table: a row a layer, a column a projection."""
    groups: list[tuple[str, int]] = []
    for column in stack.columns:
        group = _group(column)
        if groups and groups[-1][0] == group:
            groups[-1] = (group, groups[-1][1] + 1)
        else:
            groups.append((group, 1))
    top = tag(
        "tr",
        tag("th", "layer", scope="col", rowspan=2),
        *(tag("th", group, scope="colgroup", colspan=count) for group, count in groups),
    )
    names = tag(
        "tr",
        *(
            tag("th", tag("span", column.rpartition(".")[2]), scope="col")
            for column in stack.columns
        ),
    )
    rows = [
        tag(
            "tr",
            tag("th", str(layer), scope="row"),
            *(_cell(stack.cells.get((layer, column)), low, high) for column in stack.columns),
        )
        for layer in stack.layers
    ]
    title = f"SQNR in dB, {stack.name or 'outside of layers'}"
    body = tag(
        "table",
        tag("caption", title),
        tag("thead", top, names),
        tag("tbody", *rows),
        class_="heat",
    )
    # It alone may be wider than a phone; a keyboard must reach it to scroll.
    return tag("div", body, class_="wide", role="region", aria_label=title, tabindex=0)


def scale(found: Sequence[Stack]) -> tuple[float, float] | None:
    """Return the least and the most SQNR that the colours stand for; None where none is known."""
    known = [
        cell.worst
        for stack in found
        for cell in stack.cells.values()
        if cell.worst is not None and math.isfinite(cell.worst)
    ]
    if not known:
        return None
    low, high = min(known), max(known)
    spare = max(0.0, _SPAN - (high - low)) / 2
    return low - spare, high + spare


def legend(low: float, high: float) -> Html:
    """Return which shade stands for what."""
    steps = [low + (high - low) * i / SHADES for i in range(SHADES + 1)]
    items = [
        tag("li", f"{steps[i]:.1f} to {steps[i + 1]:.1f}", class_=f"q{i}") for i in range(SHADES)
    ]
    return tag("ul", *items, class_="legend", aria_label="Shades of the heat map, SQNR in dB")


def histogram(
    edges: Sequence[float], counts: Sequence[float], title: str, most: float = 0.0
) -> Html:
    """Return a histogram, its numbers in a table below.

    Args:
        edges: of the bins, one more than there are counts.
        counts: of the bins.
        title: what is counted.
        most: what the height stands for at least, so that several can be compared.
    """
    fullest = max([*counts, 0])
    most = max(fullest, most, 1)
    total = sum(counts)
    wide = (_WIDTH - _LEFT) / max(1, len(counts))
    high = _HEIGHT - _BOTTOM
    bars = [
        tag(
            "rect",
            tag("title", f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {count:g}"),
            x=f"{_LEFT + i * wide:.2f}",
            y=f"{high - high * 0.94 * count / most:.2f}",
            width=f"{max(wide - 1, 0.5):.2f}",
            height=f"{high * 0.94 * count / most:.2f}",
            class_="bar",
        )
        for i, count in enumerate(counts)
        if count
    ]
    across = [
        tag("text", _short(edges[at]), x=f"{_LEFT + at * wide:.1f}", y=_HEIGHT - 8,
            text_anchor="middle" if at < len(counts) else "end")
        for at in dict.fromkeys(round(len(counts) * i / _TICKS) for i in range(_TICKS + 1))
    ]  # fmt: skip
    up = [
        tag("text", f"{most * part:g}", x=_LEFT - 6, y=f"{high - high * 0.94 * part + 4:.1f}",
            text_anchor="end")
        for part in (0.5, 1)
    ]  # fmt: skip
    axis = tag("line", x1=_LEFT, x2=_WIDTH, y1=high, y2=high, class_="axis")
    label = f"Histogram, {title}: {total:g} in {len(counts)} bins, the fullest has {fullest:g}"
    picture = tag(
        "svg",
        *bars,
        axis,
        *across,
        *up,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
    )
    numbers = table(
        ("from", "to", "count"),
        [
            (f"{edges[i]:.4g}", f"{edges[i + 1]:.4g}", f"{count:g}")
            for i, count in enumerate(counts)
        ],
        caption=title,
    )
    return tag(
        "figure",
        tag("figcaption", title),
        picture,
        tag("details", tag("summary", "The same as numbers"), numbers),
    )


def number(value: Any) -> float | None:
    """Return a number of a document, None for what is none or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def decibel(value: float | None) -> str:
    """Return an SQNR for people."""
    if value is None:
        return "not known"
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"


def _cell(cell: Cell | None, low: float, high: float) -> Html:
    if cell is None:
        return tag("td", class_="none")
    worst = cell.worst
    if worst is None:
        shade, text = "none", "?"
    elif math.isinf(worst):
        shade, text = (f"q{SHADES - 1}", "∞") if worst > 0 else ("q0", "-∞")
    else:
        part = (worst - low) / (high - low)
        shade, text = f"q{min(SHADES - 1, max(0, int(part * SHADES)))}", f"{worst:.1f}"
    marks: list[str] = [text]
    if cell.unequal:
        marks.append(tag("strong", " ≠", class_="bad"))
        shade += " unequal"
    return tag("td", join(marks), class_=shade, title=cell.told)


def _group(column: str) -> str:
    return column.rpartition(".")[0]


def _place(column: str) -> int:
    last = column.rpartition(".")[2]
    return _ORDER.index(last) if last in _ORDER else len(_ORDER)


def _short(value: float) -> str:
    return f"{value:.2g}"
