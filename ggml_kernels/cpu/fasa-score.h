// The tip scores of cells, and what FASA_SELECT shares among its steps: the shapes of the op, the division of its work
// buffer, and the parts of rows that threads work on.

#pragma once

#include "fasa-simd.h"

#include <cfloat>

namespace {

constexpr float   FASA_MASKED = -INFINITY;
constexpr float   FASA_LEAST  =  1e-30f; // a query of smaller elements is zero: their inverse is not finite
constexpr float   FASA_MOST   =  1e24f;  // step of a query at most, in units of the scores: none of these is infinite
constexpr int64_t FASA_CHUNK  = 1024; // cells
constexpr int64_t FASA_PIECE  = 128;  // cells
constexpr int64_t FASA_BLOCKS_AHEAD = 8; // blocks of tips that are asked for before they are needed

// bins of the distance to the best score: 64 for each power of two, from 2^-6 to 2^10
constexpr int32_t FASA_BINS      = 1024;
constexpr int32_t FASA_BIN_SHIFT = 17;
constexpr int32_t FASA_BIN_FIRST = (127 - 6) << (23 - FASA_BIN_SHIFT); // upper bits of 2^-6

constexpr int FASA_SCORE_HEADS = 4; // query heads scored together

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

    float   * scores; // [n_cells] by query head, with a stride of a whole row
    int32_t * ids;    // of the candidates
    float   * found;  // their scores
    int64_t   n_ids;
    int64_t   n_gathered;

    // scores of candidates in the bin of the n_fac-th best cell: when they are gathered, nobody needs the scores of heads any more
    float * gathered() const { return scores; }

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
    const ggml_tensor * ranges;
    const ggml_tensor * dst;

    int64_t n_dim;
    int64_t n_quads;
    int64_t n_head_sel; // heads that choose: a KV head for its whole group, or each query head
    int64_t n_shared;   // of them that read one KV head
    int64_t n_group;    // query heads that share a choice
    int64_t n_tokens;
    int64_t n_rows;
    int64_t n_kv;
    int64_t n_chunks; // of a row
    int64_t n_fac;

    // bytes; of a row at work: a thread's own, or one that all share
    size_t size_stats;   // of all rows: fasa_row_stats [n_rows, n_chunks, n_group]
    size_t size_scores;  // of a row at work: floats [n_group, n_kv]
    size_t size_cells;   // of a row at work, for the ids of its candidates and for their scores: 4 bytes a cell
    size_t size_parts;   // of a thread: two parts, for it can have the end of one row and the beginning of another
    size_t size_scratch; // of a thread: 4 bytes a cell, and one more
    size_t size_query;   // of a thread: rounded query heads of a row

    explicit fasa_select_op(const ggml_tensor * dst) :
        q(dst->src[0]), tips(dst->src[1]), dims(dst->src[2]), mask(dst->src[3]), forced(dst->src[4]), ranges(dst->src[5]), dst(dst) {
        n_dim      = dims->ne[0];
        n_quads    = 2*fasa_tips_n_pairs(n_dim);
        n_head_sel = dst->ne[1];
        n_shared   = n_head_sel/dims->ne[1];
        n_group    = q->ne[1]/n_head_sel;
        n_tokens   = q->ne[2];
        n_rows     = n_head_sel*n_tokens*q->ne[3];
        n_kv       = tips->ne[1]*FASA_TIPS_CELLS;
        n_chunks   = (n_kv + FASA_CHUNK - 1)/FASA_CHUNK;
        n_fac      = dst->ne[0];

        size_stats   = align(n_rows*n_chunks*n_group*sizeof(fasa_row_stats));
        size_scores  = align(n_group*n_kv*sizeof(float));
        size_cells   = align(n_kv*sizeof(float));
        size_parts   = align(2*sizeof(fasa_part));
        size_scratch = align((n_kv + 1)*sizeof(float));
        size_query   = align(n_group*(n_quads + 1)*sizeof(int32_t) + 2*n_group*FASA_LANES*sizeof(float));
    }

