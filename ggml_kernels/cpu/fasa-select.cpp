// Scores every cell on its tips and lists the best ones, in four steps with a barrier between them:
//
//   score    tip scores of each query head; their maximum and sum of exp, by chunks of cells (fasa-score.h)
//   find     candidates by one score per cell, comparable between the query heads of a group; a histogram of them
//   gather   scores of the candidates in the bin that holds the n_fac-th best cell
//   list     the candidates in better bins, and of that one the best
//
// A row is what one KV head, or a query head that chooses for itself, does for one token. Threads take whole rows as far
// as these are equally many for all, and then need no barrier; the cells of what rows remain are split into one part per
// thread. Sums are made by chunks of cells and added in order, so the result does not depend on who made them.

#include "fasa-score.h"

#include <functional>

size_t ggml_fasa_select_work_size(const ggml_tensor * dst, int n_tasks) {
    const fasa_select_op op(dst);
    return op.size_stats + op.n_at_work(n_tasks)*(op.size_scores + 2*op.size_cells) + n_tasks*(op.size_parts + op.size_scratch + op.size_query);
}

namespace {

constexpr float FASA_FORCED = INFINITY;

// where that leaves out most, candidates are the cells down to a score guessed from one vector of cells in so many
constexpr int64_t FASA_SAMPLE = 16;

constexpr int64_t FASA_BINS_BATCH = 64; // scores whose bins are computed together

//
// find
//

// the maximum over all cells, and what makes the heads of a group comparable: the logarithm of the sum
fasa_row_stats fasa_head_stats(const fasa_select_op & op, const fasa_row_stats * stats, int64_t row, int64_t ig) {
    const auto chunk = [&](int64_t ic) -> const fasa_row_stats & {
        return stats[(row*op.n_chunks + ic)*op.n_group + ig];
    };

    fasa_row_stats res = { -FLT_MAX, 0.0f };
    for (int64_t ic = 0; ic < op.n_chunks; ++ic) {
        res.max = std::max(res.max, chunk(ic).max);
    }
    if (op.n_group == 1) {
        return res; // it is compared with itself only: the paper's raw scores
    }
    for (int64_t ic = 0; ic < op.n_chunks; ++ic) {
        res.sum += chunk(ic).sum*std::exp2(chunk(ic).max - res.max);
    }
    res.sum = res.max + std::log2(res.sum);
    return res;
}

int32_t fasa_bin(float score, float best) {
    const float distance = best - score;

    int32_t bits;
    memcpy(&bits, &distance, sizeof(bits));

    return std::min(std::max((bits >> FASA_BIN_SHIFT) - FASA_BIN_FIRST, 0), FASA_BINS - 1);
}

// no score in this bin or a better one is farther from the best
float fasa_bin_end(int32_t bin) {
    const int32_t bits = (bin + 1 + FASA_BIN_FIRST) << FASA_BIN_SHIFT;

    float res;
    memcpy(&res, &bits, sizeof(res));
    return bin < FASA_BINS - 1 ? res : INFINITY;
}

// count scores by their bins
void fasa_count_bins(const float * scores, int64_t n, float best, uint32_t * bins) {
    std::fill(bins, bins + FASA_BINS, 0);
    for (int64_t i = 0; i < n; i += FASA_BINS_BATCH) {
        const int64_t n_batch = std::min(FASA_BINS_BATCH, n - i);

        int32_t batch[FASA_BINS_BATCH]; // apart from the counting, compilers make vectors of it
        for (int64_t j = 0; j < n_batch; ++j) {
            batch[j] = fasa_bin(scores[i + j], best);
        }
        for (int64_t j = 0; j < n_batch; ++j) {
            bins[batch[j]]++;
        }
    }
}

// scores of the group, made of those of its heads; lse: [n_group]
vec fasa_group_score(const fasa_select_op & op, const float * scores, const float * lse) {
    vec res = v_set1(FASA_MASKED);
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        res = v_max(v_sub(v_load(scores + ig*op.n_kv), v_set1(lse[ig])), res);
    }
    return res;
}

