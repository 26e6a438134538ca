"""The FP8 matrix product has the bits that its text defines, and errors within its bound."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fp8ctl.kernels import dequantize, linear, reference
from fp8ctl.kernels.groups import PER_CHANNEL, PER_TENSOR, Groups, block
from fp8ctl.kernels.inputs import NonFiniteError
from fp8ctl.kernels.recipes import IEEE, RECIPROCAL

_U = Fraction(1, 1 << 24)

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _operands(
    m: int, n: int, k: int, groups: Groups, a_scales: str = "block", spread: float = 3.0
) -> Operands:
    """Return random codes of every finite kind, as uint8, and scales over many magnitudes."""
    torch.manual_seed(m + 31 * n + 997 * k)
    a, b = (torch.randint(0, 254, (rows, k)) for rows in (m, n))
    codes = [(c + (c >= 127).int()).to(torch.uint8) for c in (a, b)]  # all but the two NaN
    shape = {"block": (m, groups.grid((n, k))[1]), "row": (m, 1), "one": (1,)}[a_scales]
    a_scale, b_scale = (
        torch.randn(size).mul_(spread).exp_() for size in (shape, groups.scale_shape((n, k)))
    )
    return codes[0], a_scale, codes[1], b_scale


def _values(codes: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return codes as whole numbers of 2^-9."""
    return (codes.view(torch.float8_e4m3fn).double() * 512).long().numpy()


def _scale_of(scales: torch.Tensor, i: int, g: int) -> np.float32:
    """Return the scale of row i and group g, from [rows, groups], [rows, 1] or [1]."""
    if scales.dim() == 1:
        return np.float32(scales[0].item())
    return np.float32(scales[i, min(g, scales.shape[1] - 1)].item())


