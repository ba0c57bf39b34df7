// FASA_ATTEND: softmax attention to listed cells, or to all that a mask shows, in two steps.
//
//   split    for some cells of a list: the greatest logit of each query head, and sums with the weights relative to it
//   combine  these sums of a head over all splits
//
// Some lanes of a warp read a row of K and of V together, 8 elements each, and hold as many of the query and of the sum, for
// all query heads that share the list: each row is read once for them. Each such set of lanes works on cells of its own and
// meets the others at the end alone; what is one number for a row and a query head is worked on by one lane of the set. Rows are read by fasa-rows.h.

#pragma once

#include "fasa-rows.h"

//
// split
//

// The sums, over the lanes that differ in bits FROM to TO of their number, of V numbers that each has. At every step a lane gives
// half of what it has away, as long as that is two, so that in the end the lanes, in order, have V/lanes each. (Steps are templates:
// a loop over them would leave the numbers in memory.)
template <int V, int FROM, int TO, bool IS_STEP = (FROM >= TO)>
struct fasa_share_sums {
    FASA_FN_MEMBER void step(FASA_THREAD float * x, int32_t lane) {
        const bool upper = lane & FROM;
        if (V > 1) {
            FASA_UNROLL
            for (int32_t i = 0; i < V/2; ++i) {
                const float given = upper ? x[i] : x[i + V/2];
                x[i] = (upper ? x[i + V/2] : x[i]) + fasa_shuffle_xor(given, FROM);
            }
        } else {
            x[0] += fasa_shuffle_xor(x[0], FROM);
        }
        fasa_share_sums<(V > 1 ? V/2 : 1), FROM/2, TO>::step(x, lane);
    }
};

template <int V, int FROM, int TO>
struct fasa_share_sums<V, FROM, TO, false> {
    FASA_FN_MEMBER void step(FASA_THREAD float *, int32_t) {}
};

// rows that a set of lanes has on the way at once
#define FASA_ROWS 2

// logits of a set of lanes: FASA_ROWS for each of N query heads, the rows of a head side by side, shared out to the lanes in order
#define FASA_LOGITS(N)              (FASA_ROWS*N)
#define FASA_LOGITS_EACH(LANES, N)  (FASA_LOGITS(N) > LANES ? FASA_LOGITS(N)/LANES : 1) // of a lane
#define FASA_LOGIT_LANES(LANES, N)  (FASA_LOGITS(N) > LANES ? 1 : LANES/FASA_LOGITS(N)) // that have the same one

// What a set of lanes knows of N query heads. A lane knows the greatest logit of the head whose logits it has, in units of
// log(2), and a sum of weights relative to it: of its own logits.
template <int N>
struct fasa_sums {
    float max;
    float sum;
    float out[N][FASA_ELEMENTS]; // weighted rows of V
};

FASA_FN float fasa_logit(FASA_THREAD const fasa_attend_args & args, float dot) {
    float logit = dot*args.scale;
    if (args.logit_softcap != 0.0f) {
        logit = args.logit_softcap*fasa_tanh(logit);
    }
    return logit*FASA_LOG2_E;
}

// what the lane that has it tells of logit i
template <int LANES, int N>
FASA_FN float fasa_tell(FASA_THREAD const float (& x)[FASA_LOGITS_EACH(LANES, N)], int32_t i, int32_t lane) {
    const int32_t each = FASA_LOGITS_EACH(LANES, N);
    return fasa_shuffle(x[i%each], lane/LANES*LANES + i/each*FASA_LOGIT_LANES(LANES, N));
}

