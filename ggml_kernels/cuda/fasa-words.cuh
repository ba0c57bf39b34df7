// What CUDA calls the things that ../gpu/fasa-common.h speaks of.

#pragma once

#include "../gpu/fasa-args.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

// whether blocks of a launch can wait for one another: not on devices that ggml-cuda is compiled for, but that never run FASA
#if CUDART_VERSION >= 11080 && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700)
#    define FASA_BLOCKS_MEET 1
#    include <cuda/atomic>
#else
#    define FASA_BLOCKS_MEET 0
#endif

#define FASA_FN        static __device__ __forceinline__
#define FASA_FN_MEMBER static __device__ __forceinline__
#define FASA_FN_OUTLINED static __device__ __attribute__((noinline))

#define FASA_GLOBAL
#define FASA_SHARED
#define FASA_THREAD

#define FASA_UNROLL _Pragma("unroll")
#define FASA_ROLLED _Pragma("unroll 1") // run once or twice: the code itself has to be fetched

//
// threads among each other
//

FASA_FN void     fasa_sync_block()                        { __syncthreads(); }
FASA_FN void     fasa_sync_block_and_memory()             { __syncthreads(); } // with what it wrote to global memory
FASA_FN uint32_t fasa_ballot(bool x)                      { return __ballot_sync(0xFFFFFFFFu, x); }
FASA_FN float    fasa_shuffle_xor(float x, int32_t mask)  { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
FASA_FN uint32_t fasa_shuffle_xor(uint32_t x, int32_t mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
FASA_FN uint32_t fasa_shuffle_up(uint32_t x, int32_t n)   { return __shfl_up_sync(0xFFFFFFFFu, x, n); }
FASA_FN float    fasa_shuffle(float x, int32_t lane)      { return __shfl_sync(0xFFFFFFFFu, x, lane); }
FASA_FN uint32_t fasa_shuffle(uint32_t x, int32_t lane)   { return __shfl_sync(0xFFFFFFFFu, x, lane); }

FASA_FN uint32_t fasa_atomic_add_shared(FASA_SHARED uint32_t * p, uint32_t x) { return atomicAdd(p, x); }
FASA_FN void     fasa_atomic_or_shared (FASA_SHARED uint32_t * p, uint32_t x) { atomicOr(p, x); }
FASA_FN uint32_t fasa_atomic_add(FASA_GLOBAL uint32_t * p, uint32_t x)        { return atomicAdd(p, x); }
FASA_FN void     fasa_atomic_or (FASA_GLOBAL uint32_t * p, uint32_t x)        { atomicOr(p, x); }

// ask for what will be read soon
FASA_FN void fasa_prefetch(FASA_GLOBAL const void * p) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
#else
    (void) p;
#endif
}

// what another block of the same launch has written
FASA_FN uint32_t fasa_load_shared_by_blocks(FASA_GLOBAL const uint32_t * p) { return __ldcg(p); }
FASA_FN uint64_t fasa_load_shared_by_blocks(FASA_GLOBAL const uint64_t * p) { return __ldcg((const unsigned long long *) p); }

// Blocks that run at the same time meet: each arrives at a counter, with what all of its threads have written, and waits until
// enough have.
FASA_FN void fasa_arrive(FASA_GLOBAL uint32_t * counter) {
    __syncthreads();
#if FASA_BLOCKS_MEET
    if (threadIdx.x == 0) {
        cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(*counter).fetch_add(1, cuda::memory_order_release);
    }
#else
    (void) counter;
#endif
}

FASA_FN void fasa_wait(FASA_GLOBAL uint32_t * counter, uint32_t n) {
#if FASA_BLOCKS_MEET
    if (threadIdx.x == 0) {
        while (cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(*counter).load(cuda::memory_order_acquire) < n) {
        }
    }
#else
    (void) counter; (void) n;
#endif
    __syncthreads();
}

// whether all others of n blocks have come before; what they wrote can be read then. flag: in shared memory
FASA_FN bool fasa_arrive_last(FASA_GLOBAL uint32_t * counter, uint32_t n, FASA_SHARED uint32_t * flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *flag = atomicAdd(counter, 1) == n - 1;
    }
    __syncthreads();
    const bool is_last = *flag;
    __threadfence();
    __syncthreads(); // the flag can be written to again
    return is_last;
}

//
// numbers
//

// of four i8 each
FASA_FN int32_t fasa_dot(int32_t a, int32_t b, int32_t sum) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 610
    return __dp4a(a, b, sum);
#else
    return sum; // compiled for older devices, but never run there
#endif
}

FASA_FN int32_t  fasa_count(uint32_t x)      { return __popc(x); }
FASA_FN int32_t  fasa_first(uint32_t x)      { return __ffs(x) - 1; } // lowest bit set
FASA_FN float    fasa_exp2(float x)          { return exp2f(x); }
FASA_FN float    fasa_log2(float x)          { return log2f(x); }
FASA_FN float    fasa_div(float x, float y)  { return __fdiv_rn(x, y); } // whatever the options say
FASA_FN float    fasa_mul(float x, float y)  { return __fmul_rn(x, y); } // never fused with what comes behind
FASA_FN int32_t  fasa_clz(uint32_t x)        { return __clz(x); }
FASA_FN float    fasa_floor(float x)         { return floorf(x); }
FASA_FN int32_t  fasa_round(float x)         { return __float2int_rn(x); }
FASA_FN uint32_t fasa_bits(float x)          { return __float_as_uint(x); }
FASA_FN float    fasa_float(uint32_t x)      { return __uint_as_float(x); }
FASA_FN float    fasa_from_f16(uint16_t x)   { return __half2float(__ushort_as_half(x)); }
FASA_FN uint16_t fasa_to_f16(float x)        { return __half_as_ushort(__float2half_rn(x)); }