// forced cells that are visible are better than any other
void fasa_force(const fasa_select_op & op, const fasa_part & part) {
    const int64_t   n_forced = op.forced ? op.forced->ne[0] : 0;
    const int32_t * forced   = op.forced ? (const int32_t *) op.forced->data + part.row/op.n_head_sel*n_forced : nullptr;

    for (int64_t i = 0; i < n_forced; ++i) {
        for (int64_t ig = 0; ig < op.n_group && forced[i] >= part.cell0 && forced[i] < part.cell1; ++ig) {
            float & score = part.scores[ig*op.n_kv + forced[i] - part.cell0];
            score = score > FASA_MASKED ? FASA_FORCED : score;
        }
    }
}

// a distance within which there are probably n_fac cells of the part, and not many more
float fasa_guess_end(const fasa_select_op & op, fasa_part & part, const float * lse) {
    const int64_t n = part.cell1 - part.cell0;
    if (n < 8*op.n_fac || n < 2*FASA_CHUNK) {
        return INFINITY; // the guess would cost more than it spares
    }

    const int64_t n_sample = n/(FASA_SAMPLE*FASA_LANES);
    for (int64_t is = 0; is < n_sample; ++is) {
        const int64_t i = is*FASA_SAMPLE + is*7 % FASA_SAMPLE; // not at equal distances, as a text may repeat itself
        v_store(part.found + is*FASA_LANES, fasa_group_score(op, part.scores + i*FASA_LANES, lse));
    }
    fasa_count_bins(part.found, n_sample*FASA_LANES, part.best, part.bins);

    const int64_t n_wanted = op.n_fac/FASA_SAMPLE + op.n_fac/FASA_SAMPLE/4 + 32;

    int64_t n_upto = 0;
    int32_t bin    = 0;
    while (bin < FASA_BINS - 1 && (n_upto += part.bins[bin]) < n_wanted) { // masked cells are in the last bin
        bin++;
    }
    return fasa_bin_end(bin);
}

// candidates: the visible cells that are nearer to the best score than end
void fasa_collect(const fasa_select_op & op, fasa_part & part, const float * lse, float end) {
    int32_t * ids   = part.ids;
    float   * found = part.found;
    for (int64_t i = 0; i < part.cell1 - part.cell0; i += FASA_LANES) {
        const vec      score = fasa_group_score(op, part.scores + i, lse);
        const uint32_t bits  = end < INFINITY ? v_bits_gt(v_set1(end), v_sub(v_set1(part.best), score)) : v_bits_gt(score, v_set1(FASA_MASKED));

        float scores[FASA_LANES];
        v_store(scores, score);

        ids   += v_append_ids(bits, part.cell0 + i, ids);
        found += v_append(bits, scores, found);
    }
    part.n_ids = ids - part.ids;
}

// lse: [n_group], scratch
void fasa_find_candidates(const fasa_select_op & op, fasa_part & part, const fasa_row_stats * stats, float * lse) {
    part.best = FASA_MASKED;
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const auto head = fasa_head_stats(op, stats, part.row, ig);

        lse[ig]   = head.sum;
        part.best = head.max - head.sum > part.best ? head.max - head.sum : part.best;
    }
    part.best = std::min(part.best, FLT_MAX);

    fasa_force(op, part); // counted in the guess, too

    const float end = fasa_guess_end(op, part, lse);
    fasa_collect(op, part, lse, end);
    if (part.n_ids < op.n_fac && end < INFINITY) {
        fasa_collect(op, part, lse, INFINITY);
    }
    fasa_count_bins(part.found, part.n_ids, part.best, part.bins);
}

//
// list
//

// the parts of a row, in order; their bins are those of one histogram
struct fasa_row_parts {
    const fasa_part * begin;
    const fasa_part * end;
    int64_t           row;