// TYPE: of K and V, or any if it is negative
template <int TYPE, int LANES, int N, typename CELLS>
FASA_FN void fasa_attend_rows(
        FASA_THREAD const fasa_attend_args & args,
        FASA_GLOBAL const char   * k,
        FASA_GLOBAL const char   * v,
        FASA_THREAD const CELLS  & cells,
        FASA_THREAD const float (& q)[N][FASA_ELEMENTS],
        FASA_THREAD fasa_sums<N> & sums,
        fasa_at at) {
    const int32_t type_k = TYPE < 0 ? args.type_k : TYPE;
    const int32_t type_v = TYPE < 0 ? args.type_v : TYPE;
    const int32_t n_sets = FASA_WARP/LANES;
    const int32_t n_each = FASA_LOGITS_EACH(LANES, N);
    const int32_t lane   = at.lane%LANES;

    const bool has_k = lane*FASA_ELEMENTS < args.n_embd_k;
    const bool has_v = lane*FASA_ELEMENTS < args.n_embd_v;

    // a warp has rows that follow each other: where there are few, others have nothing to do
    FASA_ROLLED
    for (int32_t i0 = at.warp*FASA_ROWS*n_sets; i0 < cells.n; i0 += FASA_WARPS*FASA_ROWS*n_sets) {
        fasa_raw raw_k[FASA_ROWS];
        fasa_raw raw_v[FASA_ROWS];
        bool     listed[FASA_ROWS];
        FASA_UNROLL
        for (int32_t ir = 0; ir < FASA_ROWS; ++ir) {
            const int32_t i  = i0 + ir*n_sets + at.lane/LANES;
            const int32_t id = i < cells.n ? fasa_cell_at(cells, i) : -1;
            listed[ir] = id >= 0;
            FASA_UNROLL
            for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
                raw_k[ir].x[j] = 0; // zero in all types
                raw_v[ir].x[j] = 0;
            }
            if (listed[ir] && has_k) {
                fasa_load_raw(type_k, fasa_row_at(k, args.nb_k2, id), lane, raw_k[ir]);
            }
            if (listed[ir] && has_v) {
                fasa_load_raw(type_v, fasa_row_at(v, args.nb_v2, id), lane, raw_v[ir]);
            }
        }

        float dots[FASA_LOGITS(N)];
        FASA_UNROLL
        for (int32_t ir = 0; ir < FASA_ROWS; ++ir) {
            float x[FASA_ELEMENTS];
            fasa_to_floats(type_k, raw_k[ir], lane, x);
            FASA_UNROLL
            for (int32_t n = 0; n < N; ++n) {
                float dot = 0.0f;
                FASA_UNROLL
                for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
                    dot += x[j]*q[n][j];
                }
                dots[n*FASA_ROWS + ir] = dot;
            }
        }
        fasa_share_sums<FASA_LOGITS(N), LANES/2, 1>::step(dots, lane);

        // of the logits that a lane has, which are rows of one head
        float weights[n_each];
        bool  has_row[n_each];
        float max = sums.max;
        FASA_UNROLL
        for (int32_t i = 0; i < n_each; ++i) {
            const int32_t ir = (lane/FASA_LOGIT_LANES(LANES, N)*n_each + i)%FASA_ROWS;
            weights[i] = fasa_logit(args, dots[i]);
            has_row[i] = ir == 0 ? listed[0] : listed[1];
            max = has_row[i] ? fasa_greater(weights[i], max) : max;
        }
        if (n_each < FASA_ROWS) {
            max = fasa_greater(fasa_shuffle_xor(max, FASA_LOGIT_LANES(LANES, N)), max);
        }
        float factor[n_each];
        factor[0] = fasa_exp2(sums.max - max);
        sums.max  = max;
        sums.sum *= factor[0];
        FASA_UNROLL
        for (int32_t i = 0; i < n_each; ++i) {
            weights[i] = has_row[i] ? fasa_exp2(weights[i] - max) : 0.0f; // NaN stays NaN
            sums.sum += weights[i];
            factor[i] = factor[0];
        }

        float x[FASA_ROWS][FASA_ELEMENTS];
        fasa_to_floats(type_v, raw_v[0], lane, x[0]);
        fasa_to_floats(type_v, raw_v[1], lane, x[1]);
        FASA_UNROLL
        for (int32_t n = 0; n < N; ++n) {
            const float shrink = fasa_tell<LANES, N>(factor,  n*FASA_ROWS, at.lane);
            const float first  = fasa_tell<LANES, N>(weights, n*FASA_ROWS, at.lane);
            const float second = fasa_tell<LANES, N>(weights, n*FASA_ROWS + 1, at.lane);
            FASA_UNROLL
            for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
                sums.out[n][j] = sums.out[n][j]*shrink + first*x[0][j] + second*x[1][j];
            }
        }
    }
}

// query heads whose sums of all warps are in shared memory together
#define FASA_MERGED(LANES, N) (64/LANES < N ? 64/LANES : N)

