#include "fasa-cpu.h"

#include "../fasa-tips.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ops.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

static constexpr float FASA_MASKED = -std::numeric_limits<float>::infinity();
static constexpr float FASA_FORCED =  std::numeric_limits<float>::infinity();

// per-thread parts of the work buffer, in floats
struct fasa_select_work {
    fasa_select_work(const ggml_tensor * dst) {
        const int64_t n_kv    = dst->src[1]->ne[1]*FASA_TIPS_CELLS;
        const int64_t n_dim   = dst->src[2]->ne[0];
        const int64_t n_group = dst->src[0]->ne[1]/dst->src[2]->ne[1];

        n_scores = n_kv;
        n_heads  = n_kv*n_group;
        n_q      = n_dim*n_group;
        n_block  = n_dim*FASA_TIPS_CELLS;
    }

    size_t size() const {
        return GGML_PAD(3*n_scores + n_heads + n_q + n_block, CACHE_LINE_SIZE_F32);
    }

    size_t n_scores; // one score per cell: of the group, the mask, scratch
    size_t n_heads;  // scores of each query head
    size_t n_q;      // dominant dims of each query head
    size_t n_block;  // one block of tips
};

size_t ggml_fasa_select_work_size(const ggml_tensor * dst, int n_tasks) {
    return n_tasks*fasa_select_work(dst).size()*sizeof(float);
}

// the tip scores of a group of query heads for all cells, each tip read once
// tips: of one KV head, q: [n_dim, n_group], scores: [n_blocks*FASA_TIPS_CELLS, n_group], block: scratch
static void fasa_score_cells(
        const char * tips, int64_t n_blocks, const float * q, int64_t n_dim, int64_t n_group, float * scores, float * block) {
    const size_t  block_size = fasa_tips_block_size(n_dim);
    const int64_t n_kv       = n_blocks*FASA_TIPS_CELLS;

    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        char * src = const_cast<char *>(tips) + ib*block_size;

        float scales[FASA_TIPS_CELLS];
        ggml_cpu_fp16_to_fp32(fasa_tips_scales(src), scales, FASA_TIPS_CELLS);

        const int8_t * values = fasa_tips_values(src);
        for (int64_t i = 0; i < n_dim*FASA_TIPS_CELLS; ++i) {
            block[i] = values[i];
        }

        for (int64_t ig = 0; ig < n_group; ++ig) {
            float sums[FASA_TIPS_CELLS] = { 0.0f };
            for (int64_t i = 0; i < n_dim; ++i) {
                for (int j = 0; j < FASA_TIPS_CELLS; ++j) {
                    sums[j] += q[ig*n_dim + i]*block[i*FASA_TIPS_CELLS + j];
                }
            }
            for (int j = 0; j < FASA_TIPS_CELLS; ++j) {
                scores[ig*n_kv + ib*FASA_TIPS_CELLS + j] = sums[j]*scales[j];
            }
        }
    }
}

// in lanes, so that the maxima do not wait for each other
static float fasa_max(const float * x, int64_t n) {
    float lanes[FASA_TIPS_CELLS];
    std::fill(lanes, lanes + FASA_TIPS_CELLS, FASA_MASKED);
    for (int64_t i = 0; i < n; i += FASA_TIPS_CELLS) {
        for (int j = 0; j < FASA_TIPS_CELLS; ++j) {
            lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
        }
    }
    return *std::max_element(lanes, lanes + FASA_TIPS_CELLS);
}

// the bin of a score: its upper bits, ordered as the scores are
static constexpr int FASA_BIN_BITS = 12;

static uint32_t fasa_bin(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits ^= (bits & 0x80000000u) ? 0xffffffffu : 0x80000000u;
    return bits >> (32 - FASA_BIN_BITS);
}

struct fasa_threshold {
    float   score;
    int64_t n_equal; // cells with just this score that are taken, too
};

// the score of the n_fac-th best cell, scratch[n_kv]
// a histogram finds the bin that holds it, only that bin is searched
static fasa_threshold fasa_find_threshold(const float * scores, int64_t n_kv, int64_t n_fac, float * scratch) {
    uint32_t counts[1 << FASA_BIN_BITS] = { 0 };
    int64_t  n_visible = 0;
    for (int64_t i = 0; i < n_kv; ++i) {
        const bool visible = scores[i] > FASA_MASKED; // NaN is not
        counts[fasa_bin(scores[i])] += visible;
        n_visible += visible;
    }
    if (n_visible <= n_fac) {
        return { FASA_MASKED, 0 };
    }

    uint32_t bin   = (1 << FASA_BIN_BITS) - 1;
    int64_t  above = 0; // cells in higher bins
    while (above + counts[bin] < n_fac) {
        above += counts[bin--];
    }

    int64_t n = 0;
    for (int64_t i = 0; i < n_kv; ++i) {
        if (fasa_bin(scores[i]) == bin && scores[i] > FASA_MASKED) {
            scratch[n++] = scores[i];
        }
    }
    const int64_t rank = n_fac - above; // within the bin, from 1
    std::nth_element(scratch, scratch + rank - 1, scratch + n, std::greater<float>());

    const float threshold = scratch[rank - 1];
    return { threshold, rank - std::count_if(scratch, scratch + rank, [&](float x) { return x > threshold; }) };
}

