// Scores every cell on its tips and lists the best ones, in four steps with a barrier between them:
//
//   score    tip scores of each query head; their maximum and sum of exp, by chunks of cells
//   combine  one score per cell, comparable between the query heads of a group; a histogram of them
//   collect  the cells down to the bin of the histogram that holds the n_fac-th best
//   list     of the cells in that bin the best ones, and all above
//
// A row is what one KV head does for one token. Threads take whole rows as far as these are equally many for all, and
// then need no barrier; the cells of what rows remain are split into one part per thread. Sums are made by chunks of
// cells and added in order, so the result does not depend on who made them.

#include "fasa-simd.h"

#include <cfloat>
#include <functional>

static constexpr float   FASA_MASKED = -INFINITY;
static constexpr float   FASA_FORCED =  INFINITY;
static constexpr int64_t FASA_CHUNK  = 1024; // cells
static constexpr int64_t FASA_PIECE  = 128;  // cells
static constexpr int64_t FASA_AHEAD  = 8;    // blocks of tips that are asked for before they are needed

// bins of the distance to the best score: 128 for each power of two, from 2^-6 to 2^10, and one for what cannot be chosen
static constexpr int32_t FASA_BINS      = 2048;
static constexpr int32_t FASA_BIN_SHIFT = 16;
static constexpr int32_t FASA_BIN_FIRST = (127 - 6) << (23 - FASA_BIN_SHIFT); // upper bits of 2^-6

static constexpr int FASA_MAX_TILE = 4; // query heads scored together

struct fasa_row_stats {
    float max;
    float sum; // of exp(score - max)
};

// some cells of a row
struct fasa_part {
    int64_t row;
    int64_t cell0;
    int64_t cell1;

    float   * scores; // [n_cells] by query head, with a stride of a whole row; then of the group in the first one
    int32_t * ids;    // of the cells collected
    int64_t   n_ids;

    float    best;               // score of the row
    uint32_t bins[FASA_BINS + 1];
};

// what the op reads, and how its work buffer is divided
struct fasa_select_op {
    const ggml_tensor * q;
    const ggml_tensor * tips;
    const ggml_tensor * dims;
    const ggml_tensor * mask;
    const ggml_tensor * forced;
    const ggml_tensor * dst;

    int64_t n_dim;
    int64_t n_quads;
    int64_t n_head_kv;
    int64_t n_group;
    int64_t n_tokens;
    int64_t n_rows;
    int64_t n_kv;
    int64_t n_chunks; // of a row
    int64_t n_fac;

    // bytes
    size_t size_stats;  // of all rows: fasa_row_stats [n_rows, n_chunks, n_group]
    size_t size_parts;  // of a thread: two parts, for it can have the end of one row and the beginning of another
    size_t size_scores; // of a thread: floats [n_group, n_kv]
    size_t size_ids;    // of a thread
    size_t size_scratch; // of a thread: floats [n_kv]
    size_t size_query;  // of a thread: rounded query heads of a row

    explicit fasa_select_op(const ggml_tensor * dst) :
        q(dst->src[0]), tips(dst->src[1]), dims(dst->src[2]), mask(dst->src[3]), forced(dst->src[4]), dst(dst) {
        n_dim     = dims->ne[0];
        n_quads   = fasa_tips_n_dim(n_dim)/FASA_TIPS_QUAD;
        n_head_kv = dims->ne[1];
        n_group   = q->ne[1]/n_head_kv;
        n_tokens  = q->ne[2];
        n_rows    = n_head_kv*n_tokens*q->ne[3];
        n_kv      = tips->ne[1]*FASA_TIPS_CELLS;
        n_chunks  = (n_kv + FASA_CHUNK - 1)/FASA_CHUNK;
        n_fac     = dst->ne[0];

        size_stats  = align(n_rows*n_chunks*n_group*sizeof(fasa_row_stats));
        size_parts  = align(2*sizeof(fasa_part));
        size_scores = align(n_group*n_kv*sizeof(float));
        size_ids    = align((n_kv + 2*FASA_LANES)*sizeof(int32_t)); // v_append_ids writes beyond the end
        size_scratch = align(n_kv*sizeof(float));
        size_query  = align(n_group*(n_quads + 2)*sizeof(int32_t) + 2*n_group*FASA_LANES*sizeof(float));
    }

    static size_t align(size_t size) { return GGML_PAD(size, CACHE_LINE_SIZE); }

