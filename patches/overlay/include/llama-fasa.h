// FASA (Frequency-Aware Sparse Attention, arXiv 2602.03152) in llama.cpp: settings, counters and calibration.
//
// A model whose GGUF carries `fasa.*` metadata decodes sparsely without any call from here; without that metadata, or a
// profile loaded beside it, the library is stock llama.cpp.

#pragma once

#include "llama.h"

// C++ may assume that an enum holds one of its enumerators, unless its underlying type is given: then any number that
// comes through this API can be looked at, and refused
#ifdef __cplusplus
#    define LLAMA_FASA_ENUM(name) enum name : int
#else
#    define LLAMA_FASA_ENUM(name) enum name
#endif

#ifdef __cplusplus
extern "C" {
#endif

    //
    // threads
    //

    // Settings, counters and captures may be asked for, set and reset from any thread at any time, also while another one
    // is in llama_decode or llama_encode, as long as the context lives. What is set waits for the next of these; of what is
    // captured, nothing is given meanwhile. Another profile may be given to a model while contexts of it decode, but not
    // while one is made. All else is as in llama.h, where a context is of one thread at a time.

    //
    // settings
    //

    // who chooses
    LLAMA_FASA_ENUM(llama_fasa_select_type) {
        LLAMA_FASA_SELECT_TYPE_GROUP, // each KV head, for all query heads that read it
        LLAMA_FASA_SELECT_TYPE_HEAD,  // each query head
        LLAMA_FASA_SELECT_TYPE_COUNT,
    };

    // as in fasa.select; NULL: no such thing
    LLAMA_API const char * llama_fasa_select_name(enum llama_fasa_select_type select);

    // defaults come from the metadata `fasa.<field>`, which --override-kv can replace at load
    struct llama_fasa_params {
        bool     enabled;
        bool     exact;          // what stays dense on the CPU, prompts as well, is attended to with FASA's kernels, all cells
        uint32_t budget;         // cells that a decoded token attends to in each layer, of up to budget_ctx, sinks and recent ones included (N_fac)
        uint32_t budget_ctx;     // cells that the budget is for: with n times as many it grows by sqrt(n); 0: it never grows
        uint32_t n_sink;         // first tokens of the sequence, always attended to
        uint32_t n_recent;       // last tokens of the sequence, always attended to
        uint32_t min_ctx;        // sparse from this many cells on; 0: from where the budget is half of them, on a GPU from where it is faster on
        uint32_t max_batch;      // a batch with more tokens of one sequence is a prompt and runs dense
        uint32_t n_tip;          // chunks scored per KV head (N_tip)                  fixed when the model is loaded
        uint32_t n_dense_layers; // the first layers, which never run sparse           fixed when the model is loaded

        enum llama_fasa_select_type select;

        uint32_t prompt_mass;    // thousandths of their attention, by the tips, that the tokens of a prompt are left with, on the CPU; 1000: all

        int32_t policy; // which cells a head attends to, 0: as FASA says; others: of a library for evaluation, see llama-fasa-eval.h;
                        // never in the metadata, only an override
    };

    LLAMA_API bool llama_fasa_model_has_profile(const struct llama_model * model);

    // gives a model the profile in another GGUF file, in place of its own; contexts that are there keep theirs
    // overrides: as in llama_model_params, may be NULL; fasa.version is left out, so that those of the model can be given
    //            again: with fasa.version = 0 a model loads even if its own metadata is damaged
    // false: the file is damaged, or its profile of another model (the log says which); the model stays as it was
    LLAMA_API bool llama_fasa_model_load_profile(
            struct llama_model * model,
            const char * path,
            const struct llama_model_kv_override * overrides);

    // `fasa.*` overrides that had no effect, one line each; "" when all had one; until another profile is loaded
    LLAMA_API const char * llama_fasa_model_override_report(const struct llama_model * model);

    // false: the model has no profile, and was not loaded with the override fasa.exact = true either
    LLAMA_API bool llama_fasa_get_params(const struct llama_context * ctx, struct llama_fasa_params * params);

    // takes effect with the next llama_decode; llama_fasa_get_params gives it at once
    // false: no settings, a value out of range, or a field that is fixed when the model is loaded (the log says which)
    LLAMA_API bool llama_fasa_set_params(struct llama_context * ctx, const struct llama_fasa_params * params);

    // true: from the next llama_decode on every batch is a prompt, however short: the caller knows that these are the last
    // tokens of one; false: again a batch of more than max_batch tokens of one sequence alone
    LLAMA_API void llama_fasa_set_prompt(struct llama_context * ctx, bool prompt);

    //
    // counters
    //

    // why a layer did not run sparse
    LLAMA_FASA_ENUM(llama_fasa_reason) {
        LLAMA_FASA_REASON_NONE, // it ran sparse
        LLAMA_FASA_REASON_DISABLED,
        LLAMA_FASA_REASON_PROMPT,
        LLAMA_FASA_REASON_SHORT_CONTEXT,
        LLAMA_FASA_REASON_DENSE_LAYER,
        LLAMA_FASA_REASON_NO_CHUNKS,
        LLAMA_FASA_REASON_NO_KV_HEADS,
        LLAMA_FASA_REASON_MLA,
        LLAMA_FASA_REASON_SLIDING_WINDOW,
        LLAMA_FASA_REASON_FLASH_ATTN_OFF,
        LLAMA_FASA_REASON_BACKEND,
        LLAMA_FASA_REASON_STALE_TIPS,
        LLAMA_FASA_REASON_NON_CAUSAL,
        LLAMA_FASA_REASON_ATTN_BIAS,
        LLAMA_FASA_REASON_POLICY,
        LLAMA_FASA_REASON_COUNT,
    };

    // NULL: no such reason
    LLAMA_API const char * llama_fasa_reason_name       (enum llama_fasa_reason reason);
    LLAMA_API const char * llama_fasa_reason_description(enum llama_fasa_reason reason);

    // sums since the context was made or reset
    // a step is one micro-batch; bytes are counted for decode steps and full-attention layers only: every K and V row
    // that the attention of a token touches, for each token
    struct llama_fasa_stats {
        uint64_t n_steps_prompt;
        uint64_t n_steps_decode;
        uint64_t n_layers[LLAMA_FASA_REASON_COUNT]; // layers run, by reason; [NONE]: sparse
        uint64_t n_layers_exact;                    // of the dense ones, those that FASA's kernel attended to

        uint64_t bytes_kv;       // of K and V, sparse and dense layers together
        uint64_t bytes_tips;     // of the tip cache
        uint64_t bytes_kv_dense; // of K and V, had all layers run dense
    };

    LLAMA_API void   llama_fasa_get_stats  (const struct llama_context * ctx, struct llama_fasa_stats * stats);
    LLAMA_API void   llama_fasa_reset_stats(struct llama_context * ctx);
    LLAMA_API size_t llama_fasa_tips_size  (const struct llama_context * ctx); // bytes

    // cells from which on the first layers run sparse, with the settings as they are; 0: no layer ever does
    LLAMA_API uint32_t llama_fasa_min_ctx(const struct llama_context * ctx);

    //
    // memory
    //

    // what a context and its model take of one kind of memory, in bytes; with no_alloc: what they would take
    struct llama_fasa_memory {
        ggml_backend_dev_t device;  // whose memory it is; NULL: the host's
        bool               is_host; // of the host: of the CPU, pinned, or of a device that shares the host's
        bool               can_map; // weights in it stay in the mapped file, where load_mode maps it

        size_t model;   // weights
        size_t context; // KV cache and tips, recurrent states, ...
        size_t compute;
    };

    // false: fewer kinds than i + 1
    LLAMA_API bool llama_fasa_get_memory(const struct llama_context * ctx, int32_t i, struct llama_fasa_memory * memory);

    //
    // calibration and evaluation
    //

    // one layer as FASA sees it
    struct llama_fasa_layer {
        int32_t n_head;      // query heads
        int32_t n_head_kv;   // KV heads with a K cache of their own; 0: none (recurrent, MLA, or the cache of another layer)
        int32_t n_embd_head; // dims of a K head
        int32_t n_rot;       // dims that RoPE turns; 0: none
        int32_t rope_type;   // enum llama_rope_type; NONE with ALiBi, whatever the architecture
        bool    is_swa;
    };

    // false: no such layer
    LLAMA_API bool llama_fasa_get_layer(const struct llama_model * model, int32_t il, struct llama_fasa_layer * layer);

    // the two dims that chunk i of a head turns, RoPE planes first, then pairs of the dims that it leaves alone
    // false: no such chunk, a RoPE type whose planes FASA does not know, or an n_rot that does not fit the head
    LLAMA_API bool llama_fasa_chunk_dims(const struct llama_fasa_layer * layer, int32_t chunk, int32_t dims[2]);

    // architecture and head geometry in one line: a profile belongs to the models that share it
    LLAMA_API const char * llama_fasa_fingerprint(const struct llama_model * model);

    // what can be kept of the last micro-batch
    LLAMA_FASA_ENUM(llama_fasa_capture) {
        LLAMA_FASA_CAPTURE_Q     = 1, // F32 [n_embd_head, n_head,    n_tokens] as it enters the attention: after RoPE,
        LLAMA_FASA_CAPTURE_K     = 2, // F32 [n_embd_head, n_head_kv, n_tokens] before any Hadamard rotation
        LLAMA_FASA_CAPTURE_CELLS = 4, // I32 [n_list, n_head_kv or n_head, n_tokens] chosen cells, -1: none; sparse layers
        LLAMA_FASA_CAPTURE_MASS  = 8, // F32 [1, n_head, n_tokens] attention weight that these hold of 1;    sparse layers,
                                      //     on the CPU and slowly
    };

    // what: LLAMA_FASA_CAPTURE_*, or'ed; 0: nothing; from the next llama_decode on
    LLAMA_API void llama_fasa_set_capture(struct llama_context * ctx, uint32_t what);

    // of one layer; dst NULL: gives its shape, else takes the shape for which dst has room, and copies
    //  1: it is there
    //  0: it was not captured
    // -1: refused, since llama_decode or llama_encode is running, or the shape has become another one (the log says which)
    LLAMA_API int32_t llama_fasa_get_capture(struct llama_context * ctx, int32_t il, enum llama_fasa_capture which, int64_t ne[3], void * dst);

    // by how many radians one position turns each chunk of a head, F32 [n_embd_head/2], in (-pi, pi]: 0 where RoPE leaves
    // the chunk alone, or its two dims do not turn as one. Computed by ggml's RoPE as the last run applied it to the layer's
    // keys, which must have been captured: base, scale, frequency factors, YaRN. n_ctx: with the factors of a context of
    // that many cells, where they depend on it; 0: of this one
    // false: no such layer or capture, llama_decode is running, or RoPE failed (the log says which)
    LLAMA_API bool llama_fasa_get_angles(const struct llama_context * ctx, int32_t il, uint32_t n_ctx, float * angles);

    //
    // build
    //

    struct llama_fasa_build {
        const char * llama_commit;     // of the llama.cpp that was patched
        const char * ggml_base_path;   // the library that libllama's calls to ggml really reach
        const char * llama_path;       // this library
        size_t sizeof_model_params;    // sizes of the structs that bindings mirror
        size_t sizeof_context_params;
        size_t sizeof_batch;
        size_t sizeof_kv_override;
        size_t sizeof_fasa_params;
        size_t sizeof_fasa_stats;
        size_t sizeof_fasa_memory;
        size_t sizeof_fasa_layer;
    };

    LLAMA_API struct llama_fasa_build llama_fasa_get_build(void);

#ifdef __cplusplus
}
#endif
