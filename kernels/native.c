/* The exact FP8 arithmetic for a CPU, bit for bit that of reference.py.
 *
 * recipes.py says what is computed. native.py compiles this file at first use, decides
 * which part a thread works on, and loads it; nothing else calls it.
 *
 * A group's elements are seen twice: once for the largest magnitude, once for the
 * codes. A part is walked in tiles of whole groups that stay in a core's cache in
 * between. Both walks are loops over a row of a tile, all its groups at once, with
 * a scale per column: they have no branch and no carried value, so that compilers
 * turn them into vector code for groups of every width.
 *
 * Memory is addressed in bytes through memcpy: any strides, any alignment.
 */

#include <fenv.h>
#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD < 0 || FLT_EVAL_METHOD == 1 || FLT_EVAL_METHOD == 2
#error "this target rounds FP32 operations to another precision"
#endif
#ifdef __FAST_MATH__
#error "every operation must be rounded as IEEE 754 says"
#endif

#if defined(__GNUC__)
#define NOT_INLINE __attribute__((noinline))
#else
#define NOT_INLINE
#endif

/* Columns that are worked on at a time, and bytes of a tile: its columns' largest
 * magnitudes and scales stay in the first cache, its elements in the second. */
#define WIDTH 1024
#define TILE_BYTES (256 * 1024)
#define WIDTH_AT_LEAST 256 /* or rows that are far apart in memory are read in crumbs */
/* Rows whose codes wait to be stored column by column: as many as fill a cache line. */
#define DEPTH 64
/* Between waiting rows; no power of two, or they would all want the same lines of a cache. */
#define PITCH (WIDTH + 64)
/* Groups of a tile across, and down: there are many where they are small. */
#define MAX_ACROSS 256
#define MAX_DOWN 64

#define SIGN 0x80000000u
#define MAGNITUDE 0x7FFFFFFFu
#define INFINITE 0x7F800000u
#define QUIET_NAN 0x7FC00000u
#define NON_FINITE_FOUND SIGN /* beside a magnitude, in one word */
#define NOWHERE INT64_MAX

enum { BF16, FP16, FP32 };
enum { DIVIDE, RECIPROCAL, INVERSE_SCALE, POWER_OF_TWO };
enum { ERROR, SATURATE, PROPAGATE };
enum { DONE, NO_MEMORY };

/* One tensor, quantised or dequantised; native.py has the same fields. Where memory asks
 * for it native.py has exchanged rows and columns, everywhere. */
typedef struct {
    unsigned char *x;
    unsigned char *codes;
    unsigned char *scales;
    int64_t x_row, x_column; /* steps in bytes, as all of these: */
    int64_t codes_row, codes_column;
    int64_t scales_row, scales_column;
    int64_t rows, columns;
    int64_t group_rows, group_columns;
    int64_t place_row, place_column; /* row and column times these: an element's place */
    int32_t dtype, arithmetic, policy;
    float floor;
} Job;

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t load16(const unsigned char *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return bits;
}

static inline uint32_t load32(const unsigned char *at)
{
    uint32_t bits;
    memcpy(&bits, at, sizeof bits);
    return bits;
}

static inline uint32_t from_bf16(const unsigned char *at) { return load16(at) << 16; }

/* Of a finite number alone. */
static inline uint32_t from_fp16(const unsigned char *at)
{
    uint32_t half = load16(at);
    uint32_t magnitude = (half & 0x7FFF) << 13; /* exponent and mantissa in FP32's places */
    /* Exponent 0 means 2^-14 too, but no implicit bit: it is read as 1, and 2^-14 taken off. */
    uint32_t subnormal = magnitude < 1u << 23 ? UINT32_MAX : 0;
    float value = float_of(magnitude + (112u << 23) + (subnormal & 1u << 23));
    value -= float_of(subnormal & 113u << 23);
    return (half & 0x8000) << 16 | bits_of(value);
}

static inline uint32_t from_fp32(const unsigned char *at) { return load32(at); }

/* Round to e4m3fn, ties to even. |value| < 464, of which the scale makes sure: it has
 * 448 as its code, and what is not finite gets its code elsewhere. */
