"""Names, shapes and configuration keys are those that the engines read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ctl.errors import UsageError
from fp8ctl.formats import (
    SCALES,
    BlockSize,
    Mode,
    parse_mode,
    parse_scale,
    quantization_config,
    scale_name,
    scale_shape,
    scale_word,
)
from fp8ctl.kernels import recipes


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_block_reads_back_what_it_prints(n: int, k: int) -> None:
    assert BlockSize.parse(str(BlockSize(n, k))) == BlockSize(n, k)


@pytest.mark.parametrize(
    "text", ["", "128", "128,", "128x128", "0,128", "-1,128", "1,2,3", "a,b", "1.0,2", "²,2"]
)
def test_what_is_no_block_is_refused_with_the_value(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        BlockSize.parse(text)
    assert repr(text) in caught.value.message
    assert caught.value.hint == "--block-size 128,128"


def test_modes_of_a_checkpoint_are_two() -> None:
    assert parse_mode("block") is Mode.BLOCK
    assert parse_mode("per-tensor") is Mode.PER_TENSOR
    for text in ("per-channel", "online", "Block", ""):
        with pytest.raises(UsageError, match="expected block or per-tensor"):
            parse_mode(text)


def test_scales_that_can_be_asked_for_have_recipes_of_the_kernels() -> None:
    assert [parse_scale(word) for word in SCALES] == ["ieee", "ue8m0"]
    for word, recipe in SCALES.items():
        assert scale_word(recipe) == word
        assert recipes.named(recipe).name == recipe
    for text in ("ieee", "UE8M0", ""):
        with pytest.raises(UsageError, match=f"--scale {text!r}; expected fp32 or ue8m0"):
            parse_scale(text)


def test_scales_are_named_and_shaped_as_engines_read_them() -> None:
    block = BlockSize(128, 64)
    assert scale_name("a.weight", Mode.BLOCK) == "a.weight_scale_inv"
    assert scale_name("a.weight", Mode.PER_TENSOR) == "a.weight_scale"
    assert scale_shape((129, 64), Mode.BLOCK, block) == (2, 1)
    assert scale_shape((129, 64), Mode.PER_TENSOR, None) == (1,)
    assert scale_shape((129, 64), Mode.PER_CHANNEL, None) == (129, 1)
    with pytest.raises(ValueError, match=r"\.weight"):
        scale_name("a.bias", Mode.BLOCK)
    with pytest.raises(ValueError, match="block"):
        scale_shape((1, 1), Mode.BLOCK, None)


def test_the_configuration_has_both_lists_and_a_block_in_block_mode_only() -> None:
    common = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    lists = {"modules_to_not_convert": ["lm_head"], "ignored_layers": ["x.qkv_proj"]}
    names = {"not_converted": ["lm_head"], "ignored_layers": ["x.qkv_proj"]}
    assert quantization_config(Mode.BLOCK, BlockSize(64, 32), **names) == {
        **common,
        "weight_block_size": [64, 32],
        **lists,
    }
    assert quantization_config(Mode.PER_TENSOR, None, **names) == {**common, **lists}