    size_t size_thread() const { return size_scores + size_ids + size_scratch + size_query; }

    int64_t head  (int64_t row) const { return row % n_head_kv; }
    int64_t token (int64_t row) const { return row / n_head_kv % n_tokens; }
    int64_t stream(int64_t row) const { return row / n_head_kv / n_tokens; }

    const ggml_fp16_t * mask_of(int64_t row) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + token(row)*mask->nb[1] + stream(row)*mask->nb[3]);
    }

    int32_t * ids_of(int64_t row) const {
        return (int32_t *) dst->data + row*n_fac;
    }
};

size_t ggml_fasa_select_work_size(const ggml_tensor * dst, int n_tasks) {
    const fasa_select_op op(dst);
    return op.size_stats + n_tasks*(op.size_parts + op.size_thread());
}

//
// score
//

// the dominant dims of a group's query heads in 8 bits, so that the sums of products are whole numbers
struct fasa_query {
    int32_t * quads; // [n_quads, n_group] four dims each
    int32_t * start; // [n_group] of the sums, see FASA_DOT_BIAS
    float   * scale; // [n_group]

    // statistics under way, lane by lane
    float * max; // [FASA_LANES, n_group]
    float * sum;
};

static void fasa_round_query(const fasa_select_op & op, int64_t row, const fasa_query & query) {
    const float     scale = ggml_get_op_params_f32(op.dst, 0);
    const int32_t * dims  = (const int32_t *) op.dims->data + op.head(row)*op.n_dim;

    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const float * q_row = (const float *) ((const char *) op.q->data +
            (op.head(row)*op.n_group + ig)*op.q->nb[1] + op.token(row)*op.q->nb[2] + op.stream(row)*op.q->nb[3]);

        float amax = 0.0f;
        for (int64_t i = 0; i < op.n_dim; ++i) {
            const float x = std::fabs(q_row[dims[i]]);
            amax = x > amax || std::isnan(x) ? x : amax;
        }
        const bool finite = std::isfinite(amax);

        int8_t * values = (int8_t *) (query.quads + ig*op.n_quads);
        int32_t  sum    = 0;
        for (int64_t i = 0; i < FASA_TIPS_QUAD*op.n_quads; ++i) {
            values[i] = i < op.n_dim && finite && amax > 0.0f ? (int8_t) std::nearbyint(q_row[dims[i]]*(127.0f/amax)) : 0;
            sum += values[i];
        }
        query.start[ig] = -FASA_DOT_BIAS*sum;
        query.scale[ig] = finite ? scale*amax/127.0f : NAN; // a head that is not finite has no say
    }
}

// sums of products for one block of cells, with N heads at a time: sums of head i at i*stride
template <int N>
static inline void fasa_dot_block(const int8_t * values, const fasa_query & query, int64_t n_quads, int64_t ig, float * sums, int64_t stride) {
    static constexpr int N_VECS = 2;

    for (int iv = 0; iv < FASA_TIPS_CELLS/FASA_QUADS; iv += N_VECS) {
        ivec acc[N][N_VECS];
        for (int i = 0; i < N; ++i) {
            for (int j = 0; j < N_VECS; ++j) {
                acc[i][j] = i_set1(query.start[ig + i]);
            }
        }
        for (int64_t iq = 0; iq < n_quads; ++iq) {
            const int8_t * quad = values + FASA_TIPS_QUAD*(iq*FASA_TIPS_CELLS + iv*FASA_QUADS);
            for (int j = 0; j < N_VECS; ++j) {
                const ivec t = i_tips(quad + FASA_TIPS_QUAD*j*FASA_QUADS);
                for (int i = 0; i < N; ++i) {
                    acc[i][j] = i_dot(acc[i][j], t, i_set1(query.quads[(ig + i)*n_quads + iq]));
                }
            }
        }
        for (int i = 0; i < N; ++i) {
            for (int j = 0; j < N_VECS; ++j) {
                i_store(sums + i*stride + (iv + j)*FASA_QUADS, acc[i][j]);
            }
        }
    }
}

