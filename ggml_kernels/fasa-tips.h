// The tip layout. Included by the constructor (sizes) and by the store and select kernels, by nobody else.
//
// A tip is the dominant dims of one key in 4 bits: which of 16 levels around a centre a dim is at, in steps that are the dim's
// own and the same for all cells. Cells lie in blocks of 32. Within a block eight dims of a cell are four neighbouring bytes, the
// first four dims in their lower halves and the next four in the upper ones, and the same eight dims of the next cell follow: so
// that a vector of any width holds whole cells, and its halves are what the dot-product instructions of all ISAs take:
//
//   u8 dims 0-7 of cell 0, of cell 1 ... of cell 31 | u8 dims 8-15 of cell 0 ... | ...
//
// A number of dims that eight does not divide is filled up with level 0.

#pragma once

#include <stddef.h>
#include <stdint.h>

#define FASA_TIPS_CELLS 32
#define FASA_TIPS_QUAD   4 // dims that a dot-product instruction takes
#define FASA_TIPS_PAIR   8 // dims that lie together: two quads

#define FASA_TIPS_LEVELS 16

// pairs of quads
static inline int64_t fasa_tips_n_pairs(int64_t n_dim) {
    return (n_dim + FASA_TIPS_PAIR - 1)/FASA_TIPS_PAIR;
}

static inline size_t fasa_tips_block_size(int64_t n_dim) {
    return FASA_TIPS_CELLS*FASA_TIPS_QUAD*(size_t) fasa_tips_n_pairs(n_dim);
}

// where the four bytes of a cell with the dims of a pair begin in its block
static inline int64_t fasa_tips_offset(int64_t pair, int64_t cell) {
    return (pair*FASA_TIPS_CELLS + cell)*FASA_TIPS_QUAD;
}
