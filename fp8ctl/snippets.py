"""What to paste into a trainer's configuration, a script or a shell, as text.

Pure. Each kind is spelled as the released sources and documents of its trainer or
engine spell it; where, stands at its function. Called by `settings`.
"""

from __future__ import annotations

import json
import pprint
import shlex
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from fp8ctl.errors import UnsupportedError, UsageError
from fp8ctl.formats import RECIPE, BlockSize, Mode, scale_word

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from fp8ctl.formats import RecipeName
    from fp8ctl.policy import Backend

_PUSHED = (
    "16-bit weights under an FP8 configuration: what it answers before the first complete",
    "FP8 update means nothing. `fp8ctl patch` makes updates possible; `fp8ctl launch",
    "--await-push` starts the same server and answers 503 until then.",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a snippet says.

    Attributes:
        model: the 16-bit checkpoint.
        config: the `quantization_config`.
        recipe: the arithmetic of scales and codes.
        flags, arguments, environment: of the engine, from `Settings`.
        quantized: names of the tensors that become FP8; empty where unknown.
    """

    backend: Backend
    model: str
    mode: Mode
    block: BlockSize | None
    recipe: RecipeName
    tp: int | None
    config: Mapping[str, object]
    flags: Sequence[str]
    arguments: Mapping[str, Any]
    environment: Mapping[str, str]
    quantized: Collection[str] = ()


def engine_of(kind: str, backend: Backend | None) -> Backend | None:
    """Return the engine of a kind: its own, or `backend` where it takes either.

    Raises:
        UsageError: no such kind, or one of the other engine.
    """
    if kind not in KINDS:
        raise UsageError(
            f"unknown snippet {kind!r}; there is {', '.join(KINDS)}", hint="--snippet verl"
        )
    own = kind.partition("-")[0]
    if own not in ("vllm", "sglang"):
        return backend
    if backend not in (None, own):
        raise UsageError(
            f"snippet {kind} is {own}'s, and {backend} was asked", hint=f"--backend {own}"
        )
    return cast("Backend", own)


def write(kind: str, facts: Facts) -> str:
    """Return the snippet of a kind; it ends in a newline.

    Raises:
        UnsupportedError: the trainer cannot do this mode or block.
    """
    return KINDS[kind](facts)


def _verl(facts: Facts) -> str:
    """verl since December 2025: docs/low_precision/fp8.md, verl/workers/config/rollout.py.

    Its block is written into the rollout workers; ignored layers of SGLang come from
    SGLANG_FP8_IGNORED_LAYERS (verl/utils/sglang/sglang_fp8_utils.py), compared by
    whole components of a name.
    """
    _require_128(facts, "verl's `quantization: fp8`", "--snippet verl-old")
    _require_ieee(facts, "verl")
    lines = ["# verl: weights stay in 16 bits in training, and become FP8 on their way to rollout."]
    ignored = _short_names(facts)
    if facts.backend == "sglang" and ignored:
        lines += [
            "# In the environment of the trainer, so that both sides keep what the plan keeps:",
            f"# export SGLANG_FP8_IGNORED_LAYERS={shlex.quote(','.join(ignored))}",
        ]
    return _rollout(facts, lines, "    quantization: fp8")


def _verl_old(facts: Facts) -> str:
    """verl until November 2025: docs/advance/fp8.md of that time."""
    _require_128(facts, "verl's `use_block_quant_rollout`", None)
    _require_ieee(facts, "verl")
    lines = [
        "# verl until November 2025, with two switches: FP8 at all, and blocks of 128x128",
        "# (false: one scale per tensor).",
    ]
    block = "true" if facts.mode is Mode.BLOCK else "false"
    return _rollout(facts, lines, "    quantization: true", f"    use_block_quant_rollout: {block}")


def _rollout(facts: Facts, comment: Sequence[str], *keys: str) -> str:
    lines = [*comment, "actor_rollout_ref:", "  rollout:", f"    name: {facts.backend}", *keys]
    if facts.tp is not None:
        lines.append(f"    tensor_model_parallel_size: {facts.tp}")
    return "\n".join(lines) + "\n"


def _areal(facts: Facts) -> str:
    """AReaL: the fields of areal-project/AReaL#1378, as subclasses with them.

    `build_args` of areal/api/cli_args.py makes a flag of every field of the dataclass,
    so a field more is an argument of the server more; it says `load_format="auto"` itself.
    """
    _require_ieee(facts, "AReaL")
    ours = "SGLangConfig" if facts.backend == "sglang" else "vLLMConfig"
    name = "json_model_override_args" if facts.backend == "sglang" else "hf_overrides"
    return _lines(
        *_comment("AReaL: the configuration of the server, and what weight updates carry.", ""),
        "import copy",
        "import json",
        "from dataclasses import dataclass, field",
        "",
        f"from areal.api.cli_args import {ours}",
        "from areal.api.io_struct import WeightUpdateMeta",
        "",
        f"QUANTIZATION_CONFIG = {_python(dict(facts.config))}",
        "",
        "",
        "@dataclass",
        f"class Fp8{ours[0].upper()}{ours[1:]}({ours}):",
        '    quantization: str = "fp8"',
        f'    {name}: str = json.dumps({{"quantization_config": QUANTIZATION_CONFIG}})',
        "",
        "",
        "@dataclass",
        "class Fp8WeightUpdateMeta(WeightUpdateMeta):",
        '    quantization: str | None = "fp8"',
        "    quantization_config: dict | None = field(",
        "        default_factory=lambda: copy.deepcopy(QUANTIZATION_CONFIG)",
        "    )",
    )


def _vllm(facts: Facts) -> str:
    """vLLM 0.9.1: `vllm serve MODEL`, entrypoints/cli/serve.py."""
    return _shell(facts, ["vllm", "serve", facts.model])


def _sglang(facts: Facts) -> str:
    """SGLang 0.4.8: launch_server.py."""
    return _shell(facts, ["python", "-m", "sglang.launch_server", "--model-path", facts.model])


def _vllm_python(facts: Facts) -> str:
    """vLLM 0.9.1: `LLM`, entrypoints/llm.py; `AsyncEngineArgs` takes the same."""
    return _script(facts, "from vllm import LLM", "llm = LLM", "model")


def _sglang_python(facts: Facts) -> str:
    """SGLang 0.4.8: `Engine`, srt/entrypoints/engine.py; `ServerArgs` takes the same."""
    return _script(facts, "from sglang import Engine", "engine = Engine", "model_path")


KINDS: Final[dict[str, Callable[[Facts], str]]] = {
    "verl": _verl,
    "verl-old": _verl_old,
    "areal": _areal,
    "vllm": _vllm,
    "vllm-python": _vllm_python,
    "sglang": _sglang,
    "sglang-python": _sglang_python,
}
"""What `--snippet` takes."""


def _shell(facts: Facts, command: Sequence[str]) -> str:
    """Return a command line, an option and its value in a line."""
    lines = ["env", *(f"{name}={shlex.quote(v)}" for name, v in facts.environment.items())]
    lines.append(shlex.join(command))
    for word in facts.flags:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return _lines(*_comment(*_PUSHED), " \\\n  ".join(lines))


def _script(facts: Facts, import_: str, call: str, model: str) -> str:
    """Return a script; the processes that engines start import it once more."""
    body = [f"os.environ[{_python(k)}] = {_python(v)}" for k, v in facts.environment.items()]
    body += [import_, "", f"{call}("]
    for name, value in {model: facts.model, **facts.arguments}.items():
        text = _python(value)
        if name == "json_model_override_args":
            text = f"json.dumps(\n{textwrap.indent(_python(json.loads(value)), '    ')}\n)"
        body.append(textwrap.indent(f"{name}={text},", "    "))
    body.append(")")
    imports = ["import json"] * ("json_model_override_args" in facts.arguments) + ["import os"]
    return _lines(
        *_comment(*_PUSHED),
        *imports,
        "",
        'if __name__ == "__main__":',
        textwrap.indent("\n".join(body), "    "),
    )


def _python(value: object) -> str:
    """Return a value as Python source: strings in double quotes, long values in several lines."""
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, dict):
        items = [f"{_python(k)}: {_python(v)}," for k, v in value.items()]
        return "{\n" + textwrap.indent("\n".join(items), "    ") + "\n}"
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        if len(value) == 1:
            return f"[{_python(value[0])}]"
        items = [f"{_python(item)}," for item in value]
        return "[\n" + textwrap.indent("\n".join(items), "    ") + "\n]"
    return pprint.pformat(value)


def _quoted(text: str) -> str:
    """Return a string literal, in double quotes unless it holds some."""
    literal = repr(text)
    return literal if '"' in text or "'" in text or "\\" in literal else f'"{text}"'


def _comment(*lines: str) -> list[str]:
    return [f"# {line}" if line else "" for line in lines]


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def _require_128(facts: Facts, what: str, instead: str | None) -> None:
    """Refuse what the trainer's switch cannot say.

    Raises:
        UnsupportedError: other blocks than 128x128, or one scale per tensor where it has blocks.
    """
    if facts.block == BlockSize(128, 128) or (facts.mode is Mode.PER_TENSOR and instead is None):
        return
    form = facts.mode.value if facts.block is None else f"blocks of {facts.block.label}"
    raise UnsupportedError(
        f"{what} makes blocks of 128x128 and no others; the plan is {form}",
        hint=instead if instead and facts.mode is Mode.PER_TENSOR else "--block-size 128,128",
    )


def _require_ieee(facts: Facts, who: str) -> None:
    """Refuse a plan whose scales the trainer, which quantises itself, does not make.

    Raises:
        UnsupportedError: powers of two.
    """
    if facts.recipe != RECIPE:
        raise UnsupportedError(
            f"{who} quantises itself, with scales that are any FP32 number; the plan says"
            f" --scale {scale_word(facts.recipe)}",
            hint=f"--scale {scale_word(RECIPE)}",
        )


def _short_names(facts: Facts) -> list[str]:
    """Return the kept modules without their layer's number, where that names no other module.

    `mlp.gate` for the routers of 48 layers; the output head is left out, which every
    trainer keeps.
    """
    quantized = {f".{_inside(name.removesuffix('.weight'))}." for name in facts.quantized}
    found: dict[str, None] = {}
    for module in cast("Sequence[str]", facts.config["modules_to_not_convert"]):
        if module == "lm_head":
            continue
        short = _inside(module)
        clash = any(f".{short}." in name for name in quantized)
        found[module if clash else short] = None
    return list(found)


def _inside(module: str) -> str:
    """Return the path of a module behind the number of its layer."""
    parts = module.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[0] + 1 :]) if numbered else module
