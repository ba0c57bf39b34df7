// Softmax attention to listed cells, or to all that a mask shows, in two steps with a barrier between them:
//
//   attend   for some cells and all query heads of a group: the greatest logit, and sums with the weights relative to it
//   combine  these sums of a head over all its cells
//
// A row of K and V comes from memory once for the whole group, and from the cache for every four of its heads. The cells
// of a head are divided into chunks, and these are dealt to the threads. Chunks do not depend on the number of threads,
// so neither does the result.

#include "fasa-simd.h"

#include <cfloat>

namespace {

constexpr int64_t FASA_TILE_CELLS = 256; // cells whose logits are at hand together
constexpr int64_t FASA_MIN_CHUNK  = 32;  // cells
constexpr int64_t FASA_MAX_CHUNKS = 64;  // of a head
constexpr int64_t FASA_ROWS_AHEAD = 16;  // cells by which a row is asked for before it is needed
constexpr int64_t FASA_UNPACKED   = 16;  // rows that are made floats together, where no loader knows the type

constexpr int FASA_TILE_HEADS = 4; // query heads that share a loaded row

int64_t fasa_pad(int64_t n) {
    return GGML_PAD(n, FASA_LANES);
}

// what the op reads, and how its work buffer is divided
struct fasa_attend_op {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * idx;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * dst;

    int64_t n_heads;  // that have a list: KV heads for their whole group, or query heads
    int64_t n_shared; // of them that read one KV head
    int64_t n_group;  // query heads that share a list
    int64_t n_tokens;
    int64_t n_stream;
    int64_t n_list;   // cells of a head, listed or masked ones included
    int64_t n_chunks; // of a head
    int64_t n_chunk;  // cells of a chunk

    // floats
    int64_t n_k;       // of a row of K, whole vectors
    int64_t n_v;
    int64_t n_sums;    // of a query head in a chunk: greatest logit, sum of weights, weighted sum of V
    int64_t n_partial; // of all chunks: [n_sums, n_group, n_chunks, n_heads, n_tokens, n_stream]
    int64_t n_thread;  // of a thread: query heads, logits, ids, unpacked rows

    explicit fasa_attend_op(const ggml_tensor * dst) :
        q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), idx(dst->src[3]), mask(dst->src[4]), sinks(dst->src[5]), dst(dst) {
        n_heads   = idx ? idx->ne[1] : k->ne[1];
        n_shared  = n_heads/k->ne[1];
        n_group   = q->ne[1]/n_heads;
        n_tokens  = q->ne[2];
        n_stream  = q->ne[3];
        n_list    = idx ? idx->ne[0] : k->ne[2];

        // enough chunks for many threads, but not more than that, as each has sums of its own; the same for one stream or many
        const int64_t min_chunk  = n_heads*n_tokens < 4 ? FASA_MIN_CHUNK : 4*FASA_MIN_CHUNK;
        const int64_t max_chunks = std::max<int64_t>(FASA_MAX_CHUNKS/n_tokens, 1);

        n_chunk   = GGML_PAD(std::max(min_chunk, (n_list + max_chunks - 1)/max_chunks), FASA_MIN_CHUNK);
        n_chunks  = (n_list + n_chunk - 1)/n_chunk;

        n_k       = fasa_pad(k->ne[0]);
        n_v       = fasa_pad(v->ne[0]);
        n_sums    = n_v + FASA_LANES;
        n_partial = n_sums*n_group*n_chunks*n_heads*n_tokens*n_stream;
        n_thread  = GGML_PAD(n_group*n_k + FASA_TILE_HEADS*(FASA_TILE_CELLS + FASA_LANES) + FASA_TILE_CELLS + FASA_ROWS_AHEAD + FASA_LANES +
            FASA_UNPACKED*std::max(n_k, n_v), CACHE_LINE_SIZE_F32);
    }

    // the cells of a chunk for one token and list
    struct unit {
        int64_t stream, chunk, head, token;
    };

    int64_t n_units() const { return n_stream*n_chunks*n_heads*n_tokens; }

    // heads and tokens inside of a chunk: they read neighbours, or the same
    unit get_unit(int64_t i) const {
        return { i/n_tokens/n_heads/n_chunks, i/n_tokens/n_heads % n_chunks, i/n_tokens % n_heads, i % n_tokens };
    }

