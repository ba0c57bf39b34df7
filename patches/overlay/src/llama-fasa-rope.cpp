#include "llama-fasa.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// positions 1, 2, 4 ...: each tells the angle twice as precisely as the one before, which tells how many whole turns it made
static constexpr int N_POS = 17;

// RoPE as llama_kv_cache::build_graph_shift applies it, to one vector for each chunk of the dims that it turns
static bool fasa_rope(const llama_model & model, const llama_cparams & cparams, int32_t il, std::vector<float> & x, int64_t n_vec) {
    const auto & hparams = model.hparams;

    const int64_t n_rot = hparams.n_rot(il);

    // M-RoPE turns the planes of NEOX, in text by one position
    const bool is_mrope  = hparams.rope_type == LLAMA_ROPE_TYPE_MROPE || hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE;
    const int  rope_type = is_mrope ? LLAMA_ROPE_TYPE_NEOX : hparams.rope_type;

    const ggml_tensor * factors = model.get_rope_factors(cparams, il);
    if (factors && !factors->buffer) {
        LLAMA_LOG_ERROR("%s: the model was loaded without its weights, of which the frequency factors are a part\n", __func__);
        return false;
    }

    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_context_ptr ctx { ggml_init({
        /*.mem_size   =*/ 8*ggml_tensor_overhead() + ggml_graph_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    }) };

    ggml_tensor * cur = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_rot, n_vec, N_POS);
    ggml_tensor * pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, N_POS);
    ggml_tensor * ff  = factors ? ggml_dup_tensor(ctx.get(), factors) : nullptr;
    ggml_tensor * res = ggml_rope_ext(ctx.get(), cur, pos, ff, n_rot, rope_type, cparams.n_ctx_orig_yarn,
            model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il),
            cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, res);

    ggml_backend_buffer_ptr buf { backend ? ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) : nullptr };
    if (!buf) {
        LLAMA_LOG_ERROR("%s: no CPU backend, or no memory\n", __func__);
        return false;
    }

    ggml_backend_tensor_set(cur, x.data(), 0, ggml_nbytes(cur));
    for (int32_t i = 0, p = 1; i < N_POS; ++i, p *= 2) {
        ggml_backend_tensor_set(pos, &p, i*sizeof(p), sizeof(p));
    }
    if (ff) {
        std::vector<uint8_t> data(ggml_nbytes(ff));
        ggml_backend_tensor_get(factors, data.data(), 0, data.size());
        ggml_backend_tensor_set(ff, data.data(), 0, data.size());
    }
    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to compute RoPE\n", __func__);
        return false;
    }
    ggml_backend_tensor_get(res, x.data(), 0, ggml_nbytes(res));

    return true;
}

bool llama_fasa_get_angles(const llama_context * ctx, int32_t il, uint32_t n_ctx, float * angles) {
    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;

    llama_fasa_layer layer;
    if (!llama_fasa_get_layer(&model, il, &layer)) {
        return false;
    }

    const int32_t n_chunk = layer.n_embd_head/2;
    const int32_t n_rot   = layer.n_rot;

    std::fill(angles, angles + n_chunk, 0.0f);
    if (n_rot == 0) {
        return true;
    }

    auto cparams = ctx->get_cparams();
    if (n_ctx > 0) {
        cparams.n_ctx_seq = n_ctx;
    }

    // as in build_graph_shift: some architectures turn the last dims
    const int32_t first = hparams.n_lora_kv > 0 ? layer.n_embd_head - n_rot : 0;

    // the first dim of each chunk, if RoPE turns both
    std::vector<int32_t> chunks;
    std::vector<float>   x;
    for (int32_t chunk = 0; chunk < n_chunk; ++chunk) {
        int32_t dims[2];
        if (!llama_fasa_chunk_dims(&layer, chunk, dims)) {
            return false;
        }
        if (std::min(dims[0], dims[1]) >= first && std::max(dims[0], dims[1]) < first + n_rot) {
            chunks.push_back(chunk);
            x.resize(x.size() + n_rot, 0.0f);
            x[x.size() - n_rot + dims[0] - first] = 1.0f;
        }
    }
    if (chunks.empty()) {
        return true;
    }
    const size_t n_x = x.size();
    for (int i = 1; i < N_POS; ++i) {
        x.insert(x.end(), x.begin(), x.begin() + n_x);
    }
    if (!fasa_rope(model, cparams, il, x, chunks.size())) {
        return false;
    }

    for (size_t iv = 0; iv < chunks.size(); ++iv) {
        int32_t dims[2];
        llama_fasa_chunk_dims(&layer, chunks[iv], dims);

        double angle    = 0.0;
        bool   is_plane = true;
        for (int i = 0; i < N_POS; ++i) {
            const float * y = x.data() + i*n_x + iv*n_rot;
            for (int32_t dim = 0; dim < n_rot; ++dim) {
                is_plane = is_plane && (y[dim] == 0.0f || dim + first == dims[0] || dim + first == dims[1]);
            }
            const double p      = std::ldexp(1.0, i);
            const double turned = std::atan2((double) y[dims[1] - first], (double) y[dims[0] - first]);
            const double turn   = 2*std::acos(-1.0);

            angle = (turned + turn*std::round((angle*p - turned)/turn))/p;
        }
        angles[chunks[iv]] = is_plane ? angle : 0.0;
    }

    return true;
}
