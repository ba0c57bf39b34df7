// FASA_SELECT: scores every cell on its tips and lists the best ones, in four steps.
//
//   stats   greatest tip score of each query head, and sum of exp, by chunks of cells
//   keys    one score per cell, comparable between the query heads of a group, as a number whose order is that of the
//           scores; a histogram of them
//   mark    the cells in better bins of the histogram than the n_fac-th best cell; a list of those in its own bin
//   list    the best of that bin; all ids in ascending order
//
// A step needs all blocks of the one before, so the steps are launches; or the last block of mark lists. The tips are read
// twice, which is less than writing the scores of all query heads and reading them again, and the second time often comes
// from the cache. No step depends on the order in which threads run: sums are made in a fixed order, atomics count.
//
// The contract is in ../README.md, the bins are those of ../cpu/fasa-score.h.

#pragma once

#include "fasa-common.h"

// blocks of cells that a warp scores together
#define FASA_BATCH 2

#define FASA_BIN_SHIFT 17
#define FASA_BIN_FIRST ((127 - 6) << (23 - FASA_BIN_SHIFT)) // upper bits of 2^-6

#define FASA_KEY_MASKED 0u
#define FASA_KEY_FORCED 0xFFFFFFFFu

// candidates that are put in order by comparing each with all
#define FASA_RANKED 256

// a query of smaller elements is zero: their inverse is not finite
#define FASA_LEAST 1e-30f

//
// memory
//

// what is kept from one step to the next, of all rows of a launch
struct fasa_select_memory {
    FASA_GLOBAL float          * stats; // [2, n_group, n_chunks, n_rows] maximum and sum, in units of log(2)
    FASA_GLOBAL uint32_t       * keys;  // [n_kv, n_rows]
    FASA_GLOBAL uint32_t       * found; // [n_kv, n_rows] ids
    FASA_GLOBAL uint32_t       * marks; // [n_kv/32, n_rows] a bit for each cell
    FASA_GLOBAL fasa_row_state * state; // [n_rows]
};

FASA_FN fasa_select_memory fasa_divide(FASA_THREAD const fasa_select_args & args, FASA_GLOBAL char * memory) {
    const int64_t n_rows = args.n_rows;

    fasa_select_memory res;
    res.state = (FASA_GLOBAL fasa_row_state *) memory;
    res.keys  = (FASA_GLOBAL uint32_t *) (res.state + n_rows);
    res.found = res.keys  + n_rows*args.n_kv;
    res.marks = res.found + n_rows*args.n_kv;
    res.stats = (FASA_GLOBAL float *) (res.marks + n_rows*(args.n_kv/32));
    return res;
}

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

//
// tip scores
//

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
            uint32_t quad = 0;
            for (int32_t i = 0; i < FASA_QUAD; ++i) {
                const int32_t id = iq*FASA_QUAD + i;
                const float   x  = id < args.n_dim && inverse > 0.0f ? q[row.dims[id]]*inverse : 0.0f;
                quad |= (uint32_t) (fasa_max(-127, fasa_min(127, fasa_round(x))) & 0xFF) << 8*i;
            }
            quads[iq*FASA_TILE] = (int32_t) quad;
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

//
// stats
//

// the sums of 2^(score - max) of two sets of cells together; -1 where a score is not finite
FASA_FN void fasa_add_stats(FASA_THREAD float & max, FASA_THREAD float & sum, float max_b, float sum_b) {
    const float greatest = fasa_greater(max_b, max);
    const float both     = sum*fasa_exp2(max - greatest) + sum_b*fasa_exp2(max_b - greatest);
    sum = sum < 0.0f || sum_b < 0.0f ? -1.0f : both;
    max = greatest;
}

