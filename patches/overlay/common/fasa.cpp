#include "fasa.h"

#include "llama-fasa.h"
#include "log.h"

#include <algorithm>
#include <cstring>

static llama_model_kv_override & fasa_override(common_params & params, const char * key, llama_model_kv_override_type tag) {
    auto & overrides = params.kv_overrides;

    // of an option that is given twice the last counts
    auto it = std::find_if(overrides.begin(), overrides.end(), [&](const auto & kvo) { return strcmp(kvo.key, key) == 0; });
    if (it == overrides.end()) {
        it = overrides.insert(overrides.end(), llama_model_kv_override{});
        strncpy(it->key, key, sizeof(it->key) - 1);
    }
    it->tag = tag;
    return *it;
}

static void fasa_override(common_params & params, const char * key, bool value) {
    fasa_override(params, key, LLAMA_KV_OVERRIDE_TYPE_BOOL).val_bool = value;
}

static void fasa_use_profile(common_params & params, const std::string & path) {
    params.fasa_profile = path;
    // the model's own is left out, whatever its state
    fasa_override(params, "fasa.version", LLAMA_KV_OVERRIDE_TYPE_INT).val_i64 = 0;
}

bool common_fasa_is_mode(const std::string & mode) {
    return mode == "off" || mode == "on" || mode == "exact";
}

void common_fasa_add_options(const std::function<void(common_arg)> & add_opt) {
    add_opt(common_arg(
        {"--fasa"}, "off|on|exact",
        "sparse attention of a model that carries a FASA profile; exact: what stays dense on the CPU, prompts as well, is attended "
        "to with FASA's kernels, all cells (default: on, with a profile)",
        [](common_params & params, const std::string & value) {
            if (!common_fasa_is_mode(value)) {
                throw std::invalid_argument("error: --fasa " + value + ": choose off, on or exact\n");
            }
            fasa_override(params, "fasa.enabled", value != "off");
            const bool is_given = std::any_of(params.kv_overrides.begin(), params.kv_overrides.end(), [](const auto & ovrd) {
                return strcmp(ovrd.key, "fasa.exact") == 0; // by the environment, or by this option before
            });
            if (value == "exact" || is_given) {
                fasa_override(params, "fasa.exact", value == "exact");
            }
        }
    ).set_env("LLAMA_ARG_FASA"));
    add_opt(common_arg(
        {"--fasa-budget"}, "N",
        "cells that a decoded token attends to in each sparse layer, of up to fasa.budget_ctx in use, sinks and recent ones included (default: the profile's)",
        [](common_params & params, int value) {
            if (value < 1) {
                throw std::invalid_argument("error: --fasa-budget " + std::to_string(value) + ": choose 1 or more\n");
            }
            fasa_override(params, "fasa.budget", LLAMA_KV_OVERRIDE_TYPE_INT).val_i64 = value;
        }
    ).set_env("LLAMA_ARG_FASA_BUDGET"));
    add_opt(common_arg(
        {"--fasa-profile"}, "FNAME",
        "FASA profile in place of the model's own, made with `fasa-edge convert --profile`",
        [](common_params & params, const std::string & value) {
            fasa_use_profile(params, value);
        }
    ).set_env("LLAMA_ARG_FASA_PROFILE"));
}

bool common_fasa_load_profile(llama_model * model, const common_params & params) {
    if (params.fasa_profile.empty()) {
        return true;
    }
    const auto * overrides = params.kv_overrides.empty() ? nullptr : params.kv_overrides.data();
    if (!llama_fasa_model_load_profile(model, params.fasa_profile.c_str(), overrides)) {
        LOG_ERR("%s: --fasa-profile %s is no profile of this model\n", __func__, params.fasa_profile.c_str());
        return false;
    }
    return true;
}

void common_fasa_warn(const llama_context * ctx, const common_params & params) {
    const auto * model = llama_get_model(ctx);

    if (!llama_fasa_model_has_profile(model)) {
        for (const auto & kvo : params.kv_overrides) {
            // FASA's kernels take all cells without a profile, and false asks for what is so anyway
            const bool has_effect = strcmp(kvo.key, "fasa.exact") == 0 || strcmp(kvo.key, "fasa.version") == 0 ||
                (kvo.tag == LLAMA_KV_OVERRIDE_TYPE_BOOL && !kvo.val_bool);
            if (strncmp(kvo.key, "fasa.", 5) == 0 && !has_effect) {
                LOG_WRN("%s: %s has no effect: the model has no FASA profile; make one with `fasa-edge convert`\n", __func__, kvo.key);
            }
        }
        return;
    }
    const std::string report = llama_fasa_model_override_report(model);
    if (!report.empty()) {
        LOG_WRN("%s: overrides without effect: %s\n", __func__, report.c_str());
    }
    llama_fasa_params fasa;
    if (llama_fasa_get_params(ctx, &fasa) && fasa.enabled && llama_fasa_min_ctx(ctx) == 0) {
        LOG_WRN("%s: the model carries a FASA profile, but will run dense: %s\n", __func__,
                params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED
                    ? "FASA needs flash attention; leave out -fa off"
                    : "no layer of it, or no device, can run sparse; a response's timings say why");
    }
}

std::vector<common_fasa_test> common_fasa_tests(const std::vector<std::string> & modes, const std::vector<int> & budgets) {
    std::vector<common_fasa_test> res;
    bool has_off = false;
    for (const auto & mode : modes) {
        for (const int budget : budgets) {
            const bool is_off = mode == "off" || budget == 0;
            if (!is_off) {
                res.push_back({ mode, budget });
            } else if (!has_off) {
                res.push_back({ "off", -1 });
                has_off = true;
            }
        }
    }
    return res;
}

common_params common_fasa_params(const std::vector<common_fasa_test> & tests, const std::string & profile) {
    common_params res;
    if (!profile.empty()) {
        fasa_use_profile(res, profile);
    }
    // without a profile this is of the model's loading, with one it is set for each test
    if (std::any_of(tests.begin(), tests.end(), [](const auto & test) { return test.mode == "exact"; })) {
        fasa_override(res, "fasa.exact", true);
    }
    res.kv_overrides.emplace_back().key[0] = 0;
    return res;
}

bool common_fasa_apply(llama_context * ctx, const common_fasa_test & test) {
    const bool has_profile = llama_fasa_model_has_profile(llama_get_model(ctx));
    llama_fasa_params fasa;
    if (!llama_fasa_get_params(ctx, &fasa)) {
        return test.budget == -1; // dense, whatever the mode
    }
    if (!test.mode.empty()) {
        fasa.enabled = has_profile && test.mode != "off";
        fasa.exact   = test.mode == "exact";
    }
    if (test.budget != -1) {
        fasa.enabled    = true;
        fasa.budget     = test.budget;
        fasa.budget_ctx = 0; // it is what is measured
    }
    return llama_fasa_set_params(ctx, &fasa);
}

common_fasa_test common_fasa_applied(const llama_context * ctx) {
    llama_fasa_params fasa;
    if (!llama_fasa_get_params(ctx, &fasa)) {
        return { "off", 0 };
    }
    return { fasa.exact ? "exact" : fasa.enabled ? "on" : "off", fasa.enabled ? int(fasa.budget) : 0 };
}
