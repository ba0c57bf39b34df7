// FASA_STORE: a warp packs the dominant dims of one key into its tip.

#pragma once

#include "fasa-common.h"

// bits of the element as the K cache will hold it
FASA_FN uint32_t fasa_key_element(FASA_THREAD const fasa_store_args & args, FASA_GLOBAL const char * key, int32_t i) {
    if (args.type == FASA_TYPE_F16 && !fasa_is_finite_f16(((FASA_GLOBAL const uint16_t *) key)[i])) {
        return 0x7FC00000u; // NaN
    }
    const uint32_t bits = args.type == FASA_TYPE_F32 ? ((FASA_GLOBAL const uint32_t *) key)[i]
        : args.type == FASA_TYPE_BF16 ? (uint32_t) ((FASA_GLOBAL const uint16_t *) key)[i] << 16
        : fasa_bits(fasa_from_f16(((FASA_GLOBAL const uint16_t *) key)[i]));
    if (!fasa_is_finite(bits)) {
        return bits;
    }
    if (args.type_k == FASA_TYPE_F16) {
        const uint16_t rounded = fasa_to_f16(fasa_float(bits));
        return fasa_is_finite_f16(rounded) ? fasa_bits(fasa_from_f16(rounded)) : 0x7FC00000u;
    }
    return args.type_k == FASA_TYPE_BF16 ? fasa_bits(fasa_from_bf16(fasa_to_bf16(fasa_float(bits)))) : bits;
}

// a warp's key: what is known of it before it is there
struct fasa_store_key {
    int64_t id;                // where it lies and its tip belongs, stream by stream; negative: there is none
    int32_t token;
    int32_t head;
    int32_t dims[FASA_QUAD];   // of the lane's first quad, -1: none
};

// blocks of threads: FASA_WARPS keys each
FASA_FN fasa_store_key fasa_store_begin(
        FASA_THREAD const fasa_store_args & args,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const int64_t * idxs,
        fasa_at at) {
    const int32_t ir = at.x*FASA_WARPS + at.warp;

    fasa_store_key res;
    res.token = ir/args.n_head_kv;
    res.head  = ir%args.n_head_kv;
    res.id    = ir < args.n_tokens*args.n_head_kv ? idxs[res.token] : -1;
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_QUAD; ++i) {
        const int32_t id = at.lane*FASA_QUAD + i;
        res.dims[i] = id < args.n_dim ? dims[res.head*args.n_dim + id] : -1;
    }
    return res;
}

FASA_FN void fasa_store_end(
        FASA_THREAD const fasa_store_args & args,
        FASA_THREAD const fasa_store_key  & key,
        FASA_GLOBAL char          * tips,
        FASA_GLOBAL const char    * k,
        FASA_GLOBAL const int32_t * dims,
        fasa_at at) {
    if (key.id < 0 || key.id >= (int64_t) args.n_cells*args.n_stream) {
        return;
    }
    const int32_t is   = (int32_t) (key.id/args.n_cells);
    const int32_t cell = (int32_t) (key.id%args.n_cells);
    const int32_t slot = cell%FASA_BLOCK_CELLS;

    FASA_GLOBAL char       * block = tips + cell/FASA_BLOCK_CELLS*args.nb_tips1 + key.head*args.nb_tips2 + is*args.nb_tips3;
    FASA_GLOBAL const char * row   = k + key.head*args.nb_k1 + (args.cached ? key.id : key.token)*args.nb_k2;

    dims += key.head*args.n_dim;

    float first[FASA_QUAD] = { 0.0f, 0.0f, 0.0f, 0.0f }; // most keys have one quad for each lane at most
    float amax   = 0.0f;
    bool  finite = true;
    FASA_ROLLED
    for (int32_t iq = at.lane; iq < args.n_quads; iq += FASA_WARP) {
        FASA_UNROLL
        for (int32_t i = 0; i < FASA_QUAD; ++i) {
            const int32_t  id   = iq*FASA_QUAD + i;
            const uint32_t bits = id < args.n_dim ? fasa_key_element(args, row, iq == at.lane ? key.dims[i] : dims[id]) : 0;
            finite   = finite && fasa_is_finite(bits);
            amax     = finite ? fasa_greater(fasa_abs(fasa_float(bits)), amax) : 0.0f;
            first[i] = iq == at.lane ? fasa_float(bits) : first[i];
        }
    }
    amax   = fasa_warp_max(amax);
    finite = fasa_ballot(!finite) == 0;

    // the f16 scale is what select multiplies by: quantize against the rounded one
    const uint16_t scale   = fasa_to_f16(finite ? fasa_div(amax, 127.0f) : 0.0f);
    const float    d       = fasa_from_f16(scale);
    const float    inverse = d > 0.0f ? fasa_div(1.0f, d) : 0.0f;

    if (at.lane == 0) {
        ((FASA_GLOBAL uint16_t *) block)[slot] = finite ? scale : FASA_F16_NAN;
    }

    FASA_GLOBAL uint32_t * quads = (FASA_GLOBAL uint32_t *) (block + FASA_BLOCK_CELLS*sizeof(uint16_t));
    FASA_ROLLED
    for (int32_t iq = at.lane; iq < args.n_quads; iq += FASA_WARP) {
        uint32_t values = 0;
        FASA_UNROLL
        for (int32_t i = 0; i < FASA_QUAD; ++i) {
            const int32_t id = iq*FASA_QUAD + i;
            const float   x  = iq == at.lane ? first[i] : id < args.n_dim ? fasa_float(fasa_key_element(args, row, dims[id])) : 0.0f;
            const int32_t v  = inverse > 0.0f && id < args.n_dim ? fasa_max(-127, fasa_min(127, fasa_round(x*inverse))) : 0;
            values |= (uint32_t) (v & 0xFF) << 8*i;
        }
        quads[iq*FASA_BLOCK_CELLS + slot] = values;
    }
}
