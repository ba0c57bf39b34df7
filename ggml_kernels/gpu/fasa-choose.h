// The last two steps of FASA_SELECT: the n_fac best cells by their keys, in ascending order.

#pragma once

#include "fasa-select.h"

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

// greater: better, or as good and of a lower id; no two are equal
FASA_FN uint64_t fasa_rank(uint32_t key, int32_t id) {
    return (uint64_t) key << 32 | (uint32_t) ~id;
}

// of 32 cells by lane, those above the bin of the threshold, and those in it
FASA_FN void fasa_part_cells(uint32_t key, float best, fasa_threshold threshold, FASA_THREAD uint32_t & above, FASA_THREAD uint32_t & equal) {
    const int32_t bin = key != FASA_KEY_MASKED ? fasa_bin_of_key(key, best) : FASA_BINS;
    above = fasa_ballot(bin < threshold.bin);
    equal = fasa_ballot(bin == threshold.bin && bin < FASA_BINS);
}

// shared: [FASA_WARPS + 2] u32; whether this block was the last one of its row is for the caller to find out
FASA_FN fasa_threshold fasa_select_mark(
        FASA_THREAD const fasa_select_args & args,
        FASA_GLOBAL char     * memory,
        FASA_SHARED uint32_t * shared,
        fasa_at at) {
    const fasa_select_memory mem = fasa_divide(args, memory);

    FASA_GLOBAL fasa_row_state & state = mem.state[at.y];
    FASA_GLOBAL const uint32_t * keys  = mem.keys  + (int64_t) at.y*args.n_kv;
    FASA_GLOBAL       uint64_t * found = mem.found + (int64_t) at.y*args.n_kv;
    FASA_GLOBAL       uint32_t * marks = mem.marks + (int64_t) at.y*(args.n_kv/32);

    const fasa_threshold threshold = fasa_find_threshold(args, state, shared, at);
    const float          best      = state.best;

    for (int32_t block = at.x + at.warp*args.n_parts; block < args.n_kv/FASA_BLOCK_CELLS; block += FASA_WARPS*args.n_parts) {
        const int32_t  cell = block*FASA_BLOCK_CELLS + at.lane;
        const uint32_t key  = keys[cell];

        uint32_t above;
        uint32_t equal;
        fasa_part_cells(key, best, threshold, above, equal);

        uint32_t first = 0;
        if (at.lane == 0) {
            marks[block] = above;
            first = equal ? fasa_atomic_add(&state.n_found, fasa_count(equal)) : 0;
        }
        first = fasa_shuffle(first, 0);
        if (equal >> at.lane & 1) {
            found[first + fasa_count(equal & ((1u << at.lane) - 1))] = fasa_rank(key, cell);
        }
    }
    return threshold;
}

//
// list
//

// bits set in any of a warp's lanes
FASA_FN uint32_t fasa_warp_or(uint32_t x) {
    FASA_UNROLL
    for (int32_t mask = 1; mask < FASA_WARP; mask *= 2) {
        x |= fasa_shuffle_xor(x, mask);
    }
    return x;
}

