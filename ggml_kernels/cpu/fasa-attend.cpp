#include "fasa-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <limits>

// floats of work buffer per thread: one dequantized row, the logits of a group
static size_t fasa_attend_work_floats(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    const int64_t n_group = q->ne[1]/k->ne[1];
    const int64_t n_fac   = dst->src[3] ? dst->src[3]->ne[0] : k->ne[2];

    return GGML_PAD(std::max(k->ne[0], v->ne[0]) + n_group*n_fac, CACHE_LINE_SIZE_F32);
}

size_t ggml_fasa_attend_work_size(const ggml_tensor * dst, int n_tasks) {
    return n_tasks*fasa_attend_work_floats(dst)*sizeof(float);
}

// one head of one cell as f32, in place where it already is
static const float * fasa_cell_row(const ggml_tensor * t, int64_t cell, int64_t ih, int64_t is, float * scratch) {
    const char * row = (const char *) t->data + ih*t->nb[1] + cell*t->nb[2] + is*t->nb[3];

    switch (t->type) {
        case GGML_TYPE_F32: return (const float *) row;
        case GGML_TYPE_F16: ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, scratch, t->ne[0]);    break;
        default:            ggml_get_type_traits(t->type)->to_float(row, scratch, t->ne[0]); break;
    }
    return scratch;
}

// softmax over logits[n] in place, the sink taking its share
static void fasa_soft_max(float * logits, int64_t n, const float * sink) {
    float max = sink ? *sink : -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < n; ++i) {
        max = std::max(max, logits[i]);
    }

    ggml_float sum = ggml_vec_soft_max_f32(n, logits, logits, max);
    if (sink) {
        sum += std::exp(*sink - max);
    }
    ggml_vec_scale_f32(n, logits, 1.0/sum);
}

void ggml_compute_forward_fasa_attend(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * idx   = dst->src[3];
    const ggml_tensor * mask  = dst->src[4];
    const ggml_tensor * sinks = dst->src[5];

    const float scale   = ggml_get_op_params_f32(dst, 0);
    const float softcap = ggml_get_op_params_f32(dst, 1);

    const int64_t n_head_kv = k->ne[1];
    const int64_t n_group   = q->ne[1]/n_head_kv;
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_stream  = q->ne[3];
    const int64_t n_fac     = idx ? idx->ne[0] : k->ne[2];

    float * row    = (float *) params->wdata + params->ith*fasa_attend_work_floats(dst);
    float * logits = row + std::max(k->ne[0], v->ne[0]); // [n_fac, n_group]

    for (int64_t ir = params->ith; ir < n_head_kv*n_tokens*n_stream; ir += params->nth) {
        const int64_t ih = ir % n_head_kv;
        const int64_t it = ir / n_head_kv % n_tokens;
        const int64_t is = ir / n_head_kv / n_tokens;

        const auto cell = [&](int64_t i) -> int64_t {
            if (idx) {
                return ((const int32_t *) idx->data)[((is*n_tokens + it)*n_head_kv + ih)*n_fac + i];
            }
            const auto * m = (const ggml_fp16_t *) ((const char *) mask->data + it*mask->nb[1] + is*mask->nb[3]);
            return GGML_CPU_FP16_TO_FP32(m[i]) > -INFINITY ? i : -1;
        };

        const char * q_rows   = (const char *) q->data + ih*n_group*q->nb[1]   + it*q->nb[2]   + is*q->nb[3];
        char       * dst_rows = (char *)     dst->data + ih*n_group*dst->nb[1] + it*dst->nb[2] + is*dst->nb[3];

        const auto q_row   = [&](int64_t ig) { return (const float *) (q_rows + ig*q->nb[1]); };
        const auto dst_row = [&](int64_t ig) { return (float *) (dst_rows + ig*dst->nb[1]); };

        // every row of K and V is read once for the whole group
        int64_t n = 0;
        for (int64_t i = 0; i < n_fac; ++i) {
            if (cell(i) < 0) {
                continue;
            }
            GGML_ASSERT(cell(i) < k->ne[2]);

            const float * k_row = fasa_cell_row(k, cell(i), ih, is, row);
            for (int64_t ig = 0; ig < n_group; ++ig) {
                float logit;
                ggml_vec_dot_f32(k->ne[0], &logit, 0, q_row(ig), 0, k_row, 0, 1);
                logit *= scale;
                logits[ig*n_fac + n] = softcap == 0.0f ? logit : softcap*std::tanh(logit/softcap);
            }
            n++;
        }

        for (int64_t ig = 0; ig < n_group; ++ig) {
            std::fill(dst_row(ig), dst_row(ig) + v->ne[0], 0.0f);
            if (n > 0) {
                fasa_soft_max(logits + ig*n_fac, n, sinks ? (const float *) sinks->data + ih*n_group + ig : nullptr);
            }
        }

        n = 0;
        for (int64_t i = 0; i < n_fac; ++i) {
            if (cell(i) < 0) {
                continue;
            }
            const float * v_row = fasa_cell_row(v, cell(i), ih, is, row);
            for (int64_t ig = 0; ig < n_group; ++ig) {
                ggml_vec_mad_f32(v->ne[0], dst_row(ig), v_row, logits[ig*n_fac + n]);
            }
            n++;
        }
    }
}