    int32_t bin     = 0; // that holds the n_fac-th best cell
    int64_t n_above = 0; // cells in better bins
    int64_t n_upto  = 0; // and in that one

    // parts: those of other rows are skipped
    fasa_row_parts(const fasa_part * parts, int64_t n_parts, int64_t row, int64_t n_fac) : begin(parts), end(parts + n_parts), row(row) {
        while (begin->row != row) {
            begin++;
        }
        while (end[-1].row != row) {
            end--;
        }
        for (bin = 0; bin < FASA_BINS; ++bin) {
            for_each([&](const fasa_part & part) { n_upto += part.bins[bin]; });
            if (n_upto > n_fac) {
                break;
            }
            n_above = n_upto;
        }
    }

    template <typename F>
    void for_each(F f) const {
        for (const auto * part = begin; part != end; ++part) {
            if (part->row == row) {
                f(*part);
            }
        }
    }
};

// candidates in the bin of the n_fac-th best cell
void fasa_gather(const fasa_row_parts & row, fasa_part & part) {
    const float begin = row.bin > 0 ? fasa_bin_end(row.bin - 1) : -INFINITY;
    const float end   = fasa_bin_end(row.bin);

    part.n_gathered = 0;
    for (int64_t i = 0; i < part.n_ids && row.bin < FASA_BINS; i += FASA_LANES) {
        const vec distance = v_sub(v_set1(part.best), v_load(part.found + i));

        const uint32_t bits = v_bits_first(part.n_ids - i) & v_bits_gt(v_set1(end), distance) & ~v_bits_gt(v_set1(begin), distance);
        part.n_gathered += v_append(bits, part.found + i, part.gathered() + part.n_gathered);
    }
}

// write the ids of one part of a row; scratch: as many floats or ids as there are cells, and one
void fasa_list(const fasa_select_op & op, const fasa_row_parts & row, const fasa_part & own, void * scratch) {
    float   threshold = FASA_MASKED; // above it all cells are taken
    int64_t n_equal   = 0;           // of the cells at the threshold, those that are, by lower id

    if (row.n_upto > op.n_fac) {
        auto * begin = (float *) scratch;
        auto * end   = begin;
        row.for_each([&](const fasa_part & part) { end = std::copy_n(part.gathered(), part.n_gathered, end); });

        const int64_t rank = op.n_fac - row.n_above; // within the bin, from 1; 0: none of it
        std::nth_element(begin, begin + std::max<int64_t>(rank - 1, 0), end, std::greater<float>());

        threshold = begin[std::max<int64_t>(rank - 1, 0)];
        n_equal   = rank - std::count_if(begin, begin + rank, [&](float x) { return x > threshold; });
    }

    int64_t n_before = 0; // ids of the parts before
    row.for_each([&](const fasa_part & part) {
        if (&part >= &own) {
            return;
        }
        for (int32_t bin = 0; bin < row.bin; ++bin) {
            n_before += part.bins[bin];
        }
        for (int64_t i = 0; i < part.n_gathered; ++i) {
            const bool equal = part.gathered()[i] == threshold && n_equal > 0;
            n_before += part.gathered()[i] > threshold || equal;
            n_equal  -= equal;
        }
    });

    auto *  chosen   = (int32_t *) scratch;
    int64_t n_chosen = 0;
    for (int64_t i = 0; i < own.n_ids; i += FASA_LANES) {
        const vec      score = v_load(own.found + i);
        const uint32_t some  = v_bits_first(own.n_ids - i);

        uint32_t bits  = some & v_bits_gt(score, v_set1(threshold));
        uint32_t equal = some & ~bits & ~v_bits_gt(v_set1(threshold), score);
        for (; equal && n_equal > 0; equal &= equal - 1, --n_equal) {
            bits |= equal & (~equal + 1);
        }
        n_chosen += v_append(bits, own.ids + i, chosen + n_chosen);
    }

    int32_t * ids = std::copy_n(chosen, n_chosen, op.ids_of(own.row) + n_before);
    if (own.cell1 == op.n_kv) {
        std::fill(ids, op.ids_of(own.row) + op.n_fac, -1);
    }
}

} // namespace

