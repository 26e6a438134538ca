"""How fast the kernels are beside a copy of as many bytes, and whether they are right.

    python -m fp8ctl.kernels.bench [--device cpu|cuda] [--recipe R] [--quick]
                                   [--only PATTERN] [--json FILE]

Needs torch, and for CUDA triton; `fp8ctl bench kernel` runs the same through the worker.

Bytes are what must move: every input byte read once, every code and scale written once.
The copy moves as many, half of them read and half written, by torch's `copy_`; it is timed
in turns with the kernel, so that both meet the same clock, neighbours and caches. Before
each timed call a buffer larger than the caches is overwritten. On CUDA events tell the
time, and that buffer is written as often as it takes for the host to be ahead of the
device: what is between two events is then the device's own time. Rows called "wall" are
what a caller waits, from an idle device until all is done, host work included.

The limit of a row is the copy of its bytes. Per-tensor scales must be known before the
first code: two reads and one write. A list is held against the best rate of a copy.

Every output is poisoned, written once more and compared with `fp8ctl.kernels.reference`,
bit for bit: all of it, or, where `checked` is below 1, that share of a list (tensors chosen
at random, and of each shape), and all of the list for what was left unwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8ctl.kernels import compare, quantize, recipes, workloads
from fp8ctl.kernels.inputs import has_triton
from fp8ctl.kernels.timing import Device, NoCudaError, open_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp8ctl.kernels.groups import Groups, Shape
    from fp8ctl.kernels.recipes import NonFinite, Recipe
    from fp8ctl.kernels.timing import Call
    from fp8ctl.kernels.workloads import Work

    Outputs = tuple[torch.Tensor, torch.Tensor]
    Run = Callable[[], Sequence[Outputs]]
    Row = dict[str, Any]

SCHEMA = 1
POLICY: NonFinite = "error"  # the default, with its search for NaN and Inf in the same pass


def run(
    device: str | None = None,
    recipe: str | Recipe = recipes.IEEE,
    quick: bool = False,
    only: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Measure everything; return one JSON document, whose rows always have the same keys.

    Args:
        device: cpu or cuda; None takes CUDA where torch sees it.
        recipe: of all rows but those that compare recipes.
        quick: fewer and smaller tensors, less often.
        only: a pattern of shell kind that must be part of a work's name.
        progress: hears bytes measured so far, and in all.
        tell: hears each row as it is found.

    Raises:
        ValueError: unknown device or recipe, or no work of such a name.
        NoCudaError: there is no CUDA.
    """
    started = time.monotonic()
    named = recipes.named(recipe)
    bench = _Bench(open_device(device, quick))
    chosen = (
        workloads.for_cpu(named, quick)
        if bench.device.kind == "cpu"
        else workloads.for_cuda(named, quick, bench.device.free())
    )
    if only is not None:
        names = [work.name for work in chosen]
        chosen = [work for work in chosen if fnmatch.fnmatch(work.name, f"*{only}*")]
        if not chosen:
            raise ValueError(f"no work is named like {only!r}; there are {', '.join(names)}")
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    total = sum(work.bytes for work in chosen)
    rows: list[Row] = []
    done = 0
    for work in chosen:
        for row in bench.rows(work):
            rows.append(row)
            if tell is not None:
                tell(row)
        done += work.bytes
        if progress is not None:
            progress(done, total)
    best = bench.best
    return {
        "schema": SCHEMA,
        "device": bench.device.facts(),
        "versions": _versions(),
        "date": date,
        "seconds": round(time.monotonic() - started, 1),
        "recipe": named.name,
        "quick": quick,
        "best_copy_gb_s": None if best is None else round(best / 1e9, 1),
        "rows": rows,
        "ok": all(row["exact"] for row in rows),
    }


def _versions() -> dict[str, str | None]:
    triton = has_triton() and importlib.import_module("triton")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
    }


