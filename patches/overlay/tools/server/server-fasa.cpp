#include "server-fasa.h"

#include <sstream>
#include <stdexcept>

using json = common_json;

//
// server_fasa_stats
//

static void fasa_add(uint64_t & sum, uint64_t n) { sum += n; }

// each counter of one with that of another
template <typename F>
static void fasa_each(llama_fasa_stats & a, const llama_fasa_stats & b, F f) {
    f(a.n_steps_prompt, b.n_steps_prompt);
    f(a.n_steps_decode, b.n_steps_decode);
    for (int i = 0; i < LLAMA_FASA_REASON_COUNT; ++i) {
        f(a.n_layers[i], b.n_layers[i]);
    }
    f(a.n_layers_exact, b.n_layers_exact);
    f(a.bytes_kv,       b.bytes_kv);
    f(a.bytes_tips,     b.bytes_tips);
    f(a.bytes_kv_dense, b.bytes_kv_dense);
}

void server_fasa_stats::add(const server_fasa_steps & steps) {
    fasa_each(sum, steps.stats, fasa_add);
    budget = steps.budget;
}

bool server_fasa_stats::empty() const {
    return !is_shown && sum.n_steps_prompt + sum.n_steps_decode == 0;
}

static double fasa_read_ratio(const llama_fasa_stats & sum) {
    return sum.bytes_kv_dense > 0 ? double(sum.bytes_kv + sum.bytes_tips)/sum.bytes_kv_dense : 1.0;
}

json server_fasa_stats::to_json() const {
    json dense = json::object();
    for (int i = 0; i < LLAMA_FASA_REASON_COUNT; ++i) {
        if (i != LLAMA_FASA_REASON_NONE && sum.n_layers[i] > 0) {
            dense[llama_fasa_reason_name(llama_fasa_reason(i))] = sum.n_layers[i];
        }
    }
    return json {
        {"n_steps_prompt",  sum.n_steps_prompt},
        {"n_steps_decode",  sum.n_steps_decode},
        {"n_layers_sparse", sum.n_layers[LLAMA_FASA_REASON_NONE]},
        {"n_layers_dense",  dense},
        {"n_layers_exact",  sum.n_layers_exact},
        {"bytes_kv",        sum.bytes_kv},
        {"bytes_tips",      sum.bytes_tips},
        {"bytes_kv_dense",  sum.bytes_kv_dense},
        {"read_ratio",      fasa_read_ratio(sum)},
        {"budget",          budget},
    };
}

void server_fasa_stats::add_to_timings(json & timings) const {
    json counters = to_json();
    for (const auto & [name, value] : counters.items()) {
        if (!value.is_object()) {
            timings["fasa_" + name] = value;
            continue;
        }
        for (const auto & [reason, n] : value.items()) {
            timings["fasa_" + name + "_" + reason] = n;
        }
    }
}

std::string server_fasa_stats::to_metrics() const {
    std::stringstream res;

    auto describe = [&](const char * name, const char * type, const char * description) {
        res << "# HELP llamacpp:" << name << " " << description << "\n"
            << "# TYPE llamacpp:" << name << " " << type        << "\n";
    };
    auto sample = [&](const char * name, const char * label, const char * value, auto n) {
        res << "llamacpp:" << name << "{" << label << "=\"" << value << "\"} " << n << "\n";
    };

    describe("fasa_steps_total", "counter", "FASA: micro-batches");
    sample("fasa_steps_total", "kind", "prompt", sum.n_steps_prompt);
    sample("fasa_steps_total", "kind", "decode", sum.n_steps_decode);

    describe("fasa_layers_sparse_total", "counter", "FASA: layers that ran sparse, summed over micro-batches");
    res << "llamacpp:fasa_layers_sparse_total " << sum.n_layers[LLAMA_FASA_REASON_NONE] << "\n";

    describe("fasa_layers_dense_total", "counter", "FASA: layers that ran dense, summed over micro-batches, by reason");
    for (int i = 0; i < LLAMA_FASA_REASON_COUNT; ++i) {
        if (i != LLAMA_FASA_REASON_NONE) {
            sample("fasa_layers_dense_total", "reason", llama_fasa_reason_name(llama_fasa_reason(i)), sum.n_layers[i]);
        }
    }
    describe("fasa_layers_exact_total", "counter", "FASA: of the dense layers, those that FASA's kernels attended to");
    res << "llamacpp:fasa_layers_exact_total " << sum.n_layers_exact << "\n";

    describe("fasa_read_bytes_total", "counter", "FASA: bytes that attention read for decoded tokens");
    sample("fasa_read_bytes_total", "of", "kv",   sum.bytes_kv);
    sample("fasa_read_bytes_total", "of", "tips", sum.bytes_tips);

    describe("fasa_dense_bytes_total", "counter", "FASA: bytes that attention would have read, had all layers run dense");
    res << "llamacpp:fasa_dense_bytes_total " << sum.bytes_kv_dense << "\n";

    return res.str();
}

