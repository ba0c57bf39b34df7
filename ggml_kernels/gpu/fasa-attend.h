// FASA_ATTEND: softmax attention to listed cells, or to all that a mask shows, in two steps.
//
//   split    for some cells of a list: the greatest logit of each query head, and sums with the weights relative to it
//   combine  these sums of a head over all splits
//
// Some lanes of a warp read a row of K or V together, 8 elements each, and hold as many of the query or of the sum, for all
// query heads that share the list: each row is read once for the group. Where rows lie is known to fasa_row_at alone.

#pragma once

#include "fasa-common.h"

//
// rows
//

FASA_FN FASA_GLOBAL const char * fasa_row_at(FASA_GLOBAL const char * rows, uint64_t nb, int32_t cell) {
    return rows + cell*nb;
}

// bytes of eight numbers that begin at an even address
struct fasa_bytes {
    uint16_t pairs[4];
};

FASA_FN fasa_bytes fasa_load_bytes(FASA_GLOBAL const char * p) {
    FASA_GLOBAL const uint16_t * pairs = (FASA_GLOBAL const uint16_t *) p;
    return { { pairs[0], pairs[1], pairs[2], pairs[3] } };
}

FASA_FN int32_t fasa_byte(FASA_THREAD const fasa_bytes & bytes, int32_t i) {
    return bytes.pairs[i/2] >> 8*(i%2) & 0xFF;
}

// the i-th eight elements of a row
template <int TYPE> struct fasa_rows;

template <> struct fasa_rows<FASA_TYPE_F32> {
    FASA_FN_MEMBER void load(FASA_GLOBAL const char * row, int32_t i, FASA_THREAD float * res) {
        FASA_GLOBAL const float4 * p = (FASA_GLOBAL const float4 *) row + 2*i;
        const float4 a = p[0];
        const float4 b = p[1];
        res[0] = a.x; res[1] = a.y; res[2] = a.z; res[3] = a.w;
        res[4] = b.x; res[5] = b.y; res[6] = b.z; res[7] = b.w;
    }
};

template <> struct fasa_rows<FASA_TYPE_F16> {
    FASA_FN_MEMBER void load(FASA_GLOBAL const char * row, int32_t i, FASA_THREAD float * res) {
        const uint4    x = ((FASA_GLOBAL const uint4 *) row)[i];
        const uint32_t pairs[4] = { x.x, x.y, x.z, x.w };
        FASA_UNROLL
        for (int32_t j = 0; j < 4; ++j) {
            res[2*j + 0] = fasa_from_f16((uint16_t) (pairs[j] & 0xFFFF));
            res[2*j + 1] = fasa_from_f16((uint16_t) (pairs[j] >> 16));
        }
    }
};

template <> struct fasa_rows<FASA_TYPE_BF16> {
    FASA_FN_MEMBER void load(FASA_GLOBAL const char * row, int32_t i, FASA_THREAD float * res) {
        const uint4    x = ((FASA_GLOBAL const uint4 *) row)[i];
        const uint32_t pairs[4] = { x.x, x.y, x.z, x.w };
        FASA_UNROLL
        for (int32_t j = 0; j < 4; ++j) {
            res[2*j + 0] = fasa_float(pairs[j] << 16);
            res[2*j + 1] = fasa_float(pairs[j] & 0xFFFF0000u);
        }
    }
};

// blocks of 32: an f16 scale, then a byte for each element
template <> struct fasa_rows<FASA_TYPE_Q8_0> {
    FASA_FN_MEMBER void load(FASA_GLOBAL const char * row, int32_t i, FASA_THREAD float * res) {
        FASA_GLOBAL const char * block = row + i/4*34;
        const float      d     = fasa_from_f16(*(FASA_GLOBAL const uint16_t *) block);
        const fasa_bytes bytes = fasa_load_bytes(block + 2 + i%4*8);
        FASA_UNROLL
        for (int32_t j = 0; j < 8; ++j) {
            res[j] = d*(float) (int8_t) fasa_byte(bytes, j);
        }
    }
};

// blocks of 32: an f16 scale, then 16 bytes, the lower halves of which are the first 16 elements
template <> struct fasa_rows<FASA_TYPE_Q4_0> {
    FASA_FN_MEMBER void load(FASA_GLOBAL const char * row, int32_t i, FASA_THREAD float * res) {
        FASA_GLOBAL const char * block = row + i/4*18;
        const float      d     = fasa_from_f16(*(FASA_GLOBAL const uint16_t *) block);
        const fasa_bytes bytes = fasa_load_bytes(block + 2 + i%2*8);
        const int32_t    shift = i%4/2*4;
        FASA_UNROLL
        for (int32_t j = 0; j < 8; ++j) {
            res[j] = d*(float) ((fasa_byte(bytes, j) >> shift & 0xF) - 8);
        }
    }
};

