// The tip scores of cells for the query heads that share a choice: what FASA_SELECT counts.

#pragma once

#include "fasa-common.h"

// a query of smaller elements is zero: their inverse is not finite
#define FASA_LEAST 1e-30f

// the row that a block of threads works on, and its part of it: the blocks of cells part, part + n_parts, and so on
struct fasa_row {
    int32_t head;
    int32_t token;
    int32_t stream;
    int32_t part;
    int32_t n_own; // blocks of cells

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
    res.part   = at.x;
    res.n_own  = (args.n_kv/FASA_BLOCK_CELLS - at.x + args.n_parts - 1)/args.n_parts;

    const int32_t head_kv = res.head/args.n_shared;

    res.q    = q + res.head*args.n_group*args.nb_q1 + res.token*args.nb_q2 + res.stream*args.nb_q3;
    res.dims = dims + head_kv*args.n_dim;
    res.tips = tips + head_kv*args.nb_tips2 + res.stream*args.nb_tips3;
    res.mask = (FASA_GLOBAL const uint16_t *) (mask + res.token*args.nb_mask1 + res.stream*args.nb_mask3);
    return res;
}

// query heads that share a choice are scored by tiles
FASA_FN int32_t fasa_n_tiles(FASA_THREAD const fasa_select_args & args) {
    return (args.n_group + FASA_TILE - 1)/FASA_TILE;
}

// the i-th of its blocks of cells
FASA_FN int32_t fasa_own_block(FASA_THREAD const fasa_select_args & args, FASA_THREAD const fasa_row & row, int32_t i) {
    return row.part + i*args.n_parts;
}

// its blocks of tips from begin to end are on their way, and what of the mask belongs to them
FASA_FN void fasa_prefetch_tips(FASA_THREAD const fasa_select_args & args, FASA_THREAD const fasa_row & row, int32_t begin, int32_t end, fasa_at at) {
    FASA_ROLLED
    for (int32_t i = begin + at.warp; i < fasa_min(end, row.n_own); i += FASA_WARPS) {
        const int32_t own = fasa_own_block(args, row, i);
        if (at.lane == FASA_WARP - 1) {
            fasa_prefetch(row.mask + own*FASA_BLOCK_CELLS);
        }
        FASA_GLOBAL const char * block = row.tips + own*args.nb_tips1;
        FASA_ROLLED
        for (int32_t byte = at.lane*FASA_PREFETCHED; byte < (int32_t) args.nb_tips1; byte += FASA_WARP*FASA_PREFETCHED) {
            fasa_prefetch(block + byte);
        }
    }
}

// the dominant dims of a group's query heads in 8 bits, so that the sums of products are whole numbers
struct fasa_query {
    FASA_SHARED int4    * quads; // [n_quads, tiles] four dims of each head of a tile
    FASA_SHARED float   * scale; // [heads of all tiles]
    FASA_SHARED int32_t * has_say; // [heads of all tiles] not one with dims that are not finite
};

// the dims of a lane's first quad
struct fasa_first_dims {
    int32_t ids[FASA_QUAD];
};

FASA_FN fasa_first_dims fasa_get_first_dims(FASA_THREAD const fasa_select_args & args, FASA_THREAD const fasa_row & row, int32_t lane) {
    fasa_first_dims res;
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_QUAD; ++i) {
        res.ids[i] = lane*FASA_QUAD + i < args.n_dim ? row.dims[lane*FASA_QUAD + i] : -1;
    }
    return res;
}

