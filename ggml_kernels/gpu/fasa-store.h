// FASA_STORE: a warp packs the dominant dims of one key into its tip.

#pragma once

#include "fasa-common.h"

// the element as the K cache will hold it
FASA_FN float fasa_key_element(FASA_THREAD const fasa_store_args & args, FASA_GLOBAL const char * key, int32_t i) {
    const float x = args.type == FASA_TYPE_F16 ? fasa_from_f16(((FASA_GLOBAL const uint16_t *) key)[i]) : ((FASA_GLOBAL const float *) key)[i];
    switch (args.type_k) {
        case FASA_TYPE_F16:  return fasa_from_f16(fasa_to_f16(x));
        case FASA_TYPE_BF16: return fasa_from_bf16(fasa_to_bf16(x));
        default:             return x;
    }
}

// blocks of threads: FASA_WARPS keys each
FASA_FN void fasa_store(
        FASA_THREAD const fasa_store_args & args,
        FASA_GLOBAL char          * tips,
        FASA_GLOBAL const char    * k,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const int64_t * idxs,
        fasa_at at) {
    const int32_t ir = at.x*FASA_WARPS + at.warp;
    if (ir >= args.n_tokens*args.n_head_kv) {
        return;
    }
    const int32_t it = ir/args.n_head_kv;
    const int32_t ih = ir%args.n_head_kv;

    const int64_t id = idxs[it];
    if (id < 0 || id >= (int64_t) args.n_cells*args.n_stream) {
        return;
    }
    const int32_t is   = (int32_t) (id/args.n_cells);
    const int32_t cell = (int32_t) (id%args.n_cells);
    const int32_t slot = cell%FASA_TIPS_CELLS;

    FASA_GLOBAL char       * block = tips + cell/FASA_TIPS_CELLS*args.nb_tips1 + ih*args.nb_tips2 + is*args.nb_tips3;
    FASA_GLOBAL const char * key   = k + ih*args.nb_k1 + it*args.nb_k2;

    dims += ih*args.n_dim;

    float amax   = 0.0f;
    bool  finite = true;
    for (int32_t i = at.lane; i < args.n_dim; i += FASA_WARP) {
        const float x = fasa_key_element(args, key, dims[i]);
        amax   = fasa_greater(x < 0.0f ? -x : x, amax);
        finite = finite && fasa_is_finite(x);
    }
    amax   = fasa_warp_max(amax);
    finite = fasa_ballot(!finite) == 0;

    // the f16 scale is what select multiplies by: quantize against the rounded one
    const uint16_t scale   = finite ? fasa_to_f16(amax/127.0f) : 0x7E00; // NaN, as the score will be
    const float    d       = fasa_from_f16(scale);
    const float    inverse = finite && d > 0.0f ? 1.0f/d : 0.0f;

    if (at.lane == 0) {
        ((FASA_GLOBAL uint16_t *) block)[slot] = scale;
    }

    FASA_GLOBAL uint32_t * quads = (FASA_GLOBAL uint32_t *) (block + FASA_TIPS_CELLS*sizeof(uint16_t));
    for (int32_t iq = at.lane; iq < args.n_quads; iq += FASA_WARP) {
        uint32_t quad = 0;
        for (int32_t i = 0; i < FASA_TIPS_QUAD; ++i) {
            const int32_t id = iq*FASA_TIPS_QUAD + i;
            const float   x  = id < args.n_dim && inverse > 0.0f ? fasa_key_element(args, key, dims[id])*inverse : 0.0f;
            quad |= (uint32_t) (fasa_max(-127, fasa_min(127, fasa_round(x))) & 0xFF) << 8*i;
        }
        quads[iq*FASA_TIPS_CELLS + slot] = quad;
    }
}
