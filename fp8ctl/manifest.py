"""The plan of a model as data: what planning makes and quantize, launch and check follow.

Made purely from config.json and headers, printed, written as JSON, read back
unchanged. The digest covers everything but where the model lies, so the same
plan for a copied folder is the same plan.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ctl import formats, models, policy
from fp8ctl.errors import NotFoundError, UsageError
from fp8ctl.families import Backend, family_named
from fp8ctl.formats import BlockSize, Mode, RecipeName
from fp8ctl.policy import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCHEMA = 3
RECORD = "fp8ctl.json"  # in a checkpoint that fp8ctl wrote: its plan and recipe

_AGAIN = "fp8ctl plan --model MODEL --backend BACKEND --out plan.json"


class PlannedTensor(NamedTuple):
    """One tensor of the source checkpoint and what becomes of it.

    A tuple for the same reason as `models.TensorInfo`.

    Attributes:
        rule: the user's rule, where the reason is one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantize: bool
    reason: Reason
    rule: str = ""

    @property
    def why(self) -> str:
        """The reason, with the user's rule where there is one."""
        return f"{self.reason.value}: {self.rule}" if self.rule else self.reason.value

    @property
    def bytes_before(self) -> int:
        """Bytes in the source."""
        return _count(self.shape) * models.DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule of the engine that the plan breaks.

    Attributes:
        rule: short identifier: `merged-n`, `column-n`, `row-k`, `group-k`, `expert-n`, `tp`,
            `fused-on-disk`, `kernel-128`, `fused`, `experts`, `ignored`.
        tensor: the first tensor that breaks it.
        count: how many do, in the same way.
        message: one sentence with the value found and the value expected.
    """

    rule: str
    tensor: str
    count: int
    message: str


@dataclass(frozen=True, slots=True)
class Memory:
    """What one GPU holds, in bytes.

    Attributes:
        before: weights as they are in the source.
        after: weights and scales as planned.
        cache_per_token: KV cache in 16 bits.
    """

    before: int = 0
    after: int = 0
    cache_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is quantised, in which format, for which engine, and whether that fits.

    Attributes:
        model: folder of the source.
        family: architecture, or "unknown".
        backend: the engine whose rules were applied; None for both.
        block: in block mode.
        gpu: compute capability of the GPU whose kernels were asked about; None: of none.
        keep, quantize: the user's rules, as typed.
        recipe: the arithmetic of scales and codes.
        memory: of one GPU.
        rejected: blocks that were tried first, each with its problems.
        notes: what a user should know and no rule forbids.
    """

    model: Path
    model_type: str
    family: str
    backend: Backend | None
    mode: Mode
    tp: int
    block: BlockSize | None
    tensors: tuple[PlannedTensor, ...]
    problems: tuple[Problem, ...] = ()
    rejected: tuple[tuple[BlockSize, tuple[Problem, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    gpu: tuple[int, int] | None = None
    keep: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    memory: Memory = Memory()
    recipe: RecipeName = formats.RECIPE

    @property
    def fits(self) -> bool:
        """Whether no rule is broken."""
        return not self.problems

    @property
    def quantized(self) -> Iterator[PlannedTensor]:
        """The tensors that become FP8."""
        return (tensor for tensor in self.tensors if tensor.quantize)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan without the place of the model, in hexadecimal."""
        pairs = zip(self.tensors, self._shared(), strict=True)
        return _digest(self._head(), [f"{t.name!r} {line}" for t, (_, line) in pairs])

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(tensor.bytes_before for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the result, scales included."""
        return sum(self.bytes_of(tensor) for tensor in self.tensors)

    def bytes_of(self, tensor: PlannedTensor) -> int:
        """Return the bytes that `tensor` takes in the result, with its scales."""
        if not tensor.quantize:
            return tensor.bytes_before
        return _count(tensor.shape) + 4 * _count(self.scale_shape(tensor))

    def scale_shape(self, tensor: PlannedTensor) -> tuple[int, ...]:
        """Return the shape of the scales of a quantised tensor."""
        return formats.scale_shape(tensor.shape, self.mode, self.block)

    def quantization_config(self, backend: Backend | None = None) -> dict[str, object]:
        """Return the `quantization_config` for config.json or an engine's override.

        Args:
            backend: the engine that will read it; None takes the plan's own, and
                where that is None too, both spellings of ignored layers are given.
        """
        kept = policy.kept_modules(
            (t.name, t.reason, t.shape) for t in self.tensors if not t.quantize
        )
        return formats.quantization_config(
            self.mode,
            self.block,
            ignored_layers=policy.ignored_layers(
                kept, backend or self.backend, family_named(self.family)
            ),
            not_converted=kept,
        )

    def to_json(self) -> dict[str, object]:
        """Return the manifest: JSON types only."""
        head = self._head()
        tensors, lines = [], []
        for t, (rest, line) in zip(self.tensors, self._shared(), strict=True):
            tensors.append({"name": t.name, **rest})
            lines.append(f"{t.name!r} {line}")
        return {
            "schema": SCHEMA,
            "digest": _digest(head, lines),
            "model": str(self.model),
            "fits": self.fits,
            **head,
            "tensors": tensors,
        }

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read the manifest in a file.

        Raises:
            NotFoundError: there is none that can be read.
            UsageError: it is no plan, or was edited.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise NotFoundError(f"cannot read {path}: {e.strerror}", hint=_AGAIN) from e
        except ValueError as e:
            raise UsageError(f"{path} is not JSON: {e}", hint=_AGAIN) from e
        if not isinstance(document, dict):
            raise UsageError(f"{path} is not a plan: no JSON object", hint=_AGAIN)
        return cls.from_json(document)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """Read a manifest back.

        Raises:
            UsageError: another schema, a field missing or of the wrong kind, or
                a digest that the content does not have.
        """
        if document.get("schema") != SCHEMA:
            raise UsageError(
                f"a plan of schema {document.get('schema')!r}; expected {SCHEMA}:"
                " another version of fp8ctl made it",
                hint=_AGAIN,
            )
        try:
            block, gpu, memory = document["block_size"], document["gpu"], document["memory"]
            plan = cls(
                model=Path(document["model"]),
                model_type=str(document["model_type"]),
                family=str(document["family"]),
                backend=document["backend"],
                mode=Mode(document["mode"]),
                tp=int(document["tp"]),
                block=None if block is None else BlockSize(int(block[0]), int(block[1])),
                tensors=tuple(
                    PlannedTensor(
                        t["name"],
                        t["dtype"],
                        tuple(t["shape"]),
                        t["quantize"],
                        *_reason(t["reason"]),
                    )
                    for t in document["tensors"]
                ),
                problems=_problems(document["problems"]),
                rejected=tuple(
                    (BlockSize(*entry["block_size"]), _problems(entry["problems"]))
                    for entry in document["rejected"]
                ),
                notes=tuple(document["notes"]),
                gpu=None if gpu is None else (int(gpu[0]), int(gpu[1])),
                keep=tuple(document["keep"]),
                quantize=tuple(document["quantize"]),
                memory=Memory(memory["before"], memory["after"], memory["kv_cache_per_token"]),
                recipe=_recipe(document["recipe"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise UsageError(
                f"not a plan: {type(e).__name__} {e}",
                hint=_AGAIN,
            ) from e
        if plan.digest != document.get("digest"):
            raise UsageError(
                f"the plan was edited: its digest is {plan.digest[:16]},"
                f" it says {str(document.get('digest'))[:16]}",
                hint=_AGAIN,
            )
        return plan

    def _head(self) -> dict[str, object]:
        """Return what the manifest says of all tensors together."""
        return {
            "model_type": self.model_type,
            "family": self.family,
            "backend": self.backend,
            "mode": self.mode.value,
            "tp": self.tp,
            "block_size": None if self.block is None else [self.block.n, self.block.k],
            "gpu": None if self.gpu is None else list(self.gpu),
            "keep": list(self.keep),
            "quantize": list(self.quantize),
            "recipe": self.recipe,
            "memory": {
                "before": self.memory.before,
                "after": self.memory.after,
                "kv_cache_per_token": self.memory.cache_per_token,
            },
            "problems": [_problem(p) for p in self.problems],
            "rejected": [
                {"block_size": [b.n, b.k], "problems": [_problem(p) for p in problems]}
                for b, problems in self.rejected
            ],
            "notes": list(self.notes),
        }

    def _shared(self) -> Iterator[tuple[dict[str, object], str]]:
        """Yield of each tensor all but its name: for JSON, and in a line."""
        # Most tensors of a model are alike in this; an enum is told by identity, its hash is slow.
        known: dict[object, tuple[dict[str, object], str]] = {}
        for t in self.tensors:
            key = (t.shape, t.dtype, t.quantize, id(t.reason), t.rule)
            shared = known.get(key)
            if shared is None:
                rest: dict[str, object] = {
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "quantize": t.quantize,
                    "reason": t.why,
                    "bytes_before": t.bytes_before,
                    "bytes_after": self.bytes_of(t),
                }
                shared = known[key] = (rest, json.dumps(rest))
            yield shared


def _digest(head: dict[str, object], tensors: list[str]) -> str:
    # Lines, not JSON: a model of 70 000 tensors is to be planned in a second.
    lines = [json.dumps(head, sort_keys=True, separators=(",", ":")), *tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def dumps(document: Mapping[str, object]) -> str:
    """Return a manifest, or a document that holds one, as text, with a line for each tensor."""
    # `indent` would leave json's fast encoder. Quotes inside a string are escaped, so that
    # what is replaced is nowhere but between tensors.
    text = json.dumps(document)
    return text.replace('}, {"name": "', '},\n{"name": "') + "\n"


def _reason(text: str) -> tuple[Reason, str]:
    kind, _, rule = text.partition(": ")
    return (Reason.USER, rule) if kind == Reason.USER.value else (Reason(text), "")


def _recipe(text: object) -> RecipeName:
    for recipe in formats.SCALES.values():
        if text == recipe:
            return recipe
    raise ValueError(f"recipe {text!r}")


def _problem(problem: Problem) -> dict[str, object]:
    return {
        "rule": problem.rule,
        "tensor": problem.tensor,
        "count": problem.count,
        "message": problem.message,
    }


def _problems(entries: list[dict[str, Any]]) -> tuple[Problem, ...]:
    return tuple(Problem(e["rule"], e["tensor"], int(e["count"]), e["message"]) for e in entries)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
