"""What the recorder wants to know of tensors that are sent, computed where they lie.

Of codes, from the codes and scales themselves, so that a GPU and a CPU say the same: `amax` is
448 times the largest scale of a block that is not zero, `saturated` counts codes of +-448 (a
block that is not zero has one at least), `zero_blocks` those in which all codes are zero. Of what
stays in 16 or 32 bits, `amax` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8ctl.wire import Entry

MAX = 448.0
_MAX_CODE = 0x7E
#: Codes that are counted at a time on a CPU: they stay in a core's cache.
_CHUNK = 1 << 18


def facts(
    entries: Sequence[Entry], tensors: Sequence[torch.Tensor], block: tuple[int, int] | None
) -> list[dict[str, float]]:
    """Return the facts of each tensor; waits for a GPU once.

    Args:
        entries: of the tensors; codes come before their scales.
        tensors: the values.
        block: sides of what shares a scale; None: all of a tensor does.
    """
    asked: list[torch.Tensor] = []
    names: list[tuple[str, ...]] = []
    kept = [
        tensor
        for i, (entry, tensor) in enumerate(zip(entries, tensors, strict=True))
        if _is_kept(entries, i) and tensor.is_floating_point() and tensor.numel()
    ]
    peaks = iter(largest(kept))
    for i, (entry, tensor) in enumerate(zip(entries, tensors, strict=True)):
        if entry.dtype == "float8_e4m3fn":
            asked += of_codes(tensor, tensors[i + 1], block)
            names.append(("amax", "saturated", "zero_blocks"))
        elif _is_kept(entries, i) and tensor.is_floating_point() and tensor.numel():
            asked.append(next(peaks))
            names.append(("amax",))
        else:
            names.append(())
    found = iter(torch.stack(asked).tolist() if asked else [])
    counts = {"saturated", "zero_blocks"}
    return [
        {name: int(next(found)) if name in counts else next(found) for name in of_it}
        for of_it in names
    ]


def largest(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what `peaks` does, each as 0-D; of no tensors none."""
    return [*peaks(tensors).unbind()] if tensors else []


def peaks(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude in each tensor, NaN where there is one, as FP64 [tensors].

    Args:
        tensors: of floats, at least one, none empty; all on one device.
    """
    if tensors[0].device.type == "cpu":
        return torch.stack([torch.stack(torch.aminmax(t)).abs().amax().double() for t in tensors])
    return _by_norms(tensors)


def _by_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Find them in a few launches for all, where the host would take longer with one each."""
    alike: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault(tensor.dtype, []).append(i)
    found = [
        torch.stack([*torch._foreach_norm([tensors[i] for i in those], float("inf"))]).double()
        for those in alike.values()
    ]
    if len(found) == 1:
        return found[0]
    # Back into the order in which they came.
    place = {i: at for at, i in enumerate(i for those in alike.values() for i in those)}
    each = torch.cat(found).unbind()
    return torch.stack([each[place[i]] for i in range(len(tensors))])


def of_codes(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None
) -> tuple[torch.Tensor, ...]:
    """Return amax, saturated and zero_blocks of codes, as FP64 on their device."""
    bits = codes.view(torch.uint8)
    zero = _zero(bits, scales, block)
    largest = torch.where(zero, 0, scales.double()).amax() * MAX
    return largest, _saturated(bits).double(), zero.sum().double()


def _is_kept(entries: Sequence[Entry], i: int) -> bool:
    """Say whether it is neither codes nor the scales of those before it."""
    of_it = entries[i].dtype, entries[i - 1].dtype if i else ""
    return "float8_e4m3fn" not in of_it


def _zero(bits: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Say of each block whether all its codes are zero, of either sign."""
    if block is None:
        return (bits & 0x7F).amax().eq(0).view(scales.shape)
    (high, wide), (rows, columns) = block, scales.shape
    if bits.device.type == "cpu":
        # A block of zeros has scale 1, as few others have: only these are looked at.
        zero = scales == 1
        for r, c in zero.nonzero().tolist():
            part = bits[r * high : (r + 1) * high, c * wide : (c + 1) * wide]
            zero[r, c] = not bool((part & 0x7F).any())
        return zero
    beyond = (0, columns * wide - bits.shape[1], 0, rows * high - bits.shape[0])
    whole = F.pad(bits & 0x7F, beyond)
    return whole.view(rows, high, columns, wide).amax((1, 3)).eq(0)


def _saturated(bits: torch.Tensor) -> torch.Tensor:
    flat = bits.reshape(-1)
    if flat.device.type != "cpu" or flat.data_ptr() % 8:
        return (flat & 0x7F).eq(_MAX_CODE).sum()
    rest = flat.numel() % 8
    if rest:
        return _saturated(flat[:-rest]) + (flat[-rest:] & 0x7F).eq(_MAX_CODE).sum()
    # Eight codes a word: adding 2 carries into the highest bit only from 0x7e, as 0x7f is NaN.
    ones = 0x0101010101010101
    total = torch.zeros((), dtype=torch.int64)
    for words in torch.split(flat.view(torch.int64), _CHUNK // 8):
        high = ((words & (0x7F * ones)) + 2 * ones).bitwise_right_shift_(7).bitwise_and_(ones)
        total += high.mul_(ones).bitwise_right_shift_(56).sum()
    return total
