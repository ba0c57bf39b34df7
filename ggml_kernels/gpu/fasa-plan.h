// From a FASA op to what the GPU kernels are told: their arguments, how many blocks of threads, how much memory.
// Included by the host side of the GPU backends; which shapes and types the kernels handle is said here, too.

#pragma once

#include "fasa-args.h"
#include "../fasa-tips.h"

#include "ggml.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

static_assert(FASA_BLOCK_CELLS == FASA_TIPS_CELLS && FASA_QUAD == FASA_TIPS_QUAD &&
    FASA_PAIR == FASA_TIPS_PAIR && FASA_LEVELS == FASA_TIPS_LEVELS, "another layout of tips");

static_assert(FASA_TYPE_F32  == GGML_TYPE_F32,  "wrong type number");
static_assert(FASA_TYPE_F16  == GGML_TYPE_F16,  "wrong type number");
static_assert(FASA_TYPE_BF16 == GGML_TYPE_BF16, "wrong type number");
static_assert(FASA_TYPE_Q8_0 == GGML_TYPE_Q8_0, "wrong type number");
static_assert(FASA_TYPE_Q4_0 == GGML_TYPE_Q4_0, "wrong type number");

// in the second dimension of a grid
static constexpr int64_t FASA_MAX_ROWS = 65535;

static constexpr int64_t FASA_MAX_EMBD   = 256; // a warp holds as many dims of a query
static constexpr size_t  FASA_MAX_MEMORY = 64 << 20; // bytes for select: rows that need more come in several launches
static constexpr size_t  FASA_MAX_SHARED = 32*1024; // bytes of shared memory, as many as Metal has
static constexpr float   FASA_MOST       = 1e24f; // step of a query, see ../cpu/fasa-score.h
static constexpr int64_t FASA_MAX_PARTS  = 128; // of a row in select
static constexpr int64_t FASA_MIN_PART   = 512; // cells
static constexpr int64_t FASA_MIN_BLOCKS = 2;   // of cells, for a part of what does all in one launch
static constexpr int64_t FASA_MAX_SPLITS = 64;  // of a list in attend
static constexpr int64_t FASA_MIN_SPLIT  = 64;  // cells
static constexpr int64_t FASA_MAX_COUNTERS = 512; // rows of a launch that does all, which cannot take turns
static constexpr size_t  FASA_MAX_MEMORY_TOGETHER = 256 << 20;

static float fasa_op_param(const ggml_tensor * op, int i) {
    return ((const float *) op->op_params)[i];
}

static int64_t fasa_padded(int64_t n, int64_t multiple) {
    return (n + multiple - 1)/multiple*multiple;
}

// whether all rows begin where a vector load of the type may
static bool fasa_is_aligned(const ggml_tensor * t) {
    const size_t align = ggml_is_quantized(t->type) ? sizeof(uint16_t) : 16;
    return t->nb[1] % align == 0 && t->nb[2] % align == 0 && t->nb[3] % align == 0 && t->view_offs % align == 0;
}

//
// store
//

static bool fasa_store_supported(const ggml_tensor * op) {
    const ggml_tensor * tips = op->src[0];
    return tips->ne[1]*FASA_TIPS_CELLS*tips->ne[3] <= INT32_MAX && op->src[2]->ne[0] <= FASA_MAX_EMBD;
}

struct fasa_store_plan {
    fasa_store_args args;
    int32_t n_blocks;

    explicit fasa_store_plan(const ggml_tensor * op) {
        const ggml_tensor * tips = op->src[0];
        const ggml_tensor * k    = op->src[1];
        const ggml_tensor * dims = op->src[2];

        args.n_dim     = dims->ne[0];
        args.n_pairs   = fasa_tips_n_pairs(args.n_dim);
        args.n_head_kv = dims->ne[1];
        args.n_tokens  = op->src[3]->ne[0];
        args.n_stream  = tips->ne[3];
        args.n_cells   = tips->ne[1]*FASA_TIPS_CELLS;
        args.type      = k->type;
        args.type_k    = op->op_params[0];
        args.cached    = op->op_params[1];
        args.nb_k1     = k->nb[1];
        args.nb_k2     = k->nb[2];
        args.nb_tips1  = tips->nb[1];
        args.nb_tips2  = tips->nb[2];
        args.nb_tips3  = tips->nb[3];

        n_blocks = (args.n_tokens*args.n_head_kv + FASA_WARPS - 1)/FASA_WARPS;
    }
};

