#include "llama-fasa-graph.h"

#include "llama-cparams.h"
#include "llama-fasa-context.h"
#include "llama-fasa-profile.h"
#include "llama-fasa-tips.h"
#include "llama-fasa-weights.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include "ggml-fasa.h"

#include <algorithm>
#include <limits>

//
// llama_fasa_attn
//

llama_fasa_attn::llama_fasa_attn(const llm_graph_context & graph, ggml_tensor * q_cur, ggml_tensor * k_cur, int il) :
    graph(graph), fasa(graph.cparams.fasa), q_cur(q_cur), k_cur(k_cur), il(il) {
}

// one for all layers of the graph; mctx nullptr: no layer has attended to a plain KV cache
static llama_fasa_graph_input * fasa_get_input(const llm_graph_context & graph, const llama_kv_cache_context * mctx) {
    for (auto & inp : graph.res->inputs) {
        if (auto * res = dynamic_cast<llama_fasa_graph_input *>(inp.get())) {
            return res;
        }
    }
    return (llama_fasa_graph_input *) graph.res->add_input(std::make_unique<llama_fasa_graph_input>(
            *graph.cparams.fasa, mctx ? llama_fasa_tips::of(mctx->get_listener()) : nullptr, mctx ? mctx->get_n_kv() : 0, graph.ubatch));
}

bool llama_fasa_attn::is_flash_attn(const ggml_tensor * v) const {
    return v->nb[1] <= v->nb[2] && graph.cparams.flash_attn && !graph.cparams.auto_fa;
}

llama_fasa_reason llama_fasa_attn::reason_dense(
        const llama_fasa_tips * tips, uint32_t n_kv, bool is_dense_prompt, const ggml_tensor * v, const ggml_tensor * kq_b) const {
    const auto & params = fasa->params;

    if (graph.hparams.is_swa(il)) {
        return LLAMA_FASA_REASON_SLIDING_WINDOW; // its cache is another one
    }
    if (kq_b || graph.hparams.use_alibi) {
        return LLAMA_FASA_REASON_ATTN_BIAS;
    }
    if (!params.enabled) {
        return LLAMA_FASA_REASON_DISABLED;
    }
    if (!tips) {
        return LLAMA_FASA_REASON_NO_CHUNKS; // the cache of another context
    }
    if (const auto reason = tips->get_layer(il).reason; reason != LLAMA_FASA_REASON_NONE) {
        return reason;
    }
    if (!tips->is_valid()) {
        return LLAMA_FASA_REASON_STALE_TIPS;
    }
    if (!is_flash_attn(v)) {
        return LLAMA_FASA_REASON_FLASH_ATTN_OFF;
    }
    if (!graph.cparams.causal_attn) {
        return LLAMA_FASA_REASON_NON_CAUSAL;
    }
    if (is_dense_prompt) {
        return LLAMA_FASA_REASON_PROMPT;
    }
    if (n_kv < tips->get_min_ctx(il, params)) {
        return LLAMA_FASA_REASON_SHORT_CONTEXT;
    }
    return LLAMA_FASA_REASON_NONE;
}

static bool fasa_is_on_host(const ggml_tensor * k) {
    ggml_backend_buffer_t buffer = k->view_src ? k->view_src->buffer : nullptr; // of the KV cache

    return buffer && ggml_backend_buffer_is_host(buffer);
}

bool llama_fasa_attn::is_exact(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * kq_b) const {
    return fasa->params.exact && !kq_b && !graph.hparams.use_alibi && fasa_is_on_host(k) && is_flash_attn(v);
}

void llama_fasa_attn::capture(llama_fasa_graph_input & inp, llama_fasa_capture which, ggml_tensor * cur) const {
    if (fasa->capture & which) {
        cur = ggml_cont(graph.ctx0, cur);
        ggml_set_output(cur);
        ggml_build_forward_expand(graph.gf, cur);
        inp.add_captured(il, which, cur);
    }
}

