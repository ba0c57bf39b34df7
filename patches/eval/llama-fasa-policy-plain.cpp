#include "llama-fasa-policy-plain.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <numeric>

//
// the op
//

// sources of the custom op
enum { SRC_Q, SRC_K, SRC_MASK, SRC_DIMS, SRC_FORCED };

bool llama_fasa_policy_plain::is_supported(const llama_fasa_chooser_args & args) const {
    ggml_backend_buffer_t buffer = args.k->view_src ? args.k->view_src->buffer : nullptr; // of the KV cache

    return buffer && ggml_backend_buffer_is_host(buffer) && (!needs_dims() || args.q == args.q_rot);
}

ggml_tensor * llama_fasa_policy_plain::build(const llama_fasa_chooser_args & args) {
    prepare(args);

    auto & op = ops[{ args.il, args.n_fac }];
    op = { this, args.il, args.n_fac, args.scale, args.softcap };

    ggml_tensor * srcs[] = { args.q_rot, args.k, args.mask, args.dims, args.forced };

    return ggml_custom_4d(args.ctx, GGML_TYPE_I32, n_list(args.n_fac, args.k->ne[2]), args.n_head_sel, args.q->ne[2], args.q->ne[3],
            srcs, args.forced ? 5 : 4, compute, GGML_N_TASKS_MAX, &op);
}

void llama_fasa_policy_plain::compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & op = *(const op_data *) userdata;

    const auto * q      = dst->src[SRC_Q];
    const auto * k      = dst->src[SRC_K];
    const auto * mask   = dst->src[SRC_MASK];
    const auto * dims   = dst->src[SRC_DIMS];
    const auto * forced = dst->src[SRC_FORCED]; // nullptr: none

    const int64_t n_head_sel = dst->ne[1];
    const int64_t n_kv       = k->ne[2];

    for (int64_t row = ith; row < n_head_sel*dst->ne[3]; row += nth) {
        const int64_t is = row/n_head_sel;

        llama_fasa_head head;

        head.il      = op.il;
        head.ih      = row % n_head_sel;
        head.ih_kv   = head.ih*k->ne[1]/n_head_sel;
        head.n_query = q->ne[1]/n_head_sel;
        head.n_embd  = k->ne[0];
        head.n_fac   = op.n_fac;
        head.scale   = op.scale;
        head.softcap = op.softcap;
        head.n_dim   = dims->ne[0];
        head.dims    = (const int32_t *) dims->data + head.ih_kv*head.n_dim;

        head.keys.resize(n_kv*head.n_embd);
        for (int64_t cell = 0; cell < n_kv; ++cell) {
            const char * data = (const char *) k->data + head.ih_kv*k->nb[1] + cell*k->nb[2] + is*k->nb[3];
            float      * key  = head.keys.data() + cell*head.n_embd;
            if (k->type == GGML_TYPE_F32) {
                std::copy_n((const float *) data, head.n_embd, key);
            } else {
                ggml_get_type_traits(k->type)->to_float(data, key, head.n_embd);
            }
        }

        for (int64_t it = 0; it < dst->ne[2]; ++it) {
            const auto * visible = (const ggml_fp16_t *) ((const char *) mask->data + it*mask->nb[1] + is*mask->nb[3]);

            llama_fasa_choice choice;

            for (int64_t iq = 0; iq < head.n_query; ++iq) {
                choice.queries.push_back((const float *) ((const char *) q->data +
                    (head.ih*head.n_query + iq)*q->nb[1] + it*q->nb[2] + is*q->nb[3]));
            }
            for (int64_t cell = 0; cell < n_kv; ++cell) {
                if (ggml_fp16_to_fp32(visible[cell]) == 0.0f) {
                    choice.visible.push_back(cell);
                }
            }
            if (forced) {
                const auto * ids = (const int32_t *) forced->data + (is*forced->ne[1] + it)*forced->ne[0];
                std::copy_if(ids, ids + forced->ne[0], std::back_inserter(choice.forced), [&](int32_t id) {
                    return id >= 0 && std::binary_search(choice.visible.begin(), choice.visible.end(), id);
                });
                std::sort(choice.forced.begin(), choice.forced.end());
                choice.forced.erase(std::unique(choice.forced.begin(), choice.forced.end()), choice.forced.end());
            }

            auto cells = op.policy->choose(head, choice);
            std::sort(cells.begin(), cells.end());
            GGML_ASSERT((int64_t) cells.size() <= dst->ne[0]);

            auto * ids = (int32_t *) ((char *) dst->data + head.ih*dst->nb[1] + it*dst->nb[2] + is*dst->nb[3]);
            std::fill(std::copy(cells.begin(), cells.end(), ids), ids + dst->ne[0], -1);
        }
    }
}

