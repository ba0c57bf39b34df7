#pragma once

#include "llama-fasa.h"

#include "ggml-fasa.h"

#include <algorithm>
#include <memory>

struct llama_ubatch;

// one sparse layer of a graph under construction, as ggml_fasa_select and ggml_fasa_attend take it
struct llama_fasa_chooser_args {
    ggml_context * ctx;

    int32_t          il;
    llama_fasa_layer layer;

    ggml_tensor * q;      // F32 [n_embd_head, n_head, n_tokens, n_stream] after RoPE
    ggml_tensor * q_rot;  // the same, with the Hadamard rotation that K has in the cache, if any
    ggml_tensor * k;      //     [n_embd_head, n_head_kv, n_kv, n_stream] of the cache
    ggml_tensor * tips;
    ggml_tensor * dims;
    ggml_tensor * ranges;
    ggml_tensor * mask;
    ggml_tensor * forced; // nullptr: none

    int64_t n_head_sel; // heads that choose: n_head_kv, or n_head
    int64_t n_fac;
    float   scale;
    float   softcap; // 0: none
};

// Which cells a head attends to in one context. This is FASA's answer; another library may give others in its place.
// Inline, so that such a library needs nothing of libllama but what is exported.
class llama_fasa_chooser {
public:
    virtual ~llama_fasa_chooser() = default;

    // the settings of the runs that follow, params.policy among them
    virtual void configure(const llama_fasa_params & /*params*/) {}

    // whether it can choose for a layer and this micro-batch; asked before build
    virtual bool is_supported(const llama_fasa_chooser_args & /*args*/, const llama_ubatch & /*ubatch*/) const { return true; }

    // I32 [n_list, n_head_sel, n_tokens, n_stream]: ids within the stream, ascending, each once, then -1
    virtual ggml_tensor * build(const llama_fasa_chooser_args & args) {
        return ggml_fasa_select(args.ctx, args.q, args.tips, args.dims, args.ranges, args.mask, args.forced, args.n_head_sel, args.n_fac, args.scale);
    }

    // cells that a head attends to out of n_visible
    virtual int64_t n_kept(int64_t n_visible, int64_t n_fac) const { return std::min(n_visible, n_fac); }

    //
    // the attention of prompts, for those who choose by it
    //

    virtual bool observes() const { return false; }

    // what looks at a layer of a prompt while it runs
    //   q:       F32 [n_embd_head, n_head, n_tokens, 1], as the K cache is rotated
    //   weights: F32 [n_kv, n_tokens, n_head, 1]
    virtual ggml_tensor * observe(ggml_context * /*ctx*/, int32_t /*il*/, ggml_tensor * /*q*/, ggml_tensor * weights, ggml_tensor * /*mask*/) { return weights; }

    // a micro-batch is about to run; is_observed: so that its attention is observed
    virtual void begin(const llama_ubatch & /*ubatch*/, bool /*is_observed*/) {}

    // a graph serves a micro-batch for which this is the same as when it was built
    virtual uint64_t graph_key(const llama_ubatch & /*ubatch*/) const { return 0; }
};

// what another library chooses by; lives on to the end of the process
struct llama_fasa_choosers {
    // as that library was compiled: it would call past what it does not know
    size_t sizeof_args   = sizeof(llama_fasa_chooser_args);
    size_t sizeof_params = sizeof(llama_fasa_params);
    int    version       = 1; // of llama_fasa_chooser

    const char * (*name)(int32_t policy) = nullptr; // of policies from 1 on, for the override fasa.policy; nullptr: no such policy

    std::unique_ptr<llama_fasa_chooser> (*make)(void) = nullptr; // for one context
};

// from any thread, also while contexts run: they may be given its policies from then on
// false: it was compiled with other headers, and was left out
LLAMA_API bool llama_fasa_set_choosers(const llama_fasa_choosers & choosers);

// 0: "fasa"; nullptr: no such policy
const char * llama_fasa_chooser_name(int32_t policy);

// of all policies but FASA; some have been set
std::unique_ptr<llama_fasa_chooser> llama_fasa_make_chooser();
