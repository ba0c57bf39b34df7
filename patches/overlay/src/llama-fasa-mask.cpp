#include "llama-fasa-mask.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>

// whether the used cells are the first ones, and all of one sequence: then all that is later than a token is at the end
static bool fasa_is_dense(const llama_kv_cells & cells, llama_seq_id seq_id) {
    return cells.used_max_p1() == cells.get_used() && cells.seq_pos_get(seq_id).size() == cells.get_used();
}

template<typename T>
static void fasa_set_mask(const llama_kv_cache & kv, ggml_tensor * mask, const llama_ubatch & ubatch, T keep, T drop) {
    const int64_t n_kv = mask->ne[0];

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto   seq_id = ubatch.seq_id[i][0];
        const auto & cells  = kv.get_cells(seq_id);
        const auto & places = cells.seq_pos_get(seq_id);

        T * row = (T *) mask->data + n_kv*i;
        T * end = row + std::min<int64_t>(cells.get_used(), n_kv);

        std::fill(row, end, keep);
        std::fill(end, row + n_kv, drop);

        for (auto it = places.rbegin(); it != places.rend() && it->first > ubatch.pos[i]; ++it) {
            row[it->second] = drop;
        }
    }
}

bool llama_fasa_set_mask(const llama_kv_cache & kv, ggml_tensor * mask, const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (!fasa_is_dense(kv.get_cells(ubatch.seq_id[i][0]), ubatch.seq_id[i][0])) {
            return false;
        }
    }
    if (mask->type == GGML_TYPE_F16) {
        fasa_set_mask(kv, mask, ubatch, ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        fasa_set_mask(kv, mask, ubatch, 0.0f, -INFINITY);
    }
    return true;
}