// floats of shared memory for the sums of all warps
#define FASA_SUMS_SHARED(LANES, N) (FASA_WARPS*(FASA_MERGED(LANES, N)*(LANES + 1)*FASA_ELEMENTS + 2*N))

// The sums of all lanes of a block: partial [n_embd_v + 2, n_splits, n_heads] gets the n-th split's of n_heads <= N heads.
template <int LANES, int N>
FASA_FN void fasa_merge_sums(
        FASA_THREAD const fasa_attend_args & args,
        FASA_THREAD fasa_sums<N> & sums,
        FASA_GLOBAL float        * partial,
        int32_t split, int32_t n_heads,
        FASA_SHARED float        * shared,
        fasa_at at) {
    const int32_t n_sets   = FASA_WARP/LANES;
    const int32_t n_merged = FASA_MERGED(LANES, N);
    const int32_t n_each   = FASA_LOGITS_EACH(LANES, N);
    const int32_t n_row    = FASA_ELEMENTS*(LANES + 1); // one more, or lanes would share banks
    const int32_t lane     = at.lane%LANES;

    // the head whose logits the lane has
    const int32_t own     = lane/FASA_LOGIT_LANES(LANES, N)*n_each/FASA_ROWS;
    const bool    is_told = at.lane < LANES && lane%(FASA_LOGIT_LANES(LANES, N)*(n_each < FASA_ROWS ? FASA_ROWS : 1)) == 0;

    FASA_SHARED float * warp_max = shared; // [N, FASA_WARPS]
    FASA_SHARED float * warp_sum = warp_max + N*FASA_WARPS;
    FASA_SHARED float * warp_out = warp_sum + N*FASA_WARPS; // [LANES + 1, FASA_ELEMENTS, n_merged, FASA_WARPS]

    float max = sums.max;
    FASA_UNROLL
    for (int32_t mask = LANES; mask < FASA_WARP; mask *= 2) {
        max = fasa_greater(fasa_shuffle_xor(max, mask), max);
    }
    if (is_told) {
        warp_max[at.warp*N + own] = max;
    }
    fasa_sync_block();

    FASA_UNROLL
    for (int32_t i = 0; i < FASA_WARPS; ++i) {
        max = fasa_greater(warp_max[i*N + own], max);
    }
    float factor[n_each];
    FASA_UNROLL
    for (int32_t i = 0; i < n_each; ++i) {
        factor[i] = fasa_exp2(sums.max - max);
    }
    float sum = fasa_warp_sum(sums.sum*factor[0], LANES, FASA_WARP);
    if (n_each < FASA_ROWS) {
        sum += fasa_shuffle_xor(sum, FASA_LOGIT_LANES(LANES, N));
    }
    if (is_told) {
        warp_sum[at.warp*N + own] = sum;
    }

    const int64_t n_partial = args.n_embd_v + 2;

    FASA_UNROLL
    for (int32_t n0 = 0; n0 < N; n0 += n_merged) {
        float out[n_merged*FASA_ELEMENTS];
        FASA_UNROLL
        for (int32_t n = 0; n < n_merged; ++n) {
            const float own_factor = fasa_tell<LANES, N>(factor, (n0 + n)*FASA_ROWS, at.lane);
            FASA_UNROLL
            for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
                out[n*FASA_ELEMENTS + j] = sums.out[n0 + n][j]*own_factor;
            }
        }
        fasa_share_sums<FASA_MERGED(LANES, N)*FASA_ELEMENTS, FASA_WARP/2, LANES>::step(out, at.lane);
        FASA_UNROLL
        for (int32_t i = 0; i < n_merged*FASA_ELEMENTS/n_sets; ++i) {
            const int32_t element = at.lane/LANES*(n_merged*FASA_ELEMENTS/n_sets) + i;
            warp_out[at.warp*n_merged*n_row + element*(LANES + 1) + lane] = out[i];
        }
        fasa_sync_block();

        FASA_ROLLED
        for (int32_t i = at.index; i < n_merged*LANES*FASA_ELEMENTS; i += FASA_THREADS) {
            const int32_t n = i/(LANES*FASA_ELEMENTS);
            const int32_t d = i%(LANES*FASA_ELEMENTS);
            if (n0 + n < n_heads && d < args.n_embd_v) {
                FASA_SHARED const float * from = warp_out + n*n_row + d%FASA_ELEMENTS*(LANES + 1) + d/FASA_ELEMENTS;
                float all = 0.0f;
                FASA_UNROLL
                for (int32_t iw = 0; iw < FASA_WARPS; ++iw) {
                    all += from[iw*n_merged*n_row];
                }
                partial[((int64_t) (n0 + n)*args.n_splits + split)*n_partial + d] = all;
            }
        }
        if (n0 + n_merged < N) {
            fasa_sync_block();
        }
    }
    if (at.index < n_heads) {
        float greatest = warp_max[at.index];
        float all      = warp_sum[at.index];
        FASA_UNROLL
        for (int32_t i = 1; i < FASA_WARPS; ++i) {
            greatest = fasa_greater(warp_max[i*N + at.index], greatest);
            all     += warp_sum[i*N + at.index];
        }
        FASA_GLOBAL float * to = partial + ((int64_t) at.index*args.n_splits + split)*n_partial + args.n_embd_v;
        to[0] = greatest;
        to[1] = all;
    }
}

