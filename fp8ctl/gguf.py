"""A GGUF file as a Hugging Face checkpoint in BF16.

Runs in an interpreter with transformers, gguf and torch (the worker, in an
engine's environment). Used for the demo model, whose package holds a GGUF.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8ctl.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def convert(gguf: Path, out: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Write model and tokenizer of `gguf` to the folder `out`, which must not exist yet.

    Raises:
        UnsupportedError: this interpreter lacks transformers or gguf.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        raise UnsupportedError(
            f"reading {gguf.name} needs transformers and gguf: {e}",
            hint="fp8ctl install sglang",
        ) from e
    folder, name = str(gguf.parent), gguf.name
    progress(0, 3)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    progress(1, 3)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, torch_dtype=torch.bfloat16)
    progress(2, 3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers takes the GGUF for the tokenizer's vocabulary file and copies all of it.
    (out / "tokenizer.model").unlink(missing_ok=True)
    progress(3, 3)
    return {"parameters": sum(p.numel() for p in model.parameters())}