// shared: the query, then [2, heads of all tiles, FASA_WARPS] floats
FASA_FN void fasa_select_stats(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * tips,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const char    * mask,
        FASA_GLOBAL char          * memory,
        FASA_SHARED char          * shared,
        fasa_at at) {
    const fasa_select_memory mem   = fasa_divide(args, memory);
    const fasa_row           row   = fasa_get_row(args, q, tips, dims, mask, at);
    const fasa_query         query = fasa_round_query(args, row, shared, at);

    const int32_t n_tiles = (args.n_group + FASA_TILE - 1)/FASA_TILE;

    FASA_SHARED float * stats = (FASA_SHARED float *) (query.has_say + n_tiles*FASA_TILE);

    for (int32_t tile = 0; tile < n_tiles; ++tile) {
        float max[FASA_TILE];
        float sum[FASA_TILE];
        bool  finite = true;
        FASA_UNROLL
        for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
            max[ih] = -FASA_FLT_MAX;
            sum[ih] = 0.0f;
        }

        const int32_t n_batch = FASA_BATCH*FASA_BLOCK_CELLS;
        for (int32_t cell = row.cell0 + at.warp*n_batch; cell < row.cell1; cell += FASA_WARPS*n_batch) {
            fasa_scores scores;
            fasa_score(args, row, query, tile, cell, at.lane, scores);
            FASA_UNROLL
            for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
                finite = finite && (scores.finite[ib] || !scores.visible[ib]);
                scores.visible[ib] = scores.visible[ib] && scores.finite[ib];
            }
            FASA_UNROLL
            for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
                float greatest = max[ih];
                FASA_UNROLL
                for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
                    greatest = scores.visible[ib] ? fasa_greater(scores.of[ib][ih], greatest) : greatest;
                }
                sum[ih] *= fasa_exp2(max[ih] - greatest);
                max[ih]  = greatest;
                FASA_UNROLL
                for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
                    sum[ih] += scores.visible[ib] ? fasa_exp2(scores.of[ib][ih] - greatest) : 0.0f;
                }
            }
        }
        finite = fasa_ballot(!finite) == 0;
        FASA_UNROLL
        for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
            sum[ih] = finite ? sum[ih] : -1.0f;
            for (int32_t n = 1; n < FASA_WARP; n *= 2) {
                const float max_b = fasa_shuffle_xor(max[ih], n);
                const float sum_b = fasa_shuffle_xor(sum[ih], n);
                fasa_add_stats(max[ih], sum[ih], max_b, sum_b);
            }
            if (at.lane == 0) {
                FASA_SHARED float * res = stats + 2*((tile*FASA_TILE + ih)*FASA_WARPS + at.warp);
                res[0] = max[ih];
                res[1] = sum[ih];
            }
        }
    }
    fasa_sync_block();

    for (int32_t ig = at.index; ig < args.n_group; ig += FASA_THREADS) {
        FASA_SHARED const float * from = stats + 2*ig*FASA_WARPS;
        float max = from[0];
        float sum = from[1];
        for (int32_t i = 1; i < FASA_WARPS; ++i) {
            fasa_add_stats(max, sum, from[2*i], from[2*i + 1]);
        }
        FASA_GLOBAL float * to = mem.stats + 2*(((int64_t) at.y*args.n_chunks + at.x)*args.n_group + ig);
        to[0] = max;
        to[1] = sum;
    }

    // for the steps that follow
    if (at.x == 0) {
        FASA_GLOBAL fasa_row_state & state = mem.state[at.y];
        for (int32_t i = at.index; i < FASA_BINS; i += FASA_THREADS) {
            state.bins[i] = 0;
        }
        if (at.index == 0) {
            state.n_found = 0;
            state.n_done  = 0;
        }
    }
}

//
// keys
//

