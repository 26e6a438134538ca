/* Sums of what lies in memory times keys, modulo 2^64: the inner loop of digest.py. */

#include <stdint.h>
#include <string.h>

#define ALONG(TYPE, STEP)                                                                          \
    for (int64_t j = 0; j < inner; j++) {                                                          \
        TYPE bits;                                                                                 \
        memcpy(&bits, line + j * (STEP), sizeof bits);                                             \
        sum += (uint64_t)bits * inner_keys[j];                                                     \
    }

/* Steps are bytes between elements of `size` bytes, which may lie anywhere. A step that the
   compiler knows lets it make vector code. */
#define EACH(TYPE)                                                                                 \
    if (inner_step == (int64_t)sizeof(TYPE))                                                       \
        ALONG(TYPE, (int64_t)sizeof(TYPE))                                                         \
    else                                                                                           \
        ALONG(TYPE, inner_step)                                                                    \
    break;

uint64_t fp8_digest(const char *first, int64_t outer, int64_t inner, int64_t outer_step,
                    int64_t inner_step, int64_t size, const uint64_t *outer_keys,
                    const uint64_t *inner_keys)
{
    uint64_t total = 0;
    for (int64_t i = 0; i < outer; i++) {
        const char *line = first + i * outer_step;
        uint64_t sum = 0;
        switch (size) {
        case 1:
            EACH(uint8_t)
        case 2:
            EACH(uint16_t)
        default:
            EACH(uint32_t)
        }
        total += sum * outer_keys[i];
    }
    return total;
}
