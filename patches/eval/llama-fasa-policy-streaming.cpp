#include "llama-fasa-policy-plain.h"

#include <algorithm>

namespace {

// attention sinks and the most recent cells (StreamingLLM, arXiv 2309.17453), with the positions that they have
class policy_streaming : public llama_fasa_policy_plain {
public:
    explicit policy_streaming(int64_t n_sink) : n_sink(n_sink) {}

    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        const int64_t n       = choice.visible.size();
        const int64_t n_first = std::min({ n_sink, head.n_fac, n });

        std::vector<int32_t> res(choice.visible.begin(), choice.visible.begin() + n_first);
        res.insert(res.end(), choice.visible.end() - std::min(head.n_fac - n_first, n - n_first), choice.visible.end());
        return res;
    }

private:
    const int64_t n_sink;
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_streaming(uint32_t n_sink) {
    return std::make_unique<policy_streaming>(n_sink);
}
