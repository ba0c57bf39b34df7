#include "llama-fasa-eval.h"

#include "llama-fasa-observed.h"
#include "llama-fasa-policy.h"

const char * llama_fasa_policy_name(llama_fasa_policy_type policy) {
    switch (policy) {
        case LLAMA_FASA_POLICY_TYPE_FASA:      return "fasa";
        case LLAMA_FASA_POLICY_TYPE_FASA_SUM:  return "fasa_sum";
        case LLAMA_FASA_POLICY_TYPE_ORACLE:    return "oracle";
        case LLAMA_FASA_POLICY_TYPE_RANDOM:    return "random";
        case LLAMA_FASA_POLICY_TYPE_STREAMING: return "streaming";
        case LLAMA_FASA_POLICY_TYPE_QUEST:     return "quest";
        case LLAMA_FASA_POLICY_TYPE_UNIQUE:    return "unique";
        case LLAMA_FASA_POLICY_TYPE_SNAPKV:    return "snapkv";
        case LLAMA_FASA_POLICY_TYPE_H2O:       return "h2o";
        case LLAMA_FASA_POLICY_TYPE_COUNT:     break;
    }
    return nullptr;
}

namespace {

std::unique_ptr<llama_fasa_policy> make_policy(const llama_fasa_params & params, const llama_fasa_observed & observed) {
    switch ((llama_fasa_policy_type) params.policy) {
        case LLAMA_FASA_POLICY_TYPE_FASA:      break;
        case LLAMA_FASA_POLICY_TYPE_FASA_SUM:  return llama_fasa_policy_fasa_sum();
        case LLAMA_FASA_POLICY_TYPE_ORACLE:    return llama_fasa_policy_oracle();
        case LLAMA_FASA_POLICY_TYPE_RANDOM:    return llama_fasa_policy_random();
        case LLAMA_FASA_POLICY_TYPE_STREAMING: return llama_fasa_policy_streaming(params.n_sink);
        case LLAMA_FASA_POLICY_TYPE_QUEST:     return llama_fasa_policy_quest();
        case LLAMA_FASA_POLICY_TYPE_UNIQUE:    return llama_fasa_policy_unique();
        case LLAMA_FASA_POLICY_TYPE_SNAPKV:    return llama_fasa_policy_snapkv(observed);
        case LLAMA_FASA_POLICY_TYPE_H2O:       return llama_fasa_policy_h2o(observed);
        case LLAMA_FASA_POLICY_TYPE_COUNT:     break;
    }
    return nullptr;
}

// The policies of one context. What was observed of a prompt outlives them: one prompt serves several.
class policy_chooser : public llama_fasa_chooser {
public:
    void configure(const llama_fasa_params & params) override {
        policy = make_policy(params, observed);
    }

    bool is_supported(const llama_fasa_chooser_args & args, const llama_ubatch & ubatch) const override {
        const bool is_observed = args.k->ne[3] == 1 && observed.has(args.il, ubatch);

        return !policy || (policy->is_supported(args) && (is_observed || !policy->needs_prompt()));
    }

    ggml_tensor * build(const llama_fasa_chooser_args & args) override {
        return policy ? policy->build(args) : llama_fasa_chooser::build(args);
    }

    int64_t n_kept(int64_t n_visible, int64_t n_fac) const override {
        return policy ? policy->n_kept(n_visible, n_fac) : llama_fasa_chooser::n_kept(n_visible, n_fac);
    }

    bool observes() const override { return policy && policy->needs_prompt(); }

    ggml_tensor * observe(ggml_context * ctx, int32_t il, ggml_tensor * q, ggml_tensor * weights, ggml_tensor * mask) override {
        return observed.build(ctx, il, q, weights, mask);
    }

    void begin(const llama_ubatch & ubatch, bool is_observed) override { observed.begin(ubatch, is_observed); }

    uint64_t graph_key(const llama_ubatch & ubatch) const override {
        return observes() ? 2*observed.prompt + observed.is_of(ubatch) : 0;
    }

private:
    llama_fasa_observed observed;

    std::unique_ptr<llama_fasa_policy> policy; // nullptr: FASA
};

} // namespace

bool llama_fasa_eval_init(void) {
    static const auto choosers = [] {
        llama_fasa_choosers res;
        res.name = [](int32_t policy) { return llama_fasa_policy_name((llama_fasa_policy_type) policy); };
        res.make = []() -> std::unique_ptr<llama_fasa_chooser> { return std::make_unique<policy_chooser>(); };
        return res;
    }();
    return llama_fasa_set_choosers(choosers);
}
