"""What a push must bring, by the plan of the model that this server serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ctl import formats
from fp8ctl.engines.hooks.refused import RefusedError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from fp8ctl.held import Held
    from fp8ctl.wire import Entry

CODES = "float8_e4m3fn"
SCALES = "float32"
_FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})
#: As safetensors spells what is not a float, and as torch does.
_TORCH = {"F8_E4M3": CODES, "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8"}
#: Tables that engines compute themselves; old checkpoints hold them.
_COMPUTED = ".rotary_emb.inv_freq"


class Tensor(NamedTuple):
    """One tensor that a push brings.

    Attributes:
        dtypes: any of these will do.
        quantized: it is codes or scales.
    """

    shape: tuple[int, ...]
    dtypes: frozenset[str]
    quantized: bool


class Expected:
    """All tensors of a plan by name; without a plan, any float under any name.

    Attributes:
        digest: of the plan; "" without one.
        tensors: by name.
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self.digest: str = manifest.get("digest", "")
        self.tensors: dict[str, Tensor] = {}
        if not manifest:
            return
        mode = formats.Mode(manifest["mode"])
        sides = manifest.get("block_size")
        block = formats.BlockSize(*sides) if sides else None
        for t in manifest["tensors"]:
            shape = tuple(t["shape"])
            if t["quantize"]:
                self.tensors[t["name"]] = Tensor(shape, frozenset({CODES}), True)
                scales = formats.scale_shape(shape, mode, block)
                name = formats.scale_name(t["name"], mode)
                self.tensors[name] = Tensor(scales, frozenset({SCALES}), True)
            else:
                other = _TORCH.get(t["dtype"])
                dtypes = frozenset({other}) if other else _FLOATS
                self.tensors[t["name"]] = Tensor(shape, dtypes, False)

    def check(self, entries: Iterable[Entry], sent: Collection[str]) -> None:
        """Refuse a bucket that does not bring what the plan says.

        Args:
            entries: of the bucket.
            sent: names that this push has brought before.

        Raises:
            RefusedError: a name that the plan does not have or that came before, another shape or
                another dtype; it names the first and counts the rest.
        """
        wrong = [(e.name, why) for e in entries if (why := self._wrong(e, sent))]
        if wrong:
            name, why = wrong[0]
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            names = [name for name, _ in wrong]
            data: dict[str, object] = {"names": names[:20], "count": len(wrong)}
            raise RefusedError(422, "FP8-TENSOR", f"{name}: {why}{more}", data=data)

    def _wrong(self, entry: Entry, sent: Collection[str]) -> str:
        if entry.name in sent:
            return "it was sent before in this update"
        if not self.tensors:
            return "" if entry.dtype in _FLOATS else f"dtype {entry.dtype}; expected a float"
        tensor = self.tensors.get(entry.name)
        if tensor is None:
            return "the server's plan has no such tensor"
        if entry.shape != tensor.shape:
            return f"shape {list(entry.shape)}; expected {list(tensor.shape)}"
        if entry.dtype not in tensor.dtypes:
            return f"dtype {entry.dtype}; expected {' or '.join(sorted(tensor.dtypes))}"
        return ""

    def missing(self, there: Collection[str]) -> list[str]:
        """Return the names of a complete set that are not in `there`, in the plan's order."""
        return [n for n in self.tensors if n not in there and not n.endswith(_COMPUTED)]

    def held_nowhere(self, names: Iterable[str], held: Mapping[str, Held]) -> set[str]:
        """Return those kept tensors that no rank holds: a head that is tied, a layer left out."""
        if any("#" in name for name in held):
            return set()  # a part of something fused that nobody has a name for
        return {n for n in names if n not in held and not self.tensors[n].quantized}
