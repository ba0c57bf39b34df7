#include "llama-fasa-context.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-fasa-graph.h"
#include "llama-fasa-profile.h"

#include "ggml-backend.h"

#include <algorithm>
#include <map>

llama_fasa_context::llama_fasa_context(std::shared_ptr<const llama_fasa_profile> profile) : profile(std::move(profile)) {
    if (this->profile) {
        set_params(this->profile->params);
    }
}

bool llama_fasa_context::is_prompt(const llama_ubatch & ubatch) const {
    if (reads_prompt) {
        return true;
    }
    std::map<llama_seq_id, uint32_t> n_tokens;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (++n_tokens[ubatch.seq_id[i][0]] > params.max_batch) {
            return true;
        }
    }
    return false;
}

//
// runs
//

llama_fasa_run::llama_fasa_run(llama_fasa_context & fasa, llama_cparams & cparams) : fasa(fasa) {
    if (fasa.begin_run()) {
        // without a profile and without capture the graph must not know of FASA at all
        cparams.fasa = fasa.profile || fasa.capture != 0 ? &fasa : nullptr;
        cparams.fasa_epoch++;
    }
}

bool llama_fasa_context::begin_run() {
    const std::lock_guard<std::mutex> lock(mutex);

    const bool is_changed = next_params || next_capture;

    if (next_params) {
        params = *next_params;
        if (params.policy != 0 && !other) {
            other = llama_fasa_make_chooser();
        }
        chooser().configure(params);
        next_params.reset();
    }
    if (next_capture) {
        capture = *next_capture;
        next_capture.reset();
    }
    reads_prompt = next_prompt; // a graph for the other is not used again, see llama_fasa_graph_input::can_reuse

    last_run   = nullptr; // its memory may be taken for other graphs
    is_running = true;

    return is_changed;
}

void llama_fasa_context::end_run() {
    const std::lock_guard<std::mutex> lock(mutex);
    is_running = false;
}

//
// settings
//

llama_fasa_params llama_fasa_context::get_params() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return next_params.value_or(params);
}

void llama_fasa_context::set_params(const llama_fasa_params & params) {
    const std::lock_guard<std::mutex> lock(mutex);
    next_params = params;
}

void llama_fasa_context::set_capture(uint32_t what) {
    const std::lock_guard<std::mutex> lock(mutex);
    next_capture = what;
}

void llama_fasa_context::set_prompt(bool prompt) {
    const std::lock_guard<std::mutex> lock(mutex);
    next_prompt = prompt;
}

//
// counters
//

void llama_fasa_context::count(const llama_fasa_stats & step) {
    const std::lock_guard<std::mutex> lock(mutex);

    stats.n_steps_prompt += step.n_steps_prompt;
    stats.n_steps_decode += step.n_steps_decode;
    for (int i = 0; i < LLAMA_FASA_REASON_COUNT; ++i) {
        stats.n_layers[i] += step.n_layers[i];
    }
    stats.n_layers_exact += step.n_layers_exact;
    stats.bytes_kv       += step.bytes_kv;
    stats.bytes_tips     += step.bytes_tips;
    stats.bytes_kv_dense += step.bytes_kv_dense;
}

llama_fasa_stats llama_fasa_context::get_stats() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return stats;
}

void llama_fasa_context::reset_stats() {
    const std::lock_guard<std::mutex> lock(mutex);
    stats = {};
}

//
// capture
//

llama_fasa_context::capture_status llama_fasa_context::get_capture(
        const llama_context & ctx, int32_t il, llama_fasa_capture which, int64_t ne[3], void * dst) const {
    const std::lock_guard<std::mutex> lock(mutex); // no run begins before the data is copied

    if (is_running) {
        return CAPTURE_STATUS_RUNNING;
    }
    const ggml_tensor * found = last_run ? last_run->get_captured(il, which) : nullptr;
    if (!found) {
        return CAPTURE_STATUS_NONE;
    }
    if (!dst) {
        std::copy_n(found->ne, 3, ne);
        return CAPTURE_STATUS_FOUND;
    }
    if (!std::equal(ne, ne + 3, found->ne)) {
        return CAPTURE_STATUS_CHANGED;
    }
    // a graph may go on after the run; not llama_context::synchronize, whose times are of the thread that decodes
    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(ctx.get_sched(), const_cast<ggml_tensor *>(found));
    ggml_backend_tensor_get_async(backend, found, dst, 0, ggml_nbytes(found));
    ggml_backend_synchronize(backend);

    return CAPTURE_STATUS_FOUND;
}

std::optional<llama_fasa_rope> llama_fasa_context::get_rope(int32_t il) const {
    const std::lock_guard<std::mutex> lock(mutex);

    if (is_running || !last_run) {
        return {};
    }
    const auto it = last_run->ropes.find(il);

    return it == last_run->ropes.end() ? std::nullopt : std::make_optional(it->second);
}
