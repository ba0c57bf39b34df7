// Softmax attention to listed cells, or to all that a mask shows, in two steps with a barrier between them:
//
//   attend   for some cells and all query heads of a group: the greatest logit, and sums with the weights relative to it
//   combine  these sums of a head over all its cells
//
// A decode step is bound by memory: a row of K and V comes from there once for the whole group, and from the cache for
// every four of its heads. A prompt is bound by products: fasa-attend-tile.h. The cells of a head are divided into
// chunks, and these are dealt to the threads. Chunks do not depend on the number of threads, so neither does the result.

#include "fasa-attend-tile.h"

namespace {

constexpr int64_t FASA_LIST_CELLS = 256; // cells whose logits are at hand together
constexpr int64_t FASA_ROWS_AHEAD = 16;  // cells by which a row is asked for before it is needed
constexpr int64_t FASA_UNPACKED   = 16;  // rows that are made floats together, where no loader knows the type

constexpr int FASA_LIST_HEADS = 4; // query heads that share a loaded row

// rows of some cells, made floats first if no loader reads them in place
struct fasa_row_reader : fasa_rows {
    float * unpacked;

    fasa_row_reader(const ggml_tensor * t, int64_t head_kv, int64_t stream, float * scratch) :
        fasa_rows(t, head_kv, stream), unpacked(is_native ? nullptr : scratch) {
    }

    ggml_type type() const { return unpacked ? GGML_TYPE_F32 : t->type; }

    // how many can be had at once
    int64_t n_batch() const { return unpacked ? FASA_UNPACKED : FASA_LIST_CELLS; }

