// Scores every cell on its tips and lists the best ones, in four steps with a barrier between them:
//
//   score    tip scores of each query head; their maximum and sum of exp, by chunks of cells
//   combine  one score per cell, comparable between the query heads of a group; candidates, and a histogram of them
//   gather   scores of the candidates in the bin that holds the n_fac-th best cell
//   list     the candidates in better bins, and of that one the best
//
// A row is what one KV head does for one token. Threads take whole rows as far as these are equally many for all, and
// then need no barrier; the cells of what rows remain are split into one part per thread. Sums are made by chunks of
// cells and added in order, so the result does not depend on who made them.

#include "fasa-simd.h"

#include <cfloat>
#include <functional>
#include <type_traits>

static constexpr float   FASA_MASKED = -INFINITY;
static constexpr float   FASA_FORCED =  INFINITY;
static constexpr float   FASA_LEAST  =  1e-30f; // a query of smaller elements is zero: their inverse is not finite
static constexpr int64_t FASA_CHUNK  = 1024; // cells
static constexpr int64_t FASA_PIECE  = 128;  // cells
static constexpr int64_t FASA_AHEAD  = 8;    // blocks of tips that are asked for before they are needed

// bins of the distance to the best score: 64 for each power of two, from 2^-6 to 2^10
static constexpr int32_t FASA_BINS      = 1024;
static constexpr int32_t FASA_BIN_SHIFT = 17;
static constexpr int32_t FASA_BIN_FIRST = (127 - 6) << (23 - FASA_BIN_SHIFT); // upper bits of 2^-6

// where that leaves out most, candidates are the cells down to a score guessed from one vector of cells in so many
static constexpr int64_t FASA_SAMPLE = 16;

static constexpr int FASA_MAX_TILE = 4; // query heads scored together

// scores are in units of log(2), which changes no order
struct fasa_row_stats {
    float max;
    float sum; // of 2^(score - max)
};

// some cells of a row
struct fasa_part {
    int64_t row;
    int64_t cell0;
    int64_t cell1;

    float   * scores; // [n_cells] by query head, with a stride of a whole row; then of the group in the first one
    int32_t * ids;    // of the candidates
    int64_t   n_ids;
    float   * gathered;
    int64_t   n_gathered;

    float    best; // score of the row
    uint32_t bins[FASA_BINS];
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

    // bytes; of a row at work: a thread's own, or one that all share
    size_t size_stats;   // of all rows: fasa_row_stats [n_rows, n_chunks, n_group]
    size_t size_scores;  // of a row at work: floats [n_group, n_kv]
    size_t size_cells;   // of a row at work, for its candidates and for the gathered ones: 4 bytes a cell
    size_t size_parts;   // of a thread: two parts, for it can have the end of one row and the beginning of another
    size_t size_scratch; // of a thread: 4 bytes a cell, and one more
    size_t size_query;   // of a thread: rounded query heads of a row

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

        size_stats   = align(n_rows*n_chunks*n_group*sizeof(fasa_row_stats));
        size_scores  = align(n_group*n_kv*sizeof(float));
        size_cells   = align(n_kv*sizeof(float));
        size_parts   = align(2*sizeof(fasa_part));
        size_scratch = align((n_kv + 1)*sizeof(float));
        size_query   = align(n_group*(n_quads + 2)*sizeof(int32_t) + 2*n_group*FASA_LANES*sizeof(float));
    }

    static size_t align(size_t size) { return GGML_PAD(size, CACHE_LINE_SIZE); }

    // threads that share rows are more than these rows, so there are never more rows at work than either
    int64_t n_at_work(int64_t n_threads) const { return std::min(n_rows, n_threads); }

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
    return op.size_stats + op.n_at_work(n_tasks)*(op.size_scores + 2*op.size_cells) + n_tasks*(op.size_parts + op.size_scratch + op.size_query);
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

    // the query heads from the ig-th on
    fasa_query from(int64_t ig, int64_t n_quads) const {
        return { quads + ig*n_quads, start + ig, scale + ig, max + ig*FASA_LANES, sum + ig*FASA_LANES };
    }
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
        const bool  finite  = std::isfinite(amax);
        const float inverse = finite && amax > FASA_LEAST ? 127.0f/amax : 0.0f;

        int8_t * values = (int8_t *) (query.quads + ig*op.n_quads);
        int32_t  sum    = 0;
        for (int64_t i = 0; i < FASA_TIPS_QUAD*op.n_quads; ++i) {
            values[i] = i < op.n_dim && inverse > 0.0f ? (int8_t) std::nearbyint(q_row[dims[i]]*inverse) : 0;
            sum += values[i];
        }
        query.start[ig] = -FASA_DOT_BIAS*sum;
        query.scale[ig] = finite ? FASA_LOG2_E*scale*amax/127.0f : NAN; // a head that is not finite has no say
    }
}

