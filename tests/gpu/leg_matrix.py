"""Every --quantization and --torchao-config of SGLang 0.4.8: answers, is refused, or dies.

A cell is good where the server answers, or where fp8ctl refuses it before the start; what only
dies is a fault. How far log-probabilities are from those of 16 bits tells garbage from rounding.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fp8ctl.engines.sglang import QUANTIZATION
from tests.gpu import ask, path
from tests.gpu.leg import FailedError, SkippedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.host import Host

_START = 120.0
# Random weights tell nothing apart better than this: two unrelated models are 2 and more apart.
GARBAGE = 1.0


@dataclass(frozen=True)
class Cell:
    """One start.

    Attributes:
        option: of fp8ctl.
        value: of the option.
        model: which checkpoint.
        refused: fp8ctl must refuse it, on any GPU of today's runs.
    """

    option: str
    value: str
    model: str
    refused: bool = False

    @property
    def name(self) -> str:
        return f"{self.value}.{self.model}"


_AO = "--torchao-config"
_Q = "--quantization"

CELLS = (
    Cell(_AO, "int8wo", "dense-a"),
    Cell(_AO, "int8dq", "dense-a"),
    *(Cell(_AO, f"int4wo-{size}", "dense-a") for size in (32, 64, 128, 256)),
    Cell(_AO, "fp8wo", "dense-a"),
    Cell(_AO, "fp8dq-per_tensor", "dense-a"),
    Cell(_AO, "fp8dq-per_row", "dense-a"),
    Cell(_Q, "fp8", "dense-a"),
    Cell(_Q, "fp8", "moe-a"),
    Cell(_Q, "w8a8_fp8", "dense-a"),
    Cell(_Q, "w8a8_int8", "dense-int8"),
    Cell(_Q, "gptq", "dense-gptq"),
    Cell(_Q, "gptq_marlin", "dense-gptq"),
    Cell(_Q, "marlin", "dense-gptq"),
    Cell(_Q, "awq", "dense-awq"),
    Cell(_Q, "awq_marlin", "dense-awq"),
    Cell(_Q, "marlin", "dense-awq"),
    Cell(_Q, "moe_wna16", "moe-gptq"),
    Cell(_Q, "modelopt", "dense-modelopt"),
    # Refused: not of the checkpoint's kind, of no kind, or for another GPU.
    Cell(_AO, "int4wo-48", "dense-a", refused=True),
    Cell(_AO, "int8", "dense-a", refused=True),
    Cell(_AO, "gemlite-4-64", "dense-a", refused=True),
    Cell(_AO, "gemlite-8-None", "dense-a", refused=True),
    Cell(_Q, "bitsandbytes", "dense-a", refused=True),
    Cell(_AO, "int8wo", "dense-gptq", refused=True),
    Cell(_Q, "modelopt_fp4", "dense-modelopt", refused=True),
    Cell(_Q, "aqlm", "dense-a", refused=True),
    *(
        Cell(_Q, method, "dense-a", refused=True)
        for method in QUANTIZATION
        if method not in ("fp8", "w8a8_fp8", "bitsandbytes")
    ),
)


def run(host: Host) -> None:
    """Do the leg."""
    leg = host.leg
    truth: dict[str, ask.Said] = {}
    rows: list[dict[str, object]] = []

    def prepare() -> None:
        with leg.step("models"):
            host.models("dense-a", "moe-a", "dense-gptq", "dense-awq", "dense-int8")
            host.models("dense-modelopt", "moe-gptq")
        with leg.step("begin as released"):
            host.released("sglang")
        with leg.step("patch"):
            host.fp8ctl("patch", *host.target, "--backend", "sglang", limit=60)

    if not leg.job("prepare", prepare):
        return
    # First, for all others are compared with it.
    first = {f"16-bit {kind}": partial(sixteen, host, truth, kind) for kind in ("dense", "moe")}
    leg.jobs(first)
    work: dict[str, Callable[[], None]] = {"int8dq, graphs on": partial(int8dq, host, rows)}
    for cell in CELLS:
        work[cell.name] = partial(look, host, truth, rows, cell)
    leg.jobs(work)
    with (leg.folder / "matrix.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    table(host, rows)
    leg.job("end", lambda: path.reverted(host, "sglang"))


def sixteen(host: Host, truth: dict[str, ask.Said], kind: str) -> None:
    model = host.model(f"{kind}-a")
    with (
        host.leg.step("16 bits") as seen,
        host.stock("sglang", model, limit=_START) as server,
    ):
        truth[kind] = server.said()
        seen |= ask.chat(server.url, server.model)


def look(host: Host, truth: dict[str, ask.Said], rows: list[dict[str, object]], cell: Cell) -> None:
    """Start a cell as a user does, ask it, stop it."""
    row: dict[str, object] = {"option": cell.option, "value": cell.value, "model": cell.model}
    rows.append(row)
    model = host.model(cell.model)
    typed = ["launch", "--backend", "sglang", *host.target, "--model", str(model)]
    typed += [cell.option, cell.value]
    extra = host.extra("sglang")
    with host.leg.step(f"{cell.option} {cell.value}, {cell.model}") as seen:
        row["result"] = "not looked at"
        dry = host.answer(*typed, "--dry-run", "--", *extra, limit=60)
        if not dry["ok"]:
            error = dry["error"]
            row |= {"result": "refused", "id": error["id"], "reason": error["message"]}
            seen |= {**row, "seen": f"refused: {error['id']}: {error['message']}"}
            return
        if cell.refused:
            row["result"] = "not refused"
            raise FailedError("it was not refused")
        line = " ".join(map(str, dry["data"]["launch"]["argv"]))
        row["graphs_off"] = "--disable-cuda-graph" in line
        try:
            # The check of launch asks the seed's question.
            with host.launched(
                "sglang", model, cell.option, cell.value, limit=_START, extra=extra
            ) as server:
                row["seconds"] = round(server.seconds, 1)
                row |= ask.chat(server.url, server.model)
                said = server.said()
        except FailedError as e:
            row |= {"result": "died", "reason": str(e)}
            seen |= row
            raise
        kind = cell.model.partition("-")[0]
        row |= {"result": "answers", "finite": said.finite()}
        if kind in truth:
            row["mean_difference"] = ask.difference(said, truth[kind])["mean_difference"]
        seen |= {**row, "seen": f"answers; mean difference {row.get('mean_difference')}"}
        gap = row.get("mean_difference", 0.0)
        if not said.finite() or not isinstance(gap, float) or math.isnan(gap) or gap > GARBAGE:
            row["result"] = "answers garbage"
            raise FailedError(f"garbage: finite {said.finite()}, mean difference {gap}")


def int8dq(host: Host, rows: list[dict[str, object]]) -> None:
    """Start int8dq without the flag that fp8ctl adds: does it still crash under capture?"""
    if host.device == "cpu":
        with host.leg.step("int8dq with CUDA graphs"):
            raise SkippedError("only where CUDA graphs are captured")
    row: dict[str, object] = {"option": _AO, "value": "int8dq, graphs on", "model": "dense-a"}
    rows.append(row)
    with host.leg.step("int8dq with CUDA graphs") as seen:
        model = host.model("dense-a")
        try:
            with host.stock("sglang", model, _AO, "int8dq", limit=_START) as server:
                row |= {"result": "answers", **ask.chat(server.url, server.model)}
        except FailedError as e:
            row |= {"result": "died", "reason": str(e)}
        row["seen"] = f"{row['result']}: {row.get('reason') or row.get('answer')}"
        seen |= row


def table(host: Host, rows: list[dict[str, object]]) -> None:
    """Write the table of docs/quantization.md."""
    lines = ["| Option | Checkpoint | Result | Ready | From 16 bits | Seen |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        gap = row.get("mean_difference")
        told = row.get("reason") or row.get("answer") or ""
        if row.get("graphs_off"):
            told = f"CUDA graphs off; {told}"
        cells = (
            f"`{row['option']} {row['value']}`",
            row["model"],
            row.get("result", ""),
            f"{row['seconds']} s" if "seconds" in row else "",
            f"{gap:.3f}" if isinstance(gap, float) else "",
            " ".join(str(told).split())[:160].replace("|", "/"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (host.leg.folder / "matrix.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
