"""What an FP8 linear layer gives, in numbers that any device reproduces to the bit.

    C[m, n] = sum over groups g of K:  dot_g * a_scale[m, g] * b_scale[n, g]

- `dot_g`, the dot product of codes over the columns of a group, is the exact sum rounded
  once to FP32. Codes are multiples of 2^-9 up to 448, so FP64 holds a sum of up to 171,196
  products without rounding, in any order: no library, shape or device has a say in it.
  (Wider groups are cut every 131,072 columns, and each piece is a group of its own.)
- Then FP32, each operation rounded to nearest even: (dot * a_scale) * b_scale, and sums
  from the first group to the last, from +0. No -0 is left, except by rounding to 16 bits.

So an element depends on its row, its column and nothing else: slices of N or M are equal
to the whole bit for bit, and powers of two move between scales freely. With u = 2^-24 and
G groups, away from overflow,

    |C - exact| <= ((1 + u)^(G + 2) - 1) * sum |dot_g * a_scale * b_scale|
                   + G * 2^-150 * (1 + the largest b_scale),

the latter for products under 2^-126; rounding to `out_dtype` comes on top.

The Triton kernels of both engines compute the same expression in the same order of groups
(`accumulator += tl.dot(a, b) * a_s * b_s`), with another `dot`: tensor cores keep fewer
bits than FP32 while they sum (about 14 on Hopper for FP8), and the last multiplication may
be fused with the sum. What they give differs from this by the error of their own sums.

How activations become FP8 (`linear`), as read in the engines' Python and Triton sources:

    engine, path                                  activation    recipe
    vLLM 0.9.1, blocks                            block         ieee:floor=1e-10
    SGLang 0.4.8, blocks, Triton and our CPU      block         reciprocal (its floor is 1e-10)
    SGLang 0.4.8, blocks, cutlass                 block         ieee:floor=1e-10
    SGLang 0.4.8, per-tensor or -channel, our CPU per-token     reciprocal

with true division, where Triton's `/` on a GPU may be 2 units off. With activation "none"
the numbers of `x` stand for codes, with a scale of 1: their sums are rounded by FP64, at
most K * 2^-53 of the sum of magnitudes, and may differ by that between libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from fp8ctl.kernels import dequantize, inputs
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, block
from fp8ctl.kernels.quantize import quantize
from fp8ctl.kernels.recipes import IEEE
from fp8ctl.kernels.reference import keeping_denormals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8ctl.kernels.groups import Groups
    from fp8ctl.kernels.recipes import NonFinite, Recipe

Activation = Literal["block", "per-token", "per-tensor", "none"]

# The floor of both engines' per_token_group_quant.
ACTIVATION = IEEE.with_floor(1e-10)

_EXACT = 1 << 17  # columns whose sum FP64 holds without rounding
_STEP = 1 << 10  # columns that are converted at a time
_ROWS = 1 << 7  # rows of A at a time: what a conversion of B is spread over
_TILE = 1 << 18  # elements of a converted part of B, or of a tile of C
_ROWS_CUDA = 1 << 12
_TILE_CUDA = 1 << 24


@torch.no_grad()
def matmul(
    a_codes: torch.Tensor,
    a_scales: torch.Tensor,
    b_codes: torch.Tensor,
    b_scales: torch.Tensor,
    groups: Groups = block(128, 128),  # noqa: B008 -- immutable
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return A @ B^T of FP8 matrices, as the module's text says; any strides, any sides.

    Args:
        a_codes: [M, K], float8_e4m3fn or uint8 with its bits.
        a_scales: FP32; [M, ceil(K / bk)] with blocks, or [M, 1], or [1].
        b_codes: [N, K].
        b_scales: FP32 of `groups.scale_shape((N, K))`.
        groups: what shares a scale in B.
        out_dtype: of the result, FP32, FP16 or BF16; the sum is rounded to it once.

    Returns:
        C [M, N]. A NaN code makes its row or column NaN.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
    """
    dequantize.check_quantized(b_codes, b_scales, groups)
    _check_matrix("b_codes", b_codes)
    _check_matrix("a_codes", a_codes)
    if a_codes.dtype not in inputs.CODE_DTYPES:
        raise TypeError(f"a_codes of {a_codes.dtype}; expected float8_e4m3fn or uint8")
    return _multiply(a_codes, a_scales, b_codes, b_scales, groups, out_dtype)