// neither of FASA_KEY_MASKED nor _FORCED, which would be NaN
FASA_FN uint32_t fasa_to_key(float score) {
    const uint32_t bits = fasa_bits(score);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

FASA_FN float fasa_from_key(uint32_t key) {
    return fasa_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

FASA_FN int32_t fasa_bin(uint32_t key, float best) {
    if (key == FASA_KEY_FORCED) {
        return 0;
    }
    const int32_t bits = (int32_t) fasa_bits(best - fasa_from_key(key));
    return fasa_min(fasa_max((bits >> FASA_BIN_SHIFT) - FASA_BIN_FIRST, 0), FASA_BINS - 1);
}

// shared: the query, then [heads of all tiles] and [FASA_WARPS] floats, [n_chunk/32] and [FASA_BINS] u32
FASA_FN void fasa_select_keys(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * tips,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const char    * mask,
        FASA_GLOBAL const int32_t * forced,
        FASA_GLOBAL char          * memory,
        FASA_SHARED char          * shared,
        fasa_at at) {
    const fasa_select_memory mem   = fasa_divide(args, memory);
    const fasa_row           row   = fasa_get_row(args, q, tips, dims, mask, at);
    const fasa_query         query = fasa_round_query(args, row, shared, at);

    const int32_t n_tiles = (args.n_group + FASA_TILE - 1)/FASA_TILE;

    FASA_SHARED float    * lse    = (FASA_SHARED float *) (query.has_say + n_tiles*FASA_TILE);
    FASA_SHARED float    * bests  = lse + n_tiles*FASA_TILE;
    FASA_SHARED uint32_t * is_forced = (FASA_SHARED uint32_t *) (bests + FASA_WARPS);
    FASA_SHARED uint32_t * bins      = is_forced + args.n_chunk/32;

    // what makes the heads of a group comparable, and the best score of all
    float best = -FASA_FLT_MAX;
    for (int32_t ig = at.warp; ig < args.n_group; ig += FASA_WARPS) {
        FASA_GLOBAL const float * stats = mem.stats + 2*((int64_t) at.y*args.n_chunks*args.n_group + ig);

        float max = -FASA_FLT_MAX;
        for (int32_t ic = at.lane; ic < args.n_chunks; ic += FASA_WARP) {
            max = fasa_greater(stats[2*ic*args.n_group], max);
        }
        max = fasa_warp_max(max);

        float sum    = 0.0f;
        bool  finite = true;
        for (int32_t ic = at.lane; ic < args.n_chunks; ic += FASA_WARP) {
            const float part = stats[2*ic*args.n_group + 1];
            finite = finite && part >= 0.0f;
            sum += part*fasa_exp2(stats[2*ic*args.n_group] - max);
        }
        sum = fasa_warp_sum(sum, 1, FASA_WARP);

        // alone, a head is compared with itself only: the paper's raw scores, of which each stands for itself
        const bool alone   = args.n_group == 1;
        const bool has_say = query.has_say[ig] && (alone || (fasa_ballot(!finite) == 0 && sum > 0.0f));

        const float log_sum = alone || !has_say ? 0.0f : max + fasa_log2(sum);
        if (at.lane == 0) {
            lse[ig]           = log_sum;
            query.has_say[ig] = has_say;
        }
        best = has_say ? fasa_greater(max - log_sum, best) : best;
    }
    if (at.lane == 0) {
        bests[at.warp] = best;
    }
    for (int32_t i = at.index; i < args.n_chunk/32; i += FASA_THREADS) {
        is_forced[i] = 0;
    }
    for (int32_t i = at.index; i < FASA_BINS; i += FASA_THREADS) {
        bins[i] = 0;
    }
    fasa_sync_block();

    for (int32_t i = 0; i < FASA_WARPS; ++i) {
        best = fasa_greater(bests[i], best);
    }
    for (int32_t i = at.index; i < args.n_forced; i += FASA_THREADS) {
        const int32_t id = forced[(row.stream*args.n_tokens + row.token)*args.n_forced + i];
        if (id >= row.cell0 && id < row.cell1) {
            fasa_atomic_or_shared(is_forced + (id - row.cell0)/32, 1u << (id - row.cell0)%32);
        }
    }
    fasa_sync_block();

    FASA_GLOBAL uint32_t * keys = mem.keys + (int64_t) at.y*args.n_kv;

    const int32_t n_batch = FASA_BATCH*FASA_BLOCK_CELLS;
    for (int32_t cell0 = row.cell0 + at.warp*n_batch; cell0 < row.cell1; cell0 += FASA_WARPS*n_batch) {
        fasa_scores scores;
        uint32_t best_of[FASA_BATCH];
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            best_of[ib] = FASA_KEY_MASKED;
        }
        for (int32_t tile = 0; tile < n_tiles; ++tile) {
            fasa_score(args, row, query, tile, cell0, at.lane, scores);
            FASA_UNROLL
            for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
                if (query.has_say[tile*FASA_TILE + ih]) {
                    const float log_sum = lse[tile*FASA_TILE + ih];
                    FASA_UNROLL
                    for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
                        const uint32_t key = fasa_to_key(scores.of[ib][ih] - log_sum);
                        best_of[ib] = key > best_of[ib] ? key : best_of[ib];
                    }
                }
            }
        }
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            const int32_t cell = cell0 + ib*FASA_BLOCK_CELLS;
            if (cell < row.cell1) {
                uint32_t key = scores.visible[ib] && scores.finite[ib] ? best_of[ib] : FASA_KEY_MASKED;
                if (key != FASA_KEY_MASKED) {
                    key = is_forced[(cell - row.cell0)/32] >> at.lane & 1 ? FASA_KEY_FORCED : key;
                    fasa_atomic_add_shared(bins + fasa_bin(key, best), 1);
                }
                keys[cell + at.lane] = key;
            }
        }
    }
    fasa_sync_block();

    FASA_GLOBAL fasa_row_state & state = mem.state[at.y];
    for (int32_t i = at.index; i < FASA_BINS; i += FASA_THREADS) {
        if (bins[i] > 0) {
            fasa_atomic_add(&state.bins[i], bins[i]);
        }
    }
    if (at.x == 0 && at.index == 0) {
        state.best = best;
    }
}

