"""What engines say of themselves, and what of it may be shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fp8ctl.check import words

BLOCKS: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("info", "config", "word", "is_16_bit"),
    [
        pytest.param({}, None, None, False, id="nothing asked, folder not visible"),
        pytest.param({}, {}, "none: a 16-bit checkpoint", True, id="16 bits"),
        pytest.param({"quantization": "fp8"}, None, "fp8, by argument", False, id="remote"),
        pytest.param({"quantization": "fp8"}, {}, "fp8, quantised at load", False, id="online"),
        pytest.param({"torchao_config": "int8wo"}, {}, "torchao int8wo", False, id="torchao"),
        pytest.param(
            {"quantization": "fp8", "quantization_config": BLOCKS},
            {},
            "fp8 in blocks of 128x128, put over",
            False,
            id="override",
        ),
        pytest.param(
            {}, {"quantization_config": BLOCKS}, "from the checkpoint", False, id="checkpoint"
        ),
    ],
)
def test_the_word_of_sglang(
    info: dict[str, Any], config: dict[str, Any] | None, word: str | None, is_16_bit: bool
) -> None:
    own = info.pop("quantization_config", None)
    override = json.dumps({"quantization_config": own}) if own else "{}"
    found, plain = words.sglang_word({**info, "json_model_override_args": override}, config)
    assert plain is is_16_bit
    assert (found is None) if word is None else (found is not None and word in found)


def test_the_word_of_vllm_is_read_from_its_server_info() -> None:
    text = '{"vllm_config": "model=\'m\', quantization=fp8, enforce_eager=False"}'
    assert words.vllm_word(200, text) == "fp8, by the engine's config"
    assert words.vllm_word(200, text.replace("fp8", "None")) is None
    assert words.vllm_word(404, text) is None


def test_only_arguments_of_the_list_are_shown() -> None:
    info = {
        "api_key": "s3cret",
        "ssl_keyfile_password": "s3cret",
        "tp_size": 2,
        "torchao_config": "",
        "json_model_override_args": "{}",
        "dtype": "auto",
        "quantization": None,
        "internal_states": [{"api_key": "s3cret"}],
    }
    assert words.arguments(info) == {"tp_size": 2, "dtype": "auto"}
    assert not [name for name in words.ARGUMENTS if "key" in name or "token" in name.split("_")]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "only a server that fp8ctl started"),
        ({"engine": "sglang"}, "an earlier one"),
        ({"engine": "sglang", "plan": None}, "the engine quantises by itself"),
    ],
)
def test_a_server_without_a_mode_says_why(told: dict[str, object], said: str) -> None:
    assert words.mode(told) is None
    assert said in words.modeless(told)


def test_a_plan_of_whole_tensors_has_no_block() -> None:
    plan = {"mode": "per-tensor", "block_size": None, "recipe": "ieee", "digest": None}
    assert words.mode({"plan": plan}) == "per-tensor, ieee"


def test_versions_of_a_stock_server_are_its_engines_alone() -> None:
    assert words.versions("vllm 0.9.1", {}) == "vllm 0.9.1"
    assert words.versions(None, {}) is None
    told = {"engine": "vllm", "engine_version": "0.9.1", "device": "cuda", "torch": None}
    assert words.versions(None, told) == "vllm 0.9.1 on cuda"