//
// server_fasa
//

bool server_fasa::init(llama_context * ctx_of_model) {
    ctx         = ctx_of_model;
    has_profile = llama_fasa_model_has_profile(llama_get_model(ctx));
    has_params  = llama_fasa_get_params(ctx, &params);
    turn        = defaults();
    applied     = turn;

    return has_params;
}

server_fasa_request server_fasa::defaults() const {
    server_fasa_request res;
    res.budget  = has_profile ? params.budget : 0;
    res.enabled = has_profile && params.enabled;
    return res;
}

std::string server_fasa::complete(server_fasa_request & request) const {
    if (!has_profile && (request.budget > 0 || request.enabled > 0)) {
        return "fasa_budget and fasa_enabled: the model has no FASA profile; make one with `fasa-edge convert`";
    }
    const auto own = defaults();
    if (request.budget == 0) {
        request.budget = own.budget;
    }
    if (request.enabled == -1) {
        request.enabled = own.enabled;
    }
    const uint64_t n_always = uint64_t(params.n_sink) + params.n_recent;
    if (has_profile && n_always > uint64_t(request.budget)) {
        return "fasa_budget = " + std::to_string(request.budget) + " is below the " + std::to_string(params.n_sink) + " first and " +
            std::to_string(params.n_recent) + " last tokens that are always attended to: choose " + std::to_string(n_always) + " or more";
    }
    return "";
}

void server_fasa::begin(bool is_prompt) {
    if (!has_params) {
        return;
    }
    if (has_profile && turn != applied) {
        auto wanted = params;
        wanted.budget  = turn.budget;
        wanted.enabled = turn.enabled != 0;
        if (!llama_fasa_set_params(ctx, &wanted)) {
            throw std::runtime_error("the FASA settings of a request were refused"); // server_fasa::complete let them pass
        }
        applied = turn;
    }
    llama_fasa_set_prompt(ctx, is_prompt);
    llama_fasa_get_stats(ctx, &before);
}

server_fasa_steps server_fasa::end() {
    server_fasa_steps res;
    if (has_params) {
        llama_fasa_get_stats(ctx, &res.stats);
        fasa_each(res.stats, before, [](uint64_t & now, uint64_t then) { now -= then; });
        res.budget = applied.enabled ? applied.budget : 0;
    }
    return res;
}

json server_fasa::settings() const {
    if (!has_params) {
        return json();
    }
    return json {
        {"profile",        has_profile},
        {"enabled",        params.enabled},
        {"exact",          params.exact},
        {"budget",         params.budget},
        {"budget_ctx",     params.budget_ctx},
        {"n_sink",         params.n_sink},
        {"n_recent",       params.n_recent},
        {"min_ctx",        llama_fasa_min_ctx(ctx)},
        {"max_batch",      params.max_batch},
        {"n_tip",          params.n_tip},
        {"n_dense_layers", params.n_dense_layers},
        {"select",         llama_fasa_select_name(params.select)},
        {"tips_size",      llama_fasa_tips_size(ctx)},
    };
}
