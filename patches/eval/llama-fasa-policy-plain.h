#pragma once

#include "llama-fasa-policy.h"

#include <map>
#include <vector>

// one head that chooses, in one micro-batch
struct llama_fasa_head {
    int32_t il;
    int64_t ih;      // among those that choose
    int64_t ih_kv;   // KV head that it reads
    int64_t n_query; // query heads that share its choice
    int64_t n_embd;
    int64_t n_fac;
    float   scale;
    float   softcap;

    std::vector<float> keys; // [n_kv, n_embd] as the cache holds them

    const int32_t * dims; // of the dominant chunks
    int64_t         n_dim;

    const float * key(int32_t cell) const { return keys.data() + cell*n_embd; }
};

// what it chooses from for one token
struct llama_fasa_choice {
    std::vector<const float *> queries; // of its query heads [n_embd]
    std::vector<int32_t>       visible; // cells, ascending
    std::vector<int32_t>       forced;  // of these, ascending
};

// A policy in plain code: one head and one token at a time, on unrounded keys.
// Cells are taken to lie in the order of their positions, as they do in a context of one sequence.
class llama_fasa_policy_plain : public llama_fasa_policy {
public:
    ggml_tensor * build(const llama_fasa_chooser_args & args) override;

    bool is_supported(const llama_fasa_chooser_args & args) const override;

    // the chosen cells in any order, at most n_list of them
    // threads call it at once for different heads, and for one head in the order of the tokens
    virtual std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) = 0;

    virtual int64_t n_list(int64_t n_fac, int64_t /*n_kv*/) const { return n_fac; }

    // called while the graph is built: whatever a head will need has to be there before threads look for it
    virtual void prepare(const llama_fasa_chooser_args & /*args*/) {}

    // whether it looks at single dims, which a Hadamard rotation mixes
    virtual bool needs_dims() const { return false; }

private:
    // what an op does not see of its sources
    struct op_data {
        llama_fasa_policy_plain * policy;
        int32_t il;
        int64_t n_fac;
        float   scale;
        float   softcap;
    };

    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata);

    std::map<std::pair<int32_t, int64_t>, op_data> ops; // by layer and n_fac
};

//
// what policies are made of
//

// of two ascending lists
std::vector<int32_t> llama_fasa_common(const std::vector<int32_t> & a, const std::vector<int32_t> & b);

float llama_fasa_dot(const float * a, const float * b, int64_t n);

// of each query head, the logits of the visible cells on some dims; dims nullptr: all
std::vector<std::vector<float>> llama_fasa_logits(
        const llama_fasa_head & head, const llama_fasa_choice & choice, const int32_t * dims = nullptr, int64_t n_dim = 0);

// the attention weights of a query head among some cells
std::vector<float> llama_fasa_weights_of(const llama_fasa_head & head, const float * query, const int32_t * cells, int64_t n_cells);

enum llama_fasa_group { LLAMA_FASA_GROUP_MAX, LLAMA_FASA_GROUP_SUM };

// one score per cell: the greatest log-softmax of the query heads, or the logarithm of the sum of softmax; of one head its logits
std::vector<float> llama_fasa_group_scores(const std::vector<std::vector<float>> & logits, llama_fasa_group group);

// the forced cells, and the best of the others, by the lower id where scores are equal; scores: of the visible cells
std::vector<int32_t> llama_fasa_best_cells(const llama_fasa_head & head, const llama_fasa_choice & choice, const std::vector<float> & scores);
