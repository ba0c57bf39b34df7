// Half precision numbers of CUDA, on the CPU.

#pragma once

#include "ggml.h"

struct half { ggml_fp16_t bits; };

static inline half        __ushort_as_half(uint16_t x) { return { x }; }
static inline uint16_t    __half_as_ushort(half x)     { return x.bits; }
static inline float       __half2float(half x)         { return ggml_fp16_to_fp32(x.bits); }
static inline half        __float2half_rn(float x)     { return { ggml_fp32_to_fp16(x) }; }