ggml_tensor * llama_fasa_attn::build(
        const llama_kv_cache_context * mctx,
        ggml_tensor * k_idxs,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * kq_b,
        ggml_tensor * kq_mask,
        ggml_tensor * sinks,
        float         kq_scale) const {
    if (!fasa || graph.cparams.training) {
        return nullptr;
    }

    auto * ctx0 = graph.ctx0;
    auto * gf   = graph.gf;

    auto * inp = fasa_get_input(graph, mctx);

    inp->layers.insert(il);

    capture(*inp, LLAMA_FASA_CAPTURE_Q, q_cur);
    if (k_cur) { // null: the layer reads the cache of another one
        capture(*inp, LLAMA_FASA_CAPTURE_K, k_cur);
        if (fasa->capture & LLAMA_FASA_CAPTURE_K) {
            inp->ropes[il] = llama_fasa_find_rope(k_cur);
        }
    }

    if (!fasa->profile) {
        return nullptr;
    }

    const auto * tips = llama_fasa_tips::of(mctx->get_listener());

    if (tips && tips->get_layer(il).tips) {
        if (!inp->store.idxs) {
            inp->store = tips->build_store_inputs(ctx0, k_idxs, k_idxs->ne[0]);
        }
        ggml_tensor * stored = tips->build_store(ctx0, il, inp->store);
        graph.cb(stored, "fasa_store", il);
        ggml_build_forward_expand(gf, stored);
    }

    const int64_t n_stream = k->ne[3];
    const int64_t n_tokens = q->ne[2]/n_stream;

    const auto split_streams = [&](ggml_tensor * t) {
        return ggml_view_4d(ctx0, t, t->ne[0], t->ne[1], n_tokens, n_stream, t->nb[1], t->nb[2], t->nb[2]*n_tokens, 0);
    };

    const float softcap = graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;

    if (inp->is_observed() && tips && tips->get_layer(il).tips && n_stream == 1 && is_flash_attn(v)) {
        ggml_tensor * weights = llama_fasa_weights(ctx0, split_streams(q), k, kq_mask, kq_scale, softcap);
        ggml_build_forward_expand(gf, fasa->chooser().observe(ctx0, il, split_streams(q), weights, kq_mask));
    }

    const bool   wants_blocks = inp->is_prompt && fasa->params.prompt_mass < 1000 && fasa->params.policy == 0;
    const bool   by_blocks    = wants_blocks && fasa_is_on_host(k);
    auto         reason       = reason_dense(tips, mctx->get_n_kv(), inp->is_prompt && !by_blocks, v, kq_b);
    const size_t row_bytes    = k->ne[1]*(ggml_row_size(k->type, k->ne[0]) + ggml_row_size(v->type, graph.hparams.n_embd_head_v(il)));

    if (reason == LLAMA_FASA_REASON_PROMPT && wants_blocks && !fasa->logged_prompt_mass) {
        LLAMA_LOG_WARN("fasa: fasa.prompt_mass has no effect on layer %d, whose K is not in host memory: its prompts are read densely\n", il);
        fasa->logged_prompt_mass = true;
    }

    llama_fasa_chooser_args args = {};

    if (reason == LLAMA_FASA_REASON_NONE && !by_blocks) {
        const bool by_head = fasa->params.select == LLAMA_FASA_SELECT_TYPE_HEAD;

        inp->n_fac = llama_fasa_n_fac(fasa->params, mctx->get_n_kv());

        args.ctx        = ctx0;
        args.il         = il;
        args.layer      = fasa->profile->layers[il];
        args.q          = split_streams(q_cur);
        args.q_rot      = q == q_cur ? args.q : split_streams(q);
        args.k          = k;
        args.tips       = tips->get_tips(ctx0, il, k);
        args.dims       = tips->get_layer(il).dims;
        args.ranges     = tips->get_layer(il).ranges;
        args.mask       = kq_mask;
        args.forced     = inp->build_forced(ctx0, n_tokens, n_stream);
        args.n_head_sel = by_head ? q->ne[1] : k->ne[1];
        args.n_fac      = inp->n_fac;
        args.scale      = kq_scale;
        args.softcap    = softcap;

        if (!fasa->chooser().is_supported(args, graph.ubatch)) {
            reason = LLAMA_FASA_REASON_POLICY;
        }
    }

    const bool is_sparse = reason == LLAMA_FASA_REASON_NONE;

    if (!is_sparse && !is_exact(k, v, kq_b)) {
        inp->add_layer(reason, row_bytes, 0);
        if (fasa->params.exact && !fasa->logged_exact) {
            LLAMA_LOG_WARN("fasa: fasa.exact has no effect on layer %d: it takes flash attention, K in host memory, and no bias on the logits\n", il);
            fasa->logged_exact = true;
        }
        return nullptr;
    }

    ggml_tensor * idx = nullptr;

    if (is_sparse && !by_blocks) {
        const size_t tip_bytes = args.tips->ne[0]*args.tips->ne[2]/ggml_fasa_cells_per_block();

        inp->add_layer(reason, row_bytes, fasa->params.policy == 0 ? tip_bytes : 0, args.n_head_sel/k->ne[1]);

        idx = fasa->chooser().build(args);
        graph.cb(idx, "fasa_select", il);

        capture(*inp, LLAMA_FASA_CAPTURE_CELLS, ggml_reshape_3d(ctx0, idx, idx->ne[0], idx->ne[1], idx->ne[2]*idx->ne[3]));
        if (fasa->capture & LLAMA_FASA_CAPTURE_MASS) {
            ggml_tensor * weights = llama_fasa_weights(ctx0, args.q_rot, k, kq_mask, kq_scale, softcap);
            ggml_tensor * mass    = llama_fasa_mass(ctx0, weights, idx);
            capture(*inp, LLAMA_FASA_CAPTURE_MASS, ggml_reshape_3d(ctx0, mass, 1, mass->ne[0], mass->ne[1]*mass->ne[2]));
        }
    } else {
        inp->add_layer(reason, row_bytes, 0);
        inp->n_layers_exact += !is_sparse;
    }

    ggml_tensor * cur = ggml_fasa_attend(ctx0, split_streams(q), k, v, idx, idx ? nullptr : kq_mask, sinks, kq_scale, softcap);
    if (is_sparse && by_blocks) {
        const auto & layer = tips->get_layer(il);
        ggml_fasa_attend_set_tips(cur, split_streams(q_cur), tips->get_tips(ctx0, il, k), layer.dims, layer.ranges, fasa->params.prompt_mass/1000.0f);
    }
    graph.cb(cur, "fasa_attend", il);

    cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(gf, cur);

    return cur;
}

