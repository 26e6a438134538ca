"""How many bytes of weights one GPU holds, and of KV cache for each token.

Cut as both engines cut: column-parallel rows, row-parallel columns, the vocabulary
in parts of whole 64 rows; all else is whole on every GPU. Pure. Called by `planning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fp8ctl import formats, models
from fp8ctl.fitting import Heads, Linear, rows_per_rank
from fp8ctl.manifest import Memory
from fp8ctl.policy import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.families import Role
    from fp8ctl.formats import BlockSize, Mode
    from fp8ctl.models import TensorInfo
    from fp8ctl.policy import Decision
    from fp8ctl.survey import Survey

_SERVED_BYTES = 2
"""Of a float that stays: engines serve BF16 or FP16, also from an FP32 checkpoint."""
_VOCABULARY_PART = 64


class Sizer:
    """Adds up a model; of tensors that are alike one is asked for."""

    def __init__(
        self,
        config: Mapping[str, Any],
        mode: Mode,
        block: BlockSize | None,
        tp: int,
    ) -> None:
        """Prepare for a model.

        Args:
            config: config.json.
            mode: of the scales.
            block: in block mode.
            tp: tensor-parallel size.
        """
        text = config.get("text_config")
        source = text if isinstance(text, Mapping) else config
        layers = source.get("num_hidden_layers")
        ahead = source.get("num_nextn_predict_layers")
        self._ahead: tuple[str, ...] = ()
        if isinstance(layers, int):
            count = ahead if isinstance(ahead, int) else 1
            self._ahead = tuple(f".layers.{layers + i}." for i in range(count))
        self.heads = Heads.of(config)
        self.mode, self.block, self.tp = mode, block, tp

    def memory(self, seen: Survey) -> Memory:
        """Return the bytes of one GPU."""
        before = after = cache = 0
        counted = [(kind.first, kind.decision, kind.number) for kind in seen.kinds]
        for info, decision, count in (*counted, *self._not_loaded(seen)):
            sizes = self._sizes(info, decision)
            before += count * sizes[0]
            after += count * sizes[1]
            cache += count * sizes[2]
        return Memory(before, after, cache)

    def _not_loaded(self, seen: Survey) -> Iterator[tuple[TensorInfo, Decision, int]]:
        """Yield -1 times each tensor of layers for multi-token prediction: engines load none."""
        ahead = {name for part in self._ahead for name in seen.decisions if part in name}
        ahead |= {name for name in seen.decisions if name.startswith("mtp.")}
        for name in ahead:
            decision = seen.decisions[name]
            if decision.reason is not Reason.VISION:
                yield seen.checkpoint.tensors[name], decision, -1

    def _sizes(self, info: TensorInfo, decision: Decision) -> tuple[int, int, int]:
        name, shape, dtype, role = info.name, info.shape, info.dtype, decision.role
        each = models.DTYPE_BYTES[dtype]
        if dtype.startswith(("F", "BF")):
            each = min(each, _SERVED_BYTES)
        count = 1
        for side in shape:
            count *= side
        if role is None or len(shape) != 2:
            if decision.reason in (Reason.EMBEDDING, Reason.LM_HEAD) and len(shape) == 2:
                padded = -(-shape[0] // _VOCABULARY_PART) * _VOCABULARY_PART
                count = -(-padded // self.tp) * shape[1]
            return count * each, count * each, 0
        local = (_rows(name, (shape[0], shape[1]), role, self.heads, self.tp), shape[1])
        if role.split == "row":
            local = (local[0], -(-shape[1] // self.tp))
        before = local[0] * local[1] * each
        after = before
        if decision.quantize:
            scales = 1
            for side in formats.scale_shape(local, self.mode, self.block):
                scales *= side
            after = local[0] * local[1] + 4 * scales
        cache = 0
        if role.part == "kv_b":
            # Both engines hold it a second time, taken apart, in 16 bits.
            before += local[0] * local[1] * _SERVED_BYTES
            after += local[0] * local[1] * _SERVED_BYTES
        elif role.part == "kv_a":
            cache = shape[0] * _SERVED_BYTES
        elif role.fused == "qkv_proj" and role.part in ("k", "v"):
            cache = local[0] * _SERVED_BYTES
        elif role.part == "q+k+v":
            q = self.heads.query * self.heads.size
            cache = max(0, local[0] - q // self.tp) * _SERVED_BYTES
        return before, after, cache


def _rows(name: str, shape: tuple[int, int], role: Role, heads: Heads, tp: int) -> int:
    """Return the rows on one GPU; of what does not divide, the larger share."""
    if role.split != "column":
        return shape[0]
    ranks = rows_per_rank(Linear(name, 1, shape, role), heads, tp)
    return -(-shape[0] // tp) if ranks is None else sum(ranks)
