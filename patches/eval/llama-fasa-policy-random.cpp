#include "llama-fasa-policy-plain.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

namespace {

// FASA on as many chunks drawn at random, for each KV head its own, always the same
class policy_random : public llama_fasa_policy_plain {
public:
    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        const auto & drawn  = dims.at({ head.il, head.ih_kv });
        const auto   logits = llama_fasa_logits(head, choice, drawn.data(), drawn.size());
        return llama_fasa_best_cells(head, choice, llama_fasa_group_scores(logits, LLAMA_FASA_GROUP_MAX));
    }

    void prepare(const llama_fasa_chooser_args & args) override {
        for (int64_t ih = 0; ih < args.layer.n_head_kv; ++ih) {
            auto & drawn = dims[{ args.il, ih }];
            if (!drawn.empty()) {
                continue;
            }
            std::vector<int32_t> chunks(args.layer.n_embd_head/2);
            std::iota(chunks.begin(), chunks.end(), 0);

            std::mt19937 rng(1000*args.il + ih);
            for (size_t i = 0; i < (size_t) args.dims->ne[0]/2; ++i) {
                std::swap(chunks[i], chunks[i + rng() % (chunks.size() - i)]); // not std::shuffle, which differs by platform

                int32_t pair[2];
                GGML_ASSERT(llama_fasa_chunk_dims(&args.layer, chunks[i], pair));
                drawn.insert(drawn.end(), { pair[0], pair[1] });
            }
        }
    }

    bool needs_dims() const override { return true; }

private:
    std::map<std::pair<int32_t, int64_t>, std::vector<int32_t>> dims; // by layer and KV head
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_random() {
    return std::make_unique<policy_random>();
}