//
// select
//

struct fasa_select_plan {
    fasa_select_args args;
    size_t shared_stats; // bytes of shared memory
    size_t shared_keys;
    size_t shared_mark;
    size_t memory;       // bytes from one step to the next, for the rows of a launch
    int32_t n_rows;      // of all launches

    explicit fasa_select_plan(const ggml_tensor * op) {
        const ggml_tensor * q      = op->src[0];
        const ggml_tensor * tips   = op->src[1];
        const ggml_tensor * dims   = op->src[2];
        const ggml_tensor * mask   = op->src[3];
        const ggml_tensor * forced = op->src[4];

        args.n_dim      = dims->ne[0];
        args.n_pairs    = fasa_tips_n_pairs(args.n_dim);
        args.n_head_sel = op->ne[1];
        args.n_shared   = args.n_head_sel/dims->ne[1];
        args.n_group    = q->ne[1]/args.n_head_sel;
        args.n_tokens   = q->ne[2];
        n_rows          = args.n_head_sel*args.n_tokens*q->ne[3];
        args.n_kv       = tips->ne[1]*FASA_TIPS_CELLS;
        args.n_fac      = op->ne[0];
        args.n_forced   = forced ? forced->ne[0] : 0;
        set_parts(std::min((args.n_kv + FASA_MIN_PART - 1)/FASA_MIN_PART, FASA_MAX_PARTS));
        args.scale      = std::max(-FLT_MAX, std::min(fasa_op_param(op, 0)*1.44269504088896f, FLT_MAX));
        args.max_query  = std::min(127.0f*FASA_MOST/std::abs(args.scale), FLT_MAX);
        args.nb_q1      = q->nb[1];
        args.nb_q2      = q->nb[2];
        args.nb_q3      = q->nb[3];
        args.nb_tips1   = tips->nb[1];
        args.nb_tips2   = tips->nb[2];
        args.nb_tips3   = tips->nb[3];
        args.nb_mask1   = mask->nb[1];
        args.nb_mask3   = mask->nb[3];

        const size_t n_heads = fasa_padded(args.n_group, FASA_TILE);

        shared_stats = shared_query() + 2*n_heads*FASA_WARPS*sizeof(float);
        shared_keys  = shared_query() + (n_heads + FASA_WARPS)*sizeof(float) + (args.n_own + FASA_BINS)*sizeof(uint32_t);
        shared_mark  = FASA_NTH_SHARED*sizeof(uint32_t);

        const size_t row = row_memory() + args.n_kv*sizeof(uint32_t) + args.n_kv/32*sizeof(uint32_t);

        args.row0   = 0;
        args.n_rows = std::min<int64_t>({ n_rows, FASA_MAX_ROWS, std::max<int64_t>(FASA_MAX_MEMORY/row, 1) });
        memory      = args.n_rows*row;
    }

    void set_parts(int64_t n_parts) {
        args.n_parts = n_parts;
        args.n_own   = (args.n_kv/FASA_BLOCK_CELLS + n_parts - 1)/n_parts;
    }

    // bytes of shared memory for the rounded query
    size_t shared_query() const {
        const size_t n_heads = fasa_padded(args.n_group, FASA_TILE);
        return n_heads*2*args.n_pairs*sizeof(int32_t) + 2*n_heads*sizeof(float);
    }

    // bytes that a row has at least from one step to the next
    size_t row_memory() const {
        return sizeof(fasa_row_state) + args.n_kv*sizeof(uint64_t) + 2*args.n_group*args.n_parts*sizeof(float);
    }

    // on to the next rows, as many as there is memory for; false if there are none
    bool next() {
        args.row0  += args.n_rows;
        args.n_rows = std::min(args.n_rows, n_rows - args.row0);
        return args.n_rows > 0;
    }
};

static bool fasa_select_supported(const ggml_tensor * op) {
    const fasa_select_plan plan(op);
    return std::max({ plan.shared_stats, plan.shared_keys, plan.shared_mark }) <= FASA_MAX_SHARED && plan.args.n_dim <= FASA_MAX_EMBD &&
        op->src[1]->ne[1]*FASA_TIPS_CELLS <= INT32_MAX/2;
}

