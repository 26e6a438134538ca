"""The Triton kernels: the reference's codes and scales at the speed of memory.

Equal to `fp8ctl.kernels.reference` bit for bit, on a GPU and in Triton's
interpreter. What makes it so, and fast:

- NaN and Inf are told by the bits of the largest magnitude, which every group needs
  anyway: what handles them is one branch per program, not work per element.
- x / scale is one multiplication and two fused multiply-adds (`_divide`), correctly
  rounded wherever a code can tell. The interpreter does not fuse, and divides.
- On a GPU with FP8 (8.9 up) codes come from its own conversion, elsewhere from integer
  arithmetic (`_encode`). The interpreter's conversion loses a carry into the exponent
  (127.9 becomes 64, in Triton 3.3.1 to 3.9.0) and is not used.

A program works on R groups above each other (`_quantize`), or on a tile of one large
group (`_amax`, `_encode_tiles`). Strides are used as they are, edges are masked. With
LIST the tensor of a program is looked up in a table; `launch` writes it:
`places[program]` is a row of `table`, whose columns are numbered below.

docs/kernels.md has what was measured. Triton 3.3.1 to 3.9.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# Columns of a row of the table, int64 each: 128 bytes, a line of the cache.
COLUMNS = 16
_X, _CODES, _SCALES, _N, _K, _GRID_N, _GRID_K, _FIRST = (tl.constexpr(i) for i in range(8))
_XN, _XK, _CN, _CK, _SN, _SK, _AMAX, _ID = (tl.constexpr(i) for i in range(8, 16))

FIRST, AMAX, ID = 7, 14, 15  # columns that `batch` fills by themselves

# A place is tensor * 2^44 + n * K + k: the smallest is the first of the first tensor.
PLACE_BITS = 44
NO_PLACE = (1 << 63) - 1
_BITS = tl.constexpr(PLACE_BITS)
_NONE = tl.constexpr(NO_PLACE)

_INFINITY = tl.constexpr(0x7F800000)  # bits from here up are not finite
_MIN_SCALE = tl.constexpr(2.0**-126)
# Below this scale the remainder of `_divide` would have bits under 2^-149.
_SMALL_SCALE = tl.constexpr(2.0**-60)


@triton.jit
def _wide(x):
    """Return x as FP32, exactly; the interpreter's own way from BF16 loses subnormals."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def _magnitude(x):
    """Return the bits of |x| in its own format: they order as the numbers do, then Inf, NaN."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True) & 0x7FFF
    return bits


@triton.jit
def _is_finite(x):
    if x.dtype == tl.float32:
        finite = _magnitude(x) < 0x7F800000
    elif x.dtype == tl.bfloat16:
        finite = _magnitude(x) < 0x7F80
    else:
        finite = _magnitude(x) < 0x7C00
    return finite


@triton.jit
def _top(x):
    """Return the FP32 bits of the largest |x| of each of the groups [R, n, k] as [R, 1, 1]."""
    top = tl.max(_magnitude(x), axis=2, keep_dims=True)
    top = tl.max(top, axis=1, keep_dims=True).to(tl.int32)
    if x.dtype == tl.bfloat16:
        top = top << 16
    elif x.dtype == tl.float16:
        top = top.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        top = top.to(tl.int32, bitcast=True)
    return top


@triton.jit
def _scale(top, ARITHMETIC: tl.constexpr, FLOOR: tl.constexpr):
    """Return scale and factor of groups whose largest magnitudes have the bits `top`."""
    top = tl.maximum(top, FLOOR)
    a = top.to(tl.float32, bitcast=True)
    largest = tl.full(a.shape, 448.0, tl.float32)
    one = tl.full(a.shape, 1.0, tl.float32)
    if ARITHMETIC == "power-of-two":
        # 448 is 1.75 * 2^8: up to that mantissa the exponent falls by 8, above it by 7.
        exponent = tl.maximum(((top + 0x1FFFFF) >> 23) - 8, 1)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    elif ARITHMETIC == "inverse-scale":
        factor = tl.minimum(tl.div_rn(largest, tl.where(top == 0, one, a)), 1.0 / _MIN_SCALE)
        scale = tl.div_rn(one, factor)
    else:
        scale = tl.div_rn(a, largest)
        scale = tl.where(scale < _MIN_SCALE, tl.full(a.shape, _MIN_SCALE, tl.float32), scale)
        factor = tl.div_rn(one, scale)
    return tl.where(top == 0, one, scale), tl.where(top == 0, one, factor)


@triton.jit
def _divide(x, scale, factor, STEPS: tl.constexpr):
    """Return x / scale, where factor is 1 / scale correctly rounded.

    Each step is Markstein's correction q + (x - q * scale) * factor. After two the
    quotient is the correctly rounded one (Markstein 1990). After one it can be one unit
    off where x / scale lies within 2^-22 units of the middle of two FP32 numbers; with 8
    or 11 significant bits in x and in amax no such quotient has another code.
    """
    scale = tl.broadcast_to(scale, x.shape)
    factor = tl.broadcast_to(factor, x.shape)
    q = x * factor
    # Negated by products: Triton's minus takes from 0, which would lose the sign of a zero.
    minus = x * -1.0
    for _ in tl.static_range(STEPS):
        q = tl.fma(tl.fma(q, scale, minus) * -1.0, factor, q)
    return q


@triton.jit
def _encode(y, HARDWARE: tl.constexpr):
    """Round FP32 to e4m3fn, to nearest even, saturating at 448; return the codes as uint8."""
    if HARDWARE:
        code = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = y.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
        # From 2^-6 up: keep 3 of 23 mantissa bits, ties to even, exponent bias 127 -> 7.
        # The carry of the addition goes into the exponent, where it belongs.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below: one addition rounds to multiples of 2^-9, the last place of 2^14.
        shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
        subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
        code = (sign | tl.where(magnitude >= 0x3C800000, normal, subnormal)).to(tl.uint8)
    return code


@triton.jit
def _codes(
    x,
    scale,
    factor,
    ARITHMETIC: tl.constexpr,
    NON_FINITE: tl.constexpr,
    FUSED: tl.constexpr,
    STEPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Return the codes (uint8) of x; scale and factor [R, 1, 1] broadcast over it."""
    y = _wide(x)
    if ARITHMETIC == "divide":
        if FUSED:
            # Powers of two: the quotient stays what it is.
            small = scale < _SMALL_SCALE
            up = tl.where(small, 2.0**64, 1.0).to(tl.float32)
            down = tl.where(small, 2.0**-64, 1.0).to(tl.float32)
            y = _divide(y * up, scale * up, factor * down, STEPS)
        else:
            y = tl.div_rn(y, tl.broadcast_to(scale, x.shape))
    else:
        y = y * factor
    code = _encode(y, HARDWARE)
    if NON_FINITE != "error":
        # Of the bits as they are: a NaN in FP16 loses its sign on the way to FP32.
        if x.dtype == tl.float32:
            sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        else:
            sign = (x.to(tl.int16, bitcast=True).to(tl.int32) >> 8) & 0x80
        if NON_FINITE == "propagate":
            special = sign | 0x7F
        else:
            wide = _wide(x).to(tl.int32, bitcast=True)
            special = tl.where((wide & 0x7FFFFFFF) == _INFINITY, sign | 0x7E, 0)
        code = tl.where(_is_finite(x), code, special.to(tl.uint8))
    return code


