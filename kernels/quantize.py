"""The front door: quantise a tensor or a list of them, wherever they lie.

Every path gives the same bits; this module only decides who computes them:

    CUDA with triton       `launch` and `batch`, the Triton kernels
    CPU                    `native`, C that is built at first use, where that can be
    anything else          `reference`, plain PyTorch

`FP8CTL_NATIVE=0` turns the C off; without triton a GPU is served by the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fp8ctl.kernels import native, reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, block
from fp8ctl.kernels.inputs import (
    NonFiniteError,
    check_disjoint,
    check_input,
    has_triton,
    make_outputs,
    matrices,
    unravel,
)
from fp8ctl.kernels.recipes import IEEE, check_non_finite, named

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fp8ctl.kernels.groups import Groups
    from fp8ctl.kernels.recipes import NonFinite, Recipe

    Pair = tuple[torch.Tensor, torch.Tensor]

_BLOCK = block(128, 128)


def quantize(
    x: torch.Tensor,
    groups: Groups = _BLOCK,
    recipe: Recipe | str = IEEE,
    non_finite: NonFinite = "error",
    out: Pair | None = None,
) -> Pair:
    """Quantise a tensor to float8_e4m3fn codes and FP32 scales.

    Args:
        x: BF16, FP16 or FP32; [N, K], any shape for `PER_TENSOR`; any strides; sides from
            0 up that need not divide by anything.
        groups: what shares a scale: `block(128, 128)`, `PER_CHANNEL`, `PER_TENSOR`.
        recipe: the arithmetic, by name or as a `Recipe`.
        non_finite: "error", "saturate" or "propagate"; see `recipes`.
        out: codes (float8_e4m3fn or uint8) and scales to write; any strides.

    Returns:
        codes in the shape of `x`, and scales of `groups.scale_shape(x.shape)`: `codes *
        scale` approximates `x`. `out`, if it was given.

    Raises:
        NonFiniteError: the first NaN or Inf, with "error"; the outputs are half written.
        TypeError: `x` is no plain tensor of these dtypes, or an output has another dtype.
        ValueError: unknown recipe or policy; shape or device that does not fit; outputs
            that overlap each other, themselves or `x`.
    """
    recipe, non_finite = named(recipe), check_non_finite(non_finite)
    check_input(x, groups)
    if _on_gpu(x):
        from fp8ctl.kernels import launch

        return launch.quantize(x, groups, recipe, non_finite, out)
    codes, scales = make_outputs(x, groups, out)
    if out is not None:
        check_disjoint((codes, scales), (x,))
    parts = matrices(x, codes) if x.numel() else []
    if len(parts) != 1 or x.device.type != "cpu" or not native.available():
        return reference.quantize(x, groups, recipe, non_finite, (codes, scales))
    matrix, code = parts[0]
    grid = scales if scales.dim() == 2 else scales.view(1, 1)
    bad = native.quantize(matrix, groups, recipe, non_finite, code, grid)
    if bad is not None and non_finite == "error":
        index = unravel(bad[0] * matrix.shape[1] + bad[1], x.shape)
        raise NonFiniteError(index, float(x.detach()[index]))
    return codes, scales


def quantize_many(
    xs: Sequence[torch.Tensor],
    groups: Groups = _BLOCK,
    recipe: Recipe | str = IEEE,
    non_finite: NonFinite = "error",
    out: Sequence[Pair] | None = None,
) -> Sequence[Pair]:
    """Quantise a list of tensors of one device, on a GPU in a few launches; see `quantize`.

    Args:
        out: codes and scales for each.

    Returns:
        codes and scales of each. On a GPU, without `out`, tensors of one shape share
        allocations of up to 512 MB: a view of one keeps the others' memory.

    Raises:
        NonFiniteError: with the position of the tensor in the list.
        TypeError, ValueError: as `quantize`, naming the tensor; also where two of the
            outputs overlap, or tensors lie on several devices.
    """
    if xs and _on_gpu(xs[0]):
        from fp8ctl.kernels import batch

        return batch.quantize_many(xs, groups, named(recipe), non_finite, out)
    return _Loop(xs, groups, recipe, non_finite, out).run()


class Started(Protocol):
    """A list that is being quantised."""

    def wait(self) -> Sequence[Pair]:
        """Return codes and scales of each when they are there; once.

        Raises:
            NonFiniteError: as `quantize_many`.
        """


def start_many(
    xs: Sequence[torch.Tensor],
    groups: Groups,
    recipe: Recipe | str,
    out: Sequence[Pair],
) -> Started:
    """Begin with `quantize_many(..., out=out)`, with "error": on a GPU it is not waited for.

    `wait` does not wait for what is queued there later.

    Raises:
        TypeError, ValueError: as `quantize_many`; a NonFiniteError where that is known now.
    """
    if xs and _on_gpu(xs[0]):
        from fp8ctl.kernels import batch

        return batch.start_many(xs, groups, named(recipe), "error", out)
    return _Done(_Loop(xs, groups, recipe, "error", out).run())


class Prepared(Protocol):
    """A list of tensors whose quantisation is prepared, to be run at every step."""

    def run(self, xs: Sequence[torch.Tensor] | None = None) -> Sequence[Pair]:
        """Quantise the tensors as they are now, or others of the same kinds instead.

        Returns:
            codes and scales of each, in the same memory at every run.

        Raises:
            NonFiniteError: as `quantize_many`.
            ValueError: tensors of other shapes, strides, dtypes or devices.
        """


def prepare(
    xs: Sequence[torch.Tensor],
    groups: Groups = _BLOCK,
    recipe: Recipe | str = IEEE,
    non_finite: NonFinite = "error",
    out: Sequence[Pair] | None = None,
) -> Prepared:
    """Do all of `quantize_many` that does not depend on the numbers; raises what it does."""
    if xs and _on_gpu(xs[0]):
        from fp8ctl.kernels import batch

        return batch.Prepared(xs, groups, named(recipe), non_finite, out)
    return _Loop(xs, groups, recipe, non_finite, out)


def quantize_block(x: torch.Tensor, size: tuple[int, int] = (128, 128)) -> Pair:
    """Quantise a [N, K] tensor in blocks of N rows by K columns; see `quantize`."""
    return quantize(x, block(*size))


def quantize_per_tensor(x: torch.Tensor) -> Pair:
    """Quantise a tensor of any shape with one scale [1]; see `quantize`."""
    return quantize(x, PER_TENSOR)


def quantize_per_channel(x: torch.Tensor) -> Pair:
    """Quantise a [N, K] tensor with a scale per row [N, 1]; see `quantize`."""
    return quantize(x, PER_CHANNEL)


class _Done:
    """What was not begun but done."""

    def __init__(self, outputs: Sequence[Pair]) -> None:
        self._outputs = outputs

    def wait(self) -> Sequence[Pair]:
        return self._outputs


class _Loop:
    """A list, one by one: the device has no use for more at a time."""

    def __init__(
        self,
        xs: Sequence[torch.Tensor],
        groups: Groups,
        recipe: Recipe | str,
        non_finite: NonFinite,
        out: Sequence[Pair] | None,
    ) -> None:
        self._xs = list(xs)
        self._groups = groups
        self._recipe, self._non_finite = named(recipe), check_non_finite(non_finite)
        self._given = out is not None
        if out is not None and len(out) != len(self._xs):
            raise ValueError(f"{len(out)} outputs for {len(self._xs)} tensors")
        self._kinds = []
        self._outputs = []
        for i, x in enumerate(self._xs):
            try:
                check_input(x, groups)
                if x.device != self._xs[0].device:
                    raise ValueError(f"on {x.device}; the first is on {self._xs[0].device}")
                self._outputs.append(make_outputs(x, groups, None if out is None else out[i]))
            except (TypeError, ValueError) as e:
                raise type(e)(f"tensor {i}: {e}") from e
            self._kinds.append(_kind(x))
        self._check_disjoint(self._xs)

    def run(self, xs: Sequence[torch.Tensor] | None = None) -> Sequence[Pair]:
        """Quantise them all; see `Prepared`."""
        if xs is not None:
            if len(xs) != len(self._xs):
                raise ValueError(f"{len(xs)} tensors; the plan was made for {len(self._xs)}")
            for i, x in enumerate(xs):
                try:
                    check_input(x, self._groups)
                except (TypeError, ValueError) as e:
                    raise type(e)(f"tensor {i}: {e}") from e
                if _kind(x) != self._kinds[i]:
                    raise ValueError(
                        f"tensor {i} is {x.dtype} {list(x.shape)} with strides"
                        f" {list(x.stride())} on {x.device}; the plan was made for another kind"
                    )
            self._check_disjoint(xs)
            self._xs = list(xs)
        for i, (x, pair) in enumerate(zip(self._xs, self._outputs, strict=True)):
            try:
                quantize(x, self._groups, self._recipe, self._non_finite, pair)
            except NonFiniteError as e:
                raise NonFiniteError(e.index, e.value, i) from None
        return self._outputs

    def _check_disjoint(self, xs: Sequence[torch.Tensor]) -> None:
        if self._given:
            check_disjoint([tensor for pair in self._outputs for tensor in pair], xs)


def _kind(x: torch.Tensor) -> object:
    return type(x), x.dtype, x.device, x.shape, x.stride()


def _on_gpu(x: torch.Tensor) -> bool:
    return bool(getattr(x, "is_cuda", False)) and has_triton()
