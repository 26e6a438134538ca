"""What engines make of 16-bit weights by themselves: their kernels' arithmetic, and near misses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from fp8ctl import online
from fp8ctl.check import online as own
from fp8ctl.engines.hooks import inspection
from fp8ctl.engines.hooks.shards import Shard
from fp8ctl.held import Held
from fp8ctl.kernels.digest import digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fp8ctl.manifest import Plan

LAYER = "model.layers.0"
Q, OUT, ROUTER = (
    f"{LAYER}.{m}.weight" for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate")
)
SHAPES = {Q: (64, 96), OUT: (64, 64), ROUTER: (4, 64)}
CODES, FP32 = "float8_e4m3fn", "float32"


def rows_of_sglang(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise as SGLang's `_per_token_group_quant_fp8`, exactly divided."""
    w = weight.float()
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-10) / 448
    return (w * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def rows_of_vllm(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise as vLLM's `dynamic_per_token_scaled_fp8_quant`."""
    w = weight.float()
    least = torch.tensor(1 / (448 * 512), dtype=torch.float32)
    scale = torch.maximum(w.abs().amax(1, keepdim=True) / 448, least)
    return (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    made = {n: torch.randn(s, generator=random).bfloat16() for n, s in SHAPES.items()}
    made[Q][5] = 0  # a row of zeros
    made[Q][6] *= 1e-7
    return made


@pytest.fixture(scope="module")
def folder(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    return folder


def held(parts: int = 1) -> dict[str, Held]:
    found = {n: Held(CODES, 0, True, (0,), s) for n, s in SHAPES.items() if n != ROUTER}
    found |= {f"{Q}_scale": Held(FP32, 0, True, (0,), (64, 1))}
    found |= {f"{OUT}_scale": Held(FP32, 0, True, (0,), (64, parts))}
    return found | {ROUTER: Held("bfloat16", 0, True, (0,), SHAPES[ROUTER])}


def guessed(folder: Path, engine: str, parts: int = 1) -> tuple[Plan, online.Kernel]:
    found = own.guess(folder, engine, parts, held(parts))
    assert found is not None
    return found[0], online.Kernel.from_json(json.loads(json.dumps(found[1])))


@pytest.mark.parametrize(("engine", "rows"), [("sglang", rows_of_sglang), ("vllm", rows_of_vllm)])
def test_the_expectation_is_the_engines_own_arithmetic(
    engine: str, rows: Any, folder: Path, state: dict[str, torch.Tensor]
) -> None:
    plan, kernel = guessed(folder, engine)
    quality: dict[str, dict[str, float]] = {}
    found = online.expected_digests(plan, kernel, quality=quality)
    for name in (Q, OUT):
        codes, scales = rows(state[name])
        assert found[name] == [digest(codes)]
        assert found[f"{name}_scale"] == [digest(scales)]
    assert found[ROUTER] == [digest(state[ROUTER])]
    assert set(quality) == {Q, OUT}


def test_each_rank_scales_the_columns_that_it_holds(
    folder: Path, state: dict[str, torch.Tensor]
) -> None:
    plan, kernel = guessed(folder, "sglang", parts=2)
    assert own.shapes(plan, kernel.to_json())[f"{OUT}_scale"] == (64, 2)
    found = online.expected_digests(plan, kernel)
    halves = [rows_of_sglang(half) for half in state[OUT].chunk(2, dim=1)]
    assert found[OUT] == [sum(digest(c, 0, 32 * i) for i, (c, _) in enumerate(halves)) % 2**64]
    scales = sum(digest(s, 0, i) for i, (_, s) in enumerate(halves)) % 2**64
    assert found[f"{OUT}_scale"] == [scales]


def test_what_the_engine_chose_to_quantise_is_expected_so_but_for_routers(folder: Path) -> None:
    chosen = {**held(), ROUTER: Held(CODES, 0, True, (0,), SHAPES[ROUTER])}
    found = own.guess(folder, "sglang", 1, chosen)
    assert found is not None
    assert {t.name for t in found[0].quantized} == {Q, OUT}, "a router is no engine's to quantise"
    left = {n: h._replace(dtype="bfloat16") if n == Q else h for n, h in held().items()}
    found = own.guess(folder, "sglang", 1, left)
    assert found is not None
    assert Q in {t.name for t in found[0].quantized}, "what it left is a fault that is told"


def test_an_engine_or_a_model_that_nobody_knows_is_not_guessed(
    folder: Path, tmp_path: Path
) -> None:
    assert own.guess(folder, "other", 1, held()) is None
    assert own.guess(tmp_path, "sglang", 1, held()) is None


class Model:
    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self.parts = parts

    def shards(self) -> Iterator[Shard]:
        for name, t in self.parts.items():
            yield Shard(name, t, 0, 0, True)


def near(folder: Path, codes: torch.Tensor, scales: torch.Tensor) -> dict[str, dict[str, Any]]:
    plan, kernel = guessed(folder, "sglang")
    model: Any = Model({Q: codes, f"{Q}_scale": scales})
    return online.examine(plan, kernel, inspection.inspect(model, [Q, f"{Q}_scale"], {}, 4096))


def beside(scales: torch.Tensor, ulps: int) -> torch.Tensor:
    return (scales.view(torch.int32) + ulps).view(torch.float32)


@pytest.mark.parametrize(("of_scale", "of_inverse"), [(1, 0), (-2, 0), (0, 1), (0, -2), (2, -1)])
def test_a_division_that_is_off_by_the_last_places_is_within_one_step(
    of_scale: int, of_inverse: int, folder: Path, state: dict[str, torch.Tensor]
) -> None:
    """As Triton divides on a GPU; all rows are proven, of large tensors without their codes."""
    scales = beside(rows_of_sglang(state[Q])[1], of_scale)
    inverse = beside(scales.reciprocal(), of_inverse)
    codes = (state[Q].float() * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)
    found = near(folder, codes, scales)
    assert {one["looks"] for one in found.values()} == {"one step"}


def test_a_code_or_a_scale_that_is_off_by_more_is_not(
    folder: Path, state: dict[str, torch.Tensor]
) -> None:
    codes, scales = rows_of_sglang(state[Q])
    flipped = codes.clone()
    flipped.view(torch.uint8)[3, 2] ^= 1
    assert {one["looks"] for one in near(folder, flipped, scales).values()} == {""}
    for ulps in (3, -5):
        other = beside(scales, ulps)
        made = (state[Q].float() * other.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
        found = near(folder, made, other)
        assert {one["looks"] for one in found.values()} == {""}