static inline unsigned char encode(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t magnitude = bits & MAGNITUDE;
    /* The last place of a code is 2^-3 of the power of two below it, and 2^-9 at the
     * least. Of 2^20 times that power FP32's last place is the same: one addition
     * rounds as wanted, and the last bits of the sum count the places. There are 8 codes
     * to each power of two; 56 makes 0 of the places of 2^-6 and the bits of its power. */
    uint32_t power = bits & INFINITE;
    power = power > 121u << 23 ? power : 121u << 23;
    float large = float_of(power + (20u << 23) + 56);
    uint32_t code = bits_of(float_of(magnitude) + large) + (power >> 20);
    /* Down from the highest byte: otherwise compilers narrow every operand by itself. */
    return (unsigned char)((code << 24 | (bits & SIGN)) >> 24);
}

static inline float decode(unsigned char code)
{
    /* In the highest byte at once: otherwise compilers widen every operand by itself. */
    uint32_t bits = (uint32_t)code << 24;
    uint32_t magnitude = (bits & MAGNITUDE) >> 4; /* exponent and mantissa in FP32's places */
    /* Exponent 0 means 2^-6 too, but no implicit bit: it is read as 1, and 2^-6 taken off. */
    uint32_t subnormal = magnitude < 1u << 23 ? UINT32_MAX : 0;
    float value = float_of(magnitude + (120u << 23) + (subnormal & 1u << 23));
    value -= float_of(subnormal & 121u << 23);
    uint32_t nan = magnitude == 0x7Fu << 20 ? QUIET_NAN : 0;
    return float_of((bits & SIGN) | bits_of(value) | nan);
}

static inline void store_fp32(unsigned char *at, float value) { memcpy(at, &value, sizeof value); }

static inline void store16(unsigned char *at, uint32_t bits)
{
    uint16_t half = (uint16_t)bits;
    memcpy(at, &half, sizeof half);
}

static inline void store_bf16(unsigned char *at, float value)
{
    uint32_t bits = bits_of(value);
    uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
    /* A product that is NaN is a quiet one: that is in its upper half. */
    store16(at, ((bits & MAGNITUDE) > INFINITE ? bits : rounded) >> 16);
}

static inline void store_fp16(unsigned char *at, float value)
{
    uint32_t bits = bits_of(value);
    uint32_t magnitude = bits & MAGNITUDE;
    uint32_t nan = magnitude > INFINITE ? 0x200 : 0;
    magnitude = magnitude < 143u << 23 ? magnitude : 143u << 23; /* 2^16, which becomes Inf */
    /* As in `encode`; here the last place is 2^-10 of the power, and 2^-24 at the least. */
    uint32_t power = magnitude & INFINITE;
    power = power > 113u << 23 ? power : 113u << 23;
    uint32_t large = power + (13u << 23);
    uint32_t places = bits_of(float_of(magnitude) + float_of(large)) - large;
    uint32_t half = (places + (power >> 13) - (113u << 10)) | nan;
    store16(at, (half << 16 | (bits & SIGN)) >> 16);
}

/* ---- loops over contiguous elements of a row ---- */

#define RAISE_PEAKS(name, type, load, bytes, mask)                                             \
    static void name(const unsigned char *restrict a, const unsigned char *restrict b,        \
                     const unsigned char *restrict c, const unsigned char *restrict d,        \
                     type *restrict peaks, ptrdiff_t count)                                   \
    {                                                                                          \
        for (ptrdiff_t j = 0; j < count; j++) {                                                \
            type p = (type)(load(a + j * (bytes)) & (mask));                                   \
            type q = (type)(load(b + j * (bytes)) & (mask));                                   \
            type r = (type)(load(c + j * (bytes)) & (mask));                                   \
            type s = (type)(load(d + j * (bytes)) & (mask));                                   \
            p = p > q ? p : q;                                                                 \
            r = r > s ? r : s;                                                                 \
            p = p > r ? p : r;                                                                 \
            peaks[j] = p > peaks[j] ? p : peaks[j];                                            \
        }                                                                                      \
    }

RAISE_PEAKS(raise_peaks_16, uint16_t, load16, 2, 0x7FFFu)
RAISE_PEAKS(raise_peaks_32, uint32_t, load32, 4, MAGNITUDE)