//
// what policies are made of
//

std::vector<int32_t> llama_fasa_common(const std::vector<int32_t> & a, const std::vector<int32_t> & b) {
    std::vector<int32_t> res;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(res));
    return res;
}

float llama_fasa_dot(const float * a, const float * b, int64_t n) {
    float sums[8] = {}; // independent, so that a compiler may use vectors

    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sums[j] += a[i + j]*b[i + j];
        }
    }
    for (; i < n; ++i) {
        sums[0] += a[i]*b[i];
    }
    return std::accumulate(sums, sums + 8, 0.0f);
}

std::vector<std::vector<float>> llama_fasa_logits(
        const llama_fasa_head & head, const llama_fasa_choice & choice, const int32_t * dims, int64_t n_dim) {
    std::vector<std::vector<float>> res;

    for (const float * query : choice.queries) {
        std::vector<float> masked(head.n_embd, 0.0f); // what is left out of the sum is zero in the query
        for (int64_t i = 0; i < n_dim; ++i) {
            masked[dims[i]] = query[dims[i]];
        }
        auto & logits = res.emplace_back();
        for (const int32_t cell : choice.visible) {
            logits.push_back(head.scale*llama_fasa_dot(dims ? masked.data() : query, head.key(cell), head.n_embd));
        }
    }
    return res;
}

static double fasa_log_sum_exp(const std::vector<float> & logits) {
    const float max = *std::max_element(logits.begin(), logits.end());
    return max + std::log(std::accumulate(logits.begin(), logits.end(), 0.0, [&](double sum, float x) { return sum + std::exp(x - max); }));
}

std::vector<float> llama_fasa_weights_of(const llama_fasa_head & head, const float * query, const int32_t * cells, int64_t n_cells) {
    std::vector<float> res;
    for (int64_t i = 0; i < n_cells; ++i) {
        const float logit = head.scale*llama_fasa_dot(query, head.key(cells[i]), head.n_embd);
        res.push_back(head.softcap != 0.0f ? head.softcap*std::tanh(logit/head.softcap) : logit);
    }
    if (!res.empty()) {
        const double lse = fasa_log_sum_exp(res);
        for (float & x : res) {
            x = std::exp(x - lse);
        }
    }
    return res;
}

std::vector<float> llama_fasa_group_scores(const std::vector<std::vector<float>> & logits, llama_fasa_group group) {
    if (logits.size() == 1 || logits[0].empty()) {
        return logits[0];
    }
    std::vector<float> res(logits[0].size(), -INFINITY);
    for (const auto & head : logits) {
        const double lse = fasa_log_sum_exp(head);
        for (size_t i = 0; i < res.size(); ++i) {
            const float score = head[i] - lse;
            const float best  = std::max(res[i], score);
            res[i] = group == LLAMA_FASA_GROUP_MAX ? best : best + std::log(std::exp(res[i] - best) + std::exp(score - best));
        }
    }
    return res;
}

std::vector<int32_t> llama_fasa_best_cells(const llama_fasa_head & head, const llama_fasa_choice & choice, const std::vector<float> & scores) {
    std::vector<int32_t> res = choice.forced;

    std::vector<size_t> order;
    for (size_t i = 0; i < choice.visible.size(); ++i) {
        if (!std::binary_search(res.begin(), res.end(), choice.visible[i])) {
            order.push_back(i);
        }
    }
    const size_t n_left = std::min<size_t>(std::max<int64_t>(head.n_fac - (int64_t) res.size(), 0), order.size());
    std::partial_sort(order.begin(), order.begin() + n_left, order.end(), [&](size_t a, size_t b) {
        return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    for (size_t i = 0; i < n_left; ++i) {
        res.push_back(choice.visible[order[i]]);
    }
    return res;
}