    int64_t sums_offset(const unit & u, int64_t ig) const {
        return ((((u.stream*n_tokens + u.token)*n_heads + u.head)*n_chunks + u.chunk)*n_group + ig)*n_sums;
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

// of some cells, and how they are to be made floats first if no loader reads their type
struct fasa_row_reader {
    const ggml_tensor * t;
    const char        * base; // of the head in the stream
    int64_t             n;    // floats, whole vectors
    float             * unpacked; // nullptr: a loader reads the rows in place

    fasa_row_reader(const ggml_tensor * t, int64_t head_kv, int64_t stream, float * scratch) :
        t(t), base((const char *) t->data + head_kv*t->nb[1] + stream*t->nb[3]), n(fasa_pad(t->ne[0])) {
        const bool native = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 ||
            t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0;
        unpacked = native && t->ne[0] == n ? nullptr : scratch;
    }

    ggml_type type() const { return unpacked ? GGML_TYPE_F32 : t->type; }

    const char * row(int32_t cell) const { return base + cell*t->nb[2]; }

    // how many can be had at once
    int64_t n_batch() const { return unpacked ? FASA_UNPACKED : FASA_TILE_CELLS; }

    // pointers to the rows of some cells; FASA_ROWS_AHEAD more of them are only asked for: the rows of what comes next
    void get(const int32_t * ids, int64_t n_ids, const fasa_row_reader & next, const int32_t * next_ids, int64_t n_next, const char ** rows) const {
        for (int64_t i = 0; i < n_ids; ++i) {
            rows[i] = unpacked ? unpack(ids[i], unpacked + i*n) : row(ids[i]);
        }
        for (int64_t i = 0; i < FASA_ROWS_AHEAD; ++i) {
            rows[n_ids + i] = i < n_next ? next.row(next_ids[i]) : rows[n_ids - 1];
        }
    }

    const char * unpack(int32_t cell, float * dst) const {
        switch (t->type) {
            case GGML_TYPE_F32: memcpy(dst, row(cell), t->ne[0]*sizeof(float)); break;
            case GGML_TYPE_F16: ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row(cell), dst, t->ne[0]); break;
            default:            ggml_get_type_traits(t->type)->to_float(row(cell), dst, t->ne[0]); break;
        }
        std::fill(dst + t->ne[0], dst + n, 0.0f);
        return (const char *) dst;
    }
};

// logits of N query heads for some cells, of head i at i*stride; q: [n, N], rows: see fasa_row_reader::get
template <typename T, int N>
void fasa_dot_rows(const float * q, int64_t n, const char * const * rows, int64_t n_rows, float * logits, int64_t stride) {
    static constexpr int N_CELLS = FASA_ACCS/(N == 3 ? 4 : N); // at a time

    for (int64_t i = 0; i < n_rows; i += N_CELLS) {
        const int64_t n_cells = std::min<int64_t>(N_CELLS, n_rows - i);

        vec acc[FASA_ACCS];
        for (auto & x : acc) {
            x = v_set1(0.0f);
        }
        for (int64_t j = 0; j < n/FASA_LANES; ++j) {
            for (int ic = 0; ic < N_CELLS; ++ic) {
                const vec x = T::load(rows[i + std::min<int64_t>(ic, n_cells - 1)], j);
                FASA_PREFETCH(T::at(rows[i + std::min<int64_t>(ic, n_cells - 1) + FASA_ROWS_AHEAD], j));
                for (int ih = 0; ih < N; ++ih) {
                    acc[ih*N_CELLS + ic] = v_fma(x, v_load(q + ih*n + j*FASA_LANES), acc[ih*N_CELLS + ic]);
                }
            }
        }

        float sums[FASA_ACCS];
        for (int j = 0; j < FASA_ACCS; j += FASA_LANES) {
            v_store(sums + j, v_sums(acc + j));
        }
        for (int ih = 0; ih < N; ++ih) {
            std::copy_n(sums + ih*N_CELLS, n_cells, logits + ih*stride + i);
        }
    }
}

// add the weighted rows to the sums of N query heads, N_VECS vectors from the j-th on
template <typename T, int N, int N_VECS>
void fasa_add_rows(
        const float * weights, int64_t stride, const char * const * rows, int64_t n_rows, float * sums, int64_t n_sums, int64_t j) {
    vec acc[N][N_VECS];
    for (int ih = 0; ih < N; ++ih) {
        for (int iv = 0; iv < N_VECS; ++iv) {
            acc[ih][iv] = v_load(sums + ih*n_sums + (j + iv)*FASA_LANES);
        }
    }
    for (int64_t i = 0; i < n_rows; ++i) {
        for (int iv = 0; iv < N_VECS; ++iv) {
            const vec x = T::load(rows[i], j + iv);
            FASA_PREFETCH(T::at(rows[i + FASA_ROWS_AHEAD], j + iv));
            for (int ih = 0; ih < N; ++ih) {
                acc[ih][iv] = v_fma(x, v_set1(weights[ih*stride + i]), acc[ih][iv]);
            }
        }
    }
    for (int ih = 0; ih < N; ++ih) {
        for (int iv = 0; iv < N_VECS; ++iv) {
            v_store(sums + ih*n_sums + (j + iv)*FASA_LANES, acc[ih][iv]);
        }
    }
}

// some query heads and some cells
struct fasa_tile {
    const float   * q;      // [n_k, n_heads], scaled
    int64_t         n_heads;
    const int32_t * ids;
    int64_t         n_ids;
    int64_t         n_next; // ids of the next tile that follow these
    float         * logits; // [stride, n_heads], then the weights
    int64_t         stride;
    float         * sums;   // [n_sums, n_heads]
    int64_t         n_sums;
};

template <typename T, int N>
void fasa_tile_logits(const fasa_tile & tile, const fasa_row_reader & k, const fasa_row_reader & v) {
    const char * rows[FASA_TILE_CELLS + FASA_ROWS_AHEAD];
    for (int64_t i = 0; i < tile.n_ids; i += k.n_batch()) {
        const int64_t n = std::min(k.n_batch(), tile.n_ids - i);
        k.get(tile.ids + i, n, v, tile.ids, tile.n_ids, rows);
        fasa_dot_rows<T, N>(tile.q, k.n, rows, n, tile.logits + i, tile.stride);
    }
}

template <typename T, int N>
void fasa_tile_sums(const fasa_tile & tile, const fasa_row_reader & k, const fasa_row_reader & v) {
    static constexpr int N_VECS = FASA_ACCS/FASA_TILE_HEADS;

    const char * rows[FASA_TILE_CELLS + FASA_ROWS_AHEAD];
    for (int64_t i = 0; i < tile.n_ids; i += v.n_batch()) {
        const int64_t n = std::min(v.n_batch(), tile.n_ids - i);
        v.get(tile.ids + i, n, k, tile.ids + tile.n_ids, tile.n_next, rows);

        int64_t j = 0;
        for (; j + N_VECS <= v.n/FASA_LANES; j += N_VECS) {
            fasa_add_rows<T, N, N_VECS>(tile.logits + i, tile.stride, rows, n, tile.sums, tile.n_sums, j);
        }
        for (; j < v.n/FASA_LANES; ++j) {
            fasa_add_rows<T, N, 1>(tile.logits + i, tile.stride, rows, n, tile.sums, tile.n_sums, j);
        }
    }
}

// f<type of the rows, number of query heads>
#define FASA_DISPATCH_HEADS(f, T, n_heads, ...)      \
    switch (n_heads) {                               \
        case 1:  f<T, 1>(__VA_ARGS__); break;        \
        case 2:  f<T, 2>(__VA_ARGS__); break;        \
        case 3:  f<T, 3>(__VA_ARGS__); break;        \
        default: f<T, 4>(__VA_ARGS__); break;        \
    }

#define FASA_DISPATCH(f, type, n_heads, ...)                                                        \
    switch (type) {                                                                                 \
        case GGML_TYPE_F32:  FASA_DISPATCH_HEADS(f, fasa_f32,  n_heads, __VA_ARGS__); break;        \
        case GGML_TYPE_F16:  FASA_DISPATCH_HEADS(f, fasa_f16,  n_heads, __VA_ARGS__); break;        \
        case GGML_TYPE_BF16: FASA_DISPATCH_HEADS(f, fasa_bf16, n_heads, __VA_ARGS__); break;        \
        case GGML_TYPE_Q8_0: FASA_DISPATCH_HEADS(f, fasa_q8_0, n_heads, __VA_ARGS__); break;        \
        case GGML_TYPE_Q4_0: FASA_DISPATCH_HEADS(f, fasa_q4_0, n_heads, __VA_ARGS__); break;        \
        default: GGML_ABORT("unpacked rows are floats");                                            \
    }

// the logits become weights relative to the greatest so far, at sums[n_v]; their sum is kept behind it
void fasa_soft_max(float * logits, int64_t n, float softcap, float * sums, int64_t n_v) {
    if (softcap != 0.0f) {
        for (int64_t i = 0; i < n; ++i) {
            logits[i] = softcap*std::tanh(logits[i]/softcap);
        }
    }
    std::fill(logits + n, logits + fasa_pad(n), -INFINITY);

    vec max = v_set1(-INFINITY);
    for (int64_t i = 0; i < n; i += FASA_LANES) {
        max = v_max(v_load(logits + i), max);
    }
    const float before = sums[n_v];
    const float after  = std::max(before, v_greatest(max));

    if (after > before) {
        const vec scale = v_set1(std::exp(before - after));
        for (int64_t i = 0; i < n_v; i += FASA_LANES) {
            v_store(sums + i, v_mul(v_load(sums + i), scale));
        }
        sums[n_v + 1] *= std::exp(before - after);
    }

    vec sum = v_set1(0.0f);
    for (int64_t i = 0; i < n; i += FASA_LANES) {
        const vec x      = v_mul(v_sub(v_load(logits + i), v_set1(after)), v_set1(FASA_LOG2_E));
        const vec weight = v_select_gt(v_set1(FASA_EXP2_LEAST), x, v_set1(0.0f), v_exp2(x));
        v_store(logits + i, weight);
        sum = v_add(sum, weight);
    }
    sums[n_v]      = after;
    sums[n_v + 1] += v_sum(sum);
}

// the cells among list positions [i0, i1)
int64_t fasa_get_ids(const fasa_attend_op & op, const fasa_attend_op::unit & u, int64_t i0, int64_t i1, int32_t * ids) {
    int64_t n = 0;

    if (op.idx) {
        const int32_t * list = (const int32_t *) op.idx->data + ((u.stream*op.n_tokens + u.token)*op.n_heads + u.head)*op.n_list;
        for (int64_t i = i0; i < i1; ++i) {
            GGML_ASSERT(list[i] < op.k->ne[2]);
            ids[n] = list[i];
            n += list[i] >= 0;
        }
        return n;
    }

    const auto * mask = (const ggml_fp16_t *) ((const char *) op.mask->data + u.token*op.mask->nb[1] + u.stream*op.mask->nb[3]);

    int64_t i = i0;
    for (; i + FASA_LANES <= i1; i += FASA_LANES) {
        n += v_append_ids(v_bits_gt(v_load_f16(mask + i), v_set1(-INFINITY)), i, ids + n);
    }
    for (; i < i1; ++i) {
        ids[n] = i;
        n += GGML_CPU_FP16_TO_FP32(mask[i]) > -INFINITY;
    }
    return n;
}

// the partial sums of one unit; work: floats of the thread
void fasa_attend_unit(const fasa_attend_op & op, const fasa_attend_op::unit & u, float * partial, float * work) {
    const float scale   = ggml_get_op_params_f32(op.dst, 0);
    const float softcap = ggml_get_op_params_f32(op.dst, 1);

    float   * q        = work;
    float   * logits   = q + op.n_group*op.n_k;
    int32_t * ids      = (int32_t *) (logits + FASA_TILE_HEADS*(FASA_TILE_CELLS + FASA_LANES));
    float   * unpacked = (float   *) ids + FASA_TILE_CELLS + FASA_ROWS_AHEAD + FASA_LANES;

    const fasa_row_reader k(op.k, u.head/op.n_shared, u.stream, unpacked);
    const fasa_row_reader v(op.v, u.head/op.n_shared, u.stream, unpacked);

    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const float * row = (const float *) ((const char *) op.q->data +
            (u.head*op.n_group + ig)*op.q->nb[1] + u.token*op.q->nb[2] + u.stream*op.q->nb[3]);
        for (int64_t i = 0; i < op.n_k; ++i) {
            q[ig*op.n_k + i] = i < op.q->ne[0] ? scale*row[i] : 0.0f;
        }

        float * sums = partial + op.sums_offset(u, ig);
        std::fill(sums, sums + op.n_sums, 0.0f);
        sums[op.n_v] = -FLT_MAX; // finite: a logit of -INFINITY has no weight beside it
    }

