// What the kernels use of CUDA, on the CPU. Found instead of CUDA's own header by the include path.

#pragma once

#include "../simt.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

#define FASA_SHARED_MEMORY ((char *) simt::shared_memory())

using dim3 = simt::index3;

#define threadIdx simt::thread_index
#define blockIdx  simt::block_index

struct alignas(8)  uint2  { uint32_t x, y; };
struct alignas(8)  float2 { float    x, y; };
struct alignas(16) int4   { int32_t  x, y, z, w; };
struct alignas(16) uint4  { uint32_t x, y, z, w; };
struct alignas(16) float4 { float    x, y, z, w; };

template <typename To, typename From> static inline To simt_cast(From x) {
    static_assert(sizeof(To) <= sizeof(From) || sizeof(To) == 8, "");
    To res {};
    memcpy(&res, &x, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
    return res;
}

static inline void __syncthreads() { simt::sync_block(); }
static inline void __threadfence() {}

// the mask names all lanes: the kernels do not diverge at these
static inline void __syncwarp(uint32_t = 0xFFFFFFFFu) { simt::exchange(0); }

template <typename T> static inline T __shfl_sync(uint32_t, T x, int lane) {
    return simt_cast<T>(simt::exchange(simt_cast<uint64_t>(x))[lane % simt::WARP]);
}

template <typename T> static inline T __shfl_xor_sync(uint32_t, T x, int mask) {
    const int lane = simt::thread_index.x % simt::WARP;
    return simt_cast<T>(simt::exchange(simt_cast<uint64_t>(x))[(lane ^ mask) % simt::WARP]);
}

template <typename T> static inline T __shfl_up_sync(uint32_t, T x, int n) {
    const int lane = simt::thread_index.x % simt::WARP;
    return simt_cast<T>(simt::exchange(simt_cast<uint64_t>(x))[lane >= n ? lane - n : lane]);
}

static inline uint32_t __ballot_sync(uint32_t, bool x) {
    const uint64_t * all = simt::exchange(x);
    uint32_t res = 0;
    for (int i = 0; i < simt::WARP; ++i) {
        res |= (uint32_t) (all[i] != 0) << i;
    }
    return res;
}

// no thread is interrupted
static inline uint32_t atomicAdd(uint32_t * p, uint32_t x) { const uint32_t res = *p; *p += x; simt::after_plain_atomic(p); return res; }
static inline uint32_t atomicOr (uint32_t * p, uint32_t x) { const uint32_t res = *p; *p |= x; simt::after_plain_atomic(p); return res; }

// also of what was written as another type
template <typename T> static inline T simt_load(const T * p) {
    if ((uintptr_t) p % alignof(T) != 0) {
        __builtin_trap();
    }
    T res;
    memcpy(&res, p, sizeof(res));
    return res;
}

static inline uint32_t           __ldcg(const uint32_t * p)           { return simt_load(p); }
static inline unsigned long      __ldcg(const unsigned long * p)      { return simt_load(p); }
static inline unsigned long long __ldcg(const unsigned long long * p) { return simt_load(p); }
static inline float              __ldcg(const float * p)              { return simt_load(p); }
static inline float2             __ldcg(const float2 * p)             { return simt_load(p); }
static inline uint4              __ldcg(const uint4 * p)              { return simt_load(p); }

static inline int32_t __dp4a(int32_t a, int32_t b, int32_t sum) {
    for (int i = 0; i < 4; ++i) {
        sum += (int8_t) ((uint32_t) a >> 8*i)*(int8_t) ((uint32_t) b >> 8*i);
    }
    return sum;
}

static inline float    __fdiv_rn(float x, float y) { return x/y; }
static inline float    __fmul_rn(float x, float y) { return x*y; }
static inline int32_t  __clz(uint32_t x)           { return x ? __builtin_clz(x) : 32; }
static inline int32_t  __popc(uint32_t x)          { return __builtin_popcount(x); }
static inline int32_t  __ffs(uint32_t x)           { return __builtin_ffs((int) x); }
static inline int32_t  __float2int_rn(float x)     { return (int32_t) std::nearbyint(x); }
static inline uint32_t __float_as_uint(float x)    { return simt_cast<uint32_t>(x); }
static inline float    __uint_as_float(uint32_t x) { return simt_cast<float>(x); }
