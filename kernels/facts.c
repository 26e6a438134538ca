/* What tensors share, for a list of them: called with Python's lock held.

   A tensor describes itself by DLPack's C exchange (https://dmlc.github.io/dlpack), which
   is made for that: no object of Python's is made, nothing is counted. */

#include <stdint.h>
#include <string.h>

typedef struct {
    int32_t kind, number;
} Device;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DType;

typedef struct {
    char *data;
    Device device;
    int32_t dimensions;
    DType dtype;
    int64_t *shape, *strides;
    uint64_t offset;
} Described;

typedef int (*Describe)(void *tensor, Described *into);
typedef void (*Forget)(void);

enum { SIDES = 6, WORDS = 2 + 2 * SIDES };

/* Writes, for each of `count` tensors, which of the `seen` it is like and where it begins;
   what is new is added while there is room. -1 for what cannot be told here: no tensor, one
   without memory, one with more sides, or one too many. */
void fp8_facts(Describe describe, Forget forget, void **tensors, int64_t count,
               int64_t (*seen)[WORDS], int64_t *known, int64_t room,
               int64_t *numbers, int64_t *addresses)
{
    int64_t like = 0;
    for (int64_t i = 0; i < count; i++) {
        Described tensor;
        numbers[i] = addresses[i] = -1;
        if (describe(tensors[i], &tensor)) {
            forget();
            continue;
        }
        if (tensor.dimensions > SIDES)
            continue;
        int64_t facts[WORDS] = {0};
        memcpy(&facts[0], &tensor.device, 8);
        memcpy(&facts[1], &tensor.dimensions, 4);
        memcpy((char *)&facts[1] + 4, &tensor.dtype, 4);
        for (int32_t side = 0; side < tensor.dimensions; side++) {
            facts[2 + side] = tensor.shape[side];
            facts[2 + SIDES + side] = tensor.strides[side];
        }
        /* Mostly it is like the one before it. */
        if (like >= *known || memcmp(facts, seen[like], sizeof facts) != 0) {
            for (like = 0; like < *known; like++)
                if (memcmp(facts, seen[like], sizeof facts) == 0)
                    break;
            if (like == room)
                continue;
            if (like == *known)
                memcpy(seen[(*known)++], facts, sizeof facts);
        }
        numbers[i] = like;
        addresses[i] = (int64_t)(intptr_t)(tensor.data + tensor.offset);
    }
}
