#include "llama-fasa-tips.h"

#include "llama-context.h"
#include "llama-fasa-profile.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-fasa.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

static bool fasa_can_store_cached(ggml_type type_k) {
    return type_k == GGML_TYPE_F32 || type_k == GGML_TYPE_F16 || type_k == GGML_TYPE_BF16;
}

// whether the device that holds K can run the three ops on this layer
static bool fasa_is_supported(const ggml_tensor * k, const ggml_tensor * v, int64_t n_dim, int64_t n_head, int64_t n_head_kv) {
    const auto buft = ggml_backend_buffer_get_type(k->buffer);
    if (ggml_backend_buft_is_host(buft)) {
        return true;
    }

    auto * dev = ggml_backend_buft_get_device(buft);
    auto * reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    if (!reg || strncmp(ggml_backend_reg_name(reg), "RPC", 3) == 0) {
        return false; // the RPC backend claims every op, whatever its server can do
    }
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_META) {
        return false; // several devices as one, which would have to know how to split the ops among them
    }

    ggml_context_ptr ctx { ggml_init({
        /*.mem_size   =*/ 16*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    }) };

    // shapes of a decode step; how many cells there are does not matter
    const int64_t n_kv  = k->ne[1];
    const int64_t n_fac = 1;

    const auto split_heads = [&](const ggml_tensor * t) {
        return ggml_new_tensor_3d(ctx.get(), t->type, t->ne[0]/n_head_kv, n_head_kv, n_kv);
    };

    ggml_tensor * k_heads = split_heads(k);
    ggml_tensor * v_heads = split_heads(v);
    ggml_tensor * k_cur   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, k_heads->ne[0], n_head_kv, 1);
    ggml_tensor * q       = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, k_heads->ne[0], n_head, 1);
    ggml_tensor * mask    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_kv, 1);
    ggml_tensor * idxs    = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1);
    ggml_tensor * dims    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_dim, n_head_kv);
    ggml_tensor * ranges  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_dim, 2, n_head_kv);
    ggml_tensor * tips    = ggml_fasa_new_tips(ctx.get(), n_kv, n_dim, n_head_kv, 1);
    ggml_tensor * idx     = ggml_fasa_select(ctx.get(), q, tips, dims, ranges, mask, nullptr, n_head_kv, n_fac, 1.0f);

    ggml_tensor * stored  = fasa_can_store_cached(k->type)
        ? ggml_fasa_store_cached(ctx.get(), tips, k_heads, dims, ranges, idxs)
        : ggml_fasa_store       (ctx.get(), tips, k_cur,   dims, ranges, idxs, k->type);

    return
        ggml_backend_dev_supports_op(dev, stored) &&
        ggml_backend_dev_supports_op(dev, idx) &&
        ggml_backend_dev_supports_op(dev, ggml_fasa_attend(ctx.get(), q, k_heads, v_heads, idx, nullptr, nullptr, 1.0f, 0.0f));
}

static llama_fasa_reason fasa_reason_no_tips(
        const llama_model & model, const llama_fasa_profile & profile, int32_t il, const ggml_tensor * k, const ggml_tensor * v, bool v_trans) {
    const auto & hparams = model.hparams;

    if (hparams.is_swa(il)) {
        return LLAMA_FASA_REASON_SLIDING_WINDOW;
    }
    if ((uint32_t) il < profile.params.n_dense_layers) {
        return LLAMA_FASA_REASON_DENSE_LAYER;
    }
    if (profile.dims[il].empty() || k->ne[0] != (int64_t) hparams.n_embd_k_gqa(il) || k->ne[1] % ggml_fasa_cells_per_block() != 0) {
        return LLAMA_FASA_REASON_NO_CHUNKS;
    }
    if (v_trans) {
        return LLAMA_FASA_REASON_FLASH_ATTN_OFF;
    }
    const int64_t n_head_kv = hparams.n_head_kv(il);
    if (!fasa_is_supported(k, v, profile.dims[il].size()/n_head_kv, hparams.n_head(il), n_head_kv)) {
        return LLAMA_FASA_REASON_BACKEND;
    }
    return LLAMA_FASA_REASON_NONE;
}