class _Bench:
    """Makes the rows of one work after the other on a device.

    Attributes:
        device: where.
        best: the best rate of a copy so far, in bytes per second.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.best: float | None = None
        self._long: list[float] = []
        self._source = torch.zeros(device.piece, dtype=torch.uint8, device=device.device)
        self._target = torch.zeros_like(self._source)

    def rows(self, work: Work) -> Iterator[Row]:
        """Yield what is found about a work; what breaks off is a row that says why."""
        try:
            with _threads(work.threads):
                yield from self._list(work) if work.listed else self._single(work)
        except Exception as e:  # noqa: BLE001 - the other rows are worth having
            traceback.print_exc()
            first = str(e).strip().partition("\n")[0]
            yield _row(work, "", differs=f"{type(e).__name__}: {first}", checked=0.0)
        finally:
            self.device.release()

    # --- one tensor

    def _single(self, work: Work) -> Iterator[Row]:
        x = _random(work, self.device.device)
        out = _outputs(work, work.shapes[0], self.device.device)
        kernel = functools.partial(quantize.quantize, x, work.groups, work.recipe, POLICY, out)
        copy = self._copy(work.bytes)
        calls: list[Call] = [kernel, copy]
        plain: Outputs | None = None
        if self.device.kind == "cpu":
            made = plain = _outputs(work, work.shapes[0], self.device.device)
            calls.append(lambda: eager(x, work.groups, work.recipe, made))
        for call in calls:
            call()
        rounds = work.rounds or self.device.rounds(calls)
        with _unread_flags():
            times = self.device.times(calls, rounds)
        copied = statistics.median(times[1])
        self._saw(work.bytes / copied)
        compare.poison([out])
        kernel()
        differs = compare.with_reference(x, work.groups, work.recipe, out)
        if differs is None and self.device.kind == "cuda":
            differs = compare.with_the_cpu(x, work.groups, work.recipe, out)
        if differs is None and plain is not None:
            other = compare.outputs(plain, out)
            differs = other and f"the plain expression has {other}"
        yield _row(
            work,
            "device" if self.device.kind == "cuda" else "wall",
            times=times[0],
            copied=copied,
            limit=copied * work.limit_bytes / work.bytes,
            plain=statistics.median(times[2]) if plain is not None else None,
            differs=differs,
        )

    # --- a list of tensors

    def _list(self, work: Work) -> Iterator[Row]:
        device = self.device
        given = (work.groups, work.recipe, POLICY)
        xs = [_normal(shape, work.dtype, device.device) for shape in work.shapes]
        plan = quantize.prepare(xs, *given)
        copy = self._copy(work.bytes)
        calls: list[Call] = [copy, plan.run] if device.kind == "cuda" else [copy]
        for call in calls:
            call()
        rounds = device.rounds(calls)
        with _unread_flags():
            copies, *launches = device.times(calls, rounds)
        self._see_a_long_copy()
        copied = statistics.median(copies)
        best = self._saw(work.bytes / copied)

        def row(measure: str, times: Sequence[float], call: Run, of: list[torch.Tensor]) -> Row:
            # Outputs of its own come out of the same memory once more, or nearly so.
            compare.poison(call())
            differs, checked = compare.with_references(of, work.groups, work.recipe, call())
            return _row(
                work,
                measure,
                times=times,
                copied=copied,
                limit=work.limit_bytes / best,
                differs=differs,
                checked=checked,
            )

        for times in launches:
            yield row("device", times, plan.run, xs)
        yield row("wall, plan", self._wall(plan.run), plan.run, xs)
        if device.free() < work.elements:
            return
        many = functools.partial(quantize.quantize_many, xs, *given)
        yield row("wall, no plan", self._wall(many), many, xs)
        seen = functools.partial(_looked_at, many)
        yield row("wall, no plan, outputs looked at", self._wall(seen), seen, xs)
        if device.free() < work.bytes:
            return
        news = [_normal(shape, work.dtype, device.device) for shape in work.shapes]
        again = functools.partial(plan.run, news)
        yield row("wall, plan, new tensors", self._wall(again), again, news)
        outs = [_outputs(work, shape, device.device) for shape in work.shapes]
        there = functools.partial(many, outs)
        yield row("wall, no plan, given outputs", self._wall(there), there, xs)
        plan = quantize.prepare(xs, *given, outs)
        both = functools.partial(plan.run, news)
        yield row("wall, plan, new tensors, given outputs", self._wall(both), both, news)

    def _wall(self, call: Call) -> list[float]:
        call()
        return self.device.wall(call, self.device.rounds([call]))

    # --- copies

    def _copy(self, count: int) -> Call:
        """Return a call that copies: `count` bytes in all, half of them read."""
        half = count // 2
        sizes = [self.device.piece] * (half // self.device.piece)
        sizes += [half % self.device.piece] if half % self.device.piece else []
        pairs = [(self._target[:size], self._source[:size]) for size in sizes]

        def copy() -> None:
            for target, source in pairs:
                target.copy_(source)

        return copy

    def _see_a_long_copy(self) -> None:
        if not self._long:
            copy = self._copy(2 * self.device.piece)
            copy()
            self._long = self.device.times([copy], self.device.few)[0]
            self._saw(2 * self.device.piece / statistics.median(self._long))

    def _saw(self, rate: float) -> float:
        self.best = rate if self.best is None else max(self.best, rate)
        return self.best


def _looked_at(call: Run) -> Sequence[Outputs]:
    """Return the outputs as a list: their views are made when they are looked at."""
    return [*call()]


def _row(
    work: Work,
    measure: str,
    *,
    times: Sequence[float] = (),
    copied: float | None = None,
    limit: float | None = None,
    plain: float | None = None,
    differs: str | None = None,
    checked: float = 1.0,
) -> Row:
    """Return a row; times in microseconds, rates in GB/s (1e9 bytes), shares of 1."""
    median = statistics.median(times) if times else None
    low, high = _spread(times)

    def micro(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1e6, 2)

    def rate(seconds: float | None) -> float | None:
        return None if seconds is None else round(work.bytes / seconds / 1e9, 2)

    def of(seconds: float | None) -> float | None:
        return None if seconds is None or median is None else round(seconds / median, 4)

    return {
        "work": work.name,
        "measure": measure,
        "tensors": len(work.shapes),
        "shape": list(work.shapes[0]) if len(set(work.shapes)) == 1 else None,
        "groups": str(work.groups),
        "recipe": work.recipe.name,
        "dtype": workloads.DTYPES[work.dtype],
        "threads": work.threads,
        "bytes": work.bytes,
        "limit_bytes": work.limit_bytes,
        "rounds": len(times),
        "time_us": micro(median),
        "p10_us": micro(low),
        "p90_us": micro(high),
        "gb_s": rate(median),
        "copy_us": micro(copied),
        "copy_gb_s": rate(copied),
        "of_copy": of(copied),
        "limit_us": micro(limit),
        "of_limit": of(limit),
        "plain_us": micro(plain),
        "of_plain": of(plain),
        "exact": differs is None,
        "checked": round(checked, 4),
        "differs": differs,
    }


def _spread(times: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the tenth and the ninetieth percentile."""
    if len(times) < 2:
        return (times[0], times[0]) if times else (None, None)
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[0], tenths[-1]


