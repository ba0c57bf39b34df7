// FASA in the programs: their options, and what these make of a model.

#pragma once

#include "arg.h"
#include "common.h"

#include <functional>
#include <string>
#include <vector>

// --fasa, --fasa-budget, --fasa-profile
void common_fasa_add_options(const std::function<void(common_arg)> & add_opt);

// before a model gets contexts: gives it the profile that was asked for
// false: it does not fit the model (the log says why)
bool common_fasa_load_profile(llama_model * model, const common_params & params);

// says what was asked for and has no effect
void common_fasa_warn(const llama_context * ctx, const common_params & params);

// a test of llama-bench, which has options of its own
struct common_fasa_test {
    std::string mode;        // off, on or exact; "": as the model is
    int         budget = -1; // -1: the profile's
};

bool common_fasa_is_mode(const std::string & mode);

// every mode with every budget; a budget of 0 is off, and off is one test
std::vector<common_fasa_test> common_fasa_tests(const std::vector<std::string> & modes, const std::vector<int> & budgets);

// what a model is loaded with for them: overrides, and a profile for common_fasa_load_profile
common_params common_fasa_params(const std::vector<common_fasa_test> & tests, const std::string & profile);

// false: the model has no profile, or the budget is out of range (the log says which)
bool common_fasa_apply(llama_context * ctx, const common_fasa_test & test);

// what is in force; budget 0: FASA is off, or the model has no profile
common_fasa_test common_fasa_applied(const llama_context * ctx);
