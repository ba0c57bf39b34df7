#include "llama-fasa-tips.h"

#include "llama-context.h"
#include "llama-fasa-profile.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-fasa.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

static llama_fasa_reason fasa_reason_no_tips(const llama_model & model, int32_t il, const ggml_tensor * k, bool v_trans) {
    const auto & profile = *model.fasa;

    if (model.hparams.is_swa(il)) {
        return LLAMA_FASA_REASON_SLIDING_WINDOW;
    }
    if (model.hparams.use_alibi) {
        return LLAMA_FASA_REASON_ATTN_BIAS;
    }
    if ((uint32_t) il < profile.params.n_dense_layers) {
        return LLAMA_FASA_REASON_DENSE_LAYER;
    }
    if (profile.dims[il].empty() || k->ne[0] != (int64_t) model.hparams.n_embd_k_gqa(il) || k->ne[1] % ggml_fasa_cells_per_block() != 0) {
        return LLAMA_FASA_REASON_NO_CHUNKS;
    }
    if (v_trans) {
        return LLAMA_FASA_REASON_FLASH_ATTN_OFF;
    }
    if (k->type != GGML_TYPE_F16) {
        return LLAMA_FASA_REASON_KV_TYPE;
    }
    if (!ggml_backend_buft_is_host(ggml_backend_buffer_get_type(k->buffer))) {
        return LLAMA_FASA_REASON_BACKEND;
    }
    return LLAMA_FASA_REASON_NONE;
}

llama_fasa_tips::llama_fasa_tips(
        const llama_model    & model,
        const llama_kv_cache & kv,
        const std::map<int32_t, ggml_tensor *> & layers_k,
        bool v_trans,
        bool no_alloc) : model(model), kv(kv) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (const auto & [il, k] : layers_k) {
        auto & layer = layers[il];

        layer.k      = k;
        layer.reason = fasa_reason_no_tips(model, il, k, v_trans);

        if (layer.reason != LLAMA_FASA_REASON_NONE) {
            continue;
        }

        // tips live where the layer's K lives
        auto & ctx = ctx_map[ggml_backend_buffer_get_type(k->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({
                /*.mem_size   =*/ 2*layers_k.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            }));
            GGML_ASSERT(ctx);
        }

        const int64_t n_head_kv = model.hparams.n_head_kv(il);
        const int64_t n_dim     = model.fasa->dims[il].size()/n_head_kv;

        layer.tips = ggml_fasa_new_tips(ctx.get(), k->ne[1], n_dim, n_head_kv, k->ne[2]);
        layer.dims = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_dim, n_head_kv);

        ggml_format_name(layer.tips, "cache_fasa_tips_l%d", il);
        ggml_format_name(layer.dims, "fasa_dims_l%d", il);
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (no_alloc) {
            // memory is only being estimated: a dummy buffer keeps the scheduler from allocating the tensors
            buf = ggml_backend_buft_alloc_buffer(buft, 0);
            for (auto * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for the FASA tip cache");
        }
        ctxs_bufs.emplace_back(std::move(ctx), buf);
    }

    clear();

    if (!ctxs_bufs.empty()) {
        LLAMA_LOG_INFO("%s: size = %7.2f MiB (%u chunks of each key)\n", __func__, size()/(1024.0*1024.0), model.fasa->params.n_tip);
    }
}

void llama_fasa_tips::clear() {
    for (auto & [_, buf] : ctxs_bufs) {
        ggml_backend_buffer_clear(buf.get(), 0);
    }
    for (auto & [il, layer] : layers) {
        if (layer.dims && layer.dims->data) {
            ggml_backend_tensor_set(layer.dims, model.fasa->dims[il].data(), 0, ggml_nbytes(layer.dims));
        }
    }
    valid = true;
}

const llama_fasa_tips::layer & llama_fasa_tips::get_layer(int32_t il) const {
    static const layer none = { nullptr, nullptr, nullptr, LLAMA_FASA_REASON_NO_CHUNKS };

    const auto it = layers.find(il);

    return it == layers.end() ? none : it->second;
}

ggml_tensor * llama_fasa_tips::get_tips(ggml_context * ctx, int32_t il, uint32_t n_kv, uint32_t s0, uint32_t s1) const {
    auto * tips = layers.at(il).tips;

    return ggml_view_4d(ctx, tips,
            tips->ne[0], n_kv/ggml_fasa_cells_per_block(), tips->ne[2], s1 - s0 + 1,
            tips->nb[1], tips->nb[2], tips->nb[3], s0*tips->nb[3]);
}

const std::set<std::pair<llama_pos, uint32_t>> & llama_fasa_tips::get_cells(llama_seq_id seq_id) const {
    return kv.get_cells(seq_id).seq_pos_get(seq_id);
}

size_t llama_fasa_tips::size() const {
    return std::accumulate(ctxs_bufs.begin(), ctxs_bufs.end(), size_t(0), [](size_t sum, const auto & ctx_buf) {
        return sum + ggml_backend_buffer_get_size(ctx_buf.second.get());
    });
}

void llama_fasa_tips::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const {
    for (const auto & [ctx, buf] : ctxs_bufs) {
        const auto buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += model.hparams.no_alloc
            ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)
            : ggml_backend_buffer_get_size(buf.get());
    }
}

//
// rebuild
//

namespace {

class fasa_graph_input_cells : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * /*ubatch*/) override {
        std::vector<int64_t> ids(idxs->ne[0]);
        std::iota(ids.begin(), ids.end(), 0);
        ggml_backend_tensor_set(idxs, ids.data(), 0, ggml_nbytes(idxs));
    }

    ggml_tensor * idxs = nullptr; // I64 [kv_size*n_stream]
};

} // namespace

ggml_cgraph * llama_fasa_tips::build_graph_rebuild(llm_graph_result * res) const {
    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    auto inp = std::make_unique<fasa_graph_input_cells>();

    for (const auto & [il, layer] : layers) {
        if (!layer.tips) {
            continue;
        }

        const int64_t n_cells     = layer.k->ne[1]*layer.k->ne[2];
        const int64_t n_head_kv   = layer.dims->ne[1];
        const int64_t n_embd_head = layer.k->ne[0]/n_head_kv;

        if (!inp->idxs) {
            inp->idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_cells);
            ggml_set_input(inp->idxs);
        }

        ggml_tensor * k = ggml_view_3d(ctx, layer.k, n_embd_head, n_head_kv, n_cells,
                ggml_row_size(layer.k->type, n_embd_head), layer.k->nb[1], 0);

        ggml_build_forward_expand(gf, ggml_fasa_store(ctx, layer.tips, k, layer.dims, inp->idxs, layer.k->type));
    }

    if (inp->idxs) {
        res->add_input(std::move(inp));
    }

    return gf;
}

bool llama_fasa_tips::rebuild(llama_context * lctx) {
    valid = false;

    auto * sched = lctx->get_sched();
    auto * res   = lctx->get_gf_res_reserve();

    ggml_backend_sched_reset(sched);
    res->reset();

    auto * gf = build_graph_rebuild(res);
    if (!ggml_backend_sched_alloc_graph(sched, gf)) {
        LLAMA_LOG_ERROR("%s: failed to allocate the graph that rebuilds the tips\n", __func__);
        return false;
    }

    res->set_inputs(nullptr);

    if (lctx->graph_compute(gf, false) != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to rebuild the tips\n", __func__);
        return false;
    }

    valid = true;

    return true;
}
