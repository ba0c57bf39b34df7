// FASA_SELECT: scores every cell on its tips and lists the best ones, in four steps.
//
//   stats   greatest tip score of each query head, and sum of exp, of each part of the cells
//   keys    one score per cell, comparable between the query heads of a group, as a number whose order is that of the
//           scores; a histogram of them
//   mark    the cells in better bins of the histogram than the n_fac-th best cell; a list of those in its own bin
//   list    the best of that bin; all ids in ascending order
//
// A step needs all blocks of the one before, so the steps are launches; or the last block of mark lists. The tips are read
// twice, which is less than writing the scores of all query heads and reading them again, and the second time often comes
// from the cache. (In one launch with attend, scores stay where they are made: ../cuda/fasa-decode.cuh.) No step depends on
// the order in which threads run: sums are made in a fixed order, atomics count.
//
// Here are the first two steps, in fasa-score.h the tip scores of a cell, in fasa-choose.h the other two steps. The contract is
// in ../README.md, the bins are those of ../cpu/fasa-score.h.

#pragma once

#include "fasa-score.h"

#define FASA_BIN_SHIFT 17
#define FASA_BIN_FIRST ((127 - 6) << (23 - FASA_BIN_SHIFT)) // upper bits of 2^-6

#define FASA_KEY_MASKED 0u
#define FASA_KEY_FORCED 0xFFFFFFFFu

// the score where a head has none: lower than any, and its opposite is what takes it there
#define FASA_NO_SAY (-FASA_FLT_MAX/2)

//
// memory
//

// what is kept from one step to the next, of all rows of a launch
struct fasa_select_memory {
    FASA_GLOBAL fasa_row_state * state; // [n_rows]
    FASA_GLOBAL uint64_t       * found; // [n_kv, n_rows] ranks of the cells in the bin of the n_fac-th best
    FASA_GLOBAL float          * stats; // [2, n_group, n_parts, n_rows] maximum and sum, in units of log(2)
    FASA_GLOBAL uint32_t       * keys;  // [n_kv, n_rows]; one launch for all has none, and memory of its own from here on
    FASA_GLOBAL uint32_t       * marks; // [n_kv/32, n_rows] a bit for each cell
};

FASA_FN fasa_select_memory fasa_divide(FASA_THREAD const fasa_select_args & args, FASA_GLOBAL char * memory) {
    const int64_t n_rows = args.n_rows;

    fasa_select_memory res;
    res.state = (FASA_GLOBAL fasa_row_state *) memory;
    res.found = (FASA_GLOBAL uint64_t *) (res.state + n_rows);
    res.stats = (FASA_GLOBAL float *) (res.found + n_rows*args.n_kv);
    res.keys  = (FASA_GLOBAL uint32_t *) (res.stats + 2*n_rows*args.n_parts*args.n_group);
    res.marks = res.keys + n_rows*args.n_kv;
    return res;
}

//
// stats
//

// where the statistics of a part stand
FASA_FN FASA_GLOBAL float * fasa_stats_of(FASA_THREAD const fasa_select_args & args, FASA_THREAD const fasa_select_memory & mem, int32_t row, int32_t part) {
    return mem.stats + 2*((int64_t) row*args.n_parts + part)*args.n_group;
}

// for the steps that follow, by one block of threads for each row
FASA_FN void fasa_clear_state(FASA_GLOBAL fasa_row_state & state, fasa_at at) {
    FASA_ROLLED
    for (int32_t i = at.index; i < FASA_BINS; i += FASA_THREADS) {
        state.bins[i] = 0;
    }
    if (at.index == 0) {
        state.n_found = 0;
        state.n_done  = 0;
    }
}