llama_fasa_tips::llama_fasa_tips(
        const llama_model    & model,
        std::shared_ptr<const llama_fasa_profile> profile_of_model,
        const llama_kv_cache & kv,
        bool v_trans) : model(model), profile(std::move(profile_of_model)), kv(kv) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    const auto ids = kv.get_layer_ids();

    for (const uint32_t il : ids) {
        const ggml_tensor * k = kv.get_k_storage(il);
        const ggml_tensor * v = kv.get_v_storage(il);

        auto & layer = layers[il];

        layer.k      = kv.get_k_storage(il);
        layer.reason = fasa_reason_no_tips(model, *profile, il, k, v, v_trans);

        if (layer.reason != LLAMA_FASA_REASON_NONE) {
            continue;
        }

        // tips live where the layer's K lives
        auto & ctx = ctx_map[ggml_backend_buffer_get_type(k->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({
                /*.mem_size   =*/ 3*ids.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            }));
            GGML_ASSERT(ctx);
        }

        const int64_t n_head_kv = model.hparams.n_head_kv(il);
        const int64_t n_dim     = profile->dims[il].size()/n_head_kv;

        layer.tips = ggml_fasa_new_tips(ctx.get(), k->ne[1], n_dim, n_head_kv, k->ne[2]);
        layer.dims = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_dim, n_head_kv);
        layer.ranges = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_dim, 2, n_head_kv);

        layer.row_bytes = k->nb[1] + v->nb[1];
        layer.tip_bytes = ggml_row_size(layer.tips->type, layer.tips->ne[0])*n_head_kv/ggml_fasa_cells_per_block();
        layer.bandwidth = ggml_fasa_bandwidth(ggml_backend_buft_get_device(ggml_backend_buffer_get_type(k->buffer)));

        ggml_format_name(layer.tips, "cache_fasa_tips_l%d", il);
        ggml_format_name(layer.dims, "fasa_dims_l%d", il);
        ggml_format_name(layer.ranges, "fasa_ranges_l%d", il);
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (model.hparams.no_alloc) {
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
        ggml_fasa_prefer_huge_pages(buf);

        LLAMA_LOG_INFO("%s: %10s tip buffer size = %8.2f MiB\n", __func__,
                ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ctxs_bufs.emplace_back(std::move(ctx), buf);
    }

    on_clear();

    if (!ctxs_bufs.empty()) {
        LLAMA_LOG_INFO("%s: size = %7.2f MiB (%u chunks of each key)\n", __func__, size()/(1024.0*1024.0), profile->params.n_tip);
    }
}

std::unique_ptr<llama_kv_cache_listener> llama_fasa_make_listener(const llama_model & model, const llama_kv_cache & kv, bool v_trans) {
    auto profile = llama_fasa_profile_of(model);

    return profile ? std::make_unique<llama_fasa_tips>(model, std::move(profile), kv, v_trans) : nullptr;
}

void llama_fasa_tips::on_clear() {
    for (auto & [_, buf] : ctxs_bufs) {
        ggml_backend_buffer_clear(buf.get(), 0);
    }
    for (auto & [il, layer] : layers) {
        if (layer.dims && layer.dims->data) {
            ggml_backend_tensor_set(layer.dims,   profile->dims[il].data(),   0, ggml_nbytes(layer.dims));
            ggml_backend_tensor_set(layer.ranges, profile->ranges[il].data(), 0, ggml_nbytes(layer.ranges));
        }
    }
    stale.clear();
    n_failed = n_wait = 0;
}

const llama_fasa_tips::layer & llama_fasa_tips::get_layer(int32_t il) const {
    static const layer none = { nullptr, nullptr, nullptr, nullptr, LLAMA_FASA_REASON_NO_CHUNKS, 0, 0, 0.0f };

    const auto it = layers.find(il);

    return it == layers.end() ? none : it->second;
}