//
// mark
//

// the bin that holds the n_fac-th best cell, FASA_BINS if there are not as many cells
struct fasa_threshold {
    int32_t bin;
    int32_t n_above; // cells in better bins
};

// shared: [FASA_WARPS + 2] u32
FASA_FN fasa_threshold fasa_find_threshold(FASA_THREAD const fasa_select_args & args, FASA_GLOBAL const fasa_row_state & state, FASA_SHARED uint32_t * shared, fasa_at at) {
    const int32_t n_own = FASA_BINS/FASA_THREADS;

    FASA_SHARED uint32_t * found = shared + FASA_WARPS;
    if (at.index == 0) {
        found[0] = FASA_BINS;
        found[1] = 0;
    }

    uint32_t own[FASA_BINS/FASA_THREADS];
    uint32_t n = 0;
    FASA_UNROLL
    for (int32_t i = 0; i < n_own; ++i) {
        own[i] = state.bins[at.index*n_own + i];
        n += own[i];
    }
    uint32_t total;
    uint32_t n_upto = fasa_sum_before(at, n, shared, total);

    const uint32_t n_fac = args.n_fac;
    FASA_UNROLL
    for (int32_t i = 0; i < n_own; ++i) {
        if (n_upto <= n_fac && n_upto + own[i] > n_fac) { // of one thread only
            found[0] = at.index*n_own + i;
            found[1] = n_upto;
        }
        n_upto += own[i];
    }
    fasa_sync_block();

    return { (int32_t) found[0], (int32_t) found[1] };
}

