// FASA (Frequency-Aware Sparse Attention, arXiv 2602.03152) as three ggml ops: store, select, attend.
//
// Terms: a frequency chunk is one RoPE plane (two dims of a head); the dominant chunks of a KV head rank the
// cached tokens nearly as the whole head does. Their dims of every key are kept in a packed *tip cache*:
//
//   store   writes the tips of new keys                                   (beside the write of K itself)
//   select  scores all cells on their tips, lists the few that matter     (TIP, paper section 4.2)
//   attend  exact softmax attention over the listed cells, or over all    (FAC, paper section 4.3)
//
// Only store and select know the layout of the tips; everybody else sees an opaque I8 tensor.
// README.md beside this file states the contract that every backend has to meet.

#pragma once

#include "ggml.h"
#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

    // the tip cache of one layer: I8 [n_bytes_block, n_cells/n_cells_block, n_head_kv, n_stream]
    //   n_cells:  cells of one stream, a multiple of ggml_fasa_cells_per_block()
    //   n_dim:    dims kept of each key, two for every chunk
    GGML_API struct ggml_tensor * ggml_fasa_new_tips(
            struct ggml_context * ctx,
            int64_t               n_cells,
            int64_t               n_dim,
            int64_t               n_head_kv,
            int64_t               n_stream);

    GGML_API int64_t ggml_fasa_cells_per_block(void);

    // pack the listed dims of each key into the tip cache
    //
    //   tips:   I8           as made by ggml_fasa_new_tips
    //   k:      F32/F16/BF16 [n_embd_head, n_head_kv, n_tokens] !! after RoPE, before any Hadamard rotation !!
    //   dims:   I32          [n_dim, n_head_kv]                 the dims of each head that are kept
    //   ranges: F32          [n_dim, 2, n_head_kv]              of each of them the centre, then the step between its 16 levels
    //   idxs:   I64          [n_tokens]                         stream*n_cells + cell, as for ggml_set_rows in a KV cache
    //   type_k: type of the K cache. F16 and BF16 round the key first, so that tips made again from the cache
    //           are equal to the bit
    //
    // a dim is stored as its level floor((k - centre)*(1/step)) + 8, from 0 to 15; a step of 0 means that it never moves
    //
    // returns a view of tips
    GGML_API struct ggml_tensor * ggml_fasa_store(
            struct ggml_context * ctx,
            struct ggml_tensor  * tips,
            struct ggml_tensor  * k,
            struct ggml_tensor  * dims,
            struct ggml_tensor  * ranges,
            struct ggml_tensor  * idxs,
            enum   ggml_type      type_k);

    // the same, equal to the bit, from keys that the K cache holds already
    //
    //   k:    F32/F16/BF16 [n_embd_head, n_head_kv, n_cells*n_stream] the cache, stream after stream !! not rotated !!
    //   idxs: I64          [n_tokens]                                 cells, so rows of k
    //
    // !! what writes these rows has to come earlier in the graph: no edge leads from there to this op !!
    GGML_API struct ggml_tensor * ggml_fasa_store_cached(
            struct ggml_context * ctx,
            struct ggml_tensor  * tips,
            struct ggml_tensor  * k,
            struct ggml_tensor  * dims,
            struct ggml_tensor  * ranges,
            struct ggml_tensor  * idxs);

    // list the cells that each KV head, or each query head, attends to
    //
    //   q:      F32 [n_embd_head, n_head, n_tokens, n_stream]
    //   tips:   I8  the first n_kv cells of the tip cache (a view in dimension 1)
    //   dims:   I32 [n_dim, n_head_kv]
    //   ranges: F32 [n_dim, 2, n_head_kv], those that the tips were stored with
    //   mask:   F16 [n_kv, n_tokens, 1, n_stream] 0: visible, -INFINITY: not
    //   forced: I32 [n_forced, n_tokens, n_stream] or NULL: visible cells chosen whatever their score, -1: none
    //   n_head_sel: n_head_kv: the query heads of a group share one choice; n_head: each has its own
    //   scale:  of the logits
    //
    //   res:    I32 [n_fac, n_head_sel, n_tokens, n_stream] ids within the stream, ascending, each once, then -1
    //
    // where heads share a choice, a cell's score is the greatest of their log-softmax over the tip scores of all
    // visible cells; equal scores go to the lower id; forced cells count in n_fac
    GGML_API struct ggml_tensor * ggml_fasa_select(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * tips,
            struct ggml_tensor  * dims,
            struct ggml_tensor  * ranges,
            struct ggml_tensor  * mask,
            struct ggml_tensor  * forced,
            int64_t               n_head_sel,
            int64_t               n_fac,
            float                 scale);

    // exact softmax attention over some cells: those listed in idx, or those visible in mask; the other one is NULL
    //
    //   q:     F32 [n_embd_head_k, n_head,    n_tokens, n_stream]
    //   k:         [n_embd_head_k, n_head_kv, n_kv,     n_stream]
    //   v:         [n_embd_head_v, n_head_kv, n_kv,     n_stream] !! not transposed !!
    //   idx:   I32 [n_fac, n_head_sel, n_tokens, n_stream] from ggml_fasa_select: visible cells, -1 is skipped
    //   mask:  F16 [n_kv, n_tokens, 1, n_stream] 0: visible, -INFINITY: not
    //   sinks: F32 [n_head] or NULL, as in ggml_flash_attn_ext_add_sinks
    //   scale, logit_softcap: as in ggml_flash_attn_ext
    //
    //   res:   F32 [n_embd_head_v, n_head, n_tokens, n_stream] a head with no cell, or none but of logit -INFINITY, gets zeros
    GGML_API struct ggml_tensor * ggml_fasa_attend(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * idx,
            struct ggml_tensor  * mask,
            struct ggml_tensor  * sinks,
            float                 scale,
            float                 logit_softcap);

    // of an attend with a mask: let the tokens of a prompt attend to the blocks of cells that matter to them, by the tips
    //
    //   q, tips, dims, ranges: as for ggml_fasa_select; what fills the tips has to come earlier in the graph
    //   mass: share of the attention of the queries that are asked for their neighbours, by their scores; >= 1: all blocks
    GGML_API void ggml_fasa_attend_set_tips(
            struct ggml_tensor * a,
            struct ggml_tensor * q,
            struct ggml_tensor * tips,
            struct ggml_tensor * dims,
            struct ggml_tensor * ranges,
            float                mass);

    //
    // when it pays, on a GPU
    //
    // microseconds that one layer's attention takes for one token, estimated (fasa-cost.cpp)
    //
    //   bandwidth: of the GPU's memory by its data sheet, GB/s
    //   row_bytes: of K and V of a cell, all KV heads
    //   tip_bytes: of the tips of a cell, all KV heads
    //   n_fac:     rows that are read, once for each list

    GGML_API float ggml_fasa_us_dense (float bandwidth, size_t row_bytes, int64_t n_kv);
    GGML_API float ggml_fasa_us_sparse(float bandwidth, size_t row_bytes, size_t tip_bytes, int64_t n_kv, int64_t n_fac);

    // cells from which on sparse attention is the faster one; 0: the bandwidth is not known (0), so nothing is
    GGML_API int64_t ggml_fasa_min_cells(float bandwidth, size_t row_bytes, size_t tip_bytes, int64_t n_fac);

    // GB/s of a device's memory by its data sheet; 0: not known, or nothing has been measured on such devices
    GGML_API float ggml_fasa_bandwidth(ggml_backend_dev_t dev);

    // ask the system for huge pages under a buffer in host memory, best before it is written to; elsewhere nothing happens
    // rows read here and there cost a page-table walk each, which huge pages spare
    GGML_API void ggml_fasa_prefer_huge_pages(ggml_backend_buffer_t buffer);

#ifdef __cplusplus
}
#endif
