"""What a tensor that differs looks like: the hook's lines of its parts, read beside the source."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8ctl import checkpoint, difference, models, reading
from fp8ctl.engines.hooks import inspection
from fp8ctl.formats import BlockSize, Mode
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.digest import row_sums
from fp8ctl.kernels.groups import PER_CHANNEL, block
from fp8ctl.planning import make_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.engines.hooks.shards import Shard
    from fp8ctl.manifest import Plan

LAYER = "model.layers.0"
SQUARE, WIDE = f"{LAYER}.self_attn.o_proj.weight", f"{LAYER}.mlp.experts.0.gate_proj.weight"
ROUTER, NORM = f"{LAYER}.mlp.gate.weight", f"{LAYER}.input_layernorm.weight"
SHAPES = {SQUARE: (128, 128), WIDE: (192, 128), ROUTER: (4, 128), NORM: (128,)}
MOST = 1 << 20


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("model")
    random = torch.Generator().manual_seed(3)
    state = {n: torch.randn(s, generator=random).bfloat16() for n, s in SHAPES.items()}
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    return make_plan(folder, "sglang", Mode.BLOCK, 1, BlockSize(32, 32))


def right(plan: Plan) -> dict[str, torch.Tensor]:
    """Return what the kernel makes of the source."""
    made: dict[str, torch.Tensor] = {}
    source = models.read_checkpoint(plan.model)
    for planned, _, tensor in reading.read_planned(source, plan):
        made |= checkpoint.become(planned, tensor, plan)
    return made


class Model:
    """The walk of one rank's model that holds given tensors, whole or a part of each."""

    def __init__(self, held: dict[str, torch.Tensor], rank: int = 0, *, across: bool = False):
        self.held, self.rank, self.across = held, rank, across

    def shards(self) -> Iterator[Shard]:
        from fp8ctl.engines.hooks.shards import Shard

        for name, t in self.held.items():
            column = self.rank * t.shape[1] if self.across else 0
            row = 0 if self.across else self.rank * t.shape[0]
            yield Shard(name, t, row, column, True)


def told(
    held: dict[str, torch.Tensor], rows: dict[str, list[int]] | None = None, most: int = MOST
) -> list[dict[str, Any]]:
    model: Any = Model(held)
    return inspection.inspect(model, list(held), rows or {}, most)


def one(plan: Plan, name: str, held: torch.Tensor) -> dict[str, Any]:
    """Return what is said of a tensor that one rank holds, after a way through JSON."""
    lines = json.loads(json.dumps(told({name: held})))
    return difference.examine(plan, lines)[name]


def changed(t: torch.Tensor, *places: tuple[int, int]) -> torch.Tensor:
    bits = t.clone().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])
    for row, column in places:
        bits[row, column] ^= 1
    return bits.view(t.dtype)


def test_codes_that_differ_are_counted_and_their_rows_named(plan: Plan) -> None:
    held = changed(right(plan)[WIDE], (3, 2), (3, 9), (4, 0), (100, 127))
    seen = one(plan, WIDE, held)
    assert (seen["codes"], seen["rows"], seen["looks"]) == ([4, 192 * 128], "3-4, 100", "")


def test_scales_and_kept_tensors_are_counted_as_well(plan: Plan) -> None:
    scales = f"{WIDE}_scale_inv"
    seen = one(plan, scales, changed(right(plan)[scales], (5, 1)))
    assert (seen["codes"], seen["rows"]) == ([1, 6 * 4], "5")
    norm = right(plan)[NORM].clone()
    norm[7] *= 2
    assert one(plan, NORM, norm) == {
        "codes": [1, 128],
        "rows": "7",
        "looks": "",
        "detail": "",
        "wanted": [],
    }


def test_of_a_large_tensor_the_rows_that_differ_are_asked_for(plan: Plan) -> None:
    held = {WIDE: changed(right(plan)[WIDE], (3, 2), (3, 9), (150, 1))}
    seen = difference.examine(plan, told(held, most=100))[WIDE]
    assert (seen["codes"], seen["wanted"], seen["rows"]) == (None, [3, 150], "3, 150")
    again = difference.examine(plan, told(held, {WIDE: seen["wanted"]}))[WIDE]
    assert again["codes"] == [3, 192 * 128]
    # Of more rows than are asked for, what is known is said, and no more.
    everything = {WIDE: changed(right(plan)[WIDE], *((row, 0) for row in range(192)))}
    seen = difference.examine(plan, told(everything, most=100))[WIDE]
    assert len(seen["wanted"]) == difference.ROWS
    again = difference.examine(plan, told(everything, {WIDE: seen["wanted"]}))[WIDE]
    assert again["codes"] is None
    assert again["detail"] == f"64 of {64 * 128} in the first 64 of these rows"


@pytest.mark.parametrize("across", [False, True])
def test_parts_of_two_ranks_are_put_together(across: bool, plan: Plan) -> None:
    halves = changed(right(plan)[WIDE], (3, 2), (190, 100)).chunk(2, dim=int(across))
    lines: list[dict[str, Any]] = []
    for rank, half in enumerate(halves):
        model: Any = Model({WIDE: half}, rank, across=across)
        lines += inspection.inspect(model, [WIDE], {}, MOST)
    seen = difference.examine(plan, lines)[WIDE]
    assert (seen["codes"], seen["rows"]) == ([2, 192 * 128], "3, 190")