#define HIGHEST(name, type, load, bytes, mask)                                                 \
    static type name(const unsigned char *restrict x, ptrdiff_t count)                        \
    {                                                                                          \
        type highest = 0;                                                                      \
        for (ptrdiff_t j = 0; j < count; j++) {                                                \
            type p = (type)(load(x + j * (bytes)) & (mask));                                   \
            highest = p > highest ? p : highest;                                               \
        }                                                                                      \
        return highest;                                                                        \
    }

HIGHEST(highest_16, uint16_t, load16, 2, 0x7FFFu)
HIGHEST(highest_32, uint32_t, load32, 4, MAGNITUDE)

#define ENCODE_ROW(name, load, bytes, operator)                                                \
    static void name(const unsigned char *restrict x, unsigned char *restrict codes,          \
                     const float *restrict by, ptrdiff_t count)                               \
    {                                                                                          \
        for (ptrdiff_t j = 0; j < count; j++)                                                  \
            codes[j] = encode(float_of(load(x + j * (bytes))) operator by[j]);                 \
    }

ENCODE_ROW(divide_bf16, from_bf16, 2, /)
ENCODE_ROW(divide_fp16, from_fp16, 2, /)
ENCODE_ROW(divide_fp32, from_fp32, 4, /)
ENCODE_ROW(multiply_bf16, from_bf16, 2, *)
ENCODE_ROW(multiply_fp16, from_fp16, 2, *)
ENCODE_ROW(multiply_fp32, from_fp32, 4, *)

typedef void (*EncodeRow)(const unsigned char *restrict, unsigned char *restrict,
                          const float *restrict, ptrdiff_t);

static const EncodeRow encoders[2][3] = {
    {divide_bf16, divide_fp16, divide_fp32},
    {multiply_bf16, multiply_fp16, multiply_fp32},
};

#define DECODE_ROW(name, store, bytes)                                                         \
    static void name(const unsigned char *restrict codes, unsigned char *restrict x,          \
                     const float *restrict by, ptrdiff_t count)                               \
    {                                                                                          \
        for (ptrdiff_t j = 0; j < count; j++)                                                  \
            store(x + j * (bytes), decode(codes[j]) * by[j]);                                  \
    }

DECODE_ROW(decode_bf16, store_bf16, 2)
DECODE_ROW(decode_fp16, store_fp16, 2)
DECODE_ROW(decode_fp32, store_fp32, 4)

typedef EncodeRow DecodeRow;

static const DecodeRow decoders[3] = {decode_bf16, decode_fp16, decode_fp32};

/* ---- tiles ---- */

typedef struct {
    unsigned char row[4][WIDTH * 4]; /* elements that do not lie side by side in memory */
    uint32_t peaks[WIDTH]; /* or twice as many uint16_t */
    float by[WIDTH];
    unsigned char waiting[DEPTH * PITCH * 4];
    /* of the groups of a tile: */
    uint32_t found[MAX_ACROSS * MAX_DOWN]; /* largest finite magnitude, NON_FINITE_FOUND */
    float scale[MAX_ACROSS * MAX_DOWN];
    float factor[MAX_ACROSS * MAX_DOWN];
} Scratch;

/* The elements from (r0, c0) to before (r1, c1). */
typedef struct {
    int64_t r0, r1, c0, c1;
} Part;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline ptrdiff_t bytes_of(int32_t dtype) { return dtype == FP32 ? 4 : 2; }

/* Return a magnitude as it lies in memory; such bits are ordered as the numbers are. */
static uint32_t raw_magnitude(const Job *job, const unsigned char *at)
{
    return job->dtype == FP32 ? load32(at) & MAGNITUDE : load16(at) & 0x7FFF;
}

static uint32_t raw_infinity(int32_t dtype)
{
    return dtype == BF16 ? 0x7F80 : dtype == FP16 ? 0x7C00 : INFINITE;
}

static uint32_t from_raw(int32_t dtype, uint32_t raw)
{
    uint16_t half = (uint16_t)raw;
    unsigned char bytes[2];
    memcpy(bytes, &half, sizeof half);
    return dtype == BF16 ? from_bf16(bytes) : dtype == FP16 ? from_fp16(bytes) : raw;
}

