// The entry points of the kernels in CUDA, and their launches.
//
// Stands alone, so that it compiles without the rest of ggml-cuda. A launcher, which fasa.cu makes of a stream of ggml-cuda,
// has
//
//   int32_t n_cores                                         multiprocessors of the device
//   void *  alloc(size_t size)                              device memory until the launches are through, once
//   void    launch(kernel, dim3 grid, size_t shared, ...)   kernel<<<grid, FASA_THREADS, shared>>>(...)
//
//   uint32_t * counters(size_t size)                        device memory, zero at first, that the next launch finds as this one leaves it
//   int32_t n_resident(kernel, size_t shared)               blocks that the device holds at once; 0: none, or they could not wait for one another
//   bool    launch_together(kernel, dim3 grid, size_t shared, ...)  all blocks at once; false: it cannot hold them after all

#pragma once

#include "fasa-words.cuh"

#include "../gpu/fasa-store.h"
#include "../gpu/fasa-choose.h"
#include "../gpu/fasa-attend.h"
#include "../gpu/fasa-plan.h"

#include <algorithm>

// A kernel can be launched before the one in front of it has ended: it waits here before it writes anything, or reads more than
// constants and inputs of the graph.
static __device__ __forceinline__ void fasa_wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

static __device__ __forceinline__ fasa_at fasa_here() {
    const int32_t index = threadIdx.x;
    return { index, index%FASA_WARP, index/FASA_WARP, (int32_t) blockIdx.x, (int32_t) blockIdx.y };
}

#ifndef FASA_SHARED_MEMORY
extern __shared__ int4 fasa_shared[]; // for its alignment
#    define FASA_SHARED_MEMORY ((char *) fasa_shared)
#endif

#include "fasa-decode.cuh"

//
// store
//

static __global__ void __launch_bounds__(FASA_THREADS) fasa_store_kernel(
        fasa_store_args args, char * tips, const char * k, const int32_t * dims, const float * ranges, const int64_t * idxs) {
    fasa_wait_for_previous();
    const fasa_at at = fasa_here();
    fasa_store_end(args, fasa_store_begin(args, dims, ranges, idxs, at), tips, k, at);
}

template <typename T>
static void fasa_launch_store(T & launcher, const ggml_tensor * op) {
    const fasa_store_plan plan(op);
    launcher.launch(fasa_store_kernel, dim3(plan.n_blocks), 0, plan.args, (char *) op->src[0]->data, (const char *) op->src[1]->data,
        (const int32_t *) op->src[2]->data, (const float *) op->src[4]->data, (const int64_t *) op->src[3]->data);
}

// rows of V to their cells, as SET_ROWS does: a decode step has few
struct fasa_copy_args {
    int32_t  n_embd;
    int32_t  type;     // of the cache; the rows are f32
    int32_t  n_blocks; // of threads for each row
    uint64_t nb_from;
    uint64_t nb_to;
};

static __device__ __forceinline__ void fasa_copy_row(const fasa_copy_args & args, const char * from, char * to, int64_t id, fasa_at at) {
    const float * x   = (const float *) (from + at.x/args.n_blocks*args.nb_from);
    char        * row = to + id*args.nb_to;
    for (int32_t i = at.x%args.n_blocks*FASA_THREADS + at.index; i < args.n_embd; i += args.n_blocks*FASA_THREADS) {
        switch (args.type) {
            case FASA_TYPE_F32:  ((float    *) row)[i] = x[i]; break;
            case FASA_TYPE_F16:  ((uint16_t *) row)[i] = fasa_to_f16(x[i]); break;
            case FASA_TYPE_BF16: ((uint16_t *) row)[i] = fasa_to_bf16(x[i]); break;
        }
    }
}

// The first n_store blocks make tips, the others copy rows. Dims, ranges and indices are inputs of the graph, which no launch in front of
// this one writes: they are read before it has ended.
static __global__ void __launch_bounds__(FASA_THREADS) fasa_store_and_copy_kernel(
        fasa_store_args store, char * tips, const char * k, const int32_t * dims, const float * ranges, const int64_t * idxs_k,
        fasa_copy_args copy, char * v, const char * rows, const int64_t * idxs_v, int32_t n_store) {
    fasa_at at = fasa_here();
    if (at.x < n_store) {
        const fasa_store_key key = fasa_store_begin(store, dims, ranges, idxs_k, at);
        fasa_wait_for_previous();
        fasa_store_end(store, key, tips, k, at);
    } else {
        at.x -= n_store;
        const int64_t id = idxs_v[at.x/copy.n_blocks];
        fasa_wait_for_previous();
        fasa_copy_row(copy, rows, v, id, at);
    }
}