//
// threads
//

void ggml_compute_forward_fasa_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const fasa_select_op op(dst);

    const int64_t ith = params->ith;
    const int64_t nth = params->nth;

    // [stats] [scores, ids and scores of candidates: of the rows at work] [parts] [scratch, query: of each thread]
    auto * stats    = (fasa_row_stats *) params->wdata;
    auto * scores   = (char *) stats    + op.size_stats;
    auto * ids      = (char *) scores   + op.size_scores*op.n_at_work(nth);
    auto * found    = (char *) ids      + op.size_cells *op.n_at_work(nth);
    auto * parts    = (fasa_part *) (found + op.size_cells*op.n_at_work(nth));
    auto * scratch  = (char *) parts    + op.size_parts*nth + (op.size_scratch + op.size_query)*ith;
    auto * quads    = (int32_t *) (scratch + op.size_scratch);
    auto * scale    = (float *) (quads + op.n_group*op.n_quads);
    auto * max      = scale + op.n_group;
    auto * sum      = max   + op.n_group*FASA_LANES;

    const fasa_group_query query = { quads, scale, max, sum };

    // at: of the rows at work
    const auto set_part = [&](fasa_part & part, int64_t row, int64_t cell0, int64_t cell1, int64_t at) {
        part.row    = row;
        part.cell0  = cell0;
        part.cell1  = cell1;
        part.scores = (float   *) (scores + op.size_scores*at) + cell0;
        part.ids    = (int32_t *) (ids    + op.size_cells *at) + cell0;
        part.found  = (float   *) (found  + op.size_cells *at) + cell0;
    };

    const int64_t n_whole = op.n_rows/nth; // rows of each thread
    const int64_t shared0 = n_whole*nth;   // first of the rows that all threads share
    const int64_t n_units = (op.n_rows - shared0)*op.n_chunks;

    auto * own = parts + 2*ith;

    if (n_units > 0) {
        // chunks one after the other, across the end of a row
        const int64_t unit1 = n_units*(ith + 1)/nth;

        int64_t unit = n_units*ith/nth;
        for (int i = 0; i < 2; ++i) {
            const int64_t at       = unit/op.n_chunks;
            const int64_t unit_end = std::min(unit1, (at + 1)*op.n_chunks);

            if (unit < unit_end) {
                set_part(own[i], shared0 + at, (unit - at*op.n_chunks)*FASA_CHUNK, std::min((unit_end - at*op.n_chunks)*FASA_CHUNK, op.n_kv), at);
            } else {
                own[i].row = -1;
            }
            unit = unit_end;
        }

        const auto for_each_own = [&](auto f) {
            for (int i = 0; i < 2; ++i) {
                if (own[i].row >= 0) {
                    f(own[i]);
                }
            }
            ggml_barrier(params->threadpool);
        };
        const auto row_of = [&](const fasa_part & part) {
            return fasa_row_parts(parts, 2*nth, part.row, op.n_fac);
        };

        for_each_own([&](fasa_part & part) { fasa_score_part(op, part, query, stats); });
        for_each_own([&](fasa_part & part) { fasa_find_candidates(op, part, stats, query.sum); });
        for_each_own([&](fasa_part & part) { fasa_gather (row_of(part), part); });
        for_each_own([&](fasa_part & part) { fasa_list   (op, row_of(part), part, scratch); });
    }

    for (int64_t row = ith*n_whole; row < (ith + 1)*n_whole; ++row) {
        set_part(*own, row, 0, op.n_kv, ith);

        fasa_score_part(op, *own, query, stats);
        fasa_find_candidates(op, *own, stats, query.sum);

        const fasa_row_parts whole(own, 1, row, op.n_fac);

        fasa_gather(whole, *own);
        fasa_list  (op, whole, *own, scratch);
    }
}
