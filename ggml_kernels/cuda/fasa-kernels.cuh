// The entry points of the kernels in CUDA, and their launches.
//
// Stands alone, so that it compiles without the rest of ggml-cuda. A launcher, which fasa.cu makes of a stream of ggml-cuda,
// has
//
//   int32_t n_cores                                         multiprocessors of the device
//   void *  alloc(size_t size)                              device memory until the launches are through, once
//   void    launch(kernel, dim3 grid, size_t shared, ...)   kernel<<<grid, FASA_THREADS, shared>>>(...)

#pragma once

#include "fasa-words.cuh"

#include "../gpu/fasa-store.h"
#include "../gpu/fasa-choose.h"
#include "../gpu/fasa-attend.h"
#include "../gpu/fasa-plan.h"

// A kernel can be launched before the one in front of it has ended, if it waits here before it reads or writes anything.
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

extern __shared__ int4 fasa_shared[]; // for its alignment

//
// store
//

static __global__ void __launch_bounds__(FASA_THREADS) fasa_store_kernel(
        fasa_store_args args, char * tips, const char * k, const int32_t * dims, const int64_t * idxs) {
    fasa_wait_for_previous();
    fasa_store(args, tips, k, dims, idxs, fasa_here());
}

template <typename T>
static void fasa_launch_store(T & launcher, const ggml_tensor * op) {
    const fasa_store_plan plan(op);
    launcher.launch(fasa_store_kernel, dim3(plan.n_blocks), 0, plan.args, (char *) op->src[0]->data, (const char *) op->src[1]->data,
        (const int32_t *) op->src[2]->data, (const int64_t *) op->src[3]->data);
}

//
// select
//

static __global__ void __launch_bounds__(FASA_THREADS) fasa_stats_kernel(
        fasa_select_args args, const char * q, const char * tips, const int32_t * dims, const char * mask, char * memory) {
    fasa_wait_for_previous();
    fasa_select_stats(args, q, tips, dims, mask, memory, (char *) fasa_shared, fasa_here());
}

static __global__ void __launch_bounds__(FASA_THREADS) fasa_keys_kernel(
        fasa_select_args args, const char * q, const char * tips, const int32_t * dims, const char * mask, const int32_t * forced, char * memory) {
    fasa_wait_for_previous();
    fasa_select_keys(args, q, tips, dims, mask, forced, memory, (char *) fasa_shared, fasa_here());
}

// whether all other blocks of the row have come here before, with all that they wrote
static __device__ bool fasa_is_last_block(const fasa_select_args & args, char * memory, uint32_t * is_last, fasa_at at) {
    __threadfence();
    __syncthreads();
    if (at.index == 0) {
        *is_last = atomicAdd(&fasa_divide(args, memory).state[at.y].n_done, 1) == (uint32_t) args.n_chunks - 1;
    }
    __syncthreads();
    const bool res = *is_last;
    __threadfence();
    __syncthreads(); // is_last can be used again
    return res;
}

static __global__ void __launch_bounds__(FASA_THREADS) fasa_choose_kernel(fasa_select_args args, char * memory, int32_t * ids) {
    fasa_wait_for_previous();

    const fasa_at at = fasa_here();
    uint32_t * shared = (uint32_t *) fasa_shared;

    const fasa_threshold threshold = fasa_select_mark(args, memory, shared, at);
    if (fasa_is_last_block(args, memory, shared, at)) {
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

    char * memory = (char *) launcher.alloc(plan.memory);

    do {
        const dim3 grid(plan.args.n_chunks, plan.args.n_rows);
        launcher.launch(fasa_stats_kernel,  grid, plan.shared_stats, plan.args, q, tips, dims, mask, memory);
        launcher.launch(fasa_keys_kernel,   grid, plan.shared_keys,  plan.args, q, tips, dims, mask, forced, memory);
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
    fasa_attend_split<LANES, N>(args, q, k, v, idx, mask, partial, (char *) fasa_shared, fasa_here());
}

static __global__ void __launch_bounds__(FASA_THREADS) fasa_combine_kernel(fasa_attend_args args, const float * partial, const float * sinks, float * out) {
    fasa_wait_for_previous();
    fasa_attend_combine(args, partial, sinks, out, fasa_here());
}

typedef void (*fasa_split_kernel_t)(fasa_attend_args, const char *, const char *, const char *, const int32_t *, const char *, float *);

static fasa_split_kernel_t fasa_get_split_kernel(const fasa_attend_plan & plan) {
    static constexpr fasa_split_kernel_t kernels[3][3] = {
        { fasa_split_kernel< 8, 1>, fasa_split_kernel< 8, 4>, fasa_split_kernel< 8, 8> },
        { fasa_split_kernel<16, 1>, fasa_split_kernel<16, 4>, fasa_split_kernel<16, 8> },
        { fasa_split_kernel<32, 1>, fasa_split_kernel<32, 4>, fasa_split_kernel<32, 8> },
    };
    return kernels[plan.n_lanes == 8 ? 0 : plan.n_lanes == 16 ? 1 : 2][plan.args.n_tile == 1 ? 0 : plan.args.n_tile == 4 ? 1 : 2];
}

template <typename T>
static void fasa_launch_attend(T & launcher, const ggml_tensor * op) {
    const fasa_attend_plan plan(op, 2*launcher.n_cores, FASA_MAX_TILE);

    const int32_t * idx   = op->src[3] ? (const int32_t *) op->src[3]->data : nullptr;
    const char    * mask  = op->src[4] ? (const char    *) op->src[4]->data : nullptr;
    const float   * sinks = op->src[5] ? (const float   *) op->src[5]->data : nullptr;

    float * partial = (float *) launcher.alloc(plan.memory);

    launcher.launch(fasa_get_split_kernel(plan), dim3(plan.args.n_splits, plan.n_units), plan.shared, plan.args,
        (const char *) op->src[0]->data, (const char *) op->src[1]->data, (const char *) op->src[2]->data, idx, mask, partial);
    launcher.launch(fasa_combine_kernel, dim3(plan.n_rows), 0, plan.args, partial, sinks, (float *) op->data);
}