/* Return `count` elements side by side: where they lie, or copied to `row`. */
static const unsigned char *side_by_side(const Job *job, int64_t r, int64_t c, int64_t count,
                                         unsigned char *row)
{
    const unsigned char *at = job->x + r * job->x_row + c * job->x_column;
    ptrdiff_t step = job->x_column;
    if (step == bytes_of(job->dtype))
        return at;
    if (job->dtype == FP32)
        for (ptrdiff_t j = 0; j < count; j++)
            memcpy(row + j * 4, at + j * step, 4);
    else
        for (ptrdiff_t j = 0; j < count; j++)
            memcpy(row + j * 2, at + j * step, 2);
    return row;
}

/* Return the largest finite magnitude, and lower `first` to the first place that is not finite. */
static NOT_INLINE uint32_t look_closely(const Job *job, Part part, int64_t *first)
{
    uint32_t highest = 0, infinity = raw_infinity(job->dtype);
    for (int64_t r = part.r0; r < part.r1; r++)
        for (int64_t c = part.c0; c < part.c1; c++) {
            uint32_t raw = raw_magnitude(job, job->x + r * job->x_row + c * job->x_column);
            if (raw >= infinity)
                *first = least(*first, r * job->place_row + c * job->place_column);
            else
                highest = raw > highest ? raw : highest;
        }
    return highest;
}

/* Return the largest magnitudes of the columns of at most WIDTH, as they lie in memory. */
static const unsigned char *peaks_of_columns(const Job *job, Scratch *scratch, Part part)
{
    int64_t count = part.c1 - part.c0;
    if (part.r1 - part.r0 == 1)
        return side_by_side(job, part.r0, part.c0, count, scratch->row[0]);
    memset(scratch->peaks, 0, (size_t)(count * bytes_of(job->dtype)));
    for (int64_t r = part.r0; r < part.r1; r += 4) {
        const unsigned char *x[4];
        for (int i = 0; i < 4; i++)
            x[i] = r + i < part.r1 ? side_by_side(job, r + i, part.c0, count, scratch->row[i])
                                   : x[0];
        if (job->dtype == FP32)
            raise_peaks_32(x[0], x[1], x[2], x[3], scratch->peaks, count);
        else
            raise_peaks_16(x[0], x[1], x[2], x[3], (uint16_t *)scratch->peaks, count);
    }
    return (const unsigned char *)scratch->peaks;
}

/* Return how many rows of a part to walk at a time: all, or few where rows are long. */
static int64_t rows_at_a_time(Part part)
{
    return part.c1 - part.c0 > WIDTH ? DEPTH : most(1, part.r1 - part.r0);
}

/* Raise `found` of the groups from that of column c0 on, all in one row of groups. */
static void find_peaks(const Job *job, Scratch *scratch, Part part, uint32_t *found, int64_t *first)
{
    int64_t leftmost = part.c0 / job->group_columns;
    uint32_t infinity = raw_infinity(job->dtype);
    ptrdiff_t bytes = bytes_of(job->dtype);
    int64_t height = rows_at_a_time(part);
    for (int64_t r0 = part.r0; r0 < part.r1; r0 += height)
        for (int64_t c0 = part.c0; c0 < part.c1; c0 += WIDTH) {
            Part strip = {r0, least(r0 + height, part.r1), c0, least(c0 + WIDTH, part.c1)};
            const unsigned char *peaks = peaks_of_columns(job, scratch, strip);
            for (int64_t c = c0, next; c < strip.c1; c = next) {
                int64_t group = c / job->group_columns;
                next = least((group + 1) * job->group_columns, strip.c1);
                ptrdiff_t at = (c - c0) * bytes, count = next - c;
                uint32_t raw = job->dtype == FP32 ? highest_32(peaks + at, count)
                                                  : highest_16(peaks + at, count);
                uint32_t *here = &found[group - leftmost];
                uint32_t flag = *here & NON_FINITE_FOUND, magnitude = *here & MAGNITUDE;
                if (raw >= infinity) {
                    Part closely = {strip.r0, strip.r1, c, next};
                    raw = look_closely(job, closely, first);
                    flag = NON_FINITE_FOUND;
                }
                uint32_t peak = from_raw(job->dtype, raw);
                *here = flag | (peak > magnitude ? peak : magnitude);
            }
        }
}