// shared: [FASA_WARPS + 2] u32; whether this block was the last one of its row is for the caller to find out
FASA_FN fasa_threshold fasa_select_mark(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL char     * memory,
        FASA_SHARED uint32_t * shared,
        fasa_at at) {
    const fasa_select_memory mem = fasa_divide(args, memory);

    const int32_t cell0 = at.x*args.n_chunk;
    const int32_t cell1 = fasa_min(cell0 + args.n_chunk, args.n_kv);

    FASA_GLOBAL fasa_row_state & state = mem.state[at.y];
    FASA_GLOBAL const uint32_t * keys  = mem.keys  + (int64_t) at.y*args.n_kv;
    FASA_GLOBAL       uint32_t * found = mem.found + (int64_t) at.y*args.n_kv;
    FASA_GLOBAL       uint32_t * marks = mem.marks + (int64_t) at.y*(args.n_kv/32);

    const fasa_threshold threshold = fasa_find_threshold(args, state, shared, at);
    const float          best      = state.best;

    for (int32_t cell = cell0 + at.warp*FASA_WARP; cell < cell1; cell += FASA_THREADS) {
        const uint32_t key = keys[cell + at.lane];
        const int32_t  bin = key != FASA_KEY_MASKED ? fasa_bin(key, best) : FASA_BINS;

        const uint32_t above = fasa_ballot(bin < threshold.bin);
        const uint32_t equal = fasa_ballot(bin == threshold.bin && bin < FASA_BINS);

        uint32_t first = 0;
        if (at.lane == 0) {
            marks[cell/32] = above;
            first = equal ? fasa_atomic_add(&state.n_found, fasa_count(equal)) : 0;
        }
        first = fasa_shuffle(first, 0);
        if (equal >> at.lane & 1) {
            found[first + fasa_count(equal & ((1u << at.lane) - 1))] = cell + at.lane;
        }
    }
    return threshold;
}

//
// list
//

// greater: better, or as good and of a lower id; no two are equal
FASA_FN uint64_t fasa_rank_key(FASA_GLOBAL const uint32_t * keys, uint32_t id) {
    return (uint64_t) keys[id] << 32 | (uint32_t) ~id;
}

// marks the best of the cells that were found; shared: [FASA_BINS] u32 (as many as FASA_RANKED numbers need, and more)
FASA_FN void fasa_mark_best(
        FASA_GLOBAL const uint32_t * keys,
        FASA_GLOBAL const uint32_t * found,
        FASA_GLOBAL uint32_t       * marks,
        uint32_t n_found, uint32_t n_wanted,
        FASA_SHARED uint32_t       * shared,
        fasa_at at) {
    FASA_SHARED uint32_t * bins  = shared;
    FASA_SHARED uint32_t * digit = shared + FASA_THREADS;
    FASA_SHARED uint32_t * sums  = digit + 3;

    uint32_t n_share = n_found;

    // bits that they do not share; in one bin, they do share the upper ones
    if (at.index < 2) {
        digit[at.index] = 0;
    }
    fasa_sync_block();
    const uint64_t first = fasa_rank_key(keys, fasa_load_shared_by_blocks(found));
    for (uint32_t i = at.index; i < n_found && n_found > FASA_RANKED; i += FASA_THREADS) {
        const uint64_t other = first ^ fasa_rank_key(keys, fasa_load_shared_by_blocks(found + i));
        fasa_atomic_or_shared(digit,     (uint32_t) (other >> 32));
        fasa_atomic_or_shared(digit + 1, (uint32_t) other);
    }
    fasa_sync_block();
    int32_t  n_bits = digit[0] || !digit[1] ? 64 - fasa_clz(digit[0]) % 32 : 32 - fasa_clz(digit[1]); // all, if few were found
    uint64_t prefix = n_bits == 64 ? 0 : first >> n_bits;
    fasa_sync_block();

    // by up to 8 of these at a time, until few enough share those above
    while (n_share > FASA_RANKED) {
        const int32_t n_digit = fasa_min(n_bits, 8);

        bins[at.index] = 0;
        fasa_sync_block();

        for (uint32_t i = at.index; i < n_found; i += FASA_THREADS) {
            const uint64_t key = fasa_rank_key(keys, fasa_load_shared_by_blocks(found + i));
            if (n_bits == 64 || key >> n_bits == prefix) {
                fasa_atomic_add_shared(bins + (key >> (n_bits - n_digit) & ((1 << n_digit) - 1)), 1);
            }
        }
        fasa_sync_block();

        const uint32_t n = bins[FASA_THREADS - 1 - at.index]; // the greatest digit first
        uint32_t total;
        const uint32_t before = fasa_sum_before(at, n, sums, total);
        if (before < n_wanted && before + n >= n_wanted) {
            digit[0] = FASA_THREADS - 1 - at.index;
            digit[1] = before;
            digit[2] = n;
        }
        fasa_sync_block();

        n_bits   -= n_digit;
        prefix    = prefix << n_digit | digit[0];
        n_wanted -= digit[1];
        n_share   = digit[2];
        fasa_sync_block();
    }

    // those that share the bits are ranked, those above are taken
    FASA_SHARED uint64_t * ranked   = (FASA_SHARED uint64_t *) shared;
    FASA_SHARED uint32_t * n_ranked = (FASA_SHARED uint32_t *) (ranked + FASA_RANKED);
    if (at.index == 0) {
        *n_ranked = 0;
    }
    fasa_sync_block();

    for (uint32_t i = at.index; i < n_found; i += FASA_THREADS) {
        const uint32_t id  = fasa_load_shared_by_blocks(found + i);
        const uint64_t key = fasa_rank_key(keys, id);
        const uint64_t top = n_bits == 64 ? 0 : key >> n_bits;
        if (top > prefix) {
            fasa_atomic_or(marks + id/32, 1u << id%32);
        } else if (top == prefix) {
            ranked[fasa_atomic_add_shared(n_ranked, 1)] = key;
        }
    }
    fasa_sync_block();

    for (uint32_t i = at.index; i < n_share; i += FASA_THREADS) {
        const uint64_t key = ranked[i];
        uint32_t rank = 0;
        for (uint32_t other = 0; other < n_share; ++other) {
            rank += ranked[other] > key;
        }
        if (rank < n_wanted) {
            const uint32_t id = ~(uint32_t) key;
            fasa_atomic_or(marks + id/32, 1u << id%32);
        }
    }
}

