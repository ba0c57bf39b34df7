#include "llama-fasa-observed.h"
#include "llama-fasa-policy-plain.h"

#include <algorithm>
#include <map>

namespace {

// Heavy hitters and recent cells, half of the budget each; what is dropped never comes back (H2O, arXiv 2306.14048).
// A cell is as heavy as all the attention it has had, in the prompt and since.
class policy_h2o : public llama_fasa_policy_plain {
public:
    explicit policy_h2o(const llama_fasa_observed & observed) : observed(observed) {}

    std::vector<int32_t> choose(const llama_fasa_head & head, const llama_fasa_choice & choice) override {
        auto & state = histories.at({ head.il, head.ih });
        if (state.decode != observed.decode) {
            begin(state, head, choice);
        }

        for (const int32_t cell : choice.visible) {
            if (cell > state.last) {
                state.kept.push_back(cell);
                state.last = cell;
            }
        }
        state.weights.resize(std::max<size_t>(state.weights.size(), state.last + 1), 0.0f);
        while ((int64_t) state.kept.size() > head.n_fac) {
            drop(state, head.n_fac/2);
        }

        for (const float * query : choice.queries) {
            const auto weights = llama_fasa_weights_of(head, query, state.kept.data(), state.kept.size());
            for (size_t i = 0; i < weights.size(); ++i) {
                state.weights[state.kept[i]] += weights[i];
            }
        }
        return state.kept;
    }

    void prepare(const llama_fasa_chooser_args & args) override {
        for (int64_t ih = 0; ih < args.n_head_sel; ++ih) {
            histories.insert({ { args.il, ih }, {} });
        }
    }

    bool needs_prompt() const override { return true; }

private:
    struct history {
        uint64_t decode = 0; // that it belongs to

        std::vector<float>   weights; // by cell
        std::vector<int32_t> kept;    // ascending
        int32_t              last = -1;
    };

    // after the prompt
    void begin(history & state, const llama_fasa_head & head, const llama_fasa_choice & choice) const {
        const auto * heads = &observed.layers.at(head.il).heads[head.ih*head.n_query];

        state = {};
        state.decode  = observed.decode;
        state.kept    = llama_fasa_common(heads[0].cells, choice.visible);
        state.last    = state.kept.empty() ? -1 : state.kept.back();
        state.weights.resize(state.last + 1, 0.0f);
        for (int64_t iq = 0; iq < head.n_query; ++iq) {
            for (const int32_t cell : state.kept) {
                state.weights[cell] += heads[iq].sums[cell];
            }
        }

        const int64_t n_recent = head.n_fac/2;
        const int64_t n_heavy  = head.n_fac - n_recent;
        if ((int64_t) state.kept.size() > head.n_fac) {
            const auto recent = state.kept.end() - n_recent;
            std::stable_sort(state.kept.begin(), recent, [&](int32_t a, int32_t b) { return state.weights[a] > state.weights[b]; });
            state.kept.erase(state.kept.begin() + n_heavy, recent);
            std::sort(state.kept.begin(), state.kept.end());
        }
    }

    // the lightest of those that are not recent
    static void drop(history & state, int64_t n_recent) {
        const auto recent = state.kept.end() - std::min<int64_t>(n_recent, state.kept.size() - 1);

        state.kept.erase(std::min_element(state.kept.begin(), recent, [&](int32_t a, int32_t b) {
            return state.weights[a] < state.weights[b];
        }));
    }

    const llama_fasa_observed & observed;

    std::map<std::pair<int32_t, int64_t>, history> histories; // by layer and head
};

} // namespace

std::unique_ptr<llama_fasa_policy> llama_fasa_policy_h2o(const llama_fasa_observed & observed) {
    return std::make_unique<policy_h2o>(observed);
}
