#include "llama-fasa-policy-plain.h"

namespace {

// FASA, with a group's score the sum of its heads' softmax in place of the greatest
class policy_fasa_sum : public llama_fasa_policy_plain {
public:
    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        const auto logits = llama_fasa_logits(head, choice, head.dims, head.n_dim);
        return llama_fasa_best_cells(head, choice, llama_fasa_group_scores(logits, LLAMA_FASA_GROUP_SUM));
    }

    bool needs_dims() const override { return true; }
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_fasa_sum() {
    return std::make_unique<policy_fasa_sum>();
}
