"""The engines' rules about shapes: does a format fit a model, split over some GPUs?

Read from vLLM 0.9.1 and SGLang 0.4.8, whose rules are the same (vLLM fp8.py:229,
238, 497; SGLang fp8.py:240-263, 503-516), so that the engine's ValueError comes
before the engine. Pure: shapes in, problems and notes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fp8ctl.formats import BlockSize, Mode
from fp8ctl.manifest import Problem

if TYPE_CHECKING:
    from fp8ctl.policy import Backend, Role

# Tried in this order when no block is asked for. Below 32 a block is narrower
# than the smallest K that a GPU's FP8 dot product takes.
SQUARES = (BlockSize(128, 128), BlockSize(64, 64), BlockSize(32, 32))

CUTLASS_BLOCK_GPUS: Final = ((9, 0), (10, 0))
"""Compute capabilities, from and below, on which vLLM 0.9.1 has its kernel for 128x128 blocks."""

AROUND_128_KERNEL: Final = (
    "--mode per-tensor, or --backend sglang, whose fast kernels can be switched off"
)


@dataclass(frozen=True, slots=True)
class Linear:
    """Linears of one shape and role: one stands for all of them.

    Attributes:
        name: of the first one.
        count: how many there are.
    """

    name: str
    count: int
    shape: tuple[int, int]
    role: Role


@dataclass(frozen=True, slots=True)
class Module:
    """A Linear as the engine has it on one GPU: fused, and cut by tensor parallelism.

    Attributes:
        name: the module's last name, such as qkv_proj.
        n, k: rows and columns on one GPU.
    """

    name: str
    n: int
    k: int

    @property
    def label(self) -> str:
        """Name and shape, for a sentence."""
        return f"{self.name} ({self.n}x{self.k} per GPU)"


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads, which tensor parallelism cuts; 0 where the configuration has none."""

    query: int
    key_value: int
    size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads:
        """Read the heads from a configuration, or from its text part."""
        text = config.get("text_config")
        source: Mapping[str, Any] = text if isinstance(text, Mapping) else config
        query = _number(source.get("num_attention_heads"))
        key_value = _number(source.get("num_key_value_heads")) or query
        size = _number(source.get("head_dim"))
        if not size and query:
            size = _number(source.get("hidden_size")) // query
        return cls(query, key_value, size)


def problems(
    linears: Sequence[Linear],
    heads: Heads,
    mode: Mode,
    block: BlockSize | None,
    tp: int,
    backend: Backend | None,
) -> tuple[Problem, ...]:
    """Return every rule that these Linears break, each with the first tensor that does."""
    found = []
    if tp > 1 and heads.query and heads.query % tp:
        message = f"{heads.query} attention heads do not divide by tensor-parallel size {tp}"
        found.append(Problem("tp", "num_attention_heads", 1, message))
    for linear in linears:
        for rule, message in _broken(linear, heads, mode, block, tp, backend):
            found.append(Problem(rule, linear.name, linear.count, message))
    return tuple(found)


def notes(
    linears: Sequence[Linear],
    those: Sequence[Module],
    mode: Mode,
    block: BlockSize | None,
    backend: Backend | None,
) -> tuple[str, ...]:
    """Return what fits, and may still surprise on a GPU."""
    said = []
    # SGLang's kernels of this kind can be switched off, and `launch` does.
    if mode is Mode.BLOCK and block not in (None, SQUARES[0]) and backend != "sglang":
        caught = in_128_kernel(those)
        if caught and block is not None:
            (major, _), _ = CUTLASS_BLOCK_GPUS
            more = f" and {len(caught) - 1} more" if len(caught) > 1 else ""
            said.append(
                f"on GPUs of compute capability {major}.x `fp8ctl launch --backend vllm` refuses"
                f" blocks of {block.label}: vLLM 0.9.1 would compute {caught[0].label}{more} with"
                f" its kernel for 128x128 blocks; {AROUND_128_KERNEL}"
            )
    if mode is Mode.PER_TENSOR:
        odd = [linear for linear in linears if linear.shape[0] % 16 or linear.shape[1] % 16]
        if odd:
            said.append(
                f"on a GPU {odd[0].name} {_sides(odd[0].shape)} does not divide by 16, which"
                " torch._scaled_mm asks for"
            )
    return tuple(said)