// scores of N query heads for one block of cells, of head i at i*stride; what is masked does not matter
template <int N>
static inline void fasa_score_block(
        const int8_t * values, const ggml_fp16_t * scales, const ggml_fp16_t * mask, int64_t n_quads,
        const fasa_query & query, float * scores, int64_t stride) {
    static constexpr int N_VECS = 2;

    const vec masked = v_set1(FASA_MASKED);

    vec max[N];
    for (int ih = 0; ih < N; ++ih) {
        max[ih] = v_load(query.max + ih*FASA_LANES);
    }
    for (int i = 0; i < FASA_TIPS_CELLS; i += N_VECS*FASA_LANES) {
        ivec acc[N][N_VECS];
        for (int ih = 0; ih < N; ++ih) {
            for (int iv = 0; iv < N_VECS; ++iv) {
                acc[ih][iv] = i_set1(query.start[ih]);
            }
        }
        for (int64_t iq = 0; iq < n_quads; ++iq) {
            ivec t[N_VECS];
            for (int iv = 0; iv < N_VECS; ++iv) {
                t[iv] = i_tips(values + FASA_TIPS_QUAD*(iq*FASA_TIPS_CELLS + i + iv*FASA_LANES));
            }
            for (int ih = 0; ih < N; ++ih) {
                const ivec q = i_set1(query.quads[ih*n_quads + iq]);
                for (int iv = 0; iv < N_VECS; ++iv) {
                    acc[ih][iv] = i_dot(acc[ih][iv], t[iv], q);
                }
            }
        }
        for (int iv = 0; iv < N_VECS; ++iv) {
            const int at       = i + iv*FASA_LANES;
            const vec scale    = v_load_f16(scales + at);
            const vec mask_vec = v_load_f16(mask + at);
            for (int ih = 0; ih < N; ++ih) {
                vec score = v_mul(v_mul(v_from(acc[ih][iv]), scale), v_set1(query.scale[ih]));
                // not by adding: whatever a masked cell holds must not reach the others
                score   = v_select_gt(mask_vec, masked, score, masked);
                max[ih] = v_max(score, max[ih]);
                v_store(scores + ih*stride + at, score);
            }
        }
    }
    for (int ih = 0; ih < N; ++ih) {
        v_store(query.max + ih*FASA_LANES, max[ih]);
    }
}