uint32_t llama_fasa_tips::get_min_ctx(int32_t il, const llama_fasa_params & params) const {
    if (params.min_ctx > 0) {
        return params.min_ctx;
    }
    const auto & layer = layers.at(il);

    const int64_t n_head_kv = model.hparams.n_head_kv(il);
    const int64_t n_lists   = params.select == LLAMA_FASA_SELECT_TYPE_HEAD ? model.hparams.n_head(il)/n_head_kv : 1;
    const int64_t n_faster  = ggml_fasa_min_cells(layer.bandwidth, layer.row_bytes, layer.tip_bytes, params.budget*n_lists);

    return std::max(llama_fasa_n_twice(params), n_faster);
}

uint32_t llama_fasa_tips::get_min_ctx(const llama_fasa_params & params) const {
    uint32_t res = 0;
    for (const auto & [il, layer] : layers) {
        if (layer.tips) {
            const uint32_t min_ctx = get_min_ctx(il, params);
            res = res == 0 ? min_ctx : std::min(res, min_ctx);
        }
    }
    return res;
}

ggml_tensor * llama_fasa_tips::get_tips(ggml_context * ctx, int32_t il, const ggml_tensor * k) const {
    auto * tips = layers.at(il).tips;

    return ggml_view_4d(ctx, tips,
            tips->ne[0], k->ne[2]/ggml_fasa_cells_per_block(), tips->ne[2], k->ne[3],
            tips->nb[1], tips->nb[2], tips->nb[3], k->view_offs/k->nb[3]*tips->nb[3]);
}

bool llama_fasa_tips::copies_k() const {
    return std::any_of(layers.begin(), layers.end(), [](const auto & it) {
        return it.second.tips && !fasa_can_store_cached(it.second.k->type);
    });
}

llama_fasa_tips::store_inputs llama_fasa_tips::build_store_inputs(ggml_context * ctx, ggml_tensor * idxs, int64_t n_cells) const {
    store_inputs res;

    res.idxs = idxs;
    if (!idxs) {
        res.idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_cells);
        ggml_set_input(res.idxs);
    }
    if (copies_k()) {
        res.rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_cells);
        ggml_set_input(res.rows);
        res.k_rot = kv.build_input_k_rot(ctx); // only what is quantized is rotated
    }
    return res;
}

void llama_fasa_tips::set_store_inputs(const store_inputs & inputs) const {
    if (inputs.rows && inputs.rows->buffer) {
        std::vector<int64_t> idxs(inputs.idxs->ne[0]);
        ggml_backend_tensor_get(inputs.idxs, idxs.data(), 0, ggml_nbytes(inputs.idxs));

        const std::vector<int32_t> rows(idxs.begin(), idxs.end());
        ggml_backend_tensor_set(inputs.rows, rows.data(), 0, ggml_nbytes(inputs.rows));
    }
    if (inputs.k_rot && inputs.k_rot->buffer) {
        kv.set_input_k_rot(inputs.k_rot);
    }
}