// scores of some cells, and what they add to the statistics of each query head, lane by lane: between the loads of one
// piece and the next there is little to compute, so the memory stays busy
static void fasa_score_piece(
        const fasa_select_op & op, const fasa_part & part, const fasa_query & query, int64_t cell0, int64_t cell1) {
    const size_t        block_size = fasa_tips_block_size(op.n_dim);
    const char        * tips       = (const char *) op.tips->data + op.head(part.row)*op.tips->nb[2] + op.stream(part.row)*op.tips->nb[3];
    const ggml_fp16_t * mask       = op.mask_of(part.row);
    const vec           masked     = v_set1(FASA_MASKED);

    float * scores = part.scores + (cell0 - part.cell0);

    for (int64_t cell = cell0; cell < cell1; cell += FASA_TIPS_CELLS) {
        char         * block  = const_cast<char *>(tips) + cell/FASA_TIPS_CELLS*block_size;
        const int8_t * values = fasa_tips_values(block);
        const auto   * scales = (const ggml_fp16_t *) fasa_tips_scales(block);
        float        * sums   = scores + (cell - cell0);

        for (size_t i = 0; i < block_size; i += CACHE_LINE_SIZE) {
            FASA_PREFETCH(block + FASA_AHEAD*block_size + i);
        }
        for (int64_t ig = 0; ig < op.n_group; ig += FASA_MAX_TILE) {
            float * dst = sums + ig*op.n_kv;
            switch (std::min<int64_t>(FASA_MAX_TILE, op.n_group - ig)) {
                case 1:  fasa_dot_block<1>(values, query, op.n_quads, ig, dst, op.n_kv); break;
                case 2:  fasa_dot_block<2>(values, query, op.n_quads, ig, dst, op.n_kv); break;
                case 3:  fasa_dot_block<3>(values, query, op.n_quads, ig, dst, op.n_kv); break;
                default: fasa_dot_block<4>(values, query, op.n_quads, ig, dst, op.n_kv); break;
            }
        }
        for (int j = 0; j < FASA_TIPS_CELLS; j += FASA_LANES) {
            const vec tip_scale = v_load_f16(scales + j);
            const vec mask_vec  = v_load_f16(mask + cell + j);
            for (int64_t ig = 0; ig < op.n_group; ++ig) {
                float   * x     = sums + ig*op.n_kv + j;
                const vec score = v_mul(v_mul(v_load(x), tip_scale), v_set1(query.scale[ig]));
                // not by adding: whatever a masked cell holds must not reach the others
                v_store(x, v_select_gt(mask_vec, masked, score, masked));
            }
        }
    }

    const int64_t n = cell1 - cell0;
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const float * x = scores + ig*op.n_kv;

        const vec before = v_load(query.max + ig*FASA_LANES);

        vec top = before;
        for (int64_t i = 0; i < n; i += FASA_LANES) {
            top = v_max(v_load(x + i), top);
        }
        if (op.n_group > 1) {
            vec sum = v_mul(v_load(query.sum + ig*FASA_LANES), v_exp(v_sub(before, top)));
            for (int64_t i = 0; i < n; i += FASA_LANES) {
                sum = v_add(sum, v_exp(v_sub(v_load(x + i), top)));
            }
            v_store(query.sum + ig*FASA_LANES, sum);
        }
        v_store(query.max + ig*FASA_LANES, top);
    }
}

static void fasa_score_chunk(
        const fasa_select_op & op, const fasa_part & part, const fasa_query & query, int64_t cell0, int64_t cell1, fasa_row_stats * stats) {
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        v_store(query.max + ig*FASA_LANES, v_set1(-FLT_MAX)); // finite, as differences must be numbers
        v_store(query.sum + ig*FASA_LANES, v_set1(0.0f));
    }
    for (int64_t cell = cell0; cell < cell1; cell += FASA_PIECE) {
        fasa_score_piece(op, part, query, cell, std::min(cell + FASA_PIECE, cell1));
    }
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const vec max = v_load(query.max + ig*FASA_LANES);
        const vec sum = v_load(query.sum + ig*FASA_LANES);

        stats[ig].max = v_greatest(max);
        stats[ig].sum = v_sum(v_mul(sum, v_exp(v_sub(max, v_set1(stats[ig].max)))));
    }
}

static void fasa_score(const fasa_select_op & op, const fasa_part & part, const fasa_query & query, fasa_row_stats * stats) {
    fasa_round_query(op, part.row, query);

    for (int64_t cell = part.cell0; cell < part.cell1; cell += FASA_CHUNK) {
        const int64_t ic = cell/FASA_CHUNK;
        fasa_score_chunk(op, part, query, cell, std::min(cell + FASA_CHUNK, part.cell1), stats + (part.row*op.n_chunks + ic)*op.n_group);
    }
}