FASA_FN fasa_query fasa_round_query(
        FASA_THREAD const fasa_select_args & args,
        FASA_THREAD const fasa_row         & row,
        FASA_THREAD const fasa_first_dims  & dims,
        FASA_SHARED char                   * shared,
        fasa_at at) {
    const int32_t n_tiles = fasa_n_tiles(args);

    fasa_query res;
    res.quads = (FASA_SHARED int4 *) shared;
    res.scale = (FASA_SHARED float *) (res.quads + n_tiles*args.n_quads);
    res.has_say = (FASA_SHARED int32_t *) (res.scale + n_tiles*FASA_TILE);

    FASA_ROLLED
    for (int32_t ig = at.warp; ig < n_tiles*FASA_TILE; ig += FASA_WARPS) {
        FASA_GLOBAL const float   * q     = (FASA_GLOBAL const float *) (row.q + fasa_min(ig, args.n_group - 1)*args.nb_q1);
        FASA_SHARED       int32_t * quads = (FASA_SHARED int32_t *) (res.quads + ig/FASA_TILE*args.n_quads) + ig%FASA_TILE;

        uint32_t bits[FASA_QUAD];
        float    first[FASA_QUAD];
        float amax   = 0.0f;
        bool  finite = true;
        FASA_UNROLL
        for (int32_t i = 0; i < FASA_QUAD; ++i) {
            bits[i] = dims.ids[i] >= 0 ? ((FASA_GLOBAL const uint32_t *) q)[dims.ids[i]] : 0;
        }
        FASA_UNROLL
        for (int32_t i = 0; i < FASA_QUAD; ++i) {
            first[i] = fasa_float(bits[i]);
            finite   = finite && fasa_is_finite(bits[i]);
            amax     = finite ? fasa_greater(fasa_abs(first[i]), amax) : 0.0f;
        }
        FASA_ROLLED
        for (int32_t i = FASA_WARP*FASA_QUAD + at.lane; i < args.n_dim; i += FASA_WARP) { // few heads have as many
            const uint32_t more = ((FASA_GLOBAL const uint32_t *) q)[row.dims[i]];
            finite = finite && fasa_is_finite(more);
            amax   = finite ? fasa_greater(fasa_abs(fasa_float(more)), amax) : 0.0f;
        }
        amax   = fasa_warp_max(amax);
        finite = fasa_ballot(!finite) == 0;

        const float inverse = finite && amax > FASA_LEAST ? fasa_div(127.0f, amax) : 0.0f;
        FASA_ROLLED
        for (int32_t iq = at.lane; iq < args.n_quads; iq += FASA_WARP) {
            uint32_t values = 0;
            FASA_UNROLL
            for (int32_t i = 0; i < FASA_QUAD; ++i) {
                const int32_t id = iq*FASA_QUAD + i;
                const float   x  = iq == at.lane ? first[i] : id < args.n_dim ? q[row.dims[id]] : 0.0f;
                values |= (uint32_t) (inverse > 0.0f ? fasa_max(-127, fasa_min(127, fasa_round(x*inverse))) & 0xFF : 0) << 8*i;
            }
            quads[iq*FASA_TILE] = (int32_t) values;
        }
        if (at.lane == 0) {
            res.scale[ig]   = fasa_div(args.scale*(amax < args.max_query ? amax : args.max_query), 127.0f);
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

// of its blocks i, i + FASA_WARPS and so on, as far as there are; layout of tips: ../fasa-tips.h
FASA_FN void fasa_score(
        FASA_THREAD const fasa_select_args & args,
        FASA_THREAD const fasa_row   & row,
        FASA_THREAD const fasa_query & query,
        int32_t tile, int32_t i, int32_t lane,
        FASA_THREAD fasa_scores & res) {
    FASA_GLOBAL const char * blocks[FASA_BATCH];
    int32_t dots[FASA_BATCH][FASA_TILE];
    FASA_UNROLL
    for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
        const bool    inside = i + ib*FASA_WARPS < row.n_own;
        const int32_t block  = fasa_own_block(args, row, inside ? i + ib*FASA_WARPS : i); // one outside is not read

        res.visible[ib] = inside && row.mask[block*FASA_BLOCK_CELLS + lane] != FASA_F16_MASKED;
        blocks[ib]      = row.tips + block*args.nb_tips1;
        FASA_UNROLL
        for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
            dots[ib][ih] = 0;
        }
    }

    FASA_SHARED const int4 * quads = query.quads + tile*args.n_quads;
    #pragma unroll 8
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
            res.of[ib][ih] = fasa_mul(fasa_mul((float) dots[ib][ih], scale), query.scale[tile*FASA_TILE + ih]);
        }
    }
}

