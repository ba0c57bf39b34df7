// What the GPU kernels share: numbers, and sums over the threads of a warp or of a block.
//
// The kernels in this folder are written once for CUDA and Metal, in what both have: C++14 without lambdas, recursion or
// variables of static storage. A pointer or a reference names its address space, which only Metal asks for. Threads run in
// warps of 32 (Metal: SIMD groups). The few words in which the languages differ are in ../cuda/fasa-words.cuh and
// ../metal/fasa-words.h, one of which comes first.
//
// Metal's compiler may take it that no float is infinite or NaN. So what is not finite is found by the bits of what comes
// from memory, never by comparing what was computed.

#pragma once

#include "fasa-args.h"

#define FASA_FLT_MAX 3.402823466e38f
#define FASA_LOG2_E  1.44269504088896f

#define FASA_PREFETCHED 128 // bytes that one request brings

#define FASA_F16_MASKED 0xFC00 // -INFINITY
#define FASA_F16_NAN    0x7E00

// which thread this is, and of which block
struct fasa_at {
    int32_t index;
    int32_t lane;
    int32_t warp;
    int32_t x;
    int32_t y;
};

FASA_FN int32_t fasa_min(int32_t a, int32_t b) { return a < b ? a : b; }
FASA_FN int32_t fasa_max(int32_t a, int32_t b) { return a > b ? a : b; }

FASA_FN bool fasa_is_finite(uint32_t bits)     { return (bits & 0x7F800000u) != 0x7F800000u; } // of a float
FASA_FN bool fasa_is_finite_f16(uint16_t bits) { return (bits & 0x7C00) != 0x7C00; }

FASA_FN float fasa_greater(float a, float b) { return a > b ? a : b; }
FASA_FN float fasa_abs(float x)              { return x < 0.0f ? -x : x; }

// as exact as exp2, where a language's own is not
FASA_FN float fasa_tanh(float x) {
    const float exponent = 2.0f*FASA_LOG2_E*x;
    return 1.0f - fasa_div(2.0f, fasa_exp2(exponent > 126.0f ? 126.0f : exponent) + 1.0f); // NaN stays NaN
}

FASA_FN float fasa_from_bf16(uint16_t x) { return fasa_float((uint32_t) x << 16); }

// as ggml_fp32_to_bf16 does
FASA_FN uint16_t fasa_to_bf16(float x) {
    const uint32_t bits = fasa_bits(x);
    return (uint16_t) ((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 64 : (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

// over the lanes of a warp that differ in bits from..FASA_WARP/2 of their number
FASA_FN float fasa_warp_sum(float x, int32_t from, int32_t to) {
    for (int32_t mask = from; mask < to; mask *= 2) {
        x += fasa_shuffle_xor(x, mask);
    }
    return x;
}

FASA_FN float fasa_warp_max(float x) {
    for (int32_t mask = 1; mask < FASA_WARP; mask *= 2) {
        x = fasa_greater(fasa_shuffle_xor(x, mask), x);
    }
    return x;
}

// sum over the threads before this one; total: over all of the block
// sums: [FASA_WARPS], scratch, not to be written to before all threads have met again
FASA_FN uint32_t fasa_sum_before(fasa_at at, uint32_t x, FASA_SHARED uint32_t * sums, FASA_THREAD uint32_t & total) {
    uint32_t upto = x;
    for (int32_t n = 1; n < FASA_WARP; n *= 2) {
        const uint32_t before = fasa_shuffle_up(upto, n);
        upto += at.lane >= n ? before : 0;
    }
    if (at.lane == FASA_WARP - 1) {
        sums[at.warp] = upto;
    }
    fasa_sync_block();

    uint32_t res = upto - x;
    total = 0;
    for (int32_t i = 0; i < FASA_WARPS; ++i) {
        res   += i < at.warp ? sums[i] : 0;
        total += sums[i];
    }
    return res;
}