/* Compute what `found` makes of groups: scales, and what x is divided or multiplied by. */
static void find_scales(const Job *job, const uint32_t *found, float *scale, float *factor,
                        int64_t count)
{
    for (int64_t g = 0; g < count; g++) {
        float a = float_of(found[g] & MAGNITUDE);
        float m, s;
        a = a > job->floor ? a : job->floor;
        if (job->arithmetic == POWER_OF_TWO) {
            /* 448 is 1.75 * 2^8: up to that mantissa the exponent falls by 8, above by 7. */
            uint32_t exponent = (bits_of(a) + 0x1FFFFF) >> 23;
            exponent = exponent > 9 ? exponent - 8 : 1;
            s = float_of(exponent << 23);
            m = float_of((254 - exponent) << 23);
        } else if (job->arithmetic == INVERSE_SCALE) {
            m = 448.0f / a;
            m = m < 0x1p126f ? m : 0x1p126f;
            s = 1.0f / m;
        } else {
            s = a / 448.0f;
            s = s > FLT_MIN ? s : FLT_MIN;
            m = job->arithmetic == DIVIDE ? s : 1.0f / s;
        }
        scale[g] = a == 0.0f ? 1.0f : s;
        factor[g] = a == 0.0f ? 1.0f : m;
    }
}

/* Put the codes of what is not finite, of which `encode` made nothing. */
static NOT_INLINE void correct_row(const Job *job, const unsigned char *x, unsigned char *codes,
                                   int64_t count)
{
    uint32_t infinity = raw_infinity(job->dtype);
    ptrdiff_t bytes = bytes_of(job->dtype);
    for (int64_t j = 0; j < count; j++) {
        uint32_t raw = raw_magnitude(job, x + j * bytes);
        uint32_t sign = job->dtype == FP32 ? load32(x + j * bytes) >> 24 & 0x80
                                           : load16(x + j * bytes) >> 8 & 0x80;
        if (raw < infinity)
            continue;
        if (job->policy == PROPAGATE)
            codes[j] = (unsigned char)(sign | 0x7F);
        else
            codes[j] = (unsigned char)(raw == infinity ? sign | 0x7E : 0);
    }
}

#define STORE_COLUMNS(name, bytes)                                                             \
    static NOT_INLINE void name(const unsigned char *restrict waiting, unsigned char *restrict to, \
                                ptrdiff_t down, ptrdiff_t across, ptrdiff_t depth,             \
                                ptrdiff_t count)                                               \
    {                                                                                          \
        for (ptrdiff_t j = 0; j < count; j++)                                                  \
            for (ptrdiff_t i = 0; i < depth; i++)                                              \
                memcpy(to + i * down + j * across, waiting + (i * PITCH + j) * (bytes), bytes); \
    }

/* Store `depth` rows that wait, column by column, in steps of `down` and `across`. */
STORE_COLUMNS(store_columns_8, 1)
STORE_COLUMNS(store_columns_16, 2)
STORE_COLUMNS(store_columns_32, 4)

/* Fill in the value of each column's group. */
static void fill(float *by, int64_t c0, int64_t c1, int64_t wide, const unsigned char *values,
                 ptrdiff_t step)
{
    for (int64_t c = c0, next; c < c1; c = next, values += step) {
        float value;
        memcpy(&value, values, sizeof value);
        next = least((c / wide + 1) * wide, c1);
        for (int64_t j = c; j < next; j++)
            by[j - c0] = value;
    }
}