// shared: the query, then [2, FASA_WARPS, heads of all tiles] floats
FASA_FN void fasa_select_stats(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * tips,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const float   * ranges,
        FASA_GLOBAL const char    * mask,
        FASA_GLOBAL char          * memory,
        FASA_SHARED char          * shared,
        fasa_at at) {
    const fasa_select_memory mem = fasa_divide(args, memory);
    const fasa_row           row = fasa_get_row(args, q, tips, dims, ranges, mask, at);

    // the first blocks of tips are on their way while the query is rounded
    fasa_prefetch_tips(args, row, 0, FASA_BATCH*FASA_WARPS, at);
    const fasa_query query = fasa_round_query(args, row, fasa_get_own_dims(args, row, at.lane), shared, at);

    const int32_t n_tiles = fasa_n_tiles(args);

    FASA_SHARED float * joined = (FASA_SHARED float *) (query.has_say + n_tiles*FASA_TILE);

    for (int32_t tile = 0; tile < n_tiles; ++tile) {
        fasa_stats stats = fasa_no_stats();
        for (int32_t i = at.warp; i < row.n_own; i += FASA_BATCH*FASA_WARPS) {
            fasa_scores scores;
            fasa_score(args, row, query, tile, i, at.lane, scores);
            fasa_add_scores(stats, scores);
        }
        fasa_join_lanes(stats, tile, joined, at);
    }
    fasa_sync_block();
    fasa_join_warps(args, joined, fasa_stats_of(args, mem, at.y, at.x), at);

    if (at.x == 0) {
        fasa_clear_state(mem.state[at.y], at);
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

FASA_FN int32_t fasa_bin(float distance) {
    return fasa_min(fasa_max(((int32_t) fasa_bits(distance) >> FASA_BIN_SHIFT) - FASA_BIN_FIRST, 0), FASA_BINS - 1);
}

FASA_FN int32_t fasa_bin_of_key(uint32_t key, float best) {
    return key == FASA_KEY_FORCED ? 0 : fasa_bin(best - fasa_from_key(key));
}

// What makes the heads of a group comparable, by the statistics of all parts of a row, is what has to be taken from their scores:
// log_sums [heads of all tiles]. The best score of the row by warp: bests [FASA_WARPS], FASA_NO_SAY where no head has a say.
FASA_FN void fasa_compare_heads(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL const float       * stats,
        FASA_THREAD const fasa_query & query,
        FASA_SHARED float             * log_sums,
        FASA_SHARED float             * bests,
        fasa_at at) {
    const int32_t n_heads = fasa_n_tiles(args)*FASA_TILE;

    float best = FASA_NO_SAY;
    FASA_ROLLED
    for (int32_t ig = at.warp; ig < n_heads; ig += FASA_WARPS) {
        float max = -FASA_FLT_MAX;
        float sum = 0.0f;
        FASA_ROLLED
        for (int32_t i = at.lane; i < args.n_parts && ig < args.n_group; i += FASA_WARP) {
            const float max_i = stats[2*((int64_t) i*args.n_group + ig) + 0];
            const float sum_i = stats[2*((int64_t) i*args.n_group + ig) + 1];
            fasa_join_stats(max, sum, max_i, sum_i);
        }
        const float greatest = fasa_warp_max(max);
        sum = fasa_warp_sum(sum*fasa_exp2(max - greatest), 1, FASA_WARP);

        // alone, a head is compared with itself only: the paper's raw scores, of which each stands for itself
        const bool alone   = args.n_group == 1;
        const bool has_say = query.has_say[ig] && (alone || sum > 0.0f);

        const float log_sum = !has_say ? -FASA_NO_SAY : alone ? 0.0f : greatest + fasa_log2(sum);
        if (at.lane == 0) {
            log_sums[ig] = log_sum;
        }
        best = has_say ? fasa_greater(greatest - log_sum, best) : best;
    }
    if (at.lane == 0) {
        bests[at.warp] = best;
    }
}

FASA_FN float fasa_best_of(FASA_SHARED const float * bests) {
    float best = bests[0];
    FASA_UNROLL
    for (int32_t i = 1; i < FASA_WARPS; ++i) {
        best = fasa_greater(bests[i], best);
    }
    return best;
}

// a cell's score by those of a tile's heads, if it is greater than that of other tiles
FASA_FN float fasa_best_score(FASA_THREAD const float (& scores)[FASA_TILE], FASA_SHARED const float * log_sums, int32_t tile, float best) {
    FASA_UNROLL
    for (int32_t ih = 0; ih < FASA_TILE; ++ih) {
        best = fasa_greater(scores[ih] - log_sums[tile*FASA_TILE + ih], best);
    }
    return best;
}

// the key of a visible cell; in the histogram, too
FASA_FN uint32_t fasa_count_key(float score, float best, bool is_forced, FASA_SHARED uint32_t * bins) {
    if (score <= FASA_NO_SAY/2) { // no head has a say
        return FASA_KEY_MASKED;
    }
    fasa_atomic_add_shared(bins + (is_forced ? 0 : fasa_bin(best - score)), 1);
    return is_forced ? FASA_KEY_FORCED : fasa_to_key(score);
}

// a bit for each forced cell of the part: is_forced [n_own], cleared before
FASA_FN void fasa_mark_forced(
        FASA_THREAD const fasa_select_args & args,
        FASA_THREAD const fasa_row & row,
        FASA_GLOBAL const int32_t  * forced,
        FASA_SHARED uint32_t       * is_forced,
        fasa_at at) {
    FASA_ROLLED
    for (int32_t i = at.index; i < args.n_forced; i += FASA_THREADS) {
        const int32_t id = forced[(row.stream*args.n_tokens + row.token)*args.n_forced + i];
        if (id >= 0 && id < args.n_kv && id/FASA_BLOCK_CELLS%args.n_parts == row.part) {
            fasa_atomic_or_shared(is_forced + id/FASA_BLOCK_CELLS/args.n_parts, 1u << id%FASA_BLOCK_CELLS);
        }
    }
}

// a part's histogram to that of the row
FASA_FN void fasa_add_bins(FASA_SHARED const uint32_t * bins, FASA_GLOBAL fasa_row_state & state, fasa_at at) {
    FASA_ROLLED
    for (int32_t i = at.index; i < FASA_BINS; i += FASA_THREADS) {
        if (bins[i] > 0) {
            fasa_atomic_add(&state.bins[i], bins[i]);
        }
    }
}

// shared: the query, then [heads of all tiles] and [FASA_WARPS] floats, [n_own] and [FASA_BINS] u32
FASA_FN void fasa_select_keys(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * tips,
        FASA_GLOBAL const int32_t * dims,
        FASA_GLOBAL const float   * ranges,
        FASA_GLOBAL const char    * mask,
        FASA_GLOBAL const int32_t * forced,
        FASA_GLOBAL char          * memory,
        FASA_SHARED char          * shared,
        fasa_at at) {
    const fasa_select_memory mem = fasa_divide(args, memory);
    const fasa_row           row = fasa_get_row(args, q, tips, dims, ranges, mask, at);

    fasa_prefetch_tips(args, row, 0, FASA_BATCH*FASA_WARPS, at);
    const fasa_query query = fasa_round_query(args, row, fasa_get_own_dims(args, row, at.lane), shared, at);

    const int32_t n_tiles = fasa_n_tiles(args);

    FASA_SHARED float    * log_sums  = (FASA_SHARED float *) (query.has_say + n_tiles*FASA_TILE);
    FASA_SHARED float    * bests     = log_sums + n_tiles*FASA_TILE;
    FASA_SHARED uint32_t * is_forced = (FASA_SHARED uint32_t *) (bests + FASA_WARPS);
    FASA_SHARED uint32_t * bins      = is_forced + args.n_own;

    fasa_compare_heads(args, fasa_stats_of(args, mem, at.y, 0), query, log_sums, bests, at);
    FASA_ROLLED
    for (int32_t i = at.index; i < args.n_own; i += FASA_THREADS) {
        is_forced[i] = 0;
    }
    FASA_ROLLED
    for (int32_t i = at.index; i < FASA_BINS; i += FASA_THREADS) {
        bins[i] = 0;
    }
    fasa_sync_block();

    const float best = fasa_best_of(bests);
    fasa_mark_forced(args, row, forced, is_forced, at);
    fasa_sync_block();

    FASA_GLOBAL uint32_t * keys = mem.keys + (int64_t) at.y*args.n_kv;

    for (int32_t i = at.warp; i < row.n_own; i += FASA_BATCH*FASA_WARPS) {
        fasa_scores scores;
        float best_of[FASA_BATCH];
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            best_of[ib] = -FASA_FLT_MAX;
        }
        for (int32_t tile = 0; tile < n_tiles; ++tile) {
            fasa_score(args, row, query, tile, i, at.lane, scores);
            FASA_UNROLL
            for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
                best_of[ib] = fasa_best_score(scores.of[ib], log_sums, tile, best_of[ib]);
            }
        }
        FASA_UNROLL
        for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
            const int32_t own = i + ib*FASA_WARPS;
            if (own < row.n_own) {
                const uint32_t key = scores.visible[ib] ? fasa_count_key(best_of[ib], best, is_forced[own] >> at.lane & 1, bins) : FASA_KEY_MASKED;
                keys[fasa_own_block(args, row, own)*FASA_BLOCK_CELLS + at.lane] = key;
            }
        }
    }
    fasa_sync_block();

    fasa_add_bins(bins, mem.state[at.y], at);
    if (at.x == 0 && at.index == 0) {
        mem.state[at.y].best = best;
    }
}
