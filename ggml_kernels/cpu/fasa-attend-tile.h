// Attention of a prompt: tiles of query rows, which are the query heads of a group for neighbouring tokens, against
// tiles of cells, in two matrix products of floats:
//
//   logits [cells, rows] = K [cells, dims] * Q^T [dims, rows]
//   output [dims,  rows] = V^T [dims, cells] * weights [cells, rows]
//
// A lane of a vector is a query row throughout, so K and V serve as they lie in the cache, a number at a time, and the
// softmax over the cells adds lane by lane. Their rows are made floats once for all query rows of the tile.

#pragma once

#include "fasa-attend-blocks.h"

namespace {

constexpr int FASA_PANEL        = 3;           // vectors of query rows that are worked on together
constexpr int FASA_PRODUCT_ROWS = FASA_ACCS/2; // numbers that meet them: their products fill the registers

// c[i][j] = a(i, k)*b[k][j] summed over k, plus what is there if ADD; a(i, k) at a[i*a_i + k*a_k]
// i: n_i of them, a multiple of FASA_PRODUCT_ROWS; j: N vectors, of rows of b and c that are FASA_PANEL vectors apart
template <int N, bool ADD>
void fasa_product(const float * a, int64_t a_i, int64_t a_k, int64_t n_i, const float * b, int64_t n_k, float * c) {
    constexpr int64_t stride = FASA_PANEL*FASA_LANES;

    for (int64_t i0 = 0; i0 < n_i; i0 += FASA_PRODUCT_ROWS) {
        vec acc[FASA_PRODUCT_ROWS][N];
        for (int i = 0; i < FASA_PRODUCT_ROWS; ++i) {
            for (int j = 0; j < N; ++j) {
                acc[i][j] = ADD ? v_load(c + (i0 + i)*stride + j*FASA_LANES) : v_set1(0.0f);
            }
        }
        for (int64_t k = 0; k < n_k; ++k) {
            vec x[N];
            for (int j = 0; j < N; ++j) {
                x[j] = v_load(b + k*stride + j*FASA_LANES);
            }
            for (int i = 0; i < FASA_PRODUCT_ROWS; ++i) {
                const vec y = v_set1(a[(i0 + i)*a_i + k*a_k]);
                for (int j = 0; j < N; ++j) {
                    acc[i][j] = v_fma(x[j], y, acc[i][j]);
                }
            }
        }
        for (int i = 0; i < FASA_PRODUCT_ROWS; ++i) {
            for (int j = 0; j < N; ++j) {
                v_store(c + (i0 + i)*stride + j*FASA_LANES, acc[i][j]);
            }
        }
    }
}

// buffers of a thread, in floats
struct fasa_tile_work {
    static constexpr int64_t N_PANEL = FASA_PANEL*FASA_LANES; // query rows of a panel

    int64_t n_panels;
    int64_t n_k, n_v;
    float * q;       // [N_PANEL, n_k, n_panels], scaled
    float * k;       // [n_k, FASA_TILE_CELLS]
    float * v;       // [n_v, FASA_TILE_CELLS]
    float * weights; // [N_PANEL, FASA_TILE_CELLS], of one panel; logits before
    float * sums;    // [N_PANEL, n_v + 2, n_panels]: weighted sums of V, greatest logit so far, sum of weights
    float * blocks;  // see fasa_choose_blocks
    float * end;

    fasa_tile_work(const fasa_attend_op & op, float * base) :
        n_panels((op.n_tile*op.n_group + N_PANEL - 1)/N_PANEL), n_k(op.n_k), n_v(op.n_v), q(base) {
        k       = q       + n_panels*n_k*N_PANEL;
        v       = k       + FASA_TILE_CELLS*n_k;
        weights = v       + FASA_TILE_CELLS*n_v;
        sums    = weights + FASA_TILE_CELLS*N_PANEL;
        blocks  = sums    + n_panels*(n_v + 2)*N_PANEL;
        end     = blocks  + fasa_blocks_size(op);
    }

    int64_t size() const { return end - q; }

