#pragma once

#include "llama-fasa.h"

#include <memory>
#include <string>
#include <vector>

struct llama_model;
struct llama_model_loader;

// what `fasa.*` metadata says of a model; belongs to the model and never changes
struct llama_fasa_profile {
    llama_fasa_params params;

    // per layer: I32 [n_dim, n_head_kv], the dims of the n_tip best chunks of each KV head; empty: no chunks
    std::vector<std::vector<int32_t>> dims;

    std::string override_report;

    // nullptr: the model has no profile
    // throws std::runtime_error: the metadata is damaged, or of another model
    static std::unique_ptr<const llama_fasa_profile> load(const llama_model_loader & ml, const llama_model & model);
};

llama_fasa_layer llama_fasa_model_layer(const llama_model & model, int32_t il);

std::string llama_fasa_model_fingerprint(const llama_model & model);

// throws std::runtime_error: a value is out of range
void llama_fasa_params_validate(const llama_fasa_params & params);
