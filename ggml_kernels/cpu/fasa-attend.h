// What both ways to attend share: the op as kernels see it, and rows of K and V as vectors of floats.

#pragma once

#include "fasa-simd.h"

#include <cfloat>

namespace {

constexpr int64_t FASA_MIN_CHUNK  = 32;  // cells
constexpr int64_t FASA_MAX_CHUNKS = 64;  // of a head
constexpr int64_t FASA_TILE_ROWS  = 144; // query heads of neighbouring tokens that are worked on together, about
constexpr int64_t FASA_MIN_TILE   = 24;  // as many are worth a tile
constexpr int64_t FASA_TILE_CELLS = 64;  // whose K and V are at hand together: a block

int64_t fasa_pad(int64_t n) {
    return GGML_PAD(n, std::max(FASA_LANES, 8));
}

// what the op reads, and how its work is divided
struct fasa_attend_op {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * idx;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * dst;

    // of what chooses blocks of cells, or NULL
    const ggml_tensor * q_tip;
    const ggml_tensor * tips;
    const ggml_tensor * dims;
    const ggml_tensor * ranges;

    int64_t n_heads;  // that have a list: KV heads for their whole group, or query heads
    int64_t n_shared; // of them that read one KV head
    int64_t n_group;  // query heads that share a list
    int64_t n_tokens;
    int64_t n_tile;   // tokens that are worked on together
    int64_t n_tiles;
    int64_t n_stream;
    int64_t n_list;   // cells of a head, listed or masked ones included
    int64_t n_chunks; // of a head
    int64_t n_chunk;  // cells of a chunk

    // floats
    int64_t n_k;       // of a row of K, whole vectors
    int64_t n_v;
    int64_t n_sums;    // of a query head in a chunk: weighted sum of V, greatest logit, sum of weights
    int64_t n_partial; // of all chunks: [n_sums, n_group, n_chunks, n_heads, n_tokens, n_stream]

    float scale;
    float softcap;
    float mass;

    explicit fasa_attend_op(const ggml_tensor * dst) :
        q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), idx(dst->src[3]), mask(dst->src[4]), sinks(dst->src[5]), dst(dst),
        q_tip(dst->src[6]), tips(dst->src[7]), dims(dst->src[8]), ranges(dst->src[9]) {
        n_heads   = idx ? idx->ne[1] : k->ne[1];
        n_shared  = n_heads/k->ne[1];
        n_group   = q->ne[1]/n_heads;
        n_tokens  = q->ne[2];
        n_tile    = is_tiled() ? std::min(n_tokens, std::max<int64_t>(FASA_TILE_ROWS/n_group, 1)) : 1;
        n_tiles   = (n_tokens + n_tile - 1)/n_tile;
        n_stream  = q->ne[3];
        n_list    = idx ? idx->ne[0] : k->ne[2];

        // enough chunks for many threads, but not more than that, as each has sums of its own; the same for one stream or many
        const int64_t min_chunk  = n_heads*n_tiles < 4 ? FASA_MIN_CHUNK : 4*FASA_MIN_CHUNK;
        const int64_t max_chunks = tips ? 1 : std::max<int64_t>(FASA_MAX_CHUNKS/(is_tiled() ? n_heads*n_tiles : n_tokens), 1);

        n_chunk   = GGML_PAD(std::max(min_chunk, (n_list + max_chunks - 1)/max_chunks), FASA_MIN_CHUNK);
        n_chunks  = (n_list + n_chunk - 1)/n_chunk;

        n_k       = fasa_pad(k->ne[0]);
        n_v       = fasa_pad(v->ne[0]);
        n_sums    = n_v + FASA_LANES;
        n_partial = n_sums*n_group*n_chunks*n_heads*n_tokens*n_stream;

        scale   = ggml_get_op_params_f32(dst, 0);
        softcap = ggml_get_op_params_f32(dst, 1);
        mass    = tips ? ggml_get_op_params_f32(dst, 2) : 1.0f;
    }

    // a token's list is its own, a mask has much in common with the next token's
    bool is_tiled() const { return tips || (!idx && n_tokens > 1 && n_tokens*n_group >= FASA_MIN_TILE); }

    // the cells of a chunk for one list, and some tokens
    struct unit {
        int64_t stream, chunk, head, token;
    };

    int64_t n_units() const { return n_stream*n_chunks*n_heads*n_tiles; }

    // heads and tokens inside of a chunk: they read neighbours, or the same; the last tokens, which see most, first
    unit get_unit(int64_t i) const {
        return { i/n_tiles/n_heads/n_chunks, i/n_tiles/n_heads % n_chunks, i/n_tiles % n_heads, (n_tiles - 1 - i % n_tiles)*n_tile };
    }