void llama_fasa_add_other_layers(const llm_graph_context & graph, llm_graph_type gtype) {
    const auto * fasa = graph.cparams.fasa;

    if (!fasa || !fasa->profile || graph.cparams.training) {
        return;
    }
    if (gtype != LLM_GRAPH_TYPE_DEFAULT && gtype != LLM_GRAPH_TYPE_DECODER) {
        return; // an encoder, or multi-token prediction: they run other layers
    }

    const auto & hparams = graph.hparams;
    const auto   n_layer = hparams.dec_n_layer > 0 ? hparams.dec_n_layer : hparams.n_layer();

    auto * inp = fasa_get_input(graph, nullptr);

    for (uint32_t il = 0; il < n_layer; ++il) {
        if (inp->layers.count(il) > 0) {
            continue;
        }
        if (hparams.is_recr(il) || hparams.n_head_kv(il) == 0) {
            inp->add_layer(LLAMA_FASA_REASON_NO_KV_HEADS, 0, 0);
        } else if (hparams.is_mla()) {
            inp->add_layer(LLAMA_FASA_REASON_MLA, 0, 0);
        } else {
            inp->add_layer(LLAMA_FASA_REASON_NO_CHUNKS, 0, 0); // an attention of its own, which calibration cannot see
        }
    }
}

//
// llama_fasa_graph_input
//

llama_fasa_graph_input::llama_fasa_graph_input(
        llama_fasa_context & fasa, const llama_fasa_tips * tips, uint32_t n_kv, const llama_ubatch & ubatch) :
    is_prompt(fasa.is_prompt(ubatch)), fasa(fasa), tips(tips), is_valid(tips && tips->is_valid()), n_kv(n_kv),
    key(fasa.chooser().graph_key(ubatch)) {
}

llama_fasa_graph_input::~llama_fasa_graph_input() {
    if (fasa.last_run == this) {
        fasa.last_run = nullptr;
    }
}

const ggml_tensor * llama_fasa_graph_input::get_captured(int32_t il, llama_fasa_capture which) const {
    const auto it = captured.find({ il, which });

    return it == captured.end() ? nullptr : it->second;
}

void llama_fasa_graph_input::add_layer(llama_fasa_reason reason, size_t row_bytes, size_t tip_bytes, size_t n_lists) {
    n_layers[reason]++;

    if (reason == LLAMA_FASA_REASON_NONE) {
        row_bytes_sparse += row_bytes;
        row_bytes_listed += row_bytes*n_lists;
        this->tip_bytes  += tip_bytes;
    } else if (reason != LLAMA_FASA_REASON_SLIDING_WINDOW) {
        row_bytes_dense  += row_bytes;
    }
}

