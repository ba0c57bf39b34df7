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
// Here are the first two steps, in fasa-score.h the tip scores of a cell, in fasa-choose.h the other two steps. The contract is
// in ../README.md, the bins are those of ../cpu/fasa-score.h.

#pragma once

#include "fasa-score.h"

#define FASA_BIN_SHIFT 17
#define FASA_BIN_FIRST ((127 - 6) << (23 - FASA_BIN_SHIFT)) // upper bits of 2^-6

#define FASA_KEY_MASKED 0u
#define FASA_KEY_FORCED 0xFFFFFFFFu

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
