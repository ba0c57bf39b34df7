#include "llama-fasa-observed.h"
#include "llama-fasa-policy-plain.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace {

constexpr int64_t POOL = 7; // cells whose greatest weight counts for each

// Cells of the prompt chosen once, by the attention of its last queries, whose own cells stay as well; and everything
// decoded since, on top of the budget (SnapKV, arXiv 2404.14469: window 32, max-pooling over 7 cells).
class policy_snapkv : public llama_fasa_policy_plain {
public:
    explicit policy_snapkv(const llama_fasa_observed & observed) : observed(observed) {}

    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        // what is left of it, should the cache have been changed since
        const auto prompt = llama_fasa_common(observed.layers.at(head.il).heads[head.ih*head.n_query].cells, choice.visible);

        auto & kept = chosen.at({ head.il, head.ih });
        if (kept.decode != observed.decode) {
            kept = { observed.decode, choose_prompt(head, prompt) };
        }

        auto res = llama_fasa_common(kept.cells, prompt);
        std::set_difference(choice.visible.begin(), choice.visible.end(), prompt.begin(), prompt.end(), std::back_inserter(res));
        return res;
    }

    int64_t n_list(int64_t /*n_fac*/, int64_t n_kv) const override { return n_kv; }

    int64_t n_kept(int64_t n_visible, int64_t n_fac) const override {
        const auto    & layer    = observed.layers.begin()->second;
        const int64_t   n_prompt = layer.heads[0].cells.size();

        return std::min(n_prompt, n_fac) + std::max<int64_t>(n_visible - n_prompt, 0);
    }

    void prepare(const llama_fasa_chooser_args & args) override {
        for (int64_t ih = 0; ih < args.n_head_sel; ++ih) {
            chosen.insert({ { args.il, ih }, {} });
        }
    }

    bool needs_prompt() const override { return true; }

private:
    std::vector<int32_t> choose_prompt(const llama_fasa_head & head, const std::vector<int32_t> & prompt) const {
        const auto    & heads    = observed.layers.at(head.il).heads;
        const int64_t   n        = prompt.size();
        const int64_t   n_fac    = std::min(head.n_fac, n);
        const int64_t   n_window = std::min<int64_t>(heads[head.ih*head.n_query].queries.size(), n_fac/2);

        std::vector<float> sums(n, 0.0f);
        for (int64_t iq = 0; iq < head.n_query; ++iq) {
            const auto & queries = heads[head.ih*head.n_query + iq].queries;
            for (int64_t iw = 0; iw < n_window; ++iw) {
                const auto & query = queries[queries.size() - n_window + iw];

                const auto weights = llama_fasa_weights_of(head, query.data(), prompt.data(), n - n_window + iw + 1);
                for (size_t i = 0; i < weights.size(); ++i) {
                    sums[i] += weights[i];
                }
            }
        }

        const int64_t n_before = n - n_window;

        std::vector<float> pooled(n_before);
        for (int64_t i = 0; i < n_before; ++i) {
            pooled[i] = *std::max_element(sums.begin() + std::max<int64_t>(i - POOL/2, 0), sums.begin() + std::min(i + POOL/2 + 1, n_before));
        }

        std::vector<int64_t> order(n_before);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return pooled[a] > pooled[b]; });

        std::vector<int32_t> res(prompt.end() - n_window, prompt.end());
        for (int64_t i = 0; i < n_fac - n_window; ++i) {
            res.push_back(prompt[order[i]]);
        }
        std::sort(res.begin(), res.end());
        return res;
    }

    struct selection {
        uint64_t decode = 0; // for which it was made

        std::vector<int32_t> cells;
    };

    const llama_fasa_observed & observed;

    std::map<std::pair<int32_t, int64_t>, selection> chosen; // by layer and head
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_snapkv(const llama_fasa_observed & observed) {
    return std::make_unique<policy_snapkv>(observed);
}
