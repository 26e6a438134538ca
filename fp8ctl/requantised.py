"""What stock engines make of a per-tensor checkpoint: one scale for all that they fuse.

Without the patch `refit` both engines give the parts of a fused module, and w1 and w3 of an
expert, the largest of their scales, and quantise the codes anew, by way of FP16
(`requantize_with_max_scale`: vLLM 0.9.1 w8a8_utils.py:101, SGLang 0.4.8 quantization/utils.py:94;
experts: fp8.py:840). A Linear that stands alone goes the same way with its own scale. What is fused
on disk already, and w2 of experts, stays. Runs where torch is, called by `worker`; Python 3.10.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from fp8ctl import checkpoint, formats, models, reading
from fp8ctl.kernels import digest as digests
from fp8ctl.kernels.recipes import FP8_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.checkpoint import Progress
    from fp8ctl.manifest import Plan

#: Last names of modules that the engines build as one, beside each other.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    **dict.fromkeys(("w1", "w3"), "w13"),
}
_ON_DISK = frozenset({"qkv_proj", "gate_up_proj"})


def expected_digests(
    plan: Plan,
    progress: Progress | None = None,
    quality: dict[str, dict[str, float]] | None = None,
) -> dict[str, list[int]]:
    """Return of every tensor the digests that would be right: divided, and by the inverse.

    Args:
        plan: per tensor, of the server.
        progress: as of `checkpoint.expected_digests`.
        quality: as there, of what the checkpoint holds.
    """
    found: dict[str, list[int]] = {}
    source = models.read_checkpoint(plan.model)
    checkpoint.require_planned(source, plan)
    sizes: dict[str, int] = {}
    for one in plan.quantized:
        group = _group(one.name)
        sizes[group] = sizes.get(group, 0) + 1
    waiting: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    make = checkpoint.making(plan, measured=quality is not None)
    with contextlib.closing(reading.each(source, plan, make, progress)) as several:
        for planned, (made, measured) in several:
            if not planned.quantize:
                found[planned.name] = [digests.digest(made[planned.name])]
                continue
            if quality is not None and measured is not None:
                quality[planned.name] = measured
            group = _group(planned.name)
            parts = waiting.setdefault(group, {})
            codes, scale = made.values()
            parts[planned.name] = (codes, scale)
            if len(parts) == sizes[group]:
                for name, (several_codes, shared) in share(waiting.pop(group)).items():
                    found[name] = [digests.digest(one) for one in several_codes]
                    found[formats.scale_name(name, plan.mode)] = [digests.digest(shared)]
    return found


def share(
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, tuple[Sequence[torch.Tensor], torch.Tensor]]:
    """Return of each part its codes under the largest scale, as they may be rounded, and the scale.

    Args:
        parts: by name, codes and scale [1] of all that is fused.
    """
    # One that found no room on the GPU is on the CPU.
    device = next(iter(parts.values()))[0].device
    parts = {name: (c.to(device), s.to(device)) for name, (c, s) in parts.items()}
    largest = torch.stack([scale.reshape(()) for _, scale in parts.values()]).max()
    made: dict[str, tuple[Sequence[torch.Tensor], torch.Tensor]] = {}
    for name, (codes, scale) in parts.items():
        last = name.split(".")[-2]
        if last in _ON_DISK or (".experts." in name and last not in _FUSED):
            made[name] = ([codes], scale)
            continue
        # A scale without sides takes the type of what it multiplies: it is rounded to FP16.
        back = (codes.to(torch.float16) * scale.reshape(())).float()
        several = [back / largest, back * largest.reciprocal()]
        made[name] = (
            [one.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn) for one in several],
            largest.reshape(1),
        )
    return made


def _group(name: str) -> str:
    """Return what a weight is fused into; the weight itself where it stands alone."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{_FUSED[last]}" if last in _FUSED else name