def _broken(
    linear: Linear,
    heads: Heads,
    mode: Mode,
    block: BlockSize | None,
    tp: int,
    backend: Backend | None,
) -> Iterator[tuple[str, str]]:
    role, (n, k) = linear.role, linear.shape
    parts = _parts(linear, heads)
    ranks = [(part, size, _per_rank(part, size, heads, tp, role)) for part, size in parts]
    for part, size, per_rank in ranks:
        if per_rank is None:
            yield "tp", f"{part} has {size} rows, which do not divide by tp {tp}"
            return
    k_rank = k
    if role.split == "row" and tp > 1:
        if k % tp:
            yield "tp", f"K = {k} does not divide by tensor-parallel size {tp}"
            return
        k_rank = k // tp
    if mode is not Mode.BLOCK or block is None:
        return
    share = f" per rank (tp {tp})" if tp > 1 else ""
    merged = bool(role.fused) and role.split == "column"
    rule = "expert-n" if role.expert else "merged-n" if merged else "column-n"
    if merged or (role.split == "column" and tp > 1):
        for part, _, per_rank in ranks:
            if per_rank is not None and per_rank % block.n:
                inside = f" of {role.fused}" if role.fused else ""
                yield rule, f"{part}{inside} has N = {per_rank}{share}, not a multiple of {block.n}"
                break
    if role.part == "q_a" and backend != "vllm" and n % block.n:
        # SGLang 0.4.8 puts q_a and kv_a into one module, scales below scales.
        yield "merged-n", f"q_a of {role.fused} has N = {n}, not a multiple of {block.n}"
    if k_rank % block.k:
        # Activations are quantised in groups of block_k, which must fill K:
        # `assert x.shape[-1] % group_size == 0` in per_token_group_quant_fp8 of both engines.
        row = role.split == "row" and tp > 1
        yield (
            "row-k" if row else "group-k",
            f"K = {k_rank}{share if row else ''}, not a multiple of {block.k}",
        )


def _parts(linear: Linear, heads: Heads) -> list[tuple[str, int]]:
    """Return name and rows of each part that `linear` holds on disk."""
    n, names = linear.shape[0], linear.role.part.split("+")
    if names == ["q", "k", "v"]:
        q = heads.query * heads.size
        return [("q", q), ("k", (n - q) // 2), ("v", (n - q) // 2)]
    return [(name or linear.name.split(".")[-2], n // len(names)) for name in names]


def _per_rank(part: str, size: int, heads: Heads, tp: int, role: Role) -> int | None:
    """Return the rows of a part on one rank, or None where they cannot be cut."""
    if role.split != "column" or tp == 1:
        return size
    pieces = tp
    if part in ("k", "v") and role.fused == "qkv_proj" and heads.key_value:
        # Fewer key-value heads than ranks: engines give each rank a whole copy of one.
        if heads.key_value < tp:
            if tp % heads.key_value:
                return None
            pieces = heads.key_value
        elif heads.key_value % tp:
            return None
    return None if size % pieces else size // pieces


def modules(linears: Iterable[Linear], heads: Heads, tp: int) -> tuple[Module, ...]:
    """Return each shape of an engine's module once, fused and cut as on one of `tp` GPUs.

    Args:
        linears: every single one: what is fused is what lies beside each other in a layer.
        heads: of the model.
        tp: tensor-parallel size; what does not divide by it is left out.
    """
    sizes: dict[tuple[str, str, int], list[int | None]] = {}
    for linear in linears:
        role, (n, k) = linear.role, linear.shape
        path = linear.name.split(".")
        if role.split == "row":
            rows: list[int | None] = [n if k % tp == 0 else None]
            k //= tp
        else:
            rows = [_per_rank(part, size, heads, tp, role) for part, size in _parts(linear, heads)]
        beside = (".".join(path[:-2]), role.fused or path[-2], k)
        sizes.setdefault(beside, []).extend(rows)
    return tuple(
        dict.fromkeys(
            Module(name, sum(n for n in rows if n is not None), k)
            for (_, name, k), rows in sizes.items()
            if None not in rows
        )
    )


def in_128_kernel(those: Sequence[Module]) -> tuple[Module, ...]:
    """Return the modules that vLLM's kernel for 128x128 blocks takes, whatever the block.

    Its gate looks at N and K and never at the block size (vLLM 0.9.1 fp8_utils.py:130,
    CUTLASS); it holds on `CUTLASS_BLOCK_GPUS` only.
    """
    return tuple(module for module in those if module.n % 128 == 0 and module.k % 128 == 0)


def _sides(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
