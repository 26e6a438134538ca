"""Which elements of a matrix share a scale: blocks, whole rows, or all of it.

    groups            scales of a [N, K] tensor
    block(bn, bk)     [ceil(N / bn), ceil(K / bk)]
    PER_CHANNEL       [N, 1], a scale per row (output channel)
    PER_TENSOR        [1]; tensors of any number of dimensions

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Shape = tuple[int, int]


@dataclass(frozen=True)
class Groups:
    """One way to cut a matrix into groups; made by `block`, or one of the constants.

    Attributes:
        kind: what the groups are.
        sides: (bn, bk) of a block, (0, 0) otherwise.
    """

    kind: Literal["block", "per-channel", "per-tensor"]
    sides: Shape = (0, 0)

    def __post_init__(self) -> None:
        if self.kind == "block" and not all(_is_positive(side) for side in self.sides):
            raise ValueError(
                f"block sides must be positive whole numbers, not {self.sides[0]}x{self.sides[1]}"
            )

    def size(self, shape: Shape) -> Shape:
        """Return the sides of a group in a [N, K] matrix: at least 1, not cut at its edge."""
        if self.kind == "block":
            return self.sides
        return (1 if self.kind == "per-channel" else max(1, shape[0])), max(1, shape[1])

    def grid(self, shape: Shape) -> Shape:
        """Return how many groups a [N, K] matrix has along N and K.

        An empty matrix has no block, a row of no columns is a channel all the same, and
        every tensor has its one scale.
        """
        if self.kind == "block":
            return -(-shape[0] // self.sides[0]), -(-shape[1] // self.sides[1])
        return (shape[0] if self.kind == "per-channel" else 1), 1

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the scales of a tensor of this shape."""
        if self.kind == "per-tensor":
            return (1,)
        return self.grid((shape[0], shape[1]))

    def __str__(self) -> str:
        return f"{self.sides[0]}x{self.sides[1]}" if self.kind == "block" else self.kind


PER_TENSOR = Groups("per-tensor")
PER_CHANNEL = Groups("per-channel")


def block(n: int, k: int) -> Groups:
    """Return groups of n rows by k columns.

    Raises:
        ValueError: a side is not a positive whole number.
    """
    return Groups("block", (n, k))


def _is_positive(side: object) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and side > 0
