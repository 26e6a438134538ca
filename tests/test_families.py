"""What families say about the engines, held against the engines' released sources."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

from fp8ctl.families import FAMILIES, UNKNOWN, family_named, family_of, guessed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fp8ctl.families import Backend

# Family: the class that config.json names, and the module that has its Linears in each engine.
CLASSES = {
    "Llama": ("LlamaForCausalLM", "llama", "llama"),
    "Mistral": ("MistralForCausalLM", "llama", "llama"),
    "Qwen2": ("Qwen2ForCausalLM", "qwen2", "qwen2"),
    "Qwen3": ("Qwen3ForCausalLM", "qwen3", "qwen3"),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", "qwen2_moe", "qwen2_moe"),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "qwen3_moe", "qwen3_moe"),
    "Qwen3-Next": ("Qwen3NextForCausalLM", "", ""),
    "Mixtral": ("MixtralForCausalLM", "mixtral", "mixtral"),
    "DeepSeek": ("DeepseekV3ForCausalLM", "deepseek_v2", "deepseek_v2"),
    "Gemma": ("GemmaForCausalLM", "gemma", "gemma"),
    "Gemma-2": ("Gemma2ForCausalLM", "gemma2", "gemma2"),
    "Gemma-3": ("Gemma3ForCausalLM", "gemma3", "gemma3_causal"),
    "Phi": ("PhiForCausalLM", "phi", ""),
    "Phi-3": ("Phi3ForCausalLM", "phi3", "llama"),
    "GLM": ("GlmForCausalLM", "glm", ""),
    "GLM-4": ("Glm4ForCausalLM", "glm4", "glm4"),
    "GLM-4-MoE": ("Glm4MoeForCausalLM", "", ""),
}
MODELS = {
    "vllm": "vllm/model_executor/models",
    "sglang": "sglang/srt/models",
}
EACH = [(family.name, engine) for family in FAMILIES for engine in MODELS]


def test_families_are_told_by_one_model_type_each() -> None:
    assert set(CLASSES) == {family.name for family in FAMILIES}
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(set(kinds)) == len(kinds)
    for family in FAMILIES:
        assert family_named(family.name) is family
        assert all(family_of({"model_type": kind}) is family for kind in family.model_types)
    assert family_named("never heard of") is UNKNOWN


def test_a_linear_that_no_family_names_is_cut_by_its_last_name() -> None:
    assert guessed("down_proj").split == "row"
    assert guessed("c_attn").split == "column"


@pytest.fixture
def folder(engine_sources: Callable[[str], Path]) -> Callable[[Backend], Path]:
    return lambda engine: engine_sources(engine) / MODELS[engine]


@pytest.mark.wheels
@pytest.mark.parametrize(("name", "engine"), EACH)
def test_an_engine_has_a_class_unless_it_is_missing(
    name: str, engine: Backend, folder: Callable[[Backend], Path]
) -> None:
    if engine == "vllm":
        registered = (folder(engine) / "registry.py").read_text()
        found = f'"{CLASSES[name][0]}"' in registered
    else:
        entries = [
            match
            for path in folder(engine).glob("*.py")
            for match in re.findall(r"^EntryClass = (.*?(?:\]|$))", path.read_text(), re.M | re.S)
        ]
        found = any(re.search(rf"\b{CLASSES[name][0]}\b", entry) for entry in entries)
    assert found is (engine not in family_named(name).missing)


def named(path: Path, pattern: str) -> list[bool]:
    """Say of each call of a name that matches whether it is given a prefix."""
    return [
        any(keyword.arg == "prefix" for keyword in node.keywords)
        or any(isinstance(one, ast.Name) and one.id == "prefix" for one in node.args)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and re.fullmatch(pattern, node.func.id)
    ]


@pytest.mark.wheels
@pytest.mark.parametrize(("name", "engine"), EACH)
def test_linears_have_names_unless_they_are_unnamed(
    name: str, engine: Backend, folder: Callable[[Backend], Path]
) -> None:
    family = family_named(name)
    module = CLASSES[name][1 if engine == "vllm" else 2]
    if not module or engine in family.missing:
        return
    path = folder(engine) / f"{module}.py"
    built = named(path, r"(Column|Row|QKV|MergedColumn)ParallelLinear")
    layers = named(path, r"\w+DecoderLayer")
    assert all((*built, *layers)) is (engine not in family.unnamed)


@pytest.mark.wheels
def test_vllm_is_told_the_parts_of_fused_modules_unless_unmapped(
    folder: Callable[[Backend], Path],
) -> None:
    for name, (_, module, _) in CLASSES.items():
        family = family_named(name)
        if module and "vllm" not in (*family.missing, *family.unnamed):
            text = (folder("vllm") / f"{module}.py").read_text()
            inherited = "class GlmForCausalLM(LlamaForCausalLM" in text
            mapped = "packed_modules_mapping" in text or inherited
            assert mapped is ("vllm" not in family.unmapped), name


@pytest.mark.wheels
def test_sglang_names_mixtral_s_layers_without_the_model(folder: Callable[[Backend], Path]) -> None:
    for name, (_, _, module) in CLASSES.items():
        if module:
            bare = 'prefix="layers"' in (folder("sglang") / f"{module}.py").read_text()
            assert bare is ("sglang" in family_named(name).bare_layers), name


@pytest.mark.wheels
def test_neither_engine_cuts_the_block_scales_of_parts_fused_on_disk(
    engine_sources: Callable[[str], Path],
) -> None:
    for path in ("vllm/model_executor/layers/linear.py", "sglang/srt/layers/linear.py"):
        text = (engine_sources(path.split("/")[0]) / path).read_text()
        bodies = re.findall(
            r"    def _load_fused_module_from_checkpoint\(.*?\n(?=    def )", text, re.S
        )
        assert len(bodies) == 2  # of gate and up, of q, k and v
        for body in bodies:
            assert "narrow(" in body
            assert "BlockQuantScaleParameter" not in body
        # Positive control: parts that come one by one are cut in blocks.
        assert "isinstance(param, BlockQuantScaleParameter)" in text


@pytest.mark.wheels
def test_neither_engine_asks_about_ignored_layers_for_a_fused_moe(
    engine_sources: Callable[[str], Path],
) -> None:
    for path in (
        "vllm/model_executor/layers/quantization/fp8.py",
        "sglang/srt/layers/quantization/fp8.py",
    ):
        text = (engine_sources(path.split("/")[0]) / path).read_text()
        [body] = re.findall(r"    def get_quant_method\(.*?\n(?=    def |\nclass )", text, re.S)[:1]
        linear, moe = body.split("isinstance(layer, FusedMoE)")
        assert "is_layer_skipped" in linear
        assert "is_layer_skipped" not in moe
