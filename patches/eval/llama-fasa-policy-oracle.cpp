#include "llama-fasa-policy-plain.h"

namespace {

// scores on all dims of the keys: what FASA would choose if it knew the full logits
class policy_oracle : public llama_fasa_policy_plain {
public:
    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        return llama_fasa_best_cells(head, choice, llama_fasa_group_scores(llama_fasa_logits(head, choice), LLAMA_FASA_GROUP_MAX));
    }
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_oracle() {
    return std::make_unique<policy_oracle>();
}
