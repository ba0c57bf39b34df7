// FASA_STORE: a warp packs the dominant dims of one key into its tip.

#pragma once

#include "fasa-common.h"

// bits of a key's element as the K cache will hold it, as a float
FASA_FN uint32_t fasa_key_element(int32_t type, int32_t type_k, uint32_t raw) {
    const bool     is_f16 = type == FASA_TYPE_F16;
    const bool     is_odd = is_f16 && !fasa_is_finite_f16((uint16_t) raw); // infinite or NaN: as a language converts it
    const uint32_t wide   = (raw & 0x8000u) << 16 | (raw & 0x3FFu) << 13 | 0x7F800000u;
    const uint32_t bits   = is_odd ? wide : is_f16 ? fasa_bits(fasa_from_f16((uint16_t) raw)) : type == FASA_TYPE_BF16 ? raw << 16 : raw;
    if (type_k == type || !fasa_is_finite(bits)) {
        return bits;
    }
    if (type_k == FASA_TYPE_F16) {
        const uint16_t rounded = fasa_to_f16(fasa_float(bits));
        return fasa_is_finite_f16(rounded) ? fasa_bits(fasa_from_f16(rounded)) : (bits & 0x80000000u) | 0x7F800000u;
    }
    return type_k == FASA_TYPE_BF16 ? fasa_bits(fasa_from_bf16(fasa_to_bf16(fasa_float(bits)))) : bits;
}

// The level of an element, ../README.md. Not inlined: the compiler would make code of its own for every pair of types, 50 KB, which
// drives the other kernels out of the caches of instructions.
FASA_FN_OUTLINED uint32_t fasa_key_level(int32_t type, int32_t type_k, uint32_t raw, float centre, float step) {
    const uint32_t bits    = fasa_key_element(type, type_k, raw);
    const float    inverse = step > 0.0f ? fasa_div(1.0f, step) : 0.0f;
    if (!fasa_is_finite(bits)) {
        return bits == 0x7F800000u && inverse > 0.0f ? FASA_LEVELS - 1 : 0;
    }
    const float steps = fasa_mul(fasa_float(bits) - centre, inverse);
    const float least = -FASA_LEVELS/2;
    const float most  = FASA_LEVELS/2 - 1;
    return (uint32_t) (fasa_floor(steps > least ? steps < most ? steps : most : least) + FASA_LEVELS/2);
}

// dims of a lane, at most: each lane has every 32nd
#define FASA_LANE_DIMS 8

// of a warp's key, what is known before it is there
struct fasa_store_key {
    int64_t id;    // where it lies and its tip belongs, stream by stream; negative: there is none
    int32_t token;
    int32_t head;
    int32_t dims    [FASA_LANE_DIMS]; // of the lane, -1: none
    float   centres [FASA_LANE_DIMS];
    float   steps   [FASA_LANE_DIMS];
};

// blocks of threads: FASA_WARPS keys each
FASA_FN fasa_store_key fasa_store_begin(
        FASA_THREAD const fasa_store_args & args,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const float   * ranges,
        FASA_GLOBAL const int64_t * idxs,
        fasa_at at) {
    const int32_t ir = at.x*FASA_WARPS + at.warp;

    fasa_store_key res;
    res.token = ir/args.n_head_kv;
    res.head  = ir%args.n_head_kv;
    res.id    = ir < args.n_tokens*args.n_head_kv ? idxs[res.token] : -1;

    dims   += res.head*args.n_dim;
    ranges += 2*res.head*args.n_dim;
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_LANE_DIMS; ++i) {
        const int32_t dim = i*FASA_WARP + at.lane;
        const bool    is  = dim < args.n_dim;
        res.dims   [i] = is ? dims[dim] : -1;
        res.centres[i] = is ? ranges[dim] : 0.0f;
        res.steps  [i] = is ? ranges[args.n_dim + dim] : 0.0f;
    }
    return res;
}

FASA_FN void fasa_store_end(
        FASA_THREAD const fasa_store_args & args,
        FASA_THREAD const fasa_store_key  & key,
        FASA_GLOBAL char       * tips,
        FASA_GLOBAL const char * k,
        fasa_at at) {
    if (key.id < 0 || key.id >= (int64_t) args.n_cells*args.n_stream) {
        return;
    }
    int64_t cell = key.id;
    int32_t is   = 0;
    FASA_ROLLED
    while (cell >= args.n_cells) { // a division of 64 bits is longer
        cell -= args.n_cells;
        ++is;
    }
    FASA_GLOBAL char       * block = tips + cell/FASA_BLOCK_CELLS*args.nb_tips1 + key.head*args.nb_tips2 + is*args.nb_tips3;
    FASA_GLOBAL const char * row   = k + key.head*args.nb_k1 + (args.cached ? key.id : key.token)*args.nb_k2;
    FASA_GLOBAL uint32_t   * words = (FASA_GLOBAL uint32_t *) block + cell%FASA_BLOCK_CELLS;

    const int32_t i_lane = at.lane%FASA_PAIR; // in a word
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_LANE_DIMS; ++i) {
        if (i*FASA_WARP < args.n_dim) {
            const int32_t id   = fasa_max(key.dims[i], 0);
            const uint32_t raw = args.type == FASA_TYPE_F32 ? ((FASA_GLOBAL const uint32_t *) row)[id] : ((FASA_GLOBAL const uint16_t *) row)[id];
            const uint32_t own = key.dims[i] < 0 ? 0 : fasa_key_level(args.type, args.type_k, raw, key.centres[i], key.steps[i]);

            uint32_t word = own << (8*(i_lane%FASA_QUAD) + 4*(i_lane/FASA_QUAD));
            FASA_UNROLL
            for (int32_t mask = 1; mask < FASA_PAIR; mask *= 2) {
                word |= fasa_shuffle_xor(word, mask);
            }
            const int32_t pair = (i*FASA_WARP + at.lane)/FASA_PAIR;
            if (i_lane == 0 && pair < args.n_pairs) {
                words[pair*FASA_BLOCK_CELLS] = word;
            }
        }
    }
}