    const int64_t end = std::min((u.chunk + 1)*op.n_chunk, op.n_list);

    for (int64_t i = u.chunk*op.n_chunk; i < end; i += FASA_TILE_CELLS) {
        const int64_t i1 = std::min(i + FASA_TILE_CELLS, end);

        fasa_tile tile = {};

        tile.ids    = ids;
        tile.n_ids  = fasa_get_ids(op, u, i, i1, ids);
        tile.n_next = fasa_get_ids(op, u, i1, std::min(i1 + FASA_ROWS_AHEAD, end), ids + tile.n_ids);
        tile.logits = logits;
        tile.stride = FASA_TILE_CELLS + FASA_LANES;
        tile.n_sums = op.n_sums;

        if (tile.n_ids == 0) {
            continue;
        }
        for (int64_t ig = 0; ig < op.n_group; ig += FASA_TILE_HEADS) {
            tile.q       = q + ig*op.n_k;
            tile.n_heads = std::min<int64_t>(FASA_TILE_HEADS, op.n_group - ig);
            tile.sums    = partial + op.sums_offset(u, ig);

            FASA_DISPATCH(fasa_tile_logits, k.type(), tile.n_heads, tile, k, v);
            for (int64_t ih = 0; ih < tile.n_heads; ++ih) {
                fasa_soft_max(logits + ih*tile.stride, tile.n_ids, softcap, tile.sums + ih*op.n_sums, op.n_v);
            }
            FASA_DISPATCH(fasa_tile_sums, v.type(), tile.n_heads, tile, k, v);
        }
    }
}

