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
    FASA_GLOBAL const float    * steps;
    FASA_GLOBAL const char     * tips;
    FASA_GLOBAL const uint16_t * mask;
};

FASA_FN fasa_row fasa_get_row(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * tips,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const float   * ranges,
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
    res.steps = ranges + (2*head_kv + 1)*args.n_dim;
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

// the dominant dims of a group's query heads, in units of the steps of the tips, in 8 bits: the sums of products are whole numbers
struct fasa_query {
    FASA_SHARED int4    * quads; // [2*n_pairs, tiles] four dims of each head of a tile
    FASA_SHARED float   * scale; // [heads of all tiles]
    FASA_SHARED int32_t * has_say; // [heads of all tiles] not one with dims that are not finite
};

// a lane's dims: those of two quads, as many as there are of them (../README.md: heads of up to 256 dims)
struct fasa_own_dims {
    int32_t ids[FASA_PAIR];   // -1: none
    float   steps[FASA_PAIR];
};

FASA_FN fasa_own_dims fasa_get_own_dims(FASA_THREAD const fasa_select_args & args, FASA_THREAD const fasa_row & row, int32_t lane) {
    fasa_own_dims res;
    FASA_UNROLL
    for (int32_t i = 0; i < FASA_PAIR; ++i) {
        const bool is = lane*FASA_PAIR + i < args.n_dim;
        res.ids[i]   = is ? row.dims[lane*FASA_PAIR + i] : -1;
        res.steps[i] = is ? row.steps[lane*FASA_PAIR + i] : 0.0f;
    }
    return res;
}

FASA_FN fasa_query fasa_round_query(
        FASA_THREAD const fasa_select_args & args,
        FASA_THREAD const fasa_row         & row,
        FASA_THREAD const fasa_own_dims    & dims,
        FASA_SHARED char                   * shared,
        fasa_at at) {
    const int32_t n_tiles = fasa_n_tiles(args);
    const int32_t n_quads = 2*args.n_pairs;

    fasa_query res;
    res.quads = (FASA_SHARED int4 *) shared;
    res.scale = (FASA_SHARED float *) (res.quads + n_tiles*n_quads);
    res.has_say = (FASA_SHARED int32_t *) (res.scale + n_tiles*FASA_TILE);

    FASA_ROLLED
    for (int32_t ig = at.warp; ig < n_tiles*FASA_TILE; ig += FASA_WARPS) {
        FASA_GLOBAL const uint32_t * q = (FASA_GLOBAL const uint32_t *) (row.q + fasa_min(ig, args.n_group - 1)*args.nb_q1);

        uint32_t bits[FASA_PAIR];
        float    x[FASA_PAIR];
        float    amax   = 0.0f;
        bool     finite = true;
        FASA_UNROLL
        for (int32_t i = 0; i < FASA_PAIR; ++i) {
            bits[i] = q[fasa_max(dims.ids[i], 0)];
        }
        FASA_UNROLL
        for (int32_t i = 0; i < FASA_PAIR; ++i) {
            x[i]   = dims.ids[i] >= 0 ? fasa_mul(fasa_float(bits[i]), dims.steps[i]) : 0.0f;
            finite = finite && (dims.ids[i] < 0 || fasa_is_finite(bits[i])) && fasa_is_finite(fasa_bits(x[i])); // or too great
            amax   = finite ? fasa_greater(fasa_abs(x[i]), amax) : 0.0f;
        }
        amax   = fasa_warp_max(amax);
        finite = fasa_ballot(!finite) == 0;

        const float inverse = finite && amax > FASA_LEAST ? fasa_div(127.0f, amax) : 0.0f;
        if (at.lane < args.n_pairs) {
            FASA_UNROLL
            for (int32_t half = 0; half < 2; ++half) {
                uint32_t values = 0;
                FASA_UNROLL
                for (int32_t i = 0; i < FASA_QUAD; ++i) {
                    const int32_t value = inverse > 0.0f ? fasa_max(-127, fasa_min(127, fasa_round(x[half*FASA_QUAD + i]*inverse))) : 0;
                    values |= (uint32_t) (value & 0xFF) << 8*i;
                }
                ((FASA_SHARED int32_t *) (res.quads + ig/FASA_TILE*n_quads + 2*at.lane + half))[ig%FASA_TILE] = (int32_t) values;
            }
        }
        if (at.lane == 0) {
            res.scale[ig]   = fasa_div(args.scale*(amax < args.max_query ? amax : args.max_query), 127.0f);
            res.has_say[ig] = finite && ig < args.n_group;
        }
    }
    fasa_sync_block();
    return res;
}

// the levels of eight dims, as a dot product takes them
struct fasa_pair {
    int32_t low;
    int32_t high;
};

FASA_FN fasa_pair fasa_unpack(uint32_t word) {
    return { (int32_t) (word & 0x0F0F0F0Fu), (int32_t) (word >> 4 & 0x0F0F0F0Fu) };
}

// scores of some blocks of cells, one cell of each block by lane
struct fasa_scores {
    float of[FASA_BATCH][FASA_TILE];
    bool  visible[FASA_BATCH];
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

    FASA_SHARED const int4 * quads = query.quads + 2*tile*args.n_pairs;
    #pragma unroll 4
    for (int32_t ip = 0; ip < args.n_pairs; ++ip) {
        const int4 low  = quads[2*ip];
        const int4 high = quads[2*ip + 1];
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            const fasa_pair tip = fasa_unpack(((FASA_GLOBAL const uint32_t *) blocks[ib])[ip*FASA_BLOCK_CELLS + lane]);
            dots[ib][0] = fasa_dot(tip.high, high.x, fasa_dot(tip.low, low.x, dots[ib][0]));
            dots[ib][1] = fasa_dot(tip.high, high.y, fasa_dot(tip.low, low.y, dots[ib][1]));
            dots[ib][2] = fasa_dot(tip.high, high.z, fasa_dot(tip.low, low.z, dots[ib][2]));
            dots[ib][3] = fasa_dot(tip.high, high.w, fasa_dot(tip.low, low.w, dots[ib][3]));
        }
    }
    FASA_UNROLL
    for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
        FASA_UNROLL
        for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
            res.of[ib][ih] = fasa_mul((float) dots[ib][ih], query.scale[tile*FASA_TILE + ih]);
        }
    }
}

