#include "llama-fasa.h"

#include "llama-context.h"
#include "llama-fasa-context.h"
#include "llama-fasa-profile.h"
#include "llama-fasa-tips.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"
#include "llama-version.h"

#include <algorithm>
#include <iterator>
#include <string>

#if defined(_WIN32)
#    define WIN32_LEAN_AND_MEAN
#    include <windows.h>
#else
#    include <dlfcn.h>
#endif

//
// settings
//

bool llama_fasa_model_has_profile(const llama_model * model) {
    const auto profile = llama_fasa_profile_of(*model);

    return profile && profile->has_chunks;
}

const char * llama_fasa_model_override_report(const llama_model * model) {
    // a C string has to outlive the call, and the profile, should another thread load one
    static thread_local std::string res;
    const auto profile = llama_fasa_profile_of(*model);
    res = profile ? profile->override_report : "";

    return res.c_str();
}

bool llama_fasa_get_params(const llama_context * ctx, llama_fasa_params * params) {
    const auto & fasa = ctx->get_fasa();

    *params = fasa.get_params();

    return fasa.profile != nullptr;
}

bool llama_fasa_set_params(llama_context * ctx, const llama_fasa_params * params) {
    auto & fasa = ctx->get_fasa();

    if (!fasa.profile) {
        LLAMA_LOG_ERROR("%s: the model has no FASA profile\n", __func__);
        return false;
    }
    if (!fasa.profile->has_chunks && params->enabled) {
        LLAMA_LOG_ERROR("%s: enabled: the model has no FASA profile, it can only attend exactly\n", __func__);
        return false;
    }
    const auto & fixed = fasa.profile->params;
    if (params->n_tip != fixed.n_tip || params->n_dense_layers != fixed.n_dense_layers) {
        LLAMA_LOG_ERROR("%s: n_tip = %u and n_dense_layers = %u are fixed when the model is loaded, they cannot become %u and %u\n", __func__,
                fixed.n_tip, fixed.n_dense_layers, params->n_tip, params->n_dense_layers);
        return false;
    }
    try {
        llama_fasa_params_validate(*params);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return false;
    }

    fasa.set_params(*params);

    return true;
}

void llama_fasa_set_prompt(llama_context * ctx, bool prompt) {
    ctx->get_fasa().set_prompt(prompt);
}

//
// counters
//

static const struct {
    const char * name;
    const char * description;
} FASA_REASONS[] = {
    /* NONE           */ { "none",           "runs sparse" },
    /* DISABLED       */ { "disabled",       "FASA is switched off (fasa.enabled)" },
    /* PROMPT         */ { "prompt",         "a batch with more than fasa.max_batch tokens of one sequence is a prompt, and what the caller reads as one" },
    /* SHORT_CONTEXT  */ { "short_context",  "fewer cells than fasa.min_ctx (or less than twice the budget, or than where it pays on this GPU)" },
    /* DENSE_LAYER    */ { "dense_layer",    "one of the first fasa.n_dense_layers" },
    /* NO_CHUNKS      */ { "no_chunks",      "no chunks for the layer, or it reads the cache of another layer or context" },
    /* NO_KV_HEADS    */ { "no_kv_heads",    "the layer keeps no keys: it is recurrent, a convolution, or without attention" },
    /* MLA            */ { "mla",            "latent attention (MLA) keeps no keys of heads" },
    /* SLIDING_WINDOW */ { "sliding_window", "sliding-window attention is short already" },
    /* FLASH_ATTN_OFF */ { "flash_attn_off", "flash attention is off, so V is transposed" },
    /* BACKEND        */ { "backend",        "the device that holds the layer's K does not support the FASA ops on it" },
    /* STALE_TIPS     */ { "stale_tips",     "the tips could not be made again after K changed (see the log)" },
    /* NON_CAUSAL     */ { "non_causal",     "attention is not causal" },
    /* ATTN_BIAS      */ { "attn_bias",      "attention has a bias on its logits (ALiBi or other)" },
    /* POLICY         */ { "policy",         "fasa.policy, who is to choose in place of FASA, cannot do so for the layer (llama-fasa-eval.h says when)" },
};

static_assert(sizeof(FASA_REASONS)/sizeof(FASA_REASONS[0]) == LLAMA_FASA_REASON_COUNT, "every reason has a row");

const char * llama_fasa_reason_name(llama_fasa_reason reason) {
    return reason >= 0 && reason < LLAMA_FASA_REASON_COUNT ? FASA_REASONS[reason].name : nullptr;
}

const char * llama_fasa_reason_description(llama_fasa_reason reason) {
    return reason >= 0 && reason < LLAMA_FASA_REASON_COUNT ? FASA_REASONS[reason].description : nullptr;
}

void llama_fasa_get_stats(const llama_context * ctx, llama_fasa_stats * stats) {
    *stats = ctx->get_fasa().get_stats();
}

void llama_fasa_reset_stats(llama_context * ctx) {
    ctx->get_fasa().reset_stats();
}