// the output of query head ih for one token
void fasa_combine_chunks(const fasa_attend_op & op, int64_t is, int64_t it, int64_t ih, const float * partial) {
    const fasa_attend_op::unit first = { is, 0, ih/op.n_group, it };

    const float * sums  = partial + op.sums_offset(first, ih % op.n_group);
    const float * sinks = op.sinks ? (const float *) op.sinks->data : nullptr;

    const auto chunk    = [&](int64_t ic) { return sums + ic*op.n_group*op.n_sums; };
    const auto is_empty = [&](int64_t ic) { return chunk(ic)[op.n_v + 1] == 0.0f; }; // NaN is not: it must be seen

    float max = sinks ? sinks[ih] : -INFINITY;
    for (int64_t ic = 0; ic < op.n_chunks; ++ic) {
        max = std::max(max, chunk(ic)[op.n_v]);
    }
    float sum = sinks ? std::exp(sinks[ih] - max) : 0.0f;
    for (int64_t ic = 0; ic < op.n_chunks; ++ic) {
        sum += is_empty(ic) ? 0.0f : chunk(ic)[op.n_v + 1]*std::exp(chunk(ic)[op.n_v] - max);
    }

    float * out = (float *) ((char *) op.dst->data + ih*op.dst->nb[1] + it*op.dst->nb[2] + is*op.dst->nb[3]);

    std::fill(out, out + op.v->ne[0], 0.0f);
    for (int64_t ic = 0; ic < op.n_chunks; ++ic) {
        if (!is_empty(ic)) {
            const float weight = std::exp(chunk(ic)[op.n_v] - max)/sum;
            for (int64_t i = 0; i < op.v->ne[0]; ++i) {
                out[i] += weight*chunk(ic)[i];
            }
        }
    }
}

} // namespace

