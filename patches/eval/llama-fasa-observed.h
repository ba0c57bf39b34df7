#pragma once

#include "ggml.h"
#include "llama.h"

#include <map>
#include <vector>

struct llama_ubatch;

// What SnapKV and H2O need to know of the prompt: attention weights, which are computed a second time, unfused, while it is
// read: n_kv*n_tokens*n_head floats for a micro-batch. For one sequence.
struct llama_fasa_observed {
    static constexpr size_t N_QUERIES = 32; // kept of the end of the prompt

    // of one query head
    struct head {
        uint64_t prompt = 0; // that all this belongs to

        std::vector<float>              sums;    // of each cell: its attention weights, over all queries of the prompt
        std::vector<std::vector<float>> queries; // the last ones [n_embd_head], as the K cache is rotated
        std::vector<int32_t>            cells;   // of the prompt
    };

    struct layer {
        const llama_fasa_observed * observed = nullptr;

        std::vector<head> heads;
    };

    std::map<int32_t, layer> layers;

    uint64_t prompt = 0; // counts the prompts, observed or not: what begins at position 0, or goes on in another place
    uint64_t decode = 0; // counts the times that decoding began, or went on elsewhere than after the last token

    // whether these tokens belong to the sequence of the last prompt
    bool is_of(const llama_ubatch & ubatch) const;

    // whether that prompt was observed in a layer
    bool has(int32_t il, const llama_ubatch & ubatch) const;

    // a micro-batch is about to run
    void begin(const llama_ubatch & ubatch, bool is_observed);

    // as llama_fasa_chooser::observe
    ggml_tensor * build(ggml_context * ctx, int32_t il, ggml_tensor * q, ggml_tensor * weights, ggml_tensor * mask);

private:
    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata);

    llama_seq_id seq_id   = -1;    // of the prompt
    llama_pos    next_pos = -1;    // after the last token
    bool         is_whole = false; // all of it has been observed
};