//
// statistics: the greatest score of a query head and the sum of 2^(score - greatest), of some cells
//

struct fasa_stats {
    float max[FASA_TILE];
    float sum[FASA_TILE];
    bool  finite; // no visible cell's score is not
};

FASA_FN fasa_stats fasa_no_stats() {
    fasa_stats res;
    FASA_UNROLL
    for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
        res.max[ih] = -FASA_FLT_MAX;
        res.sum[ih] = 0.0f;
    }
    res.finite = true;
    return res;
}

// scores that a lane has seen; from then on, visible means finite as well
FASA_FN void fasa_add_scores(FASA_THREAD fasa_stats & stats, FASA_THREAD fasa_scores & scores) {
    FASA_UNROLL
    for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
        stats.finite = stats.finite && (scores.finite[ib] || !scores.visible[ib]);
        scores.visible[ib] = scores.visible[ib] && scores.finite[ib];
    }
    FASA_UNROLL
    for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
        float greatest = stats.max[ih];
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            greatest = scores.visible[ib] ? fasa_greater(scores.of[ib][ih], greatest) : greatest;
        }
        stats.sum[ih] *= fasa_exp2(stats.max[ih] - greatest);
        stats.max[ih]  = greatest;
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            stats.sum[ih] += scores.visible[ib] ? fasa_exp2(scores.of[ib][ih] - greatest) : 0.0f;
        }
    }
}

// two sets of cells together; -1 where a score is not finite
FASA_FN void fasa_join_stats(FASA_THREAD float & max, FASA_THREAD float & sum, float max_b, float sum_b) {
    const float greatest = fasa_greater(max_b, max);
    const float both     = sum*fasa_exp2(max - greatest) + sum_b*fasa_exp2(max_b - greatest);
    sum = sum < 0.0f || sum_b < 0.0f ? -1.0f : both;
    max = greatest;
}

// a tile's, of all lanes of a warp; shared: [2, FASA_WARPS, heads of all tiles]
FASA_FN void fasa_join_lanes(FASA_THREAD fasa_stats & stats, int32_t tile, FASA_SHARED float * shared, fasa_at at) {
    const bool finite = fasa_ballot(!stats.finite) == 0;
    FASA_UNROLL
    for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
        const float max = fasa_warp_max(stats.max[ih]);
        const float sum = fasa_warp_sum(stats.sum[ih]*fasa_exp2(stats.max[ih] - max), 1, FASA_WARP);
        if (at.lane == 0) {
            FASA_SHARED float * res = shared + 2*((tile*FASA_TILE + ih)*FASA_WARPS + at.warp);
            res[0] = max;
            res[1] = finite ? sum : -1.0f;
        }
    }
}

// of all warps, which have met since; to: [2, n_group]
FASA_FN void fasa_join_warps(FASA_THREAD const fasa_select_args & args, FASA_SHARED const float * shared, FASA_GLOBAL float * to, fasa_at at) {
    const int32_t n_heads = fasa_n_tiles(args)*FASA_TILE;

    // a lane for each warp of a head, so that all lanes of a warp have something to do, or nothing
    FASA_ROLLED
    for (int32_t i = at.index; i < n_heads*FASA_WARPS; i += FASA_THREADS) {
        float max = shared[2*i + 0];
        float sum = shared[2*i + 1];
        FASA_UNROLL
        for (int32_t mask = 1; mask < FASA_WARPS; mask *= 2) {
            const float max_b = fasa_shuffle_xor(max, mask);
            const float sum_b = fasa_shuffle_xor(sum, mask);
            fasa_join_stats(max, sum, max_b, sum_b);
        }
        const int32_t ig = i/FASA_WARPS;
        if (i%FASA_WARPS == 0 && ig < args.n_group) {
            to[2*ig + 0] = max;
            to[2*ig + 1] = sum;
        }
    }
}