// nullptr: no layer has tips
static const llama_fasa_tips * fasa_get_tips(const llama_context * ctx) {
    auto * memory = ctx->get_memory();

    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        memory = hybrid->get_mem_attn();
    }
    if (auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        memory = hybrid_iswa->get_mem_attn();
    }
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        memory = iswa->get_base();
    }

    const auto * kv = dynamic_cast<llama_kv_cache *>(memory);

    return kv ? llama_fasa_tips::of(kv->get_listener()) : nullptr;
}

size_t llama_fasa_tips_size(const llama_context * ctx) {
    const auto * tips = fasa_get_tips(ctx);

    return tips ? tips->size() : 0;
}

uint32_t llama_fasa_min_ctx(const llama_context * ctx) {
    const auto * tips = fasa_get_tips(ctx);

    return tips ? tips->get_min_ctx(ctx->get_fasa().get_params()) : 0;
}

//
// memory
//

bool llama_fasa_get_memory(const llama_context * ctx, int32_t i, llama_fasa_memory * memory) {
    const auto breakdown = ctx->memory_breakdown();
    if (i < 0 || i >= (int32_t) breakdown.size()) {
        return false;
    }
    const auto & [buft, bytes] = *std::next(breakdown.begin(), i);

    // the CPU's buffer type may have none
    auto * dev = ggml_backend_buft_get_device(buft);
    auto * cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev ? dev : cpu, &props);

    const bool takes_pages = props.caps.buffer_from_host_ptr;
    const bool is_device   = dev && props.type != GGML_BACKEND_DEVICE_TYPE_CPU && props.type != GGML_BACKEND_DEVICE_TYPE_ACCEL &&
                             !ggml_backend_buft_is_host(buft);

    memory->device  = is_device && props.memory_total > 0 ? dev : nullptr; // as in load_tensors, which takes the host's for one that says nothing
    memory->is_host = !memory->device || takes_pages || props.type == GGML_BACKEND_DEVICE_TYPE_IGPU;
    memory->can_map = is_device ? takes_pages && buft == ggml_backend_dev_buffer_type(dev) : ggml_backend_buft_is_host(buft);
    memory->model   = bytes.model;
    memory->context = bytes.context;
    memory->compute = bytes.compute;

    return true;
}

//
// calibration
//

bool llama_fasa_get_layer(const llama_model * model, int32_t il, llama_fasa_layer * layer) {
    if (il < 0 || il >= (int32_t) model->hparams.n_layer_all) {
        return false;
    }
    *layer = llama_fasa_model_layer(*model, il);

    return true;
}

const char * llama_fasa_fingerprint(const llama_model * model) {
    // a C string has to outlive the call
    static thread_local std::string res;
    res = llama_fasa_model_fingerprint(*model);

    return res.c_str();
}

void llama_fasa_set_capture(llama_context * ctx, uint32_t what) {
    ctx->get_fasa().set_capture(what);
}

int32_t llama_fasa_get_capture(llama_context * ctx, int32_t il, llama_fasa_capture which, int64_t ne[3], void * dst) {
    switch (ctx->get_fasa().get_capture(*ctx, il, which, ne, dst)) {
        case llama_fasa_context::CAPTURE_STATUS_FOUND:
            return 1;
        case llama_fasa_context::CAPTURE_STATUS_NONE:
            return 0;
        case llama_fasa_context::CAPTURE_STATUS_RUNNING:
            LLAMA_LOG_ERROR("%s: llama_decode or llama_encode is running: ask when it has returned\n", __func__);
            return -1;
        case llama_fasa_context::CAPTURE_STATUS_CHANGED:
            LLAMA_LOG_ERROR("%s: the shape of layer %d is another by now: ask for it again\n", __func__, il);
            return -1;
    }
    return 0;
}

//
// build
//

// the file that holds a function, as the loader resolved it
static std::string fasa_path_of(const void * function) {
#if defined(_WIN32)
    HMODULE module = nullptr;
    char    path[MAX_PATH] = "";
    if (GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT, (LPCSTR) function, &module)) {
        GetModuleFileNameA(module, path, sizeof(path));
    }
    return path;
#else
    Dl_info info;
    return dladdr(function, &info) && info.dli_fname ? info.dli_fname : "";
#endif
}

llama_fasa_build llama_fasa_get_build(void) {
    static const std::string llama_path = fasa_path_of((const void *) &llama_fasa_get_build);
    static const std::string ggml_path  = fasa_path_of((const void *) &ggml_init);

    llama_fasa_build build = {};

    build.llama_commit          = LLAMA_COMMIT;
    build.ggml_base_path        = ggml_path.c_str();
    build.llama_path            = llama_path.c_str();
    build.sizeof_model_params   = sizeof(llama_model_params);
    build.sizeof_context_params = sizeof(llama_context_params);
    build.sizeof_batch          = sizeof(llama_batch);
    build.sizeof_kv_override    = sizeof(llama_model_kv_override);
    build.sizeof_fasa_params    = sizeof(llama_fasa_params);
    build.sizeof_fasa_stats     = sizeof(llama_fasa_stats);
    build.sizeof_fasa_memory    = sizeof(llama_fasa_memory);
    build.sizeof_fasa_layer     = sizeof(llama_fasa_layer);

    return build;
}
