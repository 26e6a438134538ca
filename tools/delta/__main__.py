"""Train a Llama on text and count what each step changes in its FP8 form.

    python -m tools.delta MODEL TEXT... [--steps 20] [--lr 1e-6] [--tokens 512] [--threads 1]
                          [--spread]

Prints one JSON document. Master weights and Adam in FP32, arithmetic in BF16 (autocast), as
RL trainers have it. Compared is each step's form with that of the step before: a tensor
(codes and scales), a block (its codes and its scale), a code. `bf16` rounds the master weights
to BF16 before they are quantised, which is what trainers send; `fp32` quantises them as they
are. A BF16 checkpoint begins on the grid of BF16, where a first small step moves no large
weight off its place; --spread puts every master weight at random within half a step of that
grid, as they lie after some hundred steps. MODEL: SmolLM2, or another plain Llama. Needs torch
and, for its tokenizer, transformers: the managed engine's interpreter has both, and wants the
repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from examples import llama
from fp8ctl import policy
from fp8ctl.kernels import quantize as kernels
from fp8ctl.kernels.groups import PER_TENSOR, Groups, block

FORMS = {"block 64x64": block(64, 64), "block 128x128": block(128, 128), "per-tensor": PER_TENSOR}
Form = dict[str, tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    from transformers import AutoTokenizer

    asked = _arguments()
    torch.set_num_threads(asked.threads)
    folder = Path(asked.model)
    text = "\n".join(Path(path).read_text(encoding="utf-8") for path in asked.text)
    ids = torch.tensor(AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"])
    model = llama.load(folder)
    adam = torch.optim.Adam(model.parameters(), lr=asked.lr)
    family = policy.family_of({"model_type": "llama"})
    quantized = {
        n for n, p in model.named_parameters() if policy.decide(family, n, p.shape).quantize
    }
    if asked.spread:
        spread(model)
    before = snapshot(model, quantized)
    steps = []
    for step in range(asked.steps):
        began = time.perf_counter()
        at = step * asked.tokens % (len(ids) - asked.tokens - 1)
        batch = ids[at : at + asked.tokens + 1][None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = -llama.log_probabilities(model(batch), batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        after = snapshot(model, quantized)
        steps.append({"step": step + 1, "loss": round(loss.item(), 4), **changes(before, after)})
        before = after
        seconds = time.perf_counter() - began
        print(json.dumps(steps[-1]), f"{seconds:.1f} s", file=sys.stderr, flush=True)
    document = {
        "model": folder.name,
        "lr": asked.lr,
        "tokens": asked.tokens,
        "quantized_tensors": len(quantized),
        "mean": mean(steps),
        "steps": steps,
    }
    print(json.dumps(document, indent=1))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python -m tools.delta")
    parser.add_argument("model")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--spread", action="store_true")
    return parser.parse_args()


@torch.no_grad()
def snapshot(model: torch.nn.Module, quantized: set[str]) -> dict[str, Form]:
    """Return the FP8 forms of the weights now, and their BF16 form as `kept`."""
    found: dict[str, Form] = defaultdict(dict)
    for name, weight in model.named_parameters():
        rounded = weight.bfloat16()
        found["16 bits"][name] = rounded, torch.empty(0)
        if name in quantized:
            for label, groups in FORMS.items():
                found[f"{label} of bf16"][name] = kernels.quantize(rounded, groups)
                found[f"{label} of fp32"][name] = kernels.quantize(weight.detach(), groups)
    return dict(found)


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Move every weight at random within what rounds to the same BF16 number."""
    noise = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        exponent = torch.frexp(weight).exponent
        # 0.5 <= mantissa < 1 and 8 bits of it: neighbours are 2^(exponent - 8) apart.
        half = torch.ldexp(torch.ones_like(weight), exponent - 9)
        weight.add_((torch.rand(weight.shape, generator=noise) * 2 - 1) * half)


def changes(before: dict[str, Form], after: dict[str, Form]) -> dict[str, dict[str, float]]:
    """Return of each form the fractions that did not change."""
    return {label: unchanged(label, before[label], after[label]) for label in after}


def unchanged(label: str, old: Form, new: Form) -> dict[str, float]:
    """Return the fractions of tensors, blocks, scales and values that are the same."""
    groups = next((g for name, g in FORMS.items() if label.startswith(name)), None)
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def count(what: str, same: int, of: int) -> None:
        totals[what][0] += same
        totals[what][1] += of

    for name, (codes, scales) in new.items():
        was, was_scales = old[name]
        same = codes.view(BITS[codes.itemsize]) == was.view(BITS[codes.itemsize])
        same_scales = scales == was_scales
        whole = bool(same.all()) and bool(same_scales.all())
        count("tensors", whole, 1)
        count("bytes", codes.nbytes + scales.nbytes if whole else 0, codes.nbytes + scales.nbytes)
        count("values", int(same.sum()), same.numel())
        if groups is None:
            continue
        count("scales", int(same_scales.sum()), scales.numel())
        if groups.kind == "block":
            both = of_blocks(same, groups) & same_scales
            count("blocks", int(both.sum()), both.numel())
    return {what: same / of for what, (same, of) in totals.items()}


def of_blocks(same: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return whether all of a block is the same, for each block."""
    rows, columns = groups.sides
    n, k = groups.grid((same.shape[0], same.shape[1]))
    beside = (0, k * columns - same.shape[1], 0, n * rows - same.shape[0])
    padded = torch.nn.functional.pad(same, beside, value=True)
    return padded.view(n, rows, k, columns).all(3).all(1)


BITS = {1: torch.uint8, 2: torch.int16}


def mean(steps: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean over all steps."""
    labels = [key for key in steps[0] if isinstance(steps[0][key], dict)]
    return {
        label: {
            what: round(sum(step[label][what] for step in steps) / len(steps), 6)
            for what in steps[0][label]
        }
        for label in labels
    }


if __name__ == "__main__":
    main()
