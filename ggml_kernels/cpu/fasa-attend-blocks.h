// Which blocks of cells a tile of a prompt's tokens attends to: all that any of them sees or, with tips, those that matter.
//
// A few tokens of the tile are asked for their neighbours: their query heads score all cells on the tips, as select does,
// and every one of them is left with a share of its attention, by these scores. Always attended to are the first block
// that is seen, the blocks that only some of the tokens see, where the tile itself is, and the one before these.

#pragma once

#include "fasa-attend.h"
#include "fasa-score.h"

#include <numeric>

namespace {

constexpr int64_t FASA_ASKED = 4; // tokens of a tile

// what the tokens see of a block
enum fasa_visible : int32_t { FASA_NONE, FASA_SOME, FASA_ALL };

fasa_visible fasa_get_visible(const fasa_attend_op & op, const fasa_attend_op::unit & u, int64_t n_tokens, int64_t first, int64_t n) {
    bool any = false;
    bool all = true;
    for (int64_t it = 0; it < n_tokens; ++it) {
        for (int64_t i = 0; i < n; i += FASA_LANES) {
            const uint32_t bits = op.mask_bits(u, u.token + it, first + i, std::min<int64_t>(FASA_LANES, n - i));
            any |= bits != 0;
            all &= bits == v_bits_first(n - i);
        }
    }
    return all ? FASA_ALL : any ? FASA_SOME : FASA_NONE;
}


struct fasa_blocks_work {
    int64_t n_blocks;
    int64_t n_quads;
    int64_t n_scores; // of a query head, whole blocks of tips

    fasa_visible * seen;   // [n_blocks]
    int32_t      * order;  // [n_blocks]
    float        * most;   // [n_blocks] the greatest share
    float        * shares; // [n_blocks, FASA_ASKED*n_group], of each query head that is asked
    float        * scores; // [n_scores, n_group]
    float        * left;   // [FASA_ASKED*n_group] what a query head has by the blocks so far
    float        * max;    // [FASA_LANES, n_group]
    float        * scale;  // [n_group]
    int32_t      * quads;  // [n_quads, n_group]
    float        * end;

    fasa_blocks_work(const fasa_attend_op & op, float * base) {
        n_blocks = (std::min(op.n_chunk, op.n_list) + FASA_TILE_CELLS - 1)/FASA_TILE_CELLS;
        n_quads  = op.tips ? 2*fasa_tips_n_pairs(op.dims->ne[0]) : 0;
        n_scores = op.tips ? n_blocks*FASA_TILE_CELLS : 0;

        const int64_t n_asked = op.tips ? FASA_ASKED*op.n_group : 0;

        seen   = (fasa_visible *) base;
        order  = (int32_t *) base + n_blocks;
        most   = base   + 2*n_blocks;
        shares = most   + n_blocks;
        scores = shares + n_blocks*n_asked;
        left   = scores + n_scores*op.n_group;
        max    = left   + n_asked;
        scale  = max    + FASA_LANES*op.n_group;
        quads  = (int32_t *) (scale + op.n_group);
        end    = (float *) quads + n_quads*op.n_group;
    }
};

int64_t fasa_blocks_size(const fasa_attend_op & op) {
    const fasa_blocks_work work(op, nullptr);
    return work.end - (float *) work.seen;
}

// shares of a token's attention that its query heads give to the blocks, by their scores; shares: [n_blocks, n_group]
void fasa_get_shares(const fasa_attend_op & op, const fasa_attend_op::unit & u, int64_t it, const fasa_blocks_work & work, float * shares) {
    const int64_t   n_dim      = op.dims->ne[0];
    const int32_t * dims       = (const int32_t *) op.dims->data + u.head*n_dim;
    const float   * steps      = (const float *) op.ranges->data + (2*u.head + 1)*n_dim;
    const char    * tips       = (const char *) op.tips->data + u.head*op.tips->nb[2] + u.stream*op.tips->nb[3];
    const size_t    block_size = fasa_tips_block_size(n_dim);

    const fasa_group_query query = { work.quads, work.scale, work.max, nullptr };

    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        query.scale[ig] = fasa_round_row(op.row_of(op.q_tip, u, it, ig), dims, steps, n_dim, op.scale, query.quads + ig*work.n_quads);
        v_store(query.max + ig*FASA_LANES, v_set1(-FLT_MAX));
    }
    for (int64_t cell = 0; cell < op.n_list; cell += FASA_TIPS_CELLS) {
        ggml_fp16_t mask[FASA_TIPS_CELLS]; // the last block may be longer than the mask
        const int64_t n = std::min<int64_t>(FASA_TIPS_CELLS, op.n_list - cell);
        std::copy_n(op.mask_row(u, it) + cell, n, mask);
        std::fill(mask + n, mask + FASA_TIPS_CELLS, GGML_CPU_FP32_TO_FP16(-INFINITY));

        for (int64_t ig = 0; ig < op.n_group; ig += FASA_SCORE_HEADS) {
            fasa_score_heads(std::min<int64_t>(FASA_SCORE_HEADS, op.n_group - ig), tips + cell/FASA_TIPS_CELLS*block_size, mask,
                work.n_quads, query.from(ig, work.n_quads), work.scores + ig*work.n_scores + cell, work.n_scores);
        }
    }
    for (int64_t ig = 0; ig < op.n_group; ++ig) {
        const float max = v_greatest(v_load(query.max + ig*FASA_LANES));

        float total = 0.0f;
        for (int64_t ib = 0; ib < work.n_blocks; ++ib) {
            vec sum = v_set1(0.0f);
            for (int64_t i = ib*FASA_TILE_CELLS; i < std::min((ib + 1)*FASA_TILE_CELLS, GGML_PAD(op.n_list, FASA_TIPS_CELLS)); i += FASA_LANES) {
                const vec x = v_sub(v_load(work.scores + ig*work.n_scores + i), v_set1(max));
                sum = v_add(sum, v_select_gt(v_set1(FASA_EXP2_LEAST), x, v_set1(0.0f), v_exp2(x)));
            }
            shares[ig*work.n_blocks + ib] = v_sum(sum);
            total += shares[ig*work.n_blocks + ib];
        }
        for (int64_t ib = 0; ib < work.n_blocks; ++ib) {
            float & share = shares[ig*work.n_blocks + ib];
            share = total > 0.0f ? share/total : ib == 0; // a head that is not finite is content
        }
    }
}