// what lane i reads of the row of a cell; zeros where there is nothing
template <int TYPE>
FASA_FN void fasa_load(FASA_GLOBAL const char * rows, uint64_t nb, int32_t n_embd, int32_t id, int32_t i, FASA_THREAD float * res) {
    if (id >= 0 && i*FASA_ELEMENTS < n_embd) {
        fasa_rows<TYPE>::load(fasa_row_at(rows, nb, id), i, res);
    } else {
        FASA_UNROLL
        for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
            res[j] = 0.0f;
        }
    }
}

#define FASA_BY_TYPE(type, call)                              \
    switch (type) {                                           \
        case FASA_TYPE_F32:  call<FASA_TYPE_F32,  LANES, N> FASA_ATTEND_ARGUMENTS; break; \
        case FASA_TYPE_F16:  call<FASA_TYPE_F16,  LANES, N> FASA_ATTEND_ARGUMENTS; break; \
        case FASA_TYPE_BF16: call<FASA_TYPE_BF16, LANES, N> FASA_ATTEND_ARGUMENTS; break; \
        case FASA_TYPE_Q8_0: call<FASA_TYPE_Q8_0, LANES, N> FASA_ATTEND_ARGUMENTS; break; \
        case FASA_TYPE_Q4_0: call<FASA_TYPE_Q4_0, LANES, N> FASA_ATTEND_ARGUMENTS; break; \
    }

//
// split
//

// in shared memory; sums of all warps come where the logits have been
struct fasa_attend_shared {
    FASA_SHARED float   * logits; // [FASA_STEP, N], then weights
    FASA_SHARED float   * max;    // [N]
    FASA_SHARED float   * sum;    // [N]
    FASA_SHARED float   * factor; // [N] by which sums so far shrink
    FASA_SHARED int32_t * ids;    // [FASA_STEP]
    FASA_SHARED float   * out;    // [LANES*FASA_ELEMENTS, FASA_WARPS]
};

// lanes that read a row together, LANES of them; each reads cells at.index/LANES, and so on by FASA_THREADS/LANES
template <int TYPE, int LANES, int N>
FASA_FN void fasa_attend_logits(
        FASA_GLOBAL const char * rows, uint64_t nb, int32_t n_embd,
        FASA_THREAD const float (& q)[N][FASA_ELEMENTS],
        FASA_THREAD const fasa_attend_shared & shared,
        fasa_at at) {
    const int32_t lane = at.lane%LANES;

    FASA_UNROLL_ROWS
    for (int32_t i = 0; i < FASA_STEP; i += FASA_THREADS/LANES) {
        const int32_t slot = i + at.index/LANES;

        float x[FASA_ELEMENTS];
        fasa_load<TYPE>(rows, nb, n_embd, shared.ids[slot], lane, x);
        FASA_UNROLL
        for (int32_t n = 0; n < N; ++n) {
            float sum = 0.0f;
            FASA_UNROLL
            for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
                sum += x[j]*q[n][j];
            }
            sum = fasa_warp_sum(sum, 1, LANES);
            if (lane == n%LANES) {
                shared.logits[n*FASA_STEP + slot] = sum;
            }
        }
    }
}

template <int TYPE, int LANES, int N>
FASA_FN void fasa_attend_sums(
        FASA_GLOBAL const char * rows, uint64_t nb, int32_t n_embd,
        FASA_THREAD float (& out)[N][FASA_ELEMENTS],
        FASA_THREAD const fasa_attend_shared & shared,
        fasa_at at) {
    const int32_t lane = at.lane%LANES;

    FASA_UNROLL_ROWS
    for (int32_t i = 0; i < FASA_STEP; i += FASA_THREADS/LANES) {
        const int32_t slot = i + at.index/LANES;

        float x[FASA_ELEMENTS];
        fasa_load<TYPE>(rows, nb, n_embd, shared.ids[slot], lane, x);
        FASA_UNROLL
        for (int32_t n = 0; n < N; ++n) {
            const float weight = shared.logits[n*FASA_STEP + slot];
            FASA_UNROLL
            for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
                out[n][j] += weight*x[j];
            }
        }
    }
}

