"""docs/conformance.md against what its own rows do today, and its judges against wrong answers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tools.conformance import __main__ as tool
from tools.conformance import cases, expressions, packages, page
from tools.conformance.cases import Adapter, Case, cell

if TYPE_CHECKING:
    from collections.abc import Callable

    Pair = tuple[torch.Tensor, torch.Tensor]
    Tables = dict[str, dict[str, dict[str, str]]]

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
PAGE = page.parse(TEXT)
OWN = ("fp8ctl ", "torch ")


@pytest.fixture(scope="module")
def own() -> Tables:
    """Return the tables of the rows that need nothing but torch, made anew."""
    rows = tool.own_rows()
    tool.compare(rows)
    return page.parse(page.tables(rows))


def named(label: str) -> str:
    """Return the name of a row without its policies."""
    return re.sub(r" \([a-z, ]+\)$", "", label)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_what_its_own_rows_do(own: Tables) -> None:
    [made_with] = re.findall(r"torch (\d[\d.]*)", TEXT.partition("\n## ")[0])
    if made_with != torch.__version__.partition("+")[0]:
        pytest.skip(f"the page was made with torch {made_with}: casts to FP8 differ by version")
    assert list(own) == list(PAGE)
    for title, rows in own.items():
        there = {label: row for label, row in PAGE[title].items() if label.startswith(OWN)}
        assert list(there) == list(rows), title
        for label, row in rows.items():
            # A release of fp8ctl need not make the page anew.
            found = {k: v for k, v in there[label].items() if k != "Version"}
            assert found == {k: v for k, v in row.items() if k != "Version"}, f"{title}: {label}"


def test_the_page_has_every_case_and_every_row_in_every_table() -> None:
    wanted = {
        page.IMPLEMENTATIONS: {"Package", "Version", "Scales per", "What is called"},
        **{title: {case.title for case in columns} for title, columns in cases.TABLES.items()},
    }
    wanted["Arithmetic"] |= {"Same bits as"}
    names = set(PAGE[page.IMPLEMENTATIONS])
    for title, columns in wanted.items():
        assert {named(label) for label in PAGE[title]} == names, title
        for label, row in PAGE[title].items():
            assert set(row) == columns, (title, label)
            assert all(row.values()), (title, label)


def test_every_implementation_of_the_page_has_a_version() -> None:
    for label, row in PAGE[page.IMPLEMENTATIONS].items():
        assert re.fullmatch(r"\d+(\.\w+)+", row["Version"]), label


def test_the_page_comes_of_a_run_that_had_everything() -> None:
    head = TEXT.partition("\n## ")[0]
    assert "Not installed here: nothing." in head
    assert "--require" in head
    assert re.search(r"Made on \d{4}-\d\d-\d\d by\n", head)
    sources = {row["Package"] for row in PAGE[page.IMPLEMENTATIONS].values()}
    released = {name for name, _, _ in packages.RELEASED}
    assert sources == {"fp8ctl", "torch", *packages.INSTALLED, *released}


def test_what_is_written_is_read_back() -> None:
    rows = page.judge([HONEST], "1.2.3")
    page.compare(rows, [dataclasses.replace(HONEST, name="itself")])
    found = page.parse(page.render(rows, ["A head."]))
    assert found[page.IMPLEMENTATIONS]["honest"]["Version"] == "1.2.3"
    assert found["Arithmetic"]["honest"]["Same bits as"] == "itself"
    for title, columns in cases.TABLES.items():
        for case in columns:
            assert found[title]["honest"][case.title] == rows[0].cells[case.key]


def test_variants_share_a_row_only_where_they_do_the_same() -> None:
    one = page.judge([dataclasses.replace(HONEST, variant="one")], "1.0")[0]
    other = dataclasses.replace(one, variant="other", cells={**one.cells, "nan": "refused"})
    for row in (one, other):
        row.cells["same"] = "none"
    found = page.parse(page.tables([one, other]))
    assert list(found["Zeros, NaN and infinity"]) == ["honest (one)", "honest (other)"]
    assert list(found["Shapes and layout"]) == ["honest"]


# --- the judges -----------------------------------------------------------------------------------


def eager(name: str) -> Adapter:
    return next(one for one in expressions.eager() if one.name == f"torch {name}")


HONEST = dataclasses.replace(eager("x / s, floor"), name="honest")
BITS = eager("x * (1/2^e)")


def before(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], Pair]:
    return lambda x: HONEST.run(change(x))


def after(change: Callable[[Pair], Pair]) -> Callable[[torch.Tensor], Pair]:
    return lambda x: change(HONEST.run(x))


def refuse(wrong: Callable[[torch.Tensor], bool]) -> Callable[[torch.Tensor], Pair]:
    def run(x: torch.Tensor) -> Pair:
        if wrong(x):
            raise ValueError("no")
        return HONEST.run(x)

    return run


def one_code_off(pair: Pair) -> Pair:
    pair[0].view(torch.uint8)[5, 7] ^= 1
    return pair


def one_scale_off(pair: Pair) -> Pair:
    pair[1].view(torch.int32)[-1, -1] += 1
    return pair


def spoil(x: torch.Tensor) -> Pair:
    pair = HONEST.run(x)
    x[3, 3] = 0.0
    return pair


# For each case, an implementation that does one thing otherwise than the one it is held against.
PLANTS: dict[str, tuple[Adapter, Callable[[torch.Tensor], Pair]]] = {
    "zeros": (HONEST, eager("x / s").run),
    "nan": (HONEST, before(torch.nan_to_num)),
    "infinity": (HONEST, before(lambda x: x.clamp(-1, 1))),
    "subnormal-bf16": (HONEST, eager("x / s").run),
    "subnormal-fp32": (HONEST, eager("x / s").run),
    "tinier": (HONEST, eager("x / s").run),
    "tiny": (HONEST, eager("x * (1/s)").run),
    "largest": (HONEST, after(lambda pair: (pair[0], pair[1] * 1.5))),
    "ragged": (eager("x * div(448, amax)"), eager("x * (448/amax)").run),
    "small": (HONEST, after(lambda pair: (pair[0], pair[1].squeeze()))),
    "empty": (HONEST, refuse(lambda x: x.numel() == 0)),
    "transposed": (HONEST, before(lambda x: x.as_strided(x.shape, (x.shape[1], 1)))),
    "stored": (HONEST, after(lambda pair: (pair[0], pair[1].bfloat16()))),
    "dtypes": (HONEST, refuse(lambda x: x.dtype == torch.float16)),
    "unchanged": (HONEST, spoil),
    "codes": (HONEST, after(one_code_off)),
    "scales": (HONEST, after(one_scale_off)),
    "equal": (HONEST, after(lambda pair: (pair[0], pair[1] * 2))),
    "edge": (BITS, eager("x * exp2(-e)").run),
}


def test_every_case_has_a_plant() -> None:
    assert list(PLANTS) == [case.key for case in cases.CASES]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.key)
def test_a_wrong_implementation_changes_the_cell(case: Case) -> None:
    honest, wrong = PLANTS[case.key]
    assert cell(case, dataclasses.replace(honest, run=wrong)) != cell(case, honest)


def test_one_bit_is_another_fingerprint() -> None:
    case = Case("", "", cases.fingerprint)
    prints = {
        cell(case, dataclasses.replace(HONEST, run=run))
        for run in (HONEST.run, after(one_code_off), after(one_scale_off))
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (after(lambda pair: (pair[0].view(torch.uint8), pair[1])), "codes are uint8"),
        (after(lambda pair: (pair[0][:-1], pair[1])), "codes [255, 384] for [256, 384]"),
        (after(lambda pair: (pair[0], pair[1][:, :1])), "scales [2, 1] for [2, 3] groups"),
        (refuse(lambda x: True), "raises ValueError"),
    ],
)
def test_what_cannot_be_judged_is_said(run: Callable[[torch.Tensor], Pair], word: str) -> None:
    [stored] = [case for case in cases.CASES if case.key == "stored"]
    assert cell(stored, dataclasses.replace(HONEST, run=run)) == word


def test_an_error_at_another_place_is_not_said_to_name_the_element() -> None:
    def run(x: torch.Tensor) -> Pair:
        if x.isnan().any():
            raise ValueError(f"NaN at {places[0]}")
        return HONEST.run(x)

    places = [[0, 3]]
    case = Case("", "", cases.nan)
    assert cell(case, dataclasses.replace(HONEST, run=run)) == "raises ValueError at [0, 3]"
    places[0] = [3, 0]
    assert cell(case, dataclasses.replace(HONEST, run=run)) == "raises ValueError"


def test_scales_per_row_or_tensor_have_no_blocks_to_be_below() -> None:
    case = Case("", "", cases.small)
    assert cell(case, eager("x / s, per-channel")) == "no such path"


@pytest.mark.parametrize(
    ("value", "word"),
    [(0.0, "0"), (1.0, "1"), (2.0**-126, "2^-126"), (2.2321e-15, "2.2e-15"), (math.nan, "NaN")],
)
def test_numbers_are_short(value: float, word: str) -> None:
    assert cases.number(value) == word


# --- where rows come from -------------------------------------------------------------------------


def test_functions_come_out_of_a_wheel_to_the_letter(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    source = "import nowhere\nLIMIT = 3\ndef f(x):\n    return min(x, LIMIT) + g()\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/a.py", source)
    read = packages.in_wheel(wheel)
    found = packages.functions(read, {"thing/a.py": ("LIMIT", "f")}, {"g": lambda: 10})
    assert found.f(9) == 13
    with pytest.raises(ImportError, match=r"thing/a\.py has no h"):
        packages.functions(read, {"thing/a.py": ("f", "h")})
    with pytest.raises(ImportError, match=r"no thing/b\.py"):
        packages.functions(read, {"thing/b.py": ("f",)})


def test_a_wheel_of_another_version_is_none(tmp_path: Path) -> None:
    (tmp_path / "sglang-0.4.80-py3-none-any.whl").touch()
    with pytest.raises(ImportError, match=r"no wheel of sglang 0\.4\.8"):
        packages.released(tmp_path, "sglang", "0.4.8", packages.sglang)


def test_a_worker_answers_with_rows_and_what_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> list[Adapter]:
        raise ImportError("nothing of the kind")

    monkeypatch.setattr(packages, "INSTALLED", {"torch": lambda: [HONEST], "pytest": missing})
    answer = tmp_path / "answer.json"
    assert tool.main(["--answer", str(answer)]) == 0
    told = json.loads(answer.read_text(encoding="utf-8"))
    assert [row["name"] for row in told["rows"]] == ["honest"]
    assert told["missing"][0] == "pytest (ImportError: nothing of the kind)"
    assert len(told["missing"]) == 1 + len(packages.RELEASED)


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--require"], 1)])
def test_a_missing_row_is_counted_and_an_error_where_it_is_required(
    options: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object) -> tuple[list[page.Row], list[str], str]:
        return [], ["torchao (ModuleNotFoundError: gone)"], torch.__version__

    monkeypatch.setattr(tool, "ask", answer)
    monkeypatch.setattr(tool, "own_rows", list)
    out = tmp_path / "page.md"
    assert tool.main(["--out", str(out), *options]) == code
    text = out.read_text(encoding="utf-8")
    assert "Not installed here: torchao." in text
    assert str(tmp_path) not in text


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "ask", lambda *_: ([], [], "0.1.0"))
    with pytest.raises(SystemExit, match=r"torch .* 0\.1\.0 there"):
        tool.main([])


def test_the_wheels_that_are_wanted_are_pins_for_pip(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--wanted"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sglang==0.4.8" in lines
    assert "vllm==0.9.1" in lines
    assert all(re.fullmatch(r"[a-z-]+==[\w.]+", line) for line in lines)


def test_requirements_are_pinned_and_leave_torch_to_the_constraints() -> None:
    text = (ROOT / "tools" / "conformance" / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert set(packages.INSTALLED) <= pinned
    assert "torch" not in pinned
    assert "triton" not in pinned
