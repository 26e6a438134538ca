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
    from fp8ctl.families import Backend, Role

# Tried in this order when no block is asked for. Below 32 a block is narrower
# than the smallest K that a GPU's FP8 dot product takes.
SQUARES = (BlockSize(128, 128), BlockSize(64, 64), BlockSize(32, 32))

CUTLASS_BLOCK_GPUS: Final = ((9, 0), (10, 0))
"""Compute capabilities, from and below, on which vLLM 0.9.1 has its kernel for 128x128 blocks."""

HOPPER: Final = (9, 0)
"""The GPU that a plan is for where none is named: the first with such a kernel."""

AROUND_128_KERNEL: Final = (
    "--mode per-tensor, or --backend sglang, whose fast kernels can be switched off"
)

# Gemma-3's config.json leaves out what its class has as defaults.
_DEFAULT_HEADS: Final = {"gemma3_text": (8, 4, 256)}


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
        expert: whether it is one of many experts.
    """

    name: str
    n: int
    k: int
    expert: bool = False

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
        default = _DEFAULT_HEADS.get(str(source.get("model_type")), (0, 0, 0))
        query = _number(source.get("num_attention_heads")) or default[0]
        key_value = _number(source.get("num_key_value_heads")) or default[1] or query
        size = _number(source.get("head_dim")) or default[2]
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


def kernel_problems(
    linears: Sequence[Linear],
    those: Sequence[Module],
    block: BlockSize | None,
    backend: Backend | None,
    gpu: tuple[int, int] | None,
) -> tuple[Problem, ...]:
    """Return the Linears that the engine would compute with a kernel for other blocks.

    SGLang's kernels of this kind can be switched off, and `launch` does.

    Args:
        linears: those that become FP8.
        those: the same, as the engine has them on one GPU.
        block: of the plan.
        backend: whose rules; None for both.
        gpu: compute capability; None where it is no GPU.
    """
    low, high = CUTLASS_BLOCK_GPUS
    if block in (None, SQUARES[0]) or backend == "sglang" or gpu is None or not low <= gpu < high:
        return ()
    caught = in_128_kernel(those)
    if not caught or block is None:
        return ()
    names = {module.name for module in caught}
    mine = [one for one in linears if (one.role.fused or one.name.split(".")[-2]) in names]
    more = f" and {len(caught) - 1} more" if len(caught) > 1 else ""
    message = (
        f"on a GPU of compute capability {gpu[0]}.{gpu[1]} vLLM 0.9.1 would compute"
        f" {caught[0].label}{more} with its kernel for 128x128 blocks, whatever the block"
    )
    first = mine[0].name if mine else caught[0].name
    return (Problem("kernel-128", first, sum(one.count for one in mine) or len(caught), message),)


def notes(
    linears: Sequence[Linear], mode: Mode, block: BlockSize | None, backend: Backend | None
) -> tuple[str, ...]:
    """Return what fits, and may still surprise on a GPU."""
    said = []
    mla = [linear for linear in linears if linear.role.part == "kv_b"]
    if mla and backend != "vllm" and block not in (None, SQUARES[0]):
        said.append(
            f"SGLang 0.4.8 gives {mla[0].name} a single scale when it loads"
            " blocks of another size than 128x128"
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
    if role.fused_on_disk:
        # `_load_fused_module_from_checkpoint` cuts scales at the weight's rows (vLLM linear.py:708,
        # SGLang linear.py:658): block scales have fewer, and `narrow` raises.
        yield (
            "fused-on-disk",
            f"{role.part} are one tensor, whose block scales neither engine takes apart",
        )
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


def rows_per_rank(linear: Linear, heads: Heads, tp: int) -> tuple[int, ...] | None:
    """Return the rows of each part on one GPU, or None where they cannot be cut."""
    ranks = [_per_rank(part, size, heads, tp, linear.role) for part, size in _parts(linear, heads)]
    return None if None in ranks else tuple(rank for rank in ranks if rank is not None)


def broken(
    linear: Linear,
    heads: Heads,
    mode: Mode,
    block: BlockSize | None,
    tp: int,
    backend: Backend | None,
) -> bool:
    """Say whether one Linear breaks a rule."""
    return next(_broken(linear, heads, mode, block, tp, backend), None) is not None


def modules(linears: Iterable[Linear], heads: Heads, tp: int) -> tuple[Module, ...]:
    """Return each shape of an engine's module once, fused and cut as on one of `tp` GPUs.

    Args:
        linears: every single one: what is fused is what lies beside each other in a layer.
        heads: of the model.
        tp: tensor-parallel size; what does not divide by it is left out.
    """
    sizes: dict[tuple[str, str, int, bool], list[int | None]] = {}
    for linear in linears:
        role, (n, k) = linear.role, linear.shape
        path = linear.name.split(".")
        if role.split == "row":
            rows: list[int | None] = [n if k % tp == 0 else None]
            k //= tp
        else:
            rows = [_per_rank(part, size, heads, tp, role) for part, size in _parts(linear, heads)]
        beside = (".".join(path[:-2]), role.fused or path[-2], k, role.expert)
        sizes.setdefault(beside, []).extend(rows)
    return tuple(
        dict.fromkeys(
            Module(name, sum(n for n in rows if n is not None), k, expert)
            for (_, name, k, expert), rows in sizes.items()
            if None not in rows
        )
    )


def in_128_kernel(those: Sequence[Module]) -> tuple[Module, ...]:
    """Return the modules that vLLM's kernel for 128x128 blocks takes, whatever the block.

    Its gate looks at N and K and never at the block size (vLLM 0.9.1 fp8_utils.py:130,
    CUTLASS); it holds on `CUTLASS_BLOCK_GPUS` only. A fused MoE has Triton's kernel, which
    is told the block.
    """
    return tuple(m for m in those if not m.expert and m.n % 128 == 0 and m.k % 128 == 0)


def _sides(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
