// FASA_SELECT and FASA_ATTEND in one launch, of the functions that make up the launches of the two ops (../gpu).
//
// A row (what one KV head, or a query head that chooses for itself, does for one token) has n_parts blocks of threads, all of
// which are on the device at once. Each keeps the scores of its part of the cells, in its shared memory as far as they fit, so
// the tips are read once. The blocks of a row meet three times, at a counter of their own:
//
//   score   all query heads on the tips of the part: greatest score, sum of exp                                      | meet
//   keys    one score per cell, comparable between the heads; a histogram of all parts                               | meet
//   mark    the cells in better bins than the n_fac-th best, and attend to them; candidates are those in its bin     | meet
//   attend  to those of the part's candidates that are among the best of all
//
// and the last block of a row adds the parts up. Since cells are dealt out to the parts by blocks of 32, each has about as
// many of the chosen ones. There is no list of a whole row, and so no order among its blocks but that of their numbers.

#pragma once

#include "fasa-words.cuh"

#include "../gpu/fasa-choose.h"
#include "../gpu/fasa-attend.h"

// of a cell that is not visible, where its first score would stand; a NaN that no arithmetic gives
#define FASA_SCORE_MASKED 0xFFFFFFFFu

struct fasa_decode_data {
    // as of FASA_SELECT
    const char    * q;
    const char    * tips;
    const int32_t * dims;
    const float   * ranges;
    const char    * mask;
    const int32_t * forced;
    // as of FASA_ATTEND
    const char    * q_attend;
    const char    * k;
    const char    * v;
    const float   * sinks;
    float         * out;

    char     * memory;
    uint32_t * counters; // [FASA_COUNTERS bytes, n_rows] zero between launches
};

struct fasa_decode_shared {
    float    * log_sums; // [heads of all tiles]
    float    * bests;  // [FASA_WARPS]
    float    * joined; // [2, FASA_WARPS, heads of all tiles]
    uint32_t * marks;  // [n_own] cells that are forced, then those that are chosen
    uint32_t * equals; // [n_own] candidates, then those that are chosen
    int32_t  * list;   // [n_list] chosen cells
    uint32_t * bins;   // [FASA_BINS], then scratch
    float    * work;   // [n_work]
};

static __device__ __forceinline__ fasa_decode_shared fasa_divide_shared(const fasa_decode_args & args, const fasa_query & query) {
    const int32_t n_heads = fasa_n_tiles(args.select)*FASA_TILE;

    fasa_decode_shared res;
    res.work   = (float *) query.quads + args.query_floats;
    res.bins   = (uint32_t *) (res.work + args.n_work);
    res.list   = (int32_t *) (res.bins + FASA_BINS);
    res.marks  = (uint32_t *) (res.list + args.n_list);
    res.equals = res.marks + args.select.n_own;
    res.joined = (float *) (res.equals + args.select.n_own);
    res.log_sums = res.joined + 2*FASA_WARPS*n_heads;
    res.bests  = res.log_sums + n_heads;
    return res;
}

// the scores of the part [n_own cells, heads of all tiles]; its statistics
static __device__ __forceinline__ void fasa_decode_score(
        const fasa_decode_args & args, const fasa_row & row, const fasa_query & query, float * scores,
        float * joined, float * stats, fasa_at at) {
    const int32_t n_tiles = fasa_n_tiles(args.select);
    const int32_t n_cells = args.select.n_own*FASA_BLOCK_CELLS;

    FASA_ROLLED
    for (int32_t tile = 0; tile < n_tiles; ++tile) {
        fasa_stats sums = fasa_no_stats();
        FASA_ROLLED
        for (int32_t i = at.warp; i < row.n_own; i += FASA_BATCH*FASA_WARPS) {
            // what comes after the next
            fasa_prefetch_tips(args.select, row, i - at.warp + 2*FASA_BATCH*FASA_WARPS, i - at.warp + 3*FASA_BATCH*FASA_WARPS, at);

            fasa_scores own;
            fasa_score(args.select, row, query, tile, i, at.lane, own);
            fasa_add_scores(sums, own);
            FASA_UNROLL
            for (int32_t ib = 0; ib < FASA_BATCH; ++ib) {
                if (i + ib*FASA_WARPS < row.n_own) {
                    float * to = scores + tile*FASA_TILE*n_cells + (i + ib*FASA_WARPS)*FASA_BLOCK_CELLS + at.lane;
                    to[0*n_cells] = own.visible[ib] ? own.of[ib][0] : fasa_float(FASA_SCORE_MASKED);
                    to[1*n_cells] = own.of[ib][1];
                    to[2*n_cells] = own.of[ib][2];
                    to[3*n_cells] = own.of[ib][3];
                }
            }
        }
        fasa_join_lanes(sums, tile, joined, at);
    }
    fasa_sync_block();
    fasa_join_warps(args.select, joined, stats, at);
}