// what the tokens see of each block of the cells [begin, end) that they attend to; base: floats of the thread
const fasa_visible * fasa_choose_blocks(
        const fasa_attend_op & op, const fasa_attend_op::unit & u, int64_t n_tokens, int64_t begin, int64_t end, float * base) {
    const fasa_blocks_work work(op, base);

    for (int64_t i = begin; i < end; i += FASA_TILE_CELLS) {
        work.seen[(i - begin)/FASA_TILE_CELLS] = fasa_get_visible(op, u, n_tokens, i, std::min(FASA_TILE_CELLS, end - i));
    }
    if (op.mass >= 1.0f) {
        return work.seen;
    }

    const int64_t n_asked = FASA_ASKED*op.n_group;
    for (int64_t i = 0; i < FASA_ASKED; ++i) {
        fasa_get_shares(op, u, u.token + std::max<int64_t>((i + 1)*n_tokens/FASA_ASKED - 1, 0), work, work.shares + i*op.n_group*work.n_blocks);
    }
    std::fill(work.left, work.left + n_asked, op.mass);
    std::fill(work.most, work.most + work.n_blocks, 0.0f);
    for (int64_t i = 0; i < n_asked*work.n_blocks; ++i) {
        work.most[i % work.n_blocks] = std::max(work.most[i % work.n_blocks], work.shares[i]);
    }

    // what is always attended to is as if nothing mattered more
    const auto first = std::find_if(work.seen, work.seen + work.n_blocks, [](fasa_visible x) { return x != FASA_NONE; }) - work.seen;
    for (int64_t ib = 0; ib < work.n_blocks; ++ib) {
        const bool is_near = work.seen[ib] == FASA_SOME || (ib + 1 < work.n_blocks && work.seen[ib] == FASA_ALL && work.seen[ib + 1] != FASA_ALL);
        work.most[ib] = ib == first || is_near ? INFINITY : work.most[ib];
    }

    std::iota(work.order, work.order + work.n_blocks, 0);
    std::sort(work.order, work.order + work.n_blocks, [&](int32_t a, int32_t b) {
        return work.most[a] != work.most[b] ? work.most[a] > work.most[b] : a < b;
    });
    bool is_enough = false;
    for (int64_t i = 0; i < work.n_blocks; ++i) {
        const int32_t ib = work.order[i];
        if (is_enough && work.most[ib] < INFINITY) {
            work.seen[ib] = FASA_NONE;
            continue;
        }
        float most = 0.0f;
        for (int64_t ia = 0; ia < n_asked; ++ia) {
            work.left[ia] -= work.shares[ia*work.n_blocks + ib];
            most = std::max(most, work.left[ia]);
        }
        is_enough = most <= 0.0f;
    }
    return work.seen;
}

} // namespace
