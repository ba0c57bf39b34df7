// The tip layout. Included by the constructor (sizes) and by the store and select kernels, by nobody else.
//
// A tip is the dominant dims of one key, in 8 bits with one f16 scale per cell and KV head. Cells lie in blocks
// of 32. Within a block four dims of a cell are neighbours, which is what the dot-product instructions of all ISAs
// take, and the same four dims of the next cell follow, so that a vector of any width holds whole cells:
//
//   f16 scale[32] | i8 dims 0-3 of cell 0, of cell 1 ... of cell 31 | i8 dims 4-7 of cell 0 ... | ...
//
// A number of dims that four does not divide is filled up with zeros.

#pragma once

#include <stddef.h>
#include <stdint.h>

#define FASA_TIPS_CELLS 32
#define FASA_TIPS_QUAD   4 // dims that lie together

// dims with their filling
static inline int64_t fasa_tips_n_dim(int64_t n_dim) {
    return (n_dim + FASA_TIPS_QUAD - 1)/FASA_TIPS_QUAD*FASA_TIPS_QUAD;
}

static inline size_t fasa_tips_block_size(int64_t n_dim) {
    return FASA_TIPS_CELLS*(sizeof(uint16_t) + (size_t) fasa_tips_n_dim(n_dim));
}

// byte in a block where the values begin, behind the scales
static inline size_t fasa_tips_values(void) {
    return FASA_TIPS_CELLS*sizeof(uint16_t);
}

// where dim i of a cell lies among the values of its block
static inline int64_t fasa_tips_offset(int64_t i, int64_t cell) {
    return (i/FASA_TIPS_QUAD*FASA_TIPS_CELLS + cell)*FASA_TIPS_QUAD + i%FASA_TIPS_QUAD;
}