@triton.jit
def _row(places_ptr, pid, per, UNIFORM: tl.constexpr):
    """Return which row of the table a program of a list works for."""
    return (pid // per if UNIFORM else tl.load(places_ptr + pid)).to(tl.int64)


@triton.jit
def _look_again(
    x_ptr,
    n0,
    k0,
    end_n,
    end_k,
    K,
    x_sn,
    x_sk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Return what a program with NaN or Inf in its tile needs to know.

    FP32 bits of the largest finite magnitude of each group [R, 1, 1], and the smallest
    n * K + k of what is not finite. A loop over few elements: the tile lies in the caches,
    and this must not cost registers where all is finite.
    """
    PART: tl.constexpr = 1024 if TILE_N * TILE_K > 1024 else TILE_N * TILE_K
    PARTS: tl.constexpr = R * TILE_N * TILE_K // PART
    r = tl.arange(0, R)[:, None, None]
    top = tl.zeros((R, 1, 1), tl.int32)
    first = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for part in range(PARTS):
        at = part * PART + tl.arange(0, PART)
        group = part * PART // (TILE_N * TILE_K)
        i = at // TILE_K % TILE_N
        j = at % TILE_K
        n = n0 + group * BLOCK_N + i
        k = k0 + j
        inside = ((i < BLOCK_N) & (n < end_n)) & ((j < BLOCK_K) & (k < end_k))
        x = tl.load(x_ptr + n * x_sn + k * x_sk, mask=inside, other=0.0)
        finite = _is_finite(x)
        first = tl.minimum(first, tl.min(tl.where(finite, _NONE, n * K + k), axis=0))
        bits = _wide(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(tl.where(finite, bits, 0), axis=0)
        top = tl.maximum(top, tl.where(r == group, largest, 0))
    return top, first


_RUNTIME = ["per", "N", "K", "grid_n", "grid_k"]
_RUNTIME += ["x_sn", "x_sk", "c_sn", "c_sk", "s_sn", "s_sk"]
_POINTERS = ["scale_ptr", "bad_ptr", "table_ptr", "places_ptr"]


# A kernel is compiled for what LAYOUT and its like say, not for what arguments happen to be.
@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_POINTERS)
def _quantize(
    x_ptr,
    code_ptr,
    scale_ptr,
    bad_ptr,
    table_ptr,
    places_ptr,
    per,
    N,
    K,
    grid_n,
    grid_k,
    x_sn,
    x_sk,
    c_sn,
    c_sk,
    s_sn,
    s_sk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    LIST: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIFORM: tl.constexpr,
    LAYOUT: tl.constexpr,
    CODE_LAYOUT: tl.constexpr,
    K_MULTIPLE: tl.constexpr,
    X_BYTES: tl.constexpr,
    WHOLE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    FLOOR: tl.constexpr,
    NON_FINITE: tl.constexpr,
    FUSED: tl.constexpr,
    STEPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Quantise R groups of BLOCK_N x BLOCK_K, one above the other, reading them once.

    TILE_N and TILE_K are the sides rounded up to powers of two. WHOLE: no group is cut by
    an edge. K_MULTIPLE divides K, X_BYTES the addresses of a list's tensors.
    LAYOUT > 0: elements lie side by side along k, and rows begin at multiples of it.
    LAYOUT < 0: along n, and columns begin at multiples of it. 0: nothing is known.
    """
    pid = tl.program_id(0)
    tensor = tl.full((), 0, tl.int64)
    if LIST:
        row = table_ptr + _row(places_ptr, pid, per, UNIFORM) * 16
        x_ptr = tl.load(row + _X).to(tl.pointer_type(DTYPE))
        code_ptr = tl.load(row + _CODES).to(tl.pointer_type(tl.uint8))
        scale_ptr = tl.load(row + _SCALES).to(tl.pointer_type(tl.float32))
        N = tl.load(row + _N).to(tl.int32)
        K = tl.load(row + _K).to(tl.int32)
        grid_n = tl.load(row + _GRID_N).to(tl.int32)
        grid_k = tl.load(row + _GRID_K).to(tl.int32)
        pid = pid - tl.load(row + _FIRST).to(tl.int32)
        x_sn = tl.load(row + _XN)
        x_sk = tl.load(row + _XK)
        c_sn = tl.load(row + _CN)
        c_sk = tl.load(row + _CK)
        s_sn = tl.load(row + _SN)
        s_sk = tl.load(row + _SK)
        tensor = tl.load(row + _ID)
        x_ptr = tl.multiple_of(x_ptr, X_BYTES)
        code_ptr = tl.multiple_of(code_ptr, CODE_LAYOUT if CODE_LAYOUT > 0 else 1)
    # By arithmetic that the compiler sees through: hints on arguments do not reach it.
    if LAYOUT > 0:
        x_sn = x_sn // LAYOUT * LAYOUT
        x_sk = 1
    elif LAYOUT < 0:
        x_sk = x_sk // -LAYOUT * -LAYOUT
        x_sn = 1
    if CODE_LAYOUT > 0:
        c_sn = c_sn // CODE_LAYOUT * CODE_LAYOUT
        c_sk = 1
    K = K // K_MULTIPLE * K_MULTIPLE
    above = (pid // grid_k).to(tl.int64) * R
    block_k = (pid % grid_k).to(tl.int64)
    r = tl.arange(0, R)[:, None, None]
    i = tl.arange(0, TILE_N)[None, :, None]
    j = tl.arange(0, TILE_K)[None, None, :]
    block_n = above + r
    n = block_n * BLOCK_N + i
    k = block_k * BLOCK_K + j
    x_at = x_ptr + n * x_sn + k * x_sk
    if WHOLE:
        x = tl.load(x_at)
    else:
        inside = ((i < BLOCK_N) & (n < N)) & ((j < BLOCK_K) & (k < K))
        x = tl.load(x_at, mask=inside, other=0.0)
    top = _top(x)
    if tl.max(tl.reshape(top, (R,)), axis=0) >= _INFINITY:
        top, first = _look_again(
            x_ptr,
            above * BLOCK_N,
            block_k * BLOCK_K,
            N,
            K,
            K,
            x_sn,
            x_sk,
            BLOCK_N,
            BLOCK_K,
            R,
            TILE_N,
            TILE_K,
        )
        if NON_FINITE == "error":
            tl.atomic_min(bad_ptr, (tensor << _BITS) + first)
    scale, factor = _scale(top, ARITHMETIC, FLOOR)
    scale_at = scale_ptr + block_n * s_sn + block_k * s_sk
    if WHOLE:
        tl.store(scale_at, scale)
    else:
        tl.store(scale_at, scale, mask=block_n < grid_n)
    code = _codes(x, scale, factor, ARITHMETIC, NON_FINITE, FUSED, STEPS, HARDWARE)
    code_at = code_ptr + n * c_sn + k * c_sk
    if WHOLE:
        tl.store(code_at, code)
    else:
        tl.store(code_at, code, mask=inside)


@triton.jit(
    do_not_specialize=[*_RUNTIME, "programs", "BLOCK_N", "BLOCK_K"],
    do_not_specialize_on_alignment=[*_POINTERS, "amax_ptr"],
)
def _large(
    x_ptr,
    code_ptr,
    scale_ptr,
    bad_ptr,
    table_ptr,
    places_ptr,
    per,
    N,
    K,
    grid_n,
    grid_k,
    x_sn,
    x_sk,
    c_sn,
    c_sk,
    s_sn,
    s_sk,
    amax_ptr,
    programs,
    BLOCK_N,
    BLOCK_K,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SECOND: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    LIST: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIFORM: tl.constexpr,
    LAYOUT: tl.constexpr,
    CODE_LAYOUT: tl.constexpr,
    K_MULTIPLE: tl.constexpr,
    X_BYTES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    FLOOR: tl.constexpr,
    NON_FINITE: tl.constexpr,
    FUSED: tl.constexpr,
    STEPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Work on a tile of a group that no program can hold: find its amax, or write its codes.

    The first pass raises amax_ptr[group] (int32, zero before) to the bits of the largest
    finite magnitude. The SECOND reads from it, in the opposite order: what the first read
    last may still be in the L2 cache.
    """
    pid = tl.program_id(0)
    if SECOND:
        pid = programs - 1 - pid
    tensor = tl.full((), 0, tl.int64)
    if LIST:
        row = table_ptr + _row(places_ptr, pid, per, UNIFORM) * 16
        x_ptr = tl.load(row + _X).to(tl.pointer_type(DTYPE))
        code_ptr = tl.load(row + _CODES).to(tl.pointer_type(tl.uint8))
        scale_ptr = tl.load(row + _SCALES).to(tl.pointer_type(tl.float32))
        N = tl.load(row + _N).to(tl.int32)
        K = tl.load(row + _K).to(tl.int32)
        grid_k = tl.load(row + _GRID_K).to(tl.int32)
        pid = pid - tl.load(row + _FIRST).to(tl.int32)
        x_sn = tl.load(row + _XN)
        x_sk = tl.load(row + _XK)
        c_sn = tl.load(row + _CN)
        c_sk = tl.load(row + _CK)
        s_sn = tl.load(row + _SN)
        s_sk = tl.load(row + _SK)
        amax_ptr += tl.load(row + _AMAX)
        tensor = tl.load(row + _ID)
        x_ptr = tl.multiple_of(x_ptr, X_BYTES)
        code_ptr = tl.multiple_of(code_ptr, CODE_LAYOUT if CODE_LAYOUT > 0 else 1)
    # By arithmetic that the compiler sees through: hints on arguments do not reach it.
    if LAYOUT > 0:
        x_sn = x_sn // LAYOUT * LAYOUT
        x_sk = 1
    elif LAYOUT < 0:
        x_sk = x_sk // -LAYOUT * -LAYOUT
        x_sn = 1
    if CODE_LAYOUT > 0:
        c_sn = c_sn // CODE_LAYOUT * CODE_LAYOUT
        c_sk = 1
    K = K // K_MULTIPLE * K_MULTIPLE
    if WHOLE_N:
        BLOCK_N = N
    if WHOLE_K:
        BLOCK_K = K
    tiles_k = tl.cdiv(BLOCK_K, TILE_K)
    tiles = tl.cdiv(BLOCK_N, TILE_N) * tiles_k
    group = pid // tiles
    tile = pid % tiles
    block_n = (group // grid_k).to(tl.int64)
    block_k = (group % grid_k).to(tl.int64)
    from_n = tile // tiles_k * TILE_N
    from_k = tile % tiles_k * TILE_K
    i = from_n + tl.arange(0, TILE_N)[None, :, None]
    j = from_k + tl.arange(0, TILE_K)[None, None, :]
    n = block_n * BLOCK_N + i
    k = block_k * BLOCK_K + j
    inside = ((i < BLOCK_N) & (n < N)) & ((j < BLOCK_K) & (k < K))
    x = tl.load(x_ptr + n * x_sn + k * x_sk, mask=inside, other=0.0)
    if SECOND:
        top = tl.load(amax_ptr + group + tl.zeros((1, 1, 1), tl.int32))
        scale, factor = _scale(top, ARITHMETIC, FLOOR)
        if tile == 0:
            scale_at = scale_ptr + block_n * s_sn + block_k * s_sk
            tl.store(scale_at + tl.zeros((1, 1, 1), tl.int32), scale)
        code = _codes(x, scale, factor, ARITHMETIC, NON_FINITE, FUSED, STEPS, HARDWARE)
        tl.store(code_ptr + n * c_sn + k * c_sk, code, mask=inside)
    else:
        top = tl.max(tl.reshape(_top(x), (1,)), axis=0)
        if top >= _INFINITY:
            again, first = _look_again(
                x_ptr,
                block_n * BLOCK_N + from_n,
                block_k * BLOCK_K + from_k,
                tl.minimum(N, (block_n + 1) * BLOCK_N),
                tl.minimum(K, (block_k + 1) * BLOCK_K),
                K,
                x_sn,
                x_sk,
                TILE_N,
                TILE_K,
                1,
                TILE_N,
                TILE_K,
            )
            top = tl.max(tl.reshape(again, (1,)), axis=0)
            if NON_FINITE == "error":
                tl.atomic_min(bad_ptr, (tensor << _BITS) + first)
        tl.atomic_max(amax_ptr + group, top)
