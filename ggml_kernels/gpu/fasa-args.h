// What host and GPU kernels both know: sizes, and what a kernel is told, in one structure for each op: counts in elements,
// nb* in bytes as in ggml_tensor, numbered by dimension. Compiled as C++, CUDA and Metal alike.

#pragma once

#ifndef __METAL_VERSION__
#    include <stdint.h>
#endif

// cells of a block of tips, dims that lie together in it, those that a dot product takes, and levels of a dim (../fasa-tips.h)
#define FASA_BLOCK_CELLS 32
#define FASA_PAIR        8
#define FASA_QUAD        4
#define FASA_LEVELS      16

// kernels run in blocks of so many threads, if a file does not say otherwise
#ifndef FASA_THREADS
#    define FASA_THREADS 256
#endif
#define FASA_WARP    32
#define FASA_WARPS   (FASA_THREADS/FASA_WARP)

// select: blocks of cells that a warp scores together, and query heads; bins of the distance to the best score, 64 for each power of two, from 2^-6 to 2^10
#define FASA_BATCH 2
#define FASA_TILE  4
#define FASA_BINS  1024

// attend: elements of a row by lane; query heads that are served together at most
#define FASA_ELEMENTS 8
#define FASA_MAX_TILE 8

// of the cells in the bin of the n_fac-th best, those that are put in order by comparing each with all; u32 of shared memory
// that finding the n-th best takes
#define FASA_RANKED     32
#define FASA_DIGITS     256
#define FASA_NTH_SHARED (2*FASA_RANKED + FASA_DIGITS + 4 + FASA_WARPS)

// one launch for all: bytes between the counters of two rows
#define FASA_COUNTERS 128

// numbers of ggml_type
#define FASA_TYPE_F32  0
#define FASA_TYPE_F16  1
#define FASA_TYPE_Q4_0 2
#define FASA_TYPE_Q8_0 8
#define FASA_TYPE_BF16 30

struct fasa_store_args {
    int32_t n_dim;
    int32_t n_pairs;   // of quads
    int32_t n_head_kv;
    int32_t n_tokens;
    int32_t n_stream;
    int32_t n_cells;   // of a stream
    int32_t type;      // of k
    int32_t type_k;    // of the K cache
    int32_t cached;    // k is the K cache, else the keys of the tokens
    uint64_t nb_k1;    // head
    uint64_t nb_k2;    // token or cell
    uint64_t nb_tips1; // block of cells
    uint64_t nb_tips2; // head
    uint64_t nb_tips3; // stream
};

// a row is what one KV head, or a query head that chooses for itself, does for one token
struct fasa_select_args {
    int32_t n_dim;
    int32_t n_pairs;    // of quads
    int32_t n_head_sel; // heads that choose
    int32_t n_shared;   // of them that read one KV head
    int32_t n_group;    // query heads that share a choice
    int32_t n_tokens;
    int32_t row0;       // first row of a launch
    int32_t n_rows;     // of it
    int32_t n_kv;
    int32_t n_fac;
    int32_t n_forced;
    int32_t n_parts;    // of a row, a block of threads for each: its blocks of cells are dealt out to them in turn
    int32_t n_own;      // blocks of cells of a part, at most
    float   scale;      // of the logits, times log2(e)
    float   max_query;  // greatest element of a query head, as far as its scores go: more would make them infinite
    uint64_t nb_q1;     // head
    uint64_t nb_q2;     // token
    uint64_t nb_q3;     // stream
    uint64_t nb_tips1;  // block of cells
    uint64_t nb_tips2;  // head
    uint64_t nb_tips3;  // stream
    uint64_t nb_mask1;  // token
    uint64_t nb_mask3;  // stream
};

// of a row, from one launch of select to the next
struct fasa_row_state {
    uint32_t bins[FASA_BINS];
    uint32_t n_found; // cells in the bin of the n_fac-th best
    uint32_t n_done;  // parts whose cells are marked
    float    best;    // score of the row
    uint32_t padding;
};

struct fasa_attend_args {
    int32_t n_embd_k;  // head sizes
    int32_t n_embd_v;
    int32_t n_head;    // query heads
    int32_t n_list;    // heads that have a list of cells
    int32_t n_shared;  // of them that read one KV head
    int32_t n_group;   // query heads that share a list
    int32_t n_tile;    // of them that a block of threads serves
    int32_t n_tiles;
    int32_t n_tokens;
    int32_t n_cells;   // of a list, skipped ones included
    int32_t n_split;   // cells of a list that one block of threads works on
    int32_t n_splits;
    int32_t has_list;  // else a mask
    int32_t has_sinks;
    int32_t type_k;
    int32_t type_v;
    float   scale;         // of the logits; with a softcap, divided by it
    float   logit_softcap;
    uint64_t nb_q1;    // head
    uint64_t nb_q2;    // token
    uint64_t nb_q3;    // stream
    uint64_t nb_k1;    // head
    uint64_t nb_k2;    // cell
    uint64_t nb_k3;    // stream
    uint64_t nb_v1;
    uint64_t nb_v2;
    uint64_t nb_v3;
    uint64_t nb_mask1; // token
    uint64_t nb_mask3; // stream
};

// score, select and attend in one launch
struct fasa_decode_args {
    fasa_select_args select;
    fasa_attend_args attend;   // n_splits: n_parts
    int32_t scores_in_shared;  // else behind the rest of the memory
    int32_t query_floats;      // of shared memory: the rounded query,
    int32_t n_work;            // scores, then sums,
    int32_t n_list;            // the list of cells
    int32_t partial_floats;    // of memory
};
