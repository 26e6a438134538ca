"""The machine code of the shipped kernels: exact division, no flush to zero.

Compiled for an H100 (sm_90) by Triton and the ptxas in its wheel; no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from tests.kernels.implementations import PLACES, ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only"
)

DTYPES = ("bfloat16", "float16", "float32")
RECIPES = ("ieee", "reciprocal", "inverse-scale", "ue8m0")
SMALL = ("128x128", "64x64", "1x128", "3x7", "per-channel")
LARGE = ("300x300", "per-tensor", "per-channel")

# Words: dtype, recipe, policy, groups, one tensor or a list, and of large groups which pass.
ALL = tuple(
    itertools.chain(
        (f"{d} {r} error 128x128 one" for d in DTYPES for r in RECIPES),
        (f"{d} {r} saturate 1x128 list" for d in DTYPES for r in RECIPES),
        (f"{d} ieee propagate {g} list" for d in DTYPES for g in SMALL),
        (f"{d} ieee error {g} one amax" for d in DTYPES for g in LARGE),
        (f"{d} {r} error per-tensor one codes" for d in DTYPES for r in RECIPES),
        (f"float32 reciprocal propagate {g} list codes" for g in LARGE),
        (f"{d} ieee error 128x128 old" for d in DTYPES),
    )
)
FEW = (
    "bfloat16 ieee error 128x128 list",
    "float32 ieee error per-tensor one codes",
)
CONTROLS = (
    "control: a / b",
    "control: exp2",
    "control: log2",
    "control: a * b",
    "control: a * b + c",
    "control: div_rn",
)

# In PTX an IEEE division is one instruction, so nothing of what follows is ever right.
APPROXIMATE = re.compile(
    r"\b(?:div\.(?:full|approx)|(?:rcp|sqrt|rsqrt)\.approx|ex2|lg2|tanh)[.\w]*"
)
FLUSHED = re.compile(r"\b\w+(?:\.\w+)*\.ftz\b[.\w]*")
# A product or a sum that does not say how it is rounded may be fused with another, by ptxas too.
UNROUNDED = re.compile(r"\b(?:add|sub|mul)\.f32\b")
# In SASS one is a sequence: FCHK, MUFU.RCP, corrections, and a call for the rare cases, whose
# code stands behind the program's last EXIT. An integer division has an F2I.FTZ of a number
# that is never subnormal.
INTEGER_DIVISION = "F2I.FTZ.U32.TRUNC.NTZ"


def in_ptx(ptx: str) -> list[str]:
    """Return approximations and flushes in PTX."""
    return APPROXIMATE.findall(ptx) + FLUSHED.findall(ptx)


def in_sass(sass: str) -> list[str]:
    """Return approximations and flushes in SASS that belong to no exact division."""
    program = sass[: sass.rindex("EXIT;")]
    words = re.findall(r"\b[A-Z][A-Z0-9]*(?:\.[A-Z0-9]+)+|\bFCHK\b", program)
    integer = words.count(INTEGER_DIVISION)
    found = [word for word in words if ".FTZ" in word and word != INTEGER_DIVISION]
    found += [word for word in words if word.startswith("MUFU.") and word != "MUFU.RCP"]
    reciprocals = words.count("MUFU.RCP")
    if reciprocals > words.count("FCHK") + integer:
        found.append(f"{reciprocals} MUFU.RCP")
    return found


def compiled(names: list[str], home: Path) -> dict[str, dict[str, str]]:
    """Compile in a process of its own: the rest of the tests may have set TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.machine_code_cases", *names],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    assert list(found) == names
    return found


def _check(kernels: dict[str, dict[str, str]]) -> None:
    for name, code in kernels.items():
        ptx, sass = code["ptx"], code["sass"]
        assert f".target sm_{80 if ' old' in name else 90}" in ptx, name
        assert not in_ptx(ptx), name
        assert not in_sass(sass), name
        # A product that was not written as part of a fused operation must not become one. None
        # could today, as no product is added to anything: all must say .rn before one is.
        assert not UNROUNDED.search(ptx), name
        assert ("ieee" in name and "amax" not in name) == ("fma." in ptx), name
        conversions = ptx.count("cvt.rn.satfinite.e4m3x2.f32")
        if "ieee" in name and conversions:
            # Two a step and number; FP32 takes two steps, else a quotient may be one unit off.
            assert ptx.count("fma.rn.f32") == conversions * (8 if "float32" in name else 4), name
        # The search had something to search: a scale takes a division, codes a conversion.
        divides = "amax" not in name and "ue8m0" not in name
        assert divides == bool(re.search(r"\bdiv\.rn\.f32\b", ptx)), name
        converts = "amax" not in name and "old" not in name
        assert converts == ("cvt.rn.satfinite.e4m3x2.f32" in ptx), name
        assert re.search(r"\b(?:LDG|LD)\.", sass), name
        assert re.search(r"\b(?:STG|ST|RED|ATOMG)\.", sass), name


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return compiled([*FEW, *CONTROLS], tmp_path_factory.mktemp("triton"))


def test_the_kernels_divide_exactly_and_keep_subnormals(code: dict[str, dict[str, str]]) -> None:
    _check({name: code[name] for name in FEW})


@pytest.mark.long
def test_all_kernels_divide_exactly_and_keep_subnormals(tmp_path: Path) -> None:
    _check(compiled(list(ALL), tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_kernels_divide_exactly_as_compiled_by_the_gpus_own_triton(tmp_path: Path) -> None:
    _check(compiled(list(ALL), tmp_path))


def test_the_search_finds_what_it_looks_for(code: dict[str, dict[str, str]]) -> None:
    assert any("div.full" in word for word in in_ptx(code["control: a / b"]["ptx"]))
    assert any(".ftz" in word for word in in_ptx(code["control: log2"]["ptx"]))
    assert any("ex2.approx" in word for word in in_ptx(code["control: exp2"]["ptx"]))
    assert any("MUFU" in word for word in in_sass(code["control: a / b"]["sass"]))
    assert any("MUFU" in word for word in in_sass(code["control: exp2"]["sass"]))
    assert any("FTZ" in word for word in in_sass(code["control: log2"]["sass"]))
    assert "fma.rn.f32" in code["control: a * b + c"]["ptx"]
    assert UNROUNDED.search(code["control: a * b"]["ptx"])
    exact = code["control: div_rn"]
    assert "div.rn.f32" in exact["ptx"]
    assert not in_ptx(exact["ptx"])
    assert not in_sass(exact["sass"])


def test_each_recipe_dtype_and_policy_is_among_the_kernels_searched() -> None:
    names = " ".join(ALL)
    for word in itertools.chain(
        ("bfloat16", "float16", "float32", "ieee", "reciprocal", "inverse-scale", "ue8m0"),
        ("error", "saturate", "propagate", "list", "one", "128x128", "1x128", "64x64", "3x7"),
        ("per-tensor", "per-channel", "amax", "codes"),
    ):
        assert word in names, word
    assert len(FEW) < len(ALL)
    assert "triton-cuda" in PLACES