//
// attend
//

static bool fasa_attend_supported(const ggml_tensor * op) {
    const auto is_supported = [](const ggml_tensor * t) {
        switch (t->type) {
            case GGML_TYPE_F32:
            case GGML_TYPE_F16:
            case GGML_TYPE_BF16:
            case GGML_TYPE_Q8_0:
            case GGML_TYPE_Q4_0:
                return t->ne[0] % 8 == 0 && t->ne[0] <= FASA_MAX_EMBD && t->ne[2] <= INT32_MAX/2 && fasa_is_aligned(t);
            default:
                return false;
        }
    };
    const bool is_by_blocks = op->src[7]; // of a prompt
    return is_supported(op->src[1]) && is_supported(op->src[2]) && op->ne[1]*op->ne[2]*op->ne[3] <= FASA_MAX_ROWS && !is_by_blocks;
}

struct fasa_attend_plan {
    fasa_attend_args args;
    int32_t n_lanes;  // that read a row of K or V
    int32_t n_units;  // blocks of threads for each split
    int32_t n_lists;  // of all tokens
    size_t  shared_split; // bytes of shared memory
    size_t  shared_combine;
    size_t  memory;   // bytes from one step to the next

    // n_blocks: of threads, that keep the device busy; max_tile: query heads, as many as a thread has registers for
    fasa_attend_plan(const ggml_tensor * op, int32_t n_blocks, int32_t max_tile) {
        const ggml_tensor * q    = op->src[0];
        const ggml_tensor * k    = op->src[1];
        const ggml_tensor * v    = op->src[2];
        const ggml_tensor * idx  = op->src[3];
        const ggml_tensor * mask = op->src[4];

        args.n_embd_k  = k->ne[0];
        args.n_embd_v  = v->ne[0];
        args.n_head    = q->ne[1];
        args.n_list    = idx ? idx->ne[1] : k->ne[1];
        args.n_shared  = args.n_list/k->ne[1];
        args.n_group   = args.n_head/args.n_list;
        args.n_tile    = args.n_group == 1 ? 1 : args.n_group <= 4 ? 4 : max_tile;
        args.n_tiles   = (args.n_group + args.n_tile - 1)/args.n_tile;
        args.n_tokens  = q->ne[2];
        args.n_cells   = idx ? idx->ne[0] : k->ne[2];
        args.has_list  = idx != nullptr;
        args.has_sinks = op->src[5] != nullptr;
        args.type_k    = k->type;
        args.type_v    = v->type;
        args.logit_softcap = fasa_op_param(op, 1);
        args.scale         = args.logit_softcap == 0.0f ? fasa_op_param(op, 0) : fasa_op_param(op, 0)/args.logit_softcap;
        args.nb_q1     = q->nb[1];
        args.nb_q2     = q->nb[2];
        args.nb_q3     = q->nb[3];
        args.nb_k1     = k->nb[1];
        args.nb_k2     = k->nb[2];
        args.nb_k3     = k->nb[3];
        args.nb_v1     = v->nb[1];
        args.nb_v2     = v->nb[2];
        args.nb_v3     = v->nb[3];
        args.nb_mask1  = mask ? mask->nb[1] : 0;
        args.nb_mask3  = mask ? mask->nb[3] : 0;

        const int64_t n_embd = std::max(args.n_embd_k, args.n_embd_v);
        n_lanes = n_embd <= 64 ? 8 : n_embd <= 128 ? 16 : 32;

        n_lists = args.n_list*args.n_tokens*q->ne[3];
        n_units = args.n_tiles*n_lists;

        // the largest tile takes twice the registers, so half as many run at once
        n_blocks = args.n_tile == FASA_MAX_TILE ? n_blocks/2 : n_blocks;

        const int64_t n_steps  = (args.n_cells + FASA_MIN_SPLIT - 1)/FASA_MIN_SPLIT;
        const int64_t n_splits = std::min({ n_steps, max_splits(), std::max<int64_t>((n_blocks + n_units - 1)/n_units, 1) });

        args.n_split  = (n_steps + n_splits - 1)/n_splits*FASA_MIN_SPLIT;
        args.n_splits = (args.n_cells + args.n_split - 1)/args.n_split;

        shared_split   = sums_floats()*sizeof(float);
        shared_combine = (size_t) args.n_group*args.n_splits*sizeof(float);
        memory         = partial_floats()*sizeof(float);
    }