// scores of some cells, and what they add to the statistics of each query head, lane by lane: between the loads of one
// piece and the next there is little to compute, so the memory stays busy
static void fasa_score_piece(const fasa_select_op & op, const fasa_part & part, const fasa_query & query, int64_t cell0, int64_t cell1) {
    const size_t        block_size = fasa_tips_block_size(op.n_dim);
    const char        * tips       = (const char *) op.tips->data + op.head(part.row)*op.tips->nb[2] + op.stream(part.row)*op.tips->nb[3];
    const ggml_fp16_t * mask       = op.mask_of(part.row);

    for (int64_t ig = 0; ig < op.n_group; ig += FASA_MAX_TILE) {
        const int64_t n_heads = std::min<int64_t>(FASA_MAX_TILE, op.n_group - ig);
        const auto    heads   = query.from(ig, op.n_quads);
        float       * scores  = part.scores + ig*op.n_kv + (cell0 - part.cell0);

        vec before[FASA_MAX_TILE];
        for (int64_t ih = 0; ih < n_heads; ++ih) {
            before[ih] = v_load(heads.max + ih*FASA_LANES);
        }

        for (int64_t cell = cell0; cell < cell1; cell += FASA_TIPS_CELLS) {
            const char * block = tips + cell/FASA_TIPS_CELLS*block_size;

            for (size_t i = 0; i < block_size && ig == 0; i += CACHE_LINE_SIZE) {
                FASA_PREFETCH(block + FASA_AHEAD*block_size + i);
            }

            const auto score_block = [&](auto n) {
                fasa_score_block<decltype(n)::value>((const int8_t *) block + fasa_tips_values(), (const ggml_fp16_t *) block, mask + cell,
                    op.n_quads, heads, scores + (cell - cell0), op.n_kv);
            };
            switch (n_heads) {
                case 1:  score_block(std::integral_constant<int, 1>()); break;
                case 2:  score_block(std::integral_constant<int, 2>()); break;
                case 3:  score_block(std::integral_constant<int, 3>()); break;
                default: score_block(std::integral_constant<int, 4>()); break;
            }
        }

        for (int64_t ih = 0; ih < n_heads && op.n_group > 1; ++ih) {
            const float * x   = scores + ih*op.n_kv;
            const vec     max = v_load(heads.max + ih*FASA_LANES);

            vec sum = v_mul(v_load(heads.sum + ih*FASA_LANES), v_exp2(v_sub(before[ih], max)));
            for (int64_t i = 0; i < cell1 - cell0; i += FASA_LANES) {
                sum = v_add(sum, v_exp2(v_sub(v_load(x + i), max)));
            }
            v_store(heads.sum + ih*FASA_LANES, sum);
        }
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
        stats[ig].sum = v_sum(v_mul(sum, v_exp2(v_sub(max, v_set1(stats[ig].max)))));
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

// the maximum over all cells, and what makes the heads of a group comparable: the logarithm of the sum
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
        res.sum += chunk(ic).sum*std::exp2(chunk(ic).max - res.max);
    }
    res.sum = res.max + std::log2(res.sum);
    return res;
}

static int32_t fasa_bin(float score, float best) {
    const float distance = best - score;

    int32_t bits;
    memcpy(&bits, &distance, sizeof(bits));

    return std::min(std::max((bits >> FASA_BIN_SHIFT) - FASA_BIN_FIRST, 0), FASA_BINS - 1);
}

// no score in this bin or a better one is farther from the best
static float fasa_bin_end(int32_t bin) {
    const int32_t bits = (bin + 1 + FASA_BIN_FIRST) << FASA_BIN_SHIFT;

    float res;
    memcpy(&res, &bits, sizeof(res));
    return bin < FASA_BINS - 1 ? res : INFINITY;
}

// append the cells that are nearer to the best score than end; n: a multiple of FASA_LANES, so no id is written past the part's
static void fasa_collect(fasa_part & part, int64_t cell0, int64_t n, float end) {
    const float * scores = part.scores + (cell0 - part.cell0);

    for (int64_t i = 0; i < n; i += FASA_LANES) {
        const vec      score = v_load(scores + i);
        const uint32_t bits  = end < INFINITY ? v_bits_gt(v_set1(end), v_sub(v_set1(part.best), score)) : v_bits_gt(score, v_set1(FASA_MASKED));
        part.n_ids += v_append_ids(bits, cell0 + i, part.ids + part.n_ids);
    }
}

