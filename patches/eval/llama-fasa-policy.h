#pragma once

#include "llama-fasa-chooser.h"

#include <memory>

struct llama_fasa_observed;

// One way to choose other than FASA's; they share the rest of the runtime with it.
class llama_fasa_policy {
public:
    virtual ~llama_fasa_policy() = default;

    // as llama_fasa_chooser::build
    virtual ggml_tensor * build(const llama_fasa_chooser_args & args) = 0;

    // whether it can choose for this layer; asked before build
    virtual bool is_supported(const llama_fasa_chooser_args & args) const = 0;

    // cells that a head attends to out of n_visible
    virtual int64_t n_kept(int64_t n_visible, int64_t n_fac) const { return n_visible < n_fac ? n_visible : n_fac; }

    // whether it chooses by what was observed of the prompt
    virtual bool needs_prompt() const { return false; }
};

// observed: outlives the policy
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_fasa_sum ();
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_oracle   ();
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_random   ();
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_streaming(uint32_t n_sink);
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_quest    ();
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_unique   ();
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_snapkv   (const llama_fasa_observed & observed);
std::unique_ptr<llama_fasa_policy> llama_fasa_policy_h2o      (const llama_fasa_observed & observed);
