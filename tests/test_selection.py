"""The user's rules: what they match, what wins, and what no engine would load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fp8ctl.errors import UsageError
from fp8ctl.formats import Mode
from fp8ctl.manifest import Plan
from fp8ctl.models import read_checkpoint
from fp8ctl.planning import plan_checkpoint
from fp8ctl.policy import Reason
from tests.public_models import Layout, dense, experts, save

if TYPE_CHECKING:
    from pathlib import Path

    from fp8ctl.models import Checkpoint

L = "model.layers."


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    plain = dense("llama", 256, 512, 3, (2, 2, 128), 640)
    return read_checkpoint(save(tmp_path / "dense", plain))


def plan(model: Checkpoint, *, keep: str | None = None, quantize: str | None = None) -> Plan:
    return plan_checkpoint(
        model,
        "sglang",
        Mode.BLOCK,
        keep=keep.split() if keep else (),
        quantize=quantize.split() if quantize else (),
    )


def kept(plan: Plan) -> set[str]:
    """Return the Linears that a rule keeps, without `model.layers.` and `.weight`."""
    return {
        t.name.removeprefix(L).removesuffix(".weight")
        for t in plan.tensors
        if t.reason is Reason.USER and not t.quantize
    }


MLP = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
DOWN = {f"{i}.mlp.down_proj" for i in range(3)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("model.layers.1.mlp.down_proj.weight", {"1.mlp.down_proj"}),
        ("model.layers.1.mlp.down_proj", {"1.mlp.down_proj"}),
        ("model.layers.1.mlp", {f"1.{name}" for name in MLP}),
        ("model.layers.*.mlp.down_proj", DOWN),
        ("*.down_proj.weight", DOWN),
        ("model.layers.[02].mlp.down_proj", {"0.mlp.down_proj", "2.mlp.down_proj"}),
        (r"re:model\.layers\.[12]\.mlp\.down_proj", {"1.mlp.down_proj", "2.mlp.down_proj"}),
        (r"re:.*\.down_proj\.weight", DOWN),
    ],
)
def test_names_modules_globs_and_expressions(
    model: Checkpoint, rule: str, expected: set[str]
) -> None:
    found = plan(model, keep=rule)
    assert kept(found) == expected
    ruled = [t for t in found.tensors if t.reason is Reason.USER]
    assert {t.why for t in ruled} == {f"user rule: keep {rule}"}


@pytest.mark.parametrize("rule", ["model.layers.1", "model.layers.1.mlp.gate_proj"])
def test_a_name_is_whole_components(model: Checkpoint, tmp_path: Path, rule: str) -> None:
    # Neither layer 10 nor gate_proj's neighbour is meant.
    more = read_checkpoint(save(tmp_path / "more", dense("llama", 256, 512, 11, (2, 2, 128), 640)))
    assert {name.split(".")[0] for name in kept(plan(more, keep=rule))} == {"1"}
    # A part of a word is no name, and an expression must match the whole of one.
    for part in ("model.layers.1.mlp.gat", "re:mlp", r"re:model\.layers\.1\.mlp\.gate"):
        with pytest.raises(UsageError, match="matches no tensor"):
            plan(model, keep=part)


@pytest.mark.parametrize(
    ("rule", "nearest"),
    [
        ("model.layers.2.mlp.dwn_proj", "model.layers.2.mlp.down_proj"),
        ("model.layers.2.mlp.down_proj.wieght", "model.layers.2.mlp.down_proj.weight"),
        ("lmhead", "lm_head"),
    ],
)
@pytest.mark.parametrize("option", ["keep", "quantize"])
def test_a_rule_that_matches_nothing_names_the_nearest(
    model: Checkpoint, rule: str, nearest: str, option: str
) -> None:
    with pytest.raises(UsageError, match="matches no tensor") as caught:
        plan(model, **{option: rule})
    assert nearest in caught.value.message
    assert caught.value.hint == f"--{option} {nearest}"


def test_what_a_pattern_that_matches_nothing_hints_at_does_match(model: Checkpoint) -> None:
    for rule in ("model.layers.*.mlp.dwn_proj", r"re:model\.layers\.\d\.mlp\.downproj"):
        with pytest.raises(UsageError) as caught:
            plan(model, keep=rule)
        assert caught.value.hint is not None
        hint = caught.value.hint.removeprefix("--keep ").strip("'")
        assert kept(plan(model, keep=hint)) >= {"0.mlp.down_proj"}


@pytest.mark.parametrize("rule", ["", "re:", "re:(", "re:[a"])
def test_a_rule_that_is_none(model: Checkpoint, rule: str) -> None:
    with pytest.raises(UsageError, match=r"empty|not a regular expression"):
        plan_checkpoint(model, "sglang", Mode.BLOCK, keep=[rule])


def test_an_exact_name_wins_over_a_glob_and_a_longer_over_a_shorter(model: Checkpoint) -> None:
    found = plan(model, keep="model.layers.*.mlp.* ", quantize="model.layers.1.mlp")
    assert kept(found) == {f"{i}.{name}" for i in (0, 2) for name in MLP}
    found = plan(model, keep="model.layers.1", quantize="model.layers.1.mlp")
    assert all(".self_attn." in name for name in kept(found))
    assert kept(found)


def test_equal_rules_that_contradict_each_other_are_refused(model: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"contradict each other about model\.layers\.0"):
        plan(model, keep="*.down_proj", quantize="model.layers.*.mlp.*")


@pytest.mark.parametrize(
    "rule",
    [
        "lm_head",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm",
        "model.layers.0.mlp.gate",
        "*norm*",
    ],
)
def test_what_no_engine_loads_in_fp8_cannot_be_asked_for(tmp_path: Path, rule: str) -> None:
    plain = dense("qwen3_moe", 256, 512, 1, (2, 2, 128), 640)
    shapes = {name: shape for name, shape in plain.shapes.items() if ".mlp." not in name}
    shapes |= dict(experts("model.layers.0.mlp", 4, 256, 128))
    moe = read_checkpoint(save(tmp_path / "moe", Layout(plain.config, shapes)))
    with pytest.raises(UsageError, match="cannot become FP8"):
        plan(moe, quantize=rule)
    # Beside others of the same rule it is passed over.
    assert all(
        t.quantize == (t.reason is Reason.LINEAR or t.reason is Reason.EXPERT)
        for t in plan(moe, quantize="model.layers.0").tensors
    )


def test_a_linear_that_no_family_names_can_be_asked_for(tmp_path: Path) -> None:
    plain = dense("llama", 256, 512, 1, (2, 2, 128), 640)
    shapes = {**plain.shapes, "model.layers.0.mixer.wide.weight": (384, 256)}
    model = read_checkpoint(save(tmp_path / "new", Layout(plain.config, shapes)))
    name = "model.layers.0.mixer.wide.weight"
    assert not next(t for t in plan(model).tensors if t.name == name).quantize
    found = next(t for t in plan(model, quantize="*.wide").tensors if t.name == name)
    assert (found.quantize, found.why) == (True, "user rule: quantize *.wide")


def test_rules_are_in_the_manifest_and_read_back(model: Checkpoint) -> None:
    found = plan(model, keep="model.layers.0.mlp *.o_proj")
    assert Plan.from_json(found.to_json()) == found
    assert found.keep == ("model.layers.0.mlp", "*.o_proj")
    assert found.digest != plan(model).digest
    config = found.quantization_config()
    spelled = {"model.layers.0.mlp.gate_up_proj", "model.layers.2.self_attn.o_proj", "lm_head"}
    assert spelled <= set(config["ignored_layers"])  # type: ignore[call-overload]