    static size_t align(size_t size) { return GGML_PAD(size, CACHE_LINE_SIZE); }

    // threads that share rows are more than these rows, so there are never more rows at work than either
    int64_t n_at_work(int64_t n_threads) const { return std::min(n_rows, n_threads); }

    int64_t head   (int64_t row) const { return row % n_head_sel; }
    int64_t head_kv(int64_t row) const { return head(row) / n_shared; }
    int64_t token  (int64_t row) const { return row / n_head_sel % n_tokens; }
    int64_t stream (int64_t row) const { return row / n_head_sel / n_tokens; }

    const ggml_fp16_t * mask_of(int64_t row) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + token(row)*mask->nb[1] + stream(row)*mask->nb[3]);
    }

    int32_t * ids_of(int64_t row) const {
        return (int32_t *) dst->data + row*n_fac;
    }
};

// the dominant dims of a group's query heads, in units of the steps of the tips, in 8 bits: the sums of products are whole numbers
struct fasa_group_query {
    int32_t * quads; // [n_quads, n_group] four dims each
    float   * scale; // [n_group]

    // statistics under way, lane by lane
    float * max; // [FASA_LANES, n_group]
    float * sum;

    // the query heads from the ig-th on
    fasa_group_query from(int64_t ig, int64_t n_quads) const {
        return { quads + ig*n_quads, scale + ig, max + ig*FASA_LANES, sum + ig*FASA_LANES };
    }
};

// row: of one query head; scale: of the logits; returns what makes its scores of the sums, NaN if the row is not finite
float fasa_round_row(const float * row, const int32_t * dims, const float * steps, int64_t n_dim, float scale, int32_t * quads) {
    float amax = 0.0f;
    for (int64_t i = 0; i < n_dim; ++i) {
        const float x = std::fabs(row[dims[i]]*steps[i]);
        amax = x > amax || std::isnan(x) ? x : amax;
    }
    const bool  finite  = std::isfinite(amax);
    const float inverse = finite && amax > FASA_LEAST ? 127.0f/amax : 0.0f;

    int8_t * values = (int8_t *) quads;
    for (int64_t i = 0; i < FASA_TIPS_PAIR*fasa_tips_n_pairs(n_dim); ++i) {
        values[i] = i < n_dim && inverse > 0.0f ? (int8_t) std::nearbyint(row[dims[i]]*steps[i]*inverse) : 0;
    }
    return finite ? std::clamp(FASA_LOG2_E*scale*amax/127.0f, -FASA_MOST, FASA_MOST) : NAN;
}

void fasa_round_query(const fasa_select_op & op, int64_t row, const fasa_group_query & query) {
    const float     scale = ggml_get_op_params_f32(op.dst, 0);
    const int32_t * dims  = (const int32_t *) op.dims->data + op.head_kv(row)*op.n_dim;
    const float   * steps = (const float *) op.ranges->data + (2*op.head_kv(row) + 1)*op.n_dim;

    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const float * q_row = (const float *) ((const char *) op.q->data +
            (op.head(row)*op.n_group + ig)*op.q->nb[1] + op.token(row)*op.q->nb[2] + op.stream(row)*op.q->nb[3]);

        // a head that is not finite has no say
        query.scale[ig] = fasa_round_row(q_row, dims, steps, op.n_dim, scale, query.quads + ig*op.n_quads);
    }
}

