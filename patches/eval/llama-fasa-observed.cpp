#include "llama-fasa-observed.h"

#include "llama-batch.h"

bool llama_fasa_observed::is_of(const llama_ubatch & ubatch) const {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != seq_id) {
            return false;
        }
    }
    return true;
}

bool llama_fasa_observed::has(int32_t il, const llama_ubatch & ubatch) const {
    const auto it = layers.find(il);

    return is_whole && it != layers.end() && it->second.heads[0].prompt == prompt && is_of(ubatch);
}

void llama_fasa_observed::begin(const llama_ubatch & ubatch, bool is_observed) {
    const llama_pos pos = ubatch.pos[0];

    if (pos == 0) {
        prompt++;
        seq_id   = ubatch.seq_id[0][0];
        is_whole = is_observed && is_of(ubatch);
    } else if (is_observed && (pos != next_pos || !is_of(ubatch))) {
        prompt++;
        is_whole = false; // a part of what was added up is of tokens that are gone, or of others
    }
    if (is_observed || pos != next_pos) {
        decode++;
    }
    next_pos = ubatch.pos[ubatch.n_tokens - 1] + 1;
}

ggml_tensor * llama_fasa_observed::build(ggml_context * ctx, int32_t il, ggml_tensor * q, ggml_tensor * weights, ggml_tensor * mask) {
    auto & layer = layers[il];

    layer.observed = this;
    layer.heads.resize(q->ne[1]);

    ggml_tensor * srcs[] = { weights, q, mask };

    // an op has to have a result
    return ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, srcs, 3, compute, GGML_N_TASKS_MAX, &layer);
}

void llama_fasa_observed::compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & layer = *(struct layer *) userdata;

    const auto * weights = dst->src[0];
    const auto * q       = dst->src[1];
    const auto * mask    = dst->src[2];

    const int64_t n_kv     = weights->ne[0];
    const int64_t n_tokens = weights->ne[1];

    for (int64_t ih = ith; ih < q->ne[1]; ih += nth) {
        auto & head = layer.heads[ih];

        if (head.prompt != layer.observed->prompt) {
            head = {};
            head.prompt = layer.observed->prompt;
        }

        head.sums.resize(n_kv); // the cache may show fewer cells than before, but none that were added to
        for (int64_t it = 0; it < n_tokens; ++it) {
            const auto * row = (const float *) ((const char *) weights->data + it*weights->nb[1] + ih*weights->nb[2]);
            for (int64_t cell = 0; cell < n_kv; ++cell) {
                head.sums[cell] += row[cell];
            }
            const auto * query = (const float *) ((const char *) q->data + ih*q->nb[1] + it*q->nb[2]);
            head.queries.emplace_back(query, query + q->ne[0]);
        }
        if (head.queries.size() > N_QUERIES) {
            head.queries.erase(head.queries.begin(), head.queries.end() - N_QUERIES);
        }

        const auto * visible = (const ggml_fp16_t *) ((const char *) mask->data + (n_tokens - 1)*mask->nb[1]);
        head.cells.clear();
        for (int64_t cell = 0; cell < n_kv; ++cell) {
            if (ggml_fp16_to_fp32(visible[cell]) == 0.0f) {
                head.cells.push_back(cell);
            }
        }
    }
}