// from scores to keys, which stand where the first head's scores have stood; their histogram
static __device__ __forceinline__ void fasa_decode_keys(
        const fasa_decode_args & args, const fasa_row & row, float * scores, const fasa_decode_shared & shared, float best, fasa_at at) {
    const int32_t n_tiles = fasa_n_tiles(args.select);
    const int32_t n_cells = args.select.n_own*FASA_BLOCK_CELLS;

    #pragma unroll 4
    for (int32_t i = at.warp; i < row.n_own; i += FASA_WARPS) {
        float * own = scores + i*FASA_BLOCK_CELLS + at.lane;
        uint32_t key = FASA_KEY_MASKED;
        if (fasa_bits(own[0]) != FASA_SCORE_MASKED) {
            float score = -FASA_FLT_MAX;
            FASA_ROLLED
            for (int32_t tile = 0; tile < n_tiles; ++tile) {
                const float * from = own + tile*FASA_TILE*n_cells;
                const float   of[FASA_TILE] = { from[0], from[n_cells], from[2*n_cells], from[3*n_cells] };
                score = fasa_best_score(of, shared.log_sums, tile, score);
            }
            key = fasa_count_key(score, best, shared.marks[i] >> at.lane & 1, shared.bins);
        }
        own[0] = fasa_float(key);
    }
}

// what a thread does of the part's words of bits
struct fasa_decode_words {
    int32_t begin;
    int32_t end;
};

static __device__ __forceinline__ fasa_decode_words fasa_own_words(const fasa_row & row, fasa_at at) {
    const int32_t n = (row.n_own + FASA_THREADS - 1)/FASA_THREADS;
    return { fasa_min(at.index*n, row.n_own), fasa_min((at.index + 1)*n, row.n_own) };
}

static __device__ __forceinline__ uint32_t fasa_count_words(const uint32_t * words, fasa_decode_words own) {
    uint32_t res = 0;
    FASA_ROLLED
    for (int32_t i = own.begin; i < own.end; ++i) {
        res += fasa_count(words[i]);
    }
    return res;
}

// the rank of cell j of the part's block i
static __device__ __forceinline__ uint64_t fasa_decode_rank(const fasa_decode_args & args, const fasa_row & row, const float * scores, int32_t i, int32_t j) {
    return fasa_rank(fasa_bits(scores[i*FASA_BLOCK_CELLS + j]), fasa_own_block(args.select, row, i)*FASA_BLOCK_CELLS + j);
}

// the part's candidates to those of the row
static __device__ __forceinline__ void fasa_decode_tell(
        const fasa_decode_args & args, const fasa_row & row, const float * scores, const fasa_decode_shared & shared,
        fasa_row_state & state, uint64_t * found, fasa_at at) {
    const fasa_decode_words own = fasa_own_words(row, at);

    uint32_t total;
    uint32_t next = fasa_sum_before(at, fasa_count_words(shared.equals, own), shared.bins, total);
    if (at.index == 0) {
        shared.bins[FASA_WARPS] = total ? fasa_atomic_add(&state.n_found, total) : 0;
    }
    fasa_sync_block();
    next += shared.bins[FASA_WARPS];
    FASA_ROLLED
    for (int32_t i = own.begin; i < own.end; ++i) {
        for (uint32_t word = shared.equals[i]; word; word &= word - 1) {
            found[next++] = fasa_decode_rank(args, row, scores, i, fasa_first(word));
        }
    }
}