/* Write the codes of a part, of whose groups, `across` in a row, `found` and `factor` are. */
static void write_codes(const Job *job, Scratch *scratch, Part part, const uint32_t *found,
                        const float *factor, int64_t across)
{
    EncodeRow encode_row = encoders[job->arithmetic != DIVIDE][job->dtype];
    int64_t top = part.r0 / job->group_rows, leftmost = part.c0 / job->group_columns;
    int64_t height = rows_at_a_time(part);
    int waits = job->codes_column != 1;
    for (int64_t r0 = part.r0; r0 < part.r1; r0 += height) {
        int64_t r1 = least(r0 + height, part.r1);
        for (int64_t c0 = part.c0; c0 < part.c1; c0 += WIDTH) {
            int64_t c1 = least(c0 + WIDTH, part.c1);
            int64_t left = c0 / job->group_columns - leftmost;
            int64_t right = (c1 - 1) / job->group_columns - leftmost;
            int64_t line = -1, depth = 0;
            uint32_t flags = 0;
            for (int64_t r = r0; r < r1; r++) {
                if (r / job->group_rows - top != line) {
                    line = r / job->group_rows - top;
                    const float *factors = factor + line * across + left;
                    fill(scratch->by, c0, c1, job->group_columns, (const unsigned char *)factors,
                         sizeof *factors);
                    flags = 0;
                    for (int64_t g = left; g <= right; g++)
                        flags |= found[line * across + g];
                }
                const unsigned char *x = side_by_side(job, r, c0, c1 - c0, scratch->row[0]);
                unsigned char *codes = waits ? scratch->waiting + depth * PITCH
                                             : job->codes + r * job->codes_row + c0;
                encode_row(x, codes, scratch->by, c1 - c0);
                if (flags & NON_FINITE_FOUND)
                    correct_row(job, x, codes, c1 - c0);
                depth++;
                if (waits && (depth == DEPTH || r + 1 == r1)) {
                    codes = job->codes + (r + 1 - depth) * job->codes_row + c0 * job->codes_column;
                    store_columns_8(scratch->waiting, codes, job->codes_row, job->codes_column,
                                    depth, c1 - c0);
                    depth = 0;
                }
            }
        }
    }
}

static void write_scales(const Job *job, int64_t top, int64_t leftmost, int64_t down,
                         int64_t across, const float *scale)
{
    for (int64_t i = 0; i < down; i++)
        for (int64_t j = 0; j < across; j++)
            memcpy(job->scales + (top + i) * job->scales_row + (leftmost + j) * job->scales_column,
                   &scale[i * across + j], sizeof *scale);
}

/* Quantise the groups from (top, left) to before (bottom, right); `first` is lowered. */
static NOT_INLINE void quantize_groups(const Job *job, Scratch *scratch, int64_t top,
                                       int64_t bottom, int64_t left, int64_t right, int64_t *first)
{
    int64_t high = job->group_rows, wide = job->group_columns;
    int64_t room = TILE_BYTES / bytes_of(job->dtype);
    int64_t across = least(MAX_ACROSS, most(WIDTH_AT_LEAST / wide, room / wide / high));
    across = most(1, least(across, WIDTH / wide));
    int64_t down = least(most(1, room / wide / across / high), MAX_DOWN);
    if (job->codes_column != 1) /* whole lines of a cache, even if the tile leaves it */
        down = most(down, DEPTH / high);
    for (int64_t i = top; i < bottom; i += down) {
        int64_t lines = least(down, bottom - i);
        for (int64_t j = left; j < right; j += across) {
            int64_t groups = least(across, right - j);
            Part tile = {i * high, least((i + lines) * high, job->rows), j * wide,
                         least((j + groups) * wide, job->columns)};
            memset(scratch->found, 0, (size_t)(lines * groups) * sizeof *scratch->found);
            for (int64_t line = 0; line < lines; line++) {
                Part row = {(i + line) * high, least((i + line + 1) * high, job->rows), tile.c0,
                            tile.c1};
                find_peaks(job, scratch, row, scratch->found + line * groups, first);
            }
            find_scales(job, scratch->found, scratch->scale, scratch->factor, lines * groups);
            write_scales(job, i, j, lines, groups, scratch->scale);
            write_codes(job, scratch, tile, scratch->found, scratch->factor, groups);
        }
        if (job->policy == ERROR && *first != NOWHERE && job->place_row >= job->place_column)
            return; /* all that follows comes after it */
    }
}