@contextlib.contextmanager
def _unread_flags() -> Iterator[None]:
    """Let the kernels return before the device is done, without its word on NaN and Inf.

    They write it all the same, and rows called "wall" wait for it. Here the host must be
    ahead, or its own time would lie between the device's events.
    """
    if not torch.cuda.is_available() or not has_triton():
        yield
        return
    flag = importlib.import_module("fp8ctl.kernels.launch").Flag
    read = flag.read
    flag.read = lambda self: None
    try:
        yield
    finally:
        flag.read = read


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- data ---------------------------------------------------------------------


def eager(x: torch.Tensor, groups: Groups, recipe: Recipe, out: Outputs) -> None:
    """Quantise as the recipe is written down with torch's operations: what people run today."""
    n, k = x.shape
    bn, bk = groups.size((n, k))
    grid = groups.grid((n, k))
    y = x.float()
    if n % bn or k % bk:
        y = torch.nn.functional.pad(y, (0, -k % bk, 0, -n % bn))
    y = y.view(grid[0], bn, grid[1], bk)
    a = y.abs().amax(dim=(1, 3), keepdim=True).clamp(min=recipe.floor)
    if recipe.arithmetic == "inverse-scale":
        # By a tensor: torch divides a number by one as its reciprocal, times the number.
        factor = (torch.full_like(a, recipes.FP8_MAX) / a).clamp(max=1 / recipes.MIN_SCALE)
        factor = torch.where(a == 0, 1.0, factor)
        scale = 1.0 / factor
        y = y * factor
    else:
        scale = a / recipes.FP8_MAX
        if recipe.arithmetic == "power-of-two":
            # In FP64 the logarithm of no FP32 number is on the wrong side of a whole one.
            scale = torch.exp2(torch.ceil(torch.log2(a.double() / recipes.FP8_MAX))).float()
        scale = torch.where(a == 0, 1.0, scale.clamp(min=recipes.MIN_SCALE))
        y = y * (1.0 / scale) if recipe.arithmetic == "reciprocal" else y / scale
    y = y.clamp(-recipes.FP8_MAX, recipes.FP8_MAX).view(grid[0] * bn, grid[1] * bk)[:n, :k]
    out[0].copy_(y)
    out[1].copy_(scale.view(out[1].shape))


