"""What an engine builds as one module must be decided as one.

Both engines fuse Linears that lie beside each other, and neither can leave a part
of what it fused in 16 bits. Pure: Linears in, problems out. Called by `planning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8ctl.families import ENGINES
from fp8ctl.manifest import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8ctl.families import Backend, Family
    from fp8ctl.fitting import Linear

_SGLANG_ONLY = "fused_qkv_a_proj_with_mqa"


def problems(
    quantized: Sequence[Linear],
    kept: Sequence[Linear],
    stacked: Sequence[str],
    family: Family,
    backend: Backend | None,
) -> tuple[Problem, ...]:
    """Return what the engines cannot build of these decisions.

    Args:
        quantized: every Linear that becomes FP8.
        kept: every Linear of a decoder layer that stays, by a rule or for its dtype.
        stacked: names of tensors that hold many experts each, which stay.
        family: of the model.
        backend: whose rules; None for both.
    """
    engines: tuple[Backend, ...] = ("vllm", "sglang") if backend is None else (backend,)
    found = list(_experts(kept, stacked, engines))
    dense = [linear for linear in kept if not linear.role.expert]
    unnamed = [engine for engine in engines if engine in family.unnamed]
    if dense and unnamed:
        found.append(
            Problem(
                "ignored",
                dense[0].name,
                len(dense),
                f"{ENGINES[unnamed[0]]} gives the Linears of {family.name} no names, so that none"
                " of them can be left in 16 bits",
            )
        )
    found.extend(_split(quantized, dense, engines))
    return tuple(found)


def partners(linear: Linear, linears: Iterable[Linear], backend: Backend | None) -> list[str]:
    """Return the names of all Linears that are decided together with this one, itself included."""
    group = _group(linear, ("vllm", "sglang") if backend is None else (backend,))
    if group is None:
        return [linear.name]
    engines: tuple[Backend, ...] = ("vllm", "sglang") if backend is None else (backend,)
    return [other.name for other in linears if _group(other, engines) == group]


def _experts(
    kept: Sequence[Linear], stacked: Sequence[str], engines: Sequence[Backend]
) -> Iterable[Problem]:
    experts = [linear.name for linear in kept if linear.role.expert] or list(stacked)
    if experts:
        who = " nor ".join(ENGINES[engine] for engine in engines)
        who = f"neither {who} can" if len(engines) > 1 else f"{who} cannot"
        yield Problem(
            "experts",
            experts[0],
            len(experts),
            f"{who} leave experts in 16 bits: ignored layers do not reach a fused MoE",
        )


def _split(
    quantized: Sequence[Linear], kept: Sequence[Linear], engines: Sequence[Backend]
) -> Iterable[Problem]:
    """Say which modules would be half FP8; one problem for each kind of module."""
    wanted = {_group(linear, engines): linear for linear in kept}
    said: dict[tuple[str, str, str], Problem] = {}
    for linear in quantized if kept else ():
        group = _group(linear, engines)
        if group is None or group not in wanted:
            continue
        other = wanted[group]
        key = (linear.role.fused, linear.role.part, other.role.part)
        first = said.get(key)
        said[key] = Problem(
            "fused",
            first.tensor if first else other.name,
            first.count + 1 if first else 1,
            f"{_last(other)} would stay and {_last(linear)} become FP8, which engines build as"
            f" one {linear.role.fused}",
        )
    yield from said.values()


def _group(linear: Linear, engines: Sequence[Backend]) -> tuple[str, str] | None:
    role = linear.role
    if not role.fused or role.expert or (role.fused == _SGLANG_ONLY and "sglang" not in engines):
        return None
    return linear.name.rpartition(".")[0].rpartition(".")[0], role.fused


def _last(linear: Linear) -> str:
    return linear.name.split(".")[-2]
