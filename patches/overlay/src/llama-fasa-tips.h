#pragma once

#include "llama-fasa.h"
#include "llama-kv-cache-listener.h"
#include "llama-kv-cache.h"

#include <map>
#include <memory>
#include <set>
#include <vector>

struct llama_fasa_params;
struct llama_fasa_profile;

// The tip cache: the dominant chunks of every cached key, packed, beside the K of a llama_kv_cache.
//
// Tips follow from K and are never serialized: where K changes other than through the graph's own store, the cache says so,
// and the next memory update makes those tips again. Where that fails, updates are let pass before the next attempt, twice as
// many each time, or until K changes again; meanwhile the layers run dense.
class llama_fasa_tips : public llama_kv_cache_listener {
public:
    struct layer {
        ggml_tensor * tips = nullptr; // see ggml_fasa_new_tips; nullptr: this layer runs dense
        ggml_tensor * dims = nullptr; // I32 [n_dim, n_head_kv]
        ggml_tensor * ranges = nullptr; // F32 [n_dim, 2, n_head_kv]
        ggml_tensor * k    = nullptr; // the K cache of the layer [n_embd_k_gqa, kv_size, n_stream]

        llama_fasa_reason reason = LLAMA_FASA_REASON_NONE; // why there are no tips

        size_t row_bytes = 0;    // K and V of a cell
        size_t tip_bytes = 0;
        float  bandwidth = 0.0f; // of the memory that holds them, if when sparse attention pays is known there
    };

    // kv: owns the tips
    llama_fasa_tips(const llama_model & model, std::shared_ptr<const llama_fasa_profile> profile_of_model, const llama_kv_cache & kv, bool v_trans);

    // nullptr: the model has no profile, or the cache is that of another context
    static const llama_fasa_tips * of(const llama_kv_cache_listener * listener) { return dynamic_cast<const llama_fasa_tips *>(listener); }

    const layer & get_layer(int32_t il) const;

    // cells from which on a layer runs sparse: as set, or else from where the budget is half of them, on a GPU from where it is faster on
    uint32_t get_min_ctx(int32_t il, const llama_fasa_params & params) const;

    // the least of all layers, 0: none has tips
    uint32_t get_min_ctx(const llama_fasa_params & params) const;

    // the tips of the streams and cells that a view of the cache shows: [n_embd_head, n_head_kv, n_kv, n_stream]
    ggml_tensor * get_tips(ggml_context * ctx, int32_t il, const ggml_tensor * k) const;

    // what build_store needs to know of cells; input tensors
    struct store_inputs {
        ggml_tensor * idxs  = nullptr; // I64 [n_cells], stream by stream
        ggml_tensor * rows  = nullptr; // I32, the same; nullptr: no layer's keys are copied
        ggml_tensor * k_rot = nullptr; // F32 [n_rot, n_rot]; nullptr: K is not rotated
    };

    // idxs: nullptr for an input of its own
    store_inputs build_store_inputs(ggml_context * ctx, ggml_tensor * idxs, int64_t n_cells) const;

    // after that of idxs has been set
    void set_store_inputs(const store_inputs & inputs) const;

    // Writes the tips of cells, whose keys are in the cache by then: as it holds them, so that tips made again are the same. And so
    // RoPE's result has no reader but the write of K, and the two can be fused.
    ggml_tensor * build_store(ggml_context * ctx, int32_t il, const store_inputs & inputs) const;

    // (position, cell) of a sequence, ascending
    const std::set<std::pair<llama_pos, uint32_t>> & get_cells(llama_seq_id seq_id) const;

    bool is_valid() const { return stale.empty(); }

    void on_clear() override;
    void on_change(uint32_t stream, const std::vector<uint32_t> & cells) override;

    bool begin_update() override;
    bool update(llama_context * lctx) override;

    size_t size() const; // bytes
    void   memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const override;

private:
    bool copies_k() const; // a layer's keys have to be copied to be read

    ggml_cgraph * build_graph_rebuild(llm_graph_result * res, std::vector<int64_t> cells) const;

    // makes the stale tips again from K, those at the end first; nullptr, or what did not work
    const char * rebuild(llama_context * lctx);

    const llama_model & model;

    const std::shared_ptr<const llama_fasa_profile> profile; // of the model when the tips were made

    const llama_kv_cache & kv;

    std::map<int32_t, layer> layers;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::vector<int64_t> stale; // stream*kv_size + cell, ascending

    uint32_t n_failed = 0; // attempts in a row
    uint32_t n_wait   = 0; // updates to let pass
};