    // pointers to the rows of some cells; FASA_ROWS_AHEAD more of them are only asked for: the rows of what comes next
    void get(const int32_t * ids, int64_t n_ids, const fasa_row_reader & next, const int32_t * next_ids, int64_t n_next, const char ** rows) const {
        for (int64_t i = 0; i < n_ids; ++i) {
            if (unpacked) {
                unpack(ids[i], unpacked + i*n);
            }
            rows[i] = unpacked ? (const char *) (unpacked + i*n) : row(ids[i]);
        }
        for (int64_t i = 0; i < FASA_ROWS_AHEAD; ++i) {
            rows[n_ids + i] = i < n_next ? next.row(next_ids[i]) : rows[n_ids - 1];
        }
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
struct fasa_list_part {
    const float   * q;      // [n_k, n_heads], scaled
    int64_t         n_heads;
    const int32_t * ids;
    int64_t         n_ids;
    int64_t         n_next; // ids of the next part that follow these
    float         * logits; // [stride, n_heads], then the weights
    int64_t         stride;
    float         * sums;   // [n_sums, n_heads]
    int64_t         n_sums;
};

template <typename T, int N>
void fasa_list_logits(const fasa_list_part & part, const fasa_row_reader & k, const fasa_row_reader & v) {
    const char * rows[FASA_LIST_CELLS + FASA_ROWS_AHEAD];
    for (int64_t i = 0; i < part.n_ids; i += k.n_batch()) {
        const int64_t n = std::min(k.n_batch(), part.n_ids - i);
        k.get(part.ids + i, n, v, part.ids, part.n_ids, rows);
        fasa_dot_rows<T, N>(part.q, k.n, rows, n, part.logits + i, part.stride);
    }
}

template <typename T, int N>
void fasa_list_sums(const fasa_list_part & part, const fasa_row_reader & k, const fasa_row_reader & v) {
    static constexpr int N_VECS = FASA_ACCS/FASA_LIST_HEADS;

    const char * rows[FASA_LIST_CELLS + FASA_ROWS_AHEAD];
    for (int64_t i = 0; i < part.n_ids; i += v.n_batch()) {
        const int64_t n = std::min(v.n_batch(), part.n_ids - i);
        v.get(part.ids + i, n, k, part.ids + part.n_ids, part.n_next, rows);

        int64_t j = 0;
        for (; j + N_VECS <= v.n/FASA_LANES; j += N_VECS) {
            fasa_add_rows<T, N, N_VECS>(part.logits + i, part.stride, rows, n, part.sums, part.n_sums, j);
        }
        for (; j < v.n/FASA_LANES; ++j) {
            fasa_add_rows<T, N, 1>(part.logits + i, part.stride, rows, n, part.sums, part.n_sums, j);
        }
    }
}

// f of the type that loads the rows, and of the number of query heads
template <typename F>
void fasa_with_type_and_heads(ggml_type type, int64_t n_heads, F f) {
    fasa_with_type(type, [&](auto loader) {
        switch (n_heads) {
            case 1:  f(loader, std::integral_constant<int, 1>()); break;
            case 2:  f(loader, std::integral_constant<int, 2>()); break;
            case 3:  f(loader, std::integral_constant<int, 3>()); break;
            default: f(loader, std::integral_constant<int, 4>()); break;
        }
    });
}

// the logits become weights relative to the greatest so far, at sums[n_v]; their sum is kept behind it
void fasa_list_soft_max(float * logits, int64_t n, float softcap, float * sums, int64_t n_v) {
    std::fill(logits + n, logits + fasa_pad(n), -INFINITY);
    if (softcap != 0.0f) {
        for (int64_t i = 0; i < n; i += FASA_LANES) {
            v_store(logits + i, v_mul(v_set1(softcap), v_tanh(v_mul(v_load(logits + i), v_set1(1.0f/softcap)))));
        }
        std::fill(logits + n, logits + fasa_pad(n), -INFINITY);
    }

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

    for (int64_t i = i0; i < i1; i += FASA_LANES) {
        n += v_append_ids(op.mask_bits(u, u.token, i, std::min<int64_t>(FASA_LANES, i1 - i)), i, ids + n);
    }
    return n;
}

// floats that a thread needs: query heads, logits, ids, unpacked rows
int64_t fasa_list_work_size(const fasa_attend_op & op) {
    return op.n_group*op.n_k + FASA_LIST_HEADS*(FASA_LIST_CELLS + FASA_LANES) + FASA_LIST_CELLS + FASA_ROWS_AHEAD + FASA_LANES +
        FASA_UNPACKED*std::max(op.n_k, op.n_v);
}

// the partial sums of one unit; work: floats of the thread
void fasa_attend_list(const fasa_attend_op & op, const fasa_attend_op::unit & u, float * partial, float * work) {
    float   * q        = work;
    float   * logits   = q + op.n_group*op.n_k;
    int32_t * ids      = (int32_t *) (logits + FASA_LIST_HEADS*(FASA_LIST_CELLS + FASA_LANES));
    float   * unpacked = (float   *) ids + FASA_LIST_CELLS + FASA_ROWS_AHEAD + FASA_LANES;

    const fasa_row_reader k(op.k, u.head/op.n_shared, u.stream, unpacked);
    const fasa_row_reader v(op.v, u.head/op.n_shared, u.stream, unpacked);

    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const float * row = op.q_row(u, u.token, ig);
        for (int64_t i = 0; i < op.n_k; ++i) {
            q[ig*op.n_k + i] = i < op.q->ne[0] ? op.scale*row[i] : 0.0f;
        }

        float * sums = partial + op.sums_offset(u, u.token, ig);
        std::fill(sums, sums + op.n_sums, 0.0f);
        sums[op.n_v] = -FLT_MAX; // finite: a logit of -INFINITY has no weight beside it
    }

    const int64_t end = std::min((u.chunk + 1)*op.n_chunk, op.n_list);

    for (int64_t i = u.chunk*op.n_chunk; i < end; i += FASA_LIST_CELLS) {
        const int64_t i1 = std::min(i + FASA_LIST_CELLS, end);

        fasa_list_part part = {};

        part.ids    = ids;
        part.n_ids  = fasa_get_ids(op, u, i, i1, ids);
        part.n_next = fasa_get_ids(op, u, i1, std::min(i1 + FASA_ROWS_AHEAD, end), ids + part.n_ids);
        part.logits = logits;
        part.stride = FASA_LIST_CELLS + FASA_LANES;
        part.n_sums = op.n_sums;

        if (part.n_ids == 0) {
            continue;
        }
        for (int64_t ig = 0; ig < op.n_group; ig += FASA_LIST_HEADS) {
            part.q       = q + ig*op.n_k;
            part.n_heads = std::min<int64_t>(FASA_LIST_HEADS, op.n_group - ig);
            part.sums    = partial + op.sums_offset(u, u.token, ig);

            fasa_with_type_and_heads(k.type(), part.n_heads, [&](auto loader, auto n_heads) {
                fasa_list_logits<decltype(loader), n_heads>(part, k, v);
            });
            for (int64_t ih = 0; ih < part.n_heads; ++ih) {
                fasa_list_soft_max(logits + ih*part.stride, part.n_ids, op.softcap, part.sums + ih*op.n_sums, op.n_v);
            }
            fasa_with_type_and_heads(v.type(), part.n_heads, [&](auto loader, auto n_heads) {
                fasa_list_sums<decltype(loader), n_heads>(part, k, v);
            });
        }
    }
}

// the output of query head ih for one token
void fasa_combine_chunks(const fasa_attend_op & op, int64_t is, int64_t it, int64_t ih, const float * partial) {
    const fasa_attend_op::unit first = { is, 0, ih/op.n_group, it };

    const float * sums  = partial + op.sums_offset(first, it, ih % op.n_group);
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

// floats of a thread
int64_t fasa_attend_thread_size(const fasa_attend_op & op) {
    return GGML_PAD(op.is_tiled() ? fasa_tile_work(op, nullptr).size() : fasa_list_work_size(op), CACHE_LINE_SIZE_F32);
}

} // namespace

size_t ggml_fasa_attend_work_size(const ggml_tensor * dst, int n_tasks) {
    const fasa_attend_op op(dst);
    return (GGML_PAD(op.n_partial, CACHE_LINE_SIZE_F32) + n_tasks*fasa_attend_thread_size(op))*sizeof(float);
}

void ggml_compute_forward_fasa_attend(const ggml_compute_params * params, ggml_tensor * dst) {
    const fasa_attend_op op(dst);

    const int64_t ith = params->ith;
    const int64_t nth = params->nth;

    float * partial = (float *) params->wdata;
    float * work    = partial + GGML_PAD(op.n_partial, CACHE_LINE_SIZE_F32) + ith*fasa_attend_thread_size(op);

    if (op.is_tiled()) {
        // by turns: what a mask hides makes some shorter
        if (ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, nth);
        }
        ggml_barrier(params->threadpool);

        for (int64_t i = ith; i < op.n_units(); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            fasa_attend_tile(op, op.get_unit(i), partial, work);
        }
    } else {
        for (int64_t i = op.n_units()*ith/nth; i < op.n_units()*(ith + 1)/nth; ++i) {
            fasa_attend_list(op, op.get_unit(i), partial, work);
        }
    }

    ggml_barrier(params->threadpool);

    const int64_t n_head = op.n_heads*op.n_group;
    const int64_t n_out  = n_head*op.n_tokens*op.n_stream;

    for (int64_t i = n_out*ith/nth; i < n_out*(ith + 1)/nth; ++i) {
        fasa_combine_chunks(op, i/n_head/op.n_tokens, i/n_head % op.n_tokens, i % n_head, partial);
    }
}
