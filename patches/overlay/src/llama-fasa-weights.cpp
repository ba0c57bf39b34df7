#include "llama-fasa-weights.h"

ggml_tensor * llama_fasa_weights(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * mask,
        float          scale,
        float          softcap) {
    ggml_tensor * kq = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q, 0, 2, 1, 3));

    if (softcap != 0.0f) {
        kq    = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale/softcap)), softcap);
        scale = 1.0f;
    }
    return ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
}

static void fasa_mass_compute(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const auto * weights = dst->src[0];
    const auto * idx     = dst->src[1];

    const int64_t n_head   = dst->ne[0];
    const int64_t n_tokens = dst->ne[1];

    for (int64_t i = ith; i < ggml_nelements(dst); i += nth) {
        const int64_t ih = i % n_head;
        const int64_t it = i / n_head % n_tokens;
        const int64_t is = i / n_head / n_tokens;

        const auto * row = (const float   *) ((const char *) weights->data + it*weights->nb[1] + ih*weights->nb[2] + is*weights->nb[3]);
        const auto * ids = (const int32_t *) ((const char *) idx->data + ih*idx->ne[1]/n_head*idx->nb[1] + it*idx->nb[2] + is*idx->nb[3]);

        double mass = 0.0;
        for (int64_t j = 0; j < idx->ne[0]; ++j) {
            mass += ids[j] >= 0 ? row[ids[j]] : 0.0f;
        }
        ((float *) dst->data)[i] = mass;
    }
}

ggml_tensor * llama_fasa_mass(
        ggml_context * ctx,
        ggml_tensor  * weights,
        ggml_tensor  * idx) {
    ggml_tensor * srcs[] = { weights, idx };

    return ggml_custom_4d(ctx, GGML_TYPE_F32, weights->ne[2], weights->ne[1], weights->ne[3], 1, srcs, 2, fasa_mass_compute, GGML_N_TASKS_MAX, nullptr);
}
