#include "llama-fasa-policy-plain.h"

#include "ggml-fasa.h"

namespace {

// scores all cells on the dominant chunks of their keys
class policy_fasa : public llama_fasa_policy {
public:
    ggml_tensor * build(const llama_fasa_policy_args & args) override {
        return ggml_fasa_select(args.ctx, args.q, args.tips, args.dims, args.ranges, args.mask, args.forced, args.n_head_sel, args.n_fac, args.scale);
    }
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_make(
        const llama_fasa_params & params, const llama_fasa_profile & profile, llama_fasa_observed & observed) {
    switch (params.policy) {
        case LLAMA_FASA_POLICY_FASA:      break;
        case LLAMA_FASA_POLICY_FASA_SUM:  return llama_fasa_policy_fasa_sum();
        case LLAMA_FASA_POLICY_ORACLE:    return llama_fasa_policy_oracle();
        case LLAMA_FASA_POLICY_RANDOM:    return llama_fasa_policy_random(profile);
        case LLAMA_FASA_POLICY_STREAMING: return llama_fasa_policy_streaming(params.n_sink);
        case LLAMA_FASA_POLICY_QUEST:     return llama_fasa_policy_quest();
        case LLAMA_FASA_POLICY_SNAPKV:    return llama_fasa_policy_snapkv(observed);
        case LLAMA_FASA_POLICY_H2O:       return llama_fasa_policy_h2o(observed);
        case LLAMA_FASA_POLICY_COUNT:     break;
    }
    return std::make_unique<policy_fasa>();
}