    // of a list: combine keeps a number for each, and query head, in half of the shared memory
    int64_t max_splits() const {
        return std::max<int64_t>(std::min<int64_t>(FASA_MAX_SPLITS, FASA_MAX_SHARED/2/sizeof(float)/args.n_group), 1);
    }

    size_t partial_floats() const {
        return (size_t) n_lists*args.n_group*args.n_splits*(args.n_embd_v + 2);
    }

    // of shared memory, for the sums of all warps: FASA_SUMS_SHARED of the kernel
    size_t sums_floats() const {
        const int32_t n_merged = std::min(64/n_lanes, args.n_tile);
        return FASA_WARPS*(n_merged*(n_lanes + 1)*FASA_ELEMENTS + 2*args.n_tile);
    }
};

//
// select and attend in one launch
//

struct fasa_decode_plan {
    fasa_decode_args args;
    fasa_attend_plan attend;
    int32_t n_rows;
    size_t  shared; // bytes of shared memory
    size_t  memory; // bytes

    // n_resident: blocks of threads that the device holds at once
    fasa_decode_plan(const ggml_tensor * select_op, const ggml_tensor * attend_op, int32_t n_resident, bool scores_in_shared) :
        attend(attend_op, n_resident, FASA_MAX_TILE) {
        fasa_select_plan select(select_op);

        n_rows = select.n_rows;

        const int64_t n_blocks = select.args.n_kv/FASA_BLOCK_CELLS;
        // as many as there are, but each with some blocks of cells, and a few less if a warp then reads what there is of all parts at once
        const int64_t n_busy  = (n_blocks + FASA_MIN_BLOCKS - 1)/FASA_MIN_BLOCKS;
        const int64_t n_parts = std::min({ (int64_t) n_resident/n_rows, FASA_MAX_PARTS, n_busy, max_parts(select.args) });

        select.args.n_rows = n_rows;
        select.set_parts(std::max<int64_t>(n_parts%FASA_WARP <= n_parts/8 ? n_parts - n_parts%FASA_WARP : n_parts, 1));
        attend.args.n_splits = select.args.n_parts; // not by lists of the same length

        args.select           = select.args;
        args.attend           = attend.args;
        args.scores_in_shared = scores_in_shared;

        const int64_t n_heads  = fasa_padded(select.args.n_group, FASA_TILE);
        const int64_t n_own    = select.args.n_own;
        const int64_t n_scores = n_own*FASA_BLOCK_CELLS*n_heads;
        const int64_t n_factors = (int64_t) select.args.n_group*select.args.n_parts;

        args.query_floats = fasa_padded(select.shared_query()/sizeof(float), 4);
        args.n_list       = fasa_padded(std::min<int64_t>(select.args.n_fac, n_own*FASA_BLOCK_CELLS), 4);
        args.n_work       = fasa_padded(std::max<int64_t>({ scores_in_shared ? n_scores : 0, (int64_t) attend.sums_floats(), n_factors }), 4);

        const size_t n_partial = attend.partial_floats();

        args.partial_floats = n_partial;

        shared = (args.query_floats + args.n_work + FASA_BINS + args.n_list + 2*n_own + 2*FASA_WARPS*n_heads + n_heads + FASA_WARPS)*sizeof(float);
        memory = n_rows*select.row_memory() + (n_partial + (scores_in_shared ? 0 : n_rows*select.args.n_parts*n_scores))*sizeof(float);
    }

    // whether every row has a block of threads, and counters
    bool is_possible(int32_t n_resident) const {
        return n_rows*args.select.n_parts <= n_resident && n_rows <= FASA_MAX_COUNTERS && memory <= FASA_MAX_MEMORY_TOGETHER;
    }

private:
    // combine keeps a number for each part and query head in shared memory
    static int64_t max_parts(const fasa_select_args & args) {
        return std::max<int64_t>(FASA_MAX_SHARED/2/sizeof(float)/args.n_group, 1);
    }
};

// of any of the three ops
static bool fasa_supported(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_FASA_STORE:  return fasa_store_supported(op);
        case GGML_OP_FASA_SELECT: return fasa_select_supported(op);
        case GGML_OP_FASA_ATTEND: return fasa_attend_supported(op);
        default:                  return false;
    }
}