def _defined(
    operands: Operands, groups: Groups, exact: bool = False
) -> tuple[list[list[Any]], list[list[Fraction]]]:
    """Return C by the definition, in numpy's FP32 or exactly, and the sums of magnitudes."""
    a, a_scales, b, b_scales = operands
    x, y = _values(a), _values(b)
    bn, bk = groups.size((b.shape[0], b.shape[1]))
    result = []
    magnitudes = []
    for i, j in itertools.product(range(len(x)), range(len(y))):
        total: Any = Fraction(0) if exact else np.float32(0)
        magnitude = Fraction(0)
        for g, start in enumerate(range(0, x.shape[1], bk)):
            dot = int(x[i, start : start + bk] @ y[j, start : start + bk])
            s, t = _scale_of(a_scales, i, g), _scale_of(b_scales, j // bn, g)
            if exact:
                term = Fraction(dot, 1 << 18) * Fraction(float(s)) * Fraction(float(t))
                total += term
                magnitude += abs(term)
            else:
                total += np.float32(dot / 2**18) * s * t
        result.append(total)
        magnitudes.append(magnitude)
    width = len(y)
    return (
        [result[i * width : (i + 1) * width] for i in range(len(x))],
        [magnitudes[i * width : (i + 1) * width] for i in range(len(x))],
    )


def _as_tensor(rows: list[list[Any]], n: int) -> torch.Tensor:
    return torch.tensor(np.array(rows, dtype=np.float32)).view(-1, n)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether all bits are equal."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    ("m", "n", "k", "groups", "a_scales"),
    [
        (1, 1, 1, block(128, 128), "block"),
        (3, 5, 300, block(128, 128), "block"),
        (7, 33, 257, block(16, 64), "block"),
        (2, 9, 50, block(1, 7), "block"),
        (4, 6, 40, block(2, 1), "block"),
        (5, 20, 130, block(8, 32), "row"),
        (5, 20, 130, block(8, 32), "one"),
        (5, 20, 1500, PER_CHANNEL, "row"),
        (5, 20, 130, PER_CHANNEL, "one"),
        (5, 20, 130, PER_TENSOR, "row"),
        (5, 20, 130, PER_TENSOR, "one"),
    ],
)
@pytest.mark.parametrize("tile", [1 << 18, 64])
def test_every_bit_is_as_defined(
    m: int,
    n: int,
    k: int,
    groups: Groups,
    a_scales: str,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_TILE", tile)
    monkeypatch.setattr(linear, "_ROWS", 2 if tile == 64 else 128)
    operands = _operands(m, n, k, groups, a_scales)
    found = linear.matmul(*operands, groups)
    assert _same(found, _as_tensor(_defined(operands, groups)[0], n))


@pytest.mark.parametrize(("k", "width"), [(64, 8), (61, 16), (200, 1), (40, 40)])
def test_errors_stay_within_the_bound(k: int, width: int) -> None:
    groups = block(3, width)
    operands = _operands(6, 7, k, groups, spread=8.0)
    found = linear.matmul(*operands, groups)
    exact, magnitudes = _defined(operands, groups, exact=True)
    count = -(-k // width)
    relative = (1 + _U) ** (count + 2) - 1
    absolute = count * Fraction(1, 1 << 150) * (1 + Fraction(float(operands[3].max())))
    largest = Fraction(0)
    for i, j in itertools.product(range(6), range(7)):
        error = abs(Fraction(float(found[i, j])) - exact[i][j])
        assert error <= relative * magnitudes[i][j] + absolute
        largest = max(largest, error / magnitudes[i][j])
    assert largest > _U / 8  # or this would test nothing


def test_products_too_small_for_fp32_stay_within_the_bound() -> None:
    groups = block(2, 4)
    operands = _operands(4, 4, 16, groups)
    operands[1].mul_(2.0**-80)
    operands[3].mul_(2.0**-62)
    found = linear.matmul(*operands, groups)
    exact, magnitudes = _defined(operands, groups, exact=True)
    relative = (1 + _U) ** 6 - 1
    absolute = 4 * Fraction(1, 1 << 150) * (1 + Fraction(float(operands[3].max())))
    assert 0 < float(found.abs().max()) < 2.0**-110
    for i, j in itertools.product(range(4), range(4)):
        error = abs(Fraction(float(found[i, j])) - exact[i][j])
        assert error <= relative * magnitudes[i][j] + absolute


def test_columns_of_a_group_may_come_in_any_order() -> None:
    # FP32 sums of these would differ: what is tested is that no sum inside a group rounds.
    groups = block(16, 512)
    a, a_scales, b, b_scales = _operands(5, 16, 1024, groups)
    order = torch.cat([torch.randperm(512), 512 + torch.randperm(512)])
    shuffled = linear.matmul(a[:, order], a_scales, b[:, order], b_scales, groups)
    assert _same(shuffled, linear.matmul(a, a_scales, b, b_scales, groups))


def test_wide_groups_are_cut_where_fp64_would_round(monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.tensor([448.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    least = torch.tensor([2.0**-9]).to(torch.float8_e4m3fn).view(torch.uint8)
    k = linear._EXACT
    a = full.expand(1, k).clone()
    a[0, -1] = least
    one = torch.ones(1)
    # In one piece, exact but for the one rounding to FP32 ...
    dot = Fraction(448 * 448 * (k - 1)) + Fraction(1, 1 << 18)
    assert float(dot) == dot
    assert linear.matmul(a, one, a, one, PER_TENSOR).item() == np.float32(float(dot))
    # ... and pieces are groups with a scale in common.
    monkeypatch.setattr(linear, "_EXACT", 8)
    a, _, b, scale = _operands(3, 4, 20, PER_TENSOR)
    groups = block(4, 8)
    wanted = linear.matmul(a, torch.ones(3, 3), b, scale.expand(1, 3), groups)
    assert _same(linear.matmul(a, one, b, scale, PER_TENSOR), wanted)


def test_slices_of_columns_and_rows_are_slices_of_the_whole() -> None:
    # Tensor-parallel ranks with some outputs each, and batches of other sizes.
    groups = block(32, 64)
    a, a_scales, b, b_scales = _operands(37, 96, 200, groups)
    whole = linear.matmul(a, a_scales, b, b_scales, groups)
    for rank in range(3):
        part = slice(rank * 32, rank * 32 + 32)
        found = linear.matmul(a, a_scales, b[part], b_scales[rank : rank + 1], groups)
        assert _same(found, whole[:, part].contiguous())
    for row in (0, 17, 36):
        one = slice(row, row + 1)
        assert _same(linear.matmul(a[one], a_scales[one], b, b_scales, groups), whole[one])


def test_slices_along_k_add_up() -> None:
    # Tensor-parallel ranks with some inputs each: FP32 sums of theirs are within the bounds.
    groups = block(8, 16)
    operands = _operands(5, 6, 64, groups)
    a, a_scales, b, b_scales = operands
    halves = [
        linear.matmul(a[:, k], a_scales[:, g], b[:, k], b_scales[:, g], groups)
        for k, g in ((slice(0, 32), slice(0, 2)), (slice(32, 64), slice(2, 4)))
    ]
    exact, magnitudes = _defined(operands, groups, exact=True)
    total = halves[0] + halves[1]
    for i, j in itertools.product(range(5), range(6)):
        error = abs(Fraction(float(total[i, j])) - exact[i][j])
        assert error <= ((1 + _U) ** 5 - 1) * magnitudes[i][j]


def test_powers_of_two_move_between_scales() -> None:
    groups = block(32, 32)
    a, a_scales, b, b_scales = _operands(9, 40, 100, groups)
    whole = linear.matmul(a, a_scales, b, b_scales, groups)
    for power in (-30, -1, 7, 30):
        moved = linear.matmul(a, a_scales * 2.0**power, b, b_scales * 2.0**-power, groups)
        assert _same(moved, whole)


def test_a_one_picks_a_column_of_the_weight() -> None:
    groups = block(16, 32)
    _, _, b, b_scales = _operands(1, 50, 90, groups)
    wanted = dequantize.dequantize(b, b_scales, groups)
    eye = torch.eye(90).to(torch.float8_e4m3fn)
    found = linear.matmul(eye, torch.ones(90, 3), b, b_scales, groups)
    assert _same(found, (wanted.t() + 0.0).contiguous())  # but for the sign of a zero


def test_zeros_of_any_sign_give_zero() -> None:
    groups = block(4, 4)
    zeros = torch.tensor([[0x00, 0x80] * 4] * 3, dtype=torch.uint8)
    ones = torch.tensor([1.0, -1.0] * 4).to(torch.float8_e4m3fn)[None].expand(2, 8)
    for a, b in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        n = b.shape[0]
        c = linear.matmul(a, torch.ones(len(a), 2), b, torch.ones(-(-n // 4), 2), groups)
        assert _same(c, torch.zeros(len(a), n))


def test_a_nan_code_makes_its_row_or_column_nan() -> None:
    groups = block(4, 4)
    a, a_scales, b, b_scales = _operands(3, 5, 8, groups)
    a[1, 2], b[4, 7] = 0x7F, 0xFF
    nan = torch.isnan(linear.matmul(a, a_scales, b, b_scales, groups))
    wanted = torch.zeros(3, 5, dtype=torch.bool)
    wanted[1] = wanted[:, 4] = True
    assert torch.equal(nan, wanted)


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("groups", [block(4, 4), PER_CHANNEL, PER_TENSOR])
def test_nothing_to_multiply(shape: tuple[int, int, int], groups: Groups) -> None:
    m, n, k = shape
    c = linear.matmul(*_operands(m, n, k, groups), groups)
    assert _same(c, torch.zeros(m, n))
    y = linear.linear(
        torch.ones(m, k), *_operands(m, n, k, groups)[2:], groups, torch.ones(n), "per-token"
    )
    assert _same(y, torch.ones(m, n))


def test_strides() -> None:
    groups = block(16, 32)
    a, a_scales, b, b_scales = _operands(10, 50, 90, groups)
    wanted = linear.matmul(a, a_scales, b, b_scales, groups)
    a, a_scales, b, b_scales = (t.t().contiguous().t() for t in (a, a_scales, b, b_scales))
    assert _same(linear.matmul(a, a_scales, b, b_scales, groups), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_once_to_the_dtype(dtype: torch.dtype) -> None:
    operands = _operands(5, 9, 64, block(8, 8), spread=0.5)
    found = linear.matmul(*operands, block(8, 8), out_dtype=dtype)
    assert _same(found, linear.matmul(*operands, block(8, 8)).to(dtype))


# linear


def _layer(
    groups: Groups, n: int = 48, k: int = 96
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    w = torch.randn(n, k) * 0.02
    return w, *reference.quantize(w, groups)


def test_block_activations_are_quantised_as_sglang_does() -> None:
    # per_token_group_quant_fp8 of SGLang 0.4.8, written out.
    groups = block(16, 32)
    _, codes, scales = _layer(groups)
    x = torch.randn(7, 96).bfloat16()
    x[2] = 0
    grouped = x.float().view(7, 3, 32)
    x_scales = grouped.abs().amax(-1).clamp(min=1e-10) / 448.0
    x_codes = (grouped * x_scales.reciprocal()[:, :, None]).clamp(-448, 448)
    x_codes = x_codes.to(torch.float8_e4m3fn).view(7, 96)
    wanted = linear.matmul(x_codes, x_scales, codes, scales, groups, torch.bfloat16)
    found = linear.linear(x, codes, scales, groups, activation="block", recipe="reciprocal")
    assert _same(found, wanted)
    assert not found[2].any()


def test_activations_are_quantised_with_true_division_and_the_floor_unless_told() -> None:
    groups = block(16, 32)
    _, codes, scales = _layer(groups)
    x = torch.randn(1000, 96).bfloat16().float()  # ties, which tell x / s from x * (1 / s)
    x[3] *= 1e-12  # below the floor: few codes, or none
    x_codes, x_scales = reference.quantize(x, block(1, 32), IEEE.with_floor(1e-10))
    assert x_scales[3].tolist() == [np.float32(1e-10) / np.float32(448)] * 3
    wanted = linear.matmul(x_codes, x_scales, codes, scales, groups)
    assert _same(linear.linear(x, codes, scales, groups), wanted)
    assert not _same(linear.linear(x, codes, scales, groups, recipe=RECIPROCAL), wanted)


@pytest.mark.parametrize(
    ("activation", "shared"), [("per-token", PER_CHANNEL), ("per-tensor", PER_TENSOR)]
)
@pytest.mark.parametrize("groups", [PER_CHANNEL, PER_TENSOR, block(16, 32)])
def test_other_activations(activation: linear.Activation, shared: Groups, groups: Groups) -> None:
    _, codes, scales = _layer(groups)
    x = torch.randn(7, 96).half()
    x_codes, x_scales = reference.quantize(x, shared, linear.ACTIVATION)
    wanted = linear.matmul(x_codes, x_scales, codes, scales, groups, torch.float16)
    assert _same(linear.linear(x, codes, scales, groups, activation=activation), wanted)


@pytest.mark.parametrize("groups", [PER_CHANNEL, PER_TENSOR, block(16, 32)])
def test_a_weight_alone_in_fp8(groups: Groups) -> None:
    _, codes, scales = _layer(groups)
    x = torch.randn(7, 96)
    found = linear.linear(x, codes, scales, groups, activation="none")
    spread = (
        scales.repeat_interleave(16, 0).repeat_interleave(32, 1)
        if groups.kind == "block"
        else scales
    ).double()
    weight = codes.double() * spread
    exact = x.double() @ weight.t()
    magnitude = x.double().abs() @ weight.abs().t()  # no less than the sum of |dot| * b
    count = 3 if groups.kind == "block" else 1
    bound = ((1 + 2.0**-24) ** (count + 2) - 1 + 200 * 2.0**-53) * magnitude
    error = (found.double() - exact).abs()
    assert bool((error <= bound).all())
    assert bool((error > 0).any())


def test_a_layer_in_fp8_is_near_the_layer() -> None:
    # Each side is off by 2^-4 of a number at most, and by less than a third of it mostly.
    for groups, activation in itertools.product(
        (block(16, 32), PER_CHANNEL, PER_TENSOR), ("per-token", "per-tensor", "none")
    ):
        w, codes, scales = _layer(groups, k=512)
        x = torch.randn(32, 512)
        found = linear.linear(x, codes, scales, groups, activation=activation)  # type: ignore[arg-type]
        error = (found - x @ w.t()).norm() / (x @ w.t()).norm()
        assert 0.01 < error < 0.05


def test_bias_is_added_where_the_engines_add_it() -> None:
    # 1 + 2^-8 is the middle of two BF16 numbers and goes down to 1; with 2^-8 more it is exact.
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    codes = torch.tensor([[1.0, 2.0**-8]]).to(torch.float8_e4m3fn)
    bias = torch.tensor([2.0**-8], dtype=torch.bfloat16)
    one = torch.ones(1)
    late = linear.linear(x, codes, one.view(1, 1), block(2, 2), bias)
    early = linear.linear(x, codes, one, PER_TENSOR, bias, "per-tensor")
    alone = linear.linear(x, codes, one, PER_TENSOR, bias, "none")
    assert (late.item(), early.item(), alone.item()) == (1.0, 1 + 2.0**-7, 1.0)


def test_shapes_and_dtypes_of_x() -> None:
    groups = block(16, 32)
    _, codes, scales = _layer(groups)
    x = torch.randn(2, 3, 96).bfloat16()
    y = linear.linear(x, codes, scales, groups)
    assert (y.shape, y.dtype) == ((2, 3, 48), torch.bfloat16)
    one = linear.linear(x[1, 2], codes, scales, groups, out_dtype=torch.float32)
    assert (one.shape, one.dtype) == ((48,), torch.float32)
    assert _same(one.bfloat16(), y[1, 2])
    assert _same(
        linear.linear(x.transpose(0, 1), codes, scales, groups), y.transpose(0, 1).contiguous()
    )


def test_what_is_not_finite_in_x() -> None:
    groups = block(16, 32)
    _, codes, scales = _layer(groups)
    x = torch.randn(4, 96)
    x[2, 50] = math.inf
    with pytest.raises(NonFiniteError, match=r"inf at index \[2, 50\]"):
        linear.linear(x, codes, scales, groups)
    y = linear.linear(x, codes, scales, groups, non_finite="propagate")
    assert torch.equal(
        torch.isnan(y), torch.tensor([[False], [False], [True], [False]]).expand(4, 48)
    )


def test_the_default_dtype_of_the_caller_has_no_say() -> None:
    # Engines set it to that of the model.
    groups = block(16, 32)
    _, codes, scales = _layer(groups)
    x, bias = torch.randn(4, 96), torch.randn(48)
    wanted = [linear.linear(x, codes, scales, groups, bias, a) for a in ("block", "none")]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [linear.linear(x, codes, scales, groups, bias, a) for a in ("block", "none")]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
    assert all(_same(one, other) for one, other in zip(found, wanted, strict=True))


def test_subnormal_numbers_are_kept_where_the_caller_flushes_them() -> None:
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    scales = [torch.tensor([2.0**-70]), torch.tensor([2.0**-60])]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        found = linear.matmul(one, scales[0], one, scales[1], PER_TENSOR)
    finally:
        torch.set_flush_denormal(False)
    assert found.item() == 2.0**-130


_GOOD: dict[str, Any] = {
    "a_codes": torch.zeros(3, 6, dtype=torch.uint8),
    "a_scales": torch.ones(3, 2),
    "b_codes": torch.zeros(4, 6, dtype=torch.uint8),
    "b_scales": torch.ones(2, 2),
    "groups": block(2, 3),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_codes": torch.zeros(3, 6)}, "a_codes of torch.float32"),
        ({"a_codes": torch.zeros(6, dtype=torch.uint8)}, "a_codes of 2 dimensions"),
        ({"a_codes": torch.zeros(3, 7, dtype=torch.uint8)}, r"\[3, 7\] and B of \[4, 6\] differ"),
        ({"a_codes": None}, "a_codes are a NoneType"),
        ({"a_scales": torch.ones(3, 3)}, r"a_scales of shape \[3, 3\]; expected \[3, 2\]"),
        ({"a_scales": torch.ones(3, 2).half()}, "a_scales of torch.float16"),
        ({"b_codes": torch.zeros(4, 6)}, "codes of torch.float32"),
        ({"b_scales": torch.ones(2, 3)}, r"scales of shape \[2, 3\]; expected \[2, 2\]"),
        ({"groups": PER_TENSOR, "b_codes": torch.zeros(2, 4, 6, dtype=torch.uint8),
          "b_scales": torch.ones(1)}, "b_codes of 2 dimensions"),
        ({"out_dtype": torch.float64}, "no result in torch.float64"),
    ],
)  # fmt: skip
def test_bad_operands_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        linear.matmul(**{**_GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tensor"}, "unknown activation 'tensor'"),
        ({"groups": PER_CHANNEL, "scales": torch.ones(4, 1)}, "need a weight in blocks"),
        ({"x": torch.ones(3, 5)}, r"x of shape \[3, 5\] for a weight of \[4, 6\]"),
        ({"x": torch.ones(3, 6).double()}, "cannot quantise torch.float64"),
        ({"x": torch.tensor(1.0)}, r"x of shape \[\]"),
        ({"bias": torch.ones(5)}, r"bias of shape \[5\]; expected \[4\]"),
        ({"bias": torch.ones(4).double()}, "bias of torch.float64"),
        ({"recipe": "exact"}, "unknown recipe 'exact'"),
        ({"non_finite": "drop"}, "unknown policy 'drop'"),
        ({"out_dtype": torch.float64}, "no result in torch.float64"),
    ],
)
def test_bad_layers_are_refused(change: dict[str, Any], message: str) -> None:
    good = {
        "x": torch.ones(3, 6),
        "codes": _GOOD["b_codes"],
        "scales": _GOOD["b_scales"],
        "groups": block(2, 3),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        linear.linear(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("groups", [block(128, 128), block(64, 64), PER_CHANNEL, PER_TENSOR])
def test_a_gpu_gives_the_same_bits(groups: Groups) -> None:
    a, a_scales, b, b_scales = _operands(33, 500, 3000, groups, "row")
    found = linear.matmul(a.cuda(), a_scales.cuda(), b.cuda(), b_scales.cuda(), groups)
    assert _same(found.cpu(), linear.matmul(a, a_scales, b, b_scales, groups))
    _, codes, scales = _layer(groups, 500, 3000)
    x = torch.randn(33, 3000).bfloat16()
    bias = torch.randn(500).bfloat16()
    for activation in ("block", "per-token") if groups.kind == "block" else ("per-token",):
        arguments = [x, codes, scales, groups, bias, activation]
        moved = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]
        found = linear.linear(*moved)  # type: ignore[arg-type]
        assert _same(found.cpu(), linear.linear(*arguments))  # type: ignore[arg-type]