/* Write the elements of a part, in groups that may be cut. */
static NOT_INLINE void dequantize_part(const Job *job, Scratch *scratch, Part part)
{
    DecodeRow decode_row = decoders[job->dtype];
    ptrdiff_t bytes = bytes_of(job->dtype);
    int waits = job->x_column != bytes;
    for (int64_t c0 = part.c0; c0 < part.c1; c0 += WIDTH) {
        int64_t count = least(c0 + WIDTH, part.c1) - c0;
        int64_t line = -1, depth = 0;
        for (int64_t r = part.r0; r < part.r1; r++) {
            if (r / job->group_rows != line) {
                line = r / job->group_rows;
                fill(scratch->by, c0, c0 + count, job->group_columns,
                     job->scales + line * job->scales_row
                         + c0 / job->group_columns * job->scales_column,
                     job->scales_column);
            }
            const unsigned char *codes = job->codes + r * job->codes_row + c0 * job->codes_column;
            if (job->codes_column != 1) {
                for (ptrdiff_t j = 0; j < count; j++)
                    scratch->row[0][j] = codes[j * job->codes_column];
                codes = scratch->row[0];
            }
            unsigned char *x = waits ? scratch->waiting + depth * PITCH * bytes
                                     : job->x + r * job->x_row + c0 * bytes;
            decode_row(codes, x, scratch->by, count);
            depth++;
            if (waits && (depth == DEPTH || r + 1 == part.r1)) {
                x = job->x + (r + 1 - depth) * job->x_row + c0 * job->x_column;
                (bytes == 4 ? store_columns_32 : store_columns_16)(
                    scratch->waiting, x, job->x_row, job->x_column, depth, count);
                depth = 0;
            }
        }
    }
}

/* ---- what native.py calls; each is a thread's part of the work ---- */

/* A caller may have subnormals flushed, or another rounding: both are a thread's own. */
#define WITH_IEEE_754(statement)                                                               \
    do {                                                                                       \
        fenv_t environment;                                                                    \
        fegetenv(&environment);                                                                \
        fesetenv(FE_DFL_ENV);                                                                  \
        statement;                                                                             \
        fesetenv(&environment);                                                                \
    } while (0)

/* Quantise whole groups. `first` becomes the first place that is not finite, or NOWHERE. */
int fp8_quantize(const Job *job, int64_t top, int64_t bottom, int64_t left, int64_t right,
                 int64_t *first)
{
    Scratch *scratch = malloc(sizeof *scratch);
    if (scratch == NULL)
        return NO_MEMORY;
    *first = NOWHERE;
    WITH_IEEE_754(quantize_groups(job, scratch, top, bottom, left, right, first));
    free(scratch);
    return DONE;
}

/* Look at a part of one group. `found` becomes its largest magnitude, NON_FINITE_FOUND or not. */
int fp8_peak(const Job *job, int64_t r0, int64_t r1, int64_t c0, int64_t c1, uint32_t *found,
             int64_t *first)
{
    Part part = {r0, r1, c0, c1};
    Scratch *scratch = malloc(sizeof *scratch);
    if (scratch == NULL)
        return NO_MEMORY;
    *found = 0;
    *first = NOWHERE;
    WITH_IEEE_754(find_peaks(job, scratch, part, found, first));
    free(scratch);
    return DONE;
}

static NOT_INLINE void encode_part(const Job *job, Scratch *scratch, Part part, uint32_t found)
{
    find_scales(job, &found, scratch->scale, scratch->factor, 1);
    write_codes(job, scratch, part, &found, scratch->factor, 1);
}

/* Write the codes of a part of one group. */
int fp8_encode(const Job *job, int64_t r0, int64_t r1, int64_t c0, int64_t c1, uint32_t found)
{
    Part part = {r0, r1, c0, c1};
    Scratch *scratch = malloc(sizeof *scratch);
    if (scratch == NULL)
        return NO_MEMORY;
    WITH_IEEE_754(encode_part(job, scratch, part, found));
    free(scratch);
    return DONE;
}

static NOT_INLINE void write_scale(const Job *job, int64_t i, int64_t j, uint32_t found)
{
    float scale, factor;
    find_scales(job, &found, &scale, &factor, 1);
    write_scales(job, i, j, 1, 1, &scale);
}

/* Write the scale of a group. */
void fp8_scale(const Job *job, int64_t i, int64_t j, uint32_t found)
{
    WITH_IEEE_754(write_scale(job, i, j, found));
}

/* Write the elements of a part; groups may be cut. */
int fp8_dequantize(const Job *job, int64_t r0, int64_t r1, int64_t c0, int64_t c1)
{
    Part part = {r0, r1, c0, c1};
    Scratch *scratch = malloc(sizeof *scratch);
    if (scratch == NULL)
        return NO_MEMORY;
    WITH_IEEE_754(dequantize_part(job, scratch, part));
    free(scratch);
    return DONE;
}
