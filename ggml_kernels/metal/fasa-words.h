// What Metal calls the things that ../gpu/fasa-common.h speaks of.

#pragma once

#include <metal_stdlib>

#include "../gpu/fasa-args.h"

using namespace metal;

#define FASA_FN        static inline
#define FASA_FN_MEMBER static inline
#define FASA_FN_OUTLINED static __attribute__((noinline))

#define FASA_GLOBAL device
#define FASA_SHARED threadgroup
#define FASA_THREAD thread

#define FASA_UNROLL _Pragma("clang loop unroll(full)")
#define FASA_ROLLED _Pragma("clang loop unroll(disable)") // run once or twice

// an emulator, to which threadgroup is no word, has another
#ifndef FASA_SHARED_ARGUMENT
#    define FASA_SHARED_ARGUMENT [[threadgroup(0)]]
#endif

//
// threads among each other
//

FASA_FN void     fasa_sync_block()                       { threadgroup_barrier(mem_flags::mem_threadgroup); }
FASA_FN void     fasa_sync_block_and_memory()            { threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device); }
FASA_FN uint32_t fasa_ballot(bool x)                     { return (uint32_t) (simd_vote::vote_t) simd_ballot(x); }
FASA_FN float    fasa_shuffle_xor(float x, int32_t mask) { return simd_shuffle_xor(x, (ushort) mask); }
FASA_FN uint32_t fasa_shuffle_xor(uint32_t x, int32_t mask) { return simd_shuffle_xor(x, (ushort) mask); }
FASA_FN uint32_t fasa_shuffle_up(uint32_t x, int32_t n)  { return simd_shuffle_up(x, (ushort) n); }
FASA_FN float    fasa_shuffle(float x, int32_t lane)     { return simd_shuffle(x, (ushort) lane); }
FASA_FN uint32_t fasa_shuffle(uint32_t x, int32_t lane)  { return simd_shuffle(x, (ushort) lane); }

FASA_FN uint32_t fasa_atomic_add_shared(FASA_SHARED uint32_t * p, uint32_t x) {
    return atomic_fetch_add_explicit((FASA_SHARED atomic_uint *) p, x, memory_order_relaxed);
}

FASA_FN void fasa_atomic_or_shared(FASA_SHARED uint32_t * p, uint32_t x) {
    atomic_fetch_or_explicit((FASA_SHARED atomic_uint *) p, x, memory_order_relaxed);
}

FASA_FN uint32_t fasa_atomic_add(FASA_GLOBAL uint32_t * p, uint32_t x) {
    return atomic_fetch_add_explicit((FASA_GLOBAL atomic_uint *) p, x, memory_order_relaxed);
}

FASA_FN void fasa_atomic_or(FASA_GLOBAL uint32_t * p, uint32_t x) {
    atomic_fetch_or_explicit((FASA_GLOBAL atomic_uint *) p, x, memory_order_relaxed);
}

// there is no such request in Metal
FASA_FN void fasa_prefetch(FASA_GLOBAL const void * p) { (void) p; }

// what other threads have written by atomics
FASA_FN uint32_t fasa_load_shared_by_blocks(FASA_GLOBAL const uint32_t * p) {
    return atomic_load_explicit((FASA_GLOBAL const atomic_uint *) p, memory_order_relaxed);
}

// there are no atomics of 64 bits: of another dispatch only
FASA_FN uint64_t fasa_load_shared_by_blocks(FASA_GLOBAL const uint64_t * p) { return *p; }

//
// numbers
//

// of four i8 each
FASA_FN int32_t fasa_dot(int32_t a, int32_t b, int32_t sum) {
    const int4 products = int4(as_type<char4>(a))*int4(as_type<char4>(b));
    return sum + products.x + products.y + products.z + products.w;
}

FASA_FN int32_t  fasa_count(uint32_t x)    { return (int32_t) popcount(x); }
FASA_FN int32_t  fasa_first(uint32_t x)    { return (int32_t) ctz(x); } // lowest bit set
FASA_FN float    fasa_exp2(float x)        { return metal::exp2(x); }
FASA_FN float    fasa_log2(float x)        { return metal::log2(x); }
FASA_FN float    fasa_div(float x, float y) { return precise::divide(x, y); }
FASA_FN float    fasa_mul(float x, float y) { return x*y; }
FASA_FN int32_t  fasa_clz(uint32_t x)      { return (int32_t) clz(x); }
FASA_FN float    fasa_floor(float x)       { return metal::floor(x); }
FASA_FN int32_t  fasa_round(float x)       { return (int32_t) metal::rint(x); }
FASA_FN uint32_t fasa_bits(float x)        { return as_type<uint32_t>(x); }
FASA_FN float    fasa_float(uint32_t x)    { return as_type<float>(x); }
FASA_FN float    fasa_from_f16(uint16_t x) { return (float) as_type<half>(x); }
FASA_FN uint16_t fasa_to_f16(float x)      { return as_type<uint16_t>((half) x); }
