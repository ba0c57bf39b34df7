#include "llama-fasa-policy-plain.h"

#include <algorithm>
#include <numeric>

namespace {

constexpr size_t PAGE = 16; // cells

// whole pages, by the greatest logit that a key within the bounds of the page's keys could have (Quest, arXiv 2406.10774)
class policy_quest : public llama_fasa_policy_plain {
public:
    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        const auto & visible = choice.visible;

        std::vector<size_t>             first; // visible cell of each page
        std::vector<std::vector<float>> logits(choice.queries.size());

        for (size_t i = 0; i < visible.size(); ) {
            std::vector<float> min(head.key(visible[i]), head.key(visible[i]) + head.n_embd);
            std::vector<float> max = min;

            first.push_back(i);
            for (const size_t page = visible[i]/PAGE; i < visible.size() && visible[i]/PAGE == page; ++i) {
                const float * key = head.key(visible[i]);
                for (int64_t d = 0; d < head.n_embd; ++d) {
                    min[d] = std::min(min[d], key[d]);
                    max[d] = std::max(max[d], key[d]);
                }
            }
            for (size_t iq = 0; iq < choice.queries.size(); ++iq) {
                const float * query = choice.queries[iq];
                float         bound = 0.0f;
                for (int64_t d = 0; d < head.n_embd; ++d) {
                    bound += std::max(query[d]*min[d], query[d]*max[d]);
                }
                logits[iq].push_back(head.scale*bound);
            }
        }
        first.push_back(visible.size());

        const auto scores = llama_fasa_group_scores(logits, LLAMA_FASA_GROUP_MAX);

        std::vector<size_t> pages(scores.size());
        std::iota(pages.begin(), pages.end(), 0);
        std::stable_sort(pages.begin(), pages.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });

        auto res = choice.forced;
        for (const size_t page : pages) {
            for (size_t i = first[page]; i < first[page + 1] && (int64_t) res.size() < head.n_fac; ++i) {
                if (!std::binary_search(choice.forced.begin(), choice.forced.end(), visible[i])) {
                    res.push_back(visible[i]);
                }
            }
        }
        return res;
    }

    bool needs_dims() const override { return true; } // bounds of single dims
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_quest() {
    return std::make_unique<policy_quest>();
}