// scores of the group, made of those of its heads; lse: [n_group]
static vec fasa_group_score(const fasa_select_op & op, const float * scores, const float * lse) {
    vec res = v_set1(FASA_MASKED);
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        res = v_max(v_sub(v_load(scores + ig*op.n_kv), v_set1(lse[ig])), res);
    }
    return res;
}

// a distance within which there are probably n_fac cells of the part, and not many more
static float fasa_guess_end(const fasa_select_op & op, fasa_part & part, const float * lse) {
    const int64_t n = part.cell1 - part.cell0;
    if (n < 8*op.n_fac || n < 2*FASA_CHUNK) {
        return INFINITY; // the guess would cost more than it spares
    }

    std::fill(part.bins, part.bins + FASA_BINS, 0);
    for (int64_t is = 0; is < n/(FASA_SAMPLE*FASA_LANES); ++is) {
        const int64_t i = is*FASA_SAMPLE + is*7 % FASA_SAMPLE; // not at equal distances, as a text may repeat itself

        float scores[FASA_LANES];
        v_store(scores, fasa_group_score(op, part.scores + i*FASA_LANES, lse));
        for (float score : scores) {
            part.bins[fasa_bin(score, part.best)] += score > FASA_MASKED;
        }
    }

    const int64_t n_wanted = op.n_fac/FASA_SAMPLE + op.n_fac/FASA_SAMPLE/4 + 32;

    int64_t n_upto = 0;
    int32_t bin    = 0;
    while (bin < FASA_BINS - 1 && (n_upto += part.bins[bin]) < n_wanted) {
        bin++;
    }
    return fasa_bin_end(bin);
}

// lse: [n_group], scratch
static void fasa_combine(const fasa_select_op & op, fasa_part & part, const fasa_row_stats * stats, float * lse) {
    part.best = FASA_MASKED;
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const auto head = fasa_head_stats(op, stats, part.row, ig);

        lse[ig]   = head.sum;
        part.best = head.max - head.sum > part.best ? head.max - head.sum : part.best;
    }
    part.best = std::min(part.best, FLT_MAX);

    const float end = fasa_guess_end(op, part, lse);

    const int64_t   n_forced = op.forced ? op.forced->ne[0] : 0;
    const int32_t * forced   = op.forced ? (const int32_t *) op.forced->data + part.row/op.n_head_kv*n_forced : nullptr;

    part.n_ids = 0;
    for (int64_t cell = part.cell0; cell < part.cell1; cell += FASA_CHUNK) {
        const int64_t n      = std::min(FASA_CHUNK, part.cell1 - cell);
        float       * scores = part.scores + (cell - part.cell0);

        for (int64_t i = 0; i < n; i += FASA_LANES) {
            v_store(scores + i, fasa_group_score(op, scores + i, lse));
        }
        for (int64_t i = 0; i < n_forced; ++i) {
            if (forced[i] >= cell && forced[i] < cell + n && scores[forced[i] - cell] > FASA_MASKED) {
                scores[forced[i] - cell] = FASA_FORCED;
            }
        }
        fasa_collect(part, cell, n, end);
    }
    if (part.n_ids < op.n_fac && end < INFINITY) {
        part.n_ids = 0;
        fasa_collect(part, part.cell0, part.cell1 - part.cell0, INFINITY);
    }

    std::fill(part.bins, part.bins + FASA_BINS, 0);
    for (int64_t i = 0; i < part.n_ids; ++i) {
        part.bins[fasa_bin(part.scores[part.ids[i] - part.cell0], part.best)]++;
    }
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

static void fasa_gather(const fasa_row_parts & row, fasa_part & part) {
    part.n_gathered = 0;
    for (int64_t i = 0; i < part.n_ids && row.bin < FASA_BINS; ++i) {
        const float score = part.scores[part.ids[i] - part.cell0];

        part.gathered[part.n_gathered] = score; // if it is of another bin, the next one replaces it
        part.n_gathered += fasa_bin(score, part.best) == row.bin;
    }
}

