"""The heat map and the histogram, as data and as what they become."""

from __future__ import annotations

import math
import re

import pytest

from fp8ctl.check import charts


def quality(**found: float | None) -> dict[str, dict[str, object]]:
    return {name.replace("__", "."): {"sqnr_db": v, "amax": 0.5} for name, v in found.items()}


LLAMA = {
    f"model.layers.{layer}.{part}.weight": {"sqnr_db": 31.0 + layer, "amax": 0.25}
    for layer in (0, 1, 10)
    for part in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj")
}


def test_layers_are_rows_in_their_order_and_projections_columns_in_that_of_the_arithmetic() -> None:
    [stack] = charts.stacks(LLAMA)
    assert (stack.name, stack.layers) == ("model.layers", [0, 1, 10])
    assert stack.columns == ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def test_the_experts_of_a_layer_share_a_cell_that_shows_the_worst() -> None:
    found = {
        f"model.layers.0.mlp.experts.{e}.up_proj.weight": {
            "sqnr_db": 30.0 + e % 7,
            "amax": float(e),
        }
        for e in range(256)
    }
    found["model.layers.0.mlp.experts.77.up_proj.weight"]["sqnr_db"] = 12.5
    [stack] = charts.stacks(found, ["model.layers.0.mlp.experts.3.up_proj.weight_scale_inv"])
    assert stack.columns == ["mlp.experts.*.up_proj"]
    cell = stack.cells[0, "mlp.experts.*.up_proj"]
    assert (len(cell.names), cell.worst, cell.amax) == (256, 12.5, 255.0)
    assert "worst of 256: model.layers.0.mlp.experts.77.up_proj.weight, 12.5 dB" in cell.told
    assert cell.unequal == ["model.layers.0.mlp.experts.3.up_proj.weight"]


def test_towers_and_what_is_in_no_layer_have_maps_of_their_own() -> None:
    found = {
        "visual.blocks.3.attn.qkv.weight": {"sqnr_db": 30.0, "amax": 1.0},
        "lm_head.weight": {"sqnr_db": 33.0, "amax": 1.0},
        **LLAMA,
    }
    assert [one.name for one in charts.stacks(found)] == ["visual.blocks", "", "model.layers"]


@pytest.mark.parametrize("suffix", ["", "_scale_inv", "_scale"])
def test_a_tensor_or_a_scale_that_differs_marks_its_cell_and_no_other(suffix: str) -> None:
    name = "model.layers.10.mlp.up_proj.weight"
    [stack] = charts.stacks(LLAMA, [name + suffix])
    marked = {key for key, cell in stack.cells.items() if cell.unequal}
    assert marked == {(10, "mlp.up_proj")}
    shown = charts.heat_map(stack, 30.0, 42.0)
    assert shown.count("≠") == 1
    assert f"{name}: 41.0 dB; largest value 0.25; not equal in the server" in shown


def test_a_shade_is_the_more_the_better_and_the_ends_are_inside() -> None:
    [stack] = charts.stacks(LLAMA)
    ends = charts.scale([stack])
    assert ends == (31.0, 41.0)
    shown = charts.heat_map(stack, *ends)
    shades = re.findall(r'<td class="(q\d)"[^>]*>([\d.]+)', shown)
    assert ("q0", "31.0") in shades
    assert (f"q{charts.SHADES - 1}", "41.0") in shades
    assert charts.legend(*ends).count("<li") == charts.SHADES


def test_alike_values_are_not_made_to_look_different() -> None:
    [stack] = charts.stacks(quality(layers__0__a__weight=31.50, layers__1__a__weight=31.51))
    ends = charts.scale([stack])
    assert ends is not None
    assert ends[1] - ends[0] == pytest.approx(1.0)
    assert len(set(re.findall(r'<td class="(q\d)"', charts.heat_map(stack, *ends)))) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "?"), (math.nan, "?"), (math.inf, "∞"), (-math.inf, "-∞"), (True, "?")],
)
def test_what_is_no_number_is_drawn_as_such(value: float | None, shown: str) -> None:
    [stack] = charts.stacks(quality(layers__0__a__weight=value, layers__0__b__weight=31.0))
    assert f">{shown}</td>" in charts.heat_map(stack, 30.0, 33.0)


def test_without_any_number_there_is_no_scale() -> None:
    assert charts.scale(charts.stacks(quality(layers__0__a__weight=None))) is None
    assert charts.scale([]) is None


def test_a_histogram_has_a_bar_for_every_bin_with_something_in_it_and_all_as_numbers() -> None:
    shown = charts.histogram([-1.0, 0.0, 1.0, 2.0], [2, 0, 8], "differences")
    heights = [float(one) for one in re.findall(r'<rect[^>]* height="([\d.]+)"', shown)]
    assert len(heights) == 2
    assert heights[1] == pytest.approx(4 * heights[0], rel=1e-3)
    assert 'role="img" aria-label="Histogram, differences: 10 in 3 bins' in shown
    assert shown.count("<tr") == 1 + 3


def test_a_histogram_of_nothing_is_drawn() -> None:
    assert "<rect" not in charts.histogram([0.0, 1.0], [0], "nothing")