    int64_t sums_offset(const unit & u, int64_t it, int64_t ig) const {
        return ((((u.stream*n_tokens + it)*n_heads + u.head)*n_chunks + u.chunk)*n_group + ig)*n_sums;
    }

    const float * q_row(const unit & u, int64_t it, int64_t ig) const { return row_of(q, u, it, ig); }

    const float * row_of(const ggml_tensor * t, const unit & u, int64_t it, int64_t ig) const {
        return (const float *) ((const char *) t->data + (u.head*n_group + ig)*t->nb[1] + it*t->nb[2] + u.stream*t->nb[3]);
    }

    const ggml_fp16_t * mask_row(const unit & u, int64_t it) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + it*mask->nb[1] + u.stream*mask->nb[3]);
    }

    // bit i: the token sees cell first + i; n of them, at most FASA_LANES
    uint32_t mask_bits(const unit & u, int64_t it, int64_t first, int64_t n) const {
        const ggml_fp16_t * row = mask_row(u, it) + first;

        if (n < FASA_LANES) {
            uint32_t bits = 0;
            for (int64_t i = 0; i < n; ++i) {
                bits |= (uint32_t) (GGML_CPU_FP16_TO_FP32(row[i]) > -INFINITY) << i;
            }
            return bits;
        }
        return v_bits_gt(v_load_f16(row), v_set1(-INFINITY));
    }
};

//
// rows of K and V, a vector at a time
//

struct fasa_f32 {
    static const float * at  (const char * row, int64_t i) { return (const float *) row + i*FASA_LANES; }
    static vec           load(const char * row, int64_t i) { return v_load(at(row, i)); }
};

struct fasa_f16 {
    static const ggml_fp16_t * at  (const char * row, int64_t i) { return (const ggml_fp16_t *) row + i*FASA_LANES; }
    static vec                 load(const char * row, int64_t i) { return v_load_f16(at(row, i)); }
};

struct fasa_bf16 {
    static const ggml_bf16_t * at  (const char * row, int64_t i) { return (const ggml_bf16_t *) row + i*FASA_LANES; }
    static vec                 load(const char * row, int64_t i) { return v_load_bf16(at(row, i)); }
};

struct fasa_q8_0 {
    static const block_q8_0 * at(const char * row, int64_t i) { return (const block_q8_0 *) row + i*FASA_LANES/QK8_0; }

    static vec load(const char * row, int64_t i) {
        const auto * block = at(row, i);
        return v_mul(v_load_i8(block->qs + i*FASA_LANES % QK8_0), v_set1(GGML_CPU_FP16_TO_FP32(block->d)));
    }
};

struct fasa_q4_0 {
    static const block_q4_0 * at(const char * row, int64_t i) { return (const block_q4_0 *) row + i*FASA_LANES/QK4_0; }

    static vec load(const char * row, int64_t i) {
        const auto *  block = at(row, i);
        const int64_t first = i*FASA_LANES % QK4_0;
        return v_mul(v_load_u4(block->qs + first % (QK4_0/2), first >= QK4_0/2), v_set1(GGML_CPU_FP16_TO_FP32(block->d)));
    }
};

// f of an object of the type that loads rows of this one
template <typename F>
void fasa_with_type(ggml_type type, F f) {
    switch (type) {
        case GGML_TYPE_F32:  f(fasa_f32());  break;
        case GGML_TYPE_F16:  f(fasa_f16());  break;
        case GGML_TYPE_BF16: f(fasa_bf16()); break;
        case GGML_TYPE_Q8_0: f(fasa_q8_0()); break;
        case GGML_TYPE_Q4_0: f(fasa_q4_0()); break;
        default: GGML_ABORT("unpacked rows are floats");
    }
}

// the rows of a KV head in a stream
struct fasa_rows {
    const ggml_tensor * t;
    const char        * base;
    int64_t             n;         // floats of a row, whole vectors
    bool                is_native; // a loader reads them in place

    fasa_rows(const ggml_tensor * t, int64_t head_kv, int64_t stream) :
        t(t), base((const char *) t->data + head_kv*t->nb[1] + stream*t->nb[3]), n(fasa_pad(t->ne[0])) {
        is_native = t->ne[0] == n && (t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 ||
            t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0);
    }

    const char * row(int64_t cell) const { return base + cell*t->nb[2]; }

    void unpack(int64_t cell, float * dst) const {
        switch (t->type) {
            case GGML_TYPE_F32: memcpy(dst, row(cell), t->ne[0]*sizeof(float)); break;
            case GGML_TYPE_F16: ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row(cell), dst, t->ne[0]); break;
            default:            ggml_get_type_traits(t->type)->to_float(row(cell), dst, t->ne[0]); break;
        }
        std::fill(dst + t->ne[0], dst + n, 0.0f);
    }
};

} // namespace