// write the ids of one part of a row; scratch: as many floats or ids as there are cells, and one
static void fasa_list(const fasa_select_op & op, const fasa_row_parts & row, const fasa_part & own, void * scratch) {
    float   threshold = FASA_MASKED; // above it all cells are taken
    int64_t n_equal   = 0;           // of the cells at the threshold, those that are, by lower id

    if (row.n_upto > op.n_fac) {
        auto * begin = (float *) scratch;
        auto * end   = begin;
        row.for_each([&](const fasa_part & part) { end = std::copy_n(part.gathered, part.n_gathered, end); });

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
            const bool equal = part.gathered[i] == threshold && n_equal > 0;
            n_before += part.gathered[i] > threshold || equal;
            n_equal  -= equal;
        }
    });

    auto *  chosen   = (int32_t *) scratch;
    int64_t n_chosen = 0;
    for (int64_t i = 0; i < own.n_ids; ++i) {
        const float score = own.scores[own.ids[i] - own.cell0];
        const bool  equal = score == threshold && n_equal > 0;

        chosen[n_chosen] = own.ids[i]; // if it is not taken, the next one replaces it
        n_chosen += score > threshold || equal;
        n_equal  -= equal;
    }

    int32_t * ids = std::copy_n(chosen, n_chosen, op.ids_of(own.row) + n_before);
    if (own.cell1 == op.n_kv) {
        std::fill(ids, op.ids_of(own.row) + op.n_fac, -1);
    }
}

//
// threads
//

void ggml_compute_forward_fasa_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const fasa_select_op op(dst);

    const int64_t ith = params->ith;
    const int64_t nth = params->nth;

    // [stats] [scores, candidates, gathered: of the rows at work] [parts] [scratch, query: of each thread]
    auto * stats    = (fasa_row_stats *) params->wdata;
    auto * scores   = (char *) stats    + op.size_stats;
    auto * ids      = (char *) scores   + op.size_scores*op.n_at_work(nth);
    auto * gathered = (char *) ids      + op.size_cells *op.n_at_work(nth);
    auto * parts    = (fasa_part *) (gathered + op.size_cells*op.n_at_work(nth));
    auto * scratch  = (char *) parts    + op.size_parts*nth + (op.size_scratch + op.size_query)*ith;
    auto * quads    = (int32_t *) (scratch + op.size_scratch);
    auto * start    = quads + op.n_group*op.n_quads;
    auto * scale    = (float *) start + op.n_group;
    auto * max      = scale + op.n_group;
    auto * sum      = max   + op.n_group*FASA_LANES;

    const fasa_query query = { quads, start, scale, max, sum };

    // at: of the rows at work
    const auto set_part = [&](fasa_part & part, int64_t row, int64_t cell0, int64_t cell1, int64_t at) {
        part.row      = row;
        part.cell0    = cell0;
        part.cell1    = cell1;
        part.scores   = (float   *) (scores   + op.size_scores*at) + cell0;
        part.ids      = (int32_t *) (ids      + op.size_cells *at) + cell0;
        part.gathered = (float   *) (gathered + op.size_cells *at) + cell0;
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

        for_each_own([&](fasa_part & part) { fasa_score  (op, part, query, stats); });
        for_each_own([&](fasa_part & part) { fasa_combine(op, part, stats, query.sum); });
        for_each_own([&](fasa_part & part) { fasa_gather (row_of(part), part); });
        for_each_own([&](fasa_part & part) { fasa_list   (op, row_of(part), part, scratch); });
    }

    for (int64_t row = ith*n_whole; row < (ith + 1)*n_whole; ++row) {
        set_part(*own, row, 0, op.n_kv, ith);

        fasa_score  (op, *own, query, stats);
        fasa_combine(op, *own, stats, query.sum);

        const fasa_row_parts whole(own, 1, row, op.n_fac);

        fasa_gather(whole, *own);
        fasa_list  (op, whole, *own, scratch);
    }
}