// the query heads of a tile, nothing attended to yet; q: of the first of them
template <int LANES, int N>
FASA_FN void fasa_begin_tile(
        FASA_THREAD const fasa_attend_args & args,
        FASA_GLOBAL const char   * q,
        int32_t n_heads,
        FASA_THREAD float (& q_own)[N][FASA_ELEMENTS],
        FASA_THREAD fasa_sums<N> & sums,
        fasa_at at) {
    const int32_t lane = at.lane%LANES;

    FASA_UNROLL
    for (int32_t n = 0; n < N; ++n) {
        fasa_raw raw = { { 0, 0, 0, 0, 0, 0, 0, 0 } };
        if (n < n_heads && lane*FASA_ELEMENTS < args.n_embd_k) {
            fasa_load_raw(FASA_TYPE_F32, q + n*args.nb_q1, lane, raw);
        }
        fasa_to_floats(FASA_TYPE_F32, raw, lane, q_own[n]);
        FASA_UNROLL
        for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
            sums.out[n][j] = 0.0f;
        }
    }
    sums.max = -FASA_FLT_MAX;
    sums.sum = 0.0f;
}

// attention to some cells more
template <int LANES, int N>
FASA_FN void fasa_attend_cells(
        FASA_THREAD const fasa_attend_args & args,
        FASA_GLOBAL const char   * k,
        FASA_GLOBAL const char   * v,
        FASA_THREAD const fasa_cells & cells,
        FASA_THREAD const float (& q)[N][FASA_ELEMENTS],
        FASA_THREAD fasa_sums<N> & sums,
        fasa_at at) {
    if (args.type_k == FASA_TYPE_F16 && args.type_v == FASA_TYPE_F16) {
        fasa_attend_rows<FASA_TYPE_F16, LANES, N>(args, k, v, cells, q, sums, at);
    } else {
        fasa_attend_rows<-1, LANES, N>(args, k, v, cells, q, sums, at);
    }
}

// blocks: at.x by split, at.y by tile of query heads, list, token, stream
// partial: [n_embd_v + 2, n_splits, n_head, n_tokens, n_stream] weighted sum of V, greatest logit in units of log(2), sum of weights
// shared: [FASA_SUMS_SHARED] floats
template <int LANES, int N>
FASA_FN void fasa_attend_split(
        FASA_THREAD const fasa_attend_args & args,
        FASA_GLOBAL const char    * q,
        FASA_GLOBAL const char    * k,
        FASA_GLOBAL const char    * v,
        FASA_GLOBAL const int32_t * idx,
        FASA_GLOBAL const char    * mask,
        FASA_GLOBAL float         * partial,
        FASA_SHARED char          * shared,
        fasa_at at) {
    const int32_t tile   = at.y % args.n_tiles;
    const int32_t list   = at.y / args.n_tiles % args.n_list;
    const int32_t token  = at.y / args.n_tiles / args.n_list % args.n_tokens;
    const int32_t stream = at.y / args.n_tiles / args.n_list / args.n_tokens;

    const int32_t head    = list*args.n_group + tile*N;
    const int32_t head_kv = list/args.n_shared;
    const int64_t row     = (int64_t) stream*args.n_tokens + token;

    fasa_cells cells;
    cells.list  = args.has_list ? idx + (row*args.n_list + list)*args.n_cells : nullptr;
    cells.mask  = args.has_list ? nullptr : (FASA_GLOBAL const uint16_t *) (mask + token*args.nb_mask1 + stream*args.nb_mask3);
    cells.cell0 = at.x*args.n_split;
    cells.n     = fasa_min(args.n_split, args.n_cells - cells.cell0);

    const int32_t n_heads = fasa_min(N, args.n_group - tile*N);

    float        q_own[N][FASA_ELEMENTS];
    fasa_sums<N> sums;
    fasa_begin_tile<LANES, N>(args, q + head*args.nb_q1 + token*args.nb_q2 + stream*args.nb_q3, n_heads, q_own, sums, at);
    fasa_attend_cells<LANES, N>(args, k + head_kv*args.nb_k1 + stream*args.nb_k3, v + head_kv*args.nb_v1 + stream*args.nb_v3, cells, q_own, sums, at);
    fasa_merge_sums<LANES, N>(args, sums, partial + (row*args.n_head + head)*args.n_splits*(args.n_embd_v + 2), at.x, n_heads, (FASA_SHARED float *) shared, at);
}

