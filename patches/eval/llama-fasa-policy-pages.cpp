#include "llama-fasa-policy-plain.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

constexpr size_t PAGE = 16; // cells

// whole pages, by one logit for each query head
class policy_pages : public llama_fasa_policy_plain {
public:
    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        const auto & visible = choice.visible;

        std::vector<size_t>             first; // visible cell of each page
        std::vector<std::vector<float>> logits(choice.queries.size());

        for (size_t i = 0; i < visible.size(); ) {
            std::vector<const float *> keys;

            first.push_back(i);
            for (const size_t page = visible[i]/PAGE; i < visible.size() && visible[i]/PAGE == page; ++i) {
                keys.push_back(head.key(visible[i]));
            }
            const auto scores = score_page(keys, choice.queries, head.n_embd);
            for (size_t iq = 0; iq < scores.size(); ++iq) {
                logits[iq].push_back(head.scale*scores[iq]);
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

private:
    // of each query, [n_embd] as the keys; the logit but for the scale
    virtual std::vector<float> score_page(const std::vector<const float *> & keys, const std::vector<const float *> & queries, int64_t n_embd) const = 0;
};

// the greatest logit that a key within the bounds of the page's keys could have (Quest, arXiv 2406.10774)
class policy_quest : public policy_pages {
    std::vector<float> score_page(const std::vector<const float *> & keys, const std::vector<const float *> & queries, int64_t n_embd) const override {
        std::vector<float> res(queries.size(), 0.0f);
        for (int64_t d = 0; d < n_embd; ++d) {
            float min = keys[0][d];
            float max = keys[0][d];
            for (const float * key : keys) {
                min = std::min(min, key[d]);
                max = std::max(max, key[d]);
            }
            for (size_t iq = 0; iq < queries.size(); ++iq) {
                res[iq] += std::max(queries[iq][d]*min, queries[iq][d]*max);
            }
        }
        return res;
    }

    bool needs_dims() const override { return true; } // bounds of single dims
};

// the logit of the mean of the page's keys, and half of what their deviation from it could add (UNIQUE, arXiv 2605.27740)
class policy_unique : public policy_pages {
    std::vector<float> score_page(const std::vector<const float *> & keys, const std::vector<const float *> & queries, int64_t n_embd) const override {
        std::vector<float> mean(n_embd, 0.0f);
        for (const float * key : keys) {
            for (int64_t d = 0; d < n_embd; ++d) {
                mean[d] += key[d]/keys.size();
            }
        }
        float variance = 0.0f;
        for (const float * key : keys) {
            for (int64_t d = 0; d < n_embd; ++d) {
                variance += (key[d] - mean[d])*(key[d] - mean[d])/keys.size();
            }
        }
        std::vector<float> res;
        for (const float * query : queries) {
            res.push_back(llama_fasa_dot(query, mean.data(), n_embd) + 0.5f*std::sqrt(llama_fasa_dot(query, query, n_embd)*variance));
        }
        return res;
    }
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_quest() {
    return std::make_unique<policy_quest>();
}

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_unique() {
    return std::make_unique<policy_unique>();
}
