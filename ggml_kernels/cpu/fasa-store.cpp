#include "fasa-cpu.h"

#include "../fasa-tips.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>

namespace {

float key_element(const char * k_row, ggml_type type, int32_t i) {
    switch (type) {
        case GGML_TYPE_F16:  return GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) k_row)[i]);
        case GGML_TYPE_BF16: return GGML_BF16_TO_FP32(((const ggml_bf16_t *) k_row)[i]);
        default:             return ((const float *) k_row)[i];
    }
}

// the element as the K cache will hold it
float round_to_type(float x, ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return GGML_CPU_FP16_TO_FP32(GGML_CPU_FP32_TO_FP16(x));
        case GGML_TYPE_BF16: return GGML_BF16_TO_FP32(GGML_FP32_TO_BF16(x));
        default:             return x;
    }
}

// what is not a number is at the lowest level
uint8_t key_level(float x, float centre, float step) {
    const float steps = (x - centre)*(step > 0.0f ? 1.0f/step : 0.0f);
    return (uint8_t) (std::floor(std::min(std::max(-FASA_TIPS_LEVELS/2.0f, steps), FASA_TIPS_LEVELS/2 - 1.0f)) + FASA_TIPS_LEVELS/2);
}

} // namespace

void ggml_compute_forward_fasa_store(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * tips = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * dims = dst->src[2];
    const ggml_tensor * idxs = dst->src[3];
    const ggml_tensor * ranges = dst->src[4];

    const ggml_type type_k    = (ggml_type) ggml_get_op_params_i32(dst, 0);
    const bool      is_cached = ggml_get_op_params_i32(dst, 1) != 0;

    const int64_t n_dim     = dims->ne[0];
    const int64_t n_head_kv = dims->ne[1];
    const int64_t n_tokens  = idxs->ne[0];
    const int64_t n_cells   = tips->ne[1]*FASA_TIPS_CELLS;

    // rows are (token, KV head) pairs: no two of them share a byte of the tips
    for (int64_t ir = params->ith; ir < n_tokens*n_head_kv; ir += params->nth) {
        const int64_t it = ir / n_head_kv;
        const int64_t ih = ir % n_head_kv;

        const int64_t id = ((const int64_t *) idxs->data)[it];
        GGML_ASSERT(id >= 0 && id < n_cells*tips->ne[3]);

        const int64_t is   = id / n_cells;
        const int64_t cell = id % n_cells;
        const int64_t lane = cell % FASA_TIPS_CELLS;

        const char    * k_row    = (const char *) k->data + (is_cached ? id : it)*k->nb[2] + ih*k->nb[1];
        const int32_t * dims_row = (const int32_t *) dims->data + ih*n_dim;

        char * block = (char *) tips->data + (cell/FASA_TIPS_CELLS)*tips->nb[1] + ih*tips->nb[2] + is*tips->nb[3];

        const float * centres = (const float *) ranges->data + 2*ih*n_dim;
        const float * steps   = centres + n_dim;

        const auto level = [&](int64_t i) -> uint8_t {
            return i < n_dim ? key_level(round_to_type(key_element(k_row, k->type, dims_row[i]), type_k), centres[i], steps[i]) : 0;
        };

        for (int64_t ip = 0; ip < fasa_tips_n_pairs(n_dim); ++ip) {
            auto * bytes = (uint8_t *) block + fasa_tips_offset(ip, lane);
            for (int64_t i = 0; i < FASA_TIPS_QUAD; ++i) {
                bytes[i] = level(ip*FASA_TIPS_PAIR + i) | level(ip*FASA_TIPS_PAIR + FASA_TIPS_QUAD + i) << 4;
            }
        }
    }
}