ggml_tensor * llama_fasa_tips::build_store(ggml_context * ctx, int32_t il, const store_inputs & inputs) const {
    const auto & layer = layers.at(il);

    const int64_t n_embd    = layer.k->ne[0];
    const int64_t n_head_kv = layer.dims->ne[1];
    const int64_t n_rows    = layer.k->ne[1]*layer.k->ne[2];

    if (fasa_can_store_cached(layer.k->type)) {
        ggml_tensor * k = ggml_reshape_3d(ctx, layer.k, n_embd/n_head_kv, n_head_kv, n_rows);
        return ggml_fasa_store_cached(ctx, layer.tips, k, layer.dims, layer.ranges, inputs.idxs);
    }

    ggml_tensor * k = ggml_get_rows(ctx, ggml_reshape_2d(ctx, layer.k, n_embd, n_rows), inputs.rows);

    k = ggml_reshape_3d(ctx, k, n_embd/n_head_kv, n_head_kv, inputs.rows->ne[0]);
    if (inputs.k_rot) {
        k = llama_mul_mat_hadamard(ctx, k, inputs.k_rot); // its own inverse
    }
    return ggml_fasa_store(ctx, layer.tips, k, layer.dims, layer.ranges, inputs.idxs, layer.k->type);
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
// what the cache tells
//

void llama_fasa_tips::on_change(uint32_t stream, const std::vector<uint32_t> & cells) {
    if (ctxs_bufs.empty()) {
        return; // no layer has tips
    }
    for (const uint32_t cell : cells) {
        stale.push_back((int64_t) stream*kv.get_size() + cell);
    }
    std::sort(stale.begin(), stale.end());
    stale.erase(std::unique(stale.begin(), stale.end()), stale.end());
    n_wait = 0;
}

bool llama_fasa_tips::begin_update() {
    if (stale.empty()) {
        return false;
    }
    if (n_wait > 0) {
        n_wait--;
        return false;
    }
    return true;
}

bool llama_fasa_tips::update(llama_context * lctx) {
    if (stale.empty() || n_wait > 0) {
        return false;
    }
    const char * error = rebuild(lctx);

    if (!error) {
        if (n_failed > 0) {
            LLAMA_LOG_INFO("%s: the tips are made again after %u failures\n", __func__, n_failed);
        }
        n_failed = 0;
        return true;
    }
    if (n_failed == 0) {
        LLAMA_LOG_ERROR("%s: failed to make the tips of %zu cells again: %s; until a later attempt succeeds their layers run dense\n",
                __func__, stale.size(), error);
    }
    n_wait = (1u << std::min(n_failed, 16u)) - 1; // none after the first failure, which may be an abort that the application asked for
    n_failed++;
    return false;
}

namespace {

class fasa_graph_input_cells : public llm_graph_input_i {
public:
    fasa_graph_input_cells(const llama_fasa_tips & tips, ggml_context * ctx, std::vector<int64_t> cells) :
        store(tips.build_store_inputs(ctx, nullptr, cells.size())), tips(tips), cells(std::move(cells)) {}

    void set_input(const llama_ubatch * /*ubatch*/) override {
        ggml_backend_tensor_set(store.idxs, cells.data(), 0, ggml_nbytes(store.idxs));
        tips.set_store_inputs(store);
    }

    const llama_fasa_tips::store_inputs store;

private:
    const llama_fasa_tips    & tips;
    const std::vector<int64_t> cells;
};

} // namespace

ggml_cgraph * llama_fasa_tips::build_graph_rebuild(llm_graph_result * res, std::vector<int64_t> cells) const {
    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    auto inp = std::make_unique<fasa_graph_input_cells>(*this, ctx, std::move(cells));

    for (const auto & [il, layer] : layers) {
        if (layer.tips) {
            ggml_build_forward_expand(gf, build_store(ctx, il, inp->store));
        }
    }

    res->add_input(std::move(inp));

    return gf;
}

const char * llama_fasa_tips::rebuild(llama_context * lctx) {
    // what is quantized (only that is rotated) is copied as f32: no more rows than a micro-batch computes, for which memory is reserved
    const size_t n_cells_max = copies_k() ? lctx->n_ubatch() : 8192;

    auto * sched = lctx->get_sched();
    auto * res   = lctx->get_gf_res_reserve();

    while (!stale.empty()) {
        const auto first = stale.end() - std::min(stale.size(), n_cells_max);

        ggml_backend_sched_reset(sched);
        res->reset();

        auto * gf = build_graph_rebuild(res, { first, stale.end() });
        if (!ggml_backend_sched_alloc_graph(sched, gf)) {
            return "memory for the graph cannot be allocated";
        }

        res->set_inputs(nullptr);

        if (lctx->graph_compute(gf, false) != GGML_STATUS_SUCCESS) {
            return "the graph was aborted, or failed";
        }

        stale.erase(first, stale.end());
    }

    return nullptr;
}
