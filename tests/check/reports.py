"""A small plan, and what workers would report of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8ctl.held import Held, gather
from fp8ctl.kernels.digest import to_text

if TYPE_CHECKING:
    from collections.abc import Mapping

LAYER = "model.layers.0"
Q, OUT = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.o_proj.weight"
SCALE = f"{Q}_scale_inv"
NORM, ROUTER, HEAD = f"{LAYER}.input_layernorm.weight", f"{LAYER}.mlp.gate.weight", "lm_head.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 64),
    Q: (64, 64),
    OUT: (64, 64),
    NORM: (64,),
    ROUTER: (2, 64),
    HEAD: (40, 64),
}
#: Of scales, in blocks of 32x32.
GRID = (2, 2)


def shard(name: str, value: int, **changes: object) -> dict[str, object]:
    """Return the line of a whole tensor on one rank."""
    scales = name.endswith("scale_inv")
    dtype = "float32" if scales else "float8_e4m3fn" if "_proj.weight" in name else "bfloat16"
    shape = list(GRID if scales else SHAPES.get(name, (1,)))
    plain = {"name": name, "row": 0, "column": 0, "shape": shape, "dtype": dtype, "primary": True}
    return {**plain, "digest": to_text(value), **changes}


def rank(shards: list[dict[str, object]], number: int = 0) -> dict[str, Any]:
    """Return what one rank reports."""
    return {"rank": number, "pid": 1, "format": "checkpoint", "unfilled": {}, "tensors": shards}


def held_of(expected: Mapping[str, int]) -> dict[str, Held]:
    """Return what a server holds whose weights have these digests."""
    return gather([rank([shard(name, value) for name, value in expected.items()])])