//
// combine
//

// the maximum over all cells, and what makes the heads of a group comparable: the logarithm of the sum of exp
static fasa_row_stats fasa_head_stats(const fasa_select_op & op, const fasa_row_stats * stats, int64_t row, int64_t ig) {
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
        res.sum += chunk(ic).sum*std::exp(chunk(ic).max - res.max);
    }
    res.sum = res.max + std::log(res.sum);
    return res;
}

// the bins of n scores, FASA_BINS for those that cannot be chosen
static void fasa_bins(const float * scores, int64_t n, float best, uint16_t * bins) {
    for (int64_t i = 0; i < n; ++i) {
        const float distance = best - scores[i];

        int32_t bits;
        memcpy(&bits, &distance, sizeof(bits));

        const int32_t bin = std::min(std::max((bits >> FASA_BIN_SHIFT) - FASA_BIN_FIRST, 0), FASA_BINS - 1);
        bins[i] = scores[i] > FASA_MASKED ? bin : FASA_BINS;
    }
}

static void fasa_combine(const fasa_select_op & op, fasa_part & part, const fasa_row_stats * stats) {
    const int64_t n = part.cell1 - part.cell0;

    part.best = FASA_MASKED;
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const auto    head = fasa_head_stats(op, stats, part.row, ig);
        const vec     lse  = v_set1(head.sum);
        const float * x    = part.scores + ig*op.n_kv;

        const float best = head.max - head.sum;
        part.best = best > part.best ? best : part.best;

        for (int64_t i = 0; i < n; i += FASA_LANES) {
            v_store(part.scores + i, v_max(v_sub(v_load(x + i), lse), ig > 0 ? v_load(part.scores + i) : v_set1(FASA_MASKED)));
        }
    }
    part.best = std::min(part.best, FLT_MAX);

    if (op.forced) {
        const int64_t   n_forced = op.forced->ne[0];
        const int32_t * forced   = (const int32_t *) op.forced->data + part.row/op.n_head_kv*n_forced;
        for (int64_t i = 0; i < n_forced; ++i) {
            if (forced[i] >= part.cell0 && forced[i] < part.cell1 && part.scores[forced[i] - part.cell0] > FASA_MASKED) {
                part.scores[forced[i] - part.cell0] = FASA_FORCED;
            }
        }
    }

    static constexpr int64_t N = 8*FASA_TIPS_CELLS;

    std::fill(part.bins, part.bins + FASA_BINS + 1, 0);
    for (int64_t i = 0; i < n; i += N) {
        uint16_t bins[N];
        const int64_t n_bins = std::min(N, n - i);
        fasa_bins(part.scores + i, n_bins, part.best, bins);
        for (int64_t j = 0; j < n_bins; ++j) {
            part.bins[bins[j]]++;
        }
    }
}

//
// collect, list
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

    // no cell in this bin or a better one is farther from the best
    float distance_end() const {
        if (bin >= FASA_BINS - 1) {
            return INFINITY;
        }
        const int32_t bits = (bin + 1 + FASA_BIN_FIRST) << FASA_BIN_SHIFT;
        float res;
        memcpy(&res, &bits, sizeof(res));
        return res;
    }
};

static void fasa_collect(const fasa_row_parts & row, fasa_part & part) {
    const float end = row.distance_end();

    part.n_ids = 0;
    for (int64_t i = 0; i < part.cell1 - part.cell0; i += FASA_LANES) {
        const vec      score = v_load(part.scores + i);
        const uint32_t bits  = std::isinf(end) ? v_bits_gt(score, v_set1(FASA_MASKED)) : v_bits_gt(v_set1(end), v_sub(v_set1(part.best), score));
        if (bits) {
            part.n_ids += v_append_ids(bits, part.cell0 + i, part.ids + part.n_ids);
        }
    }
}

