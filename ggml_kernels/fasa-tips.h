// The tip layout. Included by the constructor (sizes) and by the store and select kernels, by nobody else.
//
// A tip is the dominant dims of one key, in 8 bits with one f16 scale per cell and KV head. Cells lie in blocks
// of 32 with the dims outermost, so that scoring runs over 32 cells side by side with no horizontal sum:
//
//   f16 scale[32] | i8 dim 0 [32] | i8 dim 1 [32] | ... | i8 dim n_dim-1 [32]

#pragma once

#include <stddef.h>
#include <stdint.h>

#define FASA_TIPS_CELLS 32

static inline size_t fasa_tips_block_size(int64_t n_dim) {
    return FASA_TIPS_CELLS*(sizeof(uint16_t) + (size_t) n_dim);
}

static inline uint16_t * fasa_tips_scales(void * block) {
    return (uint16_t *) block;
}

static inline int8_t * fasa_tips_values(void * block) {
    return (int8_t *) block + FASA_TIPS_CELLS*sizeof(uint16_t);
}
