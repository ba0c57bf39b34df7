// From a FASA op to what the GPU kernels are told: their arguments, how many blocks of threads, how much memory.
// Included by the host side of the GPU backends; which shapes and types the kernels handle is said here, too.

#pragma once

#include "fasa-args.h"
#include "../fasa-tips.h"

#include "ggml.h"

#include <algorithm>

static_assert(FASA_BLOCK_CELLS == FASA_TIPS_CELLS && FASA_QUAD == FASA_TIPS_QUAD, "another layout of tips");

static_assert(FASA_TYPE_F32  == GGML_TYPE_F32,  "wrong type number");
static_assert(FASA_TYPE_F16  == GGML_TYPE_F16,  "wrong type number");
static_assert(FASA_TYPE_BF16 == GGML_TYPE_BF16, "wrong type number");
static_assert(FASA_TYPE_Q8_0 == GGML_TYPE_Q8_0, "wrong type number");
static_assert(FASA_TYPE_Q4_0 == GGML_TYPE_Q4_0, "wrong type number");

// in the second dimension of a grid
static constexpr int64_t FASA_MAX_ROWS = 65535;

static constexpr int64_t FASA_MAX_EMBD   = 256;
static constexpr size_t  FASA_MAX_MEMORY = 64 << 20; // bytes for select: rows that need more come in several launches
static constexpr size_t  FASA_MAX_SHARED = 32*1024; // bytes of shared memory, as many as Metal has
static constexpr int64_t FASA_MAX_CHUNKS = 128; // of a row in select
static constexpr int64_t FASA_MIN_CHUNK  = 512; // cells
static constexpr int64_t FASA_MAX_SPLITS = 64;  // of a list in attend

static float fasa_op_param(const ggml_tensor * op, int i) {
    return ((const float *) op->op_params)[i];
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
    return tips->ne[1]*FASA_TIPS_CELLS*tips->ne[3] <= INT32_MAX;
}

struct fasa_store_plan {
    fasa_store_args args;
    int32_t n_blocks;

    explicit fasa_store_plan(const ggml_tensor * op) {
        const ggml_tensor * tips = op->src[0];
        const ggml_tensor * k    = op->src[1];
        const ggml_tensor * dims = op->src[2];

        args.n_dim     = dims->ne[0];
        args.n_quads   = fasa_tips_n_dim(args.n_dim)/FASA_TIPS_QUAD;
        args.n_head_kv = dims->ne[1];
        args.n_tokens  = k->ne[2];
        args.n_stream  = tips->ne[3];
        args.n_cells   = tips->ne[1]*FASA_TIPS_CELLS;
        args.type      = k->type;
        args.type_k    = op->op_params[0];
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
        args.n_quads    = fasa_tips_n_dim(args.n_dim)/FASA_TIPS_QUAD;
        args.n_head_sel = op->ne[1];
        args.n_shared   = args.n_head_sel/dims->ne[1];
        args.n_group    = q->ne[1]/args.n_head_sel;
        args.n_tokens   = q->ne[2];
        n_rows          = args.n_head_sel*args.n_tokens*q->ne[3];
        args.n_kv       = tips->ne[1]*FASA_TIPS_CELLS;
        args.n_fac      = op->ne[0];
        args.n_forced   = forced ? forced->ne[0] : 0;
        args.n_chunk    = (args.n_kv + FASA_MIN_CHUNK*FASA_MAX_CHUNKS - 1)/(FASA_MIN_CHUNK*FASA_MAX_CHUNKS)*FASA_MIN_CHUNK;
        args.n_chunks   = (args.n_kv + args.n_chunk - 1)/args.n_chunk;
        args.scale      = fasa_op_param(op, 0)*1.44269504088896f;
        args.nb_q1      = q->nb[1];
        args.nb_q2      = q->nb[2];
        args.nb_q3      = q->nb[3];
        args.nb_tips1   = tips->nb[1];
        args.nb_tips2   = tips->nb[2];
        args.nb_tips3   = tips->nb[3];
        args.nb_mask1   = mask->nb[1];
        args.nb_mask3   = mask->nb[3];

        const size_t n_heads = (args.n_group + FASA_TILE - 1)/FASA_TILE*FASA_TILE;
        const size_t query   = n_heads*args.n_quads*sizeof(int32_t) + 2*n_heads*sizeof(float);

        shared_stats = query + 2*n_heads*FASA_WARPS*sizeof(float);
        shared_keys  = query + (n_heads + FASA_WARPS)*sizeof(float) + (args.n_chunk/32 + FASA_BINS)*sizeof(uint32_t);
        shared_mark  = FASA_BINS*sizeof(uint32_t);

        const size_t row = sizeof(fasa_row_state) + args.n_kv*2*sizeof(uint32_t) + args.n_kv/32*sizeof(uint32_t) +
            2*args.n_group*args.n_chunks*sizeof(float);

        args.row0   = 0;
        args.n_rows = std::min<int64_t>({ n_rows, FASA_MAX_ROWS, std::max<int64_t>(FASA_MAX_MEMORY/row, 1) });
        memory      = args.n_rows*row;
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
    return std::max({ plan.shared_stats, plan.shared_keys, plan.shared_mark }) <= FASA_MAX_SHARED &&
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
    return is_supported(op->src[1]) && is_supported(op->src[2]) && op->ne[1]*op->ne[2]*op->ne[3] <= FASA_MAX_ROWS;
}

struct fasa_attend_plan {
    fasa_attend_args args;
    int32_t n_lanes;  // that read a row of K or V
    int32_t n_units;  // blocks of threads for each split
    int32_t n_rows;   // query heads of all tokens
    size_t  shared;   // bytes of shared memory
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
        args.n_bytes_v = ggml_row_size(v->type, v->ne[0]);
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

        n_rows  = args.n_head*args.n_tokens*q->ne[3];
        n_units = args.n_tiles*args.n_list*args.n_tokens*q->ne[3];

        // the largest tile takes twice the registers, so half as many run at once
        n_blocks = args.n_tile == FASA_MAX_TILE ? n_blocks/2 : n_blocks;

        const int64_t n_steps  = (args.n_cells + FASA_STEP - 1)/FASA_STEP;
        const int64_t n_splits = std::min({ n_steps, FASA_MAX_SPLITS, std::max<int64_t>((n_blocks + n_units - 1)/n_units, 1) });

        args.n_split  = (n_steps + n_splits - 1)/n_splits*FASA_STEP;
        args.n_splits = (args.n_cells + args.n_split - 1)/args.n_split;

        const size_t n_shared = std::max(args.n_tile*FASA_STEP, FASA_WARPS*n_lanes*FASA_ELEMENTS);

        shared = (3*FASA_MAX_TILE + n_shared)*sizeof(float) + FASA_STEP*sizeof(int32_t);
        memory = (size_t) n_rows*args.n_splits*(args.n_embd_v + 2)*sizeof(float);
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
