#pragma once

#include "llama-fasa-tips.h"
#include "llama-fasa.h"
#include "llama-fasa-rope.h"
#include "llama-graph.h"

#include <map>
#include <set>

struct llama_fasa_context;

class  llama_kv_cache_context;
class  llama_fasa_graph_input;

// one attention layer of a graph under construction
class llama_fasa_attn {
public:
    // q_cur, k_cur: as they enter build_attn, before any Hadamard rotation
    llama_fasa_attn(const llm_graph_context & graph, ggml_tensor * q_cur, ggml_tensor * k_cur, int il);

    // call once K and V are in the cache: writes the tips, then attends to the cells that matter
    // q, k, v: as build_attn_mha takes them
    // returns [n_embd_head_v*n_head, n_tokens], or nullptr: the caller's dense attention has to run
    ggml_tensor * build(
            const llama_kv_cache_context * mctx,
            ggml_tensor * k_idxs,
            ggml_tensor * q,
            ggml_tensor * k,
            ggml_tensor * v,
            ggml_tensor * kq_b,
            ggml_tensor * kq_mask,
            ggml_tensor * sinks,
            float         kq_scale) const;

private:
    // tips: nullptr: the cache is that of another context
    llama_fasa_reason reason_dense(const llama_fasa_tips * tips, uint32_t n_kv, bool is_dense_prompt, const ggml_tensor * v, const ggml_tensor * kq_b) const;

    // whether a layer that stays dense takes FASA's kernel
    bool is_exact(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * kq_b) const;

    bool is_flash_attn(const ggml_tensor * v) const;

    void capture(llama_fasa_graph_input & inp, llama_fasa_capture which, ggml_tensor * cur) const;

    const llm_graph_context & graph;
    llama_fasa_context      * fasa; // nullptr: the model has no profile, and nothing is captured

    ggml_tensor * q_cur;
    ggml_tensor * k_cur;

    const int il;
};

// call once the graph has all its layers: counts those that did not pass llama_fasa_attn
void llama_fasa_add_other_layers(const llm_graph_context & graph, llm_graph_type gtype);

// the inputs of the ops, and what running the graph once adds to the counters
class llama_fasa_graph_input : public llm_graph_input_i {
public:
    // tips: outlive the graph, unlike the memory context of a batch, which a reused graph must not keep
    llama_fasa_graph_input(llama_fasa_context & fasa, const llama_fasa_tips * tips, uint32_t n_kv, const llama_ubatch & ubatch);
    ~llama_fasa_graph_input() override;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // a layer of the graph: sparse if the reason is NONE; n_lists: of cells, for each KV head
    void add_layer(llama_fasa_reason reason, size_t row_bytes, size_t tip_bytes, size_t n_lists = 1);

    // cells that every token attends to: I32 [n_forced, n_tokens/n_stream, n_stream], nullptr: none
    ggml_tensor * build_forced(ggml_context * ctx, int64_t n_tokens, int64_t n_stream);

    void add_captured(int32_t il, llama_fasa_capture which, ggml_tensor * cur) { captured[{ il, which }] = cur; }

    const ggml_tensor * get_captured(int32_t il, llama_fasa_capture which) const; // nullptr: it was not

    llama_fasa_tips::store_inputs store; // of the cells of the batch

    int64_t n_fac = 0; // cells attended to in sparse layers

    uint32_t n_layers_exact = 0; // dense layers that take FASA's kernel

    std::set<int> layers; // that have been added

    std::map<int32_t, llama_fasa_rope> ropes; // of layers whose keys are captured

    const bool is_prompt; // what the graph is built for, and so what runs it

    // whether the chooser sees the attention of the micro-batch
    bool is_observed() const;

private:
    void set_forced(const llama_ubatch * ubatch) const;
    void count     (const llama_ubatch * ubatch) const;

    void count_bytes(const llama_ubatch * ubatch, llama_fasa_stats & step) const;

    llama_fasa_context & fasa;

    std::map<std::pair<int32_t, llama_fasa_capture>, ggml_tensor *> captured; // by layer

    const llama_fasa_tips * tips; // nullptr: no profile, the cache of another context, or none
    const bool              is_valid; // they are
    const uint32_t          n_kv;

    const uint64_t key; // what the graph is built for, too: llama_fasa_chooser::graph_key

    ggml_tensor * forced = nullptr;

    uint32_t n_layers[LLAMA_FASA_REASON_COUNT] = {};

    // bytes of one cell, all KV heads, summed over the layers
    size_t row_bytes_sparse = 0; // K and V
    size_t row_bytes_listed = 0; // of the sparse layers, once for each list
    size_t row_bytes_dense  = 0;
    size_t tip_bytes        = 0;
};