// of the part's candidates the chosen ones, by those of the whole row
static __device__ __forceinline__ void fasa_decode_compare(
        const fasa_decode_args & args, const fasa_row & row, const float * scores, const fasa_decode_shared & shared,
        const fasa_row_state & state, const uint64_t * found, uint32_t n_wanted, fasa_at at) {
    const uint32_t n_found = fasa_load_shared_by_blocks(&state.n_found);
    const uint64_t first   = fasa_load_shared_by_blocks(found + fasa_min(at.index, args.select.n_kv - 1));
    const uint64_t nth     = fasa_find_nth(found, first, n_found, n_wanted, shared.bins, at);

    const fasa_decode_words own = fasa_own_words(row, at);
    FASA_ROLLED
    for (int32_t i = own.begin; i < own.end; ++i) {
        uint32_t chosen = 0;
        for (uint32_t word = shared.equals[i]; word; word &= word - 1) {
            const int32_t j = fasa_first(word);
            chosen |= (uint32_t) (fasa_decode_rank(args, row, scores, i, j) >= nth) << j;
        }
        shared.equals[i] = chosen;
    }
}

// the cells of words of bits, in order; returns how many these are
static __device__ __forceinline__ int32_t fasa_decode_list(
        const fasa_decode_args & args, const fasa_row & row, const uint32_t * words, int32_t * list, uint32_t * scratch, fasa_at at) {
    const fasa_decode_words own = fasa_own_words(row, at);

    fasa_sync_block(); // the scratch memory is nobody's any more
    uint32_t total;
    uint32_t next = fasa_sum_before(at, fasa_count_words(words, own), scratch, total);
    FASA_ROLLED
    for (int32_t i = own.begin; i < own.end; ++i) {
        for (uint32_t word = words[i]; word; word &= word - 1) {
            list[next++] = fasa_own_block(args.select, row, i)*FASA_BLOCK_CELLS + fasa_first(word);
        }
    }
    fasa_sync_block();
    return total;
}

