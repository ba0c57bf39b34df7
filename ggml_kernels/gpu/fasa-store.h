// FASA_STORE: a warp packs the dominant dims of one key into its tip.

#pragma once

#include "fasa-common.h"

// bits of a key's element as the K cache will hold it, as a float; a function of its own, or the code would be fifteen times as long:
// every combination of types
FASA_FN_OUTLINED uint32_t fasa_key_element(int32_t type, int32_t type_k, uint32_t raw) {
    if (type == FASA_TYPE_F16 && !fasa_is_finite_f16((uint16_t) raw)) {
        return 0x7FC00000u; // NaN
    }
    const uint32_t bits = type == FASA_TYPE_F32 ? raw : type == FASA_TYPE_BF16 ? raw << 16 : fasa_bits(fasa_from_f16((uint16_t) raw));
    if (!fasa_is_finite(bits)) {
        return bits;
    }
    if (type_k == FASA_TYPE_F16) {
        const uint16_t rounded = fasa_to_f16(fasa_float(bits));
        return fasa_is_finite_f16(rounded) ? fasa_bits(fasa_from_f16(rounded)) : 0x7FC00000u;
    }
    return type_k == FASA_TYPE_BF16 ? fasa_bits(fasa_from_bf16(fasa_to_bf16(fasa_float(bits)))) : bits;
}

// the elements of a quad, all asked for before any is needed; ids: -1 for none
FASA_FN void fasa_key_quad(
        FASA_THREAD const fasa_store_args & args, FASA_GLOBAL const char * row, FASA_THREAD const int32_t (& ids)[FASA_QUAD], FASA_THREAD uint32_t (& bits)[FASA_QUAD]) {
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_QUAD; ++i) {
        const int32_t id = fasa_max(ids[i], 0);
        bits[i] = args.type == FASA_TYPE_F32 ? ((FASA_GLOBAL const uint32_t *) row)[id] : ((FASA_GLOBAL const uint16_t *) row)[id];
    }
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_QUAD; ++i) {
        bits[i] = ids[i] < 0 ? 0 : fasa_key_element(args.type, args.type_k, bits[i]);
    }
}

FASA_FN void fasa_quad_ids(FASA_THREAD const fasa_store_args & args, FASA_GLOBAL const int32_t * dims, int32_t iq, FASA_THREAD int32_t (& ids)[FASA_QUAD]) {
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_QUAD; ++i) {
        ids[i] = iq*FASA_QUAD + i < args.n_dim ? dims[iq*FASA_QUAD + i] : -1;
    }
}

// the greatest of a quad's elements, unless one is not finite
FASA_FN void fasa_add_quad(FASA_THREAD const uint32_t (& bits)[FASA_QUAD], FASA_THREAD float & amax, FASA_THREAD bool & finite) {
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_QUAD; ++i) {
        finite = finite && fasa_is_finite(bits[i]);
        amax   = finite ? fasa_greater(fasa_abs(fasa_float(bits[i])), amax) : 0.0f;
    }
}

FASA_FN uint32_t fasa_pack_quad(FASA_THREAD const uint32_t (& bits)[FASA_QUAD], float inverse) {
    uint32_t res = 0;
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_QUAD; ++i) {
        const int32_t v = inverse > 0.0f ? fasa_max(-127, fasa_min(127, fasa_round(fasa_float(bits[i])*inverse))) : 0;
        res |= (uint32_t) (v & 0xFF) << 8*i;
    }
    return res;
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
    fasa_quad_ids(args, dims + res.head*args.n_dim, at.lane, res.dims);
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
    int64_t cell = key.id;
    int32_t is   = 0;
    FASA_ROLLED
    while (cell >= args.n_cells) { // a division of 64 bits is longer
        cell -= args.n_cells;
        ++is;
    }
    const int32_t slot = cell%FASA_BLOCK_CELLS;

    FASA_GLOBAL char       * block = tips + cell/FASA_BLOCK_CELLS*args.nb_tips1 + key.head*args.nb_tips2 + is*args.nb_tips3;
    FASA_GLOBAL const char * row   = k + key.head*args.nb_k1 + (args.cached ? key.id : key.token)*args.nb_k2;

    // most keys have one quad for each lane at most
    uint32_t first[FASA_QUAD];
    float amax   = 0.0f;
    bool  finite = true;
    fasa_key_quad(args, row, key.dims, first);
    fasa_add_quad(first, amax, finite);
    FASA_ROLLED
    for (int32_t iq = at.lane + FASA_WARP; iq < args.n_quads; iq += FASA_WARP) {
        int32_t  ids[FASA_QUAD];
        uint32_t bits[FASA_QUAD];
        fasa_quad_ids(args, dims + key.head*args.n_dim, iq, ids);
        fasa_key_quad(args, row, ids, bits);
        fasa_add_quad(bits, amax, finite);
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
    if (at.lane < args.n_quads) {
        quads[at.lane*FASA_BLOCK_CELLS + slot] = fasa_pack_quad(first, inverse);
    }
    FASA_ROLLED
    for (int32_t iq = at.lane + FASA_WARP; iq < args.n_quads; iq += FASA_WARP) {
        int32_t  ids[FASA_QUAD];
        uint32_t bits[FASA_QUAD];
        fasa_quad_ids(args, dims + key.head*args.n_dim, iq, ids);
        fasa_key_quad(args, row, ids, bits);
        quads[iq*FASA_BLOCK_CELLS + slot] = fasa_pack_quad(bits, inverse);
    }
}
