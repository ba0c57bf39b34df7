// The last two steps of FASA_SELECT: the n_fac best cells by their keys, in ascending order.

#pragma once

#include "fasa-select.h"

// candidates that are put in order by comparing each with all
#define FASA_RANKED 256

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
        fasa_sync_block_and_memory();
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