//
// statistics: the greatest score of a query head and the sum of 2^(score - greatest), of some cells
//

struct fasa_stats {
    float max[FASA_TILE];
    float sum[FASA_TILE];
};

FASA_FN fasa_stats fasa_no_stats() {
    fasa_stats res;
    FASA_UNROLL
    for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
        res.max[ih] = -FASA_FLT_MAX;
        res.sum[ih] = 0.0f;
    }
    return res;
}

// scores that a lane has seen
FASA_FN void fasa_add_scores(FASA_THREAD fasa_stats & stats, FASA_THREAD const fasa_scores & scores) {
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

// two sets of cells together
FASA_FN void fasa_join_stats(FASA_THREAD float & max, FASA_THREAD float & sum, float max_b, float sum_b) {
    const float greatest = fasa_greater(max_b, max);
    sum = sum*fasa_exp2(max - greatest) + sum_b*fasa_exp2(max_b - greatest);
    max = greatest;
}

// a tile's, of all lanes of a warp; shared: [2, FASA_WARPS, heads of all tiles]
FASA_FN void fasa_join_lanes(FASA_THREAD fasa_stats & stats, int32_t tile, FASA_SHARED float * shared, fasa_at at) {
    FASA_UNROLL
    for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
        const float max = fasa_warp_max(stats.max[ih]);
        const float sum = fasa_warp_sum(stats.sum[ih]*fasa_exp2(stats.max[ih] - max), 1, FASA_WARP);
        if (at.lane == 0) {
            FASA_SHARED float * res = shared + 2*((tile*FASA_TILE + ih)*FASA_WARPS + at.warp);
            res[0] = max;
            res[1] = sum;
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