    float * panel_q   (int64_t ip) const { return q    + ip*n_k*N_PANEL; }
    float * panel_sums(int64_t ip) const { return sums + ip*(n_v + 2)*N_PANEL; }
};

template <typename T>
void fasa_unpack_native(const fasa_rows & rows, int64_t first, int64_t n, float * dst) {
    for (int64_t i = 0; i < n; ++i) {
        const char * row = rows.row(first + i);
        for (int64_t j = 0; j < rows.n/FASA_LANES; ++j) {
            v_store(dst + i*rows.n + j*FASA_LANES, T::load(row, j));
        }
    }
}

// rows of n cells, and zeros up to a multiple of FASA_PRODUCT_ROWS
void fasa_unpack_rows(const fasa_rows & rows, int64_t first, int64_t n, float * dst) {
    if (rows.is_native) {
        fasa_with_type(rows.t->type, [&](auto loader) { fasa_unpack_native<decltype(loader)>(rows, first, n, dst); });
    } else {
        for (int64_t i = 0; i < n; ++i) {
            rows.unpack(first + i, dst + i*rows.n);
        }
    }
    std::fill(dst + n*rows.n, dst + GGML_PAD(n, FASA_PRODUCT_ROWS)*rows.n, 0.0f);
}

// logits of what the tokens of a panel do not see become -INFINITY
void fasa_hide(const fasa_attend_op & op, const fasa_attend_op::unit & u, int64_t n_tokens, int64_t ip, int64_t first, int64_t n, float * logits) {
    constexpr int64_t n_panel = fasa_tile_work::N_PANEL;

    for (int64_t it = ip*n_panel/op.n_group; it < n_tokens && it*op.n_group < (ip + 1)*n_panel; ++it) {
        const int64_t begin = std::max(it*op.n_group - ip*n_panel, (int64_t) 0);
        const int64_t end   = std::min((it + 1)*op.n_group - ip*n_panel, n_panel);

        for (int64_t i = 0; i < n; i += FASA_LANES) {
            const int64_t n_bits = std::min<int64_t>(FASA_LANES, n - i);
            uint32_t      hidden = v_bits_first(n_bits) & ~op.mask_bits(u, u.token + it, first + i, n_bits);

            for (float * row = logits + i*n_panel; hidden; hidden >>= 1, row += n_panel) {
                if (hidden & 1) {
                    std::fill(row + begin, row + end, -INFINITY);
                }
            }
        }
    }
}

// logits, in base 2, become weights relative to the greatest so far, to which the sums are brought, too
template <int N>
void fasa_tile_soft_max(float * logits, int64_t n, float * sums, int64_t n_v) {
    constexpr int64_t stride = fasa_tile_work::N_PANEL;

    for (int j = 0; j < N*FASA_LANES; j += FASA_LANES) {
        float * greatest = sums + n_v*stride + j;
        float * total    = greatest + stride;

        const vec before = v_load(greatest);

        vec after = before;
        for (int64_t i = 0; i < n; ++i) {
            after = v_max(v_load(logits + i*stride + j), after);
        }
        vec sum = v_load(total);
        if (v_bits_gt(after, before)) {
            const vec x     = v_sub(before, after);
            const vec scale = v_select_gt(v_set1(FASA_EXP2_LEAST), x, v_set1(0.0f), v_exp2(x));
            for (int64_t i = 0; i < n_v; ++i) {
                v_store(sums + i*stride + j, v_mul(v_load(sums + i*stride + j), scale));
            }
            sum = v_mul(sum, scale);
        }
        for (int64_t i = 0; i < n; ++i) {
            const vec x      = v_sub(v_load(logits + i*stride + j), after);
            const vec weight = v_select_gt(v_set1(FASA_EXP2_LEAST), x, v_set1(0.0f), v_exp2(x));
            v_store(logits + i*stride + j, weight);
            sum = v_add(sum, weight);
        }
        v_store(greatest, after);
        v_store(total, sum);
    }
}

// what fasa_product<N, true> adds, where a row of V may hold what is no number: it must not reach those who do not see the cell
void fasa_add_seen(const float * v, int64_t n_v, const float * weights, int64_t n, float * sums) {
    constexpr int64_t stride = fasa_tile_work::N_PANEL;

    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < stride; ++j) {
            const float weight = weights[i*stride + j];
            for (int64_t id = 0; id < n_v && weight != 0.0f; ++id) {
                sums[id*stride + j] += weight*v[i*n_v + id];
            }
        }
    }
}

bool fasa_is_finite(const float * x, int64_t n) {
    vec sum = v_set1(0.0f);
    for (int64_t i = 0; i < n; i += FASA_LANES) {
        sum = v_fma(v_load(x + i), v_set1(0.0f), sum);
    }
    return v_sum(sum) == 0.0f;
}