// set_rows: of V, of the same tokens (fasa_fused_store of ../gpu/fasa-fuse.h)
template <typename T>
static void fasa_launch_store_and_copy(T & launcher, const ggml_tensor * store, const ggml_tensor * set_rows) {
    const fasa_store_plan plan(store);
    const ggml_tensor   * from = set_rows->src[0];

    fasa_copy_args copy;
    copy.n_embd   = from->ne[0];
    copy.type     = set_rows->type;
    copy.n_blocks = (copy.n_embd + FASA_THREADS - 1)/FASA_THREADS;
    copy.nb_from  = from->nb[1];
    copy.nb_to    = set_rows->nb[1];

    launcher.launch(fasa_store_and_copy_kernel, dim3(plan.n_blocks + copy.n_blocks*from->ne[1]), 0, plan.args, (char *) store->src[0]->data,
        (const char *) store->src[1]->data, (const int32_t *) store->src[2]->data, (const float *) store->src[4]->data, (const int64_t *) store->src[3]->data,
        copy, (char *) set_rows->data, (const char *) from->data, (const int64_t *) set_rows->src[1]->data, plan.n_blocks);
}

//
// select
//

static __global__ void __launch_bounds__(FASA_THREADS) fasa_stats_kernel(
        fasa_select_args args, const char * q, const char * tips, const int32_t * dims, const float * ranges, const char * mask, char * memory) {
    fasa_wait_for_previous();
    fasa_select_stats(args, q, tips, dims, ranges, mask, memory, FASA_SHARED_MEMORY, fasa_here());
}

static __global__ void __launch_bounds__(FASA_THREADS) fasa_keys_kernel(
        fasa_select_args args, const char * q, const char * tips, const int32_t * dims, const float * ranges, const char * mask, const int32_t * forced, char * memory) {
    fasa_wait_for_previous();
    fasa_select_keys(args, q, tips, dims, ranges, mask, forced, memory, FASA_SHARED_MEMORY, fasa_here());
}

static __global__ void __launch_bounds__(FASA_THREADS) fasa_choose_kernel(fasa_select_args args, char * memory, int32_t * ids) {
    fasa_wait_for_previous();

    const fasa_at at = fasa_here();
    uint32_t * shared = (uint32_t *) FASA_SHARED_MEMORY;

    const fasa_threshold threshold = fasa_select_mark(args, memory, shared, at);
    if (fasa_arrive_last(&fasa_divide(args, memory).state[at.y].n_done, args.n_parts, shared)) {
        fasa_select_list(args, threshold, memory, ids, shared, at);
    }
}

template <typename T>
static void fasa_launch_select(T & launcher, const ggml_tensor * op) {
    fasa_select_plan plan(op);

    const char    * q      = (const char    *) op->src[0]->data;
    const char    * tips   = (const char    *) op->src[1]->data;
    const int32_t * dims   = (const int32_t *) op->src[2]->data;
    const char    * mask   = (const char    *) op->src[3]->data;
    const int32_t * forced = op->src[4] ? (const int32_t *) op->src[4]->data : nullptr;
    const float   * ranges = (const float   *) op->src[5]->data;

    char * memory = (char *) launcher.alloc(plan.memory);

    do {
        const dim3 grid(plan.args.n_parts, plan.args.n_rows);
        launcher.launch(fasa_stats_kernel,  grid, plan.shared_stats, plan.args, q, tips, dims, ranges, mask, memory);
        launcher.launch(fasa_keys_kernel,   grid, plan.shared_keys,  plan.args, q, tips, dims, ranges, mask, forced, memory);
        launcher.launch(fasa_choose_kernel, grid, plan.shared_mark,  plan.args, memory, (int32_t *) op->data);
    } while (plan.next());
}

//
// attend
//

template <int LANES, int N>
static __global__ void __launch_bounds__(FASA_THREADS) fasa_split_kernel(
        fasa_attend_args args, const char * q, const char * k, const char * v, const int32_t * idx, const char * mask, float * partial) {
    fasa_wait_for_previous();
    fasa_attend_split<LANES, N>(args, q, k, v, idx, mask, partial, FASA_SHARED_MEMORY, fasa_here());
}

static __global__ void __launch_bounds__(FASA_THREADS) fasa_combine_kernel(fasa_attend_args args, const float * partial, const float * sinks, float * out) {
    fasa_wait_for_previous();
    fasa_attend_combine(args, partial, sinks, out, (float *) FASA_SHARED_MEMORY, fasa_here());
}

// of what is compiled for 8, 16, 32 lanes a row and 1, 4, 8 query heads at once
template <typename KERNEL>
static KERNEL fasa_get_kernel(const KERNEL (& kernels)[3][3], const fasa_attend_plan & plan) {
    return kernels[plan.n_lanes == 8 ? 0 : plan.n_lanes == 16 ? 1 : 2][plan.args.n_tile == 1 ? 0 : plan.args.n_tile == 4 ? 1 : 2];
}

typedef void (*fasa_split_kernel_t)(fasa_attend_args, const char *, const char *, const char *, const int32_t *, const char *, float *);

