#pragma once

#include "llama-fasa.h"
#include "llama-fasa-profile.h"

#include "ggml.h"

#include <memory>

struct llama_fasa_observed;

// one sparse layer of a graph under construction, as ggml_fasa_select and ggml_fasa_attend take it
struct llama_fasa_policy_args {
    ggml_context * ctx;

    int32_t il;

    ggml_tensor * q;      // F32 [n_embd_head, n_head, n_tokens, n_stream] after RoPE
    ggml_tensor * q_rot;  // the same, with the Hadamard rotation that K has in the cache, if any
    ggml_tensor * k;      //     [n_embd_head, n_head_kv, n_kv, n_stream] of the cache
    ggml_tensor * tips;
    ggml_tensor * dims;
    ggml_tensor * ranges;
    ggml_tensor * mask;
    ggml_tensor * forced; // nullptr: none

    int64_t n_head_sel; // heads that choose: n_head_kv, or n_head
    int64_t n_fac;
    float   scale;
    float   softcap; // 0: none
};

// Which cells a head attends to. FASA is one answer; the others are what it is compared with: they share the rest of the
// runtime with it and are plain code on the CPU, for evaluation (fasa.policy).
class llama_fasa_policy {
public:
    virtual ~llama_fasa_policy() = default;

    // I32 [n_list, n_head_sel, n_tokens, n_stream]: ids within the stream, ascending, each once, then -1
    virtual ggml_tensor * build(const llama_fasa_policy_args & args) = 0;

    // whether it can choose for this layer; asked before build
    virtual bool is_supported(const llama_fasa_policy_args & /*args*/) const { return true; }

    // cells that a head attends to out of n_visible
    virtual int64_t n_kept(int64_t n_visible, int64_t n_fac) const { return n_visible < n_fac ? n_visible : n_fac; }

    // whether it chooses by what was observed of the prompt
    virtual bool needs_prompt() const { return false; }
};

// observed: outlives the policy
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_make(
        const llama_fasa_params & params, const llama_fasa_profile & profile, llama_fasa_observed & observed);