// N: vectors of the panel that hold query rows
template <int N>
void fasa_attend_panel(const fasa_attend_op & op, const fasa_attend_op::unit & u, const fasa_tile_work & work, int64_t n_tokens,
        int64_t ip, int64_t first, int64_t n, bool is_masked) {
    float * sums = work.panel_sums(ip);

    fasa_product<N, false>(work.k, work.n_k, 1, GGML_PAD(n, FASA_PRODUCT_ROWS), work.panel_q(ip), work.n_k, work.weights);
    if (op.softcap != 0.0f) {
        const vec cap = v_set1(op.softcap*FASA_LOG2_E);
        for (int64_t i = 0; i < n*fasa_tile_work::N_PANEL; i += FASA_LANES) {
            v_store(work.weights + i, v_mul(cap, v_tanh(v_load(work.weights + i))));
        }
    }
    if (is_masked) {
        fasa_hide(op, u, n_tokens, ip, first, n, work.weights);
    }
    fasa_tile_soft_max<N>(work.weights, n, sums, work.n_v);

    if (is_masked && !fasa_is_finite(work.v, n*work.n_v)) {
        fasa_add_seen(work.v, work.n_v, work.weights, n, sums);
    } else {
        fasa_product<N, true>(work.v, 1, work.n_v, work.n_v, work.weights, n, sums);
    }
}

// the partial sums of one unit; base: floats of the thread
void fasa_attend_tile(const fasa_attend_op & op, const fasa_attend_op::unit & u, float * partial, float * base) {
    constexpr int64_t n_panel = fasa_tile_work::N_PANEL;

    const fasa_tile_work work(op, base);

    const fasa_rows k(op.k, u.head, u.stream);
    const fasa_rows v(op.v, u.head, u.stream);

    const int64_t n_tokens = std::min(op.n_tile, op.n_tokens - u.token);
    const int64_t n_rows   = n_tokens*op.n_group;

    // logits are in base 2, or with a softcap what v_tanh takes
    const float scale = op.softcap != 0.0f ? op.scale/op.softcap : op.scale*FASA_LOG2_E;

    std::fill(work.q, work.k, 0.0f);
    for (int64_t ir = 0; ir < n_rows; ++ir) {
        const float * row = op.q_row(u, u.token + ir/op.n_group, ir % op.n_group);
        float       * q   = work.panel_q(ir/n_panel) + ir % n_panel;
        for (int64_t i = 0; i < op.q->ne[0]; ++i) {
            q[i*n_panel] = scale*row[i];
        }
    }
    std::fill(work.sums, work.blocks, 0.0f);
    for (int64_t ip = 0; ip < work.n_panels; ++ip) {
        float * greatest = work.panel_sums(ip) + work.n_v*n_panel;
        std::fill(greatest, greatest + n_panel, -FLT_MAX); // finite: a logit of -INFINITY has no weight beside it
    }

    const int64_t begin = u.chunk*op.n_chunk;
    const int64_t end   = std::min(begin + op.n_chunk, op.n_list);
    const auto *  seen  = fasa_choose_blocks(op, u, n_tokens, begin, end, work.blocks);

    for (int64_t i = begin; i < end; i += FASA_TILE_CELLS) {
        const int64_t      n       = std::min(FASA_TILE_CELLS, end - i);
        const fasa_visible visible = seen[(i - begin)/FASA_TILE_CELLS];

        if (visible == FASA_NONE) {
            continue;
        }
        fasa_unpack_rows(k, i, n, work.k);
        fasa_unpack_rows(v, i, n, work.v);

        for (int64_t ip = 0; ip*n_panel < n_rows; ++ip) {
            const auto attend = n_rows - ip*n_panel > 2*FASA_LANES ? fasa_attend_panel<3> :
                                n_rows - ip*n_panel >   FASA_LANES ? fasa_attend_panel<2> : fasa_attend_panel<1>;
            attend(op, u, work, n_tokens, ip, i, n, visible == FASA_SOME);
        }
    }

    for (int64_t ir = 0; ir < n_rows; ++ir) {
        const float * from = work.panel_sums(ir/n_panel) + ir % n_panel;
        float       * to   = partial + op.sums_offset(u, u.token + ir/op.n_group, ir % op.n_group);
        for (int64_t i = 0; i < work.n_v + 2; ++i) {
            to[i] = from[i*n_panel];
        }
        to[work.n_v] /= FASA_LOG2_E;
    }
}

} // namespace
