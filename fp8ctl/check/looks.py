"""What tensors that differ look like, as far as digests, shapes and types tell. Pure.

Digests are keyed by position, so that one which equals that of another version, of another tensor
or of a constant is that version, that tensor or that constant. What takes values to tell is
`fp8ctl.difference`'s. Called by `weights`.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fp8ctl.check.tensors import TORCH, shapes_of
from fp8ctl.held import constant_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8ctl.check.tensors import Line, Looks
    from fp8ctl.held import Held
    from fp8ctl.manifest import Plan

#: FP32 numbers that stand in scales which nobody loaded, and how they are written.
_UNSET = {1.0: "1", -3.4028234663852886e38: "the lowest number of FP32", 0.0: "0"}


@dataclass(frozen=True, slots=True)
class Version:
    """One set of weights that a server has had.

    Attributes:
        name: as it is told.
        digests: of what it brought, by name; not always all of a model.
    """

    name: str
    digests: Mapping[str, int] = field(default_factory=dict)


def explain(
    plan: Plan,
    lines: Sequence[Line],
    expected: Mapping[str, Sequence[int]],
    held: Mapping[str, Held],
    versions: Sequence[Version] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Line]:
    """Say of what is wrong what it looks like, as far as digests and shapes tell.

    Args:
        plan: of the server's weights.
        lines: of `compare`.
        expected: as there.
        held: as there.
        versions: that the server has had, the oldest first.
        shapes: as of `compare`.
    """
    shapes = {**shapes_of(plan), **(shapes or {})}
    owners = _owners(expected)
    latest = _latest(expected, versions)
    seen: list[Line] = []
    for line in lines:
        one = held.get(line.name)
        if line.bad and line.name in shapes:
            right = expected.get(line.name, ())
            line = _explained(line, one, shapes[line.name], right, owners, versions, latest)
            line = _without_scales(line, held)
        elif line.bad and one is not None:
            line = _of_version(line, one, expected.get(line.name, ()), versions, latest)
            line = _of_another(line, one, owners)
        seen.append(line)
    return seen


def _explained(
    line: Line,
    one: Held | None,
    shape: tuple[int, ...],
    right: Sequence[int],
    owners: Mapping[int, str],
    versions: Sequence[Version],
    latest: int,
) -> Line:
    """Explain codes or scales."""
    if one is None:
        return line
    codes = not line.name.endswith(("_scale", "_scale_inv"))
    if codes and one.dtype in TORCH.values():
        return replace(line, looks="bf16")
    if one.shape and one.shape != shape:
        turned = codes and one.shape == shape[::-1]
        return replace(line, looks="transposed" if turned else "" if codes else "other block")
    if not codes:
        for value, text in _UNSET.items():
            if one.digest == constant_digest(struct.pack("<f", value), shape):
                return replace(line, looks="unscaled", detail=f"every scale is {text}")
    return _of_another(_of_version(line, one, right, versions, latest), one, owners)


def _of_another(line: Line, one: Held, owners: Mapping[int, str]) -> Line:
    """Say which other tensor's values one has."""
    owner = owners.get(one.digest)
    if line.looks or owner is None or owner == line.name:
        return line
    return replace(line, looks="swapped", like=owner)


def _latest(expected: Mapping[str, Sequence[int]], versions: Sequence[Version]) -> int:
    """Return which version was the last to bring what is expected, all of it or a part; -1: none.

    A part may be all that came of an update: what it did not bring was brought as often as not by
    one long before. A part that is alike in all versions is of none.
    """
    other = {
        name
        for version in versions
        for name, digest in version.digests.items()
        if digest not in expected.get(name, (digest,))
    }
    for i in reversed(range(len(versions))):
        brought = versions[i].digests
        if not other.isdisjoint(brought) and all(
            digest in expected.get(name, (digest,)) for name, digest in brought.items()
        ):
            return i
    return -1


def _of_version(
    line: Line, one: Held, right: Sequence[int], versions: Sequence[Version], latest: int
) -> Line:
    """Say of which version a tensor is, if of one that came before what is expected."""
    if not one.replicas_agree:
        return line
    mine = [i for i, v in enumerate(versions) if v.digests.get(line.name) == one.digest]
    wanted = [i for i, v in enumerate(versions) if v.digests.get(line.name) in right]
    if not mine:
        return line
    version = versions[mine[-1]].name
    if wanted and mine[-1] > max(wanted[-1], latest):
        newer = f"is that of {version}, which was brought later"
        return replace(line, detail=", ".join(filter(None, (line.detail, newer))))
    return replace(line, looks="stale", version=version)


def _without_scales(line: Line, held: Mapping[str, Held]) -> Line:
    """Tell codes that have no scales from a layer that was left in 16 bits, or out, as a whole."""
    weight = held.get(line.name.removesuffix("_inv").removesuffix("_scale"))
    if line.name in held or weight is None:
        return line
    looks: Looks = "unscaled" if "float8" in weight.dtype else "bf16"
    return replace(line, looks=looks, detail=line.detail or "there is none")


def _owners(expected: Mapping[str, Iterable[int]]) -> dict[int, str]:
    """Return whose a digest is; not those that several tensors share, as zeros do."""
    every = [(digest, name) for name, digests in expected.items() for digest in set(digests)]
    count = Counter(digest for digest, _ in every)
    return {digest: name for digest, name in every if count[digest] == 1}