// The rank of the n_wanted-th best of the cells that were found, by all threads of a block; 0 where no more are wanted than were
// found. By radix until few enough share the digits, then each of these against all. first: found[at.index], whatever that is
// shared: [FASA_NTH_SHARED] u32
FASA_FN uint64_t fasa_find_nth(
        FASA_GLOBAL const uint64_t * found,
        uint64_t first, uint32_t n_found, uint32_t n_wanted,
        FASA_SHARED uint32_t       * shared,
        fasa_at at) {
    if (n_found <= n_wanted) {
        return 0;
    }
    FASA_SHARED uint64_t * ranked   = (FASA_SHARED uint64_t *) shared;
    FASA_SHARED uint32_t * bins     = shared + 2*FASA_RANKED;
    FASA_SHARED uint32_t * digit    = bins + FASA_DIGITS; // [3], then how many are ranked
    FASA_SHARED uint32_t * n_ranked = digit + 3;
    FASA_SHARED uint32_t * sums     = digit + 4;

    fasa_sync_block();
    if (at.index < FASA_DIGITS) {
        bins[at.index] = 0;
    }
    if (at.index < 4) {
        digit[at.index] = 0;
    }
    fasa_sync_block();

    // bits that they do not share; being in one bin, they do share the upper ones
    const uint64_t any = fasa_load_shared_by_blocks(found);
    uint64_t differ = at.index < (int32_t) n_found ? any ^ first : 0;
    FASA_ROLLED
    for (uint32_t i = at.index + FASA_THREADS; i < n_found; i += FASA_THREADS) {
        differ |= any ^ fasa_load_shared_by_blocks(found + i);
    }
    const uint32_t upper = fasa_warp_or((uint32_t) (differ >> 32));
    const uint32_t lower = fasa_warp_or((uint32_t) differ);
    if (at.lane == 0) {
        fasa_atomic_or_shared(digit,     upper);
        fasa_atomic_or_shared(digit + 1, lower);
    }
    fasa_sync_block();

    // by 8 of these at a time, until few enough share those above
    int32_t  n_bits  = digit[0] ? 64 - fasa_clz(digit[0]) : 32 - fasa_clz(digit[1]);
    uint64_t prefix  = n_bits == 64 ? 0 : any >> n_bits;
    uint32_t n_share = n_found;
    while (n_share > FASA_RANKED) {
        const int32_t n_digit = fasa_min(n_bits, 8);

        FASA_ROLLED
        for (uint32_t i = at.index; i < n_found; i += FASA_THREADS) {
            const uint64_t rank = i < FASA_THREADS ? first : fasa_load_shared_by_blocks(found + i);
            if (n_bits == 64 || rank >> n_bits == prefix) {
                fasa_atomic_add_shared(bins + (rank >> (n_bits - n_digit) & ((1 << n_digit) - 1)), 1);
            }
        }
        fasa_sync_block();

        const uint32_t n = at.index < FASA_DIGITS ? bins[FASA_DIGITS - 1 - at.index] : 0; // the greatest digit first
        uint32_t total;
        const uint32_t before = fasa_sum_before(at, n, sums, total);
        if (before < n_wanted && before + n >= n_wanted) {
            digit[0] = FASA_DIGITS - 1 - at.index;
            digit[1] = before;
            digit[2] = n;
        }
        if (at.index < FASA_DIGITS) {
            bins[FASA_DIGITS - 1 - at.index] = 0;
        }
        fasa_sync_block();

        n_bits   -= n_digit;
        prefix    = prefix << n_digit | digit[0];
        n_wanted -= digit[1];
        n_share   = digit[2];
    }

    // the n_wanted-th of those that share the bits
    FASA_ROLLED
    for (uint32_t i = at.index; i < n_found; i += FASA_THREADS) {
        const uint64_t rank = i < FASA_THREADS ? first : fasa_load_shared_by_blocks(found + i);
        if (n_bits == 64 || rank >> n_bits == prefix) {
            ranked[fasa_atomic_add_shared(n_ranked, 1)] = rank;
        }
    }
    fasa_sync_block();

    if (at.index < (int32_t) n_share) {
        const uint64_t rank = ranked[at.index];
        uint32_t n_better = 0;
        FASA_ROLLED
        for (uint32_t other = 0; other < n_share; ++other) {
            n_better += ranked[other] > rank;
        }
        if (n_better == n_wanted - 1) {
            digit[0] = (uint32_t) (rank >> 32);
            digit[1] = (uint32_t) rank;
        }
    }
    fasa_sync_block();
    return (uint64_t) digit[0] << 32 | digit[1];
}

// by one block of threads for each row, at.y; shared: [FASA_NTH_SHARED] u32
FASA_FN void fasa_select_list(
        FASA_THREAD const fasa_select_args & args,
        fasa_threshold threshold,
        FASA_GLOBAL char     * memory,
        FASA_GLOBAL int32_t  * ids,
        FASA_SHARED uint32_t * shared,
        fasa_at at) {
    const fasa_select_memory mem = fasa_divide(args, memory);

    const int32_t n_words = args.n_kv/32;

    FASA_GLOBAL uint32_t       * marks = mem.marks + (int64_t) at.y*n_words;
    FASA_GLOBAL const uint64_t * found = mem.found + (int64_t) at.y*args.n_kv;

    if (threshold.bin < FASA_BINS && threshold.n_above < args.n_fac) {
        const uint32_t n_found = fasa_load_shared_by_blocks(&mem.state[at.y].n_found);
        const uint64_t first   = fasa_load_shared_by_blocks(found + fasa_min(at.index, args.n_kv - 1));
        const uint64_t nth     = fasa_find_nth(found, first, n_found, args.n_fac - threshold.n_above, shared, at);
        FASA_ROLLED
        for (uint32_t i = at.index; i < n_found; i += FASA_THREADS) {
            const uint64_t rank = fasa_load_shared_by_blocks(found + i);
            if (rank >= nth) {
                const uint32_t id = ~(uint32_t) rank;
                fasa_atomic_or(marks + id/32, 1u << id%32);
            }
        }
        fasa_sync_block_and_memory();
    }

    // as many words for each thread, one after the other
    const int32_t n_own = (n_words + FASA_THREADS - 1)/FASA_THREADS;
    const int32_t word0 = fasa_min(at.index*n_own, n_words);
    const int32_t word1 = fasa_min(word0 + n_own, n_words);

    uint32_t n = 0;
    FASA_ROLLED
    for (int32_t i = word0; i < word1; ++i) {
        n += fasa_count(fasa_load_shared_by_blocks(marks + i));
    }
    uint32_t total;
    uint32_t at_id = fasa_sum_before(at, n, shared, total);

    ids += (int64_t) (args.row0 + at.y)*args.n_fac;
    FASA_ROLLED
    for (int32_t i = word0; i < word1; ++i) {
        uint32_t word = fasa_load_shared_by_blocks(marks + i);
        while (word) {
            ids[at_id++] = i*32 + fasa_first(word);
            word &= word - 1;
        }
    }
    FASA_ROLLED
    for (int32_t i = (int32_t) total + at.index; i < args.n_fac; i += FASA_THREADS) {
        ids[i] = -1;
    }
}
