// The tip scores of cells for the query heads that share a choice: what FASA_SELECT counts.

#pragma once

#include "fasa-common.h"

// blocks of cells that a warp scores together
#define FASA_BATCH 2

// a query of smaller elements is zero: their inverse is not finite
#define FASA_LEAST 1e-30f

// the row that a block works on, and its cells
struct fasa_row {
    int32_t head;
    int32_t token;
    int32_t stream;
    int32_t cell0;
    int32_t cell1;

    FASA_GLOBAL const char     * q;    // of the first query head
    FASA_GLOBAL const int32_t  * dims;
    FASA_GLOBAL const char     * tips;
    FASA_GLOBAL const uint16_t * mask;
};

FASA_FN fasa_row fasa_get_row(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * tips,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const char    * mask,
        fasa_at at) {
    const int32_t row = args.row0 + at.y;

    fasa_row res;
    res.head   = row % args.n_head_sel;
    res.token  = row / args.n_head_sel % args.n_tokens;
    res.stream = row / args.n_head_sel / args.n_tokens;
    res.cell0  = at.x*args.n_chunk;
    res.cell1  = fasa_min(res.cell0 + args.n_chunk, args.n_kv);

    const int32_t head_kv = res.head/args.n_shared;

    res.q    = q + res.head*args.n_group*args.nb_q1 + res.token*args.nb_q2 + res.stream*args.nb_q3;
    res.dims = dims + head_kv*args.n_dim;
    res.tips = tips + head_kv*args.nb_tips2 + res.stream*args.nb_tips3;
    res.mask = (FASA_GLOBAL const uint16_t *) (mask + res.token*args.nb_mask1 + res.stream*args.nb_mask3);

    // the warp's first blocks of tips are on their way while the query is rounded
    const int32_t cell = res.cell0 + at.warp*FASA_BATCH*FASA_BLOCK_CELLS;
    for (int32_t i = at.lane*FASA_PREFETCHED; i < FASA_BATCH*(int32_t) args.nb_tips1 && cell + (FASA_BATCH - 1)*FASA_BLOCK_CELLS < res.cell1; i += FASA_WARP*FASA_PREFETCHED) {
        fasa_prefetch(res.tips + cell/FASA_BLOCK_CELLS*args.nb_tips1 + i);
    }
    return res;
}

// the dominant dims of a group's query heads in 8 bits, so that the sums of products are whole numbers
struct fasa_query {
    FASA_SHARED int4    * quads; // [n_quads, tiles] four dims of each head of a tile
    FASA_SHARED float   * scale; // [heads of all tiles]
    FASA_SHARED int32_t * has_say; // [heads of all tiles] not one with dims that are not finite
};

FASA_FN fasa_query fasa_round_query(FASA_THREAD const fasa_select_args & args, FASA_THREAD const fasa_row & row, FASA_SHARED char * shared, fasa_at at) {
    const int32_t n_tiles = (args.n_group + FASA_TILE - 1)/FASA_TILE;

    fasa_query res;
    res.quads = (FASA_SHARED int4 *) shared;
    res.scale = (FASA_SHARED float *) (res.quads + n_tiles*args.n_quads);
    res.has_say = (FASA_SHARED int32_t *) (res.scale + n_tiles*FASA_TILE);

    for (int32_t ig = at.warp; ig < n_tiles*FASA_TILE; ig += FASA_WARPS) {
        FASA_GLOBAL const float   * q     = (FASA_GLOBAL const float *) (row.q + fasa_min(ig, args.n_group - 1)*args.nb_q1);
        FASA_SHARED       int32_t * quads = (FASA_SHARED int32_t *) (res.quads + ig/FASA_TILE*args.n_quads) + ig%FASA_TILE;

        float amax   = 0.0f;
        bool  finite = true;
        for (int32_t i = at.lane; i < args.n_dim; i += FASA_WARP) {
            const uint32_t bits = ((FASA_GLOBAL const uint32_t *) q)[row.dims[i]];
            finite = finite && fasa_is_finite(bits);
            amax   = finite ? fasa_greater(fasa_abs(fasa_float(bits)), amax) : 0.0f;
        }
        amax   = fasa_warp_max(amax);
        finite = fasa_ballot(!finite) == 0;

        const float inverse = finite && amax > FASA_LEAST ? fasa_div(127.0f, amax) : 0.0f;
        for (int32_t iq = at.lane; iq < args.n_quads; iq += FASA_WARP) {
            uint32_t values = 0;
            for (int32_t i = 0; i < FASA_QUAD; ++i) {
                const int32_t id = iq*FASA_QUAD + i;
                const float   x  = id < args.n_dim && inverse > 0.0f ? q[row.dims[id]]*inverse : 0.0f;
                values |= (uint32_t) (fasa_max(-127, fasa_min(127, fasa_round(x))) & 0xFF) << 8*i;
            }
            quads[iq*FASA_TILE] = (int32_t) values;
        }
        if (at.lane == 0) {
            res.scale[ig]   = fasa_div(args.scale*amax, 127.0f);
            res.has_say[ig] = finite && ig < args.n_group;
        }
    }
    fasa_sync_block();
    return res;
}

// scores of some blocks of cells, one cell of each block by lane
struct fasa_scores {
    float of[FASA_BATCH][FASA_TILE];
    bool  visible[FASA_BATCH];
    bool  finite[FASA_BATCH];
};

FASA_FN void fasa_score(
        FASA_THREAD const fasa_select_args & args,
        FASA_THREAD const fasa_row   & row,
        FASA_THREAD const fasa_query & query,
        int32_t tile, int32_t cell0, int32_t lane,
        FASA_THREAD fasa_scores & res) {
    FASA_GLOBAL const char * blocks[FASA_BATCH];
    int32_t dots[FASA_BATCH][FASA_TILE];
    FASA_UNROLL
    for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
        const int32_t cell   = cell0 + ib*FASA_BLOCK_CELLS;
        const bool    inside = cell < row.cell1;

        res.visible[ib] = inside && row.mask[cell + lane] != FASA_F16_MASKED;
        blocks[ib]      = row.tips + (inside ? cell : cell0)/FASA_BLOCK_CELLS*args.nb_tips1; // a block outside is not read
        FASA_UNROLL
        for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
            dots[ib][ih] = 0;
        }
    }

    FASA_SHARED const int4 * quads = query.quads + tile*args.n_quads;
    #pragma unroll 4
    for (int32_t iq = 0; iq < args.n_quads; ++iq) {
        const int4 q = quads[iq];
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            const int32_t tip = ((FASA_GLOBAL const int32_t *) (blocks[ib] + FASA_BLOCK_CELLS*sizeof(uint16_t)))[iq*FASA_BLOCK_CELLS + lane];
            dots[ib][0] = fasa_dot(tip, q.x, dots[ib][0]);
            dots[ib][1] = fasa_dot(tip, q.y, dots[ib][1]);
            dots[ib][2] = fasa_dot(tip, q.z, dots[ib][2]);
            dots[ib][3] = fasa_dot(tip, q.w, dots[ib][3]);
        }
    }
    FASA_UNROLL
    for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
        const uint16_t bits = ((FASA_GLOBAL const uint16_t *) blocks[ib])[lane];
        res.finite[ib] = fasa_is_finite_f16(bits);

        const float scale = fasa_from_f16(res.finite[ib] ? bits : (uint16_t) 0);
        FASA_UNROLL
        for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
            res.of[ib][ih] = (float) dots[ib][ih]*scale*query.scale[tile*FASA_TILE + ih];
        }
    }
}