// logits to weights, by one warp for each head
FASA_FN void fasa_attend_weights(FASA_THREAD const fasa_attend_args & args, FASA_THREAD const fasa_attend_shared & shared, int32_t n, int32_t lane) {
    FASA_SHARED float * logits = shared.logits + n*FASA_STEP;

    const float before = shared.max[n];

    float max = before;
    for (int32_t i = lane; i < FASA_STEP; i += FASA_WARP) {
        float logit = logits[i]*args.scale;
        if (args.logit_softcap != 0.0f) {
            logit = args.logit_softcap*fasa_tanh(logit);
        }
        logits[i] = logit*FASA_LOG2_E;
        max = shared.ids[i] >= 0 ? fasa_greater(logits[i], max) : max;
    }
    max = fasa_warp_max(max);

    float sum = 0.0f;
    for (int32_t i = lane; i < FASA_STEP; i += FASA_WARP) {
        const float weight = shared.ids[i] >= 0 ? fasa_exp2(logits[i] - max) : 0.0f; // NaN stays NaN
        logits[i] = weight;
        sum += weight;
    }
    sum = fasa_warp_sum(sum, 1, FASA_WARP);

    if (lane == 0) {
        const float factor = fasa_exp2(before - max);
        shared.factor[n] = factor;
        shared.sum[n]    = shared.sum[n]*factor + sum;
        shared.max[n]    = max;
    }
}

// blocks: at.x by split, at.y by tile of query heads, list, token, stream
// partial: [n_embd_v + 2, n_splits, n_head, n_tokens, n_stream] weighted sum of V, greatest logit in units of log(2), sum of weights
template <int LANES, int N>
FASA_FN void fasa_attend_split(
        FASA_THREAD const fasa_attend_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * k,
        FASA_GLOBAL const char    * v,
        FASA_GLOBAL const int32_t * idx,
        FASA_GLOBAL const char    * mask,
        FASA_GLOBAL float         * partial,
        FASA_SHARED char          * memory,
        fasa_at at) {
    const int32_t tile   = at.y % args.n_tiles;
    const int32_t list   = at.y / args.n_tiles % args.n_list;
    const int32_t token  = at.y / args.n_tiles / args.n_list % args.n_tokens;
    const int32_t stream = at.y / args.n_tiles / args.n_list / args.n_tokens;

    const int32_t head0   = list*args.n_group + tile*N;
    const int32_t n_heads = fasa_min(N, args.n_group - tile*N);
    const int32_t head_kv = list/args.n_shared;

    fasa_attend_shared shared;
    shared.max    = (FASA_SHARED float *) memory;
    shared.sum    = shared.max + FASA_MAX_TILE;
    shared.factor = shared.sum + FASA_MAX_TILE;
    shared.ids    = (FASA_SHARED int32_t *) (shared.factor + FASA_MAX_TILE);
    shared.logits = (FASA_SHARED float *) (shared.ids + FASA_STEP);
    shared.out    = shared.logits;

    q += token*args.nb_q2 + stream*args.nb_q3;
    k += head_kv*args.nb_k1 + stream*args.nb_k3;
    v += head_kv*args.nb_v1 + stream*args.nb_v3;
    if (args.has_list) {
        idx += ((int64_t) (stream*args.n_tokens + token)*args.n_list + list)*args.n_cells;
    } else {
        mask += token*args.nb_mask1 + stream*args.nb_mask3;
    }

    const int32_t lane = at.lane%LANES;

    float q_own[N][FASA_ELEMENTS];
    float out[N][FASA_ELEMENTS];
    FASA_UNROLL
    for (int32_t n = 0; n < N; ++n) {
        const bool is_head = n < n_heads && lane*FASA_ELEMENTS < args.n_embd_k;
        FASA_GLOBAL const float * q_row = (FASA_GLOBAL const float *) (q + (head0 + (n < n_heads ? n : 0))*args.nb_q1);
        FASA_UNROLL
        for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
            q_own[n][j] = is_head ? q_row[lane*FASA_ELEMENTS + j] : 0.0f;
            out[n][j]   = 0.0f;
        }
    }
    if (at.index < N) {
        shared.max[at.index] = -FASA_FLT_MAX;
        shared.sum[at.index] = 0.0f;
    }

    const int32_t cell0 = at.x*args.n_split;
    const int32_t cell1 = fasa_min(cell0 + args.n_split, args.n_cells);

    for (int32_t cell = cell0; cell < cell1; cell += FASA_STEP) {
        if (at.index < FASA_STEP) {
            const int32_t i = cell + at.index;
            shared.ids[at.index] = i >= cell1 ? -1 : args.has_list ? idx[i] : ((FASA_GLOBAL const uint16_t *) mask)[i] != FASA_F16_MASKED ? i : -1;
        }
        fasa_sync_block();

        // a row of V by warp at a time: they are on their way while K is worked on
        for (int32_t i = at.warp; i < FASA_STEP; i += FASA_WARPS) {
            if (shared.ids[i] >= 0 && at.lane*FASA_PREFETCHED < args.n_bytes_v) {
                fasa_prefetch(fasa_row_at(v, args.nb_v2, shared.ids[i]) + at.lane*FASA_PREFETCHED);
            }
        }
#define FASA_ATTEND_ARGUMENTS (k, args.nb_k2, args.n_embd_k, q_own, shared, at)
        FASA_BY_TYPE(args.type_k, fasa_attend_logits)
#undef FASA_ATTEND_ARGUMENTS
        fasa_sync_block();

        if (at.warp < N) {
            fasa_attend_weights(args, shared, at.warp, at.lane);
        }
        fasa_sync_block();

        FASA_UNROLL
        for (int32_t n = 0; n < N; ++n) {
            const float factor = shared.factor[n];
            FASA_UNROLL
            for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
                out[n][j] *= factor;
            }
        }