// write the ids of the n_fac greatest scores in ascending order, equal scores by lower id, then -1
static void fasa_list_top(const float * scores, int64_t n_kv, int64_t n_fac, float * scratch, int32_t * ids) {
    fasa_threshold threshold = fasa_find_threshold(scores, n_kv, n_fac, scratch);

    int64_t n = 0;
    for (int64_t i = 0; i < n_kv && n < n_fac; ++i) {
        const bool equal = scores[i] == threshold.score && threshold.n_equal > 0;

        ids[n] = i;
        n += (scores[i] > threshold.score) | equal;
        threshold.n_equal -= equal;
    }
    std::fill(ids + n, ids + n_fac, -1);
}

void ggml_compute_forward_fasa_select(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * tips   = dst->src[1];
    const ggml_tensor * dims   = dst->src[2];
    const ggml_tensor * mask   = dst->src[3];
    const ggml_tensor * forced = dst->src[4];

    const float scale = ggml_get_op_params_f32(dst, 0);

    const int64_t n_dim     = dims->ne[0];
    const int64_t n_head_kv = dims->ne[1];
    const int64_t n_group   = q->ne[1]/n_head_kv;
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_stream  = q->ne[3];
    const int64_t n_kv      = tips->ne[1]*FASA_TIPS_CELLS;
    const int64_t n_fac     = dst->ne[0];

    const fasa_select_work work(dst);

    float * scores   = (float *) params->wdata + params->ith*work.size();
    float * mask_f32 = scores   + work.n_scores;
    float * scratch  = mask_f32 + work.n_scores;
    float * heads    = scratch  + work.n_scores;
    float * q_dom    = heads    + work.n_heads;
    float * block    = q_dom    + work.n_q;

    for (int64_t ir = params->ith; ir < n_head_kv*n_tokens*n_stream; ir += params->nth) {
        const int64_t ih = ir % n_head_kv;
        const int64_t it = ir / n_head_kv % n_tokens;
        const int64_t is = ir / n_head_kv / n_tokens;

        const char    * tips_head = (const char *) tips->data + ih*tips->nb[2] + is*tips->nb[3];
        const int32_t * dims_row  = (const int32_t *) dims->data + ih*n_dim;

        for (int64_t ig = 0; ig < n_group; ++ig) {
            const float * q_row = (const float *) ((const char *) q->data + (ih*n_group + ig)*q->nb[1] + it*q->nb[2] + is*q->nb[3]);
            for (int64_t i = 0; i < n_dim; ++i) {
                q_dom[ig*n_dim + i] = scale*q_row[dims_row[i]];
            }
        }

        fasa_score_cells(tips_head, tips->ne[1], q_dom, n_dim, n_group, heads, block);

        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) ((const char *) mask->data + it*mask->nb[1] + is*mask->nb[3]), mask_f32, n_kv);

        std::fill(scores, scores + n_kv, FASA_MASKED);

        for (int64_t ig = 0; ig < n_group; ++ig) {
            float * head = heads + ig*n_kv;

            // not by adding: whatever a masked cell holds must not reach the others
            for (int64_t i = 0; i < n_kv; ++i) {
                head[i] = mask_f32[i] > FASA_MASKED ? head[i] : FASA_MASKED;
            }

            const float max = fasa_max(head, n_kv);
            if (max == FASA_MASKED) {
                break; // the token sees no cell
            }

            // log-softmax makes the heads of a group comparable; it changes no order within one head
            const float lse = n_group > 1 ? max + std::log((float) ggml_vec_soft_max_f32(n_kv, scratch, head, max)) : 0.0f;
            for (int64_t i = 0; i < n_kv; ++i) {
                scores[i] = head[i] - lse > scores[i] ? head[i] - lse : scores[i];
            }
        }

        if (forced) {
            const int32_t * forced_row = (const int32_t *) forced->data + (is*n_tokens + it)*forced->ne[0];
            for (int64_t i = 0; i < forced->ne[0]; ++i) {
                if (forced_row[i] >= 0 && forced_row[i] < n_kv && scores[forced_row[i]] > FASA_MASKED) {
                    scores[forced_row[i]] = FASA_FORCED;
                }
            }
        }

        int32_t * ids = (int32_t *) dst->data + ((is*n_tokens + it)*n_head_kv + ih)*n_fac;

        fasa_list_top(scores, n_kv, n_fac, scratch, ids);
    }
}