ggml_tensor * llama_fasa_graph_input::build_forced(ggml_context * ctx, int64_t n_tokens, int64_t n_stream) {
    const int64_t n_forced = fasa.params.n_sink + fasa.params.n_recent;

    if (!forced && n_forced > 0) {
        forced = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, std::min(n_forced, n_fac), n_tokens, n_stream);
        ggml_set_input(forced);
        ggml_set_name(forced, "fasa_inp_forced");
    }
    return forced;
}

bool llama_fasa_graph_input::is_observed() const {
    return fasa.chooser().observes() && (is_prompt || !fasa.params.enabled);
}

bool llama_fasa_graph_input::can_reuse(const llm_graph_params & params) {
    // llm_graph_params compares the number of tokens and the settings, the attention input n_kv
    return is_prompt == fasa.is_prompt(params.ubatch) && is_valid == (tips && tips->is_valid()) && key == fasa.chooser().graph_key(params.ubatch);
}

void llama_fasa_graph_input::set_input(const llama_ubatch * ubatch) {
    fasa.last_run = this;

    if (store.rows) {
        tips->set_store_inputs(store); // its idxs are the attention's, which was built first and has been set
    }
    if (forced && forced->buffer) {
        set_forced(ubatch);
    }
    fasa.chooser().begin(*ubatch, is_observed());
    count(ubatch);
}

void llama_fasa_graph_input::set_forced(const llama_ubatch * ubatch) const {
    const size_t n_forced = forced->ne[0];
    const size_t n_sink   = std::min<size_t>(fasa.params.n_sink, n_forced);

    std::vector<int32_t> ids(ggml_nelements(forced), -1);

    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        const auto   seq_id = ubatch->seq_id[i][0];
        const auto & cells  = tips->get_cells(seq_id);
        const auto   end    = cells.upper_bound({ ubatch->pos[i], std::numeric_limits<uint32_t>::max() });

        int32_t * res = ids.data() + i*n_forced;
        size_t    n   = 0;

        for (auto it = cells.begin(); it != end && n < n_sink; ++it) {
            res[n++] = it->second;
        }
        for (auto it = end; it != cells.begin() && n < n_forced; ) {
            res[n++] = (--it)->second;
        }
    }

    ggml_backend_tensor_set(forced, ids.data(), 0, ggml_nbytes(forced));
}

void llama_fasa_graph_input::count(const llama_ubatch * ubatch) const {
    llama_fasa_stats step = {};

    step.n_layers_exact = n_layers_exact;

    for (int i = 0; i < LLAMA_FASA_REASON_COUNT; ++i) {
        const auto reason = (llama_fasa_reason) i;

        step.n_layers[i] = n_layers[i];

        if (n_layers[i] > 0 && reason != LLAMA_FASA_REASON_NONE && fasa.profile->has_chunks && !fasa.logged[i]) {
            LLAMA_LOG_INFO("fasa: %u layers run dense: %s\n", n_layers[i], llama_fasa_reason_description(reason));
            fasa.logged[i] = true;
        }
    }

    if (is_prompt) {
        step.n_steps_prompt = 1;
    } else {
        step.n_steps_decode = 1;
        count_bytes(ubatch, step);
    }
    fasa.count(step);
}

void llama_fasa_graph_input::count_bytes(const llama_ubatch * ubatch, llama_fasa_stats & step) const {
    for (uint32_t i = 0; tips && i < ubatch->n_tokens; ++i) {
        // cells of the sequence up to the token; only a batch of several tokens has later ones
        const auto & cells = tips->get_cells(ubatch->seq_id[i][0]);

        size_t n_visible = cells.size();
        for (auto it = cells.rbegin(); it != cells.rend() && it->first > ubatch->pos[i]; ++it) {
            n_visible--;
        }

        const size_t n_kept = row_bytes_sparse > 0 ? fasa.chooser().n_kept(n_visible, n_fac) : 0;

        step.bytes_kv       += n_visible*row_bytes_dense + n_kept*row_bytes_listed;
        step.bytes_tips     += n_kv*tip_bytes;
        step.bytes_kv_dense += n_visible*(row_bytes_dense + row_bytes_sparse);
    }
}