size_t ggml_fasa_attend_work_size(const ggml_tensor * dst, int n_tasks) {
    const fasa_attend_op op(dst);
    return (GGML_PAD(op.n_partial, CACHE_LINE_SIZE_F32) + n_tasks*op.n_thread)*sizeof(float);
}

void ggml_compute_forward_fasa_attend(const ggml_compute_params * params, ggml_tensor * dst) {
    const fasa_attend_op op(dst);

    const int64_t ith = params->ith;
    const int64_t nth = params->nth;

    float * partial = (float *) params->wdata;
    float * work    = partial + GGML_PAD(op.n_partial, CACHE_LINE_SIZE_F32) + ith*op.n_thread;

    for (int64_t i = op.n_units()*ith/nth; i < op.n_units()*(ith + 1)/nth; ++i) {
        fasa_attend_unit(op, op.get_unit(i), partial, work);
    }

    ggml_barrier(params->threadpool);

    const int64_t n_head = op.n_heads*op.n_group;
    const int64_t n_out  = n_head*op.n_tokens*op.n_stream;

    for (int64_t i = n_out*ith/nth; i < n_out*(ith + 1)/nth; ++i) {
        fasa_combine_chunks(op, i/n_head/op.n_tokens, i/n_head % op.n_tokens, i % n_head, partial);
    }
}