// by one block of threads for each row, at.y; shared: [FASA_BINS] u32
FASA_FN void fasa_select_list(
        FASA_THREAD const fasa_select_args & args,
        fasa_threshold threshold,
        FASA_GLOBAL char     * memory,
        FASA_GLOBAL int32_t  * ids,
        FASA_SHARED uint32_t * shared,
        fasa_at at) {
    const fasa_select_memory mem = fasa_divide(args, memory);

    const int32_t n_words = args.n_kv/32;

    FASA_GLOBAL uint32_t * marks = mem.marks + (int64_t) at.y*n_words;

    if (threshold.bin < FASA_BINS && threshold.n_above < args.n_fac) {
        fasa_mark_best(mem.keys + (int64_t) at.y*args.n_kv, mem.found + (int64_t) at.y*args.n_kv, marks,
            fasa_load_shared_by_blocks(&mem.state[at.y].n_found), args.n_fac - threshold.n_above, shared, at);
        fasa_sync_block();
    }

    // as many words for each thread, one after the other
    const int32_t n_own = (n_words + FASA_THREADS - 1)/FASA_THREADS;
    const int32_t word0 = fasa_min(at.index*n_own, n_words);
    const int32_t word1 = fasa_min(word0 + n_own, n_words);

    uint32_t n = 0;
    for (int32_t i = word0; i < word1; ++i) {
        n += fasa_count(fasa_load_shared_by_blocks(marks + i));
    }
    uint32_t total;
    uint32_t at_id = fasa_sum_before(at, n, shared, total);

    ids += (int64_t) (args.row0 + at.y)*args.n_fac;
    for (int32_t i = word0; i < word1; ++i) {
        uint32_t word = fasa_load_shared_by_blocks(marks + i);
        while (word) {
            ids[at_id++] = i*32 + fasa_first(word);
            word &= word - 1;
        }
    }
    for (int32_t i = (int32_t) total + at.index; i < args.n_fac; i += FASA_THREADS) {
        ids[i] = -1;
    }
}
