#pragma once

#include "llama-fasa.h"

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct gguf_context;
struct llama_model;

using llama_fasa_overrides = std::unordered_map<std::string, llama_model_kv_override>; // by key

// what `fasa.*` metadata says of a model; never changes, and who was made by it keeps it when the model gets another
struct llama_fasa_profile {
    llama_fasa_params params = {};

    // per layer: I32 [n_dim, n_head_kv], the dims of the n_tip best chunks of each KV head; empty: no chunks
    std::vector<std::vector<int32_t>> dims;

    // per layer: F32 [n_dim, 2, n_head_kv], centre and step of each of these dims (ggml_fasa_store)
    std::vector<std::vector<float>> ranges;

    std::vector<llama_fasa_layer> layers;

    // false: all there is to it is `exact`, which needs no chunks and so no profile
    bool has_chunks = true;

    std::string override_report;

    // metadata: of the model's own file, or of a profile file
    // nullptr: it holds no profile, or fasa.version is overridden with 0, and fasa.exact is not overridden with true
    // throws std::runtime_error: the profile is damaged, or of another model
    static std::shared_ptr<const llama_fasa_profile> load(const gguf_context * metadata, const llama_fasa_overrides & overrides, const llama_model & model);
};

// of a model, which another thread may give another one meanwhile; nullptr: none
std::shared_ptr<const llama_fasa_profile> llama_fasa_profile_of(const llama_model & model);

llama_fasa_layer llama_fasa_model_layer(const llama_model & model, int32_t il);

std::string llama_fasa_model_fingerprint(const llama_model & model);

// throws std::runtime_error: a value is out of range
void llama_fasa_params_validate(const llama_fasa_params & params);

// cells that a decoded token attends to out of n_kv
int64_t llama_fasa_n_fac(const llama_fasa_params & params, int64_t n_kv);

// cells from which on that is at most half of them
int64_t llama_fasa_n_twice(const llama_fasa_params & params);
