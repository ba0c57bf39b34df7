// FASA in the programs: their options, and what these make of a model.

#pragma once

#include "arg.h"
#include "common.h"

#include <functional>

// --fasa, --fasa-budget, --fasa-profile
void common_fasa_add_options(const std::function<void(common_arg)> & add_opt);

// before a model gets contexts: gives it the profile that was asked for
// false: it does not fit the model (the log says why)
bool common_fasa_load_profile(llama_model * model, const common_params & params);

// says what was asked for and has no effect
void common_fasa_warn(const llama_context * ctx, const common_params & params);

// cells that a decoded token attends to; 0: all, FASA is off or the model has no profile
int  common_fasa_budget    (const llama_context * ctx);
bool common_fasa_set_budget(llama_context * ctx, int budget); // -1: as it is; false: no profile, or out of range (the log says why)