@torch.no_grad()
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: Groups,
    bias: torch.Tensor | None = None,
    activation: Activation = "block",
    recipe: str | Recipe = ACTIVATION,
    non_finite: NonFinite = "error",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return what a linear layer with an FP8 weight gives for `x`.

    As in the engines, the bias is added to the result as rounded to `out_dtype` where the
    weight is in blocks or activations stay as they are, and to the FP32 sum elsewhere.

    Args:
        x: activations [..., K], BF16, FP16 or FP32.
        codes: the weight [N, K].
        scales: its scales.
        groups: what shares a scale in the weight.
        bias: [N], BF16, FP16 or FP32.
        activation: what shares a scale in `x`: 1 x bk columns as the blocks of the weight
            have it, a row ("per-token"), all; or "none", where only the weight is FP8.
        recipe: how `x` is quantised.
        non_finite: what becomes of NaN and Inf in `x`.
        out_dtype: of the result; that of `x` if None.

    Returns:
        [..., N].

    Raises:
        NonFiniteError: `x` holds NaN or Inf, and `non_finite` is "error".
        TypeError, ValueError: dtypes, shapes or devices do not fit.
    """
    dequantize.check_quantized(codes, scales, groups)
    _check_matrix("codes", codes)
    if activation not in get_args(Activation):
        raise ValueError(
            f"unknown activation {activation!r}; expected one of {', '.join(get_args(Activation))}"
        )
    if activation == "block" and groups.kind != "block":
        raise ValueError(f"activations in blocks need a weight in blocks, not {groups}")
    inputs.check_input(x, PER_TENSOR)
    n, k = codes.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x of shape {list(x.shape)} for a weight of {list(codes.shape)}")
    if bias is not None:
        _check_bias(bias, codes)
    out_dtype = out_dtype or x.dtype
    matrix = x.reshape(x.shape[:-1].numel(), k)
    if activation == "none":
        a, a_scales = matrix, torch.ones(1, dtype=torch.float32, device=x.device)
    else:
        shared = {
            "block": block(1, max(1, groups.sides[1])),
            "per-token": PER_CHANNEL,
            "per-tensor": PER_TENSOR,
        }[activation]
        a, a_scales = quantize(matrix, shared, recipe, non_finite)
    late = groups.kind == "block" or activation == "none"
    y = _multiply(a, a_scales, codes, scales, groups, out_dtype, None if late else bias)
    if late and bias is not None:
        y = (y.float() + bias.float()).to(out_dtype)
    return y.view(*x.shape[:-1], n)


def _multiply(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    groups: Groups,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return A @ B^T + bias, rounded once; A may be numbers in place of codes."""
    m, k = a.shape
    n = b.shape[0]
    if b.shape[1] != k:
        raise ValueError(f"A of shape {list(a.shape)} and B of {list(b.shape)} differ in K")
    if a.device != b.device:
        raise ValueError(f"A on {a.device}, B on {b.device}")
    if out_dtype not in dequantize.OUTPUT_DTYPES:
        raise TypeError(f"no result in {out_dtype}; expected bfloat16, float16 or float32")
    width = groups.size((n, k))[1]
    a_scales = _row_scales(a_scales, a, groups.grid((n, k))[1])
    b_scales = b_scales.view(1, 1) if groups.kind == "per-tensor" else b_scales
    c = torch.empty((m, n), dtype=out_dtype, device=a.device)
    height, tile = (_ROWS_CUDA, _TILE_CUDA) if a.is_cuda else (_ROWS, _TILE)
    height = min(max(1, m), height)
    # Of this thread; sums that are subnormal are beyond what a layer's output needs.
    with keeping_denormals(0):
        for columns in _cuts(n, max(1, tile // max(height, min(width, _STEP)))):
            index = torch.arange(columns.start, columns.stop, device=a.device)
            of_columns = b_scales[index // groups.size((n, k))[0]].t()
            for rows in _cuts(m, height):
                of_rows = a_scales[rows] if len(a_scales) > 1 else a_scales
                total = torch.zeros_like(c[rows, columns], dtype=torch.float32)
                for g, span in _spans(k, width):
                    dot = _dot(a[rows, span], b[columns, span])
                    dot.mul_(of_rows[:, g if of_rows.shape[1] > 1 else 0, None])
                    total.add_(dot.mul_(of_columns[g]))
                if bias is not None:
                    total.add_(bias[columns].float())
                c[rows, columns] = total
    return c


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return A @ B^T in FP32, rounded once where both are codes and not wider than _EXACT."""
    total: torch.Tensor | None = None
    for part in _cuts(a.shape[1], _STEP):
        # What both sides are too small by is made good on the side that is smaller.
        left, right = _doubles(a[:, part]).mul_(2.0**16), _doubles(b[:, part]).t()
        total = left @ right if total is None else total.addmm_(left, right)
    assert total is not None
    return total.float()


def _doubles(t: torch.Tensor) -> torch.Tensor:
    """Return codes, or other numbers, as FP64, 2^8 too small, exactly."""
    if t.dtype in inputs.CODE_DTYPES:
        return dequantize.halves(t.view(torch.uint8)).double()
    return t.double().mul_(2.0**-8)


def _spans(k: int, width: int) -> Iterator[tuple[int, slice]]:
    """Yield the groups along K, in order and in exact pieces: number, columns."""
    for g, start in enumerate(range(0, k, width)):
        for piece in _cuts(min(width, k - start), _EXACT):
            yield g, slice(start + piece.start, start + piece.stop)


def _cuts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _row_scales(scales: torch.Tensor, a: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the scales of A as a matrix: [M or 1, groups or 1]."""
    if scales.dtype != torch.float32:
        raise TypeError(f"a_scales of {scales.dtype}; expected float32")
    if scales.device != a.device:
        raise ValueError(f"a_scales on {scales.device}, a_codes on {a.device}")
    m = a.shape[0]
    if tuple(scales.shape) == (1,):
        return scales.view(1, 1)
    if tuple(scales.shape) not in ((m, groups), (m, 1)):
        raise ValueError(
            f"a_scales of shape {list(scales.shape)}; expected {[m, groups]}, {[m, 1]} or [1]"
            f" for A of {list(a.shape)}"
        )
    return scales


def _check_matrix(name: str, t: torch.Tensor) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} are a {type(t).__name__}; expected a torch.Tensor")
    if t.dim() != 2:
        raise ValueError(f"expected {name} of 2 dimensions, found shape {list(t.shape)}")


def _check_bias(bias: torch.Tensor, codes: torch.Tensor) -> None:
    if bias.dtype not in inputs.INPUT_DTYPES:
        raise TypeError(f"bias of {bias.dtype}; expected bfloat16, float16 or float32")
    if tuple(bias.shape) != (codes.shape[0],):
        raise ValueError(f"bias of shape {list(bias.shape)}; expected {[codes.shape[0]]}")
    if bias.device != codes.device:
        raise ValueError(f"bias on {bias.device}, codes on {codes.device}")