// TYPE: of K and V, or any if it is negative
template <int TYPE, int LANES, int N>
static __device__ __forceinline__ void fasa_decode(const fasa_decode_args & args, const fasa_decode_data & data, char * memory, fasa_at at) {
    const fasa_select_args & select = args.select;
    const fasa_attend_args & attend = args.attend;

    const fasa_select_memory mem = fasa_divide(select, data.memory);
    const fasa_row           row = fasa_get_row(select, data.q, data.tips, data.dims, data.ranges, data.mask, at);

    const int64_t n_partial = (int64_t) attend.n_splits*(attend.n_embd_v + 2); // of a query head
    const int32_t n_heads   = fasa_n_tiles(select)*FASA_TILE;

    // where select alone has its keys
    float  * partial  = (float *) mem.keys;
    float  * scores   = partial + args.partial_floats + ((int64_t) at.y*select.n_parts + at.x)*n_heads*select.n_own*FASA_BLOCK_CELLS;

    fasa_row_state & state   = mem.state[at.y];
    uint64_t       * found   = mem.found + (int64_t) at.y*select.n_kv;
    uint32_t       * counter = data.counters + at.y*(FASA_COUNTERS/sizeof(uint32_t));

    // what no launch in front of this one writes is read before they have ended, and tips of earlier steps are on their way
    const fasa_own_dims dims = fasa_get_own_dims(select, row, at.lane);
    fasa_prefetch_tips(select, row, 0, 2*FASA_BATCH*FASA_WARPS, at);
    fasa_wait_for_previous();

    const fasa_query         query  = fasa_round_query(select, row, dims, memory, at);
    const fasa_decode_shared shared = fasa_divide_shared(args, query);
    if (args.scores_in_shared) {
        scores = shared.work;
    }

    fasa_decode_score(args, row, query, scores, shared.joined, fasa_stats_of(select, mem, at.y, at.x), at);
    if (at.x == 0) {
        fasa_clear_state(state, at);
    }
    FASA_ROLLED
    for (int32_t i = at.index; i < row.n_own; i += FASA_THREADS) {
        shared.marks[i] = 0;
    }
    FASA_ROLLED
    for (int32_t i = at.index; i < FASA_BINS; i += FASA_THREADS) {
        shared.bins[i] = 0;
    }
    fasa_arrive(counter);
    fasa_mark_forced(select, row, data.forced, shared.marks, at);
    fasa_wait(counter, select.n_parts);

    fasa_compare_heads(select, fasa_stats_of(select, mem, at.y, 0), query, shared.log_sums, shared.bests, at);
    fasa_sync_block();
    const float best = fasa_best_of(shared.bests);
    fasa_decode_keys(args, row, scores, shared, best, at);
    fasa_sync_block();
    fasa_add_bins(shared.bins, state, at);
    fasa_arrive(counter);
    fasa_wait(counter, 2*select.n_parts);

    const char * k = data.k + row.head/attend.n_shared*attend.nb_k1 + row.stream*attend.nb_k3;
    const char * v = data.v + row.head/attend.n_shared*attend.nb_v1 + row.stream*attend.nb_v3;

    const fasa_threshold threshold = fasa_find_threshold(select, state, shared.bins, at);
    #pragma unroll 2
    for (int32_t i = at.warp; i < row.n_own; i += FASA_WARPS) {
        uint32_t above;
        uint32_t equal;
        fasa_part_cells(fasa_bits(scores[i*FASA_BLOCK_CELLS + at.lane]), best, threshold, above, equal);
        if (at.lane == 0) {
            shared.marks[i]  = above;
            shared.equals[i] = equal;
        }
    }
    fasa_sync_block();

    // all blocks of the row find the same, so all of them have candidates to compare, or none
    const bool has_candidates = threshold.bin < FASA_BINS && threshold.n_above < select.n_fac;
    if (has_candidates) {
        fasa_decode_tell(args, row, scores, shared, state, found, at);
        fasa_arrive(counter);
    }
    fasa_own_cells cells;

    const int64_t head = (int64_t) row.head*attend.n_group; // of the token
    const char  * q    = data.q_attend + head*attend.nb_q1 + row.token*attend.nb_q2 + row.stream*attend.nb_q3;
    float       * own_partial = partial + (int64_t) (select.row0 + at.y)*attend.n_group*n_partial;

    FASA_ROLLED
    for (int32_t tile = 0; tile < attend.n_tiles; ++tile) {
        const int32_t n_tile = fasa_min(N, attend.n_group - tile*N);

        float        q_own[N][FASA_ELEMENTS];
        fasa_sums<N> sums;
        fasa_begin_tile<LANES, N>(attend, q + tile*N*attend.nb_q1, n_tile, q_own, sums, at);
        if (tile == 0) {
            cells.list = shared.list;
            cells.n    = fasa_decode_list(args, row, shared.marks, shared.list, shared.bins, at);
        }

        // the first tile attends to the marked cells while other parts tell their candidates, then to the chosen ones of these
        FASA_ROLLED
        for (int32_t step = tile > 0 || !has_candidates; step < 2; ++step) {
            fasa_attend_rows<TYPE, LANES, N>(attend, k, v, cells, q_own, sums, at);
            if (step == 0) {
                fasa_wait(counter, 3*select.n_parts);
                fasa_decode_compare(args, row, scores, shared, state, found, select.n_fac - threshold.n_above, at);

                cells.list += cells.n;
                cells.n     = fasa_decode_list(args, row, shared.equals, shared.list + cells.n, shared.bins, at);
            }
        }
        if (tile == 0) { // the others attend to all at once
            cells.n   += cells.list - shared.list;
            cells.list = shared.list;
        }
        fasa_sync_block(); // the scores have been read, or the sums of the tile before
        fasa_merge_sums<LANES, N>(attend, sums, own_partial + tile*N*n_partial, at.x, n_tile, shared.work, at);
    }

    if (fasa_arrive_last(counter + 1, select.n_parts, shared.bins)) {
        if (at.index == 0) {
            counter[0] = 0;
            counter[1] = 0;
        }
        fasa_attend_combine(attend, partial, data.sinks, data.out, shared.work, at);
    }
}
