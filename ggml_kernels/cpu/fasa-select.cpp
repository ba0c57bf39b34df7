#include "fasa-cpu.h"

#include "../fasa-tips.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ops.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

static constexpr float FASA_MASKED = -std::numeric_limits<float>::infinity();
static constexpr float FASA_FORCED =  std::numeric_limits<float>::infinity();

// floats of work buffer per thread: the group's scores, one head's scores, scratch, the dominant dims of one query
static size_t fasa_select_work_floats(const ggml_tensor * dst) {
    const int64_t n_kv = dst->src[1]->ne[1]*FASA_TIPS_CELLS;

    return GGML_PAD(3*n_kv + dst->src[2]->ne[0], CACHE_LINE_SIZE_F32);
}

size_t ggml_fasa_select_work_size(const ggml_tensor * dst, int n_tasks) {
    return n_tasks*fasa_select_work_floats(dst)*sizeof(float);
}

// the tip scores of one query head for all cells: scores[n_kv]
static void fasa_score_cells(const char * tips, int64_t n_blocks, const float * q_dom, int64_t n_dim, float * scores) {
    const size_t block_size = fasa_tips_block_size(n_dim);

    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        char * block = const_cast<char *>(tips) + ib*block_size;

        const uint16_t * scales = fasa_tips_scales(block);
        const int8_t   * values = fasa_tips_values(block);

        float acc[FASA_TIPS_CELLS] = { 0.0f };
        for (int64_t i = 0; i < n_dim; ++i) {
            for (int j = 0; j < FASA_TIPS_CELLS; ++j) {
                acc[j] += q_dom[i]*(float) values[i*FASA_TIPS_CELLS + j];
            }
        }

        for (int j = 0; j < FASA_TIPS_CELLS; ++j) {
            scores[ib*FASA_TIPS_CELLS + j] = acc[j]*GGML_CPU_FP16_TO_FP32(scales[j]);
        }
    }
}

// write the ids of the n_fac greatest scores in ascending order, equal scores by lower id, then -1
// scratch[n_kv]
static void fasa_list_top(const float * scores, int64_t n_kv, int64_t n_fac, float * scratch, int32_t * ids) {
    int64_t n_visible = 0;
    for (int64_t i = 0; i < n_kv; ++i) {
        // also drops NaN, which has no place in an order
        if (scores[i] > FASA_MASKED) {
            scratch[n_visible++] = scores[i];
        }
    }

    float   threshold = FASA_MASKED;
    int64_t n_equal   = 0; // cells at the threshold that still fit

    if (n_visible > n_fac) {
        std::nth_element(scratch, scratch + n_fac - 1, scratch + n_visible, std::greater<float>());
        threshold = scratch[n_fac - 1];
        n_equal   = n_fac - std::count_if(scratch, scratch + n_fac, [&](float x) { return x > threshold; });
    }

    int64_t n = 0;
    for (int64_t i = 0; i < n_kv && n < n_fac; ++i) {
        if (scores[i] > threshold) {
            ids[n++] = i;
        } else if (scores[i] == threshold && n_equal > 0) {
            ids[n++] = i;
            n_equal--;
        }
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

    float * scores  = (float *) params->wdata + params->ith*fasa_select_work_floats(dst);
    float * head    = scores  + n_kv;
    float * scratch = head    + n_kv;
    float * q_dom   = scratch + n_kv;

    for (int64_t ir = params->ith; ir < n_head_kv*n_tokens*n_stream; ir += params->nth) {
        const int64_t ih = ir % n_head_kv;
        const int64_t it = ir / n_head_kv % n_tokens;
        const int64_t is = ir / n_head_kv / n_tokens;

        const char        * tips_head = (const char *) tips->data + ih*tips->nb[2] + is*tips->nb[3];
        const ggml_fp16_t * mask_row  = (const ggml_fp16_t *) ((const char *) mask->data + it*mask->nb[1] + is*mask->nb[3]);
        const int32_t     * dims_row  = (const int32_t *) dims->data + ih*n_dim;

        std::fill(scores, scores + n_kv, FASA_MASKED);

        for (int64_t ig = 0; ig < n_group; ++ig) {
            const float * q_row = (const float *) ((const char *) q->data + (ih*n_group + ig)*q->nb[1] + it*q->nb[2] + is*q->nb[3]);
            for (int64_t i = 0; i < n_dim; ++i) {
                q_dom[i] = scale*q_row[dims_row[i]];
            }

            fasa_score_cells(tips_head, tips->ne[1], q_dom, n_dim, head);

            float max = FASA_MASKED;
            for (int64_t i = 0; i < n_kv; ++i) {
                head[i] += GGML_CPU_FP16_TO_FP32(mask_row[i]);
                max = std::max(max, head[i]);
            }
            if (max == FASA_MASKED) {
                break; // the token sees no cell
            }

            // log-softmax makes the heads of a group comparable; it changes no order within one head
            const float lse = n_group > 1 ? max + std::log((float) ggml_vec_soft_max_f32(n_kv, scratch, head, max)) : 0.0f;
            for (int64_t i = 0; i < n_kv; ++i) {
                scores[i] = std::max(scores[i], head[i] - lse);
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
