"""What FP8 means here: modes, block sizes, tensor names and configuration keys.

No tensors: the command process, the engines' hooks and the worker share it.
The numbers behind the names are kernels/reference.py.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from fp8ctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

RecipeName = Literal["ieee", "ue8m0"]
"""Arithmetic of scales and codes that a plan can ask for; kernels/recipes.py has what each is."""

RECIPE: Final[RecipeName] = "ieee"
SCALES: Final[dict[str, RecipeName]] = {"fp32": "ieee", "ue8m0": "ue8m0"}
"""What `--scale` takes: which FP32 numbers scales may be; with `ue8m0` powers of two alone."""
CODE_DTYPE = "F8_E4M3"  # as safetensors spells torch.float8_e4m3fn
SCALE_DTYPE = "F32"


class Mode(enum.Enum):
    """What shares a scale."""

    BLOCK = "block"
    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"


# What a checkpoint can be written in: neither engine reads per-channel scales
# under quant_method "fp8".
CHECKPOINT_MODES = (Mode.BLOCK, Mode.PER_TENSOR)


def parse_mode(text: str) -> Mode:
    """Return the mode of a checkpoint that `text` names.

    Raises:
        UsageError: it names none.
    """
    for mode in CHECKPOINT_MODES:
        if text == mode.value:
            return mode
    known = " or ".join(mode.value for mode in CHECKPOINT_MODES)
    raise UsageError(f"unknown mode {text!r}; expected {known}", hint="--mode block")


def parse_scale(text: str) -> RecipeName:
    """Return the recipe of the scales that `text` names.

    Raises:
        UsageError: it names none.
    """
    if text in SCALES:
        return SCALES[text]
    raise UsageError(
        f"unknown --scale {text!r}; expected {' or '.join(SCALES)}", hint="--scale fp32"
    )


def scale_word(recipe: RecipeName) -> str:
    """Return the word of `--scale` for a recipe."""
    return next(word for word, name in SCALES.items() if name == recipe)


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Sides of a block: n rows (outputs) by k columns (inputs) share a scale."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n},{self.k}"

    @property
    def label(self) -> str:
        """The block as people write it: `64x64`."""
        return f"{self.n}x{self.k}"

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the shape of the scales of a [N, K] weight."""
        return -(-shape[0] // self.n), -(-shape[1] // self.k)

    @classmethod
    def parse(cls, text: str) -> BlockSize:
        """Return the block that `text`, "N,K", names.

        Raises:
            UsageError: not two positive whole numbers.
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
            raise UsageError(
                f"--block-size {text!r} is not two numbers N,K", hint="--block-size 128,128"
            )
        n, k = (int(part) for part in parts)
        if n < 1 or k < 1:
            raise UsageError(f"--block-size {text!r} must be positive", hint="--block-size 128,128")
        return cls(n, k)


def scale_name(weight: str, mode: Mode) -> str:
    """Return the name of the scales of `weight` (`X.weight`).

    Block scales are `X.weight_scale_inv` (DeepSeek's name; the value multiplies
    codes), the others `X.weight_scale`.

    Raises:
        ValueError: the name does not end in `.weight`.
    """
    if not weight.endswith(".weight"):
        raise ValueError(f"{weight!r} does not end in '.weight'")
    return weight + ("_scale_inv" if mode is Mode.BLOCK else "_scale")


def scale_shape(shape: Sequence[int], mode: Mode, block: BlockSize | None) -> tuple[int, ...]:
    """Return the shape of the scales of a [N, K] weight.

    Raises:
        ValueError: block mode without a block.
    """
    if mode is Mode.PER_TENSOR:
        return (1,)
    if mode is Mode.PER_CHANNEL:
        return (shape[0], 1)
    if block is None:
        raise ValueError("block mode needs a block size")
    return block.grid(shape)


def quantization_config(
    mode: Mode,
    block: BlockSize | None,
    *,
    ignored_layers: Sequence[str] = (),
    not_converted: Sequence[str] = (),
) -> dict[str, object]:
    """Return the `quantization_config` of a checkpoint in this format.

    Args:
        mode: of the scales.
        block: in block mode.
        ignored_layers: full names as the engine spells them; the only such key
            that vLLM 0.9.1 and SGLang 0.4.8 read.
        not_converted: full names as the checkpoint spells them; transformers'
            key, which it matches as substrings.
    """
    config: dict[str, object] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    if mode is Mode.BLOCK:
        if block is None:
            raise ValueError("block mode needs a block size")
        config["weight_block_size"] = [block.n, block.k]
    config["modules_to_not_convert"] = list(not_converted)
    config["ignored_layers"] = list(ignored_layers)
    return config