//
// combine
//

// blocks: at.y by list, token, stream; out: [n_embd_v, n_head, n_tokens, n_stream]; shared: [n_splits, n_group] floats
FASA_FN void fasa_attend_combine(
        FASA_THREAD const fasa_attend_args & args,
        FASA_GLOBAL const float * partial,
        FASA_GLOBAL const float * sinks,
        FASA_GLOBAL float       * out,
        FASA_SHARED float       * shared,
        fasa_at at) {
    const int64_t n_partial = args.n_embd_v + 2;
    const int64_t head0     = (int64_t) at.y*args.n_group; // of all tokens

    partial += head0*args.n_splits*n_partial;
    out     += head0*args.n_embd_v;

    // what a split's sums count in the end, a head by warp
    FASA_ROLLED
    for (int32_t ig = at.warp; ig < args.n_group; ig += FASA_WARPS) {
        FASA_GLOBAL const float * from    = partial + ig*args.n_splits*n_partial + args.n_embd_v;
        FASA_SHARED       float * factors = shared + ig*args.n_splits;

        const float sink = args.has_sinks ? sinks[(head0 + ig)%args.n_head]*FASA_LOG2_E : -FASA_FLT_MAX;

        float max = sink;
        float sum = args.has_sinks && at.lane == 0 ? 1.0f : 0.0f;
        FASA_ROLLED
        for (int32_t i = at.lane; i < args.n_splits; i += FASA_WARP) {
            const float2 own      = *(FASA_GLOBAL const float2 *) (from + i*n_partial);
            const float  greatest = fasa_greater(own.x, max);
            sum = sum*fasa_exp2(max - greatest) + own.y*fasa_exp2(own.x - greatest);
            max = greatest;
            factors[i] = own.x;
        }
        const float greatest = fasa_warp_max(max);
        sum = fasa_warp_sum(sum*fasa_exp2(max - greatest), 1, FASA_WARP);
        const float inverse = sum == 0.0f ? 0.0f : fasa_div(1.0f, sum); // zeros for a head without cells
        FASA_ROLLED
        for (int32_t i = at.lane; i < args.n_splits; i += FASA_WARP) {
            factors[i] = fasa_exp2(factors[i] - greatest)*inverse;
        }
    }
    fasa_sync_block();

    FASA_ROLLED
    for (int32_t i = at.index; i < args.n_group*args.n_embd_v/2; i += FASA_THREADS) {
        const int32_t ig = i/(args.n_embd_v/2);
        const int32_t d  = i%(args.n_embd_v/2);

        FASA_GLOBAL const float2 * from    = (FASA_GLOBAL const float2 *) (partial + ig*args.n_splits*n_partial) + d;
        FASA_SHARED const float  * factors = shared + ig*args.n_splits;

        float a = 0.0f;
        float b = 0.0f;
        #pragma unroll 32
        for (int32_t is = 0; is < args.n_splits; ++is) {
            const float2 x = from[is*(n_partial/2)];
            a += x.x*factors[is];
            b += x.y*factors[is];
        }
        out[2*i + 0] = a;
        out[2*i + 1] = b;
    }
}