def test_a_copy_that_differs_is_found_beside_a_right_one(plan: Plan) -> None:
    good, bad = right(plan)[SQUARE], changed(right(plan)[SQUARE], (9, 9))
    lines = told({SQUARE: good}) + [{**line, "primary": False} for line in told({SQUARE: bad})]
    assert difference.examine(plan, lines)[SQUARE]["rows"] == "9"


def test_a_square_matrix_on_its_side_is_transposed(plan: Plan) -> None:
    want = right(plan)[SQUARE]
    assert one(plan, SQUARE, want.t().contiguous())["looks"] == "transposed"
    assert one(plan, SQUARE, changed(want.t().contiguous(), (0, 1)))["looks"] == ""


@pytest.mark.parametrize("own", [True, False])
def test_a_transposed_shard_of_one_rank_is_seen(own: bool, plan: Plan) -> None:
    """A part turned by itself, and a part of what was turned before it was cut."""
    want = right(plan)[SQUARE]
    first, second = want.chunk(2, dim=1)
    turned = second if own else want.t()[:, 64:]
    if own:  # only a square one fits
        second = want[:64, 64:]
        lines = []
        for part, row, column in (
            (want[:64, :64], 0, 0),
            (second.t(), 0, 64),
            (want[64:, :64], 64, 0),
            (want[64:, 64:], 64, 64),
        ):
            [line] = told({SQUARE: part.contiguous()})
            sums = row_sums(part.contiguous(), column).numpy()
            text = base64.b64encode(sums.astype("<i8").tobytes()).decode()
            lines.append({**line, "row": row, "column": column, "sums": text})
    else:
        lines = []
        for rank, part in enumerate((first, turned)):
            model: Any = Model({SQUARE: part.contiguous()}, rank, across=True)
            lines += inspection.inspect(model, [SQUARE], {}, MOST)
    assert difference.examine(plan, lines)[SQUARE]["looks"] == "transposed"


@pytest.mark.parametrize("value", [1.0, torch.finfo(torch.float32).min, 0.0])
def test_some_scales_that_nobody_loaded(value: float, plan: Plan) -> None:
    scales = f"{WIDE}_scale_inv"
    held = right(plan)[scales].clone()
    held[2:4] = value
    seen = one(plan, scales, held)
    assert (seen["looks"], seen["rows"]) == ("unscaled", "2-3")
    held[0, 0] *= 2  # this one is no default
    assert one(plan, scales, held)["looks"] == ""


def test_weights_that_were_cast_without_a_scale(plan: Plan) -> None:
    weight = load_file(str(plan.model / "model.safetensors"))[WIDE]
    assert one(plan, WIDE, weight.float().to(torch.float8_e4m3fn))["looks"] == "unscaled"


def test_what_load_format_dummy_leaves(plan: Plan) -> None:
    def noise(t: torch.Tensor) -> torch.Tensor:
        return (torch.rand(t.shape) * 2e-3 - 1e-3).half().to(t.dtype)

    made = right(plan)
    for name in (WIDE, f"{WIDE}_scale_inv"):
        assert one(plan, name, noise(made[name]))["looks"] == "dummy"


def test_codes_of_another_recipe_say_which(plan: Plan) -> None:
    weight = load_file(str(plan.model / "model.safetensors"))[WIDE]
    codes, _ = kernels.quantize(weight, block(32, 32), "ue8m0")
    assert one(plan, WIDE, codes)["detail"] == "as recipe ue8m0 makes them"


@pytest.mark.parametrize("raw", [True, False])
def test_a_router_that_went_through_fp8(raw: bool, plan: Plan) -> None:
    weight = load_file(str(plan.model / "model.safetensors"))[ROUTER]
    codes, scales = kernels.quantize(weight, PER_CHANNEL)
    held = (codes.float() * (1 if raw else scales)).bfloat16()
    assert one(plan, ROUTER, held)["looks"] == "quantised"
    assert one(plan, ROUTER, weight * 2)["looks"] == ""


def test_a_tensor_of_another_shape_or_type_says_no_more(plan: Plan) -> None:
    want = right(plan)[WIDE]
    for held in (want[:, :64].float(), torch.cat((want.view(torch.uint8),) * 2)):
        seen = one(plan, WIDE, held)
        assert (seen["codes"], seen["looks"]) == (None, "")


def test_rows_are_told_as_spans() -> None:
    assert difference.spans([]) == ""
    assert difference.spans([4]) == "4"
    assert difference.spans([0, 1, 2, 7, 9, 10]) == "0-2, 7, 9-10"
    assert difference.spans(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, ..."


def test_an_inspected_part_sends_no_more_values_than_it_may() -> None:
    line = told({"a": torch.zeros(100, 100)}, most=39999)[0]
    assert line["values"] is None
    assert told({"a": torch.zeros(100, 100)}, most=40000)[0]["values"]