// write the ids of one part of a row; scratch: floats, as many as there are cells in the bin
static void fasa_list(const fasa_select_op & op, const fasa_row_parts & row, const fasa_part & own, float * scratch) {
    const auto for_each_id = [&](auto f) {
        row.for_each([&](const fasa_part & part) {
            for (int64_t i = 0; i < part.n_ids; ++i) {
                f(part, part.ids[i], part.scores[part.ids[i] - part.cell0]);
            }
        });
    };

    float   threshold = FASA_MASKED; // above it all cells are taken
    int64_t n_equal   = 0;           // of the cells at the threshold, those that are, by lower id

    if (row.n_upto > op.n_fac) {
        float * end = scratch;
        for_each_id([&](const fasa_part & part, int32_t, float score) {
            uint16_t bin;
            fasa_bins(&score, 1, part.best, &bin);
            if (bin == row.bin) {
                *end++ = score;
            }
        });
        const int64_t rank = op.n_fac - row.n_above; // within the bin, from 1; 0: none of it
        std::nth_element(scratch, scratch + std::max<int64_t>(rank - 1, 0), end, std::greater<float>());

        threshold = scratch[std::max<int64_t>(rank - 1, 0)];
        n_equal   = rank - std::count_if(scratch, scratch + rank, [&](float x) { return x > threshold; });
    }

    int32_t * ids = op.ids_of(own.row);

    int64_t n = 0;
    for_each_id([&](const fasa_part & part, int32_t id, float score) {
        const bool equal = score == threshold && n_equal > 0;
        if (score > threshold || equal) {
            if (&part == &own) {
                ids[n] = id;
            }
            n++;
            n_equal -= equal;
        }
    });
    if (own.cell1 == op.n_kv) {
        std::fill(ids + n, ids + op.n_fac, -1);
    }
}

//
// threads
//

void ggml_compute_forward_fasa_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const fasa_select_op op(dst);

    const int64_t ith = params->ith;
    const int64_t nth = params->nth;

    // [stats of all rows] [parts of all threads] [scores, ids, scratch, query of each thread]
    auto * stats   = (fasa_row_stats *) params->wdata;
    auto * parts   = (fasa_part *) ((char *) stats + op.size_stats);
    auto * scores  = (float     *) ((char *) parts + op.size_parts*nth + op.size_thread()*ith);
    auto * ids     = (int32_t   *) ((char *) scores  + op.size_scores);
    auto * scratch = (float     *) ((char *) ids     + op.size_ids);
    auto * quads   = (int32_t   *) ((char *) scratch + op.size_scratch);
    auto * start   = quads + op.n_group*op.n_quads;
    auto * scale   = (float *) start + op.n_group;
    auto * max     = scale + op.n_group;
    auto * sum     = max   + op.n_group*FASA_LANES;

    const fasa_query query = { quads, start, scale, max, sum };

    const int64_t n_whole = op.n_rows/nth;    // rows of each thread
    const int64_t shared0 = n_whole*nth;      // first of the rows that all threads share
    const int64_t n_units = (op.n_rows - shared0)*op.n_chunks;

    auto * own = parts + 2*ith;

    if (n_units > 0) {
        // chunks one after the other, across the end of a row
        const int64_t unit1 = n_units*(ith + 1)/nth;

        int64_t unit   = n_units*ith/nth;
        int64_t offset = 0;
        for (int i = 0; i < 2; ++i) {
            const int64_t row      = unit/op.n_chunks;
            const int64_t unit_end = std::min(unit1, (row + 1)*op.n_chunks);

            own[i].row    = unit < unit_end ? shared0 + row : -1;
            own[i].cell0  = (unit     - row*op.n_chunks)*FASA_CHUNK;
            own[i].cell1  = std::min((unit_end - row*op.n_chunks)*FASA_CHUNK, op.n_kv);
            own[i].scores = scores + offset;
            own[i].ids    = ids    + offset + i*FASA_LANES;

            offset += own[i].cell1 - own[i].cell0;
            unit    = unit_end;
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

        for_each_own([&](fasa_part & part) { fasa_score  (op, part, query, stats); });
        for_each_own([&](fasa_part & part) { fasa_combine(op, part, stats); });
        for_each_own([&](fasa_part & part) { fasa_collect(row_of(part), part); });
        for_each_own([&](fasa_part & part) { fasa_list   (op, row_of(part), part, scratch); });
    }

    for (int64_t row = ith*n_whole; row < (ith + 1)*n_whole; ++row) {
        own->row    = row;
        own->cell0  = 0;
        own->cell1  = op.n_kv;
        own->scores = scores;
        own->ids    = ids;

        fasa_score  (op, *own, query, stats);
        fasa_combine(op, *own, stats);

        const fasa_row_parts whole(own, 1, row, op.n_fac);

        fasa_collect(whole, *own);
        fasa_list   (op, whole, *own, scratch);
    }
}
