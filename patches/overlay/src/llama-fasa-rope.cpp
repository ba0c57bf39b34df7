#include "llama-fasa-rope.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-fasa-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <vector>

llama_fasa_rope llama_fasa_find_rope(const ggml_tensor * k_cur) {
    static_assert(sizeof(llama_fasa_rope::op_params) == sizeof(k_cur->op_params), "all of them");

    llama_fasa_rope res;

    // back to the projection; in between are norms, reshapes and copies
    for (const auto * cur = k_cur; cur && cur->op != GGML_OP_MUL_MAT && cur->op != GGML_OP_MUL_MAT_ID; cur = cur->src[0]) {
        if (cur->op == GGML_OP_ROPE) {
            res.n_dim   = cur->ne[0];
            res.factors = cur->src[2];
            std::copy_n(cur->op_params, 16, res.op_params);
            break;
        }
    }

    return res;
}

// positions 1, 2, 4 ...: each tells the angle twice as precisely as the one before, which tells how many whole turns it made
static constexpr int N_POS = 17;

// turns the vectors x, [n_dim, n_vec, N_POS]
static bool fasa_apply_rope(const llama_fasa_rope & rope, const ggml_tensor * factors, std::vector<float> & x) {
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

    const int32_t mode  = rope.op_params[2];
    const int64_t n_ids = mode & GGML_ROPE_TYPE_MROPE ? 4 : 1; // positions of a token, in text all the same

    ggml_tensor * cur = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, rope.n_dim, x.size()/rope.n_dim/N_POS, N_POS);
    ggml_tensor * pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, N_POS*n_ids);
    ggml_tensor * ff  = factors ? ggml_dup_tensor(ctx.get(), factors) : nullptr;

    int sections[GGML_MROPE_SECTIONS] = {};
    ggml_tensor * res = n_ids > 1 ?
        ggml_rope_multi(ctx.get(), cur, pos, ff, rope.op_params[1], sections, mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f) :
        ggml_rope_ext  (ctx.get(), cur, pos, ff, rope.op_params[1],           mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    std::copy_n(rope.op_params, 16, res->op_params);

    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, res);

    ggml_backend_buffer_ptr buf { backend ? ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) : nullptr };
    if (!buf) {
        LLAMA_LOG_ERROR("%s: no CPU backend, or no memory\n", __func__);
        return false;
    }

    std::vector<int32_t> positions(N_POS*n_ids);
    for (size_t i = 0; i < positions.size(); ++i) {
        positions[i] = 1 << i % N_POS;
    }
    ggml_backend_tensor_set(cur, x.data(), 0, ggml_nbytes(cur));
    ggml_backend_tensor_set(pos, positions.data(), 0, ggml_nbytes(pos));
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
    const auto & model = ctx->get_model();

    llama_fasa_layer layer;
    if (!llama_fasa_get_layer(&model, il, &layer)) {
        LLAMA_LOG_ERROR("%s: the model has no layer %d\n", __func__, il);
        return false;
    }
    const auto rope = ctx->get_fasa().get_rope(il);
    if (!rope) {
        LLAMA_LOG_ERROR("%s: the keys of layer %d were not captured in the last run, or llama_decode is running\n", __func__, il);
        return false;
    }

    const int64_t n_dim   = rope->n_dim;
    const int32_t n_chunk = layer.n_embd_head/2;

    std::fill(angles, angles + n_chunk, 0.0f);
    if (n_dim != layer.n_embd_head) {
        return true; // none, or on a part of the head that is put together later
    }

    // the first dim of each chunk
    std::vector<std::pair<int32_t, int32_t>> chunks(n_chunk);
    std::vector<float> x(n_dim*n_chunk*N_POS, 0.0f);
    for (int32_t i = 0; i < n_chunk; ++i) {
        int32_t dims[2];
        if (!llama_fasa_chunk_dims(&layer, i, dims)) {
            LLAMA_LOG_ERROR("%s: the chunks of layer %d are not known\n", __func__, il);
            return false;
        }
        chunks[i] = { dims[0], dims[1] };
        for (int ip = 0; ip < N_POS; ++ip) {
            x[(ip*n_chunk + i)*n_dim + dims[0]] = 1.0f;
        }
    }

    auto cparams = ctx->get_cparams();
    const auto * factors = rope->factors;
    if (n_ctx > 0 && factors == model.get_rope_factors(cparams, il)) {
        cparams.n_ctx_seq = n_ctx;
        factors = model.get_rope_factors(cparams, il);
    }
    if (!fasa_apply_rope(*rope, factors, x)) {
        return false;
    }

    const double full_turn = 2*std::acos(-1.0);
    for (int32_t i = 0; i < n_chunk; ++i) {
        const auto [first, second] = chunks[i];

        double angle    = 0.0;
        bool   is_plane = true;
        for (int ip = 0; ip < N_POS; ++ip) {
            const float * y = x.data() + (ip*n_chunk + i)*n_dim;
            for (int32_t dim = 0; dim < n_dim; ++dim) {
                is_plane = is_plane && (y[dim] == 0.0f || dim == first || dim == second);
            }
            const double p      = std::ldexp(1.0, ip);
            const double turned = std::atan2((double) y[second], (double) y[first]);

            angle = (turned + full_turn*std::round((angle*p - turned)/full_turn))/p;
        }
        angles[i] = is_plane ? angle : 0.0;
    }

    return true;
}