static constexpr fasa_split_kernel_t FASA_SPLIT_KERNELS[3][3] = {
    { fasa_split_kernel< 8, 1>, fasa_split_kernel< 8, 4>, fasa_split_kernel< 8, 8> },
    { fasa_split_kernel<16, 1>, fasa_split_kernel<16, 4>, fasa_split_kernel<16, 8> },
    { fasa_split_kernel<32, 1>, fasa_split_kernel<32, 4>, fasa_split_kernel<32, 8> },
};

template <typename T>
static void fasa_launch_attend(T & launcher, const ggml_tensor * op) {
    const fasa_attend_plan plan(op, 2*launcher.n_cores, FASA_MAX_TILE);

    const int32_t * idx   = op->src[3] ? (const int32_t *) op->src[3]->data : nullptr;
    const char    * mask  = op->src[4] ? (const char    *) op->src[4]->data : nullptr;
    const float   * sinks = op->src[5] ? (const float   *) op->src[5]->data : nullptr;

    float * partial = (float *) launcher.alloc(plan.memory);

    launcher.launch(fasa_get_kernel(FASA_SPLIT_KERNELS, plan), dim3(plan.args.n_splits, plan.n_units), plan.shared_split, plan.args,
        (const char *) op->src[0]->data, (const char *) op->src[1]->data, (const char *) op->src[2]->data, idx, mask, partial);
    launcher.launch(fasa_combine_kernel, dim3(1, plan.n_lists), plan.shared_combine, plan.args, partial, sinks, (float *) op->data);
}

//
// select and attend in one launch
//

template <int TYPE, int LANES, int N>
static __global__ void __launch_bounds__(FASA_THREADS, N == FASA_MAX_TILE ? 1 : 2) fasa_decode_kernel(fasa_decode_args args, fasa_decode_data data) {
    fasa_decode<TYPE, LANES, N>(args, data, FASA_SHARED_MEMORY, fasa_here());
}

typedef void (*fasa_decode_kernel_t)(fasa_decode_args, fasa_decode_data);

template <int TYPE>
static fasa_decode_kernel_t fasa_get_decode_kernel(const fasa_attend_plan & plan) {
    static constexpr fasa_decode_kernel_t kernels[3][3] = {
        { fasa_decode_kernel<TYPE,  8, 1>, fasa_decode_kernel<TYPE,  8, 4>, fasa_decode_kernel<TYPE,  8, 8> },
        { fasa_decode_kernel<TYPE, 16, 1>, fasa_decode_kernel<TYPE, 16, 4>, fasa_decode_kernel<TYPE, 16, 8> },
        { fasa_decode_kernel<TYPE, 32, 1>, fasa_decode_kernel<TYPE, 32, 4>, fasa_decode_kernel<TYPE, 32, 8> },
    };
    return fasa_get_kernel(kernels, plan);
}

// false: the device cannot hold all blocks at once, the ops have to be launched one after the other
template <typename T>
static bool fasa_launch_decode(T & launcher, const ggml_tensor * select, const ggml_tensor * attend) {
    for (const bool in_shared : { true, false }) {
        for (const int32_t per_core : { 2, 1 }) {
            const fasa_decode_plan     plan(select, attend, per_core*launcher.n_cores, in_shared);
            const bool is_f16 = attend->src[1]->type == GGML_TYPE_F16 && attend->src[2]->type == GGML_TYPE_F16;
            const fasa_decode_kernel_t kernel = is_f16 ? fasa_get_decode_kernel<FASA_TYPE_F16>(plan.attend) : fasa_get_decode_kernel<-1>(plan.attend);

            if (!plan.is_possible(per_core*launcher.n_cores) || launcher.n_resident(kernel, plan.shared) < plan.n_rows*plan.args.select.n_parts) {
                continue;
            }
            fasa_decode_data data;
            data.q        = (const char    *) select->src[0]->data;
            data.tips     = (const char    *) select->src[1]->data;
            data.dims     = (const int32_t *) select->src[2]->data;
            data.ranges   = (const float   *) select->src[5]->data;
            data.mask     = (const char    *) select->src[3]->data;
            data.forced   = select->src[4] ? (const int32_t *) select->src[4]->data : nullptr;
            data.q_attend = (const char    *) attend->src[0]->data;
            data.k        = (const char    *) attend->src[1]->data;
            data.v        = (const char    *) attend->src[2]->data;
            data.sinks    = attend->src[5] ? (const float *) attend->src[5]->data : nullptr;
            data.out      = (float *) attend->data;
            data.memory   = (char *) launcher.alloc(plan.memory);
            data.counters = launcher.counters(FASA_MAX_COUNTERS*FASA_COUNTERS);

            return launcher.launch_together(kernel, dim3(plan.args.select.n_parts, plan.n_rows), plan.shared, plan.args, data);
        }
    }
    return false;
}