// scores of N query heads for one block of cells, of head i at i*stride; what is masked does not matter
template <int N>
inline void fasa_score_block(
        const char * block, const ggml_fp16_t * mask, int64_t n_quads, const fasa_group_query & query, float * scores, int64_t stride) {
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
                acc[ih][iv] = i_set1(0);
            }
        }
        for (int64_t iq = 0; iq < n_quads; iq += 2) {
            ivec lower[N_VECS];
            ivec upper[N_VECS];
            for (int iv = 0; iv < N_VECS; ++iv) {
                const ivec t = i_load(block + fasa_tips_offset(iq/2, i + iv*FASA_LANES));
                lower[iv] = i_lower(t);
                upper[iv] = i_upper(t);
            }
            for (int ih = 0; ih < N; ++ih) {
                const ivec low  = i_set1(query.quads[ih*n_quads + iq]);
                const ivec high = i_set1(query.quads[ih*n_quads + iq + 1]);
                for (int iv = 0; iv < N_VECS; ++iv) {
                    acc[ih][iv] = i_dot(acc[ih][iv], lower[iv], upper[iv], low, high);
                }
            }
        }
        for (int iv = 0; iv < N_VECS; ++iv) {
            const int at       = i + iv*FASA_LANES;
            const vec mask_vec = v_load_f16(mask + at);
            for (int ih = 0; ih < N; ++ih) {
                vec score = v_mul(v_from(acc[ih][iv]), v_set1(query.scale[ih]));
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

// the same for up to FASA_SCORE_HEADS of them
inline void fasa_score_heads(int64_t n_heads,
        const char * block, const ggml_fp16_t * mask, int64_t n_quads, const fasa_group_query & query, float * scores, int64_t stride) {
    switch (n_heads) {
        case 1:  fasa_score_block<1>(block, mask, n_quads, query, scores, stride); break;
        case 2:  fasa_score_block<2>(block, mask, n_quads, query, scores, stride); break;
        case 3:  fasa_score_block<3>(block, mask, n_quads, query, scores, stride); break;
        default: fasa_score_block<4>(block, mask, n_quads, query, scores, stride); break;
    }
}

// scores of some cells, and what they add to the statistics of each query head, lane by lane: between the loads of one
// piece and the next there is little to compute, so the memory stays busy
void fasa_score_piece(const fasa_select_op & op, const fasa_part & part, const fasa_group_query & query, int64_t cell0, int64_t cell1) {
    const size_t        block_size = fasa_tips_block_size(op.n_dim);
    const char        * tips       = (const char *) op.tips->data + op.head_kv(part.row)*op.tips->nb[2] + op.stream(part.row)*op.tips->nb[3];
    const ggml_fp16_t * mask       = op.mask_of(part.row);

    for (int64_t ig = 0; ig < op.n_group; ig += FASA_SCORE_HEADS) {
        const int64_t n_heads = std::min<int64_t>(FASA_SCORE_HEADS, op.n_group - ig);
        const auto    heads   = query.from(ig, op.n_quads);
        float       * scores  = part.scores + ig*op.n_kv + (cell0 - part.cell0);

        vec before[FASA_SCORE_HEADS];
        for (int64_t ih = 0; ih < n_heads; ++ih) {
            before[ih] = v_load(heads.max + ih*FASA_LANES);
        }

        for (int64_t cell = cell0; cell < cell1; cell += FASA_TIPS_CELLS) {
            const char * block = tips + cell/FASA_TIPS_CELLS*block_size;

            for (size_t i = 0; i < block_size && ig == 0; i += CACHE_LINE_SIZE) {
                FASA_PREFETCH(block + FASA_BLOCKS_AHEAD*block_size + i);
            }

            fasa_score_heads(n_heads, block, mask + cell, op.n_quads, heads, scores + (cell - cell0), op.n_kv);
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

void fasa_score_chunk(
        const fasa_select_op & op, const fasa_part & part, const fasa_group_query & query, int64_t cell0, int64_t cell1, fasa_row_stats * stats) {
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

void fasa_score_part(const fasa_select_op & op, const fasa_part & part, const fasa_group_query & query, fasa_row_stats * stats) {
    fasa_round_query(op, part.row, query);

    for (int64_t cell = part.cell0; cell < part.cell1; cell += FASA_CHUNK) {
        const int64_t ic = cell/FASA_CHUNK;
        fasa_score_chunk(op, part, query, cell, std::min(cell + FASA_CHUNK, part.cell1), stats + (part.row*op.n_chunks + ic)*op.n_group);
    }
}

} // namespace