def _random(work: Work, device: torch.device) -> torch.Tensor:
    """Return a tensor whose rows differ in magnitude, with one block of zeros at its end."""
    n, _ = work.shapes[0]
    x = _normal(work.shapes[0], work.dtype, device)
    x.mul_(torch.exp2(torch.randint(-8, 9, (n, 1), device=device)).to(work.dtype))
    x[-128:, -128:] = 0
    return x


def _normal(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _outputs(work: Work, shape: Shape, device: torch.device) -> Outputs:
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(work.groups.scale_shape(shape), dtype=torch.float32, device=device)
    compare.poison([(codes, scales)])  # and so its memory is really there
    return codes, scales


# --- tables ---------------------------------------------------------------------------------------


def describe(document: dict[str, Any]) -> list[str]:
    """Return the lines above the table: device, versions, date."""
    device, versions = document["device"], document["versions"]
    parts = [f"driver {device['driver']}"] if device["driver"] else []
    parts += [f"CUDA {device['cuda']}"] if device["cuda"] else []
    parts += [f"{name} {version}" for name, version in versions.items() if version]
    lines = [device["name"], ", ".join(parts), f"{document['date']}, recipe {document['recipe']}"]
    if document["best_copy_gb_s"] is not None:
        lines[-1] += f", best copy {document['best_copy_gb_s']:,.0f} GB/s"
    return lines


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells; a column that no row has anything for is left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "work": _label,
        "time": lambda row: _time(row["time_us"]),
        "p10 - p90": lambda row: f"{_time(row['p10_us'])} - {_time(row['p90_us'])}",
        "GB/s": lambda row: _number(row["gb_s"]),
        "copy GB/s": lambda row: _number(row["copy_gb_s"]),
        "of copy": lambda row: _percent(row["of_copy"]),
        "of limit": lambda row: _percent(row["of_limit"]),
        "plain torch": lambda row: _time(row["plain_us"]),
        "faster": lambda row: "" if row["of_plain"] is None else f"{row['of_plain']:.1f}x",
        "exact": _verdict,
    }
    cells = [[show(row) for show in columns.values()] for row in document["rows"]]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    names = list(columns)
    return [names[i] for i in kept], [[row[i] for i in kept] for row in cells]


def _label(row: Row) -> str:
    threads = row["threads"]
    parts = [row["work"]]
    parts += [row["measure"]] if row["tensors"] > 1 and row["measure"] else []
    parts += [f"{threads} thread" + ("s" if threads > 1 else "")] if threads else []
    return ", ".join(parts)


def _time(micro: float | None) -> str:
    if micro is None:
        return ""
    if micro < 1e3:
        return f"{micro:.1f} us"
    return f"{micro / 1e3:.2f} ms" if micro < 1e6 else f"{micro / 1e6:.2f} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _verdict(row: Row) -> str:
    if row["differs"]:
        return str(row["differs"])
    return "exact" if row["checked"] == 1 else f"exact ({_percent(row['checked'])} compared)"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; 8 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m fp8ctl.kernels.bench")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--recipe", default="ieee")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", metavar="PATTERN", help="works whose name holds this")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the document here")
    options = parser.parse_args(argv)

    def tell(row: Row) -> None:
        parts = (_label(row), _time(row["time_us"]), _percent(row["of_limit"]), _verdict(row))
        sys.stderr.write("  ".join(part for part in parts if part) + "\n")

    try:
        document = run(options.device, options.recipe, options.quick, options.only, tell=tell)
    except (NoCudaError, ValueError) as e:
        parser.error(str(e))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    columns, rows = table(document)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [*describe(document), ""]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if document["ok"] else 8


if __name__ == "__main__":
    sys.exit(main())