#define FASA_ATTEND_ARGUMENTS (v, args.nb_v2, args.n_embd_v, out, shared, at)
        FASA_BY_TYPE(args.type_v, fasa_attend_sums)
#undef FASA_ATTEND_ARGUMENTS
        fasa_sync_block();
    }

    const int64_t n_partial = args.n_embd_v + 2;

    FASA_UNROLL
    for (int32_t n = 0; n < N; ++n) {
        FASA_UNROLL
        for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
            const float sum = fasa_warp_sum(out[n][j], LANES, FASA_WARP);
            if (at.lane < LANES) {
                shared.out[at.warp*LANES*FASA_ELEMENTS + lane*FASA_ELEMENTS + j] = sum;
            }
        }
        fasa_sync_block();

        FASA_GLOBAL float * res = partial +
            (((int64_t) (stream*args.n_tokens + token)*args.n_head + head0 + n)*args.n_splits + at.x)*n_partial;

        if (n < n_heads && at.index < args.n_embd_v) {
            float sum = 0.0f;
            for (int32_t i = 0; i < FASA_WARPS; ++i) {
                sum += shared.out[i*LANES*FASA_ELEMENTS + at.index];
            }
            res[at.index] = sum;
        }
        if (n < n_heads && at.index == 0) {
            res[args.n_embd_v + 0] = shared.max[n];
            res[args.n_embd_v + 1] = shared.sum[n];
        }
        fasa_sync_block();
    }
}

//
// combine
//

// blocks: at.x by query head, token, stream; out: [n_embd_v, n_head, n_tokens, n_stream]
FASA_FN void fasa_attend_combine(
        FASA_THREAD const fasa_attend_args & args,
        FASA_GLOBAL const float * partial,
        FASA_GLOBAL const float * sinks,
        FASA_GLOBAL float       * out,
        fasa_at at) {
    const int64_t n_partial = args.n_embd_v + 2;

    partial += at.x*args.n_splits*n_partial;

    const float sink = args.has_sinks ? sinks[at.x%args.n_head]*FASA_LOG2_E : -FASA_FLT_MAX;

    if (at.index >= args.n_embd_v) {
        return;
    }
    float max = sink;
    for (int32_t i = 0; i < args.n_splits; ++i) {
        max = fasa_greater(partial[i*n_partial + args.n_embd_v], max);
    }

    float sum = args.has_sinks ? fasa_exp2(sink - max) : 0.0f;
    float res = 0.0f;
    for (int32_t i = 0; i < args.n_splits; ++i) {
        FASA_GLOBAL const float * from = partial + i*n_partial;
        const float factor = fasa_exp2(from[args.n_embd_v] - max);
        sum += from[args.n_embd_v + 1]*factor;
        res += from[at.index]*factor;
    }
    out[(int64_t) at.x*args.n_embd_v + at.index] = sum == 0.0f ? 0.0f : res/sum; // zeros for a head without cells
}
